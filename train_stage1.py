"""Stage 1: the U-Net learns to regress the depth latent, its features aligned with DINOv2's.

DepthMaster, arXiv 2501.02576, section III-B, Eq. 3-5 and 9. The U-Net (from Stable Diffusion 2) and
a small adapter train; the autoencoder, the text and DINOv2 (or another teacher) are frozen.

    python train_stage1.py --data /hypersim [--vkitti /vkitti2]
    torchrun --nproc_per_node 8 train_stage1.py --data /hypersim        # the same, on 8 GPUs

The same command again resumes. Without --data and --vkitti it trains the embedded miniature.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
from pathlib import Path

import torch
from torch import nn

from data.cache import fill, open_cache
from data.pairs import pair_options
from data.training_set import (
    add_data_options,
    check_data,
    open_held_out,
    open_training_set,
    read_batches,
)
from data.transforms import TARGETS
from engine import job, run_folder, terminal
from engine.progress import Steps
from engine.step import learning_rate, optimizer_step, set_learning_rate, to_device
from engine.terminal import say, tell
from losses.alignment import FeatureAdapter, feature_alignment_loss, resize_tokens, teacher_image
from losses.latent import latent_loss, valid_cells
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.inference.precision import choose
from nets.model_file import LONGEST, read_header
from nets.ops.recompute import activation_bytes
from evaluation.curves import draw_curves
from evaluation.loop import check


NO_SD2 = ("get Stable Diffusion 2's weights (README, \"Weights\"), run python convert_sd2.py "
          "FOLDER, or try --sd2 weights/miniature_sd2.safetensors.")
NO_TEACHER = ("get DINOv2's weights (README, \"Weights\"), run python convert_sd2.py FILE, or "
              "train without the encoder (--align-weight 0).")


class Stage1(nn.Module):
    """The objective: a batch -> {"latent": B, "alignment": B}, before weighting (Eq. 9)."""

    def __init__(self, model, teacher, align_at, align_loss):
        super().__init__()
        self.unet = model.unet
        self.vae = model.vae.requires_grad_(False)
        self.teacher, self.adapter = None, None
        self.align_at, self.align_loss = align_at, align_loss
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False)
            self.adapter = FeatureAdapter(self.unet.feature_channels(align_at), teacher.width)

    def forward(self, batch):
        """batch: a batch of samples, or the output of `frozen` for it (from the cache)."""
        fixed = batch if "z_image" in batch else self.frozen(batch)
        # float: the cache may hold float16
        z_pred, feature = self.unet(fixed["z_image"].float(), self.align_at)  # B,4,h,w; B,C,h',w'
        losses = {"latent": latent_loss(z_pred, fixed["z_target"], fixed["cells"])}
        if self.adapter is not None:
            adapted = self.adapter(feature.flatten(2).transpose(1, 2))  # B,N,D
            losses["alignment"] = feature_alignment_loss(adapted, fixed["tokens"], self.align_loss)
        return losses

    @torch.no_grad()
    def frozen(self, batch):
        """The outputs of the frozen networks, the same each time a sample is drawn.

        batch: image uint8 B,3,H,W; target B,1,H,W in [-1,1]; valid bool B,1,H,W ->
        z_image, z_target B,4,h,w; cells B,1,h,w; tokens B,N,D at the aligned feature's size.
        """
        image = batch["image"].float() / 127.5 - 1
        both = torch.cat([image, batch["target"].expand(-1, 3, -1, -1)])  # 2B,3,H,W
        z_image, z_target = self.vae.encode(both).chunk(2)
        fixed = {"z_image": z_image, "z_target": z_target, "cells": valid_cells(batch["valid"])}
        if self.teacher is not None:
            size = self.unet.feature_size(fixed["z_image"].shape[2:], self.align_at)
            fixed["tokens"] = self.teacher_tokens(image, size)
        return fixed

    @torch.no_grad()
    def teacher_tokens(self, image, size):
        """The encoder's tokens of the image at the aligned feature's size: B,h'*w',D."""
        image = teacher_image(image, self.teacher.patch, self.teacher.mean, self.teacher.std)
        grid = [side // self.teacher.patch for side in image.shape[2:]]
        tokens = self.teacher(image.to(next(self.teacher.parameters()).dtype))
        return resize_tokens(tokens, grid, size)

    def activation_bytes(self, samples, size, dtype):
        """Bytes that a micro-batch of a size (height, width) keeps for the backward pass."""
        device = self.unet.conv_in.weight.device

        def forward(side):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self.unet(torch.zeros(1, 4, side, side, device=device))

        return activation_bytes(forward, samples * math.prod(size) // 64)


def options():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("stage 1").add_argument
    add("--sd2", type=Path, default=Path("weights/sd2.safetensors"),
        help="weights to start from (%(default)s)")
    # Deviation: DINOv2 by default, not Depth-Anything-V2's encoder.
    add("--teacher", "--dinov2", type=Path, default=Path("weights/dinov2_vitg14.safetensors"),
        help="encoder to align with: DINOv2, OpenCLIP, AIMv2 or SAM (%(default)s)")
    add("--out", type=Path, default=Path("runs/stage1"), help="run folder (%(default)s)")
    add("--target", choices=TARGETS, default="sqrt_disparity", help="to regress, Table III "
        "(%(default)s)")
    add("--align-at", choices=["down1", "down2", "mid"], default="mid", help="Table V (mid)")
    add("--align-loss", choices=["kl", "cosine"], default="kl", help="(%(default)s)")
    add("--align-weight", type=terminal.not_negative, default=1.0,
        help="0: no encoder, Table IV (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="keep the frozen networks' outputs here: "
        "remove it when pictures change")
    add("--cache-precision", choices=["float16", "float32"], default="float16",
        help="of what is kept (%(default)s)")
    add_data_options(parser, terminal.number_between(*LONGEST))
    terminal.add_training_options(parser, steps=20_000, lr=3e-5)
    return parser


def teacher_file(sd2, teacher):
    """The encoder's file, else the small one beside small SD2 weights, else FileNotFoundError."""
    small = sd2.with_name(sd2.name.replace("_sd2", "_dinov2"))
    if not teacher.exists() and small != sd2 and small.exists():
        return small
    if not teacher.exists():
        raise FileNotFoundError(f"{teacher} is not there: {NO_TEACHER}")
    return teacher


