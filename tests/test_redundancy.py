"""benchmarks/redundancy.py on networks of a few thousand parameters."""

import torch

from benchmarks import redundancy
from nets.depthmaster import DepthMaster
from tests.worlds import call, files


def test_groups_hold_each_block_once(files):
    model = DepthMaster.from_file(files / "stage1.safetensors")
    groups, blocks = redundancy.groups(model.unet), model.unet.blocks()
    assert all(groups[block] == [block] for block in blocks)
    whole = [block for name in groups if name not in blocks for block in groups[name]]
    assert sorted(whole) == sorted(blocks)
    assert groups["mid"] == ["mid.resnet1", "mid.attention", "mid.resnet2"]


def test_what_a_block_holds_and_does(files):
    """The work of a 3x3 convolution is 2 x 9 x C_in x C_out for a pixel."""
    model = DepthMaster.from_file(files / "stage1.safetensors")
    work, total = redundancy.work_of_blocks(model, (32, 48))
    resnet = model.unet.get_submodule("mid.resnet1")
    channels, time_width = resnet.conv1.in_channels, resnet.time.in_features
    pixels = 2 * 3  # a latent of 4x6, halved once
    assert work["mid.resnet1"] == 2 * (2 * 9 * channels**2 * pixels + time_width * channels)
    assert sum(work.values()) < total
    took, all_took = redundancy.seconds_of_blocks(model, (32, 48), 1)
    assert took.keys() == work.keys() and 0 < sum(took.values()) < all_took
    smaller = redundancy.without(model, ["mid"])
    assert model.unet.blocks() != smaller.unet.blocks()
    assert torch.equal(smaller.vae.quant_conv.weight, model.vae.quant_conv.weight)


def test_the_table_and_the_list(files, monkeypatch, capsys):
    assert call(monkeypatch, redundancy, files / "stage1.safetensors", "--data", files / "pairs",
                "--images", 2, "--runs", 1, "--save", 0.001, "--device", "cpu") == 0
    out = capsys.readouterr().out
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")][1:]
    blocks = DepthMaster.from_file(files / "stage1.safetensors").unet.blocks()
    assert [row[1].strip() for row in rows][:len(blocks)] == blocks
    assert all(len(row) == 8 for row in rows)
    assert "--drop " in out and "saves 0.0 MB" in out
