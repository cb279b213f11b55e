"""Renders the miniature data set and writes it in the layouts of Hypersim and Virtual KITTI 2.

    python -m miniature.render OUT --train 400 --val 48 --streets-train 100 --streets-val 16

OUT/hypersim is read like the raw Hypersim release, OUT/vkitti like Virtual KITTI 2. What a frame
shows is a pure function of (split, index): rendering more never changes a frame that is there.
"""

import argparse
import csv
import multiprocessing
import re
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

from miniature.builder import CLASSES
from miniature.rooms import room_camera, room_scene
from miniature.shading import render
from miniature.streets import street_camera, street_scene
from storage import whole

__all__ = ["CLASSES", "ensure", "render_room", "render_street"]

SEED = 20250105
SPLITS = ("train", "val")
ROOM_SIZE = 192, 256  # height, width
STREET_SIZE = 104, 344
FRAMES_PER_ROOM = {"train": 1, "val": 2}  # every frame to train on shows another room
FIRST_VOLUME = {"train": 1, "val": 900}  # the VVV of ai_VVV_NNN
STREET_SCENE = {"train": "Scene02", "val": "Scene01"}  # as Virtual KITTI 2 is usually split
SPLIT_TABLE = "metadata_images_split_scene_v1.csv"
COLUMNS = (
    "scene_name", "camera_name", "frame_id", "included_in_public_release", "exclude_reason",
    "split_partition_name",
)  # fmt: skip


def render_room(split, index, frame):
    """Draws frame `frame` of room `index` of a split ("train" or "val"), 192x256.

    Returns a dict of `color` H,W,3 float16 (linear HDR RGB), `distance_m` H,W float16 (along the
    ray, NaN where nothing is hit), `entity` H,W int16 (-1 where nothing is hit) and `semantic`
    H,W int16 (index into CLASSES).
    """
    key = [SEED, 0, SPLITS.index(split), index]
    room, scene = room_scene(np.random.default_rng(key))
    height, width = ROOM_SIZE
    camera = room_camera(room, scene, np.random.default_rng([*key, frame + 1]), width, height)
    return render(scene, camera)


def render_street(split, index):
    """Draws street `index` of a split, 104x344; the same dict as `render_room`."""
    scene, camera = _street(split, index)
    return render(scene, camera)


def ensure(root, train=0, val=0, streets_train=0, streets_val=0, workers=2):
    """Renders the frames that are absent under root/hypersim (rooms) and root/vkitti (streets).

    The numbers count frames; frames beyond them that are already there stay. The rooms' split
    table lists exactly the frames on disk. Worker processes are spawned: a script that calls this
    with several workers needs `if __name__ == "__main__"`. Raises ValueError for a negative number.
    """
    if min(train, val, streets_train, streets_val) < 0 or workers < 1:
        raise ValueError(
            f"Nothing can be rendered to {root} with a negative number of frames or without a "
            "worker; ask for 0 or more frames and 1 or more workers."
        )
    root = Path(root)
    jobs = []
    for split, rooms, streets in (("train", train, streets_train), ("val", val, streets_val)):
        jobs += [(_write_room, root / "hypersim", split, k) for k in range(rooms)]
        jobs += [(_write_street, root / "vkitti", split, k) for k in range(streets)]
    _run([job for job in jobs if not _is_complete(*job)], workers)
    if train or val:
        _write_split_table(root / "hypersim")


def _is_complete(write, folder, split, k):
    files = _room_files if write is _write_room else _street_files
    return all(path.exists() for path in files(folder, split, k).values())


def _run(jobs, workers):
    """Calls every job (function, *arguments), in processes if that can help."""
    workers = min(workers, len(jobs))
    with tqdm(total=len(jobs), desc="rendering", unit="frame", disable=not jobs) as bar:
        if workers <= 1:
            for job in jobs:
                bar.update(_call(job))
            return
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for done in pool.imap_unordered(_call, jobs, chunksize=2):
                bar.update(done)


def _call(job):
    function, *arguments = job
    function(*arguments)
    return 1


