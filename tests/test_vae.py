"""nets/vae.py against activations of diffusers' AutoencoderKL (tests/fixtures)."""

import pytest
import torch

from nets.vae import AutoencoderKL
from tests.fixtures.networks import small_network
from tests.fixtures.weights import noise, relative_error

IMAGE = noise("image", (1, 3, 101, 135))


@pytest.mark.parametrize("name, factor, channels", [("vae", 8, 4), ("vae_three_levels", 4, 3)])
@torch.no_grad()
def test_equals_diffusers_at_odd_sizes(name, factor, channels):
    vae, expected = small_network(name)
    mean, log_variance = vae.moments(IMAGE)
    assert mean.shape == (1, channels, 101 // factor, 135 // factor)
    assert relative_error(mean, expected["mean"]) < 1e-5
    assert relative_error(log_variance, expected["log_variance"]) < 1e-5
    decoded = vae.decode(noise("latent", (1, channels, 7, 9)) * vae.scaling_factor)
    assert decoded.shape == (1, 3, 7 * factor, 9 * factor)
    assert relative_error(decoded, expected["decoded"]) < 1e-5


@pytest.mark.parametrize("name, scaling_factor", [("vae", 0.18215), ("vae_three_levels", 0.3)])
@torch.no_grad()
def test_latents_are_scaled_means(name, scaling_factor):
    vae, expected = small_network(name)
    assert relative_error(vae.encode(IMAGE), scaling_factor * expected["mean"]) < 1e-5


@pytest.mark.parametrize("height, width", [(480, 640), (352, 1216), (504, 756), (101, 135)])
@torch.no_grad()
def test_sizes(height, width):
    vae = AutoencoderKL(channels=(2, 2, 2, 2), layers=1, groups=1)
    latent = vae.encode(torch.zeros(1, 3, height, width))
    assert latent.shape == (1, 4, height // 8, width // 8)
    assert vae.decode(latent).shape == (1, 3, height // 8 * 8, width // 8 * 8)


def test_defaults_are_stable_diffusion_2():
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert vae.scaling_factor == 0.18215
