"""A metric depth map as points or as a mesh, in colour, and the focal length for it.

Camera axes: x right, y down, z forward, in metres; the principal point is the picture's centre.
"""

import math

import numpy as np
from PIL import ExifTags, Image

from data.images import open_picture
from extras.libraries import need
from storage import whole

FOV = 55.0  # degrees, horizontal: assumed where nothing is known
DIAGONAL_MM = math.hypot(36, 24)  # of the film that EXIF's equivalent focal length refers to


def focal_pixels(size, fov=None, focal=None, picture=None):
    """The focal length in pixels for a map of `size` (height, width), and a phrase that says how.

    From, in this order: focal (pixels), fov (horizontal, degrees), the EXIF data of the file
    `picture`, FOV.
    """
    if focal:
        return float(focal), f"{focal:g} pixels given"
    if fov:
        return from_fov(size, fov), f"{fov:g} degrees given"
    focal_mm = exif_focal_mm(picture) if picture else None
    if focal_mm:
        return focal_mm / DIAGONAL_MM * math.hypot(*size), f"from EXIF: {focal_mm:g} mm"
    return from_fov(size, FOV), f"{FOV:g} degrees assumed: give --fov or --focal"


def from_fov(size, fov):
    return size[1] / 2 / math.tan(math.radians(fov) / 2)


def exif_focal_mm(path):
    """The focal length for 35 mm film in a picture's EXIF data, or None."""
    try:  # EXIF data may be malformed
        with open_picture(path) as picture:
            tags = picture.getexif().get_ifd(ExifTags.IFD.Exif)
        focal_mm = float(tags[ExifTags.Base.FocalLengthIn35mmFilm])
    except Exception:
        return None
    return focal_mm if 0 < focal_mm < math.inf else None


def kept(depth_m, edge):
    """Where a map H,W has a depth and no edge -> bool H,W. ValueError if that is nowhere.

    An edge is where the inverse depth bends by more than the share `edge` of itself: it is linear
    on a plane, so that a steep plane has none. Both sides of a step are edges. edge 0: none are.
    """
    keep = np.isfinite(depth_m) & (depth_m > 0)
    if edge:
        with np.errstate(all="ignore"):
            inverse = np.where(keep, 1 / depth_m, np.nan)  # NaN: unknown beside a hole
            for axis in (0, 1):
                keep &= ~(bend(inverse, axis) > edge * inverse)
    if not keep.any():
        raise ValueError("no point is left: the map has no depth, or edges everywhere "
                         "(--edge-filter).")
    return keep


def bend(values, axis):
    """|second difference| along an axis, of the same shape; a border has its neighbour's."""
    if values.shape[axis] < 3:
        return np.zeros_like(values)
    pad = [(1, 1) if number == axis else (0, 0) for number in range(values.ndim)]
    return np.pad(np.abs(np.diff(values, 2, axis)), pad, mode="edge")


def positions(depth_m, focal_px):
    """Each pixel's point x, y, z in metres, float32 H,W,3."""
    height, width = depth_m.shape
    x = (np.arange(width) + 0.5 - width / 2) / focal_px
    y = (np.arange(height) + 0.5 - height / 2) / focal_px
    z = depth_m.astype(np.float32)
    with np.errstate(invalid="ignore"):  # 0 * inf, where there is no depth
        return np.stack([x.astype(np.float32) * z, y.astype(np.float32)[:, None] * z, z], axis=-1)


def to_points(depth_m, focal_px, image=None, edge=0.04):
    """Depth H,W and an image uint8 H,W,3 -> points float32 M,3 and colours uint8 M,3 or None.

    Pixels without depth (0, negative, NaN, inf) and at edges (`kept`) are left out.
    """
    keep = kept(depth_m, edge)
    return positions(depth_m, focal_px)[keep], None if image is None else image[keep]


def write_ply(path, xyz, rgb, comments=()):
    """Writes points float32 M,3 and colours uint8 M,3 or None as PLY, whole or not at all."""
    ply = need("PLY")
    columns = {name: xyz[:, i] for i, name in enumerate("xyz")}
    if rgb is not None:
        columns |= {name: rgb[:, i] for i, name in enumerate(("red", "green", "blue"))}
    kinds = [(name, "<f4" if name in "xyz" else "u1") for name in columns]
    vertices = np.empty(len(xyz), kinds)
    for name, values in columns.items():
        vertices[name] = values
    # A comment is one line of ASCII.
    lines = [" ".join(text.encode("ascii", "backslashreplace").decode().split())
             for text in comments]
    with whole(path) as temporary, open(temporary, "wb") as file:
        ply.PlyData([ply.PlyElement.describe(vertices, "vertex")], byte_order="<",
                    comments=lines).write(file)


def write_glb(path, depth_m, focal_px, image=None, edge=0.04, comments=()):
    """Writes depth H,W as a mesh with the image uint8 H,W,3 as its texture, whole or not at all.

    Each kept pixel is a vertex, in the axes of glTF: x right, y up, z backward. Four that form a
    square are two triangles. Raises ValueError if there is none.
    """
    trimesh = need("GLB")
    keep = kept(depth_m, edge)
    vertices = positions(depth_m, focal_px)[keep] * np.float32([1, -1, -1])
    faces = triangles(keep)
    if not len(faces):
        raise ValueError("no triangle is left: no four neighbours have depth and no edge "
                         "(--edge-filter).")
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    if image is not None:  # no vertex colours: glTF takes them for linear, not sRGB
        rows, columns = np.nonzero(keep)
        uv = np.stack([(columns + 0.5) / keep.shape[1], 1 - (rows + 0.5) / keep.shape[0]], axis=1)
        material = trimesh.visual.material.PBRMaterial(
            baseColorTexture=Image.fromarray(image), metallicFactor=0, doubleSided=True)
        mesh.visual = trimesh.visual.TextureVisuals(uv, material=material)
    def finish(tree):
        without_lights(tree)
        tree["asset"]["extras"] = {"comments": [*comments, "in this file: y up, z backward"]}

    content = mesh.export(file_type="glb", tree_postprocessor=finish)
    with whole(path) as temporary:
        temporary.write_bytes(content)


def triangles(keep):
    """Triangles of the kept pixels of bool H,W -> M,3 numbers of pixels, counted among the kept."""
    number = np.cumsum(keep, dtype=np.int32).reshape(keep.shape) - 1
    square = keep[:-1, :-1] & keep[:-1, 1:] & keep[1:, :-1] & keep[1:, 1:]
    a, b = number[:-1, :-1][square], number[:-1, 1:][square]  # a b
    c, d = number[1:, :-1][square], number[1:, 1:][square]    # c d
    return np.stack([a, c, b, b, c, d], axis=1).reshape(-1, 3)  # anticlockwise for the camera


def without_lights(tree):
    """Says in glTF's tree that viewers show the texture as it is: the picture is already lit."""
    for material in tree.get("materials", []):
        material["extensions"] = {"KHR_materials_unlit": {}}
        tree["extensionsUsed"] = ["KHR_materials_unlit"]
