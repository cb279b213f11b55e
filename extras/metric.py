"""Metres from a prediction that is known up to scale and shift, and a few known distances.

    from extras.metric import fit
    found = fit(prediction, points)     # prediction H,W; points N,3: x, y, metres
    depth_m = found.metres(prediction)

In square-root disparity, sqrt(1/metres) = scale * prediction + shift. Errors count in relation to
the distance (1 % of 2 m is as bad as 1 % of 50 m), and gross errors do not count at all.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from data.files import read_table
from data.pairs import DEPTH_SUFFIXES, SAME_SHAPE, read_depth
from data.transforms import BadSample

POWER = {"sqrt_disparity": -2, "disparity": -1, "depth": 1}  # metres = value ** POWER
FARTHEST_M = 1000.0  # no result is farther: MIN_DISPARITY of metrics.py
FAR_TO_NEAR = 10  # assumed ratio of the farthest to the nearest depth, where nothing is known
ALIKE = 1.01  # depths whose ratio is smaller count as one depth
CERTAIN = 4  # standard deviations that a scale must have to count as known (good points: over 8)
NOISE = 0.02  # the relative error that measured distances have at least
PICKS = 2000  # random pairs of points that are tried, and points on which they are compared
GROSS = 0.3  # relative error above which an error is as bad as any larger one
MOST_POINTS = 20_000  # of a depth map; drawn at random from more
SOURCES = (".csv", *DEPTH_SUFFIXES)
COLUMNS = {"x": ("x",), "y": ("y",), "metres": ("metres", "meters", "depth")}


@dataclass(frozen=True)
class Fit:
    """What brings a prediction to metres: metres ** (1 / POWER[target]) = scale * value + shift."""

    scale: float
    shift: float
    inliers: np.ndarray    # bool N: points that the fit rests on
    residuals: np.ndarray  # float N: (the fit's metres - the point's metres) / the point's metres
    shift_assumed: bool    # the points could not tell it
    target: str = "sqrt_disparity"

    def metres(self, prediction):
        """A prediction of any shape -> depth in metres, float32, at most FARTHEST_M."""
        values = np.asarray(prediction, np.float64) * self.scale + self.shift
        return to_metres(values, self.target).astype(np.float32)

    def quality(self):
        """The median and the 90 % quantile of the inliers' relative residuals."""
        return np.quantile(np.abs(self.residuals[self.inliers]), (0.5, 0.9))

    def __str__(self):
        median, most = self.quality()
        poor = bool(most > 0.1 or self.inliers.mean() < 0.5)
        return (f"{self.inliers.sum()} of {self.inliers.size} points fit, half of them within "
                f"{100 * median:.1f} %, 90 % within {100 * most:.1f} %; scale {self.scale:.4f}, "
                f"shift {self.shift:.4f}"
                + "; they do not tell the shift, which follows from --far-to-near"
                * self.shift_assumed + "; warning: this is a poor fit, check the points" * poor)


def to_metres(values, target):
    """Values in a target space, in metres ** (1 / POWER), -> metres, at most FARTHEST_M."""
    power = POWER[target]
    low = FARTHEST_M ** (1 / power) if power < 0 else 1e-3
    return np.minimum(np.maximum(values, low) ** power, FARTHEST_M)


