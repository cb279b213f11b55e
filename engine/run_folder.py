"""The folder of a training run: its options, checkpoints to resume from, the log.

A checkpoint is one file with weights, optimizer and step. It is written under a temporary name,
synced and renamed; the previous checkpoint stays as a reserve. One of the two is always whole.
"""

import json
import os
import re
import shutil
import signal
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.job import agreed
from engine.terminal import is_first, say
from storage import append, check_file, compressed, read_text, sha256, sync, whole, write_text

STATE, PREVIOUS, MODEL = "state.pt", "state.previous.pt", "model.safetensors"
LOG, OPTIONS, LOCK = "log.jsonl", "args.json", ".lock"
CONTENT = {"step": int, "trained": dict, "optimizer": dict}  # of a checkpoint
FILES = ("data", "vkitti", "sd2", "teacher", "ckpt")  # options; old runs have None for a default
CONTENT_OF_RUN = "content"  # key in args.json: digests of files and samples
HELD = {}  # open lock files by path: a lock lasts as long as its file is open


def decisive(options):
    """Those of a script's options (a dict) that change the result, as plain types."""
    rest = {"out", "cache", "device", "workers", "micro_batch", "compile", "checkpoint_activations",
            "log_every", "save_every", "validate_every", "validate_images", "preflight", "extend",
            "accept_changes", "tensorboard"}
    if not options.get("cache", True):  # without a cache: exact, as in a float32 cache
        options = options | {"cache_precision": "float32"}
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(options.items()) if name not in rest}


def content(files, model, training_set, ranks):
    """The content that a run's options name: digests of files (None: unused) and samples."""
    found = None
    if ranks.first:
        weights = {f"the weights {path.name}": sha256(path) for path in files if path}
        found = weights | {"the model's target": model.target, "the names of the samples":
                           training_set.digest(), "the sizes of the samples": training_set.sizes}
    return agreed(found)


# ---------------------------------------------------------------------------- opening


def check_system(tensorboard=False):
    """ValueError on a system that can't keep a run folder; call it before any other work.

    tensorboard: whether its events are wanted.
    """
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs tensorboard: pip install -r "
                         "extras/requirements.txt")
    if find_spec("fcntl") is None or not hasattr(signal, "SIGUSR1"):
        raise ValueError("training needs Linux or macOS (on Windows: WSL); predict.py, evaluate.py "
                         "and convert_sd2.py run here, too.")


