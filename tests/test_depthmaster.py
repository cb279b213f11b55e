"""nets/depthmaster.py: prediction's properties, precision, files."""

import copy

import numpy as np
import pytest
import torch

from miniature.embedded import TRAINED
from nets import model_file
from nets.depthmaster import DepthMaster

SMALL = dict(vae=dict(channels=(4, 4, 8, 8), layers=1, groups=2),
             unet=dict(channels=(4, 8), layers=1, attention=(False, True), heads=(1, 2),
                       text_width=6, groups=2))


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = DepthMaster(**SMALL, processing_res=96).eval()
    with torch.no_grad():
        model.unet.text_embedding.normal_()
    return model


def picture(height, width):
    return np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("height, width", [(101, 135), (64, 64), (40, 131), (300, 57)])
@pytest.mark.parametrize("processing_res", [None, 0, 64, 163])
def test_prediction(model, height, width, processing_res):
    image = picture(height, width)
    before = image.copy()
    depth = model.predict(image, processing_res)
    assert depth.shape == (height, width) and depth.dtype == np.float32
    assert np.isfinite(depth).all() and 0 <= depth.min() < depth.max() <= 1
    assert np.array_equal(depth, model.predict(image, processing_res))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("processing_res, size", [(None, (71, 96)), (0, (101, 135)),
                                                  (50, (37, 50)), (768, (574, 768))])
def test_what_the_network_is_given(model, monkeypatch, processing_res, size):
    """Longest side to R, the other truncated, 8 bits, [-1,1]; small images are enlarged too."""
    given = []

    def keep(image, timesteps):
        given.append(image)
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(model, "forward", keep)
    depth = model.predict(picture(101, 135), processing_res)
    assert np.all(depth == 0.5)
    levels = (given[0] + 1) * 127.5
    assert tuple(given[0].shape) == (1, 3, *size)
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert levels.min() >= 0 and levels.max() <= 255 and levels.max() - levels.min() > 50
    if processing_res == 0:
        image = torch.from_numpy(picture(101, 135)).permute(2, 0, 1)
        assert torch.equal(levels.round()[0].byte(), image)


def test_inference_in_float32_is_the_same(model):
    image = picture(40, 56)
    before = model.predict(image, 0)
    after = model.for_inference("cpu", "float32").predict(image, 0)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_views_are_taken_as_they_look(model):
    image = picture(40, 56)
    mirrored = model.predict(image[:, ::-1])
    assert np.array_equal(mirrored, model.predict(image[:, ::-1].copy()))
    assert not np.allclose(mirrored, model.predict(image))


@torch.no_grad()
def test_forward_is_clipped_and_rounds_sizes_down(model):
    image = 6 * torch.randn(2, 3, 101, 135)
    latent, _ = model.unet(model.encode(image))
    model.vae.decoder.conv_out.bias += 0.5  # so that there is something to clip
    free = model.decode_depth(latent)
    assert free.shape == (2, 1, 96, 128) and free.max() > 1
    assert torch.allclose(free[:, 0], model.vae.decode(latent).mean(1), atol=1e-5)
    assert torch.allclose(model(image), free.clamp(-1, 1), atol=1e-5)


@torch.no_grad()
def test_the_text_constant_takes_part(model):
    image = torch.randn(1, 3, 64, 64)
    before = model(image)
    model.unet.text_embedding.normal_()
    assert not torch.allclose(before, model(image))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_of_inference(model, precision):
    image = picture(101, 135)
    exact = model.predict(image)
    depth = model.for_inference("cpu", precision).predict(image)
    assert model.unet.conv_in.weight.dtype == getattr(torch, precision)
    assert depth.dtype == np.float32
    assert np.abs(depth - exact).mean() < (1e-6 if precision == "float32" else 1e-2)


