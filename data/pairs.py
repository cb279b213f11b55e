"""A folder of pairs: anybody's images with depth, from any sensor.

    DIR/rgb/a/b.jpg  and  DIR/depth/a/b.png     matched by path without suffix, or
    DIR/pairs.csv                               columns image and depth, paths relative to DIR

Links are followed, and names that begin with a dot are passed over.
"""

import argparse
import logging
import os
import math
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from data.files import read_exr, read_hdf5, read_npy, read_npz, read_table
from data.images import PICTURES, read_picture, read_png16, read_rgb
from data.transforms import BadSample, pack_sample, resize_nearest
from storage import walk

log = logging.getLogger(__name__)

PAIRS_CSV = "pairs.csv"
MIN_DEPTH_M = 1e-5
DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".pfm", ".hdf5", ".h5", ".tif", ".tiff", ".exr")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
MANY, FAR_M = 0.01, 1000.0  # share of a map's pixels, metres: `doubt` reports a map above them
SAME_SHAPE = 0.02  # by how much a depth map's aspect ratio may differ from its image's


def add_pair_options(add):
    """Adds the options of a folder of pairs for `pair_options`; add: parser.add_argument."""
    add("--depth-scale", type=above_0, default=1000.0, metavar="N",
        help="of pairs in files of integers (16-bit PNG): units per metre (1000)")
    add("--max-depth", type=above_0, metavar="M",
        help="of pairs: what is deeper, in metres, is no depth (any is)")
    add("--resize-depth", choices=["nearest"],
        help="of pairs: bring depth maps to their images' sizes (refused)")
    add("--exif", choices=["auto", "apply", "ignore"], default="auto",
        help="images that EXIF says are turned: turn them, or not; auto: as fits their depth maps, "
        "and refuse them where both would (%(default)s)")


def above_0(text):
    """argparse type: a number above 0."""
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")


def pair_options(args):
    """Keywords for FolderOfPairs."""
    return {name: getattr(args, name) for name in
            ("depth_scale", "max_depth", "resize_depth", "exif")}


class FolderOfPairs:
    """Pairs of an image and a planar depth map of the same size.

    Depth maps are 16-bit PNG or another file of integers, in units of 1/depth_scale metres, or
    floating-point .npy, .npz, .pfm, .tif, .exr or .hdf5 in metres. A pixel without depth is 0,
    negative, NaN, inf or above max_depth (metres; None: no limit).
    """

    benchmark = "pairs"  # key of BENCHMARKS in data/sources.py
    expected = None  # only the owner knows the complete number of pairs

    def __init__(self, root, depth_scale=1000.0, max_depth=None, resize_depth=None, exif="auto"):
        """resize_depth: `nearest` brings a depth map to the image's size, None refuses it;
        exif: as for read_rgb in data/images.py.

        Raises FileNotFoundError if there is no pair, ValueError if the pairing is ambiguous.
        """
        if not depth_scale > 0:
            raise ValueError(f"the depth scale is {depth_scale}, but it must be above 0.")
        self.root, self.depth_scale = Path(root), depth_scale
        self.max_depth = np.inf if max_depth is None else max_depth
        self.resize_depth, self.exif = resize_depth, exif
        listed = os.path.lexists(self.root / PAIRS_CSV)
        self.pairs = read_pairs_csv(self.root) if listed else match_by_stem(self.root)
        self.warned = torch.zeros(1, dtype=torch.bool).share_memory_()  # by any worker

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return without_suffix(self.pairs[i][0])

    def __getitem__(self, i):
        """A sample; raises BadSample. With `doubt`, a reason to doubt its depth, or None."""
        image_path, depth_path = (self.root / path for path in self.pairs[i])
        depth_m = read_depth(depth_path, self.depth_scale)
        image = read_rgb(image_path, exif=self.exif, size=depth_m.shape)
        if depth_m.shape != image.shape[:2]:
            depth_m = self.resized(depth_m, image.shape[:2], depth_path)
        valid = (depth_m > MIN_DEPTH_M) & (depth_m < np.inf) & (depth_m <= self.max_depth)
        sample = pack_sample(image, depth_m, valid, self.name(i), depth_path)
        reason = doubt(depth_m, valid)
        if reason and not self.warned:
            self.warned[:] = True
            log.warning("%s: %s.", depth_path, reason)
        return dict(sample, doubt=reason)

    def resized(self, depth_m, size, path):
        """A depth map at its image's size, by the nearest pixel; BadSample without resize_depth."""
        shapes = depth_m.shape[0] * size[1], depth_m.shape[1] * size[0]
        if self.resize_depth and abs(shapes[0] - shapes[1]) > SAME_SHAPE * shapes[0]:
            raise BadSample(f"{path} is {depth_m.shape[0]}x{depth_m.shape[1]}, which is of another "
                            f"shape than its counterpart's {size[0]}x{size[1]}: it is not the same "
                            "picture, or turned.")
        if not self.resize_depth:
            raise BadSample(f"{path} is {depth_m.shape[0]}x{depth_m.shape[1]}, but its counterpart "
                            f"is {size[0]}x{size[1]}: make them alike, or give --resize-depth "
                            "nearest.")
        return resize_nearest(torch.from_numpy(depth_m)[None], size)[0].numpy()


