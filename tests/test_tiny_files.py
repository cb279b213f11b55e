"""TAESD in each of its layouts, attached to a model by convert_sd2.py --autoencoder."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convert_sd2
import evaluate
import predict
from extras.tiny_files import open_tiny
from nets.depthmaster import DepthMaster
from nets.tiny import TinyDecoder, TinyEncoder
from tests.test_tiny import SMALL, model_with, trained_like
from tests.worlds import boxes, call, photo, save_tiny

CONFIG = {"_class_name": "AutoencoderTiny", "in_channels": 3, "out_channels": 3, "act_fn": "relu",
          "latent_channels": 4, "upsampling_scaling_factor": 2, "latent_magnitude": 3,
          "latent_shift": 0.5, "scaling_factor": 1.0, "force_upcast": False,
          "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4,
          "num_encoder_blocks": [1, 1, 1, 1], "num_decoder_blocks": [1, 1, 1, 1]}


def halves():
    return trained_like(TinyEncoder(**SMALL)), trained_like(TinyDecoder(**SMALL))


def numbered(network, shift=0):
    return {f"{int(name.split('.')[0]) + shift}.{name.split('.', 1)[1]}": tensor.clone()
            for name, tensor in network.state_dict().items()}


def in_diffusers(encoder, decoder):
    return {f"{half}.layers.{name}": tensor for half, network in (
        ("encoder", encoder), ("decoder", decoder)) for name, tensor in numbered(network).items()}


def write(folder, layout):
    """Writes a tiny autoencoder in one of LAYOUTS; returns (encoder, decoder)."""
    encoder, decoder = halves()
    folder.mkdir()
    if layout.startswith("diffusers"):
        tensors = in_diffusers(encoder, decoder)
        if layout.endswith("bin"):
            torch.save(tensors, folder / "diffusion_pytorch_model.bin")
        else:
            save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
    else:
        for name, tensors in (("taesd_encoder", numbered(encoder)),
                              ("taesd_decoder", numbered(decoder, shift=1))):
            if layout.endswith("pth"):
                torch.save(tensors, folder / f"{name}.pth")
            else:
                save_file(tensors, folder / f"{name}.safetensors")
    return encoder, decoder


LAYOUTS = ["diffusers, safetensors", "diffusers, bin", "author, pth", "author, safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    written = write(tmp_path / "taesd", layout)
    found, files = open_tiny(tmp_path / "taesd")
    assert set(found) == {"tiny_encoder", "tiny_decoder"}
    for network, (read, sizes) in zip(written, found.values()):
        assert sizes == dict(SMALL, image_channels=3, latent_channels=4)
        for name, tensor in network.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor)
    assert len(files) == (1 if "diffusers" in layout else 2)


@pytest.fixture
def model(tmp_path):
    save_tiny(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_attached_beside_and_in_place(tmp_path, model, monkeypatch, capsys):
    encoder, decoder = write(tmp_path / "taesd", LAYOUTS[0])
    call(monkeypatch, convert_sd2, model, "--autoencoder", tmp_path / "taesd")
    both = tmp_path / "model_tiny.safetensors"
    assert str(both) in capsys.readouterr().out
    found = DepthMaster.from_file(both)
    assert found.vae and found.approximate
    assert found.licence == "MIT (TAESD)"
    assert found.sources[-1].startswith("diffusion_pytorch_model.safetensors sha256:")
    exact = DepthMaster.from_file(both, autoencoder="full").state_dict()
    for name, tensor in DepthMaster.from_file(model).state_dict().items():
        assert torch.equal(exact[name], tensor)
    call(monkeypatch, convert_sd2, both, "--without-full", "--out", tmp_path / "alone.safetensors",
         "--dtype", "float16")
    alone = DepthMaster.from_file(tmp_path / "alone.safetensors")
    assert alone.vae is None
    x = torch.rand(1, 3, 16, 16)
    assert (alone.encode(x) - encoder(x)).abs().max() < 1e-2 * encoder(x).abs().max()


def test_one_file_is_one_half(tmp_path, model, monkeypatch, capsys):
    encoder, decoder = write(tmp_path / "taesd", LAYOUTS[2])
    out = tmp_path / "out.safetensors"
    call(monkeypatch, convert_sd2, model, "--autoencoder", tmp_path / "taesd/taesd_decoder.pth",
         "--out", out)
    found = DepthMaster.from_file(out)
    assert found.tiny_encoder is None and found.tiny_decoder
    call(monkeypatch, convert_sd2, model, "--autoencoder", tmp_path / "taesd/taesd_decoder.pth",
         tmp_path / "taesd/taesd_encoder.pth", "--out", out)
    assert DepthMaster.from_file(out).tiny_encoder
    assert call(monkeypatch, convert_sd2, model, "--without-full") == 1
    assert "has no tiny encoder and decoder: --without-full would" in capsys.readouterr().err


def test_bad_sources(tmp_path, model, monkeypatch, capsys):
    def refused(source):
        assert call(monkeypatch, convert_sd2, model, "--autoencoder", source) == 1
        return capsys.readouterr().err

    assert "taesd is not there: give the folder or a file" in refused(tmp_path / "taesd")
    (tmp_path / "taesd").mkdir()
    assert "holds no tiny autoencoder: give the folder" in refused(tmp_path / "taesd")
    encoder, decoder = halves()
    file = tmp_path / "taesd/diffusion_pytorch_model.safetensors"
    tensors = in_diffusers(encoder, decoder)
    tensors.pop("encoder.layers.3.conv.2.weight")
    save_file(tensors, file)
    assert "misses tensors: 1 (encoder.layers.3.conv.2.weight)" in refused(tmp_path / "taesd")
    save_file(in_diffusers(encoder, decoder), file)
    (tmp_path / "taesd/config.json").write_text(json.dumps(CONFIG | {"latent_magnitude": 1}))
    assert "config.json says latent_magnitude = 1, but" in refused(tmp_path / "taesd")
    (tmp_path / "taesd/config.json").unlink()
    save_file(numbered(TinyEncoder(**SMALL, latent_channels=16)), tmp_path / "other.safetensors")
    other = refused(tmp_path / "other.safetensors")
    assert "is of another model: its latents have 16 channels" in other
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    assert "no.safetensors holds no tiny autoencoder" in refused(tmp_path / "no.safetensors")
    assert not (tmp_path / "model_tiny.safetensors").exists()


def test_scripts_take_such_a_file_and_say_so(tmp_path, model, monkeypatch, capsys):
    write(tmp_path / "taesd", LAYOUTS[0])
    call(monkeypatch, convert_sd2, model, "--autoencoder", tmp_path / "taesd")
    both, picture = tmp_path / "model_tiny.safetensors", tmp_path / "photo.png"
    iio.imwrite(picture, photo(48, 64))
    maps = {}
    for name, options in (("tiny", []), ("full", ["--autoencoder", "full"])):
        capsys.readouterr()
        call(monkeypatch, predict, picture, "--ckpt", both, "--out", tmp_path / name, "--save",
             "npy", "--precision", "float32", "--device", "cpu", *options)
        maps[name] = np.load(tmp_path / name / "photo.npy")
        assert ("Tiny autoencoder: approximate." in capsys.readouterr().err) == (name == "tiny")
    call(monkeypatch, predict, picture, "--ckpt", model, "--out", tmp_path / "exact", "--save",
         "npy", "--precision", "float32", "--device", "cpu")
    np.testing.assert_allclose(np.load(tmp_path / "exact/photo.npy"), maps["full"], atol=1e-5)
    assert not np.allclose(maps["tiny"], maps["full"], atol=1e-2)
    assert call(monkeypatch, evaluate, "--predictions", tmp_path, "--autoencoder", "tiny") == 2
    assert call(monkeypatch, predict, "--ckpt", both, "--selftest", "--autoencoder", "full") == 2
    assert call(monkeypatch, convert_sd2, both, "--export", "diffusers", "--out", tmp_path / "x",
                "--without-full") == 2


def test_the_report_of_such_a_model(tmp_path, monkeypatch):
    pairs = tmp_path / "data"
    for kind in ("rgb", "depth"):
        (pairs / kind).mkdir(parents=True)
    iio.imwrite(pairs / "rgb/a.png", photo(61, 83))
    np.save(pairs / "depth/a.npy", boxes()[0])
    model = model_with()
    model.save(tmp_path / "model.safetensors")
    assert call(monkeypatch, evaluate, "--ckpt", tmp_path / "model.safetensors", "--data", pairs,
                "--datasets", "pairs", "--workers", 0, "--device", "cpu", "--report", "--out",
                tmp_path / "out") == 0
    assert "a single pass, tiny autoencoder" in (tmp_path / "out/report.html").read_text()
    result = json.loads((tmp_path / "out/metrics.json").read_text())["pairs"]
    assert result["paradigm"] == "single, tiny autoencoder"
