"""Peak memory and time of opening a model file and of predicting with it, as predict.py does.

    python -m benchmarks.memory [--precision bfloat16 float32] [--sizes 480x640 3024x4032]
    python -m benchmarks.memory --miniature

The file has random weights of Stable Diffusion 2's size (3.8 GB), the image is random and keeps its
size. Each figure comes from a process of its own: its largest resident memory, in which libraries
and mapped files count, and on a GPU also the largest that torch allocated there. Reading and
opening are timed from the disk, where the system lets go of its copy (Linux), and warm; predictions
find the file warm. In float32 it is mapped, and some of it read only while predicting. 3024x4032
takes half an hour.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine import job, terminal
from engine.terminal import say
from miniature import embedded
from nets.depthmaster import DepthMaster
from nets.inference import memory
from nets.inference.precision import choose
from nets.model_file import LONGEST

OPENING_TARGET = 1.3  # times reading the file once, warm
PREDICTION_TARGETS_GB = {(480, 640): 2.8, (3024, 4032): 8.0}  # bfloat16, on a CPU


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=size, nargs="+", default=[(480, 640)], metavar="HxW")
    add("--precision", nargs="+", choices=["float32", "bfloat16", "float16"],
        default=["bfloat16", "float32"])
    add("--device", default="auto")
    add("--runs", type=terminal.positive, default=3, help="of opening and reading (%(default)s)")
    add("--folder", type=Path, help="keeps the file of random weights (one that is removed)")
    add("--miniature", action="store_true", help="the embedded miniature")
    add("--measure", nargs="+", help=argparse.SUPPRESS)  # one figure, in this process
    return parser.parse_args()


def size(text):
    """argparse type: HxW -> (height, width)."""
    height, width = map(terminal.number_between(*LONGEST), text.split("x"))
    return height, width


# ------------------------------------------------------- measured, each in a process of its own


def imports(device):
    return {}


def write_model(device, path):
    torch.manual_seed(0)
    DepthMaster().save(path)
    return {}


def read_once(device, path):
    """As `cat` reads, into the same megabyte again and again."""
    buffer = bytearray(1 << 20)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return {"seconds": time.perf_counter() - started}


def opened(device, path, precision, longest_side=None):
    """The model, ready to predict, and the seconds of reading it and of all."""
    memory.keep_freed_memory(longest_side)
    torch.zeros(1, device=device)  # what a GPU needs to start does not count
    started = time.perf_counter()
    model = DepthMaster.from_file(path, device, getattr(torch, choose(precision, device)[0]))
    read = time.perf_counter() - started
    model.for_inference(device, precision)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return model, {"read": read, "seconds": time.perf_counter() - started}


def open_model(device, path, precision):
    return opened(device, path, precision)[1]


def predict(device, path, precision, height, width):
    model, _ = opened(device, path, precision, max(int(height), int(width)))
    image = np.random.default_rng(0).integers(256, size=(int(height), int(width), 3),
                                              dtype=np.uint8)
    started = time.perf_counter()
    model.predict(image, processing_res=0)
    return {"seconds": time.perf_counter() - started}


def measure(device, what, *words):
    """What a function above measures, with the peaks of memory in GiB."""
    functions = (imports, write_model, read_once, open_model, predict)
    result = {function.__name__: function for function in functions}[what](device, *words)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return result | {"peak": peak / 2**30, "gpu": gpu / 2**30}


# ------------------------------------------------------------------------------ the table


def called(args, function, *words):
    """A measurement in a new process. ValueError if that one fails."""
    # On Linux a process starts with its parent's peak, so nothing is opened or written in this one.
    command = [sys.executable, "-m", "benchmarks.memory", "--device", args.device, "--measure",
               function.__name__, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        killed = " (killed: out of memory?)" if done.returncode == -9 else ""
        raise ValueError(f"{function.__name__} {' '.join(map(str, words))} ended with code "
                         f"{done.returncode}{killed}.")
    return json.loads(done.stdout)


def model_file(args, folder):
    """The file that is opened; random weights are written unless they are there."""
    if args.miniature:
        return embedded.TRAINED
    path = folder / "random_sd2.safetensors"
    if not path.exists():
        say(f"Writing random weights to {path}.")
        called(args, write_model, path)
    return path


def row(name, result, libraries, ratio="", target=""):
    over = result["peak"] - libraries["peak"]
    gpu = f"{result['gpu']:.2f}" if result["gpu"] else ""
    print(f"| {name} | {result['seconds']:.3g} | {ratio} | {result['peak']:.2f} | {over:.2f} "
          f"| {gpu} | {target} |", flush=True)


def median(results):
    """The median of each figure of several measurements."""
    return {key: float(np.median([result[key] for result in results])) for key in results[0]}


def forget(path):
    """Lets the system drop what it keeps of a file, so that it comes from the disk again."""
    with open(path, "rb") as file:
        os.fsync(file)  # what is not written yet stays
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report_opening(args, path, libraries, state, prepare):
    """Rows of reading and opening, each after prepare(path): medians of runs that alternate."""
    measured = {"reading": (read_once,)} | {precision: (open_model, precision)
                                            for precision in args.precision}
    results = {name: [] for name in measured}
    for _ in range(args.runs):
        for name, (function, *words) in measured.items():
            prepare(path)
            results[name].append(called(args, function, path, *words))
    reading, *openings = (median(values) for values in results.values())
    row(f"reading the file once, {state}", reading, libraries)
    for precision, result in zip(args.precision, openings):
        row(f"opening, {precision}, {state} (file {result['read']:.3g} s, then folding and layout)",
            result, libraries, f"{result['seconds'] / reading['seconds']:.2f}",
            f"{OPENING_TARGET} times reading" if state == "warm" and not args.miniature else "")


def report(args, path):
    libraries = called(args, imports)
    device = job.start(args.device).device
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; the file has "
          f"{path.stat().st_size / 2**30:.2f} GiB, the libraries take {libraries['peak']:.2f} GiB; "
          f"opening: median of {args.runs} runs\n")
    print("| | seconds | over reading | peak, GiB | over the libraries, GiB | on the GPU, GiB "
          "| target |")
    print("|---|---|---|---|---|---|---|")
    if hasattr(os, "posix_fadvise"):
        report_opening(args, path, libraries, "from the disk", forget)
    report_opening(args, path, libraries, "warm", partial(read_once, None))
    for height, width in args.sizes:
        for precision in args.precision:
            result = called(args, predict, path, precision, height, width)
            target = PREDICTION_TARGETS_GB.get((height, width))
            aimed = target and precision == "bfloat16" and not (args.miniature or result["gpu"])
            row(f"predicting {height}x{width}, {precision}", result, libraries, target=(
                f"{target:g} GB ({target * 1e9 / 2**30:.2f} GiB)" if aimed else ""))


def main():
    args = options()
    if args.measure:
        return print(json.dumps(measure(job.start(args.device).device, *args.measure)))
    with tempfile.TemporaryDirectory() as folder:
        report(args, model_file(args, args.folder or Path(folder)))


if __name__ == "__main__":
    job.run(main)
