"""Opens TAESD, the tiny autoencoder of Stable Diffusion 1 and 2, in its two layouts.

Its author's (github.com/madebyollin/taesd: taesd_encoder and taesd_decoder, .pth or .safetensors)
and that of diffusers (a folder of an AutoencoderTiny). The networks: nets/tiny.py.
"""

import re
from pathlib import Path

import torch

from nets.official.layouts import count
from nets.official.read import (
    ENDINGS, files_of, find_weights, read_settings, read_tensors, weights_file)
from nets.official.source import Part, fit
from nets.tiny import TinyDecoder, TinyEncoder

LICENCE = "MIT (TAESD)"
DIFFUSERS, AUTHOR = "diffusion_pytorch_model", ("taesd_encoder", "taesd_decoder")
# config.json of an AutoencoderTiny: our keywords -> its names; values that are fixed here.
SETTINGS = {"image_channels": "in_channels", "latent_channels": "latent_channels"}
FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2,
         "latent_magnitude": 3, "latent_shift": 0.5, "scaling_factor": 1.0, "shift_factor": 0.0}


def encoder_sizes(shapes):
    width, image_channels = shapes["0.weight"][:2]
    layers = count("#", shapes)  # two, three times a halving and `blocks`, and one
    return dict(width=width, image_channels=image_channels, blocks=(layers - 3) // 3 - 1,
                latent_channels=shapes[f"{layers - 1}.weight"][0])


def decoder_sizes(shapes):
    width, latent_channels = shapes["0.weight"][:2]
    layers = count("#", shapes)  # two, three times `blocks` and an enlarging of two, and two
    return dict(width=width, latent_channels=latent_channels, blocks=(layers - 4) // 3 - 2,
                image_channels=shapes[f"{layers - 1}.weight"][0])


HALVES = {"encoder": (TinyEncoder, encoder_sizes), "decoder": (TinyDecoder, decoder_sizes)}


def open_tiny(path, dtype=torch.float32):
    """({"tiny_encoder", "tiny_decoder": (network, its keywords)}, {name: path} of its files).

    path: a folder of either layout, or a file; one of the author's files holds one half.
    FileNotFoundError or ValueError if it holds none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: give the folder or a file of TAESD.")
    files = [path]
    if path.is_dir() and find_weights(path, DIFFUSERS):
        files = [weights_file(path, DIFFUSERS)]
    elif path.is_dir():
        files = [file for name in AUTHOR for ending in ENDINGS
                 if (file := path / f"{name}{ending}").is_file()]
    found, names = {}, {}
    for file in files:
        names |= {each.name: each for each in files_of(file)}
        for half, part in parts_of(file).items():
            sizes, tensors = fit(part, dtype)
            with torch.device("meta"):
                network = HALVES[half][0](**sizes)
            network.load_state_dict(tensors, assign=True)
            found.setdefault(f"tiny_{half}", (network, sizes))
    if not found:
        raise ValueError(f"{path} holds no tiny autoencoder: give the folder of an AutoencoderTiny "
                         "of diffusers, or TAESD's taesd_encoder and taesd_decoder.")
    return found, names


def parts_of(file):
    """{"encoder", "decoder": Part} of a file."""
    tensors, parts = read_tensors(file), {}
    numbered = [name for name in tensors if re.match(r"\d+\.", name)]
    if numbered:  # the author's; his decoder counts its clamping as layer 0
        half = "encoder" if "0.weight" in tensors else "decoder"
        if half == "decoder":
            tensors = {re.sub(r"^\d+", lambda number: str(int(number[0]) - 1), name): tensor
                       for name, tensor in tensors.items()}
        found, prefix, settings = {half: tensors}, "", {}
    else:
        prefix, settings = "{}.layers.", read_settings(file)
        found = {half: mine for half in HALVES if (mine := {
            name: tensor for name, tensor in tensors.items() if name.startswith(f"{half}.")})}
    for half, mine in found.items():
        constructor, measure = HALVES[half]
        prefix_here = prefix.format(half)
        layout = [(f"{prefix_here}#", "#"), (f"{prefix_here}#.conv.#", "#.conv.#")]
        parts[half] = Part(half, file.name, mine, settings,
                           (layout, (SETTINGS, FIXED, measure), constructor))
    return parts
