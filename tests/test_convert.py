"""convert_sd2.py on small files and folders of every official layout."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import convert_sd2
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.official import layouts
from nets.unet import UNet
from tests.fixtures.fourier_in_numpy import enhance
from tests.fixtures.sources import (
    converted,
    diffusers_folder,
    facebook_tensors,
    fourier_tensors,
    run,
    single_file_tensors,
    source,
    write_diffusers,
    write_network,
    write_released,
    write_tensors,
)
from tests.fixtures.weights import names_and_shapes, noise, relative_error, stored


def assert_equal(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -------------------------------------------------------------------------- Stable Diffusion 2


def test_diffusers_folder(converted):
    model = DepthMaster.from_file(converted)
    assert model.kind == "sd2" and "RAIL" in model.licence
    assert [source.split(" sha256:")[0] for source in model.sources] == [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors"]
    assert model.config["unet"] == dict(
        in_channels=3, out_channels=3, channels=[16, 24, 32], layers=1, heads=[1, 2, 4], groups=4,
        attention=[False, True, True], text_width=128, text_tokens=2, fourier=False)
    assert model.config["vae"] == dict(
        channels=[8, 16, 24], layers=1, image_channels=3, latent_channels=3, groups=4,
        scaling_factor=0.3)
    assert relative_error(model.unet.text_embedding, stored("text")[2]["empty"]) < 1e-5
    with torch.no_grad():
        mean, _ = model.vae.moments(noise("image", (1, 3, 101, 135)))
        model.unet.text_embedding.copy_(noise("text_embedding", (1, 2, 128))[0])
        output, _ = model.unet(noise("latent", (2, 3, 13, 17)))
    assert relative_error(mean, stored("vae_three_levels")[2]["mean"]) < 1e-5
    assert relative_error(output, stored("unet_three_levels")[2]["output_1"]) < 1e-5


# ------------------------------------------------------------------------------ DepthMaster


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin",
                                  "diffusion_pytorch_model.safetensors"])
@torch.no_grad()
def test_the_released_folder(tmp_path, converted, diffusers_folder, file, capsys):
    folder = write_released(tmp_path / "released", text=diffusers_folder / "text_encoder",
                            file=file)
    out = convert_sd2.convert(folder, tmp_path / "stage2.safetensors")
    assert "DepthMaster, stage 2" in capsys.readouterr().err
    found, plain = load_file(out), load_file(converted)
    block = fourier_tensors(32)
    assert_equal(found, plain | {name.replace("fftblock", "unet.fourier"): tensor
                                 for name, tensor in block.items()})
    model = DepthMaster.from_file(out)
    assert (model.kind, model.target) == ("stage2", "sqrt_disparity")
    latent = noise("latent", (1, 3, 13, 17))
    output, middle = model.unet(latent)
    tensors = {name.removeprefix("fftblock."): tensor.numpy() for name, tensor in block.items()}
    replaced = torch.from_numpy(enhance(tensors, middle[0].numpy())).float()[None]
    model.unet.fourier.forward = lambda x: replaced
    assert relative_error(output, model.unet(latent)[0]) < 1e-5


def test_the_released_folder_and_back(tmp_path, diffusers_folder):
    folder = write_released(tmp_path / "released", text=diffusers_folder / "text_encoder")
    first = convert_sd2.convert(folder, tmp_path / "first.safetensors")
    exported = convert_sd2.export(first, tmp_path / "exported")
    theirs = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    assert_equal(theirs, torch.load(folder / "unet" / "diffusion_pytorch_model.bin"))
    second = convert_sd2.convert(exported, tmp_path / "second.safetensors")
    assert_equal(load_file(second), load_file(first))
    assert DepthMaster.from_file(second).kind == "stage2"


@pytest.mark.parametrize("place", [".", "unet"])
def test_a_stage_1_save_with_its_adapter(tmp_path, source, converted, place, capsys):
    adapter = {f"{layer}.{name}": torch.zeros(3) for layer in (0, 2, 4)
               for name in ("weight", "bias")}
    torch.save(adapter, source / place / "dinov2_adapter.pth")
    out = convert_sd2.convert(source, tmp_path / "stage1.safetensors")
    said = capsys.readouterr().err
    assert "DepthMaster, stage 1" in said and "ignored: 6 tensors" in said
    assert DepthMaster.from_file(out).kind == "stage1"
    assert_equal(load_file(out), load_file(converted))
    torch.save(adapter | {"6.weight": torch.zeros(3)}, source / place / "dinov2_adapter.pth")
    with pytest.raises(ValueError, match="6.weight"):
        convert_sd2.convert(source, tmp_path / "other.safetensors")


def test_the_full_released_block_is_accounted_for():
    names = names_and_shapes("sd2_unet_diffusers") | {
        name: tuple(tensor.shape) for name, tensor in fourier_tensors(1280).items()}
    assert len(names) == 702
    assert sum(math.prod(shape) for shape in names.values()) == 944_565_444
    layout = layouts.choose("unet", names)
    with torch.device("meta"):
        ours = UNet(fourier=True).state_dict()
    ours.pop("text_embedding")
    assert {layouts.our_name(name, layout): shape for name, shape in names.items()} == {
        name: tuple(tensor.shape) for name, tensor in ours.items()}


# -------------------------------------------------------------------- Stable Diffusion 2's variants


def old_attention_names(tensors):
    changes = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in changes.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    return tensors


def convolutions(*parts):
    """Linear weights whose name has one of these parts as 1x1 convolutions."""
    def change(tensors):
        return {name: tensor[:, :, None, None] if tensor.ndim == 2 and any(p in name for p in parts)
                else tensor for name, tensor in tensors.items()}
    return change


def with_prefix_and_extra(tensors):
    tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


VARIANTS = [
    ("unet", "unet_three_levels", "diffusion_pytorch_model.bin", dict),
    ("unet", "unet_three_levels", "diffusion_pytorch_model.safetensors",
     convolutions("proj_in", "proj_out")),
    ("vae", "vae_three_levels", "diffusion_pytorch_model.bin", old_attention_names),
    ("vae", "vae_three_levels", "diffusion_pytorch_model.safetensors", convolutions("to_")),
    ("text_encoder", "text", "pytorch_model.bin", with_prefix_and_extra),
]


@pytest.mark.parametrize("folder, name, file, change", VARIANTS)
def test_variants_of_the_diffusers_folder(tmp_path, source, converted, folder, name, file, change):
    for old in (source / folder).glob("*.safetensors"):
        old.unlink()
    write_network(source / folder, name, file, change)
    out = convert_sd2.convert(source, tmp_path / "out.safetensors")
    assert_equal(load_file(out), load_file(converted))


def test_half_precision(tmp_path, source, converted, diffusers_folder):
    def halved(tensors):
        return {name: tensor.half() for name, tensor in tensors.items()}
    (source / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    write_network(source / "unet", "unet_three_levels",
                  "diffusion_pytorch_model.fp16.safetensors", halved)
    found = load_file(convert_sd2.convert(source, tmp_path / "from_half.safetensors"))
    full = load_file(converted)
    assert_equal(found, {name: tensor.half().float() if name.startswith("unet.")
                         and "text_embedding" not in name else tensor
                         for name, tensor in full.items()})
    out = convert_sd2.convert(diffusers_folder, tmp_path / "half.safetensors", torch.float16)
    assert_equal(load_file(out), {name: tensor.half() for name, tensor in full.items()})


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_file(tmp_path, diffusers_folder, ending):
    tensors = single_file_tensors()
    schedule = {name: torch.zeros(1000) for name in names_and_shapes("sd2_single_file")
                if "." not in name}
    everything = tensors | schedule | {"model_ema.decay": torch.tensor(0.9999),
                                       "model_ema.diffusion_modelout2bias": torch.zeros(4)}
    file = tmp_path / f"v2-1_768-ema-pruned.{ending}"
    if ending == "ckpt":
        everything = {"state_dict": everything, "global_step": 110000}
    write_tensors(file, everything)
    found = load_file(convert_sd2.convert(file, tmp_path / "single.safetensors"))

    folder = write_diffusers(tmp_path / "folder", "unet", "vae", diffusers_folder / "text_encoder")
    expected = load_file(convert_sd2.convert(folder, tmp_path / "folder.safetensors"))
    embedding = "unet.text_embedding"
    assert relative_error(found[embedding], stored("text")[2]["empty"]) < 1e-5
    found[embedding] = expected[embedding]
    assert_equal(found, expected)
    header = [model_file.read_header(tmp_path / name)["config"]
              for name in ("single.safetensors", "folder.safetensors")]
    assert header[0] == header[1]


def test_equal_runs_write_equal_bytes(tmp_path, converted, diffusers_folder):
    again = convert_sd2.convert(diffusers_folder, tmp_path / "again.safetensors")
    assert again.read_bytes() == converted.read_bytes()


@pytest.mark.parametrize("kind", ["sd2", "stage1", "stage2"])
def test_export_and_back(tmp_path, converted, kind, capsys):
    model = DepthMaster.from_file(converted)
    model.kind, model.licence = kind, "of the test"
    model.config |= dict(target="disparity", train_size=[192, 256], processing_res=256)
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    model.save(before)
    folder = convert_sd2.export(before, tmp_path / "exported")
    for name in ("unet_three_levels", "vae_three_levels"):
        part = folder / name.split("_")[0]
        settings, tensors, _ = stored(name)
        assert_equal(load_file(part / "diffusion_pytorch_model.safetensors"), tensors)
        written = json.loads((part / "config.json").read_text())
        assert {key: written[key] for key in settings} == settings
    capsys.readouterr()
    convert_sd2.convert(folder, after)
    said = capsys.readouterr().err.splitlines()[0]
    assert said == f"An exported {kind} model: a diffusers folder, of the test"
    assert_equal(load_file(after), load_file(before))
    headers = [model_file.read_header(file) for file in (before, after)]
    for key in ("kind", "licence", "config"):
        assert headers[0][key] == headers[1][key]


# ---------------------------------------------------------------------------------------- DINOv2


@pytest.mark.parametrize("name", ["dinov2_gelu", "dinov2_swiglu"])
@torch.no_grad()
def test_dinov2_in_all_layouts(tmp_path, name):
    facebook = facebook_tensors(name)
    depth_anything = {f"pretrained.{key}": tensor for key, tensor in facebook.items()}
    depth_anything["depth_head.scratch.output_conv1.weight"] = torch.zeros(2, 2)
    write_network(tmp_path / "folder", name, "model.safetensors")
    write_tensors(tmp_path / "huggingface.safetensors", stored(name)[1])
    write_tensors(tmp_path / "dinov2_pretrain.pth", facebook)
    write_tensors(tmp_path / "depth_anything_v2.pth", depth_anything)
    expected = stored(name)[2]["tokens_5x8"]
    licences = {"folder": "Apache-2.0 (DINOv2)", "huggingface.safetensors": "Apache-2.0 (DINOv2)",
                "dinov2_pretrain.pth": "Apache-2.0 (DINOv2)",
                "depth_anything_v2.pth": "Apache-2.0 (Depth-Anything-V2)"}
    for source, licence in licences.items():
        out = convert_sd2.convert(tmp_path / source, tmp_path / "out.safetensors")
        tokens = DINOv2.from_file(out)(noise("image", (1, 3, 70, 112)))
        assert relative_error(tokens, expected) < 1e-5
        assert model_file.read_header(out)["licence"] == licence


def test_licence_of_large_depth_anything(tmp_path):
    with torch.device("meta"):
        shapes = DINOv2(width=1024, depth=1, heads=16, swiglu=False).state_dict()
    tensors = {f"pretrained.{name}": torch.zeros(t.shape) for name, t in shapes.items()}
    write_tensors(tmp_path / "depth_anything_v2_vitl.pth", tensors)
    out = convert_sd2.convert(tmp_path / "depth_anything_v2_vitl.pth", tmp_path / "out.safetensors")
    assert model_file.read_header(out)["licence"] == "CC-BY-NC-4.0 (Depth-Anything-V2)"


def test_command_line(tmp_path, monkeypatch, capsys, diffusers_folder):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, diffusers_folder)
    written = capsys.readouterr()
    assert written.out == "weights/sd2.safetensors\n"
    assert "vae/diffusion_pytorch_model.safetensors: " in written.err and "float32" in written.err
    run(monkeypatch, "weights/sd2.safetensors", "--export", "diffusers", "--out", "exported")
    written = capsys.readouterr()
    assert written.out == "exported\n" and "text_embedding.safetensors" in written.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "weights"]
