"""extras/points.py: the geometry of points and meshes, and the files read back."""

import sys

import numpy as np
import pytest
from PIL import Image

from extras import libraries
from extras.points import focal_pixels, kept, to_points, write_glb, write_ply

plyfile, trimesh = pytest.importorskip("plyfile"), pytest.importorskip("trimesh")
SIZE = 120, 160
FOV = 60.0
CAMERA_M, WALL_M = 1.5, 6.0  # height of the camera, its distance to the wall


def room(tilt=0.35, wall=WALL_M):
    """A floor and a wall at right angles, seen by a camera that looks down by `tilt` radians.

    Returns depth float32 H,W in metres, an image, and where the floor is.
    """
    height, width = SIZE
    focal = focal_pixels(SIZE, fov=FOV)[0]
    ray = np.stack(np.broadcast_arrays((np.arange(width) + 0.5 - width / 2) / focal,
                                       (np.arange(height)[:, None] + 0.5 - height / 2) / focal, 1),
                   axis=-1)  # H,W,3 with z = 1: a ray's multiple is the depth
    down = np.array([0, np.cos(tilt), np.sin(tilt)])
    ahead = np.array([0, -np.sin(tilt), np.cos(tilt)])
    with np.errstate(divide="ignore"):
        floor_m, wall_m = CAMERA_M / (ray @ down), wall / (ray @ ahead)
    floor = (floor_m > 0) & (floor_m < wall_m)
    return np.where(floor, floor_m, wall_m).astype(np.float32), picture(), floor


def picture():
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def step():
    """A near plane of 2 m beside a far one of 3 m; the step is between the columns 79 and 80."""
    depth_m = np.full(SIZE, 2, np.float32)
    depth_m[:, 80:] = 3
    return depth_m


def plane(points):
    """(normal, largest distance in metres) of the plane that fits N,3 points best."""
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    normal = np.linalg.svd(centred, full_matrices=False)[2][2]
    return normal, np.abs(centred @ normal).max()


def test_a_room_has_planes_at_right_angles():
    depth_m, image, floor = room()
    focal_px = focal_pixels(SIZE, fov=FOV)[0]
    xyz, rgb = to_points(depth_m, focal_px, image, edge=0)
    np.testing.assert_array_equal(rgb, image.reshape(-1, 3))
    floor_normal, floor_off = plane(xyz[floor.ravel()])
    wall_normal, wall_off = plane(xyz[~floor.ravel()])
    assert max(floor_off, wall_off) < 1e-3
    assert abs(np.degrees(np.arccos(abs(floor_normal @ wall_normal))) - 90) < 0.1
    assert (xyz[floor.ravel()] @ [0, np.cos(0.35), np.sin(0.35)]
            == pytest.approx(CAMERA_M, abs=1e-4)), "y down, z forward, in metres"
    wrong, _ = to_points(depth_m, focal_pixels(SIZE, fov=80)[0], edge=0)
    assert abs(np.degrees(np.arccos(abs(plane(wrong[floor.ravel()])[0]
                                        @ plane(wrong[~floor.ravel()])[0]))) - 90) > 1


def test_by_hand():
    depth_m = np.float32([[2, 0, np.nan], [-1, np.inf, 4]])
    xyz, rgb = to_points(depth_m, 10, edge=0)
    np.testing.assert_allclose(xyz, [[-0.2, -0.1, 2], [0.4, 0.2, 4]], rtol=1e-6)
    assert xyz.dtype == np.float32 and rgb is None


@pytest.mark.parametrize("tilt, wall, steep", [(0.35, WALL_M, 1.02), (0.1, 60, 1.2)])
def test_edges_leave_planes_whole(tilt, wall, steep):
    """Far off, the floor's depth grows by up to a quarter from row to row."""
    depth_m, _, floor = room(tilt, wall)
    keep = kept(depth_m, 0.04)
    crease = floor.argmax(axis=0)  # first row of the floor, in each column
    away = np.abs(np.arange(SIZE[0])[:, None] - crease) > 1
    assert (depth_m[:-1] / depth_m[1:]).max() > steep
    assert keep[away].all() and away.mean() > 0.97


def test_a_step_loses_both_sides():
    for depth_m, lost in ((step(), [79, 80]), (step()[:, 79:], [0, 1])):
        keep = kept(depth_m, 0.04)
        assert sorted(set(np.nonzero(~keep)[1])) == lost
        assert (~keep[:, lost]).all()
        np.testing.assert_array_equal(kept(depth_m.T, 0.04), keep.T)
        assert kept(depth_m, 0).all()


def test_beside_a_hole_points_stay():
    depth_m = np.full((5, 5), 2, np.float32)
    depth_m[2, 2] = np.nan
    assert kept(depth_m, 0.04).sum() == 24


