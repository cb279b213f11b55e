"""evaluate.py on small worlds in the sets' own layouts, against test_metrics' numpy scores."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import evaluate
import metrics
from evaluation import loop
from data.sources import BENCHMARKS, find_benchmarks
from data.pairs import FolderOfPairs
from evaluation.journal import Journal, prepare
from data.transforms import normalise_target
from extras.report import write_report
from miniature import embedded
from nets.depthmaster import DepthMaster
from tests import worlds
from tests.worlds import (
    CROP,
    HEIGHT,
    WIDTH,
    boxes,
    noisy,
    numpy_score,
    photo,
    save_tiny,
    write_street,
)

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on their number
SIZES = {"a": (40, 60), "deep/b": (45, 50), "deep/c": (45, 50)}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture()
def world(tmp_path):
    """ROOT/pairs with three images of two sizes, and saved predictions of them in DIR/pairs."""
    for number, (name, size) in enumerate(SIZES.items()):
        depth_m, _ = boxes(*size, holes=0.05, seed=number)
        save(tmp_path / "root/pairs/rgb" / f"{name}.png", photo(*size, seed=number))
        save(tmp_path / "root/pairs/depth" / f"{name}.png", np.round(1000 * depth_m))
        path = tmp_path / "saved/pairs/rgb" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        pred = noisy(depth_m, "sqrt_disparity", seed=number)
        pred[0, :9] = -2  # far below what the others say: negative when aligned
        np.save(path, pred)
    return tmp_path


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, picture if picture.dtype == np.uint8 else picture.astype(np.uint16))


def truth(world, name):
    """depth_m and valid as the files of the world say."""
    depth_m = iio.imread(world / "root/pairs/depth" / f"{name}.png") / np.float32(1000)
    return depth_m, depth_m > 0


def call(monkeypatch, *arguments):
    return worlds.call(monkeypatch, evaluate, *arguments)


def results(out):
    """metrics.json, and per_image.csv as {(dataset, image): {score: float}}."""
    with open(out / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:13] == ["dataset", "image", *metrics.SCORES]
    images = {(row["dataset"], row["image"]): {key: float(row[key]) for key in metrics.SCORES}
              for row in rows}
    return json.loads((out / "metrics.json").read_text()), images


def pairs_score(pred, depth_m, valid, space, negative="clamp", f1_mask="pair"):
    return numpy_score(pred, depth_m, valid, space, 1e-5, np.inf, negative, f1_mask)


def mean(scores):
    return {key: np.mean([each[key] for each in scores]) for key in metrics.SCORES}


def test_saved_predictions_in_all_three_spaces(world, monkeypatch, capsys):
    """One prediction is a PNG, the released behaviour is switched on."""
    path = world / "saved/pairs/rgb/deep/c.npy"
    save(path.with_suffix(".png"), np.round(65535 * np.load(path).astype(np.float64).clip(0)))
    path.unlink()
    assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                "--out", world / "out", "--align-negative", "square", "--f1-mask", "owner") == 0
    expected = {space: [] for space in metrics.SPACES}
    for name in SIZES:
        file = world / "saved/pairs/rgb" / name
        pred = (np.load(f"{file}.npy") if name != "deep/c" else iio.imread(f"{file}.png") / 65535)
        for space in metrics.SPACES:
            expected[space].append(pairs_score(pred, *truth(world, name), space, "square", "owner"))
    found, images = results(world / "out")
    for name, scores in zip(SIZES, expected["sqrt_disparity"]):
        assert images["pairs", f"rgb/{name}"] == pytest.approx(scores, rel=1e-6, abs=1e-9)
    assert len(images) == 3
    found = found["pairs"]
    assert {key: found[key] for key in metrics.SCORES} == pytest.approx(
        mean(expected["sqrt_disparity"]), rel=1e-6)
    for space in ("disparity", "depth"):
        other = found["other_alignments"][space]
        assert other == pytest.approx({"unfitted": 0, **mean(expected[space])}, rel=1e-6)
    assert (found["align"], found["align_negative"], found["f1_mask"]) == (
        "sqrt_disparity", "square", "owner")
    assert (found["images"], found["expected_images"], found["skipped"]) == (3, None, 0)
    assert found["processing_res"] is None and found["precision"] is None
    table = capsys.readouterr().out
    for space in metrics.SPACES:
        [line] = [line for line in table.splitlines() if f" {space} " in line]
        assert f"{100 * mean(expected[space])['abs_rel']:.2f}" in line
        assert line.endswith("at 40x60 to 45x50 (2 sizes)")


def test_a_model_is_scored_at_the_asked_resolution(world, ckpt, monkeypatch, capsys):
    """ROOT is the set's own folder; --limit says so."""
    assert call(monkeypatch, "--ckpt", ckpt, "--data", world / "root/pairs", "--datasets", "pairs",
                "--processing-res", 32, "--limit", 2, "--align", "depth",
                "--out", world / "out") == 0
    model = DepthMaster.from_file(ckpt).for_inference(precision="float32")
    expected = []
    for number, name in enumerate(["a", "deep/b"]):
        pred = model.predict(photo(*SIZES[name], seed=number), 32)
        expected.append(pairs_score(pred, *truth(world, name), "depth"))
    found = results(world / "out")[0]["pairs"]
    assert {key: found[key] for key in metrics.SCORES} == pytest.approx(mean(expected), rel=1e-6)
    assert found["other_alignments"] == {}
    assert (found["images"], found["limit"], found["align"]) == (2, 2, "depth")
    assert (found["processing_res"], found["precision"]) == (32, "float32")
    assert "only the first 2 were asked for (--limit)" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_predicts_in_the_asked_precision(precision, world, ckpt, monkeypatch):
    assert call(monkeypatch, "--ckpt", ckpt, "--data", world / "root", "--precision", precision,
                "--out", world / "out") == 0
    expected = {}
    for each in ("float32", "bfloat16"):
        model = DepthMaster.from_file(ckpt, dtype=getattr(torch, each))
        pred = model.for_inference(precision=each).predict(photo(*SIZES["a"]))
        expected[each] = pairs_score(pred, *truth(world, "a"), "sqrt_disparity")
    found, images = results(world / "out")
    assert images["pairs", "rgb/a"] == pytest.approx(expected[precision], rel=1e-5)
    assert expected["float32"] != pytest.approx(expected["bfloat16"], rel=1e-4)
    assert found["pairs"]["precision"] == precision


