"""The official files of OpenCLIP, AIMv2 and SAM, for convert_sd2.py: names, sizes, licences.

Both the authors' files and those of Hugging Face; of a whole model only the image encoder is kept,
and the rest is known by name. How files are read and accounted for: nets/official/.
"""

from extras.encoders import NETWORKS
from nets.official.layouts import count, same, under
from nets.official.read import files_of, read_json, read_settings
from nets.official.source import Part, Source, stripped, without

LICENCES = {
    "openclip": "MIT (OpenCLIP and LAION's weights; others' weights: see their page)",
    "aimv2": "Apple's licence for models (apple-amlr)",
    "sam": "Apache-2.0 (SAM)",
}

# ------------------------------------------------------------------------------------------ names

OPENCLIP_AUTHORS = [
    *same("class_embedding"), ("positional_embedding", "position_embedding"),
    ("conv1", "patch_embed"), ("ln_pre", "norm_pre"), ("ln_post", "norm"),
    *under("transformer.resblocks.#", "blocks.#", [
        ("ln_1", "norm1"), ("ln_2", "norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
        ("attn.in_proj_weight", "attn.qkv.weight"), ("attn.in_proj_bias", "attn.qkv.bias"),
        ("attn.out_proj", "attn.proj"),
    ]),
]
OPENCLIP_TRANSFORMERS = [
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.position_embedding.weight", "position_embedding"),
    ("embeddings.patch_embedding", "patch_embed"),
    ("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm"),  # the first is spelt so
    *under("encoder.layers.#", "blocks.#", [
        *same("mlp.fc1 mlp.fc2"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"),
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.qkv"),
        ("self_attn.out_proj", "attn.proj"),
    ]),
]
AIMV2_AUTHORS = [
    ("preprocessor.patchifier.proj", "patch_embed"),
    ("preprocessor.patchifier.norm", "norm_patches"),
    ("preprocessor.pos_embed", "position_embedding"), ("trunk.post_trunk_norm", "norm"),
    *under("trunk.blocks.#", "blocks.#", [
        *same("attn.qkv attn.proj"), ("norm_1", "norm1"), ("norm_2", "norm2"),
        (("mlp.fc1", "mlp.fc3"), "mlp.w12"), ("mlp.fc2", "mlp.w3"),
    ]),
]
AIMV2_TRANSFORMERS = [
    ("embeddings.patch_embed", "patch_embed"), ("embeddings.rms_norm", "norm_patches"),
    ("embeddings.position_embedding.weight", "position_embedding"), ("rms_norm", "norm"),
    *under("encoder.layers.#", "blocks.#", [
        ("rms_norm1", "norm1"), ("rms_norm2", "norm2"),
        (("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attn.qkv"),
        ("attention.out_proj", "attn.proj"), (("ffn.gate_proj", "ffn.up_proj"), "mlp.w12"),
        ("ffn.down_proj", "mlp.w3"),
    ]),
]
SAM_AUTHORS = [
    *same("pos_embed"), ("patch_embed.proj", "patch_embed"),
    ("neck.0", "neck.conv1"), ("neck.1", "neck.norm1"), ("neck.2", "neck.conv2"),
    ("neck.3", "neck.norm2"),
    *under("blocks.#", "blocks.#", [
        *same("norm1 norm2 attn.qkv attn.proj attn.rel_pos_h attn.rel_pos_w"),
        ("mlp.lin1", "mlp.fc1"), ("mlp.lin2", "mlp.fc2"),
    ]),
]
SAM_TRANSFORMERS = [
    *same("pos_embed neck.conv1 neck.conv2"), ("patch_embed.projection", "patch_embed"),
    ("neck.layer_norm1", "neck.norm1"), ("neck.layer_norm2", "neck.norm2"),
    *under("layers.#", "blocks.#", [
        *same("attn.qkv attn.proj attn.rel_pos_h attn.rel_pos_w"),
        ("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("mlp.lin1", "mlp.fc1"),
        ("mlp.lin2", "mlp.fc2"),
    ]),
]
# How each file is told: (network, whose layout, the prefixes that its names may have, a name that
# no other has, the layout).
LAYOUTS = [
    ("openclip", "the authors' file", ("visual.",), "class_embedding", OPENCLIP_AUTHORS),
    ("openclip", "Hugging Face's file", ("", "vision_model."), "embeddings.class_embedding",
     OPENCLIP_TRANSFORMERS),
    ("aimv2", "the authors' file", ("", "image_encoder."), "trunk.post_trunk_norm.weight",
     AIMV2_AUTHORS),
    ("aimv2", "Hugging Face's file", ("", "vision_model.", "model."), "embeddings.rms_norm.weight",
     AIMV2_TRANSFORMERS),
    ("sam", "the authors' file", ("image_encoder.",), "neck.0.weight", SAM_AUTHORS),
    ("sam", "Hugging Face's file", ("vision_encoder.",), "neck.conv1.weight", SAM_TRANSFORMERS),
]
# Tensors of the whole models that are not needed: patterns of whole names.
EXTRAS = {
    "openclip": r"visual\.proj|transformer\..*|token_embedding\.weight|positional_embedding"
                r"|ln_final\..*|attn_mask|text\..*|text_model\..*|(text|visual)_projection(\..*)?"
                r"|logit_(scale|bias)|(vision_model\.)?embeddings\.position_ids",
    "aimv2": r"((image_encoder|vision_model|model)\.)?head\..*|text_(encoder|model)\..*"
             r"|(image|text)_projector\..*|(text|visual)_projection\..*|(log_)?logit_scale",
    "sam": r"prompt_encoder\..*|mask_decoder\..*|shared_image_embedding\..*|pixel_(mean|std)",
}

# ------------------------------------------------------------------------------------------ sizes

# As in nets/official/sizes.py.
COMMON = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
          "patch": "patch_size"}
SETTINGS = {
    "openclip": COMMON | {"hidden": "intermediate_size"},
    "aimv2": COMMON | {"hidden": "intermediate_size", "native": "is_native"},
    "sam": COMMON | {"window": "window_size", "out": "output_channels"},
}
FIXED = {
    "openclip": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "aimv2": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "qkv_bias": False, "mlp_bias": False,
              "use_bias": False},
    "sam": {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "use_abs_pos": True,
            "use_rel_pos": True},
}


def common_sizes(shapes):
    patches = shapes["patch_embed.weight"]
    return dict(width=patches[0], patch=patches[-1], depth=count("blocks.#", shapes))


def openclip_sizes(shapes):
    """The heads of the largest are wider than 64; of all others they are 64 wide (see `sizes`)."""
    found = common_sizes(shapes)
    heads = {"heads": 16} if found["width"] in (1280, 1408, 1664) else {}
    return dict(found, hidden=shapes["blocks.0.mlp.fc1.weight"][0],
                grid=round((shapes["position_embedding"][0] - 1) ** 0.5), **heads)


def aimv2_sizes(shapes):
    """Heads are 128 wide in all that are published."""
    found = common_sizes(shapes)
    table = shapes.get("position_embedding")
    return dict(found, heads=max(found["width"] // 128, 1), native=table is None,
                hidden=shapes["blocks.0.mlp.w3.weight"][1],
                **({"grid": round(table[0] ** 0.5)} if table else {}))


def sam_sizes(shapes):
    """Which blocks see windows only: the tables of distances tell their sides."""
    found, grid = common_sizes(shapes), shapes["pos_embed"][1]
    head_width = shapes["blocks.0.attn.rel_pos_h"][-1]
    sides = [(shapes[f"blocks.{i}.attn.rel_pos_h"][0] + 1) // 2
             for i in range(min(found["depth"], len(shapes)))]
    return dict(found, heads=found["width"] // max(head_width, 1), grid=grid, window=min(sides),
                windowed=[side != grid for side in sides], out=shapes["neck.conv1.weight"][0])


MEASURES = {"openclip": openclip_sizes, "aimv2": aimv2_sizes, "sam": sam_sizes}

# ---------------------------------------------------------------------------------------- opening


def open_encoder(file, tensors):
    """The image encoder in a file's tensors {name: tensor} as a Source; None if there is none.

    For `open_source`. ValueError if it is a CLIP with another activation.
    """
    found = next(((row, prefix) for row in LAYOUTS for prefix in row[2]
                  if prefix + row[3] in tensors), None)
    if found is None:
        return None
    (kind, whose, _, _, layout), prefix = found
    if kind == "openclip" and "input_resolution" in tensors:
        raise ValueError(f"{file} is OpenAI's own CLIP, whose activation is quick_gelu, and only "
                         "CLIPs with gelu fit: take one that OpenCLIP's authors trained.")
    ignored = []
    tensors = stripped(without(tensors, EXTRAS[kind], ignored), prefix, file)
    table = tensors.get("preprocessor.pos_embed")
    if table is not None and table.ndim == 3 and len(table) == 1:  # AIMv2: 1,N,D
        tensors["preprocessor.pos_embed"] = table[0]
    part = Part(kind, f"{file.name} ({prefix}*)" if prefix else file.name, tensors,
                settings_of(file, kind, whose),
                (layout, (SETTINGS[kind], FIXED[kind], MEASURES[kind]), NETWORKS[kind]))
    files = {each.name: each for each in files_of(file)}
    return Source(kind, whose, {kind: part}, files, LICENCES[kind], ignored)


def settings_of(file, kind, whose):
    """What config.json beside a file says of the image encoder; empty where there is none.

    transformers leaves out what is a default of its own: so what its CLIP lacks is quick_gelu.
    """
    whole = read_settings(file)
    settings = whole.get("vision_config", whole)
    if kind == "openclip" and not whole:
        return openclip_settings(file.with_name("open_clip_config.json"))
    defaults = {"openclip": {"hidden_act": "quick_gelu"}, "aimv2": {"is_native": False}}
    if whole and whose == "Hugging Face's file" and isinstance(settings, dict):
        settings = defaults.get(kind, {}) | settings
    return settings


def openclip_settings(config):
    """What open_clip's own settings file says, under Hugging Face's names."""
    if not config.is_file():
        return {}
    content = read_json(config)
    try:
        model, vision = content["model_cfg"], content["model_cfg"]["vision_cfg"]
        settings = {"hidden_act": "quick_gelu"} if model.get("quick_gelu") else {}
        if "head_width" in vision:
            settings["num_attention_heads"] = vision["width"] // vision["head_width"]
        return settings
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        raise ValueError(f"{config} is not a table of OpenCLIP's settings: download it "
                         "again.") from None


# ----------------------------------------------------------------------------------------- naming

MODELS = {
    "dinov2": {384: "vits", 768: "vitb", 1024: "vitl", 1536: "vitg"},
    "openclip": {768: "vitb", 1024: "vitl", 1280: "vith", 1408: "vitg", 1664: "vitbigg"},
    "aimv2": {1024: "large", 1536: "huge", 2048: "1b", 3072: "3b"},
    "sam": {768: "vitb", 1024: "vitl", 1280: "vith"},
}


USUAL = {"dinov2": 518, "openclip": 224, "aimv2": 224, "sam": 1024}  # sides of pictures


def encoder_name(source, sizes):
    """The name of a teacher's file, as openclip_vith14; with the picture's side if unusual.

    Depth-Anything-V2's encoder is named after it, although it is of the kind dinov2.
    """
    kind, patch = source.kind, sizes["patch"]
    family = "depth_anything_v2" if "Depth-Anything" in source.licence else kind
    model = MODELS[kind].get(sizes["width"], f"width{sizes['width']}_")
    side = "native" if sizes.get("native") else sizes["grid"] * patch
    return f"{family}_{model}{patch}" + (f"_{side}" if side != USUAL[kind] else "")
