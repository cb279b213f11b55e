"""Reads weight files from other projects; nothing in them is ever executed.

The files are mapped, not read, if their format allows it. A faulty file raises ValueError with the
file's name and the remedy.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path

import torch

from nets import model_file
from storage import LARGEST, check_file, compressed, first_bytes, wrong_content

ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def find_weights(folder, *stems):
    """The weights in a folder: full precision before half, .safetensors before .bin; or None.

    For weights in several files: their index (.index.json).
    """
    for variant in ("", ".fp16"):
        for ending in (".safetensors", ".bin"):
            for stem in stems:
                for name in (f"{stem}{variant}{ending}", f"{stem}{variant}{ending}.index.json",
                             f"{stem}{ending}.index{variant}.json"):
                    if (folder / name).is_file():
                        return folder / name
    return None


def weights_file(folder, *stems):
    """As `find_weights`, but FileNotFoundError if there are none."""
    if found := find_weights(folder, *stems):
        return found
    raise FileNotFoundError(f"{folder} holds no {' or '.join(stems)} (.safetensors or .bin): give "
                            "the folder of a whole model, completely downloaded, or a single "
                            "file of one.")


def read_settings(file):
    """config.json beside a file of weights; empty where there is none."""
    config = file.with_name("config.json")
    settings = read_json(config) if config.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config} is not a table of settings: download it again.")
    return settings


def read_json(file):
    """The content of a JSON file, in any of JSON's encodings; ValueError if it is not JSON."""
    try:
        check_file(file, LARGEST)
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        what = wrong_content(file) or f"is not valid JSON ({error}): download it again"
        raise ValueError(f"{file} {what}.") from None


def read_tensors(file):
    """{name: tensor} of a weight file (its content shows the format) or an index's files."""
    if file.suffix == ".json":
        return read_shards(file)
    if what := wrong_content(file):
        raise ValueError(f"{file} {what}.")
    if first_bytes(file)[8:9] != b"{":  # where the header of .safetensors begins
        return read_pickle(file)
    with model_file.open_weights(file) as opened:
        if model_file.KEY in (opened.metadata() or {}):
            raise ValueError(f"{file} is a model file of this project already: use it as it is, or "
                             "add --export diffusers.")
        return {name: opened.get_tensor(name) for name in opened.keys()}


def shards(index):
    """{file name: names of its tensors} of an index; ValueError if it is damaged."""
    content = read_json(index)
    try:
        table = content["weight_map"]
        if not table or not all(name == Path(name).name and Path(name).suffix in ENDINGS
                                for name in table.values()):
            raise ValueError("it names no files of weights beside it")
        found = {name: set() for name in sorted(table.values())}
        for tensor, name in table.items():
            found[name].add(tensor)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): download it again.") from None
    return found


def files_of(file):
    """The weight file itself and, if it is an index, the files that it lists."""
    return [file, *map(file.with_name, shards(file))] if file.suffix == ".json" else [file]


def read_shards(index):
    """{name: tensor} of an index's files; each must hold exactly the tensors in its list."""
    tensors = {}
    for name, expected in shards(index).items():
        file = index.with_name(name)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, one of the files that {index.name} lists: "
                                    "download it, too.")
        found = read_tensors(file)
        odd = sorted(found.keys() ^ expected)
        if odd:
            raise ValueError(f"{file} does not hold what {index.name} says: {len(odd)} tensors are "
                             f"missing or too many, {odd[0]} first: download both again.")
        tensors |= found
    return tensors


def read_pickle(file):
    """{name: tensor} of a pickle; nothing but tensors and plain containers is ever unpickled."""
    misnamed = file.name.endswith(".safetensors")  # given a path, torch.load goes by its ending
    archive = zipfile.is_zipfile(file)  # before torch 1.6, files were no archives
    mapped = archive and not misnamed
    if archive and compressed(file):
        raise ValueError(f"{file} is compressed, which no file of PyTorch is, and could unpack to "
                         "any size: download it again, or unpack it if it is an archive.")
    try:
        with (warnings.catch_warnings(action="ignore"),  # about odd protocols, sparse tensors
              open(file, "rb") as opened):
            content = torch.load(opened if misnamed else file, map_location="cpu",
                                 weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can make the library raise anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(f"{file} was refused: it is a pickle that wants to run code "
                             f"({code[1]}) when it is opened; take the .safetensors file or one "
                             "with nothing but weights.") from None
        raise ValueError(f"{file} is not a readable file of PyTorch weights: it is damaged or "
                         "something else, so download it again (or unpack it, if it is an "
                         "archive).") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, dict) and isinstance(content.get("teacher"), dict):
        raise ValueError(f"{file} is a checkpoint of DINOv2's training (its teacher among others), "
                         "not an encoder alone: take the published file, such as "
                         "dinov2_vitg14_pretrain.pth.")
    if not isinstance(content, dict) or not all(
            isinstance(name, str) and plain(tensor) for name, tensor in content.items()):
        raise ValueError(f"{file} does not hold a plain table of named tensors: take the file with "
                         "the model's weights.")
    return content


def plain(tensor):
    """Whether it is a tensor with memory for each value; others could expand without limit."""
    return (torch.is_tensor(tensor) and tensor.layout == torch.strided and not tensor.is_quantized
            and tensor.device.type == "cpu"
            and tensor.nbytes <= tensor.untyped_storage().nbytes())
