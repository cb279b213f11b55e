"""convert_sd2.py on official weights in other clothes, and what is said of those that do not fit.

Shards, hub caches, files with another ending, one level too high or too low, other files in the
place of weights.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from convert_sd2 import convert
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.official.source import open_source
from storage import sha256
from tests.fixtures.sources import (
    converted,
    diffusers_folder,
    facebook_tensors,
    single_file_tensors,
    source,
    write_network,
    write_released,
    write_tensors,
)
from tests.fixtures.weights import noise, stored, weights

UNET = "diffusion_pytorch_model.safetensors"


def refused(source, *words, read=None):
    """The source is refused with one sentence that has all the words."""
    out = source.absolute().parent / "out.safetensors"
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(source) if read else convert(source, out)
    said = str(caught.value)
    assert all(str(word) in said for word in words), said
    assert said.endswith(".") and "\n" not in said
    assert ". " not in said.removeprefix(str(source))


def assert_same(source, expected, out):
    """The source converts to the tensors of another converted file; its header."""
    found, expected = load_file(convert(source, out)), load_file(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return model_file.read_header(out)


def write_json(file, content):
    file.write_text(json.dumps(content))


def less(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The small DINOv2 in transformers' plain form, converted."""
    folder = tmp_path_factory.mktemp("dinov2")
    write_network(folder / "plain", "dinov2_gelu", "model.safetensors")
    return convert(folder / "plain", folder / "dinov2.safetensors")


# ----------------------------------------------------------------------------------------- DINOv2


def wider(name):
    """(config.json's content, tensors) of a small DINOv2, but 448 channels wide."""
    settings, tensors, _ = stored(name)
    other = {128: 448, 512: 1792}
    shapes = {key: [other.get(side, side) for side in t.shape] for key, t in tensors.items()}
    return settings | {"hidden_size": 448, "num_attention_heads": 7}, weights(shapes)


def write_depth_anything(folder, settings, tensors, file="model.safetensors"):
    """Depth-Anything-V2 as transformers writes it."""
    folder.mkdir()
    if settings:
        write_json(folder / "config.json", {"model_type": "depth_anything", "backbone": None,
                                            "backbone_config": settings, "fusion_hidden_size": 64})
    extras = ("neck.reassemble_stage.layers.0.projection.weight", "neck.convs.0.weight",
              "neck.fusion_stage.layers.0.projection.bias", "head.conv1.weight")
    tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    write_tensors(folder / file, tensors | {name: torch.ones(2, 2) for name in extras})
    return sorted(extras)


@pytest.mark.parametrize("make, licence", [
    (lambda name: stored(name)[:2], "Apache-2.0 (Depth-Anything-V2)"),
    (wider, "CC-BY-NC-4.0 (Depth-Anything-V2)")])
@torch.no_grad()
def test_depth_anything_of_transformers(tmp_path, make, licence):
    settings, tensors = make("dinov2_gelu")
    (tmp_path / "plain").mkdir()
    write_json(tmp_path / "plain" / "config.json", settings)
    write_tensors(tmp_path / "plain" / "model.safetensors", tensors)
    plain = convert(tmp_path / "plain", tmp_path / "plain.safetensors")
    extras = write_depth_anything(tmp_path / "hf", settings, tensors)
    assert open_source(tmp_path / "hf").ignored == extras
    out = tmp_path / "out.safetensors"
    header = assert_same(tmp_path / "hf", plain, out)
    assert (header["kind"], header["licence"]) == ("dinov2", licence)
    image = noise("image", (1, 3, 28, 42))
    assert torch.equal(DINOv2.from_file(out)(image), DINOv2.from_file(plain)(image))


def test_depth_anything_with_swiglu_with_a_pickle_and_without_settings(tmp_path, dinov2):
    settings, tensors, _ = stored("dinov2_swiglu")
    write_depth_anything(tmp_path / "swiglu", settings, tensors)
    assert open_source(tmp_path / "swiglu").parts["dinov2"].settings == settings
    convert(tmp_path / "swiglu", tmp_path / "out.safetensors")
    write_depth_anything(tmp_path / "bin", {}, stored("dinov2_gelu")[1], "pytorch_model.bin")
    assert_same(tmp_path / "bin", dinov2, tmp_path / "out.safetensors")


