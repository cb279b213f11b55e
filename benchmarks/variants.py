"""The open questions about the method: each variant replaces one function of the project.

    python -m benchmarks.variants NAME train_stage1.py --data ...   # any script, with its options

The scripts need not know of them. A model that was trained as a variant is scored as the same one:
its file does not say that it is one. Readers must be forked or --workers 0, so that they, too, have
the function.
"""

import runpy
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from data import cache, training_set, transforms
from engine import run_folder
from losses import gradient
from nets import vae
from nets.fourier import FourierEnhancement


def power(exponent):
    """The target depth ** -exponent, under the name sqrt_disparity, in training and alignment."""
    space_of = partial(in_power, exponent, transforms.to_target_space)
    for module in (transforms, metrics):
        module.to_target_space = space_of
    metrics.align = partial(align_power, exponent, metrics.align)


def in_power(exponent, ordinary, depth_m, target):
    """Depth in metres -> depth ** -exponent (0: -log), if the target is sqrt_disparity."""
    if target != "sqrt_disparity":
        return ordinary(depth_m, target)
    return depth_m.pow(-exponent) if exponent else -depth_m.log()


def align_power(exponent, ordinary, pred, depth_m, valid, space, negative="clamp", fit=None):
    """metrics.align, but sqrt_disparity means depth ** -exponent (0: -log)."""
    if space != "sqrt_disparity":
        return ordinary(pred, depth_m, valid, space, negative, fit)
    scale, shift = fit or metrics.fit_scale_shift(pred, depth_m, valid, space) or metrics.flat(
        depth_m, valid, space)
    aligned = scale * pred.double() + shift
    if not exponent:
        return aligned.neg().exp()
    return aligned.clamp(min=metrics.MIN_DISPARITY**exponent).pow(-1 / exponent)


def plain_convolutions():
    """The Fourier block's convolutions without its transform: as many parameters."""
    def frequency_pass(self, n):
        f = F.silu(self.conv_f1(n))
        return self.conv_f3(F.silu(self.conv_f2(F.silu(self.conv_f4(f)))) + f)
    FourierEnhancement.frequency_pass = frequency_pass


def zero_filled():
    """The gradient loss as released: invalid pixels are 0 in both maps, and all differences count.
    """
    def gradient_loss(pred, target, valid, delta=0.2):
        error = torch.where(valid, pred - target, 0)
        differences = gradient.directional_gradients(error)
        return gradient.reversed_huber(differences, delta).flatten(1).mean(dim=1)
    gradient.gradient_loss = gradient_loss


def filled_with_neighbours():
    """Invalid pixels of the target get the nearest valid value of their row, not the far code."""
    ordinary = transforms.normalise_target

    def normalise_target(depth_m, valid, target="sqrt_disparity", name="the depth map"):
        y = ordinary(depth_m, valid, target, name)
        for row, known in zip(y[0].numpy(), valid[0].numpy()):
            places = known.nonzero()[0]
            if len(places):
                right = np.searchsorted(places, np.arange(len(row))).clip(0, len(places) - 1)
                left = (right - 1).clip(0)
                here = np.arange(len(row))
                nearer = abs(places[left] - here) < abs(places[right] - here)
                row[:] = row[np.where(nearer, places[left], places[right])]
        return y
    training_set.normalise_target = normalise_target


def last_convolution_in_bfloat16():
    """The decoder's last convolution in the precision of all others."""
    vae.in_float32 = lambda conv, x, padding: F.conv2d(x, conv.weight, conv.bias, padding=padding)


def remember(name):
    """Makes the variant a part of a cache's name, and of the options that a resumed run must have.
    """
    fingerprint, decisive = cache.fingerprint, run_folder.decisive
    cache.fingerprint = lambda settings, files: fingerprint(settings | {"variant": name}, files)
    run_folder.decisive = lambda options: decisive(options) | {"variant": name}


VARIANTS = {
    "power_1_3": partial(power, 1 / 3), "power_2_3": partial(power, 2 / 3),
    "log": partial(power, 0), "plain_convolutions": plain_convolutions,
    "zero_filled": zero_filled, "filled_with_neighbours": filled_with_neighbours,
    "last_convolution_in_bfloat16": last_convolution_in_bfloat16}


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in VARIANTS:
        sys.exit(f"error: give the name of a variant ({', '.join(VARIANTS)}) and a script.")
    VARIANTS[sys.argv[1]]()
    remember(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
