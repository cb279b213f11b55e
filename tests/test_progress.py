"""engine/progress.py: signals, the rows of the log, steps that are skipped, spikes."""

import json
import signal
import time

import pytest
import torch

from engine import run_folder
from engine.job import Ranks
from engine.progress import Progress, Watch
from engine.step import Outcome

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, capsys):
    log = run_folder.Log(tmp_path, 0, ALONE)
    bad, good = Outcome(None, ["a"], ["a", "b"]), Outcome({"loss": 1.0}, ["a"], None)
    with Progress(0, 99, 2, 5, log, ALONE) as progress:
        for step in range(1, 10):
            progress.report(step, bad, 0.1)
        progress.report(10, good, 0.1)
        for step in range(11, 20):
            progress.report(step, bad, 0.1)
        with pytest.raises(ValueError, match="10 steps in a row .* lower --lr.*a, b"):
            progress.report(20, bad, 0.1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(row.get("skipped") == ["a", "b"] for row in rows) == 19
    assert "Step 3 was skipped" in capsys.readouterr().err


def test_a_spike_of_the_loss_is_logged_with_its_samples(tmp_path):
    log = run_folder.Log(tmp_path, 0, ALONE)
    with Progress(0, 200, 2, 1000, log, ALONE) as progress:
        for step in range(1, 151):
            loss = 9.0 if step in (50, 150) else 1.0  # the first is too early to be a spike
            progress.report(step, Outcome({"loss": loss}, [f"s{step}"], None), 0.1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["spike"], row["samples"]) for row in rows] == [(150, 9.0, ["s150"])]


def test_signals_are_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Watch(ALONE) as watch:
        assert watch.agree() == [False, False]
        signal.raise_signal(signal.SIGUSR1)
        assert watch.agree() == [False, True] and watch.agree() == [False, False]
        signal.raise_signal(signal.SIGTERM)
        assert watch.agree() == [True, False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_program_unless_it_is_the_first_passed_on(monkeypatch):
    clock, ended = iter([10.0, 10.1, 20.0]), []
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Watch(ALONE) as watch:
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        watch.note(signal.SIGTERM, None)
        watch.note(signal.SIGTERM, None)  # from torchrun, which got it, too
        assert watch.leave and not ended
        watch.note(signal.SIGTERM, None)
        assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_progress_logs_means_since_the_last_row(tmp_path):
    log = run_folder.Log(tmp_path, 0, ALONE)
    with Progress(0, 3, 8, 2, log, ALONE) as progress:
        for step, loss in enumerate((1.0, 3.0, 5.0), start=1):
            progress.report(step, Outcome({"loss": loss}, [], None), 0.1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == [(2, 2.0, 0.1), (3, 5.0, 0.1)]
    assert all(row["samples_per_second"] > 0 for row in rows)
