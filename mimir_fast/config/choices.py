"""Choices of flags: the closed sets of words that they take, each defined once, for the flag and for the code that acts on it.

Sets that are the keys of a table are defined with it: data sets in mimir_fast/data/datasets.py, implementations of operations
in kernels/_shared/registration.py, models in mimir_fast/models/families/, formats of exports in mimir_fast/config/export.py.
"""

# Pre-training.
ATTACKS = ("plain", "pgd_mae")
PENALTIES = ("hsic", "dib_mi", "renyi2")
MI_TRAIN = ("plain", *PENALTIES)
PENALTY_BATCHES = ("local", "global")

# Fine-tuning.
TRAINING_ATTACKS = ("plain", "pgd", "trades", "mart", "apgd", "pgd_best")
MI_LOSS = ("plain", "dib_mi")
ALPHA_SCHEDULES = ("constant", "linear", "cosine")
EDM_AUGMENTATIONS = ("none", "base", "cutout", "autoaugment", "randaugment", "idbh")
REMODES = ("const", "rand", "pixel")
MIXUP_MODES = ("batch", "pair", "elem")

# Where the cosine of the learning rate begins.
AFTER_WARMUP, AT_START = COSINE_FROM = ("warmup", "start")

# How a step is computed.
PRECISIONS = ("bf16", "fp16", "fp32")
RESIDUAL_DTYPES = ("fp32", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_REGIONS = ("model", "block")
STEP_GRAPH = ("auto", "off")
# PyTorch's own kernels by name; sdpa lets PyTorch choose.
SDPA_BACKENDS = ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient")
ATTENTION = ("auto", "short", "narrow", "sdpa", *SDPA_BACKENDS, "flash_attn", "xformers", "math")
PARALLEL = ("ddp", "fsdp")
GRAD_COMPRESSION = ("none", "bf16")

# Who decides what a word means, and what some models compute.
NONE, ORIGINAL = COMPAT = ("none", "original")

# Evaluation and analysis.
SPLITS = ("val", "train", "held_out")
EVAL_RESIZE = ("crop", "none")
BANDWIDTHS = ("squared", "distance")