def open_teacher(path, dtype):
    """The encoder in a file: DINOv2 or one of extras/encoders.py."""
    kind = read_header(path, kinds=("dinov2", "openclip", "aimv2", "sam"))["kind"]
    if kind == "dinov2":
        return DINOv2.from_file(path, dtype=dtype)
    from extras.encoders import NETWORKS
    return NETWORKS[kind].from_file(path, dtype=dtype)


def main():
    parser = options()
    args = parser.parse_args()
    run_folder.check_system(args.tensorboard)
    terminal.check_folder(args.out, "--out")
    if args.cache:
        terminal.check_folder(args.cache, "--cache")
    ranks = job.start(args.device)
    if not (args.data or args.vkitti):
        from miniature.embedded import stand_in
        args = stand_in(parser)
    elif not args.vkitti:
        say("No --vkitti: every sample comes from --data.")
    before = run_folder.begun_with(args.out, "precision", args.precision)
    args.precision, why = job.agreed(choose(before, ranks.device, training=True))
    say(why)
    dtype = getattr(torch, args.precision)
    torch.manual_seed(args.seed)

    if not args.sd2.exists():
        raise FileNotFoundError(f"{args.sd2} is not there: {NO_SD2}")
    model = DepthMaster.from_file(args.sd2, autoencoder="full")
    model.become("stage1", args.target, args.size)
    teacher = teacher_file(args.sd2, args.teacher) if args.align_weight else None
    objective = Stage1(model, teacher and open_teacher(teacher, dtype), args.align_at,
                       args.align_loss)
    objective.to(ranks.device, memory_format=torch.channels_last)
    weights = {"latent": 1.0} | ({"alignment": args.align_weight} if teacher else {})
    trained = nn.ModuleDict({"unet": objective.unet})
    if teacher:
        trained["adapter"] = objective.adapter
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.0, fused=True)

    pairs = pair_options(args)
    training_set = open_training_set(args.data, args.vkitti, model.train_size, args.vkitti_crop,
                                     args.target, args.seed, args.batch, args.rgb_resize, **pairs)
    held_out = open_held_out(args.data or args.vkitti, args.vkitti_crop, pairs, say)
    if args.preflight:
        return check_data(training_set, held_out, args.workers, tell)
    objective.unet.checkpoint_activations = job.recompute_activations(
        args.checkpoint_activations, objective.unet.parameters(), ranks, needed=lambda:
        objective.activation_bytes(args.micro_batch, training_set.largest_size(), dtype))
    content = run_folder.content((args.sd2, teacher), model, training_set, ranks)
    state = run_folder.open_run(args.out, run_folder.decisive(vars(args)), ranks, args.extend,
                                content, args.accept_changes)
    first = run_folder.resume(args.out, state, trained, optimizer, args.steps, model)
    if args.cache:
        settings = dict(align_at=args.align_at, target=args.target, rgb_resize=args.rgb_resize,
                        autocast=str(dtype), kept=f"torch.{args.cache_precision}", **pairs)
        training_set = open_cache(training_set, args.cache, settings,
                                  [args.sd2, teacher] if teacher else [args.sd2])

        def frozen(batch):
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                return objective.frozen(to_device(batch, ranks.device))

        fill(training_set, frozen, getattr(torch, args.cache_precision), args.workers, ranks.rank,
             ranks.world)
        objective.teacher = None  # not used any more; validation still uses the autoencoder
        job.wait()
    if args.compile:
        objective.unet.compile(dynamic=False)  # compiled again for each size

    log = run_folder.Log(args.out, first, ranks, args.tensorboard)

    def look(done):
        """Validates, and draws the curves."""
        last = done == args.steps
        if held_out and (last or done % args.validate_every == 0):
            check(model, held_out, args.validate_images, dtype, args.out, done, log)
        if last or done % args.save_every == 0:
            draw_curves([args.out], args.out / "curves.png")

    def save(done):
        run_folder.save(args.out, done, trained, optimizer, model)

    sampler = training_set.sampler(args.micro_batch, first, args.steps, ranks)
    batches = read_batches(training_set, sampler, args.workers, on_bad=lambda name, reason:
                           say(f"Replaced a bad sample: {reason}", any_rank=True))
    runner = job.parallel(objective, ranks)
    with Steps(first, args.steps, args.batch, args.log_every, args.save_every, log, ranks, save,
               look) as steps:
        for step in steps:
            rate = learning_rate(step, args.lr, args.warmup, args.decay_steps)
            set_learning_rate(optimizer, rate)
            outcome = optimizer_step(
                runner, batches, sampler.micro_batch_count(step), args.batch, weights, optimizer,
                ranks, dtype, args.clip_gradient, steps.watch)
            steps.end(outcome, rate)


if __name__ == "__main__":
    job.run(main)
