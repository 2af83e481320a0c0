"""linf_start in plain PyTorch: Philox 4x32-10 in int64 arithmetic, the same numbers as the kernel bit for bit."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.bytes import as_floats, float_of

# Philox's own: the multipliers of a round, and what each word of the key grows by (golden ratio, sqrt(3) - 1).
ROUND_A, ROUND_B, KEY_A, KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
# Just under 2^-31, so that the largest int32 maps below 1; the constant that tl.rand uses.
UNIT = 4.6566127342e-10


def linf_start(images_BCHW: Tensor, bounds_4C: Tensor, seed: Tensor) -> Tensor:
    """See op.py; [B,C,H,W] in the images' dtype, fp32 for uint8."""
    eps, _, lo, hi = bounds_4C.float()[:, :, None, None]
    images = as_floats(images_BCHW).float()
    noise = eps * (2 * uniform(seed, images.numel()).view(images.shape) - 1)
    return torch.clamp(images + noise, lo, hi).to(float_of(images_BCHW))


def uniform(seed: Tensor, count: int) -> Tensor:
    """`count` fp32 numbers in [0,1): element n is word n % 4 of Philox block n // 4, keyed by the 64-bit seed."""
    block = torch.arange((count + 3) // 4, device=seed.device)
    words = torch.stack(philox(seed.reshape(()), block), dim=1).flatten()[:count]
    # Words with the top bit set are complemented, not shifted: the mapping of tl.rand, which the kernel uses.
    return torch.where(words > LOW >> 1, words ^ LOW, words).float() * UNIT


def philox(seed: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) for each 64-bit counter in `block`."""
    k0, k1 = seed & LOW, seed >> 32 & LOW
    c0, c1 = block & LOW, block >> 32 & LOW
    c2 = c3 = torch.zeros_like(block)
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = _multiply(ROUND_A, c0), _multiply(ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + KEY_A & LOW, k1 + KEY_B & LOW
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word."""
    # The product of two 32-bit numbers overflows int64; (constant - 2^32) * word does not, and is added back below.
    product = (constant - (1 << 32)) * word
    return (product >> 32) + word & LOW, product & LOW
