"""Model files: one .safetensors with everything that is needed to build and run the model.

The header (JSON, under one key of the file's metadata) holds: format (version), kind (`sd2`,
`stage1`, `stage2` or `dinov2`), config (the constructor's arguments), sources (names and sha256 of
the files it was made from) and licence. Nothing in a file depends on time, path or host, so equal
runs write equal bytes.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from storage import stand_in, whole

FORMAT = 1
USE = {"target", "train_size", "processing_res"}  # of a config: what is no network's size
ENTRIES = {"format": int, "kind": str, "sources": list, "licence": str}  # and config
KEY = "depthmaster"
MADE_BY = {"sd2": "convert_sd2.py", "dinov2": "convert_sd2.py", "stage1": "train_stage1.py",
           "stage2": "train_stage2.py"}
# In the order in which the library writes them, last to first.
DTYPES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
          torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
          torch.float64: "F64", torch.int64: "I64"}
TARGETS = ("sqrt_disparity", "disparity", "depth")
LONGEST = (8, 8192)  # sides that an image may have in training and prediction
PART = 1 << 27  # bytes that are converted before a file is mapped anew
PIECE = 1 << 17  # numbers that are converted and rearranged while they are in the cache


def save(path, tensors, header):
    """Writes {name: tensor} and the header, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One key: the library writes several in random order, and equal models must be equal bytes.
    metadata = {KEY: json.dumps({"format": FORMAT, **header}, sort_keys=True)}
    with whole(path, lasting=True) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path, tensors, metadata):
    """A .safetensors file, byte for byte the library's, which would need a copy of all tensors.

    (It takes contiguous ones only, and a trainer's are channels last.)
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
    """The header of a model file. ValueError if it is no such file or of another kind."""
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
        raise ValueError(f"{path} holds a {header['kind']} model, but what is needed here is "
                         f"{wanted}.")
    return header


@contextmanager
def open_weights(path, device="cpu"):
    """A .safetensors file, opened by its library: what it holds is mapped, not read.

    ValueError that says what the file is if it is none.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        what = stand_in(path)
        raise ValueError(f"{path} {what}." if what else f"{path} is not a readable .safetensors "
                         f"file ({error}): download, copy or convert it again.") from None


def holds_networks(folder):
    """Whether it is a folder of diffusers, or of a trainer that saves as it does."""
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
    """Whether what a model's file says of its use, where it says it, is what users of it expect."""
    height, width = config.get("train_size", (LONGEST[0], LONGEST[0]))
    sides = (height, width, config.get("processing_res", LONGEST[0]))
    return config.get("target", TARGETS[0]) in TARGETS and all(
        type(side) is int and LONGEST[0] <= side <= LONGEST[1] for side in sides)


def is_size(name, value):
    """Whether a value can be that of one of our constructors' keywords."""
    if name in ("swiglu", "fourier"):
        return isinstance(value, bool)
    if name == "attention":
        return isinstance(value, list) and all(isinstance(part, bool) for part in value)
    if name == "scaling_factor":
        return type(value) in (int, float) and 0 < value < math.inf
    listed = {"channels": (True,), "heads": (True, False)}.get(name, (False,))
    values = value if isinstance(value, list) else [value]
    limit = 256 if name in ("layers", "depth") else 100_000  # what a network could have
    return isinstance(value, list) in listed and 0 < len(values) <= 32 and all(
        type(part) is int and 0 < part <= limit for part in values)


def networks(config):
    """The sizes of each network of a model, dicts."""
    return [config[name] for name in ("vae", "unet") if name in config] or [config]


def build(constructor, config, path, device="cpu", dtype=None):
    """Builds a module without initialising it and fills it from the file, strictly.

    The module is made on the meta device and the file is mapped, so that neither 866 M random
    numbers are drawn nor the weights held twice. dtype None: float32.
    """
    with open_weights(path) as file:
        names = file.keys()
    least = sum(max(len(each.get("channels", ())) * each.get("layers", 1), each.get("depth", 0))
                for each in networks(config))
    try:
        if least > len(names):  # building it could take long
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
    """{name: tensor} of a file, on a device and in a type; without conversion, they stay mapped.

    What was read of a mapped file counts as memory until the map is gone, so it is opened again
    every PART bytes. ValueError if another file has taken its place meanwhile.
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
    """A contiguous tensor in another type; a convolution's weights channels last, as used."""
    if tensor.ndim != 4:
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype, memory_format=torch.channels_last)
    # In two steps, the second within the cache: numbers of half the size are faster to rearrange.
    count = max(PIECE // tensor.stride(0), 1) if tensor.device.type == "cpu" else len(tensor)
    for rows, place in zip(tensor.split(count), result.split(count)):
        place.copy_(rows.to(dtype))
    return result
