"""For the tests of the trainers: networks of a few thousand parameters, pairs, a short run."""

import json
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import train_stage1
import train_stage2
from data.training_set import collate, open_training_set
from engine import run_folder
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from tests.test_vkitti import CROP, write_frame

VAE = dict(channels=(8, 8, 8, 16), layers=1, groups=4)
UNET = dict(channels=(8, 16), layers=1, attention=(False, True), heads=(1, 2), text_width=6,
            groups=4)
VIT = dict(width=12, depth=1, heads=2, swiglu=False, grid=4)
SHORT = ["--batch", 4, "--micro-batch", 2, "--workers", 0, "--steps", 4, "--warmup", 2, "--lr",
         1e-3, "--log-every", 1, "--validate-every", 2, "--validate-images", 2, "--save-every", 2,
         "--device", "cpu", "--precision", "float32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with sd2, stage1 and dinov2.safetensors and pairs/ (train and val)."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = DepthMaster(vae=VAE, unet=UNET, train_size=(32, 48), processing_res=48)
    model.unet.text_embedding.normal_()
    model.save(folder / "sd2.safetensors")
    model.become("stage1")
    model.save(folder / "stage1.safetensors")
    model_file.save(folder / "dinov2.safetensors", DINOv2(**VIT).state_dict(),
                    dict(kind="dinov2", config=VIT, sources=[], licence=""))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("rgb", "depth"):
            (folder / "pairs" / split / kind).mkdir(parents=True)
        for number in range(count):
            depth_m = np.linspace(1, 5 + number, 40)[:, None] + rng.random((40, 60))
            image = (255 * np.stack([depth_m / 16, rng.random((40, 60)), depth_m / 20], -1))
            iio.imwrite(folder / f"pairs/{split}/rgb/{number}.png", image.astype(np.uint8))
            np.save(folder / f"pairs/{split}/depth/{number}.npy", depth_m.astype(np.float32))
    return folder


def run(monkeypatch, script, out, *options):
    """Runs a script's main() with SHORT; a later option overrides an earlier one. Rows logged."""
    words = [f"{script.__name__}.py", "--out", out, *SHORT, *options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    script.main()
    return [json.loads(line) for line in (out / run_folder.LOG).read_text().splitlines()]


def comes_back(train, file):
    """Whether the same command, train(), writes a file that was lost again, to the byte."""
    train()
    whole = file.read_bytes()
    file.unlink()
    train()  # nothing else is left to do
    return file.read_bytes() == whole


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A folder of Virtual KITTI 2 with a few frames of 30x53 to train on and one held out."""
    folder = tmp_path_factory.mktemp("streets")
    for frame in range(5):
        write_frame(folder, frame=frame)
    write_frame(folder, scene="Scene01")
    return folder


def first_losses(objective, data, vkitti=None, size=(32, 48), dtype=torch.float32, **options):
    """{name: mean} of an objective's losses over the samples of a run's first step, one by one.

    options: of `open_training_set`.
    """
    samples = open_training_set(data, vkitti, size, batch=SHORT[1], **options)
    objective.to(memory_format=torch.channels_last)  # in bfloat16 the layout rounds differently
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        rows = [objective(collate([samples[k]])) for k in range(SHORT[1])]
    return {name: np.mean([row[name].item() for row in rows]) for name in rows[0]}


def gradient_that_adam_had(out):
    """Norm of the first step's gradient, of which Adam's first moment is a tenth."""
    moments = torch.load(out / "state.pt", weights_only=True)["optimizer"]["state"].values()
    return 10 * torch.cat([each["exp_avg"].flatten() for each in moments]).norm().item()


def opened(monkeypatch, script, train):
    """What a run, train(), reads and validates: training set, held-out reader, images, dtype."""
    found, original = [], script.read_batches

    def read_batches(training_set, *rest, **named):
        found.append(training_set)
        return original(training_set, *rest, **named)

    monkeypatch.setattr(script, "read_batches", read_batches)
    monkeypatch.setattr(script, "check", lambda model, *rest: found.extend(rest[:3]))
    train()
    return found


def compiled_calls(monkeypatch, train):
    """The modules whose calls go through what torch.compile made of them, once per call."""
    called = []

    def stand_in(function, **options):
        def counted(*arguments, **named):
            called.append(function.__self__)
            return function(*arguments, **named)
        return counted

    monkeypatch.setattr(torch, "compile", stand_in)
    train()
    return called


def interrupt(monkeypatch, steps):
    """Lets a run die after so many steps; returns a function that lets runs live again."""
    original, left = train_stage1.optimizer_step, iter(range(steps))

    def killed(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    replace_step(monkeypatch, killed)
    return lambda: replace_step(monkeypatch, original)


def replace_step(monkeypatch, function):
    """Another optimizer_step for both trainers."""
    for script in (train_stage1, train_stage2):
        monkeypatch.setattr(script, "optimizer_step", function)