def test_the_settings_of_depth_anything_count(tmp_path):
    settings, tensors, _ = stored("dinov2_gelu")
    for number, (wrong, words) in enumerate(((settings | {"num_attention_heads": 3}, "3 heads"),
                                             (settings | {"mlp_ratio": 3}, "mlp_ratio = 3"),
                                             ("dinov2", "not a table"))):
        write_depth_anything(tmp_path / str(number), wrong, tensors)
        refused(tmp_path / str(number), words)


def test_depth_anything_that_is_incomplete(tmp_path):
    settings, tensors, _ = stored("dinov2_gelu")
    write_depth_anything(tmp_path / "hf", settings, less(tensors, "layernorm.bias"))
    refused(tmp_path / "hf", "misses tensors: 1 (layernorm.bias)")


@pytest.mark.parametrize("name", ["dinov2_gelu", "dinov2_swiglu"])
@pytest.mark.parametrize("authors", [False, True])
def test_dinov2_without_a_mask_token(tmp_path, name, authors):
    tensors = facebook_tensors(name) if authors else stored(name)[1]
    write_tensors(tmp_path / "whole.pth", tensors)
    write_tensors(tmp_path / "less.pth", less(tensors, "mask_token", "embeddings.mask_token"))
    whole = load_file(convert(tmp_path / "whole.pth", tmp_path / "whole.safetensors"))
    found = load_file(convert(tmp_path / "less.pth", tmp_path / "less.safetensors"))
    assert found.keys() == whole.keys() and found["mask_token"].shape == (1, 128)
    assert all(torch.equal(tensor, torch.zeros(1, 128) if name == "mask_token" else whole[name])
               for name, tensor in found.items())
    DINOv2.from_file(tmp_path / "less.safetensors")


def test_a_checkpoint_of_dinov2s_training(tmp_path):
    backbone = {f"backbone.{name}": t for name, t in facebook_tensors("dinov2_gelu").items()}
    teacher = backbone | {"dino_head.last_layer.weight_v": torch.zeros(2, 2)}
    for content in ({"teacher": teacher}, {"teacher": teacher, "student": {}, "iteration": 3}):
        torch.save(content, tmp_path / "teacher_checkpoint.pth")
        refused(tmp_path / "teacher_checkpoint.pth", "checkpoint of DINOv2's training")
    torch.save(backbone, tmp_path / "teacher_checkpoint.pth")  # the same, unpacked: no licence
    refused(tmp_path / "teacher_checkpoint.pth", "misses tensors")


# -------------------------------------------------------------------- in the place of the weights

POINTER = (b"version https://git-lfs.github.com/spec/v1\n"
           b"oid sha256:4665dc1a24ea2b0e8ca96f3ed3d3ea5a3a5b5d5c5e5f5a5b5c5d5e5f5a5b5c5d\n"
           b"size 346334312\n")
STAND_INS = pytest.mark.parametrize("content, said", [
    (POINTER, "git lfs pull"), (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    (b"\xef\xbb\xbf\r\n<html lang=en>", "web page")], ids=["pointer", "page", "page with a BOM"])


@STAND_INS
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.pth", "v2-1.ckpt",
                                  "model.pt", "4665dc1a24ea"])
def test_a_file_that_only_stands_for_one(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, tmp_path / name, said)
    for reader in (DepthMaster.from_file, DINOv2.from_file):  # as --ckpt, --sd2, --teacher
        refused(tmp_path / name, tmp_path / name, said, read=reader)


@STAND_INS
@pytest.mark.parametrize("name", [
    f"unet/{UNET}", "unet/config.json", "vae/config.json", "text_encoder/model.safetensors",
    "text_encoder/config.json", f"vae/{UNET}", "dinov2_adapter.pth", "text_embedding.safetensors"])
def test_a_part_of_a_folder_that_only_stands_for_one(source, name, content, said):
    (source / name).unlink(missing_ok=True)  # one is a link
    (source / name).write_bytes(content)
    refused(source, source / name, said)


@STAND_INS
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_or_an_index_that_only_stands_for_one(source, number, content, said):
    file = sharded(source / "unet", UNET)[number]
    file.write_bytes(content)
    refused(source, file, said)


@STAND_INS
def test_dinov2s_settings_that_only_stand_for_them(tmp_path, content, said):
    write_network(tmp_path / "dinov2", "dinov2_gelu", "model.safetensors")
    (tmp_path / "dinov2" / "config.json").write_bytes(content)
    refused(tmp_path / "dinov2", tmp_path / "dinov2" / "config.json", said)


