"""The autoencoder without gradients: large maps in strips of rows, with the same numbers.

At the picture's own size a map of the autoencoder exceeds the cache, and at 12 megapixels two maps
exceed the memory. So each strip is normalised, activated and convolved while it is in the cache,
the sum with the skip overwrites the input, and a map of more than LARGE bytes is not kept: its rows
are computed at each use. Strips do not change the numbers: each strip is computed from as many rows
above and below as its convolutions need, and group normalisation uses the whole map's statistics.

The layers are those of nets/vae.py; training uses their own forward().
"""

import torch
import torch.nn.functional as F

from nets.ops.enlarge import enlarge_rows, phase_kernels
from nets.vae import in_float32

# Pixels in a strip. On a CPU: few, so that the strip stays in the cache, but enough to outweigh the
# cost of preparing each convolution's weights. On other devices: enough to keep the device busy.
STRIP, LARGE_STRIP = 1 << 13, 1 << 19
ROWS = 16  # at least: neighbouring strips both compute the rows around their border
LARGE = 3 << 29  # bytes; a larger map is not kept in memory beside another map


def encode(vae, image):
    """As AutoencoderKL.encode."""
    encoder = vae.encoder
    x = encoder.conv_in(image)
    for level in encoder.down:
        for block in level.resnets:
            x = resnet(block, Map(x))
        if level.downsample is not None:
            x = halved(level.downsample, Map(x))
    x = tail(encoder, Map(middle(encoder.mid, x)))
    return vae.quant_conv(x).chunk(2, dim=1)[0] * vae.scaling_factor


def decode(vae, latent):
    """As AutoencoderKL.decode."""
    decoder = vae.decoder
    x = Map(middle(decoder.mid, decoder.conv_in(vae.post_quant_conv(latent / vae.scaling_factor))))
    for level in decoder.up:
        for block in level.resnets:
            x = Map(resnet(block, x))
        if level.upsample is not None:
            x = kept_if_small(Enlarged(x, level.upsample))
    return tail(decoder, x, exact=True)


# ---------------------------------------------------------------------------- maps, row by row


