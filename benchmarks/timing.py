"""Seconds of a call, and what rate the device reaches at best."""

import time

import torch


def seconds(function, device):
    """Of one call; on a GPU between two events on its own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    stream = torch.cuda.current_stream(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record(stream)
    function()
    after.record(stream)
    after.synchronize()
    return before.elapsed_time(after) / 1000  # from milliseconds


def matrix_rate(device, dtype):
    """What a large matrix product reaches, in TFLOP/s."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5)) / 1e12


def utilisation(rate, reached):
    """A rate of work and its share of what a matrix product reached, both in TFLOP/s."""
    return f"{rate:.3g} ({100 * rate / reached:.0f} %)"
