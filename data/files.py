"""Decode one file into an array, or raise a BadSample that names the file and the reason."""

import os
from contextlib import contextmanager

import h5py
import imageio.v3 as iio
import numpy as np

from data.transforms import BadSample


@contextmanager
def blame(path):
    """Whatever goes wrong inside is the fault of the file at `path`, and says so."""
    try:
        yield
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(f"{path} is missing.") from None
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, ...
        reason = str(error).split("\n")[0] or type(error).__name__
        raise BadSample(f"{path} can't be read: {reason.rstrip('.')}.") from error


def read_picture(path, content=None):
    """A picture -> the array that is stored in it. content: its bytes, if they were read before."""
    with blame(path):
        return iio.imread(path if content is None else content, plugin="pillow")


def read_rgb(path, content=None):
    """A picture -> uint8 H,W,3; grey ones are repeated, an alpha channel is dropped."""
    image = read_picture(path, content)
    if image.dtype != np.uint8:
        raise BadSample(f"{path} is a picture of {image.dtype}, not of 8 bits a channel.")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4):
        raise BadSample(f"{path} is not one picture in grey or colour: its shape is {image.shape}.")
    if image.shape[2] < 3:
        return np.repeat(image[..., :1], 3, axis=2)
    return image[..., :3]


def read_png16(path, content=None):
    """A 16-bit picture of one channel -> uint16 H,W."""
    values = read_picture(path, content)
    if values.dtype != np.uint16 or values.ndim != 2:
        raise BadSample(f"{path} is a picture of {values.dtype} with shape {values.shape}, not a "
                        "16-bit picture of one channel.")
    return values


def read_hdf5(path, key="dataset"):
    """The data set `key` of an HDF5 file -> array; with key=None the file's only data set."""
    # No file locks: data sets are read only and often lie where locking isn't supported.
    with blame(path), h5py.File(path, "r", locking=False) as file:
        if key is None:
            key = single_key(list(file), path)
        if key not in file:
            raise BadSample(f"{path} has no data set {key!r}.")
        return file[key][()]


def single_key(keys, path):
    """The key called depth or dataset, or the only one there is."""
    for key in ("depth", "dataset"):
        if key in keys:
            return key
    if len(keys) != 1:
        raise BadSample(f"{path} holds {sorted(keys)}; call the depth map 'depth'.")
    return keys[0]


def write_png(path, array):
    """Write uint8 H,W,3 or uint16 H,W as PNG, atomically."""
    iio.imwrite(f"{path}.tmp", array, plugin="pillow", extension=".png")
    os.replace(f"{path}.tmp", path)


def write_npy(path, array):
    """Write an array as .npy, atomically."""
    with open(f"{path}.tmp", "wb") as file:
        np.save(file, array)
    os.replace(f"{path}.tmp", path)
