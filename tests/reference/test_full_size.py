"""Stable Diffusion 2 and ViT-g at their true sizes, with random weights, against the libraries.

Not run unless asked for, as it takes long, 15 GB of disk and 12 GiB of memory:

    DEPTHMASTER_FULL=1 .venv-reference/bin/python -m pytest -s tests/reference/test_full_size.py

It prints errors, seconds and peak memory. Photos: ../shared/samples/in_the_wild beside the
checkout, or any folder in DEPTHMASTER_PHOTOS. The weights lie in pytest's --basetemp meanwhile.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
if not os.environ.get("DEPTHMASTER_FULL"):
    pytest.skip("takes long; set DEPTHMASTER_FULL=1", allow_module_level=True)

from nets.depthmaster import DepthMaster  # noqa: E402
from nets.dinov2 import DINOv2  # noqa: E402
from tests.fixtures.make_lists import SD2_TEXT, SD2_UNET, SD2_VAE, VITG  # noqa: E402
from tests.fixtures.weights import noise, relative_error  # noqa: E402
from tests.reference.test_networks import give_resized_positions  # noqa: E402

torch.set_grad_enabled(False)
ROOT = Path(__file__).parents[2]
BAR = 1e-5  # relative error
PHOTOS = Path(os.environ.get("DEPTHMASTER_PHOTOS", ROOT.parent / "shared/samples/in_the_wild"))


def randomised(network):
    """The library's own initialisation, with every bias and affine made non-trivial."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return network.eval()


def say(text):
    print("\n" + text, flush=True)


def measured(*command):
    """Runs a program: prints its seconds (elapsed, of all cores) and peak memory; it must succeed.

    The peak is the kernel's high-water mark of this process, mapped files included, read until it
    ends. The usual ru_maxrss would not do: a child inherits its parent's, and this one is large.
    """
    started, peak, finished = time.perf_counter(), 0, 0
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    while not finished:
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(0.05)
        finished, status, usage = os.wait4(process.pid, os.WNOHANG)
    elapsed, cores = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    say(f"{' '.join(map(str, command[:3]))}: {elapsed:.0f} s, {cores:.0f} core seconds, peak "
        f"{peak / 2**20:.2f} GiB")
    assert status == 0


def high_water_mark(pid):
    """Peak resident memory of a running process in KiB (Linux); 0 once it has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Stable Diffusion 2 as a diffusers folder, and converted."""
    folder = tmp_path_factory.mktemp("sd2") / "official"
    unet = randomised(diffusers.UNet2DConditionModel.from_config(SD2_UNET))
    unet.save_pretrained(folder / "unet", max_shard_size="50GB")
    del unet
    randomised(diffusers.AutoencoderKL.from_config(SD2_VAE)).save_pretrained(folder / "vae")
    config = transformers.CLIPTextConfig(**SD2_TEXT, num_hidden_layers=23, vocab_size=49408)
    randomised(transformers.CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    file = folder.parent / "sd2.safetensors"
    measured("convert_sd2.py", folder, "--out", file)
    yield folder, file
    shutil.rmtree(folder.parent)


def test_networks(stable_diffusion):
    folder, file = stable_diffusion
    ours = DepthMaster.from_file(file)
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    text = text(torch.tensor([[49406, 49407]])).last_hidden_state
    assert compared("text", ours.unet.text_embedding, text[0]) < BAR

    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    image = noise("image", (1, 3, 101, 135)) / 2
    mean = vae.encode(image).latent_dist.mean
    assert compared("VAE, encoder", ours.vae.moments(image)[0], mean) < BAR
    decoded = vae.decode(mean).sample
    assert compared("VAE, decoder", ours.vae.decode(mean * 0.18215), decoded) < BAR
    del vae

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    latent = noise("latent", (1, 4, 13, 17))
    for timestep in (1, 977):
        expected = unet(latent, timestep, text).sample
        found = ours.unet(latent, timestep=timestep)[0]
        assert compared(f"U-Net, t = {timestep}", found, expected) < BAR


def compared(what, found, expected):
    """The relative error, also printed; infinite if there is next to nothing to compare."""
    error = relative_error(found, expected)
    say(f"{what}: relative error {error:.1e} (standard deviation {expected.std():.3f})")
    return error if expected.std() > 1e-3 else float("inf")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos in {PHOTOS}")
def test_prediction(stable_diffusion, tmp_path):
    folder, file = stable_diffusion
    photos = sorted(PHOTOS.glob("*.jpg"))
    assert photos
    module = ("-m", "tests.reference.sides")
    measured(*module, "ours", file, 768, tmp_path / "ours", *photos)
    measured(*module, "diffusers", folder, 768, tmp_path / "theirs", *photos)
    for photo in photos:
        ours = np.load(tmp_path / "ours" / f"{photo.stem}.npy")
        theirs = np.load(tmp_path / "theirs" / f"{photo.stem}.npy")
        difference = np.abs(ours - theirs)
        say(f"{photo.name}: mean difference {difference.mean():.1e}, largest "
            f"{difference.max():.1e}, standard deviation {theirs.std():.3f}")
        assert difference.mean() < 1e-5 and theirs.std() > 0.02


def test_vit_giant(tmp_path):
    config = transformers.Dinov2Config(**VITG, num_hidden_layers=40)
    folder, file = tmp_path / "dinov2-giant", tmp_path / "dinov2.safetensors"
    randomised(transformers.Dinov2Model(config)).save_pretrained(folder, max_shard_size="50GB")
    measured("convert_sd2.py", folder, "--out", file)
    ours = DINOv2.from_file(file)
    for rows, columns in ((37, 37), (30, 40)):
        theirs = transformers.Dinov2Model.from_pretrained(folder).eval()
        give_resized_positions(theirs, rows, columns)
        image = noise("image", (1, 3, 14 * rows, 14 * columns))
        expected = theirs(image).last_hidden_state[:, 1:]
        del theirs
        assert compared(f"ViT-g, {14 * rows}x{14 * columns}", ours(image), expected) < BAR
    shutil.rmtree(tmp_path)
