"""Patterns on surfaces, box-filtered by a pixel's extent: with distance they fade to a mean."""

from functools import cache

import numpy as np


def mixing_weight(pattern, u, v, du, dv, shift):
    """How much of a material's second colour shows, N in [0,1].

    u, v: positions on the surface; du, dv: extents of a pixel there; all N, in units of the
    pattern's scale. shift: N, a different number for every object. Raises ValueError for an
    unknown pattern.
    """
    wide = np.maximum(du, dv)
    if pattern == "plain":
        return np.zeros_like(u)
    if pattern == "noise":
        rough = noise(u + shift, v, wide) + 0.5 * noise(2 * u, 2 * v + shift, 2 * wide)
        return np.clip(0.5 + rough, 0, 1)
    if pattern == "picture":
        blobs = 1.3 * noise(u + shift, v, du) + 0.6 * noise(2.5 * u, 2.5 * v + shift, 2.5 * du)
        return np.clip(0.5 + 1.5 * blobs, 0, 1)
    if pattern == "checker":
        return 0.5 + 2 * (_pulse(u / 2, 0.5, du / 2) - 0.5) * (_pulse(v / 2, 0.5, dv / 2) - 0.5)
    if pattern == "stripes":
        return _pulse(u, 0.5, du)
    if pattern == "tiles":
        return 1 - _pulse(u, 0.95, du) * _pulse(v, 0.95, dv)
    if pattern == "bricks":
        row = np.floor(3 * v)
        return 1 - _pulse(u + 0.5 * row, 0.95, du) * _pulse(3 * v, 0.87, 3 * dv)
    if pattern == "windows":
        return _pulse(u, 0.5, du) * _pulse(v, 0.55, dv)
    if pattern == "wood":
        return _planks(u, v, du, dv, shift)
    if pattern == "road":  # the scale is the road's width: dashes in the middle, lines at the sides
        middle = _pulse(v + 0.008, 0.016, dv) * _pulse(1.2 * u, 0.4, 1.2 * du)
        sides = _pulse(v + 0.03, 0.014, dv) + _pulse(v + 0.97, 0.014, dv)
        return np.clip(middle + sides, 0, 1)
    raise ValueError(f"There is no pattern called {pattern}; see textures.mixing_weight for all.")


def noise(x, y, width):
    """Smooth noise in [-0.5, 0.5] with unit cells, faded out where a pixel is as wide as a cell."""
    i, j = np.floor(x), np.floor(y)
    fx, fy = x - i, y - j
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    i, j = i.astype(np.int32) & 255, j.astype(np.int32) & 255
    i1, j1 = (i + 1) & 255, (j + 1) & 255
    table = _random_table()
    low = table[j * 256 + i] * (1 - fx) + table[j * 256 + i1] * fx
    high = table[j1 * 256 + i] * (1 - fx) + table[j1 * 256 + i1] * fx
    return (low + (high - low) * fy - 0.5) * np.clip(1.5 - 1.5 * width, 0, 1)


@cache
def _random_table():
    return np.random.default_rng(0).random(256 * 256, np.float32)


def _planks(u, v, du, dv, shift):
    """Boards along u, each of its own tone, with grain and dark joints."""
    board = np.floor(v)
    grain = noise(0.4 * u + 5.3 * board + shift, 9 * v, np.maximum(0.4 * du, 9 * dv))
    tone = noise(0.77 * board + shift, 0.31 * board, np.zeros_like(u))
    return np.clip(0.45 + 0.4 * grain + 0.5 * tone + 0.4 * (1 - _pulse(v, 0.96, dv)), 0, 1)


def _pulse(x, duty, width):
    """The mean over `width` around x of a wave: 1 on the first `duty` of every unit, else 0."""
    width = np.clip(width, 0.01, 8)

    def integral(s):
        whole = np.floor(s)
        return whole * duty + np.minimum(s - whole, duty)

    return (integral(x + width / 2) - integral(x - width / 2)) / width
