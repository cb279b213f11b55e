"""engine/run_folder.py: what resuming finds, whatever happened to the files; the log."""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import random
import shutil
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import storage
from engine import job, run_folder
from nets import model_file
from nets.depthmaster import DepthMaster

ALONE = job.Ranks(0, 1, torch.device("cpu"))
OPTIONS = {"lr": 0.1, "steps": 9}


class Model:
    """What stands for a DepthMaster."""

    def state_dict(self):
        return {"w": torch.ones(3)}

    def save(self, path):
        Path(path).write_bytes(b"model")


def saved(folder, steps):
    """A run folder with a checkpoint after each of these steps; the weight tells which."""
    run_folder.open_run(folder, OPTIONS, ALONE)
    trained = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(trained.parameters())
    for step in steps:
        torch.nn.init.constant_(trained.weight, step)
        trained(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        torch.nn.init.constant_(trained.weight, step)
        run_folder.save(folder, step, trained, optimizer, Model())
    return folder


def found(folder, **options):
    """(step, weight) that resuming gives."""
    trained = torch.nn.Linear(2, 1)
    state = run_folder.open_run(folder, OPTIONS | options, ALONE)
    step = run_folder.resume(folder, state, trained, torch.optim.Adam(trained.parameters()), 9)
    return step, trained.weight[0, 0].item()


def test_state_comes_back_and_other_options_are_refused(tmp_path):
    options = {"lr": 0.1, "size": [2, 3]}
    assert run_folder.open_run(tmp_path, options, ALONE) is None
    trained, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    run_folder.save(tmp_path, 7, trained, torch.optim.Adam(trained.parameters()), Model())
    state = run_folder.open_run(tmp_path, {"lr": 0.1, "size": (2, 3)}, ALONE)
    optimizer = torch.optim.Adam(other.parameters())
    assert run_folder.resume(tmp_path, state, other, optimizer, steps=9) == 7
    assert torch.equal(other.weight, trained.weight)
    with pytest.raises(ValueError, match="lr: 0.1 then, 0.2 now"):
        run_folder.open_run(tmp_path, {"lr": 0.2, "size": [2, 3]}, ALONE)


def test_decisive_options_leave_out_what_does_not_change_the_result():
    options = {"lr": 1.0, "data": Path("/x"), "workers": 3, "micro_batch": 2, "out": Path("y")}
    assert run_folder.decisive(options) == {"data": "/x", "lr": 1.0}
    kept, plain = ({"cache": cache, "cache_precision": "float16"} for cache in (Path("c"), None))
    assert run_folder.decisive(kept) != run_folder.decisive(plain)
    exact = {"cache": Path("c"), "cache_precision": "float32"}
    assert run_folder.decisive(exact) == run_folder.decisive(plain)


def test_log_drops_what_lies_beyond_the_resumed_step(tmp_path):
    log = run_folder.Log(tmp_path, 0, ALONE)
    for step in (10, 20, 30):
        log.write({"step": step})
    run_folder.Log(tmp_path, 20, ALONE).write({"step": 25})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25]


def test_the_newest_of_two_checkpoints_is_taken(tmp_path):
    assert found(saved(tmp_path, [2, 4, 6])) == (6, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "args.json", "model.safetensors", "state.previous.pt", "state.pt"]


def cut(share):
    def spoil(path):
        path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    return spoil


def flip(place):
    def spoil(path):
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 0x10
        path.write_bytes(content)
    return spoil


@pytest.mark.parametrize("spoil", [cut(0), cut(0.3), cut(0.7), cut(0.99), flip(0.1), flip(0.5),
                                   lambda path: path.write_bytes(b"nonsense"), os.unlink])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, spoil, capsys):
    saved(tmp_path, [2, 4])
    spoil(tmp_path / "state.pt")
    step, weight = found(tmp_path)
    assert (step, weight) in [(2, 2), (4, 4)]  # some bits are those of no tensor
    if step == 2:
        said = capsys.readouterr().err
        assert "state.pt is damaged" in said or "state.pt is missing" in said
    assert found(tmp_path) == (step, weight)  # the damaged one is out of the way


