"""data/hypersim.py and data/hypersim_geometry.py, on frames in the official layout."""

import pickle
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from hypersim_files import (
    HEIGHT,
    WIDTH,
    frame_folder,
    frame_path,
    scene_arrays,
    write_camera_csv,
    write_data_set,
    write_frame,
    write_hdf5,
    write_split_csv,
)

from data.sources import open_benchmark
from data.files import read_hdf5, read_table
from data.hypersim import SPLIT_CSV, Hypersim, ProcessedHypersim, tone_map
from data.hypersim_geometry import planar_depth, planar_per_distance, read_cameras
from data.sources import open_training_source
from data.transforms import BadSample, FilteredSample

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "hypersim"
TILTED = np.array([[0.58, 0, -0.07], [0, 0.43, 0.09], [0.01, 0.004, -1.004]])
ALL_OBJECT = np.ones((HEIGHT, WIDTH), np.int16)


# ---- geometry ----


@pytest.mark.parametrize("height, width", [(768, 1024), (48, 64), (35, 51)])
def test_constant_focal_length(height, width):
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height)[:, None] - (height - 1) / 2
    focal = width / 2 / np.tan(np.radians(30))
    expected = focal / np.sqrt(x**2 + y**2 + focal**2)
    if width == 1024:
        assert x[0] == -511.5 and y[0] == -383.5 and abs(focal - 886.81) < 0.001
    np.testing.assert_allclose(planar_per_distance(height, width), expected, rtol=1e-6)


def test_rays_of_a_tilted_camera():
    ratio = planar_per_distance(HEIGHT, WIDTH, tuple(TILTED.ravel()))
    for row, column in ((0, 0), (5, 60), (47, 31)):
        ray = TILTED @ [(column + 0.5) / 32 - 1, 1 - (row + 0.5) / 24, 1]
        assert abs(ratio[row, column] + ray[2] / np.linalg.norm(ray)) < 1e-6


def test_what_is_not_depth_is_invalid_before_anything_is_rounded():
    distance_m = np.full((1, 10), 5, np.float16)
    distance_m[0, 1:8] = [80, np.nan, np.inf, -np.inf, 0, -3, 1e-5]
    entity = np.ones((1, 10), np.int16)
    entity[0, 8:] = -1, 0
    depth_m, valid = planar_depth(distance_m, entity)
    assert valid.tolist() == [[True] + [False] * 9]
    ratio = planar_per_distance(1, 10)[0]
    assert depth_m[0, 1] == np.float32(80) * ratio[1]  # the value of the file, not of the mask
    assert depth_m[0, 8] == np.float32(5) * ratio[8]


def test_65_metres_are_planar_metres():
    distance_m = np.full((HEIGHT, WIDTH), 66, np.float16)
    depth_m, valid = planar_depth(distance_m, ALL_OBJECT)
    assert np.array_equal(valid, depth_m < 65) and 0 < valid.mean() < 1


@pytest.fixture(scope="module")
def real_frame():
    """(distance H,W, M_cam_from_uv, camera to world rotation, camera position in metres)."""
    if not SAMPLES.exists():
        pytest.skip("the real frame is not here")
    scene = SAMPLES / "ai_037_002"
    pose = scene / "_detail" / "cam_00"
    metres_per_unit = 0.01  # of this scene
    return (read_hdf5(frame_path(SAMPLES, "ai_037_002", 0, "depth_meters")),
            read_cameras(SAMPLES)["ai_037_002"],
            read_hdf5(pose / "camera_keyframe_orientations.hdf5")[0],
            read_hdf5(pose / "camera_keyframe_positions.hdf5")[0] * metres_per_unit)


def plane_residuals(points):
    centred = points - points.mean(0)
    return np.abs(centred @ np.linalg.svd(centred, full_matrices=False)[2][2])


def test_real_floor_is_flat_with_the_scenes_camera(real_frame):
    distance_m, camera, to_world, position_m = real_frame
    height, width = distance_m.shape
    u, v = (np.arange(width) + 0.5) / 512 - 1, 1 - (np.arange(height)[:, None] + 0.5) / 384
    rays = np.stack(np.broadcast_arrays(u, v, 1.0), -1) @ np.reshape(camera, (3, 3)).T
    rays /= -rays[..., 2:]
    residual_m = {}
    for name, matrix in (("scene", camera), ("constant", None)):
        depth_m, valid = planar_depth(distance_m, np.ones_like(distance_m, np.int16), matrix)
        assert valid.all()
        floor = (rays * depth_m[..., None])[700:].reshape(-1, 3)  # rows of bare floor, no rug
        residual_m[name] = plane_residuals(floor).max()
        if name == "scene":
            # In the world's frame the floor is the plane z = 0.
            assert np.abs((floor @ to_world.T + position_m)[:, 2]).max() < 0.001
    # float16 distances of 3 to 4.4 m are rounded by up to 2 mm along rays that graze the floor.
    assert residual_m["scene"] < 0.001
    assert residual_m["constant"] > 0.005


