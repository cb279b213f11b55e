"""The paper's Figures 1, 5 and 6, drawn from this project's own models and scenes.

    python -m benchmarks.figures --stage1 CKPT --stage2 CKPT --denoising CKPT --scenes ROOT

figure_5.png: histograms of the three training targets. figure_6.png: the models side by side on the
frames whose textures mislead most. figure_1.png: the same, a depth edge enlarged. ROOT holds
hypersim/ and vkitti/, and pairs/ if there are real frames.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data.files import write_png
from data.sources import BENCHMARKS, find_benchmarks, locate, open_benchmark
from data.transforms import KITTI_CROP, TARGETS, BadSample, normalise_target
from engine import job
from engine.terminal import say
from evaluation.pictures import colourise, labelled, nearness
from extras.denoising import Denoiser
from metrics import align
from nets.depthmaster import DepthMaster

CROP, TIMES = 48, 4  # pixels of an enlarged edge, and how much larger
SHOWN = 4  # frames
NAMES = {"hypersim": "rooms", "vkitti": "streets", "pairs": "real frames"}


def steps(x):
    """Absolute differences to the right and the lower neighbour, summed: H,W -> H-1,W-1."""
    return np.abs(np.diff(x, axis=0))[:, :-1] + np.abs(np.diff(x, axis=1))[:-1]


def misleading(sample):
    """How much texture a frame has where its depth has no edge: posters, checkers, shadows."""
    image = sample["image"].float().mean(dim=0).numpy() / 255
    depth_m, valid = sample["depth"][0].numpy(), sample["valid"][0].numpy()
    log_depth = np.log(np.where(valid, depth_m, 1))
    flat = valid[:-1, :-1] & (steps(log_depth) < 0.02)
    return (steps(image) * flat).mean()


def sharpest(depth_m, valid):
    """(row, column) of the CROP x CROP window with the most depth edges, counted on a grid."""
    edges = steps(np.log(np.where(valid, depth_m, 1))) > 0.2
    height, width = edges.shape
    places = [(row, column) for row in range(0, height - CROP, 8)
              for column in range(0, width - CROP, 8)]
    return max(places, key=lambda place: edges[place[0]:place[0] + CROP,
                                               place[1]:place[1] + CROP].sum())


def side_by_side(sample, models):
    """{caption: uint8 H,W,3}: photo, truth and each model's aligned prediction, one scale."""
    depth_m, valid = sample["depth"][0], sample["valid"][0]
    maps = {"truth": torch.where(valid, depth_m, torch.nan)}
    for name, model in models.items():
        pred = model.predict_batch(sample["image"][None])[0].cpu()
        maps[name] = align(pred, depth_m, valid, model.target)
    near = nearness(depth_m.numpy(), valid.numpy(), [x.numpy() for x in maps.values()])
    photo = sample["image"].permute(1, 2, 0).numpy()
    return {"photo": photo, **dict(zip(maps, map(colourise, near)))}


def draw_models(samples, models, out):
    """Writes figure_6.png and figure_1.png."""
    whole, enlarged = [], []
    for sample in samples:
        pictures = side_by_side(sample, models)
        row, column = sharpest(sample["depth"][0].numpy(), sample["valid"][0].numpy())
        cut = {name: picture[row:row + CROP, column:column + CROP].repeat(TIMES, 0).repeat(TIMES, 1)
               for name, picture in pictures.items()}
        whole.append(labelled(pictures))
        enlarged.append(labelled(cut))
    write_png(out / "figure_6.png", np.concatenate(whole))
    write_png(out / "figure_1.png", np.concatenate(enlarged))


def draw_targets(readers, out):
    """Writes figure_5.png: the distribution of each target's values, -1 to 1, per data set."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, len(readers), figsize=(4 * len(readers), 3), squeeze=False)
    bins = np.linspace(-1, 1, 41)
    for axis, (name, reader) in zip(axes[0], readers.items()):
        counts = {target: np.zeros(len(bins) - 1) for target in TARGETS}
        for sample in map(reader.__getitem__, range(len(reader))):
            for target in TARGETS:
                try:
                    y = normalise_target(sample["depth"], sample["valid"], target)
                except BadSample:
                    continue
                counts[target] += np.histogram(y[sample["valid"]], bins)[0]
        for target, count in counts.items():
            axis.stairs(count / count.sum(), bins, label=target.replace("_", " "))
        axis.set_title(NAMES.get(name, name))
        axis.set_xlabel("normalised target (depth: 1 = far, else 1 = near)")
    axes[0][0].set_ylabel("share of pixels")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(out / "figure_5.png", dpi=80, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage1", type=Path, help="model after stage 1")
    add("--stage2", type=Path, help="model after stage 2")
    add("--denoising", type=Path, help="model of extras.train_denoising")
    add("--scenes", type=Path, required=True, help="folder of hypersim/, vkitti/, pairs/")
    add("--vkitti-crop", type=int, nargs=2, default=KITTI_CROP, help="(352 1216)")
    add("--denoise-steps", type=int, default=10, help="(%(default)s)")
    add("--ensemble", type=int, default=3, help="(%(default)s)")
    add("--out", type=Path, default=Path("docs/tables"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in find_benchmarks(args.scenes) if name in NAMES]
    if not names:
        raise ValueError(f"{args.scenes} holds none of hypersim/, vkitti/ and pairs/: give the "
                         "folder above them.")
    readers = {name: open_benchmark(name, locate(name, args.scenes, alone=False),
                                    tuple(args.vkitti_crop)) for name in names}
    draw_targets(readers, args.out)
    models = {}
    for name, ckpt, kind in (("denoising", args.denoising, Denoiser),
                             ("stage 1", args.stage1, DepthMaster),
                             ("stage 2", args.stage2, DepthMaster)):
        if ckpt:
            models[name] = kind.from_file(ckpt)
            models[name].steps, models[name].ensemble = args.denoise_steps, args.ensemble
    rooms = next(iter(readers.values()))
    samples = sorted(map(rooms.__getitem__, range(0, len(rooms), 2)), key=misleading)[-SHOWN:]
    draw_models(samples, models, args.out)
    say(f"Written: {args.out}/figure_1.png, figure_5.png and figure_6.png; "
        f"{BENCHMARKS[names[0]].folder}: {', '.join(sample['name'] for sample in samples)}.")


if __name__ == "__main__":
    job.run(main)
