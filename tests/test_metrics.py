"""metrics.py against a second implementation in numpy, and against results worked out by hand."""

import math

import numpy as np
import pytest
import torch

import metrics
from evaluation import loop
from data.transforms import to_target_space
from tests.worlds import boxes, in_space, noisy, numpy_align, numpy_score

RANGE = dict(min_depth=1e-3, max_depth=10.0)


# ---- the second implementation: float64 numpy, as the papers say it, nothing shared ----


# ---- pictures ----


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


# ---- tests ----


@pytest.mark.parametrize("space", metrics.SPACES)
@pytest.mark.parametrize("negative", metrics.NEGATIVE)
@pytest.mark.parametrize("f1_mask", metrics.F1_MASKS)
def test_scores_equal_the_second_implementation(space, negative, f1_mask):
    depth_m, valid = boxes(holes=0.05)
    pred = noisy(depth_m, space)
    expected = numpy_score(pred, depth_m, valid, space, **RANGE, negative=negative,
                           f1_mask=f1_mask)
    found = metrics.score(*tensors(pred, depth_m, valid), space, **RANGE, negative=negative,
                          f1_mask=f1_mask)
    assert tuple(found) == metrics.SCORES
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 0 < found["boundary_f1"] < 1 and 0 < found["delta1"] < 1  # nothing trivial


@pytest.mark.parametrize("negative", metrics.NEGATIVE)
def test_align_handles_negative_disparities_as_asked(negative):
    depth_m = np.linspace(1, 9, 48, dtype=np.float32).reshape(6, 8)
    pred = in_space(depth_m, "sqrt_disparity") - 0.3  # below 0 at the far end: left out of the fit
    pred[5] = np.linspace(-2, -0.5, 8)  # far below 0: the fitted line is negative there too
    valid = np.ones_like(depth_m, bool)
    found = metrics.align(*tensors(pred, depth_m, valid), "sqrt_disparity", negative).numpy()
    expected = numpy_align(pred, depth_m, valid, "sqrt_disparity", negative)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found[:2], depth_m[:2], rtol=1e-5)
    assert (found[5, 0] == 1000) == (negative == "clamp")


def test_metric_predictions_are_scaled_or_left():
    depth_m, valid = boxes(holes=0.05)
    pred = 1.7 * np.where(valid, depth_m, 4) + 0.1
    left = metrics.align(*tensors(pred, depth_m, valid), "none")
    np.testing.assert_array_equal(left, pred)
    scaled = metrics.align(*tensors(pred, depth_m, valid), "scale").numpy()
    np.testing.assert_allclose(scaled, pred * np.median(depth_m[valid]) / np.median(pred[valid]))
    flat = metrics.align(*tensors(np.zeros_like(pred), depth_m, valid), "scale").numpy()
    np.testing.assert_allclose(flat, depth_m[valid].mean(), rtol=1e-6)


@pytest.mark.parametrize("space", metrics.SPACES)
def test_perfect_prediction_up_to_scale_and_shift(space):
    depth_m, valid = boxes()
    pred = 0.37 * in_space(depth_m.astype(np.float64), space) + 0.21
    found = metrics.score(*tensors(pred, depth_m, valid), space, **RANGE)
    assert found["abs_rel"] < 1e-6 and found["silog"] < 1e-4
    assert found["delta1"] == 1 and found["boundary_f1"] == pytest.approx(1)
    aligned = metrics.align(pred, *tensors(depth_m, valid), space)  # an array will do
    np.testing.assert_allclose(aligned, depth_m, rtol=1e-6)


def test_pixels_predicted_as_zero_are_scored_but_not_fitted():
    depth_m = np.full((4, 4), 2.0, np.float32)
    depth_m[:2] = 4
    pred = 1 / depth_m
    pred[0, 0] = 0
    found = metrics.align(*tensors(pred, depth_m, depth_m > 0), "disparity")
    assert found[0, 1].item() == pytest.approx(4, abs=1e-6)  # the fit is the exact one
    assert found[0, 0].item() == pytest.approx(1000)
    wrong = metrics.abs_rel(found, torch.from_numpy(depth_m), torch.from_numpy(depth_m > 0))
    assert wrong == pytest.approx((1000 - 4) / 4 / 16)


