"""How far bfloat16 moves a prediction: mean absolute difference to float32, on [0,1].

    python -m benchmarks.precision FOLDER_OF_PHOTOS [--ckpt MODEL] [--processing-res 256 768]

Both models are made as predict.py makes them; without --ckpt it is the embedded miniature.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data.images import PICTURES, read_rgb
from engine import job, terminal
from miniature import embedded
from nets.depthmaster import DepthMaster
from storage import walk

TARGET = 0.01


def opened(path, device, precision):
    model = DepthMaster.from_file(path, device, getattr(torch, precision))
    return model.for_inference(device, precision)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("photos", type=Path, help="folder")
    add("--ckpt", type=Path, default=embedded.TRAINED)
    add("--processing-res", type=terminal.positive, nargs="+", default=[256, 768])
    add("--device", default="auto")
    args = parser.parse_args()
    photos = [args.photos / file for file in walk(args.photos) if file.lower().endswith(PICTURES)]
    if not photos:
        raise ValueError(f"{args.photos} holds no photograph: give a folder that does.")
    device = job.start(args.device).device
    models = [opened(args.ckpt, device, kind) for kind in ("float32", "bfloat16")]
    print("| photograph | longest side | mean difference | largest | target of the mean |")
    print("|---|---|---|---|---|")
    for path in photos:
        image = read_rgb(path)
        for longest in args.processing_res:
            exact, rounded = (model.predict(image, longest) for model in models)
            difference = np.abs(exact - rounded)
            print(f"| {path.name} | {longest} | {difference.mean():.4f} | {difference.max():.3f} "
                  f"| {TARGET} |", flush=True)


if __name__ == "__main__":
    job.run(main)
