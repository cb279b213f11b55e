"""losses/gradient.py: by hand on 3x3, the reversed Huber's shape, and what masks hide."""

import numpy as np
import pytest
import torch

from losses.gradient import directional_gradients, gradient_loss, pixel_loss, reversed_huber


def test_four_directions_by_hand():
    x = torch.tensor([[1.0, 2, 4], [7, 11, 16], [22, 29, 37]])[None, None]
    horizontal, vertical, rising, falling = directional_gradients(x)[0]
    assert horizontal.tolist() == [[4, 5], [7, 8]]  # v[i,j] - v[i,j-1]
    assert vertical.tolist() == [[9, 12], [18, 21]]  # v[i,j] - v[i-1,j]
    assert rising.tolist() == [[-5, -7], [-11, -13]]  # v[i-1,j] - v[i,j-1]
    assert falling.tolist() == [[10, 14], [22, 26]]  # v[i,j] - v[i-1,j-1]


@pytest.mark.parametrize("delta", [0.2, 1.0])
def test_reversed_huber(delta):
    e = torch.tensor([0.0, 0.3 * delta, delta, 2 * delta], dtype=torch.float64, requires_grad=True)
    loss = reversed_huber(e, delta)
    expected = [0, 0.3 * delta**2, delta**2, 2.5 * delta**2]
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(e.grad.numpy(), [0, delta, delta, 2 * delta], rtol=1e-12)
    assert torch.equal(reversed_huber(-e, delta), loss)


def test_reversed_huber_is_continuous_with_its_slope():
    e = torch.tensor([0.2 - 1e-9, 0.2 + 1e-9], dtype=torch.float64, requires_grad=True)
    loss = reversed_huber(e)
    loss.sum().backward()
    assert (loss[1] - loss[0]).abs() < 1e-9
    assert (e.grad[1] - e.grad[0]).abs() < 1e-8


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 2, 1, 5, 6, dtype=torch.float64, generator=generator)
    valid = torch.rand(2, 1, 5, 6, generator=generator) > 0.2
    for loss in (pixel_loss, gradient_loss):
        assert torch.autograd.gradcheck(lambda p: loss(p, target, valid), pred.requires_grad_())


def test_against_numpy_loops_with_different_masks_per_sample():
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 3, 1, 6, 7))
    valid = rng.random((3, 1, 6, 7)) > 0.25
    pixels, gradients = [], []
    pairs = [((1, 1), (1, 0)), ((1, 1), (0, 1)), ((0, 1), (1, 0)), ((1, 1), (0, 0))]
    for k in range(3):
        pixels.append(np.mean([(pred - target)[k, 0, i, j] ** 2 for i in range(6)
                               for j in range(7) if valid[k, 0, i, j]]))
        found = []
        for i in range(5):
            for j in range(6):
                for a, b in pairs:
                    one, other = (i + a[0], j + a[1]), (i + b[0], j + b[1])
                    if valid[k, 0][one] and valid[k, 0][other]:
                        of_pred = pred[k, 0][one] - pred[k, 0][other]
                        e = abs(of_pred - (target[k, 0][one] - target[k, 0][other]))
                        found.append(0.2 * e if e <= 0.2 else e**2 / 2 + 0.02)
        gradients.append(np.mean(found))
    tensors = [torch.tensor(x) for x in (pred, target, valid)]
    np.testing.assert_allclose(pixel_loss(*tensors).numpy(), pixels, rtol=1e-12)
    np.testing.assert_allclose(gradient_loss(*tensors).numpy(), gradients, rtol=1e-12)


@pytest.mark.parametrize("loss", [pixel_loss, gradient_loss])
@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 1e30])
def test_invalid_pixels_are_invisible(loss, hidden):
    generator = torch.Generator().manual_seed(1)
    pred, target = torch.randn(2, 1, 1, 8, 9, generator=generator)
    valid = torch.rand(1, 1, 8, 9, generator=generator) > 0.3
    results = []
    for value in (0.0, hidden):
        p = torch.where(valid, pred, value).requires_grad_()
        result = loss(p, torch.where(valid, target, value), valid)
        result.sum().backward()
        assert (p.grad[~valid] == 0).all() and (p.grad[valid] != 0).any()
        results.append((result.detach(), p.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("loss", [pixel_loss, gradient_loss])
def test_an_empty_mask_gives_zero(loss):
    nothing = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    assert loss(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), nothing).tolist() == [0, 0]


def test_the_gradient_loss_does_not_see_a_shift():
    target = torch.rand(1, 1, 6, 6)
    valid = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert gradient_loss(target + 0.25, target, valid).item() < 1e-6
    assert pixel_loss(target + 0.25, target, valid).item() == pytest.approx(0.0625)


def test_a_bfloat16_prediction_is_compared_in_float32():
    target = torch.rand(1, 1, 6, 6)
    valid = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert pixel_loss(target.bfloat16(), target, valid).dtype == torch.float32
    assert gradient_loss(target.bfloat16(), target, valid).dtype == torch.float32


def test_a_map_without_two_rows_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        directional_gradients(torch.zeros(1, 1, 1, 5))
