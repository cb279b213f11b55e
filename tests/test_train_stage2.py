"""train_stage2.py from end to end, on networks of a few thousand parameters and some pairs."""

import shutil
import sys

import pytest
import torch

import train_stage1
import train_stage2
from losses.gradient import gradient_loss, pixel_loss
from nets.depthmaster import DepthMaster
from nets.unet import UNet
from tests.fixtures.weights import relative_error
from tests.small_runs import (
    CROP,
    comes_back,
    compiled_calls,
    files,
    first_losses,
    gradient_that_adam_had,
    interrupt,
    losses_of,
    opened,
    run,
    streets,
)


def train(monkeypatch, files, out, *options):
    """Runs the script's main() with tiny settings; a later option overrides an earlier one."""
    return run(monkeypatch, train_stage2, out, "--ckpt", files / "stage1.safetensors",
               "--data", files / "pairs", *options)


def batch_of(count=2, height=32, width=48):
    generator = torch.Generator().manual_seed(0)
    return dict(image=torch.randint(256, (count, 3, height, width), dtype=torch.uint8,
                                    generator=generator),
                target=torch.rand(count, 1, height, width, generator=generator) * 2 - 1,
                valid=torch.rand(count, 1, height, width, generator=generator) > 0.1)


def test_auto_asks_what_the_largest_size_needs(files, streets, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_stage2.Stage2, "activation_bytes",
                        lambda self, samples, size, dtype: asked.append(tuple(size)) or 0)
    train(monkeypatch, files, tmp_path / "pairs", "--steps", 1)
    train(monkeypatch, files, tmp_path / "both", "--steps", 1, "--size", 16, 24, "--vkitti",
          streets, "--vkitti-crop", *CROP)
    assert asked == [(32, 48), CROP]


