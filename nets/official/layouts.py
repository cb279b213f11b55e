"""The names of the networks' tensors in official files, and our names for them.

A layout is a list of pairs (theirs, ours) of name patterns. `#` stands for a number; both sides
have the same numbers in the same order. A pair also covers the names with `.weight` or `.bias` at
the end. If one tensor of ours is stacked from several of theirs, theirs is a tuple. The list is
read in both directions: `our_name` recognises a file's tensors, `their_names` gives the names
for fetching or writing them.

The names of Stability AI's single files are those of github.com/Stability-AI/stablediffusion, the
others those of diffusers, transformers and github.com/facebookresearch/dinov2.
"""

import re
from functools import lru_cache


def same(names):
    """Pairs for names that are equal on both sides."""
    return [(name, name) for name in names.split()]


def under(theirs, ours, pairs):
    """The pairs, each side below its own prefix."""
    def prefixed(names):
        return f"{theirs}.{names}" if isinstance(names, str) else tuple(map(prefixed, names))
    return [(prefixed(a), f"{ours}.{b}") for a, b in pairs]


def our_name(name, layout):
    """Our name of one of their tensors, or None."""
    for theirs, ours in layout:
        for pattern in (theirs,) if isinstance(theirs, str) else theirs:
            found = match(pattern, name)
            if found is not None:
                return numbered(ours, found)
    return None


def their_names(name, layout):
    """Their names of one of our tensors, in stacking order; empty where they have none."""
    for theirs, ours in layout:
        found = match(ours, name)
        if found is not None:
            patterns = (theirs,) if isinstance(theirs, str) else theirs
            return [numbered(pattern, found) for pattern in patterns]
    return []


def count(pattern, names):
    """One more than the largest number for `#` among the names that begin with the pattern."""
    expression = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)") + r"\b")
    found = (expression.match(name) for name in names)
    return max((int(numbers[1]) + 1 for numbers in found if numbers), default=0)


def match(pattern, name):
    """The numbers and the ending (empty, .weight or .bias) of a name that fits, else None."""
    found = compiled(pattern).fullmatch(name)
    return found and [group or "" for group in found.groups()]


@lru_cache(maxsize=None)
def compiled(pattern):
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)") + r"(\.weight|\.bias)?")


def numbered(pattern, found):
    *numbers, ending = found
    return pattern.replace("#", "{}").format(*numbers) + ending


# ------------------------------------------------------------------------------- U-Net, diffusers

RESNET = [*same("norm1 conv1 norm2 conv2"), ("time_emb_proj", "time"),
          ("conv_shortcut", "shortcut")]
ATTENTION = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")]
TRANSFORMER = [
    *same("norm proj_in proj_out"),
    *under("transformer_blocks.0.attn1", "self_attention", ATTENTION),
    *under("transformer_blocks.0.attn2", "cross_attention", ATTENTION),
    ("transformer_blocks.0.ff.net.0.proj", "feed_forward.linear_in"),
    ("transformer_blocks.0.ff.net.2", "feed_forward.linear_out"),
    *[(f"transformer_blocks.0.norm{i}", f"norm{i}") for i in (1, 2, 3)],
]
UNET_DIFFUSERS = [
    *same("conv_in conv_out"),
    ("conv_norm_out", "norm_out"),
    ("time_embedding.linear_#", "time_embedding.linear#"),
    *under("down_blocks.#.resnets.#", "down.#.resnets.#", RESNET),
    *under("down_blocks.#.attentions.#", "down.#.attentions.#", TRANSFORMER),
    ("down_blocks.#.downsamplers.0.conv", "down.#.resize"),
    *under("mid_block.resnets.0", "mid.resnet1", RESNET),
    *under("mid_block.attentions.0", "mid.attention", TRANSFORMER),
    *under("mid_block.resnets.1", "mid.resnet2", RESNET),
    *under("up_blocks.#.resnets.#", "up.#.resnets.#", RESNET),
    *under("up_blocks.#.attentions.#", "up.#.attentions.#", TRANSFORMER),
    ("up_blocks.#.upsamplers.0.conv", "up.#.resize"),
    # The released DepthMaster's stage 2 block; plain Stable Diffusion has none.
    *under("fftblock", "fourier",
           same("norm conv_f1 conv_f2 conv_f4 conv_s1 conv_s2 conv_f3 fuse")),
]