def test_without_a_whole_checkpoint_nothing_is_lost(tmp_path):
    saved(tmp_path, [2, 4])
    for name in ("state.pt", "state.previous.pt"):
        cut(0.5)(tmp_path / name)
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        found(tmp_path)
    assert (tmp_path / "state.pt").exists() and (tmp_path / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_never_the_reserve(tmp_path):
    """Killed between the renames of the save that follows, a damaged reserve would be all."""
    saved(tmp_path, [2, 4])
    cut(0.5)(tmp_path / "state.pt")
    found(tmp_path)
    saved(tmp_path, [6])
    for name, step in (("state.pt", 6), ("state.previous.pt", 2)):
        assert run_folder.damage(tmp_path / name) is None
        assert torch.load(tmp_path / name)["step"] == step


def test_spoiled_checkpoints_fall_back_or_are_whole(tmp_path):
    saved(tmp_path, [2, 4])
    content, rng, fell = (tmp_path / "state.pt").read_bytes(), random.Random(4), 0
    previous = (tmp_path / "state.previous.pt").read_bytes()
    for number in range(200):
        spoiled = bytearray(content)
        spoiled[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        cut_off = content[:rng.randrange(len(content))]
        (tmp_path / "state.pt").write_bytes(cut_off if number % 2 else spoiled)
        (tmp_path / "state.previous.pt").write_bytes(previous)
        step, weight = found(tmp_path)
        assert step == weight and step in (2, 4)
        fell += step == 2
    assert 150 < fell


def test_damage_that_pytorch_reads_now_so_now_so(tmp_path):
    """In the archive's directory: a size (at 20), a folder's mark (at 38) of the last entry."""
    for place in (20, 38):
        saved(tmp_path / str(place), [2, 4])
        path = tmp_path / str(place) / "state.pt"
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + place] ^= 16
        path.write_bytes(content)
        assert found(tmp_path / str(place)) == (2, 2)


class Code:
    """Pickles to a call, which must never happen."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file ran",))


@pytest.mark.parametrize("content", [
    {"step": 1, "trained": Code(), "optimizer": {}}, ["x"], {"step": "1"}, {}, Code(),
    {"step": 1, "trained": {}, "optimizer": []}])
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_state_that_is_something_else(tmp_path, content, write):
    saved(tmp_path, [2, 4])
    write(content, tmp_path / "state.pt")
    assert found(tmp_path) == (2, 2)


@pytest.mark.parametrize("trained", [{}, {"weight": torch.ones(3, 3), "bias": torch.ones(1)},
                                     {"weight": 3, "bias": None}])
def test_a_state_of_another_model(tmp_path, trained):
    saved(tmp_path, [2])
    optimizer = torch.optim.Adam([torch.ones(2)]).state_dict()
    torch.save({"step": 1, "trained": trained, "optimizer": optimizer}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is a checkpoint of another model"):
        found(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"steps": "9"}', "[" * 100_000, None])
def test_without_its_options_a_run_is_not_resumed(tmp_path, content):
    saved(tmp_path, [2])
    (tmp_path / "args.json").unlink()
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(ValueError, match="args.json is missing or damaged"):
        found(tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path):
    saved(tmp_path, [2])
    child = os.fork()
    if child == 0:
        try:
            run_folder.open_run(tmp_path, OPTIONS, ALONE)
        except ValueError as error:
            os._exit(str(os.getppid()) in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_resuming_copies_what_it_needs(tmp_path):
    """A checkpoint that is removed or cut off while a run goes on does not concern it."""
    saved(tmp_path, [2])
    trained = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(trained.parameters())
    state = run_folder.open_run(tmp_path, OPTIONS, ALONE)
    run_folder.resume(tmp_path, state, trained, optimizer, 9)
    assert not state
    os.truncate(tmp_path / "state.pt", 0)
    assert trained.weight.sum() == 4 and optimizer.state[trained.weight]["step"] == 1
    optimizer.step()


@pytest.mark.parametrize("spoil", [os.unlink, cut(0.5), lambda path: None])
def test_the_model_file_comes_back_with_the_checkpoint(tmp_path, spoil, capsys):
    class Weights(torch.nn.Linear):
        is_saved = DepthMaster.is_saved

        def save(self, path):
            model_file.write_tensors(path, self.state_dict(), {})

    torch.manual_seed(0)
    trained = Weights(2, 1)
    optimizer = torch.optim.Adam(trained.parameters())
    run_folder.open_run(tmp_path, OPTIONS, ALONE)
    run_folder.save(tmp_path, 9, trained, optimizer, trained)
    expected = (tmp_path / "model.safetensors").read_bytes()
    spoil(tmp_path / "model.safetensors")
    run_folder.resume(tmp_path, run_folder.open_run(tmp_path, OPTIONS, ALONE), trained, optimizer,
                      9, trained)
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    said = capsys.readouterr().err
    assert "is finished" in said and ("Writing" in said) == (spoil.__name__ != "<lambda>")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saved(tmp_path, [2])
    trained = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(trained.weight, float("nan"))
    with pytest.raises(ValueError, match="weights are not finite, weight first"):
        run_folder.save(tmp_path, 4, trained, torch.optim.Adam(trained.parameters()), Model())
    assert found(tmp_path) == (2, 2)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, [2])
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"no room .* step 4: it takes \d+ bytes, 10 are free"):
        saved(tmp_path, [4])
    monkeypatch.undo()
    assert found(tmp_path) == (2, 2)


def test_a_disk_that_fills_up_in_the_middle_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, [2])

    def full(state, file):
        file.write(b"half a")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.torch, "save", full)
    with pytest.raises(OSError, match="last checkpoint is untouched.*No space left"):
        saved(tmp_path, [4])
    monkeypatch.undo()
    assert found(tmp_path) == (2, 2)
    assert not list(tmp_path.glob("*.tmp"))


def test_more_steps_only_with_extend(tmp_path):
    saved(tmp_path, [2])
    with pytest.raises(ValueError, match="steps: 9 then, 20 now.*--extend"):
        run_folder.open_run(tmp_path, OPTIONS | {"steps": 20}, ALONE)
    with pytest.raises(ValueError, match="lr: 0.1 then, 0.2 now"):
        run_folder.open_run(tmp_path, OPTIONS | {"steps": 20, "lr": 0.2}, ALONE, extend=True)
    assert run_folder.open_run(tmp_path, OPTIONS | {"steps": 20}, ALONE, extend=True)["step"] == 2
    assert run_folder.open_run(tmp_path, OPTIONS | {"steps": 20}, ALONE)["step"] == 2
    with pytest.raises(ValueError, match="steps: 20 then, 9 now"):
        run_folder.open_run(tmp_path, OPTIONS, ALONE, extend=True)


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n[1]\n{"a": 2}\n{"step": []}\n3\n\xff\x00\n'
                                         b'{"step": 2, "lo')
    run_folder.Log(tmp_path, 5, ALONE).write({"step": 3})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 3}]


def test_a_log_without_room_names_its_path(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = run_folder.Log(tmp_path, 0, ALONE)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="log.jsonl can't be written .No space"):
        log.write({"step": 1})


# ---- what is there is not mixed up ----


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError(),
                                   OSError(116, "Stale file handle")])
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, error, monkeypatch):
    saved(tmp_path, [2, 4])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self):
        raise error

    monkeypatch.setattr(run_folder.zipfile.ZipFile, "testzip", fail)
    with pytest.raises(OSError, match="state.pt can't be read now.*left as they are"):
        found(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_checkpoint_is_kept_aside(tmp_path):
    for number in ("", "1"):
        saved(tmp_path, [2, 4])
        cut(0.5)(tmp_path / "state.pt")
        content = (tmp_path / "state.pt").read_bytes()
        found(tmp_path)
        assert (tmp_path / f"state.damaged{number}.pt").read_bytes() == content


def test_a_folder_that_is_gone_is_named(tmp_path):
    folder = saved(tmp_path / "run", [2])
    log = run_folder.Log(folder, 2, ALONE)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="run is gone: it was removed or unmounted"):
        run_folder.save(folder, 4, torch.nn.Linear(2, 1), torch.optim.Adam(
            torch.nn.Linear(2, 1).parameters()), Model())
    with pytest.raises(FileNotFoundError, match="run is gone"):
        log.write({"step": 3})


def test_a_folder_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", fail)
    saved(tmp_path, [2])
    assert "can't be locked there: make sure that no other run" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".lock", "args.json", "state.pt"])
def test_links_in_a_run_folder_lead_nowhere(tmp_path, name):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    temporary = f".{storage.MACHINE}-{os.getpid()}-{zlib.crc32(name.encode()):08x}.tmp"
    for link in (name, temporary):
        (tmp_path / "run" / link).symlink_to(tmp_path / "outside")
    with contextlib.suppress(OSError, ValueError):
        saved(tmp_path / "run", [2])
    assert (tmp_path / "outside").read_text() == "mine"


def test_what_is_behind_the_options_may_not_change(tmp_path, capsys):
    content = {"the weights sd2.safetensors": "a1", "the names of the samples": "b2"}
    saved(tmp_path, [2])  # by a version that kept no digests
    opened = partial(run_folder.open_run, tmp_path, OPTIONS, ALONE)
    assert opened(content=content)["step"] == 2
    assert opened(content=content)["step"] == 2
    changed = content | {"the weights sd2.safetensors": "other"}
    with pytest.raises(ValueError, match="something else as the weights sd2.safetensors than"):
        opened(content=changed)
    assert opened(content=changed, accept_changes=True)["step"] == 2
    assert "Going on although this has changed: the weights sd2" in capsys.readouterr().err
    [row] = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert row == {"step": 2, "accepted": ["the weights sd2.safetensors"]}
    assert opened(content=changed)["step"] == 2
    with pytest.raises(ValueError, match="other options"):
        run_folder.open_run(tmp_path, OPTIONS | {"lr": 3}, ALONE, content=changed,
                            accept_changes=True)


def test_a_validation_that_was_missed_is_known(tmp_path):
    log = run_folder.Log(tmp_path, 0, ALONE)
    assert not log.has_validation(2)
    log.write({"step": 2, "loss": 1.0})
    assert not log.has_validation(2)
    log.write({"step": 2, "validation": {}})
    assert log.has_validation(2) and not log.has_validation(4)


def test_a_model_whose_checkpoint_is_gone_is_not_written_over(tmp_path):
    saved(tmp_path, [2])
    (tmp_path / "state.pt").unlink()
    with pytest.raises(ValueError, match="holds model.safetensors of a run whose checkpoint is"):
        run_folder.open_run(tmp_path, OPTIONS, ALONE)
    assert (tmp_path / "model.safetensors").read_bytes() == b"model"
    (tmp_path / f".{storage.MACHINE}-1-00000000.tmp").touch()  # a first save that was cut off
    assert run_folder.open_run(tmp_path, OPTIONS, ALONE) is None
