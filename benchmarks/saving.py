"""The pause of a checkpoint: seconds, bytes per second and extra memory of run_folder.save.

    python -m benchmarks.saving [--folder runs] [--runs 2]
    python -m benchmarks.saving --miniature

What is saved has random weights of Stable Diffusion 2's size: U-Net, adapter for ViT-g and Adam's
moments (state.pt, 10.5 GB) and the model file (3.8 GB). It takes 11 GB of memory and, with the
checkpoint before it, 25 GB of disk, which are given back. Training stands still meanwhile.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from engine import job, run_folder, terminal
from losses.alignment import FeatureAdapter
from miniature import embedded
from nets.depthmaster import DepthMaster

EXTRA_TARGET_GB = 1.0
TEACHER_WIDTH = 1536  # of DINOv2 ViT-g/14
PROBE = 1 << 28  # bytes that tell how fast the disk is


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs"), help="on the disk to measure (%(default)s)")
    add("--runs", type=terminal.positive, default=2, help="checkpoints (%(default)s)")
    add("--device", default="auto")
    add("--miniature", action="store_true", help="the embedded miniature")
    return parser.parse_args()


def training(device, miniature):
    """(model, what is trained, its optimizer) as stage 1 has them in the middle of a run."""
    if miniature:
        model = DepthMaster.from_file(embedded.TRAINED)
    else:
        with torch.device("meta"):
            model = DepthMaster()
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.uniform_(-0.1, 0.1)
    model.to(device, memory_format=torch.channels_last)
    adapter = FeatureAdapter(model.unet.feature_channels("mid"), TEACHER_WIDTH).to(device)
    trained = nn.ModuleDict({"unet": model.unet, "adapter": adapter})
    optimizer = torch.optim.Adam(trained.parameters(), fused=True)
    for parameter in trained.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0, device=device),
            "exp_avg": torch.rand_like(parameter), "exp_avg_sq": torch.rand_like(parameter)}
    return model, trained, optimizer


def peak_memory(reset=False):
    """The largest resident memory of this process, in bytes, since the last reset (Linux only)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(row.split()[1] for row in rows if row.startswith("VmHWM")))


def disk_speed(folder):
    """Bytes per second of writing and syncing one file."""
    content, path = os.urandom(PROBE), folder / "probe"
    started = time.perf_counter()
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return PROBE / seconds


def measure(args, folder):
    device = job.start(args.device).device
    model, trained, optimizer = training(device, args.miniature)
    print(f"{device}, torch {torch.__version__}; the disk takes "
          f"{disk_speed(folder) / 1e9:.2f} GB/s\n")
    print("| checkpoint | state.pt, GB | model.safetensors, GB | pause, s | GB/s "
          "| extra memory, GB | target |")
    print("|---|---|---|---|---|---|---|")
    for run in range(args.runs):
        before = peak_memory(reset=True)
        started = time.perf_counter()
        run_folder.save(folder, run, trained, optimizer, model)
        seconds = time.perf_counter() - started
        extra = peak_memory() - before
        state, file = ((folder / name).stat().st_size / 1e9
                       for name in (run_folder.STATE, run_folder.MODEL))
        print(f"| {run + 1} | {state:.3f} | {file:.3f} | {seconds:.3g} "
              f"| {(state + file) / seconds:.2f} | {extra / 1e9:.3f} | {EXTRA_TARGET_GB:g} |",
              flush=True)


def main():
    args = options()
    if not sys.platform.startswith("linux"):
        raise ValueError("memory is measured on Linux only.")
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    job.run(main)