@pytest.mark.parametrize("space", metrics.SPACES)
@pytest.mark.parametrize("pred", [
    torch.zeros(3, 3), torch.full((3, 3), 0.1), torch.eye(3) * 0.5,
    torch.tensor([[0.7, 0, 0], [0, 0, 0], [0, 0, 0]]),
], ids=["all zero", "constant", "constant where above zero", "one pixel above zero"])
def test_predictions_that_fix_no_scale_give_the_mean_map(pred, space):
    depth_m = torch.tensor([[1.0, 2, 3], [4, 0, 6], [7, 8, 9]])
    valid = depth_m > 0
    found = metrics.align(pred, depth_m, valid, space)
    assert torch.isfinite(found).all()
    if space != "depth" or pred.min() == pred.max():  # with two values, depth can be fitted
        mean = to_target_space(depth_m[valid].double(), space).mean()
        torch.testing.assert_close(to_target_space(found, space), mean.expand(3, 3))
    assert all(map(math.isfinite, metrics.score(pred, depth_m, valid, space, **RANGE).values()))


def test_one_valid_pixel_is_scored_and_none_is_an_error():
    depth_m, valid = torch.full((2, 2), 3.0), torch.tensor([[True, False], [False, False]])
    found = metrics.score(torch.rand(2, 2), depth_m, valid, "sqrt_disparity", **RANGE)
    assert found["abs_rel"] == pytest.approx(0) and found["boundary_f1"] == 0
    with pytest.raises(ValueError, match="no valid pixel"):
        metrics.score(depth_m, depth_m, torch.zeros_like(valid), "depth", **RANGE)


def test_predictions_are_clipped_to_the_range_and_the_truth_is_not():
    depth_m = torch.tensor([[1.0, 2.0], [3.0, 40.0]])
    found = metrics.score(depth_m, depth_m, depth_m > 0, "depth", min_depth=1.5, max_depth=10)
    assert found["abs_rel"] == pytest.approx((0.5 / 1 + 30 / 40) / 4)


def test_deltas_are_strict():
    depth_m = torch.tensor([1.0, 1.0, 1.0, 4.0])
    pred_m = torch.tensor([1.25, 1.5625, 1.953125, 5.0], dtype=torch.float64)  # powers of 1.25
    assert metrics.delta(pred_m, depth_m) == 0
    assert metrics.delta(pred_m, depth_m, power=2) == 0.5
    assert metrics.delta(pred_m, depth_m, power=3) == 0.75
    assert metrics.delta(pred_m, depth_m, torch.tensor([0, 1, 1, 0], dtype=bool), power=2) == 0


def test_boundary_f1_of_a_3x3_by_hand():
    """Disparities; every ratio is 1 or 2, so all ten thresholds agree.

    truth 1 1 1     prediction 1 1 1     A pixel's neighbour is nearer:
          1 2 2                1 2 1     to the right: truth (1,0),              prediction (1,0)
          1 1 1                1 1 1     to the left:  truth none,               prediction (1,2)
                                         below:        truth (0,1), (0,2),       prediction (0,1)
                                         above:        truth (2,1), (2,2),       prediction (2,1)
    recall (1 + 0 + 1/2 + 1/2) / 4 = 1/2, precision (1 + 0 + 1 + 1) / 4 = 3/4, F1 = 3/5
    """
    truth = 1 / torch.tensor([[1.0, 1, 1], [1, 2, 2], [1, 1, 1]])
    pred = 1 / torch.tensor([[1.0, 1, 1], [1, 2, 1], [1, 1, 1]])
    valid = torch.ones(3, 3, dtype=torch.bool)
    for mask in metrics.F1_MASKS:
        assert metrics.boundary_f1(pred, truth, valid, mask) == pytest.approx(3 / 5)
    assert metrics.boundary_f1(pred[None], truth[None], valid[None]) == pytest.approx(3 / 5)
    assert metrics.boundary_f1(truth, truth, valid) == pytest.approx(3 / 4)  # none to the left
    assert metrics.boundary_f1(torch.ones(3, 3), truth, valid) == 0


