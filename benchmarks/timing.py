"""Seconds of a call, its operations, and what rate the device reaches at best."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


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


def counter():
    """A FlopCounterMode that counts the CPU's attention, too, which PyTorch's own leaves out."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_work(query, key, value, *others, **options):
        return sdpa_flop_count(query, key, value)

    def backward_work(gradient, query, key, value, *others, **options):
        return sdpa_backward_flop_count(gradient, query, key, value)

    return FlopCounterMode(display=False,
                           custom_mapping={forward: forward_work, backward: backward_work})


def matrix_rate(device, dtype):
    """What a large matrix product reaches, in TFLOP/s."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5)) / 1e12


def utilisation(rate, reached):
    """A rate of work and its share of what a matrix product reached, both in TFLOP/s."""
    return f"{rate:.3g} ({100 * rate / reached:.0f} %)"
