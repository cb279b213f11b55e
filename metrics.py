"""Scores of a depth prediction that is known only up to scale and shift.

The protocol is that of the field (Ranftl et al., arXiv 1907.01341; Ke et al., arXiv 2312.02145):
fit scale and shift by least squares, in the space the model predicts in, turn the result into
metres, and compare. Pictures are H,W or 1,H,W tensors of any float type; all arithmetic is in
float64. `valid` is a bool mask of the same shape; valid depths are above 0.
"""

import math

import numpy as np
import torch

from data.transforms import TARGETS as SPACES
from data.transforms import to_target_space

METRIC = ("scale", "none")  # alignments of predictions that are depth already
ALIGNMENTS = (*SPACES, *METRIC)
NEGATIVE = ("clamp", "square")
F1_MASKS = ("pair", "owner", "none")
SCORES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "irmse", "silog",
          "delta1", "delta2", "delta3", "boundary_f1")
BLOCK = 1 << 16  # pixels
MIN_DISPARITY = 1e-3  # 1/m: an aligned prediction is never farther than 1 km


# ------------------------------------------------------------------------------- alignment


def align(pred, depth_m, valid, space, negative="clamp", fit=None):
    """A prediction in `space`, up to scale and shift -> depth in metres, float64, same shape.

    pred may also be an array, as from `DepthMaster.predict`. The fit uses the valid pixels; in the
    two disparity spaces only those predicted above 0, because an exact 0 was clipped and may stand
    for any farther depth. If the prediction does not determine scale and shift (fewer than two such
    pixels, or all of one value), the result is the flat map at the mean of the truth in `space`
    over the valid pixels. In the depth space the result may be 0 or negative; `score` clips it to
    the data set's range.
    space `scale`: pred is depth, multiplied by the ratio of the medians of truth and prediction
    over the valid pixels, as is usual for metric systems. `none`: pred is in metres, left as it is.
    negative: treatment of a square-root disparity below 0: `clamp` makes it 0 (far), `square`
    squares it, which makes it near again (as in the released code).
    fit: the result of `fit_scale_shift` for these inputs; None: computed here.
    """
    _check_choice("space", space, ALIGNMENTS)
    _check_choice("negative", negative, NEGATIVE)
    if not torch.count_nonzero(valid):
        raise ValueError("the truth has no valid pixel to align to.")
    pred = torch.as_tensor(pred, device=depth_m.device)
    if fit is None:
        fit = fit_scale_shift(pred, depth_m, valid, space) or flat(depth_m, valid, space)
    scale, shift = fit
    aligned = pred.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    for (block,) in _blocks(aligned):  # views, changed in place
        block.mul_(scale).add_(shift)
        if space == "sqrt_disparity":
            # Deviation: clamped by default, not squared.
            (block.clamp_(min=0) if negative == "clamp" else block).square_()
        if "disparity" in space:
            block.clamp_(min=MIN_DISPARITY).reciprocal_()
    return aligned


def flat(depth_m, valid, space):
    """Scale 0 and the shift that makes any prediction the mean of the truth in `space`."""
    space = space if space in SPACES else "depth"
    return 0.0, to_target_space(depth_m[valid].double(), space).mean().item()


def fit_scale_shift(pred, depth_m, valid, space):
    """Least squares of scale * pred + shift to the truth in `space`; None if undetermined.

    Scale and shift are undetermined with fewer than two pixels to fit or a constant prediction, in
    `scale` with a median that is not above 0.
    """
    if space == "none":
        return 1.0, 0.0
    if space == "scale":
        median, true = (float(np.median(x[valid].cpu())) for x in (pred, depth_m))
        return (true / median, 0.0) if median > 0 else None
    parts = []
    # One pixel's values are subtracted from all: products of nearly equal numbers lose digits.
    origin = None
    for p, d, used in _blocks(pred, depth_m, valid):
        used = used if space == "depth" else used & (p > 0)
        p, t = p.double(), to_target_space(d.double(), space)
        if origin is None:
            first = used.nonzero()[:1, 0]
            if not len(first):
                continue
            origin = p[first], t[first]
        p, t = torch.where(used, p - origin[0], 0.0), torch.where(used, t - origin[1], 0.0)
        parts.append(torch.stack([torch.count_nonzero(used).double(), p.sum(), t.sum(),
                                  torch.dot(p, p), torch.dot(p, t)]))
    if not parts:
        return None
    count, sum_p, sum_t, sum_pp, sum_pt = torch.stack(parts).sum(dim=0).tolist()
    if sum_pp == 0:  # all pixels have the same value
        return None
    scale = (sum_pt - sum_p * sum_t / count) / (sum_pp - sum_p * sum_p / count)
    if not math.isfinite(scale):  # the squares of very large values overflow
        return None
    origin_p, origin_t = (value.item() for value in origin)
    return scale, origin_t + sum_t / count - scale * (origin_p + sum_p / count)


