"""nets/text.py against activations of transformers' CLIPTextModel (tests/fixtures)."""

import torch

from nets.text import EMPTY_PROMPT
from tests.fixtures.networks import small_network
from tests.fixtures.weights import relative_error


def test_equals_transformers():
    text, expected = small_network("text")
    assert EMPTY_PROMPT == (49406, 49407)
    assert relative_error(text.empty_prompt(), expected["empty"]) < 1e-5
    with torch.no_grad():
        longer = text(torch.tensor([[49406, 320, 1125, 49407]]))[0]
    assert relative_error(longer, expected["longer"]) < 1e-5


def test_is_causal():
    text, _ = small_network("text")
    with torch.no_grad():
        one, two = text(torch.tensor([[49406, 320, 7], [49406, 1125, 9]]))
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(one[1:], two[1:], atol=1e-2)
