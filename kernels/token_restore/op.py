"""Decoder input: mask tokens and positions.  Shapes: B batch, L patches, K kept patches, E decoder width."""

from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_indices, check_storage, choose
from mimir_fast.kernels.token_restore import reference


def token_restore(
    tokens_BKE: Tensor, mask_token_E: Tensor, pos_embed_LE: Tensor, ids_shuffle_BL: Tensor, impl: str = "auto"
) -> Tensor:
    """Decoder input of a masked autoencoder: class token, kept patches, then a mask token per removed patch, plus positions.

    Tokens stay in shuffled order, each with its own patch's position: attention does not depend on their order.

    formula      out[b,0] = tokens[b,0] + pos[0];
                 out[b,1+r] = (tokens[b,1+r] if r < K else mask_token) + pos[1+ids_shuffle[b,r]]
    shapes       tokens [B,1+K,E] (class token first), mask_token [E], pos_embed [1+L,E], ids_shuffle [B,L] -> [B,1+L,E]
    dtypes       output in the promoted dtype of tokens and position table; differentiable in tokens and mask token
    bytes        tokens and indices read once, the position table once per image (from cache), the output written once;
                 backward: the removed patches' gradient read once; the tokens' gradient is a view
    determinism  exact forward; the mask token's gradient is a sum over B*(L-K) rows in a fixed order
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits.
    Raises ValueError if shapes or devices disagree, or an element type or impl is not on offer.
    """
    if ids_shuffle_BL.ndim != 2:
        raise ValueError(f"ids_shuffle: expected [B,L], got {tuple(ids_shuffle_BL.shape)}")
    B, L = ids_shuffle_BL.shape
    E = tokens_BKE.shape[-1]
    if tokens_BKE.ndim != 3 or tokens_BKE.shape[0] != B or not 1 <= tokens_BKE.shape[1] <= L + 1:
        raise ValueError(f"tokens: expected [{B},1+K,E] with K <= {L}, got {tuple(tokens_BKE.shape)}")
    if mask_token_E.shape != (E,):
        raise ValueError(f"mask_token: expected [{E}], got {tuple(mask_token_E.shape)}")
    if pos_embed_LE.shape != (L + 1, E):
        raise ValueError(f"pos_embed: expected [{L + 1},{E}], got {tuple(pos_embed_LE.shape)}")
    floats = {"tokens": tokens_BKE, "mask_token": mask_token_E, "pos_embed": pos_embed_LE}
    check_floats(tokens_BKE.device, **floats)
    check_indices(tokens_BKE.device, ids_shuffle=ids_shuffle_BL)
    if choose(impl, tokens_BKE) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.token_restore import kernel

        check_storage(**floats)
        # MIMIR's decoder has a fixed sine-cosine table: the kernel computes no gradient for it.
        if pos_embed_LE.requires_grad:
            raise ValueError("pos_embed: the triton implementation takes a fixed table; impl='reference' trains it")
        return kernel.token_restore(tokens_BKE, mask_token_E, pos_embed_LE, ids_shuffle_BL)
    return reference.token_restore(tokens_BKE, mask_token_E, pos_embed_LE, ids_shuffle_BL)