def test_a_run_leaves_what_it_promises(files, tmp_path, monkeypatch):
    rows = train(monkeypatch, files, tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert set(row) == {"step", "loss", "pixel", "gradient", "lr", "samples_per_second",
                            "gradient_norm"}
        assert row["loss"] == pytest.approx(row["pixel"] + 0.001 * row["gradient"], rel=1e-6)
    assert [row["step"] for row in rows if "validation" in row] == [2, 4]
    assert (tmp_path / "pictures" / "000004.png").exists()
    model = DepthMaster.from_file(tmp_path / "model.safetensors")
    assert model.kind == "stage2" and model.config["unet"]["fourier"]
    before = DepthMaster.from_file(files / "stage1.safetensors").state_dict()
    after = model.state_dict()
    new = {name for name in after if name not in before}
    assert new == {name for name in after if name.startswith("unet.fourier.")} and len(new) == 16
    assert not torch.equal(after["unet.conv_in.weight"], before["unet.conv_in.weight"])
    for name, weight in before.items():
        if name.startswith("vae."):
            assert torch.equal(after[name], weight), f"{name} should be frozen"


def test_a_lost_model_file_comes_back(files, tmp_path, monkeypatch):
    assert comes_back(lambda: train(monkeypatch, files, tmp_path), tmp_path / "model.safetensors")


def test_the_loss_falls(files, tmp_path, monkeypatch):
    rows = train(monkeypatch, files, tmp_path, "--steps", 60, "--lr", 3e-3, "--log-every", 10,
                 "--validate-every", 99)
    losses = losses_of(rows)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("interrupted", [2, 3])
def test_a_resumed_run_is_the_same_to_the_bit(files, tmp_path, monkeypatch, interrupted):
    train(monkeypatch, files, tmp_path / "whole")
    revive = interrupt(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, files, tmp_path / "cut")
    revive()
    rows = train(monkeypatch, files, tmp_path / "cut")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_the_micro_batch_does_not_change_the_result(files, tmp_path, monkeypatch):
    one = train(monkeypatch, files, tmp_path / "1", "--micro-batch", 1)
    four = train(monkeypatch, files, tmp_path / "4", "--micro-batch", 4, "--workers", 2)
    assert losses_of(one) == pytest.approx(losses_of(four), rel=1e-4)


def test_the_objective_against_its_parts(files):
    """`Stage2` is what the paper says, put together here by hand."""
    model = DepthMaster.from_file(files / "stage1.safetensors")
    model.add_fourier()
    batch = batch_of(height=35, width=50)  # no multiples of 8: the map is 32x48
    losses = train_stage2.Stage2(model)(batch)
    z, _ = model.unet(model.vae.encode(batch["image"] / 127.5 - 1))
    pred = model.vae.decode(z).mean(dim=1, keepdim=True)
    target, valid = batch["target"][:, :, :32, :48], batch["valid"][:, :, :32, :48]
    torch.testing.assert_close(losses["pixel"], pixel_loss(pred, target, valid))
    torch.testing.assert_close(losses["gradient"], gradient_loss(pred, target, valid))


def test_predictions_beyond_the_range_still_have_a_gradient(files):
    """The decoded map is not clipped in training."""
    model = DepthMaster.from_file(files / "stage1.safetensors")
    torch.nn.init.constant_(model.vae.decoder.conv_out.bias, 5.0)
    train_stage2.Stage2(model)(batch_of())["pixel"].sum().backward()
    assert model.unet.conv_out.weight.grad.abs().max() > 0


def test_the_unet_and_its_block_get_gradients_with_and_without_recomputing(files):
    gradients = {}
    for recompute in (False, True):
        model = DepthMaster.from_file(files / "stage1.safetensors")
        torch.manual_seed(3)
        model.add_fourier()
        model.unet.checkpoint_activations = model.vae.decoder.checkpoint_activations = recompute
        losses = train_stage2.Stage2(model)(batch_of())
        sum(loss.sum() for loss in losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("unet."), name
        gradients[recompute] = torch.cat([p.grad.flatten() for p in model.unet.parameters()])
    assert relative_error(gradients[True], gradients[False]) < 1e-6


def test_recomputing_keeps_less(files):
    """Bytes that autograd keeps between the passes."""
    kept = {}
    for recompute in (False, True):
        model = DepthMaster.from_file(files / "stage1.safetensors")
        model.add_fourier()
        model.unet.checkpoint_activations = model.vae.decoder.checkpoint_activations = recompute
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train_stage2.Stage2(model)(batch_of())
        kept[recompute] = sum(sizes.values())
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("options, block, weights", [
    (["--fourier", "off"], False, (1, 0.001)),
    (["--gradient-weight", 0], True, (1, 0)),
    (["--pixel-weight", 0.5, "--gradient-weight", 2], True, (0.5, 2)),
    (["--fourier-init", "identity", "--precision", "bfloat16"], True, (1, 0.001)),
    (["--checkpoint-activations", "--size", 24, 40], True, (1, 0.001)),
])
def test_the_ablations_run(files, tmp_path, monkeypatch, options, block, weights):
    rows = train(monkeypatch, files, tmp_path, "--steps", 2, *options)
    expected = weights[0] * rows[0]["pixel"] + weights[1] * rows[0]["gradient"]
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-6)
    model = DepthMaster.from_file(tmp_path / "model.safetensors")
    assert (model.unet.fourier is not None) == block and model.kind == "stage2"


def by_hand(files, fourier_init="default", seed=0, dtype=torch.float32, **data):
    """The loss of the first step of a run with these options."""
    torch.manual_seed(seed)
    model = DepthMaster.from_file(files / "stage1.safetensors")
    model.add_fourier(fourier_init)
    means = first_losses(train_stage2.Stage2(model), files / "pairs", seed=seed, dtype=dtype,
                         **data)
    return means["pixel"] + 0.001 * means["gradient"]


@pytest.mark.parametrize("options, expected", [
    (["--fourier-init", "identity"], dict(fourier_init="identity")),
    (["--rgb-resize", "antialias"], dict(rgb_resize="antialias")),
    (["--precision", "bfloat16"], dict(dtype=torch.bfloat16)),
    (["--size", 24, 40], dict(size=(24, 40))),
    (["--seed", 8], dict(seed=8)),
])
def test_options_decide_the_loss(files, tmp_path, monkeypatch, options, expected):
    rows = train(monkeypatch, files, tmp_path, "--steps", 1, "--micro-batch", 1, *options)
    loss = by_hand(files, **expected)
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert abs(loss / by_hand(files) - 1) > 1e-5


def test_the_mix_with_virtual_kitti(files, streets, tmp_path, monkeypatch):
    """With this seed the second of the four samples is a street."""
    options = ["--vkitti", streets, "--vkitti-crop", *CROP, "--seed", 8, "--steps", 1]
    rows = train(monkeypatch, files, tmp_path, *options)
    loss = by_hand(files, vkitti=streets, crop=CROP, seed=8)
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_gradients_are_clipped(files, tmp_path, monkeypatch):
    for out, options in (("plain", []), ("clipped", ["--clip-gradient", 0.01])):
        [row, _] = train(monkeypatch, files, tmp_path / out, "--steps", 1, *options)
        norm = row["gradient_norm"] if out == "plain" else 0.01
        assert row["gradient_norm"] > 0.1
        assert gradient_that_adam_had(tmp_path / out) == pytest.approx(norm, rel=1e-3)


def test_options_reach_the_readers_and_the_validation(files, streets, tmp_path, monkeypatch):
    samples, held_out, images, dtype = opened(monkeypatch, train_stage2, lambda: train(
        monkeypatch, files, tmp_path / "pairs", "--steps", 1, "--depth-scale", 256,
        "--validate-images", 7, "--precision", "bfloat16"))
    assert [reader.depth_scale for reader in (*samples.sources, held_out)] == [256, 256]
    assert (images, dtype) == (7, torch.bfloat16)
    samples, held_out, *_ = opened(monkeypatch, train_stage2, lambda: run(
        monkeypatch, train_stage2, tmp_path / "streets", "--ckpt", files / "stage1.safetensors",
        "--vkitti", streets, "--vkitti-crop", *CROP, "--steps", 1))
    assert [reader.crop for reader in (*samples.sources, held_out)] == [CROP, CROP]


@pytest.mark.parametrize("options, calls", [([], 0), (["--compile"], 4)])
def test_only_the_unet_is_compiled(files, tmp_path, monkeypatch, options, calls):
    """In training: two micro-batches, and in validation: two images."""
    found = compiled_calls(monkeypatch, lambda: train(
        monkeypatch, files, tmp_path, "--steps", 1, *options))
    assert [type(module) for module in found] == [UNet] * calls


def test_the_block_takes_the_middle_features_place(files):
    """With a block that only passes through, the U-Net is stage 1's."""
    model = DepthMaster.from_file(files / "stage1.safetensors")
    latent = torch.randn(1, 4, 4, 6)
    output, feature = model.unet(latent)
    model.add_fourier("identity")
    assert not torch.allclose(model.unet(latent)[0], output)
    assert torch.equal(model.unet(latent)[1], feature)  # the feature is that before the block
    model.unet.fourier.norm = torch.nn.Identity()
    torch.testing.assert_close(model.unet(latent)[0], output)


def test_both_stages_one_after_the_other(files, tmp_path, monkeypatch, capsys):
    run(monkeypatch, train_stage1, tmp_path / "stage1", "--sd2", files / "sd2.safetensors",
        "--align-weight", 0, "--data", files / "pairs", "--target", "disparity", "--size", 24, 40)
    train(monkeypatch, files, tmp_path / "stage2", "--ckpt", tmp_path / "stage1/model.safetensors")
    model = DepthMaster.from_file(tmp_path / "stage2" / "model.safetensors")
    assert (model.target, model.train_size) == ("disparity", (24, 40))
    assert "one stage" not in capsys.readouterr().err
    train(monkeypatch, files, tmp_path / "more", "--ckpt", tmp_path / "stage2/model.safetensors")


def test_one_stage_from_sd2_is_said(files, tmp_path, monkeypatch, capsys):
    train(monkeypatch, files, tmp_path, "--ckpt", files / "sd2.safetensors", "--steps", 1)
    assert "training in one stage" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    (["--data", "/nowhere"], "/nowhere is not a folder"),
    (["--ckpt", "dinov2.safetensors"], "holds a dinov2 model"),
    (["--ckpt", "none.safetensors"], "none.safetensors is not there"),
    (["--out", "sd2.safetensors"], "--out .*sd2.safetensors is a file: give a folder."),
])
def test_mistakes_are_told(files, tmp_path, monkeypatch, options, words):
    options = [files / word if word.endswith("tensors") else word for word in options]
    with pytest.raises((ValueError, OSError), match=words):
        train(monkeypatch, files, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("option", ["--size", "--vkitti-crop"])
def test_a_side_that_no_model_may_have_is_a_wrong_option(files, tmp_path, monkeypatch, option,
                                                         capsys):
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, files, tmp_path, option, 16, 9000)
    assert stopped.value.code == 2
    assert f"{option}: must be a whole number from 8 to 8192" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pixel-weight", "--gradient-weight"])