def test_depth_scale_is_the_unit_of_the_truth(world, monkeypatch):
    assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                "--depth-scale", 250, "--out", world / "out") == 0
    depth_m, valid = truth(world, "a")
    pred = np.load(world / "saved/pairs/rgb/a.npy")
    expected = pairs_score(pred, 4 * depth_m, valid, "sqrt_disparity")
    assert results(world / "out")[1]["pairs", "rgb/a"] == pytest.approx(expected, rel=1e-6)


def test_the_crop_of_virtual_kitti_is_the_asked_one(tmp_path, monkeypatch):
    _, depth_cm = write_street(tmp_path / "root/vkitti", scene="Scene01")
    left = (WIDTH - CROP[1]) // 2
    depth_m = depth_cm[HEIGHT - CROP[0]:, left:left + CROP[1]].astype(np.float32) / 100
    pred = noisy(depth_m, "disparity")
    path = tmp_path / "saved/vkitti/Scene01/clone/frames/rgb/Camera_0/rgb_00000.npy"
    path.parent.mkdir(parents=True)
    np.save(path, pred)
    assert call(monkeypatch, "--predictions", tmp_path / "saved", "--data", tmp_path / "root",
                "--align", "disparity", "--vkitti-crop", *CROP, "--out", tmp_path / "out") == 0
    found = results(tmp_path / "out")[0]["vkitti"]
    expected = numpy_score(pred, depth_m, depth_m < 80, "disparity", 1e-5, 80, "clamp", "pair")
    assert {key: found[key] for key in metrics.SCORES} == pytest.approx(expected, rel=1e-6)
    assert found["f1_resolution"] == f"{CROP[0]}x{CROP[1]}"


@pytest.mark.parametrize("target", ["disparity", "depth"])
def test_alignment_space_and_resolution_are_the_models(target, world, monkeypatch):
    """Of a folder of pairs with train/ and val/, the latter is scored."""
    (world / "split").mkdir()
    (world / "root/pairs").rename(world / "split/val")
    ckpt = save_tiny(world / "other.safetensors", target=target, processing_res=40)
    assert call(monkeypatch, "--ckpt", ckpt, "--data", world / "split", "--datasets", "pairs",
                "--out", world / "out") == 0
    found = results(world / "out")[0]["pairs"]
    assert (found["align"], found["processing_res"], found["images"]) == (target, 40, 3)


