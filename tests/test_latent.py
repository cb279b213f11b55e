"""losses/latent.py: masks of latent cells, and the mean of each sample over its own cells."""

import numpy as np
import torch

from losses.latent import latent_loss, valid_cells


def test_a_cell_is_valid_only_if_all_its_pixels_are():
    valid = torch.ones(1, 1, 16, 24, dtype=torch.bool)
    valid[0, 0, 9, 17] = False  # one pixel of cell (1, 2)
    expected = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.equal(valid_cells(valid)[0, 0], expected)


def test_pixels_beyond_the_last_whole_cell_are_ignored():
    valid = torch.ones(1, 1, 20, 13, dtype=torch.bool)
    valid[:, :, 16:] = False
    valid[:, :, :, 8:] = False
    assert valid_cells(valid).shape == (1, 1, 2, 1)
    assert valid_cells(valid).all()


def test_against_numpy_with_different_masks_per_sample():
    rng = np.random.default_rng(0)
    z, target = rng.normal(size=(2, 3, 4, 5, 6))
    pixels = rng.random((3, 1, 40, 48)) > 0.01
    expected = []
    for sample in range(3):
        total, count = 0.0, 0
        for row in range(5):
            for column in range(6):
                block = pixels[sample, 0, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
                if block.all():
                    total += ((z - target)[sample, :, row, column] ** 2).mean()
                    count += 1
        assert 0 < count < 30
        expected.append(total / count)
    loss = latent_loss(torch.tensor(z), torch.tensor(target), torch.tensor(pixels))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6)


def test_invalid_cells_are_invisible_even_if_not_finite():
    z = torch.zeros(1, 4, 2, 2, requires_grad=True)
    target = torch.ones(1, 4, 2, 2)
    target[:, :, 1, 1] = float("nan")
    valid = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    valid[:, :, 8:, 8:] = False
    loss = latent_loss(z, target, valid)
    loss.sum().backward()
    assert loss.item() == 1.0
    assert z.grad.isfinite().all() and (z.grad[:, :, 1, 1] == 0).all()


def test_an_empty_mask_gives_zero():
    valid = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    assert latent_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), valid).item() == 0.0
