"""nets/dinov2.py against activations of transformers' Dinov2Model (tests/fixtures)."""

import pytest
import torch

from nets import model_file
from nets.dinov2 import DINOv2
from tests.fixtures.networks import small_network
from tests.fixtures.weights import noise, relative_error

PARAMETERS = [  # as the authors' table has them
    (dict(width=384, depth=12, heads=6, swiglu=False), 22_056_576, 175),
    (dict(width=768, depth=12, heads=12, swiglu=False), 86_580_480, 175),
    (dict(width=1024, depth=24, heads=16, swiglu=False), 304_368_640, 343),
    (dict(), 1_136_480_768, 567),
]


@pytest.mark.parametrize("rows, columns", [(37, 37), (5, 8)])
@pytest.mark.parametrize("name", ["dinov2_gelu", "dinov2_swiglu"])
@torch.no_grad()
def test_equals_transformers(name, rows, columns):
    dinov2, expected = small_network(name)
    tokens = dinov2(noise("image", (1, 3, 14 * rows, 14 * columns)))
    assert tokens.shape == (1, rows * columns, 128)
    every = 37 if rows == 37 else 1  # not all are stored
    assert relative_error(tokens[:, ::every], expected[f"tokens_{rows}x{columns}"]) < 1e-5


@torch.no_grad()
def test_position_embeddings_resize_by_the_factor_and_not_to_the_size():
    dinov2, _ = small_network("dinov2_gelu")
    native = dinov2.pos_embed
    found = dinov2.position_embedding(30, 40)
    assert found.shape == (1, 1 + 30 * 40, 128)
    assert torch.equal(found[:, 0], native[:, 0])
    grid = native[:, 1:].reshape(1, 37, 37, 128).permute(0, 3, 1, 2)
    by_size = torch.nn.functional.interpolate(grid, size=(30, 40), mode="bicubic")
    difference = found[:, 1:] - by_size.flatten(2).transpose(1, 2)
    unit = native[:, 1:].std()
    assert 0.08 < difference.square().mean().sqrt() / unit < 0.18


@pytest.mark.parametrize("sizes, parameters, tensors", PARAMETERS)
def test_sizes_of_the_family(sizes, parameters, tensors):
    with torch.device("meta"):
        state = DINOv2(**sizes).state_dict()
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_file_round_trip(tmp_path):
    sizes = dict(width=16, depth=1, heads=2, swiglu=True, patch=4, grid=3)
    dinov2 = DINOv2(**sizes).eval()
    file = tmp_path / "dinov2.safetensors"
    header = dict(kind="dinov2", config=sizes, sources=[], licence="none")
    model_file.save(file, dinov2.state_dict(), header)
    image = noise("image", (1, 3, 8, 12))
    with torch.no_grad():
        assert torch.equal(DINOv2.from_file(file)(image), dinov2(image))
