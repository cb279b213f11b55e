"""The folder of a training run: what it was started with, checkpoints to resume from, the log.

A checkpoint is one file with weights, optimizer and step, written beside, synced and renamed; the
one before it stays as a reserve. Whatever happens, at any moment, one of the two is whole.
"""

import json
import os
import shutil
import signal
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from engine import agreed, is_first, say
from storage import sync, whole, write_text

STATE, PREVIOUS, MODEL = "state.pt", "state.previous.pt", "model.safetensors"
LOG, OPTIONS, LOCK = "log.jsonl", "args.json", ".lock"
CONTENT = {"step": int, "trained": dict, "optimizer": dict}  # of a checkpoint
HELD = {}  # open lock files by path: a lock lasts as long as its file is open


def decisive(options):
    """Of a script's options (a dict), those that change the result, as plain types."""
    rest = {"out", "cache", "device", "workers", "micro_batch", "compile", "checkpoint_activations",
            "log_every", "save_every", "validate_every", "validate_images", "preflight", "extend"}
    if not options.get("cache", True):  # what is not kept is as if it were kept exactly
        options = options | {"cache_precision": "float32"}
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(options.items()) if name not in rest}


# ---------------------------------------------------------------------------- opening


def check_system():
    """ValueError where a run's folder can't be kept, before anything is done for it."""
    if find_spec("fcntl") is None or not hasattr(signal, "SIGUSR1"):
        raise ValueError("training needs Linux or macOS (on Windows: WSL); predict.py, evaluate.py "
                         "and convert_sd2.py run here, too.")


def open_run(folder, options, ranks, extend=False):
    """Prepares a run folder; returns the state to resume from, or None for a new run.

    options: those that change the result. A folder of a run with other options is refused; with
    `extend` it may have had fewer steps.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = json.loads(json.dumps(options))
    path = None
    if ranks.first:
        claim(folder)
        path = choose_checkpoint(folder)
        for left in folder.glob("*.tmp"):  # by a run that was killed while saving
            left.unlink(missing_ok=True)
    path = agreed(path)
    if path is None:
        if ranks.first:
            write_text(folder / OPTIONS, json.dumps(options, indent=1) + "\n", lasting=True)
            (folder / LOG).unlink(missing_ok=True)
        return None
    before = read_options(folder / OPTIONS)
    longer = extend and before.get("steps", 0) < options["steps"]
    same = {"steps": options["steps"]} if longer else {}
    changed = [f"{name}: {before.get(name)} then, {options.get(name)} now"
               for name in sorted(before.keys() | options.keys())
               if (before | same).get(name) != options.get(name)]
    if changed:
        raise ValueError(f"{folder} holds a run with other options ({'; '.join(changed)}): repeat "
                         "its options to resume it, choose another --out, or add --extend if it "
                         "is to have more steps.")
    if same and ranks.first:
        write_text(folder / OPTIONS, json.dumps(options, indent=1) + "\n", lasting=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def begun_with(folder, name, value):
    """An option whose value is `auto`: what the run in a folder, if any, began with."""
    try:
        before = json.loads((Path(folder) / OPTIONS).read_text())
        return before[name] if value == "auto" and isinstance(before[name], str) else value
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return value  # open_run says what is wrong with it


def claim(folder):
    """Keeps other processes out of a run folder while this one lives. ValueError if one is in it.

    It may be a rank that outlived its torchrun; both would write the same files.
    """
    import fcntl  # which Windows does not have
    file = HELD[folder] = open(folder / LOCK, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of its children
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"process {file.read(20) or 'of another machine'} is at work in {folder}: "
                         "wait for it or end it, then give the same command again.") from None
    except OSError:  # not all file systems have locks
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def choose_checkpoint(folder):
    """The newest whole checkpoint, or None if there never was one; says which ones are damaged."""
    there = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    for path in there:
        fault = damage(path)
        if fault is None:
            # In the damaged one's place: the next save must not keep that one as the reserve.
            os.replace(path, folder / STATE)
            sync(folder)
            if path.name == PREVIOUS and len(there) == 1:
                say(f"{folder / STATE} is missing: going back to the checkpoint before it.")
            return folder / STATE
        say(f"{path} is damaged ({fault}): going back to the checkpoint before it.")
    if there:
        raise ValueError(f"no checkpoint in {folder} is whole: bring back a copy of {STATE}, or "
                         f"remove {' and '.join(path.name for path in there)} to begin anew.")
    return None


def damage(path):
    """What is wrong with a checkpoint, or None: all of it is read and its checksums are tried."""
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read: allow it and give the same command again.")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                return "it is compressed, which is not how it was written"
            bad = archive.testzip()
        if bad is not None:
            return f"{bad} does not fit its checksum"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(state[name], kind) for name, kind in CONTENT.items()):
            return "it holds something else"
    except Exception as error:  # a damaged file can make these libraries raise anything
        return str(error).split("\n")[0] or type(error).__name__
    return None


def read_options(path):
    """What a run was started with. ValueError if the file can't tell."""
    try:
        options = json.loads(path.read_text())
        whole = isinstance(options, dict) and isinstance(options.get("steps", 0), int)
    except (OSError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is missing or damaged, so that this run's options are not known: "
                         "bring back a copy of it, or choose another --out.")
    return options


def resume(folder, state, trained, optimizer, steps, model=None):
    """Puts back what `open_run` returned; the number of steps that are done, of `steps`.

    model: what has `save` and `is_saved`; its file is written anew if it is not of this checkpoint.
    """
    if state is None:
        return 0
    try:
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{Path(folder) / STATE} is a checkpoint of another model "
                         f"({str(error).splitlines()[0]}): choose another --out.") from error
    # Copies, as the file is mapped: whatever becomes of it does not concern the run any more.
    for moments in optimizer.state.values():
        moments.update({name: value.clone() for name, value in moments.items()
                        if torch.is_tensor(value)})
    done = state["step"]
    state.clear()
    if model is not None and is_first() and not model.is_saved(Path(folder) / MODEL):
        say(f"Writing {Path(folder) / MODEL} as of step {done}.")
        model.save(Path(folder) / MODEL)
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
    try:
        with whole(folder / STATE, lasting=True) as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
            model.save(folder / MODEL)
            if (folder / STATE).exists():
                os.replace(folder / STATE, folder / PREVIOUS)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{full} ({str(error).splitlines()[0]})") from error


def size(tensors):
    """Bytes of the tensors in a dict of tensors, or of dicts of tensors."""
    return sum(size(value) if isinstance(value, dict) else value.nbytes
               for value in tensors.values() if isinstance(value, dict) or torch.is_tensor(value))


# ---------------------------------------------------------------------------- the log


class Log:
    """log.jsonl: one object per logged step; written by the first rank only.

    When a run resumes at a step, what an interrupted run logged beyond it is dropped.
    """

    def __init__(self, folder, step, ranks):
        self.path = Path(folder) / LOG if ranks.first else None
        if self.path and self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
            write_text(self.path, "".join(f"{line}\n" for line in lines if step_of(line) <= step),
                       lasting=True)

    def write(self, row):
        """Appends a row; OSError with the path and the bytes if there is no room."""
        if not self.path:
            return
        line = json.dumps(row) + "\n"
        try:
            with open(self.path, "a") as file:
                file.write(line)
        except OSError as error:
            raise OSError(f"{self.path} has no room for {len(line)} bytes more ({error.strerror}): "
                          "make room and give the same command again (the last checkpoint is "
                          "untouched).") from error


def step_of(line):
    """The step of a row; of one that was cut off in the middle or is none, infinity."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