@pytest.mark.parametrize("paradigm", ["single", "iterative", "i2l"])
def test_paradigms(paradigm, world, ckpt, monkeypatch, capsys):
    assert call(monkeypatch, "--ckpt", ckpt, "--data", world / "root", "--datasets", "pairs",
                "--paradigm", paradigm, "--out", world / "out") == 0
    steps = (4, 3, 2, 1) if paradigm == "iterative" else (1,)
    model = DepthMaster.from_file(ckpt).for_inference(precision="float32", timesteps=steps)
    expected = []
    for number, name in enumerate(sorted(SIZES)):
        depth_m, valid = truth(world, name)
        if paradigm == "i2l":
            depth = torch.from_numpy(depth_m)[None]
            target = normalise_target(depth, torch.from_numpy(valid)[None])
            pred = model.round_trip(target[None])[0].numpy()
        else:
            image = torch.from_numpy(photo(*SIZES[name], seed=number)).permute(2, 0, 1)
            pred = model.predict_batch(image[None], timesteps=steps)[0].numpy()
        expected.append(pairs_score(pred, depth_m, valid, "sqrt_disparity"))
    found = results(world / "out")[0]["pairs"]
    assert found["paradigm"] == paradigm
    assert {key: found[key] for key in metrics.SCORES} == pytest.approx(mean(expected), rel=1e-6)
    assert f"paradigm {paradigm}" in capsys.readouterr().out


@pytest.mark.parametrize("space", metrics.METRIC)
def test_predictions_in_metres(space, world, monkeypatch, capsys):
    """predict.py's names come first; PNG holds millimetres; nothing but `space` is scored."""
    expected = []
    for name in SIZES:
        depth_m, valid = truth(world, name)
        metres = np.where(valid, depth_m, 3) * np.float32(1.3) + np.float32(1)
        path = world / "saved/pairs/rgb" / name  # NAME.npy, the map without metres, lies there, too
        if name == "deep/c":
            millimetres = np.round(1000 * metres)
            save(path.with_name("c_metres.png"), millimetres)
            metres = millimetres.astype(np.float64) / 1000
        else:
            np.save(path.with_name(f"{path.name}_metres.npy"), metres)
        if space == "scale":
            metres = metres * (np.median(depth_m[valid]) / np.median(metres[valid]))
        absolute = np.abs(metres - depth_m)[valid] / depth_m[valid]
        expected.append(absolute.mean())
    options = ["--predictions", world / "saved", "--data", world / "root", "--align", space]
    assert call(monkeypatch, *options, "--out", world / "out", "--report") == 0
    found, images = results(world / "out")
    for name, abs_rel in zip(SIZES, expected):
        assert images["pairs", f"rgb/{name}"]["abs_rel"] == pytest.approx(abs_rel, rel=1e-5)
    assert found["pairs"]["align"] == space and found["pairs"]["other_alignments"] == {}
    assert expected[0] > 0.01 and "NAME_metres" in capsys.readouterr().err
    page = (world / "out/report.html").read_text()
    assert ("Predictions in metres, as they are" in page) == (space == "none")
    assert ("times the ratio of the medians" in page) == (space == "scale")


def test_a_map_with_holes_is_no_prediction_in_metres(world, monkeypatch, capsys):
    for name in SIZES:
        depth_m, _ = truth(world, name)  # 0 where it has holes
        save(world / "saved/pairs/rgb" / f"{name}_metres.png", np.round(1000 * depth_m))
    assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                "--align", "none", "--out", world / "out") == 1
    assert "pixels without depth (0)" in capsys.readouterr().err


def test_a_model_has_no_metres(ckpt, monkeypatch, capsys):
    assert call(monkeypatch, "--ckpt", ckpt, "--align", "none") == 2
    assert "--align none is for saved predictions" in capsys.readouterr().err


def test_saved_predictions_have_no_paradigm(world, monkeypatch, capsys):
    assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                "--paradigm", "i2l", "--out", world / "out") == 2
    assert "--paradigm is about a model" in capsys.readouterr().err


