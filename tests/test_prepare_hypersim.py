"""data/prepare_hypersim.py: what it writes, what it drops, and going on where it stopped."""

import csv

import imageio.v3 as iio
import numpy as np
import pytest
from hypersim_files import frame_path, scene_arrays, write_data_set, write_frame, write_split_csv

from data.hypersim import Hypersim, ProcessedHypersim
from data.prepare_hypersim import main, to_millimetres


@pytest.fixture
def raw(tmp_path):
    """Train: two good frames, a dull one, a torn one, one that isn't on disk. Val: a dull one."""
    root = write_data_set(tmp_path / "raw", train=4, val=1)
    color, distance_m, entity = scene_arrays(1)
    distance_m[20:22, 30:40], distance_m[30, 30], entity[40, 40] = 70, np.nan, -1
    write_frame(root, frame=1, distance_m=distance_m, entity=entity)
    write_frame(root, frame=2, color=np.full_like(color, 3))
    write_frame(root, "ai_002_001", 0, color=np.full_like(color, 3))
    frame_path(root, "ai_001_001", 3, "render_entity_id").write_bytes(b"torn")
    write_split_csv(root, [*(("ai_001_001", frame, "train") for frame in range(5)),
                           ("ai_002_001", 0, "val"), ("ai_003_001", 0, "test")])
    return root


def run(raw, out, *options):
    main([str(raw), str(out), *(options or ("--workers", "0"))])


def dropped(out):
    """{frame number: kind} of the report."""
    with open(out / "dropped.csv", newline="") as file:
        return {row["frame"][-10:-6]: (row["split"], row["kind"]) for row in csv.DictReader(file)}


def pictures(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))


def pair(folder, frame):
    return [f"{folder}/{kind}_cam_00_fr{frame:04d}.png" for kind in ("depth_plane", "rgb")]


EXPECTED = sorted(pair("train/ai_001_001", 0) + pair("train/ai_001_001", 1)
                  + pair("val/ai_002_001", 0))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_converts_and_reports(raw, tmp_path, capsys, caplog, workers):
    out = tmp_path / "out"
    run(raw, out, "--workers", workers)
    assert pictures(out) == EXPECTED
    assert sorted(path.name for path in out.iterdir()) == ["dropped.csv", "train", "val"]
    assert dropped(out) == {"0002": ("train", "filtered"), "0003": ("train", "bad")}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["split", "listed", "on", "disk", "filtered", "bad", "kept", "published"]
    assert lines[1:] == [["train", "5", "4", "1", "1", "2", "53,885"],
                         ["val", "1", "1", "0", "0", "1", "7,370"]]
    assert "1 of the 5 train frames" in caplog.text and "none of the 1 test" in caplog.text


def test_the_processed_reader_sees_what_the_raw_one_does(raw, tmp_path):
    run(raw, tmp_path / "out")
    before, after = Hypersim(raw, "train"), ProcessedHypersim(tmp_path / "out", "train")
    assert len(after) == 2
    for i in range(2):
        one, other = before[i], after[i]
        assert np.array_equal(one["image"], other["image"])
        assert np.array_equal(one["valid"], other["valid"])
        assert (one["depth"] - other["depth"])[one["valid"]].abs().max() <= 0.00051
    assert not after[1]["valid"][0, 20:22, 30:40].any() and after[1]["valid"].sum() == 48 * 64 - 22
    depth_mm = iio.imread(tmp_path / "out" / pair("train/ai_001_001", 1)[0])
    assert depth_mm.dtype == np.uint16 and (depth_mm == 0).sum() == 22


def test_far_depth_saturates_to_invalid_and_never_wraps():
    depth_m = np.array([[0.4567, 64.9996, 65.6, 70.0, 200.0]], np.float32)[None]
    depth_mm = to_millimetres(depth_m, depth_m < 65)
    assert depth_mm.dtype == np.uint16 and depth_mm.tolist() == [[457, 65000, 0, 0, 0]]


def test_goes_on_where_it_stopped(raw, tmp_path):
    out = tmp_path / "out"
    run(raw, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    # A half pair isn't finished, and no reader takes it for one.
    half = out / pair("train/ai_001_001", 1)[1]
    half.unlink()
    assert len(ProcessedHypersim(out, "train")) == 1
    # Meanwhile the torn file was replaced, and a frame that the filter dropped has become torn:
    # it isn't looked at again.
    write_frame(raw, frame=3)
    frame_path(raw, "ai_001_001", 2, "color").write_bytes(b"torn")
    run(raw, out)
    assert pictures(out) == sorted(EXPECTED + pair("train/ai_001_001", 3))
    assert dropped(out) == {"0002": ("train", "filtered")}
    redone = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert redone == {half, out / pair("train/ai_001_001", 1)[0]}


def test_a_killed_run_keeps_its_report(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare_hypersim.write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        run(raw, out)
    monkeypatch.undo()
    with open(out / "dropped.csv", "a") as file:
        file.write("train,ai_001_0")  # a line that was cut off
    frame_path(raw, "ai_001_001", 2, "color").write_bytes(b"torn")
    run(raw, out)
    assert dropped(out) == {"0002": ("train", "filtered"), "0003": ("train", "bad")}
    assert pictures(out) == EXPECTED


def test_an_interrupted_write_leaves_no_picture(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("data.files.os.replace", full_disk)
    with pytest.raises(OSError, match="png can't be written .No space left") as caught:
        run(raw, out)
    assert "Traceback" not in str(caught.value)
    monkeypatch.undo()
    assert pictures(out) == []
    run(raw, out)
    assert pictures(out) == EXPECTED
    assert not list(out.rglob("*.tmp"))


def test_wrong_arguments(raw, tmp_path):
    with pytest.raises(ValueError, match="is the raw data set itself"):
        run(raw, raw)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="none of the 1 test frames"):
        run(raw, tmp_path / "out", "--splits", "test")
    for options in (("--workers", "-1"), ("--splits", "training")):
        with pytest.raises(SystemExit) as caught:
            run(raw, tmp_path / "out", *options)
        assert caught.value.code == 2
    with pytest.raises(FileExistsError, match="OUT .*csv is a file: give a folder."):
        run(tmp_path / "nowhere", raw / "metadata_images_split_scene_v1.csv")
    assert not (tmp_path / "out").exists()
