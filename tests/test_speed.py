"""What benchmarks/ makes of what it measures."""

import importlib
import os
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

from benchmarks import inference, memory, timing, training
from miniature import embedded
from nets.depthmaster import DepthMaster


@pytest.mark.parametrize("operation, kind", [
    ("aten::cudnn_convolution", "convolution"),
    ("aten::mkldnn_convolution", "convolution"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ("aten::_flash_attention_forward", "attention"),
    ("aten::_efficient_attention_forward", "attention"),
    ("aten::addmm", "matrix product"),
    ("aten::bmm", "matrix product"),
    ("aten::silu_", "aten::silu_"),
])
def test_kinds_of_operations(operation, kind):
    assert inference.kind(operation) == kind


def row(key, device_type, cpu_us, device_us):
    return SimpleNamespace(key=key, device_type=device_type, self_cpu_time_total=cpu_us,
                           self_device_time_total=device_us)


def test_a_gpu_profile_counts_each_kernel_once():
    rows = [row("aten::cudnn_convolution", DeviceType.CPU, 9e6, 3e6),
            row("sm90_xmma_fprop_implicit_gemm_bf16", DeviceType.CUDA, 0, 3e6),
            row("aten::addmm", DeviceType.CPU, 5e6, 2e6),
            row("sm90_xmma_gemm_bf16", DeviceType.CUDA, 0, 2e6),
            row("cudaLaunchKernel", DeviceType.CPU, 1e6, 0)]
    took = inference.seconds_by_kind(rows, on_gpu=True)
    assert +took == {"convolution": 3, "matrix product": 2}


def test_a_cpu_profile_has_all_its_time():
    rows = [row("aten::mkldnn_convolution", DeviceType.CPU, 3e6, 0),
            row("aten::convolution", DeviceType.CPU, 1e6, 0),
            row("aten::silu_", DeviceType.CPU, 2e6, 0)]
    took = inference.seconds_by_kind(rows, on_gpu=False)
    assert took == {"convolution": 4, "aten::silu_": 2}


def test_seconds_of_a_call_on_the_cpu():
    assert 0.02 <= timing.seconds(lambda: time.sleep(0.02), torch.device("cpu")) < 2


def test_seconds_of_a_call_on_a_gpu_are_those_between_two_events(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            happened.append(stream)

        def synchronize(self):
            happened.append("waited")

        def elapsed_time(self, end):
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    took = timing.seconds(lambda: happened.append("called"), torch.device("cuda:1"))
    assert took == 0.25
    assert happened == ["stream of cuda:1", "called", "stream of cuda:1", "waited"]


def test_attention_on_the_cpu_is_counted():
    """Two products of 2 * 5 * 7 * 16 operations for each of 6 heads, and five backward."""
    q = torch.rand(2, 3, 5, 16, requires_grad=True)
    k, v = torch.rand(2, 2, 3, 7, 16, requires_grad=True)
    with timing.counter() as operations:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert operations.get_total_flops() == 7 * 6 * 2 * 5 * 7 * 16


def test_the_table_of_predictions(capsys):
    times = {"ours": [2.0, 2.0, 2.0], "diffusers, channels_last": [4.0, 4.0, 4.0]}
    inference.print_table("float32", times, batch=8, work={"ours": 0.5, "diffusers": 1.0},
                          reached=4.0, targets={"diffusers, channels_last": "0.87"})
    *_, ours, other = capsys.readouterr().out.splitlines()
    assert ours == "| ours | 2 | 2 | 2 | 4 | 0.5 | 2 (50 %) | 1.00 |  |"
    assert other == "| diffusers, channels_last | 4 | 4 | 4 | 2 | 1 | 2 (50 %) | 0.50 | 0.87 |"


def test_ways_are_timed_in_processes_of_their_own(monkeypatch, capfd):
    words = "--miniature --size 64 96 --batch 1 2 --runs 2 --precision float32 --profile"
    monkeypatch.setattr(sys, "argv", ["inference", *words.split()])
    inference.main()
    said = capfd.readouterr().out
    assert said.count("| ours | ") == 2 and said.count("| convolution | ") == 2
    broken = inference.Apart("theirs", partial(int, "none"), torch.device("cpu"))
    with pytest.raises(ValueError, match="process of theirs has ended"):
        broken.ask(inference.timed, (1, 3, 64, 96))
    broken.close()
    assert "invalid literal" in capfd.readouterr().err


def test_memory_and_opening_from_the_disk_and_warm(monkeypatch, capfd):
    words = "--miniature --sizes 64x96 --precision float32 --runs 1"
    monkeypatch.setattr(sys, "argv", ["memory", *words.split()])
    before = embedded.TRAINED.read_bytes()
    memory.main()
    assert embedded.TRAINED.read_bytes() == before
    rows = [line.split(" | ") for line in capfd.readouterr().out.splitlines()
            if line.startswith(("| reading", "| opening", "| predicting"))]
    states = ["from the disk", "warm"] if hasattr(os, "posix_fadvise") else ["warm"]
    names = [name for state in states for name in (f"| reading the file once, {state}",
                                                   f"| opening, float32, {state}")]
    assert [row[0].split(" (")[0] for row in rows] == [*names, "| predicting 64x96, float32"]
    for reading, opening in zip(rows[:-1:2], rows[1:-1:2]):
        assert float(opening[2]) == pytest.approx(float(opening[1]) / float(reading[1]), rel=0.02)
    assert all(float(row[3]) > 0.05 for row in rows)  # GiB: libraries alone take more


def test_the_work_of_a_prediction(monkeypatch):
    """5.23 TFLOP the plain way, as diffusers does it; 4.71 by ours."""
    size = 480, 640
    assert inference.operations(inference.ours(False, "meta", "float32"), size) == (
        pytest.approx(4.707, abs=5e-4))

    def plain(x, conv, size=None):
        size = size or [2 * side for side in x.shape[2:]]
        return conv(F.interpolate(x, size=size, mode="nearest"))

    monkeypatch.setattr("nets.vae.enlarge", plain)
    monkeypatch.setattr("nets.unet.enlarge", plain)
    with torch.device("meta"):
        assert inference.operations(DepthMaster(), size) == pytest.approx(5.231, abs=5e-4)


def test_training_with_a_cache_keeps_the_vae_and_frees_the_teacher():
    args = SimpleNamespace(miniature=True, micro_batch=1, size=(64, 96), compile=False,
                           checkpoint_activations="off")
    objective, batch, _ = training.objective_and_batch(
        args, "stage 1, cached", torch.device("cpu"), torch.float32)
    assert objective.teacher is None
    assert {p.device.type for p in objective.vae.parameters()} == {"cpu"}
    assert all(torch.isfinite(loss).all() for loss in objective(batch).values())


@pytest.mark.parametrize("module, words", [
    ("inference", ["--size", "4", "4"]), ("training", ["--size", "0", "640"]),
    ("memory", ["--sizes", "4x4"]), ("memory", ["--sizes", "480"]),
    ("memory", ["--sizes", "wide"]), ("scoring", ["--size", "0", "0"])])
def test_sizes_that_no_picture_has_are_refused(module, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{module}").main()
    assert ended.value.code == 2 and "error: argument --size" in capsys.readouterr().err