def break_prediction(world, how):
    path = world / "saved/pairs/rgb/deep/b.npy"
    pred = np.load(path)
    if how == "missing":
        path.unlink()
    elif how == "size":
        np.save(path, pred[1:])
    elif how == "nan":
        pred[3, 4] = np.nan
        np.save(path, pred)
    else:
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("how, reason", [
    ("missing", "is missing"), ("size", "(44, 50)"), ("nan", "1 values that are NaN"),
    ("truncated", "can't be read"),
])
def test_bad_predictions_are_named_or_skipped(how, reason, world, monkeypatch, capsys):
    break_prediction(world, how)
    arguments = ["--predictions", world / "saved", "--data", world / "root", "--out", world / "out"]
    assert call(monkeypatch, *arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "deep/b.npy" in last and reason in last
    assert not (world / "out" / "metrics.json").exists()

    assert call(monkeypatch, *arguments, "--skip-bad") == 0
    printed = capsys.readouterr()
    assert "skipped pairs/rgb/deep/b" in printed.err and "deep/b.npy" in printed.err
    assert "1 could not be used and were left out (--skip-bad)" in printed.out
    found, images = results(world / "out")
    assert (found["pairs"]["images"], found["pairs"]["skipped"]) == (2, 1)
    assert set(images) == {("pairs", "rgb/a"), ("pairs", "rgb/deep/c")}


def test_bad_truth_is_named_or_skipped(world, monkeypatch, capsys):
    save(world / "root/pairs/depth/a.png", np.zeros(SIZES["a"]))
    arguments = ["--predictions", world / "saved", "--data", world / "root", "--out", world / "out"]
    assert call(monkeypatch, *arguments) == 1
    assert "no valid pixel" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--skip-bad", "--limit", 1) == 1
    assert "error: none of the 1 images of pairs could be scored" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--skip-bad") == 0


def many_pairs(root, count=30):
    """ROOT/pairs with images of two sizes, five of one, five of the other, and so on."""
    for number in range(count):
        size = (40, 60) if number // 5 % 2 else (45, 50)
        save(root / f"pairs/rgb/{number:02d}.png", photo(*size, seed=number))
        save(root / f"pairs/depth/{number:02d}.png", np.round(1000 * boxes(*size, seed=number)[0]))
    return root


def run(*arguments):
    """The script in a process of its own."""
    words = [sys.executable, evaluate.__file__, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=ONE_THREAD)


def files_of(out):
    return [(out / name).read_bytes() for name in ("metrics.json", "per_image.csv")]


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path, ckpt):
    root = many_pairs(tmp_path / "root")
    arguments = ["--ckpt", ckpt, "--data", root, "--batch", 4, "--processing-res", 100]
    assert run(*arguments, "--out", tmp_path / "whole").wait() == 0
    journal, killed = tmp_path / "cut/per_image.csv", []
    while not killed or killed[-1] < 13:
        process = run(*arguments, "--out", tmp_path / "cut", "--workers", 0)
        wanted = (killed[-1] if killed else 0) + 7
        while process.poll() is None and not (
                journal.exists() and journal.read_bytes().count(b"\n") > wanted):
            time.sleep(0.002)
        process.kill()
        process.wait()
        killed.append(journal.read_bytes().count(b"\n") - 1)
    with open(journal, "a") as file:
        file.write("pairs,rgb/29,0.1")  # a row that was cut off
    process = run(*arguments, "--out", tmp_path / "cut")
    assert "going on" in process.communicate()[1] and process.returncode == 0
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    lines = (tmp_path / "cut/per_image.csv").read_text().splitlines()
    assert len(lines) == 31 and len({line.split(",")[1] for line in lines}) == 31


def test_a_reader_that_dies_is_one_sentence(tmp_path):
    root = many_pairs(tmp_path, count=4) / "pairs"

    class Dying(FolderOfPairs):
        def __getitem__(self, index):
            if index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="died .* read rgb/02: look at"):
        list(loop.evaluate_dataset(lambda samples: [torch.ones(45, 50)], Dying(root), ["depth"],
                                      1e-5, 80, workers=1))


def test_ranks_share_the_images(tmp_path, ckpt):
    """Three ranks, whose shares differ, give the same files as one."""
    root = many_pairs(tmp_path / "root", count=10)
    arguments = ["--ckpt", ckpt, "--data", root, "--batch", 2, "--device", "cpu", "--workers", 0]
    assert run(*arguments, "--out", tmp_path / "one").wait() == 0
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
             "3", evaluate.__file__, *arguments, "--out", tmp_path / "three"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True,
                          env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 images") == 1
    for one, three in zip(files_of(tmp_path / "one"), files_of(tmp_path / "three")):
        assert one == three
    assert not list((tmp_path / "three").glob("per_image.rank*"))