@pytest.mark.parametrize("mask, expected", [("pair", 1 / 4), ("owner", 1 / 6), ("none", 1 / 5)])
def test_boundary_f1_masks_by_hand(mask, expected):
    """One row of disparities, the right half invalid: only edges to the right, of factor 2.

    truth 1 2 4 8: edges at 0, 1, 2; prediction 1 2 2 4: edges at 0 and 2.
    pair  counts the edge at 0 only:  recall 1/4, precision 1/4 (three directions have none)
    owner counts the edges at 0 and 1: recall 1/2 / 4, precision 1/4: F1 = 1/6
    none  counts all three:            recall 2/3 / 4, precision 1/4: F1 = 1/5
    """
    truth, pred = 1 / torch.tensor([[1.0, 2, 4, 8]]), 1 / torch.tensor([[1.0, 2, 2, 4]])
    valid = torch.tensor([[True, True, False, False]])
    for turn in range(4):  # edges to the right, above, to the left, below
        turned = [torch.rot90(x, turn) for x in (pred, truth, valid)]
        assert metrics.boundary_f1(*turned, mask) == pytest.approx(expected)
    assert metrics.boundary_f1(pred / 1e4, truth / 1e4, valid, mask) == pytest.approx(expected)


def test_boundary_f1_thresholds_are_strict_and_weighted():
    """One edge of exactly 1.25: found at nine of the ten thresholds, in one direction of four."""
    depth_m = torch.tensor([[1.25, 1.0]])
    t = np.linspace(1.05, 1.25, 10)
    expected = 0.25 * t[:9].sum() / t.sum()
    assert metrics.boundary_f1(depth_m, depth_m) == pytest.approx(expected, abs=1e-12)
    depth_m = torch.tensor([[2.5, 1.25, 1.0]])  # and one of 2, at all ten
    assert metrics.boundary_f1(depth_m, depth_m) == pytest.approx(0.25, abs=1e-12)


def test_holes_in_the_truth_do_not_hurt_a_perfect_prediction():
    depth_m, valid = boxes(240, 320, holes=0.03)
    pred_m, _ = boxes(240, 320)
    assert np.array_equal(pred_m[valid], depth_m[valid]) and 0.02 < (~valid).mean() < 0.04
    maps = tensors(pred_m, depth_m, valid)
    assert metrics.boundary_f1(*maps, "pair") == pytest.approx(1)
    assert metrics.boundary_f1(*maps, "owner") < 0.3
    assert metrics.boundary_f1(*maps, "none") < 0.3


class Reader:
    """Two pictures of different size and a broken one between them."""

    def __init__(self):
        self.maps = [boxes(30, 40, seed=0), None, boxes(45, 50, holes=0.1, seed=1)]

    def __len__(self):
        return len(self.maps)

    def name(self, index):
        return f"scene/{index}"

    def __getitem__(self, index):
        if self.maps[index] is None:
            raise ValueError(f"scene/{index}.hdf5 is truncated.")
        depth_m, valid = tensors(*self.maps[index])
        return dict(image=torch.zeros(3, *depth_m.shape, dtype=torch.uint8), depth=depth_m[None],
                    valid=valid[None], name=self.name(index))


def predict(samples):
    return [noisy(sample["depth"][0].numpy(), "disparity") for sample in samples]


def test_evaluate_dataset_scores_every_image_in_every_space():
    reader, bad = Reader(), []
    rows = list(loop.evaluate_dataset(
        predict, reader, metrics.SPACES, **RANGE, negative="square", f1_mask="owner",
        on_bad=lambda *why: bad.append(why)))
    assert bad == [("scene/1", "scene/1.hdf5 is truncated.")]
    assert [(row.image, row.size) for row in rows] == [("scene/0", (30, 40)), ("scene/2", (45, 50))]
    for row, index in zip(rows, (0, 2)):
        depth_m, valid = reader.maps[index]
        for space in metrics.SPACES:
            expected = numpy_score(noisy(depth_m, "disparity"), depth_m, valid, space, **RANGE,
                                   negative="square", f1_mask="owner")
            assert row.scores[space] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    mean = metrics.mean_scores([row.scores["depth"] for row in rows])
    assert mean["rmse"] == pytest.approx(sum(row.scores["depth"]["rmse"] for row in rows) / 2)


