"""What the scripts fall back to when they are called with neither weights nor data.

The small models in weights/, and scenes that are rendered into miniature/scenes when first needed.
"""

from pathlib import Path

from data.training_set import check_folder
from engine import job, terminal
from engine.terminal import say
from miniature import render
from nets import model_file
from nets.depthmaster import KINDS
from nets.unet import UNet

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
SD2 = WEIGHTS / "miniature_sd2.safetensors"
DINOV2 = WEIGHTS / "miniature_dinov2.safetensors"
TRAINED = WEIGHTS / "miniature.safetensors"
SCENES = Path(__file__).resolve().parent / "scenes"
FRAMES = dict(train=960, val=48, streets_train=50, streets_val=8)

CROP = dict(vkitti_crop=(96, 336))  # of the embedded streets
# A run of minutes on two cores in place of the paper's days.
STAGE1 = dict(steps=590, batch=16, micro_batch=8, lr=1.4e-3, warmup=30, decay_steps=850,
              cache=Path(__file__).resolve().parent / "cache",
              validate_every=590, save_every=295)
STAGE2 = dict(steps=60, batch=8, micro_batch=4, lr=1e-4, warmup=10, decay_steps=60,
              validate_every=60, save_every=30)


def scenes():
    """Renders the scenes that are absent; returns the folder that holds hypersim/ and vkitti/."""
    if terminal.is_first():
        render.ensure(SCENES, **FRAMES)
    job.wait()
    return SCENES


def training_data(data, vkitti):
    """(data, vkitti) as given, or the embedded scenes if neither was.

    FileNotFoundError if a folder that was given is not there.
    """
    for folder in (data, vkitti):
        if folder:
            check_folder(folder)
    if data and not vkitti:
        say("No --vkitti: every sample comes from --data.")
    if data or vkitti:
        return data, vkitti
    say(f"No --data: training on the embedded scenes in {SCENES}.")
    folder = scenes()
    return folder / "hypersim", folder / "vkitti"


def base_weights(data_given, sd2):
    """The file to start stage 1 from: as given, SD2's if there, the miniature's without data."""
    if sd2:
        return sd2
    official = Path("weights/sd2.safetensors")
    if data_given and not official.exists():
        raise FileNotFoundError(
            f"{official} is not there: get Stable Diffusion 2's weights (README, \"Weights\"), run "
            "python convert_sd2.py FOLDER, or try --sd2 weights/miniature_sd2.safetensors.")
    if not data_given:
        say(f"No --sd2: starting from the embedded miniature, {SD2.name}.")
    return official if data_given else SD2


def stage1_weights(data_given, ckpt):
    """The file to start stage 2 from: as given, else stage 1's (without data: the miniature's)."""
    if ckpt:
        return ckpt
    if not data_given:
        say(f"No --ckpt: starting from the embedded miniature, {SD2.name}.")
        return SD2
    stage1 = Path("runs/stage1/model.safetensors")
    if not stage1.exists():
        raise FileNotFoundError(
            f"{stage1} is not there: run train_stage1.py first, or give its model with --ckpt (to "
            "train in one stage: --ckpt weights/sd2.safetensors).")
    sizes = model_file.read_header(stage1, kinds=KINDS)["config"]["unet"]
    official = UNet.__init__.__kwdefaults__["channels"]
    if tuple(sizes.get("channels", official)) != official:
        raise ValueError(
            f"{stage1} is a small model, as of the embedded miniature: train stage 1 on --data "
            f"first, or give --ckpt {stage1} if it is meant.")
    return stage1


def teacher_weights(sd2, dinov2):
    """The encoder to align with: as given, else ViT-g, or the miniature's beside the miniature."""
    if dinov2:
        return dinov2
    if Path(sd2).resolve() == SD2:
        return DINOV2
    official = Path("weights/dinov2_vitg14.safetensors")
    if not official.exists():
        raise FileNotFoundError(
            f"{official} is not there: get DINOv2's weights (README, \"Weights\"), run python "
            "convert_sd2.py FILE, or train without the encoder (--align-weight 0).")
    return official
