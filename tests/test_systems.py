"""Other systems: names of files that are no UTF-8, processes that are spawned, Windows."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train_stage1
from data.loading import Checked, read_ahead
from data.files import write_npy
from data.hypersim import ProcessedHypersim
from data.pairs import FolderOfPairs
from data.training_set import TrainingSet
from data.zeroshot import ZeroShot
from tests.worlds import SHORT, call, files, photo, save_tiny, world_of, write

ROOT = Path(__file__).resolve().parents[1]
ODD = os.fsdecode(b"caf\xe9")  # Latin-1, as old archives unpack


def write_pairs(root, names, size=(40, 60)):
    for kind in ("rgb", "depth"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        depth_m = np.linspace(1, 5 + number, size[0])[:, None] + np.random.random(size)
        Image.fromarray(photo(*size, seed=number)).save(root / f"rgb/{name}.png")
        np.save(root / f"depth/{name}.npy", depth_m.astype(np.float32))
    return root


def run(*words, before="", folder=ROOT):
    """A script in a process of its own, after some lines of Python: (exit code, out, err)."""
    script, *options = map(str, words)
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]\n"
            f"{before}\nif __name__ == '__main__':\n"
            f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code, script, *options], cwd=folder, timeout=120,
                          capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("workers", [0, 2])
def test_names_that_are_no_utf8_survive_an_evaluation(workers, tmp_path):
    root, out = write_pairs(tmp_path / "pairs", [ODD, "b"]), tmp_path / "out"
    ckpt = save_tiny(tmp_path / "tiny.safetensors")
    options = ["evaluate.py", "--ckpt", ckpt, "--data", root, "--datasets", "pairs", "--out", out,
               "--workers", workers, "--device", "cpu", "--report"]
    code, _, said = run(*options)
    assert code == 0, said
    with open(out / "per_image.csv", newline="", errors="surrogateescape") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {f"rgb/{ODD}", "rgb/b"}
    code, _, said = run(*options)  # goes on from what is there
    assert code == 0 and "the scores of 2 images already" in said
    assert (out / "report.html").read_bytes().decode()  # a page in UTF-8


def test_names_that_are_no_utf8_survive_training(files, tmp_path):  # noqa: F811
    root = write_pairs(tmp_path / "pairs", [ODD, "b", "c"])
    (root / f"depth/{ODD}.npy").write_bytes(b"spoiled")
    for cache in ((), ("--cache", tmp_path / "cache")):
        code, _, said = run(
            "train_stage1.py", "--data", root, "--sd2", files / "sd2.safetensors", "--teacher",
            files / "dinov2.safetensors", "--out", tmp_path / f"run{len(cache)}", *SHORT,
            "--workers", 2, "--batch", 3, "--micro-batch", 1, *cache)
        assert code == 0, said
        assert "caf?.npy" in said and "died" not in said
    code, out, _ = run("train_stage1.py", "--data", root, "--sd2", files / "sd2.safetensors",
                       "--align-weight", 0, "--out", tmp_path / "run", *SHORT, "--preflight")
    assert code == 1 and "rgb/caf?: " in out


def test_names_that_are_no_utf8_survive_tables_and_predictions(tmp_path):
    write_pairs(tmp_path, [ODD])
    (tmp_path / "pairs.csv").write_bytes(b"image,depth\nrgb/caf\xe9.png,depth/caf\xe9.npy\n")
    assert FolderOfPairs(tmp_path)[0]["name"] == f"rgb/{ODD}"
    ckpt = save_tiny(tmp_path / "tiny.safetensors")
    (tmp_path / "rgb" / os.fsdecode(b"spoiled\xff.png")).write_bytes(b"x")
    code, _, said = run("predict.py", tmp_path / "rgb", "--ckpt", ckpt, "--out", tmp_path / "out",
                        "--device", "cpu")
    assert code == 1 and "left out: " in said and "spoiled?.png" in said
    assert (tmp_path / f"out/{ODD}.npy").exists() and (tmp_path / f"out/{ODD}_color.png").exists()


def test_readers_can_be_sent_to_processes_that_are_spawned(tmp_path):
    """As on macOS and Windows, and on Linux from Python 3.14."""
    members, _, _ = world_of("scannet")
    folder = write(tmp_path, members, "scannet_val_sampled_800_1.tar")
    pairs = FolderOfPairs(write_pairs(tmp_path / "pairs", ["a", "b"]))
    context = multiprocessing.get_context("spawn")
    for reader in (ZeroShot("scannet", folder), pairs):
        rows = list(read_ahead(Checked(reader), 1, batch_size=None,
                               multiprocessing_context=context))
        assert [(name, reason) for name, reason, _ in rows] == [
            (reader.name(i), None) for i in range(len(reader))]
    samples = TrainingSet([pairs], [1.0], [(32, 48)], batch=2)
    loaded = list(read_ahead(samples, 1, batch_size=None, sampler=[0, 1],
                             multiprocessing_context=context))
    assert [sample["name"] for sample in loaded] == [samples[k]["name"] for k in (0, 1)]


WINDOWS = """
import signal, os
for name in ("SIGUSR1", "SIGCHLD", "SIGHUP"):
    delattr(signal, name)
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("pread", "sysconf", "mkfifo", "getuid"):
    delattr(os, name)
