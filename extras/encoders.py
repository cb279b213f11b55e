"""Other semantic teachers of stage 1 (arXiv 2501.02576, Table IV): OpenCLIP, AIMv2 and SAM.

Image encoders only. Each turns a normalised picture into tokens, as nets/dinov2.py does.

The paper names the encoders, and neither their sizes nor the layer that is aligned. Taken here are
the largest usual size (ViT-H for OpenCLIP and SAM; AIMv2: large, the others convert too) and the
last layer: patch tokens after the final norm, and for SAM the image embedding after its neck.
The picture is brought to a size at which a patch covers 16 pixels of it, as for DINOv2, so that
480x640 gives 30x40 tokens, whatever size an encoder was trained at.

Sources of the facts: github.com/mlfoundations/open_clip, github.com/apple/ml-aim,
github.com/facebookresearch/segment-anything, and transformers' networks, to which these are equal.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets import model_file
from nets.dinov2 import MLP, Attention, DINOv2, SwiGLU

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resized(table, rows, columns):
    """Position embeddings N,D of a square grid at another size: rows*columns,D.

    Bicubic to the size with antialias, as open_clip does it. AIMv2's and SAM's own code knows one
    size only, so for these the rule is a choice. DINOv2's is another one (nets/dinov2.py).
    """
    grid = math.isqrt(len(table))
    if (rows, columns) == (grid, grid):
        return table
    maps = rearrange(table.float(), "(h w) d -> 1 d h w", h=grid)
    maps = F.interpolate(maps, size=(rows, columns), mode="bicubic", antialias=True)
    return rearrange(maps, "1 d h w -> (h w) d").to(table.dtype)


class Encoder(nn.Module):
    """What the encoders share: how a model file is opened."""

    @classmethod
    def from_file(cls, path, device="cpu", dtype=None):
        """Opens a file that convert_sd2.py wrote from any of the official layouts."""
        header = model_file.read_header(path, kinds=(cls.__name__.lower(),))
        return model_file.build(cls, header["config"], path, device, dtype)


class Block(nn.Module):
    """A block of a transformer. norm: a function of the width that makes a norm."""

    def __init__(self, width, norm, attn, mlp):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm(width), attn, norm(width), mlp

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# --------------------------------------------------------------------------------------- OpenCLIP


class OpenCLIP(Encoder):
    """OpenCLIP's ViT (arXiv 2212.07143); the keywords' defaults are those of ViT-H/14.

    (width, depth, heads, hidden) of other models: B (768, 12, 12, 3072), L (1024, 24, 16, 4096),
    g (1408, 40, 16, 6144), bigG (1664, 48, 16, 8192). grid: patches per side in training.
    """

    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, *, width=1280, depth=32, heads=16, hidden=5120, patch=14, grid=16):
        super().__init__()
        self.width, self.patch = width, patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.randn(1 + grid**2, width) * 0.02)
        self.norm_pre = nn.LayerNorm(width)  # this and all others: eps 1e-5
        self.blocks = nn.ModuleList(
            Block(width, nn.LayerNorm, Attention(width, heads), MLP(width, hidden))
            for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, image):
        """image B,3,H,W, normalised, sides multiples of the patch -> patch tokens B,N,D.

        N = H/patch * W/patch, row by row; after the final LayerNorm, before the projection.
        """
        x = self.patch_embed(image)
        places = resized(self.position_embedding[1:], *x.shape[2:])
        x = rearrange(x, "b d h w -> b (h w) d")
        first = (self.class_embedding + self.position_embedding[0]).expand(len(x), 1, -1)
        x = self.norm_pre(torch.cat([first, x + places], dim=1))  # B,1+N,D
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


# ------------------------------------------------------------------------------------------ AIMv2


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


class AIMv2(Encoder):
    """AIMv2's ViT (arXiv 2411.14402); the keywords' defaults are those of large, patch 14, 224.

    (width, depth, heads, hidden) of other models: huge (1536, 24, 12, 4096), 1B (2048, 24, 16,
    5632), 3B (3072, 24, 24, 8192). grid: patches per side of the learnt position embeddings.
    native: computed ones instead, for pictures of any size.
    """

    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, *, width=1024, depth=24, heads=8, hidden=2816, patch=14, grid=16,
                 native=False):
        super().__init__()
        self.width, self.patch, self.native = width, patch, native
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.norm_patches = RMSNorm(width)
        if not native:
            self.position_embedding = nn.Parameter(torch.randn(grid**2, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, RMSNorm, Attention(width, heads, bias=False),
                  SwiGLU(width, hidden, bias=False)) for _ in range(depth))
        self.norm = RMSNorm(width)

    def forward(self, image):
        """image B,3,H,W, normalised, sides multiples of the patch -> patch tokens B,N,D.

        N = H/patch * W/patch, row by row; after the final norm.
        """
        x = self.patch_embed(image)
        size = x.shape[2:]
        x = self.norm_patches(rearrange(x, "b d h w -> b (h w) d"))
        x = x + (waves_of_grid(*size, self.width, x.device).to(x.dtype) if self.native
                 else resized(self.position_embedding, *size))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def waves_of_grid(rows, columns, width, device=None):
    """Computed position embeddings rows*columns,D: half tells the column, half the row."""
    across, down = (waves(torch.arange(side, device=device), width // 4)
                    for side in (columns, rows))
    return torch.cat([across.repeat(rows, 1), down.repeat_interleave(columns, 0)], dim=1)


def waves(places, count):
    """Sines, then cosines, of places N at wavelengths from 2 pi to nearly 20,000 pi: N,2*count."""
    rates = 10_000 ** (-torch.arange(count, device=places.device) / count)
    angles = places[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# -------------------------------------------------------------------------------------------- SAM


class RelativeAttention(Attention):
    """Self-attention of a map B,H,W,D, in which the distances between places count.

    places: rows and columns that the tables of distances are for. window: side of the squares
    within which places see each other; 0: all see all.
    """

    def __init__(self, width, heads, places, window=0):
        super().__init__(width, heads)
        self.window = window
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * places - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * places - 1, width // heads))

    def forward(self, x):
        if not self.window:
            return self.attend(x)
        batch, height, width, _ = x.shape
        below, right = -height % self.window, -width % self.window
        x = F.pad(x, (0, 0, 0, right, 0, below))  # zeros are seen, too, as in the official code
        rows = x.shape[1] // self.window
        x = rearrange(x, "b (r h) (c w) d -> (b r c) h w d", h=self.window, w=self.window)
        x = rearrange(self.attend(x), "(b r c) h w d -> b (r h) (c w) d", b=batch, r=rows)
        return x[:, :height, :width]

    def attend(self, x):
        """softmax(q k^T / sqrt(d) + q R_h + q R_w) v: B,H,W,D -> B,H,W,D (arXiv 2112.01526)."""
        rows, columns = x.shape[1:3]
        q, k, v = rearrange(self.qkv(x), "b h w (three n d) -> three b n h w d", three=3,
                            n=self.heads)
        down = torch.einsum("bnhwd,hkd->bnhwk", q, by_distance(self.rel_pos_h, rows))
        across = torch.einsum("bnhwd,wkd->bnhwk", q, by_distance(self.rel_pos_w, columns))
        scores = down[..., None] + across[..., None, :]  # B,n,H,W,H,W
        q, k, v = (rearrange(each, "b n h w d -> b n (h w) d") for each in (q, k, v))
        scores = rearrange(scores, "b n h w k l -> b n (h w) (k l)")
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.proj(rearrange(x, "b n (h w) d -> b h w (n d)", h=rows))


def by_distance(table, side):
    """The rows of a table of distances for each two places of a side: side,side,d.

    The table is interpolated linearly to the distances that occur, as in the official code.
    """
    fitting = F.interpolate(table.float().T[None], size=2 * side - 1, mode="linear")[0].T
    places = torch.arange(side, device=table.device)
    return fitting[places[:, None] - places + side - 1].to(table.dtype)


class Neck(nn.Module):
    """The map's width becomes that of the image embedding: B,H,W,D -> B,H,W,D'."""

    def __init__(self, width, out):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 1, bias=False)
        self.norm1 = nn.LayerNorm(out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(out, eps=1e-6)

    def forward(self, x):
        x = self.norm1(self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SAM(Encoder):
    """SAM's image encoder (arXiv 2304.02643); the keywords' defaults are those of ViT-H.

    (width, depth, heads, blocks that see all, counted from 0) of other models: B (768, 12, 12,
    [2, 5, 8, 11]), L (1024, 24, 16, [5, 11, 17, 23]). windowed: for each block whether it sees
    windows only; None: all but every eighth. grid: places per side in training.
    The output is `out` wide. Pictures keep their size; SAM itself enlarges them to 1024.
    """

    mean, std = DINOv2.mean, DINOv2.std  # ImageNet's

    def __init__(self, *, width=1280, depth=32, heads=16, patch=16, grid=64, window=14,
                 windowed=None, out=256):
        super().__init__()
        windowed = [i % 8 != 7 for i in range(depth)] if windowed is None else windowed
        if len(windowed) != depth:
            raise ValueError(f"{len(windowed)} blocks are described, but there are {depth}")
        self.width, self.patch = out, patch
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(
            Block(width, partial(nn.LayerNorm, eps=1e-6),
                  RelativeAttention(width, heads, *((window, window) if some else (grid, 0))),
                  MLP(width, 4 * width)) for some in windowed)
        self.neck = Neck(width, out)

    def forward(self, image):
        """image B,3,H,W, normalised, sides multiples of the patch -> tokens B,N,D.

        N = H/patch * W/patch, row by row: the image embedding.
        """
        x = self.patch_embed(image).permute(0, 2, 3, 1)  # B,H,W,D
        rows, columns = x.shape[1:3]
        x = x + resized(self.pos_embed.flatten(0, 2), rows, columns).unflatten(0, (rows, columns))
        for block in self.blocks:
            x = block(x)
        return self.neck(x).flatten(1, 2)


NETWORKS = {"openclip": OpenCLIP, "aimv2": AIMv2, "sam": SAM}