def test_real_frame_differs_from_the_constant_focal_length(real_frame):
    distance_m, camera, _, _ = real_frame
    entity = np.ones_like(distance_m, np.int16)
    exact_m, constant_m = planar_depth(distance_m, entity, camera)[0], planar_depth(
        distance_m, entity)[0]
    error_m = constant_m - exact_m
    assert (round(error_m.min(), 2), round(error_m.max(), 2)) == (-0.24, 0.38)
    per_cent = 100 * error_m / exact_m
    assert (round(per_cent.min(), 1), round(per_cent.max(), 1)) == (-5.0, 5.7)


def test_real_scenes_differ_from_the_constant_focal_length():
    """The counts that the README states."""
    if not SAMPLES.exists():
        pytest.skip("the real tables are not here")
    train = {row["scene_name"] for row in read_table(SAMPLES / SPLIT_CSV)
             if row["split_partition_name"] == "train"}
    constant = planar_per_distance(768, 1024)
    error = np.array([np.abs(constant / planar_per_distance(768, 1024, camera) - 1).max()
                      for scene, camera in read_cameras(SAMPLES).items() if scene in train])
    assert (len(error), (error > 0.01).sum(), (error > 0.05).sum()) == (365, 114, 18)


def test_real_tables():
    if not SAMPLES.exists():
        pytest.skip("the real tables are not here")
    with pytest.raises(FileNotFoundError, match="none of the 7386 val frames"):
        Hypersim(SAMPLES, "val")
    reader = Hypersim(SAMPLES, "train")
    assert len(reader) == 1 and reader.expected == 59_543
    assert reader.name(0) == "ai_037_002/images/scene_cam_00_final_hdf5/frame.0000.color"
    with pytest.raises(BadSample, match="render_entity_id.hdf5 is missing"):
        reader[0]


# ---- colour ----


def official_tone_map(color, labelled):
    """After apple/ml-hypersim's scene_generate_images_tonemap.py, in float64."""
    color = color.astype(np.float64)
    scale = 1.0
    if labelled.any():
        brightness = 0.3 * color[:, :, 0] + 0.59 * color[:, :, 1] + 0.11 * color[:, :, 2]
        bright = np.percentile(brightness[labelled], 90)
        scale = 0.0 if bright < 0.0001 else np.power(0.8, 2.2) / bright
    mapped = np.clip(np.power(np.maximum(scale * color, 0), 1 / 2.2), 0, 1)
    return (mapped * 255).astype(np.uint8)


def test_tone_map():
    color, _, entity = scene_arrays(3)
    labelled = entity > 60
    ours, official = tone_map(color, labelled), official_tone_map(color, labelled)
    assert ours.dtype == np.uint8 and ours.shape == color.shape
    difference = np.abs(ours.astype(int) - official)
    assert difference.max() <= 1 and difference.mean() < 1e-3  # the percentile is in float32
    # The mask matters: without it the picture is another.
    color[~labelled] *= 50
    assert np.abs(tone_map(color, labelled).astype(int) - official)[labelled].max() <= 1
    assert np.abs(tone_map(color, labelled | True).astype(int) - official)[labelled].mean() > 10


def test_tone_map_of_grey():
    # All of one brightness, so that is the percentile: 0.8 of 255 is 204, where rounding decides.
    color = np.full((4, 5, 3), 7, np.float16)
    assert np.isin(tone_map(color, np.ones((4, 5), bool)), (203, 204)).all()
    assert (tone_map(color * np.float16(1e-5), np.ones((4, 5), bool)) == 0).all()
    color[:] = 0.25  # no object at all: the scale is 1
    expected = int(255 * 0.25 ** (1 / 2.2))
    assert (tone_map(color, np.zeros((4, 5), bool)) == expected).all()


