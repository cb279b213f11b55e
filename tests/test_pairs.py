"""data/pairs.py: every format of depth map, both ways of matching, and what can be wrong."""

import h5py
import imageio.v3 as iio
import numpy as np
import pytest

from data.pairs import FolderOfPairs, read_depth
from data.transforms import BadSample

SHAPE = (5, 7)


def depth_map():
    """Metres, multiples of a millimetre."""
    return np.random.default_rng(0).integers(400, 9000, SHAPE).astype(np.float32) / 1000


def write_image(path, shape=SHAPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    iio.imwrite(path, image)
    return image


def write_depth(path, values, key="depth"):
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix
    if suffix == ".png":
        iio.imwrite(path, values)
    elif suffix == ".npy":
        np.save(path, values)
    elif suffix == ".npz":
        np.savez(path, **{key: values})
    elif suffix == ".pfm":  # rows from bottom to top
        header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode()
        path.write_bytes(header + values[::-1].astype("<f4").tobytes())
    else:
        with h5py.File(path, "w") as file:
            file[key] = values


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pfm", ".hdf5", ".h5"])
def test_metres(tmp_path, suffix):
    write_depth(tmp_path / f"a{suffix}", depth_map())
    values = read_depth(tmp_path / f"a{suffix}", depth_scale=17)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, depth_map())


@pytest.mark.parametrize("suffix", [".png", ".npy", ".hdf5"])
@pytest.mark.parametrize("scale", [1000, 256, 5000.0])
def test_integers_are_in_units_of_the_scale(tmp_path, suffix, scale):
    values = np.arange(35, dtype=np.uint16).reshape(SHAPE) * 1872
    write_depth(tmp_path / f"a{suffix}", values)
    expected_m = values / scale
    np.testing.assert_allclose(read_depth(tmp_path / f"a{suffix}", scale), expected_m, rtol=1e-6)


def test_other_shapes_types_and_keys(tmp_path):
    for name, values in (("a.npy", depth_map()[..., None]), ("b.npz", depth_map().astype("f8")),
                         ("c.hdf5", depth_map().astype("f2"))):
        write_depth(tmp_path / name, values, key="whatever")
        np.testing.assert_allclose(read_depth(tmp_path / name), depth_map(), rtol=1e-3)
    np.savez(tmp_path / "d.npz", other=np.ones(3), depth=depth_map())
    np.testing.assert_array_equal(read_depth(tmp_path / "d.npz"), depth_map())


def test_matches_by_path_without_suffix(tmp_path, caplog):
    image = write_image(tmp_path / "rgb/kitchen/1305.62.png")
    write_depth(tmp_path / "depth/kitchen/1305.62.npy", depth_map())
    write_image(tmp_path / "rgb/b.jpg")
    write_depth(tmp_path / "depth/b.png", (depth_map() * 1000).round().astype(np.uint16))
    reader = FolderOfPairs(tmp_path)
    assert [reader.name(i) for i in range(len(reader))] == ["rgb/b", "rgb/kitchen/1305.62"]
    assert not caplog.records
    sample = reader[1]
    assert sample["name"] == "rgb/kitchen/1305.62"
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), image)
    np.testing.assert_array_equal(sample["depth"][0].numpy(), depth_map())
    np.testing.assert_allclose(reader[0]["depth"][0].numpy(), depth_map(), rtol=1e-6)
    np.testing.assert_allclose(FolderOfPairs(tmp_path, 500.0)[0]["depth"][0].numpy(),
                               2 * depth_map(), rtol=1e-6)
    write_image(tmp_path / "rgb/alone.png")
    assert len(FolderOfPairs(tmp_path)) == 2
    assert "1 files have no partner" in caplog.text and "alone" in caplog.text


def test_pairs_csv(tmp_path):
    write_image(tmp_path / "left/im0.png")
    write_depth(tmp_path / "truth/d0.npy", depth_map())
    (tmp_path / "pairs.csv").write_text("depth,note,image\ntruth/d0.npy,x,left/im0.png\n"
                                        "truth/d0.npy,x,left/gone.png\n")
    reader = FolderOfPairs(tmp_path)
    assert len(reader) == 2 and reader[0]["name"] == reader.name(0) == "left/im0"
    with pytest.raises(BadSample, match="left/gone.png is missing"):
        reader[1]