def open_run(folder, options, ranks, extend=False, content=None, accept_changes=False):
    """Prepares a run folder; returns the state to resume from, or None for a new run.

    options: those that change the result. ValueError if the folder's run has other options; with
    `extend` it may have fewer steps.
    content: {name: digest or value} of the files and samples that the options name. ValueError if
    it has changed; with accept_changes the change is logged instead.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = json.loads(json.dumps(options | {CONTENT_OF_RUN: content or {}}))
    path = None
    if ranks.first:
        claim(folder)
        path = choose_checkpoint(folder)
    path = agreed(path)
    if path is None:
        if ranks.first:
            write_text(folder / OPTIONS, json.dumps(options, indent=1) + "\n", lasting=True)
            (folder / LOG).unlink(missing_ok=True)
        return None
    before = read_options(folder / OPTIONS)
    held = before.pop(CONTENT_OF_RUN, {})
    content = options.pop(CONTENT_OF_RUN)
    longer = extend and before.get("steps", 0) < options["steps"]
    same = {"steps": options["steps"]} if longer else {}
    changed = [f"{name}: {before.get(name)} then, {options.get(name)} now"
               for name in sorted(before.keys() | options.keys())
               if (before | same).get(name) != options.get(name)
               and (name not in FILES or before.get(name))]
    if changed:
        raise ValueError(f"{folder} holds a run with other options ({'; '.join(changed)}): repeat "
                         "its options to resume it, choose another --out, or add --extend if it "
                         "is to have more steps.")
    other = [what for what in content if held.get(what, content[what]) != content[what]]
    if other and not accept_changes:
        raise ValueError(f"{folder} holds a run with something else as {', '.join(other)} than is "
                         "there now: bring that back, choose another --out, or add "
                         "--accept-changes to go on with what is there.")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if ranks.first:
        write_text(folder / OPTIONS, json.dumps(options | {CONTENT_OF_RUN: held | content},
                                                indent=1) + "\n", lasting=True)
        if other:
            say(f"Going on although this has changed: {', '.join(other)}.")
            Log(folder, state["step"], ranks).write({"step": state["step"], "accepted": other})
    return state


def begun_with(folder, name, value):
    """The option's value; for `auto`, the value with which the folder's run, if any, began."""
    try:
        before = json.loads(read_text(Path(folder) / OPTIONS))
        return before[name] if value == "auto" and isinstance(before[name], str) else value
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return value  # open_run reports the fault


def claim(folder):
    """Locks a run folder while this process lives. ValueError if another process has the lock.

    That process may be a rank that outlived its torchrun; both would write the same files.
    """
    if find_spec("fcntl") is None:  # Windows
        return
    import fcntl
    if os.path.exists(folder / LOCK):
        check_file(folder / LOCK)
    # O_NOFOLLOW: a link there could lead to another file.
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    file = HELD[folder] = open(handle, "r+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # children do not inherit the lock
    except (BlockingIOError, PermissionError):
        raise ValueError(f"process {file.read(20) or 'of another machine'} is at work in {folder}: "
                         "wait for it or end it, then give the same command again.") from None
    except OSError:  # not all file systems have locks
        say(f"{folder} can't be locked there: make sure that no other run writes into it.")
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def choose_checkpoint(folder):
    """The newest whole checkpoint, or None if there never was one; says which ones are damaged."""
    there = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    for path in (*there, *filter(Path.exists, (folder / OPTIONS, folder / LOG, folder / MODEL))):
        check_file(path)
    faults = {}
    for path in there:
        fault = damage(path)
        if fault is None:
            break
        faults[path] = fault
    if len(faults) < len(there):
        for damaged, fault in faults.items():
            aside = next(name for number in range(10**6) if not os.path.lexists(
                name := damaged.with_name(f"{damaged.stem}.damaged{number or ''}.pt")))
            os.replace(damaged, aside)
            say(f"{damaged} is damaged ({fault}) and is kept as {aside.name}: going back to the "
                "checkpoint before it.")
        if path.name == PREVIOUS and len(there) == 1:
            say(f"{folder / STATE} is missing: going back to the checkpoint before it.")
        os.replace(path, folder / STATE)  # so that the next save makes this one the reserve
        sync(folder)
        return folder / STATE
    if there:
        raise ValueError(f"no checkpoint in {folder} is whole "
                         f"({'; '.join(f'{path.name}: {faults[path]}' for path in there)}): bring "
                         f"back a copy of {STATE}, or move these aside to begin anew.")
    # An interrupted first save leaves a model and a checkpoint under a temporary name.
    if (folder / MODEL).exists() and not any(folder.glob(".*.tmp")):
        raise ValueError(f"{folder} holds {MODEL} of a run whose checkpoint is gone: move it aside "
                         "to begin anew, or choose another --out.")
    return None


def damage(path):
    """The fault of a checkpoint, or None; reads the whole file and tests its checksums.

    OSError if the file can't be read now, which is no sign of damaged content.
    """
    try:
        if compressed(path):
            return "it is compressed, which is not how it was written"
        with zipfile.ZipFile(path) as archive:
            # Entries are files, stored as they are. Where damage says otherwise (another size, a
            # folder's mark) PyTorch reads memory that it has not filled, now so, now so.
            bad = next((entry.filename for entry in archive.infolist() if entry.external_attr & 16
                        or entry.compress_size != entry.file_size), None) or archive.testzip()
        if bad is not None:
            return f"{bad} does not fit its checksum"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(state[name], kind) for name, kind in CONTENT.items()):
            return "it holds something else"
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a damaged file can make these libraries raise anything
        if re.search("mmap|memory|Input/output", str(error)):
            raise unreadable(path, error) from error
        return str(error).split("\n")[0] or type(error).__name__
    return None


def unreadable(path, error):
    reason = str(error).split("\n")[0] or type(error).__name__
    return OSError(f"{path} can't be read now ({reason}), which says nothing of what is in it: all "
                   "files are left as they are; mend that and give the same command again.")


def read_options(path):
    """The options of a run. ValueError if the file is missing or damaged."""
    try:
        options = json.loads(read_text(path))
        whole = isinstance(options, dict) and isinstance(options.get("steps", 0), int)
    except (OSError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is missing or damaged, so that this run's options are not known: "
                         "bring back a copy of it, or choose another --out.")
    # Runs that were begun before there were other teachers call the option by its old name.
    return {"teacher" if name == "dinov2" else name: value for name, value in options.items()}


def resume(folder, state, trained, optimizer, steps, model=None):
    """Restores the state from `open_run`; returns how many of `steps` are done.

    model: an object with `save` and `is_saved`; its file is rewritten if it differs from the model.
    """
    if state is None:
        return 0
    try:
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{Path(folder) / STATE} is a checkpoint of another model "
                         f"({str(error).splitlines()[0]}): choose another --out.") from error
    # Copies, because the file is mapped: later changes to the file must not reach the run.
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
    """Writes a checkpoint and model.safetensors; an error leaves the last checkpoint untouched.

    trained: the trained module; step: the number of steps done; model: an object with `save`.
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
    check_there(folder)
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


