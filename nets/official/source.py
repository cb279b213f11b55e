"""Opens the official files of Stable Diffusion 2, DepthMaster and DINOv2, whatever their layout.

The tensors' names tell which networks a file holds. `open_source` finds the networks in a file or
folder, `fit` brings one of them to our names and shapes and accounts for every tensor. (Reading
the files: nets/official/read.py.)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nets import model_file
from nets.depthmaster import KINDS
from nets.dinov2 import DINOv2
from nets.official import layouts
from nets.official.read import (
    ENDINGS,
    files_of,
    find_weights,
    read_settings,
    read_tensors,
    weights_file,
)
from nets.official.sizes import sizes
from nets.text import TextEncoder
from nets.unet import UNet
from nets.vae import AutoencoderKL

NETWORKS = {"unet": UNet, "vae": AutoencoderKL, "text": TextEncoder, "dinov2": DINOv2}
PARTS = {"unet", "unet_ema", "vae", "text_encoder"}  # names of the networks' folders
STEMS = ("model", "pytorch_model")  # of transformers' files
TEXT_CONSTANT = "text_embedding.safetensors"  # beside unet/ and vae/ in a folder that we wrote
ADAPTER = "dinov2_adapter.pth"  # beside or in unet/, from stage 1 of the released code
SCHEDULER = Path("scheduler", "scheduler_config.json")  # of a denoising model
ADAPTER_NAMES = {f"{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")}

# Tensors of a source that are not needed; patterns of whole names.
TEXT_EXTRAS = r"embeddings\.position_ids|text_projection(\.weight)?|logit_scale|attn_mask"
SINGLE_FILE_EXTRAS = (r"model_ema\..*|betas|alphas_cumprod(_prev)?|posterior_.*|logvar|sqrt_.*"
                      r"|log_one_minus_alphas_cumprod|lvlb_weights")
DEPTH_ANYTHING_EXTRAS = r"(depth_head|neck|head)\..*"
UNUSED = {"mask_token"}  # in DINOv2: only its pre-training used it; some files lack it
SD2_LICENCE = "CreativeML Open RAIL++-M (Stable Diffusion 2)"
DENOISE_LICENCE = f"{SD2_LICENCE}, trained on by others (such as Marigold): see their page"
DEPTHMASTER_LICENCE = f"{SD2_LICENCE}, trained on by DepthMaster's authors: see their page"

# Parts of tensor names of similar models that can't be converted -> the message to the user.
OTHER_MODELS = {
    "conditioner.": "this is Stable Diffusion XL, and only 2 and 2.1 fit",
    "cond_stage_model.transformer.": "this is Stable Diffusion 1, and only 2 and 2.1 fit",
    "register_tokens": "this is DINOv2 with registers, and only the plain one fits",
    "lora_": "this is a LoRA, not a whole model",
}


@dataclass
class Part:
    """One network of a source: its tensors under their names, without their common prefix."""

    net: str
    origin: str  # file and prefix, for messages
    tensors: dict
    settings: dict = field(default_factory=dict)  # content of config.json
    network: tuple = ()  # (layout, tables for `sizes`, constructor) of one not in NETWORKS


@dataclass
class Source:
    """The networks that `open_source` found in a file or folder."""

    kind: str  # of the model file that it becomes
    layout: str  # in words
    parts: dict  # of Part, by network
    files: dict  # path by name
    licence: str
    ignored: list = field(default_factory=list)  # names of known extras
    exported: Path | None = None  # our TEXT_CONSTANT, which stands for the text encoder


# -------------------------------------------------------------------------------------- one part


def fit(part, dtype=torch.float32):
    """Checks a part and brings it to our names: (constructor's keywords, {our name: tensor}).

    Uses every source tensor exactly once and fills every tensor of ours; otherwise ValueError with
    the names and the likely cause. ValueError also if a number is not finite in dtype.
    """
    # Their names -> ours gives the shapes, the shapes give the sizes, the sizes give our network.
    # Then each of its tensors, our name -> theirs, is fetched: ours may join several of theirs.
    layout, tables, constructor = part.network or (
        layouts.choose(part.net, part.tensors), None, NETWORKS[part.net])
    ours = {name: layouts.our_name(name, layout) for name in part.tensors}
    shapes = {ours[name]: tuple(tensor.shape) for name, tensor in part.tensors.items()
              if ours[name]}
    try:
        found = sizes(part.net, shapes, part.settings, tables)
    except KeyError as error:
        raise mismatch(part.origin, missing=layouts.their_names(error.args[0], layout)) from None
    except ValueError as error:
        raise ValueError(f"{part.origin}: {error}") from None
    try:
        with torch.device("meta"):
            expected = constructor(**found).state_dict()
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError,
            AttributeError) as error:
        raise ValueError(f"{part.origin}: its tensors or its config.json describe no network that "
                         f"can be built ({error}): download both again.") from None
    expected.pop("text_embedding", None)  # a constant of ours, filled later
    wanted = {name: layouts.their_names(name, layout) for name in expected}
    unknown = [name for name in part.tensors if ours[name] not in expected]
    missing = [name for our, names in wanted.items() if our not in UNUSED
               for name in names if name not in part.tensors]
    if unknown or missing:
        raise mismatch(part.origin, unknown, missing)
    tensors = {name: brought(part, names, expected[name].shape, dtype)
               for name, names in wanted.items() if names[0] in part.tensors}
    return found, tensors | {name: torch.zeros(expected[name].shape, dtype=dtype)
                             for name in UNUSED & wanted.keys() - tensors.keys()}


def mismatch(origin, unknown=(), missing=()):
    """The error for unknown and missing tensors."""
    def some(names):
        return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    faults = [f"{text} {some(names)}" for text, names in
              (("misses tensors:", missing), ("has tensors that do not belong to it:", unknown))
              if names]
    return ValueError(f"{origin} {' and '.join(faults)}; {likely_cause(unknown)}.")


def likely_cause(names):
    found = (cause for mark, cause in OTHER_MODELS.items() if any(mark in name for name in names))
    return next(found, "it is incomplete or of another model, so download it again or take another")


def brought(part, names, shape, dtype):
    """Stacks, reshapes, casts and checks their tensors to make one of ours."""
    tensors = [part.tensors[name] for name in names]
    try:
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    except RuntimeError:  # their widths differ; the shape check below fails then
        tensor = tensors[0]
    if without_kernel(tensor.shape) != without_kernel(shape):
        raise ValueError(f"{part.origin}: {names[0]} has shape {tuple(tensor.shape)}, but "
                         f"{tuple(shape)} is needed: it or its config.json is of another model.")
    if not tensor.is_floating_point():
        raise ValueError(f"{part.origin}: {names[0]} is {tensor.dtype}, not floating point: take "
                         "a file that is not quantised.")
    tensor = tensor.reshape(shape).to(dtype)
    if not tensor.isfinite().all():
        raise ValueError(f"{part.origin}: {names[0]} has values that are not finite in {dtype}: "
                         "download it again, or choose another --dtype.")
    return tensor


def without_kernel(shape):
    """The shape without a 1x1 kernel: some files store linear layers as 1x1 convolutions."""
    return shape[:2] if shape[2:] == (1, 1) else shape


# -------------------------------------------------------------------------------- finding the parts


def open_source(path, others=None):
    """Finds the networks in a file or folder by its tensors' names; ValueError if there is none.

    others(file, tensors): the Source of a network that is not known here, or None.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: give a local file or folder of Stable "
                                "Diffusion 2 or of an encoder.")
    is_config = path.suffix == ".json" and ".index" not in path.name
    if path.is_file() and (is_config or re.search(r"-\d+-of-\d+\.", path.name)):
        path = path.parent  # the file is a config.json or one shard: open its folder
    path = within(path)
    if model_file.holds_networks(path):
        return open_diffusers(path)
    if path.is_dir() and (is_part(path) or any(path.glob("diffusion_pytorch_model*"))):
        raise ValueError(one_of_three(path))
    file = only_file(path) or weights_file(path, *STEMS) if path.is_dir() else path
    tensors = read_tensors(file)
    if others and (found := others(file, tensors)):
        return found
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return open_single_file(file, tensors)
    if any(name.endswith(("pos_embed", "embeddings.position_embeddings")) for name in tensors):
        return open_dinov2(file, tensors)
    if is_part(path.parent) or any(
            name.startswith(("down_blocks.", "encoder.down_blocks.", "text_model.",
                             "embeddings.token_embedding.")) for name in tensors):
        raise ValueError(one_of_three(path))
    raise ValueError(f"{path} is neither Stable Diffusion 2 nor DINOv2 or another teacher (its "
                     f"first tensor: {min(tensors, default='missing')}); {likely_cause(tensors)}.")


