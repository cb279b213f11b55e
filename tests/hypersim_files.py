"""Writes frames in the layout of the raw Hypersim release, at a small size."""

import csv

import h5py
import numpy as np

HEIGHT, WIDTH = 48, 64
SPLIT_COLUMNS = ("scene_name", "camera_name", "frame_id", "included_in_public_release",
                 "exclude_reason", "split_partition_name")


def frame_folder(root, scene, kind):
    return root / scene / "images" / f"scene_cam_00_{kind}"


def frame_path(root, scene, frame, content):
    kind = "final_hdf5" if content == "color" else "geometry_hdf5"
    return frame_folder(root, scene, kind) / f"frame.{frame:04d}.{content}.hdf5"


def write_hdf5(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=array, compression="gzip")


def scene_arrays(seed=0):
    """(color float16 H,W,3, distance float16 H,W between 1 and 9 m, entity ids int16 H,W)."""
    random = np.random.default_rng(seed)
    color = random.lognormal(0, 1, (HEIGHT, WIDTH, 3)).astype(np.float16)
    distance_m = (1 + 8 * random.random((HEIGHT, WIDTH))).astype(np.float16)
    return color, distance_m, random.integers(1, 300, (HEIGHT, WIDTH)).astype(np.int16)


def write_frame(root, scene="ai_001_001", frame=0, color=None, distance_m=None, entity=None):
    """What isn't given is that of scene_arrays(frame)."""
    given = {"color": color, "depth_meters": distance_m, "render_entity_id": entity}
    for (content, array), default in zip(given.items(), scene_arrays(frame)):
        write_hdf5(frame_path(root, scene, frame, content), default if array is None else array)


def write_split_csv(root, rows):
    """rows: (scene, frame, split) of public frames, or complete rows of the table."""
    rows = [row if len(row) == 6 else (row[0], "cam_00", row[1], "True", "", row[2])
            for row in rows]
    with open(root / "metadata_images_split_scene_v1.csv", "w", newline="") as file:
        csv.writer(file).writerows([SPLIT_COLUMNS, *rows])


def write_camera_csv(root, cameras):
    """cameras: {scene: M_cam_from_uv 3x3}."""
    columns = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    with open(root / "metadata_camera_parameters.csv", "w", newline="") as file:
        rows = [(scene, *np.ravel(matrix)) for scene, matrix in cameras.items()]
        csv.writer(file).writerows([("scene_name", *columns), *rows])


def write_data_set(root, train=4, val=2):
    """A readable raw data set: `train` frames of ai_001_001 and `val` frames of ai_002_001."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, scene, count in (("train", "ai_001_001", train), ("val", "ai_002_001", val)):
        for frame in range(count):
            write_frame(root, scene, frame)
            rows.append((scene, frame, split))
    write_split_csv(root, rows)
    return root
