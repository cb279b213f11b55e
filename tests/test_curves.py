"""evaluation/curves.py and extras/watch.py: runs seen as curves and as a table."""

import json
import os
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest

from evaluation.curves import FEWEST, draw_curves, read_log
from extras import watch
from tests import worlds


def run(folder, steps, speed=2.0):
    """A run folder with a log of so many steps, of 20."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 1 / step, "latent": 0.5 / step, "lr": 1e-4 * step,
             "samples_per_second": speed} for step in range(1, steps + 1)]
    rows.append({"step": steps, "left_out": 0, "validation": {
        "abs_rel": 0.125, "delta1": 0.875, "boundary_f1": 0.25}})
    lines = [json.dumps(row) for row in rows]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 3']))
    (folder / "args.json").write_text(json.dumps({"steps": 20, "batch": 40}))
    return folder


def test_rows_that_are_cut_off_are_passed_over(tmp_path):
    assert len(read_log(run(tmp_path / "a", 9))) == 10
    assert read_log(tmp_path) == []


def test_curves_are_drawn(tmp_path):
    a, b = run(tmp_path / "a", 9), run(tmp_path / "b", FEWEST - 1)
    draw_curves([b], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()  # too few steps
    draw_curves([a], tmp_path / "a.png")
    draw_curves([a, b], tmp_path / "both.png")
    one, both = (iio.imread(tmp_path / f"{name}.png")[..., :3] for name in ("a", "both"))
    assert one.shape == both.shape and one.shape[1] > 3 * one.shape[0]
    for third in np.array_split(one, 3, axis=1):  # each of the axes has a coloured curve
        assert (np.ptp(third.astype(int), axis=2) > 60).sum() > 50
    assert (one != both).any()


def test_the_table_of_runs(tmp_path, monkeypatch, capsys):
    a, b = run(tmp_path / "a", 9), run(tmp_path / "b", 20)
    (a / "state.pt").touch()
    os.utime(a / "state.pt", (time.time() - 7500, time.time() - 7500))
    assert worlds.call(monkeypatch, watch, a, b, "--out", tmp_path / "curves.png") == 0
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split() == " ".join(watch.HEADS).split()
    assert first.split() == [str(a), "9", "20", "0.1111", "0.125", "0.875", "0.250", "2.00",
                             "3:40", "min", "2:05", "h", "ago"]
    assert second.split()[-2:] == ["finished", "never"]
    assert last == f"Curves: {tmp_path / 'curves.png'}" and (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("there", [True, False])
def test_what_is_no_run(there, tmp_path, monkeypatch, capsys):
    folder = tmp_path if there else tmp_path / "nowhere"
    assert worlds.call(monkeypatch, watch, folder) == 1
    assert "is no run folder" in capsys.readouterr().err
    assert "matplotlib.pyplot" not in sys.modules  # it would look for a screen