def only_file(folder):
    """A folder's weight file: the one with transformers' name, else the only one, else None."""
    alone = [each for each in folder.glob("*") if each.suffix in ENDINGS and each.is_file()]
    return find_weights(folder, *STEMS) or (alone[0] if len(alone) == 1 else None)


def is_part(folder):
    """Whether a folder holds one network and lies in the folder of a model."""
    folder = folder.absolute()
    return folder.name in PARTS and model_file.holds_networks(folder.parent)


def within(path):
    """The model's folder inside a path: a snapshot in the hub's cache, or its only model folder.

    The path itself if it is a model or holds none; ValueError if it holds several.
    """
    def is_model(folder):
        return model_file.holds_networks(folder) or only_file(folder)
    if not path.is_dir() or is_model(path):
        return path
    inside = sorted(each for each in (path / "snapshots").glob("*") if each.is_dir())
    main = path / "refs" / "main"
    name = main.read_text(errors="replace").strip() if main.is_file() else None
    inside = [each for each in inside if each.name == name] or inside
    inside = inside or sorted(each for each in path.glob("*") if each.is_dir()
                              and each.name not in PARTS and is_model(each))
    if len(inside) > 1:
        raise ValueError(f"{path} holds {len(inside)} models: give one of them, {inside[0]} or "
                         "another.")
    return inside[0] if inside else path


