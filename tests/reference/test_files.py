"""Files that diffusers and transformers wrote are converted; what is exported, they load."""

import shutil

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import convert_sd2  # noqa: E402
from nets.depthmaster import DepthMaster  # noqa: E402
from tests.fixtures.make_fixtures import (  # noqa: E402
    TEXT, UNET, UNET_THREE_LEVELS, VAE, VAE_THREE_LEVELS)
from tests.fixtures.fourier_in_numpy import enhance  # noqa: E402
from tests.fixtures.sources import fourier_tensors  # noqa: E402
from tests.fixtures.weights import noise, relative_error, weights  # noqa: E402
from tests.reference.sides import predict_with_diffusers  # noqa: E402

torch.set_grad_enabled(False)
STRUCTURES = {"SD2's": (UNET, VAE), "three levels": (UNET_THREE_LEVELS, VAE_THREE_LEVELS)}


def write(folder, unet, vae, freshly_made=(), **options):
    """A folder of small networks, through the libraries' own writers.

    freshly_made: those that keep their initial weights.
    """
    torch.manual_seed(0)
    networks = {"unet": diffusers.UNet2DConditionModel.from_config(unet),
                "vae": diffusers.AutoencoderKL.from_config(vae),
                "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))}
    for name, network in networks.items():
        if name not in freshly_made:
            shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
            network.load_state_dict(weights(shapes))
        network.save_pretrained(folder / name, **(options if name != "text_encoder" else {}))
    return folder


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("height, width, processing_res", [(101, 135, 128), (90, 60, 96)])
def test_prediction_equals_diffusers(tmp_path, structure, height, width, processing_res):
    folder = write(tmp_path / "source", *STRUCTURES[structure])
    file = convert_sd2.convert(folder, tmp_path / "model.safetensors")
    image = (noise("image", (height, width, 3)) * 60 + 128).clamp(0, 255).byte().numpy()
    ours = DepthMaster.from_file(file).predict(image, processing_res)
    theirs = predict_with_diffusers(folder)(image, processing_res)
    assert theirs.std() > 0.005
    assert np.abs(ours - theirs).mean() < 1e-5


def with_block(unet, tensors):
    """diffusers' U-Net with the Fourier block, from numpy, behind its middle block."""
    arrays = {name.removeprefix("fftblock."): tensor.numpy() for name, tensor in tensors.items()}

    def enhanced(module, inputs, output):
        return torch.from_numpy(enhance(arrays, output[0].numpy())).float()[None]

    unet.mid_block.register_forward_hook(enhanced)
    return unet


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("height, width, processing_res", [(96, 128, 128), (101, 135, 135),
                                                           (150, 200, 128)])
def test_the_released_layout_equals_diffusers_and_the_block(tmp_path, structure, height, width,
                                                            processing_res):
    # What the fixtures' weights make of the middle is lost on the way up; initial ones keep it.
    folder = write(tmp_path / "plain", *STRUCTURES[structure], freshly_made=["unet", "vae"])
    block = fourier_tensors(STRUCTURES[structure][0]["block_out_channels"][-1])
    released = shutil.copytree(folder, tmp_path / "released")
    (released / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.save(unet.state_dict() | block, released / "unet" / "diffusion_pytorch_model.bin")
    file = convert_sd2.convert(released, tmp_path / "model.safetensors")
    image = (noise("image", (height, width, 3)) * 60 + 128).clamp(0, 255).byte().numpy()
    ours = DepthMaster.from_file(file).predict(image, processing_res)
    theirs = predict_with_diffusers(folder, change=lambda net: with_block(net, block))
    theirs, plain = (predict(image, processing_res)
                     for predict in (theirs, predict_with_diffusers(folder)))
    assert np.abs(theirs - plain).mean() > 1e-3  # the block counts
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("options", [dict(safe_serialization=False), dict(variant="fp16")])
def test_other_endings(tmp_path, options):
    reference = write(tmp_path / "reference", *STRUCTURES["three levels"])
    other = write(tmp_path / "other", *STRUCTURES["three levels"], **options)
    ending = ".bin" if "safe_serialization" in options else ".fp16.safetensors"
    assert (other / "unet" / f"diffusion_pytorch_model{ending}").is_file()
    models = [DepthMaster.from_file(convert_sd2.convert(folder, tmp_path / "model.safetensors"))
              for folder in (reference, other)]
    states = [model.state_dict() for model in models]
    assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_diffusers_loads_what_is_exported(tmp_path, structure):
    unet, vae = STRUCTURES[structure]
    folder = write(tmp_path / "source", unet, vae)
    file = convert_sd2.convert(folder, tmp_path / "model.safetensors")
    convert_sd2.export(file, tmp_path / "exported")
    latent = noise("latent", (1, unet.get("in_channels", 4), 13, 17))
    text = noise("text_embedding", (1, 2, 128))
    image = noise("image", (1, 3, 101, 135))
    outputs = []
    for place in (folder, tmp_path / "exported"):
        network, loading = diffusers.UNet2DConditionModel.from_pretrained(
            place / "unet", output_loading_info=True)
        coder, coding = diffusers.AutoencoderKL.from_pretrained(
            place / "vae", output_loading_info=True)
        for problems in (loading, coding):
            assert not any(problems.values())
        outputs.append((network(latent, 1, text).sample, coder.encode(image).latent_dist.mean,
                        coder.decode(latent).sample, torch.tensor(coder.config.scaling_factor)))
    for first, second in zip(*outputs):
        assert relative_error(second, first) < 1e-6
