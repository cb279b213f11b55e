"""Runs every command of docs/*.md in miniature: python -m docs.check [PAGE...]

Commands are the lines of ```sh blocks. They run one after another, page after page, in one folder
that has links to this project's files and small stand-ins for a reader's own files (`prepare`):
pictures, data sets, weights. Trainers run for 2 steps. Blocks of another kind (downloads, Slurm's
commands) are not run.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from data.files import write_npy, write_png
from data.hypersim import Hypersim
from engine.terminal import tell
from miniature import render
from nets.official.export import write_diffusers
from nets.depthmaster import DepthMaster
from nets.tiny import TinyDecoder, TinyEncoder

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("quickstart", "own-data", "hypersim", "metres", "formats", "memory", "reproduce",
         "tables", "reading", "faq", "clusters", "faster")
LIMIT = 300  # seconds that a command may take
SHORT = ("--steps 2 --batch 2 --micro-batch 1 --workers 0 --warmup 1 --validate-images 2 "
         "--size 96 128 --vkitti-crop 96 336 --device cpu")
OPTIONS = {"train_stage1.py": SHORT, "train_stage2.py": SHORT, "extras.train_denoising": SHORT,
           "distill.py": f"{SHORT} --width 8 --blocks 1",
           "evaluate.py": "--limit 2 --workers 0 --device cpu",
           "--paradigm denoise": "--denoise-steps 2 --ensemble 2"}
INSTEAD = {"--nproc_per_node 8": "--nproc_per_node 2", "--processing-res 0": "--processing-res 96"}


def commands(page):
    """The commands in a page's ```sh blocks, without comments; \\ joins lines."""
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line := re.sub(r"(^|\s)#.*", "", line).strip():
                yield line


def in_miniature(command):
    """The command with the options that make it short."""
    for long, short in INSTEAD.items():
        command = command.replace(long, short)
    for script, options in OPTIONS.items():
        if script in command and "--help" not in command and "--compare" not in command:
            command += f" {options}"
    return command


def prepare(folder):
    """Links to the project, and a reader's own files."""
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                               check=True).stdout.split():
        top = name.split("/")[0]
        if top not in ("weights", "runs") and not (folder / top).exists():
            (folder / top).symlink_to(ROOT / top)
    shutil.copytree(ROOT / "weights", folder / "weights")
    render.ensure(folder / "rendered", train=12, val=6, streets_train=2)
    (folder / "hypersim").symlink_to(folder / "rendered/hypersim")
    (folder / "vkitti2").symlink_to(folder / "rendered/vkitti")
    (folder / "benchmarks_root").mkdir()
    (folder / "benchmarks_root/hypersim").symlink_to(folder / "rendered/hypersim")
    (folder / "photos").mkdir()
    rooms = Hypersim(folder / "hypersim", "train", filter=False)
    for number in range(10):
        sample = rooms[number]
        image = sample["image"].permute(1, 2, 0).numpy()
        depth_m, valid = sample["depth"][0].numpy(), sample["valid"][0].numpy()
        part = "val" if number > 7 else "train"
        for kind, values in (("rgb", image), ("depth", np.round(1000 * depth_m))):
            path = folder / "mydata" / part / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, values.astype(np.uint8 if kind == "rgb" else np.uint16))
        if number < 2:
            write_png(folder / "photos" / f"{number}.png", image)
    write_png(folder / "photo.png", image)
    rows, columns = valid.nonzero()
    picks = np.linspace(0, len(rows) - 1, 12).astype(int)
    points = [f"{columns[k] + 0.5},{rows[k] + 0.5},{depth_m[rows[k], columns[k]]:.3f}"
              for k in picks]
    (folder / "points.csv").write_text("\n".join(["x,y,metres", *points, ""]))
    write_npy(folder / "lidar.npy", np.where(valid, depth_m, 0)[::2, ::2])
    from extras.video import write_clip
    write_clip(folder / "clip.mp4", 25, ((k / 25, image[:, k : k + 200]) for k in range(12)))
    write_diffusers(DepthMaster.from_file(ROOT / "weights/miniature_sd2.safetensors"),
                    folder / "stable-diffusion-2")
    write_diffusers(DepthMaster.from_file(ROOT / "weights/miniature.safetensors"),
                    folder / "DepthMaster")
    (folder / "taesd").mkdir()
    for half, kind, shift in (("encoder", TinyEncoder, 0), ("decoder", TinyDecoder, 1)):
        numbered = {re.sub(r"^\d+", lambda number: str(int(number[0]) + shift), name): tensor
                    for name, tensor in kind(width=8, blocks=1).state_dict().items()}
        save_file(numbered, folder / f"taesd/taesd_{half}.safetensors")
    shutil.copy(ROOT / "weights/miniature_dinov2.safetensors",
                folder / "weights/dinov2_vitg14.safetensors")
    shutil.copy(ROOT / "weights/miniature_sd2.safetensors", folder / "weights/sd2.safetensors")


def main():
    pages = sys.argv[1:] or PAGES
    missing = {path.stem for path in (ROOT / "docs").glob("*.md")} - set(PAGES)
    assert not missing, f"PAGES lacks {missing}"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                                "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for page in pages:
            for command in commands((ROOT / "docs" / f"{page}.md").read_text()):
                started = time.perf_counter()
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", in_miniature(command)],
                                      cwd=folder, env=environment, text=True, timeout=LIMIT,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                tell(f"{page}: {time.perf_counter() - started:5.1f} s  {command}")
                if done.returncode:
                    tell(done.stdout[-3000:])
                    sys.exit(f"docs/{page}.md: this command ends with {done.returncode}.")
    tell("All commands of the documentation run.")


if __name__ == "__main__":
    main()