def ramp():
    """A smooth picture uint8 192,256,3."""
    rows, columns = np.mgrid[:192, :256]
    return np.stack([columns, rows, 255 - columns], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("in_strips", [True, False])
def test_in_bfloat16_a_smooth_map_has_no_bands(in_strips, monkeypatch):
    """The decoder's last convolution is in float32: rounded to bfloat16 there are some 2,000."""
    monkeypatch.setattr(DepthMaster, "in_strips", lambda self, pixels: in_strips)
    trained = DepthMaster.from_file(TRAINED)
    exact = trained.predict(ramp())
    depth = trained.for_inference("cpu", "bfloat16").predict(ramp())
    assert len(np.unique(depth)) > 10_000
    assert np.abs(depth - exact).mean() < 0.01


def test_in_training_the_last_convolution_is_in_float32():
    trained = DepthMaster.from_file(TRAINED)
    latent = torch.randn(1, 4, 24, 32)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = trained.decode_depth(latent)
    assert decoded.requires_grad and decoded.dtype == torch.float32
    assert len(decoded.unique()) > 10_000


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_no_depth(model, value):
    torch.nn.init.constant_(model.vae.decoder.conv_out.bias, value)
    with pytest.raises(ValueError, match="not finite"):
        model.predict(picture(40, 56))
    assert model.round_trip(torch.zeros(1, 1, 40, 56)).isnan().all()


def test_what_overflows_in_half_precision_is_computed_once_more(model):
    with torch.no_grad():  # beyond float16 before the last convolution, which is in float32
        model.vae.decoder.up[-1].resnets[-1].conv2.weight.fill_(6e4)
    with pytest.warns(UserWarning, match="float16 overflowed"):
        depth = model.for_inference("cpu", "float16").predict(picture(40, 56))
    assert np.isfinite(depth).all()


def test_file_round_trip(model, tmp_path):
    model.kind, model.sources, model.licence = "stage1", ["made up"], "none"
    path = tmp_path / "model.safetensors"
    model.save(path)
    again = DepthMaster.from_file(path)
    image = picture(40, 56)
    # Not to the bit: weights of a mapped file lie at other addresses, which takes other kernels.
    assert np.allclose(model.predict(image), again.predict(image), rtol=0, atol=1e-6)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    for name in ("kind", "sources", "licence", "target", "train_size", "processing_res"):
        assert getattr(again, name) == getattr(model, name)
    half = DepthMaster.from_file(path, dtype=torch.float16)
    assert half.vae.quant_conv.weight.dtype == torch.float16
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    model_file.save(path, {}, dict(kind="dinov2", config={}, sources=[], licence=""))
    with pytest.raises(ValueError, match="holds a dinov2 model"):
        DepthMaster.from_file(path)


@pytest.mark.parametrize("image, sentence", [
    (np.zeros((64, 64, 3), np.float32), "must be uint8 of shape H,W,3"),
    (np.zeros((64, 64), np.uint8), "must be uint8 of shape H,W,3"),
    (np.zeros((64, 64, 4), np.uint8), "must be uint8 of shape H,W,3"),
    (np.zeros((7, 900, 3), np.uint8), "too thin"),
])
def test_images_that_cannot_be_used(model, image, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.predict(image)


def test_defaults_are_the_papers():
    with torch.device("meta"):
        model = DepthMaster()
    assert sum(p.numel() for p in model.parameters()) == 865_910_724 + 83_653_863
    assert (model.target, model.train_size) == ("sqrt_disparity", (480, 640))
    assert model.processing_res == 768


def test_more_passes_start_from_the_last_ones_output(model):
    """Table II's iterative paradigm."""
    image = torch.rand(1, 3, 32, 40) * 2 - 1
    assert not torch.equal(*(model.predict_batch((255 * image.abs()).byte(), timesteps=steps)
                             for steps in ((1,), (2, 1))))
    model = copy.deepcopy(model).double()  # four passes enlarge rounding errors
    with torch.no_grad():
        latent = model.vae.encode(image.double())
        for timestep in (4, 3, 2, 1):
            latent, _ = model.unet(latent, timestep=timestep)
        expected = model.decode_depth(latent).clamp(-1, 1).float()
        assert torch.allclose(model(image, (4, 3, 2, 1)), expected, atol=1e-6)
        assert not torch.allclose(model(image), expected)


@pytest.mark.parametrize("size, processing_res", [((40, 64), 0), ((45, 70), 96)])
def test_the_round_trip_of_a_target(model, size, processing_res):
    """Table II's I2L: no U-Net takes part."""
    torch.nn.init.constant_(model.unet.conv_out.weight, float("nan"))
    target = torch.rand(1, *size) * 2 - 1
    found = model.round_trip(target[None], processing_res)[0].numpy()
    assert found.shape == size and found.dtype == np.float32
    with torch.no_grad():
        x = target[None].repeat(1, 3, 1, 1)
        if processing_res:
            x = torch.nn.functional.interpolate(x, (61, 96), mode="nearest-exact")
        decoded = model.vae.decode(model.vae.encode(x)).mean(1, keepdim=True).clamp(-1, 1)
        decoded = torch.nn.functional.interpolate((decoded + 1) / 2, size, mode="bilinear",
                                                  antialias=True)
    np.testing.assert_allclose(found, decoded[0, 0].clamp(0, 1).numpy(), atol=1e-5)
