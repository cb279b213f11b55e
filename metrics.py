"""Scores of a depth prediction that is known only up to scale and shift.

The protocol is that of the field (Ranftl et al., arXiv 1907.01341; Ke et al., arXiv 2312.02145):
fit scale and shift by least squares, in the space the model predicts in, turn the result into
metres, and compare. Pictures are H,W or 1,H,W tensors of any float type; all arithmetic is in
float64. `valid` is a bool mask of the same shape; valid depths are above 0.
"""

import math
from itertools import groupby
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from data.chunks import Chunks
from data.transforms import TARGETS as SPACES
from data.transforms import to_target_space

NEGATIVE = ("clamp", "square")
F1_MASKS = ("pair", "owner", "none")
SCORES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "irmse", "silog",
          "delta1", "delta2", "delta3", "boundary_f1")
MIN_DISPARITY = 1e-3  # 1/m: an aligned prediction is never farther than 1 km


def to_depth(aligned, space, negative="clamp"):
    """`space` -> depth in metres, by way of a disparity of at least 0.001/m.

    negative: what becomes of a square-root disparity below 0: `clamp` makes it 0 (far), `square`
    squares it, which turns it near again (what the released code does).
    """
    if space == "depth":
        return aligned
    if space == "sqrt_disparity":
        # Deviation: clamped by default, not squared.
        aligned = (aligned.clamp(min=0) if negative == "clamp" else aligned).square()
    return aligned.clamp(min=MIN_DISPARITY).reciprocal()


def fit_scale_shift(pred, target):
    """Least squares of scale * pred + shift to target, both N; None if they do not fix both.

    That is the case with fewer than two values and with a constant prediction.
    """
    if len(pred) < 2 or pred.min() == pred.max():
        return None
    pred_mean, target_mean = pred.mean(), target.mean()
    centred = pred - pred_mean  # before any product, or a small spread would drown in the mean
    scale = (centred * (target - target_mean)).sum() / centred.square().sum()
    return scale, target_mean - scale * pred_mean


def align(pred, depth_m, valid, space, negative="clamp"):
    """A prediction in `space`, up to scale and shift -> depth in metres, float64, same shape.

    pred may also be an array, as `DepthMaster.predict` returns it. The fit takes the valid pixels
    and, in the two disparity spaces, of these the ones predicted above 0: an exact 0 was clipped
    there and could be anything farther. Where the prediction cannot fix scale and shift (fewer than
    two such pixels, or all of the same value), the result is the flat map at the mean of the truth
    in `space` over the valid pixels. In the depth space the result may be 0 or negative; `score`
    clips it to the data set's range.
    """
    return align_if_possible(pred, depth_m, valid, space, negative)[0]


def align_if_possible(pred, depth_m, valid, space, negative="clamp"):
    """As `align`, and whether the prediction could fix scale and shift."""
    _check_choice("space", space, SPACES)
    _check_choice("negative", negative, NEGATIVE)
    if not valid.any():
        raise ValueError("the truth has no valid pixel to align to.")
    pred = torch.as_tensor(pred, device=depth_m.device).double()
    p, d = _pixels(pred, depth_m, valid if space == "depth" else valid & (pred > 0))
    fit = fit_scale_shift(p, to_target_space(d, space))
    if fit is None:
        flat = to_target_space(depth_m[valid].double(), space).mean().item()
        aligned = torch.full_like(pred, flat)
    else:
        scale, shift = fit
        aligned = scale * pred + shift
    return to_depth(aligned, space, negative), fit is not None


def _pixels(first, second, mask):
    """The pixels of two maps inside the mask, as float64, N and N; mask None: all of them."""
    if mask is not None:
        inside = mask.flatten().nonzero()[:, 0]  # found once; x[mask] would search for each map
        first, second = first.take(inside), second.take(inside)
    return first.double(), second.double()


def abs_rel(pred_m, depth_m, valid=None):
    """Mean of |p-d|/d."""
    p, d = _pixels(pred_m, depth_m, valid)
    return ((p - d).abs() / d).mean().item()


def sq_rel(pred_m, depth_m, valid=None):
    """Mean of (p-d)^2/d, in metres."""
    p, d = _pixels(pred_m, depth_m, valid)
    return ((p - d).square() / d).mean().item()


def rmse(pred_m, depth_m, valid=None):
    """Root of the mean of (p-d)^2, in metres."""
    p, d = _pixels(pred_m, depth_m, valid)
    return (p - d).square().mean().sqrt().item()


def rmse_log(pred_m, depth_m, valid=None):
    """Root of the mean of (ln p - ln d)^2."""
    p, d = _pixels(pred_m, depth_m, valid)
    return (p / d).log().square().mean().sqrt().item()


