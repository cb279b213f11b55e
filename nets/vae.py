"""The autoencoder of Stable Diffusion 2: images to latents at an eighth of the size, and back.

A KL-regularised convolutional autoencoder (Rombach et al., arXiv 2112.10752, section 3.1). Depth
estimation uses the posterior's mean only, so `encode` never samples.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets.ops import recompute
from nets.ops.attention import attention
from nets.ops.enlarge import enlarge


class Resnet(nn.Module):
    """Two 3x3 convolutions with a skip: B,C_in,H,W -> B,C_out,H,W."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a skip: B,C,H,W -> B,C,H,W."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.attend(self.norm(x))

    def attend(self, n):
        """The residual that attention adds to a map, computed from the normalised map."""
        height = n.shape[2]
        n = rearrange(n, "b c h w -> b 1 (h w) c")  # one head
        n = attention(self.q(n), self.k(n), self.v(n))
        return rearrange(self.out(n), "b 1 (h w) c -> b c h w", h=height)


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnet1 = Resnet(channels, channels, groups)
        self.attention = Attention(channels, groups)
        self.resnet2 = Resnet(channels, channels, groups)

    def forward(self, x):
        return self.resnet2(self.attention(self.resnet1(x)))


class Down(nn.Module):
    """`layers` resnets, then (but for the last level) a halving of the size, rounded down."""

    def __init__(self, in_channels, out_channels, layers, groups, last):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        pairs = zip(widths[:-1], widths[1:])
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in pairs)
        self.downsample = None if last else nn.Conv2d(out_channels, out_channels, 3, stride=2)

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsample is not None:
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, unlike the U-Net
        return x


class Up(nn.Module):
    """`layers` resnets, then (but for the last level) nearest x2 and a 3x3 convolution."""

    def __init__(self, in_channels, out_channels, layers, groups, last):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        pairs = zip(widths[:-1], widths[1:])
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in pairs)
        self.upsample = None if last else nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x, checkpoint_activations=False):
        for resnet in self.resnets:
            x = recompute.run(resnet, x, recompute=checkpoint_activations)
        if self.upsample is not None:
            x = recompute.run(self.enlarge, x, recompute=checkpoint_activations)
        return x

    def enlarge(self, x):
        return enlarge(x, self.upsample)


class Encoder(nn.Module):
    """B,3,H,W -> B,2*latent,H/8,W/8 (mean and log variance; each halving rounds down)."""

    def __init__(self, channels, layers, image_channels, latent_channels, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        inputs = (channels[0],) + tuple(channels[:-1])
        self.down = nn.ModuleList(
            Down(a, b, layers, groups, last=level == len(channels) - 1)
            for level, (a, b) in enumerate(zip(inputs, channels))
        )
        self.mid = Middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down:
            x = block(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """B,latent,h,w -> B,3,8h,8w."""

    def __init__(self, channels, layers, image_channels, latent_channels, groups):
        super().__init__()
        channels = tuple(reversed(channels))
        self.checkpoint_activations = False
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid = Middle(channels[0], groups)
        inputs = (channels[0],) + channels[:-1]
        self.up = nn.ModuleList(
            Up(a, b, layers + 1, groups, last=level == len(channels) - 1)
            for level, (a, b) in enumerate(zip(inputs, channels))
        )
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    def forward(self, z):
        x = recompute.run(self.mid, self.conv_in(z), recompute=self.checkpoint_activations)
        for block in self.up:
            x = block(x, self.checkpoint_activations)
        return recompute.run(self.tail, x, recompute=self.checkpoint_activations)

    def tail(self, x):
        return in_float32(self.conv_out, F.silu(self.norm_out(x)), padding=1)


def in_float32(conv, x, padding):
    """A convolution in at least float32, at any precision of the other layers."""
    # Deviation: the released code uses the networks' precision; bfloat16 gives some 2,000 values.
    exact = torch.promote_types(x.dtype, torch.float32)
    device = x.device.type if not x.is_meta else "cpu"  # autocast knows no meta device
    with torch.autocast(device, enabled=False):
        return F.conv2d(x.to(exact), conv.weight.to(exact), conv.bias.to(exact), padding=padding)


class AutoencoderKL(nn.Module):
    """The whole autoencoder; the keywords' defaults are those of Stable Diffusion 2.

    channels: widths per level, finest first; every level but the last halves the size.
    layers: resnets per level of the encoder (the decoder has one more).
    scaling_factor: brings the latents to about unit variance; both methods apply it.
    """

    def __init__(self, *, channels=(128, 256, 512, 512), layers=2, image_channels=3,
                 latent_channels=4, groups=32, scaling_factor=0.18215):
        super().__init__()
        sizes = (layers, image_channels, latent_channels, groups)
        self.scaling_factor = scaling_factor
        self.encoder = Encoder(channels, *sizes)
        self.decoder = Decoder(channels, *sizes)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def moments(self, image):
        """image B,3,H,W in [-1,1] -> the unscaled posterior's mean and log variance, B,4,h,w."""
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, image):
        """image B,3,H,W in [-1,1] -> scaled posterior mean B,4,H/8,W/8 (rounded down)."""
        return self.moments(image)[0] * self.scaling_factor

    def decode(self, latent):
        """scaled latent B,4,h,w -> image B,3,8h,8w, about [-1,1], not clipped."""
        return self.decoder(self.post_quant_conv(latent / self.scaling_factor))
