"""The tiny autoencoder at its full size against diffusers' AutoencoderTiny, from files."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from extras.tiny_files import open_tiny  # noqa: E402
from tests.fixtures.weights import noise, relative_error, weights  # noqa: E402

torch.set_grad_enabled(False)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny()
    model.load_state_dict(weights({name: tuple(tensor.shape)
                                   for name, tensor in model.state_dict().items()}))
    return model.eval()


@pytest.fixture(scope="module", params=["safetensors", "bin", "the author's, pth"])
def ours(request, theirs, tmp_path_factory):
    """(encoder, decoder) from files that the library wrote, or with the author's names."""
    folder = tmp_path_factory.mktemp("taesd")
    if "author" not in request.param:
        theirs.save_pretrained(folder, safe_serialization=request.param == "safetensors")
    else:
        for half, shift in (("encoder", 0), ("decoder", 1)):
            tensors = {}
            for name, tensor in theirs.state_dict().items():
                kind, _, number, rest = name.split(".", 3)
                if kind == half:
                    tensors[f"{int(number) + shift}.{rest}"] = tensor
            torch.save(tensors, folder / f"taesd_{half}.pth")
    found, _ = open_tiny(folder)
    assert sum(len(network.state_dict()) for network, _ in found.values()) == 134
    return [found[f"tiny_{half}"][0] for half in ("encoder", "decoder")]


@pytest.mark.parametrize("height, width", [(96, 128), (101, 135), (88, 304), (71, 64)])
def test_both_halves(theirs, ours, height, width):
    """Its sizes round up, ours down: at odd sizes it gets what ours keeps."""
    image = noise("image", (2, 3, height, width)).clamp(-1, 1)
    kept = image[:, :, :height // 8 * 8, :width // 8 * 8]
    latent = theirs.encode(kept).latents
    assert relative_error(ours[0](image), latent) < 1e-5
    assert relative_error(ours[1](latent), theirs.decode(latent).sample) < 1e-5
