"""Writes a model as diffusers' folders, so that other programs can load it."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from nets import model_file
from nets.official import layouts
from nets.official.sizes import FIXED, SETTINGS
from nets.official.source import NETWORKS, TEXT_CONSTANT


def write_diffusers(model, folder, settings=None):
    """Writes unet/ and vae/ as diffusers loads them, and the text embedding beside them.

    settings: {relative path: content} of more JSON files.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: give the name of a new folder.")
    if dropped := model.config["unet"].get("drop"):
        raise ValueError(f"this U-Net lacks {', '.join(dropped)}, and diffusers has no such U-Net: "
                         "export the model that it was distilled from.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    header = dict(kind=model.kind, config=model.config, sources=model.sources,
                  licence=model.licence)
    with TemporaryDirectory(dir=folder.parent, suffix=".tmp") as temporary:
        new = Path(temporary, folder.name)
        write_network(new / "unet", model.unet, layouts.UNET_DIFFUSERS, unet_settings(model))
        write_network(new / "vae", model.vae, layouts.VAE_DIFFUSERS, vae_settings(model))
        model_file.save(new / TEXT_CONSTANT, {"text_embedding": model.unet.text_embedding}, header)
        for path, content in (settings or {}).items():
            (new / path).parent.mkdir(exist_ok=True)
            write_json(new / path, content)
        os.replace(new, folder)


def write_network(folder, network, layout, settings):
    folder.mkdir(parents=True)
    tensors = {layouts.their_names(name, layout)[0]: tensor
               for name, tensor in network.state_dict().items() if name != "text_embedding"}
    file = folder / "diffusion_pytorch_model.safetensors"
    model_file.write_tensors(file, tensors, metadata={"format": "pt"})
    write_json(folder / "config.json", settings)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def theirs(net, config):
    """(settings under config.json's names, our keywords with all defaults) of a network."""
    config = {**NETWORKS[net].__init__.__kwdefaults__, **config}
    return {**FIXED[net], **{name: config[ours] for ours, name in SETTINGS[net].items()}}, config


def unet_settings(model):
    settings, config = theirs("unet", model.config["unet"])
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config["attention"]]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config["attention"])]
    return {"_class_name": "UNet2DConditionModel", **settings, "down_block_types": down,
            "up_block_types": up, "use_linear_projection": True,
            "sample_size": model.processing_res // 8}


def vae_settings(model):
    settings, config = theirs("vae", model.config["vae"])
    levels = len(config["channels"])
    return {"_class_name": "AutoencoderKL", **settings, "out_channels": config["image_channels"],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels, "sample_size": model.processing_res}
