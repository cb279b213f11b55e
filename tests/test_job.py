"""engine/job.py: ranks, devices, a script's end, what it says of mistakes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_step import one_step

from engine import job

ROOT = Path(__file__).resolve().parent.parent


TWO_RANKS = """
import os, sys, torch
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from engine import job, step, terminal
from nets.inference import memory
from test_step import Objective

def main():
    global before
    ranks = job.start("cpu")
    before = threads()
    objective = Objective()
    runner = job.parallel(objective, ranks)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))[ranks.rank::2]
    parts = x.split([3, 1]) if ranks.first else x.split([2, 2])
    losses = step.optimizer_step(runner, iter([dict(x=part) for part in parts]), 2, 8,
                                   dict(square=1.0, size=0.5), optimizer, ranks,
                                   torch.float32).losses
    torch.save((losses, objective.linear.weight.detach()), {out!r} + os.environ["RANK"])

def threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

job.run(main)
Path({out!r} + os.environ["RANK"] + ".threads").write_text(f"{{before}} {{threads()}}")
"""


def test_two_ranks_equal_one_and_leave_no_thread(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"),
                                       out=str(tmp_path / "result")))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", str(script)], check=True, capture_output=True)
    losses, weight = one_step([8])
    for rank in range(2):
        other_losses, other_weight = torch.load(tmp_path / f"result{rank}", weights_only=True)
        assert other_losses == pytest.approx(losses, rel=1e-6)
        torch.testing.assert_close(other_weight, weight)
        # A thread of the group that outlived it aborted one run of four ranks in four.
        before, after = map(int, (tmp_path / f"result{rank}.threads").read_text().split())
        assert after == 0 and (before > 0 or sys.platform != "linux")


@pytest.mark.parametrize("error", [ValueError("Bad\nthing."), FileNotFoundError("Bad thing.")])
def test_run_turns_a_mistake_into_one_sentence(error, capsys, monkeypatch):
    monkeypatch.delenv("FULL_TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        job.run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: Bad thing.\n"


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(10**15), lambda: np.empty(10**15),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried ..."))])
def test_too_little_memory_is_one_sentence(fail, capsys):
    with pytest.raises(SystemExit) as stopped:
        job.run(lambda: next(fail()))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ") and "--micro-batch" in said


def test_a_stopped_script_says_so(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        job.run(main)
    assert stopped.value.code == 130 and capsys.readouterr().err == "Stopped.\n"


def test_activations_are_recomputed_where_they_would_not_fit(monkeypatch, capsys):
    trained = [torch.zeros(1000)]  # 12 kB of gradients and moments
    ranks = job.Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr(job, "free_memory", lambda device: 112_000)

    def decide(choice, needed=0):
        return job.recompute_activations(choice, trained, ranks, lambda: needed)

    assert decide("on") and not decide("off", 10**9)
    assert not decide("auto", 79_000) and decide("auto", 81_000)
    assert "are recomputed" in capsys.readouterr().err
    monkeypatch.undo()
    assert 2**28 < job.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(ValueError, match=f"--device {device} can't be used"):
        job.start(device)
