"""mask_indices: the kernel in the interpreter against a stable sort, entry by entry."""

import pytest
import torch

from mimir_fast.kernels import mask_indices
from tests.support.interpreter import Sanitizer, interpret

SHAPES = [(1, 1), (3, 4), (2, 7), (5, 49), (2, 196), (1, 257), (2, 300)]  # B, L
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(noise):
    expected = mask_indices(noise, impl="reference")
    with interpret(Sanitizer()) as s:
        ours = mask_indices(noise, impl="triton")
    assert not s.errors
    for name, a, b in zip(("ids_shuffle", "ids_restore"), ours, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.is_contiguous(), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices(shape, dtype):
    check(torch.rand(shape).to(dtype))  # in 16 bits long rows hold equal entries


@pytest.mark.parametrize("values", ["equal", "few", "infinities", "nan", "signed zeros", "ties"])
def test_ties_and_odd_values(values):
    noise = {
        "equal": lambda: torch.zeros(2, 40),
        "few": lambda: torch.randint(3, (3, 70)).float(),
        "infinities": lambda: torch.tensor([[1.0, float("inf"), -1.0, float("-inf"), float("inf"), 0.0]]),
        "nan": lambda: torch.tensor([[1.0, float("nan"), -1.0, float("inf"), float("nan"), 0.0]]),
        "signed zeros": lambda: torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]]),
        "ties": lambda: torch.randint(256, (2, 50)).float() / 255,
    }[values]()
    check(noise)


@pytest.mark.parametrize("view", ["transposed", "every second", "expanded"])
def test_strided_noise(view):
    noise = {
        "transposed": lambda: torch.rand(37, 3).T,
        "every second": lambda: torch.rand(3, 74)[:, ::2],
        "expanded": lambda: torch.rand(1, 37).expand(3, 37),
    }[view]()
    check(noise)


def test_ranks_are_a_permutation_and_follow_the_batch():
    noise = torch.rand(4, 60)
    order = torch.tensor([2, 0, 3, 1])
    with interpret():
        shuffle, restore = mask_indices(noise, impl="triton")
        for a, b in zip((shuffle, restore), mask_indices(noise[order], impl="triton")):
            assert torch.equal(a[order], b)
    assert torch.equal(noise.gather(1, shuffle), noise.sort(1).values)
    assert torch.equal(restore.gather(1, shuffle), torch.arange(60).expand(4, 60))


def test_traffic_is_the_contracts():
    noise = torch.rand(
        8, 256
    )  # rows begin on a sector; 196 entries would not, and every chunk would touch one more (in L1)
    with interpret(Sanitizer()) as s:
        outputs = mask_indices(noise, impl="triton")
    assert s.st["load_bytes"] == 2 * noise.nbytes
    assert s.st["store_bytes"] == sum(out.nbytes for out in outputs)
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_operator_registration_and_fullgraph_compilation():
    from mimir_fast.kernels.mask_indices import kernel

    noise = torch.rand(3, 20)
    with interpret():
        torch.library.opcheck(kernel.mask_indices, (noise,))
        eager = mask_indices(noise, impl="triton")
        compiled = torch.compile(lambda n: mask_indices(n, impl="triton"), fullgraph=True, backend="aot_eager")(noise)
        reference = torch.compile(mask_indices, fullgraph=True, backend="aot_eager")(noise)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, compiled, reference))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"noise_BL": torch.rand(4)}, "noise"),
        ({"noise_BL": torch.zeros(2, 4, dtype=torch.int64)}, "noise"),
        ({"noise_BL": torch.rand(2, 4).double(), "impl": "triton"}, "noise"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    with pytest.raises(ValueError, match=f"^{word}"):
        mask_indices(**({"noise_BL": torch.rand(2, 4)} | change))
