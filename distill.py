"""Distils a part of a trained model into a smaller one, which learns from the model alone.

    python distill.py --data /pictures --ckpt runs/stage2/model.safetensors --part decoder
    python distill.py --data /pictures --ckpt runs/distill/model.safetensors --part encoder --out B
    python distill.py --data /pictures --ckpt CKPT --part unet --drop mid up.0
    torchrun --nproc_per_node 8 distill.py ...        # the same, on 8 GPUs

--part decoder: a decoder of depth that does a thirtieth of the work learns the full decoder's map
of each latent: of the U-Net's and, where --data has depth, of the truth's. --part encoder: a tiny
encoder learns the full encoder's latent, and what the U-Net makes of it. --part unet: a U-Net
without the blocks in --drop, which starts with the whole one's weights, learns its latent and its
middle feature. --data is a folder of any pictures, or what the trainers take. The model in --out
holds all of --ckpt and the new part. The same command again resumes; without --data it distils the
embedded miniature.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
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
from engine import job, run_folder, terminal
from engine.progress import Steps
from engine.step import learning_rate, optimizer_step, set_learning_rate, to_device
from engine.terminal import say, tell
from evaluation.curves import draw_curves
from evaluation.loop import check
from losses.gradient import gradient_loss, pixel_loss
from losses.latent import latent_loss, relative_error
from nets.depthmaster import DepthMaster
from nets.inference.precision import choose
from nets.model_file import LONGEST
from nets.ops.recompute import activation_bytes
from nets.tiny import TinyDecoder, TinyEncoder

RATES = {"decoder": 1e-3, "encoder": 1e-3, "unet": 3e-5}  # peak learning rates


class Part(nn.Module):
    """What the three objectives have in common: a model, of which only `student` trains."""

    def __init__(self, model, student):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.student = student.requires_grad_(True)

    def forward(self, batch):
        """batch: a batch of samples, or the output of `frozen` for it (from the cache)."""
        return self.losses(batch if "z_image" in batch else self.frozen(batch))

    @torch.no_grad()
    def frozen(self, batch):
        """The whole model's outputs, the same each time a sample is drawn.

        batch: image uint8 B,3,H,W, and perhaps target B,1,H,W in [-1,1].
        """
        z_image = self.model.vae.encode(batch["image"].float() / 127.5 - 1)
        return {"z_image": z_image} | self.taught(z_image.float(), batch)

    def activation_bytes(self, samples, size, dtype):
        """Bytes that a micro-batch of a size (height, width) keeps for the backward pass."""
        device = self.model.device

        def forward(side):
            image = torch.zeros(1, 3, 8 * side, 8 * side, dtype=torch.uint8, device=device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self({"image": image, "target": image[:, :1].float()})

        return activation_bytes(forward, samples * math.prod(size) // 64)


class DecoderPart(Part):
    """-> {"pixel": B, "gradient": B}: means over a picture's one or two latents."""

    def taught(self, z_image, batch):
        z_pred, _ = self.model.unet(z_image)
        latents = [z_pred]
        if "target" in batch:
            latents.append(self.model.vae.encode(batch["target"].expand(-1, 3, -1, -1)))
        maps = [self.model.vae.decode(z).mean(dim=1) for z in latents]
        return {"latents": torch.stack(latents, 1), "maps": torch.stack(maps, 1)}  # B,K,...

    def losses(self, fixed):
        count = fixed["latents"].shape[1]
        pred = self.student(fixed["latents"].flatten(0, 1).float())
        pred = pred.mean(dim=1, keepdim=True).float()  # B*K,1,8h,8w
        target = fixed["maps"].flatten(0, 1)[:, None].float()
        everywhere = torch.ones_like(target, dtype=torch.bool)
        losses = {"pixel": pixel_loss(pred, target, everywhere),
                  "gradient": gradient_loss(pred, target, everywhere)}
        return {name: loss.view(-1, count).mean(dim=1) for name, loss in losses.items()}


