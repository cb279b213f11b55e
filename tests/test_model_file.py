"""nets/model_file.py: what is written, and what is said of files that are not what is needed."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import storage
from nets import model_file

HEADER = dict(kind="sd2", config=dict(in_features=3, out_features=2), sources=[], licence="none")


def linear(**sizes):
    return nn.Linear(**sizes)


def written(path, **header):
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    model_file.save(path, tensors, HEADER | header)
    return path


def test_round_trip(tmp_path):
    path = written(tmp_path / "new" / "model.safetensors")
    header = model_file.read_header(path)
    assert header == HEADER | {"format": model_file.FORMAT}
    module = model_file.build(linear, header["config"], path)
    assert module.weight.tolist() == [[0, 1, 2], [3, 4, 5]] and not module.training
    assert isinstance(module.weight, nn.Parameter)
    half = model_file.build(linear, header["config"], path, dtype=torch.float16)
    assert half.bias.dtype == torch.float16


def test_half_precision_files_are_opened_in_float32(tmp_path):
    path = tmp_path / "model.safetensors"
    model_file.save(path, {"weight": torch.ones(2, 3).half(), "bias": torch.ones(2).half()}, HEADER)
    assert model_file.build(linear, HEADER["config"], path).weight.dtype == torch.float32


@pytest.mark.parametrize("numbers", [1, 40, 1 << 17])  # of a piece: less than a row, one, all
def test_conversion_lays_convolutions_out_piece_by_piece(numbers, monkeypatch):
    monkeypatch.setattr(model_file, "PIECE", numbers)
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3)
    found = model_file.converted(weight, torch.bfloat16)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == torch.bfloat16 and torch.equal(found, weight.bfloat16())
    assert model_file.converted(torch.ones(0, 4, 3, 3), torch.bfloat16).shape == (0, 4, 3, 3)


def test_equal_models_are_equal_bytes(tmp_path):
    first, second = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_files_are_those_that_the_library_writes(tmp_path):
    """It wants contiguous tensors; a trainer's are channels last, and copies of all are large."""
    torch.manual_seed(0)
    tensors = {"b": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
               "a\u00e9": torch.randn(3).bfloat16(), "e": torch.zeros(0, 2), "s": torch.tensor(2.0),
               "t": torch.randn(2, 5).T, "i": torch.arange(3), "m": torch.tensor([True, False]),
               "h": torch.ones(3).half(), "d": torch.ones(2).double(), "u": torch.ones(1).byte()}
    model_file.write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs",
              metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_others_may_read_the_file_as_far_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        assert written(tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = written(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def fail(handle):
        raise OSError(28, "no space left")

    monkeypatch.setattr(storage.os, "fsync", fail)
    with pytest.raises(OSError, match="model.safetensors can't be written .*no space left"):
        written(path, licence="another")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_what_is_needed(tmp_path):
    def refused(path, sentence, error=ValueError, **options):
        with pytest.raises(error, match=sentence):
            model_file.read_header(path, **options)
    refused(tmp_path / "nowhere.safetensors", "is not there", FileNotFoundError)
    refused(tmp_path, "is a folder: give a model file", FileNotFoundError)
    page = tmp_path / "page.safetensors"
    page.write_text("<html>not found</html>")
    refused(page, "is a web page \\(HTML\\), not the file")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign, metadata={"format": "pt"})
    refused(foreign, "is not a model file of this project: convert it first")
    newer = tmp_path / "newer.safetensors"
    header = json.dumps(HEADER | {"format": model_file.FORMAT + 1})
    save_file({"weight": torch.ones(2)}, newer, metadata={model_file.KEY: header})
    refused(newer, "update the code")
    refused(written(tmp_path / "model.safetensors"),
            r"holds a sd2 model \(from convert_sd2.py\), but what is needed here is dinov2 \(from ",
            kinds=("dinov2",))


@pytest.mark.parametrize("config, sentence", [
    (dict(in_features=3, out_features=2, bias=False), "1 tensors are missing or unknown, bias"),
    (dict(in_features=4, out_features=2), r"weight has shape \(2, 3\), but .* needs \(2, 4\)"),
])
def test_files_that_do_not_fit_their_header(tmp_path, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        model_file.build(linear, config, written(tmp_path / "model.safetensors"))
