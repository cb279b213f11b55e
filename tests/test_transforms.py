"""data/transforms.py: hand-computed values and second implementations in numpy float64."""

import numpy as np
import pytest
import torch

from data.transforms import (
    BadSample,
    FilteredSample,
    kitti_crop,
    normalise_target,
    pack_sample,
    resize_antialias,
    resize_nearest,
)


def random_depth(shape=(1, 37, 53), seed=0):
    random = np.random.default_rng(seed)
    depth_m = torch.from_numpy(random.uniform(0.3, 40, shape).astype(np.float32))
    return depth_m, torch.from_numpy(random.random(shape) < 0.7)


def test_target_by_hand():
    # sqrt(1/d) is 1.00, 1.01, ..., 2.00, so the quantiles are 1.02 and 1.98, half their span 0.48.
    t = 1 + torch.arange(101) / 100
    y = normalise_target((1 / t**2).view(1, 1, 101), torch.ones(1, 1, 101, dtype=torch.bool))
    expected = ((t - 1.02) / 0.48 - 1).clamp(-1, 1)
    assert torch.allclose(y[0, 0], expected, atol=1e-5)
    assert y[0, 0, 0] == -1 and y[0, 0, 100] == 1  # far, near
    assert abs(y[0, 0, 50]) < 1e-5


@pytest.mark.parametrize("target, space, far", [
    ("sqrt_disparity", lambda d: np.sqrt(1 / d), -1), ("disparity", lambda d: 1 / d, -1),
    ("depth", lambda d: d, 1)])
def test_target_against_numpy(target, space, far):
    depth_m, valid = random_depth()
    depth_m[~valid] = torch.tensor([0.0, 655.35]).repeat(depth_m.numel())[:(~valid).sum()]
    t = space(depth_m.numpy()[valid.numpy()].astype(np.float64))
    low, high = np.percentile(t, [2, 98])
    expected = np.full(depth_m.shape, float(far))
    expected[valid.numpy()] = np.clip(2 * (t - low) / (high - low) - 1, -1, 1)
    y = normalise_target(depth_m, valid, target)
    assert y.dtype == torch.float32 and y.shape == depth_m.shape
    np.testing.assert_allclose(y.numpy(), expected, atol=2e-5)
    assert (y[~valid] == far).all()
    nearest = depth_m.masked_fill(~valid, 99).argmin()
    assert y.flatten()[nearest] == -far


def test_quantiles_are_those_of_valid_pixels_only():
    depth_m, valid = random_depth()
    y = normalise_target(depth_m, valid)
    depth_m[~valid] = 1e-3
    assert torch.equal(y, normalise_target(depth_m, valid))


def test_flat_and_empty_depth_are_bad_samples():
    depth_m, valid = random_depth()
    with pytest.raises(BadSample, match="sofa.png .*quantiles"):
        normalise_target(torch.full_like(depth_m, 3.7), valid, name="sofa.png")
    with pytest.raises(BadSample, match="no valid pixel"):
        normalise_target(depth_m, torch.zeros_like(valid))
    with pytest.raises(ValueError, match="'inverse' is unknown"):
        normalise_target(depth_m, valid, "inverse")
    assert issubclass(FilteredSample, BadSample) and issubclass(BadSample, ValueError)


def test_pack_sample_keeps_depth_outside_the_mask():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    depth_m = np.array([[1.5, 70, np.nan], [np.inf, -np.inf, -2]], np.float32)
    valid = np.array([[True, False, False], [False, False, False]])
    sample = pack_sample(image, depth_m, valid, "a/b", "a/depth.png")
    assert sample["image"].shape == (3, 2, 3) and sample["image"].dtype == torch.uint8
    assert sample["image"][1, 1, 2] == image[1, 2, 1]
    assert sample["depth"].tolist() == [[[1.5, 70, 0], [0, 0, -2]]]
    assert sample["valid"].tolist() == [valid.tolist()] and sample["name"] == "a/b"


def test_pack_sample_blames_the_depth_file():
    image, depth_m = np.zeros((4, 5, 3), np.uint8), np.ones((4, 6), np.float32)
    with pytest.raises(BadSample, match="a/depth.png is 4x6, but its counterpart is 4x5"):
        pack_sample(image, depth_m, depth_m > 0, "a/b", "a/depth.png")
    with pytest.raises(BadSample, match="a/depth.png has no valid pixel"):
        pack_sample(image, depth_m[:, :5], depth_m[:, :5] > 2, "a/b", "a/depth.png")


def test_kitti_crop():
    # Virtual KITTI 2: top = 375 - 352, left = int((1242 - 1216) / 2).
    assert kitti_crop((375, 1242), (352, 1216), "x") == (slice(23, 375), slice(13, 1229))
    assert kitti_crop((5, 8), (4, 5), "x") == (slice(1, 5), slice(1, 6))  # 1.5 becomes 1
    with pytest.raises(BadSample, match="x.png is 375x1200, smaller than the crop 352x1216"):
        kitti_crop((375, 1200), (352, 1216), "x.png")


@pytest.mark.parametrize("size, new", [((768, 1024), (480, 640)), ((7, 11), (5, 4)),
                                       ((5, 6), (13, 9)), ((8, 8), (8, 8))])
def test_resize_nearest_takes_the_pixel_under_the_centre(size, new):
    index = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, *size)
    rows, columns = (np.floor((np.arange(n) + 0.5) * old / n).astype(int)
                     for n, old in zip(new, size))
    expected = index.numpy()[:, rows][:, :, columns]
    np.testing.assert_array_equal(resize_nearest(index, new).numpy(), expected)
    odd = resize_nearest(index % 2 == 1, new)
    assert odd.dtype == torch.bool
    np.testing.assert_array_equal(odd.numpy(), expected % 2 == 1)
    image = (index % 251).to(torch.uint8).expand(3, -1, -1)
    assert resize_nearest(image, new).dtype == torch.uint8
    np.testing.assert_array_equal(resize_nearest(image, new)[2].numpy(), expected[0] % 251)


def test_resize_antialias_averages():
    # One bright column in four: plain bilinear would look at the two dark ones in the middle.
    columns = ((torch.arange(64) % 4 == 0) * 255).to(torch.uint8).expand(3, 64, 64)
    resized = resize_antialias(columns, (16, 16))
    assert resized.dtype == torch.uint8 and resized.shape == (3, 16, 16)
    assert (resized[:, 2:-2, 2:-2] == 64).all()  # 255 / 4 is 63.75
    same = resize_antialias(torch.full((3, 9, 7), 201, dtype=torch.uint8), (5, 11))
    assert (same == 201).all()
