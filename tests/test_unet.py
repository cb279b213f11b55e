"""nets/unet.py against activations of diffusers' UNet2DConditionModel (tests/fixtures)."""

import pytest
import torch

from nets.ops.recompute import activation_bytes
from nets.unet import UNet
from tests.fixtures.networks import small_network
from tests.fixtures.weights import noise, relative_error

NETWORKS = ("unet", "unet_three_levels")


def tiny_unet():
    torch.manual_seed(0)
    return UNet(channels=(4, 8, 8, 8), layers=1, attention=(False, False, True, False),
                heads=(1, 2, 2, 2), text_width=4, groups=2)


@pytest.mark.parametrize("timestep, size", [(1, (13, 17)), (501, (12, 9))])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_equals_diffusers_at_odd_sizes(name, timestep, size):
    unet, expected = small_network(name)
    latent = noise("latent", (2, unet.conv_in.in_channels, *size))
    for feature in ("down1", "down2", "mid"):
        output, found = unet(latent, feature, timestep)
        assert relative_error(output, expected[f"output_{timestep}"]) < 1e-5
        assert relative_error(found, expected[f"{feature}_{timestep}"]) < 1e-5
        assert found.shape[1] == unet.feature_channels(feature)


@torch.no_grad()
def test_timestep_is_one_unless_said_and_may_differ_by_sample():
    unet, expected = small_network("unet")
    latent = noise("latent", (2, 4, 13, 17))
    assert torch.equal(unet(latent)[0], unet(latent, timestep=1)[0])
    both, _ = unet(latent, timestep=torch.tensor([1, 501]))
    assert relative_error(both[:1], expected["output_1"][:1]) < 1e-5
    assert relative_error(both[1:], unet(latent, timestep=501)[0][1:]) < 1e-5
    assert relative_error(both[1:], expected["output_1"][1:]) > 1e-2


@pytest.mark.parametrize("height, width", [(60, 80), (44, 152), (63, 94), (12, 16), (1, 1)])
@torch.no_grad()
def test_sizes(height, width):
    unet = tiny_unet()
    latent = torch.zeros(1, 4, height, width)
    halves = [(height, width)]
    for _ in range(3):
        halves.append(tuple((side + 1) // 2 for side in halves[-1]))
    for feature, size in (("down1", halves[1]), ("down2", halves[2]), ("mid", halves[3])):
        output, found = unet(latent, feature)
        assert output.shape == latent.shape
        assert tuple(found.shape[2:]) == size


def test_recomputed_activations_give_the_same_gradients():
    gradients = {}
    for recompute in (False, True):
        unet = tiny_unet()
        unet.checkpoint_activations = recompute
        output, feature = unet(noise("latent", (2, 4, 7, 9)))
        (output.square().mean() + feature.square().mean()).backward()
        gradients[recompute] = [parameter.grad for parameter in unet.parameters()]
    assert all(gradient is not None for gradient in gradients[False])
    assert all(map(torch.equal, gradients[False], gradients[True]))


def test_defaults_are_stable_diffusion_2():
    with torch.device("meta"):
        unet = UNet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 865_910_724
    assert unet.text_embedding.shape == (2, 1024)
    assert [unet.feature_channels(name) for name in ("down1", "down2", "mid")] == [320, 640, 1280]


def test_activations_are_counted_from_small_passes():
    layers = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.SiLU())
    # Kept for each latent pixel: the convolution's 4 inputs and SiLU's 8, in float32.
    found = activation_bytes(lambda side: layers(torch.zeros(1, 4, side, side)), cells=1000)
    assert found == 1000 * 4 * (4 + 8)
