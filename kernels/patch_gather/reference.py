"""patch_gather in plain PyTorch."""

from torch import Tensor


def patch_gather(images_BCHW: Tensor, ids_keep_BK: Tensor, patch_size: int) -> Tensor:
    """See op.py: images [B,C,H,W], ids_keep [B,K] -> [B,K,C*p*p] in (channel, row, column) order."""
    B, C, H, W = images_BCHW.shape
    p = patch_size
    grid_BLP = images_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    return grid_BLP.gather(1, ids_keep_BK[:, :, None].expand(-1, -1, C * p * p))
