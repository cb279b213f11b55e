"""Saved predictions of any system, one file an image."""

import hashlib
from pathlib import Path

import numpy as np

from data.files import read_npy, read_png16
from data.transforms import BadSample, kitti_crop

SUFFIXES = (".npy", ".png")


def state(folder, names):
    """A digest of when the predictions for these names were last written, and of their sizes."""
    digest = hashlib.sha256()
    for path in (Path(folder) / f"{name}{suffix}" for name in names for suffix in SUFFIXES):
        if path.exists():
            found = path.stat()
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_prediction(folder, name, size, uncropped=None):
    """FOLDER/NAME.npy, or else FOLDER/NAME.png of 16 bits -> float64 H,W, as stored.

    name: of the sample; size: height and width of its truth. uncropped: of the whole image, where
    the truth is KITTI's benchmark crop of it; a prediction of that size is cropped, too. Raises
    BadSample, naming the file, if it is missing, not readable, of another size or not finite.
    """
    path = Path(folder) / f"{name}.npy"
    picture = Path(folder) / f"{name}.png"
    if picture.exists() and not path.exists():
        path, pred = picture, read_png16(picture)
    else:
        pred = read_npy(path)
    pred = pred.squeeze()
    if uncropped and pred.shape == tuple(uncropped):
        pred = pred[kitti_crop(pred.shape, size, path)]
    if pred.shape != tuple(size) or pred.dtype.kind not in "fiu":
        raise BadSample(f"{path} holds {pred.dtype} of shape {pred.shape}, but the truth has "
                        f"shape {tuple(size)}: save predictions at that size.")
    pred = pred.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(pred))
    if bad:
        raise BadSample(f"{path} has {bad} values that are NaN or infinite: write finite numbers.")
    return pred
