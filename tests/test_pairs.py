"""data/pairs.py: every format of depth map, both ways of matching, and what can be wrong."""

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from data.loading import preflight
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
    iio.imwrite(tmp_path / "rgb/a.png", grey.astype(np.uint16) * 257 * 7)  # of 16 bits
    assert np.array_equal(FolderOfPairs(tmp_path)[0]["image"].numpy(), np.stack([grey * 7] * 3))


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
    with pytest.raises(BadSample, match="left, right.*call the depth map 'depth'"):
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


# ---- what people really have ----


def write_pair(root, name, depth_m=None):
    write_image(root / f"rgb/{name}.png")
    write_depth(root / f"depth/{name}.npy", depth_map() if depth_m is None else depth_m)


@pytest.mark.parametrize("number", [1e10, 65504, 65.535])
def test_no_depth_that_is_a_number_is_said_and_can_be_left_out(number, tmp_path, caplog):
    depth_m = depth_map()
    depth_m[:, :2] = number
    for name in ("a", "b"):
        write_pair(tmp_path, name, depth_m)
    reader = FolderOfPairs(tmp_path)
    assert "29% of the pixels have one and the same depth" in reader[0]["doubt"]
    assert reader[1]["doubt"] and caplog.text.count("--max-depth") == 1  # once for all
    limited = FolderOfPairs(tmp_path, max_depth=20)[0]
    assert limited["doubt"] is None and not limited["valid"][0, :, :2].any()
    assert limited["valid"][0, :, 2:].all()


def test_millimetres_in_a_file_of_floats_are_said(tmp_path, caplog):
    write_pair(tmp_path, "a", depth_map() * 1000)
    assert "most depths are beyond 1 km" in FolderOfPairs(tmp_path)[0]["doubt"]
    assert "millimetres" in caplog.text


@pytest.mark.parametrize("depth_m", [
    depth_map(), depth_map() * 100, np.minimum(np.linspace(1, 20, 35).reshape(SHAPE), 12),
    np.full(SHAPE, 3.0)])
def test_other_maps_are_not_doubted(depth_m, tmp_path, caplog):
    """Nor is one that ends in a wall, or that a sensor cuts off where depth goes on."""
    write_pair(tmp_path, "a", depth_m.astype(np.float32))
    assert FolderOfPairs(tmp_path)[0]["doubt"] is None or depth_m.max() == 12
    assert "one and the same" not in caplog.text or depth_m.max() == 12


def test_preflight_lists_what_is_doubtful(tmp_path):
    depth_m = depth_map()
    depth_m[:, :2] = 65504
    write_pair(tmp_path, "a", depth_m)
    write_pair(tmp_path, "b")
    lines = []
    preflight({"pairs": FolderOfPairs(tmp_path)}, 0, lines.append)
    assert lines[0].endswith("2 samples, 0 bad, 0 left out by the filter, 1 doubtful")
    assert lines[1].startswith("  rgb/a: 29% of the pixels") and len(lines) == 2


def test_linked_folders_hold_pairs(tmp_path):
    write_pair(tmp_path / "elsewhere", "a")
    for kind in ("rgb", "depth"):
        (tmp_path / "root" / kind).mkdir(parents=True)
        (tmp_path / "root" / kind / "scene1").symlink_to(tmp_path / "elsewhere" / kind)
        (tmp_path / "root" / kind / "loop").symlink_to(tmp_path / "root" / kind)
    reader = FolderOfPairs(tmp_path / "root")
    assert [reader.name(i) for i in range(len(reader))] == ["rgb/scene1/a"] and reader[0]


def test_what_is_passed_over_is_counted_and_named(tmp_path, caplog):
    write_pair(tmp_path, "a")
    for name in ("rgb/._a.png", "depth/._a.npy", "rgb/.DS_Store"):  # not these
        (tmp_path / name).write_bytes(b"x")
    reader = FolderOfPairs(tmp_path)
    assert len(reader) == 1 and caplog.text == ""
    for name in ("rgb/b.mov", "rgb/c.mov", "depth/d.dpt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(FolderOfPairs(tmp_path)) == 1
    assert "3 files are of no kind that is read here" in caplog.text
    assert "rgb/b.mov" in caplog.text and ".mov 2, .dpt 1" in caplog.text


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "mpo", "avif", "gif", "webp", "bmp", "tif"])
def test_pictures_of_all_kinds(suffix, tmp_path):
    write_pair(tmp_path, "a")
    picture = Image.open(tmp_path / "rgb/a.png")
    kind = {"jfif": "JPEG", "jpe": "JPEG", "mpo": "MPO"}.get(suffix)
    picture.save(tmp_path / f"rgb/a.{suffix}", format=kind)
    (tmp_path / "rgb/a.png").unlink()
    assert FolderOfPairs(tmp_path)[0]["image"].shape == (3, *SHAPE)


