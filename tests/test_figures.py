"""benchmarks/figures.py."""

import numpy as np
import torch

from benchmarks import figures
from data.images import read_rgb
from miniature import render
from nets.depthmaster import DepthMaster
from tests import worlds
from tests.worlds import TINY


def sample(image, depth_m):
    return dict(image=torch.from_numpy(image)[None].expand(3, -1, -1),
                depth=torch.from_numpy(depth_m)[None],
                valid=torch.ones(1, *depth_m.shape, dtype=torch.bool), name="a")


def test_a_poster_misleads_an_edge_does_not():
    flat, step = np.full((64, 96), 2, np.float32), np.full((64, 96), 2, np.float32)
    step[:, 48:] = 4
    plain, texture = np.zeros((64, 96), np.uint8), np.zeros((64, 96), np.uint8)
    texture[::2] = 200
    edge = np.where(step > 3, 200, 0).astype(np.uint8)
    scores = [figures.misleading(sample(image, depth_m)) for image, depth_m in (
        (plain, flat), (edge, step), (texture, flat))]
    assert scores[0] == 0 and scores[1] < 0.01 < scores[2]


def test_the_window_with_the_edge():
    depth_m = np.full((120, 160), 2, np.float32)
    depth_m[80:90, 120:150] = 4
    row, column = figures.sharpest(depth_m, np.ones_like(depth_m, bool))
    assert row <= 80 and row + figures.CROP >= 90 and column <= 120 and column + figures.CROP > 149


def test_the_figures_are_drawn(tmp_path, monkeypatch):
    render.ensure(tmp_path, train=1, val=4, streets_val=1, workers=1)
    torch.manual_seed(0)
    DepthMaster(**TINY).save(tmp_path / "a.safetensors")
    assert worlds.call(monkeypatch, figures, "--stage1", tmp_path / "a.safetensors", "--scenes",
                       tmp_path, "--vkitti-crop", 96, 336, "--out", tmp_path / "out") == 0
    assert read_rgb(tmp_path / "out" / "figure_6.png").shape[1] == 3 * 256
    assert read_rgb(tmp_path / "out" / "figure_1.png").shape[1] == 3 * figures.CROP * figures.TIMES
    assert (tmp_path / "out" / "figure_5.png").stat().st_size > 1000
