"""extras/doctor.py and nets/selftest.py: what predict.py --doctor and --selftest find."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import predict
from extras import doctor
from nets import model_file, selftest
from nets.depthmaster import DepthMaster
from tests import worlds
from tests.worlds import save_tiny



@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def call(monkeypatch, *arguments):
    return worlds.call(monkeypatch, predict, *arguments)


def rewritten(ckpt, path, change):
    """A copy of a model file whose tensors were changed, but not what it says of itself."""
    with model_file.open_weights(ckpt) as file:
        metadata = file.metadata()
    tensors = load_file(ckpt)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def equal_shapes(tensors):
    """Two names of tensors of one shape that differ."""
    seen = {}
    for name, tensor in sorted(tensors.items()):
        other = seen.setdefault(tensor.shape, name)
        if tensor.ndim == 4 and not torch.equal(tensors[other], tensor):
            return other, name
    raise AssertionError("no two tensors of one shape")


def one_weight(tensors):
    tensors[equal_shapes(tensors)[0]].flatten()[3] *= 1.01


def exchange(tensors):
    a, b = equal_shapes(tensors)
    tensors[a], tensors[b] = tensors[b], tensors[a]


def to_half(tensors):
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})


@pytest.mark.parametrize("change, message", [
    (one_weight, "1 tensors are not as they were written, "),
    (exchange, "tensors were exchanged: "),
    (to_half, "its tensors were written as float32 and are float16 now"),
])
def test_damages_are_told_apart(change, message, ckpt, tmp_path, monkeypatch, capsys):
    path = rewritten(ckpt, tmp_path / "a.safetensors", change)
    assert call(monkeypatch, "--selftest", "--ckpt", path) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "copy or convert it again" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_whole_file_passes(dtype, precision, ckpt, tmp_path, monkeypatch, capsys):
    DepthMaster.from_file(ckpt).save(tmp_path / "a.safetensors", dtype)
    assert call(monkeypatch, "--selftest", "--ckpt", tmp_path / "a.safetensors",
                "--precision", precision, "--device", "cpu") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "tensors are as they were written" in printed[0]
    assert "On cpu in " + precision in printed[2]


def test_a_library_that_computes_something_else(ckpt, monkeypatch, capsys):
    genuine = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, **rest: genuine(x) * 1.05)
    assert call(monkeypatch, "--selftest", "--ckpt", ckpt) == 1
    assert "The result on the CPU in float32 differs by" in capsys.readouterr().err


def test_a_precision_that_is_too_coarse(ckpt, monkeypatch, capsys):
    result = iter([selftest.result(DepthMaster.from_file(ckpt)), [9.0] * 64, None])
    monkeypatch.setattr(selftest, "result", lambda model: next(result))
    assert call(monkeypatch, "--selftest", "--ckpt", ckpt, "--precision", "float16") == 1
    said = capsys.readouterr().err
    assert "in float16 differs by" in said and "try --precision float32" in said
    with pytest.raises(ValueError, match="is not finite"):
        doctor.compare(None, [0.0], "float16", "float32", "cuda", "try")


def test_an_old_file_gets_a_file_beside_it(ckpt, tmp_path, monkeypatch, capsys):
    header = {name: value for name, value in model_file.read_header(ckpt).items()
              if name not in ("selftest", "format")}
    path = tmp_path / "old.safetensors"
    model_file.save(path, load_file(ckpt), header)
    assert call(monkeypatch, "--selftest", "--ckpt", path) == 0
    assert "old.safetensors.selftest.json was written" in capsys.readouterr().out
    assert call(monkeypatch, "--selftest", "--ckpt", path) == 0
    assert "all " in capsys.readouterr().out
    model_file.save(path, {**load_file(ckpt), "unet.conv_out.bias": torch.ones(4)}, header)
    assert call(monkeypatch, "--selftest", "--ckpt", path) == 1
    assert "unet.conv_out.bias first" in capsys.readouterr().err


def test_what_a_file_says_does_not_depend_on_memory_layout(ckpt):
    model = DepthMaster.from_file(ckpt)
    said = model_file.read_header(ckpt)["selftest"]
    last = model.to(memory_format=torch.channels_last)
    assert selftest.describe(last, last.state_dict())["digests"] == said["digests"]
    assert len(said["result"]) == 64 and len(set(said["result"])) > 10
    assert json.loads(json.dumps(said)) == said


def test_the_doctor_names_what_is_there_and_what_is_not(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "LIBRARIES", {"EXR": "no-such-library"})
    assert call(monkeypatch, "--doctor", "--ckpt", ckpt, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert f"{ckpt}: stage1, " in printed and f"torch {torch.__version__}" in printed
    assert "EXR: no-such-library is not there (pip install" in printed
    assert "Precision: " in printed and "miniature_dinov2.safetensors: dinov2, " in printed
    ckpt.with_name("torn.safetensors").write_bytes(ckpt.read_bytes()[:1000])
    assert call(monkeypatch, "--doctor", "--ckpt", ckpt.with_name("torn.safetensors")) == 0
    assert "can't be used: " in capsys.readouterr().out
    monkeypatch.setattr(doctor, "SD2", 1)
    assert "fits up to about" in doctor.describe_model(ckpt, "cpu", "float32")