def test_scores_with_other_settings_are_not_mixed(world, monkeypatch, capsys):
    arguments = ["--predictions", world / "saved", "--data", world / "root", "--out", world / "out"]
    assert call(monkeypatch, *arguments) == 0
    first = results(world / "out")[0]
    assert call(monkeypatch, *arguments) == 0
    assert "holds the scores of 3 images already" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--align-negative", "square") == 0
    assert "other settings (align_negative)" in capsys.readouterr().err
    assert results(world / "out")[0]["pairs"]["abs_rel"] != first["pairs"]["abs_rel"]
    path = world / "saved/pairs/rgb/a.npy"
    np.save(path, np.load(path) ** 2)  # another prediction of the same name
    assert call(monkeypatch, *arguments) == 0
    again = results(world / "out")[1]
    assert call(monkeypatch, *arguments[:-1], world / "fresh") == 0
    assert again == results(world / "fresh")[1]


@pytest.mark.parametrize("content", [b"[1]", b"garbage", b"\xff", b"", 99999 * b"["])
def test_damaged_settings_are_named(content, tmp_path):
    (tmp_path / "evaluation.json").write_bytes(content)
    (tmp_path / "per_image.csv").write_text("scores")
    with pytest.raises(ValueError, match="evaluation.json is damaged: remove it"):
        prepare(tmp_path, {"align": "depth"})
    assert (tmp_path / "per_image.csv").read_text() == "scores"


def test_a_row_that_holds_no_number_is_scored_again(tmp_path):
    journal = Journal(tmp_path, ["abs_rel", "unfitted"])
    for image in ("a", "b"):
        journal.add("pairs", image, [0.1, "depth"])
    path = tmp_path / "per_image.csv"
    path.write_text(path.read_text().replace("pairs,a,0.1", "pairs,a,O.1"))
    assert list(Journal(tmp_path, ["abs_rel", "unfitted"]).rows) == [("pairs", "b")]


def test_a_journal_without_room_names_its_path(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path, ["abs_rel"])
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="per_image.csv can't be written .No space left.*make room"):
        journal.add("pairs", "rgb/a", [0.1])


def test_a_report_has_the_pictures_of_every_image(world, monkeypatch, capsys):
    assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                "--out", world / "out", "--report") == 0
    page = (world / "out/report.html").read_text()
    pictures = {path.parent.relative_to(world / "out/pictures/pairs").as_posix(): path
                for path in (world / "out/pictures").rglob("truth.jpg")}
    assert set(pictures) == {"rgb/a", "rgb/deep/b", "rgb/deep/c"}
    assert iio.imread(pictures["rgb/a"]).shape == (40, 60, 3)
    assert page.count('"truth": "/9j/') == 3  # the JPEGs, in base64
    assert "report.html" in capsys.readouterr().err


def test_a_report_afterwards_gets_its_pictures(world, monkeypatch):
    """The rows stay; pictures are made where they are missing, and go with other settings."""
    arguments = ["--predictions", world / "saved", "--data", world / "root", "--out", world / "out"]
    assert call(monkeypatch, *arguments) == 0
    before = files_of(world / "out")
    assert call(monkeypatch, *arguments, "--report") == 0
    assert files_of(world / "out") == before
    pictures = world / "out/pictures/pairs/rgb/a"
    assert len(list((world / "out/pictures").rglob("*.jpg"))) == 12
    written = (pictures / "error.jpg").stat().st_mtime_ns
    assert call(monkeypatch, *arguments, "--report") == 0
    assert (pictures / "error.jpg").stat().st_mtime_ns == written
    assert call(monkeypatch, *arguments, "--align", "depth") == 0
    assert not pictures.exists()


def test_evaluations_side_by_side(world, monkeypatch, capsys):
    for negative in ("clamp", "square"):
        assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                    "--align-negative", negative, "--out", world / negative) == 0
    capsys.readouterr()
    assert call(monkeypatch, "--compare", world / "clamp", world / "square") == 0
    printed = capsys.readouterr().out
    assert "pairs: 3 images that all have" in printed
    assert "warning: align_negative differs (clamp, square)" in printed
    assert call(monkeypatch, "--compare", world / "clamp", world) == 1


