"""nets/official/source.py on sources that cannot be converted: one sentence, exit code 1."""

import json

import pytest
import torch

from nets.official import source as official_source
from tests.fixtures.sources import (
    converted,
    diffusers_folder,
    facebook_tensors,
    run,
    single_file_tensors,
    source,
    write_network,
    write_tensors,
)


def changed(folder, name, change, file=None):
    """Rewrites one network of a folder."""
    network = {"unet": "unet_three_levels", "vae": "vae_three_levels", "text_encoder": "text"}[name]
    stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
    write_network(folder / name, network, file or f"{stem}.safetensors", change)


def setting(folder, name, **settings):
    config = folder / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def less(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def more(name, tensor=torch.zeros(3)):
    return lambda tensors: tensors | {name: tensor}


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


class Malicious:
    """Pickles to a call of a function, which must never run."""

    def __reduce__(self):
        return (pytest.fail, ("code of a pickle ran",))


WEIGHTS = "diffusion_pytorch_model.safetensors"
MISTAKES = {
    "missing tensor": (lambda f: changed(f, "unet", less("conv_in.weight")),
                       "misses tensors: 1 (conv_in.weight)"),
    "missing layer": (lambda f: changed(f, "unet", less("up_blocks.1.resnets.0.conv1.bias")),
                      "misses tensors: 1 (up_blocks.1.resnets.0.conv1.bias)"),
    "extra tensor": (lambda f: changed(f, "vae", more("encoder.extra.weight")),
                     "do not belong to it: 1 (encoder.extra.weight)"),
    "half a block": (lambda f: changed(f, "unet", more("fftblock.norm.weight")),
                     "misses tensors: 15 (fftblock."),
    "no autoencoder": (lambda f: (f / "vae").rename(f / "other"), "put vae/ and text_encoder/"),
    "shape": (lambda f: changed(f, "unet", more("conv_in.bias", torch.zeros(17))),
              "conv_in.bias has shape (17,), but (16,) is needed"),
    "stacked shape": (lambda f: changed(f, "text_encoder", more(
        "encoder.layers.0.self_attn.q_proj.bias", torch.zeros(127))), "has shape (383,)"),
    "not finite": (lambda f: changed(f, "vae", more("quant_conv.bias", torch.ones(6) / 0)),
                   "quant_conv.bias has values that are not finite"),
    "integers": (lambda f: changed(f, "vae", more("quant_conv.bias", torch.zeros(6).int())),
                 "not floating point"),
    "truncated": (lambda f: cut(f / "unet" / WEIGHTS, 5000), "not a readable .safetensors"),
    "config": (lambda f: setting(f, "unet", block_out_channels=[16, 24, 40]), "is needed"),
    "levels": (lambda f: setting(f, "unet", attention_head_dim=[1, 2]), "do not fit one another"),
    "heads": (lambda f: setting(f, "unet", attention_head_dim=5), "shared by 5 heads"),
    "other heads": (lambda f: setting(f, "unet", num_attention_heads=4), "num_attention_heads = 4"),
    "text heads": (lambda f: setting(f, "text_encoder", num_attention_heads=5), "by 5 heads"),
    "groups": (lambda f: setting(f, "vae", norm_num_groups=7), "no multiples of 7 groups"),
    "no groups": (lambda f: setting(f, "unet", norm_num_groups=0), "norm_num_groups = 0, which"),
    "a width for all": (lambda f: setting(f, "vae", block_out_channels=8), "_channels = 8, which"),
    "text for a size": (lambda f: setting(f, "unet", layers_per_block="2"), "per_block = 2, which"),
    "many layers": (lambda f: setting(f, "text_encoder", num_hidden_layers=10**6), "which can't"),
    "no table": (lambda f: (f / "vae" / "config.json").write_text("[1]"), "not a table"),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), "config.json is missing"),
    "twice": (lambda f: changed(f, "text_encoder", more("text_model.final_layer_norm.bias")),
              "has tensors twice"),
    "JSON": (lambda f: (f / "vae" / "config.json").write_text("{"), "not valid JSON"),
    "activation": (lambda f: setting(f, "text_encoder", hidden_act="quick_gelu"),
                   "hidden_act = quick_gelu"),
    "no U-Net": (lambda f: (f / "unet" / WEIGHTS).unlink(), "holds no diffusion_pytorch_model"),
    "no text": (lambda f: (f / "text_encoder").rename(f / "text"), "add text_encoder/"),
    "text width": (lambda f: setting(f, "unet", cross_attention_dim=64), "is needed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_folders(tmp_path, monkeypatch, capsys, source, mistake):
    spoil, sentence = MISTAKES[mistake]
    spoil(source)
    assert_refused(tmp_path, monkeypatch, capsys, source, sentence)


def assert_refused(tmp_path, monkeypatch, capsys, source, sentence):
    """One sentence on standard error, exit code 1, nothing left behind."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, source, "--out", out / "sd2.safetensors")
    written = capsys.readouterr()
    assert stop.value.code == 1 and written.out == ""
    last = written.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and last.endswith(".")
    assert not list(out.glob("*"))


@pytest.mark.parametrize("name, tensors, sentence", [
    ("sdxl.safetensors", {"conditioner.embedders.0.x": torch.zeros(1)}, "Stable Diffusion XL"),
    ("other.safetensors", {"layer.weight": torch.zeros(1)}, "neither Stable Diffusion 2 nor"),
    ("empty.safetensors", {}, "neither Stable Diffusion 2 nor DINOv2"),
    ("unet.safetensors", {"down_blocks.0.x": torch.zeros(1)}, "one network of three"),
    ("code.ckpt", {"state_dict": Malicious()}, "wants to run code"),
    ("table.pth", {"epoch": 3}, "table of named tensors"),
])
def test_foreign_files(tmp_path, monkeypatch, capsys, name, tensors, sentence):
    write_tensors(tmp_path / name, tensors)
    assert_refused(tmp_path, monkeypatch, capsys, tmp_path / name, sentence)


@pytest.mark.parametrize("keep", [0, 100, 5000])
@pytest.mark.parametrize("name", ["dinov2.pth", "dinov2.safetensors"])
def test_truncated_files(tmp_path, monkeypatch, capsys, name, keep):
    write_tensors(tmp_path / name, facebook_tensors("dinov2_gelu"))
    cut(tmp_path / name, keep)
    assert_refused(tmp_path, monkeypatch, capsys, tmp_path / name, "is not a readable")


def test_single_files_that_do_not_fit(tmp_path, monkeypatch, capsys):
    def refused(tensors, sentence):
        monkeypatch.setattr(official_source, "read_tensors", lambda file: dict(tensors))
        assert_refused(tmp_path, monkeypatch, capsys, tmp_path / "sd.safetensors", sentence)
    (tmp_path / "sd.safetensors").touch()
    tensors = single_file_tensors()
    image = "model.diffusion_model.input_blocks.0.0.weight"
    refused(tensors | {image: torch.zeros(64, 9, 3, 3)}, "plain text-to-image model")
    refused(tensors | {"cond_stage_model.transformer.x": torch.zeros(1)}, "Stable Diffusion 1")
    down = "model.diffusion_model.input_blocks.3.0.op.weight"
    refused({name: t for name, t in tensors.items() if name != down}, "misses tensors")
    refused({name: t for name, t in tensors.items() if "cond_stage" not in name},
            "no text encoder")


def test_other_mistakes(tmp_path, monkeypatch, capsys, converted, diffusers_folder):
    (tmp_path / "weights.zip").write_bytes(b"PK")
    for source, sentence in ((tmp_path / "nowhere", "is not there"), (tmp_path, "holds no model"),
                             (tmp_path / "weights.zip", "unpack it"),
                             (converted, "a model file of this project already")):
        assert_refused(tmp_path, monkeypatch, capsys, source, sentence)
    for words, code in (((converted, "--export", "diffusers"), 2),
                        ((converted, "--export", "diffusers", "--out", tmp_path), 1),
                        ((diffusers_folder, "--dtype", "int8"), 2),
                        ((diffusers_folder, "--out", tmp_path), 1)):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *words)
        assert stop.value.code == code
    for words in ((diffusers_folder, "--out", converted / "x"),
                  (converted, "--export", "diffusers", "--out", converted / "x")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *words)
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"error: --out {converted}/x: {converted} is a file: give a folder."
    source = tmp_path / "dinov2.pth"
    write_tensors(source, facebook_tensors("dinov2_gelu"))
    with pytest.raises(SystemExit):
        run(monkeypatch, source, "--out", source)
    assert "is the source itself" in capsys.readouterr().err
