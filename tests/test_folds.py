import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nets.depthmaster import DepthMaster
from nets.inference import strips
from nets.ops.enlarge import enlarge
from nets.vae import AutoencoderKL

VAE = dict(channels=(8, 16, 16, 24), layers=1, groups=4)
UNET = dict(channels=(8, 16, 24), layers=1, attention=(True, True, False), heads=(1, 2, 2),
            text_width=6, groups=4)
ROOT = Path(__file__).resolve().parents[1]


def shaken(module):
    """With every weight and bias away from its initial value."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.double().eval()


def model():
    torch.manual_seed(0)
    made = DepthMaster(vae=VAE, unet=UNET, train_size=(32, 48), processing_res=48)
    made.unet.text_embedding.normal_()
    return shaken(made)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_enlarging_by_phases_is_nearest_and_a_convolution(layout):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 7, 4).double().to(memory_format=layout).requires_grad_()
    plain = conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    fast = enlarge(x, conv)
    assert difference(fast, plain) < 1e-14
    wanted = torch.autograd.grad(plain.square().sum(), [x, conv.weight, conv.bias])
    found = torch.autograd.grad(fast.square().sum(), [x, conv.weight, conv.bias])
    assert all(difference(a, b) < 1e-13 for a, b in zip(found, wanted))


def test_enlarging_to_an_odd_size_takes_the_plain_way():
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    assert enlarge(torch.randn(1, 2, 4, 5), conv, size=(7, 10)).shape == (1, 2, 7, 10)


@pytest.mark.parametrize("timesteps, latent", [((1,), (6, 8)), ((1,), (5, 7)), ((3, 1), (6, 8))])
@torch.inference_mode()
def test_the_folded_unet_says_the_same(timesteps, latent):
    plain, folded = model(), model()
    folded.for_inference(precision="float32", timesteps=timesteps).double()
    z = torch.randn(2, 4, *latent).double()
    for timestep in timesteps:
        wanted, feature = plain.unet(z, timestep=timestep)
        found, same_feature = folded.unet(z, timestep=timestep)
        # float32: folding goes through it.
        assert difference(found, wanted) < 1e-6 and difference(same_feature, feature) < 1e-6
    count = [sum(p.numel() for p in m.unet.parameters()) for m in (plain, folded)]
    assert count[1] < count[0]


@torch.inference_mode()
def test_a_folded_model_predicts_the_same():
    image = np.random.default_rng(0).integers(0, 256, (52, 70, 3), dtype=np.uint8)
    with torch.enable_grad():
        plain = model()(torch.from_numpy(image)[None, :48, :64].permute(0, 3, 1, 2) / 127.5 - 1)
    folded = model().for_inference(precision="float32").double()
    found = folded(torch.from_numpy(image)[None, :48, :64].permute(0, 3, 1, 2) / 127.5 - 1)
    assert difference(found, plain.detach()) < 1e-6
    once_more = folded.for_inference(precision="float32").predict(image)
    assert once_more.shape == (52, 70) and np.isfinite(once_more).all()


def test_a_folded_model_refuses_what_it_can_no_longer_do(tmp_path):
    folded = model().for_inference(precision="float32")
    with pytest.raises(ValueError, match="can't be saved"):
        folded.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="time step 1"):
        folded.unet(torch.randn(1, 4, 6, 8), timestep=2)


@pytest.mark.parametrize("size", [(48, 64), (67, 45)])
@pytest.mark.parametrize("large", [1 << 30, 20_000, 1])  # 1: no map is kept
@torch.inference_mode()
def test_strips_have_no_seams(monkeypatch, size, large):
    monkeypatch.setattr(strips, "LARGE", large)
    monkeypatch.setattr(strips, "STRIP", 300)
    monkeypatch.setattr(strips, "ROWS", 2)
    torch.manual_seed(0)
    vae = shaken(AutoencoderKL(**VAE))
    image = torch.randn(2, 3, *size).double()
    latent = vae.encode(image)
    assert difference(strips.encode(vae, image.clone()), latent) < 1e-12
    assert difference(strips.decode(vae, latent), vae.decode(latent)) < 1e-12


@torch.inference_mode()
def test_strips_leave_the_image_and_the_latent_alone():
    vae = AutoencoderKL(**VAE)
    image, latent = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    before = image.clone(), latent.clone()
    strips.encode(vae, image), strips.decode(vae, latent)
    assert torch.equal(image, before[0]) and torch.equal(latent, before[1])


GROWTH = """
import resource, torch
from nets.inference import strips
x = torch.ones(1, 128, 400, 2016, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
with torch.inference_mode():
    strips.statistics(strips.Map(x), torch.nn.GroupNorm(32, 128))
print((resident() - before) / x.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much is in use")
def test_statistics_take_no_memory_of_a_maps_size():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout) < 0.2, done  # nothing as large as the map


@torch.inference_mode()
def test_statistics_of_a_large_map_are_exacter_than_the_plain_ones():
    torch.manual_seed(0)
    x = (torch.randn(1, 16, 640, 768) + 1.5).to(memory_format=torch.channels_last)
    norm = torch.nn.GroupNorm(4, 16)
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 4, eps=norm.eps))
    found = strips.NormAct(norm, strips.Map(x))(x).double()
    assert difference(found, exact) < 1e-6


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""
    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_statistics_of_channels(dtype, kind):
    torch.manual_seed(0)
    x = (2 * torch.randn(1, 16, 30, 40) - 5).to(dtype).to(memory_format=torch.channels_last)
    mean, var = (t.as_subclass(torch.Tensor)
                 for t in strips.channel_statistics(x.as_subclass(kind)))
    assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    for found, exact in zip((var, mean), expected):
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=0)


@torch.inference_mode()
def test_statistics_far_from_zero():
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 100, 120) + 30).bfloat16().to(memory_format=torch.channels_last)
    mean, var = strips.statistics(strips.Map(x), torch.nn.GroupNorm(4, 16))
    groups = x.double().unflatten(1, (4, 4)).flatten(2)
    torch.testing.assert_close(mean, groups.mean(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(var, groups.var(2, unbiased=False), rtol=5e-5, atol=0)