class EncoderPart(Part):
    """-> {"latent": B, "prediction": B}."""

    def taught(self, z_image, batch):
        return {"image": batch["image"], "z_pred": self.model.unet(z_image)[0]}

    def losses(self, fixed):
        z_image = self.student(fixed["image"].float() / 127.5 - 1).float()
        everywhere = torch.ones_like(z_image[:, :1], dtype=torch.bool)
        z_pred, _ = self.model.unet(z_image)
        return {"latent": latent_loss(z_image, fixed["z_image"], everywhere),
                "prediction": latent_loss(z_pred, fixed["z_pred"], everywhere)}


class UNetPart(Part):
    """-> {"latent": B, "feature": B}. whole: the U-Net before blocks were dropped."""

    def __init__(self, model, student, whole):
        super().__init__(model, student)
        self.whole = whole.requires_grad_(False)

    def taught(self, z_image, batch):
        z_pred, feature = self.whole(z_image)
        return {"z_pred": z_pred, "feature": feature}

    def losses(self, fixed):
        z_pred, feature = self.student(fixed["z_image"].float())
        everywhere = torch.ones_like(z_pred[:, :1], dtype=torch.bool)
        return {"latent": latent_loss(z_pred, fixed["z_pred"], everywhere),
                "feature": relative_error(feature, fixed["feature"])}


def options():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("distillation").add_argument
    add("--ckpt", type=Path, default=Path("runs/stage2/model.safetensors"),
        help="the trained model (%(default)s)")
    add("--part", choices=["decoder", "encoder", "unet"], default="decoder",
        help="(%(default)s; the unet's --lr is 3e-5)")
    add("--drop", nargs="+", metavar="BLOCK", default=[], help="of the U-Net, as up.0.attentions.1 "
        "or mid")
    add("--out", type=Path, default=Path("runs/distill"), help="run folder (%(default)s)")
    add("--width", type=terminal.positive, default=64, help="channels of a new tiny network "
        "(%(default)s)")
    add("--blocks", type=terminal.positive, default=3, help="per size of a new tiny network "
        "(%(default)s)")
    add("--gradient-weight", type=terminal.not_negative, default=1.0,
        help="decoder: of the directional gradients beside the pixels (%(default)s)")
    add("--prediction-weight", type=terminal.not_negative, default=1.0,
        help="encoder: of what the U-Net makes of its latent (%(default)s)")
    add("--feature-weight", type=terminal.not_negative, default=0.1,
        help="unet: of the middle feature (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="keep the model's outputs here: remove it when "
        "pictures change")
    add("--cache-precision", choices=["float16", "float32"], default="float16",
        help="of what is kept (%(default)s)")
    add_data_options(parser, terminal.number_between(*LONGEST))
    terminal.add_training_options(parser, steps=20_000, lr=RATES["decoder"])
    return parser


def objective_of(model, part, drop, width, blocks):
    """The objective for a part; the model then holds the student, too.

    A tiny network that the model has goes on learning, but for TAESD's decoder of pictures.
    """
    sizes = dict(width=width, blocks=blocks)
    if part == "unet":
        whole = copy.deepcopy(model.unet)
        model.unet.drop(drop)
        model.config["unet"]["drop"] = [*model.config["unet"].get("drop", ()), *drop]
        return UNetPart(model, model.unet, whole)
    if part == "encoder":
        if not model.tiny_encoder:
            model.add_tiny("tiny_encoder", TinyEncoder(**sizes), sizes)
        return EncoderPart(model, model.tiny_encoder)
    if not model.config.get("tiny_decoder", {}).get("half_size"):
        sizes["half_size"] = True
        model.add_tiny("tiny_decoder", TinyDecoder(**sizes), sizes)
    return DecoderPart(model, model.tiny_decoder)


