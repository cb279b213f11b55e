"""Reads files of weights that come from elsewhere; nothing in them is ever executed.

They are mapped, not read, as far as their format allows. What is wrong with one is a ValueError
that names the file and says what to do.
"""

import json
import re
import warnings
import zipfile

import torch
from safetensors import SafetensorError, safe_open

from nets import checkpoint

PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def weights_file(folder, *stems):
    """The weights in a folder: full precision before half, .safetensors before .bin."""
    for variant in ("", ".fp16"):
        for ending in (".safetensors", ".bin"):
            for stem in stems:
                if (folder / f"{stem}{variant}{ending}").is_file():
                    return folder / f"{stem}{variant}{ending}"
    raise FileNotFoundError(f"{folder} holds no {' or '.join(stems)} (.safetensors or .bin): give "
                            "the folder of a whole model, completely downloaded.")


def read_settings(file):
    """config.json beside a file of weights; empty where there is none."""
    config = file.with_name("config.json")
    try:
        settings = json.loads(config.read_text()) if config.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not valid JSON ({error}): download it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{config} is not a table of settings: download it again.")
    return settings


def read_tensors(file):
    """{name: tensor} of a .safetensors file or a pickle of weights."""
    if file.suffix in PICKLES:
        return read_pickle(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} has none of the endings .safetensors {' '.join(PICKLES)}: unpack "
                         "it if it is an archive, else take another file.")
    try:
        with safe_open(file, framework="pt") as opened:
            ours = checkpoint.KEY in (opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable .safetensors file ({error}): download it "
                         "again.") from None
    if ours:
        raise ValueError(f"{file} is a model file of this project already: use it as it is, or "
                         "add --export diffusers.")
    return tensors


def read_pickle(file):
    """{name: tensor} of a pickle; nothing but tensors and plain containers is ever unpickled."""
    with open(file, "rb") as opened:
        mapped = zipfile.is_zipfile(opened)  # files from before torch 1.6 are none
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd protocols, of sparse tensors
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can make the library raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(f"{file} was refused: it is a pickle that wants to run code "
                             f"({code[1]}) when it is opened; take the .safetensors file or one "
                             "with nothing but weights.") from None
        raise ValueError(f"{file} is not a readable file of PyTorch weights: it is damaged or "
                         "something else, so download it again.") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
            isinstance(name, str) and plain(tensor) for name, tensor in content.items()):
        raise ValueError(f"{file} does not hold a plain table of named tensors: take the file with "
                         "the model's weights.")
    return content


def plain(tensor):
    """Whether it is a tensor with memory for each of its values; others stand for endless ones."""
    return (torch.is_tensor(tensor) and tensor.layout == torch.strided and not tensor.is_quantized
            and tensor.device.type == "cpu"
            and tensor.nbytes <= tensor.untyped_storage().nbytes())
