"""The tensor operations of MIMIR pre-training, one folder per operation.

Every folder holds `op.py` (contract and argument checks) and `reference.py` (the specification in plain PyTorch).
The import name is `mimir_fast.kernels`: the bare name `kernels` belongs to another distribution.
"""

# From a checkout's root `import kernels` would find this folder, and load every operation a second time.
if __name__ != "mimir_fast.kernels":
    raise ImportError("this folder is the package mimir_fast.kernels: import it by that name")

from mimir_fast.kernels.add_layer_norm.op import add_layer_norm
from mimir_fast.kernels.crop_resize.op import crop_resize
from mimir_fast.kernels.crop_resize_yuv420.op import crop_resize_yuv420
from mimir_fast.kernels.linf_patch_step.op import linf_bounds, linf_patch_step
from mimir_fast.kernels.linf_start.op import linf_start
from mimir_fast.kernels.mask_indices.op import mask_indices
from mimir_fast.kernels.masked_patch_loss.op import masked_patch_loss
from mimir_fast.kernels.mlp.op import mlp
from mimir_fast.kernels.nhsic.op import nhsic, ridge_inverse
from mimir_fast.kernels.patch_gather.op import patch_gather
from mimir_fast.kernels.short_attention.op import short_attention
from mimir_fast.kernels.token_restore.op import token_restore

__all__ = [
    "add_layer_norm",
    "crop_resize",
    "crop_resize_yuv420",
    "linf_bounds",
    "linf_patch_step",
    "linf_start",
    "mask_indices",
    "masked_patch_loss",
    "mlp",
    "nhsic",
    "patch_gather",
    "ridge_inverse",
    "short_attention",
    "token_restore",
]
