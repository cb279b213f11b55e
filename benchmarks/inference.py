"""How long one prediction takes, beside the modules of diffusers, and where the time goes.

    python -m benchmarks.inference [--size 480 640] [--precision bfloat16 float32] [--batch 1 8]
    python -m benchmarks.inference --miniature --profile

Random weights of Stable Diffusion 2's size, the same image for all; the ways alternate, the figure
is the median. Each has a process of its own, as its users have: what one does to the memory is not
the others' gain. The peer takes part where diffusers is installed
(tests/requirements-reference.txt).
"""

import argparse
import importlib.util
import multiprocessing
from collections import Counter
from functools import partial

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from benchmarks.peer import peer
from benchmarks.timing import counter, matrix_rate, seconds, utilisation
from engine import job, terminal
from miniature import embedded
from nets.depthmaster import DepthMaster
from nets.inference import memory
from nets.model_file import LONGEST

# On a CPU of two cores with AMX our time over the peer's; on a GPU our time.
TARGETS = {
    ("cpu", "bfloat16"): {"diffusers, channels_last": "0.68"},
    ("cpu", "float32"): {"diffusers, channels_last": "0.87"},
    ("cuda", "bfloat16"): {"ours": "11 ms an image on an H200, batch 8, 480x640"},
}
KINDS = {"convolution": "conv", "attention": "attention", "matrix product": "mm"}


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", type=terminal.number_between(*LONGEST), nargs=2, default=(480, 640),
        metavar=("H", "W"))
    add("--batch", type=terminal.positive, nargs="+", default=[1])
    add("--precision", nargs="+", choices=["float32", "bfloat16", "float16"],
        default=["bfloat16", "float32"])
    add("--device", default="auto")
    add("--runs", type=terminal.positive, default=5)
    add("--miniature", action="store_true", help="the embedded miniature, without a peer")
    add("--compile", action="store_true", help="ours also with torch.compile on the U-Net")
    add("--profile", action="store_true", help="where the time of each goes")
    return parser.parse_args()


def ours(miniature, device, precision):
    """The model as predict.py has it; random weights, but for the miniature's."""
    if miniature:
        return DepthMaster.from_file(embedded.TRAINED).for_inference(device, precision)
    with torch.device(device):
        model = DepthMaster()
    return model.for_inference(device, precision)


def as_predict(miniature, device, precision, size, compiled=False):
    """`ours` in a process that is set up as predict.py's."""
    memory.keep_freed_memory(max(size))
    model = ours(miniature, job.start(str(device)).device, precision)
    if compiled:
        model.unet.compile()
    return model


def every_way(args, device, precision):
    """{name: function that makes a function image B,3,H,W -> depth map B,1,H,W}, to compare."""
    ways = {"ours": partial(as_predict, args.miniature, device, precision, args.size)}
    if args.compile:
        ways["ours, compiled"] = partial(ways["ours"], compiled=True)
    if with_peer(args):
        dtype = getattr(torch, precision)
        ways["diffusers, channels_last"] = partial(peer, device, dtype, torch.channels_last)
        ways["diffusers"] = partial(peer, device, dtype, torch.contiguous_format)
    return ways


class Apart:
    """One of the ways in a process of its own, until it is closed."""

    def __init__(self, name, make, device):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, end) = name, context.Pipe()
        self.process = context.Process(target=answer, args=(end, name, make, device), daemon=True)
        self.process.start()
        end.close()

    def ask(self, function, shape):
        """What function(name, way, image) returns there, for an image of a shape.

        ValueError if it fails.
        """
        try:
            self.connection.send((function, shape))
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise ValueError(f"the process of {self.name} has ended: look for its error; with "
                             "none, the system had no memory left.") from None

    def close(self):
        self.connection.close()
        self.process.join()


def answer(connection, name, make, device):
    """Does what `Apart.ask` asks for, in the other process."""
    torch.backends.cudnn.allow_tf32 = False
    way = torch.inference_mode()(make())
    while True:
        try:
            function, shape = connection.recv()
        except EOFError:  # nobody asks any more
            return
        generator = torch.Generator().manual_seed(0)
        image = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
        connection.send(function(name, way, image))


def with_peer(args):
    return importlib.util.find_spec("diffusers") and not args.miniature


