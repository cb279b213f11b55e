"""What `make demo` prints at its end: one small table, one figure.

    python -m miniature.demo_table runs/demo
"""

import argparse
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np

import engine
from data.hypersim import Hypersim
from data.pictures import comparison
from data.transforms import normalise_target
from metrics import align, evaluate_dataset, mean_scores
from miniature import embedded
from nets.depthmaster import DepthMaster

SHOWN = (3, 14, 31)  # held-out frames on the figure


def scores(folder):
    return json.loads((folder / "metrics.json").read_text())["miniature"]


def print_table(rows):
    """rows: [(what, metrics of the miniature's held-out frames)]."""
    print(f"\n{'held-out frames of the miniature':<44}{'AbsRel':>8}{'delta1':>8}{'F1':>8}")
    for what, result in rows:
        print(f"{what:<44}{result['abs_rel']:8.3f}{result['delta1']:8.3f}"
              f"{result['boundary_f1']:8.3f}")
    first, last = rows[0][1]["abs_rel"], rows[-1][1]["abs_rel"]
    print(f"AbsRel after / before: {last / first:.2f}. A miniature of minutes on procedural rooms: "
          "it shows that the code works, not how good the method is.")


def mean_target_scores(count=200):
    """Scores of the mean training target, given for every image: what no network is needed for."""
    rooms = Hypersim(embedded.SCENES / "hypersim", "train", filter=False)
    chosen = [rooms[index] for index in np.linspace(0, len(rooms) - 1, count).astype(int)]
    mean = sum(normalise_target(sample["depth"], sample["valid"])[0] for sample in chosen) / count
    held_out = Hypersim(embedded.SCENES / "hypersim", "val")
    rows = evaluate_dataset(lambda sample: (mean + 1) / 2, held_out, ["sqrt_disparity"], 1e-5, 65.0)
    return mean_scores([row.scores["sqrt_disparity"] for row in rows])


def draw(model, path):
    """A row of image | truth | prediction | error for each held-out frame that is shown."""
    reader = Hypersim(embedded.SCENES / "hypersim", "val")
    rows = []
    for index in SHOWN:
        sample = reader[index]
        image = sample["image"].permute(1, 2, 0).numpy()
        depth_m, valid = sample["depth"][0], sample["valid"][0]
        aligned = align(model.predict(image), depth_m, valid, model.target).clamp(1e-5, 65)
        rows.append(comparison(image, depth_m.numpy(), aligned.numpy(), valid.numpy()))
    iio.imwrite(path, np.concatenate(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the demo: before/, stage1/, after/")
    folder = parser.parse_args().folder
    print_table([("untrained (the miniature's Stable Diffusion)", scores(folder / "before")),
                 ("the mean training target, no network", mean_target_scores()),
                 ("after stage 1, minutes", scores(folder / "after"))])
    draw(DepthMaster.from_file(folder / "stage1" / "model.safetensors"), folder / "figure.png")
    print(f"Figure: {folder / 'figure.png'}")


if __name__ == "__main__":
    engine.run(main)
