"""The sizes of an official network: from its config.json, else from its tensors' shapes.

config.json is that of diffusers or transformers. The shapes give all sizes except the number of
heads (taken as 64 channels each), of groups (32) and the latent's scaling factor (0.18215).
"""

from nets.model_file import is_size
from nets.official.layouts import count

# Our constructors' keywords -> config.json's names; the tables are read in both directions.
SETTINGS = {
    "unet": {"in_channels": "in_channels", "out_channels": "out_channels",
             "channels": "block_out_channels", "layers": "layers_per_block",
             "heads": "attention_head_dim",  # the name misleads: it is the number of heads
             "text_width": "cross_attention_dim", "groups": "norm_num_groups"},
    "vae": {"image_channels": "in_channels", "latent_channels": "latent_channels",
            "channels": "block_out_channels", "layers": "layers_per_block",
            "groups": "norm_num_groups", "scaling_factor": "scaling_factor"},
    "text": {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
             "hidden": "intermediate_size", "vocabulary": "vocab_size",
             "positions": "max_position_embeddings"},
    "dinov2": {"width": "hidden_size", "depth": "num_hidden_layers", "swiglu": "use_swiglu_ffn",
               "heads": "num_attention_heads", "patch": "patch_size"},
}
# Fixed values of the networks here: another value in config.json means another network.
FIXED = {
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
             "downsample_padding": 1, "center_input_sample": False, "mid_block_scale_factor": 1,
             "num_attention_heads": None, "resnet_time_scale_shift": "default"},
    "vae": {"act_fn": "silu"},
    "text": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "dinov2": {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "mlp_ratio": 4},
}


def sizes(net, shapes, settings, tables=None):
    """Keywords of our constructor: from config.json if present there, else from the shapes.

    shapes: {our name: shape}; settings: content of config.json, or empty; tables: those of another
    network. KeyError with the name of a missing tensor whose shape is needed, ValueError if
    config.json describes another network.
    """
    measures = {"unet": unet_sizes, "vae": vae_sizes, "text": text_sizes, "dinov2": dinov2_sizes}
    names, fixed, measure = tables or (SETTINGS[net], FIXED[net], measures[net])
    if not isinstance(settings, dict):
        raise ValueError("config.json is not a table of settings: download it again.")
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(f"config.json says {key} = {settings[key]}, but the network that is "
                             f"built here has {value}: it is another model's.")
    given = {ours: settings[theirs] for ours, theirs in names.items()
             if settings.get(theirs) is not None}
    if net == "unet" and "down_block_types" in settings:
        given["attention"] = ["CrossAttn" in kind for kind in settings["down_block_types"]]
    found = {**measure(shapes), **given}
    for name, value in found.items():
        if not is_size(name, value):
            theirs = names.get(name, name)
            raise ValueError(f"config.json says {theirs} = {value}, which can't be: download it "
                             "again." if name in given else f"{name} = {value} can't be: it is "
                             "damaged.")
    if net == "unet":
        found["heads"] = found.get("heads") or [head_count(c) for c in found["channels"]]
        if isinstance(found["heads"], int):
            found["heads"] = [found["heads"]] * len(found["channels"])
        if not len(found["channels"]) == len(found["heads"]) == len(found["attention"]):
            raise ValueError("the levels of config.json do not fit one another.")
    elif "depth" in found:
        found["heads"] = found.get("heads") or head_count(found["width"])
    if any(width % found["groups"] for width in found.get("channels", ())):
        raise ValueError(f"the widths {found['channels']} are no multiples of {found['groups']} "
                         "groups: config.json is missing beside the weights, or of another model.")
    return found


def head_count(width):
    if width % 64:
        raise ValueError(f"a width of {width} is not a multiple of 64, so that the number of heads "
                         "cannot be told: a config.json is needed beside the weights.")
    return width // 64


def unet_sizes(shapes):
    levels = range(count("down.#", shapes))
    return dict(
        in_channels=shapes["conv_in.weight"][1], out_channels=shapes["conv_out.weight"][0],
        channels=[shapes[f"down.{i}.resnets.0.conv1.weight"][0] for i in levels],
        layers=count("down.0.resnets.#", shapes),
        attention=[f"down.{i}.attentions.0.norm.weight" in shapes for i in levels],
        text_width=shapes["mid.attention.cross_attention.k.weight"][1], groups=32,
        fourier=any(name.startswith("fourier.") for name in shapes))


def vae_sizes(shapes):
    levels = range(count("encoder.down.#", shapes))
    return dict(
        image_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["post_quant_conv.weight"][1],
        channels=[shapes[f"encoder.down.{i}.resnets.0.conv1.weight"][0] for i in levels],
        layers=count("encoder.down.0.resnets.#", shapes), groups=32, scaling_factor=0.18215)


def text_sizes(shapes):
    vocabulary, width = shapes["token_embedding.weight"]
    return dict(width=width, depth=count("blocks.#", shapes), vocabulary=vocabulary,
                hidden=shapes["blocks.0.fc1.weight"][0], positions=shapes["position_embedding"][0])


def dinov2_sizes(shapes):
    return dict(width=shapes["cls_token"][-1], depth=count("blocks.#", shapes),
                swiglu="blocks.0.mlp.w12.weight" in shapes,
                patch=shapes["patch_embed.proj.weight"][-1],
                grid=round((shapes["pos_embed"][1] - 1) ** 0.5))
