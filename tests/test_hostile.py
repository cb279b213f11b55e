"""Files that want to harm: nothing runs, nothing is written elsewhere, memory stays bounded."""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import tarfile
import zipfile
import zlib

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from convert_sd2 import convert
from data import files
from evaluation import journal
from data.archives import Folder, Tar
from data.hypersim import Hypersim
from data.images import read_picture, read_png16, read_rgb
from data.pairs import FolderOfPairs, read_depth
from data.transforms import BadSample
from data.zeroshot import ZeroShot
from engine import job, run_folder
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.official.read import read_settings, read_tensors
from nets.official.source import open_source
from tests.fixtures.sources import write_network
from tests.worlds import UNET, VAE


class Code:
    """Pickles to a call, which must never happen."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file ran",))


@pytest.fixture(autouse=True)
def bounded_memory():
    """No test here may take 4 GiB more than the process has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# ---------------------------------------------------------------------------- pictures and arrays


def png_of(width, height):
    """A PNG of a few bytes that claims a size."""
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(
        b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")


def test_a_picture_that_claims_a_huge_size(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(200_000, 200_000))
    with pytest.raises(BadSample, match="bomb.png can't be read: it has more than 178,956,970 p"):
        read_rgb(tmp_path / "bomb.png")


def test_an_hdf5_that_unpacks_to_a_huge_size(tmp_path):
    with h5py.File(tmp_path / "bomb.hdf5", "w") as file:
        file.create_dataset("dataset", (200_000, 200_000), "f4", chunks=(1000, 1000),
                            compression="gzip", fillvalue=1)
    with pytest.raises(BadSample, match="would take 160,000,000,000 bytes"):
        files.read_hdf5(tmp_path / "bomb.hdf5")


def test_an_hdf5_that_reads_other_files(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(range(64)))
    with h5py.File(tmp_path / "thief.hdf5", "w") as file:
        file.create_dataset("dataset", (64,), "u1", external=[(str(tmp_path / "secret"), 0, 64)])
    with pytest.raises(BadSample, match="in other files"):
        files.read_hdf5(tmp_path / "thief.hdf5")


def zeros(count):
    """So many zero bytes, packed, without having them."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(count >> 20)) + packer.flush()


@pytest.mark.parametrize("side, limit", [(10, 2**30), (300, 2**20)])
def test_an_hdf5_chunk_that_unpacks_to_more_than_its_size(tmp_path, side, limit, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", limit)
    with h5py.File(tmp_path / "bomb.hdf5", "w") as file:
        data = file.create_dataset("dataset", (side, side), "f4", chunks=(side, side),
                                   compression="gzip")
        data.id.write_direct_chunk((0, 0), zeros(2**25))
    with pytest.raises(BadSample, match="a chunk that unpacks to more than its"):
        files.read_hdf5(tmp_path / "bomb.hdf5")


def test_an_hdf5_chunk_larger_than_its_data_set(tmp_path):
    with h5py.File(tmp_path / "bomb.hdf5", "w") as file:
        data = file.create_dataset("dataset", (9, 9), "f4", maxshape=(None, None),
                                   chunks=(30_000, 20_000), compression="gzip")
        data.id.write_direct_chunk((0, 0), zeros(2**20))
    with pytest.raises(BadSample, match="would take 2,400,000,000 bytes"):
        files.read_hdf5(tmp_path / "bomb.hdf5")


@pytest.mark.parametrize("options", [
    dict(chunks=(4, 40), compression="gzip", shuffle=True, fletcher32=True),
    dict(chunks=(40, 50), compression="gzip", maxshape=(None, None)),
    dict(compression="lzf"), dict(chunks=(8, 8)), {}])
def test_an_honest_hdf5_is_read(tmp_path, options, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 40_000)  # so that gzip's chunks are looked into
    values = np.random.default_rng(0).random((40, 50), dtype=np.float32)
    with h5py.File(tmp_path / "good.hdf5", "w") as file:
        file.create_dataset("dataset", data=values, **options)
    if options.get("compression") == "lzf":
        monkeypatch.undo()
    assert np.array_equal(files.read_hdf5(tmp_path / "good.hdf5"), values)


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.hdf5", "dataset"),
                                  h5py.SoftLink("/elsewhere/dataset")])
def test_an_hdf5_with_links(tmp_path, link):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["dataset"] = np.ones((2, 2))
    with h5py.File(tmp_path / "thief.hdf5", "w") as file:
        file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/")
        file["dataset"] = link
    with pytest.raises(BadSample, match="only a link"):
        files.read_hdf5(tmp_path / "thief.hdf5")


def test_an_hdf5_of_variable_length(tmp_path):
    with h5py.File(tmp_path / "bomb.hdf5", "w") as file:
        file.create_dataset("dataset", (9, 9), h5py.vlen_dtype("u1"))
    with pytest.raises(BadSample, match="not numbers"):
        files.read_hdf5(tmp_path / "bomb.hdf5")


def test_a_picture_that_would_start_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program started"))
    (tmp_path / "photo.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
                                         b"%%EndComments\nshowpage\n")
    with pytest.raises(BadSample, match="cannot identify"):
        read_rgb(tmp_path / "photo.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_a_picture_of_many_frames(tmp_path, kind):
    first, *rest = (Image.new("RGB", (9, 9), (shade, 0, 0)) for shade in range(50))
    first.save(tmp_path / "many.png", format=kind, save_all=True, append_images=rest)
    assert np.array_equal(read_rgb(tmp_path / "many.png"), np.zeros((9, 9, 3)))  # the first


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.npy").symlink_to("/dev/zero")
    for read, name in ((read_rgb, "pipe.png"), (read_depth, "endless.npy")):
        with pytest.raises(BadSample, match=f"{name} is not a file"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_with_code(tmp_path, suffix):
    path = tmp_path / f"depth.{suffix}"
    if suffix == "npy":
        np.save(path, np.array([Code()], dtype=object), allow_pickle=True)
    else:
        np.savez(path, depth=np.array([Code()], dtype=object))
    with pytest.raises(BadSample, match="can't be read"):
        read_depth(path)


def test_an_npy_that_promises_more_than_there_is(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, dict(
        descr="<f8", fortran_order=False, shape=(10**6, 10**6)))
    (tmp_path / "depth.npy").write_bytes(content.getvalue() + bytes(100))
    for read in (lambda: read_depth(tmp_path / "depth.npy"),
                 lambda: files.read_npy("depth.npy", content.getvalue())):
        with pytest.raises(BadSample, match="depth.npy"):
            read()


def test_an_npy_with_holes(tmp_path):
    """A file of 2.4 GB that takes no room on the disk."""
    with open(tmp_path / "depth.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(
            descr="<f4", fortran_order=False, shape=(30_000, 20_000)))
        file.truncate(file.tell() + 2_400_000_000)
    with pytest.raises(BadSample, match="no more than"):
        read_depth(tmp_path / "depth.npy")


def test_an_npz_that_unpacks_to_a_huge_size(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, dict(
        descr="<f4", fortran_order=False, shape=(20_000, 20_000)))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("depth.npy", "w") as entry:
            entry.write(content.getvalue())
            for _ in range(100):
                entry.write(bytes(16_000_000))
    with pytest.raises(BadSample, match="no more than"):
        read_depth(tmp_path / "bomb.npz")


# ---------------------------------------------------------------------------- tables, names


@pytest.mark.parametrize("content", ["a," * 1_000_000 + "\n" + "1," * 1_000_000 + "\n",
                                     "image,depth\n" + "x" * 1_000_000 + ",y\n", "\xff\xfe\x00",
                                     "image,depth," + "a," * 190 + "\n" + "a\n" * 100_000])
def test_odd_tables(tmp_path, content):
    (tmp_path / "pairs.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises((ValueError, OSError), match="pairs.csv"):
        FolderOfPairs(tmp_path)


def test_a_split_table_does_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "metadata_images_split_scene_v1.csv").write_text(
        "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,"
        "split_partition_name\n../../outside,cam_00,0,True,,train\n")
    with pytest.raises(ValueError, match="not Hypersim's split table"):
        Hypersim(tmp_path)


def test_a_name_with_a_newline_is_one_line_in_messages(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "two\nlines"

    def main():
        FolderOfPairs(folder)

    with pytest.raises(SystemExit):
        job.run(main)
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model.ckpt"])
def test_pickles_with_code_are_refused(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        pickle.dump({"weight": Code()}, file)
    with pytest.raises(ValueError, match=name):
        open_source(tmp_path / name)
    torch.save({"state_dict": {"weight": Code()}}, tmp_path / name)
    with pytest.raises(ValueError, match="wants to run code"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("content", [
    {1: torch.ones(2)}, {"pos_embed": torch.ones(2, 2).to_sparse()}, [torch.ones(2)],
    {"pos_embed": torch.empty(1, 5, 8, device="meta")}, {"pos_embed": torch.ones(())},
    {"pos_embed": torch.ones(1).expand(10**6, 10**6)}, {"pretrained.pos_embed": torch.ones(())},
    {"model.diffusion_model.conv.weight": torch.ones(1),
     "cond_stage_model.model.transformer.resblocks.999999999.ln_1.weight": torch.ones(1)},
])
def test_pickles_of_odd_tensors(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="model.pth"):
        convert(tmp_path / "model.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("change", [
    "[]", "3", "[" * 100_000, {"num_hidden_layers": 10**9}, {"num_hidden_layers": "2"},
    {"hidden_size": 10**12}, {"hidden_size": []}, {"num_attention_heads": 0}, {"patch_size": -1}])
def test_a_config_that_lies(tmp_path, change):
    write_network(tmp_path, "dinov2_gelu", "model.safetensors")
    config = tmp_path / "config.json"
    if isinstance(change, dict):
        change = json.dumps(json.loads(config.read_text()) | change)
    config.write_text(change)
    with pytest.raises(ValueError, match="config.json|model.safetensors"):
        convert(tmp_path, tmp_path / "out.safetensors")


def small_model(path):
    torch.manual_seed(0)
    DepthMaster(vae=VAE, unet=UNET, train_size=(32, 48), processing_res=48).save(path)
    return path


@pytest.mark.parametrize("change", [
    dict(config={"unet": {"layers": 10**9}}), dict(config={"unet": {"layers": 50_000}}),
    dict(config={"unet": {"channels": [8] * 10**6}}),
    dict(config={"vae": {"channels": "abc"}}), dict(config={"unet": {"surprise": 1}}),
    dict(config=[]), dict(format="x"), dict(sources=3),
    dict(config={"processing_res": "abc"}), dict(config={"processing_res": 100_000}),
    dict(config={"target": "nonsense"}), dict(config={"train_size": ["a", "b"]}),
    dict(config={"train_size": []}),
])
def test_headers_that_lie(tmp_path, change):
    path = small_model(tmp_path / "model.safetensors")
    header = model_file.read_header(path) | change
    save_file({"w": torch.zeros(2)}, path, metadata={model_file.KEY: json.dumps(header)})
    with pytest.raises(ValueError, match="model.safetensors"):
        DepthMaster.from_file(path)


def test_a_header_that_is_nested_without_end(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata={model_file.KEY: "[" * 100_000})
    with pytest.raises(ValueError, match="damaged header"):
        DepthMaster.from_file(path)


@pytest.mark.parametrize("offsets", [[0, 10**15], [8, 4], [-4, 4], [0, 3]])
def test_safetensors_with_wrong_offsets(tmp_path, offsets):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    for read in (DepthMaster.from_file, open_source):
        with pytest.raises(ValueError, match="not a readable"):
            read(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1])
def test_safetensors_with_a_huge_header(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="not a readable"):
        DepthMaster.from_file(path)


# ---------------------------------------------------------------------------- at random


def mutations(content, count, seed):
    """Truncated and bit-flipped copies, most of them near the beginning, where the headers are."""
    rng = random.Random(seed)
    for number in range(count):
        place = int(len(content) * rng.random() ** 3)
        if number % 2:
            yield content[:place]
        else:
            spoiled = bytearray(content)
            for _ in range(rng.choice((1, 1, 8))):
                spoiled[int(len(content) * rng.random() ** 3)] ^= 1 << rng.randrange(8)
            yield bytes(spoiled)


def written(kind, path):
    rng = np.random.default_rng(0)
    if kind == "png":
        iio.imwrite(path, rng.integers(0, 60_000, (20, 30), dtype=np.uint16))
    elif kind == "jpg":
        iio.imwrite(path, rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    elif kind == "pfm":
        path.write_bytes(b"Pf\n30 20\n-1.0\n" + rng.random((20, 30), dtype=np.float32).tobytes())
    elif kind == "npy":
        np.save(path, rng.random((20, 30)))
    elif kind == "npz":
        np.savez_compressed(path, depth=rng.random((20, 30)))
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file.create_dataset("dataset", data=rng.random((20, 30)), compression="gzip")
    return path


READERS = {"png": read_png16, "jpg": read_rgb, "npy": read_depth, "npz": read_depth,
           "hdf5": files.read_hdf5, "pfm": read_depth}


@pytest.mark.parametrize("kind", READERS)
def test_spoiled_data_is_a_bad_sample_or_other_numbers(tmp_path, kind):
    content = written(kind, tmp_path / f"whole.{kind}").read_bytes()
    refused = 0
    for spoiled in mutations(content, 200, seed=1):
        path = tmp_path / f"spoiled.{kind}"
        path.write_bytes(spoiled)
        try:
            READERS[kind](path)
        except BadSample as error:
            refused += 1
            assert "spoiled" in str(error)
    assert refused > 90  # at least what was cut off


def test_spoiled_tables_are_refused_or_read(tmp_path):
    content = b"image,depth\n" + b"".join(b"rgb/%d.png,depth/%d.npy\n" % (i, i) for i in range(30))
    refused = 0
    for spoiled in mutations(content, 200, seed=5):
        (tmp_path / "pairs.csv").write_bytes(spoiled)
        try:
            FolderOfPairs(tmp_path)
        except (ValueError, OSError) as error:
            refused += 1
            assert "pairs.csv" in str(error)
    assert refused > 20  # cut off between two rows, a table is whole


def test_spoiled_models_are_refused_or_open(tmp_path):
    content = small_model(tmp_path / "model.safetensors").read_bytes()
    refused = 0
    for spoiled in mutations(content, 200, seed=2):
        path = tmp_path / "spoiled.safetensors"
        path.write_bytes(spoiled)
        try:
            DepthMaster.from_file(path)
        except ValueError as error:
            refused += 1
            assert "spoiled.safetensors" in str(error)
    assert refused > 90


@pytest.mark.parametrize("name", ["model.bin", "old.ckpt", "model.safetensors"])
def test_spoiled_official_files_are_refused_or_open(tmp_path, name):
    tensors = {f"blocks.{i}.weight": torch.randn(40, 40) for i in range(4)}
    tensors["pos_embed"] = torch.randn(1, 5, 8)
    whole = tmp_path / name
    if whole.suffix != ".safetensors":  # before torch 1.6, files were not zipped
        torch.save(tensors, whole, _use_new_zipfile_serialization=whole.suffix == ".bin")
    else:
        save_file(tensors, whole)
    path = tmp_path / f"spoiled{whole.suffix}"
    refused = 0
    for spoiled in mutations(whole.read_bytes(), 200, seed=3):
        path.write_bytes(spoiled)
        try:
            open_source(path)
        except ValueError as error:
            refused += 1
            assert "spoiled" in str(error)
    assert refused > 90


# ---- archives and photographs ----


def test_spoiled_archives_are_refused_or_read(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind, picture in (("rgb", np.full((6, 8, 3), 90, np.uint8)),
                              ("depth", np.full((6, 8), 1500, np.uint16))):
            content = iio.imwrite("<bytes>", picture, extension=".png")
            member = tarfile.TarInfo(f"./test/room/{kind}_0001.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path, refused = tmp_path / "nyu_labeled_extracted.tar", 0
    for spoiled in mutations(buffer.getvalue(), 200, seed=7):
        path.write_bytes(spoiled)
        try:
            reader = ZeroShot("nyu", tmp_path)
            for index in range(len(reader)):
                reader[index]
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert refused > 50


def test_a_member_larger_than_any_map_is_not_read(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.npy")
        member.size = 2000
        archive.addfile(member, io.BytesIO(bytes(2000)))
    (tmp_path / "a.npy").write_bytes(bytes(2000))
    monkeypatch.setattr(files, "MAX_BYTES", 1999)
    for tree in (Tar(tmp_path / "a.tar"), Folder(tmp_path)):
        with pytest.raises(BadSample, match="would take 2,000 bytes"):
            tree.read("a.npy")


@pytest.mark.parametrize("read", [read_rgb, read_picture])
def test_a_picture_that_is_a_program_is_not_run(tmp_path, read):
    """PostScript, for which Pillow starts Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(ValueError, match="cannot identify"):
        read(tmp_path / "a.png")


def test_pipes_are_not_waited_for(tmp_path, monkeypatch):
    """In the place of what a program keeps, of weights, of tables and of members of a set."""
    for name in ("args.json", "log.jsonl", "state.pt", "evaluation.json", "per_image.csv",
                 "pairs.csv", "weights.pth", "config.json", "model.safetensors", "a.npy"):
        os.mkfifo(tmp_path / name)
    ranks = job.Ranks(0, 1, torch.device("cpu"))
    calls = [lambda: run_folder.open_run(tmp_path, {"steps": 1}, ranks),
             lambda: run_folder.read_options(tmp_path / "args.json"),
             lambda: journal.read_settings(tmp_path / "evaluation.json"),
             lambda: journal.Journal(tmp_path, ["a"]),
             lambda: files.read_table(tmp_path / "pairs.csv"),
             lambda: read_tensors(tmp_path / "weights.pth"),
             lambda: read_settings(tmp_path / "weights.pth"),
             lambda: open_source(tmp_path / "weights.pth"),
             lambda: model_file.read_header(tmp_path / "model.safetensors"),
             lambda: Folder(tmp_path).read("a.npy"), lambda: read_rgb(tmp_path / "a.npy")]
    signal.alarm(60)
    for call in calls:
        try:
            call()
        except (ValueError, OSError):
            pass
    signal.alarm(0)
    assert run_folder.begun_with(tmp_path, "precision", "auto") == "auto"


def test_weights_that_are_compressed_are_not_unpacked(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "plain.pth")
    with (zipfile.ZipFile(tmp_path / "plain.pth") as plain,
          zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert read_tensors(tmp_path / "plain.pth")["w"].shape == (1000,)
    with pytest.raises(ValueError, match="w.pth is compressed"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("part, name, value", [
    ("unet", "heads", [1, 3]), ("unet", "heads", 2), ("unet", "groups", 8.0),
    ("unet", "groups", 0), ("unet", "attention", [0, 1]), ("unet", "fourier", 1),
    ("unet", "layers", True), ("unet", "channels", "8"), ("unet", "unknown", 1),
    ("vae", "scaling_factor", "x"), ("vae", "scaling_factor", 0), ("vae", "channels", []),
    ("unet", "layers", 101)])
def test_sizes_in_a_header_that_can_not_be(tmp_path, part, name, value):
    model = DepthMaster(vae=VAE, unet=UNET)
    model.save(tmp_path / "model.safetensors")
    DepthMaster.from_file(tmp_path / "model.safetensors")
    model.config[part][name] = value
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors (has a damaged header|describes|does)"):
        DepthMaster.from_file(tmp_path / "model.safetensors")


def test_a_network_that_the_file_can_not_hold_is_not_built(tmp_path, monkeypatch):
    levels = 32
    config = {"unet": dict(channels=[99_000] * levels, heads=[1] * levels, layers=100, groups=1,
                           attention=[True] * levels)}
    model_file.save(tmp_path / "big.safetensors", {"unet.w": torch.zeros(1)},
                    dict(kind="stage1", config=config, sources=[], licence=""))
    monkeypatch.setattr(DepthMaster, "__init__", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match="can't be built .it has 1 tensors"):
        DepthMaster.from_file(tmp_path / "big.safetensors")


def test_a_jpeg_of_many_scans(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    assert read_rgb(tmp_path / "a.jpg").shape == (64, 64, 3)
    scan = content[content.rindex(b"\xff\xda"):-2]
    (tmp_path / "a.jpg").write_bytes(content[:-2] + 1000 * scan + content[-2:])
    with pytest.raises(BadSample, match="a.jpg is a JPEG of 1,0.. scans, and no more than 100"):
        read_rgb(tmp_path / "a.jpg")


def test_hdf5_of_many_chunks_of_none_and_of_many_groups(tmp_path):
    with h5py.File(tmp_path / "chunks.hdf5", "w") as file:
        file.create_dataset("dataset", (1000, 1000), "f4", chunks=(1, 1))
    with h5py.File(tmp_path / "null.hdf5", "w") as file:
        file["dataset"] = h5py.Empty("f4")
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:
        for number in range(2000):
            file.create_group(f"group{number}")
    for name, words in (("chunks", "is cut into 1,000,000 chunks"), ("null", "an empty data set"),
                        ("groups", "holds 2000 things")):
        with pytest.raises(BadSample, match=words) as caught:
            files.read_hdf5(tmp_path / f"{name}.hdf5", None)
        assert len(str(caught.value)) < 300


def test_a_sparse_member_of_an_archive_is_refused(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    subprocess.run(["tar", "-S", "-C", tmp_path, "-cf", tmp_path / "a.tar", "a.npy"], check=True)
    with pytest.raises(ValueError, match="a.npy is packed as sparse"):
        Tar(tmp_path / "a.tar")
