"""The folder of a training run: what it was started with, checkpoints to resume from, the log.

A checkpoint is one file with weights, optimizer and step, written beside, synced and renamed; the
one before it stays as a reserve. Whatever happens, at any moment, one of the two is whole.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from engine import say

STATE, PREVIOUS, MODEL = "state.pt", "state.previous.pt", "model.safetensors"
LOG, OPTIONS = "log.jsonl", "args.json"


def decisive(options):
    """Of a script's options (a dict), those that change the result, as plain types."""
    rest = {"out", "cache", "device", "workers", "micro_batch", "compile", "checkpoint_activations",
            "log_every", "save_every", "validate_every", "validate_images", "preflight", "extend"}
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(options.items()) if name not in rest}


# ---------------------------------------------------------------------------- opening


def open_run(folder, options, ranks, extend=False):
    """Prepares a run folder; returns the state to resume from, or None for a new run.

    options: those that change the result. A folder of a run with other options is refused; with
    `extend` it may have had fewer steps.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = json.loads(json.dumps(options))
    described = folder / OPTIONS
    path = choose_checkpoint(folder) if ranks.first else None
    if ranks.first:
        (folder / f"{STATE}.tmp").unlink(missing_ok=True)  # of a run that was killed while saving
    if ranks.world > 1:
        chosen = [path]
        dist.broadcast_object_list(chosen)
        path = chosen[0]
    if path is None:
        if ranks.first:
            described.write_text(json.dumps(options, indent=1) + "\n")
            (folder / LOG).unlink(missing_ok=True)
        return None
    before = json.loads(described.read_text())
    same = {"steps": options["steps"]} if extend and before["steps"] < options["steps"] else {}
    changed = [f"{name}: {before.get(name)} then, {options.get(name)} now"
               for name in sorted(before.keys() | options.keys())
               if (before | same).get(name) != options.get(name)]
    if changed:
        raise ValueError(f"{folder} holds a run with other options ({'; '.join(changed)}): repeat "
                         "its options to resume it, choose another --out, or add --extend if it "
                         "is to have more steps.")
    if same and ranks.first:
        described.write_text(json.dumps(options, indent=1) + "\n")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def choose_checkpoint(folder):
    """The newest whole checkpoint, or None if there never was one; says which ones are damaged."""
    there = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    for path in there:
        fault = damage(path)
        if fault is None:
            return path
        say(f"{path} is damaged ({fault}): going back to the checkpoint before it.")
    if there:
        raise ValueError(f"no checkpoint in {folder} is whole: bring back a copy of {STATE}, or "
                         f"remove {' and '.join(path.name for path in there)} to begin anew.")
    return None


def damage(path):
    """What is wrong with a checkpoint, or None: all of it is read and its checksums are tried."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is None:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make these libraries raise anything
        return str(error).split("\n")[0] or type(error).__name__
    return bad and f"{bad} does not fit its checksum"


def resume(folder, state, trained, optimizer, steps):
    """Puts back what `open_run` returned; the number of steps that are done, of `steps`."""
    if state is None:
        return 0
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    done = state["step"]
    say(f"{folder} is finished: it has all its {done} steps." if done >= steps
        else f"Resuming {folder} at step {done} of {steps}.")
    return done


# ---------------------------------------------------------------------------- saving


def save(folder, step, trained, optimizer, model):
    """Writes a checkpoint and model.safetensors, or raises with what was there before untouched.

    trained: the module that is trained, step: how many steps are done, model: what has `save`.
    ValueError if a weight is not finite, OSError if there is no room.
    """
    folder = Path(folder)
    state = {"step": step, "trained": trained.state_dict(), "optimizer": optimizer.state_dict()}
    odd = [name for name, tensor in state["trained"].items() if not tensor.isfinite().all()]
    if odd:
        raise ValueError(f"after {step} steps {len(odd)} weights are not finite, {odd[0]} first, "
                         f"so nothing was saved: go on from the checkpoint in {folder} with a "
                         "lower --lr or in float32.")
    needed = sum(map(size, (state["trained"], state["optimizer"]["state"], model.state_dict())))
    free = shutil.disk_usage(folder).free
    full = (f"{folder} has no room for the checkpoint of step {step}: it takes {needed:,} bytes, "
            f"{free:,} are free; make room and give the same command again (the last checkpoint "
            "is untouched).")
    if free < needed:
        raise OSError(full)
    temporary = folder / f"{STATE}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        model.save(folder / MODEL)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{full} ({str(error).splitlines()[0]})") from error
    if (folder / STATE).exists():
        os.replace(folder / STATE, folder / PREVIOUS)
    os.replace(temporary, folder / STATE)
    sync_folder(folder)


def size(tensors):
    """Bytes of the tensors in a dict of tensors, or of dicts of tensors."""
    return sum(size(value) if isinstance(value, dict) else value.nbytes
               for value in tensors.values() if isinstance(value, dict) or torch.is_tensor(value))


def sync_folder(folder):
    """Makes renames in a folder last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------- the log


class Log:
    """log.jsonl: one object per logged step; written by the first rank only.

    When a run resumes at a step, what an interrupted run logged beyond it is dropped.
    """

    def __init__(self, folder, step, ranks):
        self.path = Path(folder) / LOG if ranks.first else None
        if self.path and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if step_of(line) <= step]
            temporary = self.path.with_name(f"{LOG}.tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.path)

    def write(self, row):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def step_of(line):
    """The step of a row; of one that was cut off in the middle, infinity."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
