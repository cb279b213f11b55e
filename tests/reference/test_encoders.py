"""extras/encoders.py against transformers: small networks in numbers, full-size ones in names."""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

import convert_sd2  # noqa: E402
from extras.encoder_files import open_encoder  # noqa: E402
from extras.encoders import NETWORKS  # noqa: E402
from nets.official import layouts  # noqa: E402
from tests.fixtures.encoders import CONFIG, authors_tensors, family  # noqa: E402
from tests.fixtures.weights import noise, relative_error, weights  # noqa: E402

torch.set_grad_enabled(False)
VISION = {"openclip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
          "aimv2": (transformers.Aimv2VisionModel, transformers.Aimv2VisionConfig),
          "native": (transformers.Aimv2VisionModel, transformers.Aimv2VisionConfig),
          "sam": (transformers.SamVisionModel, transformers.SamVisionConfig)}
# config.json of the models whose sizes are our constructors' defaults, as published.
FULL = {
    "openclip": dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
                     intermediate_size=5120, image_size=224, hidden_act="gelu"),
    "aimv2": dict(),  # transformers' own defaults
    "sam": dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16,
                global_attn_indexes=[7, 15, 23, 31]),
}


def both(kind, folder):
    """(theirs, ours): through transformers' own writer, on the weights of our own drawing."""
    network, config = VISION[kind]
    theirs = network(config(**CONFIG[kind])).eval()
    for name, parameter in theirs.named_parameters():
        parameter.copy_(weights({name: tuple(parameter.shape)})[name])
    theirs.save_pretrained(folder)
    file = convert_sd2.convert(folder, folder / "converted.safetensors")
    return theirs, NETWORKS[family(kind)].from_file(file)


def antialiased(table, rows, columns):
    """Position embeddings N,D as open_clip resizes them."""
    side = int(len(table) ** 0.5)
    maps = table.T.reshape(1, -1, side, side)
    maps = F.interpolate(maps, (rows, columns), mode="bicubic", antialias=True)
    return maps.flatten(2)[0].T


@pytest.mark.parametrize("rows, columns", [(4, 4), (30, 40), (3, 5), (1, 2)])
def test_openclip(tmp_path, rows, columns):
    theirs, ours = both("openclip", tmp_path)
    image = noise("image", (2, 3, 14 * rows, 14 * columns))
    table = theirs.embeddings.position_embedding.weight
    patches = table[1:] if rows == columns else antialiased(table[1:], rows, columns)
    theirs.embeddings.interpolate_pos_encoding = lambda *unused: torch.cat([table[:1], patches])
    output = theirs(image, interpolate_pos_encoding=True).last_hidden_state
    assert relative_error(ours(image), theirs.post_layernorm(output)[:, 1:]) < 1e-5


@pytest.mark.parametrize("rows, columns", [(4, 4), (30, 40), (3, 5)])
def test_aimv2(tmp_path, rows, columns):
    theirs, ours = both("aimv2", tmp_path)
    image = noise("image", (2, 3, 14 * rows, 14 * columns))
    table = theirs.embeddings.position_embedding.weight
    if rows != columns:  # transformers' network knows one size
        table = torch.nn.Parameter(antialiased(table, rows, columns))
        theirs.embeddings.position_embedding.weight = table
        theirs.embeddings.position_ids = torch.arange(rows * columns)[None]
    assert relative_error(ours(image), theirs(image).last_hidden_state) < 1e-5


@pytest.mark.parametrize("rows, columns", [(4, 4), (30, 40), (1, 7)])
def test_aimv2_for_any_size(tmp_path, rows, columns):
    theirs, ours = both("native", tmp_path)
    image = noise("image", (2, 3, 14 * rows, 14 * columns))
    assert relative_error(ours(image), theirs(image).last_hidden_state) < 1e-5


@pytest.mark.parametrize("rows, columns", [(6, 6), (30, 40), (5, 7), (2, 1)])
def test_sam(tmp_path, rows, columns):
    theirs, ours = both("sam", tmp_path)
    image = noise("image", (2, 3, 16 * rows, 16 * columns))
    inside = theirs.vision_encoder
    if rows != columns:
        table = antialiased(inside.pos_embed.flatten(0, 2), rows, columns)
        inside.pos_embed = torch.nn.Parameter(table.reshape(1, rows, columns, -1))
        inside.patch_embed.image_size = (16 * rows, 16 * columns)
    output = theirs(image).last_hidden_state.flatten(2).transpose(1, 2)  # B,N,D
    assert ours(image).shape == (2, rows * columns, 24) and ours.width == 24
    assert relative_error(ours(image), output) < 1e-5


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("kind", FULL)
def test_names_at_full_size(tmp_path, kind, authors):
    """Each of transformers' tensors is used once, and fills one of the default network's."""
    network, config = VISION[kind]
    with torch.device("meta"):
        theirs = network(config(**FULL[kind])).state_dict()
        ours = NETWORKS[kind]().state_dict()
        theirs = authors_tensors(kind, theirs) if authors else theirs
    source = open_encoder(tmp_path / "model.safetensors", theirs)
    part = source.parts[kind]
    layout, (_, _, measure), _ = part.network
    shapes = {layouts.our_name(name, layout): tuple(tensor.shape)
              for name, tensor in part.tensors.items()}
    used = []
    for name, tensor in ours.items():
        names = layouts.their_names(name, layout)
        stacked = [part.tensors[each].shape for each in names]
        assert (sum(shape[0] for shape in stacked), *stacked[0][1:]) == tuple(tensor.shape)
        used += names
    assert sorted(used) == sorted(part.tensors)
    assert len(used) + len(source.ignored) == len(theirs)
    defaults = NETWORKS[kind].__init__.__kwdefaults__
    found = measure(shapes)
    assert {name: defaults[name] for name in found if name != "windowed"} == {
        name: value for name, value in found.items() if name != "windowed"}
    if kind == "sam":
        assert [i for i, some in enumerate(found["windowed"]) if not some] == [7, 15, 23, 31]


@pytest.mark.parametrize("kind, size", [("openclip", 630_766_080), ("aimv2", 309_197_824),
                                        ("sam", 637_026_048)])
def test_size(kind, size):
    with torch.device("meta"):
        ours = NETWORKS[kind]()
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == size
