"""Pre-training objective: reconstruction loss + weight * mutual-information penalty.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P numbers per patch, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.kernels.nhsic.op import Inverse
from mimir_fast.models import MaskedAutoencoder
from mimir_fast.objectives.information import compared, penalty_value
from mimir_fast.training.distributed import World
from mimir_fast.training.stages import stage
from mimir_fast.training.step_graph import leaves, outside


class PretrainOutput(NamedTuple):
    """Results of a micro-step, tensors on the device.

    loss           recon + weight * mi, scalar; on CUDA, as mi and penalty_used, written by the end of the backward pass
    recon, mi      reconstruction loss, and the penalty without its weight, scalars
    penalty_used   whether the penalty is usable and part of the loss, bool scalar
    adv            adversarial images [B,C,H,W]
    pred           predictions [B,M,P] of the removed patches ids_removed [B,M]
    """

    loss: Tensor
    recon: Tensor
    mi: Tensor
    penalty_used: Tensor
    adv: Tensor
    pred: Tensor
    ids_removed: Tensor

    @property
    def checked(self) -> Tensor:
        """What the backward pass asks whether it is finite: what the penalty adds to the loss always is."""
        return self.recon


class ReconstructionObjective(nn.Module):
    """Reconstruction loss + weight * penalty of a masked autoencoder: the module that is trained, and that DDP wraps.

    penalty               hsic, dib_mi, renyi2 or None; used with an attack only, as in the original
    encode, reconstruct   compiled versions of the model's methods; None: the methods themselves
    gathered              the processes whose batches the penalty compares together; None: this process's own batch alone
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        mask_ratio: float = 0.75,
        penalty: str | None = None,
        weight: float = 0.0,
        encode: Callable[..., Tensor] | None = None,
        reconstruct: Callable[..., tuple[Tensor, Tensor]] | None = None,
        gathered: World | None = None,
    ):
        super().__init__()
        self.model, self.mask_ratio, self.penalty, self.weight = model, mask_ratio, penalty, weight
        self.gathered = gathered
        self.encode, self.reconstruct = encode or model.encode, reconstruct or model.reconstruct
        # The penalty needs the latent alone, and has too little work for a GPU: it runs beside the decoder's two passes.
        device = next(model.parameters()).device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" and penalty else None

    def forward(self, images: Tensor, adv: Tensor | None, noise_BL: Tensor, *plan: Tensor) -> PretrainOutput:
        """images [B,C,H,W]; adv, their adversarial version or None; noise [B,L] decides the mask; plan: nothing, or that of the
        mask (MaskedAutoencoder.host_plan)."""
        if self.penalty is not None and adv is not None:
            return self._penalised(self.penalty, images, adv, noise_BL, *plan)
        seen = images if adv is None else adv
        latent, ids_shuffle = self._encoded(seen, noise_BL, *plan)
        recon, pred, ids_removed = self._decoded(latent, ids_shuffle, images)
        # There is nothing to skip, hence True: skipped penalties are counted from this.
        none, used = torch.zeros_like(recon), torch.ones_like(recon, dtype=torch.bool)
        return PretrainOutput(recon, recon.detach(), none, used, seen, pred, ids_removed)

    def _penalised(self, penalty: str, images: Tensor, adv: Tensor, noise_BL: Tensor, *plan: Tensor) -> PretrainOutput:
        # dib_mi waits for eigenvalues.
        between_graphs = leaves("penalty", always=penalty == "dib_mi")
        side = None if between_graphs else self.side
        kernels, gather = self.model.kernels, None if self.gathered is None else self.gathered.gather
        with _beside(side), stage("penalty"):
            x = None if between_graphs else compared(penalty, images, adv, kernels, gather)
        latent, ids_shuffle = self._encoded(adv, noise_BL, *plan)

        def value_and_gradient() -> tuple[Tensor, Tensor, Tensor]:
            with stage("penalty"):
                known = compared(penalty, images, adv, kernels, gather) if x is None else x
                return guarded_penalty(penalty, latent, known, kernels, self.gathered)

        with _beside(side):
            mi, used, grad = outside(value_and_gradient) if between_graphs else value_and_gradient()
        # What the side stream reads must not be given to others before the streams are joined.
        read = [latent.detach(), images, adv]
        joined, share = PenaltyGradient.apply(latent, grad, side, read)
        recon, pred, ids_removed = self._decoded(joined, ids_shuffle, images)
        read.append(recon.detach())
        with _beside(side):
            value = recon.detach() + self.weight * torch.where(used, mi, 0)
        if side and not recon.requires_grad:
            torch.cuda.current_stream().wait_stream(side)
        loss = PenalisedLoss.apply(recon, share, value, self.weight)
        return PretrainOutput(loss, recon.detach(), mi, used, adv, pred, ids_removed)

    def _encoded(self, seen: Tensor, noise_BL: Tensor, *plan: Tensor) -> tuple[Tensor, Tensor]:
        """Latent of the images seen, and ids_shuffle [B,L]."""
        with stage("encoder"):
            ids_shuffle, _, keep = self.model.random_masking(noise_BL, self.mask_ratio)
            ids_keep = ids_shuffle[:, :keep]
            return self.encode(self.model.visible(seen, ids_keep), ids_keep, *plan), ids_shuffle

    def _decoded(self, latent: Tensor, ids_shuffle: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predictions, ids_removed [B,M]."""
        with stage("decoder"):
            recon, pred = self.reconstruct(latent, ids_shuffle, images)
        return recon, pred, ids_shuffle[:, -pred.shape[1] :]


def _beside(side: torch.cuda.Stream | None) -> torch.cuda.StreamContext:
    """Context whose work runs on the side stream, if there is one, after all work so far."""
    # Memory that both streams use is safe from reuse: every use begins with this wait and ends with that of PenaltyGradient.
    if side:
        side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def guarded_penalty(
    penalty: str, latent: Tensor, x: Tensor | Inverse, kernels: str, gathered: World | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty's value, whether it is usable, and its gradient in the latent (zero if unusable).

    Usable: finite, not exactly zero, gradient finite.
    x          from `compared`, of all images that are compared together
    gathered   processes, which all call, whose batches these are: every process gets the value of them all, and in its own
               latent a gradient whose mean over processes is that of one process that holds all images
    """
    # Its gradient is computed here, apart from that of the reconstruction, so that a NaN can be left out on the device.
    with torch.enable_grad():
        leaf = (latent if gathered is None else gathered.gather(latent)).detach().requires_grad_(True)
        value = penalty_value(penalty, leaf, x, kernels)
        (grad,) = torch.autograd.grad(value, leaf)
    value = value.detach()
    # Usable or not for all processes alike: each has computed the whole.
    # The original's penalty is exactly 0 where a matrix could not be inverted, and is then left out.
    # One pass over the gradient, whose extremes are NaN where any number is: isfinite of each takes five.
    used = value.isfinite() & (value != 0) & torch.stack(torch.aminmax(grad)).isfinite().all()
    if gathered is not None:
        # Gradients of parameters are averaged over processes, and each has its own images' part of the sum alone.
        grad = gathered.own(grad) * gathered.size
    return value, used, torch.where(used, grad, 0)


class PenaltyGradient(torch.autograd.Function):
    """The latent as it is, into whose gradient the penalty's comes: after the decoder's backward pass, which it runs beside.

    grad   the penalty's gradient in the latent; side: the stream that computes it, or None
    read   tensors that this stream reads
    Returns the latent and a scalar without a value, whose gradient is the weight of `grad`.
    """

    @staticmethod
    def forward(ctx, latent: Tensor, grad: Tensor, side: torch.cuda.Stream | None, read: list[Tensor]):
        ctx.save_for_backward(grad)
        ctx.side, ctx.read = side, read
        return latent.view_as(latent), torch.empty((), dtype=torch.float32, device=latent.device)

    @staticmethod
    def backward(ctx, grad_latent: Tensor, weight: Tensor):
        if ctx.side:
            torch.cuda.current_stream().wait_stream(ctx.side)
        ctx.read.clear()
        (grad,) = ctx.saved_tensors
        return grad_latent + weight * grad, None, None, None


class PenalisedLoss(torch.autograd.Function):
    """The penalised loss, given as value, with the gradients of recon + weight * share: no kernel waits for the value."""

    @staticmethod
    def forward(ctx, recon: Tensor, share: Tensor, value: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # It carries the accumulation's divisor and the loss scale of fp16.
        return grad, grad * ctx.weight, None, None
