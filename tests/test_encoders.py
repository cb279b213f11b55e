"""OpenCLIP, AIMv2 and SAM as teachers: from their official files to a short run of stage 1."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import convert_sd2
import train_stage1
from extras.encoder_files import encoder_name
from extras.encoders import NETWORKS, resized
from nets import model_file
from nets.dinov2 import DINOv2
from nets.official.source import Source
from tests.fixtures.encoders import (
    CONFIG,
    SMALL,
    authors_tensors,
    family,
    huggingface_tensors,
    layouts_of,
)
from tests.fixtures.sources import write_tensors
from tests.worlds import call, files, losses_of, run

LICENCES = {"openclip": "MIT", "aimv2": "apple-amlr", "native": "apple-amlr", "sam": "Apache-2.0"}


def write_folder(folder, kind, tensors, **settings):
    """A folder as transformers writes it: weights and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG[kind] | settings))
    return folder


def authors_of(kind):
    return authors_tensors(kind, huggingface_tensors(kind))


def trained_file(folder, kind):
    """A small encoder of a kind as a model file."""
    source = write_folder(folder / kind, kind, huggingface_tensors(kind))
    return convert_sd2.convert(source, folder / f"{kind}.safetensors")


# ------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", SMALL)
def test_all_layouts_give_the_same_network(tmp_path, kind, capsys):
    written = set()
    for number, (whose, tensors) in enumerate(layouts_of(kind).items()):
        for ending in ("safetensors", "pth"):
            source = tmp_path / str(number) / f"encoder.{ending}"
            source.parent.mkdir(exist_ok=True)
            write_tensors(source, tensors)
            settings = {"vision_config": CONFIG[kind]} if "model" in whose else CONFIG[kind]
            source.with_name("config.json").write_text(json.dumps(settings))
            out = convert_sd2.convert(source, tmp_path / "out.safetensors")
            header = model_file.read_header(out)
            assert (header["kind"], header["config"]) == (family(kind), SMALL[kind])
            assert LICENCES[kind] in header["licence"] and header["licence"] in (
                capsys.readouterr().err)
            written.add(tuple((name, tensor.numpy().tobytes())
                              for name, tensor in sorted(load_file(out).items())))
    assert len(written) == 1


def test_sizes_without_a_config(tmp_path):
    """Heads by width: 64 channels each, 80 in ViT-H, 128 in AIMv2, SAM's by their tables."""
    for kind, heads in (("openclip", 1), ("aimv2", 1), ("native", 1), ("sam", 2)):
        write_tensors(tmp_path / "encoder.pth", authors_of(kind))
        out = convert_sd2.convert(tmp_path / "encoder.pth", tmp_path / "out.safetensors")
        assert model_file.read_header(out)["config"] == SMALL[kind] | {"heads": heads}


def test_open_clips_own_settings(tmp_path):
    write_tensors(tmp_path / "open_clip_pytorch_model.bin", authors_of("openclip"))
    settings = {"model_cfg": {"vision_cfg": {"width": 64, "head_width": 32}}}
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps(settings))
    out = convert_sd2.convert(tmp_path, tmp_path / "out.safetensors")
    assert model_file.read_header(out)["config"] == SMALL["openclip"]
    settings["model_cfg"]["quick_gelu"] = True
    config.write_text(json.dumps(settings))
    out.unlink()
    with pytest.raises(ValueError, match="hidden_act = quick_gelu"):
        convert_sd2.convert(tmp_path, out)
    config.write_text("[]")
    with pytest.raises(ValueError, match="not a table of OpenCLIP's settings"):
        convert_sd2.convert(tmp_path, out)


def refused(monkeypatch, capsys, source, sentence):
    """One sentence on standard error, exit code 1, nothing written."""
    out = source.parent / "out.safetensors"
    assert call(monkeypatch, convert_sd2, source, "--out", out) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and last.endswith(".")
    assert not out.exists()


@pytest.mark.parametrize("kind, lost, foreign", [
    ("openclip", "visual.ln_pre.bias", "visual.transformer.resblocks.0.ls_1.gamma"),
    ("aimv2", "trunk.blocks.1.mlp.fc3.weight", "trunk.blocks.0.norm_1.bias"),
    ("sam", "image_encoder.blocks.1.attn.rel_pos_w", "image_encoder.neck.convs.0.weight")])