# ----------------------------------------------------------------------------- U-Net, single file

RESNET_SINGLE = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time"),
                 ("out_layers.0", "norm2"), ("out_layers.3", "conv2"),
                 ("skip_connection", "shortcut")]


def unet_single(names):
    """The single file's U-Net: block numbers run across levels; the names show the levels."""
    downs = [int(i) for i in re.findall(r"input_blocks\.(\d+)\.0\.op\.weight", " ".join(names))]
    layers = min(downs, default=1) - 1
    pairs = [
        ("time_embed.0", "time_embedding.linear1"), ("time_embed.2", "time_embedding.linear2"),
        ("input_blocks.0.0", "conv_in"), ("out.0", "norm_out"), ("out.2", "conv_out"),
        *under("middle_block.0", "mid.resnet1", RESNET_SINGLE),
        *under("middle_block.1", "mid.attention", TRANSFORMER),
        *under("middle_block.2", "mid.resnet2", RESNET_SINGLE),
    ]
    for level in range(len(downs) + 1):
        first = level * (layers + 1)
        for i in range(layers):
            block = f"input_blocks.{first + 1 + i}"
            pairs += under(f"{block}.0", f"down.{level}.resnets.{i}", RESNET_SINGLE)
            pairs += under(f"{block}.1", f"down.{level}.attentions.{i}", TRANSFORMER)
        pairs.append((f"input_blocks.{first + 1 + layers}.0.op", f"down.{level}.resize"))
        for i in range(layers + 1):
            block = f"output_blocks.{first + i}"
            pairs += under(f"{block}.0", f"up.{level}.resnets.{i}", RESNET_SINGLE)
            pairs += under(f"{block}.1", f"up.{level}.attentions.{i}", TRANSFORMER)
        place = 2 if f"{block}.1.norm.weight" in names else 1  # after the attention, if any
        pairs.append((f"{block}.{place}.conv", f"up.{level}.resize"))
    return pairs


# -------------------------------------------------------------------------------------------- VAE

VAE_ATTENTION = [("group_norm", "norm"), *ATTENTION]
VAE_ATTENTION_OLD = [("group_norm", "norm"), ("query", "q"), ("key", "k"), ("value", "v"),
                     ("proj_attn", "out")]
VAE_RESNET_SINGLE = [*same("norm1 conv1 norm2 conv2"), ("nin_shortcut", "shortcut")]


def vae_diffusers(attention):
    pairs = [
        *same("quant_conv post_quant_conv"),
        *under("encoder.down_blocks.#.resnets.#", "encoder.down.#.resnets.#", RESNET),
        ("encoder.down_blocks.#.downsamplers.0.conv", "encoder.down.#.downsample"),
        *under("decoder.up_blocks.#.resnets.#", "decoder.up.#.resnets.#", RESNET),
        ("decoder.up_blocks.#.upsamplers.0.conv", "decoder.up.#.upsample"),
    ]
    for half in ("encoder", "decoder"):
        pairs += [
            *same(f"{half}.conv_in {half}.conv_out"), (f"{half}.conv_norm_out", f"{half}.norm_out"),
            *under(f"{half}.mid_block.resnets.0", f"{half}.mid.resnet1", RESNET),
            *under(f"{half}.mid_block.attentions.0", f"{half}.mid.attention", attention),
            *under(f"{half}.mid_block.resnets.1", f"{half}.mid.resnet2", RESNET),
        ]
    return pairs


