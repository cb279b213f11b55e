"""nets/official/layouts.py on the names of all tensors of the full-size networks, both ways."""

import pytest
import torch

from nets.official import layouts
from nets.official.source import NETWORKS
from tests.fixtures.sources import SINGLE_FILE_NAMES
from tests.fixtures.weights import names_and_shapes

LISTS = [("sd2_unet_diffusers", "unet", "", 686), ("sd2_vae_diffusers", "vae", "", 248),
         ("sd2_text_transformers", "text", "text_model.", 372),
         ("dinov2_vitg_facebook", "dinov2", "", 567),
         ("dinov2_vitg_transformers", "dinov2", "", 727),
         ("sd2_single_file", "unet", "model.diffusion_model.", 686),
         ("sd2_single_file", "vae", "first_stage_model.", 248),
         ("sd2_single_file", "text", "cond_stage_model.model.", 280)]


def full_size(listing, net, prefix):
    """({official name without prefix: shape}, layout), without what is never used."""
    found = {name.removeprefix(prefix): shape for name, shape in names_and_shapes(listing).items()
             if name.startswith(prefix)}
    unused = ("transformer.resblocks.23.", "text_projection", "logit_scale")
    found = {name: shape for name, shape in found.items() if not name.startswith(unused)}
    return found, layouts.choose(net, found)


@pytest.mark.parametrize("listing, net, prefix, number", LISTS)
def test_full_size_names_both_ways(listing, net, prefix, number):
    official, layout = full_size(listing, net, prefix)
    assert len(official) == number
    with torch.device("meta"):
        ours = NETWORKS[net]().state_dict()
    ours.pop("text_embedding", None)
    assert {layouts.our_name(name, layout) for name in official} == set(ours)
    used = []
    for name, tensor in ours.items():
        theirs = layouts.their_names(name, layout)
        assert all(layouts.our_name(their, layout) == name for their in theirs)
        shapes = [official[their] for their in theirs]
        rows = sum(shape[0] for shape in shapes)
        rest = shapes[0][1:2] if tensor.ndim == 2 else shapes[0][1:]  # linear or 1x1 convolution
        assert (rows, *rest) == tuple(tensor.shape)
        used += theirs
    assert sorted(used) == sorted(official)


@pytest.mark.parametrize("net", ["unet", "vae", "text"])
def test_single_file_means_what_diffusers_takes_it_for(net):
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
              "text": "cond_stage_model.model."}[net]
    _, single = full_size("sd2_single_file", net, prefix)
    diffusers = {"unet": layouts.UNET_DIFFUSERS, "vae": layouts.VAE_DIFFUSERS,
                 "text": layouts.TEXT_TRANSFORMERS}[net]
    for name, theirs in SINGLE_FILE_NAMES[net].items():
        ours = layouts.our_name(name.removeprefix("text_model."), diffusers)
        assert layouts.our_name(theirs.removeprefix(prefix), single) == ours is not None