def test_missing_and_foreign_tensors(tmp_path, monkeypatch, capsys, kind, lost, foreign):
    tensors = authors_of(kind)
    source = tmp_path / "encoder.safetensors"
    prefix = {"openclip": "visual.", "aimv2": "", "sam": "image_encoder."}[kind]
    write_tensors(source, {name: t for name, t in tensors.items() if name != lost})
    refused(monkeypatch, capsys, source, f"misses tensors: 1 ({lost.removeprefix(prefix)})")
    write_tensors(source, tensors | {foreign: torch.zeros(3)})
    refused(monkeypatch, capsys, source, f"belong to it: 1 ({foreign.removeprefix(prefix)})")


def test_other_activations_are_refused(tmp_path, monkeypatch, capsys):
    tensors = huggingface_tensors("openclip")
    folder = write_folder(tmp_path / "clip", "openclip", tensors, hidden_act="quick_gelu")
    refused(monkeypatch, capsys, folder, "hidden_act = quick_gelu")
    # transformers' default is not written by all of its versions.
    (folder / "config.json").write_text('{"vision_config": {"hidden_size": 64}}')
    refused(monkeypatch, capsys, folder, "hidden_act = quick_gelu")
    write_tensors(tmp_path / "ViT-L-14.pth",
                  authors_of("openclip") | {"input_resolution": torch.tensor(224)})
    refused(monkeypatch, capsys, tmp_path / "ViT-L-14.pth", "is OpenAI's own CLIP")


def test_a_lost_position_table_is_not_taken_for_a_native_model(tmp_path, monkeypatch, capsys):
    tensors = huggingface_tensors("native")
    folder = write_folder(tmp_path / "aimv2", "aimv2", tensors)
    refused(monkeypatch, capsys, folder, "misses tensors: 1 (embeddings.position_embedding.weight)")


def test_an_encoder_has_no_export(tmp_path, monkeypatch, capsys):
    for kind in ("openclip", "aimv2", "sam"):
        file = trained_file(tmp_path, kind)
        for export in (["diffusers"], ["onnx", "--size", 64, 64]):
            assert call(monkeypatch, convert_sd2, file, "--export", *export, "--out",
                        tmp_path / "exported") == 1
            assert f"holds a {kind} model" in capsys.readouterr().err


def test_names_of_the_files(tmp_path, monkeypatch):
    names = {"openclip": "openclip_vith14", "aimv2": "aimv2_large14", "sam": "sam_vith16",
             "dinov2": "dinov2_vitg14"}
    networks = NETWORKS | {"dinov2": DINOv2}
    sources = {kind: Source(kind, "", {}, {}, "") for kind in networks}
    for kind, name in names.items():
        defaults = networks[kind].__init__.__kwdefaults__
        assert encoder_name(sources[kind], defaults) == name
    for sizes, name in ((dict(width=1536, patch=14, native=True), "aimv2_huge14_native"),
                        (dict(width=1024, patch=14, grid=32), "aimv2_large14_448")):
        assert encoder_name(sources["aimv2"], sizes) == name
    other = Source("dinov2", "", {}, {}, "CC-BY-NC-4.0 (Depth-Anything-V2)")
    assert encoder_name(other, dict(width=1024, patch=14, grid=37)) == "depth_anything_v2_vitl14"
    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / "sam.pth", authors_of("sam"))
    assert convert_sd2.convert("sam.pth").name == "sam_width64_16_96.safetensors"


# ------------------------------------------------------------------------------------- the networks


def test_positions_against_a_ramp():
    """A table that tells row and column still does so at another size."""
    ramp = torch.arange(8.0)
    table = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1).flatten(0, 1)  # N,2
    assert resized(table, 8, 8) is table
    larger = resized(table, 16, 24).reshape(16, 24, 2)
    torch.testing.assert_close(larger[6:10, 9:15, 0],
                               ((torch.arange(6, 10) + 0.5) / 2 - 0.5)[:, None].expand(4, 6),
                               atol=2e-2, rtol=0)
    assert (larger[:, 1:, 1] > larger[:, :-1, 1]).all()


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_bfloat16_and_autocast(tmp_path, kind):
    """As in training: weights in bfloat16 under autocast; tokens stay near those in float32."""
    file = trained_file(tmp_path, kind)
    full, half = (NETWORKS[family(kind)].from_file(file, dtype=dtype)
                  for dtype in (None, torch.bfloat16))
    image = torch.rand(2, 3, 5 * full.patch, 7 * full.patch)
    expected = full(image)
    assert expected.shape == (2, 35, full.width)
    with torch.autocast("cpu", torch.bfloat16):
        cast = half(image.bfloat16())
    for tokens in (cast, half(image.bfloat16())):
        assert F.cosine_similarity(tokens.float(), expected, dim=-1).mean() > 0.98


