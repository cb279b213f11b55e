"""A folder of pairs: anybody's images with depth, from any sensor.

    DIR/rgb/a/b.jpg  and  DIR/depth/a/b.png     matched by path without suffix, or
    DIR/pairs.csv                               columns image and depth, paths relative to DIR
"""

import logging
import os
from pathlib import Path, PurePosixPath

import numpy as np

from data.files import (
    read_hdf5, read_npy, read_npz, read_picture, read_png16, read_rgb, read_table,
)
from data.transforms import BadSample, pack_sample

log = logging.getLogger(__name__)

PAIRS_CSV = "pairs.csv"
MIN_DEPTH_M = 1e-5
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".pfm", ".hdf5", ".h5")


class FolderOfPairs:
    """Pairs of an image and a planar depth map of the same size.

    Depth maps are 16-bit PNG or another file of integers, in units of 1/depth_scale metres, or
    floating-point .npy, .npz, .pfm or .hdf5 in metres. 0, negative numbers, NaN and inf stand for
    pixels without depth.
    """

    benchmark = "pairs"  # in data/benchmarks.py
    expected = None  # how many pairs there should be is known to their owner only

    def __init__(self, root, depth_scale=1000.0):
        """Raises FileNotFoundError if there is no pair, ValueError if pairs can't be told."""
        if not depth_scale > 0:
            raise ValueError(f"the depth scale is {depth_scale}, but it must be above 0.")
        self.root, self.depth_scale = Path(root), depth_scale
        listed = (self.root / PAIRS_CSV).is_file()
        self.pairs = read_pairs_csv(self.root) if listed else match_by_stem(self.root)

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return without_suffix(self.pairs[i][0])

    def __getitem__(self, i):
        """A sample; raises BadSample."""
        image_path, depth_path = (self.root / path for path in self.pairs[i])
        image, depth_m = read_rgb(image_path), read_depth(depth_path, self.depth_scale)
        valid = (depth_m > MIN_DEPTH_M) & (depth_m < np.inf)
        return pack_sample(image, depth_m, valid, self.name(i), depth_path)


def without_suffix(path):
    return str(PurePosixPath(path).with_suffix(""))


def read_pairs_csv(root):
    """[(image, depth)] from pairs.csv, relative to the root."""
    path = root / PAIRS_CSV
    rows = read_table(path)
    if not rows:
        raise FileNotFoundError(f"{path} lists no pair; give it the columns image and depth.")
    if not {"image", "depth"} <= rows[0].keys():
        raise ValueError(f"{path} has the columns {', '.join(map(str, rows[0]))}; it needs image "
                         "and depth.")
    pairs, lines = [(row["image"] or "", row["depth"] or "") for row in rows], {}
    for line, pair in enumerate(pairs, start=2):
        for entry in map(PurePosixPath, pair):
            if entry == PurePosixPath() or entry.is_absolute() or ".." in entry.parts:
                raise ValueError(f"{path}, line {line}: '{entry}' is not a path inside {root}; "
                                 "write paths relative to that folder.")
        same = lines.setdefault(without_suffix(pair[0]), line)
        if same != line:
            raise ValueError(f"{path}, lines {same} and {line}: two pairs have the name "
                             f"'{without_suffix(pair[0])}'; give each image, without its suffix, "
                             "a name of its own.")
    return pairs


def match_by_stem(root):
    """[(image, depth)] of rgb/ and depth/ whose paths agree but for the suffix, sorted."""
    images = files_by_stem(root / "rgb", IMAGE_SUFFIXES)
    depth_maps = files_by_stem(root / "depth", DEPTH_SUFFIXES)
    stems = sorted(images.keys() & depth_maps.keys())
    if not stems:
        raise FileNotFoundError(
            f"{root} has no pair: {len(images)} images in rgb/ and {len(depth_maps)} depth maps in "
            f"depth/, of which no two have the same name; rename them or write a {PAIRS_CSV} with "
            "the columns image and depth.")
    alone = images.keys() ^ depth_maps.keys()
    if alone:
        log.warning("%s: %d files have no partner and are left out, such as %r.",
                    root, len(alone), min(alone))
    return [(f"rgb/{images[stem]}", f"depth/{depth_maps[stem]}") for stem in stems]


def files_by_stem(folder, suffixes):
    """{path without suffix: path} of the files with one of the suffixes, relative to the folder."""
    found = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            path = (Path(parent) / file).relative_to(folder).as_posix()
            if not path.lower().endswith(suffixes):
                continue
            stem = without_suffix(path)
            if stem in found:
                raise ValueError(f"{folder} holds both {found[stem]} and {path}; remove one, as "
                                 "pairs are matched by name without suffix.")
            found[stem] = path
    return found


def read_depth(path, depth_scale=1000.0):
    """A depth map in any of the formats -> metres, float32 H,W. Raises BadSample."""
    values = read_values(path)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise BadSample(f"{path} holds {values.dtype} of shape {values.shape}, not a depth map H,W "
                        "of numbers.")
    depth_m = values.astype(np.float32)
    return depth_m if values.dtype.kind == "f" else depth_m / np.float32(depth_scale)


def read_values(path):
    """The array in a file, as it is stored."""
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return read_png16(path)
    if suffix in (".hdf5", ".h5"):
        return read_hdf5(path, key=None)
    if suffix == ".pfm":
        return read_picture(path)
    if suffix not in (".npy", ".npz"):
        raise BadSample(f"{path} is none of the known kinds of depth map: "
                        f"{', '.join(DEPTH_SUFFIXES)}.")
    return read_npy(path) if suffix == ".npy" else read_npz(path)