def test_evaluate_dataset_raises_without_on_bad_and_takes_indices():
    with pytest.raises(ValueError, match="truncated"):
        list(loop.evaluate_dataset(predict, Reader(), ["depth"], **RANGE))
    rows = loop.evaluate_dataset(predict, Reader(), ["depth"], **RANGE, chunks=[[2], [0]])
    assert [row.image for row in rows] == ["scene/2", "scene/0"]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_one_size_are_predicted_together(workers):
    reader, sizes, bad = Reader(), [], []
    reader.maps = [boxes(30, 40, seed=0), boxes(30, 40, seed=1), None, boxes(45, 50, seed=2)]

    def predict_and_note(samples):
        sizes.append(len(samples))
        return predict(samples)

    together = list(loop.evaluate_dataset(
        predict_and_note, reader, ["depth"], **RANGE, chunks=[[0, 1, 2, 3]], workers=workers,
        on_bad=lambda name, reason: bad.append(name)))
    assert sizes == [2, 1] and bad == ["scene/2"]
    alone = list(loop.evaluate_dataset(predict, reader, ["depth"], **RANGE,
                                          on_bad=lambda name, reason: None))
    assert together == alone


def test_what_is_looked_at_is_aligned_and_clipped():
    seen = []
    reader = Reader()
    list(loop.evaluate_dataset(
        predict, reader, ["disparity", "depth"], **RANGE, chunks=[[0]],
        look=lambda sample, pred_m: seen.append((sample["name"], pred_m))))
    depth_m, valid = tensors(*reader.maps[0])
    expected = metrics.align(noisy(reader.maps[0][0], "disparity"), depth_m, valid, "disparity")
    assert seen[0][0] == "scene/0" and torch.equal(seen[0][1], expected.clamp(1e-3, 10))


def test_predictions_that_fix_nothing_are_counted():
    flat = list(loop.evaluate_dataset(lambda samples: [torch.full((30, 40), 0.5)], Reader(),
                                         ["depth", "disparity"], **RANGE, chunks=[[0]]))
    assert flat[0].unfitted == ["depth", "disparity"]
    assert all(math.isfinite(value) for scores in flat[0].scores.values()
               for value in scores.values())
    negative = list(loop.evaluate_dataset(lambda samples: [-torch.rand(30, 40)], Reader(),
                                             ["depth", "disparity"], **RANGE, chunks=[[0]]))
    assert negative[0].unfitted == ["disparity"]


def test_numbers_too_large_to_square_are_no_nan():
    pred = torch.rand(30, 40, dtype=torch.float64) * 1e200
    found = list(loop.evaluate_dataset(lambda samples: [pred], Reader(), ["depth"], **RANGE,
                                          chunks=[[0]]))
    assert found[0].unfitted == ["depth"]
    assert all(map(math.isfinite, found[0].scores["depth"].values()))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (300, 411)])
def test_any_size_and_layout_and_no_argument_is_changed(size):
    """More pixels than a block, rows and columns alone, and maps that are not contiguous."""
    rng = np.random.default_rng(0)
    depth_m = rng.uniform(1, 9, size[::-1]).astype(np.float32).T
    depth_m[rng.random(size) < 0.1] = 0
    depth_m.flat[0] = 2
    valid, pred = depth_m > 0, rng.uniform(0.1, 1, size[::-1]).T
    maps = [torch.from_numpy(x) for x in (pred, depth_m, valid)]  # transposed
    before = [x.clone() for x in maps]
    for f1_mask in metrics.F1_MASKS:
        found = metrics.score(*maps, "depth", **RANGE, f1_mask=f1_mask)
        if valid.sum() > 1:
            expected = numpy_score(pred, depth_m, valid, "depth", **RANGE, negative="clamp",
                                   f1_mask=f1_mask)
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert all(torch.equal(x, y) for x, y in zip(maps, before))


@pytest.mark.parametrize("pred, message", [
    (torch.zeros(30, 41), "scene/0 has shape"), (torch.full((30, 40), torch.nan), "1200 values"),
    (torch.full((30, 40), torch.inf), "1200 values"),
])
def test_predictions_that_cannot_be_scored_are_named(pred, message):
    with pytest.raises(ValueError, match=message):
        list(loop.evaluate_dataset(lambda samples: [pred], Reader(), ["depth"], **RANGE))


@pytest.mark.parametrize("call", [
    lambda x, v: metrics.align(x, x, v, "metres"),
    lambda x, v: metrics.align(x, x, v, "depth", negative="ignore"),
    lambda x, v: metrics.boundary_f1(x, x, v, mask="both"),
])
def test_unknown_choices_are_named(call):
    with pytest.raises(ValueError, match="must be one of"):
        call(torch.rand(4, 4) + 1, torch.ones(4, 4, dtype=torch.bool))