def test_preflight_names_every_bad_file(world, monkeypatch, capsys):
    arguments = ["--preflight", "--data", world / "root", "--workers", 0]
    assert call(monkeypatch, *arguments) == 0
    assert "pairs: 3 samples, 0 bad" in capsys.readouterr().out
    save(world / "root/pairs/depth/a.png", np.zeros(SIZES["a"]))
    (world / "root/pairs/rgb/deep/b.png").write_bytes(b"no picture")
    assert call(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert "3 samples, 2 bad" in printed.out and "a.png has no valid pixel" in printed.out
    assert "b.png can't be read" in printed.out
    assert printed.err.splitlines()[-1].startswith("error: 2 samples can't be used")
    assert not (world / "scores").exists()


def test_a_constant_prediction_is_counted(world, monkeypatch, capsys):
    np.save(world / "saved/pairs/rgb/a.npy", np.full(SIZES["a"], 0.25))
    assert call(monkeypatch, "--predictions", world / "saved", "--data", world / "root",
                "--out", world / "out") == 0
    found = results(world / "out")[0]["pairs"]
    assert found["unfitted"] == 1 and np.isfinite(found["abs_rel"])
    assert all(other["unfitted"] == 1 for other in found["other_alignments"].values())
    printed = capsys.readouterr().out
    for space in metrics.SPACES:
        assert f"1 predictions could not fix scale and shift in {space}" in printed


def test_virtual_kitti_is_cropped_and_clipped(tmp_path, ckpt, monkeypatch, capsys):
    """The sky is not scored, predictions beyond 80 m are clipped to it, pictures not resized."""
    frames = tmp_path / "root/vkitti/Scene01/clone/frames"
    rows, columns = np.mgrid[:375, :1242]
    depth_cm = 500 + 30 * rows + columns
    depth_cm[:100] = 65535
    save(frames / "rgb/Camera_0/rgb_00000.jpg", photo(375, 1242))
    save(frames / "depth/Camera_0/depth_00000.png", depth_cm)
    depth_m = depth_cm[23:, 13:1229].astype(np.float32) / 100
    pred = noisy(np.where(depth_m < 80, depth_m, 80), "disparity")
    pred[80:140, :100] = -1  # 1 km when aligned
    path = tmp_path / "saved/vkitti/Scene01/clone/frames/rgb/Camera_0/rgb_00000.npy"
    path.parent.mkdir(parents=True)
    np.save(path, pred)
    assert call(monkeypatch, "--predictions", tmp_path / "saved", "--data", tmp_path / "root",
                "--datasets", "vkitti", "--align", "disparity", "--out", tmp_path / "out") == 0
    expected = numpy_score(pred, depth_m, depth_m < 80, "disparity", 1e-5, 80, "clamp", "pair")
    found = results(tmp_path / "out")[0]["vkitti"]
    assert {key: found[key] for key in metrics.SCORES} == pytest.approx(expected, rel=1e-6)
    assert (found["images"], found["expected_images"]) == (1, 5364)
    assert "of fewer images than the set has" in capsys.readouterr().out
    assert set(found["other_alignments"]) == {"sqrt_disparity", "depth"}

    assert call(monkeypatch, "--ckpt", ckpt, "--data", tmp_path / "root/vkitti", "--datasets",
                "vkitti", "--out", tmp_path / "out") == 0
    assert results(tmp_path / "out")[0]["vkitti"]["processing_res"] == 0
    assert "processed at the native size" in capsys.readouterr().out


def test_without_arguments_the_miniature_scores_itself(tmp_path, ckpt, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "TRAINED", ckpt)
    monkeypatch.setattr(embedded, "SCENES", tmp_path / "scenes")
    monkeypatch.setitem(embedded.FRAMES, "val", 1)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("No --ckpt: scoring the embedded miniature model")
    assert "1 of 1" in printed.out and "at 192x256" in printed.out
    assert "(published)" not in printed.out.partition("\n\n")[0]
    found = results(tmp_path / "scores")[0]["miniature"]

    # The same scenes as a set of Hypersim that somebody brings.
    assert call(monkeypatch, "--ckpt", ckpt, "--data", "scenes", "--out", "again",
                "--processing-res", found["processing_res"]) == 0
    assert results(tmp_path / "again")[0]["hypersim"] == found
    published = capsys.readouterr().out.splitlines()[2]
    assert "(published)" in published and "33.70" in published
    assert published.endswith(" 80 images, native, owner mask")


def test_the_test_split_of_hypersim(tmp_path, monkeypatch):
    for split, count in (("val", 1), ("test", 2)):
        for frame in range(count):
            scene = tmp_path / "root/hypersim" / split / "ai_001_001"
            save(scene / f"rgb_cam_00_fr{frame:04d}.png", photo(40, 60))
            depth_m, _ = boxes(40, 60)
            save(scene / f"depth_plane_cam_00_fr{frame:04d}.png", np.round(1000 * depth_m))
            saved = tmp_path / f"saved/hypersim/{split}/ai_001_001/rgb_cam_00_fr{frame:04d}.npy"
            saved.parent.mkdir(parents=True, exist_ok=True)
            np.save(saved, depth_m**-0.5)
    arguments = ["--predictions", tmp_path / "saved", "--data", tmp_path / "root", "--out",
                 tmp_path / "out"]
    for split, expected in (("val", (1, 7370)), ("test", (2, 7682))):
        assert call(monkeypatch, *arguments, "--hypersim-split", split) == 0
        found = results(tmp_path / "out")[0]["hypersim"]
        assert (found["images"], found["expected_images"]) == expected


def test_mistakes_are_one_sentence(world, ckpt, monkeypatch, capsys):
    for arguments, message in [
        (["--data", world / "root"], "--data needs --ckpt"),
        (["--ckpt", ckpt, "--data", world], "holds none of the folders nyuv2, kitti, eth3d"),
        (["--ckpt", ckpt, "--data", world / "nowhere", "--datasets", "pairs"], "nowhere"),
        (["--ckpt", ckpt, "--datasets", "pairs"], "--datasets pairs needs --data"),
        (["--ckpt", ckpt, "--data", world / "root", "--datasets", "pairs", "vkitti"],
         "root/vkitti is not there as a folder"),
        (["--ckpt", ckpt, "--data", world / "root", "--datasets", "hypersim"],
         "metadata_images_split_scene_v1.csv is missing"),
    ]:
        assert call(monkeypatch, *arguments) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and message in last, last


def test_an_out_that_is_a_file_is_told_first(tmp_path, monkeypatch, capsys):
    (file := tmp_path / "file").touch()
    assert call(monkeypatch, "--predictions", "nowhere", "--data", "nowhere", "--out", file) == 1
    assert capsys.readouterr().err == f"error: --out {file} is a file: give a folder.\n"


@pytest.mark.parametrize("words", [
    ["--datasets", "imagenet"], ["--limit", 0], ["--ckpt", "a", "--predictions", "b"],
    ["--processing-res", -5], ["--workers", -1], ["--vkitti-crop", -1, 3], ["--vkitti-crop", 0, 0]])
def test_wrong_options(words, monkeypatch, capsys):
    assert call(monkeypatch, "--data", "nowhere", *words) == 2
    assert "error: argument --" in capsys.readouterr().err


def test_sets_are_found_by_their_folders(tmp_path):
    for name in ("pairs", "hypersim", "something"):
        (tmp_path / name).mkdir()
    assert find_benchmarks(tmp_path) == ["hypersim", "pairs"]
    assert all(0 < each.min_depth < each.max_depth for each in BENCHMARKS.values())


def test_a_missing_model_is_one_line(tmp_path):
    script = Path(evaluate.__file__)
    command = [sys.executable, script, "--ckpt", "nowhere.safetensors", "--data", "."]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: nowhere.safetensors") and result.stderr.count("\n") == 1


def test_two_evaluations_do_not_share_a_folder(world, ckpt, tmp_path, monkeypatch, capsys):
    """The lock is another process's."""
    words = "--ckpt", ckpt, "--data", world / "root", "--out", tmp_path / "out"
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "from engine import run_folder\nimport sys, pathlib\n"
         f"run_folder.claim(pathlib.Path({str(tmp_path / 'out')!r}))\n"
         "print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(evaluate.__file__).parent)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert call(monkeypatch, *words) == 1
        assert f"process {holder.pid} is at work in" in capsys.readouterr().err
    finally:
        holder.communicate()
    assert call(monkeypatch, *words) == 0


def test_a_checkpoint_that_is_replaced_while_it_is_opened(world, ckpt, tmp_path, monkeypatch,
                                                          capsys):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(ckpt.read_bytes())
    original = DepthMaster.from_file

    def replaced(*arguments):
        model = original(*arguments)
        save_tiny(tmp_path / "new.safetensors")
        os.replace(tmp_path / "new.safetensors", mine)
        return model

    monkeypatch.setattr(DepthMaster, "from_file", replaced)
    words = "--ckpt", mine, "--data", world / "root", "--out", tmp_path / "out"
    assert call(monkeypatch, *words) == 1
    assert "mine.safetensors was replaced while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out/per_image.csv").exists()


