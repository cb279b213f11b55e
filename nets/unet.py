"""The U-Net of Stable Diffusion 2, with time step and text inside.

Depth estimation calls it once: the image's latent goes in, the depth's latent comes out
(DepthMaster, arXiv 2501.02576, Eq. 1-2). The text is the constant embedding of the empty prompt,
two tokens, which is a buffer of the network; the time step is a constant too, 1 unless said
otherwise.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets.fourier import FourierEnhancement
from nets.ops import recompute
from nets.ops.attention import attention, check_heads
from nets.ops.enlarge import enlarge


def timestep_embedding(timestep, width):
    """Sinusoids of the time step: B -> B,width, [cos, sin], float32 (DDPM, arXiv 2006.11239)."""
    half = width // 2
    exponent = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def silu(x):
    """SiLU; in place when no gradient will need the input."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class TimeEmbedding(nn.Module):
    def __init__(self, in_width, width):
        super().__init__()
        self.linear1 = nn.Linear(in_width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear2(F.silu(self.linear1(x)))


class Resnet(nn.Module):
    """Two 3x3 convolutions with a skip and the time step in between: B,C_in,H,W -> B,C_out,H,W."""

    def __init__(self, in_channels, out_channels, time_width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        h = self.conv1(silu(self.norm1(x)))
        if self.time is not None:  # else it is part of conv1's bias (nets/inference/folds.py)
            h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention of tokens B,N,C to a context B,M,D (self-attention: D = C)."""

    def __init__(self, channels, context_width, heads):
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(context_width, channels, bias=False)
        self.v = nn.Linear(context_width, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x, context):
        tensors = self.q(x), self.k(context), self.v(context)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in tensors)
        x = attention(q, k, v)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Gated GELU, four times as wide inside (GEGLU, arXiv 2002.05202)."""

    def __init__(self, channels):
        super().__init__()
        self.linear_in = nn.Linear(channels, 8 * channels)
        self.linear_out = nn.Linear(4 * channels, channels)

    def forward(self, x):
        value, gate = self.linear_in(x).chunk(2, dim=-1)  # value half first
        return self.linear_out(value * F.gelu(gate))


class Transformer(nn.Module):
    """Self-attention, attention to the text, feed-forward, inside a skip: B,C,H,W -> B,C,H,W."""

    def __init__(self, channels, text_width, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, text_width, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, text):
        height = x.shape[2]
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        n = self.norm1(h)
        h = h + self.self_attention(n, n)
        h = h + self.cross_attention(self.norm2(h), text)
        h = h + self.feed_forward(self.norm3(h))
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height)


class Block(nn.Module):
    """One level: resnets, each followed by a transformer where the level has attention.

    widths: input channels of each resnet. `resize` leads to the next level; the U-Net calls it,
    because the U-Net knows the sizes.
    """

    def __init__(self, widths, channels, time_width, text_width, heads, groups, attention, stride):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(w, channels, time_width, groups) for w in widths)
        transformers = (Transformer(channels, text_width, heads, groups) for _ in widths)
        self.attentions = nn.ModuleList(transformers if attention else ())
        conv = stride and nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.resize = conv or None

    def layer(self, index, x, time, text):
        x = self.resnets[index](x, time)
        return self.attentions[index](x, text) if self.attentions else x


class Middle(nn.Module):
    def __init__(self, channels, time_width, text_width, heads, groups):
        super().__init__()
        self.resnet1 = Resnet(channels, channels, time_width, groups)
        self.attention = Transformer(channels, text_width, heads, groups)
        self.resnet2 = Resnet(channels, channels, time_width, groups)

    def forward(self, x, time, text):
        return self.resnet2(self.attention(self.resnet1(x, time), text), time)


class Skip(nn.Module):
    """What is left of a resnet or transformer that was dropped: its skip connection."""

    def __init__(self, block):
        super().__init__()
        self.shortcut = getattr(block, "shortcut", nn.Identity())

    def forward(self, x, context):
        return self.shortcut(x)


