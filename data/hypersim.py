"""Hypersim (Roberts et al., ICCV 2021): the raw release, and the commonly used PNG pairs."""

import logging
import re
from pathlib import Path

import numpy as np

from data.files import read_hdf5, read_table
from data.hypersim_geometry import MAX_DEPTH_M, MIN_DEPTH_M, on_object, planar_depth, read_cameras
from data.images import read_png16, read_rgb
from data.transforms import BadSample, FilteredSample, check_same_size, pack_sample
from storage import walk

log = logging.getLogger(__name__)

SPLIT_CSV = "metadata_images_split_scene_v1.csv"
SPLITS = ("train", "val", "test")
SCENE, CAMERA = r"ai_\d{3}_\d{3}", r"cam_\d{2}"
# Number of frames in the commonly used split lists (Ke et al., Marigold).
PUBLISHED_COUNTS = {"train": 53_885, "val": 7_370, "test": 7_682}
# Deviation: Marigold's thresholds for training frames, not lists of files.
MIN_DEPTH_RANGE_M, MIN_RGB_RANGE, MAX_NO_OBJECT_SHARE = 0.5, 10, 0.03


class Hypersim:
    """The raw release: HDF5 files of linear colour, distance and entity ids, and the split table.

    The frames: those of the split that the table lists as public and that have a distance file on
    disk. If the root has metadata_camera_parameters.csv, planar depth uses each scene's own rays.
    """

    benchmark = "hypersim"  # key of BENCHMARKS in data/sources.py
    exif = "auto"  # as for read_rgb in data/images.py

    def __init__(self, root, split="train", filter=None):
        """filter: leave out frames that Marigold's thresholds reject; default: only for training.

        Raises FileNotFoundError if the split table is absent or none of its frames is on disk.
        """
        self.root = Path(root)
        self.filter = split == "train" if filter is None else filter
        listed = public_frames(self.root, split)
        self.expected = len(listed)
        self.frames = keep_present(self.root, listed, split)
        self.cameras = read_cameras(self.root)
        without_camera = {scene for scene, _, _ in self.frames} - set(self.cameras)
        if self.cameras and without_camera:
            log.warning("%s: the camera table lacks %d scenes, whose cameras are taken as upright.",
                        self.root, len(without_camera))
        self.with_color = self._frames_with_color()
        entities = geometry_paths(self.root, self.frames, "render_entity_id")
        self.lacking = [path for path, there in zip(entities, are_present(entities)) if not there]
        if self.lacking:
            log.warning("%s: %d of %d frames have no entity ids, without which they can't be used, "
                        "such as %s.", root, len(self.lacking), len(self), self.lacking[0])

    def _frames_with_color(self):
        """For each frame, whether color.hdf5 exists; logs how many frames have only the preview."""
        paths = [self._path(i, "final_hdf5", "color.hdf5") for i in range(len(self))]
        with_color = are_present(paths)
        if not all(with_color):
            log.warning("%s: %d of %d frames have no color.hdf5; their tonemap.jpg is read.",
                        self.root, with_color.count(False), len(self))
        return with_color

    def __len__(self):
        return len(self.frames)

    def name(self, i):
        return self._path(i, "final_hdf5", "color").relative_to(self.root).as_posix()

    def depth_path(self, i):
        return self._path(i, "geometry_hdf5", "depth_meters.hdf5")

    def _path(self, i, kind, ending):
        scene, camera, frame = self.frames[i]
        folder = self.root / scene / "images" / f"scene_{camera}_{kind}"
        return folder / f"frame.{frame:04d}.{ending}"

    def __getitem__(self, i):
        """A sample; raises BadSample, or FilteredSample if the filter rejects it."""
        entity_id, distance_m = self._read_geometry(i)
        # Deviation: the scene's own rays where they are known, not one focal length for all.
        depth_m, valid = planar_depth(distance_m, entity_id, self.cameras.get(self.frames[i][0]))
        image = self._read_image(i, entity_id)
        if self.filter:
            apply_filter(self.depth_path(i), image, depth_m, valid, on_object(entity_id))
        return pack_sample(image, depth_m, valid, self.name(i), self.depth_path(i))

    def _read_geometry(self, i):
        """(entity ids H,W of an integer type, distance in metres H,W of a float type)."""
        entity_path = self._path(i, "geometry_hdf5", "render_entity_id.hdf5")
        entity_id, distance_m = read_hdf5(entity_path), read_hdf5(self.depth_path(i))
        check_array(self.depth_path(i), distance_m, np.floating, 2)
        check_array(entity_path, entity_id, np.integer, 2)
        check_same_size(entity_path, entity_id, distance_m)
        return entity_id, distance_m

    def _read_image(self, i, entity_id):
        """uint8 H,W,3: the tone-mapped HDR image or, where that is not on disk, its preview."""
        if self.with_color[i]:
            path = self._path(i, "final_hdf5", "color.hdf5")
            color = read_hdf5(path)
            check_array(path, color, np.floating, 3)
            check_same_size(path, color, entity_id)
            return tone_map(color, on_object(entity_id))
        return read_rgb(self._path(i, "final_preview", "tonemap.jpg"), exif=self.exif,
                        size=entity_id.shape)