def _blocks(*maps):
    """Flat maps in pieces that fit a core's cache (twice as fast as whole pictures), or whole."""
    size = BLOCK if maps[0].device.type == "cpu" else maps[0].numel()
    return zip(*(x.flatten().split(size) for x in maps))


# ------------------------------------------------------------------------------- scores


def pixel_scores(pred_m, depth_m, valid=None):
    """Scores over the valid pixels (None: all), prediction and truth in metres -> {name: float}.

    abs_rel: mean of |p-d|/d. sq_rel: mean of (p-d)^2/d, metres. rmse: root of the mean of (p-d)^2,
    metres. rmse_log: root of the mean of (ln p - ln d)^2. log10: mean of |log10 p - log10 d|.
    irmse: root of the mean of (1/p - 1/d)^2, 1/m. silog: 100 times the standard deviation of
    ln p - ln d (Eigen et al. 2014, KITTI's). delta1, 2, 3: share of pixels with
    max(p/d, d/p) < 1.25, 1.25^2, 1.25^3.
    """
    valid = torch.ones_like(depth_m, dtype=torch.bool) if valid is None else valid
    sums = sum(_sums(*block) for block in _blocks(pred_m, depth_m, valid)).tolist()
    count, invalid = sums[-1], valid.numel() - sums[-1]
    (relative, relative_square, square, inverse_square, log, log_square, log_absolute
     ) = (value / count for value in sums[:7])
    close = {f"delta{k}": (value - invalid) / count for k, value in enumerate(sums[7:10], 1)}
    return {
        "abs_rel": relative, "sq_rel": relative_square, "rmse": math.sqrt(square),
        "rmse_log": math.sqrt(log_square), "log10": log_absolute / math.log(10),
        "irmse": math.sqrt(inverse_square),
        "silog": 100 * math.sqrt(max(log_square - log * log, 0.0)), **close,
    }


def _sums(p, d, valid):
    """The 11 sums over a block, float64, from which `pixel_scores` computes its scores."""
    # Invalid pixels become 1 m in both maps, so that every error there is 0.
    p, d = (torch.where(valid, x.double(), 1.0) for x in (p, d))
    ratio = p / d
    worst = torch.div(d, p).clamp_(min=ratio)
    one = torch.empty_like(d)  # 0 or 1: comparing into float64 is faster than into bool
    close = [torch.lt(worst, 1.25**power, out=one).sum() for power in (1, 2, 3)]
    error = torch.sub(p, d, out=one)
    relative = torch.div(error, d, out=d)
    inverse = torch.div(relative, p, out=p)  # 1/d - 1/p
    sums = [torch.dot(relative, error), torch.dot(error, error), torch.dot(inverse, inverse)]
    log = ratio.log_()
    sums += [log.sum(), torch.dot(log, log), log.abs_().sum()]
    return torch.stack([relative.abs_().sum(), *sums, *close, torch.count_nonzero(valid).double()])


def abs_rel(pred_m, depth_m, valid=None):
    """Mean of |p-d|/d."""
    return pixel_scores(pred_m, depth_m, valid)["abs_rel"]


def delta(pred_m, depth_m, valid=None, power=1):
    """Share of pixels with max(p/d, d/p) < 1.25^power; power: 1, 2 or 3."""
    return pixel_scores(pred_m, depth_m, valid)[f"delta{power}"]


