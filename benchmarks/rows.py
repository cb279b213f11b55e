"""The rows of the paper's Tables I to VI and of the open questions: what trains and scores each.

A model is trained once and may stand in several tables. Words in braces are filled in by a scale:
`full` is the paper's, `miniature` runs on two cores.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class Model(NamedTuple):
    """A training run. kind: of the run, which decides its steps; variant: see variants.py."""

    kind: str  # "stage1", "denoising", "stage2" or "more" (stage 1 again, the control)
    options: str = ""
    variant: str = ""


class Entry(NamedTuple):
    """A row of a table. paper: {score: published figure}, AbsRel of KITTI and F1 of Hypersim.

    unequal: why it can't be compared with the others in miniature, if so.
    """

    label: str
    model: str
    options: str = ""  # of evaluate.py
    paper: dict = {}
    unequal: str = ""


STAGE1 = "train_stage1.py --sd2 {sd2}"
KINDS = {
    "stage1": STAGE1,
    "denoising": "-m extras.train_denoising --sd2 {sd2}",
    "stage2": "train_stage2.py --ckpt {stage1}",
    "more": "train_stage1.py --sd2 {stage1} --teacher {dinov2}",
}
ALONE = "--align-weight 0"
WITH = "--teacher {dinov2}"
MODELS = {
    "depth": Model("stage1", f"{ALONE} --target depth"),
    "disparity": Model("stage1", f"{ALONE} --target disparity"),
    "square_root": Model("stage1", ALONE),
    "denoising": Model("denoising"),
    "down1": Model("stage1", f"{WITH} --align-at down1"),
    "down2": Model("stage1", f"{WITH} --align-at down2"),
    "middle": Model("stage1", WITH),
    "control": Model("more"),
    "one_stage": Model("stage2", "--ckpt {sd2}"),
    "pixel": Model("stage2", "--gradient-weight 0 --fourier off"),
    "gradient": Model("stage2", "--fourier off"),
    "full": Model("stage2"),
    "as_dinov2": Model("stage1", "--teacher {teachers}/dinov2{size_dinov2}.safetensors"),
    "as_openclip": Model("stage1", "--teacher {teachers}/openclip{size_openclip}.safetensors"),
    "as_aimv2": Model("stage1", "--teacher {teachers}/aimv2{size_aimv2}.safetensors"),
    "as_sam": Model("stage1", "--teacher {teachers}/sam{size_sam}.safetensors"),
    "cosine": Model("stage1", f"{WITH} --align-loss cosine"),
    "identity": Model("stage2", "--fourier-init identity"),
    "plain_convolutions": Model("stage2", variant="plain_convolutions"),
    "zero_filled": Model("stage2", variant="zero_filled"),
    "power_1_3": Model("stage1", ALONE, "power_1_3"),
    "power_2_3": Model("stage1", ALONE, "power_2_3"),
    "log": Model("stage1", ALONE, "log"),
    "neighbours": Model("stage1", ALONE, "filled_with_neighbours"),
    "bfloat16": Model("stage2", "--precision bfloat16"),
    "last_bfloat16": Model("stage2", "--precision bfloat16", "last_convolution_in_bfloat16"),
}
SCORES = {"abs_rel": "AbsRel", "boundary_f1": "F1"}
DENOISE = "--paradigm denoise {denoise}"

# Examined causes of disagreements, by table; they come into docs/tables.md.
CAUSES = {}
# The first entry of a table is the one that the others are compared with.
TABLES = {
    "I": ("The whole method", [
        Entry("stage 1", "start", "", {"abs_rel": 0.083, "boundary_f1": 0.309}),
        Entry("stage 1 for as long as stage 2 (control)", "control"),
        Entry("stage 2 (DepthMaster)", "full", "", {"abs_rel": 0.082, "boundary_f1": 0.337}),
    ]),
    "II": ("Paradigms, the target is depth", [
        Entry("single pass", "depth", "", {"abs_rel": 0.103, "boundary_f1": 0.304}),
        Entry("the truth through the autoencoder (I2L)", "depth", "--paradigm i2l",
              {"boundary_f1": 0.615}),
        Entry("iterative, 4 passes", "depth", "--paradigm iterative",
              {"abs_rel": 0.100, "boundary_f1": 0.310}),
        Entry("denoising", "denoising", DENOISE, {"abs_rel": 0.104, "boundary_f1": 0.274}),
    ]),
    "III": ("Targets, no alignment of features", [
        Entry("square-root disparity", "square_root", "", {"abs_rel": 0.087, "boundary_f1": 0.306}),
        Entry("disparity", "disparity", "", {"abs_rel": 0.089}),
        Entry("depth", "depth", "", {"abs_rel": 0.103, "boundary_f1": 0.304}),
    ]),
    **{f"III: in {space}": (f"Targets, all aligned in {space.replace('_', ' ')}", [
        Entry(label, model, "" if space == own else f"--align {space}")
        for label, model, own in (("square-root disparity", "square_root", "sqrt_disparity"),
                                  ("disparity", "disparity", "disparity"),
                                  ("depth", "depth", "depth"))])
       for space in ("sqrt_disparity", "disparity", "depth")},
    "IV": ("Encoders", [
        Entry("none", "square_root", "", {"abs_rel": 0.087, "boundary_f1": 0.306}),
        Entry("DINOv2", "as_dinov2", "", {"abs_rel": 0.083, "boundary_f1": 0.309}),
        Entry("OpenCLIP", "as_openclip"),
        Entry("AIMv2", "as_aimv2"),
        Entry("SAM", "as_sam"),
    ]),
    "V": ("Where the features are aligned", [
        Entry("nowhere", "square_root", "", {"abs_rel": 0.087, "boundary_f1": 0.306}),
        Entry("down1", "down1"),
        Entry("down2", "down2"),
        Entry("middle block", "middle", "", {"abs_rel": 0.083, "boundary_f1": 0.309}),
    ]),
    "VI": ("Detail", [
        Entry("stage 1 for as long (control)", "control"),
        Entry("one stage: stage 2 from Stable Diffusion", "one_stage", unequal="it begins from the "
              "base, the others from a stage 1 that was trained for long before"),
        Entry("pixel loss", "pixel"),
        Entry("pixel and gradient loss", "gradient", "", {"abs_rel": 0.084, "boundary_f1": 0.330}),
        Entry("pixel and gradient loss, Fourier block", "full", "",
              {"abs_rel": 0.082, "boundary_f1": 0.337}),
    ]),
    "open: target": ("Is there a better target? depth to the power of", [
        Entry("-1/2 (the paper's)", "square_root"),
        Entry("0 (the logarithm)", "log"),
        Entry("-1/3", "power_1_3"),
        Entry("-2/3", "power_2_3"),
        Entry("-1/2, invalid pixels from their neighbours", "neighbours"),
    ]),
    "open: stage 1": ("How features are aligned", [
        Entry("KL divergence (the paper's)", "middle"),
        Entry("cosine", "cosine"),
    ]),
    "open: stage 2": ("What the Fourier block and the mask do", [
        Entry("default init, mask of pairs", "full"),
        Entry("identity init", "identity"),
        Entry("plain convolutions, as many", "plain_convolutions"),
        Entry("released mask, invalid pixels 0", "zero_filled"),
    ]),
    "open: precision": ("The decoder's last convolution in stage 2, the rest in bfloat16", [
        Entry("in float32", "bfloat16"),
        Entry("in bfloat16", "last_bfloat16"),
    ]),
}


@dataclass
class Scale:
    """How large the experiments are; the words in braces of a command, and its other options."""

    words: dict
    options: dict  # kind: options of its training runs
    evaluation: str
    start: str = ""  # the model that stage 2 begins with
    notes: dict = field(default_factory=dict)  # kind: hours and memory, in words
    same: dict = field(default_factory=dict)  # models that are others at this scale


def training(name, scale, seed, out):
    """The words of the command that trains a model, after `python`."""
    model = MODELS[name]
    words = f"{KINDS[model.kind]} {scale.options[model.kind]} {model.options}"
    if model.variant:
        words = f"-m benchmarks.variants {model.variant} {words}"
    return f"{words} --seed {seed} --out {out}".format(**scale.words).split()


def scoring(entry, scale, ckpt, out):
    """The words of the command that scores a row, after `python`."""
    variant = MODELS[entry.model].variant if entry.model in MODELS else ""
    words = f"evaluate.py --ckpt {ckpt} {scale.evaluation} {entry.options} --out {out}"
    if variant:
        words = f"-m benchmarks.variants {variant} {words}"
    return words.format(**scale.words).split()


def key(entry):
    """The name of a row's scores: equal rows of two tables have one."""
    return f"{entry.model} {entry.options}".strip()
