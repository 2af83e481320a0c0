"""mask_indices: the kernel in the interpreter against a stable sort, entry by entry."""

import pytest
import torch
from interpreter import Sanitizer, interpret
from mimir_fast.kernels import mask_indices

SHAPES = [(1, 1, 1), (3, 4, 1), (2, 7, 7), (5, 49, 12), (2, 196, 49), (1, 257, 64), (2, 300, 1)]  # B, L, K
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(noise, keep):
    expected = mask_indices(noise, keep, impl="reference")
    with interpret(Sanitizer()) as s:
        ours = mask_indices(noise, keep, impl="triton")
    assert not s.errors
    for name, a, b in zip(("ids_keep", "ids_restore", "mask"), ours, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.is_contiguous(), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices(shape, dtype):
    B, L, K = shape
    check(torch.rand(B, L).to(dtype), K)  # in 16 bits long rows hold equal entries


@pytest.mark.parametrize("values", ["equal", "few", "infinities", "nan", "signed zeros", "uint8"])
def test_ties_and_odd_values(values):
    noise = {
        "equal": lambda: torch.zeros(2, 40),
        "few": lambda: torch.randint(3, (3, 70)).float(),
        "infinities": lambda: torch.tensor([[1.0, float("inf"), -1.0, float("-inf"), float("inf"), 0.0]]),
        "nan": lambda: torch.tensor([[1.0, float("nan"), -1.0, 3.0, float("nan"), 0.0]]),
        "signed zeros": lambda: torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]]),
        "uint8": lambda: torch.randint(256, (2, 50)).float() / 255,
    }[values]()
    check(noise, noise.shape[1] // 2)


@pytest.mark.parametrize("view", ["transposed", "every second", "expanded"])
def test_strided_noise(view):
    noise = {
        "transposed": lambda: torch.rand(37, 3).T,
        "every second": lambda: torch.rand(3, 74)[:, ::2],
        "expanded": lambda: torch.rand(1, 37).expand(3, 37),
    }[view]()
    check(noise, 9)


def test_ranks_are_a_permutation_and_follow_the_batch():
    noise = torch.rand(4, 60)
    order = torch.tensor([2, 0, 3, 1])
    with interpret():
        keep, restore, mask = mask_indices(noise, 15, impl="triton")
        for a, b in zip((keep, restore, mask), mask_indices(noise[order], 15, impl="triton")):
            assert torch.equal(a[order], b)
    assert torch.equal(restore.sort(1).values, torch.arange(60).expand(4, 60))
    assert torch.equal(restore.gather(1, keep), torch.arange(15).expand(4, 15))
    assert (mask.sum(1) == 45).all()


def test_traffic_is_the_contracts():
    noise = torch.rand(
        8, 256
    )  # rows begin on a sector; 196 entries would not, and every chunk would touch one more (in L1)
    with interpret(Sanitizer()) as s:
        outputs = mask_indices(noise, 64, impl="triton")
    assert s.st["load_bytes"] == 2 * noise.nbytes
    assert s.st["store_bytes"] == sum(out.nbytes for out in outputs)
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_operator_registration_and_fullgraph_compilation():
    from mimir_fast.kernels.mask_indices import kernel

    noise = torch.rand(3, 20)
    with interpret():
        torch.library.opcheck(kernel.mask_indices, (noise, 5))
        eager = mask_indices(noise, 5, impl="triton")
        compiled = torch.compile(lambda n: mask_indices(n, 5, impl="triton"), fullgraph=True, backend="aot_eager")(
            noise
        )
        reference = torch.compile(mask_indices, fullgraph=True, backend="aot_eager")(noise, 5)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, compiled, reference))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"noise_BL": torch.rand(4)}, "noise"),
        ({"noise_BL": torch.zeros(2, 4, dtype=torch.int64)}, "noise"),
        ({"noise_BL": torch.rand(2, 4).double(), "impl": "triton"}, "noise"),
        ({"keep": 0}, "keep"),
        ({"keep": 5}, "keep"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    with pytest.raises(ValueError, match=f"^{word}"):
        mask_indices(**({"noise_BL": torch.rand(2, 4), "keep": 2} | change))
