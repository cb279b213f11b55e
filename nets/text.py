"""The CLIP text encoder of Stable Diffusion 2 (OpenCLIP ViT-H/14, arXiv 2212.07143).

Depth estimation needs only its embedding of the empty prompt. The converter computes this embedding
once and stores it in the U-Net; nothing else uses this file.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets.ops.attention import check_heads

EMPTY_PROMPT = (49406, 49407)  # start and end of text, without padding


class Attention(nn.Module):
    """Causal multi-head self-attention: B,N,D -> B,N,D."""

    def __init__(self, width, heads):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    """The encoder; the keywords' defaults are those of Stable Diffusion 2.

    depth: number of blocks. The original model has 24; Stable Diffusion 2 leaves out the last and
    applies the final LayerNorm after the 23rd.
    """

    def __init__(self, *, width=1024, depth=23, heads=16, hidden=4096, vocabulary=49408,
                 positions=77):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.randn(positions, width) * 0.01)
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        """tokens int64 B,N -> embeddings B,N,D after the final LayerNorm."""
        x = self.token_embedding(tokens) + self.position_embedding[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @torch.no_grad()
    def empty_prompt(self):
        """The embedding of the empty prompt: 2,D."""
        return self(torch.tensor([EMPTY_PROMPT]))[0]
