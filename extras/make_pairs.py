"""Brings files of public data sets into a folder of pairs, which the trainer and evaluate.py read.

    python -m extras.make_pairs OUT --tum DIR --nyu DIR --kitti DIR --diode DIR --middlebury DIR

Each DIR is searched with its subfolders, in the layout the data set is given away in. OUT gets
rgb/SET/NAME.png and depth/SET/NAME.npy, float32 metres, 0 where nothing was measured.
"""

import argparse
import os
import re
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.files import read_npy, read_npz, write_npy, write_png
from data.images import read_picture, read_rgb
from data.pairs import read_depth
from data.transforms import BadSample, check_same_size
from engine import job, terminal
from storage import read_text, walk

# TUM's cameras aren't synchronised: its own tool pairs pictures less than this apart.
TUM_MAX_SECONDS_APART = 0.02
# Middlebury's Motorcycle as scikit-image ships it (quarter size): baseline (mm), focal length and
# horizontal distance of the principal points (pixels).
MOTORCYCLE = (193.001, 994.978, 31.086)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--tum", metavar="DIR", type=Path,
                        help="TUM RGB-D: SEQUENCE/rgb/TIME.png, SEQUENCE/depth/TIME.png")
    parser.add_argument("--nyu", metavar="DIR", type=Path,
                        help="NYU v2, synchronised: rgb_N.jpg, sync_depth_N.png (millimetres)")
    parser.add_argument("--kitti", metavar="DIR", type=Path,
                        help="KITTI: image_02/data/F.png, proj_depth/groundtruth/image_02/F.png, "
                        "or rgb/F.png, depth/F.png")
    parser.add_argument("--kitti-gap", metavar="N", type=int, default=2,
                        help="KITTI: fill gaps up to N pixels from a measurement, as a lidar's "
                        "points leave no 8x8 cell to train on; 0 keeps it as it is (default: 2)")
    parser.add_argument("--diode", metavar="DIR", type=Path,
                        help="DIODE: NAME.png, NAME_depth.npy, NAME_depth_mask.npy")
    parser.add_argument("--middlebury", metavar="DIR", type=Path,
                        help="Middlebury 2014: SCENE/im0.png, disp0.pfm, calib.txt, or "
                        "scikit-image's motorcycle_left.png, motorcycle_disp.npz")
    options = parser.parse_args(argv)
    if options.kitti_gap < 0:
        parser.error(f"--kitti-gap is {options.kitti_gap}, but must be 0 or more")
    readers = {"tum": tum, "nyu": nyu, "diode": diode, "middlebury": middlebury,
               "kitti": lambda folder: kitti(folder, options.kitti_gap)}
    folders = {name: getattr(options, name) for name in readers if getattr(options, name)}
    if not folders:
        parser.error("give at least one of " + ", ".join(f"--{name}" for name in readers))
    terminal.check_folder(options.out, "OUT")
    for name, folder in folders.items():
        write_pairs(options.out, name, folder, readers[name])


