"""Brings official checkpoints into this project's files, and back into diffusers' folders.

    python convert_sd2.py stable-diffusion-2          # diffusers folder -> weights/sd2.safetensors
    python convert_sd2.py v2-1_768-ema-pruned.ckpt    # the same from a single file
    python convert_sd2.py DepthMaster                 # as released -> weights/stage2.safetensors
    python convert_sd2.py dinov2_vitg14_pretrain.pth  # -> weights/dinov2_vitg14.safetensors
    python convert_sd2.py sam_vit_h_4b8939.pth        # SAM, OpenCLIP, AIMv2: other teachers
    python convert_sd2.py runs/stage2/model.safetensors --autoencoder taesd     # a tiny one, beside
    python convert_sd2.py runs/stage1/model.safetensors --export diffusers --out stage1_diffusers
    python convert_sd2.py runs/stage2/model.safetensors --export onnx --size 576 768 --out a.onnx

Every tensor of the source is accounted for; the tensors determine the kind of the source.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError

from engine import job, terminal
from engine.terminal import say, tell
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.official.export import write_diffusers
from nets.official.read import read_json
from nets.official.source import SCHEDULER, fit, open_source
from nets.text import EMPTY_PROMPT, TextEncoder
from storage import sha256

MODELS = {"sd2": "Stable Diffusion 2", "stage1": "DepthMaster, stage 1",
          "stage2": "DepthMaster, stage 2", "dinov2": "DINOv2", "openclip": "OpenCLIP",
          "aimv2": "AIMv2", "sam": "SAM", "denoise": "depth by denoising (Marigold)"}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="local file or folder, of any official layout")
    parser.add_argument("--out", type=Path, help="file to write (default: weights/NAME.safetensors "
                        "with NAME by content); with --export the folder or file to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"],
                        help="precision of what is written (default: float32)")
    parser.add_argument("--export", choices=["diffusers", "onnx", "torch"],
                        help="write a model of this project as the folders that diffusers loads, "
                        "or as a graph of a fixed --size: an ONNX file, a file of torch.export")
    parser.add_argument("--size", type=terminal.positive, nargs=2, metavar=("H", "W"),
                        help="of the pictures that a graph takes: multiples of 8")
    parser.add_argument("--autoencoder", type=Path, nargs="+", metavar="SOURCE", help="attach a "
                        "tiny one (TAESD: diffusers' folder, or its author's files) to a model")
    parser.add_argument("--without-full", action="store_true",
                        help="leave the full autoencoder out of a model that has a tiny one")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.export and (args.autoencoder or args.without_full):
        parser.error("--export takes a model as it is: first attach, then export")
    if args.export and args.out is None:
        parser.error("--export needs --out, the folder or file to write")
    if args.export in ("onnx", "torch"):
        if not args.size:
            parser.error(f"--export {args.export} needs --size H W")
        from extras.graph import export_graph
        check_out(args.out, args.source)
        tell(str(export_graph(args.source, args.export, args.size, args.out, dtype)))
    elif args.export:
        tell(str(export(args.source, args.out, dtype)))
    elif args.autoencoder or args.without_full:
        tell(str(attach(args.source, args.autoencoder or (), args.without_full, args.out, dtype)))
    else:
        tell(str(convert(args.source, args.out, dtype)))


def convert(path, out=None, dtype=torch.float32):
    """Converts a file or folder of one of MODELS; returns the path of the written file."""
    from extras.encoder_files import encoder_name, open_encoder
    source = open_source(path, open_encoder)
    report(source)
    check_out(out, *source.files.values())
    sources = [f"{name} sha256:{sha256(file)}" for name, file in source.files.items()]
    if source.kind in source.parts:  # an encoder alone
        sizes, tensors = fit(source.parts[source.kind], dtype)
        out = out or Path("weights", f"{encoder_name(source, sizes)}.safetensors")
        header = dict(kind=source.kind, config=sizes, sources=sources, licence=source.licence)
        model_file.save(out, tensors, header)
    else:
        model = assemble(source, path, dtype)
        model.sources = sources
        out = out or Path("weights", f"{model.kind}.safetensors")
        model.save(out, dtype)
    return out


def assemble(source, path, dtype):
    """Autoencoder, U-Net and the empty prompt's embedding as one model."""
    vae_sizes, vae = fit(source.parts["vae"], dtype)
    unet_sizes, unet = fit(source.parts["unet"], dtype)
    latents = 2 if source.kind == "denoise" else 1
    if unet_sizes["in_channels"] != latents * vae_sizes["latent_channels"]:
        raise ValueError(f"{path}: the U-Net takes {unet_sizes['in_channels']} channels, the "
                         f"autoencoder gives {vae_sizes['latent_channels']}: this is a variant "
                         "(inpainting, depth, upscaling); take the plain text-to-image model.")
    text, settings = text_constant(source, path)
    if text.shape[1] != unet_sizes["text_width"]:
        raise ValueError(f"{path}: the U-Net takes a text of width {unet_sizes['text_width']}, the "
                         f"text encoder gives {text.shape[1]}: they are of different models.")
    unet_sizes["text_tokens"] = text.shape[0]
    unet["text_embedding"] = text.to(dtype)
    tensors = {f"vae.{name}": tensor for name, tensor in vae.items()}
    tensors |= {f"unet.{name}": tensor for name, tensor in unet.items()}
    kind = DepthMaster
    if source.kind == "denoise":
        from extras.denoising import Denoiser as kind, schedule_of
        file = source.files[str(SCHEDULER)]
        settings["schedule"] = schedule_of(read_json(file), file)
    with torch.device("meta"):
        model = kind(vae=vae_sizes, unet=unet_sizes, **settings)
    model.load_state_dict(tensors, assign=True)
    model.kind, model.licence = source.kind, source.licence
    return model