def test_tone_map_of_broken_pixels():
    color, _, entity = scene_arrays()
    color[0, :4] = np.array([np.nan, np.inf, -1, 60000], np.float16)[:, None]
    mapped = tone_map(color, entity > 0)
    assert mapped[0, :4, 0].tolist() == [0, 255, 0, 255]
    assert 100 < np.median(mapped[1:]) < 255
    same = tone_map(color.astype(np.float32), entity > 0)
    assert np.array_equal(mapped, same)


def test_tone_map_against_the_formula_with_overflown_pixels():
    color, _, entity = scene_arrays()
    color[0, :20] = np.inf
    linear, m = color.astype(np.float32), entity > 0
    b = linear @ np.array([0.3, 0.59, 0.11], np.float32)
    p, without = np.percentile(b[m], 90), np.percentile(b[m & np.isfinite(b)], 90)
    assert not np.isclose(p, without, rtol=1e-4)
    expected = (np.clip((0.8**2.2 / p * linear) ** (1 / 2.2), 0, 1) * 255).astype(np.uint8)
    assert (tone_map(color, m) != expected).mean() < 1e-3  # rounding at the steps of 8 bits


# ---- the raw reader ----


def test_reads_a_frame(tmp_path):
    write_data_set(tmp_path)
    reader = Hypersim(tmp_path, "train")
    assert (len(reader), reader.expected) == (4, 4)
    assert len(Hypersim(tmp_path, "val")) == 2
    sample = pickle.loads(pickle.dumps(reader))[2]
    color, distance_m, entity = scene_arrays(2)
    assert sample["name"] == reader.name(2) == (
        "ai_001_001/images/scene_cam_00_final_hdf5/frame.0002.color")
    assert reader.depth_path(2) == frame_path(tmp_path, "ai_001_001", 2, "depth_meters")
    expected_m = distance_m.astype(float) * planar_per_distance(HEIGHT, WIDTH)
    np.testing.assert_allclose(sample["depth"][0].numpy(), expected_m, rtol=1e-6)
    assert sample["valid"].shape == (1, HEIGHT, WIDTH) and sample["valid"].all()
    image = sample["image"].numpy().transpose(1, 2, 0)
    assert np.array_equal(image, tone_map(color, entity > 0))


def test_uses_the_cameras_of_the_table(tmp_path, caplog):
    write_data_set(tmp_path)
    write_camera_csv(tmp_path, {"ai_001_001": TILTED})
    depth_m = Hypersim(tmp_path, "train")[0]["depth"][0].numpy()
    expected_m, _ = planar_depth(scene_arrays(0)[1], ALL_OBJECT, tuple(TILTED.ravel()))
    np.testing.assert_allclose(depth_m, expected_m, rtol=1e-6)
    assert not caplog.records
    untabled = Hypersim(tmp_path, "val")[0]["depth"][0].numpy()
    np.testing.assert_array_equal(untabled, planar_depth(scene_arrays(0)[1], ALL_OBJECT)[0])
    assert "lacks 1 scenes" in caplog.text
    (tmp_path / "metadata_camera_parameters.csv").write_text("scene_name\nai_001_001\n")
    with pytest.raises(ValueError, match="is not Hypersim's camera table"):
        Hypersim(tmp_path, "train")


def test_only_public_frames_of_the_split(tmp_path):
    for frame in range(3):
        write_frame(tmp_path, frame=frame)
    write_split_csv(tmp_path, [("ai_001_001", 0, "train"), ("ai_001_001", 2, "val"), (
        "ai_001_001", "cam_00", 1, "False", "bad", "train")])
    assert [frame for _, _, frame in Hypersim(tmp_path, "train").frames] == [0]
    assert [frame for _, _, frame in Hypersim(tmp_path, "val").frames] == [2]


def test_absent_frames_are_counted(tmp_path, caplog):
    write_data_set(tmp_path, train=3)
    write_split_csv(tmp_path, [("ai_001_001", frame, "train") for frame in range(8)] + [
        ("ai_009_001", 0, "train"), ("ai_009_001", 0, "val")])
    reader = Hypersim(tmp_path, "train")
    assert (len(reader), reader.expected) == (3, 9)
    assert "6 of the 9 train frames" in caplog.text
    with pytest.raises(FileNotFoundError, match="none of the 1 val frames .*ai_009_001"):
        Hypersim(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="none of the 0 test frames"):
        Hypersim(tmp_path, "test")


