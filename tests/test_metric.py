"""extras/metric.py: metres from a few known distances, and from what cannot tell them."""

import numpy as np
import pytest

from extras.metric import POWER, fit, read_points, sample, source_for, to_metres
from tests.worlds import boxes

SIZE = 61, 83


def scene(target="sqrt_disparity", seed=0):
    """A true depth map and a prediction of it: an affine map of the truth in a target space."""
    depth_m = boxes(*SIZE, seed=seed)[0] * np.linspace(0.3, 1.3, SIZE[1], dtype=np.float32)
    value = depth_m.astype(np.float64) ** (1 / POWER[target])
    return depth_m, (value - value.min()) / np.ptp(value)


def measured(depth_m, count, noise=0.02, wrong=0, seed=0):
    """Points at random pixels: x, y, metres with a relative error; `wrong` of them gross errors."""
    rng = np.random.default_rng(seed)
    rows, columns = np.unravel_index(rng.choice(depth_m.size, count, replace=False), depth_m.shape)
    metres = depth_m[rows, columns] * (1 + noise * rng.standard_normal(count))
    metres[:wrong] *= rng.choice([0.3, 0.5, 2, 3], wrong)
    return np.stack([columns + 0.5, rows + 0.5, metres], axis=1)


@pytest.mark.parametrize("target", POWER)
def test_exact_points_give_the_exact_map(target):
    depth_m, prediction = scene(target)
    found = fit(prediction, measured(depth_m, 5, noise=0), target)
    value = depth_m.astype(np.float64) ** (1 / POWER[target])
    assert found.scale == pytest.approx(np.ptp(value), rel=1e-6)
    assert found.shift == pytest.approx(value.min(), rel=1e-6)
    np.testing.assert_allclose(found.metres(prediction), depth_m, rtol=1e-5)
    assert found.metres(prediction).dtype == np.float32
    assert found.inliers.all() and not found.shift_assumed and np.abs(found.residuals).max() < 1e-6


@pytest.mark.parametrize("target", POWER)
def test_ten_noisy_points_two_of_them_wrong(target):
    """At least 95 of 100 draws end within 3 %."""
    errors = []
    for seed in range(100):
        depth_m, prediction = scene(target, seed % 5)
        found = fit(prediction, measured(depth_m, 10, wrong=2, seed=seed), target)
        errors.append(np.median(np.abs(found.metres(prediction) / depth_m - 1)))
        again = fit(prediction, measured(depth_m, 10, wrong=2, seed=seed), target)
        assert (again.scale, again.shift) == (found.scale, found.shift)
    assert (np.array(errors) < 0.03).sum() >= 95


def test_wrong_points_are_named_and_residuals_are_signed():
    depth_m, prediction = scene()
    points = measured(depth_m, 12, noise=0)
    points[3, 2] *= 2
    found = fit(prediction, points)
    assert found.inliers.tolist() == [index != 3 for index in range(12)]
    assert found.residuals[3] == pytest.approx(-0.5, abs=1e-3)  # the fit is half of what was given
    assert "11 of 12 points fit" in str(found) and "warning" not in str(found)


def test_far_points_count_as_much_as_near_ones():
    """Errors are relative: in square-root disparity itself, far points would hardly count."""
    value = np.linspace(0, 1, 40)[None].repeat(3, axis=0)
    metres = (0.9 * value + 0.1) ** -2.0  # 1 to 100 m
    points = np.array([[x + 0.5, 1.5, metres[1, x]] for x in (0, 1, 2, 37, 38, 39)])
    points[:, 2] *= [1.05, 0.95, 1, 1.05, 0.95, 1]
    error = np.abs(fit(value, points).metres(value) / metres - 1)
    assert error.max() < 0.06


def test_points_at_one_depth_are_refused_and_nearly_one_depth_holds_the_shift():
    depth_m, prediction = scene()
    points = measured(depth_m, 8, noise=0)
    for same in (points[:1], np.r_[points[:1], points[:1]], points * [1, 1, 0] + [0, 0, 2.5]):
        with pytest.raises(ValueError, match="all .* m away: two different depths are needed"):
            fit(prediction, same)
    rng = np.random.default_rng(0)
    rows, columns = (np.abs(depth_m / np.median(depth_m) - 1) < 0.01).nonzero()
    points = np.stack([columns + 0.5, rows + 0.5, depth_m[rows, columns]], axis=1)[:40]
    points[:, 2] *= 1 + 0.02 * rng.standard_normal(len(points))
    found = fit(prediction, points)
    assert found.shift_assumed and "--far-to-near" in str(found)
    assert found.shift == pytest.approx(found.scale / (10**0.5 - 1))
    there = found.metres(prediction)[rows, columns]
    assert np.median(there / depth_m[rows, columns]) == pytest.approx(1, abs=0.02)
    assert fit(prediction, points, far_to_near=4).shift > found.shift


@pytest.mark.parametrize("change, message", [
    (lambda points: points[:0], "no points"),
    (lambda points: points[:, :2], "N rows of x, y, metres"),
    (lambda points: np.where(np.arange(3) == 0, 83.2, points), "point 1 at x 83.2, y .* outside"),
    (lambda points: np.where(np.arange(3) == 1, -1, points), "outside of the picture of 83 x 61"),
    (lambda points: np.r_[points[:2], [[4, 4, np.nan]]], "point 3 has no number"),
    (lambda points: np.r_[points[:2], [[4, 4, 0]]], "point 3 .* not between 0 and 1000 m"),
])
def test_points_that_are_no_points(change, message):
    depth_m, prediction = scene()
    with pytest.raises(ValueError, match=message):
        fit(prediction, change(measured(depth_m, 6)))


