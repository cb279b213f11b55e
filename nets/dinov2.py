"""DINOv2's vision transformer, the semantic teacher of stage 1 (arXiv 2304.07193, Apache-2.0).

The names of the parameters are those of the official .pth files.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets import model_file
from nets.ops.attention import attention, check_heads


class PatchEmbedding(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, image):
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


class Attention(nn.Module):
    def __init__(self, width, heads, bias=True):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.proj = nn.Linear(width, width, bias)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated SiLU; by default the hidden width is 2/3 of the MLP's, rounded up to 8 * n."""

    def __init__(self, width, hidden=None, bias=True):
        super().__init__()
        hidden = hidden or (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden, bias)
        self.w3 = nn.Linear(hidden, width, bias)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, swiglu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width) if swiglu else MLP(width, 4 * width)
        self.ls2 = LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """The encoder; the keywords' defaults are those of ViT-g/14.

    (width, depth, heads, swiglu) of other models: S (384, 12, 6, False), B (768, 12, 12, False),
    L (1024, 24, 16, False). grid: patches per side of the stored position embeddings.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pictures in [0,1]

    def __init__(self, *, width=1536, depth=40, heads=24, swiglu=True, patch=14, grid=37):
        super().__init__()
        self.width, self.patch, self.grid = width, patch, grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used by DINOv2's own training only
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid**2, width) * 0.02)
        self.patch_embed = PatchEmbedding(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @classmethod
    def from_file(cls, path, device="cpu", dtype=None):
        """Opens a file that convert_sd2.py wrote from any of the official layouts."""
        header = model_file.read_header(path, kinds=("dinov2",))
        return model_file.build(cls, header["config"], path, device, dtype)

    def position_embedding(self, rows, columns):
        """Position embeddings 1,1+rows*columns,D for a grid of another size.

        Bicubic by scale factor (n + 0.1)/grid as in the official code; interpolation to a given
        size gives other numbers.
        """
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = rearrange(patches.float(), "1 (h w) d -> 1 d h w", h=self.grid)
        factor = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
        return torch.cat([cls, rearrange(patches, "1 d h w -> 1 (h w) d").to(cls.dtype)], dim=1)

    def forward(self, image):
        """image B,3,H,W, ImageNet-normalised, sides multiples of 14 -> patch tokens B,N,D.

        N = H/14 * W/14, row by row; after the final LayerNorm.
        """
        rows, columns = (side // self.patch for side in image.shape[2:])
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.position_embedding(rows, columns)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]