def test_another_evaluation_in_a_folder_without_locks(world, ckpt, tmp_path, monkeypatch, capsys):
    original = evaluate.evaluate_dataset

    def overtaken(*arguments, **options):
        yield from original(*arguments, **options)
        prepare(tmp_path / "out", {"weights": "another model's"})

    monkeypatch.setattr(evaluate, "evaluate_dataset", overtaken)
    out = tmp_path / "out"
    assert call(monkeypatch, "--ckpt", ckpt, "--data", world / "root", "--out", out) == 1
    assert f"another evaluation has begun in {out}" in capsys.readouterr().err
    assert not (out / "metrics.json").exists()


def damaged_block(content):
    return content[:200] + bytes(100) + content[300:]


@pytest.mark.parametrize("damage", [
    damaged_block, lambda content: content.replace(b"0.", b"0x", 1),
    lambda content: content.replace(b"pairs", b'"airs', 1),
    lambda content: content.replace(b"\n", b"\n\"" + 200_000 * b"x", 1),
    lambda content: content.replace(b"abs_rel", b"abs_rem", 1), lambda content: bytes(len(content)),
    lambda content: re.sub(rb"0\.\d+", b"nan", content, count=1)])
def test_rows_that_can_not_be_read_are_scored_again(damage, world, ckpt, tmp_path, monkeypatch,
                                                    capsys):
    words = "--ckpt", ckpt, "--data", world / "root", "--out", tmp_path / "out"
    assert call(monkeypatch, *words) == 0
    kept = {name: (tmp_path / "out" / name).read_bytes()
            for name in ("per_image.csv", "metrics.json")}
    path = tmp_path / "out/per_image.csv"
    path.write_bytes(damage(kept["per_image.csv"]))
    capsys.readouterr()
    assert call(monkeypatch, *words) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept
    assert "can't be read; they are scored again" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"pairs": []}', "[]", "\0\0", "[" * 99_999])