def log10(pred_m, depth_m, valid=None):
    """Mean of |log10 p - log10 d|."""
    p, d = _pixels(pred_m, depth_m, valid)
    return (p / d).log10().abs().mean().item()


def irmse(pred_m, depth_m, valid=None):
    """Root of the mean of (1/p - 1/d)^2, in 1/m."""
    p, d = _pixels(pred_m, depth_m, valid)
    return (p.reciprocal() - d.reciprocal()).square().mean().sqrt().item()


def silog(pred_m, depth_m, valid=None):
    """100 times the standard deviation of ln p - ln d (Eigen et al. 2014, KITTI's SILog)."""
    p, d = _pixels(pred_m, depth_m, valid)
    return 100 * (p / d).log().std(correction=0).item()


def delta(pred_m, depth_m, valid=None, power=1):
    """Share of pixels with max(p/d, d/p) < 1.25^power."""
    p, d = _pixels(pred_m, depth_m, valid)
    close = torch.maximum(p / d, d / p) < 1.25**power
    return close.double().mean().item()


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
    pred_m, depth_m = pred_m.flatten(), depth_m.flatten()
    valid = None if valid is None or mask == "none" else valid.flatten()
    recall, precision = torch.zeros_like(t), torch.zeros_like(t)
    for right in (True, False):  # the neighbour on the right, the one below
        step = 1 if right else width
        first = _maybe_edges(pred_m, depth_m, step)
        if right:
            first = first[(first + 1) % width != 0]  # the next row's first pixel is no neighbour
        for here, there in ((first, first + step), (first + step, first)):
            if valid is not None:
                # Deviation: by default both pixels must be valid, not the pair's own alone.
                counts = valid[here] if mask == "owner" else valid[here] & valid[there]
                here, there = here[counts], there[counts]
            ratio_p, ratio_d = (_near(x[there]) / _near(x[here]) for x in (pred_m, depth_m))
            steps_p = torch.bucketize(ratio_p, t)  # how many t the ratio is above
            steps_d = torch.bucketize(ratio_d, t)
            hits = _edges_per_step(torch.minimum(steps_p, steps_d))
            recall += hits / _edges_per_step(steps_d).clamp(min=1) / 4
            precision += hits / _edges_per_step(steps_p).clamp(min=1) / 4
    f1 = 2 * recall * precision / (recall + precision).clamp(min=1e-12)  # 0 where both are 0
    return ((f1 * t).sum() / t.sum()).item()


def _near(x_m):
    return x_m.double().clamp(min=1e-6).reciprocal()


def _maybe_edges(pred_m, depth_m, step):
    """Pixels of flat maps that may have an edge, in either map, to the pixel `step` further on.

    Few have, so a rough look in float32 saves the exact one for the rest.
    """
    differences = []
    for x in (pred_m, depth_m):
        log = x.float().clamp(min=1e-6).log()
        differences.append((log[step:] - log[:-step]).abs_())
    return (torch.maximum(*differences) > math.log(1.05) - 1e-5).nonzero()[:, 0]


def _edges_per_step(steps):
    """How many of ten t each ratio is above, N -> how many ratios are above each t, 10."""
    return torch.bincount(steps, minlength=11).flip(0).cumsum(0)[:-1].flip(0)


def score(pred, depth_m, valid, space, min_depth, max_depth, negative="clamp", f1_mask="pair"):
    """All scores of one prediction in `space` -> {name: float} in the order of SCORES.

    min_depth, max_depth: the data set's range in metres, to which the aligned prediction is
    clipped. The truth is taken as it is. ValueError without a valid pixel.
    """
    pred_m = align(pred, depth_m, valid, space, negative).clamp(min_depth, max_depth)
    return score_aligned(pred_m, depth_m, valid, f1_mask)