# ---------------------------------------------------------------------------------------- training


def train(monkeypatch, files, out, *options):
    return run(monkeypatch, train_stage1, out, "--sd2", files / "sd2.safetensors", "--data",
               files / "pairs", *options)


@pytest.mark.parametrize("kind", SMALL)
def test_stage_1_with_each_teacher(files, tmp_path, monkeypatch, kind):
    teacher = trained_file(tmp_path, kind)
    rows = train(monkeypatch, files, tmp_path / "run", "--teacher", teacher, "--steps", 2)
    assert all(row["alignment"] > 0 for row in rows if "loss" in row)
    trained = torch.load(tmp_path / "run/state.pt", weights_only=True)["trained"]
    assert trained["adapter.4.weight"].shape[0] == {"sam": 24}.get(kind, 64)


def test_each_teacher_sees_the_picture_in_its_own_way(files, tmp_path):
    """The objective's tokens are those of the picture, brought by hand to the encoder's needs."""
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    for kind, size in (("openclip", (28, 42)), ("sam", (32, 48))):
        teacher = train_stage1.open_teacher(trained_file(tmp_path, kind), torch.float32)
        mean, std = {"openclip": ((0.48145466, 0.4578275, 0.40821073),
                                  (0.26862954, 0.26130258, 0.27577711)),
                     "sam": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}[kind]
        seen = (image / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1)
        seen = F.interpolate(seen, size, mode="bicubic")
        model = train_stage1.DepthMaster.from_file(files / "sd2.safetensors")
        objective = train_stage1.Stage1(model, teacher, "mid", "kl")
        torch.testing.assert_close(objective.teacher_tokens(image, (2, 3)), teacher(seen))


def test_the_cache_depends_on_the_teacher(files, tmp_path, monkeypatch):
    options = ["--steps", 1, "--cache", tmp_path / "cache", "--teacher"]
    for count, kind in enumerate(("openclip", "sam"), start=1):
        train(monkeypatch, files, tmp_path / f"run_{kind}", *options, trained_file(tmp_path, kind))
        assert len(list((tmp_path / "cache").iterdir())) == count


def test_the_old_option_and_the_runs_that_were_begun_with_it(files, tmp_path, monkeypatch, capsys):
    """--dinov2 means --teacher; an args.json that says dinov2 resumes with the same file only."""
    options = ["--dinov2", files / "dinov2.safetensors", "--decay-steps", 9, "--steps"]
    whole = losses_of(train(monkeypatch, files, tmp_path / "whole", *options, 4))
    old = tmp_path / "old"
    train(monkeypatch, files, old, *options, 2)
    told = json.loads((old / "args.json").read_text())
    assert told["teacher"] == str(files / "dinov2.safetensors") and "dinov2" not in told
    told["dinov2"] = told.pop("teacher")
    (old / "args.json").write_text(json.dumps(told))
    other = [trained_file(tmp_path, "sam"), "--decay-steps", 9, "--steps", 4, "--extend"]
    with pytest.raises(ValueError, match="teacher: .*dinov2.safetensors then, .*sam.safetensors"):
        train(monkeypatch, files, old, "--teacher", *other)
    new = ["--teacher", *options[1:]]
    assert losses_of(train(monkeypatch, files, old, *new, 4, "--extend")) == whole
    assert "Resuming" in capsys.readouterr().err
    assert "dinov2" not in json.loads((old / "args.json").read_text())


def test_a_teacher_of_another_kind(files, tmp_path, monkeypatch):
    assert isinstance(train_stage1.open_teacher(files / "dinov2.safetensors", None), DINOv2)
    with pytest.raises(ValueError, match="holds a sd2 model .*, but what is needed here is "):
        train(monkeypatch, files, tmp_path, "--teacher", files / "sd2.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors is not there: get DINOv2's"):
        train(monkeypatch, files, tmp_path, "--teacher", "nowhere.safetensors")