def doubt(depth_m, valid):
    """Why a depth map H,W may not hold metres, as a sentence without full stop, or None."""
    values = depth_m[valid]
    largest = values.max()
    count, rest = np.count_nonzero(values == largest), values[values < largest]
    # For a wall or a sensor's limit, the next smaller depth is near; for a fill value it is not.
    if count > max(MANY * depth_m.size, 1) and rest.size and largest > (1 + MANY) * rest.max():
        return (f"{count / depth_m.size:.0%} of the pixels have one and the same depth, "
                f"{largest:g} m: if it stands for no depth, give --max-depth {rest.max():.4g} or "
                "the like")
    if np.median(values) > FAR_M:
        return ("most depths are beyond 1 km: if they are millimetres, divide them by 1000, or "
                "write them as integers (16-bit PNG)")
    return None


def without_suffix(path):
    return str(PurePosixPath(path).with_suffix(""))


class FolderOfPictures:
    """Any pictures of a folder and of all below it, without depth: for distill.py."""

    benchmark, expected, exif = None, None, "auto"

    def __init__(self, root, split="train"):
        self.root = Path(root)
        self.paths = [path for path in walk(self.root) if path.lower().endswith(PICTURES)]

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return self.paths[i]

    def __getitem__(self, i):
        """dict(image uint8 3,H,W; name); raises BadSample."""
        exif = "apply" if self.exif == "auto" else self.exif
        image = read_rgb(self.root / self.paths[i], exif=exif)
        return dict(image=torch.from_numpy(image).permute(2, 0, 1), name=self.name(i))


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
        for entry in pair:
            place = PurePosixPath(entry)
            if "\\" in entry and not (root / entry).exists():
                raise ValueError(f"{path}, line {line}: '{entry}' has a backslash: write paths "
                                 "with / between their parts.")
            if place == PurePosixPath() or place.is_absolute() or ".." in place.parts:
                raise ValueError(f"{path}, line {line}: '{place}' is not a path inside {root}; "
                                 "write paths relative to that folder.")
        same = lines.setdefault(without_suffix(pair[0]), line)
        if same != line:
            raise ValueError(f"{path}, lines {same} and {line}: two pairs have the name "
                             f"'{without_suffix(pair[0])}'; give each image, without its suffix, "
                             "a name of its own.")
    return pairs


def match_by_stem(root):
    """[(image, depth)] of files in rgb/ and depth/ with equal paths without suffix, sorted."""
    images, no_images = files_by_stem(root / "rgb", PICTURES)
    depth_maps, no_maps = files_by_stem(root / "depth", DEPTH_SUFFIXES)
    stems = sorted(images.keys() & depth_maps.keys())
    passed_over = [f"rgb/{path}" for path in no_images] + [f"depth/{path}" for path in no_maps]
    lossy = [path for path in passed_over if path.startswith("depth/")
             and path.lower().endswith(LOSSY_SUFFIXES)]
    if lossy and not stems:
        raise ValueError(f"{root / lossy[0]} is a JPEG, which does not keep depth as it is: write "
                         "depth maps as 16-bit PNG or .npy.")
    if not stems:
        raise FileNotFoundError(
            f"{root} has no pair: {len(images)} images in rgb/ and {len(depth_maps)} depth maps in "
            f"depth/, of which no two have the same name; rename them or write a {PAIRS_CSV} with "
            "the columns image and depth.")
    alone = images.keys() ^ depth_maps.keys()
    if alone:
        log.warning("%s: %d files have no partner and are left out, such as %r.",
                    root, len(alone), min(alone))
    if passed_over:
        log.warning("%s: %s.", root, describe_passed_over(passed_over))
    return [(f"rgb/{images[stem]}", f"depth/{depth_maps[stem]}") for stem in stems]


def describe_passed_over(paths):
    """The message about files of unsupported kinds."""
    kinds = Counter(PurePosixPath(path).suffix.lower() or "none" for path in paths)
    kinds = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(5))
    return (f"{len(paths)} files are of no kind that is read here and are passed over, such as "
            f"{paths[0]} (by ending: {kinds})")


def files_by_stem(folder, suffixes):
    """{path without suffix: path} of the files with one of the suffixes, relative to the folder,
    and the paths of the others."""
    found, others = {}, []
    for path in walk(folder):
        if not path.lower().endswith(suffixes):
            others.append(path)
            continue
        stem = without_suffix(path)
        if stem in found:
            raise ValueError(f"{folder} holds both {found[stem]} and {path}; remove one, as "
                             "pairs are matched by name without suffix.")
        found[stem] = path
    return found, others


def read_depth(path, depth_scale=1000.0):
    """A depth map in any of the formats -> metres, float32 H,W. Raises BadSample."""
    values = read_values(path)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise BadSample(f"{path} holds {values.dtype} of shape {values.shape}, not a depth map H,W "
                        "of numbers.")
    if values.dtype == np.uint8:
        raise BadSample(f"{path} holds 8-bit numbers, which can't be depth in metres or "
                        "millimetres: write it as 16-bit PNG or float .npy.")
    with np.errstate(over="ignore"):  # 1e300 becomes inf: no depth
        depth_m = values.astype(np.float32)
    return depth_m if values.dtype.kind == "f" else depth_m / np.float32(depth_scale)


def read_values(path):
    """The array in a file, as it is stored."""
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return read_png16(path)
    if suffix in (".hdf5", ".h5"):
        return read_hdf5(path, key=None)
    if suffix in (".pfm", ".tif", ".tiff"):
        return read_picture(path)
    if suffix == ".exr":
        return read_exr(path)
    if suffix in LOSSY_SUFFIXES:
        raise BadSample(f"{path} is a JPEG, which does not keep depth as it is: write depth maps "
                        "as 16-bit PNG or .npy.")
    if suffix not in (".npy", ".npz"):
        raise BadSample(f"{path} is none of the known kinds of depth map: "
                        f"{', '.join(DEPTH_SUFFIXES)}.")
    return read_npy(path) if suffix == ".npy" else read_npz(path)
