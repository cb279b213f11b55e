"""extras/make_pairs.py: each data set's own layout and units, on made-up files and on real ones."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from data.pairs import FolderOfPairs
from data.transforms import BadSample
from extras.make_pairs import fill_gaps, main

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"
SHAPE = (6, 8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else iio.imwrite(path, array)
    return array


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


def units(seed=0):
    """uint16, some of them 0."""
    random = np.random.default_rng(seed)
    return (random.integers(300, 20000, SHAPE) * (random.random(SHAPE) < 0.8)).astype(np.uint16)


def convert(out, *options):
    main([str(out), *map(str, options)])
    return {sample["name"]: sample for sample in FolderOfPairs(out)}


def check(sample, image, expected_m):
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), image)
    np.testing.assert_allclose(sample["depth"][0].numpy(), expected_m, rtol=1e-6)
    assert np.array_equal(sample["valid"][0].numpy(), expected_m > 0)


def test_tum_pairs_by_time(tmp_path, capsys):
    sequence = tmp_path / "tum/desk"
    images = [write(sequence / f"rgb/{time}.png", picture(i)) for i, time in enumerate(
        ("100.010000", "100.050000", "100.100000"))]
    depths = [write(sequence / f"depth/{time}.png", units(i)) for i, time in enumerate(
        ("99.990001", "100.012000", "100.065000", "100.150000"))]
    made = convert(tmp_path / "out", "--tum", tmp_path / "tum")
    assert list(made) == ["rgb/tum/desk/rgb/100.010000", "rgb/tum/desk/rgb/100.050000"]
    check(made["rgb/tum/desk/rgb/100.010000"], images[0], depths[1] / 5000)
    check(made["rgb/tum/desk/rgb/100.050000"], images[1], depths[2] / 5000)
    assert capsys.readouterr().out == "tum: pairs written: 2\n"


@pytest.mark.parametrize("image, depth", [
    ("basement/rgb_00045.jpg", "basement/sync_depth_00045.png"),
    ("rgb/rgb_00045.jpg", "depth/sync_depth_00045.png")])
def test_nyu(tmp_path, image, depth):
    write(tmp_path / "nyu" / image, picture())
    values = write(tmp_path / "nyu" / depth, units())
    write(tmp_path / "nyu/basement/rgb_00046.jpg", picture())  # has no depth
    made = convert(tmp_path / "out", "--nyu", tmp_path / "nyu")
    assert list(made) == [f"rgb/nyu/{image.removesuffix('.jpg')}"]
    check(*made.values(), iio.imread(tmp_path / "nyu" / image), values / 1000)


@pytest.mark.parametrize("image, depth", [
    ("2011_09_26/drive_0002/image_02/data/0000000069.png",
     "2011_09_26/drive_0002/proj_depth/groundtruth/image_02/0000000069.png"),
    ("rgb/0000000069.png", "depth/0000000069.png")])
def test_kitti(tmp_path, image, depth):
    pixels = write(tmp_path / "kitti" / image, picture())
    values = write(tmp_path / "kitti" / depth, units())
    raw = convert(tmp_path / "raw", "--kitti", tmp_path / "kitti", "--kitti-gap", 0)
    check(*raw.values(), pixels, values / 256)
    (filled,) = convert(tmp_path / "out", "--kitti", tmp_path / "kitti").values()
    assert filled["valid"].all()
    assert np.array_equal(filled["depth"][0].numpy()[values > 0], (values / 256)[values > 0])


def test_fill_takes_the_nearest_surface_within_the_gap():
    depth_m = np.zeros((7, 9), np.float32)
    depth_m[3, 2], depth_m[3, 4] = 8, 2
    filled = fill_gaps(depth_m, 1)
    expected = np.zeros((7, 9))
    expected[2:5, 1:4] = 8
    expected[2:5, 3:6] = 2
    expected[3, 2] = 8
    np.testing.assert_allclose(filled, expected, rtol=1e-6)
    np.testing.assert_array_equal(fill_gaps(depth_m, 0), depth_m)


def test_diode_uses_the_mask(tmp_path):
    scan = tmp_path / "diode/val/indoors/scene_00019/scan_00183"
    image = write(scan / "a.png", picture())
    depth_m = write(scan / "a_depth.npy", np.linspace(1, 90, 48, dtype="f4").reshape(*SHAPE, 1))
    mask = write(scan / "a_depth_mask.npy", (np.arange(48) % 3 > 0).astype("f4").reshape(SHAPE))
    made = convert(tmp_path / "out", "--diode", tmp_path / "diode")
    assert list(made) == ["rgb/diode/val/indoors/scene_00019/scan_00183/a"]
    check(*made.values(), image, depth_m[..., 0] * mask)


def test_middlebury(tmp_path):
    scene = tmp_path / "middlebury/Adirondack-perfect"
    image = write(scene / "im0.png", picture())
    disparity = np.linspace(20, 200, 48, dtype="<f4").reshape(SHAPE)
    disparity[0, :2] = np.inf
    (scene / "disp0.pfm").write_bytes(b"Pf\n8 6\n-0.003922\n" + disparity[::-1].tobytes())
    (scene / "calib.txt").write_text("cam0=[4161.221 0 1445.577; 0 4161.221 984.686; 0 0 1]\n"
                                     "doffs=209.059\nbaseline=176.252\nwidth=8\n")
    made = convert(tmp_path / "out", "--middlebury", tmp_path / "middlebury")
    expected_m = 176.252 * 4161.221 / (disparity.astype(float) + 209.059) / 1000
    check(*made.values(), image, np.where(np.isfinite(disparity), expected_m, 0))
    (scene / "calib.txt").write_text("doffs=209.059\n")
    with pytest.raises(BadSample, match="calib.txt lacks one of baseline"):
        convert(tmp_path / "out", "--middlebury", tmp_path / "middlebury")


def test_wrong_arguments(tmp_path):
    for options in ((), ("--kitti-gap", "-1", "--kitti", tmp_path)):
        with pytest.raises(SystemExit) as caught:
            convert(tmp_path / "out", *options)
        assert caught.value.code == 2
    with pytest.raises(FileNotFoundError, match="--nyu .*nowhere is not a folder"):
        convert(tmp_path / "out", "--nyu", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="--nyu .* has no pair in the layout"):
        convert(tmp_path / "out", "--nyu", tmp_path)
    write(tmp_path / "nyu/rgb_00001.jpg", picture())
    with pytest.raises(FileExistsError, match="OUT .*rgb_00001.jpg is a file: give a folder."):
        convert(tmp_path / "nyu/rgb_00001.jpg", "--nyu", tmp_path / "nyu")
    write(tmp_path / "nyu/sync_depth_00001.png", units()[:4])
    with pytest.raises(BadSample, match="rgb_00001.jpg is 6x8, but its counterpart is 4x8"):
        convert(tmp_path / "out", "--nyu", tmp_path / "nyu")


@pytest.mark.skipif(not SAMPLES.exists(), reason="the real frames are not here")
def test_real_frames(tmp_path):
    options = [part for name in ("tum", "nyu", "kitti", "diode", "middlebury")
               for part in (f"--{name}", SAMPLES / name)]
    made = convert(tmp_path / "out", *options)
    sets = [name.split("/")[1] for name in made]
    assert {name: sets.count(name) for name in sets} == {
        "tum": 2, "nyu": 2, "kitti": 2, "diode": 1, "middlebury": 1}
    ranges_m = {"tum": (0.5, 8), "nyu": (0.5, 10), "kitti": (3, 90), "diode": (0.5, 60),
                "middlebury": (1, 6)}
    for data_set, sample in zip(sets, made.values()):
        near, far = ranges_m[data_set]
        depth_m = sample["depth"][sample["valid"]]
        assert near < depth_m.quantile(0.01) and depth_m.quantile(0.99) < far
    (diode,) = [sample for name, sample in made.items() if "diode" in name]
    assert (~diode["valid"]).sum() == 779  # the mask's zeros: 283 of these pixels have a depth
