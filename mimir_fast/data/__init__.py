"""Pre-training data: deterministic, resumable batches of uint8 images from every supported data set."""

from mimir_fast.data.augment import to_float
from mimir_fast.data.datasets import DATASETS
from mimir_fast.data.errors import DataError
from mimir_fast.data.prefetch import prefetch
from mimir_fast.data.stream import BatchStream, build_pretrain_data

__all__ = ["DATASETS", "BatchStream", "DataError", "build_pretrain_data", "prefetch", "to_float"]
