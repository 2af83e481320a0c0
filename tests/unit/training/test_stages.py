"""Stages: what a listener sees, and what it must not change."""

from contextlib import nullcontext

import pytest
import torch

from mimir_fast.training.stages import listening, stage


def test_compiled_code_neither_breaks_nor_depends_on_the_listener():
    graphs, opened = [], []

    def loss(x):
        with stage("loss"):
            return x.sin()

    compiled = torch.compile(loss, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    compiled(torch.zeros(3))
    with listening(lambda name: opened.append(name) or nullcontext()):
        compiled(torch.zeros(3))
        assert opened == []
        loss(torch.zeros(3))
        with pytest.raises(RuntimeError, match="one listener"), listening(nullcontext):
            pass
    loss(torch.zeros(3))
    assert (len(graphs), opened) == (1, ["loss"])