def fit(prediction, points, target="sqrt_disparity", far_to_near=FAR_TO_NEAR):
    """Fits scale and shift to points with known depth, robustly -> Fit. The same each time.

    prediction: float H,W in [0,1], in the space `target`. points: float N,3: x (to the right), y
    (down), in pixels, the upper left pixel's centre at 0.5, 0.5; metres along the optical axis.
    Raises ValueError if the points cannot fix it: fewer than two different depths, a constant or
    inverted prediction, points outside. If they fix the scale alone, the shift follows from the
    assumption that the farthest point is far_to_near times as far as the nearest.
    """
    points = np.asarray(points, np.float64)
    check_points(points, prediction.shape)
    power, metres = POWER[target], points[:, 2]
    known = metres ** (1 / power)
    value = sample(prediction, points)
    if not np.isfinite(value).all():
        raise ValueError(f"the prediction has no value at point {first(~np.isfinite(value))}.")
    both = np.stack([value, np.ones_like(value)], axis=1)
    (scale, shift), inliers, sigma = consensus(both, known, power)
    different(metres[inliers])
    if np.ptp(value[inliers]) < 1e-6:
        raise ValueError("the prediction has the same value at all points: give points at places "
                         "that are nearer and farther away.")
    certain = CERTAIN * scale_error(both[inliers], known[inliers], power, sigma)
    if scale < -certain:
        raise ValueError("the points are nearer where the prediction is farther: check the order "
                         "of x and y, and that they belong to this picture.")
    assumed = scale < certain
    if assumed:
        ratio = 1 / (far_to_near ** (1 / abs(power)) - 1)  # of shift to scale
        (scale,), inliers, _ = consensus(value[:, None] + ratio, known, power)
        shift = scale * ratio
    residuals = to_metres(scale * value + shift, target) / metres - 1
    return Fit(float(scale), float(shift), inliers, residuals, bool(assumed), target)


def check_points(points, size):
    """ValueError unless N points x, y, metres lie within a picture of (height, width)."""
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be N rows of x, y, metres, not of shape {points.shape}.")
    if not len(points):
        raise ValueError("there are no points.")
    bad = ~np.isfinite(points).all(axis=1) | (points[:, 2] <= 0) | (points[:, 2] > FARTHEST_M)
    if bad.any():
        raise ValueError(f"point {first(bad)} has no number, or a distance that is not between 0 "
                         f"and {FARTHEST_M:g} m.")
    outside = ((points[:, :2] < 0) | (points[:, :2] > size[::-1])).any(axis=1)
    if outside.any():
        x, y = points[outside][0, :2]
        raise ValueError(f"point {first(outside)} at x {x:g}, y {y:g} lies outside of the picture "
                         f"of {size[1]} x {size[0]} pixels.")
    different(points[:, 2])


def different(metres):
    if metres.max() < ALIKE * metres.min():
        raise ValueError(f"the points are all {np.median(metres):.3g} m away: two different depths "
                         "are needed for scale and shift.")


def first(mask):
    """The number of the first point of bool N that is true, counted from 1."""
    return int(mask.argmax()) + 1


def sample(values, points):
    """A map H,W at N points (x, y): between the four nearest pixels' centres, linearly -> N."""
    height, width = values.shape
    x = (points[:, 0] - 0.5).clip(0, width - 1)
    y = (points[:, 1] - 0.5).clip(0, height - 1)
    left, top = x.astype(int), y.astype(int)
    result = np.zeros(len(points))
    for row, part_y in ((top, 1 - (y - top)), (np.minimum(top + 1, height - 1), y - top)):
        for column, part_x in ((left, 1 - (x - left)), (np.minimum(left + 1, width - 1), x - left)):
            part = part_x * part_y
            result += np.where(part > 0, part * values[row, column], 0)  # not 0 * NaN
    return result


def consensus(columns, known, power):
    """Coefficients k with columns N,k @ coefficients = known N for most rows, inliers N, sigma.

    Of the solutions through k rows the one with the smallest errors, where gross ones count alike,
    is improved by least squares on the rows that agree with it. Errors are relative errors of
    metres = known ** power; sigma is their standard deviation over the inliers.
    """
    count, unknowns = columns.shape
    rng = np.random.default_rng(0)
    picks = np.array(list(combinations(range(count), unknowns)) if count <= 60 else
                     rng.integers(count, size=(PICKS, unknowns)))
    some = np.arange(count) if count <= PICKS else rng.integers(count, size=PICKS)
    solutions = np.einsum("pij,pj->pi", np.linalg.pinv(columns[picks]), known[picks])
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(solutions @ columns[some].T, 1e-12) / known[some])
    cost = np.minimum(np.abs(power * logs), GROSS).mean(axis=1)
    cost[solutions[:, 0] < 0] *= 2  # an inverted prediction is the less likely explanation
    coefficients, inliers = solutions[cost.argmin()], None
    weighted = columns / known[:, None]  # so that least squares counts relative errors
    for _ in range(20):
        errors = np.abs(power) * np.abs(weighted @ coefficients - 1)
        spread = 1.4826 * (1 + 5 / max(count - unknowns, 1)) * np.median(errors)
        before, inliers = inliers, errors <= min(2.5 * max(spread, NOISE), GROSS)
        if inliers.sum() < max(unknowns, 2) or np.array_equal(before, inliers):
            break
        coefficients = np.linalg.lstsq(weighted[inliers], np.ones(inliers.sum()), rcond=None)[0]
    if inliers.sum() < max(unknowns, 2):
        raise ValueError("no two points agree with the prediction.")
    rest = power * (weighted[inliers] @ coefficients - 1)
    return coefficients, inliers, np.sqrt((rest**2).sum() / max(len(rest) - unknowns, 1))


