"""extras/graph.py: a model as ONNX or torch.export, against the model itself."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import convert_sd2
from extras import graph
from extras.graph import RealFourier, angle
from nets.depthmaster import DepthMaster
from nets.fourier import FourierEnhancement
from tests import worlds
from tests.worlds import UNET, VAE, photo, save_tiny

SIZE = 48, 72  # a middle feature of odd size


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny model of stage 2, with the Fourier block."""
    torch.manual_seed(0)
    model = DepthMaster(vae=VAE, unet=UNET)
    model.become("stage2")
    model.add_fourier()
    torch.nn.init.normal_(model.unet.text_embedding)
    path = tmp_path_factory.mktemp("model") / "stage2.safetensors"
    model.save(path)
    return path


def call(monkeypatch, *arguments):
    return worlds.call(monkeypatch, convert_sd2, *arguments)


@pytest.mark.parametrize("h, w", [(6, 8), (7, 9), (15, 20), (8, 5), (1, 1), (2, 3), (3, 2)])
def test_the_fourier_block_in_real_numbers(h, w):
    torch.manual_seed(h)
    block, x = FourierEnhancement(16), torch.randn(2, 16, h, w)
    torch.testing.assert_close(RealFourier(block, h, w)(x), block(x), atol=1e-5, rtol=0)


def test_angles():
    real, imaginary = torch.cartesian_prod(*2 * [torch.tensor([-2.0, -1, -0.0, 0, 0.5, 3])]).T
    expected = torch.atan2(imaginary + 0.0, real + 0.0)  # + 0.0: no negative zeros
    torch.testing.assert_close(angle(real, imaginary), expected)


@pytest.mark.parametrize("kind, dtype, files", [
    ("onnx", "float32", ["model.onnx", "model.onnx.data"]), ("torch", "float16", ["model.torch"])])
def test_graphs_give_what_the_model_gives(kind, dtype, files, ckpt, tmp_path, monkeypatch, capsys):
    """The ONNX graph is treated as a large one: its weights get a file of their own."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    monkeypatch.setattr(graph, "LARGE", 1000)
    out = tmp_path / f"deep/model.{kind}"
    assert call(monkeypatch, ckpt, "--export", kind, "--size", *SIZE, "--dtype", dtype,
                "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and "differs from the model's by" in printed.err
    assert sorted(path.name for path in out.parent.iterdir()) == files
    model = DepthMaster.from_file(ckpt).for_inference(precision="float32")
    images = torch.from_numpy(np.stack([photo(*SIZE, seed=seed) for seed in range(3)]))
    images = images.permute(0, 3, 1, 2)
    expected = model.predict_batch(images, 0).numpy()
    tolerance = 1e-3 if dtype == "float32" else 2e-2
    for count, found in run_alone(kind, out, images.float().numpy()).items():
        assert found.shape == (int(count), *SIZE) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[: int(count)], atol=tolerance)


def run_alone(kind, file, pictures):
    """What the graph gives for 1 and for 3 pictures, in a process without this project's code."""
    load = {"onnx": f"import onnxruntime; graph = onnxruntime.InferenceSession({file.name!r}); "
                    "run = lambda x: graph.run(['depth'], {'image': x})[0]",
            "torch": f"import torch; graph = torch.export.load({file.name!r}).module(); "
                     "run = lambda x: graph(torch.from_numpy(x)).numpy()"}
    np.save(file.parent / "in.npy", pictures)
    code = (f"import numpy as np; {load[kind]}; x = np.load('in.npy'); "
            "np.savez('out.npz', **{'1': run(x[:1]), '3': run(x[:3])})")
    subprocess.run([sys.executable, "-c", code], cwd=file.parent, check=True)
    return dict(np.load(file.parent / "out.npz"))


def test_a_graph_that_differs_is_not_written(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph, "write_torch", lambda graph, picture, file, text: file.touch())
    monkeypatch.setattr(graph, "run_torch", lambda file, picture: np.ones(picture.shape[2:]))
    assert call(monkeypatch, ckpt, "--export", "torch", "--size", 32, 32, "--out",
                tmp_path / "a.pt2") == 1
    assert "is not written: its result differs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, code, message", [
    (["--size", 30, 32], 1, "both must be multiples of 8"), ([], 2, "needs --size H W"),
    (["--size", 32, 32, "--dtype", "bfloat16"], 1, "float32 or float16"),
    (["--size", 0, 32], 2, "above 0"),
])
def test_wrong_options(options, code, message, tmp_path, monkeypatch, capsys):
    ckpt = save_tiny(tmp_path / "tiny.safetensors")
    assert call(monkeypatch, ckpt, "--export", "torch", *options, "--out", tmp_path / "a") == code
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert call(monkeypatch, ckpt, "--export", "torch", "--size", 32, 32, "--out", ckpt) == 1
    assert "is the source itself" in capsys.readouterr().err


def test_a_missing_library_is_named(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call(monkeypatch, ckpt, "--export", "onnx", "--size", 32, 32, "--out",
                tmp_path / "a.onnx") == 1
    assert "ONNX Runtime needs onnxruntime: pip install" in capsys.readouterr().err
