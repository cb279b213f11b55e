"""The data sets: where each lies, how a folder is recognised and opened, how a set is scored."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data import hypersim_geometry, vkitti
from data.hypersim import SCENE, SPLIT_CSV, SPLITS, Hypersim, ProcessedHypersim
from data.pairs import MIN_DEPTH_M, PAIRS_CSV, FolderOfPairs, FolderOfPictures
from data.transforms import KITTI_CROP
from data.vkitti import TREES, VirtualKITTI, holds_scenes
from data.zeroshot import LAYOUTS, ZeroShot
from storage import walk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """How a set is evaluated.

    folder: its name in the data root, and in a folder of predictions. min_depth, max_depth:
    metres, the range that predictions are clipped to. processing_res: longest side while
    predicting; 0: the image's own, None: the model's own. published: DepthMaster's scores
    (arXiv 2501.02576, Tables I and VI) as fractions. published_of: the images and settings of
    these scores, if they differ from those here.
    """

    folder: str
    min_depth: float
    max_depth: float
    processing_res: int | None
    published: dict
    published_of: str = ""


def zero_shot(name, folder, processing_res, abs_rel, delta1, depth_range=None):
    """The Benchmark of a set of data/zeroshot.py; the clip range is that of valid ground truth."""
    layout = LAYOUTS[name]
    low, high = depth_range or (layout.min_depth, layout.max_depth)
    return Benchmark(folder, low, high, processing_res, {"abs_rel": abs_rel, "delta1": delta1})


HYPERSIM_RANGE = hypersim_geometry.MIN_DEPTH_M, hypersim_geometry.MAX_DEPTH_M
BENCHMARKS = {
    "nyu": zero_shot("nyu", "nyuv2", 0, 0.050, 0.972),
    "kitti": zero_shot("kitti", "kitti", 0, 0.082, 0.937),
    "eth3d": zero_shot("eth3d", "eth3d", 756, 0.053, 0.974),
    "scannet": zero_shot("scannet", "scannet", 0, 0.055, 0.967),
    "diode": zero_shot("diode", "diode", 640, 0.215, 0.776, depth_range=(0.6, 350.0)),
    "hypersim": Benchmark("hypersim", *HYPERSIM_RANGE, 0, {"boundary_f1": 0.337},
                          "80 images, native, owner mask"),
    "vkitti": Benchmark("vkitti", vkitti.MIN_DEPTH_M, vkitti.MAX_DEPTH_M, 0, {}),
    "pairs": Benchmark("pairs", MIN_DEPTH_M, float("inf"), None, {}),
    "miniature": Benchmark("hypersim", *HYPERSIM_RANGE, None, {}),
}


def open_reader(kind, folder, split, crop, exif="auto", **pairs):
    """A reader of the class `kind`; crop: for Virtual KITTI 2, pairs: keywords of FolderOfPairs."""
    if kind is VirtualKITTI:
        reader = VirtualKITTI(folder, split, crop)
    elif kind is FolderOfPairs:
        reader = FolderOfPairs(folder, **pairs)
    else:
        reader = kind(folder, split)
        check_usable(reader)
    reader.exif = exif
    return reader


# ----------------------------------------------------------------------------- to score


def open_benchmark(name, folder, vkitti_crop=KITTI_CROP, hypersim_split="val", **pairs):
    """The reader of the set in `folder`; pairs: keywords of FolderOfPairs (`exif`: of all readers).

    A reader has a length, name(i), [i] -> sample, and `expected`, the number of images of the
    complete set (None: unknown). Raises FileNotFoundError if the set is not there.
    """
    folder = Path(folder)
    if not folder.is_dir() and not (folder.is_file() and name in LAYOUTS):
        raise FileNotFoundError(f"{folder} is not there as a folder, but should hold the set "
                                f"{name}: give the folder that it lies in with --data.")
    if name in LAYOUTS:
        reader = ZeroShot(name, folder)
        reader.exif = pairs.get("exif", "auto")
        return reader
    split = hypersim_split if name == "hypersim" else "val"
    if name == "vkitti":
        kind = VirtualKITTI
    elif name == "pairs":
        kind, folder = FolderOfPairs, folder / "val" if holds_pairs(folder / "val") else folder
    else:
        entries = sorted(entry.name for entry in folder.iterdir())
        kind = ProcessedHypersim if holds_processed_hypersim(folder, entries) else Hypersim
    return open_reader(kind, folder, split, vkitti_crop, **pairs)


def locate(name, root, alone):
    """The folder of a set under ROOT; if it is absent and the set is the only one, ROOT itself."""
    inside = Path(root) / BENCHMARKS[name].folder
    return Path(root) if alone and not inside.is_dir() else inside


def find_benchmarks(root):
    """Names of the sets that have a folder under ROOT. FileNotFoundError if none has.

    ROOT may be the archive of one set, if the archive has its original name.
    """
    if Path(root).is_file():
        found = [name for name, layout in LAYOUTS.items() if layout.tar == Path(root).name]
        if not found:
            raise FileNotFoundError(f"{root} is a file: if it is the archive of a set, say which "
                                    "set it is with --datasets.")
        return found
    names = [name for name in BENCHMARKS if name != "miniature"]
    found = [name for name in names if (Path(root) / BENCHMARKS[name].folder).is_dir()]
    if not found:
        folders = ", ".join(BENCHMARKS[name].folder for name in names)
        raise FileNotFoundError(f"{root} holds none of the folders {folders}: give the folder "
                                "above them, or say which set it is with --datasets.")
    return found


# ----------------------------------------------------------------------------- to train on


def open_training_source(root, split="train", crop=KITTI_CROP, pictures=False, **pairs):
    """The reader of the data set in a folder; the folder's content determines the kind of reader.

    crop: for Virtual KITTI 2; pairs: keywords of FolderOfPairs (`exif`: of all readers). A folder
    of pairs may hold folders named train and val; otherwise every split uses the whole folder.
    pictures: whether a folder of any pictures will do, too.
    Raises FileNotFoundError if the folder is missing, empty or holds no known data set.
    """
    root = Path(root)
    check_folder(root)
    kind = kind_of(root)
    if kind is None and pictures:
        sets = any(kind_of(path) for path in root.iterdir()
                   if path.is_dir() and os.access(path, os.R_OK))
        found = FolderOfPictures(root)
        if len(found) and not sets:
            found.exif = pairs["exif"]
            return found
    if kind is None:
        raise FileNotFoundError(unknown_data(root))
    if kind is FolderOfPairs:
        if any(holds_pairs(root / name) for name in SPLITS):
            root = root / split
        elif split != "train":
            log.warning("%s has no folders train and val: all of it serves as %s.", root, split)
    return open_reader(kind, root, split, crop, **pairs)


def check_folder(root):
    """FileNotFoundError if the root of a data set is no folder."""
    if root.is_file():
        raise FileNotFoundError(f"{root} is a file: unpack it if it is an archive, and give the "
                                "folder.")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the root of a data set.")


def check_usable(reader):
    """FileNotFoundError if raw Hypersim lacks the entity ids of all its frames."""
    frames = getattr(reader, "frames", [])
    if frames and len(reader.lacking) == len(frames):
        raise FileNotFoundError(f"{reader.root}: none of its {len(frames)} frames has entity ids, "
                                "which tell where an object is: download the files "
                                f"frame.*.render_entity_id.hdf5, too, {reader.lacking[0]} first.")


def kind_of(root):
    """The class that reads the data set in a folder; None if the folder holds no known data set."""
    entries = sorted(entry.name for entry in root.iterdir())
    if holds_raw_hypersim(root, entries):
        return Hypersim
    if holds_processed_hypersim(root, entries):
        return ProcessedHypersim
    if any(holds_scenes(root / rgb_tree) for rgb_tree, _ in TREES):
        return VirtualKITTI
    if any(holds_pairs(root / name) for name in ("", *SPLITS)):
        return FolderOfPairs
    return None


def unknown_data(root):
    """The message that a folder holds no known data set; names a known one just above or below."""
    near = [path for path in (root.absolute().parent, *sorted(root.iterdir()))
            if path.is_dir() and os.access(path, os.R_OK) and kind_of(path)]
    if near:
        return f"{root} is no data set that is known, but {near[0]} is: give that."
    if not any(root.iterdir()):
        return f"{root} is empty; give the root of a data set."
    return (f"{root} is no data set that is known; looked for raw Hypersim ({SPLIT_CSV} and "
            "ai_VVV_NNN/images/), processed Hypersim (ai_VVV_NNN/rgb_cam_XX_frIIII.png, also under "
            "train/ and val/), Virtual KITTI 2 (Scene01/, also under rgb/ and depth/) and a folder "
            f"of pairs (rgb/ and depth/, or {PAIRS_CSV}).")


def is_scene(name):
    return re.fullmatch(SCENE, name) is not None


def holds_raw_hypersim(root, entries):
    return any(is_scene(name) and (root / name / "images").is_dir() for name in entries) or (
        SPLIT_CSV in entries and not holds_processed_hypersim(root, entries))


def holds_processed_hypersim(root, entries):
    """Whether there are scenes of PNG pairs, directly or in folders named like splits."""
    folders = [root / name for name in entries if is_scene(name)]
    folders += [scene for split in SPLITS if (root / split).is_dir()
                for scene in (root / split).iterdir() if is_scene(scene.name)]
    return any(re.match(r"rgb_cam_.*\.png", file) for folder in folders for file in walk(folder))


def holds_pairs(root):
    return (root / PAIRS_CSV).is_file() or ((root / "rgb").is_dir() and (root / "depth").is_dir())
