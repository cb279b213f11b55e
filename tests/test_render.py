"""The miniature's renderer: geometry against closed forms, contents, and the files it writes."""

import csv

import h5py
import imageio.v3 as iio
import numpy as np
import pytest

from miniature import raycast, render, textures
from miniature.builder import CLASSES, Builder
from miniature.raycast import BOX, CYLINDER, SPHERE, Camera, Material, Shape
from miniature.shading import Light, Scene
from miniature.shading import render as draw

WHITE = Material((1.0, 1.0, 1.0), grain=0.0)
GLOWING = Material((1.0, 1.0, 1.0), grain=0.0, emission=1.0)
NO_LIGHT = np.zeros((1, 3))


def scene_of(*shapes, lights=(), ambient=NO_LIGHT):
    return Scene(list(shapes), list(lights), ambient, sky=(0, 0, 0))


def planar_depth(distance_m, focal):
    """Distance along the ray to planar depth, written once more for a picture of any size."""
    height, width = distance_m.shape
    row, col = np.mgrid[0:height, 0:width]
    x, y = col + 0.5 - width / 2, row + 0.5 - height / 2
    return distance_m.astype(np.float64) * focal / np.sqrt(x**2 + y**2 + focal**2)


# ---- casting rays ----


def test_distance_to_the_floor_is_the_hand_computed_one():
    floor = Shape(BOX, (0, 0, -0.1), (50, 50, 0.1), WHITE, entity=7, label=2)
    drawn = draw(scene_of(floor), Camera((0, 0, 1.5), 0.3, 0, 0, width=16, height=12, focal=14.0))
    # Row 9 lies 3.5 pixels below the horizon, column 2 5.5 left of the middle:
    # the ray (-5.5, 3.5, 14) / 14 falls 1.5 m after 1.5 / 3.5 of its length.
    expected = 1.5 / 3.5 * np.sqrt(5.5**2 + 3.5**2 + 14**2)
    assert drawn["distance_m"].dtype == np.float16
    assert drawn["distance_m"][9, 2] == np.float16(expected)
    assert (drawn["entity"][6:] == 7).all() and (drawn["entity"][:6] == -1).all()
    assert np.isnan(drawn["distance_m"][:6]).all() and (drawn["semantic"][:6] == 0).all()


def test_wall_parallel_to_the_picture_has_constant_planar_depth():
    wall = Shape(BOX, (3.5, 0, 0), (0.5, 50, 50), WHITE, entity=1, label=1)
    drawn = draw(scene_of(wall), Camera((0, 0, 1.5), 0, 0, 0, width=32, height=24, focal=27.7))
    distance_m = drawn["distance_m"]
    assert distance_m[0, 0] > distance_m[12, 16] + 0.5
    np.testing.assert_allclose(planar_depth(distance_m, 27.7), 3.0, rtol=2**-11)


def inside(shape, points):
    """Whether points 3,N lie in a shape: the definition that the ray caster is compared with."""
    x, y, z = points - np.array(shape.centre)[:, None]
    if shape.form == SPHERE:
        return x**2 + y**2 + z**2 < shape.half[0] ** 2
    if shape.form == CYLINDER:
        return (x**2 + y**2 < shape.half[0] ** 2) & (np.abs(z) < shape.half[2])
    c, s = np.cos(shape.yaw), np.sin(shape.yaw)
    u, v = c * x + s * y, c * y - s * x
    return (np.abs(u) < shape.half[0]) & (np.abs(v) < shape.half[1]) & (np.abs(z) < shape.half[2])


def test_first_hits_equal_those_of_marching_in_small_steps():
    rng = np.random.default_rng(0)
    builder = Builder(rng)
    for _ in range(8):
        builder.part(rng.uniform(-2, 2, 3), rng.uniform(0, 6), (-0.5, -0.2, 0), (0.4, 0.3, 1),
                     "table", WHITE)  # fmt: skip
        builder.sphere(rng.uniform(-2, 2, 3), rng.uniform(0.1, 0.6), "ball", WHITE)
        x, y, bottom = rng.uniform(-2, 2, 3)
        builder.cylinder(x, y, bottom, bottom + 0.8, rng.uniform(0.1, 0.4), "post", WHITE)
    origin, step = np.array([-4.0, 0.3, 0.2]), 0.002
    d = np.stack([np.ones(150), rng.uniform(-0.6, 0.6, 150), rng.uniform(-0.6, 0.6, 150)])
    t, index = raycast.trace(raycast.Geometry(builder.shapes), origin, d.astype(np.float32))
    marks = np.arange(0, 8, step)
    for ray in range(150):
        points = origin[:, None] + marks * d[:, ray, None]
        within = np.array([inside(shape, points) for shape in builder.shapes])
        if not within.any():
            assert t[ray] == np.inf and index[ray] == -1
            continue
        first = np.argmax(within.any(axis=0))
        assert abs(marks[first] - t[ray]) < step + 1e-4
        assert within[index[ray], first]
    assert 30 < (index == -1).sum() < 120  # both cases occur


