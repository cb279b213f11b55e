"""The peer of the benchmarks does the work that is counted for it."""

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.inference import operations  # noqa: E402
from benchmarks.peer import peer  # noqa: E402


def test_work_of_one_prediction():
    way = peer("meta", torch.float32, torch.contiguous_format)
    assert operations(way, (480, 640)) == pytest.approx(5.231, abs=5e-4)  # TFLOP
