"""Saved predictions of any system, one file an image."""

from pathlib import Path

import numpy as np

from data.files import blame, read_png16
from data.transforms import BadSample


def read_prediction(folder, name, size):
    """FOLDER/NAME.npy, or else FOLDER/NAME.png of 16 bits -> float64 H,W, as stored.

    name: of the sample; size: height and width of its truth. Raises BadSample, naming the file,
    if it is missing, not readable, of another size or not finite.
    """
    path = Path(folder) / f"{name}.npy"
    picture = Path(folder) / f"{name}.png"
    if picture.exists() and not path.exists():
        path, pred = picture, read_png16(picture)
    else:
        with blame(path):
            pred = np.load(path)
    pred = pred.squeeze()
    if pred.shape != tuple(size) or pred.dtype.kind not in "fiu":
        raise BadSample(f"{path} holds {pred.dtype} of shape {pred.shape}, but the truth has "
                        f"shape {tuple(size)}: save predictions at that size.")
    pred = pred.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(pred))
    if bad:
        raise BadSample(f"{path} has {bad} values that are NaN or infinite: write finite numbers.")
    return pred
