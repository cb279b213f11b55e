"""Small networks against diffusers' and transformers' at the sizes that occur, in float32."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from nets.official.source import NETWORKS, Part, fit  # noqa: E402
from tests.fixtures.make_fixtures import (  # noqa: E402
    TEXT, UNET, UNET_THREE_LEVELS, VAE, VAE_THREE_LEVELS, resized_positions)
from tests.fixtures.weights import noise, relative_error, weights  # noqa: E402

torch.set_grad_enabled(False)


def both(net, theirs, settings):
    """(theirs, ours): two networks with the same weights."""
    names = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    tensors = weights(names)
    theirs.load_state_dict(tensors)
    sizes, state = fit(Part(net, net, tensors, settings))
    if net == "unet":
        state["text_embedding"] = noise("text_embedding", (1, 2, sizes["text_width"]))[0]
    with torch.device("meta"):
        ours = NETWORKS[net](**sizes)
    ours.load_state_dict(state, assign=True)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("settings", [VAE, VAE_THREE_LEVELS])
@pytest.mark.parametrize("height, width", [(96, 128), (101, 135), (88, 304), (71, 64)])
def test_vae(settings, height, width):
    theirs, ours = both("vae", diffusers.AutoencoderKL.from_config(settings), settings)
    image = noise("image", (2, 3, height, width))
    mean = theirs.encode(image).latent_dist.mean
    assert relative_error(ours.moments(image)[0], mean) < 1e-5
    # In channels_last, where the library's float32 ends up, GroupNorm on the CPU loses digits (1e-4
    # from float64 in the end): so it decodes in float64 here, and ours in both. Float32's own
    # rounding is 1.1e-5 on a processor with AVX2 alone, less on others.
    latent = (mean * ours.scaling_factor).contiguous()
    expected = theirs.double().decode(latent.double() / ours.scaling_factor).sample
    assert relative_error(ours.decode(latent), expected) < 2e-5
    assert relative_error(ours.double().decode(latent.double()), expected) < 1e-10


@pytest.mark.parametrize("settings", [UNET, UNET_THREE_LEVELS])
@pytest.mark.parametrize("height, width", [(60, 80), (44, 76), (63, 47), (13, 17), (1, 3)])
def test_unet(settings, height, width):
    theirs, ours = both("unet", diffusers.UNet2DConditionModel.from_config(settings), settings)
    latent = noise("latent", (1, settings.get("in_channels", 4), height, width))
    for timestep in (1, 977):
        expected = theirs(latent, timestep, ours.text_embedding[None]).sample
        assert relative_error(ours(latent, timestep=timestep)[0], expected) < 1e-5


def test_text():
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    theirs, ours = both("text", model, TEXT)
    expected = theirs(torch.tensor([[49406, 49407]])).last_hidden_state[0]
    assert relative_error(ours.empty_prompt(), expected) < 1e-5
    tokens = torch.randint(49408, (2, 77))
    assert relative_error(ours(tokens), theirs(tokens).last_hidden_state) < 1e-5


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("rows, columns", [(37, 37), (30, 40), (22, 76), (3, 5)])
def test_dinov2(tmp_path, swiglu, rows, columns):
    """Through transformers' own writer, as its modules and its files do not share names."""
    config = transformers.Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=518, use_swiglu_ffn=swiglu)
    theirs = transformers.Dinov2Model(config).eval()
    for name, parameter in theirs.named_parameters():
        parameter.copy_(weights({name: tuple(parameter.shape)})[name])
    theirs.save_pretrained(tmp_path)
    ours = opened_dinov2(tmp_path)
    give_resized_positions(theirs, rows, columns)
    image = noise("image", (1, 3, 14 * rows, 14 * columns))
    assert relative_error(ours(image), theirs(image).last_hidden_state[:, 1:]) < 1e-5


def opened_dinov2(folder):
    """This project's network from a folder that transformers wrote."""
    import convert_sd2
    from nets.dinov2 import DINOv2
    return DINOv2.from_file(convert_sd2.convert(folder, folder / "converted.safetensors"))


def give_resized_positions(dinov2, rows, columns):
    """transformers resizes to a size, the authors by a factor: give it the authors' embeddings."""
    if (rows, columns) != (37, 37):
        resized = resized_positions(dinov2.embeddings.position_embeddings, rows, columns)
        dinov2.embeddings.interpolate_pos_encoding = lambda *unused: resized
