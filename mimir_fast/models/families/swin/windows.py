"""Which tokens of a masked image attend to each other: windows, packed into groups of one size on the host.

Tokens stand in the order of their units, those of a unit (a square of n x n tokens, the patch of the mask) so that the four
children of a merged token are neighbours: `zorder`.  A window holds whatever tokens of it are there; windows are packed
first-fit, the fullest first, into G groups of S slots, and attention runs within groups, where a barrier keeps windows apart.
The result does not depend on the packing.

Shapes: K units, T tokens, R side of the stage's grid of tokens, w side of a window, G groups, S slots.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Groups beyond T/S that are laid out, since windows are of uneven sizes: at 224 pixels none of 12,000 random masks that
# removed 75 % needed more, and 2 of 6,000 that removed half.
SPARE = 1.25


class Grid(NamedTuple):
    """One stage's tokens and one partition of them into windows.

    side     R, window w: a token (r, c) is in window ((r + offset) // w, (c + offset) // w)
    units    side of the image in units; bits: log2 of the side of a unit in tokens
    """

    side: int
    window: int
    offset: int
    units: int
    bits: int

    def tokens(self, kept: int) -> int:
        """T of so many units."""
        return kept * 4**self.bits

    def slots(self, kept: int) -> int:
        """S: a full window, or all tokens where they are fewer."""
        return min(self.window**2, self.tokens(kept))

    def groups(self, kept: int, wide: bool = False) -> int:
        """G: what nearly all masks need; wide: what any mask needs."""
        tokens, slots = self.tokens(kept), self.slots(kept)
        if tokens <= slots:
            return 1
        # First-fit leaves no two groups whose contents would fit into one.
        most = math.ceil(2 * tokens / slots)
        return most if wide else min(most, math.ceil(SPARE * tokens / slots) + 1)


class Packed(NamedTuple):
    """Windows in groups, int32 in host memory.

    places   [T] where a token went, counted over all groups; empty where there is one group, which has the tokens as they stand
    slots    [4,G,S] token of each slot, its row and column, and its window; -1 for the window of an empty slot
    """

    places: np.ndarray
    slots: np.ndarray


class Windows(NamedTuple):
    """The same on the device, as attention takes it.

    slots, places   int32 [G*S] and [T], each other's inverse where slots are not empty; None where there is one group
    entry           int32 [G,S,S] which entry of a table of relative positions belongs to query and key
    inside          bool [G,S,S] whether both are tokens of one window
    outside         [G,S,S] what stands in place of an entry: -inf between windows, 0 between empty slots
    """

    slots: Tensor | None
    places: Tensor | None
    entry: Tensor
    inside: Tensor
    outside: Tensor


def zorder(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a unit's tokens in their order: the highest bit of the column, of the row, then the next ones."""
    order = np.arange(4**bits)
    rows, columns = np.zeros_like(order), np.zeros_like(order)
    for bit in range(bits):
        rows |= (order >> (2 * bit) & 1) << bit
        columns |= (order >> (2 * bit + 1) & 1) << bit
    return rows, columns


def relative_index(window: int) -> Tensor:
    """Entry of the table for every query and key of a full window in raster order, int64 [w*w,w*w]."""
    places = torch.arange(window**2)
    rows, columns = places // window, places % window
    down, right = (t[:, None] - t[None] + window - 1 for t in (rows, columns))
    return down * (2 * window - 1) + right


def attention_mask(side: int, window: int, shift: int) -> Tensor:
    """The original's mask of dense windows moved by `shift`, all tokens there: 0 within a window, else -100;
    [windows,w*w,w*w].

    Where windows do not tile the side, as if the grid were filled up with tokens of no window.
    """
    tiles = -(-side // window)
    # torch.roll by -shift, as in Liu et al.'s code: slot i holds token i + shift.
    place = (torch.arange(tiles * window) + shift) % (tiles * window)
    own = torch.where(place < side, (place + window - shift) // window, -1)
    name = (own[:, None] * (tiles + 2) + own[None]).unflatten(0, (tiles, window)).unflatten(2, (tiles, window))
    name = name.transpose(1, 2).flatten(2).flatten(0, 1)
    # The files' number: e^-100 of a weight stands for none.  What attends here takes -inf (`_windows`).
    return torch.where(name[:, :, None] == name[:, None], 0.0, -100.0)


def pack(grid: Grid, kept: np.ndarray, groups: int | None = None) -> Packed | None:
    """Pack the windows of these units (their numbers in raster order, [K]) into `groups`, or as many as they need.

    None: they do not fit.
    """
    n = 1 << grid.bits
    own_rows, own_columns = zorder(grid.bits)
    rows = (kept[:, None] // grid.units * n + own_rows).ravel()
    columns = (kept[:, None] % grid.units * n + own_columns).ravel()
    # One more than fit: moved windows stick out at both ends.
    across = (grid.side + grid.offset) // grid.window + 1
    window = (rows + grid.offset) // grid.window * across + (columns + grid.offset) // grid.window
    size = grid.slots(len(kept))
    if len(rows) == size:
        slots = np.stack([np.arange(size), rows, columns, window])[:, None]
        return Packed(np.empty(0, np.int32), slots.astype(np.int32))
    order, starts = _first_fit(window, size)
    needed = starts.max() // size + 1
    if groups is not None and needed > groups:
        return None
    slots = np.zeros((4, (groups or needed) * size), np.int32)
    # Empty slots read token 0; their window, -1, keeps what they compute from all tokens.
    slots[3] = -1
    slots[:, starts] = np.stack([order, rows[order], columns[order], window[order]])
    places = np.empty(len(rows), np.int32)
    places[order] = starts
    return Packed(places, slots.reshape(4, -1, size))


def _first_fit(window: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows [T] of tokens -> the tokens window by window, and the slot of each, groups of `size` slots in a row."""
    counts = np.bincount(window)
    # The fullest first; windows without a token are last.
    fullest = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    free: list[int] = []
    first = np.zeros(len(counts), np.int64)
    # A loop over windows and not over tokens: 81 at most where 224 pixels have 56 x 56 tokens in windows of 7.
    for name, count in zip(fullest.tolist(), counts[fullest].tolist()):
        group = next((i for i, left in enumerate(free) if left >= count), len(free))
        if group == len(free):
            free.append(size)
        first[name] = group * size + size - free[group]
        free[group] -= count
    order = np.argsort(window, kind="stable")
    sorted_windows = window[order]
    rank = np.arange(len(window)) - (np.cumsum(counts) - counts)[sorted_windows]
    return order, first[sorted_windows] + rank


class Plan:
    """What attention needs of a mask: the windows of several grids in one row of int32 numbers.

    grids   partitions of the tokens; kept: K units
    The row has one of two lengths: that for the groups that nearly all masks need, or that for those that any mask needs.
    """

    def __init__(self, grids: Sequence[Grid], kept: int):
        self.grids, self.kept = grids, kept
        # G of every grid.
        self.usual, self.wide = ([grid.groups(kept, wide) for grid in grids] for wide in (False, True))

    def row(self, kept: np.ndarray, wide: bool = False) -> np.ndarray | None:
        """The row for these units [K], in the order of their tokens: int32 [n]; None: they do not fit."""
        packed = [pack(grid, kept, groups) for grid, groups in zip(self.grids, self.wide if wide else self.usual)]
        return None if None in packed else _joined(packed)

    def exact(self, kept: np.ndarray) -> np.ndarray:
        """The same for a mask that never changes, in the groups that it needs: the plan is for such rows from now on."""
        packed = [pack(grid, kept) for grid in self.grids]
        self.usual = [one.slots.shape[1] for one in packed if one is not None]
        return _joined(packed)

    def windows(self, row: Tensor) -> list[Windows]:
        """The windows of every grid from a row [n] on the device."""
        parts, first = [], 0
        usual = row.numel() == sum(map(self._length, self.grids, self.usual))
        for grid, groups in zip(self.grids, self.usual if usual else self.wide):
            end = first + self._length(grid, groups)
            parts.append(_windows(row[first:end], grid.window, groups, grid.slots(self.kept)))
            first = end
        return parts

    def _length(self, grid: Grid, groups: int) -> int:
        moved = grid.tokens(self.kept) if groups > 1 else 0
        return moved + 4 * groups * grid.slots(self.kept)


def _joined(packed: Sequence[Packed | None]) -> np.ndarray:
    return np.concatenate([part.ravel() for one in packed if one is not None for part in one])


def _windows(row: Tensor, window: int, groups: int, size: int) -> Windows:
    moved = row.numel() - 4 * groups * size
    token, rows, columns, name = row[moved:].view(4, groups, size)
    across = 2 * window - 1

    def pairs(values: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return operation(values[:, :, None], values[:, None, :])

    entry = (pairs(rows, torch.sub) + window - 1) * across + pairs(columns, torch.sub) + window - 1
    same = pairs(name, torch.eq)
    # Entries of other windows are anywhere in the table and not all at one end: their gradients, zeros, are added there.
    entry = entry.remainder(across**2)
    # Empty slots attend to each other: a row of -inf alone would be NaN after the softmax, and so would gradients.
    outside = torch.where(same, 0.0, -torch.inf)
    return Windows(
        token.flatten() if moved else None,
        row[:moved] if moved else None,
        entry,
        same & (name >= 0)[:, :, None],
        outside,
    )


class Regroup(torch.autograd.Function):
    """x[:, take], whose gradient is grad[:, put]: rows that `put` leaves out have none, or one that does not count."""

    @staticmethod
    def forward(ctx, x: Tensor, take: Tensor, put: Tensor) -> Tensor:
        ctx.save_for_backward(put)
        return x.index_select(1, take)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        # No scatter: every token has one place, and is read from there.
        (put,) = ctx.saved_tensors
        return grad.index_select(1, put), None, None
