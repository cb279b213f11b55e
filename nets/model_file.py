"""Model files: one .safetensors with everything that is needed to build and run the model.

The header (JSON, under one key of the file's metadata) holds: format (version), kind (one of
MADE_BY), config (the constructor's arguments), sources (names and sha256 of the files it was made
from), licence and, but for the teachers, selftest (nets/selftest.py). Nothing in a file depends on
time, path or host, so equal runs write equal bytes.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from storage import wrong_content, whole

FORMAT = 1
USE = {"target", "train_size", "processing_res"}  # keys of a config that are not sizes of a network
ENTRIES = {"format": int, "kind": str, "sources": list, "licence": str}  # and config
KEY = "depthmaster"
MADE_BY = dict.fromkeys(("sd2", "dinov2", "openclip", "aimv2", "sam"), "convert_sd2.py") | {
    "stage1": "train_stage1.py", "stage2": "train_stage2.py",
    "denoise": "extras.train_denoising, for evaluate.py --paradigm denoise"}
# The library writes tensors in the reverse of this order of types.
DTYPES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
          torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
          torch.float64: "F64", torch.int64: "I64"}
TARGETS = ("sqrt_disparity", "disparity", "depth")
LONGEST = (8, 8192)  # smallest and largest side of an image in training and prediction
PART = 1 << 27  # bytes to convert before a file is mapped anew
PIECE = 1 << 17  # numbers to convert and rearrange at a time, so that they stay in the cache


def save(path, tensors, header):
    """Writes {name: tensor} and the header, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One key only: the library writes several keys in random order; equal models need equal bytes.
    metadata = {KEY: json.dumps({"format": FORMAT, **header}, sort_keys=True)}
    with whole(path, lasting=True) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path, tensors, metadata):
    """Writes a .safetensors file with the library's bytes, but without a copy of all tensors.

    The library takes only contiguous tensors, and a trainer's tensors are channels last.
    """
    kinds = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-kinds.index(tensors[name].dtype), name))
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = tensors[name].detach().cpu().contiguous()
            file.write(values.flatten().view(torch.uint8).numpy().data)


def read_header(path, kinds=tuple(MADE_BY)):
    """The header of a model file. ValueError if the file is no model file or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {what_is_there(path)}: give a model file that "
                                "convert_sd2.py or a trainer wrote.")
    with open_weights(path) as file:
        metadata = file.metadata() or {}
    if KEY not in metadata:
        raise ValueError(f"{path} is not a model file of this project: convert it first "
                         f"(python convert_sd2.py {path}).")
    header = parsed(metadata[KEY], path)
    if header["format"] > FORMAT:
        raise ValueError(f"{path} has format {header['format']}, this version reads up to "
                         f"{FORMAT}: update the code.")
    if header["kind"] not in kinds:
        wanted = " or ".join(f"{kind} (from {MADE_BY[kind]})" for kind in kinds)
        raise ValueError(f"{path} holds a {header['kind']} model (from "
                         f"{MADE_BY.get(header['kind'])}), but what is needed here is {wanted}.")
    return header


@contextmanager
def open_weights(path, device="cpu"):
    """Opens a .safetensors file with its library; the tensors are mapped, not read.

    ValueError if it is another kind of file; the message says which, if known.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        what = wrong_content(path)
        raise ValueError(f"{path} {what}." if what else f"{path} is not a readable .safetensors "
                         f"file ({error}): download, copy or convert it again.") from None


def holds_networks(folder):
    """Whether a folder has the layout of diffusers; some trainers save in this layout, too."""
    return any((folder / name).is_dir() for name in ("unet", "unet_ema", "vae"))


def what_is_there(path):
    """Why there is no model file at a path, for messages."""
    if not path.is_dir():
        return "is not a file" if path.exists() else "is not there"
    inside = path / "model.safetensors"
    if holds_networks(path):
        return f"is a folder of diffusers (bring it here with python convert_sd2.py {path})"
    return f"is a folder (the model in it is {inside})" if inside.is_file() else "is a folder"


def parsed(text, path):
    """The header as a dict with all its entries. ValueError if it is damaged."""
    try:
        header = json.loads(text)
        config = header["config"]
        whole = usable(config) and all(
            isinstance(header[name], kind) for name, kind in ENTRIES.items()) and all(
            is_size(name, value) for network in networks(config)
            for name, value in network.items() if network is not config or name not in USE)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} has a damaged header: convert or copy it again.")
    return header


