"""How many samples per second each stage trains, its peak memory, its share of the device's rate.

    python -m benchmarks.training [--micro-batch 1] [--size 480 640]
    python -m benchmarks.training --miniature --profile

Random weights of Stable Diffusion 2's and DINOv2 ViT-g's size, and samples that are in memory
already: what the networks need, without reading (benchmarks.loading). Timed are the forward and
backward pass of a micro-batch and, alone, Adam's step, once in 32 samples. Operations that are
recomputed count as work. Each row is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch.profiler import profile

from benchmarks.timing import counter, matrix_rate, seconds, utilisation
from engine import job, step, terminal
from miniature import embedded
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.inference.precision import choose
from nets.model_file import LONGEST
from train_stage1 import Stage1
from train_stage2 import Stage2

TARGETS = {"stage 1": 40, "stage 1, cached": 100, "stage 2": 40}  # samples/s on one H200, bfloat16
BATCH = 32


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=terminal.number_between(*LONGEST), nargs=2, metavar=("H", "W"),
        help="480 640, the miniature's 192 256")
    add("--micro-batch", type=terminal.positive, default=1)
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    add("--checkpoint-activations", choices=["on", "off"], default="off")
    add("--compile", action="store_true", help="the U-Net")
    add("--device", default="auto")
    add("--runs", type=terminal.positive, default=5)
    add("--rows", nargs="+", choices=TARGETS, default=list(TARGETS))
    add("--miniature", action="store_true", help="the embedded miniature and its teacher")
    add("--profile", action="store_true", help="where the time goes")
    add("--measure", choices=TARGETS, help=argparse.SUPPRESS)  # one row, in this process
    args = parser.parse_args()
    args.size = args.size or ((192, 256) if args.miniature else (480, 640))
    return args


def objective_and_batch(args, row, device, dtype):
    """A stage's objective and a micro-batch, both on the device; weights of the losses."""
    torch.manual_seed(0)
    model = DepthMaster.from_file(embedded.TRAINED) if args.miniature else DepthMaster()
    shape = args.micro_batch, 1, *args.size
    batch = {"image": torch.randint(0, 256, (args.micro_batch, 3, *args.size), dtype=torch.uint8),
             "target": torch.rand(shape) * 2 - 1, "valid": torch.rand(shape) > 0.01}
    recompute = args.checkpoint_activations == "on"
    model.unet.checkpoint_activations = model.vae.decoder.checkpoint_activations = recompute
    if row == "stage 2":
        model.add_fourier()
        objective, weights = Stage2(model), {"pixel": 1.0, "gradient": 0.001}
    else:
        teacher = (DINOv2.from_file(embedded.DINOV2, dtype=dtype) if args.miniature else
                   DINOv2().to(dtype))
        objective, weights = Stage1(model, teacher, "mid", "kl"), {"latent": 1.0, "alignment": 1.0}
    objective.to(device, memory_format=torch.channels_last)
    batch = step.to_device(batch, device)
    if row == "stage 1, cached":
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            batch = objective.frozen(batch)
        objective.teacher = None  # as in the trainer, which validates with the autoencoder
    if args.compile:
        model.unet.compile()
    return objective, batch, weights


def measure(args, row):
    """One row as a dict."""
    device = job.start(args.device).device
    dtype = getattr(torch, choose(args.precision, device, training=True)[0])
    objective, batch, weights = objective_and_batch(args, row, device, dtype)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-6, fused=True)

    def micro_batch():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = objective(batch)
        (sum(weights[name] * losses[name].sum() for name in weights) / BATCH).backward()

    with counter() as operations:
        micro_batch()
    if args.compile:
        micro_batch()
    optimizer.step()
    times = sorted(seconds(micro_batch, device) for _ in range(args.runs))
    step = seconds(optimizer.step, device)
    if args.profile:
        with profile() as recorded:
            micro_batch()
        order = f"self_{device.type}_time_total"
        print(recorded.key_averages().table(sort_by=order, row_limit=15), file=sys.stderr)
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else (
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    median = times[len(times) // 2]
    return dict(low=times[0], median=median, high=times[-1], step=step, peak_gib=peak / 2**30,
                tflops=operations.get_total_flops() / median / 1e12,
                rate=matrix_rate(device, dtype),
                samples_per_second=BATCH / (BATCH / args.micro_batch * median + step),
                what=f"{torch.cuda.get_device_name(device) if cuda else 'CPU'}, "
                     f"{torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")


def main():
    args = options()
    if args.measure:
        return print(json.dumps(measure(args, args.measure)))
    for number, row in enumerate(args.rows):
        words = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--measure", row]
        result = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        if not number:
            print(f"{result['what']}; micro-batch {args.micro_batch} of "
                  f"{args.size[0]}x{args.size[1]}\n\n| | micro-batch, s (lowest to highest) | "
                  "Adam, s | samples/s | peak, GiB | TFLOP/s (of a matrix product's) | target |\n"
                  "|---|---|---|---|---|---|---|")
        print(f"| {row} | {result['median']:.3g} ({result['low']:.3g} to {result['high']:.3g}) "
              f"| {result['step']:.3g} | {result['samples_per_second']:.3g} "
              f"| {result['peak_gib']:.1f} | {utilisation(result['tflops'], result['rate'])} "
              f"| {TARGETS[row]} samples/s on an H200 |", flush=True)


if __name__ == "__main__":
    job.run(main)
