"""What happens to a decoded sample: checks, the training target, crops and resizing.

A sample is `dict(image, depth, valid, name)`: image uint8 3,H,W; planar depth float32 1,H,W in
metres; valid bool 1,H,W; name the image's path in its data set, without suffix.
"""

import numpy as np
import torch
import torch.nn.functional as F

TARGETS = ("sqrt_disparity", "disparity", "depth")
# The target's value at the far end; pixels without depth get this value, too.
FAR_CODE = {"sqrt_disparity": -1.0, "disparity": -1.0, "depth": 1.0}
QUANTILES = (0.02, 0.98)  # of the depth, in the target's space, that become -1 and 1
KITTI_CROP = 352, 1216  # height and width of the bottom crop in KITTI's depth benchmark


class BadSample(ValueError):
    """A sample that can't be used; the message names the file and the reason."""


class FilteredSample(BadSample):
    """A readable sample that the data set's training filter leaves out: expected, not a fault."""


def check_same_size(path, array, other):
    """Raises BadSample unless two pictures, H,W or H,W,C, agree in height and width."""
    if array.shape[:2] != other.shape[:2]:
        raise BadSample(f"{path} is {array.shape[0]}x{array.shape[1]}, but its counterpart is "
                        f"{other.shape[0]}x{other.shape[1]}.")


def pack_sample(image, depth_m, valid, name, depth_path):
    """Numpy image uint8 H,W,3, depth_m H,W (metres) and valid bool H,W -> a sample of tensors.

    Depth outside the mask keeps its value, except that NaN and inf become 0. Raises a BadSample
    that names the file at depth_path if the sizes differ or no pixel is valid.
    """
    check_same_size(depth_path, depth_m, image)
    if not valid.any():
        raise BadSample(f"{depth_path} has no valid pixel.")
    depth_m = np.nan_to_num(depth_m.astype(np.float32, copy=False), nan=0.0, posinf=0.0, neginf=0.0)
    return dict(image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
                depth=torch.from_numpy(depth_m)[None],
                valid=torch.from_numpy(np.ascontiguousarray(valid))[None],
                name=name)


def to_target_space(depth_m, target):
    """Depth in metres, any shape -> the space the target is linear in (Sec. III-A: sqrt(1/d))."""
    if target == "sqrt_disparity":
        return depth_m.reciprocal().sqrt()
    if target == "disparity":
        return depth_m.reciprocal()
    if target == "depth":
        return depth_m
    raise ValueError(f"the target {target!r} is unknown; choose one of {', '.join(TARGETS)}.")


def normalise_target(depth_m, valid, target="sqrt_disparity", name="the depth map"):
    """depth_m 1,H,W in metres and valid bool 1,H,W -> y float32 1,H,W in [-1, 1] (Sec. III-A).

    y = 2 (t - q2) / (q98 - q2) - 1, clipped, with t the target space and q its quantiles over the
    valid pixels, so near = +1 and far = -1 (`target="depth"`: near = -1, far = +1). Invalid
    pixels get the far code. Call it at full resolution, before any resize.
    Raises a BadSample that mentions `name` if no pixel is valid or the two quantiles are equal.
    """
    t = to_target_space(depth_m[valid], target)
    if t.numel() == 0:
        raise BadSample(f"{name} has no valid pixel.")
    # Not torch.quantile: it sorts, and refuses more than 16 million values. numpy only selects.
    low, high = np.quantile(t.numpy(), QUANTILES).tolist()
    if not high > low:
        raise BadSample(f"{name} has equal 2 % and 98 % quantiles of {target}: it is flat, or was "
                        "measured at too few depths.")
    y = torch.full_like(depth_m, FAR_CODE[target], dtype=torch.float32)
    y[valid] = (2 * (t - low) / (high - low) - 1).clamp(-1, 1)
    return y


def kitti_crop(shape, size, path):
    """(rows, columns) as slices: `size` at the bottom, centred, as in KITTI's depth benchmark.

    shape: height and width of the picture at `path`; a BadSample names it if it is too small.
    """
    (height, width), (crop_height, crop_width) = shape, size
    if height < crop_height or width < crop_width:
        raise BadSample(f"{path} is {height}x{width}, smaller than the crop "
                        f"{crop_height}x{crop_width}.")
    top, left = height - crop_height, int((width - crop_width) / 2)
    return slice(top, top + crop_height), slice(left, left + crop_width)


def resize_nearest(x, size):
    """x C,H,W of any dtype -> C,h,w by nearest-exact: every output value is an input value."""
    if x.shape[-2:] == tuple(size):
        return x
    as_number = x.to(torch.uint8) if x.dtype == torch.bool else x
    return F.interpolate(as_number[None], size, mode="nearest-exact")[0].to(x.dtype)


def resize_antialias(image, size):
    """image uint8 3,H,W -> uint8 3,h,w, bilinear with antialias, rounded."""
    if image.shape[-2:] == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
