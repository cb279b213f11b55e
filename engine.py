"""What both training stages share: devices and ranks, a step, the learning rate, options.

It knows nothing of images: batches are dicts, objectives return named losses.
"""

import argparse
import ctypes
import gc
import logging
import math
import os
import re
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # else imported after `start`, and its defaults would hold the group
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LONGEST_MESSAGE = 2000  # characters: what is wrong with a file may quote much of it

def run(main):
    """Calls a script's main(), then leaves its job; a user's mistake becomes one sentence and 1.

    The libraries raise ValueError or OSError for those; FULL_TRACEBACK=1 shows where.
    """
    sys.stdout, sys.stderr = (Heard(stream) for stream in (sys.stdout, sys.stderr))
    logging.basicConfig(handlers=[Said()])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "RANK" not in os.environ:  # torchrun's ranks may wait for each other, and would not end
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        stop()
    except (ValueError, OSError) as error:
        if os.environ.get("FULL_TRACEBACK"):
            raise
        print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            print("error: out of memory: in training, give a smaller --micro-batch or "
                  "--checkpoint-activations on; otherwise a smaller --batch or --processing-res.",
                  file=sys.stderr)
            sys.exit(1)
        if not dist.is_initialized() or not re.search("gloo|NCCL", str(error)):
            raise
        print(f"error: rank {dist.get_rank()} can't reach the others any more: one of them has "
              "ended, look for its error.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


class Said(logging.Handler):
    """What modules log is said, as everything that a person reads."""

    def emit(self, record):
        say(record.getMessage(), any_rank=True)


class Heard:
    """Standard output or error; what nobody reads any more (`| head`) is dropped, not an error."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed from the beginning

    def write(self, text):
        self.heard(self.stream.write, text)
        return len(text)

    def flush(self):
        self.heard(self.stream.flush)

    def heard(self, function, *arguments):
        try:
            function(*arguments)
        except BrokenPipeError:  # whatever is written later, by whomever, is dropped, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:  # it goes to a disk that is full
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def out_of_memory(error):
    """Whether an error is that of a device, or of the system, which has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in str(error))


def say(text, any_rank=False):
    """A line for the person who waits (standard error), from the first rank only or from any."""
    if text and (any_rank or is_first()):
        tqdm.write(printable(text), file=sys.stderr)  # above a bar
        sys.stderr.flush()


def tell(text):
    """Lines of the result (standard output)."""
    for line in text.split("\n"):
        print(printable(line))


def printable(text):
    """One line, not too long, without what else names of files may do to a terminal."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2:]}"
    return "".join(character if character.isprintable() else "?" for character in text)


def check_folder(path, option):
    """Before the work: FileExistsError if no folder can be at the path, as there is a file."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise FileExistsError(f"{option} {part} is a file: give a folder.")


def is_first():
    """Whether this process is the first rank, or alone; before `start`, too."""
    return int(os.environ.get("RANK", 0)) == 0


# ---------------------------------------------------------------------------- devices and ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job (torchrun's, or one alone), and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


def start(device="auto"):
    """Joins the job that torchrun started, if any. `auto`: CUDA, else Apple's MPS, else CPU.

    ValueError if there is no such device.
    """
    if hasattr(signal, "SIGUSR1"):  # "save", before there is anything to save; not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    alone = "RANK" not in os.environ
    if device == "cuda" and not alone:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if torch.device(device).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("not one that this project runs on")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} can't be used ({str(error).splitlines()[0]}): choose "
                         "cuda, mps or cpu, or leave it out.") from error
    torch.backends.cudnn.allow_tf32 = False  # float32 means that; bfloat16 is what is fast
    if alone:
        return Ranks(0, 1, torch.device(device))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # Ranks wait for each other while one fills its share of a cache, validates or saves.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(hours=3))
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def keep_freed_memory(longest_side):
    """Lets the process keep blocks below 256 MiB that it frees, with glibc; larger ones go back.

    For prediction on a CPU: else each map is memory that the system clears anew, a fifth of a
    first prediction's time. Nothing changes where pictures may be large (longest_side: in pixels,
    None: the model's own, 0: any), as gaps would take a fifth more memory at 12 megapixels, nor is
    it for training in full size.
    """
    if longest_side is not None and not 0 < longest_side <= 1024:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    # Other C libraries have no mallopt, and old versions no threshold of more than 32 MiB.
    if mallopt and (mallopt(m_mmap_threshold, 1 << 28) or mallopt(m_mmap_threshold, 1 << 25)):
        mallopt(m_trim_threshold, 1 << 29)  # so much at the end of the heap; more goes back, too


