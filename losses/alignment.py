"""Stage 1's feature alignment: the U-Net learns the features of a semantic encoder.

arXiv 2501.02576, section III-B, Eq. 4-5.
"""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class FeatureAdapter(nn.Sequential):
    """Maps U-Net features B,N,C to the encoder's width B,N,D (Eq. 4); keys 0, 2, 4."""

    def __init__(self, channels=1280, width=1536):
        super().__init__(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                         nn.Linear(width, width))


def teacher_image(image, patch, mean, std):
    """The encoder's input for images B,3,H,W in [-1,1]: normalised; a patch covers 16 pixels.

    With DINOv2's patch of 14, 480x640 becomes 420x560, 7/8 of the size. `resize_tokens` then
    brings its 30x40 tokens to the U-Net's feature, 8x10 in the middle (other sizes: rounded down
    to whole patches, at least one); bicubic without antialias. mean, std: of the encoder.
    """
    mean, std = statistics(image.device, mean, std)
    # Deviation: normalises the image in [0,1]; the released code normalises it in [-1,1].
    size = [max(side // 16, 1) * patch for side in image.shape[2:]]
    return F.interpolate(((image + 1) / 2 - mean) / std, size=size, mode="bicubic")


@cache  # each copy to a GPU would make the CPU wait
def statistics(device, mean, std):
    """Mean and standard deviation of the channels, 2,3,1,1 on a device."""
    return torch.tensor([mean, std], device=device)[..., None, None]


def resize_tokens(tokens, grid, size):
    """Tokens B,N,D of a grid (rows, columns) -> B,h*w,D at another size (h, w), bicubic."""
    if tuple(grid) == tuple(size):
        return tokens
    maps = rearrange(tokens.float(), "b (h w) d -> b d h w", h=grid[0])
    maps = F.interpolate(maps, size=size, mode="bicubic")
    return rearrange(maps, "b d h w -> b (h w) d")


def feature_alignment_loss(adapted, target, kind="kl"):
    """Distance of adapted features B,N,D to the encoder's B,N,D -> per sample B (Eq. 5).

    `kl`: KL(softmax(target) || softmax(adapted)) along channels, mean over tokens and channels, so
    1/D of the KL per token. `cosine`: 1 minus the cosine
    similarity, mean over tokens.
    """
    adapted, target = adapted.float(), target.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(adapted, target, dim=-1).mean(dim=1)
    # Deviation: the paper states no reduction; with this mean, its weight of 1 is the released one.
    log_p, log_q = F.log_softmax(target, dim=-1), F.log_softmax(adapted, dim=-1)
    return (log_p.exp() * (log_p - log_q)).mean(dim=(1, 2))
