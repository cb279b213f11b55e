"""What a model file says of itself, so that a later run can check it: predict.py --selftest.

A digest of each tensor tells a damaged file; the result for a picture made by arithmetic tells a
library or a precision that computes something else.
"""

import zlib

import torch

SIDE, CELLS = 128, 8  # pixels of the picture; the result is kept as means over 8 x 8 cells
DIGITS = 4  # of a kept mean: less than what rounding changes from one machine to another


def describe(model, tensors):
    """The entry of a model's header: {name: digest} of its tensors, and its result."""
    return {"digests": {name: digest(tensor) for name, tensor in tensors.items()},
            "result": result(model)}


def digest(tensor):
    """A tensor's dtype and eight digits from its bytes, such as `float32 0a1b2c3d`."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{str(tensor.dtype).removeprefix('torch.')} {zlib.crc32(values):08x}"


@torch.no_grad()
def result(model):
    """The means of a DepthMaster's map of `picture`, in [-1,1], row after row; None if not finite.

    Computed in the precision that the model has.
    """
    with torch.compiler.set_stance("force_eager"):
        depth = model(picture().to(model.device))
    means = torch.nn.functional.adaptive_avg_pool2d(depth.double().cpu(), CELLS).flatten()
    return [round(mean, DIGITS) for mean in means.tolist()] if means.isfinite().all() else None


def picture():
    """Waves and a checkerboard, 1,3,SIDE,SIDE in [-1,1]; multiples of 1/8, exact in any float."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    parts = rows // 4 % 17 - 8, columns // 4 % 17 - 8, 16 * ((rows // 16 + columns // 16) % 2) - 8
    return torch.stack(parts)[None].float() / 8