def boundary_f1(pred_m, depth_m, valid=None, mask="pair"):
    """Boundary F1 of two depth maps (Depth Pro, arXiv 2410.02073, section 3.2), without thinning.

    Between a pixel and each of its four neighbours there is an edge where the neighbour is nearer
    by more than a factor t. Recall is the share of the truth's edges that the prediction has too,
    precision the share of the prediction's that the truth has, both averaged over the four
    directions; F1 is averaged over ten t, weighted by t. It depends on the pictures' resolution.

    mask: where an edge counts: `pair`, both of its pixels are valid; `owner`, the farther pixel
    is valid (the released code's variant, in which the border of a hole counts as an edge);
    `none`, everywhere.
    """
    _check_choice("mask", mask, F1_MASKS)
    t = torch.linspace(1.05, 1.25, 10, dtype=torch.float64, device=depth_m.device)
    width = depth_m.shape[-1]
    maps = pred_m.flatten(), depth_m.flatten()
    valid = None if valid is None or mask == "none" else valid.flatten()
    right, below = _possible_edges(maps, width)
    first, second = torch.cat([right, below]), torch.cat([right + 1, below + width])
    # Of the four directions: to the right (0), down (1), to the left (2), up (3).
    direction = (second - first == width).long()
    direction = torch.cat([direction, direction + 2])
    # The number of t that the ratio of a pair exceeds.
    pairs = [[_near(x.index_select(0, at)) for at in (first, second)] for x in maps]
    steps_p, steps_d = (torch.bucketize(torch.cat([b / a, a / b]), t) for a, b in pairs)
    if valid is not None:
        # Deviation: by default both pixels must be valid, not the owner alone.
        a, b = (valid.index_select(0, at) for at in (first, second))
        counts = torch.cat([a, b] if mask == "owner" else [a & b, a & b])
        steps_p, steps_d = steps_p * counts, steps_d * counts
    edges_p, edges_d, hits = (_edges_above(steps, direction) for steps in (
        steps_p, steps_d, torch.minimum(steps_p, steps_d)))
    recall = (hits / edges_d.clamp(min=1)).mean(dim=0)
    precision = (hits / edges_p.clamp(min=1)).mean(dim=0)
    f1 = 2 * recall * precision / (recall + precision).clamp(min=1e-12)  # 0 where both are 0
    return ((f1 * t).sum() / t.sum()).item()


def _possible_edges(maps, width):
    """Pixels i that differ by about a factor of 1.05 from a neighbour in any map -> (right, below).

    right: the neighbour is i + 1; below: the neighbour is i + width. The maps are flat. Few pixels
    lie at an edge: this rough test in float32 saves the exact test for all other pixels.
    """
    factor, count = 1.05 - 1e-5, len(maps[0])
    rows = max(1, (BLOCK if maps[0].device.type == "cpu" else count) // width) * width
    right, below = [], []
    for start in range(0, count, rows):
        blocks = [x[start : start + rows + width].float().clamp(min=1e-6) for x in maps]
        for step, found in ((1, right), (width, below)):
            end = min(rows + step, len(blocks[0]))
            pairs = [(x[step:end], x[: end - step]) for x in blocks]
            change = [torch.maximum(torch.sub(a, b, alpha=factor), torch.sub(b, a, alpha=factor))
                      for a, b in pairs]
            found.append((torch.maximum(*change) > 0).nonzero()[:, 0] + start)
    right, below = torch.cat(right), torch.cat(below)
    return right[(right + 1) % width != 0], below  # the next row's first pixel is no neighbour


def _near(x_m):
    return x_m.double().clamp(min=1e-6).reciprocal()


def _edges_above(steps, direction):
    """Number of the ten t that each pair exceeds, its direction, N -> pairs above each t, 4,10."""
    # A histogram for each direction: how many pairs exceed exactly 0, 1, ... 10 of the t.
    per_step = torch.bincount(11 * direction + steps, minlength=44).view(4, 11)
    return per_step.flip(1).cumsum(1)[:, :-1].flip(1).double()


def score(pred, depth_m, valid, space, min_depth, max_depth, negative="clamp", f1_mask="pair"):
    """All scores of one prediction in `space` -> {name: float} in the order of SCORES.

    min_depth, max_depth: the data set's range in metres, to which the aligned prediction is
    clipped. The truth is taken as it is. ValueError without a valid pixel.
    """
    pred_m = align(pred, depth_m, valid, space, negative).clamp_(min_depth, max_depth)
    return score_aligned(pred_m, depth_m, valid, f1_mask)


def score_aligned(pred_m, depth_m, valid, f1_mask="pair"):
    """All scores of a prediction in metres -> {name: float} in the order of SCORES."""
    return {**pixel_scores(pred_m, depth_m, valid),
            "boundary_f1": boundary_f1(pred_m, depth_m, valid, f1_mask)}


def mean_scores(scores):
    """List of {name: float} -> {name: mean}, rounded once, so it does not depend on the order."""
    return {name: math.fsum(each[name] for each in scores) / len(scores) for name in SCORES}


def _check_choice(what, value, choices):
    if value not in choices:
        raise ValueError(f"{what} is {value!r}, but must be one of {', '.join(choices)}.")
