"""data/vkitti.py, on frames in the official layout."""

import itertools

import imageio.v3 as iio
import numpy as np
import pytest

from data.transforms import BadSample
from data.vkitti import VirtualKITTI
from tests.worlds import CROP, HEIGHT, WIDTH, write_street


@pytest.mark.parametrize("trees", [("", ""), ("rgb", "depth"),
                                   ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth")])
def test_layouts_and_crop(tmp_path, trees):
    write_street(tmp_path, trees, frame=0)
    image, depth_cm = write_street(tmp_path, trees, frame=1)
    reader = VirtualKITTI(tmp_path, "train", crop=CROP)
    assert len(reader) == 2
    sample = reader[1]
    # top = 30 - 24, left = int((53 - 40) / 2)
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), image[6:30, 6:46])
    np.testing.assert_allclose(sample["depth"][0].numpy(), depth_cm[6:30, 6:46] / 100, rtol=1e-6)
    assert sample["valid"].shape == (1, *CROP) and sample["valid"].all()
    prefix = f"{trees[0]}/" if trees[0] else ""
    name = f"{prefix}Scene02/clone/frames/rgb/Camera_0/rgb_00001"
    assert sample["name"] == reader.name(1) == name


def test_sky_and_far_are_invalid_but_keep_their_value(tmp_path):
    depth_cm = np.full((HEIGHT, WIDTH), 300, np.uint16)
    depth_cm[10, 10:14] = 65535, 8000, 7999, 0
    write_street(tmp_path, depth_cm=depth_cm)
    sample = VirtualKITTI(tmp_path, "train", crop=CROP)[0]
    assert sample["valid"][0, 4, 4:8].tolist() == [False, False, True, False]
    assert sample["depth"][0, 4, 4:8].tolist() == pytest.approx([655.35, 80, 79.99, 0])
    assert sample["valid"].sum() == CROP[0] * CROP[1] - 3


def test_splits_by_rule(tmp_path):
    for scene, variant, camera in (
            ("Scene01", "clone", 0), ("Scene01", "fog", 0), ("Scene02", "15-deg-left", 1),
            ("Scene02", "15-deg-right", 0), ("Scene02", "30-deg-left", 0), ("Scene02", "rain", 0),
            ("Scene06", "morning", 0), ("Scene18", "overcast", 1), ("Scene20", "sunset", 0)):
        write_street(tmp_path, scene=scene, variant=variant, camera=camera)
    train, val = VirtualKITTI(tmp_path, "train"), VirtualKITTI(tmp_path, "val")
    assert [train.name(i).split("/")[:2] for i in range(len(train))] == [
        ["Scene02", "15-deg-left"], ["Scene02", "15-deg-right"], ["Scene06", "morning"],
        ["Scene18", "overcast"], ["Scene20", "sunset"]]
    assert [val.name(i) for i in range(len(val))] == ["Scene01/clone/frames/rgb/Camera_0/rgb_00000"]
    assert (train.expected, val.expected) == (20_148, 5_364)


def test_the_whole_data_set_has_the_published_lists(tmp_path):
    """As many files as were released, empty: by scene, variant, camera and frame."""
    frames = {"Scene01": 447, "Scene02": 233, "Scene06": 270, "Scene18": 339, "Scene20": 837}
    variants = ["15-deg-left", "15-deg-right", "30-deg-left", "30-deg-right", "clone", "fog",
                "morning", "overcast", "rain", "sunset"]
    for scene, variant, camera in itertools.product(frames, variants, "01"):
        folder = tmp_path / scene / variant / "frames/rgb" / f"Camera_{camera}"
        folder.mkdir(parents=True)
        for frame in range(frames[scene]):
            (folder / f"rgb_{frame:05d}.jpg").touch()
    kept = [variant for variant in variants if variant not in (
        "30-deg-left", "30-deg-right", "fog", "rain")]
    for split, scenes in (("train", list(frames)[1:]), ("val", list(frames)[:1])):
        reader = VirtualKITTI(tmp_path, split)
        assert len(reader) == reader.expected == {"train": 20_148, "val": 5_364}[split]
        assert [reader.name(i) for i in range(len(reader))] == [
            f"{scene}/{variant}/frames/rgb/Camera_{camera}/rgb_{frame:05d}" for scene in scenes
            for variant in kept for camera in "01" for frame in range(frames[scene])]


def test_bad_files_name_themselves(tmp_path):
    write_street(tmp_path)
    reader = VirtualKITTI(tmp_path, "train", crop=CROP)
    image, depth = tmp_path / f"{reader.name(0)}.jpg", reader.depth_path(0)
    with pytest.raises(BadSample, match="depth_00000.png is 30x53, smaller than the crop 352x1216"):
        VirtualKITTI(tmp_path, "train")[0]
    for path in (image, depth):
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(BadSample, match=f"{path.name} can't be read"):
            reader[0]
        path.write_bytes(whole)
    iio.imwrite(depth, np.full((HEIGHT, WIDTH), 65535, np.uint16))
    with pytest.raises(BadSample, match="depth_00000.png has no valid pixel"):
        reader[0]
    iio.imwrite(depth, np.full((HEIGHT, WIDTH + 1), 100, np.uint16))
    with pytest.raises(BadSample, match="depth_00000.png is 30x54, but its counterpart is 30x53"):
        reader[0]
    depth.unlink()
    with pytest.raises(BadSample, match="depth_00000.png is missing"):
        reader[0]


def test_wrong_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not Virtual KITTI 2"):
        VirtualKITTI(tmp_path)
    write_street(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no val image"):
        VirtualKITTI(tmp_path, "val")
    with pytest.raises(ValueError, match="no split 'test'"):
        VirtualKITTI(tmp_path, "test")
