"""Trains depth by denoising, as Marigold does: the row "denoising" of the paper's Table II.

    python -m extras.train_denoising --data /hypersim [--vkitti /vkitti2]

The U-Net of Stable Diffusion 2 gets 8 input channels: the photo's latent beside the depth's noisy
latent. It learns v at a random time step, with annealed multi-resolution noise; see
extras/denoising.py. The autoencoder is frozen. Noise and time step are functions of the seed and
the sample's place, so that the same command again resumes. Options are those of train_stage1.py.
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
    add_data_options, check_data, open_held_out, open_training_set, read_batches)
from data.transforms import TARGETS
from engine import job, run_folder, terminal
from engine.progress import Steps
from engine.step import learning_rate, optimizer_step, set_learning_rate, to_device
from engine.terminal import say, tell
from evaluation.curves import draw_curves
from evaluation.loop import check
from extras.denoising import Denoiser, drawn_noise
from losses.latent import latent_loss, valid_cells
from nets.inference.precision import choose
from nets.model_file import LONGEST
from nets.ops.recompute import activation_bytes


class Denoising(nn.Module):
    """The objective: a batch -> {"v": B}."""

    def __init__(self, model, seed, strength):
        super().__init__()
        self.unet, self.vae = model.unet, model.vae.requires_grad_(False)
        self.schedule, self.seed, self.strength = model.schedule, seed, strength

    def forward(self, batch):
        """batch: a batch of samples, or the output of `frozen` for it (from the cache)."""
        fixed = batch if "z_image" in batch else self.frozen(batch)
        z_image, z_target = fixed["z_image"].float(), fixed["z_target"].float()  # B,4,h,w
        drawn = [drawn_noise(self.seed, place, z_target.shape[1:], self.schedule.steps,
                             self.strength) for place in batch["place"].tolist()]
        noise = torch.stack([noise for noise, _ in drawn]).to(z_target.device)
        t = torch.tensor([t for _, t in drawn], device=z_target.device)  # B
        noisy, v = self.schedule.noisy(z_target, noise, t)
        v_pred, _ = self.unet(torch.cat([z_image, noisy], dim=1), timestep=t)
        return {"v": latent_loss(v_pred, v, fixed["cells"])}

    @torch.no_grad()
    def frozen(self, batch):
        """The outputs of the autoencoder, as in train_stage1.py: z_image, z_target; cells."""
        image = batch["image"].float() / 127.5 - 1
        both = torch.cat([image, batch["target"].expand(-1, 3, -1, -1)])  # 2B,3,H,W
        z_image, z_target = self.vae.encode(both).chunk(2)
        return {"z_image": z_image, "z_target": z_target, "cells": valid_cells(batch["valid"])}

    def activation_bytes(self, samples, size, dtype):
        """Bytes that a micro-batch of a size (height, width) keeps for the backward pass."""
        device = self.unet.conv_in.weight.device

        def forward(side):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self.unet(torch.zeros(1, 8, side, side, device=device))

        return activation_bytes(forward, samples * math.prod(size) // 64)


def options():
    parser = argparse.ArgumentParser(
        usage="python -m extras.train_denoising [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("denoising").add_argument
    add("--sd2", type=Path, default=Path("weights/sd2.safetensors"),
        help="weights to start from (%(default)s)")
    add("--out", type=Path, default=Path("runs/denoising"), help="run folder (%(default)s)")
    add("--target", choices=TARGETS, default="depth", help="to denoise (%(default)s)")
    add("--noise-strength", type=terminal.not_negative, default=0.9,
        help="of the enlarged noise; 0: plain noise (%(default)s)")
    add("--validation-steps", type=terminal.positive, default=10,
        help="DDIM's passes while validating (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="keep the autoencoder's outputs here: remove it "
        "when pictures change")
    add("--cache-precision", choices=["float16", "float32"], default="float16",
        help="of what is kept (%(default)s)")
    add_data_options(parser, terminal.number_between(*LONGEST))
    terminal.add_training_options(parser, steps=20_000, lr=3e-5)
    return parser


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
        raise FileNotFoundError(f"{args.sd2} is not there: get Stable Diffusion 2's weights "
                                "(README, \"Weights\"), or try --sd2 "
                                "weights/miniature_sd2.safetensors.")
    model = Denoiser.from_sd2(args.sd2, args.target, args.size)
    objective = Denoising(model, args.seed, args.noise_strength)
    objective.to(ranks.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.unet.parameters(), lr=0.0, fused=True)

    pairs = pair_options(args)
    training_set = open_training_set(args.data, args.vkitti, model.train_size, args.vkitti_crop,
                                     args.target, args.seed, args.batch, args.rgb_resize, **pairs)
    held_out = open_held_out(args.data or args.vkitti, args.vkitti_crop, pairs, say)
    if args.preflight:
        return check_data(training_set, held_out, args.workers, tell)
    model.unet.checkpoint_activations = job.recompute_activations(
        args.checkpoint_activations, model.unet.parameters(), ranks, needed=lambda:
        objective.activation_bytes(args.micro_batch, training_set.largest_size(), dtype))
    content = run_folder.content((args.sd2,), model, training_set, ranks)
    decisive = run_folder.decisive(vars(args))
    decisive.pop("validation_steps")
    state = run_folder.open_run(args.out, decisive, ranks, args.extend, content,
                                args.accept_changes)
    first = run_folder.resume(args.out, state, model.unet, optimizer, args.steps, model)
    if args.cache:
        # As of stage 1 without a teacher: the two share their entries.
        settings = dict(align_at="mid", target=args.target, rgb_resize=args.rgb_resize,
                        autocast=str(dtype), kept=f"torch.{args.cache_precision}", **pairs)
        training_set = open_cache(training_set, args.cache, settings, [args.sd2])

        def frozen(batch):
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                return objective.frozen(to_device(batch, ranks.device))
        fill(training_set, frozen, getattr(torch, args.cache_precision), args.workers, ranks.rank,
             ranks.world)
        job.wait()
    if args.compile:
        model.unet.compile(dynamic=False)

    log = run_folder.Log(args.out, first, ranks, args.tensorboard)

    def look(done):
        """Validates, and draws the curves."""
        last = done == args.steps
        if held_out and (last or done % args.validate_every == 0):
            model.steps = args.validation_steps
            check(model, held_out, args.validate_images, dtype, args.out, done, log)
            model.steps = 1  # for the file's self-test
        if last or done % args.save_every == 0:
            draw_curves([args.out], args.out / "curves.png")

    def save(done):
        run_folder.save(args.out, done, model.unet, optimizer, model)

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
                runner, batches, sampler.micro_batch_count(step), args.batch, {"v": 1.0}, optimizer,
                ranks, dtype, args.clip_gradient, steps.watch)
            steps.end(outcome, rate)


if __name__ == "__main__":
    job.run(main)
