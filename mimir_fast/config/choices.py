"""The closed sets of words that flags take.  Each stands at its flag once, and whoever acts on a word imports its set here.

Sets that are a table's keys stand with it: data sets in mimir_fast/data/datasets.py, implementations of operations in
kernels/_shared/registration.py, models in mimir_fast/models/families/, formats of exports in mimir_fast/config/export.py.
"""

# pre-training
ATTACKS = ("plain", "pgd_mae")
PENALTIES = ("hsic", "dib_mi", "renyi2")
MI_TRAIN = ("plain", *PENALTIES)

# fine-tuning
TRAINING_ATTACKS = ("plain", "pgd", "trades", "mart", "apgd")
MI_LOSS = ("plain", "dib_mi")
ALPHA_SCHEDULES = ("constant", "linear", "cosine")
EDM_AUGMENTATIONS = ("none", "base", "cutout", "autoaugment", "randaugment", "idbh")
REMODES = ("const", "rand", "pixel")
MIXUP_MODES = ("batch", "pair", "elem")

# how a step is computed
PRECISIONS = ("bf16", "fp16", "fp32")
RESIDUAL_DTYPES = ("fp32", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_REGIONS = ("model", "block")
ATTENTION = ("auto", "short", "narrow", "sdpa", "flash_attn", "xformers", "math")
PARALLEL = ("ddp", "fsdp")
GRAD_COMPRESSION = ("none", "bf16")

# who decides what a word means
COMPAT = ("none", "original")

# evaluate and analyze
SPLITS = ("val", "train", "held_out")
BANDWIDTHS = ("squared", "distance")