def _street(split, index):
    key = [SEED, 1, SPLITS.index(split), index]
    scene, half_road = street_scene(np.random.default_rng(key))
    height, width = STREET_SIZE
    return scene, street_camera(half_road, np.random.default_rng([*key, 1]), width, height)


# ---- Hypersim's raw layout ----


def _room_files(folder, split, k):
    """The HDF5 paths of the k-th frame of a split."""
    index, frame = divmod(k, FRAMES_PER_ROOM[split])
    scene = f"ai_{FIRST_VOLUME[split] + index // 100:03d}_{index % 100 + 1:03d}"
    images = folder / scene / "images"
    geometry = images / "scene_cam_00_geometry_hdf5"
    return dict(
        distance_m=geometry / f"frame.{frame:04d}.depth_meters.hdf5",
        entity=geometry / f"frame.{frame:04d}.render_entity_id.hdf5",
        semantic=geometry / f"frame.{frame:04d}.semantic.hdf5",
        color=images / "scene_cam_00_final_hdf5" / f"frame.{frame:04d}.color.hdf5",
    )


def _write_room(folder, split, k):
    drawn = render_room(split, *divmod(k, FRAMES_PER_ROOM[split]))
    for name, path in _room_files(folder, split, k).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset("dataset", data=drawn[name], compression=1, shuffle=True)


def _write_split_table(folder):
    """Lists the frames on disk in the columns of Hypersim's own split table."""
    rows = []
    for path in sorted(folder.glob("ai_*/images/scene_cam_00_final_hdf5/frame.*.color.hdf5")):
        scene, frame = path.parts[-4], int(path.name.split(".")[1])
        volume = int(re.match(r"ai_(\d+)_", scene)[1])
        split = "val" if volume >= FIRST_VOLUME["val"] else "train"
        rows.append((scene, "cam_00", frame, True, "", split))
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / SPLIT_TABLE) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


# ---- Virtual KITTI 2's layout ----


def _street_files(folder, split, k):
    """The picture and depth paths of the k-th street of a split."""
    frames = folder / STREET_SCENE[split] / "clone" / "frames"
    return dict(
        rgb=frames / "rgb" / "Camera_0" / f"rgb_{k:05d}.jpg",
        depth=frames / "depth" / "Camera_0" / f"depth_{k:05d}.png",
    )


def _write_street(folder, split, k):
    scene, camera = _street(split, k)
    drawn = render(scene, camera)
    rays = camera.centre_rays().reshape(3, *STREET_SIZE)
    planar_cm = 100 * drawn["distance_m"].astype(np.float64) / np.linalg.norm(rays, axis=0)
    planar_cm = np.clip(np.round(np.nan_to_num(planar_cm)), 0, 65534)  # 65535 is the sky
    depth = np.where(drawn["entity"] == -1, 65535, planar_cm).astype(np.uint16)
    files = _street_files(folder, split, k)
    _write_picture(files["rgb"], _tone_map(drawn["color"]), {"quality": 95})
    _write_picture(files["depth"], depth, {})


def _write_picture(path, picture, options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        iio.imwrite(temporary, picture, extension=path.suffix, **options)


def _tone_map(color):
    """Linear HDR H,W,3 to uint8: the 90th percentile of brightness becomes 0.8, gamma 2.2."""
    color = color.astype(np.float32)
    bright = np.percentile(color @ np.array([0.3, 0.59, 0.11], np.float32), 90)
    exposed = np.clip(color * (0.8**2.2 / bright), 0, 1)
    return (exposed ** (1 / 2.2) * 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description="Render the miniature rooms and streets.")
    parser.add_argument("out", type=Path, help="folder that receives hypersim/ and vkitti/")
    parser.add_argument("--train", type=int, default=400, help="frames of rooms to train on")
    parser.add_argument("--val", type=int, default=48, help="frames of rooms to validate on")
    parser.add_argument("--streets-train", type=int, default=100, help="streets to train on")
    parser.add_argument("--streets-val", type=int, default=16, help="streets to validate on")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    asked = parser.parse_args()
    streets = asked.streets_train, asked.streets_val
    ensure(asked.out, asked.train, asked.val, *streets, workers=asked.workers)


if __name__ == "__main__":
    from engine import job  # not at the top: the worker processes need no torch

    job.run(main)
