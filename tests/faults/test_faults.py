"""The quick version of the faults, on networks of a few thousand parameters."""

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch

from tests.faults.harness import (
    finish,
    kill_at_random,
    poisoned,
    ranks_of,
    rows_of,
    sha256,
    skipped,
    start,
)
from tests.worlds import CROP, SHORT, files, streets
from tests.test_hostile import mutations

RUN = [*SHORT, "--validate-every", 999, "--save-every", 2, "--steps", 12]
GRADIENTS = """
import sys, torch, {script}
def keep(self):
    torch.save([p.grad for group in self.param_groups for p in group["params"]], {out!r})
    raise SystemExit
torch.optim.Adam.step = keep
{script}.main()
"""


def stage1(files, *options):
    return ["train_stage1.py", "--sd2", files / "sd2.safetensors", "--teacher",
            files / "dinov2.safetensors", "--data", files / "pairs", *RUN, *options]


def stage2(files, *options):
    return ["train_stage2.py", "--ckpt", files / "stage1.safetensors", "--data", files / "pairs",
            *RUN, *options]


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_a_run_that_is_killed_again_and_again_ends_the_same(files, tmp_path, stage):
    code, said = finish([*stage(files), "--out", tmp_path / "whole"])
    assert code == 0, said
    kill_at_random(stage(files), tmp_path / "cut", 3, 3, random.Random(0))
    whole, cut = (sha256(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole == cut


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


LONG = ["--decay-steps", 20, "--lr", 3e-4, "--precision", "float32"]


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    """The losses of 20 steps in one process, which fall."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, said = finish([*stage1(files, *LONG, "--steps", 20), "--micro-batch", 4, "--out", out])
    assert code == 0, said
    rows = losses(out)
    assert rows[-1] < rows[0]
    return rows


@pytest.mark.parametrize("ranks, micro, workers", [(2, 2, 1)])
def test_losses_do_not_depend_on_ranks_nor_on_a_change_of_them(files, undisturbed, tmp_path, ranks,
                                                               micro, workers):
    out = tmp_path / "run"
    several = stage1(files, *LONG, "--micro-batch", micro, "--workers", workers)
    code, said = finish([*several, "--steps", 13, "--out", out], ranks)
    assert code == 0, said
    assert losses(out) == pytest.approx(undisturbed[:13], rel=1e-4)
    code, said = finish([*stage1(files, *LONG), "--steps", 20, "--extend", "--out", out])
    assert code == 0 and "Resuming" in said, said  # on one rank now
    assert losses(out) == pytest.approx(undisturbed, rel=1e-4)


def gradient(command, folder, ranks, *options):
    """The whole gradient of the first step, as one vector."""
    folder.mkdir()
    driver = folder / "driver.py"
    driver.write_text(GRADIENTS.format(script=command[0].removesuffix(".py"),
                                       out=str(folder / "gradient.pt")))
    finish([driver, *command[1:], *options, "--out", folder / "run"], ranks)
    return torch.cat([part.flatten() for part in torch.load(folder / "gradient.pt")])


@pytest.mark.parametrize("stage, cuts", [
    (stage1, [(1, 1, 3), (2, 2, 0)]), (stage2, [(4, 1, 0)]),
])
def test_gradients_do_not_depend_on_the_cut(files, streets, tmp_path, stage, cuts):
    """With this seed one of the four samples is a street, of another size than the others.

    Two ranks with micro-batches of two have one and two of them.
    """
    command = stage(files, "--vkitti", streets, "--vkitti-crop", *CROP, "--seed", 8)
    expected = gradient(command, tmp_path / "one", 1, "--micro-batch", 4)
    for ranks, micro, workers in cuts:
        found = gradient(command, tmp_path / f"{ranks} {micro}", ranks, "--micro-batch", micro,
                         "--workers", workers)
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_a_file_that_may_not_grow_is_a_full_disk(files, tmp_path):
    """The system refuses to write more: a sentence, and what was saved before stays."""
    out = tmp_path / "run"
    code, said = finish([*stage1(files, "--steps", 2, "--decay-steps", 9), "--out", out])
    assert code == 0, said
    before = sha256(out / "state.pt")
    more = stage1(files, "--steps", 4, "--decay-steps", 9, "--extend")
    limit = (out / "state.pt").stat().st_size // 2
    code, said = finish([*more, "--out", out], preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    assert code == 1 and "has no room for the checkpoint of step 4" in said
    assert "Traceback" not in said and str(out) in said
    assert sha256(out / "state.pt") == before and not list(out.glob("*.tmp"))
    assert finish([*more, "--out", out])[0] == 0


def test_a_data_set_that_loses_files_is_survived(files, tmp_path):
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    options = ["--data", tmp_path / "pairs", "--steps", 60, "--decay-steps", 60]
    process = start([*stage1(files, *options), "--out", tmp_path / "run"])
    while not (tmp_path / "run" / "state.pt").exists():
        time.sleep(0.01)
    (tmp_path / "pairs/train/depth/3.npy").unlink()
    said = process.communicate()[0]
    # One of six samples is a large share, so that the run may end, but only with a sentence.
    assert "3.npy is missing" in said and "Traceback" not in said
    assert process.returncode in (0, 1)


def test_a_dying_rank_ends_the_job_with_its_own_error(files, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text("import os, train_stage1\nfrom engine import job\n"
                      "original = train_stage1.optimizer_step\n"
                      "def dies(*a):\n    if os.environ['RANK'] == '1':\n"
                      "        raise ValueError('the second rank has had enough.')\n"
                      "    return original(*a)\ntrain_stage1.optimizer_step = dies\n"
                      "job.run(train_stage1.main)\n")
    began = time.monotonic()
    code, said = finish([driver, *stage1(files)[1:], "--out", tmp_path / "run"], ranks=2)
    assert code != 0 and "error: the second rank has had enough." in said
    assert time.monotonic() - began < 60


def test_a_worker_that_dies_is_reported_with_its_file(files, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text("import os, signal, time, train_stage1\nfrom engine import job\n"
                      "from data.pairs import FolderOfPairs\n"
                      "original = FolderOfPairs.__getitem__\n"
                      "def dies(self, i):\n    if self.name(i).endswith('3'):\n"
                      "        time.sleep(1)  # the loader waits by then\n"
                      "        os.kill(os.getpid(), signal.SIGKILL)\n"
                      "    return original(self, i)\nFolderOfPairs.__getitem__ = dies\n"
                      "job.run(train_stage1.main)\n")
    command = [driver, *stage1(files, "--workers", 2)[1:], "--out", tmp_path / "run"]
    code, said = finish(command)
    last = said.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: a process that reads data died")
    assert "rgb/3" in last and "Traceback" not in said


def started(command, out, ranks=1):
    """A run that has done some steps."""
    before = rows_of(out)
    process = start([*command, "--out", out], ranks)
    while rows_of(out) < before + 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return process


def test_spoiled_files_on_the_command_line(files, tmp_path):
    """Forty of each kind: one line for each that is refused, the others' results are written."""
    for kind, suffix in (("rgb", "png"), ("depth", "npy")):
        whole = (files / f"pairs/train/{kind}/0.{suffix}").read_bytes()
        (tmp_path / "pairs" / kind).mkdir(parents=True)
        for number, content in enumerate(mutations(whole, 40, seed=6)):
            (tmp_path / f"pairs/{kind}/{number}.{suffix}").write_bytes(content)
    out = tmp_path / "out"
    commands = [["predict.py", tmp_path / "pairs/rgb", "--ckpt", files / "stage1.safetensors",
                 "--save", "npy", "--device", "cpu"],
                stage1(files, "--data", tmp_path / "pairs", "--preflight")]
    for command in commands:
        code, said = finish([*command, "--out", out])
        assert code == 1 and "Traceback" not in said
        refused = ("left out: ", "can't be read: ")
        assert sum(any(words in line for words in refused) for line in said.splitlines()) >= 20
    assert {path.suffix for path in out.rglob("*.*")} <= {".npy"}


@pytest.mark.parametrize("name, share", [("sd2", 0.5), ("dinov2", 0.01)])
def test_a_spoiled_model_on_the_command_line(files, tmp_path, name, share):
    content, path = (files / f"{name}.safetensors").read_bytes(), tmp_path / "spoiled.safetensors"
    path.write_bytes(content[:int(share * len(content))])
    code, said = finish(stage1(files, f"--{name}", path, "--out", tmp_path / "run"))
    assert code == 1 and "Traceback" not in said
    assert f"error: {path} is not a readable" in said.strip().splitlines()[-1]


def test_gradients_that_are_not_finite(files, tmp_path):
    out = tmp_path / "run"
    code, said = finish([*poisoned(stage1(files), tmp_path, 3), "--out", out])
    assert code == 0 and skipped(out) == 4 and "Step 12 was skipped" in said
    command = [*poisoned(stage2(files, "--save-every", 99), tmp_path, 1), "--out", tmp_path / "bad"]
    code, said = finish(command)
    assert code == 1 and skipped(tmp_path / "bad") == 10 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("error: 10 steps in a row had a loss or")
    assert not (tmp_path / "bad" / "state.pt").exists()


def test_a_signal_for_all_processes_at_once_is_for_the_first(files, tmp_path):
    """As terminals and schedulers send it: the readers must not end before the run has."""
    command = stage1(files, "--steps", 12, "--workers", 2, "--save-every", 999)
    code, said = finish([*command, "--out", tmp_path / "whole"])
    assert code == 0, said
    for number in (signal.SIGTERM, signal.SIGINT):
        process = started(command, tmp_path / "cut")
        os.killpg(process.pid, number)
        said = process.communicate()[0]
        assert process.returncode == 0 and "Asked to leave: saved after" in said
    code, said = finish([*command, "--out", tmp_path / "cut"])
    assert code == 0, said
    whole, cut = (sha256(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole == cut


def test_a_rank_that_is_killed_ends_the_job(files, tmp_path):
    process = started(stage1(files, "--steps", 4000, "--workers", 1), tmp_path / "run", ranks=2)
    began = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 1 and "exitcode  : -9" in said
    assert "error: rank 0 can't reach the others" in said and "[rank0]: Traceback" not in said
    assert time.monotonic() - began < 29  # torchrun waits 30 s for a rank that hangs


def test_torchrun_saves_when_it_is_stopped(files, tmp_path):
    command = stage1(files, "--steps", 400, "--save-every", 999)
    process = started(command, tmp_path / "run", ranks=2)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # the ranks get it twice, as torchrun passes it on
    said = process.communicate()[0]
    assert time.monotonic() - began < 30 and "Asked to leave: saved after" in said
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] >= 3
