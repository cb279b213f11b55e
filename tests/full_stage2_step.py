"""One full-size step of stage 2 with and without recomputed activations; by hand.

    python -m tests.full_stage2_step FOLDER

24 GiB of memory, 4 GB of disk, ten minutes on 2 cores. Random weights of Stable Diffusion 2's size
with the Fourier block; one sample of 480x640 in float32. Two processes: one recomputes activations
and takes Adam's step, the other keeps all activations and stops at the gradients. Compared: both
losses, and the norm of the gradient of every parameter.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from nets.depthmaster import DepthMaster
from train_stage2 import Stage2


def make(folder):
    """A model file with random weights, all biases and affine parameters non-trivial."""
    file = folder / "stage2_random.safetensors"
    if file.exists():
        return file
    with torch.device("meta"):
        model = DepthMaster(unet=dict(fourier=True))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1 and "text" not in name:
            values /= tensor[0].numel() ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values *= 0.1
        tensors[name] = values
    model.load_state_dict(tensors, assign=True)
    model.kind = "stage2"
    model.save(file)
    return file


def sample():
    generator = torch.Generator().manual_seed(1)
    smooth = F.interpolate(torch.rand(2, 3, 12, 16, generator=generator), size=(480, 640),
                           mode="bicubic")
    valid = torch.ones(1, 1, 480, 640, dtype=torch.bool)
    valid[:, :, 100:131, 200:301] = False
    return {"image": (255 * smooth[:1].clamp(0, 1)).byte(), "valid": valid,
            "target": (2 * smooth[1:, :1] - 1).clamp(-1, 1)}


def step(folder, recompute):
    model = DepthMaster.from_file(make(folder))
    model.unet.checkpoint_activations = model.vae.decoder.checkpoint_activations = recompute
    optimizer = torch.optim.Adam(model.unet.parameters(), lr=3e-6, fused=True)
    started = time.perf_counter()
    losses = Stage2(model)(sample())
    (losses["pixel"] + 0.001 * losses["gradient"]).sum().backward()
    gradients = {name: parameter.grad.norm().item()
                 for name, parameter in model.unet.named_parameters()}
    if recompute:
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(losses={name: loss.item() for name, loss in losses.items()}, gradients=gradients,
                peak_gib=peak, seconds=time.perf_counter() - started)


def main(folder, recompute=None):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if recompute:
        print(json.dumps(step(folder, recompute == "recompute")))
        return
    make(folder)
    results = {}
    for way in ("recompute", "keep"):
        words = [sys.executable, "-m", "tests.full_stage2_step", folder, way]
        output = subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout
        results[way] = json.loads(output)
        print(f"{way}: losses {results[way]['losses']}, peak {results[way]['peak_gib']:.1f} GiB, "
              f"{results[way]['seconds']:.0f} s", flush=True)
    one, other = results["recompute"], results["keep"]
    worst_loss = max(abs(one["losses"][name] / value - 1)
                     for name, value in other["losses"].items())
    worst_norm = max(abs(one["gradients"][name] / value - 1) if value else one["gradients"][name]
                     for name, value in other["gradients"].items())
    print(f"largest relative difference: losses {worst_loss:.1e}, norms of "
          f"{len(one['gradients'])} gradients {worst_norm:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
