"""Less memory in training: activations that are computed again in the backward pass."""

import torch
from torch.utils.checkpoint import checkpoint


def run(function, *inputs, recompute):
    """function(*inputs); with `recompute`, keeps the inputs only and recomputes for gradients."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
