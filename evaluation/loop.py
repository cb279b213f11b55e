"""Predicts and scores the images of a data set; validation during training is the same loop."""

import shutil
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.files import write_png
from data.images import read_rgb
from data.loading import Chunks, read_ahead
from data.sources import BENCHMARKS
from engine.terminal import say
from evaluation.pictures import comparison
from metrics import align, fit_scale_shift, mean_scores, score_aligned
from storage import whole

SHOWN = 4  # images on a picture


class ImageScores(NamedTuple):
    """The result of `evaluate_dataset` for one image."""

    image: str
    size: tuple  # height, width of the truth; boundary F1 depends on it
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
    for chunk in read_ahead(Chunks(reader, chunks), workers, batch_size=None):
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
    pred = pred.cpu() if pred.device.type == "mps" else pred  # MPS lacks float64
    depth_m, valid = (sample[name][0].to(pred.device) for name in ("depth", "valid"))
    check_prediction(pred, depth_m.shape, sample["name"])
    scores, unfitted, first = {}, [], None
    for space in spaces:
        fit = fit_scale_shift(pred, depth_m, valid, space)
        pred_m = align(pred, depth_m, valid, space, negative, fit).clamp_(min_depth, max_depth)
        scores[space] = score_aligned(pred_m, depth_m, valid, f1_mask)
        first = pred_m if first is None else first
        if fit is None:
            unfitted.append(space)
    return ImageScores(sample["name"], tuple(depth_m.shape), scores, unfitted), first


def check_prediction(pred, shape, name):
    if pred.shape != shape:
        raise ValueError(f"the prediction for {name} has shape {tuple(pred.shape)}, but the depth "
                         f"map has {tuple(shape)}.")
    bad = (~pred.isfinite()).sum().item()
    if bad:
        raise ValueError(f"the prediction for {name} has {bad} values that are NaN or infinite.")


# ---------------------------------------------------------------------- while a stage trains


def check(model, reader, images, dtype, folder, step, log):
    """Validates after a step; writes a picture, a row of the log and a line on the terminal.

    The picture is kept in pictures/, and the latest one is validation.png, too.
    """
    picture = folder / "pictures" / f"{step:06d}.png"
    bad = []
    scores = validate(model, reader, images, dtype, picture, bad)
    if bad:
        say(f"Step {step}: {len(bad)} validation samples can't be used, the first because: "
            f"{bad[0]}")
    if not scores:
        return
    log.write({"step": step, "validation": scores, "left_out": len(bad)})
    with whole(folder / "validation.png") as temporary:
        shutil.copyfile(picture, temporary)
    log.show(step, read_rgb(picture))
    say(f"Step {step}, validation: AbsRel {scores['abs_rel']:.3f}, "
        f"delta1 {scores['delta1']:.3f}, boundary F1 {scores['boundary_f1']:.3f}; "
        f"see {picture}.")


def validate(model, reader, images, dtype, picture=None, bad=None):
    """Mean scores {name: float} of `images` samples spread over the reader; {} if none is usable.

    Scored as evaluate.py scores the reader's set: at its resolution, in its range of depth.
    model: a DepthMaster; dtype: autocast's. picture: a file for the first few samples, one row
    each: image, truth, prediction, error. bad: a list that gets the reason per unusable sample.
    """
    rows, protocol = [], BENCHMARKS[reader.benchmark]

    def predict(samples):
        images = torch.stack([sample["image"] for sample in samples])
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            return model.predict_batch(images, protocol.processing_res)

    def left_out(name, reason):
        if bad is not None:
            bad.append(reason)

    def look(sample, pred_m):
        if len(rows) < SHOWN:
            image, depth_m, valid = (sample[name].numpy() for name in ("image", "depth", "valid"))
            rows.append(comparison(image.transpose(1, 2, 0), depth_m[0], pred_m.cpu().numpy(),
                                   valid[0]))

    was_training = model.training
    model.eval()
    indices = sorted({int(i) for i in np.linspace(0, len(reader) - 1, images)})
    scored = [row.scores[model.target] for row in evaluate_dataset(
        predict, reader, [model.target], protocol.min_depth, protocol.max_depth,
        chunks=[[index] for index in indices], on_bad=left_out, look=look)]
    model.train(was_training)
    if picture and rows:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        same = [row for row in rows if row.shape == rows[0].shape]
        write_png(picture, np.concatenate(same))
    return mean_scores(scored) if scored else {}