def test_settings_with_a_byte_order_mark(tmp_path, source, converted):
    config = source / "unet" / "config.json"
    config.write_text(config.read_text(), encoding="utf-8-sig")
    assert_same(source, converted, tmp_path / "out.safetensors")


# ----------------------------------------------------------------------------------------- shards


def sharded(folder, old, index=None, shard=None):
    """Splits a file of weights of a folder; the paths of the index and of the two files."""
    stem, ending = old.split(".")
    index = folder / (index or f"{stem}.{ending}.index.json")
    files = [folder / (shard or f"{stem}-0000{{}}-of-00002.{ending}").format(i) for i in (1, 2)]
    tensors = read(folder / old)
    (folder / old).unlink()
    names = sorted(tensors)
    halves = dict(zip(files, (names[:len(names) // 2], names[len(names) // 2:])))
    for file, half in halves.items():
        write_tensors(file, {name: tensors[name] for name in half})
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": {
        name: file.name for file, half in halves.items() for name in half}})
    return [index, *files]


def read(file):
    if file.suffix != ".safetensors":
        return torch.load(file)
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}


@pytest.mark.parametrize("index, shard", [
    ("{}.safetensors.index.json", "{}-0000{{}}-of-00002.safetensors"),
    ("{}.safetensors.index.fp16.json", "{}.fp16-0000{{}}-of-00002.safetensors"),
    ("{}.fp16.safetensors.index.json", "{}-0000{{}}-of-00002.fp16.safetensors"),
    ("{}.bin.index.json", "{}-0000{{}}-of-00002.bin"),
    ("{}.bin.index.fp16.json", "{}.fp16-0000{{}}-of-00002.bin"),
    ("{}.fp16.bin.index.json", "{}-0000{{}}-of-00002.fp16.bin")])
def test_weights_in_several_files(tmp_path, source, converted, index, shard):
    files = sharded(source / "unet", UNET, *(name.format(UNET[:-12]) for name in (index, shard)))
    header = assert_same(source, converted, tmp_path / "out.safetensors")
    assert header["sources"][:3] == [f"unet/{file.name} sha256:{sha256(file)}" for file in files]
    assert [line.split()[0] for line in header["sources"][3:]] == [
        f"vae/{UNET}", "text_encoder/model.safetensors"]


@pytest.mark.parametrize("old", ["model.safetensors", "pytorch_model.bin"])
def test_a_text_encoder_and_an_autoencoder_in_several_files(tmp_path, source, converted, old):
    (source / "text_encoder" / "model.safetensors").unlink()
    write_network(source / "text_encoder", "text", old)
    files = sharded(source / "text_encoder", old)
    files = sharded(source / "vae", UNET) + files
    header = assert_same(source, converted, tmp_path / "out.safetensors")
    assert header["sources"][1:] == [
        f"{file.parent.name}/{file.name} sha256:{sha256(file)}" for file in files]


@pytest.mark.parametrize("old", ["model.safetensors", "pytorch_model.bin"])
def test_dinov2_in_several_files(tmp_path, dinov2, old):
    """Given by its folder, its index or one of them."""
    folder = tmp_path / "dinov2"
    write_network(folder, "dinov2_gelu", old)
    files = sharded(folder, old)
    for given in (folder, *files):
        header = assert_same(given, dinov2, tmp_path / "out.safetensors")
        assert header["sources"] == [f"{file.name} sha256:{sha256(file)}" for file in files]


def test_the_source_in_several_files_is_not_overwritten(tmp_path):
    write_network(tmp_path, "dinov2_gelu", "model.safetensors")
    for file in sharded(tmp_path, "model.safetensors"):
        before = file.read_bytes()
        with pytest.raises(ValueError, match="is the source itself"):
            convert(tmp_path, file)
        assert file.read_bytes() == before


def test_one_file_counts_before_several_and_full_precision_before_half(source, tmp_path, converted):
    sharded(source / "unet", UNET)
    (source / "unet" / UNET.replace(".", ".fp16.")).write_bytes(POINTER)
    assert_same(source, converted, tmp_path / "out.safetensors")
    write_network(source / "unet", "unet_three_levels")
    (source / "unet" / f"{UNET}.index.json").write_text("{")
    assert_same(source, converted, tmp_path / "out.safetensors")


