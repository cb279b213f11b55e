"""What both training stages share: devices and ranks, the optimizer's step, the learning rate,
saving, resuming, logging.

It knows nothing of images: batches are dicts, objectives return named losses.
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

STATE, LOG, OPTIONS = "state.pt", "log.jsonl", "args.json"


def run(main):
    """Calls a script's main(); a user's mistake becomes one sentence and exit code 1.

    The libraries raise ValueError or OSError for those; FULL_TRACEBACK=1 shows where.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("FULL_TRACEBACK"):
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


def say(text):
    """A line for the person who waits (standard error), from the first rank only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


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
    """Joins the job that torchrun started, if any. `auto`: CUDA, else Apple's MPS, else CPU."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def wait():
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def stop():
    """Leaves the job cleanly."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def parallel(objective, ranks):
    """Wraps an objective so that gradients are averaged over the ranks."""
    if ranks.world == 1:
        return objective
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)


def training_dtype(precision, device):
    """The autocast type: `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, precision)


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


def optimizer_step(objective, batches, count, samples, weights, optimizer, ranks, dtype):
    """One step over this rank's next `count` micro-batches -> {name: mean loss over all ranks}.

    objective(batch) -> {name: per-sample losses B}; the total is their weighted sum. Every sample
    of the step has the same weight, 1/samples, however the step was cut into micro-batches and
    ranks; gradients are exchanged once, on the last micro-batch.
    """
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(weights), device=ranks.device, dtype=torch.float64)
    for index in range(count):
        batch = to_device(next(batches), ranks.device)
        exchange = ranks.world == 1 or index == count - 1
        with nullcontext() if exchange else objective.no_sync():
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                losses = objective(batch)
            total = sum(weights[name] * losses[name].sum() for name in weights)
            # Deviation: a mean over the step's samples, not over micro-batches. DDP divides by the
            # number of ranks; the samples of a step are counted over all ranks.
            (total * ranks.world / samples).backward()
        sums += torch.stack([losses[name].detach().sum().double() for name in weights])
    optimizer.step()
    if ranks.world > 1:
        dist.all_reduce(sums)
    means = dict(zip(weights, (sums / samples).tolist()))
    return {"loss": sum(weights[name] * means[name] for name in weights), **means}


def to_device(batch, device):
    """Moves the tensors of a batch (a dict); what else it holds stays."""
    return {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def set_learning_rate(optimizer, value):
    for group in optimizer.param_groups:
        group["lr"] = value


# ---------------------------------------------------------------------------- the run folder


def save_state(folder, step, trained, optimizer):
    """Writes what resuming takes: the steps done, the trained module and the optimizer."""
    state = {"step": step, "trained": trained.state_dict(), "optimizer": optimizer.state_dict()}
    path = Path(folder) / STATE
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resume(folder, state, trained, optimizer, steps):
    """Puts back what `open_run` returned; the number of steps that are done, of `steps`."""
    if state is None:
        return 0
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    done = state["step"]
    say(f"{folder} is finished: it has all its {done} steps." if done == steps
        else f"Resuming {folder} at step {done} of {steps}.")
    return done


def open_run(folder, options, ranks):
    """Prepares a run folder; returns the state to resume from, or None for a new run.

    options: those that change the result. A folder of a run with other options is refused.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = json.loads(json.dumps(options))
    described, state = folder / OPTIONS, folder / STATE
    if not state.exists():
        if ranks.first:
            described.write_text(json.dumps(options, indent=1) + "\n")
            (folder / LOG).unlink(missing_ok=True)
        return None
    before = json.loads(described.read_text())
    names = sorted(before.keys() | options.keys())
    changed = [f"{name}: {before.get(name)} then, {options.get(name)} now"
               for name in names if before.get(name) != options.get(name)]
    if changed:
        raise ValueError(f"{folder} holds a run with other options ({'; '.join(changed)}): repeat "
                         "its options to resume it, or choose another --out.")
    return torch.load(state, map_location="cpu", weights_only=True, mmap=True)


def decisive(options):
    """Of a script's options (a dict), those that change the result, as plain types."""
    rest = {"out", "cache", "device", "workers", "micro_batch", "compile", "checkpoint_activations",
            "log_every", "save_every", "validate_every", "validate_images"}
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(options.items()) if name not in rest}


class Log:
    """log.jsonl: one object per logged step; written by the first rank only.

    When a run resumes at a step, what an interrupted run logged beyond it is dropped.
    """

    def __init__(self, folder, step, ranks):
        self.path = Path(folder) / LOG if ranks.first else None
        if self.path and self.path.exists():
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
            self.path.write_text("".join(kept))

    def write(self, row):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


class Progress:
    """The bar on the terminal, and every `log_every` steps a row of log.jsonl.

    The row has the step (its number done, from 1), the mean of each loss since the last row, the
    learning rate and the samples per second.
    """

    def __init__(self, first, steps, samples, log_every, log, ranks):
        self.steps, self.samples, self.log_every, self.log = steps, samples, log_every, log
        self.bar = tqdm(initial=first, total=steps, unit="step", disable=not ranks.first)
        self.sums, self.count, self.since = {}, 0, time.perf_counter()

    def report(self, done, losses, rate):
        """After step number `done`: losses {name: float}, rate the learning rate it had."""
        self.bar.update()
        self.count += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if done % self.log_every and done != self.steps:
            return
        now = time.perf_counter()
        speed = self.count * self.samples / (now - self.since)
        means = {name: value / self.count for name, value in self.sums.items()}
        self.log.write({"step": done, **means, "lr": rate, "samples_per_second": round(speed, 3)})
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, lr {rate:.1e}, {speed:.2f} samples/s")
        self.sums, self.count, self.since = {}, 0, now

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()  # before the error's sentence is printed


# ---------------------------------------------------------------------------- options


def add_training_options(parser, steps, lr):
    """The options of the loop; the defaults of both stages but for `steps` and `lr`."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=steps, help="optimizer steps (%(default)s)")
    add("--batch", type=positive, default=32, help="samples per step, all ranks (%(default)s)")
    add("--micro-batch", type=positive, default=1, help="samples at once, per rank (%(default)s)")
    add("--lr", type=float, default=lr, help="peak learning rate (%(default)s)")
    add("--warmup", type=int, default=100, help="steps of linear warm-up (%(default)s)")
    add("--decay-steps", type=positive, default=25_000,
        help="step at which the rate has fallen to 1 %% (%(default)s)")
    add("--seed", type=int, default=0, help="decides order, flips and new weights (%(default)s)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the networks; auto: bfloat16 on CUDA, else float32")
    add("--compile", action="store_true", help="torch.compile the U-Net")
    add("--checkpoint-activations", action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--workers", type=int, default=2, help="processes that read data, per rank (%(default)s)")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    add("--log-every", type=positive, default=10, help="steps (%(default)s)")
    add("--save-every", type=positive, default=500, help="steps (%(default)s)")
    add("--validate-every", type=positive, default=1000, help="steps (%(default)s)")
    add("--validate-images", type=positive, default=16, help="images to score (%(default)s)")


def positive(text):
    """argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)
