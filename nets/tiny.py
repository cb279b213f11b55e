"""A tiny autoencoder in place of Stable Diffusion's: a tenth of its work, nearly the same latents.

The architecture is that of TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd, MIT): 3x3
convolutions of one width, without normalisation or attention. Both halves speak of scaled latents,
as `encode` and `decode` of nets/vae.py do, and work on pictures in [0,1] inside. The layers have
the numbers of TAESD's files. distill.py trains either half for a model.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nets.ops import recompute
from nets.ops.enlarge import enlarge
from nets.vae import in_float32

LARGE, STRIP = 1 << 28, 1 << 26  # bytes: a larger map is computed in strips of about so many


def conv(in_channels, out_channels, **options):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


class Block(nn.Module):
    """Three convolutions inside a skip: B,C,H,W -> the same."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(inplace=True), conv(width, width),
                                  nn.ReLU(inplace=True), conv(width, width))

    def forward(self, x):
        return F.relu_(self.conv(x).add_(x))


class Enlarge(nn.Conv2d):
    """Nearest x2 and a 3x3 convolution: B,C,h,w -> B,C,2h,2w."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        return enlarge(x, self)


class Last(nn.Conv2d):
    """The last convolution of a decoder, in float32 at any precision of the other layers."""

    def __init__(self, width, out_channels):
        super().__init__(width, out_channels, 3, padding=1)

    def forward(self, x):
        return in_float32(self, x, padding=1)


class TinyEncoder(nn.Sequential):
    """image B,3,H,W in [-1,1] -> scaled latent B,4,H/8,W/8 (rounded down: what is over is cut)."""

    def __init__(self, *, width=64, blocks=3, image_channels=3, latent_channels=4):
        layers = [conv(image_channels, width), Block(width)]
        for _ in range(3):
            layers += [conv(width, width, stride=2, bias=False)]
            layers += [Block(width) for _ in range(blocks)]
        super().__init__(*layers, conv(width, latent_channels))
        self.checkpoint_activations = False

    def forward(self, image):
        height, width = (side // 8 * 8 for side in image.shape[2:])
        return run(self, (image[:, :, :height, :width] + 1) / 2)


class TinyDecoder(nn.Sequential):
    """scaled latent B,4,h,w -> image B,3,8h,8w, about [-1,1].

    half_size: a decoder of depth, B,1,8h,8w; its last convolution gives four pixels at half the
    size, so that it needs less than half of the work.
    """

    def __init__(self, *, width=64, blocks=3, image_channels=3, latent_channels=4,
                 half_size=False):
        layers = [conv(latent_channels, width), nn.ReLU()]
        for _ in range(2 if half_size else 3):
            layers += [Block(width) for _ in range(blocks)]
            layers += [nn.Identity(), Enlarge(width)]  # TAESD's files count nearest x2 as a layer
        if half_size:
            layers += [Block(width) for _ in range(blocks)]
            layers += [Last(width, 4), nn.PixelShuffle(2)]
        else:
            layers += [Block(width), Last(width, image_channels)]
        super().__init__(*layers)
        self.checkpoint_activations = False

    def forward(self, latent):
        return 2 * run(self, 3 * torch.tanh(latent / 3)) - 1


# ------------------------------------------------------------------------------ large pictures


def run(network, x):
    """A network's layers one after another; without gradients, large maps in strips of rows."""
    if torch.is_grad_enabled():
        for layer in network:
            x = recompute.run(layer, x, recompute=network.checkpoint_activations)
        return x
    for level in levels(network):
        x = in_strips(level, x)
    return x


def levels(layers):
    """The layers in groups; a group ends after a halving or before an enlarging of the size."""
    groups = [[]]
    for layer in layers:
        if isinstance(layer, Enlarge):
            groups.append([])
        groups[-1].append(layer)
        if getattr(layer, "stride", None) == (2, 2):
            groups.append([])
    return groups


def in_strips(level, x):
    """A group's output B,C,h,w, strip after strip if its widest map is large: the same numbers.

    A strip is computed with as many rows above and below as its convolutions see.
    """
    level = nn.Sequential(*level)
    # Rows of output for one of input; rows seen; numbers of the widest map for a row of input.
    scale, seen, width = 1, 0, x.shape[1] * x.shape[3]
    for layer in level:
        seen += (3 if isinstance(layer, Block) else isinstance(layer, nn.Conv2d)) / scale
        scale *= 2 if isinstance(layer, Enlarge | nn.PixelShuffle) else 1
        scale /= getattr(layer, "stride", (1,))[0]
        channels = getattr(layer, "out_channels", 0)
        width = max(width, channels * scale * max(scale, 1) * x.shape[3])
    row = len(x) * x.dtype.itemsize * width
    height = x.shape[2]
    if row * height <= LARGE:
        return level(x)
    around = -int(-seen // 2) * 2  # even, so that a halving meets the same rows
    count = max(int(STRIP / row) // 2 * 2, 2 * around)
    out = None
    for first in range(0, height, count):
        top, last = max(first - around, 0), min(first + count, height)
        part = level(x[:, :, top:last + around])
        if out is None:
            size = len(x), part.shape[1], int(height * scale), part.shape[3]
            out = part.new_empty(size).to(memory_format=torch.channels_last)
        skipped = int((first - top) * scale)
        rows = slice(int(first * scale), int(last * scale))
        out[:, :, rows] = part[:, :, skipped:skipped + rows.stop - rows.start]
    return out
