"""Attention, faster on processors that multiply matrices in bfloat16 without tiles.

On these processors (AVX512-BF16, no AMX) PyTorch's attention reaches a fifth of the rate of a
matrix product. Here each head multiplies strips of queries with all keys, in 0.6 of PyTorch's time.
Products are rounded to bfloat16, which would spoil large scores: a score near 100 by 0.25, its
weight by a quarter. So the scores are computed twice: first to find each query's largest score,
then as differences from it. Scores with large weights are then near zero, and so is their error.
"""

from functools import cache

import torch
import torch.nn.functional as F

QUERIES = 1 << 10  # at once, at most
SCORES = 1 << 25  # at once, at most: 64 MiB, and as much for the softmax's output


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v: B,H,N,d with keys and values B,H,M,d -> B,H,N,d."""
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if eager and q.device.type == "cpu" and q.dtype == torch.bfloat16 and without_tiles():
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def check_heads(width, heads):
    """ValueError if a width can't be shared by so many heads."""
    if width % heads:
        raise ValueError(f"a width of {width} can't be shared by {heads} heads")


@cache
def without_tiles():
    """Whether this processor multiplies in bfloat16 (AVX512-BF16), but without tiles (AMX)."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


@torch.autocast("cpu", enabled=False)
def by_products(q, k, v):
    """`attention` without gradients, by products of matrices."""
    out, scale = q.new_empty(q.shape), q.shape[3]**-0.5
    count = max(min(SCORES // k.shape[2], QUERIES, q.shape[2]), 1)
    buffers = q.new_empty(2, count, k.shape[2])  # once: the system clears large new memory
    for queries, keys, values, result in zip(*(each.flatten(0, 1) for each in (q, k, v, out))):
        keys = keys.T
        for first in range(0, len(queries), count):
            some = queries[first:first + count]
            scores, weights = buffers[:, :len(some)]
            torch.mm(some, keys, out=scores)
            largest = scores.amax(1, keepdim=True)
            # scale * (scores - largest), in float32 and rounded once.
            torch.addmm(largest, some, keys, beta=-scale, alpha=scale, out=scores)
            torch.softmax(scores, 1, out=weights)
            torch.mm(weights, values, out=result[first:first + count])
    return out