"""


def test_predict_and_evaluate_run_without_what_windows_lacks(tmp_path):
    root = write_pairs(tmp_path / "pairs", ["a", "b"])
    ckpt = save_tiny(tmp_path / "tiny.safetensors")
    code, _, said = run("predict.py", root / "rgb", "--ckpt", ckpt, "--out", tmp_path / "out",
                        "--device", "cpu", before=WINDOWS)
    assert code == 0 and (tmp_path / "out/a.npy").exists(), said
    code, _, said = run("evaluate.py", "--ckpt", ckpt, "--data", root, "--datasets", "pairs",
                        "--out", tmp_path / "scores", "--device", "cpu", before=WINDOWS)
    assert code == 0, said


@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_training_says_where_it_runs(script, tmp_path):
    code, _, said = run(script, "--out", tmp_path / "run", before=WINDOWS)
    assert code == 1 and not (tmp_path / "run").exists()
    assert said == ("error: training needs Linux or macOS (on Windows: WSL); predict.py, "
                    "evaluate.py and convert_sd2.py run here, too.\n")


def test_prepared_hypersim_behind_links(tmp_path):
    scene = tmp_path / "elsewhere/ai_001_001"
    scene.mkdir(parents=True)
    Image.fromarray(photo(40, 60)).save(scene / "rgb_cam_00_fr0000.png")
    depth_mm = np.linspace(1000, 9000, 2400).reshape(40, 60).astype(np.uint16)
    Image.fromarray(depth_mm).save(scene / "depth_plane_cam_00_fr0000.png")
    (scene / "._rgb_cam_00_fr0000.png").write_bytes(b"x")
    (tmp_path / "root/train").mkdir(parents=True)
    (tmp_path / "root/train/ai_001_001").symlink_to(scene)
    reader = ProcessedHypersim(tmp_path / "root")
    assert [reader.name(i) for i in range(len(reader))] == ["train/ai_001_001/rgb_cam_00_fr0000"]


@pytest.mark.parametrize("name, form", [
    ("NAME", "test/kitchen_0004/rgb_0001"), ("pred_NAME", "test/kitchen_0004/pred_rgb_0001"),
    ("pred_NAME without rgb_", "test/kitchen_0004/pred_0001"),
    ("NAME_pred", "test/kitchen_0004/rgb_0001_pred")])
def test_other_systems_names_are_known_and_counted(name, form, tmp_path, monkeypatch, capsys):
    members, _, _ = world_of("nyu")
    folder = write(tmp_path / "root", members, "nyu_labeled_extracted.tar")
    reader = ZeroShot("nyu", folder)
    sample = reader[0]
    for index in range(len(reader)):
        place = form.replace("0001", reader.name(index)[-4:])
        place = place.replace("test/kitchen_0004", os.path.dirname(reader.name(index)))
        path = tmp_path / f"predictions/{place}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npy(path, np.random.random(sample["depth"].shape[1:]).astype(np.float32))
    code = call(monkeypatch, evaluate, "--predictions", tmp_path / "predictions", "--data", folder,
                "--datasets", "nyu", "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert code == 0, said
    assert ("are there under the names" in said) == (name != "NAME")
    assert name == "NAME" or f"names: {len(reader)} {name}." in said
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["nyu"]["images"] == len(reader)


def test_the_archive_itself_may_be_given(tmp_path, monkeypatch, capsys):
    members, _, _ = world_of("nyu")
    folder = write(tmp_path / "root", members, "nyu_labeled_extracted.tar")
    archive = folder / "nyu_labeled_extracted.tar"
    renamed = tmp_path / "mine.tar"
    renamed.write_bytes(archive.read_bytes())
    for data, which in ((archive, ()), (archive, ("nyu",)), (renamed, ("nyu",))):
        code = call(monkeypatch, evaluate, "--data", data, "--preflight", "--workers", 0,
                    *(("--datasets", *which) if which else ()))
        assert code == 0 and capsys.readouterr().out.startswith("nyu: ")
    assert call(monkeypatch, evaluate, "--data", renamed, "--preflight") == 1
    assert "say which set it is with --datasets" in capsys.readouterr().err
    assert call(monkeypatch, train_stage1, "--data", archive, "--sd2",
                ROOT / "weights/miniature_sd2.safetensors", "--out", tmp_path / "r") == 1
    assert "nyu_labeled_extracted.tar is a file: unpack it" in capsys.readouterr().err