def vae_single(names):
    """The single file's autoencoder: the decoder's levels are counted from the finest."""
    pairs = [
        *same("quant_conv post_quant_conv"),
        *under("encoder.down.#.block.#", "encoder.down.#.resnets.#", VAE_RESNET_SINGLE),
        ("encoder.down.#.downsample.conv", "encoder.down.#.downsample"),
    ]
    levels = count("decoder.up.#", names)
    for i in range(levels):
        theirs, ours = f"decoder.up.{levels - 1 - i}", f"decoder.up.{i}"
        pairs += under(f"{theirs}.block.#", f"{ours}.resnets.#", VAE_RESNET_SINGLE)
        pairs.append((f"{theirs}.upsample.conv", f"{ours}.upsample"))
    for half in ("encoder", "decoder"):
        pairs += [
            *same(f"{half}.conv_in {half}.conv_out {half}.norm_out"),
            *under(f"{half}.mid.block_1", f"{half}.mid.resnet1", VAE_RESNET_SINGLE),
            *under(f"{half}.mid.attn_1", f"{half}.mid.attention",
                   [*same("norm q k v"), ("proj_out", "out")]),
            *under(f"{half}.mid.block_2", f"{half}.mid.resnet2", VAE_RESNET_SINGLE),
        ]
    return pairs


VAE_DIFFUSERS = vae_diffusers(VAE_ATTENTION)

# ------------------------------------------------------------------------------------------- text

TEXT_TRANSFORMERS = [
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "position_embedding"),
    ("final_layer_norm", "norm"),
    *under("encoder.layers.#", "blocks.#", [
        ("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"),
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.qkv"),
        ("self_attn.out_proj", "attention.out"),
    ]),
]
TEXT_OPENCLIP = [
    *same("token_embedding"), ("positional_embedding", "position_embedding"), ("ln_final", "norm"),
    *under("transformer.resblocks.#", "blocks.#", [
        ("ln_1", "norm1"), ("ln_2", "norm2"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2"),
        ("attn.in_proj_weight", "attention.qkv.weight"),
        ("attn.in_proj_bias", "attention.qkv.bias"), ("attn.out_proj", "attention.out"),
    ]),
]

# ----------------------------------------------------------------------------------------- DINOv2

DINOV2_FACEBOOK = same(
    "cls_token mask_token pos_embed patch_embed.proj norm blocks.#.norm1 blocks.#.attn.qkv "
    "blocks.#.attn.proj blocks.#.ls1.gamma blocks.#.norm2 blocks.#.mlp.fc1 blocks.#.mlp.fc2 "
    "blocks.#.mlp.w12 blocks.#.mlp.w3 blocks.#.ls2.gamma")
DINOV2_TRANSFORMERS = [
    ("embeddings.cls_token", "cls_token"), ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("layernorm", "norm"),
    *under("encoder.layer.#", "blocks.#", [
        *same("norm1 norm2 mlp.fc1 mlp.fc2"),
        (("attention.attention.query", "attention.attention.key", "attention.attention.value"),
         "attn.qkv"),
        ("attention.output.dense", "attn.proj"), ("mlp.weights_in", "mlp.w12"),
        ("mlp.weights_out", "mlp.w3"), ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
    ]),
]

# --------------------------------------------------------------------------------------- choosing


def choose(net, names):
    """The layout of a network's tensors. net: `unet`, `vae`, `text` or `dinov2`."""
    if net == "unet":
        return unet_single(names) if "input_blocks.0.0.weight" in names else UNET_DIFFUSERS
    if net == "vae":
        if "encoder.mid.attn_1.q.weight" in names:
            return vae_single(names)
        old = "encoder.mid_block.attentions.0.query.weight" in names
        return vae_diffusers(VAE_ATTENTION_OLD) if old else VAE_DIFFUSERS
    if net == "text":
        return TEXT_OPENCLIP if "positional_embedding" in names else TEXT_TRANSFORMERS
    return DINOV2_FACEBOOK if "pos_embed" in names else DINOV2_TRANSFORMERS
