"""A script's job: its start and end, the ranks that torchrun started, their devices, memory."""

import gc
import logging
import os
import re
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Imported before `start`: otherwise its default arguments would keep the process group alive.
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel

from engine.terminal import Heard, Said, printable, say


def run(main):
    """Calls a script's main(), then leaves its job; reports a user's mistake in one sentence.

    ValueError and OSError mean a user's mistake (exit code 1); FULL_TRACEBACK=1: raises it instead.
    """
    sys.stdout, sys.stderr = (Heard(stream) for stream in (sys.stdout, sys.stderr))
    logging.basicConfig(handlers=[Said()])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "RANK" not in os.environ:  # torchrun's ranks may wait for each other and would hang
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


def out_of_memory(error):
    """Whether an error means that a device or the system has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in str(error))


@dataclass(frozen=True)
class Ranks:
    """This process's rank and device, and the number of ranks in the job (torchrun's, or 1)."""

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
    if hasattr(signal, "SIGUSR1"):  # ignored until training listens; not on Windows
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
    torch.backends.cudnn.allow_tf32 = False  # float32 must be exact; bfloat16 is the fast type
    if alone:
        return Ranks(0, 1, torch.device(device))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # Ranks wait for each other while one fills its share of a cache, validates or saves.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(hours=3))
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def wait():
    """Waits until all ranks call it."""
    if dist.is_initialized():
        dist.barrier()


def agreed(value):
    """The first rank's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def stop():
    """Leaves the job, if there is one; call it after the script's main() has returned.

    The process group's threads must end before Python: a thread that frees a tensor at Python's end
    aborts the process. They end with the group's last owner, the objective from `parallel`.
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
    """Whether to recompute activations: `on`, `off`, or `auto`: if they would not fit in memory.

    trained: the parameters; needed(): bytes of activations. They must fit beside gradients and
    Adam's moments; a fifth is left for temporary tensors.
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
    """Bytes that are free on a device or that the system can free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(row.split()[1] for row in rows if row.startswith("MemAvailable"))
        return 1024 * int(kibibytes)
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