def public_frames(root, split):
    """[(scene, camera, frame id)] of the public frames of a split, in the order of the table."""
    if split not in SPLITS:
        raise ValueError(f"Hypersim has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    path = root / SPLIT_CSV
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the root of raw Hypersim.")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; put Hypersim's split table there (it is in the repository "
            f"apple/ml-hypersim as evermotion_dataset/analysis/{SPLIT_CSV}).")
    try:
        frames = [(row["scene_name"], row["camera_name"], int(row["frame_id"]))
                  for row in read_table(path)
                  if row["included_in_public_release"] == "True"
                  and row["split_partition_name"] == split]
        odd = [f"{scene}, {camera}" for scene, camera, _ in frames
               if not (re.fullmatch(SCENE, scene) and re.fullmatch(CAMERA, camera))]
        if odd:
            raise ValueError(odd[0])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not Hypersim's split table (trouble with {error}); get it "
                         "again from apple/ml-hypersim.") from error
    return frames


def keep_present(root, frames, split):
    """The frames with a distance file on disk; logs how many lack it, raises if all lack it."""
    paths = geometry_paths(root, frames, "depth_meters")
    present = [frame for frame, there in zip(frames, are_present(paths)) if there]
    if not present:
        example = f"; the first would be {paths[0]}" if paths else ""
        raise FileNotFoundError(f"{root}: none of the {len(frames)} {split} frames listed in "
                                f"{SPLIT_CSV} is on disk{example}.")
    if len(present) < len(frames):
        log.warning("%s: %d of the %d %s frames listed in %s are not on disk; going on with %d.",
                    root, len(frames) - len(present), len(frames), split, SPLIT_CSV, len(present))
    return present


def geometry_paths(root, frames, kind):
    return [root / scene / "images" / f"scene_{camera}_geometry_hdf5"
            / f"frame.{frame:04d}.{kind}.hdf5" for scene, camera, frame in frames]


def are_present(paths):
    """Whether each path exists: [bool]. Lists each folder once, much faster on a file server."""
    names = {}
    for folder in {path.parent for path in paths}:
        names[folder] = set(walk(folder))
    return [path.name in names[path.parent] for path in paths]


def check_array(path, array, kind, dimensions):
    """Raises BadSample unless the dtype is of this kind and the shape is H,W (2) or H,W,3 (3)."""
    shape_is_right = array.ndim == dimensions and (dimensions == 2 or array.shape[2] == 3)
    if not np.issubdtype(array.dtype, kind) or not shape_is_right:
        wanted = "H,W" if dimensions == 2 else "H,W,3"
        raise BadSample(f"{path} holds {array.dtype} of shape {array.shape}, not "
                        f"{kind.__name__} {wanted}.")


def tone_map(color, on_object):
    """Linear HDR colour H,W,3 float and on_object H,W bool -> uint8 H,W,3, as Hypersim's own tool.

    The 90th percentile of the brightness on objects comes out at 0.8, with a gamma of 1/2.2.
    """
    color = color.astype(np.float16, copy=False)  # as it is stored; no-op for the release's files
    scale = exposure(color, on_object)
    # float16 has 65,536 values: the curve is evaluated for each of them, and then looked up.
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN, and 0 * inf
        curve = np.clip(np.nan_to_num(scale * halves, nan=0.0), 0, 1) ** (1 / 2.2)
    return np.take((curve * 255).astype(np.uint8), color.view(np.uint16))


