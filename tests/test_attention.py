"""nets/ops/attention.py: attention by products against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from nets.ops import attention as module
from nets.ops.attention import attention, by_products

# What else multiplies bfloat16 may round in between.
in_hardware = pytest.mark.skipif(
    not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
    reason="this processor does not multiply bfloat16")


def error(found, q, k, v):
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return ((found.double() - exact).norm() / exact.norm()).item()


def tokens(heads, count, width, scale=1.0):
    """As the networks have them: B,H,N,d, whose heads lie beside each other in memory."""
    return scale * torch.randn(2, count, heads, width).transpose(1, 2)


@pytest.mark.parametrize("queries, scores", [(1000, 1 << 20), (7, 1 << 20), (1000, 100), (9, 1)])
@torch.inference_mode()
def test_by_products_is_attention_however_it_is_cut(monkeypatch, queries, scores):
    monkeypatch.setattr(module, "QUERIES", queries)
    monkeypatch.setattr(module, "SCORES", scores)
    torch.manual_seed(0)
    q, k, v = tokens(3, 50, 16), tokens(3, 31, 16), tokens(3, 31, 16)
    found = by_products(q, k, v)
    assert found.shape == q.shape and error(found, q, k, v) < 1e-6


@in_hardware
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("scale", [1, 3, 6])  # the largest scores are near 5, 50 and 200
@torch.inference_mode()
def test_large_scores_keep_their_precision(width, scale):
    torch.manual_seed(0)
    q, k = (tokens(2, 600, width, scale).bfloat16() for _ in range(2))
    v = tokens(2, 600, width).bfloat16()
    found = error(by_products(q, k, v), q, k, v)
    assert found < 2 * error(F.scaled_dot_product_attention(q, k, v), q, k, v)
    if scale > 1:  # scores as bfloat16 holds them are not enough
        rounded = (q @ k.mT * width**-0.5).softmax(-1) @ v
        assert error(rounded, q, k, v) > 4 * found


@in_hardware
@torch.inference_mode()
def test_scores_that_are_alike_keep_their_precision():
    """Of a common part, which softmax ignores, and of nothing else: weights are all alike."""
    torch.manual_seed(0)
    q, k = (tokens(2, 300, 64).add(4).bfloat16() for _ in range(2))
    v = tokens(2, 300, 64).bfloat16()
    assert error(by_products(q, k, v), q, k, v) < 1e-2
    assert error(by_products(q, k[:, :, :1].expand_as(k), v), q, k[:, :, :1].expand_as(k), v) < 1e-2


@in_hardware
@torch.no_grad()
def test_autocast_makes_no_difference():
    torch.manual_seed(0)
    q, k, v = (tokens(2, 40, 16).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = by_products(q, k, v)
    assert found.dtype == torch.bfloat16 and torch.equal(found, by_products(q, k, v))


@pytest.mark.parametrize("dtype, gradients, without_tiles, expected", [
    (torch.bfloat16, False, True, True), (torch.float32, False, True, False),
    (torch.bfloat16, True, True, False), (torch.bfloat16, False, False, False)])
def test_which_way_is_taken(monkeypatch, dtype, gradients, without_tiles, expected):
    monkeypatch.setattr(module, "without_tiles", lambda: without_tiles)
    monkeypatch.setattr(module, "by_products", lambda q, k, v: "by products")
    q = tokens(1, 4, 8).to(dtype)
    with torch.set_grad_enabled(gradients):
        found = attention(q, q, q)
    assert isinstance(found, str) is expected