@pytest.mark.parametrize("text, message", [
    ("", "lists no pair"), ("image,depth\n", "lists no pair"),
    ("a,b\n1,2\n", "has the columns a, b"),
    ("image,depth\na.png,/data/a.npy\n", "line 2: '/data/a.npy' is not a path inside"),
    ("image,depth\na.png,b.npy\n../a.png,b.npy\n", "line 3: '../a.png'"),
    ("image,depth\na.png\n", "line 2: '.' is not a path"),
    ("image,depth\na.png,b.npy\nb.png,b.npy\na.jpg,a.npy\n", "lines 2 and 4: two pairs")])
def test_wrong_pairs_csv(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FolderOfPairs(tmp_path)


def test_what_is_not_depth(tmp_path):
    write_image(tmp_path / "rgb/a.png")
    depth_m = depth_map()
    depth_m[0, :5] = 0, np.nan, np.inf, -np.inf, -2
    write_depth(tmp_path / "depth/a.npy", depth_m)
    sample = FolderOfPairs(tmp_path)[0]
    assert sample["valid"].sum() == 35 - 5 and not sample["valid"][0, 0, :5].any()
    assert sample["depth"][0, 0, :5].tolist() == [0, 0, 0, 0, -2]


def test_grey_and_transparent_images(tmp_path):
    write_depth(tmp_path / "depth/a.npy", depth_map())
    grey = np.arange(35, dtype=np.uint8).reshape(SHAPE)
    (tmp_path / "rgb").mkdir()
    for image in (grey, np.stack([grey] * 3 + [255 - grey], axis=-1)):
        iio.imwrite(tmp_path / "rgb/a.png", image)
        assert np.array_equal(FolderOfPairs(tmp_path)[0]["image"].numpy(), np.stack([grey] * 3))
    iio.imwrite(tmp_path / "rgb/a.png", grey.astype(np.uint16))
    with pytest.raises(BadSample, match="a.png is a picture of uint16"):
        FolderOfPairs(tmp_path)[0]


@pytest.mark.parametrize("suffix", [".png", ".npy", ".npz", ".pfm", ".hdf5"])
def test_bad_depth_files_name_themselves(tmp_path, suffix):
    write_image(tmp_path / "rgb/a.png")
    path = tmp_path / f"depth/a{suffix}"
    values = depth_map()
    write_depth(path, (values * 1000).astype(np.uint16) if suffix == ".png" else values)
    reader = FolderOfPairs(tmp_path)
    assert reader[0]["valid"].all()
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"not a depth map at all"):
        path.write_bytes(content)
        with pytest.raises(BadSample, match=f"depth/a{suffix} can't be read"):
            reader[0]
    write_depth(path, values[:4].astype(np.uint16) if suffix == ".png" else values[:4])
    with pytest.raises(BadSample, match=f"depth/a{suffix} is 4x7, but its counterpart is 5x7"):
        reader[0]
    path.unlink()
    with pytest.raises(BadSample, match=f"depth/a{suffix} is missing"):
        reader[0]


@pytest.mark.parametrize("values, reason", [
    (np.ones((5, 7, 3), np.float32), "of shape"), (np.ones(35), "of shape"),
    (np.ones(SHAPE, np.complex64), "complex64"), (np.ones(SHAPE, bool), "bool"),
    (np.full(SHAPE, None), "can't be read"), (np.zeros(SHAPE), "no valid pixel")])
def test_wrong_arrays(tmp_path, values, reason):
    write_image(tmp_path / "rgb/a.png")
    write_depth(tmp_path / "depth/a.npy", values)
    with pytest.raises(BadSample, match=f"a.npy .*{reason}"):
        FolderOfPairs(tmp_path)[0]


def test_eight_bit_and_ambiguous_depth(tmp_path):
    write_depth(tmp_path / "a.png", np.ones(SHAPE, np.uint8))
    with pytest.raises(BadSample, match="a.png is a picture of uint8"):
        read_depth(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", left=depth_map(), right=depth_map())
    with pytest.raises(BadSample, match="'left', 'right'.*call the depth map 'depth'"):
        read_depth(tmp_path / "a.npz")


def test_wrong_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match="0 images in rgb/ and 0 depth maps"):
        FolderOfPairs(tmp_path)
    write_image(tmp_path / "rgb/a.png")
    write_depth(tmp_path / "depth/b.npy", depth_map())
    with pytest.raises(FileNotFoundError, match="no two have the same name; rename them or"):
        FolderOfPairs(tmp_path)
    write_image(tmp_path / "rgb/a.jpg")
    with pytest.raises(ValueError, match="holds both a.(png|jpg) and a.(png|jpg)"):
        FolderOfPairs(tmp_path)
    with pytest.raises(ValueError, match="depth scale is 0"):
        FolderOfPairs(tmp_path, 0)
