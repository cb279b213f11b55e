"""OpenEXR: written by extras/exr.py, read as depth maps and as predictions."""

import resource
import signal
import struct
import sys

import imageio.v3 as iio
import numpy as np
import pytest

from data.files import read_exr
from data.pairs import FolderOfPairs, read_depth
from data.transforms import BadSample
from evaluation.predictions import find_prediction, read_prediction
from extras.exr import write_exr

OpenEXR = pytest.importorskip("OpenEXR")
SHAPE = 5, 7


def depth_map(shape=SHAPE):
    return np.random.default_rng(0).uniform(0.4, 9, shape).astype(np.float32)


def write_channels(path, **channels):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, channels).write(str(path))


def test_read_back(tmp_path):
    values = depth_map()
    values[0, :3] = np.nan, np.inf, 0
    write_exr(tmp_path / "a.exr", values, {"comments": "metres", "source": "fünf \udcff.jpg"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.exr"]
    with OpenEXR.File(str(tmp_path / "a.exr")) as file:
        assert list(file.channels()) == ["Z"]
        pixels = file.channels()["Z"].pixels
        assert file.header()["comments"] == "metres"
        assert file.header()["source"] == r"fünf \udcff.jpg"
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, values)
    np.testing.assert_array_equal(read_exr(tmp_path / "a.exr"), values)


@pytest.mark.parametrize("view", [lambda a: a[::2, 1::2], lambda a: a.T, lambda a: a[:, ::-1],
                                  lambda a: a.astype(np.float64)])
def test_an_array_of_any_layout(tmp_path, view):
    values = view(depth_map())
    write_exr(tmp_path / "a.exr", values, {})
    np.testing.assert_array_equal(read_exr(tmp_path / "a.exr"), values)


def test_half(tmp_path):
    values = depth_map()
    write_exr(tmp_path / "a.exr", values, {}, half=True)
    stored = read_exr(tmp_path / "a.exr")
    assert stored.dtype == np.float16
    assert (np.abs(stored - values) <= np.spacing(values.astype(np.float16)) / 2).all()
    np.testing.assert_allclose(read_depth(tmp_path / "a.exr"), values, rtol=2**-11)
    write_exr(tmp_path / "b.exr", np.full(SHAPE, 1e5), {}, half=True)
    assert np.isinf(read_exr(tmp_path / "b.exr")).all()


def test_a_full_disk_leaves_no_file(tmp_path):
    values = np.random.default_rng(0).random((300, 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="a.exr can't be written .*make room"):
            write_exr(tmp_path / "a.exr", values, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_pair_with_depth_in_exr(tmp_path):
    for folder in ("rgb", "depth"):
        (tmp_path / folder).mkdir()
    iio.imwrite(tmp_path / "rgb/a.png", np.zeros((*SHAPE, 3), np.uint8))
    write_exr(tmp_path / "depth/a.exr", depth_map(), {})
    sample = FolderOfPairs(tmp_path, depth_scale=17)[0]
    np.testing.assert_array_equal(np.squeeze(sample["depth"]), depth_map())


def test_the_channel_that_is_depth(tmp_path):
    z, y = depth_map(), depth_map() + 1
    write_channels(tmp_path / "a.exr", Z=z, Y=y, R=y)
    np.testing.assert_array_equal(read_depth(tmp_path / "a.exr"), z)
    write_channels(tmp_path / "a.exr", Y=y, A=z)
    np.testing.assert_array_equal(read_depth(tmp_path / "a.exr"), y)
    write_channels(tmp_path / "a.exr", **{"Layer.Depth": z})
    np.testing.assert_array_equal(read_depth(tmp_path / "a.exr"), z)
    write_channels(tmp_path / "a.exr", RGB=np.stack([z] * 3, axis=-1))
    with pytest.raises(BadSample, match="a.exr has the channels B, G, R: call .* Z"):
        read_depth(tmp_path / "a.exr")


@pytest.mark.parametrize("content", [b"", b"depth\n" * 50, b"v/1\1" + bytes(50)])
def test_no_exr(tmp_path, content):
    (tmp_path / "a.exr").write_bytes(content)
    with pytest.raises(BadSample, match="a.exr can't be read: it is no OpenEXR file"):
        read_depth(tmp_path / "a.exr")


def test_damaged(tmp_path):
    path = tmp_path / "a.exr"
    write_exr(path, np.linspace(1, 9, 120_000).reshape(300, 400), {})
    content = path.read_bytes()
    for part in (content[:-5], content[: len(content) // 2], content[:400],
                 content[:-3000] + bytes(3000)):
        path.write_bytes(part)
        with pytest.raises(BadSample, match="a.exr can't be read: .*damaged"):
            read_depth(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadSample, match="git lfs pull"):
        read_depth(path)
    with pytest.raises(BadSample, match="missing"):
        read_depth(tmp_path / "b.exr")


def test_a_header_that_claims_a_huge_size(tmp_path):
    path = tmp_path / "a.exr"
    write_exr(path, depth_map(), {})
    content = path.read_bytes()
    window = struct.pack("<4i", 0, 0, SHAPE[1] - 1, SHAPE[0] - 1)
    assert window in content
    path.write_bytes(content.replace(window, struct.pack("<4i", 0, 0, 99_999, 99_999)))
    with pytest.raises(BadSample, match="would take 40,000,000,000 bytes"):
        read_depth(path)


def test_deep_data(tmp_path):
    samples = np.empty((2, 2), object)
    for place in np.ndindex(2, 2):
        samples[place] = np.ones(3, np.float32)
    OpenEXR.File({"compression": OpenEXR.ZIPS_COMPRESSION, "type": OpenEXR.deepscanline},
                 {"Z": samples}).write(str(tmp_path / "a.exr"))
    with pytest.raises(BadSample, match="deep"):
        read_depth(tmp_path / "a.exr")


def test_without_the_library(monkeypatch, tmp_path):
    write_exr(tmp_path / "a.exr", depth_map(), {})
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(BadSample, match=r"a.exr .*install OpenEXR \(extras/requirements.txt\)"):
        read_depth(tmp_path / "a.exr")
    with pytest.raises(ValueError, match="EXR needs OpenEXR"):
        write_exr(tmp_path / "b.exr", depth_map(), {})


def test_a_prediction_in_exr(tmp_path):
    (tmp_path / "a").mkdir()
    write_exr(tmp_path / "a/b.exr", depth_map(), {}, half=True)
    assert find_prediction(tmp_path, "a/b") == (tmp_path / "a/b.exr", "NAME")
    pred = read_prediction(tmp_path, "a/b", SHAPE)
    assert pred.dtype == np.float64
    np.testing.assert_array_equal(pred, depth_map().astype(np.float16))
    np.save(tmp_path / "a/b.npy", depth_map())
    np.testing.assert_array_equal(read_prediction(tmp_path, "a/b", SHAPE), depth_map())
