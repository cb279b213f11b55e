"""One optimizer step over micro-batches and ranks, and the learning rate.

It knows nothing of pictures: batches are dicts, objectives return named losses.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist


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
    """The result of a step."""

    losses: dict | None  # means over all ranks; `loss`: their weighted sum; gradient_norm
    names: list  # of this rank's samples
    bad: list | None  # names of all ranks' samples, if the step was skipped


def optimizer_step(objective, batches, count, samples, weights, optimizer, ranks, dtype, clip=None,
                   watch=None):
    """One step over this rank's next `count` micro-batches -> Outcome.

    objective(batch) -> {name: per-sample losses B}; the total is their weighted sum. Every sample
    of the step has the same weight, 1/samples, however the step was cut into micro-batches and
    ranks; gradients are exchanged once, on the last micro-batch. A step with a loss or gradient
    that is not finite changes nothing. clip: the largest norm of the gradient, None: any.
    watch: if a signal asks a single process to leave, it returns None in the middle of the step.
    """
    optimizer.zero_grad(set_to_none=True)
    exact = torch.float32 if ranks.device.type == "mps" else torch.float64  # MPS lacks float64
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
    """The sample names of all ranks."""
    everyone = [None] * ranks.world
    if ranks.world == 1:
        return names
    dist.all_gather_object(everyone, names)
    return sum(everyone, [])


def to_device(batch, device):
    """Moves the tensors of a batch (a dict) to a device; other values stay as they are."""
    return {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def set_learning_rate(optimizer, value):
    for group in optimizer.param_groups:
        group["lr"] = value
