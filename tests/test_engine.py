"""engine.py: the learning rate, the step over micro-batches, devices, options."""

import argparse
import logging
import math
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import engine
from progress import Watch

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
    outcome = engine.optimizer_step(objective, cut(x, sizes), len(sizes), 8,
                                    {"square": 1.0, "size": 0.5}, optimizer, ALONE, torch.float32)
    return outcome.losses, objective.linear.weight.detach().clone()


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
import os, sys, torch
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import engine
from test_engine import Objective

def main():
    global before
    ranks = engine.start("cpu")
    before = threads()
    objective = Objective()
    runner = engine.parallel(objective, ranks)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))[ranks.rank::2]
    parts = x.split([3, 1]) if ranks.first else x.split([2, 2])
    losses = engine.optimizer_step(runner, iter([dict(x=part) for part in parts]), 2, 8,
                                   dict(square=1.0, size=0.5), optimizer, ranks,
                                   torch.float32).losses
    torch.save((losses, objective.linear.weight.detach()), {out!r} + os.environ["RANK"])

def threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

engine.run(main)
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


FREED = """
import resource, torch, engine
{first}
torch.ones(1)
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50 << 20)  # 200 MiB, and freed
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_that_were_cleared(first):
    done = subprocess.run([sys.executable, "-c", FREED.format(first=first)], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.36"), reason="untested C library")
def test_what_is_freed_is_kept():
    kept = pages_that_were_cleared("engine.keep_freed_memory(None)")
    assert max(kept[10:]) < kept[0] / 10  # the first ones still leave small gaps
    for large in (0, 4032):
        cleared = pages_that_were_cleared(f"engine.keep_freed_memory({large})")
        assert min(cleared) > 10 * max(kept[10:])


@pytest.mark.parametrize("largest, asked", [
    (1 << 62, [(-3, 1 << 28), (-1, 1 << 29)]),
    (1 << 25, [(-3, 1 << 28), (-3, 1 << 25), (-1, 1 << 29)]),  # old versions of glibc
    (0, [(-3, 1 << 28), (-3, 1 << 25)])])
def test_what_the_c_library_is_asked(monkeypatch, largest, asked):
    said = []

    def mallopt(what, value):
        said.append((what, value))
        return int(value <= largest)

    monkeypatch.setattr(engine.sys, "platform", "linux")
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    engine.keep_freed_memory(768)
    assert said == asked


def test_other_c_libraries_have_no_mallopt(monkeypatch):
    looked = []
    monkeypatch.setattr(engine.sys, "platform", "linux")
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda name: looked.append(name) or object())
    engine.keep_freed_memory(768)
    assert looked == [None]  # and went on


# ---------------------------------------------------------------------------- numbers gone wrong


def step_on(x, clip=None):
    """(outcome, weight before and after) of a step on these samples, two at a time."""
    objective = Objective()
    before = objective.linear.weight.detach().clone()
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    batches = iter([{"x": part, "name": [f"{index}a", f"{index}b"]}
                    for index, part in enumerate(x.split(2))])
    outcome = engine.optimizer_step(objective, batches, len(x) // 2, len(x), {"square": 1.0},
                                    optimizer, ALONE, torch.float32, clip)
    return outcome, before, objective.linear.weight.detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_changes_nothing(value):
    x = torch.ones(4, 3)
    x[2, 1] = value
    outcome, before, after = step_on(x)
    assert outcome.losses is None and outcome.bad == ["0a", "0b", "1a", "1b"]
    assert torch.equal(before, after)


def test_the_gradient_is_clipped():
    x = 10 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    outcome, before, after = step_on(x, clip=0.5)
    assert outcome.losses["gradient_norm"] > 10  # before it was clipped
    free = step_on(x)[2] - before
    direction = torch.nn.functional.cosine_similarity(after - before, free)
    assert direction.item() == pytest.approx(1) and (after - before).norm() < 0.5 + 1e-6


# ---------------------------------------------------------------------------- signals, progress


def test_one_process_leaves_in_the_middle_of_a_step():
    with Watch(ALONE) as watch:
        signal.raise_signal(signal.SIGINT)
        assert engine.optimizer_step(None, iter([]), 8, 8, {}, torch.optim.SGD(
            [torch.zeros(1)], lr=1.0), ALONE, torch.float32, watch=watch) is None


@pytest.mark.parametrize("error", [ValueError("Bad\nthing."), FileNotFoundError("Bad thing.")])
def test_run_turns_a_mistake_into_one_sentence(error, capsys, monkeypatch):
    monkeypatch.delenv("FULL_TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        engine.run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: Bad thing.\n"


def test_readers_share_the_cores(monkeypatch):
    for cores, ranks, expected in ((1, 1, 2), (6, 1, 6), (6, 2, 3), (64, 2, 8), (16, 8, 2)):
        monkeypatch.setattr(engine.os, "cpu_count", lambda: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert engine.readers() == expected


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(10**15), lambda: np.empty(10**15),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried ..."))])
def test_too_little_memory_is_one_sentence(fail, capsys):
    with pytest.raises(SystemExit) as stopped:
        engine.run(lambda: next(fail()))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ") and "--micro-batch" in said


def test_messages_are_one_line_whatever_names_hold(capsys):
    engine.say("a\nb\x1b[31m.png is bad")
    assert capsys.readouterr().err == "a?b?[31m.png is bad\n"


def test_a_stopped_script_says_so(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        engine.run(main)
    assert stopped.value.code == 130 and capsys.readouterr().err == "Stopped.\n"


def test_activations_are_recomputed_where_they_would_not_fit(monkeypatch, capsys):
    trained = [torch.zeros(1000)]  # 12 kB of gradients and moments
    ranks = engine.Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr(engine, "free_memory", lambda device: 112_000)

    def decide(choice, needed=0):
        return engine.recompute_activations(choice, trained, ranks, lambda: needed)

    assert decide("on") and not decide("off", 10**9)
    assert not decide("auto", 79_000) and decide("auto", 81_000)
    assert "are recomputed" in capsys.readouterr().err
    monkeypatch.undo()
    assert 2**28 < engine.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(ValueError, match=f"--device {device} can't be used"):
        engine.start(device)


@pytest.mark.parametrize("kind, good, bad", [
    (engine.positive, ["1", "32"], ["0", "-1", "1.5", "x"]),
    (engine.whole, ["0", "32"], ["-1", "1.5", "x"]),
    (engine.whole_between(8, 64), ["8", "64"], ["7", "65", "-8", "x"]),
    (engine.not_negative, ["0", "3e-5"], ["-1", "nan", "inf", "x"])])
def test_option_types(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "deep" / "er"):
        with pytest.raises(FileExistsError, match=f"^--out {file} is a file: give a folder.$"):
            engine.check_folder(path, "--out")
    engine.check_folder(tmp_path, "--out")
    engine.check_folder(tmp_path / "new" / "er", "--out")
    assert list(tmp_path.iterdir()) == [file]


def test_other_ranks_speak_only_when_any_may(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    engine.say("from the first")
    engine.say("from any", any_rank=True)
    assert capsys.readouterr().err == "from any\n"


@pytest.mark.parametrize("closed", ["gone", "never there"])
def test_what_nobody_reads_is_dropped(closed, tmp_path):
    """A program goes on, and ends well, when the one that reads what it says has ended."""
    code = ("import engine, sys, time, tqdm\n"
            "def main():\n"
            "    time.sleep(0.5)\n"
            "    bar = tqdm.tqdm(total=3, mininterval=0)\n"
            "    for _ in range(3):\n"
            "        engine.say('x' * 100_000), engine.tell('y' * 100_000), bar.update()\n"
            f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
            "engine.run(main)")
    command = f"{sys.executable} -c \"$CODE\" " + {"gone": "2>&1 | true; exit ${PIPESTATUS[0]}",
                                                 "never there": ">&- 2>&-"}[closed]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"CODE": code},
                          timeout=60)
    assert done.returncode == 0 and (tmp_path / "done").exists()


def test_what_modules_log_is_printable_and_short(capsys):
    log = logging.Logger("alone")
    log.addHandler(engine.Said())
    log.warning("%s is odd: %s", "a\x1b[2J\nerror: b", "x" * 100_000)
    said = capsys.readouterr().err
    assert said.startswith("a?[2J?error: b is odd: xxx") and said.count("\n") == 1
    assert len(said) < 2100