def exposure(color, on_object):
    """The factor on linear colour that brings its 90th percentile on objects to 0.8^2.2.

    An overflow (inf) counts as bright, as in Hypersim's own tool; NaN is ignored.
    """
    red, green, blue = np.moveaxis(color[on_object].astype(np.float32), -1, 0)
    brightness = 0.3 * red + 0.59 * green + 0.11 * blue
    brightness = brightness[~np.isnan(brightness)]
    if brightness.size == 0:
        return 1.0
    bright = float(np.percentile(brightness, 90))
    return 0.8 ** 2.2 / bright if bright >= 1e-4 else 0.0


def apply_filter(path, image, depth_m, valid, on_object):
    """Raises FilteredSample for frames that show too little (Marigold's thresholds)."""
    share = 1 - on_object.mean()
    if share > MAX_NO_OBJECT_SHARE:
        raise FilteredSample(f"{path}: {share:.1%} of the pixels show no object "
                             f"(at most {MAX_NO_OBJECT_SHARE:.0%}).")
    rgb_range = int(image.max()) - int(image.min())
    if rgb_range < MIN_RGB_RANGE:
        raise FilteredSample(f"{path}: the colours span {rgb_range} of 255 "
                             f"(at least {MIN_RGB_RANGE}).")
    valid_m = depth_m[valid]
    if valid_m.size and np.ptp(valid_m) < MIN_DEPTH_RANGE_M:
        raise FilteredSample(f"{path}: the depth spans {np.ptp(valid_m):.2f} m "
                             f"(at least {MIN_DEPTH_RANGE_M} m).")


class ProcessedHypersim:
    """Pairs of PNG: rgb_cam_XX_frIIII.png and depth_plane_cam_XX_frIIII.png (uint16 millimetres).

    Pairs are searched below ROOT/SPLIT or, if ROOT has no folder named like a split, below ROOT.
    0 means no depth. The files hold no entity ids, so the filter uses the share of pixels without
    depth in place of the share of pixels without an object.
    """

    benchmark = "hypersim"  # key of BENCHMARKS in data/sources.py
    exif = "auto"  # as for read_rgb in data/images.py

    def __init__(self, root, split="train", filter=None):
        """filter: as for Hypersim. Raises FileNotFoundError if there is no pair."""
        if split not in SPLITS:
            raise ValueError(f"Hypersim has no split {split!r}; choose one of {', '.join(SPLITS)}.")
        self.root = Path(root)
        self.filter = split == "train" if filter is None else filter
        self.expected = PUBLISHED_COUNTS[split]
        self.images = find_processed(self.root, split)

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return self.images[i].removesuffix(".png")

    def depth_path(self, i):
        return self.root / depth_of(self.images[i])

    def __getitem__(self, i):
        """A sample; raises BadSample, or FilteredSample if the filter rejects it."""
        depth_mm = read_png16(self.depth_path(i))
        image = read_rgb(self.root / self.images[i], exif=self.exif, size=depth_mm.shape)
        depth_m = depth_mm.astype(np.float32) / 1000
        valid = (depth_m > MIN_DEPTH_M) & (depth_m < MAX_DEPTH_M)
        if self.filter:
            apply_filter(self.depth_path(i), image, depth_m, valid, depth_mm > 0)
        return pack_sample(image, depth_m, valid, self.name(i), self.depth_path(i))


def depth_of(image):
    """The relative path of the depth map of an image of the processed form."""
    folder, _, file = image.rpartition("rgb_cam_")
    return f"{folder}depth_plane_cam_{file}"


def find_processed(root, split):
    """Relative paths of the images that have a depth map, sorted."""
    base = root
    if any((root / name).is_dir() for name in SPLITS):
        base = root / split
    elif split != "train":
        log.warning("%s has no folders train, val or test: all of it serves as %s.", root, split)
    prefix = "" if base == root else f"{split}/"
    files = {prefix + file for file in walk(base)}
    images = [file for file in files if re.fullmatch(r"(.*/)?rgb_cam_\d+_fr\d+\.png", file)]
    pairs = sorted(image for image in images if depth_of(image) in files)
    if not pairs:
        raise FileNotFoundError(f"{base} holds no pair of rgb_cam_XX_frIIII.png and "
                                "depth_plane_cam_XX_frIIII.png.")
    if len(pairs) < len(images):
        log.warning("%s: %d of %d images have no depth map and are left out.",
                    base, len(images) - len(pairs), len(images))
    return pairs