@pytest.mark.parametrize("text", [
    "\ufeffimage,depth\nrgb/a.png,depth/a.npy\n", "image, depth\nrgb/a.png, depth/a.npy\n",
    "image ,depth \n rgb/a.png , depth/a.npy \n", "image;depth\r\nrgb/a.png;depth/a.npy\r\n",
    "\ufeffimage\tdepth\nrgb/a.png\tdepth/a.npy\n", "depth,image\ndepth/a.npy,rgb/a.png\n",
    '"image","depth"\n"rgb/a.png","depth/a.npy"\n'])
def test_tables_as_spreadsheets_write_them(text, tmp_path):
    write_pair(tmp_path, "a")
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8")
    assert FolderOfPairs(tmp_path)[0]["name"] == "rgb/a"


def test_a_backslash_and_another_encoding_are_named(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,depth\nrgb\\a.png,depth\\a.npy\n")
    with pytest.raises(ValueError, match=r"line 2: 'rgb\\a.png' has a backslash: write paths"):
        FolderOfPairs(tmp_path)
    (tmp_path / "pairs.csv").write_text("image,depth\na.png,a.npy\n", encoding="utf-16")
    with pytest.raises(ValueError, match="pairs.csv can.t be read as a table.*UTF-8"):
        FolderOfPairs(tmp_path)


def test_depth_in_other_shapes_and_formats(tmp_path):
    for values in (depth_map()[None], depth_map()[..., None]):
        np.save(tmp_path / "a.npy", values)
        np.testing.assert_array_equal(read_depth(tmp_path / "a.npy"), depth_map())
    np.save(tmp_path / "a.npy", np.stack([depth_map()] * 2))
    with pytest.raises(BadSample, match="not a depth map H,W"):
        read_depth(tmp_path / "a.npy")
    Image.fromarray(depth_map()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_depth(tmp_path / "a.tif"), depth_map())
    Image.fromarray((depth_map() * 1000).round().astype(np.uint16)).save(tmp_path / "b.tiff")
    np.testing.assert_allclose(read_depth(tmp_path / "b.tiff"), depth_map(), rtol=1e-6)


def test_depth_in_jpeg_is_refused_as_lossy(tmp_path):
    write_image(tmp_path / "rgb/a.png")
    write_image(tmp_path / "depth/a.jpg")
    with pytest.raises(ValueError, match="a.jpg is a JPEG, which does not keep depth"):
        FolderOfPairs(tmp_path)
    (tmp_path / "pairs.csv").write_text("image,depth\nrgb/a.png,depth/a.jpg\n")
    with pytest.raises(BadSample, match="a.jpg is a JPEG, which does not keep depth"):
        FolderOfPairs(tmp_path)[0]


def test_depth_of_another_size_is_resized_where_it_is_asked_for(tmp_path):
    write_pair(tmp_path, "a", np.repeat(np.repeat(depth_map(), 2, 0), 2, 1))
    with pytest.raises(BadSample, match="is 10x14, but its counterpart is 5x7.*--resize-depth n"):
        FolderOfPairs(tmp_path)[0]
    sample = FolderOfPairs(tmp_path, resize_depth="nearest")[0]
    np.testing.assert_array_equal(sample["depth"][0].numpy(), depth_map())


@pytest.mark.parametrize("size", [(60, 40), (40, 40)])
def test_a_depth_map_of_another_shape_is_not_stretched(tmp_path, size):
    for kind in ("rgb", "depth"):
        (tmp_path / kind).mkdir()
    iio.imwrite(tmp_path / "rgb/a.png", np.zeros((40, 60, 3), np.uint8))
    np.save(tmp_path / "depth/a.npy", np.ones(size, np.float32))
    with pytest.raises(BadSample, match="of another shape than its counterpart's 40x60"):
        FolderOfPairs(tmp_path, resize_depth="nearest")[0]
    np.save(tmp_path / "depth/a.npy", np.ones((20, 30), np.float32))
    assert FolderOfPairs(tmp_path, resize_depth="nearest")[0]["depth"].shape == (1, 40, 60)


def test_eight_bits_are_no_depth(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 6), 73, np.uint8))
    iio.imwrite(tmp_path / "a.tif", np.full((4, 6), 73, np.uint8))
    for name in ("a.npy", "a.tif"):
        with pytest.raises(BadSample, match=f"{name} holds 8-bit numbers"):
            read_depth(tmp_path / name)


def test_what_lies_in_the_place_of_an_array_is_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "b.npy").write_bytes(b"no array")
    for name, words in (("a.npy", "git lfs pull"), ("b.npy", "it is no array of numbers")):
        with pytest.raises(BadSample, match=words) as caught:
            read_depth(tmp_path / name)
        assert "allow_pickle" not in str(caught.value)


def test_a_list_of_pairs_that_leads_nowhere_is_not_ignored(tmp_path):
    for kind in ("rgb", "depth"):
        (tmp_path / kind).mkdir()
    iio.imwrite(tmp_path / "rgb/a.png", np.zeros((4, 6, 3), np.uint8))
    np.save(tmp_path / "depth/a.npy", np.ones((4, 6), np.float32))
    (tmp_path / "pairs.csv").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="pairs.csv"):
        FolderOfPairs(tmp_path)