def text_constant(source, path):
    """The empty prompt's embedding (tokens, width), and the model's other settings.

    Computed in float32 from the text encoder, or read from the file that --export wrote; this
    file also holds the exported model's settings.
    """
    if source.exported:
        config = model_file.read_header(source.exported)["config"]
        names = ("target", "train_size", "processing_res")
        try:
            with model_file.open_weights(source.exported) as file:
                text = file.get_tensor("text_embedding").float()
            settings = {name: config[name] for name in names}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{source.exported} is damaged ({error}): export the model "
                             "again.") from None
        if text.ndim != 2:
            raise ValueError(f"{source.exported} is damaged: export the model again.")
        return text, settings
    if "text" not in source.parts:
        raise ValueError(f"{path} has no text encoder, of which the empty prompt's embedding is "
                         "needed: add text_encoder/ of the same Stable Diffusion 2 to the folder, "
                         "or take a single file that has cond_stage_model.*.")
    sizes, tensors = fit(source.parts["text"])
    if sizes["vocabulary"] <= max(EMPTY_PROMPT) or sizes["positions"] < len(EMPTY_PROMPT):
        raise ValueError(f"{path}: the text encoder has {sizes['vocabulary']} words in "
                         f"{sizes['positions']} places, too few for the empty prompt: it is of "
                         "another model.")
    with torch.device("meta"):
        encoder = TextEncoder(**sizes)
    encoder.load_state_dict(tensors, assign=True)
    return encoder.empty_prompt(), {}


def export(path, folder, dtype=torch.float32):
    """Writes a model of this project as diffusers' folders; returns the path of the folder."""
    terminal.check_folder(folder.parent, f"--out {folder}:")
    if model_file.read_header(path)["kind"] == "denoise":
        from extras.denoising import Denoiser, scheduler_config
        model = Denoiser.from_file(path, dtype=dtype)
        write_diffusers(model, folder, scheduler_config(model))
    else:
        write_diffusers(DepthMaster.from_file(path, dtype=dtype, autoencoder="full"), folder)
    say("The text encoder is not part of a model: its embedding of the empty prompt, a "
        f"constant, is in {folder / 'text_embedding.safetensors'}.")
    return folder


def attach(path, sources, without_full, out=None, dtype=torch.float32):
    """Writes a model with a tiny autoencoder beside or in place of the full one; the file's path.

    sources: files or folders of the tiny one; none: the model has it.
    """
    from extras.tiny_files import LICENCE, open_tiny
    out = out or path.with_name(f"{path.stem}_tiny.safetensors")
    check_out(out, path)
    model = DepthMaster.from_file(path)
    for source in sources:
        found, files = open_tiny(source)
        for name, (network, sizes) in found.items():
            if sizes["latent_channels"] != model.unet.conv_in.in_channels:
                raise ValueError(f"{source} is of another model: its latents have "
                                 f"{sizes['latent_channels']} channels.")
            model.add_tiny(name, network, sizes)
        model.sources += [f"{name} sha256:{sha256(file)}" for name, file in files.items()]
        if LICENCE not in model.licence:
            model.licence = "; ".join(filter(None, (model.licence, LICENCE)))
    if without_full:
        if not (model.tiny_encoder and model.tiny_decoder):
            raise ValueError(f"{path} has no tiny encoder and decoder: --without-full would leave "
                             "none; add --autoencoder.")
        model.vae, model.config["vae"] = None, False
    model.save(out, dtype)
    return out


def report(source):
    """Prints the kind, parts, sizes and ignored tensors of the source."""
    what = f"An exported {source.kind} model" if source.exported else MODELS[source.kind]
    say(f"{what}: {source.layout}, {source.licence}")
    for part in source.parts.values():
        tensors = part.tensors.values()
        precisions = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        only = " (only its embedding of the empty prompt is kept)" if part.net == "text" else ""
        say(f"  {part.origin}: {len(tensors)} tensors, "
            f"{sum(tensor.numel() for tensor in tensors):,} parameters, "
            f"{' and '.join(precisions)}{only}")
    if source.ignored:
        say(f"  ignored: {len(source.ignored)} tensors that are not needed "
            f"({', '.join(source.ignored[:3])}{', ...' if source.ignored[3:] else ''})")


def check_out(out, *sources):
    """Refuses, before the work, an `out` that is the source or a folder or lies inside a file."""
    if out is None:
        return
    terminal.check_folder(out.parent, f"--out {out}:")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give the name of a file.")
    if any(out.resolve() == file.resolve() for file in sources):
        raise ValueError(f"--out {out} is the source itself: give another file.")


if __name__ == "__main__":
    job.run(main)
