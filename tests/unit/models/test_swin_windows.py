"""Swin's windows of kept tokens packed into groups: every token has its slot, masks that do not fit, what it costs."""

import sys

import numpy as np
import pytest
import torch

from mimir_fast.models import create_model
from mimir_fast.models.families.swin import windows
from mimir_fast.models.families.swin.encoder import grids
from mimir_fast.training.host_masks import HostMasks

MODEL = {"img_size": 48, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 2), "window_size": 3}
MODEL |= {"decoder_embed_dim": 16, "decoder_num_heads": 2, "norm_pix_loss": True}


@pytest.mark.parametrize(("side", "window", "ratio"), [(224, 7, 0.75), (224, 14, 0.75), (224, 7, 0.5), (256, 7, 0.75)])
def test_packing(side, window, ratio):
    """Every token has a slot, windows are whole, and random masks fit into the usual groups."""
    generator, fits = np.random.default_rng(0), 0
    units = (side // 32) ** 2
    kept = int(units * (1 - ratio))
    for _ in range(20):
        ids = generator.permutation(units)[:kept]
        for grid in {grid for pair in grids(side, 4, 4, window) for grid in pair}:
            packed = windows.pack(grid, ids, grid.groups(kept, wide=True))
            token, row, column, name = packed.slots.reshape(4, -1)
            used = name >= 0
            assert sorted(token[used]) == list(range(grid.tokens(kept)))
            if len(packed.places):
                assert (token[packed.places] == np.arange(grid.tokens(kept))).all()
            assert (
                (row[used] // (1 << grid.bits) * grid.units + column[used] // (1 << grid.bits))
                == ids[token[used] >> 2 * grid.bits]
            ).all()
            of_group = np.broadcast_to(np.arange(packed.slots.shape[1])[:, None], packed.slots.shape[1:]).ravel()
            assert all(len(set(of_group[name == one])) == 1 for one in set(name[used]))
            fits += windows.pack(grid, ids, grid.groups(kept)) is not None
    assert fits == 20 * len({grid for pair in grids(side, 4, 4, window) for grid in pair})


def test_a_mask_that_does_not_fit_is_drawn_anew(monkeypatch):
    """A training draws another one; a caller's own mask is computed in more groups."""
    monkeypatch.setattr(windows, "SPARE", 0.9)
    model, noise = create_model("swin", **MODEL), np.random.default_rng(0).random((20, 1, 36), np.float32)
    plans = [model.host_plan(row, 0.75) for row in noise]
    refused = next(i for i, plan in enumerate(plans) if plan is None)
    fitting = next(plan for plan in plans if plan is not None)
    loss, *_ = model(torch.rand(2, 3, 48, 48), 0.75, noise=torch.from_numpy(noise[refused]))
    assert loss.isfinite()
    masks = HostMasks(model, [0.75, 0.75])
    for seed in range(20):
        row = masks.draw(seed)
        assert torch.equal(row, masks.draw(seed))
        (first, second), (plan, _) = masks.unpack(row)
        assert (first.shape, len(plan), len(row)) == ((1, 36), len(fitting), len(masks.draw(0)))
        assert (model.host_plan(first.numpy(), 0.75) == plan.numpy()).all()
        assert not torch.equal(first, second)


def test_what_packing_costs():
    """At most 0.2 ms per partition on an idle core: counted here in calls, which no neighbour on the machine changes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    generator = np.random.default_rng(0)
    ids = [generator.permutation(49)[:12] for _ in range(10)]
    sys.setprofile(count)
    for row in ids:
        windows.pack(grids(224, 4, 4, 7)[0][1], row, 21)
    sys.setprofile(None)
    assert calls / 10 < 400
