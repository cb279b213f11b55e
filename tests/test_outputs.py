"""What predict.py writes, says and reads: extras/outputs.py, record.py and inputs.py."""

import glob
import hashlib
import io
import json
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import predict
from evaluation.pictures import colourise
from extras import libraries
from extras.inputs import find_inputs
from extras.outputs import from_sqrt_disparity, to_sqrt_disparity
from tests import worlds
from tests.worlds import photo, save_tiny

SIZE = 40, 56
FLOAT32 = ("--precision", "float32")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def call(monkeypatch, ckpt, tmp_path):
    """Calls predict.py with a tiny model; results go to out/ below the test's folder, tmp_path."""
    def call(*arguments, out=tmp_path / "out"):
        return worlds.call(monkeypatch, predict, "--ckpt", ckpt, "--out", out, *FLOAT32, *arguments)
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def picture(tmp_path):
    iio.imwrite(tmp_path / "a.png", photo(*SIZE))
    return tmp_path / "a.png"


def depth_for(near):
    """A depth map that the prediction `near` is an affine map of, in square-root disparity."""
    return (0.6 * near.astype(np.float64) + 0.25) ** -2


def record(tmp_path):
    return json.loads((tmp_path / "out/predictions.json").read_text())


# ------------------------------------------------------------- spaces


def test_spaces_by_assumption_and_back():
    near = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)
    depth, disparity = (from_sqrt_disparity(near, space, 20) for space in ("depth", "disparity"))
    assert depth.dtype == np.float32
    assert depth.max() == pytest.approx(20) and depth.min() == pytest.approx(1)
    np.testing.assert_allclose(depth * disparity, 1, rtol=1e-6)
    np.testing.assert_allclose(to_sqrt_disparity((depth - 1) / 19, "depth", 20), near, atol=1e-6)
    beyond = from_sqrt_disparity(np.float32([-2, 2]), "depth", 10)  # --temporal goes there
    assert np.isfinite(beyond).all() and beyond[0] > beyond[1] > 0


@pytest.mark.parametrize("space", ["disparity", "depth"])
def test_the_space_of_npy_is_said_first(space, call, picture, tmp_path, capsys):
    assert call(picture, "--save", "npy", "--output", space, "--far-to-near", 20) == 0
    said = capsys.readouterr().err
    assert f".npy and .exr hold {space} up to scale" in said.splitlines()[0]
    assert "20" in said.splitlines()[0]
    values = np.load(tmp_path / "out/a.npy")
    assert call(picture, "--save", "npy", out=tmp_path / "plain") == 0
    near = np.load(tmp_path / "plain/a.npy")
    np.testing.assert_array_equal(values, from_sqrt_disparity(near, space, 20))


# ------------------------------------------------------------- kinds of files


def test_grey_sides_and_other_colours(call, picture, tmp_path):
    assert call(picture, "--save", "npy", "color", "side", "--near-white") == 0
    near = np.load(tmp_path / "out/a.npy")
    grey = iio.imread(tmp_path / "out/a_color.png")
    np.testing.assert_array_equal(grey, np.round(255 * near))
    side = iio.imread(tmp_path / "out/a_side.png")
    assert side.shape[1] >= 2 * SIZE[1] and side.shape[0] > SIZE[0]
    assert call(picture, "--save", "color", "--colormap", "magma") == 0
    shown = iio.imread(tmp_path / "out/a_color.png")[: SIZE[0], : SIZE[1]]
    np.testing.assert_array_equal(shown, colourise(near, "magma_r"))  # near is the map's start
    assert call(picture, "--save", "side") == 0
    side = iio.imread(tmp_path / "out/a_side.png")
    places = [(row, 0) for row in range(side.shape[0] - SIZE[0])
              if np.array_equal(side[row : row + SIZE[0], : SIZE[1]], photo(*SIZE))]
    assert len(places) == 1
    row = places[0][0]
    np.testing.assert_array_equal(side[row : row + SIZE[0], SIZE[1] : 2 * SIZE[1]],
                                  colourise(near))


