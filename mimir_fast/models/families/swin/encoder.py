"""Swin's encoder: attention within windows, tokens that merge from stage to stage.

Shapes: B batch, C channels, L units, K kept units, P = C*unit*unit numbers per unit, T tokens, D width of the first stage.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mimir_fast.models.attention import check_backend
from mimir_fast.models.compat import checked
from mimir_fast.models.encoder import Encoder, Stream, recomputed
from mimir_fast.models.families.swin.layers import (
    NormedPatchEmbed,
    PatchMerging,
    Stage,
    SwinBlock,
)
from mimir_fast.models.families.swin.windows import Grid, Plan, Windows
from mimir_fast.models.layers import add_and_norm, check_counts


class SwinEncoder(Encoder):
    """Units of an image, cut into small patches, through stages of blocks: every stage but the last merges 2 x 2 tokens.

    patch_size    side of a token's patch, in pixels; unit: side of what the last stage has as one token, which follows from it
    embed_dim     width of the first stage, which doubles from stage to stage; depths, num_heads: of every stage
    window_size   side of a window in tokens, at most the stage's own
    masked        whether shifted blocks have the original's dense mask as a buffer, as its classifiers do
    computing     further arguments of Encoder, and attention, mlp
    The weights are as torch's modules draw them; whoever makes the encoder initialises them.
    Raises ValueError where sizes do not fit together.
    Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, 2021.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        *,
        unit: int | None = None,
        masked: bool = False,
        compat: str | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        **computing: Any,
    ):
        own = check_sizes(img_size, patch_size, depths, num_heads, window_size, unit)
        # Checked and then ignored: the scores have a bias here, which no backend of --attention takes.
        check_backend(attention)
        # To the base class a unit is a patch: masks, losses and attacks cut images along units.
        super().__init__(img_size, own, in_chans, **computing)
        self.compat, self.token_size, self.window_size = checked(compat), patch_size, window_size
        self.width = embed_dim * 2 ** (len(depths) - 1)
        self.grids = grids(img_size, patch_size, len(depths), window_size)
        self.patch_embed = NormedPatchEmbed(patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads)):
            pair, width, last = self.grids[stage], embed_dim * 2**stage, stage + 1 == len(depths)
            options = (width, heads, mlp_ratio, qkv_bias, masked, self.kernels, mlp)
            blocks = (SwinBlock(pair[i % 2], *options) for i in range(depth))
            # A merging ends its stage, as in the original's files; timm's begins the next one (exports.py).
            self.layers.append(Stage(blocks, None if last else PatchMerging(width, self.kernels)))
        # The eps of pre-training; the original's fine-tuning has 1e-5 in its place (docs/fidelity.md, D9).
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    @property
    def stages(self) -> list[Stage]:
        """The list `layers`, by its type."""
        return [layer for layer in self.layers if isinstance(layer, Stage)]

    def plan(self, kept: int) -> Plan:
        """How the windows of so many units are laid out; see Plan."""
        return Plan(self._grids(), kept)

    def _grids(self) -> list[Grid]:
        """Each once: where one window holds a stage there is nothing to move."""
        return list(dict.fromkeys(grid for pair in self.grids for grid in pair))

    def tokens(self, units: Tensor) -> Tensor:
        """Units [B,K,P] in (channel, row, column) order -> patches [B,T,C*p*p] in the order of `zorder`."""
        bits = len(self.layers) - 1
        # A unit's side as an axis of 2 per merging: permuting these orders tokens as `zorder` does, without an index.
        halves = (2,) * bits
        parts = units.unflatten(2, (self.in_chans, *halves, self.token_size, *halves, self.token_size))
        rows, columns = range(3, 3 + bits), range(4 + bits, 4 + 2 * bits)
        # Columns before rows: children (row, column) come as 00, 10, 01, 11, to which a merging's weights belong.
        places = [axis for pair in zip(columns, rows) for axis in pair]
        return parts.permute(0, 1, *places, 2, 3 + bits, 4 + 2 * bits).flatten(2 + 2 * bits).flatten(1, -2)

    def run(self, units: Tensor, windows: Sequence[Windows], factors: Tensor | None = None) -> Tensor:
        """Units [B,K,P] through all stages -> normalised tokens [B,K,8*D], in the units' order.

        windows: of every grid of `plan`; factors: see `drop_factors`.
        """
        given = dict(zip(self._grids(), windows))
        stream: Stream = (self.residual(self.patch_embed(self.tokens(units))), None, None)
        i = 0
        for stage, pair in zip(self.stages, self.grids):
            for n, block in enumerate(stage.blocks):
                two = None if factors is None else factors[2 * i : 2 * i + 2]
                arguments = (*stream, 0, two, *given[pair[n % 2]])
                stream = recomputed(block, *arguments) if self.activation_checkpointing else block(*arguments)
                i += 1
            if stage.downsample is not None:
                # The last block's MLP is still to be added: the merging's normalisation does it in the same pass.
                merged = stage.downsample(*stream, None if factors is None else factors[2 * i])
                stream = (self.residual(merged), None, None)
        last = None if factors is None else factors[-1]
        # In the parameters' type, fp32, whatever the blocks compute in: the penalty takes distances of these numbers.
        return add_and_norm(*stream, self.norm, self.kernels, self.norm.weight.dtype, keep_B=last)[1]


def check_sizes(
    img_size: int, patch_size: int, depths: Sequence[int], num_heads: Sequence[int], window_size: int, unit: int | None
) -> int:
    """The side of a unit.  Raises ValueError that names the argument which does not fit."""
    if len(depths) != len(num_heads):
        raise ValueError(f"num_heads: expected one number for each of {len(depths)} stages, got {tuple(num_heads)}")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths: expected stages of 1 block or more, got {tuple(depths)}")
    check_counts(window_size=window_size)
    own = patch_size * 2 ** (len(depths) - 1)
    if unit not in (None, own):
        raise ValueError(f"unit: {len(depths)} stages make patches of {patch_size} pixels units of {own}, got {unit}")
    if own < 1 or img_size % own:
        raise ValueError(f"img_size: expected a multiple of {own}, the side of a unit, got {img_size}")
    return own


def grids(img_size: int, patch_size: int, stages: int, window_size: int) -> list[tuple[Grid, Grid]]:
    """Of every stage its windows as they are and moved by half of one; the same where one window holds the stage."""
    found = []
    for stage in range(stages):
        side, bits = img_size // patch_size // 2**stage, stages - 1 - stage
        # As in Liu et al.'s code: a stage no larger than a window has one window, and blocks that move nothing.
        window = min(window_size, side)
        plain = Grid(side, window, 0, side >> bits, bits)
        # Moved by w // 2, the first window has that many rows and columns.
        shift = window // 2 if side > window_size else 0
        found.append((plain, plain._replace(offset=window - shift) if shift else plain))
    return found