def test_wrong_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Hypersim(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="split_scene_v1.csv is missing; put"):
        Hypersim(tmp_path)
    with pytest.raises(ValueError, match="no split 'validation'"):
        Hypersim(tmp_path, "validation")
    (tmp_path / "metadata_images_split_scene_v1.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not Hypersim's split table"):
        Hypersim(tmp_path)


def test_preview_stands_in_for_colour(tmp_path, caplog):
    write_data_set(tmp_path)
    frame_path(tmp_path, "ai_001_001", 1, "color").unlink()
    reader = Hypersim(tmp_path, "train")
    assert "1 of 4 frames have no color.hdf5" in caplog.text
    preview = frame_folder(tmp_path, "ai_001_001", "final_preview") / "frame.0001.tonemap.jpg"
    with pytest.raises(BadSample, match="frame.0001.tonemap.jpg is missing"):
        reader[1]
    preview.parent.mkdir()
    picture = np.repeat(np.arange(WIDTH, dtype=np.uint8)[None], HEIGHT, 0)[..., None] * [1, 2, 3]
    iio.imwrite(preview, picture.astype(np.uint8), quality=95)
    assert np.array_equal(reader[1]["image"].numpy().transpose(1, 2, 0), iio.imread(preview))
    assert reader.name(1).endswith("frame.0001.color")


@pytest.mark.parametrize("content", ["color", "depth_meters", "render_entity_id"])
def test_bad_files_name_themselves(tmp_path, content):
    write_data_set(tmp_path, train=1)
    reader = Hypersim(tmp_path, "train")
    path = frame_path(tmp_path, "ai_001_001", 0, content)
    whole, array = path.read_bytes(), read_hdf5(path)

    def expect(reason):
        with pytest.raises(BadSample, match=f"frame.0000.{content}.hdf5.*{reason}"):
            reader[0]

    for cut in (0, 100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:cut])
        expect("can't be read")
    flipped = bytearray(whole)
    flipped[-300:-200] = bytes(100)
    path.write_bytes(flipped)  # damaged compressed data
    expect("can't be read")
    write_hdf5(path, array[0])
    expect("of shape")
    write_hdf5(path, np.array([b"text"] * 3))
    expect("of shape")
    write_hdf5(path, array.astype(np.complex64))
    expect("complex64")
    write_hdf5(path, array[:-1])
    if content == "depth_meters":  # of two files that disagree, the other one may be named
        with pytest.raises(BadSample, match="but its counterpart is 47x64"):
            reader[0]
    else:
        expect("is 47x64, but its counterpart is 48x64")
    path.unlink()
    if content == "render_entity_id":  # without a distance there is no frame; colour has previews
        expect("is missing")


def test_frames_without_depth(tmp_path):
    write_data_set(tmp_path, train=1)
    for distance_m in (90, np.nan, 0):
        write_frame(tmp_path, distance_m=np.full((HEIGHT, WIDTH), distance_m, np.float16))
        with pytest.raises(BadSample, match="depth_meters.hdf5 has no valid pixel") as caught:
            Hypersim(tmp_path, "train")[0]
        assert not isinstance(caught.value, FilteredSample)


# ---- the filter ----


def test_filter(tmp_path):
    write_data_set(tmp_path, train=1)

    def rejected(reason, **arrays):
        write_frame(tmp_path, **arrays)
        with pytest.raises(FilteredSample, match=reason):
            Hypersim(tmp_path, "train")[0]
        assert Hypersim(tmp_path, "train", filter=False)[0]["valid"].any()

    def kept(**arrays):
        write_frame(tmp_path, **arrays)
        assert Hypersim(tmp_path, "train")[0]["valid"].any()

    color, distance_m, entity = scene_arrays()
    nothing = entity.copy()
    nothing.flat[:np.ceil(0.03 * entity.size).astype(int)] = [-1, 0] * 46 + [-1]  # 93 of 3072
    rejected("3.0% of the pixels show no object", entity=nothing)
    nothing.flat[0] = 7  # 92 of 3072 are less than 3 %
    kept(entity=nothing)
    planar_m = np.full(entity.shape, 4.0)

    def distances():
        return (planar_m / planar_per_distance(HEIGHT, WIDTH)).astype(np.float16)

    rejected("the depth spans 0.0", distance_m=distances())
    planar_m[0, 0] = 4.45
    rejected("the depth spans 0.4", distance_m=distances())
    planar_m[0, 0] = 4.55
    kept(distance_m=distances())
    planar_m[0, 0] = 70  # what is invalid adds nothing to the range
    rejected("the depth spans 0.0", distance_m=distances())
    rejected("the colours span 0 of 255", color=np.full_like(color, 3))


