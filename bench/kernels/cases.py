"""Every operation at the sizes of the recipes: one table, the most important operation first.  tests/support/cases.py: a case.

Recipes draw images and noise in fp32; `dtype` is the storage of activations and 16-bit weights, and where an operation has no
activations, of its images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, rand, randn

from bench.kernels import rivals
from mimir_fast import kernels
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.pretraining_recipes import cifar10_vit_s, imagenet_vit_b, imagenet_vit_s
from mimir_fast.kernels.mlp import op as mlp
from mimir_fast.kernels.short_attention import op as short_attention
from mimir_fast.models.families import find
from tests.support.budget import beyond_budget
from tests.support.cases import DTYPES, Case, Inputs


@dataclass(frozen=True)
class Size:
    """B images of `side` pixels in patches of p, K of them kept; D, N width and heads of the encoder, E, R of the decoder.

    T: tokens of a block, by `block`, whose width and heads are D and N then.
    """

    B: int
    side: int
    p: int
    K: int
    D: int
    N: int
    E: int
    R: int
    T: int = 0

    def block(self, part: str) -> "Size":
        if part == "decoder":
            return replace(self, T=1 + self.L, D=self.E, N=self.R)
        return replace(self, T=1 + self.K)

    L = property(lambda self: (self.side // self.p) ** 2)  # patches
    M = property(lambda self: self.L - self.K)  # of them removed
    P = property(lambda self: 3 * self.p**2)  # numbers of a patch
    F = property(lambda self: 4 * self.D)  # hidden width of an MLP
    m = property(lambda self: self.B)  # rows of the penalty, their widths
    d = property(lambda self: (1 + self.K) * self.D)
    e = property(lambda self: 3 * self.side**2)
    h = property(lambda self: self.side * 5 // 4)  # windows of a cache's images
    w = property(lambda self: self.side * 2)


# ---- inputs


def images(s: Size) -> Tensor:
    return rand(s.B, 3, s.side, s.side)


def order(s: Size) -> Tensor:
    """Patches [B,L] in random order, int64."""
    return rand(s.B, s.L).argsort(dim=1)


def trained(dtype: torch.dtype | None = None, **tensors: Tensor) -> Inputs:
    """Inputs whose gradients are taken."""
    return {name: tensor.to(dtype or tensor.dtype).detach().requires_grad_() for name, tensor in tensors.items()}


def mlp_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    first = {"x": randn(s.B, s.T, s.D), "weight1_FD": randn(s.F, s.D) / s.D**0.5, "bias1_F": randn(s.F)}
    return trained(dtype, **first, weight2_DF=randn(s.D, s.F) / s.F**0.5)


def attention_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    return {**trained(dtype, qkv_BTQ=randn(s.B, s.T, 3 * s.D)), "num_heads": s.N}


def layer_norm_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    stream = {"x": randn(s.B, s.T, s.D), "delta": randn(s.B, s.T, s.D), "delta_bias_D": randn(s.D)}
    return {**trained(dtype, **stream), **trained(weight_D=randn(s.D), bias_D=randn(s.D))}


def nhsic_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    return {**trained(dtype, x_md=randn(s.m, s.d)), "y_me": rand(s.m, s.e).to(dtype)}


def step_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    clean, predictions = images(s), randn(s.B, s.M, s.P).to(dtype)
    adv = (clean + rivals.EPS * (2 * rand(clean.shape) - 1)).clamp(0, 1)
    gradient = {"grad_visible_BKP": randn(s.B, s.K, s.P), "pred_BMP": predictions, "ids_restore_BL": order(s)}
    where = {"images_BCHW": clean, "adv_BCHW": adv, "bounds_4C": bounds()}
    return {**where, **gradient, "patch_size": s.p, "norm_pix_loss": True}


def bounds() -> Tensor:
    return kernels.linf_bounds(rivals.EPS, 10 / 255, 0.0, 1.0, 3, torch.get_default_device())


def loss_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    fixed = {"images_BCHW": images(s), "ids_BM": order(s)[:, s.K :], "patch_size": s.p, "norm_pix_loss": True}
    return {**trained(dtype, pred_BMP=randn(s.B, s.M, s.P)), **fixed}


def start_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    return {"images_BCHW": images(s).to(dtype), "bounds_4C": bounds(), "seed": torch.randint(2**63 - 1, ())}


def crop_inputs(s: Size, count: int) -> Inputs:
    """Windows of count bytes each, their boxes the middle with a margin of an eighth."""
    return {
        "packed_N": torch.randint(256, (s.B * count,), dtype=torch.uint8),
        "offsets_B": torch.arange(s.B) * count,
        "sizes_B2": torch.tensor([s.h, s.w]).repeat(s.B, 1),
        "boxes_B4": torch.tensor([0.0, s.w // 8, s.h, s.w * 3 // 4]).repeat(s.B, 1),
        "flips_B": torch.arange(s.B) % 2 == 1,
        "size": s.side,
    }


def gather_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    return {**trained(dtype, images_BCHW=images(s)), "ids_keep_BK": order(s)[:, : s.K], "patch_size": s.p}


def restore_inputs(s: Size, dtype: torch.dtype) -> Inputs:
    learned = {**trained(dtype, tokens_BKE=randn(s.B, 1 + s.K, s.E)), **trained(mask_token_E=randn(s.E))}
    return {**learned, "pos_embed_LE": randn(1 + s.L, s.E), "ids_shuffle_BL": order(s)}


# ---- the table


@dataclass(frozen=True)
class Row:
    """An operation: the names of the sizes that tell a case from its others, its inputs, the rest as in Case, by dtype."""

    sizes: str
    inputs: Callable[[Size, torch.dtype], Inputs]
    rivals: Callable[[str], dict] = lambda dtype: {}
    takes: Callable[[Size, torch.dtype], bool] = lambda s, dtype: True
    judge: Callable[[str], Callable] = lambda dtype: beyond_budget
    own_judges: dict[str, Callable] = field(default_factory=dict)
    usual: str = "bf16"
    parts: tuple[str, ...] = ("",)
    dtypes: tuple[str, ...] = tuple(DTYPES)


BLOCKS: dict[str, Any] = {"parts": ("encoder", "decoder")}
CROPS: dict[str, Any] = {"dtypes": ("fp32",), "judge": lambda dtype: rivals.one_level, "usual": "fp32"}
NOISE: dict[str, Any] = {"own_judges": {"torch noise": rivals.moments}, "usual": "fp32"}
TABLE = {
    "mlp": Row("B T D F", mlp_inputs, takes=lambda s, t: mlp.supported(s.D, s.F, t), **BLOCKS),
    "short_attention": Row(
        *("B T D N", attention_inputs, rivals.of_attention),
        takes=lambda s, t: short_attention.supported(s.T, s.D // s.N, t),
        **BLOCKS,
    ),
    "add_layer_norm": Row("B T D", layer_norm_inputs, **BLOCKS),
    "nhsic": Row("m d e", nhsic_inputs, rivals.of_nhsic, judge=rivals.close, usual="fp32"),
    "linf_patch_step": Row("B side p K", step_inputs, judge=lambda dtype: rivals.few_signs_flipped),
    "masked_patch_loss": Row("B side p M", loss_inputs),
    "linf_start": Row("B side", start_inputs, rivals.of_start, **NOISE),
    "crop_resize_yuv420": Row("B side h w", lambda s, t: crop_inputs(s, 3 * s.w * ((s.h + 1) // 2)), **CROPS),
    "crop_resize": Row("B side h w", lambda s, t: crop_inputs(s, 3 * s.h * s.w), rivals.of_crops, **CROPS),
    "patch_gather": Row("B side p K", gather_inputs, usual="fp32"),
    "token_restore": Row("B L K E", restore_inputs),
    "mask_indices": Row("B L", lambda s, t: {"noise_BL": rand(s.B, s.L).to(t)}, usual="fp32"),
}
OPS = tuple(TABLE)


def cases(op: str, size: Size, dtype: str) -> list[Case]:
    """The cases of an operation at this size in this dtype."""
    row, found = TABLE[op], []
    for part in row.parts if dtype in row.dtypes else ():
        s = size.block(part)
        shape = {name: getattr(s, name) for name in row.sizes.split()}
        refused = "" if row.takes(s, DTYPES[dtype]) else f"not offered for {shape} in {dtype}"
        how = (row.rivals(dtype), refused, row.judge(dtype), row.own_judges, row.usual, part)
        draw = partial(row.inputs, s, DTYPES[dtype])
        found.append(Case(op, shape, dtype, draw, getattr(kernels, op), *how))
    return found


# ---- those of the recipes


def size_of(config: PretrainConfig, **changes) -> Size:
    """The size of one micro-batch of a run."""
    flat = config.updated(changes).flat()
    side, p, wide = flat["input_size"], flat["patch_size"], find(flat["model"], pretraining=True)[1]
    kept = int((side // p) ** 2 * (1 - flat["mask_ratio"]))
    encoder, decoder = ((wide[f"{part}embed_dim"], wide[f"{part}num_heads"]) for part in ("", "decoder_"))
    return Size(flat["batch_size"], side, p, kept, *encoder, *decoder)


SIZES: dict[str, Size] = {  # the most important first
    "imagenet_vit_b": size_of(imagenet_vit_b()),
    "imagenet_vit_s": size_of(imagenet_vit_s()),
    "cifar10_vit_s": size_of(cifar10_vit_s()),
    "imagenet_vit_l": size_of(imagenet_vit_s(), model="mae_vit_large"),
    "small": size_of(cifar10_vit_s(), model="mae_vit_ti", patch_size=4, batch_size=8),  # for CPUs
}
ON_GPU, ON_CPU = (list(SIZES)[:-1], list(DTYPES)), (["small"], ["fp32"])  # recipes and dtypes by default


class Entry(NamedTuple):
    """A case, and the recipes that have it."""

    case: Case
    recipes: tuple[str, ...]


def entries(ops: list[str], recipes: list[str], dtypes: list[str]) -> list[Entry]:
    """Cases in their usual dtypes first, in the order of the recipes, then by operation; equal shapes once.

    Raises ValueError naming a word that is not known.
    """
    for name, words, allowed in (("op", ops, OPS), ("recipes", recipes, SIZES), ("dtypes", dtypes, DTYPES)):
        unknown = [word for word in words if word not in allowed]
        if unknown or not words:
            raise ValueError(f"{name}: expected some of {', '.join(allowed)}; got {', '.join(unknown) or 'nothing'}")
    found: dict[str, Entry] = {}
    for recipe, dtype, op in product(recipes, dtypes, sorted(ops, key=OPS.index)):
        for case in cases(op, SIZES[recipe], dtype):
            before = found.get(case.label, Entry(case, ())).recipes
            found[case.label] = Entry(case, (*before, *({recipe} - {*before})))
    return sorted(
        found.values(),
        key=lambda e: (e.case.dtype != e.case.usual, recipes.index(e.recipes[0]), OPS.index(e.case.op)),
    )
