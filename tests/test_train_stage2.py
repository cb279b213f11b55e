"""train_stage2.py from end to end, on networks of a few thousand parameters and some pairs."""

import shutil
import sys

import pytest
import torch

import train_stage1
import train_stage2
from losses.gradient import gradient_loss, pixel_loss
from nets.depthmaster import DepthMaster
from tests.fixtures.weights import relative_error
from tests.worlds import (
    files,
    first_losses,
    run,
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


def test_the_blocks_beginning_decides_the_loss(files, tmp_path, monkeypatch):
    losses = {}
    for init in ("default", "identity"):
        torch.manual_seed(0)
        model = DepthMaster.from_file(files / "stage1.safetensors")
        model.add_fourier(init)
        means = first_losses(train_stage2.Stage2(model), files / "pairs")
        losses[init] = means["pixel"] + 0.001 * means["gradient"]
    rows = train(monkeypatch, files, tmp_path, "--steps", 1, "--micro-batch", 1, "--fourier-init",
                 "identity")
    assert rows[0]["loss"] == pytest.approx(losses["identity"], rel=1e-6)
    assert abs(losses["identity"] / losses["default"] - 1) > 1e-5


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
    (["--ckpt", "dinov2.safetensors"], "holds a dinov2 model"),
    (["--ckpt", "none.safetensors"], "none.safetensors is not there"),
    (["--out", "sd2.safetensors"], "--out .*sd2.safetensors is a file: give a folder."),
])
def test_mistakes_are_told(files, tmp_path, monkeypatch, options, words):
    options = [files / word if word.endswith("tensors") else word for word in options]
    with pytest.raises((ValueError, OSError), match=words):
        train(monkeypatch, files, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "model.safetensors").exists()


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
