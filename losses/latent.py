"""Stage 1's regression of the depth latent (arXiv 2501.02576, Eq. 3)."""

import torch
from einops import reduce


def valid_cells(valid, cell=8):
    """Pixels B,1,H,W (bool) -> latent cells B,1,H/8,W/8: true where all 8x8 pixels are valid."""
    height, width = (side // cell * cell for side in valid.shape[2:])
    cells = reduce(valid[:, :, :height, :width].float(), "b 1 (h p) (w q) -> b 1 h w", "min",
                   p=cell, q=cell)
    return cells.bool()


def latent_loss(z_pred, z_target, valid):
    """Squared error of latents B,4,h,w over cells whose pixels are all valid -> per sample B.

    valid: bool, of the pixels B,1,H,W or of the cells B,1,h,w. A sample without a valid cell gives
    0 (data/training_set.py yields none).
    """
    cells = valid if valid.shape[2:] == z_pred.shape[2:] else valid_cells(valid)
    error = torch.where(cells, z_pred.float() - z_target.float(), 0)  # B,4,h,w
    total = error.square().mean(dim=1).sum(dim=(1, 2))
    return total / cells.sum(dim=(1, 2, 3)).clamp(min=1)


def relative_error(found, expected):
    """Squared error of features B,C,h,w over the expected ones' mean square -> per sample B."""
    found, expected = found.float().flatten(1), expected.float().flatten(1)
    return (found - expected).square().mean(dim=1) / expected.square().mean(dim=1)