def test_a_thin_post_far_away_is_hit_exactly_along_its_width():
    post = Shape(CYLINDER, (0, 150, 0), (0.02, 0.02, 3), WHITE, entity=1, label=9)
    offsets = np.array([-0.03, -0.021, -0.019, 0, 0.019, 0.021, 0.03])
    d = np.stack([offsets / 150, np.ones(7), np.zeros(7)]).astype(np.float32)
    t, _ = raycast.trace(raycast.Geometry([post]), (0, 0, 0), d)
    assert np.isfinite(t).tolist() == [False, False, True, True, True, False, False]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("yaw", [np.pi / 4, -np.pi / 4, 3 * np.pi / 4])
def test_a_ray_along_the_axis_of_a_turned_box_hits_it(yaw):
    box = Shape(BOX, (0, 0, 0), (0.5, 0.5, 0.5), WHITE, entity=0, label=4, yaw=yaw)
    d = np.array([[np.cos(yaw), np.sin(yaw), 0]], np.float32).T
    # The rotation gives the component across exactly 0.
    assert (np.float32(np.cos(yaw)) * d[1] - np.float32(np.sin(yaw)) * d[0] == 0).all()
    for distance_m in (3, 0.8):  # far: sorted out by its sphere; near: not
        t, index = raycast.trace(raycast.Geometry([box]), -distance_m * d[:, 0], d)
        assert index.tolist() == [0]
        np.testing.assert_allclose(t, distance_m - 0.5, rtol=1e-5)


def test_a_box_shades_the_floor_behind_it_and_light_falls_off_with_distance():
    floor = Shape(BOX, (0, 0, -0.1), (50, 50, 0.1), WHITE, entity=0, label=2)
    box = Shape(BOX, (1, 0, 0.5), (0.2, 0.2, 0.5), WHITE, entity=1, label=4)
    light = Light((0, 0, 2), (4.0, 4.0, 4.0))
    points = np.array([(1.5, 0, 0), (-1.5, 0, 0), (1.5, 1.5, 0)], np.float32).T
    geometry = raycast.Geometry([floor, box])
    assert raycast.occluded(geometry, light.position, points).tolist() == [True, False, False]
    down = Camera((0, 0, 1.9), 0, -np.pi / 2, 0, width=16, height=16, focal=8.0)
    color = draw(scene_of(floor, lights=[light]), down)["color"].astype(float)
    x, y = 1.9 / 8 * 0.5, 1.9 / 8 * 7.5  # where the pixel in row 0 and column 8 meets the floor
    square = x**2 + y**2 + 4
    expected = 4.0 * (2 / np.sqrt(square)) / (square + 0.2)
    np.testing.assert_allclose(color[0, 8], expected, rtol=3e-3)


def test_edges_are_anti_aliased_in_colour_only():
    card = Shape(BOX, (4, 0, 0), (0.01, 1, 1), GLOWING, entity=5, label=10)
    camera = Camera((0, 0, 0), 0, 0, 0.3, width=48, height=48, focal=48.0)
    drawn = draw(scene_of(card), camera)
    shares = set(np.unique(drawn["color"].astype(float)))
    assert {0, 1} < shares <= {0, 0.25, 0.5, 0.75, 1}  # four rays a pixel
    assert np.unique(drawn["entity"]).tolist() == [-1, 5]
    area = (2 * 48 / 3.99) ** 2
    assert abs(drawn["color"][..., 0].astype(float).sum() - area) < 0.01 * area


def test_patterns_fade_into_their_mean_where_a_pixel_covers_them():
    u, v = np.random.default_rng(0).uniform(-9, 9, (2, 500))
    near, far, shift = np.full(500, 0.01), np.full(500, 8.0), np.zeros(500)
    fine = textures.mixing_weight("checker", u, v, near, near, shift)
    truth = (np.floor(u) + np.floor(v)) % 2 == 0
    assert np.mean(np.abs(fine - truth) < 1e-6) > 0.95
    blurred = textures.mixing_weight("checker", u, v, far, far, shift)
    np.testing.assert_allclose(blurred, 0.5, atol=1e-6)
    with pytest.raises(ValueError, match="tartan"):
        textures.mixing_weight("tartan", u, v, near, near, shift)


# ---- rooms and streets ----


@pytest.fixture(scope="module")
def rooms():
    return [render.render_room("val", k, k % 2) for k in range(12)]


def test_a_frame_is_a_pure_function_of_split_index_and_frame(rooms):
    again = render.render_room("val", 3, 1)
    for name, value in rooms[3].items():
        np.testing.assert_array_equal(value, again[name])
    for other in (("train", 3, 1), ("val", 4, 1), ("val", 3, 0)):
        assert np.mean(render.render_room(*other)["entity"] != again["entity"]) > 0.1