def main():
    parser = options()
    parser.set_defaults(lr=RATES[parser.parse_args().part])
    args = parser.parse_args()
    if bool(args.drop) != (args.part == "unet"):
        parser.error("--part unet needs --drop BLOCK..., and no other part takes it")
    run_folder.check_system(args.tensorboard)
    terminal.check_folder(args.out, "--out")
    if args.cache:
        terminal.check_folder(args.cache, "--cache")
    ranks = job.start(args.device)
    if not (args.data or args.vkitti):
        from miniature.embedded import stand_in
        args = stand_in(parser)
    before = run_folder.begun_with(args.out, "precision", args.precision)
    args.precision, why = job.agreed(choose(before, ranks.device, training=True))
    say(why)
    dtype = getattr(torch, args.precision)
    torch.manual_seed(args.seed)

    if not args.ckpt.exists():
        raise FileNotFoundError(f"{args.ckpt} is not there: give a trained model with --ckpt (to "
                                "try it: --ckpt weights/miniature.safetensors).")
    model = DepthMaster.from_file(args.ckpt)
    if model.vae is None:
        raise ValueError(f"{args.ckpt} has only the tiny autoencoder: give the file that it was "
                         "made from, whose full one teaches.")
    model.become(model.kind, train_size=args.size)
    objective = objective_of(model, args.part, args.drop, args.width, args.blocks)
    objective.to(ranks.device, memory_format=torch.channels_last)
    student = objective.student
    weights = {"decoder": {"pixel": 1.0, "gradient": args.gradient_weight},
               "encoder": {"latent": 1.0, "prediction": args.prediction_weight},
               "unet": {"latent": 1.0, "feature": args.feature_weight}}[args.part]
    optimizer = torch.optim.Adam(student.parameters(), lr=0.0, fused=True)

    pairs = pair_options(args)
    training_set = open_training_set(
        args.data, args.vkitti, model.train_size, args.vkitti_crop, model.target, args.seed,
        args.batch, args.rgb_resize, pictures=True, **pairs)
    readers = [type(source).__name__ for source in training_set.sources]
    held_out = None
    if readers == ["FolderOfPictures"]:
        say(f"{args.data} is a folder of pictures without depth: no validation during training.")
    else:
        held_out = open_held_out(args.data or args.vkitti, args.vkitti_crop, pairs, say)
    if args.preflight:
        return check_data(training_set, held_out, args.workers, tell)
    recompute = job.recompute_activations(
        args.checkpoint_activations, student.parameters(), ranks, needed=lambda:
        objective.activation_bytes(args.micro_batch, training_set.largest_size(), dtype))
    model.unet.checkpoint_activations = student.checkpoint_activations = recompute
    content = run_folder.content((args.ckpt,), model, training_set, ranks)
    decisive = run_folder.decisive(vars(args)) | {"readers": readers}  # whether there is depth
    state = run_folder.open_run(args.out, decisive, ranks, args.extend, content,
                                args.accept_changes)
    first = run_folder.resume(args.out, state, student, optimizer, args.steps, model)
    if args.cache:
        settings = dict(part=args.part, readers=readers, target=model.target, autocast=str(dtype),
                        rgb_resize=args.rgb_resize, kept=f"torch.{args.cache_precision}", **pairs)
        training_set = open_cache(training_set, args.cache, settings, [args.ckpt])

        def frozen(batch):
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                return objective.frozen(to_device(batch, ranks.device))

        fill(training_set, frozen, getattr(torch, args.cache_precision), args.workers, ranks.rank,
             ranks.world)
        job.wait()
    if args.compile:
        student.compile(dynamic=False)  # compiled again for each size

    log = run_folder.Log(args.out, first, ranks, args.tensorboard)

    def look(done):
        """Validates, and draws the curves."""
        last = done == args.steps
        if held_out and (last or done % args.validate_every == 0):
            check(model, held_out, args.validate_images, dtype, args.out, done, log)
        if last or done % args.save_every == 0:
            draw_curves([args.out], args.out / "curves.png")

    def save(done):
        run_folder.save(args.out, done, student, optimizer, model)

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
