"""Stage 2: sharp depth. The U-Net, now with a Fourier Enhancement block, learns from decoded maps.

DepthMaster, arXiv 2501.02576, section III-C, Eq. 6-8 and 10. It starts from stage 1; U-Net and
Fourier block train, gradients pass through the frozen decoder.

    python train_stage2.py --data /hypersim [--vkitti /vkitti2] [--ckpt MODEL]
    torchrun --nproc_per_node 8 train_stage2.py --data /hypersim        # the same, on 8 GPUs

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

from data.pairs import pair_options
from data.training_set import (
    add_data_options,
    check_data,
    open_held_out,
    open_training_set,
    read_batches,
)
from engine import job, run_folder, terminal
from engine.progress import Steps
from engine.step import learning_rate, optimizer_step, set_learning_rate
from engine.terminal import say, tell
from losses.gradient import gradient_loss, pixel_loss
from nets.depthmaster import DepthMaster
from nets.unet import UNet
from nets.inference.precision import choose
from nets.model_file import LONGEST
from nets.ops.recompute import activation_bytes
from evaluation.curves import draw_curves
from evaluation.loop import check


class Stage2(nn.Module):
    """The objective: a batch -> {"pixel": B, "gradient": B}, before weighting (Eq. 10)."""

    def __init__(self, model):
        super().__init__()
        model.vae.requires_grad_(False)
        self.model = model

    def forward(self, batch):
        """batch: image uint8 B,3,H,W; target B,1,H,W in [-1,1]; valid bool B,1,H,W."""
        with torch.no_grad():
            z_image = self.model.vae.encode(batch["image"].float() / 127.5 - 1)
        z_pred, _ = self.model.unet(z_image.float())
        pred = self.model.decode_depth(z_pred)  # B,1,8h,8w, not clipped
        height, width = pred.shape[2:]  # below H, W if these are not multiples of 8
        target, valid = (batch[name][:, :, :height, :width] for name in ("target", "valid"))
        return {"pixel": pixel_loss(pred, target, valid),
                "gradient": gradient_loss(pred, target, valid)}

    def activation_bytes(self, samples, size, dtype):
        """Bytes that a micro-batch of a size (height, width) keeps for the backward pass."""
        device = self.model.unet.conv_in.weight.device

        def forward(side):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                z_pred, _ = self.model.unet(torch.zeros(1, 4, side, side, device=device))
                return self.model.decode_depth(z_pred)

        return activation_bytes(forward, samples * math.prod(size) // 64)


def options():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("stage 2").add_argument
    add("--ckpt", type=Path, default=Path("runs/stage1/model.safetensors"), help="stage 1's model "
        "(%(default)s), or weights/sd2.safetensors to train in one stage")
    add("--out", type=Path, default=Path("runs/stage2"), help="run folder (%(default)s)")
    add("--pixel-weight", type=terminal.not_negative, default=1.0, help="Table VI (%(default)s)")
    add("--gradient-weight", type=terminal.not_negative, default=0.001,
        help="Table VI (%(default)s)")
    add("--fourier", choices=["on", "off"], default="on", help="the block, Table VI (%(default)s)")
    add("--fourier-init", choices=["default", "identity"], default="default",
        help="of a new block; identity: at first it only normalises (%(default)s)")
    add_data_options(parser, terminal.number_between(*LONGEST))
    # Deviation: the paper's steps; the released configuration has 20,000.
    terminal.add_training_options(parser, steps=10_000, lr=3e-6)
    return parser


def main():
    parser = options()
    args = parser.parse_args()
    run_folder.check_system(args.tensorboard)
    terminal.check_folder(args.out, "--out")
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

    if not args.ckpt.exists():
        raise FileNotFoundError(
            f"{args.ckpt} is not there: run train_stage1.py first, or give its model with --ckpt "
            "(to train in one stage: --ckpt weights/sd2.safetensors).")
    model = DepthMaster.from_file(args.ckpt, autoencoder="full")
    if (args.ckpt is parser.get_default("ckpt")
            and model.unet.channels != UNet.__init__.__kwdefaults__["channels"]):
        raise ValueError(
            f"{args.ckpt} is a small model, as of the embedded miniature: train stage 1 on --data "
            f"first, or give --ckpt {args.ckpt} if it is meant.")
    if model.kind == "sd2":
        say(f"{args.ckpt} was never trained for depth: this is training in one stage.")
    if args.fourier == "on" and model.unet.fourier is None:
        model.add_fourier(args.fourier_init)
    elif args.fourier == "off" and model.unet.fourier is not None:
        raise ValueError(f"{args.ckpt} has a Fourier block already: leave out --fourier off, or "
                         "start from stage 1's model.")
    model.become("stage2", train_size=args.size)
    objective = Stage2(model).to(ranks.device, memory_format=torch.channels_last)
    weights = {"pixel": args.pixel_weight, "gradient": args.gradient_weight}
    optimizer = torch.optim.Adam(model.unet.parameters(), lr=0.0, fused=True)

    pairs = pair_options(args)
    training_set = open_training_set(args.data, args.vkitti, model.train_size, args.vkitti_crop,
                                     model.target, args.seed, args.batch, args.rgb_resize, **pairs)
    held_out = open_held_out(args.data or args.vkitti, args.vkitti_crop, pairs, say)
    if args.preflight:
        return check_data(training_set, held_out, args.workers, tell)
    recompute = job.recompute_activations(
        args.checkpoint_activations, model.unet.parameters(), ranks, needed=lambda:
        objective.activation_bytes(args.micro_batch, training_set.largest_size(), dtype))
    model.unet.checkpoint_activations = model.vae.decoder.checkpoint_activations = recompute
    content = run_folder.content((args.ckpt,), model, training_set, ranks)
    state = run_folder.open_run(args.out, run_folder.decisive(vars(args)), ranks, args.extend,
                                content, args.accept_changes)
    first = run_folder.resume(args.out, state, model.unet, optimizer, args.steps, model)
    if args.compile:
        model.unet.compile(dynamic=False)  # compiled again for each size, without the Fourier block

    log = run_folder.Log(args.out, first, ranks, args.tensorboard)

    def look(done):
        """Validates, and draws the curves."""
        last = done == args.steps
        if held_out and (last or done % args.validate_every == 0):
            check(model, held_out, args.validate_images, dtype, args.out, done, log)
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
                runner, batches, sampler.micro_batch_count(step), args.batch, weights, optimizer,
                ranks, dtype, args.clip_gradient, steps.watch)
            steps.end(outcome, rate)


if __name__ == "__main__":
    job.run(main)
