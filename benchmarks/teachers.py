"""Pre-trains a small encoder of one of Table IV's architectures, as the miniature's teacher was.

    python -m benchmarks.teachers openclip OUT.safetensors --scenes runs/tables/scenes --steps 600

It learns which objects each patch of a rendered room shows. So the rows of Table IV compare
architectures in miniature, not what the real encoders were trained on.
"""

import argparse
from pathlib import Path

import torch

from engine import job
from extras.encoders import AIMv2, OpenCLIP, SAM
from miniature.pretrain import LICENCE, TEACHER, load, train_teacher
from nets import model_file
from nets.dinov2 import DINOv2

SMALL = {
    "dinov2": (DINOv2, TEACHER),
    "openclip": (OpenCLIP, dict(width=96, depth=6, heads=3, hidden=384, grid=16)),
    "aimv2": (AIMv2, dict(width=96, depth=6, heads=3, hidden=256, grid=16)),
    "sam": (SAM, dict(width=96, depth=6, heads=3, grid=16, window=7, out=96,
                      windowed=[True, True, False] * 2)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SMALL)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=Path, default=Path("runs/tables/scenes"))
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.manual_seed(0)
    constructor, sizes = SMALL[args.kind]
    scenes = load(args.scenes, workers=1)
    # In float32, as all rows: processors without bfloat16 would take six times as long.
    teacher = train_teacher(constructor(**sizes), scenes, args.steps, seed=0, dtype=torch.float32)
    header = dict(kind=args.kind, config=sizes, sources=["python -m benchmarks.teachers"],
                  licence=LICENCE)
    model_file.save(args.out, teacher.state_dict(), header)


if __name__ == "__main__":
    job.run(main)
