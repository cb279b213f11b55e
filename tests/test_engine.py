"""engine.py: the learning rate, the step over micro-batches, the run folder."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import engine

ROOT = Path(__file__).resolve().parent.parent
ALONE = engine.Ranks(0, 1, torch.device("cpu"))


# ---------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize("step, rate", [
    (0, 0.0), (1, 0.01), (50, 0.5), (99, 0.99), (100, 1.0),
    (100 + 12_450, 0.1),  # half-way of the decay: the square root of 1 %
    (25_000, 0.01), (40_000, 0.01),
])
def test_learning_rate(step, rate):
    assert engine.learning_rate(step, 3e-5) == pytest.approx(3e-5 * rate, rel=1e-12, abs=0)


def test_learning_rate_falls_by_a_constant_factor():
    rates = [engine.learning_rate(step, 1.0) for step in (100, 1100, 2100)]
    assert rates[1] / rates[0] == pytest.approx(rates[2] / rates[1])
    assert rates[1] == pytest.approx(math.exp(math.log(0.01) * 1000 / 24_900))


# ---------------------------------------------------------------------------- one step


class Objective(nn.Module):
    """Two per-sample losses of a linear model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, batch):
        y = self.linear(batch["x"])[:, 0]
        return {"square": y.square(), "size": y.abs()}


def cut(x, sizes):
    return iter([{"x": part, "name": ["?"] * len(part)} for part in x.split(sizes)])


def one_step(sizes):
    objective = Objective()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    losses = engine.optimizer_step(objective, cut(x, sizes), len(sizes), 8,
                                   {"square": 1.0, "size": 0.5}, optimizer, ALONE, torch.float32)
    return losses, objective.linear.weight.detach().clone()


def test_step_does_not_depend_on_the_cut():
    losses, weight = one_step([8])
    for sizes in ([4, 4], [1] * 8, [5, 2, 1]):
        other_losses, other_weight = one_step(sizes)
        assert other_losses == pytest.approx(losses, rel=1e-6)
        torch.testing.assert_close(other_weight, weight)


def test_step_against_plain_autograd():
    losses, weight = one_step([3, 5])
    objective = Objective()
    before = objective.linear.weight.detach().clone()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    parts = objective({"x": x})
    total = parts["square"].mean() + 0.5 * parts["size"].mean()
    total.backward()
    torch.testing.assert_close(weight, before - 0.1 * objective.linear.weight.grad)
    assert losses["loss"] == pytest.approx(total.item(), rel=1e-6)
    assert losses["size"] == pytest.approx(parts["size"].mean().item(), rel=1e-6)


TWO_RANKS = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import engine
from test_engine import Objective
ranks = engine.start("cpu")
objective = Objective()
runner = engine.parallel(objective, ranks)
optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))[ranks.rank::2]
batches = iter([dict(x=part) for part in (x.split([3, 1]) if ranks.first else x.split([2, 2]))])
losses = engine.optimizer_step(runner, batches, 2, 8, dict(square=1.0, size=0.5), optimizer, ranks,
                               torch.float32)
torch.save((losses, objective.linear.weight.detach()), {out!r} + str(ranks.rank))
engine.stop()
"""


def test_two_ranks_equal_one(tmp_path):
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


# ---------------------------------------------------------------------------- the run folder


def test_state_comes_back_and_other_options_are_refused(tmp_path):
    options = {"lr": 0.1, "size": [2, 3]}
    assert engine.open_run(tmp_path, options, ALONE) is None
    trained, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    engine.save_state(tmp_path, 7, trained, torch.optim.Adam(trained.parameters()))
    state = engine.open_run(tmp_path, {"lr": 0.1, "size": (2, 3)}, ALONE)
    optimizer = torch.optim.Adam(other.parameters())
    assert engine.resume(tmp_path, state, other, optimizer, steps=9) == 7
    assert torch.equal(other.weight, trained.weight)
    with pytest.raises(ValueError, match="lr: 0.1 then, 0.2 now"):
        engine.open_run(tmp_path, {"lr": 0.2, "size": [2, 3]}, ALONE)


def test_decisive_options_leave_out_what_does_not_change_the_result():
    options = {"lr": 1.0, "data": Path("/x"), "workers": 3, "micro_batch": 2, "out": Path("y")}
    assert engine.decisive(options) == {"data": "/x", "lr": 1.0}


def test_log_drops_what_lies_beyond_the_resumed_step(tmp_path):
    log = engine.Log(tmp_path, 0, ALONE)
    for step in (10, 20, 30):
        log.write({"step": step})
    engine.Log(tmp_path, 20, ALONE).write({"step": 25})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25]


def test_progress_logs_means_since_the_last_row(tmp_path):
    log = engine.Log(tmp_path, 0, ALONE)
    with engine.Progress(0, 3, 8, 2, log, ALONE) as progress:
        for step, loss in enumerate((1.0, 3.0, 5.0), start=1):
            progress.report(step, {"loss": loss}, 0.1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == [(2, 2.0, 0.1), (3, 5.0, 0.1)]
    assert all(row["samples_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("error", [ValueError("Bad\nthing."), FileNotFoundError("Bad thing.")])
def test_run_turns_a_mistake_into_one_sentence(error, capsys, monkeypatch):
    monkeypatch.delenv("FULL_TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        engine.run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: Bad thing.\n"
