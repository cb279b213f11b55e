"""What `make demo` prints at its end: one small table, and the paths of two figures.

    python -m miniature.demo_table runs/demo
"""

import argparse
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from data.hypersim import Hypersim
from evaluation.pictures import colourise, comparison, labelled, nearness
from data.transforms import normalise_target
from engine import job
from evaluation.loop import evaluate_dataset
from metrics import align, mean_scores
from miniature import embedded
from nets.depthmaster import DepthMaster

SHOWN = (3, 14, 31)  # held-out frames on the figures
WINDOW, ZOOM = (48, 64), 4  # the zoomed figure: pixels of the frame, and times enlarged


def scores(folder):
    return json.loads((folder / "metrics.json").read_text())["miniature"]


def print_table(rows):
    """rows: [(what, metrics of the miniature's held-out frames)]."""
    print(f"\n{'held-out frames of the miniature':<48}{'AbsRel':>8}{'delta1':>8}{'F1':>8}")
    for what, result in rows:
        print(f"{what:<48}{result['abs_rel']:8.3f}{result['delta1']:8.3f}"
              f"{result['boundary_f1']:8.3f}")


def mean_target_scores(count=200):
    """Scores of the mean training target, given for every image: what no network is needed for."""
    rooms = Hypersim(embedded.SCENES / "hypersim", "train", filter=False)
    chosen = [rooms[index] for index in np.linspace(0, len(rooms) - 1, count).astype(int)]
    mean = sum(normalise_target(sample["depth"], sample["valid"])[0] for sample in chosen) / count
    held_out = Hypersim(embedded.SCENES / "hypersim", "val")
    rows = evaluate_dataset(lambda samples: [(mean + 1) / 2] * len(samples), held_out,
                            ["sqrt_disparity"], 1e-5, 65.0)
    return mean_scores([row.scores["sqrt_disparity"] for row in rows])


def shown(models):
    """Of each frame on the figures: image uint8 H,W,3, depth_m, valid H,W, [aligned map]."""
    reader = Hypersim(embedded.SCENES / "hypersim", "val")
    for sample in (reader[index] for index in SHOWN):
        image = sample["image"].permute(1, 2, 0).numpy()
        depth_m, valid = sample["depth"][0], sample["valid"][0]
        aligned = [align(model.predict(image), depth_m, valid, model.target) for model in models]
        yield image, depth_m.numpy(), valid.numpy(), [x.clamp(1e-5, 65).numpy() for x in aligned]


def draw(model, path):
    """A row of image | truth | prediction | error for each frame."""
    rows = [comparison(image, depth_m, aligned, valid)
            for image, depth_m, valid, (aligned,) in shown([model])]
    iio.imwrite(path, np.concatenate(rows))


def draw_edges(models, path):
    """A row of image | truth | {caption: model}, enlarged where the truth has edges."""
    rows = []
    for image, depth_m, valid, aligned in shown(models.values()):
        maps = nearness(depth_m, valid, [np.where(valid, depth_m, np.nan), *aligned])
        pictures = dict(zip(("truth", *models), map(colourise, maps)))
        top, left = busiest_window(maps[0])
        rows.append(labelled({caption: enlarge(picture, top, left)
                              for caption, picture in {"image": image, **pictures}.items()}))
    iio.imwrite(path, np.concatenate(rows))


def busiest_window(x):
    """Top and left of the window of a map H,W (NaN: unknown) that has the largest differences."""
    steps = np.nan_to_num(np.abs(np.diff(x, axis=1))[:-1] + np.abs(np.diff(x, axis=0))[:, :-1])
    windows = np.lib.stride_tricks.sliding_window_view(steps, [side - 1 for side in WINDOW])
    sums = windows[::4, ::4].sum(axis=(2, 3))
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return 4 * top, 4 * left


def enlarge(picture, top, left):
    window = picture[top:top + WINDOW[0], left:left + WINDOW[1]]
    return window.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the demo: the runs and their scores")
    folder = parser.parse_args().folder
    before, stage1, stage2 = (scores(folder / f"scores_{what}")
                              for what in ("untrained", "stage1", "stage2"))
    print_table([("untrained (the miniature's Stable Diffusion)", before),
                 ("the mean training target, no network", mean_target_scores()),
                 ("after stage 1, minutes", stage1), ("after stage 2, minutes", stage2)])
    ratio = stage1["abs_rel"] / before["abs_rel"]
    print(f"AbsRel after stage 1 / untrained: {ratio:.2f}; F1 after stage 2 / stage 1: "
          f"{stage2['boundary_f1'] / stage1['boundary_f1']:.2f}. A miniature of minutes on "
          "procedural rooms: it shows that the code works, not how good the method is.")
    models = {name: DepthMaster.from_file(folder / name / "model.safetensors")
              for name in ("stage1", "stage2")}
    draw(models["stage2"], folder / "figure.png")
    draw_edges({"stage 1": models["stage1"], "stage 2": models["stage2"]}, folder / "edges.png")
    print(f"Figures: {folder / 'figure.png'}, and edges of depth enlarged, {folder / 'edges.png'}")


if __name__ == "__main__":
    job.run(main)