def check_there(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is gone: it was removed or unmounted while the run was "
                                "at work.")


def size(tensors):
    """Bytes of the tensors in a dict of tensors, or of dicts of tensors."""
    return sum(size(value) if isinstance(value, dict) else value.nbytes
               for value in tensors.values() if isinstance(value, dict) or torch.is_tensor(value))


# ---------------------------------------------------------------------------- the log


class Log:
    """log.jsonl: one object per logged step; written by the first rank only.

    When a run resumes at a step, the rows of later steps are dropped. tensorboard: the numbers and
    the pictures of validation also become events for TensorBoard, in the same folder.
    """

    def __init__(self, folder, step, ranks, tensorboard=False):
        self.path = Path(folder) / LOG if ranks.first else None
        self.events = events(folder, step) if tensorboard and ranks.first else None
        if self.path and self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
            write_text(self.path, "".join(f"{line}\n" for line in lines if step_of(line) <= step),
                       lasting=True)

    def write(self, row):
        """Appends a row; OSError with the path if there is no room."""
        if not self.path:
            return
        check_there(self.path.parent)
        append(self.path, json.dumps(row) + "\n")
        if self.events:
            scores = {f"validation/{name}": score
                      for name, score in row.get("validation", {}).items()}
            for name, value in (row | scores).items():
                if isinstance(value, int | float) and name != "step":
                    self.events.add_scalar(name, value, row["step"])
            self.events.flush()

    def show(self, step, picture):
        """Gives TensorBoard a picture uint8 H,W,3."""
        if self.events:
            self.events.add_image("validation", picture, step, dataformats="HWC")

    def has_validation(self, step):
        """Whether the log has the validation row of a step; a killed run may lack it.

        True for the ranks that write no log.
        """
        if not self.path or not self.path.exists():
            return not self.path
        rows = self.path.read_text(errors="replace").splitlines()
        return any(step_of(row) == step and '"validation"' in row for row in rows)


def events(folder, step):
    """A writer of TensorBoard's events; what was written for later steps is hidden."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder, purge_step=step + 1)


def step_of(line):
    """The step of a row; infinity for a row that is cut off or invalid."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