def change_shard(change):
    def spoil(index, first, second):
        write_tensors(second, change(read(second)))
        return second, index.name, "missing or too many"
    return spoil


def change_index(change, *words):
    def spoil(index, first, second):
        change(index)
        return index, *words
    return spoil


def leads(name):
    """Lets the index name another file for one tensor."""
    def change(index):
        content = json.loads(index.read_text())
        content["weight_map"]["conv_in.bias"] = name
        write_json(index, content)
    return change_index(change, "no index of weights")


def missing(index, first, second):
    second.unlink()
    return second, "is missing"


def twice(index, first, second):
    first.write_bytes(second.read_bytes())
    return first, "missing or too many"


def empty(index, first, second):
    first.write_bytes(b"")
    return first, "not a readable"


WRONG_INDICES = {
    "missing": missing, "empty": empty,
    "too many": change_shard(lambda tensors: tensors | {"extra": torch.zeros(2)}),
    "too few": change_shard(lambda tensors: less(tensors, min(tensors))),
    "the same twice": twice,
    **{f"leads to {name}": leads(name) for name in (
        f"../vae/{UNET}", f"/tmp/{UNET}", f"./{UNET}", f"deeper/{UNET}", "..", ".", "", 3, None,
        ["a"], "config.json", f"{UNET}.index.json")},
    **{f"damaged {text[:9]}": change_index(lambda index, text=text: index.write_text(text), said)
       for text, said in (("{", "not valid JSON"), ("", "not valid JSON"),
                          ("[" * 100_000, "not valid JSON"), ("\0\0", "not valid JSON"),
                          ("[]", "no index"), ("null", "no index"), ("{}", "no index"),
                          ('{"weight_map": {}}', "no index"), ('{"weight_map": 3}', "no index"),
                          ('{"weight_map": ["a"]}', "no index"))},
    "other bytes": change_index(lambda index: index.write_bytes(bytes(range(256))), "not valid"),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES)
def test_weights_in_several_files_that_do_not_fit(source, wrong):
    refused(source, *WRONG_INDICES[wrong](*sharded(source / "unet", UNET)))


