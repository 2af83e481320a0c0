"""Data loading: deterministic, resumable batches of uint8 images and labels from every supported data set."""

from mimir_fast.data.build import build_pretrain_data, build_train_data
from mimir_fast.data.crops import to_float
from mimir_fast.data.datasets import DATASETS, dataset_info
from mimir_fast.data.errors import DataError
from mimir_fast.data.eval_stream import EvalStream, eval_batches
from mimir_fast.data.mixing import Mixing, mix, mix_as_drawn, mixing_draws, mixing_seed, warmup_mixing
from mimir_fast.data.policies import Augment, warmup_augment
from mimir_fast.data.prefetch import prefetch
from mimir_fast.data.splits import subset_indices
from mimir_fast.data.stream import BatchStream

__all__ = [
    "DATASETS",
    "Augment",
    "BatchStream",
    "DataError",
    "EvalStream",
    "Mixing",
    "build_pretrain_data",
    "build_train_data",
    "dataset_info",
    "eval_batches",
    "mix",
    "mix_as_drawn",
    "mixing_draws",
    "mixing_seed",
    "prefetch",
    "subset_indices",
    "to_float",
    "warmup_augment",
    "warmup_mixing",
]