def usable(config):
    """Whether the values for USE in a config are valid; a missing value is valid, too."""
    height, width = config.get("train_size", (LONGEST[0], LONGEST[0]))
    sides = (height, width, config.get("processing_res", LONGEST[0]))
    return config.get("target", TARGETS[0]) in TARGETS and all(
        type(side) is int and LONGEST[0] <= side <= LONGEST[1] for side in sides)


def is_size(name, value):
    """Whether a value is valid for this keyword of our networks' constructors."""
    if name in ("swiglu", "fourier", "native", "half_size"):
        return isinstance(value, bool)
    if name == "drop":
        return (isinstance(value, list) and len(value) <= 1000
                and all(isinstance(part, str) for part in value))
    if name in ("attention", "windowed"):
        return isinstance(value, list) and all(isinstance(part, bool) for part in value)
    if name == "scaling_factor":
        return type(value) in (int, float) and 0 < value < math.inf
    listed = {"channels": (True,), "heads": (True, False)}.get(name, (False,))
    values = value if isinstance(value, list) else [value]
    limit = 256 if name in ("layers", "depth", "blocks") else 100_000  # no network has more
    return isinstance(value, list) in listed and 0 < len(values) <= 32 and all(
        type(part) is int and 0 < part <= limit for part in values)


def networks(config):
    """The constructor keywords of each network of a model: a list of dicts."""
    names = "vae", "unet", "tiny_encoder", "tiny_decoder"
    return [config[name] for name in names if isinstance(config.get(name), dict)] or [config]


def build(constructor, config, path, device="cpu", dtype=None):
    """Builds a module without initialising it and fills it from the file, strictly.

    The module is made on the meta device and the file is mapped. This avoids drawing 866 M random
    numbers and holding the weights twice. dtype None: float32.
    """
    with open_weights(path) as file:
        names = file.keys()
    least = sum(max(len(each.get("channels", ())) * each.get("layers", 1), each.get("depth", 0),
                    each.get("blocks", 0)) for each in networks(config))
    try:
        if least > len(names):  # building so many layers could take long
            raise ValueError(f"it has {len(names)} tensors")
        with torch.device("meta"):
            module = constructor(**config)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AttributeError,
            AssertionError) as error:
        raise ValueError(f"{path} describes a model that can't be built ({error}): convert or copy "
                         "it again.") from error
    expected = module.state_dict()
    if set(names) != set(expected):
        odd = sorted(set(names) ^ set(expected))
        raise ValueError(f"{path} does not fit the model that its header describes: "
                         f"{len(odd)} tensors are missing or unknown, {odd[0]} first.")
    tensors = read_tensors(path, names, device, dtype or torch.float32)
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, but the model needs "
                             f"{tuple(expected[name].shape)}.")
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def read_tensors(path, names, device, dtype):
    """{name: tensor} of a file on a device and in a dtype; tensors of that dtype stay mapped.

    Pages read from a map count as the process's memory until the map is closed, so the file is
    mapped anew every PART bytes. ValueError if another file replaced it meanwhile.
    """
    tensors, names = {}, list(reversed(names))
    with open(path, "rb") as first:
        while names:
            with open_weights(path, device) as file:
                if not os.path.samestat(os.fstat(first.fileno()), os.stat(path)):
                    raise ValueError(f"{path} was replaced while it was read: open it again.")
                bytes_read = 0
                while names and bytes_read < PART:
                    name = names.pop()
                    tensor = file.get_tensor(name)
                    if tensor.dtype != dtype:
                        bytes_read += tensor.nbytes
                        tensor = converted(tensor, dtype)
                    tensors[name] = tensor
    return tensors


def converted(tensor, dtype):
    """Casts a contiguous tensor; the weights of a convolution become channels last, as used."""
    if tensor.ndim != 4:
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype, memory_format=torch.channels_last)
    # Cast first, then rearrange within the cache: numbers of half the size rearrange faster.
    count = max(PIECE // tensor.stride(0), 1) if tensor.device.type == "cpu" else len(tensor)
    for rows, place in zip(tensor.split(count), result.split(count)):
        place.copy_(rows.to(dtype))
    return result
