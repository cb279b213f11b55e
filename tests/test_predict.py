"""predict.py: what it writes, what it refuses to write, and which pictures it can read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import predict
from data.images import read_rgb
from evaluation.pictures import INVALID_COLOUR, colourise, comparison, font_size
from extras.inputs import find_inputs
from extras.outputs import to_sqrt_disparity
from extras.pictures import MEANING, with_legend
from miniature import embedded
from nets.depthmaster import DepthMaster
from tests import worlds
from tests.worlds import photo, save_tiny


RECORD = "predictions.json"
FLOAT32 = ("--precision", "float32")  # not what is fast on the machine at hand


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def call(monkeypatch, *arguments):
    return worlds.call(monkeypatch, predict, *arguments)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def test_a_size_below_zero_is_a_wrong_option(tmp_path, ckpt, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, "--ckpt", ckpt, "--processing-res", -5) == 2
    assert "--processing-res: must be a whole number, 0 or above" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_told_first(tmp_path, monkeypatch, capsys):
    (file := tmp_path / "file").touch()
    assert call(monkeypatch, "nowhere", "--out", file / "deep") == 1
    assert capsys.readouterr().err == f"error: --out {file} is a file: give a folder.\n"


def test_folder_with_a_broken_picture(tmp_path, ckpt, monkeypatch, capsys):
    inputs, out = tmp_path / "in", tmp_path / "out"
    (inputs / "deep" / "er").mkdir(parents=True)
    image = photo(40, 56)
    iio.imwrite(inputs / "a.png", image)
    iio.imwrite(inputs / "deep" / "er" / "b.v2.PNG", photo(33, 50, seed=1))
    (inputs / "deep" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (inputs / "notes.txt").write_text("no picture, not read")
    (inputs / "._a.png").write_bytes(b"what macOS puts beside a.png, not read")
    assert call(monkeypatch, inputs, "--ckpt", ckpt, "--out", out, *FLOAT32) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "broken.jpg" in printed.err and "error: 1 of 3 pictures" in printed.err
    names = ["a", "deep/er/b.v2"]
    assert set(files_in(out)) == {f"{name}{ending}" for name in names
                                  for ending in (".npy", ".png", "_color.png")} | {RECORD}

    near = np.load(out / "a.npy")
    expected = DepthMaster.from_file(ckpt).for_inference(precision="float32").predict(image)
    assert near.dtype == np.float32 and near.shape == (40, 56)
    np.testing.assert_array_equal(near, expected)
    assert 0 <= near.min() < near.max() <= 1
    sixteen = iio.imread(out / "a.png")
    assert sixteen.dtype == np.uint16
    np.testing.assert_array_equal(sixteen, np.round(65535 * near.astype(np.float64)))
    assert Image.open(out / "a.png").info["Description"] == f"{MEANING}; value = stored / 65535"
    assert Image.open(out / "a_color.png").info["Description"] == MEANING
    np.testing.assert_array_equal(iio.imread(out / "a_color.png")[:40, :56], colourise(near))


def test_options_reach_the_model(tmp_path, ckpt, monkeypatch):
    image = photo(48, 80)
    iio.imwrite(tmp_path / "a.png", image)
    assert call(monkeypatch, tmp_path / "a.png", "--ckpt", ckpt, "--out", tmp_path / "out",
                "--processing-res", 0, "--save", "npy", "--precision", "bfloat16") == 0
    assert set(files_in(tmp_path / "out")) == {"a.npy", RECORD}
    model = DepthMaster.from_file(ckpt, dtype=torch.bfloat16).for_inference(precision="bfloat16")
    near = np.load(tmp_path / "out" / "a.npy")
    np.testing.assert_array_equal(near, model.predict(image, 0))
    assert not np.array_equal(near, model.predict(image))


@pytest.mark.parametrize("names, out, message", [
    (["a.png"], ".", "would be written over the input"),
    (["a.jpg", "a.png"], "out", "would both be written as a"),
    (["a.jpg", "a_color.jpg"], "out", "would be written over the result for"),
], ids=["input", "same stem", "colour of one is depth of the other"])
def test_nothing_is_ever_written_over(names, out, message, tmp_path, ckpt, monkeypatch, capsys):
    for seed, name in enumerate(names):
        iio.imwrite(tmp_path / name, photo(24, 32, seed=seed))
    before = files_in(tmp_path)
    assert call(monkeypatch, tmp_path, "--ckpt", ckpt, "--out", tmp_path / out) == 1
    assert message in capsys.readouterr().err
    assert files_in(tmp_path) == before


def test_two_folders_with_the_same_relative_path(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        iio.imwrite(tmp_path / folder / "a.png", photo(16, 16))
    with pytest.raises(ValueError, match=r"x/a.png and .*y/a.png would both be written as a"):
        find_inputs([str(tmp_path / "x"), str(tmp_path / "y")], tmp_path / "out", None)
    both = find_inputs([str(tmp_path)], tmp_path / "out", None)
    assert list(both) == [os.path.join("x", "a"), os.path.join("y", "a")]
    twice = find_inputs([str(tmp_path / "x"), str(tmp_path / "x/a.png")], tmp_path / "out", None)
    assert list(twice) == ["a"]


def test_earlier_results_in_the_folder_are_not_inputs(tmp_path, ckpt, monkeypatch, capsys):
    iio.imwrite(tmp_path / "a.jpg", photo(24, 32))
    for _ in range(2):
        assert call(monkeypatch, tmp_path, "--ckpt", ckpt, "--out", tmp_path / "predictions") == 0
    assert len(files_in(tmp_path)) == 5
    assert "3 files of an earlier run were replaced" in capsys.readouterr().err


def test_missing_and_empty_inputs(tmp_path, ckpt, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path / "nowhere", "--ckpt", ckpt) == 1
    assert "nowhere is not there" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path, "--ckpt", ckpt) == 1
    assert "holds no picture" in capsys.readouterr().err
    assert call(monkeypatch, "--save", "tif") == 2


def test_without_arguments_it_predicts_scenes_of_the_miniature(tmp_path, ckpt, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "TRAINED", ckpt)
    monkeypatch.setattr(embedded, "SCENES", tmp_path / "scenes")
    monkeypatch.setitem(embedded.FRAMES, "val", 1)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch) == 0
    assert capsys.readouterr().err.startswith("No --ckpt: predicting with the embedded miniature")
    assert np.load("predictions/room_3.npy").shape == (192, 256)


@pytest.mark.parametrize("mode, expected", [
    ("RGB", [10, 20, 30]), ("RGBA", [10, 20, 30]), ("L", [10, 10, 10]), ("LA", [10, 10, 10]),
    ("I;16", [10, 10, 10]), ("1", [255, 255, 255]), ("P", [10, 20, 30]),
])
def test_every_kind_of_picture_becomes_rgb(mode, expected, tmp_path):
    if mode == "I;16":
        grey = np.full((5, 7), 10 * 257 + 100, np.uint16)
        grey[4, 6] = 40_000  # so that all 16 bits are in use
        picture = Image.fromarray(grey)
    elif mode == "P":
        picture = Image.new("RGB", (7, 5), (10, 20, 30)).quantize(4)
    else:
        picture = Image.new(mode, (7, 5), {"RGBA": (10, 20, 30, 40), "LA": (10, 40), "L": 10,
                                           "1": 1}.get(mode, (10, 20, 30)))
    picture.save(tmp_path / "a.png")
    image = read_rgb(tmp_path / "a.png")
    assert image.dtype == np.uint8 and image.shape == (5, 7, 3)
    np.testing.assert_array_equal(image[:4], np.broadcast_to(expected, (4, 7, 3)))


def test_exif_orientation_is_applied(tmp_path):
    image = photo(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to show
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), np.rot90(image, -1))


def test_truncated_and_floating_point_pictures_are_named(tmp_path):
    iio.imwrite(tmp_path / "a.png", photo(64, 64))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "c.tiff")
    for name in ("b.png", "c.tiff"):
        with pytest.raises(ValueError, match=name):
            read_rgb(tmp_path / name)


def test_other_targets_become_square_root_disparity():
    depth_m = np.linspace(1, 10, 50).reshape(5, 10)  # the assumed ratio of far to near
    expected = (depth_m**-0.5 - 10**-0.5) / (1 - 10**-0.5)
    as_depth, as_disparity = (depth_m - 1) / 9, (1 / depth_m - 0.1) / 0.9
    np.testing.assert_allclose(to_sqrt_disparity(as_depth, "depth", 10), expected, atol=1e-6)
    found = to_sqrt_disparity(as_disparity, "disparity", 10)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert to_sqrt_disparity(expected, "sqrt_disparity", 10) is expected


def test_models_of_another_target_are_converted_and_say_so(tmp_path, monkeypatch, capsys):
    ckpt = save_tiny(tmp_path / "depth.safetensors", target="depth")
    image = photo(24, 32)
    iio.imwrite(tmp_path / "a.png", image)
    assert call(monkeypatch, tmp_path / "a.png", "--ckpt", ckpt, "--out", tmp_path / "out",
                *FLOAT32) == 0
    assert "predicts depth: converted" in capsys.readouterr().err
    depth = DepthMaster.from_file(ckpt).for_inference(precision="float32").predict(image)
    near = np.load(tmp_path / "out" / "a.npy")
    assert near.dtype == np.float32
    np.testing.assert_allclose(near, to_sqrt_disparity(depth, "depth", 10), atol=1e-7)


def test_pictures_of_one_size_are_predicted_together(tmp_path, ckpt, monkeypatch):
    sizes = [(24, 32), (24, 32), (24, 32), (24, 40), (24, 32)]
    for seed, size in enumerate(sizes):
        iio.imwrite(tmp_path / f"{seed}.png", photo(*size, seed=seed))
    (tmp_path / "1_broken.png").write_bytes(b"nothing")
    seen, original = [], DepthMaster.predict_batch
    monkeypatch.setattr(DepthMaster, "predict_batch", lambda self, images, *rest: (
        seen.append(len(images)), original(self, images, *rest))[1])
    for batch, expected in ((1, [1] * 5), (2, [2, 1, 1, 1])):
        seen.clear()
        assert call(monkeypatch, tmp_path, "--ckpt", ckpt, "--out", tmp_path / f"out{batch}",
                    "--save", "npy", "--batch", batch, *FLOAT32) == 1
        assert seen == expected
    for seed in range(5):
        alone, together = (np.load(tmp_path / f"out{batch}/{seed}.npy") for batch in (1, 2))
        np.testing.assert_allclose(alone, together, atol=1e-5)


def test_a_result_that_cannot_be_written_ends_with_a_sentence(tmp_path, ckpt, monkeypatch, capsys):
    iio.imwrite(tmp_path / "a.png", photo(24, 32))
    (tmp_path / "out").write_text("a file where the folder should be")
    assert call(monkeypatch, tmp_path / "a.png", "--ckpt", ckpt, "--out", tmp_path / "out") == 1
    assert "error: " in capsys.readouterr().err


def test_overflow_in_half_precision_is_repeated_in_float32(tmp_path, ckpt, monkeypatch, capsys):
    genuine = DepthMaster.forward

    def overflowing(self, image, timesteps):
        factor = float("nan") if self.dtype == torch.float16 else 1
        return factor * genuine(self, image, timesteps)

    monkeypatch.setattr(DepthMaster, "forward", overflowing)
    iio.imwrite(tmp_path / "a.png", photo(24, 32))
    words = [tmp_path / "a.png", "--ckpt", ckpt, "--out", tmp_path / "out"]
    assert call(monkeypatch, *words, "--precision", "float16") == 0
    assert "overflowed: going on in float32" in capsys.readouterr().err
    assert np.isfinite(np.load(tmp_path / "out/a.npy")).all()
    monkeypatch.setattr(DepthMaster, "forward",
                        lambda self, *_: torch.full((1, 1, 24, 32), float("nan")))
    assert call(monkeypatch, *words) == 1
    assert "not finite: its weights are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("height, width", [(192, 256), (30, 20), (300, 2000)])
def test_the_legend_leaves_the_picture_alone_and_runs_from_far_to_near(height, width):
    near = np.linspace(0, 1, height * width).reshape(height, width)
    picture = with_legend(near)
    np.testing.assert_array_equal(picture[:height, :width], colourise(near))
    legend = picture[height:]
    assert legend.shape[0] >= 22 and legend.shape[1] >= 100  # room for readable words
    coloured = legend[legend.shape[0] // 3]  # a line through the bar: words, colours, words
    left = (coloured == colourise(np.zeros((1, 1)))[0, 0]).all(axis=1).nonzero()[0]
    right = (coloured == colourise(np.ones((1, 1)))[0, 0]).all(axis=1).nonzero()[0]
    assert 0 < left.min() <= left.max() < right.min() <= right.max() < width or width < 100
    letters = (legend[: 2 * font_size(width)].max(axis=2) < 60).any(axis=0).nonzero()[0]
    first, second = letters[letters < left.min()], letters[letters > right.max()]
    assert 0 < np.ptp(first) < np.ptp(second)  # "far" is shorter than "near"


def test_colours_and_panels():
    found = colourise(np.array([[0.0, 1.0, np.nan]]))
    assert found[0, 0, 2] > found[0, 0, 0] and found[0, 1, 0] > found[0, 1, 2]  # far blue, near red
    assert tuple(found[0, 2]) == INVALID_COLOUR
    depth_m = np.linspace(1, 9, 40 * 60).reshape(40, 60)
    valid = np.ones((40, 60), bool)
    valid[10:20, 10:20] = False
    depth_m[~valid] = 0
    image = photo(40, 60)
    panel = comparison(image, depth_m, np.where(valid, depth_m, 5), valid)
    assert panel.dtype == np.uint8 and panel.shape[1:] == (240, 3)
    shown, truth, prediction, error = np.split(panel[-40:], 4, axis=1)
    np.testing.assert_array_equal(shown, image)
    np.testing.assert_array_equal(truth[valid], prediction[valid])
    assert (truth[~valid] == INVALID_COLOUR).all() and (error[~valid] == INVALID_COLOUR).all()
    assert (error[valid] == error[0, 0]).all() and not (prediction[~valid] == INVALID_COLOUR).all()


def test_a_mistake_is_one_sentence(tmp_path):
    script = Path(predict.__file__)
    result = subprocess.run([sys.executable, script, tmp_path, "--ckpt", "nowhere.safetensors"],
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_what_is_passed_over_in_a_folder_is_counted_and_named(tmp_path, monkeypatch, capsys):
    ckpt = save_tiny(tmp_path / "tiny.safetensors")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jfif", "b.mpo", "c.gif", "d.avif", "e.JPE"):
        kind = {"a": "JPEG", "b": "MPO", "e": "JPEG"}.get(name[0])
        Image.fromarray(photo(40, 60)).save(folder / name, format=kind)
    for name in ("notes.txt", "clip.mp4", "clip2.mp4", ".DS_Store", "._a.jfif"):
        (folder / name).write_bytes(b"x")
    (folder / "linked").symlink_to(folder)
    assert call(monkeypatch, folder, "--ckpt", ckpt, "--out", tmp_path / "out", "--save",
                "npy") == 0
    said = capsys.readouterr().err
    assert "".join(sorted(path.stem for path in (tmp_path / "out").glob("*.npy"))) == "abcde"
    assert "3 files are of no kind that is read here and are passed over" in said
    assert ".mp4 2, .txt 1" in said and "DS_Store" not in said and "._a" not in said


def test_the_limit_of_pixels_is_named_and_can_be_lifted(tmp_path, monkeypatch, capsys):
    ckpt = save_tiny(tmp_path / "tiny.safetensors")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.fromarray(photo(40, 60)).save(tmp_path / "a.png")
    options = [tmp_path / "a.png", "--ckpt", ckpt, "--out", tmp_path / "out", "--save", "npy"]
    assert call(monkeypatch, *options) == 1
    assert "more than 2,000 pixels: make it smaller (predict.py --max-pixels allows more)" in (
        capsys.readouterr().err)
    assert call(monkeypatch, *options, "--max-pixels", 2400) == 0
    assert np.load(tmp_path / "out/a.npy").shape == (40, 60)


def test_a_name_that_is_too_long_for_a_result_is_left_out(tmp_path, ckpt, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a", "b" * 247, "c" * 240, "d"):
        iio.imwrite(tmp_path / "in" / f"{name}.png", photo(24, 32))
    assert call(monkeypatch, tmp_path / "in", "--ckpt", ckpt, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "longer name than files can have" in said and "1 of 4 pictures could not" in said
    there = {path.stem for path in (tmp_path / "out").glob("*_color.png")}
    assert there == {"a_color", "c" * 240 + "_color", "d_color"}


def test_names_do_nothing_to_a_terminal(tmp_path, ckpt, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/\x1b[2Ja\nerror: forged.png").write_bytes(b"torn")
    assert call(monkeypatch, tmp_path / "in", "--ckpt", ckpt, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err.replace("\x1b[A", "")  # tqdm's own
    assert "\x1b" not in said and "\nerror: forged" not in said
    assert "?[2Ja?error: forged.png" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_when_it_is_stopped_nothing_half_written_stays(number, tmp_path, ckpt):
    (tmp_path / "in").mkdir()
    for name in range(300):
        iio.imwrite(tmp_path / "in" / f"{name}.png", photo(64, 96))
    process = subprocess.Popen(
        [sys.executable, Path(predict.__file__), tmp_path / "in", "--ckpt", ckpt, "--device", "cpu",
         "--out", tmp_path / "out", "--processing-res", "64"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("*.npy")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("after", [0.05, 0.3, 0.8])
def test_ctrl_c_while_it_is_imported(after, tmp_path):
    process = subprocess.Popen([sys.executable, predict.__file__, "nowhere"], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert "Traceback" not in said
