"""Stage 2's losses on decoded maps: pixels, and gradients in four directions.

DepthMaster, arXiv 2501.02576, section III-C, Eq. 8 and 10. Maps are normalised targets, about
[-1,1]; the prediction is not clipped. Targets are float32 (or float64), so the differences
are, too, at any precision of the prediction.
"""

import torch


def pixel_loss(pred, target, valid):
    """Squared error of maps B,1,H,W over valid pixels (bool) -> per sample B."""
    # pred and target may hold any value in invalid pixels, also NaN: `where` stops it here.
    return masked_mean(torch.where(valid, pred - target, 0).square(), valid)


def gradient_loss(pred, target, valid, delta=0.2):
    """Reversed Huber of the maps' gradients B,1,H,W in four directions -> per sample B (Eq. 8).

    A difference counts where both of its pixels are valid. Maps need two rows and two columns.
    """
    error = torch.where(valid, pred - target, 0)  # gradients of the difference: one pass
    # Deviation: in the released code invalid pixels count as 0 and the loss jumps at delta.
    both_valid = torch.stack([here & there for here, there in neighbours(valid)], dim=1)
    return masked_mean(reversed_huber(directional_gradients(error), delta), both_valid)


def directional_gradients(x):
    """x B,1,H,W -> differences B,4,H-1,W-1: horizontal, vertical, 45 degrees, 135 degrees."""
    return torch.stack([here - there for here, there in neighbours(x)], dim=1)


def neighbours(x):
    """x B,1,H,W -> four pairs (here, there) B,H-1,W-1; a difference is here - there.

    With v[i,j] at the lower right of each 2x2 square: v[i,j] - v[i,j-1], v[i,j] - v[i-1,j],
    v[i-1,j] - v[i,j-1] (along the rising diagonal) and v[i,j] - v[i-1,j-1] (the falling one).
    """
    if x.shape[1] != 1 or min(x.shape[2:]) < 2:
        raise ValueError(f"a map must have the shape B,1,H,W with H and W at least 2, not "
                         f"{tuple(x.shape)}.")
    x = x[:, 0]
    upper_left, upper_right = x[:, :-1, :-1], x[:, :-1, 1:]
    lower_left, lower_right = x[:, 1:, :-1], x[:, 1:, 1:]
    return ((lower_right, lower_left), (lower_right, upper_right), (upper_right, lower_left),
            (lower_right, upper_left))


def reversed_huber(error, delta=0.2):
    """Elementwise (Eq. 8): delta |e| where |e| <= delta, else e^2/2 + delta^2/2.

    Large errors, at missed edges, weigh more than small ones; value and slope are continuous.
    """
    size = error.abs()
    return torch.where(size <= delta, delta * size, 0.5 * (error.square() + delta**2))


def masked_mean(x, mask):
    """Mean of x over a mask of its shape, per sample B; 0 where the mask is empty."""
    return torch.where(mask, x, 0).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1).clamp(min=1)
