"""Which generation a GPU is of: kernels have other tile sizes for each."""

import torch

from mimir_fast.kernels._shared.launch import memoised


@memoised
def generation_of(device: torch.device) -> int:
    """8 an A100, 9 an H100; the CPU, where the interpreter runs, counts as 9."""
    # The generation alone, so that sums have the same order on all its GPUs, with however many multiprocessors.
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
