"""The five zero-shot benchmarks in the commonly used packaging (Ke et al., Marigold).

Each is one .tar, read in place, or a folder of the same layout. The files of a set are found by
their names, and their number is known; the project has no file lists.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from data.archives import open_tree
from data.files import read_npy
from data.images import read_png16, read_rgb
from data.transforms import KITTI_CROP, BadSample, check_same_size, kitti_crop, pack_sample

ETH3D_SIZE = 4032, 6048


@dataclass(frozen=True)
class Layout:
    """How a set is packed.

    tar: the archive's name. images: their number. find(names) -> [(image, depth)], in order.
    read_depth(tree, name) -> depth_m H,W, mask H,W or None. min_depth, max_depth: range of valid
    ground truth in metres. crop: height and width of the crop at the bottom. window: top, bottom,
    left, right of the region, after the crop, where ground truth is valid.
    """

    tar: str
    images: int
    find: Callable
    read_depth: Callable
    min_depth: float
    max_depth: float
    window: tuple | None = None
    crop: tuple | None = None


class ZeroShot:
    """One of the sets, by its name in LAYOUTS."""

    exif = "auto"  # as for read_rgb in data/images.py

    def __init__(self, name, folder):
        """Raises FileNotFoundError if the folder holds no image with depth."""
        self.set = name
        self.root = Path(folder)
        self.expected = self.layout.images
        self.tree = open_tree(folder, self.layout.tar)
        self.pairs = self.layout.find(self.tree.names)
        if not self.pairs:
            raise FileNotFoundError(f"{self.tree.root} holds no image with depth of {name}: give "
                                    f"the folder with {self.layout.tar} or its content.")

    @property
    def layout(self):
        """The set's Layout, not stored here: its functions can't be pickled for workers."""
        return LAYOUTS[self.set]

    def __len__(self):
        return len(self.pairs)

    def name(self, i):
        return self.pairs[i][0].rsplit(".", 1)[0]

    def __getitem__(self, i):
        """A sample; raises BadSample. With `uncropped`, the image's size before a crop."""
        image_name, depth_name = self.pairs[i]
        place = self.tree.place(depth_name)
        depth_m, mask = self.layout.read_depth(self.tree, depth_name)
        image = read_rgb(self.tree.place(image_name), self.tree.read(image_name), self.exif,
                         depth_m.shape)
        check_same_size(place, depth_m, image)
        uncropped = depth_m.shape
        if self.layout.crop:
            rows, columns = kitti_crop(uncropped, self.layout.crop, place)
            image, depth_m = image[rows, columns], depth_m[rows, columns]
        valid = self.valid(depth_m) if mask is None else mask
        sample = pack_sample(image, depth_m, valid, self.name(i), place)
        return dict(sample, uncropped=uncropped)

    def valid(self, depth_m):
        """Pixels whose depth is in the set's range and inside its window."""
        inside = (depth_m > self.layout.min_depth) & (depth_m < self.layout.max_depth)
        if self.layout.window:
            top, bottom, left, right = self.layout.window
            inside[:top], inside[bottom:], inside[:, :left], inside[:, right:] = [False] * 4
        return inside


# ------------------------------------------------------------------------------ which files


def matched(pattern, depth_of, by_depth=False):
    """Makes a `find`: it pairs each name that fits the pattern with its partner, if both exist.

    depth_of: template that makes the partner's name from the pattern's groups. by_depth: the
    pattern is for depth maps, and the template makes the image's name.
    """
    expression = re.compile(pattern)

    def find(names):
        found = []
        for name in sorted(names):
            match = expression.fullmatch(name)
            partner = match and match.expand(depth_of)
            if partner in names:
                found.append((partner, name) if by_depth else (name, partner))
        return sorted(found)

    return find


def diode_pairs(names):
    """A `find` for indoor and outdoor scans; each image has its own depth and mask files."""
    found = [name for name in sorted(names)
             if re.fullmatch(r"(.*/)?(indoors|outdoor)/scene_\d+/scan_\d+/[^/]+\.png", name)]
    return [(name, name.replace(".png", "_depth.npy")) for name in found
            if name.replace(".png", "_depth.npy") in names]


# ------------------------------------------------------------------------------ their depth


def depth_in_png(units_per_metre):
    """Makes a `read_depth` for 16-bit PNG."""
    def read_depth(tree, name):
        values = read_png16(tree.place(name), tree.read(name))
        return values.astype(np.float32) / np.float32(units_per_metre), None
    return read_depth


def eth3d_depth(tree, name):
    """Raw little-endian float32 in a file that is called .JPG."""
    content = tree.read(name)
    height, width = ETH3D_SIZE
    if len(content) != 4 * height * width:
        raise BadSample(f"{tree.place(name)} has {len(content)} bytes, but {height}x{width} "
                        f"numbers of 4 bytes are {4 * height * width}.")
    return np.frombuffer(content, "<f4").reshape(ETH3D_SIZE), None


def diode_depth(tree, name):
    """Two arrays H,W,1, depth and mask; the mask, not a depth range, marks valid pixels."""
    depth_m, mask = (read_array(tree, file)
                     for file in (name, name.replace("_depth.npy", "_depth_mask.npy")))
    check_same_size(tree.place(name), depth_m, mask)
    depth_m = depth_m.astype(np.float32)
    # Some masks mark a pixel without depth as valid by mistake: such a pixel can't be scored.
    return depth_m, mask.astype(bool) & np.isfinite(depth_m) & (depth_m > 0)


def read_array(tree, name):
    """An .npy of numbers H,W or H,W,1 -> H,W."""
    values = read_npy(tree.place(name), tree.read(name))
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise BadSample(f"{tree.place(name)} holds {values.dtype} of shape {values.shape}, not a "
                        "map of numbers.")
    return values


LAYOUTS = {
    "nyu": Layout("nyu_labeled_extracted.tar", 654, matched(
        r"(test/[^/]+)/rgb_(\d+)\.png", r"\1/depth_\2.png"), depth_in_png(1000), 1e-3, 10.0,
        window=(45, 471, 41, 601)),
    # The common list has 697 images; this set has only the 652 with ground truth. The window is
    # Eigen's, inside the benchmark's crop.
    "kitti": Layout("kitti_eigen_split_test.tar", 652, matched(
        r"((\d{4}_\d\d_\d\d)_drive_\d{4}_sync)/proj_depth/groundtruth/image_02/(\d+)\.png",
        r"\2/\1/image_02/data/\3.png", by_depth=True), depth_in_png(256), 1e-5, 80.0,
        window=(117, 321, 43, 1172), crop=KITTI_CROP),
    "eth3d": Layout("eth3d.tar", 454, matched(
        r"rgb/([^/]+)/images/dslr_images/([^/]+)\.JPG",
        r"depth/\1_dslr_depth/\1/ground_truth_depth/dslr_images/\2.JPG"), eth3d_depth, 1e-5,
        float("inf")),
    "scannet": Layout("scannet_val_sampled_800_1.tar", 800, matched(
        r"(scene\d+_\d+)/color/(\d+)\.jpg", r"\1/depth/\2.png"), depth_in_png(1000), 1e-3, 10.0),
    "diode": Layout("diode_val.tar", 771, diode_pairs, diode_depth, 0.0, float("inf")),
}