def test_a_damaged_table_of_scores_is_one_sentence(content, world, ckpt, tmp_path, monkeypatch,
                                                   capsys):
    words = "--ckpt", ckpt, "--data", world / "root", "--out", tmp_path / "out"
    assert call(monkeypatch, *words) == 0
    (tmp_path / "out/metrics.json").write_text(content)
    capsys.readouterr()
    assert call(monkeypatch, "--compare", tmp_path / "out", tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out'} holds ")
    with pytest.raises(ValueError, match="run evaluate.py again|not of one evaluation"):
        write_report(tmp_path / "out")


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@x", "'quoted", "plain"])
def test_names_are_text_for_a_spreadsheet(name, tmp_path):
    journal = Journal(tmp_path, ["abs_rel"])
    journal.add("pairs", name, [0.5])
    cell = (tmp_path / "per_image.csv").read_text().splitlines()[1].split(",")[1]
    assert cell == (name if name == "plain" else f"'{name}")
    again = Journal(tmp_path, ["abs_rel"])
    assert again.rows == journal.rows and not again.lost
    again.merge([("pairs", name)])
    assert Journal(tmp_path, ["abs_rel"]).rows == journal.rows


def test_of_a_users_files_none_is_removed(world, ckpt, monkeypatch, tmp_path):
    words = "--ckpt", ckpt, "--data", world / "root", "--out", tmp_path / "out"
    assert call(monkeypatch, *words, "--report") == 0
    ours = tmp_path / "out/pictures/pairs/rgb/a/image.jpg"
    mine = [tmp_path / "out" / name for name in (
        "per_image_before.csv", "pictures/mine.jpg", "pictures/image.jpg", "pictures/pairs/a.jpg")]
    for path in mine:
        path.write_text("mine")
    assert ours.exists()
    assert call(monkeypatch, *words, "--align", "depth") == 0
    assert not ours.exists() and {path.read_text() for path in mine} == {"mine"}
