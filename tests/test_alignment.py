"""losses/alignment.py against closed forms and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses.alignment import FeatureAdapter, feature_alignment_loss, resize_tokens, teacher_image
from nets.dinov2 import DINOv2


def numpy_kl(adapted, target):
    """Mean over every element of softmax(target) * log(softmax(target) / softmax(adapted))."""
    p = np.exp(target - target.max(-1, keepdims=True))
    q = np.exp(adapted - adapted.max(-1, keepdims=True))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).mean(axis=(1, 2))


def test_kl_against_numpy():
    adapted, target = np.random.default_rng(0).normal(size=(2, 3, 5, 7), scale=3)
    loss = feature_alignment_loss(torch.tensor(adapted), torch.tensor(target))
    np.testing.assert_allclose(loss.numpy(), numpy_kl(adapted, target), rtol=1e-5)


def test_kl_is_a_mean_over_channels_too():
    """With D channels it is 1/D of the divergence per token: hand-computed for D = 2."""
    adapted = torch.zeros(1, 1, 2)
    target = torch.tensor([[[np.log(3.0), 0.0]]])  # softmax: 3/4, 1/4
    per_token = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert feature_alignment_loss(adapted, target).item() == pytest.approx(per_token / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["kl", "cosine"])
def test_zero_where_equal_and_positive_elsewhere(kind):
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    same = feature_alignment_loss(x, x, kind)
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-6, rtol=0)
    assert (feature_alignment_loss(x, x.flip(1), kind) > 0.01).all()


def test_cosine_hand_computed():
    adapted = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    target = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert feature_alignment_loss(adapted, target, "cosine").item() == pytest.approx(0.5)


def test_kl_moves_only_the_adapted_features():
    adapted = torch.zeros(1, 1, 4, requires_grad=True)
    target = torch.tensor([[[2.0, 0.0, 0.0, 0.0]]])
    feature_alignment_loss(adapted, target).sum().backward()
    p = F.softmax(target, dim=-1)
    torch.testing.assert_close(adapted.grad, (0.25 - p) / 4)  # d KL / d logits = q - p, over D


def test_adapter_has_the_released_keys_and_shape():
    adapter = FeatureAdapter(12, 20)
    keys = [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("bias", "weight")]
    assert sorted(adapter.state_dict()) == keys
    assert adapter(torch.randn(2, 6, 12)).shape == (2, 6, 20)


def for_dinov2(image):
    return teacher_image(image, 14, DINOv2.mean, DINOv2.std)


def test_teacher_image_size_and_colour():
    image = torch.full((1, 3, 480, 640), 1.0)
    seen = for_dinov2(image)
    assert seen.shape == (1, 3, 420, 560)  # 30 x 40 patches of 14
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(seen[0, :, 200, 300], torch.tensor(expected), atol=1e-5, rtol=0)


def test_teacher_image_of_other_sizes_has_whole_patches():
    assert for_dinov2(torch.zeros(1, 3, 352, 1216)).shape[2:] == (308, 1064)
    assert for_dinov2(torch.zeros(1, 3, 100, 130)).shape[2:] == (84, 112)
    assert for_dinov2(torch.zeros(1, 3, 9, 9)).shape[2:] == (14, 14)


def test_teacher_image_for_a_patch_of_16_keeps_its_size():
    """Statistics of mean 1/2 and deviation 1/2 give the image itself."""
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    torch.testing.assert_close(teacher_image(image, 16, (0.5,) * 3, (0.5,) * 3), image)
    assert teacher_image(image, 32, (0.5,) * 3, (0.5,) * 3).shape == (2, 3, 64, 96)


def test_tokens_are_resized_as_a_map():
    """A ramp along the columns stays a ramp along the columns."""
    ramp = torch.arange(8.0).expand(6, 8).reshape(1, 48, 1)
    out = resize_tokens(ramp, (6, 8), (3, 4)).reshape(3, 4)
    assert (out[0] - out[2]).abs().max() < 1e-5
    torch.testing.assert_close(out[1, 1:3], torch.tensor([2.5, 4.5]), atol=1e-4, rtol=0)
    assert resize_tokens(ramp, (6, 8), (6, 8)) is ramp