def score_aligned(pred_m, depth_m, valid, f1_mask="pair"):
    """All scores of a prediction in metres -> {name: float} in the order of SCORES.

    The same numbers as of the functions above, with what they share computed once.
    """
    count, invalid = (int(x.sum()) for x in (valid, ~valid))
    # Where nothing is known both are 1 m, so that every error there is 0.
    p, d = (torch.where(valid, x.double(), 1.0).flatten() for x in (pred_m, depth_m))
    error = p - d
    relative = error.abs().div_(d).sum()
    square = error.square_()
    ratio = p / d
    worst = torch.maximum(ratio, d / p)
    close = [(worst < 1.25**power).sum() - invalid for power in (1, 2, 3)]
    log_ratio = ratio.log_()
    logs, squared_logs = log_ratio.sum(), torch.dot(log_ratio, log_ratio)
    inverse = p.reciprocal_().sub_(d.reciprocal())
    sums = torch.stack([relative, square.sum(), torch.dot(square, d.reciprocal()), logs,
                        squared_logs, log_ratio.abs_().sum(), torch.dot(inverse, inverse), *close])
    (relative, squares, relative_squares, logs, squared_logs, absolute_logs, inverse_squares,
     *close) = (sums.double() / count).tolist()
    return {
        "abs_rel": relative, "sq_rel": relative_squares, "rmse": math.sqrt(squares),
        "rmse_log": math.sqrt(squared_logs), "log10": absolute_logs / math.log(10),
        "irmse": math.sqrt(inverse_squares),
        "silog": 100 * math.sqrt(max(squared_logs - logs**2, 0.0)),
        "delta1": close[0], "delta2": close[1], "delta3": close[2],
        "boundary_f1": boundary_f1(pred_m, depth_m, valid, f1_mask),
    }


class ImageScores(NamedTuple):
    """What `evaluate_dataset` says of one image."""

    image: str
    size: tuple  # height, width: of the truth, and so of the boundary F1
    scores: dict  # space -> {name of the score: float}
    unfitted: list  # spaces in which the prediction could not fix scale and shift


def evaluate_dataset(predict, reader, spaces, min_depth, max_depth, negative="clamp",
                     f1_mask="pair", chunks=None, workers=0, on_bad=None, look=None):
    """Predicts and scores the images of a reader in their order: yields ImageScores.

    predict: list of samples (dicts of the reader) of one size -> their predictions H,W, arrays or
    tensors, of the truths' size; scores are computed on their device.
    spaces: alignment spaces to score each prediction in.
    chunks: lists of the reader's indices; neighbours of one size in a list are predicted together.
        None: all images, one by one. workers: processes that read ahead.
    on_bad: called with (name, reason) for every image that cannot be read, predicted or scored
        (ValueError), which is then left out; None: the error is raised.
    look: called with (sample, aligned prediction in metres, in the first space) for every image.
    """
    def bad(name, reason):
        if on_bad is None:
            raise ValueError(reason)
        on_bad(name, reason)

    chunks = [[index] for index in range(len(reader))] if chunks is None else list(chunks)
    for chunk in DataLoader(Chunks(reader, chunks), batch_size=None, num_workers=workers):
        for sample, pred in predict_chunk(predict, chunk, bad):
            try:
                scored, pred_m = score_sample(sample, torch.as_tensor(pred), spaces, min_depth,
                                              max_depth, negative, f1_mask)
            except ValueError as error:
                bad(sample["name"], str(error))
                continue
            if look:
                look(sample, pred_m)
            yield scored


def predict_chunk(predict, chunk, bad):
    """Yields (sample, prediction) for a chunk's samples in order, without the bad ones."""
    def size(sample):
        return None if "reason" in sample else tuple(sample["image"].shape)

    for common, samples in groupby(chunk, size):
        samples = list(samples)
        try:
            if common is None:
                raise ValueError(samples[0]["reason"])
            yield from zip(samples, predict(samples))
        except ValueError as error:
            for sample in samples:
                bad(sample["name"], sample.get("reason", str(error)))


def score_sample(sample, pred, spaces, min_depth, max_depth, negative, f1_mask):
    """ImageScores of one prediction, and its depth in metres in the first space."""
    depth_m, valid = (sample[name][0].to(pred.device) for name in ("depth", "valid"))
    _check_prediction(pred, depth_m.shape, sample["name"])
    scores, unfitted, first = {}, [], None
    for space in spaces:
        pred_m, fitted = align_if_possible(pred, depth_m, valid, space, negative)
        pred_m = pred_m.clamp(min_depth, max_depth)
        scores[space] = score_aligned(pred_m, depth_m, valid, f1_mask)
        first = pred_m if first is None else first
        if not fitted:
            unfitted.append(space)
    return ImageScores(sample["name"], tuple(depth_m.shape), scores, unfitted), first


def mean_scores(scores):
    """List of {name: float} -> {name: mean}, rounded once, so it does not depend on the order."""
    return {name: math.fsum(each[name] for each in scores) / len(scores) for name in SCORES}


def _check_prediction(pred, shape, name):
    if pred.shape != shape:
        raise ValueError(f"the prediction for {name} has shape {tuple(pred.shape)}, but the depth "
                         f"map has {tuple(shape)}.")
    bad = (~pred.isfinite()).sum().item()
    if bad:
        raise ValueError(f"the prediction for {name} has {bad} values that are NaN or infinite.")


def _check_choice(what, value, choices):
    if value not in choices:
        raise ValueError(f"{what} is {value!r}, but must be one of {', '.join(choices)}.")
