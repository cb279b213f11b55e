"""extras/clip.py: clips and folders of frames through predict.py."""

import json
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import predict
from extras import clip, outputs
from extras.video import about, read_frames, write_clip
from tests import worlds
from tests.worlds import photo, save_tiny

av = pytest.importorskip("av")
SIZE, COUNT, RATE = (40, 56), 10, 12


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def call(monkeypatch, ckpt, tmp_path):
    def call(*arguments, out=tmp_path / "out"):
        return worlds.call(monkeypatch, predict, "--ckpt", ckpt, "--out", out, "--precision",
                           "float32", *arguments)
    return call


def frames(count=COUNT):
    """A picture that moves to the left by a pixel a frame."""
    wide = photo(SIZE[0], SIZE[1] + count)
    return [wide[:, left : left + SIZE[1]] for left in range(count)]


@pytest.fixture
def film(tmp_path):
    write_clip(tmp_path / "film.mp4", RATE, ((i / RATE, x) for i, x in enumerate(frames())))
    return tmp_path / "film.mp4"


def maps(folder):
    return [iio.imread(path) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("temporal", [(), ("--temporal",)])
def test_a_clip(temporal, film, call, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "SEGMENT", 4)
    assert call(film, *temporal, "--batch", 3, "--save", "npy") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "film").iterdir()) == sorted(
        f"frame_{i:06d}.{kind}" for i in range(1, COUNT + 1) for kind in ("png", "npy"))
    count, rate, size = about(out / "film_color.mp4")
    assert (count, size) == (COUNT, (SIZE[0], 2 * SIZE[1])) and float(rate) == pytest.approx(RATE)
    for (seconds, shown), (expected, frame) in zip(read_frames(out / "film_color.mp4"),
                                                   read_frames(film)):
        assert seconds == pytest.approx(expected, abs=1e-4)
        assert np.abs(shown[:, : SIZE[1]].astype(int) - frame).mean() < 12
    stored, near = maps(out / "film")[3], np.load(out / "film/frame_000004.npy")
    value = stored / 65535 * 2 - 0.5 if temporal else stored / 65535
    np.testing.assert_allclose(value, near, atol=2e-5)
    low, high = json.loads((out / "predictions.json").read_text())["pictures"]["film"]["colours"]
    assert (low, high) == (0, 1) if not temporal else low < high
    text = Image.open(out / "film/frame_000004.png").info["Description"]
    assert ("* 2 - 0.5" in text) == bool(temporal)
    entry = json.loads((out / "predictions.json").read_text())["pictures"]["film"]
    assert entry["frames"] == COUNT and entry["files"] == ["film_color.mp4", "film/"]
    assert entry["frames_per_second"] == pytest.approx(RATE)


def test_frames_are_predicted_as_pictures_are(film, call, tmp_path):
    assert call(film) == 0
    _, frame = next(read_frames(film))
    iio.imwrite(tmp_path / "frame.png", frame)
    assert call(tmp_path / "frame.png", out=tmp_path / "single") == 0
    np.testing.assert_array_equal(maps(tmp_path / "out/film")[0],
                                  iio.imread(tmp_path / "single/frame.png"))


