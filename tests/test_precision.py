"""nets/inference/precision.py: what `auto` is, and when it is measured."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nets.depthmaster import DepthMaster
from nets.inference import precision
from nets.inference.precision import bfloat16_share, choose

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share, chosen", [(0.5, "bfloat16"), (0.84, "bfloat16"),
                                           (0.86, "float32"), (1.6, "float32")])
def test_auto_on_a_cpu_is_what_was_measured(share, chosen, training, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_share", lambda: share)
    found, why = choose("auto", "cpu", training)
    assert found == chosen and f"{share:.0%}" in why and chosen in why and why.count("\n") == 0


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_what_is_asked_for_is_not_measured(asked, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_share", lambda: pytest.fail("measured"))
    assert choose(asked) == (asked, "")


@pytest.mark.parametrize("capability, training, chosen", [
    ((8, 0), True, "bfloat16"), ((9, 0), False, "bfloat16"), ((7, 5), True, "float32"),
    ((7, 5), False, "float16")])
def test_auto_on_a_gpu(capability, training, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, why = choose("auto", "cuda", training)
    assert found == chosen and "GPU" in why


def test_apple_has_float32():
    assert choose("auto", "mps")[0] == "float32"


def test_the_measurement_is_short_is_made_once_and_leaves_no_trace():
    bfloat16_share.cache_clear()
    threads = torch.get_num_threads()
    start = time.thread_time()
    share = bfloat16_share()
    assert time.thread_time() - start < 1.0  # 0.01 s where bfloat16 is not emulated
    assert torch.get_num_threads() == threads and 0.01 < share < 1000
    assert bfloat16_share() == share and bfloat16_share.cache_info().misses == 1


@pytest.mark.parametrize("seconds, chosen", [
    ({torch.float32: 2e-3, torch.bfloat16: 1e-3}, "bfloat16"),
    ({torch.float32: 1e-3, torch.bfloat16: 1.6e-3}, "float32"),
    ({torch.float32: 1e-3, torch.bfloat16: 0.5}, "float32"),
    ({torch.float32: 0.0, torch.bfloat16: 0.0}, "float32")])
def test_the_clock_decides(seconds, chosen, monkeypatch):
    """A clock that a convolution moves on by what its type takes, and now and then by a load."""
    now, calls = [0.0], []

    def convolve(x, weight, padding):
        calls.append(x.dtype)
        now[0] += seconds[x.dtype] * (3 if len(calls) % 3 == 0 else 1)

    monkeypatch.setattr(precision.F, "conv2d", convolve)
    monkeypatch.setattr(precision.time, "thread_time", lambda: now[0])
    bfloat16_share.cache_clear()
    try:
        assert choose("auto")[0] == chosen
    finally:
        bfloat16_share.cache_clear()
    assert len(calls) == (2 if seconds[torch.bfloat16] == 0.5 else 12)
    assert calls[:2] == [torch.float32, torch.bfloat16]


def test_a_prediction_takes_it_and_says_so(tmp_path):
    from data.files import write_png
    write_png(tmp_path / "a.png", np.zeros((40, 56, 3), np.uint8))
    said = subprocess.run([sys.executable, "predict.py", tmp_path / "a.png", "--out",
                           tmp_path / "out", "--save", "npy", "--device", "cpu"],
                          cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert said.count("Precision: ") == 1 and "(measured)" in said


def test_a_model_made_for_inference_has_the_measured_type(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_share", lambda: 0.5)
    small = dict(vae=dict(channels=(4, 4, 8, 8), layers=1, groups=2),
                 unet=dict(channels=(4, 8), layers=1, attention=(False, True), heads=(1, 2),
                           text_width=6, groups=2))
    assert DepthMaster(**small).for_inference().dtype == torch.bfloat16