def test_predictions_that_cannot_be_fitted():
    depth_m, prediction = scene()
    points = measured(depth_m, 10)
    with pytest.raises(ValueError, match="nearer where the prediction is farther"):
        fit(1 - prediction, points)
    with pytest.raises(ValueError, match="same value at all points"):
        fit(np.full(SIZE, 0.5), points)
    holes = prediction.copy()
    holes[int(points[4, 1]), int(points[4, 0])] = np.nan
    with pytest.raises(ValueError, match="no value at point 5"):
        fit(holes, points)


def test_sampling_is_linear_between_pixel_centres():
    rows, columns = np.mgrid[:5, :7]
    points = np.array([[0.5, 0.5, 1], [6.5, 4.5, 1], [3, 2.25, 1], [0, 0, 1], [7, 5, 1]])
    expected = [0, 46, 10 * 1.75 + 2.5, 0, 46]
    np.testing.assert_allclose(sample(10.0 * rows + columns, points), expected)
    assert to_metres(np.array([0.0, -1.0]), "sqrt_disparity").tolist() == [1000, 1000]


@pytest.mark.parametrize("size", [SIZE, (122, 166), (30, 41)])
def test_a_depth_map_of_any_size_is_placed_by_position(size, tmp_path):
    """A lidar's (same size, sparse) and a phone's (smaller) map give the truth back."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    depth_m = (2 + 6 * (columns + 0.5) / size[1] + (rows + 0.5) / size[0]).astype(np.float32)
    depth_m[np.random.default_rng(0).random(size) < 0.7] = 0
    np.save(tmp_path / "a.npy", depth_m)
    points = read_points(tmp_path / "a.npy", SIZE)
    assert len(points) == (depth_m > 0).sum()
    expected = 2 + 6 * points[:, 0] / SIZE[1] + points[:, 1] / SIZE[0]
    np.testing.assert_allclose(points[:, 2], expected, rtol=1e-5)


def test_a_large_map_is_thinned_the_same_each_time(tmp_path):
    np.save(tmp_path / "a.npy", np.full((300, 400), 2.0))
    points = read_points(tmp_path / "a.npy", (600, 800))
    assert len(points) == len(np.unique(points, axis=0)) == 20_000
    np.testing.assert_array_equal(points, read_points(tmp_path / "a.npy", (600, 800)))


def test_maps_of_another_shape_and_without_depth(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((50, 50)))
    with pytest.raises(ValueError, match="a.npy has 50 x 50 pixels .* another shape"):
        read_points(tmp_path / "a.npy", SIZE)
    np.save(tmp_path / "b.npy", np.zeros(SIZE))
    with pytest.raises(ValueError, match="b.npy holds no depth"):
        read_points(tmp_path / "b.npy", SIZE)
    np.save(tmp_path / "c.npy", np.full(SIZE, 2500, np.uint16))
    with pytest.raises(ValueError, match="depths of 2.5e.03 m: give --depth-scale"):
        read_points(tmp_path / "c.npy", SIZE, depth_scale=1)
    far = np.full(SIZE, 2.5)
    far[:9] = 65535
    np.save(tmp_path / "d.npy", far)
    assert read_points(tmp_path / "d.npy", SIZE)[:, 2].max() == 2.5


@pytest.mark.parametrize("text", [
    "x,y,metres\n1.5,2.5,3\n4,5,6.5\n", "\ufeffmetres;X;y\n3;1.5;2.5\n6.5;4;5\n",
    "id,x,y,meters\na,1.5,2.5,3\n,4,5,6.5\n", "X;Y;depth\n1,5;2,5;3\n;;\n4;5;6,5\n"])
def test_tables_of_points(text, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    np.testing.assert_array_equal(read_points(tmp_path / "a.csv", SIZE),
                                  [[1.5, 2.5, 3], [4, 5, 6.5]])


@pytest.mark.parametrize("text, message", [
    ("", "holds no points: the first line must be x,y,metres"),
    ("x,y,metres\n", "holds no points"),
    ("x,y,far\n1,2,3\n", "has the columns x, y, far: its first line must be x,y,metres"),
    ("x,y,metres\n1,2,3\n1,2,far\n", "point 2 is not three numbers"),
    ("x,y,metres\n1,2\n", "point 1 is not three numbers"),
])
def test_tables_that_hold_no_points(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"a.csv.*{message}"):
        read_points(tmp_path / "a.csv", SIZE)


def test_a_folder_of_sources_has_the_pictures_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.csv", "deep/b.v2.png", "c.exr", "d.CSV"):
        (tmp_path / name).touch()
    assert source_for(tmp_path, "a") == tmp_path / "a.csv"
    assert source_for(tmp_path, "deep/b.v2") == tmp_path / "deep/b.v2.png"
    assert source_for(tmp_path, "d") == tmp_path / "d.CSV"
    assert source_for(tmp_path / "c.exr", "any") == tmp_path / "c.exr"
    with pytest.raises(ValueError, match="holds no b"):
        source_for(tmp_path, "b")
