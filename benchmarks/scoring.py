"""How long one image takes to score, against the same arithmetic in plain numpy.

    python -m benchmarks.scoring [--size 480 640] [--runs 15]

One thread, float64, all metrics and the boundary F1; the two ways alternate. numpy does what is
usually done: lstsq for scale and shift, each metric on its own, one comparison per threshold and
direction of the boundary F1.
"""

import argparse
import time

import numpy as np
import torch

import metrics
from engine import terminal

RANGE = 1e-5, 80.0


def numpy_score(pred, depth_m, valid, low, high):
    """All scores of a square-root disparity prediction."""
    fitted = valid & (pred > 0)
    design = np.stack([pred[fitted], np.ones(fitted.sum())], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(design, np.sqrt(1 / depth_m[fitted]), rcond=None)
    disparity = np.maximum(np.maximum(scale * pred + shift, 0) ** 2, 1e-3)
    pred_m = np.clip(1 / disparity, low, high)
    p, d = pred_m[valid], depth_m[valid]
    ratio = np.maximum(p / d, d / p)
    log_ratio = np.log(p) - np.log(d)
    return {
        "abs_rel": np.mean(np.abs(p - d) / d), "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)), "rmse_log": np.sqrt(np.mean(log_ratio**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "irmse": np.sqrt(np.mean((1 / p - 1 / d) ** 2)), "silog": 100 * np.std(log_ratio),
        "delta1": np.mean(ratio < 1.25), "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3), "boundary_f1": numpy_f1(pred_m, depth_m, valid),
    }


def numpy_f1(pred_m, depth_m, valid):
    near_p, near_d = 1 / np.maximum(pred_m, 1e-6), 1 / np.maximum(depth_m, 1e-6)
    pairs = [(np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, 1:], np.s_[:, :-1]),
             (np.s_[:-1], np.s_[1:]), (np.s_[1:], np.s_[:-1])]
    thresholds = np.linspace(1.05, 1.25, 10)
    f1 = []
    for t in thresholds:
        recall = precision = 0.0
        for here, there in pairs:
            counts = valid[here] & valid[there]
            p = (near_p[there] / near_p[here] > t) & counts
            d = (near_d[there] / near_d[here] > t) & counts
            hits = (p & d).sum()
            recall += hits / max(d.sum(), 1) / 4
            precision += hits / max(p.sum(), 1) / 4
        f1.append(2 * recall * precision / max(recall + precision, 1e-12))
    return np.sum(np.array(f1) * thresholds) / thresholds.sum()


def scene(height, width, seed=0):
    """Prediction, truth in metres, mask: planes, boxes, some noise, holes."""
    rng = np.random.default_rng(seed)
    depth_m = np.linspace(2, 9, height)[:, None] + np.linspace(0, 3, width)
    for _ in range(25):
        top, left = rng.integers(height), rng.integers(width)
        depth_m[top:top + height // 6, left:left + width // 8] = rng.uniform(1, 10)
    pred = 1.2 / np.sqrt(depth_m) - 0.1 + 0.001 * rng.normal(size=depth_m.shape)
    return np.clip(pred, 0, 1).astype(np.float32), depth_m, rng.random(depth_m.shape) > 0.05


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=terminal.positive, nargs=2, default=(480, 640),
                        metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pred, depth_m, valid = scene(*args.size)
    tensors = torch.from_numpy(pred), torch.from_numpy(depth_m).float(), torch.from_numpy(valid)
    depth_m = tensors[1].numpy().astype(np.float64)
    ways = {
        "numpy": lambda: numpy_score(pred.astype(np.float64), depth_m, valid, *RANGE),
        "metrics.score": lambda: metrics.score(*tensors, "sqrt_disparity", *RANGE),
    }
    found = {name: way() for name, way in ways.items()}
    worst = max(abs(found["numpy"][key] - value) for key, value in found["metrics.score"].items())
    seconds = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: np.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        low, high = np.quantile(values, (0.1, 0.9))
        print(f"{name:<15}{1000 * medians[name]:8.1f} ms ({1000 * low:.1f} to {1000 * high:.1f})")
    print(f"{medians['numpy'] / medians['metrics.score']:.1f} times faster; largest difference of "
          f"a score {worst:.1e}; {args.size[0]}x{args.size[1]}, one thread, {args.runs} runs each")


if __name__ == "__main__":
    main()