def scale_error(columns, known, power, sigma):
    """The standard deviation of the scale that least squares gives."""
    weighted = abs(power) * columns / known[:, None]
    return max(sigma, NOISE) * np.linalg.pinv(weighted.T @ weighted)[0, 0] ** 0.5


# ------------------------------------------------------------- files with known distances


def source_for(source, name):
    """The file of known distances for the picture `name`: SOURCE, or NAME with a suffix in it."""
    if not source.is_dir():
        return source
    for suffix in (*SOURCES, *map(str.upper, SOURCES)):
        if (path := source / f"{name}{suffix}").exists():
            return path
    raise BadSample(f"--metric {source} holds no {name} ({' '.join(SOURCES)}).")


def read_points(path, size, depth_scale=1000.0):
    """Known distances for a picture of (height, width) -> points float N,3: x, y, metres.

    A .csv has columns x, y, metres. Anything else is a depth map (`data.pairs.read_depth`) of any
    size and the picture's shape; its pixels with a depth are the points, MOST_POINTS at most.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    depth_m = read_depth(path, depth_scale)
    height, width = depth_m.shape
    if abs(width / height / (size[1] / size[0]) - 1) > SAME_SHAPE:
        raise BadSample(f"{path} has {width} x {height} pixels and the picture, turned upright as "
                        f"its EXIF says, {size[1]} x {size[0]}, which is another shape: turn or "
                        "cut the map.")
    there = np.isfinite(depth_m) & (depth_m > 0)
    if not there.any():
        raise BadSample(f"{path} holds no depth.")
    if np.median(depth_m[there]) > FARTHEST_M:
        raise BadSample(f"{path} holds depths of {np.median(depth_m[there]):.3g} m: give "
                        "--depth-scale, its units per metre.")
    rows, columns = np.nonzero(there & (depth_m <= FARTHEST_M))
    if len(rows) > MOST_POINTS:
        drawn = np.random.default_rng(0).choice(len(rows), MOST_POINTS, replace=False)
        rows, columns = rows[drawn], columns[drawn]
    x, y = (columns + 0.5) * size[1] / width, (rows + 0.5) * size[0] / height
    return np.stack([x, y, depth_m[rows, columns]], axis=1)


def read_csv(path):
    """A table with the columns x, y, metres -> float N,3. Decimal commas are read, too."""
    rows = [row for row in read_table(path) if any(row.values())]
    if not rows:
        raise BadSample(f"{path} holds no points: the first line must be x,y,metres, and each "
                        "further line one point.")
    found = {column: next((name for name in rows[0] if name and name.lower() in names), None)
             for column, names in COLUMNS.items()}
    if None in found.values():
        raise BadSample(f"{path} has the columns {', '.join(filter(None, rows[0]))}: its first "
                        "line must be x,y,metres.")
    points = []
    for number, row in enumerate(rows, start=1):
        try:
            points.append([float(row[name].replace(",", ".")) for name in found.values()])
        except (AttributeError, ValueError):
            raise BadSample(f"{path}: point {number} is not three numbers.") from None
    return np.array(points)
