"""The floating-point operations a model's step needs per image, whatever computes them: for MFU."""

import torch

from bench.step.pricing import Setting, price
from bench.step.trace import record
from bench.step.variants import StepConfig, build_step

# computes like no other setting, but every product is one that the recorder sees
PLAIN = {
    "device": "cpu",
    "batch_size": 1,
    "accum_iter": 1,
    "precision": "fp32",
    "residual_dtype": "fp32",
    "compile": False,
    "compile_region": "model",
    "parallel": "ddp",
    "kernels": "reference",
    "mlp": "reference",
    "attention": "math",
    "activation_checkpointing": False,
    "use_normalize": False,
    "mi_train": "plain",
    "mi_loss": "plain",
}


def model_flops(config: StepConfig) -> float:
    """FLOPs of the matrix products and attention of one image: attack, forward and backward pass; a multiply-add is two.

    Counted on a step of one image on the CPU.  Not counted: the penalty, elementwise work, what activation checkpointing
    computes twice.
    """
    plain = {name: value for name, value in PLAIN.items() if name in config.flags()}
    step = build_step("ours", config.updated(plain), torch.device("cpu"))
    return sum(sum(p.flops.values()) for call in record(step, "cpu") for p in price(call, Setting()))
