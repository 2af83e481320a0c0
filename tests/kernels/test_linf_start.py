"""linf_start: the same numbers in the kernel and in the reference, and that they are uniform noise."""

import pytest
import torch

from mimir_fast.kernels import linf_bounds, linf_start
from mimir_fast.kernels.linf_start import kernel, reference
from tests.support.interpreter import Sanitizer, interpret

BOUNDS = linf_bounds(torch.tensor([0.1, 0.2, 0.05]), 0.1, 0.0, torch.tensor([1.0, 0.9, 1.0]), 3, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 3, 7, 29), (2, 3, 16, 16)], ids=str)
@pytest.mark.parametrize("seed", [0, 2**62 + 12345], ids=str)
def test_kernel_and_reference_agree_bit_for_bit(shape, dtype, seed):
    images, seed = torch.rand(shape).to(dtype), torch.tensor(seed)
    with interpret(Sanitizer()) as s:
        ours = linf_start(images, BOUNDS, seed, impl="triton")
    assert not s.errors
    assert torch.equal(ours, linf_start(images, BOUNDS, seed, impl="reference"))


def test_philox_known_answers():
    """From the reference implementation of Random123: philox4x32-10, counter and key zero."""
    zero = reference.philox(torch.tensor(0), torch.tensor([0]))
    assert [int(w) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_uniform_in_every_channels_ball():
    images = torch.full((64, 3, 32, 32), 0.5)
    noise = linf_start(images, BOUNDS, torch.tensor(7)) - images
    for channel, eps in enumerate((0.1, 0.2, 0.05)):
        u = noise[:, channel] / eps
        assert u.abs().max() <= 1 + 1e-5
        assert u.abs().max() > 0.999
        assert abs(u.mean()) < 4 * 3**-0.5 / u.numel() ** 0.5
        assert abs(u.var() - 1 / 3) < 0.01
    rows = noise.flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.1  # images differ
    other = linf_start(images, BOUNDS, torch.tensor(8)) - images
    assert torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_clamped_to_the_range_and_strides_do_not_matter():
    images = torch.rand(2, 3, 8, 8)
    with interpret(Sanitizer()) as s:
        start = linf_start(images, BOUNDS, torch.tensor(3), impl="triton")
        last = linf_start(images.to(memory_format=torch.channels_last), BOUNDS, torch.tensor(3), impl="triton")
    assert not s.errors
    assert torch.equal(start, last)
    assert (start >= 0).all()
    assert (start <= BOUNDS[3][:, None, None]).all()
    assert (start[:, 1] == 0.9).any()


def test_a_nan_pixel_stays_nan():
    images = torch.rand(1, 3, 4, 4)
    images[0, 1, 2, 3] = torch.nan
    with interpret():
        start = linf_start(images, BOUNDS, torch.tensor(3), impl="triton")
    assert torch.equal(start.isnan(), images.isnan())


def test_traffic_is_the_contracts():
    images = torch.rand(2, 3, 32, 32)
    with interpret(Sanitizer()) as s:
        linf_start(images, BOUNDS, torch.tensor(3), impl="triton")
    assert s.st["load_bytes"] < 1.1 * images.nbytes
    assert s.st["store_bytes"] == images.nbytes
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_operator_registration_and_fullgraph_compilation():
    images, seed = torch.rand(1, 3, 8, 8), torch.tensor(1)
    with interpret():
        torch.library.opcheck(kernel.linf_start, (images, BOUNDS, seed))
        compiled = torch.compile(linf_start, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images, BOUNDS, seed, "triton"), linf_start(images, BOUNDS, seed))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((torch.zeros(1, 3, 8), BOUNDS, torch.tensor(1)), "images"),
        ((torch.zeros(1, 2, 8, 8), BOUNDS, torch.tensor(1)), "bounds"),
        ((torch.zeros(1, 3, 8, 8), BOUNDS, torch.tensor(1.0)), "seed"),
    ],
)
def test_errors_name_the_argument(arguments, word):
    with pytest.raises(ValueError, match=f"^{word}"):
        linf_start(*arguments)
