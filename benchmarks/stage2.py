"""Does stage 2 sharpen? In miniature, against as many more minutes of stage 1, over several seeds.

    python -m miniature.render runs/scenes --train 4000 --val 96 --streets-train 300
    python -m benchmarks.stage2

Every arm starts from the same converged stage 1 (weights/miniature.safetensors) and trains for
--minutes on one core (two arms at a time); its number of steps comes from its speed in a short
trial. Scores on the held-out frames; intervals are Student's t at 95 % over the seeds.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine import job
from engine.terminal import say

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # two-sided 95 %, by number of seeds
PROBE = 16  # steps that measure an arm's speed
BATCH = 8


def arms(args):
    """{name: words of its command}."""
    stage2 = ["train_stage2.py", "--ckpt", args.stage1, "--lr", args.lr]
    return {
        "stage 1 for as long (control)": [
            "train_stage1.py", "--sd2", args.stage1, "--teacher",
            "weights/miniature_dinov2.safetensors", "--lr", args.control_lr],
        "stage 2": stage2,
        "stage 2, identity init": [*stage2, "--fourier-init", "identity"],
        "stage 2, no Fourier block": [*stage2, "--fourier", "off"],
        "stage 2, no gradient loss": [*stage2, "--gradient-weight", 0],
        f"stage 2, gradient weight {args.gradient_weight}": [
            *stage2, "--gradient-weight", args.gradient_weight],
    }


def call(words):
    """A script of this project on one core; its standard error is shown if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"{words[0]} failed: {done.stderr[-2000:]}")


def train(args, words, seed, steps, out):
    call([*words, "--data", args.scenes / "hypersim", "--vkitti", args.scenes / "vkitti",
          "--vkitti-crop", 96, 336, "--batch", BATCH, "--micro-batch", 4, "--warmup", 20, "--seed",
          seed, "--steps", steps, "--decay-steps", steps, "--workers", 0, "--log-every", 4,
          "--validate-every", 10**6, "--validate-images", 1, "--save-every", 10**6, "--out", out])


def speed(args, words, folder):
    """Steps per second, from the second half of a short run's log."""
    if not (folder / "model.safetensors").exists():
        train(args, words, 0, PROBE, folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    samples = [row["samples_per_second"] for row in rows if "loss" in row]
    return np.median(samples[len(samples) // 2:]) / BATCH


def run(args, words, seed, steps, folder):
    """Trains and scores one arm with one seed; what is there already is not done again."""
    folder = folder / f"{steps}_steps_seed_{seed}"
    if not (folder / "metrics.json").exists():
        train(args, words, seed, steps, folder)
        score(args, folder / "model.safetensors", folder)
    return read(folder)


def score(args, ckpt, folder):
    call(["evaluate.py", "--ckpt", ckpt, "--data", args.scenes, "--datasets", "hypersim", "--out",
          folder])


def read(folder):
    return json.loads((folder / "metrics.json").read_text())["hypersim"]


def interval(values):
    """Mean and half of the 95 % interval."""
    count = len(values)
    half = STUDENT[count] * np.std(values, ddof=1) / count**0.5 if count > 1 else float("nan")
    return f"{np.mean(values):.4f} ± {half:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage1", type=Path, default=Path("weights/miniature.safetensors"))
    add("--scenes", type=Path, default=Path("runs/scenes"))
    add("--minutes", type=float, default=8, help="per arm and seed (%(default)s)")
    add("--seeds", type=int, default=3, choices=range(1, 7))
    add("--lr", type=float, default=1e-4, help="of stage 2 (%(default)s)")
    add("--control-lr", type=float, default=1e-4, help="(%(default)s)")
    add("--gradient-weight", type=float, default=0.1, help="of the last arm (%(default)s)")
    add("--arms", nargs="+", type=int, metavar="N", help="only these, counted from 0")
    add("--out", type=Path, default=Path("runs/stage2_table"))
    args = parser.parse_args()

    chosen = list(arms(args).items())
    chosen = [chosen[index] for index in args.arms] if args.arms else chosen
    jobs = []
    for name, words in chosen:
        folder = args.out / name.replace(" ", "_").replace(",", "")
        steps = round(60 * args.minutes * speed(args, words, folder / "probe"))
        say(f"{name}: {steps} steps of {BATCH}")
        jobs += [(name, words, seed, steps, folder) for seed in range(args.seeds)]
    jobs.sort(key=lambda job: job[2])  # all arms of one seed first
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: run(args, *job[1:]), jobs))
    if not (args.out / "start" / "metrics.json").exists():
        score(args, args.stage1, args.out / "start")
    start = read(args.out / "start")
    print(f"| {args.minutes:g} minutes each, {args.seeds} seeds | steps | AbsRel | delta1 | F1 "
          "| F1 minus the first arm's, seed by seed |")
    print("|---|---|---|---|---|---|")
    print(f"| end of stage 1 | 0 | {start['abs_rel']:.4f} | {start['delta1']:.4f} "
          f"| {start['boundary_f1']:.4f} | |")
    first = [result["boundary_f1"] for job, result in zip(jobs, results) if job[0] == chosen[0][0]]
    for name, _ in chosen:
        mine = [(job[3], result) for job, result in zip(jobs, results) if job[0] == name]
        cells = [interval([result[key] for _, result in mine])
                 for key in ("abs_rel", "delta1", "boundary_f1")]
        gains = [result["boundary_f1"] - f1 for (_, result), f1 in zip(mine, first)]
        print(f"| {name} | {mine[0][0]} | {' | '.join(cells)} "
              f"| {' '.join(f'{gain:+.4f}' for gain in gains)} |")


if __name__ == "__main__":
    job.run(main)