class Map:
    """A map B,C,H,W in memory."""

    def __init__(self, x):
        self.x, self.shape = x, tuple(x.shape)
        self.dtype, self.device = x.dtype, x.device

    def rows(self, first, last):
        """Rows first to last, without those outside the map; callers must not write to them."""
        return self.x[:, :, max(first, 0):last]

    def padded(self, first, last):
        """Rows first to last, with zeros for rows outside the map."""
        return pad_rows(self.rows(first, last), first, last, self.shape[2])

    def strips(self):
        """Yields (first, last) of each strip; all but the last have an even number of rows."""
        height, width = self.shape[2:]
        pixels = STRIP if self.device.type == "cpu" else LARGE_STRIP
        count = max(pixels // width // 2 * 2, ROWS)
        for first in range(0, height, count):
            yield first, min(first + count, height)


class Computed(Map):
    """A map that is not stored: the function `rows` computes its rows at each use."""

    def __init__(self, rows, shape, like):
        self.compute, self.shape = rows, tuple(shape)
        self.dtype, self.device = like.dtype, like.device

    def rows(self, first, last):
        return self.compute(max(first, 0), min(last, self.shape[2]))


class Enlarged(Computed):
    """A map after nearest x2 and a 3x3 convolution."""

    def __init__(self, small, conv):
        kernels = phase_kernels(conv.weight)

        def rows(first, last):
            seen = small.padded(first // 2 - 1, (last + 1) // 2 + 1)
            return enlarge_rows(seen, kernels, conv.bias)[:, :, first % 2:first % 2 + last - first]

        batch, _, height, width = small.shape
        super().__init__(rows, (batch, conv.out_channels, 2 * height, 2 * width), small)


def pad_rows(x, first, last, height):
    """Adds zero rows to `x`, the rows first to last of a map, for rows outside the map."""
    missing = max(-first, 0), max(last - height, 0)
    return F.pad(x, (0, 0, *missing)) if any(missing) else x


def kept_if_small(x):
    batch, channels, height, width = x.shape
    small = batch * channels * height * width * x.dtype.itemsize <= LARGE
    return Map(kept(x)) if small else x


def kept(x, out=None):
    """All rows of a map as a tensor B,C,H,W, in `out` if given; `out` may be the map's input."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device,
                          memory_format=torch.channels_last)
    ready = None  # a strip is written only after the next strip has read its input
    for first, last in x.strips():
        following = first, last, x.rows(first, last)
        if ready:
            out[:, :, ready[0]:ready[1]] = ready[2]
        ready = following
    out[:, :, ready[0]:ready[1]] = ready[2]
    return out


# ---------------------------------------------------------------------------- layers


def resnet(block, x):
    """As Resnet.forward; the output overwrites a stored input of the same shape."""
    batch, _, height, width = x.shape
    first_act = NormAct(block.norm1, x)
    h = kept_if_small(Convolved(x, first_act, block.conv1))
    h = Convolved(h, NormAct(block.norm2, h), block.conv2)

    def rows(first, last):
        return h.rows(first, last).add_(block.shortcut(x.rows(first, last)))

    in_place = type(x) is Map and x.shape == h.shape
    return kept(Computed(rows, h.shape, h), out=x.x if in_place else None)


class Convolved(Computed):
    """A map after an activation (a function of rows) and a 3x3 convolution (exact: in float32)."""

    def __init__(self, x, act, conv, exact=False):
        def rows(first, last):
            seen = pad_rows(act(x.rows(first - 1, last + 1)), first - 1, last + 1, x.shape[2])
            if exact:
                return in_float32(conv, seen, padding=(0, 1))
            return F.conv2d(seen, conv.weight, conv.bias, padding=(0, 1))

        batch, _, height, width = x.shape
        super().__init__(rows, (batch, conv.out_channels, height, width), x)
        self.dtype = torch.promote_types(x.dtype, torch.float32) if exact else x.dtype


class NormAct:
    """Group normalisation with the statistics of a whole map, and SiLU: a function of its rows."""

    def __init__(self, norm, x, silu=True):
        self.silu, self.eps = silu, norm.eps
        exact = torch.promote_types(x.dtype, torch.float32)
        each = x.shape[1] // norm.num_groups
        self.mean, self.var = (t.repeat_interleave(each, 1).to(exact) for t in statistics(x, norm))
        self.weight, self.bias = norm.weight.to(exact), norm.bias.to(exact)

    def __call__(self, rows):
        # With known statistics this is batch normalisation, in one pass.
        x = [F.batch_norm(sample, mean, var, self.weight, self.bias, eps=self.eps)
             for sample, mean, var in zip(rows.split(1), self.mean, self.var)]
        x = torch.cat(x) if len(x) > 1 else x[0]
        return F.silu(x, inplace=True) if self.silu else x


def statistics(x, norm):
    """Mean and variance of each group of a map: B,G, combined in float64 from the strips' own.

    More exact than PyTorch on a large map: PyTorch's CPU sums are in float32 (relative error 8e-5
    at 128,640,768 in channels_last; here 1e-5 at most, also for values far from zero).
    """
    batch, channels, height, _ = x.shape
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS lacks float64
    # Summed in place: small tensors between large ones would fragment the memory.
    mean, square = torch.zeros(2, batch, channels, dtype=exact, device=x.device)
    for first, last in x.strips():
        share = (last - first) / height
        for index, sample in enumerate(x.rows(first, last).split(1)):
            means, variances = (t.to(exact) for t in channel_statistics(sample))
            mean[index] += share * means
            square[index] += share * (variances + means**2)
    mean, square = (each.unflatten(1, (norm.num_groups, -1)).mean(2) for each in (mean, square))
    return mean, (square - mean**2).clamp(min=0)


def channel_statistics(x):
    """Mean and variance of each channel of 1,C,h,w, in float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        return torch.var_mean(x.to(exact), (0, 2, 3), correction=0)[::-1]
    # On a CPU, batch normalisation's statistics are faster; the running averages are not used.
    running = torch.zeros(2, x.shape[1], dtype=exact)
    return torch.batch_norm_update_stats(x, *running, 0.0)


def halved(conv, x):
    """As the end of Down.forward: padded right and below, a convolution of stride 2."""
    batch, channels, height, width = x.shape

    def rows(first, last):
        seen = F.pad(x.padded(2 * first, 2 * last + 1), (0, 1))
        return F.conv2d(seen, conv.weight, conv.bias, stride=2)

    return kept(Computed(rows, (batch, channels, height // 2, width // 2), x))


def middle(mid, x):
    """As Middle.forward."""
    x = Map(resnet(mid.resnet1, Map(x)))
    normalised = NormAct(mid.attention.norm, x, silu=False)(x.x)
    x.x += mid.attention.attend(normalised)
    return resnet(mid.resnet2, x)


def tail(network, x, exact=False):
    """As the end of Encoder.forward or, with `exact` (convolution in float32), Decoder.forward."""
    return kept(Convolved(x, NormAct(network.norm_out, x), network.conv_out, exact))
