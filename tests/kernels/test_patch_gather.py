"""patch_gather: the kernels in the interpreter against float64, and what the contract promises about traffic."""

import pytest
import torch

from mimir_fast.kernels import patch_gather
from tests.support.budget import assert_within_budget
from tests.support.interpreter import Sanitizer, interpret

SHAPES = [  # B, C, H, W, patch size, kept
    (2, 3, 32, 48, 16, 2),
    (1, 3, 28, 42, 14, 5),
    (3, 1, 8, 8, 2, 7),
    (5, 3, 8, 12, 4, 1),
    (1, 2, 16, 24, 8, 3),
    (2, 3, 4, 4, 4, 1),
    (1, 3, 36, 36, 4, 70),  # more kept patches than the backward searches at a time
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def inputs(B, C, H, W, p, K, dtype=torch.float32):
    L = H // p * (W // p)
    ids = torch.stack([torch.randperm(L) for _ in range(B)])[:, :K]  # strided, as in the step
    return torch.rand(B, C, H, W).to(dtype), ids


def patches_and_gradient(images, ids, p, impl, upstream, **options):
    images = images.detach().requires_grad_(images.is_floating_point())
    patches = patch_gather(images, ids, p, impl=impl, **options)
    if not images.requires_grad:
        return (patches,)
    return patches.detach(), *torch.autograd.grad(patches, images, upstream.to(patches.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient_are_bitwise_copies(shape, dtype):
    images, ids = inputs(*shape, dtype)
    upstream = torch.randn(*ids.shape, shape[1] * shape[4] ** 2)
    expected = patches_and_gradient(images, ids, shape[4], "reference", upstream)
    with interpret(Sanitizer()) as s:
        ours = patches_and_gradient(images, ids, shape[4], "triton", upstream)
    assert not s.errors
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(WORDS[dtype]), b.view(WORDS[dtype]))


@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offset_scale_and_output_dtype(dtype, storage):
    images, ids = inputs(2, 3, 16, 16, 8, 3)
    images = (images * 255).byte() if storage == torch.uint8 else images.to(storage)
    upstream = torch.randn(2, 3, 192)
    exact = images.double() / 255 if storage == torch.uint8 else images.double()
    truth = patches_and_gradient(exact, ids, 8, "reference", upstream.to(dtype).double(), offset=0.5)
    eager = patches_and_gradient(images, ids, 8, "reference", upstream, offset=0.5, dtype=dtype)
    with interpret(Sanitizer()) as s:
        ours = patches_and_gradient(images, ids, 8, "triton", upstream, offset=0.5, dtype=dtype)
    assert not s.errors
    for a, b, c in zip(ours, eager, truth):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c)


@pytest.mark.parametrize("view", ["channels_last", "transposed", "crop", "expanded", "flat ids"])
def test_strided_inputs(view):
    images, ids = inputs(3, 3, 16, 24, 8, 2)
    images, ids = {
        "channels_last": lambda: (images.to(memory_format=torch.channels_last), ids),
        "transposed": lambda: (images.mT.contiguous().mT, ids),
        "crop": lambda: (torch.rand(3, 3, 20, 30)[:, :, 2:18, 3:27], ids),
        "expanded": lambda: (images[:1].expand(3, -1, -1, -1), ids),
        "flat ids": lambda: (images, torch.stack([ids, ids], 2)[..., 0]),
    }[view]()
    upstream = torch.randn(3, 192, 2).mT
    expected = patches_and_gradient(images, ids.long(), 8, "reference", upstream)
    with interpret(Sanitizer()) as s:
        ours = patches_and_gradient(images, ids, 8, "triton", upstream)
    assert not s.errors
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_images_past_the_range_of_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False  # 2 GiB that are never touched, except for two images
    try:
        images = torch.empty_strided((2, 1, 8, 8), (2**31 + 64, 64, 8, 1), dtype=torch.uint8)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    images.copy_(torch.randint(256, (2, 1, 8, 8)))
    ids = torch.tensor([[0, 3], [2, 1]])
    with interpret():
        ours = patch_gather(images, ids, 4, impl="triton")
    torch.testing.assert_close(ours, patch_gather(images.contiguous(), ids, 4))


def test_permuting_the_batch_permutes_patches_and_gradient():
    images, ids = inputs(3, 3, 8, 8, 4, 2)
    order, upstream = torch.tensor([2, 0, 1]), torch.randn(3, 2, 48)
    with interpret():
        ours = patches_and_gradient(images, ids, 4, "triton", upstream)
        permuted = patches_and_gradient(images[order], ids[order], 4, "triton", upstream[order])
    assert all(torch.equal(a[order], b) for a, b in zip(ours, permuted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_is_the_contracts(dtype):
    images, ids = inputs(2, 3, 64, 64, 16, 4, dtype)
    images.requires_grad_()
    with interpret(Sanitizer()) as s:
        patches = patch_gather(images, ids, 16, impl="triton")
        assert s.st["load_bytes"] == patches.nbytes + ids.nbytes
        assert s.st["store_bytes"] == patches.nbytes
        assert s.used("load") > 0.9
        s.st.clear()
        patches.sum().backward()
    assert s.st["load_bytes"] < 1.1 * (
        patches.nbytes + ids.nbytes * 16
    )  # every tile, here a patch, looks for its index
    assert s.st["store_bytes"] == images.nbytes
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_operator_registration_and_fullgraph_compilation():
    from mimir_fast.kernels.patch_gather import kernel

    images, ids = inputs(2, 3, 8, 8, 4, 2)
    images.requires_grad_()

    def centred(images):
        return patch_gather(images, ids, 4, offset=0.5, impl="triton").square()

    with interpret():
        torch.library.opcheck(kernel.patch_gather, (images, ids, 4, 0.5, torch.float32))
        torch.library.opcheck(kernel.patch_gather_grad, (torch.randn(2, 2, 48), ids, [2, 3, 8, 8], 4, torch.float32))
        eager = centred(images)
        compiled = torch.compile(centred, fullgraph=True, backend="aot_eager")(images)
        assert torch.equal(eager, compiled)
        assert torch.equal(*(torch.autograd.grad(y.sum(), images)[0] for y in (eager, compiled)))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(centred(images), eager)


def test_reference_compiles_fullgraph_and_passes_gradcheck():
    images, ids = inputs(2, 2, 4, 4, 2, 3)
    compiled = torch.compile(patch_gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, ids, 2), patch_gather(images, ids, 2))
    double = images.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_gather(x, ids, 2, offset=0.5), double)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"images_BCHW": torch.rand(3, 8, 8)}, "images"),
        ({"images_BCHW": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, "images"),
        ({"images_BCHW": torch.rand(2, 3, 8, 8).double(), "impl": "triton"}, "images"),
        ({"ids_keep_BK": torch.zeros(3, 2, dtype=torch.int64)}, "ids_keep"),
        ({"ids_keep_BK": torch.zeros(2, 2)}, "ids_keep"),
        ({"ids_keep_BK": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, "ids_keep"),
        ({"patch_size": 3}, "patch_size"),
        ({"dtype": torch.uint8}, "dtype"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    images, ids = inputs(2, 3, 8, 8, 4, 2)
    with pytest.raises(ValueError, match=f"^{word}"):
        patch_gather(**({"images_BCHW": images, "ids_keep_BK": ids, "patch_size": 4} | change))