def wait():
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def agreed(value):
    """The first rank's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def stop():
    """Leaves the job, if there is one, once all that uses it (a script's main) has returned.

    The group's threads have to end before Python does: one that lets go of a tensor meanwhile
    aborts the process. They end with the group's last owner, the objective that `parallel` gave.
    """
    wait()
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def parallel(objective, ranks):
    """Wraps an objective so that gradients are averaged over the ranks."""
    if ranks.world == 1:
        return objective
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)


def recompute_activations(choice, trained, ranks, needed):
    """Whether to recompute activations: `on`, `off`, or `auto`, where they would not fit.

    trained: the parameters; needed(): bytes of activations. They have to fit beside gradients and
    Adam's moments; a fifth is left for what comes and goes.
    """
    if choice != "auto":
        return choice == "on"
    needed, rest = needed(), 3 * sum(p.numel() * p.element_size() for p in trained)
    free = free_memory(ranks.device) / (1 if ranks.device.type == "cuda" else ranks.world)
    if 1.25 * needed + rest < free:
        return False
    say(f"Activations of {needed / 2**30:.1f} GiB are recomputed: {free / 2**30:.1f} GiB are free "
        "(--checkpoint-activations off keeps them).")
    return True


def free_memory(device):
    """Bytes that are free on a device, or may be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(row.split()[1] for row in rows if row.startswith("MemAvailable"))
        return 1024 * int(kibibytes)
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# ---------------------------------------------------------------------------- one step


def learning_rate(step, peak, warmup=100, decay_steps=25_000, final=0.01):
    """A pure function of the step, which counts from 0.

    Linear from 0 over the warm-up, then exponential to `final` of the peak at `decay_steps`,
    constant after.
    """
    # Deviation: the paper is silent; this is the released code's schedule.
    if step < warmup:
        return peak * step / warmup
    return peak * final ** min((step - warmup) / max(decay_steps - warmup, 1), 1.0)


class Outcome(NamedTuple):
    """What became of a step."""

    losses: dict | None  # mean over all ranks of each loss and their sum; the gradient's norm
    names: list  # of this rank's samples
    bad: list | None  # names of all ranks' samples, if the step was skipped


def optimizer_step(objective, batches, count, samples, weights, optimizer, ranks, dtype, clip=None,
                   watch=None):
    """One step over this rank's next `count` micro-batches -> Outcome.

    objective(batch) -> {name: per-sample losses B}; the total is their weighted sum. Every sample
    of the step has the same weight, 1/samples, however the step was cut into micro-batches and
    ranks; gradients are exchanged once, on the last micro-batch. A step with a loss or gradient
    that is not finite changes nothing. clip: the largest norm of the gradient, None: any.
    watch: where one process alone is asked to leave, it does so in the middle: None.
    """
    optimizer.zero_grad(set_to_none=True)
    exact = torch.float32 if ranks.device.type == "mps" else torch.float64  # Apple's lack float64
    sums = torch.zeros(len(weights), device=ranks.device, dtype=exact)
    names = []
    for index in range(count):
        if watch and watch.leave and ranks.world == 1:
            return None
        batch = to_device(next(batches), ranks.device)
        exchange = ranks.world == 1 or index == count - 1
        with nullcontext() if exchange else objective.no_sync():
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                losses = objective(batch)
            total = sum(weights[name] * losses[name].sum() for name in weights)
            # Deviation: a mean over the step's samples, not over micro-batches. DDP divides by the
            # number of ranks; the samples of a step are counted over all ranks.
            (total * ranks.world / samples).backward()
        sums += torch.stack([losses[name].detach().sum().to(exact) for name in weights])
        names += batch.get("name", [])
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
    if ranks.world > 1:
        dist.all_reduce(sums)
    *means, norm = torch.cat([sums / samples, norm.to(exact)[None]]).tolist()
    if not all(map(math.isfinite, (*means, norm))):
        return Outcome(None, names, gathered(names, ranks))
    optimizer.step()
    means = dict(zip(weights, means))
    total = sum(weights[name] * means[name] for name in weights)
    return Outcome({"loss": total, **means, "gradient_norm": norm}, names, None)


def gathered(names, ranks):
    """The names of all ranks."""
    everyone = [None] * ranks.world
    if ranks.world == 1:
        return names
    dist.all_gather_object(everyone, names)
    return sum(everyone, [])


def to_device(batch, device):
    """Moves the tensors of a batch (a dict); what else it holds stays."""
    return {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def set_learning_rate(optimizer, value):
    for group in optimizer.param_groups:
        group["lr"] = value


# ---------------------------------------------------------------------------- options


def add_training_options(parser, steps, lr):
    """The options of the loop; the defaults of both stages but for `steps` and `lr`."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=steps, help="optimizer steps (%(default)s)")
    add("--batch", type=positive, default=32, help="samples per step, all ranks (%(default)s)")
    add("--micro-batch", type=positive, default=1, help="samples at once, per rank (%(default)s)")
    add("--lr", type=not_negative, default=lr, help="peak learning rate (%(default)s)")
    add("--warmup", type=whole, default=100, help="steps of linear warm-up (%(default)s)")
    add("--decay-steps", type=positive, default=25_000,
        help="step at which the rate has fallen to 1 %% (%(default)s)")
    add("--clip-gradient", type=not_negative, metavar="NORM",
        help="largest norm of a step's gradient")
    add("--extend", action="store_true", help="resume a run that had fewer --steps")
    add("--accept-changes", action="store_true", help="resume a run whose weights or data are not "
        "what they were")
    add("--seed", type=int, default=0, help="decides order, flips and new weights (%(default)s)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the networks; auto: bfloat16 on GPUs that compute in it and on CPUs that are "
        "measured to be faster in it, else float32; a run goes on with what it began with")
    add("--compile", action="store_true", help="torch.compile the U-Net (not the Fourier "
        "block's complex numbers); takes minutes for each size of sample")
    add("--checkpoint-activations", nargs="?", choices=["auto", "on", "off"], const="on",
        default="auto", help="recompute activations in the backward pass: less memory, a third "
        "more time; auto: where they would not fit")
    add("--workers", type=whole, default=readers(), help="processes that read data, per rank; each "
        "reads some 11 frames of raw Hypersim a second, 19 prepared, 350 cached (here %(default)s)")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    add("--log-every", type=positive, default=10, help="steps (%(default)s)")
    add("--save-every", type=positive, default=500, help="steps (%(default)s)")
    add("--validate-every", type=positive, default=1000, help="steps (%(default)s)")
    add("--validate-images", type=positive, default=16, help="images to score (%(default)s)")


def readers():
    """How many processes read data, unless told: a core each, at least 2, at most 8.

    Eight read some 150 prepared frames a second (benchmarks/loading.py).
    """
    return max(min(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8), 2)


def positive(text):
    """argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def whole(text):
    """argparse type: a whole number, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or above, not {text}")
    return int(text)


def whole_between(low, high):
    """An argparse type: a whole number from `low` to `high`."""
    def kind(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text}")
        return int(text)
    return kind


def not_negative(text):
    """argparse type: a number, 0 or above."""
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number, 0 or above, not {text}")