def test_a_weight_below_zero_is_a_wrong_option(files, tmp_path, monkeypatch, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(monkeypatch, files, tmp_path, option, -1)
    assert stopped.value.code == 2
    assert "must be a number, 0 or above" in capsys.readouterr().err


def test_preflight_looks_and_trains_nothing(files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    options = ["--preflight", "--data", tmp_path / "pairs"]
    words = ["train_stage2.py", "--ckpt", files / "stage1.safetensors", "--out", tmp_path / "run",
             "--workers", 0, "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    train_stage2.main()
    assert "6 samples, 0 bad" in capsys.readouterr().out
    (tmp_path / "pairs/val/depth/1.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="1 samples can't be used"):
        train_stage2.main()
    assert "1.npy can't be read" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_block_is_not_dropped(files, tmp_path, monkeypatch):
    train(monkeypatch, files, tmp_path / "with", "--steps", 1)
    with pytest.raises(ValueError, match="has a Fourier block already"):
        train(monkeypatch, files, tmp_path / "without", "--fourier", "off", "--ckpt",
              tmp_path / "with" / "model.safetensors")


def test_real_data_without_stage_1_says_the_way_out(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train_stage2.py", "--data", str(files / "pairs"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(FileNotFoundError, match="run train_stage1.py first"):
        train_stage2.main()
    (tmp_path / "runs/stage1").mkdir(parents=True)
    shutil.copy(files / "stage1.safetensors", tmp_path / "runs/stage1/model.safetensors")
    with pytest.raises(ValueError, match="is a small model, .* give --ckpt runs/stage1"):
        train_stage2.main()