@pytest.mark.parametrize("coloured", [True, False])
def test_ply_read_back(tmp_path, coloured):
    depth_m, image, _ = room()
    xyz, rgb = to_points(depth_m, 140, image if coloured else None)
    write_ply(tmp_path / "a.ply", xyz, rgb, ["metres\nx right", "fünf \udcff"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]
    file = plyfile.PlyData.read(tmp_path / "a.ply")
    assert not file.text and file.byte_order == "<"
    assert file.comments == ["metres x right", r"f\xfcnf \udcff"]
    vertices = file["vertex"].data
    np.testing.assert_array_equal(np.stack([vertices[k] for k in "xyz"], axis=1), xyz)
    cloud = trimesh.load(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.vertices, xyz)
    if coloured:
        assert vertices.dtype["red"] == np.uint8
        np.testing.assert_array_equal(cloud.colors[:, :3], rgb)
    else:
        assert vertices.dtype.names == ("x", "y", "z")


def read_glb(path):
    return trimesh.load(path, force="mesh", process=False)


def test_glb_read_back(tmp_path):
    depth_m, image = step(), picture()
    write_glb(tmp_path / "a.glb", depth_m, 140, image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.glb"]
    assert b"KHR_materials_unlit" in (tmp_path / "a.glb").read_bytes()
    mesh = read_glb(tmp_path / "a.glb")
    xyz, rgb = to_points(depth_m, 140, image)
    np.testing.assert_array_equal(mesh.vertices, xyz * np.float32([1, -1, -1]))
    assert len(mesh.faces) == 2 * (79 - 1 + 79 - 1) * 119, "two planes of 79 columns"
    assert (mesh.face_normals[:, 2] > 0.99).all(), "they face the camera"
    assert np.ptp(mesh.vertices[mesh.faces][..., 2], axis=1).max() == 0, "none spans the step"
    texture = np.array(mesh.visual.material.baseColorTexture)
    np.testing.assert_array_equal(texture, image)
    uv = mesh.visual.uv * [SIZE[1], SIZE[0]]
    np.testing.assert_array_equal(texture[SIZE[0] - 1 - uv[:, 1].astype(int),
                                          uv[:, 0].astype(int)], rgb)


def test_glb_without_edges_or_colours(tmp_path):
    write_glb(tmp_path / "a.glb", step(), 140, edge=0)
    mesh = read_glb(tmp_path / "a.glb")
    assert len(mesh.faces) == 2 * 159 * 119
    assert np.ptp(mesh.vertices[mesh.faces][..., 2], axis=1).max() == 1, "some span the step"


def test_focal_length(tmp_path):
    assert focal_pixels((100, 200), fov=90) == (pytest.approx(100), "90 degrees given")
    assert focal_pixels((100, 200), fov=90, focal=123.5) == (123.5, "123.5 pixels given")
    assumed, how = focal_pixels((100, 200))
    assert assumed == pytest.approx(192.098, abs=1e-3)  # 100 / tan(27.5 degrees)
    assert how == "55 degrees assumed: give --fov or --focal"
    path = save_with_focal_length(tmp_path / "a.jpg", 28)
    focal, how = focal_pixels((300, 400), picture=path)
    assert how == "from EXIF: 28 mm" and focal == pytest.approx(28 / 43.2666 * 500, rel=1e-5)
    assert focal_pixels((100, 200), fov=90, picture=path)[1] == "90 degrees given"


@pytest.mark.parametrize("value", [None, 0, "wide", b"\xff" * 30])
def test_no_focal_length_in_exif(tmp_path, value):
    path = save_with_focal_length(tmp_path / "a.jpg", value)
    assert focal_pixels((300, 400), picture=path)[1].startswith("55 degrees assumed")


def save_with_focal_length(path, value):
    """Writes a picture with a focal length in EXIF, or with these bytes as EXIF, or without."""
    exif = Image.Exif()
    if isinstance(value, bytes):
        exif = b"Exif\0\0" + value
    elif value is not None:
        exif.get_ifd(0x8769)[0xA405] = value
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    return path


def test_no_point_left(tmp_path):
    holes = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="no point is left"):
        to_points(holes, 10)
    with pytest.raises(ValueError, match="no point is left"):
        write_glb(tmp_path / "a.glb", holes, 10)
    holes[::2, ::2] = 1  # no two neighbours
    assert len(to_points(holes, 10)[0]) == 4
    with pytest.raises(ValueError, match="no triangle is left"):
        write_glb(tmp_path / "a.glb", holes, 10)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    for kind, module in libraries.LIBRARIES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"^{kind} needs {module}: pip install -r "
                                             "extras/requirements.txt$"):
            libraries.need(kind)
    with pytest.raises(ValueError, match="plyfile"):
        write_ply(tmp_path / "a.ply", np.zeros((1, 3), np.float32), None)


def test_a_full_disk_leaves_no_file(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plyfile.PlyData, "write", full)
    with pytest.raises(OSError, match="a.ply can't be written .*make room"):
        write_ply(tmp_path / "a.ply", np.zeros((1, 3), np.float32), None)
    assert not list(tmp_path.iterdir())
