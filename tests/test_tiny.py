"""The tiny autoencoder, and models that hold it beside or in place of the full one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.timing import counter
from nets import tiny
from nets.depthmaster import DepthMaster
from nets.tiny import Block, TinyDecoder, TinyEncoder, levels
from nets.unet import UNet
from tests.fixtures.weights import relative_error
from tests.worlds import TINY, photo

SMALL = dict(width=8, blocks=1)


def trained_like(network):
    """Random weights that keep the values about as large as trained ones do."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, Block):
            module.conv[4].weight.data *= 0.1
    return network


def model_with(encoder=True, decoder=True, half_size=False, **changes):
    torch.manual_seed(1)
    parts = {"tiny_encoder": SMALL} if encoder else {}
    parts |= {"tiny_decoder": SMALL | dict(half_size=half_size)} if decoder else {}
    model = DepthMaster(**(TINY | changes), **parts).eval()
    model.kind = "stage1"
    return model


def test_sizes_of_the_official_one():
    encoder, decoder = TinyEncoder(), TinyDecoder()
    count = sum(p.numel() for net in (encoder, decoder) for p in net.parameters())
    assert count == 2_445_063
    assert len(encoder.state_dict()) + len(decoder.state_dict()) == 134


@pytest.mark.parametrize("height, width", [(8, 8), (64, 48), (69, 55), (63, 120)])
def test_sizes_round_down(height, width):
    latent = TinyEncoder(**SMALL)(torch.zeros(2, 3, height, width))
    assert latent.shape == (2, 4, height // 8, width // 8)
    for half_size, channels in ((False, 3), (True, 1)):
        image = TinyDecoder(**SMALL, half_size=half_size)(latent)
        assert image.shape == (2, channels, height // 8 * 8, width // 8 * 8)


def test_what_the_layers_compute():
    """Against plain operations: x to [0,1], convolutions, nearest x2, 3 tanh(z/3), and back."""
    decoder, z = trained_like(TinyDecoder(**SMALL)), torch.randn(1, 4, 5, 7)
    x = 3 * torch.tanh(z / 3)
    for layer in decoder:
        if isinstance(layer, tiny.Enlarge):
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            x = nn.functional.conv2d(x, layer.weight, padding=1)
        elif isinstance(layer, Block):
            y = x
            for conv in layer.conv[::2]:
                y = conv(y.relu() if conv is not layer.conv[0] else y)
            x = (x + y).relu()
        else:
            x = layer(x)
    assert relative_error(decoder(z), 2 * x - 1) < 1e-5
    encoder, image = trained_like(TinyEncoder(**SMALL)), torch.rand(1, 3, 16, 24) * 2 - 1
    halved = nn.Sequential(*encoder)(image / 2 + 0.5)
    torch.testing.assert_close(encoder(image), halved)


@pytest.mark.parametrize("make", [TinyEncoder, TinyDecoder,
                                  lambda **sizes: TinyDecoder(**sizes, half_size=True)])
@pytest.mark.parametrize("size", [(200, 56), (136, 72)])
def test_strips_have_no_seams(make, size, monkeypatch):
    """With strips of a few rows; the seams would show, as a strip's border sees zeros."""
    network = trained_like(make(width=8, blocks=2))
    if isinstance(network, TinyEncoder):
        x = torch.rand(2, 3, *size) * 2 - 1
    else:
        x = torch.randn(2, 4, size[0] // 2, size[1] // 2)
    whole = network(x).detach()
    calls = []
    monkeypatch.setattr(tiny, "LARGE", 0)
    monkeypatch.setattr(tiny, "STRIP", 1)
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x: calls.append(1) or forward(self, x))
    with torch.no_grad():
        assert relative_error(network(x), whole) < 1e-5
    blocks = sum(isinstance(layer, Block) for layer in network)
    assert len(calls) > 2 * blocks


def test_a_group_holds_maps_of_few_sizes():
    sizes = [[type(layer).__name__ for layer in level] for level in levels(TinyEncoder(**SMALL))]
    assert [names.count("Block") for names in sizes] == [1, 1, 1, 1]
    sizes = levels(TinyDecoder(**SMALL))
    assert [sum(isinstance(layer, Block) for layer in level) for level in sizes] == [1, 1, 1, 1]


# ------------------------------------------------------------------------------ in a model


def test_the_tiny_halves_stand_in():
    image = torch.rand(1, 3, 64, 48) * 2 - 1
    for encoder, decoder in ((True, False), (False, True), (True, True)):
        model = model_with(encoder, decoder)
        assert model.approximate
        with torch.no_grad():
            z = (model.tiny_encoder if encoder else model.vae.encode)(image)
            z, _ = model.unet(z)
            depth = (model.tiny_decoder if decoder else model.vae.decode)(z).mean(1, keepdim=True)
            torch.testing.assert_close(model(image), depth.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert not model_with(False, False).approximate


@pytest.mark.parametrize("half_size", [False, True])
def test_inference_gives_the_same_numbers_without_what_is_unused(half_size):
    model, image = model_with(half_size=half_size), photo(61, 45)
    before = model.predict(image, 0)
    fast = model.for_inference()
    assert fast.vae.encoder is None and fast.vae.decoder is None
    np.testing.assert_allclose(fast.predict(image, 0), before, atol=1e-5)


@pytest.mark.parametrize("vae", [TINY["vae"], False])
def test_a_file_gives_the_model_back(tmp_path, vae):
    path = tmp_path / "model.safetensors"
    model = model_with(half_size=True, vae=vae)
    model.save(path)
    found = DepthMaster.from_file(path)
    assert (found.vae is None) == (vae is False)
    assert json.dumps(found.config, sort_keys=True) == json.dumps(model.config, sort_keys=True)
    image = photo(64, 48)
    np.testing.assert_allclose(found.predict(image), model.predict(image), atol=1e-5)
    assert found.is_saved(path)


def test_a_choice_where_both_are_there(tmp_path):
    path, exact = tmp_path / "both.safetensors", tmp_path / "exact.safetensors"
    model = model_with()
    model.save(path)
    full = DepthMaster.from_file(path, autoencoder="full")
    assert not full.approximate
    full.save(exact)  # as a model that never had a tiny one
    found = DepthMaster.from_file(exact)
    assert json.dumps(found.config, sort_keys=True) == json.dumps(
        DepthMaster(**TINY).config, sort_keys=True)
    assert DepthMaster.from_file(path, autoencoder="tiny").approximate
    with pytest.raises(ValueError, match="has no tiny autoencoder: leave out --autoencoder"):
        DepthMaster.from_file(exact, autoencoder="tiny")
    model_with(vae=False).save(path)
    with pytest.raises(ValueError, match="has only the tiny autoencoder: give the file"):
        DepthMaster.from_file(path, autoencoder="full")


def test_some_autoencoder_must_be_there():
    with pytest.raises(ValueError, match="an autoencoder is missing"):
        DepthMaster(**(TINY | dict(vae=False)), tiny_encoder=SMALL)


# ------------------------------------------------------------------------------ a smaller U-Net


def test_dropped_blocks_leave_their_skips(tmp_path):
    torch.manual_seed(0)
    whole = DepthMaster(**TINY)
    unet = TINY["unet"] | dict(drop=["mid", "up.1.resnets.0"])
    model = DepthMaster(**(TINY | dict(unet=unet)))
    names = model.unet.state_dict().keys()
    assert not [name for name in names if name.startswith("mid.")]
    assert [name for name in names if name.startswith("up.1.resnets.0.")] == [
        "up.1.resnets.0.shortcut.weight", "up.1.resnets.0.shortcut.bias"]
    model.unet.load_state_dict({name: whole.unet.state_dict()[name] for name in names})
    model.kind = "stage2"
    model.save(tmp_path / "model.safetensors")
    found = DepthMaster.from_file(tmp_path / "model.safetensors")
    z = torch.randn(1, 4, 8, 6)
    with torch.no_grad():
        out, feature = found.unet(z)
        # The middle passes on what it gets: the last feature on the way down.
        assert torch.equal(feature, found.unet(z, feature="down2")[1])
        torch.testing.assert_close(out, model.unet(z)[0])


def test_what_can_be_dropped():
    model = DepthMaster(**TINY)
    assert {"mid.attention", "mid.resnet1", "down.0.resnets.0"} <= set(model.unet.blocks())
    with pytest.raises(ValueError, match="there is no block 'conv_in' in the U-Net, which has"):
        model.unet.drop(["conv_in"])
    model.unet.drop(model.unet.blocks())
    assert model.unet.blocks() == []
    model.unet(torch.zeros(1, 4, 8, 8))


# ------------------------------------------------------------------- the figures of docs/faster.md


def work(network, *size):
    """TFLOP of an input of a size, from shapes alone."""
    with counter() as seen:
        network.to("meta")(torch.empty(size, device="meta"))
    return seen.get_total_flops() / 1e12


def test_the_work_that_the_documentation_claims():
    page = (Path(__file__).parent.parent / "docs/faster.md").read_text()
    encoder = work(TinyEncoder(), 1, 3, 480, 640)
    decoder = work(TinyDecoder(), 1, 4, 60, 80)
    of_depth = work(TinyDecoder(half_size=True), 1, 4, 60, 80)
    unet = 0.94
    assert f"| TAESD | {encoder:.2f} | {decoder:.2f} | {encoder + unet + decoder:.2f} |" in page
    assert (f"| tiny encoder, decoder of depth | {encoder:.2f} | {of_depth:.2f} | "
            f"{encoder + unet + of_depth:.2f} |") in page
    assert (f"| full encoder, decoder of depth | 1.32 | {of_depth:.2f} | "
            f"{1.32 + unet + of_depth:.2f} |") in page


def test_what_dropping_saves_at_the_full_size():
    """The documentation: 34 % of the U-Net's parameters, 5 % of its work."""
    with torch.device("meta"):
        whole, smaller = UNet(), UNet(drop=["mid", "down.3", "up.0"])
    count, less = (sum(p.numel() for p in unet.parameters()) for unet in (whole, smaller))
    assert round(1 - less / count, 2) == 0.34
    share = work(smaller, 1, 4, 60, 80) / work(whole, 1, 4, 60, 80)
    assert round(1 - share, 2) == 0.05
