"""Chooses the precision for `auto`: the one in which a device computes faster."""

import time
from functools import lru_cache

import torch
import torch.nn.functional as F

WORTH_IT = 0.85  # bfloat16's time over float32's: below this the difference is no noise


def choose(precision, device="cpu", training=False):
    """(`float32`, `bfloat16` or `float16`, reason as a sentence) for a precision or `auto`.

    auto: bfloat16 on GPUs that compute in it and on CPUs where it is measured to be faster; float16
    for predictions on older GPUs; else float32. The reason is empty if the caller named one.
    """
    # Deviation: the paper names no precision.
    if precision != "auto":
        return precision, ""
    device = torch.device(device)
    if device.type == "cuda":
        # Only native bfloat16 counts: emulation is slow.
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        slow = "float32" if training else "float16"
        precision, why = ("bfloat16", "computes") if fast else (slow, "does not compute")
        return precision, f"Precision: {precision}, as this GPU {why} in bfloat16."
    if device.type != "cpu":
        return "float32", f"Precision: float32, as is usual on {device.type}."
    share = bfloat16_share()
    precision = "bfloat16" if share < WORTH_IT else "float32"
    return precision, (f"Precision: {precision}, as bfloat16 takes {share:.0%} of float32's time "
                       "on this processor (measured).")


@lru_cache(maxsize=1)
def bfloat16_share():
    """The time of a convolution in bfloat16 over that in float32, on this processor.

    Measured in under 0.1 s, because the processor's feature flags do not tell: with AVX512-BF16
    alone, some processors are faster in bfloat16 and some slower. One thread, its own CPU time, the
    two types in turn, the best of six: so other programs on the machine do not matter.
    """
    threads = torch.get_num_threads()
    kinds = (torch.float32, torch.bfloat16)
    x, weight = torch.ones(1, 64, 32, 40), torch.ones(64, 64, 3, 3)
    inputs = {kind: [tensor.to(kind, memory_format=torch.channels_last) for tensor in (x, weight)]
              for kind in kinds}
    best = dict.fromkeys(kinds, float("inf"))
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(6):
                for kind in kinds:
                    start = time.thread_time()
                    F.conv2d(*inputs[kind], padding=1)
                    best[kind] = min(best[kind], time.thread_time() - start)
                if best[torch.bfloat16] > 10 * best[torch.float32]:
                    break  # emulated, and slow enough to be noticed
    finally:
        torch.set_num_threads(threads)
    if min(best.values()) == 0:  # the clock is too coarse
        return 1.0
    return best[torch.bfloat16] / best[torch.float32]
