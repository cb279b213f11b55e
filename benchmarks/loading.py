"""How many training samples one loader process delivers in a second.

    python -m benchmarks.loading [--frames 8] [--workers 1]
    python -m benchmarks.loading --data /hypersim

At the official size: Hypersim's 768x1024, raw, processed (python -m data.prepare_hypersim) and
cached (train_stage1.py --cache), for training at 480x640. The frames are rooms of the miniature,
which compress about as Hypersim does; --data measures a folder of one's own, raw or processed.
Everything is read through the trainers' own loader, one thread a process, after it was read once
before; the kinds alternate.
"""

import argparse
import math
import tempfile
import time
from contextlib import redirect_stdout
from os import devnull
from pathlib import Path

import numpy as np
import torch

from data.cache import CachedTrainingSet, fill
from data.hypersim import Hypersim, ProcessedHypersim
from data.prepare_hypersim import prepare
from data.sampler import StepBatchSampler
from data.training_set import open_training_set, read_batches
from engine import job, terminal
from engine.terminal import say
from losses.latent import valid_cells
from miniature import render
from nets.unet import UNet

RAW_SIZE, TRAIN_SIZE = (768, 1024), (480, 640)  # height, width
TOKEN_WIDTH = 1536  # of ViT-g
NEEDED = 100  # samples per second of stage 1 on one H200
TARGET = 20  # cached, times raw


def own_frames(folder, count):
    """{kind: training set} of frames that are drawn here, raw and processed."""
    render.ROOM_SIZE = RAW_SIZE
    render.ensure(folder, train=count, workers=1)  # in this process, where the size holds
    raw, processed = folder / "hypersim", folder / "processed"
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere):
        prepare(raw, processed, ["train"], workers=0)
    return {"raw": opened(raw, count), "processed": opened(processed, count)}


def given_frames(root, count):
    """{kind: training set} of the first frames of a user's folder. ValueError if it is another."""
    training_set = opened(root, count)
    kinds = {Hypersim: "raw", ProcessedHypersim: "processed"}
    kind = kinds.get(type(training_set.sources[0]))
    if kind is None:
        raise ValueError(f"{root} is not Hypersim, raw or processed.")
    return {kind: training_set}


def opened(root, count):
    """The training set of a folder, of its first frames only."""
    training_set = open_training_set(root, None, TRAIN_SIZE)
    source = training_set.sources[0]
    if isinstance(source, Hypersim):
        source.frames = source.frames[:count]
    elif isinstance(source, ProcessedHypersim):
        source.images = source.images[:count]
    return training_set


def cached(training_set, folder):
    """The training set as entries with the shapes that SD2 and ViT-g give, of random numbers."""
    with torch.device("meta"):
        unet = UNet()

    def frozen(batch):
        cells = valid_cells(batch["valid"])  # 1,1,h,w
        size = cells.shape[2:]
        tokens = math.prod(unet.feature_size(size, "mid"))
        return dict(z_image=torch.randn(1, 4, *size), z_target=torch.randn(1, 4, *size),
                    cells=cells, tokens=torch.randn(1, tokens, TOKEN_WIDTH))

    entries = CachedTrainingSet(training_set, folder)
    fill(entries, frozen, torch.float16, workers=0)
    return entries


def speed(training_set, workers, seconds):
    """Samples per second and worker, of newly started workers, after the first two of each."""
    sampler = StepBatchSampler(0, 32, 1, training_set.probabilities, training_set.sizes,
                               first_step=0, last_step=10**9)
    batches = read_batches(training_set, sampler, workers, on_bad=lambda name, reason:
                           say(f"Replaced a bad sample: {reason}"))
    for _ in range(2 * workers):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds or not count:
        count += len(next(batches)["name"])
    rate = count / (time.perf_counter() - started)
    batches.close()
    return rate / workers


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="raw or processed Hypersim (frames that are drawn here)")
    add("--frames", type=terminal.positive, default=8, help="to read in turn (%(default)s)")
    add("--workers", type=terminal.positive, default=1, help="processes (%(default)s)")
    add("--runs", type=terminal.positive, default=7, help="of each kind (%(default)s)")
    add("--seconds", type=float, default=1.0, help="of one run (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        kinds = given_frames(args.data, args.frames) if args.data else (
            own_frames(folder, args.frames))
        kinds["cached"] = cached(next(iter(kinds.values())), folder / "cache")
        rates = {kind: [] for kind in kinds}
        for _ in range(args.runs):
            for kind, training_set in kinds.items():
                rates[kind].append(speed(training_set, args.workers, args.seconds))
    report(rates)
    print(f"{args.workers} worker(s), {len(next(iter(kinds.values())).sources[0])} frames, "
          f"median of {args.runs} runs of {args.seconds:g} s (10 to 90 % of them)")


def report(rates):
    """The table of {kind: samples per second and worker, of each run}."""
    medians = {kind: np.median(values) for kind, values in rates.items()}
    print(f"{'kind':<11}{'samples/s per worker':>26}{'times raw':>11}{'target':>8}"
          f"{f'workers for {NEEDED}/s':>19}")
    for kind, values in rates.items():
        low, high = np.quantile(values, (0.1, 0.9))
        rate = f"{medians[kind]:.1f} ({low:.1f} to {high:.1f})"
        ratio = f"{medians[kind] / medians['raw']:.1f}" if "raw" in medians else "-"
        target = f">= {TARGET}" if kind == "cached" else ""
        print(f"{kind:<11}{rate:>26}{ratio:>11}{target:>8}"
              f"{math.ceil(NEEDED / medians[kind]):>19}")


if __name__ == "__main__":
    job.run(main)