def test_a_folder_of_frames_in_the_order_of_their_numbers(call, tmp_path):
    (tmp_path / "shots").mkdir()
    for index, frame in enumerate(frames()):
        iio.imwrite(tmp_path / f"shots/{index + 1}.png", frame)  # 10.png comes last
    assert call("--frames", tmp_path / "shots", "--fps", 5) == 0
    count, rate, _ = about(tmp_path / "out/shots_color.mp4")
    assert count == COUNT and float(rate) == pytest.approx(5)
    last = list(read_frames(tmp_path / "out/shots_color.mp4"))[-1][1]
    assert np.abs(last[:, : SIZE[1]].astype(int) - frames()[-1]).mean() < 12
    assert (tmp_path / "out/shots/10.png").exists()


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stop", ["predicting", "writing"])
def test_an_interrupted_clip_goes_on_to_the_same_bits(stop, film, call, tmp_path, monkeypatch,
                                                      capsys):
    monkeypatch.setattr(clip, "SEGMENT", 3)
    assert call(film, "--temporal", out=tmp_path / "whole") == 0
    written, original = [], outputs.Outputs.write

    def interrupted(self, name, *rest):
        if name.endswith("8"):
            full()
        written.append(name)
        return original(self, name, *rest)

    with monkeypatch.context() as broken:
        if stop == "predicting":
            broken.setattr(outputs.Outputs, "write", interrupted)
        else:
            broken.setattr(clip, "write_clip", full)
        assert call(film, "--temporal") == 1
    assert not (tmp_path / "out/film_color.mp4").exists()
    assert (tmp_path / "out/film/unfinished.npz").exists()
    capsys.readouterr()
    assert call(film, "--temporal") == 0
    assert f"going on after {6 if stop == 'predicting' else 10} frames" in capsys.readouterr().err
    assert not (tmp_path / "out/film/unfinished.npz").exists()
    for a, b in zip(maps(tmp_path / "whole/film"), maps(tmp_path / "out/film"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "out/film_color.mp4").read_bytes() == (
        tmp_path / "whole/film_color.mp4").read_bytes()


def test_what_was_left_unfinished_with_other_options_starts_again(film, call, tmp_path,
                                                                  monkeypatch, capsys):
    monkeypatch.setattr(clip, "SEGMENT", 3)
    with monkeypatch.context() as broken:
        broken.setattr(clip, "write_clip", full)
        assert call(film) == 1
    assert call(film, "--temporal") == 0
    assert "going on" not in capsys.readouterr().err
    (tmp_path / "out/film/unfinished.npz").write_bytes(b"torn")
    assert call(film, "--temporal") == 0
    assert "unfinished.npz is damaged: starting the clip again" in capsys.readouterr().err


def test_skip_existing_leaves_out_a_finished_clip(film, call, tmp_path, capsys):
    assert call(film) == 0
    capsys.readouterr()
    assert call(film, "--skip-existing") == 0
    assert "0 pictures predicted" in capsys.readouterr().err
    assert call(film, "--skip-existing", "--save", "npy") == 0
    assert len(list((tmp_path / "out/film").glob("*.npy"))) == COUNT


@pytest.mark.parametrize("change", ["clip", "kinds"])
def test_another_clip_or_kind_starts_again(change, film, call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip, "SEGMENT", 3)
    with monkeypatch.context() as broken:
        broken.setattr(clip, "write_clip", full)
        assert call(film) == 1
    if change == "clip":
        write_clip(film, RATE, ((i / RATE, x) for i, x in enumerate(frames()[::-1])))
    assert call(film, *(["--save", "npy"] if change == "kinds" else [])) == 0
    assert "going on" not in capsys.readouterr().err
    assert len(list((tmp_path / "out/film").glob("*.npy"))) == COUNT * (change == "kinds")


def test_clips_write_over_nothing(film, call, tmp_path, capsys):
    other = tmp_path / "film_color.mp4"
    other.write_bytes(film.read_bytes())
    assert call(film, other, out=tmp_path) == 1
    assert "would be written over the input" in capsys.readouterr().err
    (tmp_path / "film").mkdir()
    iio.imwrite(tmp_path / "film/frame_000001.png", frames()[0])
    assert call(film, tmp_path / "film") == 0  # OUT/frame_000001.png is beside OUT/film/
    assert call(film, "--frames", tmp_path / "film") == 1
    assert "would both be written as film" in capsys.readouterr().err
    (tmp_path / "deep/film").mkdir(parents=True)
    iio.imwrite(tmp_path / "deep/film/a.png", frames()[0])
    assert call(film, tmp_path / "deep") == 1
    assert "beside the result for" in capsys.readouterr().err
    iio.imwrite(tmp_path / "film/frame_000001.jpg", frames()[0])
    assert call("--frames", tmp_path / "film") == 1
    assert "would both be written as frame_000001" in capsys.readouterr().err


def test_metres_are_for_pictures(film, call, tmp_path, capsys):
    assert call(film, "--metric", tmp_path) == 1
    assert "--metric is about pictures" in capsys.readouterr().err


def test_no_clip_in_it(film, call, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.mp4").write_text("no clip")
    assert call(tmp_path / "text.mp4", film) == 1
    said = capsys.readouterr().err
    assert "text.mp4 is no video" in said and "1 of 2" in said
    assert (tmp_path / "out/film_color.mp4").exists()
    (tmp_path / "shots").mkdir()
    assert call("--frames", tmp_path / "shots") == 1
    assert "shots holds no picture" in capsys.readouterr().err
    assert call("--frames", tmp_path / "none") == 1
    assert "none is no folder of frames" in capsys.readouterr().err
    for index, frame in enumerate(frames(3)):
        iio.imwrite(tmp_path / f"shots/{index}.png", frame[: 40 - 8 * (index == 2)])
    assert call("--frames", tmp_path / "shots") == 1
    assert "2.png has 56 x 32 pixels, unlike the first frame's 56 x 40" in capsys.readouterr().err
    assert call("--frames", tmp_path / "shots", out=tmp_path) == 1
    assert "choose another folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert call(film, out=tmp_path / "later") == 1
    assert "error: video needs av: pip install" in capsys.readouterr().err
    assert not (tmp_path / "later").exists()
