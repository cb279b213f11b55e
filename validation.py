"""Scores and pictures of held-out samples while a stage trains."""

from pathlib import Path

import numpy as np
import torch

import engine
from data.benchmarks import BENCHMARKS
from data.files import write_png
from data.pictures import comparison
from metrics import evaluate_dataset, mean_scores

SHOWN = 4  # images on a picture


def check(model, reader, images, dtype, folder, step, log):
    """Validates, after a step, into the run folder: a picture, a row of the log, a line to read."""
    picture = folder / "pictures" / f"{step:06d}.png"
    bad = []
    scores = validate(model, reader, images, dtype, picture, bad)
    if bad:
        engine.say(f"Step {step}: {len(bad)} validation samples can't be used, the first because: "
                   f"{bad[0]}")
    if not scores:
        return
    log.write({"step": step, "validation": scores, "left_out": len(bad)})
    engine.say(f"Step {step}, validation: AbsRel {scores['abs_rel']:.3f}, "
               f"delta1 {scores['delta1']:.3f}, boundary F1 {scores['boundary_f1']:.3f}; "
               f"see {picture}.")


def validate(model, reader, images, dtype, picture=None, bad=None):
    """Mean scores {name: float} of `images` samples spread over the reader; {} if none is usable.

    Scored as evaluate.py scores the reader's set: at its resolution, in its range of depth.
    model: a DepthMaster; dtype: autocast's. picture: a file for the first few samples, one row
    each: image, truth, prediction, error. bad: a list that is given why a sample can't be used.
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
