"""Less memory in training: activations that are computed again in the backward pass."""

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def run(function, *inputs, recompute):
    """function(*inputs); with `recompute`, keeps the inputs only and recomputes for gradients."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def activation_bytes(forward, cells):
    """Bytes that autograd keeps for `cells` latent pixels, estimated from two small forward passes.

    forward(side): the output of the trained networks for one latent of side x side. The memory of
    activations grows with the number of pixels, that of weights and their copies does not.
    """
    small, large = 16, 32
    kept = [saved_bytes(lambda: forward(side)) for side in (small, large)]
    return round((kept[1] - kept[0]) / (large**2 - small**2) * cells)


def saved_bytes(function):
    """Bytes of all the memory that autograd keeps for the backward pass of function()."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()  # it keeps the saved tensors, so no address is used a second time
    total = sum(storages.values())
    del result
    return total