def test_filter_is_for_training_only(tmp_path):
    write_data_set(tmp_path, val=1)
    write_frame(tmp_path, "ai_002_001", 0, color=np.full((HEIGHT, WIDTH, 3), 3, np.float16))
    assert Hypersim(tmp_path, "val")[0]["valid"].all()
    with pytest.raises(FilteredSample):
        Hypersim(tmp_path, "val", filter=True)[0]


# ---- the processed form ----


def write_pair(folder, frame=0, depth_mm=None):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(frame)
    image = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    if depth_mm is None:
        depth_mm = random.integers(1, 65536, (12, 16)).astype(np.uint16)
    iio.imwrite(folder / f"rgb_cam_00_fr{frame:04d}.png", image)
    iio.imwrite(folder / f"depth_plane_cam_00_fr{frame:04d}.png", depth_mm)
    return image, depth_mm


@pytest.mark.parametrize("inside", ["train/ai_001_001", "ai_001_001", "train", "."])
def test_processed_layouts(tmp_path, inside):
    image, depth_mm = write_pair(tmp_path / inside, 7)
    write_pair(tmp_path / inside, 3)
    reader = ProcessedHypersim(tmp_path, "train")
    assert len(reader) == 2 and reader.expected == 53_885
    sample = reader[1]
    prefix = "" if inside == "." else f"{inside}/"
    assert sample["name"] == reader.name(1) == f"{prefix}rgb_cam_00_fr0007"
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), image)
    np.testing.assert_allclose(sample["depth"][0].numpy(), depth_mm / 1000, rtol=1e-6)
    assert np.array_equal(sample["valid"][0].numpy(), depth_mm < 65000)


def test_processed_validity_filter_and_splits(tmp_path, caplog):
    depth_mm = np.full((12, 16), 2000, np.uint16)
    depth_mm[0, :8], depth_mm[0, 8] = 0, 65300
    write_pair(tmp_path / "train/ai_001_001", 0, depth_mm)
    write_pair(tmp_path / "val/ai_002_001", 0, depth_mm)
    with pytest.raises(FilteredSample, match="4.2% of the pixels show no object"):
        ProcessedHypersim(tmp_path, "train")[0]
    sample = ProcessedHypersim(tmp_path, "val")[0]
    assert np.array_equal(sample["valid"][0].numpy(), (depth_mm > 0) & (depth_mm < 65000))
    assert len(ProcessedHypersim(tmp_path, "val")) == 1
    with pytest.raises(FileNotFoundError, match="test holds no pair"):
        ProcessedHypersim(tmp_path, "test")
    assert not caplog.records
    ProcessedHypersim(tmp_path / "val", "val")
    assert "all of it serves as val" in caplog.text


def test_processed_bad_files(tmp_path, caplog):
    write_pair(tmp_path / "ai_001_001", 0)
    write_pair(tmp_path / "ai_001_001", 1, np.zeros((12, 16), np.uint16))
    write_pair(tmp_path / "ai_001_001", 2)
    depth = tmp_path / "ai_001_001" / "depth_plane_cam_00_fr0000.png"
    reader = ProcessedHypersim(tmp_path, "train", filter=False)
    with pytest.raises(BadSample, match="fr0001.png has no valid pixel"):
        reader[1]
    depth.write_bytes(depth.read_bytes()[:200])
    with pytest.raises(BadSample, match="fr0000.png can't be read"):
        reader[0]
    iio.imwrite(depth, np.zeros((12, 16), np.uint8))
    with pytest.raises(BadSample, match="fr0000.png is a picture of uint8"):
        reader[0]
    depth.unlink()
    assert len(ProcessedHypersim(tmp_path, "train")) == 2
    assert "1 of 3 images have no depth map" in caplog.text


def test_frames_without_entity_ids_are_said_at_the_start(tmp_path, caplog):
    """With the previews alone, as some download them, no sample can be made."""
    write_data_set(tmp_path, train=3)
    frame_path(tmp_path, "ai_001_001", 0, "render_entity_id").unlink()
    assert len(open_training_source(tmp_path, "train")) == 3
    assert "1 of 3 frames have no entity ids" in caplog.text
    for path in tmp_path.rglob("*.render_entity_id.hdf5"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="download the files.*render_entity_id.hdf5"):
        open_training_source(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="download the files.*render_entity_id.hdf5"):
        open_benchmark("hypersim", tmp_path)