def work_of_each(args):
    """{"ours", "diffusers": TFLOP of a prediction}: ours with its folds, the other's plain."""
    # With gradients enabled ours is not in strips, of which counting 12 megapixels takes minutes.
    work = {"ours": operations(ours(args.miniature, "meta", "float32"), args.size)}
    if with_peer(args):
        unchanged = peer("meta", torch.float32, torch.contiguous_format)
        work["diffusers"] = operations(unchanged, args.size)
    return work


def operations(way, size):
    """TFLOP of one image of a size (height, width), from shapes alone; `way`: on meta."""
    with counter() as operations_seen:
        way(torch.empty(1, 3, *size, device="meta"))
    return operations_seen.get_total_flops() / 1e12


def alternate(ways, shape, runs):
    """{name: seconds of each run} of images of a shape, after a run each to warm up."""
    times = {way.name: [] for way in ways}
    for run in range(runs + 1):
        for way in ways:
            took = way.ask(timed, shape)
            if run:
                times[way.name].append(took)
    return times


def timed(name, way, image):
    return seconds(lambda: way(image), image.device)


def profile_table(name, way, image):
    """The kinds of operations that take longest, beside what was counted of their work, as text."""
    with counter() as operations_seen:
        way(image)
    counted = Counter()
    for operation, work in operations_seen.get_flop_counts()["Global"].items():
        counted[kind(str(operation))] += work / 1e12
    with profile() as recorded:
        way(image)
    took = seconds_by_kind(recorded.key_averages(), image.is_cuda)
    rows = [f"\n| {name}: operation | s | share | TFLOP | TFLOP/s |\n|---|---|---|---|---|"]
    for what, spent in took.most_common(10):
        work = f"{counted[what]:.3g} | {counted[what] / spent:.3f}" if counted[what] else " | "
        rows.append(f"| {what} | {spent:.3g} | {spent / took.total():.1%} | {work} |")
    return "\n".join(rows)


def seconds_by_kind(rows, on_gpu):
    """{kind of operation: seconds} of a profile's rows."""
    took = Counter()
    for row in rows:
        if row.device_type == DeviceType.CPU:  # else a GPU's kernel, whose time its operation has
            time_us = row.self_device_time_total if on_gpu else row.self_cpu_time_total
            took[kind(row.key)] += time_us / 1e6
    return took


def kind(operation):
    """What an operation is called in the profile: one of KINDS, or its own name."""
    return next((what for what, part in KINDS.items() if part in operation), operation)


def print_table(title, times, batch, work, reached, targets):
    """One row for each way of {way: seconds of each run of a batch}.

    work: {"ours", "diffusers": TFLOP an image}; reached: TFLOP/s of a matrix product; targets:
    {way: text}.
    """
    print(f"\n| {title}, batch {batch} | median s | 10 % | 90 % | images/s | TFLOP an image "
          "| TFLOP/s (of a matrix product's) | ours over it | target |\n" + 9 * "|---" + "|")
    for name, values in times.items():
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
        rate, each = batch / median, work[name.split(",")[0]]
        ratio = np.median(np.divide(times["ours"], values))
        print(f"| {name} | {median:.4g} | {low:.4g} | {high:.4g} | {rate:.3g} | {each:.3g} "
              f"| {utilisation(rate * each, reached)} | {ratio:.2f} | {targets.get(name, '')} |",
              flush=True)


def compare(args, device, precision, work):
    """The tables of one precision, whose processes end before those of the next need memory."""
    ways = [Apart(name, make, device) for name, make in every_way(args, device, precision).items()]
    targets = TARGETS.get((device.type, precision), {})
    for batch in args.batch:
        shape = batch, 3, *args.size
        times = alternate(ways, shape, args.runs)
        reached = matrix_rate(device, getattr(torch, precision))
        print_table(precision, times, batch, work, reached, targets)
        if args.profile:
            for way in ways:
                print(way.ask(profile_table, shape))
    for way in ways:
        way.close()


def main():
    args = options()
    device = job.start(args.device).device
    work = work_of_each(args)
    print(f"{torch.get_num_threads()} threads of the CPU" if device.type == "cpu" else
          torch.cuda.get_device_name(device), f"torch {torch.__version__}, "
          f"{args.size[0]}x{args.size[1]}", sep=", ")
    for precision in args.precision:
        compare(args, device, precision, work)


if __name__ == "__main__":
    job.run(main)