@pytest.mark.parametrize("half, step", [((), 0), (("--half",), 2**-11)])
def test_exr(half, step, call, picture, tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR")
    assert call(picture, "--save", "npy", "exr", *half) == 0
    with OpenEXR.File(str(tmp_path / "out/a.exr"), separate_channels=True) as file:
        values, comments = file.channels()["Z"].pixels, file.header()["comments"]
    near = np.load(tmp_path / "out/a.npy")
    assert values.dtype == (np.float16 if half else np.float32)
    np.testing.assert_allclose(values, near, atol=step / 2)
    assert "square-root disparity" in comments


def test_points_and_meshes(call, picture, tmp_path, capsys):
    plyfile, trimesh = pytest.importorskip("plyfile"), pytest.importorskip("trimesh")
    assert call(picture, "--save", "npy", "ply", "glb", "--fov", 90, "--edge-filter", 0) == 0
    said = capsys.readouterr().err
    assert "the nearest point is at 1, the farthest at 10 by assumption" in said
    assert "focal length 28.0 pixels (90 degrees given)" in said
    cloud = plyfile.PlyData.read(tmp_path / "out/a.ply")
    vertices = cloud["vertex"]
    depth = from_sqrt_disparity(np.load(tmp_path / "out/a.npy"), "depth", 10)
    np.testing.assert_array_equal(vertices["z"], depth.ravel())
    np.testing.assert_allclose(vertices["x"], ((np.arange(56) + 0.5 - 28) / 28 * depth).ravel(),
                               rtol=1e-5)
    np.testing.assert_array_equal(vertices["red"], photo(*SIZE)[..., 0].ravel())
    assert any("up to scale" in line for line in cloud.comments)
    scene = trimesh.load(tmp_path / "out/a.glb")
    assert sum(len(mesh.vertices) for mesh in scene.geometry.values()) == depth.size
    assert b"the farthest at 10 by assumption" in (tmp_path / "out/a.glb").read_bytes()


# ------------------------------------------------------------- metres


def test_metres_from_a_depth_map(call, picture, tmp_path, capsys):
    assert call(picture, "--save", "npy") == 0
    truth = depth_for(np.load(tmp_path / "out/a.npy"))
    iio.imwrite(tmp_path / "known.png", np.round(5000 * truth).clip(0, 65535).astype(np.uint16))
    assert call(picture, "--metric", tmp_path / "known.png", "--depth-scale", 5000) == 0
    said = capsys.readouterr().err
    assert "2240 of 2240 points fit" in said and "scale 0.600" in said and "shift 0.25" in said
    metres = np.load(tmp_path / "out/a_metres.npy")
    assert metres.dtype == np.float32
    np.testing.assert_allclose(metres, truth, rtol=2e-3)
    millimetres = Image.open(tmp_path / "out/a_metres.png")
    np.testing.assert_allclose(np.array(millimetres), 1000 * metres, atol=0.51)
    assert "millimetres" in millimetres.info["Description"]
    assert (tmp_path / "out/a.npy").exists()
    entry = record(tmp_path)["pictures"]["a"]
    assert entry["fit"]["points"] == 2240 and entry["fit"]["scale"] == pytest.approx(0.6, rel=1e-2)


def test_metres_in_exr_and_points(call, picture, tmp_path, capsys):
    OpenEXR, plyfile = pytest.importorskip("OpenEXR"), pytest.importorskip("plyfile")
    assert call(picture, "--save", "npy") == 0
    truth = depth_for(np.load(tmp_path / "out/a.npy"))
    np.save(tmp_path / "known.npy", truth)
    assert call(picture, "--metric", tmp_path / "known.npy", "--save", "exr", "ply",
                "--edge-filter", 0) == 0
    with OpenEXR.File(str(tmp_path / "out/a.exr"), separate_channels=True) as file:
        np.testing.assert_allclose(file.channels()["Z"].pixels, truth, rtol=1e-3)
        assert "metres" in str(file.header()["comments"])
    cloud = plyfile.PlyData.read(tmp_path / "out/a.ply")
    np.testing.assert_allclose(cloud["vertex"]["z"], truth.ravel(), rtol=1e-3)
    assert "in metres" in " ".join(cloud.comments)
    assert (tmp_path / "out/a_metres.npy").exists()
    assert not (tmp_path / "out/a_metres.png").exists()


def test_beyond_65_metres_is_0_and_said(call, picture, tmp_path, capsys):
    assert call(picture, "--save", "npy") == 0
    near = np.load(tmp_path / "out/a.npy")
    near = (near - near.min()) / np.ptp(near)
    np.save(tmp_path / "known.npy", (0.3 * near.astype(np.float64) + 0.05) ** -2)
    assert call(picture, "--metric", tmp_path / "known.npy", "--save", "png16") == 0
    assert "are beyond 65.535 m and have 0 there" in capsys.readouterr().err
    metres = np.load(tmp_path / "out/a_metres.npy")
    stored = iio.imread(tmp_path / "out/a_metres.png")
    assert ((stored == 0) == (metres > 65.535)).all() and (stored == 0).any()


def test_models_of_another_target_are_fitted_in_their_own_space(monkeypatch, picture, tmp_path):
    ckpt = save_tiny(tmp_path / "depth.safetensors", target="depth")
    from nets.depthmaster import DepthMaster
    raw = DepthMaster.from_file(ckpt).for_inference(precision="float32").predict(photo(*SIZE))
    truth = 2 + 5 * raw.astype(np.float64)
    np.save(tmp_path / "known.npy", truth)
    assert worlds.call(monkeypatch, predict, picture, "--ckpt", ckpt, "--out", tmp_path / "out",
                       "--metric", tmp_path / "known.npy", "--save", "png16", *FLOAT32) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out/a_metres.npy"), truth, rtol=1e-4)


@pytest.mark.parametrize("text, message", [
    (b"", "holds no points"), (b"x,y,metres\n900,3,2\n3,3,1\n", "outside of the picture"),
    (b"x,y,metres\n3,3,nan\n3,9,2\n", "point 1 has no number"), (None, "is not there"),
    (b"x,y,metres\n3,3,2\n3,9,2\n", "two different depths"), (b"\x89PNG\0", "UTF-8"),
    (b"x,y,metres\n3,3,2000\n3,9,2\n", "not between 0 and 1000 m"),
])
def test_sources_that_tell_nothing(text, message, call, picture, tmp_path, capsys):
    if text is not None:
        (tmp_path / "points.csv").write_bytes(text)
    assert call(picture, "--metric", tmp_path / "points.csv") == 1
    said = capsys.readouterr().err
    assert message in said and "points.csv" in said and "Traceback" not in said
    assert not list((tmp_path / "out").rglob("*"))


def test_one_source_is_for_one_picture_and_a_folder_for_many(call, tmp_path, capsys):
    for name in ("in/a", "in/deep/b", "in/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(tmp_path / f"{name}.png", photo(*SIZE))
    (tmp_path / "known/deep").mkdir(parents=True)
    (tmp_path / "known/a.csv").write_text("x,y,metres\n3,3,2\n3,9,2\n")
    assert call(tmp_path / "in", "--metric", tmp_path / "known/a.csv") == 1
    assert "is for one picture: give a folder" in capsys.readouterr().err
    assert call(tmp_path / "in", "--save", "npy") == 0
    truth = depth_for(np.load(tmp_path / "out/deep/b.npy"))
    np.save(tmp_path / "known/deep/b.npy", truth)
    assert call(tmp_path / "in", "--save", "npy", "--metric", tmp_path / "known",
                out=tmp_path / "metric") == 1
    said = capsys.readouterr().err
    assert "a.csv: the points are all 2 m away" in said and "holds no c" in said
    np.testing.assert_allclose(np.load(tmp_path / "metric/deep/b_metres.npy"), truth, rtol=1e-3)
    assert set(json.loads((tmp_path / "metric/predictions.json").read_text())["pictures"]) == {
        "deep/b"}


# ------------------------------------------------------------- options, libraries


@pytest.mark.parametrize("options, message", [
    (("--fov", "0"), "between 0 and 180"), (("--fov", "nan"), "between 0 and 180"),
    (("--focal", "-3"), "above 0"), (("--fov", "50", "--focal", "500"), "not allowed with"),
    (("--far-to-near", "1"), "above 1"), (("--colormap", "rainbows"), "colour map of matplotlib"),
    (("--edge-filter", "-1"), "0 or above"), (("--output", "metres"), "invalid choice"),
    (("--far-to-near", "ten"), "above 1"), (("--fps", "0"), "above 0"),
])
def test_wrong_options(options, message, call, picture, capsys):
    assert call(picture, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (("--half",), "--half is about exr"), (("--fov", 60), "--fov is about glb and ply"),
    (("--temporal",), "--temporal is about clips"), (("",), "an INPUT is empty"),
    (("--frames", "a.png"), "a.png is no folder of frames"),
])
def test_options_and_inputs_that_would_do_nothing(options, message, call, picture, capsys):
    assert call(picture, *options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["EXR", "PLY", "GLB"])
def test_a_missing_library_is_told_before_any_work(kind, call, picture, tmp_path, monkeypatch,
                                                   capsys):
    monkeypatch.setitem(sys.modules, libraries.LIBRARIES[kind], None)
    assert call(picture, "--save", "npy", kind.lower()) == 1
    assert capsys.readouterr().err == (f"error: {kind} needs {libraries.LIBRARIES[kind]}: "
                                       "pip install -r extras/requirements.txt\n")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------- the record, and going on


def test_the_record_says_what_was_done(call, ckpt, picture, tmp_path):
    assert call(picture, "--save", "npy") == 0
    found = record(tmp_path)
    assert found["checkpoint_sha256"] == hashlib.sha256(ckpt.read_bytes()).hexdigest()
    assert found["options"]["output"] == "sqrt_disparity" and found["version"]
    entry = found["pictures"]["a"]
    assert entry["size"] == list(SIZE) and entry["files"] == ["a.npy"] and entry["seconds"] > 0
    iio.imwrite(tmp_path / "b.png", photo(*SIZE))
    assert call(tmp_path / "b.png", "--save", "npy") == 0
    assert set(record(tmp_path)["pictures"]) == {"a", "b"}
    assert call(picture, "--save", "npy", "--processing-res", 32) == 0
    assert set(record(tmp_path)["pictures"]) == {"a"}  # b was made with other options
    (tmp_path / "out/predictions.json").write_text("[1")
    assert call(picture, "--save", "npy") == 0
    assert set(record(tmp_path)["pictures"]) == {"a"}


def test_files_of_earlier_runs_stay_in_the_record(call, picture, tmp_path, capsys):
    assert call(picture, "--save", "npy") == 0
    assert call(picture, "--save", "png16", "--skip-existing") == 0
    assert record(tmp_path)["pictures"]["a"]["files"] == ["a.png", "a.npy"]
    (tmp_path / "out/predictions.json").unlink()
    assert call(picture, "--save", "npy", "--skip-existing", "--output", "depth") == 0
    assert "nothing tells with which options" in capsys.readouterr().err


def test_a_picture_that_fails_leaves_no_file(call, tmp_path, capsys):
    pytest.importorskip("trimesh")
    iio.imwrite(tmp_path / "a.png", photo(*SIZE))
    assert call(tmp_path / "a.png", "--save", "npy", "glb", "--edge-filter", 1e-9) == 1
    assert "a.png: no " in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_skip_existing_leaves_out_what_is_whole(call, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in "abc":
        iio.imwrite(tmp_path / f"in/{name}.png", photo(*SIZE))
    assert call(tmp_path / "in/a.png", tmp_path / "in/b.png") == 0
    (tmp_path / "out/b_color.png").unlink()
    before = (tmp_path / "out/a.npy").stat().st_mtime_ns
    capsys.readouterr()
    assert call(tmp_path / "in", "--skip-existing") == 0
    assert "2 pictures predicted" in capsys.readouterr().err
    assert (tmp_path / "out/a.npy").stat().st_mtime_ns == before
    assert (tmp_path / "out/b_color.png").exists() and (tmp_path / "out/c.npy").exists()
    assert set(record(tmp_path)["pictures"]) == set("abc")
    assert call(tmp_path / "in", "--skip-existing", "--output", "depth") == 1
    said = capsys.readouterr().err
    assert "another model, version or options (predictions.json: options)" in said
    assert call(tmp_path / "in", "--skip-existing") == 0
    assert "0 pictures predicted" in capsys.readouterr().err


# ------------------------------------------------------------- inputs


def test_globs_and_lists(call, tmp_path, capsys):
    for name in ("x/rgb/1", "y/rgb/1", "y/other/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(tmp_path / f"{name}.png", photo(*SIZE))
    (tmp_path / "y/rgb/notes.txt").touch()

    def names(*given):
        return list(find_inputs([str(text) for text in given], tmp_path / "out", tmp_path))

    assert names(tmp_path / "*/rgb/*") == ["x/rgb/1", "y/rgb/1"]
    assert names(tmp_path / "**/2.png") == ["y/other/2"]
    (tmp_path / "list.txt").write_text(
        f"# some\n{tmp_path}/x/rgb/1.png\n\n  {tmp_path}/y/rgb/1.png\r\n")
    assert names(f"@{tmp_path}/list.txt") == ["x/rgb/1", "y/rgb/1"]
    (tmp_path / "relative.txt").write_text("\ufeffy/rgb/1.png\nx/../x\n", encoding="utf-8")
    assert names(f"@{tmp_path}/relative.txt") == ["y/rgb/1", "x/rgb/1"]
    assert names(tmp_path / "x/../x/rgb/*.png") == ["1"]
    (tmp_path / "[1].png").write_bytes((tmp_path / "x/rgb/1.png").read_bytes())
    assert names(tmp_path / "[1].png") == ["[1]"]  # a name, not a pattern
    assert glob.has_magic(str(tmp_path / "[1].png"))
    for given, message in ((tmp_path / "*.jpg", "matches no picture"), ("@none.txt", "not there"),
                           (f"@{tmp_path}/empty.txt", "names no picture")):
        (tmp_path / "empty.txt").write_text("\n# nothing\n")
        assert call(given) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "self.txt").write_text(f"@{tmp_path}/self.txt\n")
    assert call(f"@{tmp_path}/self.txt") == 1
    assert "is not there" in capsys.readouterr().err


class Stream:
    def __init__(self, content=b""):
        self.buffer = io.BytesIO(content)

    def __getattr__(self, name):
        return getattr(sys.__stdout__, name)


def test_standard_input_and_output(call, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Stream(picture.read_bytes()))
    stdout = Stream()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert call("-", out="-") == 0
    assert call(picture, "--save", "png16") == 0
    assert stdout.buffer.getvalue() == (tmp_path / "out/a.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out"]
    monkeypatch.setattr(sys, "stdin", Stream(b"no picture"))
    assert call("-", out="-") == 1
    for wrong in ([picture, tmp_path / "b.png"], [picture, "--save", "npy"],
                  [picture, "--metric", picture]):
        iio.imwrite(tmp_path / "b.png", photo(*SIZE))
        assert call(*wrong, out="-") == 1
