"""What benchmarks/ makes of what it measures."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import inference


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
    with torch.profiler.profile() as recorded:
        torch.nn.Conv2d(8, 8, 3)(torch.rand(1, 8, 32, 32)) @ torch.rand(30, 30)
    rows = recorded.key_averages()
    took = inference.seconds_by_kind(rows, on_gpu=False)
    assert took["convolution"] > 0 and took["matrix product"] > 0
    assert took.total() == pytest.approx(sum(r.self_cpu_time_total for r in rows) / 1e6)