def write_pairs(out, data_set, folder, reader):
    """Writes what `reader(folder)` yields, (image path, depth_m H,W); prints how many it is."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--{data_set} {folder} is not a folder; give the data set's root.")
    count = 0
    for image_path, depth_m in tqdm(reader(folder), desc=data_set, unit="pair", file=sys.stderr):
        image = read_rgb(image_path, exif="auto", size=depth_m.shape)
        check_same_size(image_path, image, depth_m)
        name = data_set / image_path.relative_to(os.path.normpath(folder))
        files = (out / "rgb" / name).with_suffix(".png"), (out / "depth" / name).with_suffix(".npy")
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        measured = np.isfinite(depth_m) & (depth_m > 0)
        write_npy(files[1], np.where(measured, depth_m, 0).astype(np.float32))
        write_png(files[0], image)
        count += 1
    if count == 0:
        raise FileNotFoundError(f"--{data_set} {folder} has no pair in the layout that --help "
                                "names; give the folder above it.")
    print(f"{data_set}: pairs written: {count}")


def tum(folder):
    """Depth is 1/5000 m; a picture goes with the depth map nearest in time."""
    for rgb_folder in sorted({path.parent for path in find(folder, "rgb/*.png")}):
        times, images = ({float(path.stem): path for path in find(folder, "*.png")
                          if path.parent == folder and is_number(path.stem)}
                         for folder in (rgb_folder.parent / "depth", rgb_folder))
        for image in images.values():
            nearest = min(times, key=lambda time: abs(time - float(image.stem)), default=np.inf)
            if abs(nearest - float(image.stem)) < TUM_MAX_SECONDS_APART:
                yield image, read_depth(times[nearest], 5000)


def nyu(folder):
    """Depth is millimetres: sync_depth_N.png beside rgb_N.jpg, or in depth/ beside rgb/."""
    for image in find(folder, "rgb_*.jpg"):
        name = image.name.replace("rgb_", "sync_depth_").replace(".jpg", ".png")
        depth = image.with_name(name)
        if not depth.exists():
            depth = image.parent.parent / "depth" / name
        if depth.exists():
            yield image, read_depth(depth, 1000)


def kitti(folder, gap):
    """Depth is 1/256 m, measured along the lidar's lines; iterates the ground truth."""
    layouts = (("proj_depth/groundtruth/image_02/*.png", "../../../image_02/data"),
               ("depth/*.png", "../rgb"))
    for pattern, image_folder in layouts:
        for depth in find(folder, pattern):
            image = Path(os.path.normpath(depth.parent / image_folder / depth.name))
            if image.exists():
                yield image, fill_gaps(read_depth(depth, 256), gap)


def fill_gaps(depth_m, gap):
    """Gives pixels without depth (0) that of the nearest surface measured within `gap` pixels."""
    disparity = torch.from_numpy(np.where(depth_m > 0, 1 / np.maximum(depth_m, 1e-6), 0))[None]
    grown = F.max_pool2d(disparity, 2 * gap + 1, stride=1, padding=gap)[0].numpy()
    filled = np.where(grown > 0, 1 / np.maximum(grown, 1e-6), 0)
    return np.where(depth_m > 0, depth_m, filled)


def diode(folder):
    """Depth is metres; the mask decides what is measured."""
    for mask_path in find(folder, "*_depth_mask.npy"):
        stem = mask_path.name.removesuffix("_depth_mask.npy")
        mask = read_npy(mask_path) > 0
        depth_m = read_depth(mask_path.with_name(f"{stem}_depth.npy"))
        yield mask_path.with_name(f"{stem}.png"), np.where(mask, depth_m, 0)


def middlebury(folder):
    """Depth in mm = baseline * focal length / (disparity + doffs), the disparity in pixels."""
    for calib_path in find(folder, "calib.txt"):
        image, disparity = calib_path.with_name("im0.png"), calib_path.with_name("disp0.pfm")
        yield image, to_depth(read_picture(disparity), read_calibration(calib_path))
    for disparity in find(folder, "motorcycle_disp.npz"):
        values = read_npz(disparity, "arr_0")
        yield disparity.with_name("motorcycle_left.png"), to_depth(values, MOTORCYCLE)


def read_calibration(path):
    """(baseline in mm, focal length in pixels, doffs in pixels) from Middlebury's calib.txt."""
    text = read_text(path)
    found = [re.search(pattern, text) for pattern in
             (r"baseline=([\d.]+)", r"cam0=\[([\d.]+)", r"doffs=([\d.]+)")]
    if not all(found):
        raise BadSample(f"{path} lacks one of baseline, cam0 and doffs.")
    return tuple(float(match[1]) for match in found)


def to_depth(disparity, calibration):
    """Disparity H,W in pixels -> metres; inf and NaN, which stand for nothing, become 0."""
    baseline_mm, focal, doffs = calibration
    known = np.isfinite(disparity)
    return np.where(known, baseline_mm * focal / (np.where(known, disparity, 0) + doffs) / 1000, 0)


def find(folder, pattern):
    """The files below a folder whose last parts fit, sorted, so that runs agree."""
    return sorted(folder / path for path in walk(folder) if PurePosixPath(path).match(pattern))


def is_number(text):
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None


if __name__ == "__main__":
    job.run(main)
