"""Virtual KITTI 2 (Cabon et al., arXiv 2001.10773): rendered streets with dense planar depth."""

import os
import re
from pathlib import Path

import numpy as np

from data.images import read_png16, read_rgb
from data.transforms import KITTI_CROP, check_same_size, kitti_crop, pack_sample
from storage import walk

SCENES = {"train": ("Scene02", "Scene06", "Scene18", "Scene20"), "val": ("Scene01",)}
VARIANTS = ("15-deg-left", "15-deg-right", "clone", "morning", "overcast", "sunset")
CAMERAS = ("Camera_0", "Camera_1")
FULL_COUNTS = {"train": 20_148, "val": 5_364}
# Folders of the two unpacked archives (images, depth): the same folder, or one folder each.
TREES = (("", ""), ("rgb", "depth"), ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth"))
MIN_DEPTH_M, MAX_DEPTH_M = 1e-5, 80.0


class VirtualKITTI:
    """SceneSS/VARIANT/frames/{rgb,depth}/Camera_C; depth is uint16 centimetres, the sky 65535."""

    benchmark = "vkitti"  # key of BENCHMARKS in data/sources.py
    exif = "auto"  # as for read_rgb in data/images.py

    def __init__(self, root, split="train", crop=KITTI_CROP):
        """crop: height and width of the part at the bottom centre that is kept.

        Raises FileNotFoundError if no frame of the split is there.
        """
        if split not in SCENES:
            raise ValueError(f"Virtual KITTI 2 has no split {split!r}; choose train or val.")
        self.root, self.crop = Path(root), tuple(crop)
        self.expected = FULL_COUNTS[split]
        self.rgb_tree, self.depth_tree = find_trees(self.root)
        self.images = list_images(self.root / self.rgb_tree, split)

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return os.path.join(self.rgb_tree, self.images[i]).removesuffix(".jpg")

    def depth_path(self, i):
        file = self.images[i].replace("frames/rgb/", "frames/depth/").replace("/rgb_", "/depth_")
        return self.root / self.depth_tree / file.replace(".jpg", ".png")

    def __getitem__(self, i):
        """A sample, cropped; raises BadSample. The sky and all beyond 80 m is invalid."""
        depth_path = self.depth_path(i)
        depth_cm = read_png16(depth_path)
        image = read_rgb(self.root / self.rgb_tree / self.images[i], exif=self.exif,
                         size=depth_cm.shape)
        check_same_size(depth_path, depth_cm, image)
        rows, columns = kitti_crop(depth_cm.shape, self.crop, depth_path)
        depth_m = depth_cm[rows, columns].astype(np.float32) / 100
        valid = (depth_m > MIN_DEPTH_M) & (depth_m < MAX_DEPTH_M)
        sample = pack_sample(image[rows, columns], depth_m, valid, self.name(i), depth_path)
        return dict(sample, uncropped=depth_cm.shape)


def find_trees(root):
    """(folder of the images' tree, folder of the depth maps' tree), relative to the root."""
    for rgb_tree, depth_tree in TREES:
        if holds_scenes(root / rgb_tree) and holds_scenes(root / depth_tree):
            return rgb_tree, depth_tree
    raise FileNotFoundError(f"{root} is not Virtual KITTI 2: it has no Scene01, Scene02, ... with "
                            "frames, neither directly nor under rgb/ and depth/ nor under "
                            "vkitti_2.0.3_rgb/ and vkitti_2.0.3_depth/.")


def holds_scenes(folder):
    """Whether a folder holds at least one of the data set's scenes."""
    scenes = (scene for split in SCENES.values() for scene in split)
    return any((folder / scene).is_dir() for scene in scenes)


def list_images(tree, split):
    """Relative paths of the images of a split, sorted."""
    folders = [f"{scene}/{variant}/frames/rgb/{camera}" for scene in SCENES[split]
               for variant in VARIANTS for camera in CAMERAS]
    images = [f"{folder}/{file}" for folder in folders for file in walk(tree / folder)
              if re.fullmatch(r"rgb_[^/]*\.jpg", file)]
    if not images:
        raise FileNotFoundError(f"{tree} has no {split} image; looked for rgb_FFFFF.jpg in "
                                f"{folders[0]} and the like.")
    return images