# ---------------------------------------------------------------- told by content, not by the name


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pth", "a.pt", "a", "a.weights", "a.0"])
def test_safetensors_with_another_ending(tmp_path, dinov2, name):
    write_tensors(tmp_path / "model.safetensors", stored("dinov2_gelu")[1])
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert_same(tmp_path / name, dinov2, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a", "a.zip", "a.json.download"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_another_ending(tmp_path, dinov2, name, zipped):
    torch.save(stored("dinov2_gelu")[1], tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_same(tmp_path / name, dinov2, tmp_path / "out.safetensors")


def test_endings_that_are_swapped_in_a_folder(tmp_path, source, converted):
    unet, vae = source / "unet", source / "vae"
    (unet / UNET).rename(unet / UNET.replace("safetensors", "bin"))
    torch.save(read(vae / UNET), vae / UNET)
    assert_same(source, converted, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name, pickled", [("v2-1.safetensors", True), ("v2-1.ckpt", False),
                                           ("v2-1", True)])
def test_single_files_by_any_name(tmp_path, name, pickled):
    write_tensors(tmp_path / f"a.{'ckpt' if pickled else 'safetensors'}", single_file_tensors())
    next(tmp_path.glob("a.*")).rename(tmp_path / name)
    source = open_source(tmp_path / name)
    assert source.kind == "sd2" and set(source.parts) == {"unet", "vae", "text"}
    convert(tmp_path / name, tmp_path / "out.safetensors")


# --------------------------------------------------------------------------------- one level off


def hub(folder, snapshots, main=None):
    """The hub's cache of a model: files are links into blobs/; {hash: folder to take them from}."""
    folder = folder / "models--stabilityai--stable-diffusion-2"
    (folder / "blobs").mkdir(parents=True)
    for commit, taken in snapshots.items():
        for file in [file for file in taken.rglob("*") if file.is_file()]:
            blob = folder / "blobs" / sha256(file)
            blob.write_bytes(file.read_bytes())
            link = folder / "snapshots" / commit / file.relative_to(taken)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_bytes(main)
    return folder


@pytest.mark.parametrize("main", [None, b"abc", b"abc\n", b"other", b"\xff", b"", b"../.."])
def test_the_hubs_cache(tmp_path, diffusers_folder, converted, main):
    folder = hub(tmp_path, {"abc": diffusers_folder}, main)
    for given in (folder, folder / "snapshots", folder / "snapshots" / "abc"):
        header = assert_same(given, converted, tmp_path / "out.safetensors")
    assert header["sources"] == model_file.read_header(converted)["sources"]


def test_several_snapshots(tmp_path, diffusers_folder, dinov2, converted):
    snapshots = {"abc": diffusers_folder, "def": dinov2.parent / "plain"}
    out = tmp_path / "out.safetensors"
    assert_same(hub(tmp_path / "1", snapshots, b"abc"), converted, out)
    assert_same(hub(tmp_path / "2", snapshots, b"def\n"), dinov2, out)
    for number, main in enumerate((None, b"other", b"..", b"")):
        folder = hub(tmp_path / f"none {number}", snapshots, main)
        refused(folder, folder, "holds 2 models", folder / "snapshots" / "abc")


def test_the_hubs_cache_of_dinov2(tmp_path, dinov2):
    (tmp_path / "a").mkdir()
    write_tensors(tmp_path / "a" / "depth_anything_v2_vits.pth", {
        f"pretrained.{name}": t for name, t in facebook_tensors("dinov2_gelu").items()})
    (tmp_path / "a" / "README.md").write_text("Depth Anything V2")
    write_network(tmp_path / "b", "dinov2_gelu", "model.safetensors")
    sharded(tmp_path / "b", "model.safetensors")
    for name in ("a", "b"):
        assert_same(tmp_path / name, dinov2, tmp_path / "out.safetensors")
        folder = hub(tmp_path / f"{name} cached", {"abc": tmp_path / name}, b"abc")
        for given in (folder, folder / "snapshots"):
            assert_same(given, dinov2, tmp_path / "out.safetensors")


def test_a_folder_with_several_files(tmp_path):
    for name in ("v2-1.ckpt", "v2-1-nonema.ckpt"):
        torch.save(facebook_tensors("dinov2_gelu"), tmp_path / name)
    refused(tmp_path, "holds no model or pytorch_model", "or a single file")


def test_a_hubs_cache_whose_files_are_not_there(tmp_path, source):
    folder = hub(tmp_path, {"abc": source})
    (folder / "snapshots" / "abc" / "unet" / UNET).resolve().unlink()
    refused(folder, "unet holds no diffusion_pytorch_model")


def test_the_mean_of_the_weights_alone(tmp_path, source, converted):
    (source / "unet").rename(source / "unet_ema")
    header = assert_same(source, converted, tmp_path / "out.safetensors")
    assert header["sources"][0].startswith(f"unet_ema/{UNET} sha256:")
    refused(source / "unet_ema", "one network of three", f"give {source}, the folder above")
    (source / "vae").rename(source / "elsewhere")
    refused(source, "holds unet_ema/ only", "put vae/ and text_encoder/")


def test_a_folder_with_one_model_in_it(tmp_path, source, converted, dinov2):
    above = tmp_path / "downloads"
    above.mkdir()
    source.rename(above / "sd2")
    (above / "notes").mkdir()
    (above / "notes" / "a.txt").touch()
    assert_same(above, converted, tmp_path / "out.safetensors")
    write_network(above / "dinov2", "dinov2_gelu", "model.safetensors")
    refused(above, "holds 2 models", above / "dinov2")
    (above / "sd2").rename(tmp_path / "sd2")
    assert_same(above, dinov2, tmp_path / "out.safetensors")


def test_a_folder_of_dinov2_is_not_passed_over_for_one_in_it(tmp_path, source, dinov2):
    write_network(tmp_path / "dinov2", "dinov2_gelu", "model.safetensors")
    source.rename(tmp_path / "dinov2" / "other")
    assert_same(tmp_path / "dinov2", dinov2, tmp_path / "out.safetensors")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("split", [False, True])
def test_one_network_alone(source, part, split):
    old = UNET if part != "text_encoder" else "model.safetensors"
    files = sharded(source / part, old) if split else [source / part / old]
    for given in (source / part, *files, source / part / "config.json"):
        refused(given, "one network of three", f"give {source}, the folder above")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_one_network_somewhere_else(tmp_path, source, part):
    (source / part).rename(tmp_path / "moved")
    for given in (tmp_path / "moved", tmp_path / "moved" / UNET):
        refused(given, "one network of three", "that holds unet/, vae/ and text_encoder/")


def test_one_network_by_relative_paths(source, monkeypatch):
    monkeypatch.chdir(source / "unet")
    for given in (".", UNET):
        refused(Path(given), "one network of three", f"give {source}, the folder above")


def test_the_settings_of_a_folder_stand_for_it(tmp_path, source, converted):
    write_json(source / "model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]})
    assert_same(source / "model_index.json", converted, tmp_path / "out.safetensors")


def test_folders_without_a_denoiser(source):
    (source / "unet").rename(source / "elsewhere")
    refused(source, "unet holds no diffusion_pytorch_model")
    (source / "vae").rename(source / "other")
    refused(source / "text_encoder", "one network of three")
    (source / "elsewhere").rename(source.parent / "elsewhere")
    (source / "other").rename(source.parent / "other")
    refused(source, "holds no model or pytorch_model")


def test_folders_in_the_place_of_a_model_file(tmp_path, source, converted):
    def not_opened(path, *words):
        for reader in (DepthMaster.from_file, DINOv2.from_file):
            refused(path, path, *words, read=reader)
    not_opened(source, "folder of diffusers", f"python convert_sd2.py {source}")
    (source / "unet").rename(source / "unet_ema")
    (source / "vae").rename(tmp_path / "vae")
    not_opened(source, "folder of diffusers", f"python convert_sd2.py {source}")
    run = tmp_path / "run"
    run.mkdir()
    not_opened(run, "is a folder: give a model file")
    (run / "model.safetensors").symlink_to(converted)
    not_opened(run, "is a folder", f"the model in it is {run / 'model.safetensors'}")
    not_opened(hub(tmp_path, {"abc": source}), "is a folder", "convert_sd2.py")


def test_a_run_folder_is_not_converted(tmp_path, converted):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").symlink_to(converted)
    for given in (run, run / "model.safetensors"):
        refused(given, run / "model.safetensors", "a model file of this project already")


def test_official_weights_in_the_place_of_a_model_file(tmp_path, source):
    refused(source / "unet" / UNET, "convert it first", read=DepthMaster.from_file)
    torch.save(single_file_tensors(), tmp_path / "v2-1.ckpt")
    refused(tmp_path / "v2-1.ckpt", "convert it", read=DepthMaster.from_file)


# ------------------------------------------------------------------------------------ other cases


def halved(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_half_precision_everywhere(tmp_path, source, converted, ending):
    for part in ("unet", "vae"):
        (source / part / UNET).unlink()
        write_network(source / part, f"{part}_three_levels",
                      f"diffusion_pytorch_model.fp16.{ending}", halved)
    found = load_file(convert(source, tmp_path / "out.safetensors"))
    for name, tensor in load_file(converted).items():
        expected = tensor if name == "unet.text_embedding" else tensor.half().float()
        assert torch.equal(found[name], expected), name


def change_unet(source, changes):
    file = source / "unet" / UNET
    write_tensors(file, read(file) | changes)


@pytest.mark.parametrize("channels, said", [
    (9, ("the U-Net takes 9 channels", "take the plain text-to-image model")),
    (8, ("scheduler_config.json is not there, which says how this model denoises",))])
def test_a_network_for_other_inputs(source, channels, said):
    config = source / "unet" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"in_channels": channels})
    change_unet(source, {"conv_in.weight": torch.zeros(16, channels, 3, 3)})
    refused(source, *said)


@pytest.mark.parametrize("name", ["class_embedding.weight", "class_embedding.linear_1.weight",
                                  "add_embedding.linear_1.weight"])
def test_a_network_with_other_embeddings(source, name):
    change_unet(source, {name: torch.zeros(10, 64)})
    refused(source, f"has tensors that do not belong to it: 1 ({name})")


def test_the_released_folder_in_the_hubs_cache(tmp_path, diffusers_folder):
    released = write_released(tmp_path / "released", text=diffusers_folder / "text_encoder")
    expected = convert(released, tmp_path / "expected.safetensors")
    sharded(released / "unet", "diffusion_pytorch_model.bin")
    folder = hub(tmp_path, {"abc": released}, b"abc")
    header = assert_same(folder, expected, tmp_path / "out.safetensors")
    assert header["kind"] == "stage2"
