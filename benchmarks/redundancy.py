"""Which blocks of the U-Net a model can do without: what leaving out each one costs and saves.

    python -m benchmarks.redundancy                                  # the embedded miniature
    python -m benchmarks.redundancy CKPT --data ROOT --save 300      # a list for distill.py --drop
    python -m benchmarks.redundancy --sd2                            # shares at SD2's size alone

Each resnet and transformer is left out in turn, and each level and the middle as a whole: only the
skip stays. The model is not trained again, so that the costs are upper bounds. ROOT is what the
trainers take; AbsRel and F1 are means over its held-out pictures. Work, time and parameters are
shares of the U-Net's. --save MB adds block after block, the cheapest per byte first, until that
many megabytes (float32) are saved, and scores the result.
"""

import argparse
import copy
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.timing import counter
from data.sources import open_training_source
from data.transforms import KITTI_CROP
from engine import job, terminal
from evaluation.loop import validate
from miniature import embedded
from nets.depthmaster import DepthMaster


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("ckpt", type=Path, nargs="?", default=embedded.TRAINED, help="model (%(default)s)")
    add("--data", type=Path, help="held-out pictures (the miniature's own)")
    add("--images", type=terminal.positive, default=32, help="to score (%(default)s)")
    add("--save", type=float, metavar="MB", help="propose blocks that save so much")
    add("--sd2", action="store_true", help="random weights of SD2's size, without scores")
    add("--size", type=terminal.positive, nargs=2, metavar=("H", "W"),
        help="of the picture for work and time (the model's own)")
    add("--runs", type=terminal.positive, default=3, help="to measure the time (%(default)s)")
    add("--device", default="auto")
    args = parser.parse_args()
    if args.sd2 and (args.data or args.save):
        parser.error("--sd2 has random weights and no scores: leave out --data and --save")
    return args


def groups(unet):
    """{name: blocks it holds}: each block, then each level and the middle."""
    blocks, found = unet.blocks(), defaultdict(list)
    for block in blocks:
        parts = block.split(".")
        found["mid" if parts[0] == "mid" else ".".join(parts[:2])].append(block)
    return {block: [block] for block in blocks} | dict(found)


def work_of_blocks(model, size):
    """({block: operations}, the U-Net's) for a latent of a picture of a size (height, width)."""
    unet = copy.deepcopy(model.unet).to("meta")
    with counter() as seen:
        unet(torch.empty(1, unet.conv_in.in_channels, size[0] // 8, size[1] // 8, device="meta"))
    counts = {name: sum(by.values()) for name, by in seen.get_flop_counts().items()}
    return ({block: counts.get(f"UNet.{block}", 0) for block in unet.blocks()},
            seen.get_total_flops())


@torch.inference_mode()
def seconds_of_blocks(model, size, runs):
    """({block: seconds}, the U-Net's): medians over runs, after one to warm up."""
    spent, unet = defaultdict(list), model.unet
    started = {}

    def now():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(name):
        return lambda module, inputs: started.update({name: now()})

    def after(name):
        return lambda module, inputs, output: spent[name].append(now() - started[name])

    hooks = [hook for name in ("", *unet.blocks()) for hook in (
        unet.get_submodule(name).register_forward_pre_hook(before(name)),
        unet.get_submodule(name).register_forward_hook(after(name)))]
    latent = torch.zeros(1, unet.conv_in.in_channels, size[0] // 8, size[1] // 8,
                         device=model.device, dtype=model.dtype)
    for _ in range(runs + 1):
        unet(latent)
    for hook in hooks:
        hook.remove()
    medians = {name: float(np.median(values[1:])) for name, values in spent.items()}
    return medians, medians.pop("")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def without(model, blocks):
    """The model with a U-Net of which these blocks are left out."""
    smaller = copy.copy(model)
    smaller._modules = dict(model._modules, unet=copy.deepcopy(model.unet))
    smaller.unet.drop(blocks)
    return smaller


def main():
    args = options()
    device = job.start(args.device).device
    if args.sd2:
        with torch.device(device):
            model = DepthMaster().eval()
    else:
        model = DepthMaster.from_file(args.ckpt, device)
        root = args.data or embedded.held_out() / "hypersim"
        reader = open_training_source(root, "val", KITTI_CROP, exif="auto")
    size = args.size or model.train_size
    shown = groups(model.unet)
    work, all_work = work_of_blocks(model, size)
    took, all_seconds = seconds_of_blocks(model, size, args.runs)
    weights, all_weights = {}, parameters(model.unet)
    for name in model.unet.blocks():
        weights[name] = parameters(model.unet) - parameters(without(model, [name]).unet)

    def score(blocks):
        bad = []
        found = validate(without(model, blocks), reader, args.images, torch.float32, bad=bad)
        if not found:
            raise ValueError(f"no picture could be scored, the first because: {bad[0]}")
        return found

    whole = {} if args.sd2 else score([])
    if whole:
        print(f"{args.ckpt}: AbsRel {whole['abs_rel']:.4f}, F1 {whole['boundary_f1']:.4f} over "
              f"{args.images} pictures of {root}.\n")
    print("| left out | parameters | work | time |" + " AbsRel | F1 |" * bool(whole)
          + "\n|---|---|---|---|" + "---|---|" * bool(whole))
    costs = {}
    for name, blocks in tqdm(shown.items(), unit="block", disable=not whole):
        shares = (sum(table[block] for block in blocks) / total for table, total in (
            (weights, all_weights), (work, all_work), (took, all_seconds)))
        row = f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
        if whole:
            found = score(blocks)
            costs[name] = found["abs_rel"] / whole["abs_rel"] - 1
            row += f" {costs[name]:+.1%} | {found['boundary_f1'] / whole['boundary_f1'] - 1:+.1%} |"
        print(row, flush=True)
    if args.save and whole:
        propose(args.save, model.unet.blocks(), weights, costs, score, whole)


def propose(megabytes, blocks, weights, costs, score, whole):
    """Prints a list for --drop that saves so much, and what leaving it out costs."""
    chosen, saved = [], 0.0
    for block in sorted(blocks, key=lambda name: costs[name] / max(weights[name], 1)):
        if saved >= megabytes:
            break
        chosen.append(block)
        saved += 4 * weights[block] / 1e6
    found = score(chosen)
    print(f"\n--drop {' '.join(chosen)}\nsaves {saved:.1f} MB (float32); before distillation "
          f"AbsRel {found['abs_rel'] / whole['abs_rel'] - 1:+.1%}, "
          f"F1 {found['boundary_f1'] / whole['boundary_f1'] - 1:+.1%}.")


if __name__ == "__main__":
    job.run(main)