def one_of_three(path):
    """The message that a file or folder is only one network of a model, with the model's folder."""
    above = [each for each in path.absolute().parents[:2] if model_file.holds_networks(each)]
    return (f"{path} is one network of three: give "
            + (f"{above[0]}, the folder above." if above else
               "the folder that holds unet/, vae/ and text_encoder/."))


def open_diffusers(folder):
    """Opens unet/, vae/ and text_encoder/ (in a folder that we wrote: the text embedding).

    If a trainer saved only the averaged weights of the U-Net (unet_ema/), opens these.
    """
    parts, files, ignored = {}, {}, []
    exported = folder / TEXT_CONSTANT
    exported = exported if exported.is_file() else None
    averaged = (folder / "unet_ema").is_dir() and not (folder / "unet").is_dir()
    unet = "unet_ema" if averaged else "unet"
    for net, name in (("unet", unet), ("vae", "vae"), ("text", "text_encoder")):
        if net == "text" and (exported or not (folder / name).is_dir()):
            continue
        stems = STEMS if net == "text" else ("diffusion_pytorch_model",)
        if net == "vae" and not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} holds {unet}/ only, as trainers save it: put vae/ "
                                    "and text_encoder/ of its Stable Diffusion 2 beside it.")
        file = weights_file(folder / name, *stems)
        origin = f"{name}/{file.name}"
        tensors = read_tensors(file)
        files |= {f"{name}/{each.name}": each for each in files_of(file)}
        if net == "text":
            tensors = without(stripped(tensors, "text_model.", file), TEXT_EXTRAS, ignored)
        parts[net] = Part(net, origin, tensors, read_settings(file))
    unet = parts["unet"].tensors
    kind = "stage2" if "fftblock.norm.weight" in unet else "sd2"
    if "conv_in.weight" in unet and unet["conv_in.weight"].shape[1] == 8:
        kind = "denoise"
        files[str(SCHEDULER)] = folder / SCHEDULER
        if not (folder / SCHEDULER).is_file():
            raise ValueError(f"{folder / SCHEDULER} is not there, which says how this model "
                             "denoises: add the folder scheduler/ of the same model.")
    adapter = next((file for file in (folder / ADAPTER, folder / "unet" / ADAPTER)
                    if file.is_file()), None)
    if adapter and kind == "sd2":
        kind, files[ADAPTER] = "stage1", adapter
        ignored += adapter_names(adapter)
    licence = {"sd2": SD2_LICENCE, "denoise": DENOISE_LICENCE}.get(kind, DEPTHMASTER_LICENCE)
    if exported:
        files[TEXT_CONSTANT] = exported
        header = model_file.read_header(exported, kinds=(*KINDS, "denoise"))
        kind, licence = header["kind"], header["licence"]
    return Source(kind, "a diffusers folder", parts, files, licence, ignored, exported)


