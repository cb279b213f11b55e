"""Saved predictions of any system, one file per image."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from data.files import read_exr, read_npy
from data.images import read_png16
from data.transforms import BadSample, kitti_crop

READERS = {".npy": read_npy, ".png": read_png16, ".exr": read_exr}  # by suffix
# Names that other systems' scripts give to the prediction for NAME; NAME itself comes first.
FORMS = {
    "NAME": lambda name: name,
    "pred_NAME": lambda name: f"pred_{name}",  # Marigold and systems based on it
    "pred_NAME without rgb_": lambda name: f"pred_{name.removeprefix('rgb_')}",
    "NAME_pred": lambda name: f"{name}_pred",  # GeoWizard, Marigold's script for pictures
}
METRIC_FORMS = {"NAME_metres": lambda name: f"{name}_metres"} | FORMS  # predict.py --metric
MILLIMETRES = 1000  # units per metre in a depth map of integers


def find_prediction(folder, name, metric=False):
    """(file, form) of the prediction for a sample: the form is one of FORMS; (None, None) if none.

    Searches the sample's folder for the name in each form (of METRIC_FORMS, if a depth map in
    metres is wanted); the suffixes in the order of READERS.
    """
    place = Path(folder) / name
    for form, renamed in (METRIC_FORMS if metric else FORMS).items():
        for suffix in READERS:
            path = place.with_name(renamed(place.name) + suffix)
            if path.exists():
                return path, form
    return None, None


def state(folder, names, metric=False):
    """({form: count} of the existing predictions for these names, a digest of their state).

    The digest covers the files' paths, sizes and times of last change.
    """
    digest, forms = hashlib.sha256(), Counter()
    for name in names:
        path, form = find_prediction(folder, name, metric)
        if path:
            found = path.stat()
            digest.update(os.fsencode(f"{path} {found.st_size} {found.st_mtime_ns}\n"))
            forms[form] += 1
    return forms, digest.hexdigest()


def read_prediction(folder, name, size, uncropped=None, metric=False):
    """The prediction for a sample, a .npy, 16-bit .png or .exr -> float64 H,W, as stored.

    metric: depth in metres is wanted; integers are millimetres.

    name: the sample's; size: height and width of its truth. uncropped: the whole image's size if
    the truth is KITTI's benchmark crop of it; a prediction of that size is cropped, too. Raises
    BadSample, naming the file, if it is missing, not readable, of another size or not finite.
    """
    path, _ = find_prediction(folder, name, metric)
    if path is None:
        forms = METRIC_FORMS if metric else FORMS
        raise BadSample(f"{Path(folder) / name}.npy is missing, and so are the names that other "
                        f"systems give it ({', '.join(forms)}).")
    pred = READERS[path.suffix](path).squeeze()
    if uncropped and pred.shape == tuple(uncropped):
        pred = pred[kitti_crop(pred.shape, size, path)]
    if pred.shape != tuple(size) or pred.dtype.kind not in "fiu":
        raise BadSample(f"{path} holds {pred.dtype} of shape {pred.shape}, but the truth has "
                        f"shape {tuple(size)}: save predictions at that size.")
    if metric and pred.dtype.kind != "f":
        if not pred.all():
            raise BadSample(f"{path} has {np.count_nonzero(pred == 0)} pixels without depth (0): "
                            "give the map as .npy, with a depth everywhere.")
        pred = pred / MILLIMETRES
    pred = pred.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(pred))
    if bad:
        raise BadSample(f"{path} has {bad} values that are NaN or infinite: write finite numbers.")
    return pred
