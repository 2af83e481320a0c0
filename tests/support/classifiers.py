"""Small classifiers of the digits, honest and not, and the package AutoAttack cut down to a second."""

import types
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mimir_fast.data import eval_batches
from mimir_fast.evaluate import Images, autoattack


@pytest.fixture(autouse=True)
def one_thread(_deterministic):
    """Import it where models are this small: a second thread costs more than it brings."""
    torch.set_num_threads(1)


def digits(count: int) -> Images:
    """The first `count` validation images."""
    return Images("digits", "", 32, num_images=count)


def untrained(seed: int = 0) -> nn.Module:
    """Convolutions on the 16 x 16 averages."""
    torch.manual_seed(seed)
    layers = [nn.AvgPool2d(2), nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


@cache
def trained_state() -> dict:
    """Parameters that read three of four digits or more."""
    model = untrained()
    batches = [(images.float() / 255, labels) for images, labels in eval_batches("digits", "", 32, 64, split="train")]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.state_dict()


def classifier() -> nn.Module:
    model = untrained()
    model.load_state_dict(trained_state())
    return model


class Quantised(nn.Module):
    """Rounds the pixels first: no gradient comes through."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(torch.round(images * 7) / 7)


class Loud(Quantised):
    """Multiplies the logits by 1e4: the cross-entropy of what it gets right is zero, and so is its gradient."""

    def forward(self, images):
        return 1e4 * self.model(images)


class Interrupted(nn.Module):
    """Counts its passes and ends the process's patience after some of them."""

    def __init__(self, model: nn.Module, after: int | None = None):
        super().__init__()
        self.model, self.after, self.calls = model, after, [0]  # a list: shared with copies of the module

    def __deepcopy__(self, memo):
        copy = Interrupted(self.model, self.after)
        copy.calls = self.calls
        return copy

    def forward(self, images):
        self.calls[0] += 1
        if self.after is not None and self.calls[0] > self.after:
            raise KeyboardInterrupt
        return self.model(images)


def short_autoattack(monkeypatch, queries: int = 30, steps: int = 8) -> None:
    """The four attacks with few steps."""
    package = pytest.importorskip("pyautoattack", reason="AutoAttack comes from the optional package pyautoattack")

    def build(*args, **kwargs):
        whole = package.AutoAttack(*args, **kwargs)
        for attack in (whole.apgd, whole.apgd_targeted):
            attack.n_iter, attack.n_iter_2, attack.n_iter_min, attack.size_decr = steps, max(2, steps // 5), 1, 1
        whole.fab.n_iter, whole.square.n_queries = max(3, steps // 3), queries
        return whole

    fake = types.SimpleNamespace(AutoAttack=build, __version__="0 (cut down)")
    monkeypatch.setattr(autoattack, "_package", lambda: fake)
