"""nets/fourier.py: against numpy in float64, properties of the transform, safe gradients."""

import numpy as np
import pytest
import torch

from nets.fourier import FourierEnhancement, from_polar, to_polar
from tests.fixtures.fourier_in_numpy import NAMES, enhance
from tests.fixtures.weights import noise, relative_error

SIZES = [(8, 10), (6, 19), (15, 20), (1, 1), (2, 2), (3, 1)]


def block(channels=16, init="default", seed=0):
    torch.manual_seed(seed)
    made = FourierEnhancement(channels, init)
    if init == "default":
        with torch.no_grad():
            made.norm.weight.add_(0.3 * torch.randn(channels))
            made.norm.bias.add_(0.3 * torch.randn(channels))
    return made


def arrays(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def test_names_and_size_are_those_of_the_released_block():
    with torch.device("meta"):
        full = FourierEnhancement()
    names = {f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")}
    assert set(full.state_dict()) == names
    assert sum(parameter.numel() for parameter in full.parameters()) == 78_654_720


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_against_numpy(size):
    module, x = block(), noise("x", (2, 16, *size))
    expected = np.stack([enhance(arrays(module), sample) for sample in x.numpy()])
    assert relative_error(module(x), torch.from_numpy(expected)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_the_round_trip_returns_the_picture(size):
    x = noise("x", (2, 8, *size))
    back = from_polar(*to_polar(x), size)
    assert back.dtype == torch.float32 and back.shape == x.shape
    assert relative_error(back, x) < 1e-6


def as_a_gpu_does(spectrum, s, norm):
    """irfft2 as cuFFT defines it: columns that are not given are mirrored, then all is summed up.

    In columns 0 and w/2 the upper rows alone count, and the lower ones are their mirror image.
    """
    height, width = s
    rows = [-row % height for row in range(height)]
    whole = torch.empty(*spectrum.shape[:2], height, width, dtype=spectrum.dtype)
    whole[..., :width // 2 + 1] = spectrum
    for column in range(width // 2 + 1, width):
        whole[..., column] = spectrum[:, :, rows, width - column].conj()
    for column in {0, width // 2} if width % 2 == 0 else {0}:
        for row in range(height // 2 + 1, height):
            whole[:, :, row, column] = whole[:, :, -row % height, column].conj()
    return torch.fft.ifft2(whole, norm=norm).real


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_what_is_inverted_is_the_spectrum_of_real_maps(size, monkeypatch):
    """So a CPU and a GPU, whose libraries differ in what they make of others, agree."""
    module, x, seen = block(), noise("x", (2, 16, *size)), []
    plain = torch.fft.irfft2

    def spy(spectrum, **options):
        seen.append(spectrum)
        return plain(spectrum, **options)

    monkeypatch.setattr(torch.fft, "irfft2", spy)
    expected = module(x)
    width, rows = size[1], [-row % size[0] for row in range(size[0])]
    for column in {0, width // 2} if width % 2 == 0 else {0}:
        own = seen[0][..., column]
        torch.testing.assert_close(own, own[:, :, rows].conj(), rtol=0, atol=1e-6)
    monkeypatch.setattr(torch.fft, "irfft2", as_a_gpu_does)
    assert relative_error(module(x), expected) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_on_a_cpu_the_symmetric_part_is_all_that_counts(size):
    amplitude, phase = noise("a", (2, 8, *size)), noise("p", (2, 8, *size))
    amplitude, phase = (x[..., :size[1] // 2 + 1] for x in (amplitude, phase))
    spectrum = torch.polar(amplitude.abs(), phase)
    expected = torch.fft.irfft2(spectrum, s=size, norm="ortho")
    assert relative_error(from_polar(amplitude.abs(), phase, size), expected) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_on_cuda_the_block_is_that_of_the_cpu(size):
    module, x = block(), noise("x", (2, 16, *size))
    expected = module(x)
    assert relative_error(module.cuda()(x.cuda()).cpu(), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_parseval(size):
    """The energy of a picture is that of its spectrum, of which one half is computed."""
    x = noise("x", (3, 8, *size))
    energy = to_polar(x)[0].square().sum(dim=2)  # B,C,w/2+1
    width = size[1]
    twice = torch.full((width // 2 + 1,), 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    total = (energy * twice).sum(dim=2)
    torch.testing.assert_close(total, x.square().sum(dim=(2, 3)), rtol=1e-6, atol=0)


def test_a_real_frequency_has_one_phase_whatever_the_sign_of_its_zero():
    negative = -torch.ones(1, 8, 4, 6)
    assert torch.equal(to_polar(negative)[1][0, :, 0, 0], torch.full((8,), torch.pi))
    checkers = (torch.arange(4)[:, None] + torch.arange(6)).remainder(2)  # alternate both ways
    phase = to_polar((1.0 - 2 * checkers).expand(1, 8, 4, 6) * -1)[1]
    assert torch.equal(phase[0, :, 2, 3], torch.full((8,), torch.pi))


def test_gradients_reach_both_passes():
    module = block()
    x = noise("x", (1, 16, 6, 7)).requires_grad_()
    module(x).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("fill", ["zero", "constant", "tiny"])
@pytest.mark.parametrize("size", [(8, 10), (6, 19), (1, 1)])
def test_gradients_are_finite_where_the_phase_has_none(fill, size):
    x = {"zero": torch.zeros(1, 16, *size), "constant": torch.full((1, 16, *size), 3.7),
         "tiny": 1e-20 * noise("x", (1, 16, *size))}[fill].requires_grad_()
    module = FourierEnhancement(16)
    torch.nn.init.zeros_(module.conv_f1.bias)  # so that its output is as tiny as its input
    output = module(x)
    output.square().sum().backward()
    assert output.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, 1e-20, 1e-7])
def test_the_phase_of_tiny_numbers(scale):
    x = (scale * noise("x", (1, 8, 6, 7))).requires_grad_()
    amplitude, phase = to_polar(x)
    (amplitude.sum() + phase.sum()).backward()
    assert phase.isfinite().all() and x.grad.isfinite().all()


def test_gradcheck():
    x = noise("x", (1, 8, 4, 5)).double().requires_grad_()
    module = block(8).double()
    assert torch.autograd.gradcheck(module, (x,))


def test_the_identity_returns_the_normalised_input():
    module, x = block(init="identity"), noise("x", (2, 16, 5, 6))
    torch.testing.assert_close(module(x), module.norm(x), rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # what is zero at first lets nothing through until it has moved
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_another_init_is_refused():
    with pytest.raises(ValueError, match="default or identity"):
        FourierEnhancement(8, "zero")


@torch.no_grad()
def test_in_bfloat16_the_transform_stays_in_float32():
    module, x = block(), noise("x", (1, 16, 6, 7))
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(module(x), exact) < 0.02
        assert to_polar(x.bfloat16())[0].dtype == torch.float32
    assert relative_error(module.bfloat16()(x.bfloat16()), exact) < 0.02