def adapter_names(file):
    """Names of a stage 1 adapter's tensors; training needs them, prediction does not."""
    names = set(read_tensors(file))
    if names != ADAPTER_NAMES:
        raise mismatch(file.name, sorted(names - ADAPTER_NAMES), sorted(ADAPTER_NAMES - names))
    return sorted(f"{file.name}: {name}" for name in names)


def open_single_file(file, tensors):
    """All of Stable Diffusion 2 in one file, told apart by prefixes."""
    ignored, parts = [], {}
    tensors = without(tensors, SINGLE_FILE_EXTRAS, ignored)
    for net, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model."),
                        ("text", "cond_stage_model.model.")):
        names = [name for name in tensors if name.startswith(prefix)]
        found = {name.removeprefix(prefix): tensors.pop(name) for name in names}
        if net == "text":
            found = without(found, "|".join([TEXT_EXTRAS, *unused_blocks(found)]), ignored)
        if found or net != "text":
            parts[net] = Part(net, f"{file.name} ({prefix}*)", found)
    if tensors:
        raise mismatch(file.name, unknown=list(tensors))
    return Source("sd2", "a single file", parts, {file.name: file}, SD2_LICENCE, ignored)


def unused_blocks(names):
    """Patterns for the text encoder's last block, which Stable Diffusion 2 leaves out.

    Some tools leave it out of the file as well. So at SD2's width (1024) the blocks after the 23rd
    are unused; at other widths the last block is.
    """
    width = names["ln_final.weight"].numel() if "ln_final.weight" in names else 0
    blocks = min(layouts.count("transformer.resblocks.#", names), len(names))
    used = 23 if width == 1024 else blocks - 1
    return [rf"transformer\.resblocks\.{i}\..*" for i in range(max(used, 0), blocks)]


def open_dinov2(file, tensors):
    """DINOv2 as published by its authors, by Hugging Face, or inside Depth-Anything-V2.

    Depth-Anything-V2: its authors' file or that of transformers (backbone.*, neck.*, head.*).
    """
    ignored, settings = [], {}
    licence, layout = "Apache-2.0 (DINOv2)", "the authors' file"
    if any(name.endswith("embeddings.position_embeddings") for name in tensors):
        layout, settings = "Hugging Face's file", read_settings(file)
    table = next((name for name in ("pretrained.pos_embed",
                                    "backbone.embeddings.position_embeddings")
                  if name in tensors), None)
    if table:
        layout = "the encoder of Depth-Anything-V2"
        settings = settings.get("backbone_config") or {}
        small = tuple(tensors[table].shape[-1:]) <= (384,)
        tensors = stripped(without(tensors, DEPTH_ANYTHING_EXTRAS, ignored),
                           f"{table.split('.')[0]}.", file)
        licence = f"{'Apache-2.0' if small else 'CC-BY-NC-4.0'} (Depth-Anything-V2)"
    part = Part("dinov2", file.name, tensors, settings)
    files = {each.name: each for each in files_of(file)}
    return Source("dinov2", layout, {"dinov2": part}, files, licence, ignored)


def without(tensors, pattern, ignored):
    """The tensors whose names do not fit the pattern; the names that fit go to `ignored`."""
    extras = {name for name in tensors if re.fullmatch(pattern, name)}
    ignored += sorted(extras)
    return {name: tensor for name, tensor in tensors.items() if name not in extras}


def stripped(tensors, prefix, file):
    """The tensors without a prefix of their names."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError(f"{file} has tensors twice, with and without {prefix}: take another file.")
    return found