def test_rooms_have_depth_light_and_objects(rooms):
    for room in rooms:
        assert room["color"].shape == (192, 256, 3) and room["color"].dtype == np.float16
        assert np.isfinite(room["color"]).all() and (room["color"] >= 0).all()
        hit = room["entity"] >= 0
        np.testing.assert_array_equal(hit, np.isfinite(room["distance_m"]))
        np.testing.assert_array_equal(hit, room["semantic"] > 0)
        distance_m = room["distance_m"][hit].astype(float)
        assert distance_m.min() > 0.2 and np.median(distance_m) > 1.5 and np.ptp(distance_m) > 0.5
        picture = render._tone_map(room["color"])
        assert 60 < picture.mean() < 200 and picture.std() > 10
        assert (picture.min(axis=-1) >= 254).mean() < 0.15  # overexposed
    assert sum((room["entity"] == -1).mean() > 0.03 for room in rooms) <= 1
    spans = [np.nanquantile(room["distance_m"].astype(float), (0.01, 0.99)) for room in rooms]
    assert sum(far > 2 * near for near, far in spans) >= 9
    seen = {CLASSES[k] for room in rooms for k in np.unique(room["semantic"])}
    assert seen >= {"wall", "floor", "ceiling", "cabinet", "table", "seat", "post", "frame"}


def test_the_floor_of_a_room_is_flat(rooms):
    """Back-projected with Hypersim's focal length, the floor's pixels lie in one plane."""
    focal = 128 / np.tan(np.pi / 6)
    tested = 0
    for room in rooms:
        floor = room["semantic"] == CLASSES.index("floor")
        if floor.sum() < 2000:
            continue
        z = planar_depth(room["distance_m"], focal)[floor]
        row, col = np.nonzero(floor)
        points = np.stack([(col + 0.5 - 128) * z / focal, (row + 0.5 - 96) * z / focal, z], axis=1)
        points -= points.mean(axis=0)
        height_m = points @ np.linalg.svd(points, full_matrices=False)[2][2]
        assert np.quantile(np.abs(height_m), 0.99) < 0.02  # a rug is 1.2 cm thick
        tested += 1
    assert tested >= 5


# ---- files ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniature")
    render.ensure(root, train=1, val=2, streets_train=1, streets_val=1, workers=1)
    return root


def read_h5(path):
    with h5py.File(path) as file:
        assert list(file) == ["dataset"]
        return file["dataset"][:]


def test_rooms_are_written_in_hypersims_layout(root, rooms):
    images = root / "hypersim/ai_900_001/images"
    geometry = images / "scene_cam_00_geometry_hdf5"
    expected = rooms[0]
    for path, name, dtype in (
        (images / "scene_cam_00_final_hdf5/frame.0000.color.hdf5", "color", np.float16),
        (geometry / "frame.0000.depth_meters.hdf5", "distance_m", np.float16),
        (geometry / "frame.0000.render_entity_id.hdf5", "entity", np.int16),
        (geometry / "frame.0000.semantic.hdf5", "semantic", np.int16),
    ):
        written = read_h5(path)
        assert written.dtype == dtype
        np.testing.assert_array_equal(written, expected[name])


def test_streets_are_written_in_virtual_kittis_layout(root):
    frames = root / "vkitti/Scene01/clone/frames"
    picture = iio.imread(frames / "rgb/Camera_0/rgb_00000.jpg")
    depth_cm = iio.imread(frames / "depth/Camera_0/depth_00000.png")
    assert picture.shape == (104, 344, 3) and picture.dtype == np.uint8
    assert depth_cm.shape == (104, 344) and depth_cm.dtype == np.uint16
    drawn = render.render_street("val", 0)
    np.testing.assert_array_equal(depth_cm == 65535, drawn["entity"] == -1)
    # Virtual KITTI 2's focal length is 725 pixels at a width of 1242; depth is planar.
    hit = drawn["entity"] >= 0
    expected = 100 * planar_depth(drawn["distance_m"], 725.0087 * 344 / 1242)[hit]
    np.testing.assert_allclose(depth_cm[hit], expected, atol=0.51)
    assert (root / "vkitti/Scene02/clone/frames/rgb/Camera_0/rgb_00000.jpg").exists()
    assert np.abs(picture.astype(int) - render._tone_map(drawn["color"])).mean() < 5


def test_ensure_adds_what_is_absent_and_keeps_the_rest(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*5")}
    render.ensure(root, train=3, val=1, workers=2)
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*.*5")}
    assert len(before) == 4 * 3 and len(after) == 4 * 5
    assert before.items() <= after.items()
    assert not list(root.rglob("*.tmp"))
    with open(root / "hypersim/metadata_images_split_scene_v1.csv") as file:
        rows = list(csv.DictReader(file))
    listed = [(r["scene_name"], r["frame_id"], r["split_partition_name"]) for r in rows]
    train = [("ai_001_001", "0"), ("ai_001_002", "0"), ("ai_001_003", "0")]
    val = [("ai_900_001", "0"), ("ai_900_001", "1")]
    assert listed == [(*r, "train") for r in train] + [(*r, "val") for r in val]
    columns = "camera_name", "included_in_public_release", "exclude_reason"
    assert {tuple(r[name] for name in columns) for r in rows} == {("cam_00", "True", "")}


def test_a_negative_number_of_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 or more frames"):
        render.ensure(tmp_path, train=-1)