class UNet(nn.Module):
    """The whole U-Net; the keywords' defaults are those of Stable Diffusion 2.

    channels: widths per level, finest first; every level but the last halves the size.
    attention: which levels have transformers (the middle always has one); heads: per level.
    layers: resnets per level on the way down (one more on the way up).
    fourier: whether the Fourier Enhancement block of stage 2 follows the middle block.
    drop: names of resnets and transformers to leave out, or of what holds them: `up.0`, `mid`.
    """

    def __init__(self, *, in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280), layers=2,
                 attention=(True, True, True, False), heads=(5, 10, 20, 20), text_width=1024,
                 text_tokens=2, groups=32, fourier=False, drop=()):
        super().__init__()
        self.channels = tuple(channels)
        self.checkpoint_activations = False
        time_width = 4 * channels[0]
        self.register_buffer("text_embedding", torch.zeros(text_tokens, text_width))
        self.time_embedding = TimeEmbedding(channels[0], time_width)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        common = (time_width, text_width)
        last = len(channels) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]  # channels of the skip connections from the way down to the way up
        for level, width in enumerate(channels):
            widths = [skips[-1]] + [width] * (layers - 1)
            self.down.append(Block(widths, width, *common, heads[level], groups, attention[level],
                                   stride=2 if level < last else None))
            skips += [width] * (layers + (level < last))
        self.mid = Middle(channels[-1], *common, heads[-1], groups)
        self.fourier = FourierEnhancement(channels[-1]) if fourier else None
        below = channels[-1]
        for level in reversed(range(len(channels))):
            widths = [below + skips.pop()]
            widths += [channels[level] + skips.pop() for _ in range(layers)]
            self.up.append(Block(widths, channels[level], *common, heads[level], groups,
                                 attention[level], stride=1 if level > 0 else None))
            below = channels[level]
        self.norm_out = nn.GroupNorm(groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.drop(drop)

    def blocks(self):
        """Names of all resnets and transformers."""
        return [name for name, module in self.named_modules()
                if isinstance(module, Resnet | Transformer)]

    def drop(self, names):
        """Leaves only the skip of blocks, given by their names or of what holds them."""
        blocks = self.blocks()
        for name in names:
            found = [block for block in blocks if f"{block}.".startswith(f"{name}.")]
            if not found:
                raise ValueError(f"there is no block {name!r} in the U-Net, which has "
                                 f"{', '.join(blocks)}.")
            for block in found:
                self.set_submodule(block, Skip(self.get_submodule(block)))

    def feature_channels(self, feature):
        """Channels of the feature `down1`, `down2`, ... or `mid`."""
        return self.channels[-1 if feature == "mid" else int(feature.removeprefix("down")) - 1]

    def feature_size(self, size, feature):
        """Height and width of a feature, from those of the latent: each halving rounds up."""
        levels = len(self.channels)
        halvings = levels - 1 if feature == "mid" else int(feature.removeprefix("down"))
        for _ in range(min(halvings, levels - 1)):
            size = tuple((side + 1) // 2 for side in size)
        return tuple(size)

    def forward(self, latent, feature="mid", timestep=1):
        """One pass: latent B,4,h,w -> (latent B,4,h,w, feature B,C,h',w').

        feature: `mid`, the whole middle block's output, or `downN`, the output of the N-th level on
        the way down with its stride. timestep: a number, or one per sample (B).
        """
        batch = latent.shape[0]
        time = self.time(timestep, latent)
        text = self.text_embedding.expand(batch, -1, -1).to(latent.dtype)  # B,2,1024

        features = {}
        x = self.conv_in(latent)
        skips = [x]
        for level, block in enumerate(self.down, start=1):
            for index in range(len(block.resnets)):
                x = self._run(block.layer, index, x, time, text)
                skips.append(x)
            if block.resize is not None:
                x = block.resize(x)
                skips.append(x)
            features[f"down{level}"] = x
        x = features["mid"] = self._run(self.mid, x, time, text)
        if self.fourier is not None:
            x = self._run(self.fourier, x)
        for block in self.up:
            for index in range(len(block.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(block.layer, index, x, time, text)
            if block.resize is not None:
                # Enlarge to the size of the next skip: for odd sizes x2 would be wrong.
                x = enlarge(x, block.resize, size=skips[-1].shape[2:])
        return self.conv_out(silu(self.norm_out(x))), features[feature]

    def time(self, timestep, latent):
        """The time step's embedding, B,4*C0; None where it is folded into biases."""
        if self.time_embedding is None:
            if torch.is_tensor(timestep) or timestep != 1:
                raise ValueError("this U-Net is folded for time step 1 and can't take another.")
            return None
        if not torch.is_tensor(timestep):
            timestep = torch.full((len(latent),), timestep, device=latent.device)
        time = timestep_embedding(timestep, self.channels[0]).to(latent.dtype)
        return self.time_embedding(time)

    def _run(self, function, *inputs):
        return recompute.run(function, *inputs, recompute=self.checkpoint_activations)
