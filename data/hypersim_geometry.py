"""From Hypersim's distance along the ray to planar depth, for upright and for tilted cameras.

Source: Roberts et al., "Hypersim", ICCV 2021, and the camera table of apple/ml-hypersim
(contrib/mikeroberts3000/metadata_camera_parameters.csv). Cameras look along -z, with y up.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from data.files import read_table

CAMERA_CSV = "metadata_camera_parameters.csv"
MIN_DEPTH_M, MAX_DEPTH_M = 1e-5, 65.0
TAN_HALF_FOV = np.tan(np.pi / 6)  # 60 degrees across the width: f = 886.81 pixels at 1024


def read_cameras(root):
    """{scene: M_cam_from_uv as 9 floats, row by row} from the camera table; {} if it is absent."""
    path = Path(root) / CAMERA_CSV
    if not path.exists():
        return {}
    keys = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    try:
        return {row["scene_name"]: tuple(float(row[key]) for key in keys)
                for row in read_table(path)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not Hypersim's camera table (trouble with {error}); get it "
                         "again from apple/ml-hypersim, or remove it.") from error


@lru_cache(maxsize=8)
def planar_per_distance(height, width, cam_from_uv=None):
    """Planar depth / distance for the centre of every pixel: float32 H,W, read-only.

    cam_from_uv: the scene's M_cam_from_uv as 9 floats. It takes (u, v, 1), u from -1 (left) to 1,
    v from -1 (bottom) to 1, to a ray (x, y, z) of the camera; the ratio is -z / |ray|. Without
    it: the focal length that the data set's description states, f = (W/2) / tan(30 deg).
    """
    if cam_from_uv is None:
        cam_from_uv = (TAN_HALF_FOV, 0, 0, 0, TAN_HALF_FOV * height / width, 0, 0, 0, -1)
    u = (np.arange(width, dtype=np.float32) + 0.5) / (width / 2) - 1
    v = 1 - (np.arange(height, dtype=np.float32)[:, None] + 0.5) / (height / 2)
    x, y, z = (row[0] * u + row[1] * v + row[2]
               for row in np.asarray(cam_from_uv, np.float32).reshape(3, 3))  # each H,W
    ratio = -z / np.sqrt(x * x + y * y + z * z)
    ratio.setflags(write=False)
    return ratio


def planar_depth(distance_m, entity_id, cam_from_uv=None):
    """Distance along the ray H,W and entity ids H,W -> (planar depth float32 H,W, valid bool H,W).

    Valid: on an object (the id is neither -1 nor 0: Hypersim uses both for pixels without object),
    finite, and between 1e-5 and 65 m. Invalid pixels keep the value computed from the file.
    """
    ratio = planar_per_distance(*distance_m.shape, cam_from_uv)
    depth_m = distance_m.astype(np.float32) * ratio
    # NaN and inf fail the comparisons, too.
    valid = on_object(entity_id) & (depth_m > MIN_DEPTH_M) & (depth_m < MAX_DEPTH_M)
    return depth_m, valid


def on_object(entity_id):
    """Entity ids, any shape -> bool: whether the pixel shows an object."""
    return (entity_id != -1) & (entity_id != 0)
