"""train_stage1.py from end to end, on networks of a few thousand parameters and some pairs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_stage1
from engine.step import Outcome
from losses.alignment import feature_alignment_loss, resize_tokens, teacher_image
from losses.latent import latent_loss
from miniature import embedded
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.inference import precision
from tests.worlds import (
    SHORT,
    files,
    first_losses,
    losses_of,
    replace_step,
    run,
)


def train(monkeypatch, files, out, *options):
    """Runs the script's main() with tiny settings; a later option overrides an earlier one."""
    return run(monkeypatch, train_stage1, out, "--sd2", files / "sd2.safetensors", "--teacher",
               files / "dinov2.safetensors", "--data", files / "pairs", *options)


def start(files, out, *options):
    """The script in a process of its own, on one thread."""
    words = [sys.executable, train_stage1.__file__, "--sd2", files / "sd2.safetensors", "--teacher",
             files / "dinov2.safetensors", "--data", files / "pairs", "--out", out, *SHORT,
             "--validate-every", 999, *options]
    return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_step(out, step):
    log = out / "log.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        time.sleep(0.01)


def test_a_run_that_is_asked_to_leave_saves_and_resumes_to_the_bit(files, tmp_path):
    options = ["--steps", 30, "--save-every", 1000]
    assert start(files, tmp_path / "whole", *options).wait() == 0
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 15)):
        process = start(files, tmp_path / "cut", *options)
        wait_for_step(tmp_path / "cut", step)
        process.send_signal(number)
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 0 and "Asked to leave: saved after" in said
    process = start(files, tmp_path / "cut", *options)
    assert "Resuming" in process.communicate()[1]
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_run_saves_when_asked_and_goes_on(files, tmp_path):
    process = start(files, tmp_path / "run", "--steps", 500, "--save-every", 1000)
    wait_for_step(tmp_path / "run", 5)
    process.send_signal(signal.SIGUSR1)
    while not (tmp_path / "run" / "state.pt").exists():
        time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_bad_step_is_skipped(files, tmp_path, monkeypatch, capsys):
    """A sample whose image makes the loss NaN: the step changes nothing, the run goes on."""
    original = train_stage1.Stage1.forward
    calls = iter(range(100))

    def poisoned(self, batch):
        losses = original(self, batch)
        return losses | {"latent": losses["latent"] * float("nan")} if next(calls) == 3 else losses

    monkeypatch.setattr(train_stage1.Stage1, "forward", poisoned)
    rows = train(monkeypatch, files, tmp_path)
    assert [row["step"] for row in rows if "skipped" in row] == [2]
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 4]
    assert "Step 2 was skipped" in capsys.readouterr().err
    state = DepthMaster.from_file(tmp_path / "model.safetensors").state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_nothing_is_saved_amid_bad_steps(files, tmp_path, monkeypatch):
    original = train_stage1.Stage1.forward
    monkeypatch.setattr(train_stage1.Stage1, "forward", lambda self, batch: {
        name: float("nan") * loss for name, loss in original(self, batch).items()})
    with pytest.raises(ValueError, match="10 steps in a row"):
        train(monkeypatch, files, tmp_path, "--steps", 12)
    assert not list(tmp_path.glob("state*")) and not (tmp_path / "model.safetensors").exists()


def test_a_finished_run_is_extended(files, tmp_path, monkeypatch):
    train(monkeypatch, files, tmp_path / "long", "--steps", 6, "--decay-steps", 9)
    train(monkeypatch, files, tmp_path / "short", "--steps", 4, "--decay-steps", 9)
    with pytest.raises(ValueError, match="--extend"):
        train(monkeypatch, files, tmp_path / "short", "--steps", 6, "--decay-steps", 9)
    train(monkeypatch, files, tmp_path / "short", "--steps", 6, "--decay-steps", 9, "--extend")
    long, short = (tmp_path / name / "model.safetensors" for name in ("long", "short"))
    assert long.read_bytes() == short.read_bytes()


def test_checkpointed_activations_do_not_change_the_result(files, tmp_path, monkeypatch):
    plain = train(monkeypatch, files, tmp_path / "plain")
    recomputed = train(monkeypatch, files, tmp_path / "recomputed", "--checkpoint-activations")
    losses = [losses_of(rows) for rows in (plain, recomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_cache_does_not_change_the_result(files, tmp_path, monkeypatch):
    """Bit by bit at micro-batch 1 with entries in float32; close with entries in half."""
    options = ["--micro-batch", 1]
    cached = [*options, "--cache", tmp_path / "cache", "--cache-precision"]
    plain = train(monkeypatch, files, tmp_path / "plain", *options)
    train(monkeypatch, files, tmp_path / "full", *cached, "float32")
    half = train(monkeypatch, files, tmp_path / "half", *cached, "float16")
    a, b = (tmp_path / name / "model.safetensors" for name in ("plain", "full"))
    assert a.read_bytes() == b.read_bytes()
    losses = [losses_of(rows) for rows in (plain, half)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0] != losses[1]
    folders = sorted((tmp_path / "cache").iterdir())
    assert len(folders) == 2  # another precision is another folder
    assert len(list(folders[0].rglob("*.safetensors"))) == 12  # 6 samples, 2 flips


def test_a_bad_sample_is_bad_in_the_cache_too(files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    np.save(tmp_path / "pairs/train/depth/3.npy", np.zeros((40, 60), np.float32))
    options = ["--data", tmp_path / "pairs", "--micro-batch", 1]
    plain = train(monkeypatch, files, tmp_path / "plain", *options)
    cached = train(monkeypatch, files, tmp_path / "cached", *options, "--cache",
                   tmp_path / "cache", "--cache-precision", "float32")
    assert [row.get("loss") for row in plain] == [row.get("loss") for row in cached]
    said = capsys.readouterr().err
    assert said.count("Replaced a bad sample") == 2 and said.count("no valid pixel") == 2


def test_another_table_is_another_folder_of_the_cache(files, tmp_path, monkeypatch):
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    options = ["--data", tmp_path / "pairs", "--cache", tmp_path / "cache", "--steps", 1]
    for run, depth in enumerate((0, 0, 1)):
        rows = [f"rgb/{number}.png,depth/{depth * number}.npy" for number in range(6)]
        (tmp_path / "pairs/train/pairs.csv").write_text("\n".join(["image,depth", *rows]))
        train(monkeypatch, files, tmp_path / str(run), *options)
        assert len(list((tmp_path / "cache").iterdir())) == 1 + depth


def test_validation_says_what_it_leaves_out_and_costs_no_step(files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs/val/rgb/0.png").write_bytes(b"no picture")
    options = ["--data", tmp_path / "pairs", "--steps", 2]
    row = train(monkeypatch, files, tmp_path / "half", *options)[-1]
    assert row["left_out"] == 1 and 0 < row["validation"]["abs_rel"] < 1
    assert "1 validation samples can't be used, the first because" in capsys.readouterr().err
    (tmp_path / "pairs/val/rgb/1.png").unlink()
    rows = train(monkeypatch, files, tmp_path / "none", *options)
    assert not any("validation" in row for row in rows)
    assert (tmp_path / "none/model.safetensors").exists()


def test_a_run_goes_on_with_what_auto_meant(files, tmp_path, monkeypatch, capsys):
    options = ["--precision", "auto", "--decay-steps", 9]
    monkeypatch.setattr(precision, "bfloat16_share", lambda: 0.5)
    train(monkeypatch, files, tmp_path, "--steps", 2, *options)
    assert json.loads((tmp_path / "args.json").read_text())["precision"] == "bfloat16"
    assert "bfloat16 takes 50% of float32's time" in capsys.readouterr().err
    monkeypatch.setattr(precision, "bfloat16_share", lambda: 2.0)  # on another machine
    train(monkeypatch, files, tmp_path, "--steps", 3, "--extend", *options)
    assert json.loads((tmp_path / "args.json").read_text())["precision"] == "bfloat16"
    train(monkeypatch, files, tmp_path / "new", "--steps", 1, *options)
    assert json.loads((tmp_path / "new/args.json").read_text())["precision"] == "float32"
    with pytest.raises(ValueError, match="precision: bfloat16 then, float32 now"):
        train(monkeypatch, files, tmp_path, "--steps", 3, *options, "--precision", "float32")


def test_weights_and_data_may_not_change_in_mid_run(files, tmp_path, monkeypatch, capsys):
    options = ["--data", tmp_path / "pairs", "--sd2", tmp_path / "sd2.safetensors", "--steps", 2,
               "--decay-steps", 9]
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    shutil.copy(files / "sd2.safetensors", tmp_path / "sd2.safetensors")
    train(monkeypatch, files, tmp_path / "run", *options)
    more = [*options, "--steps", 3, "--extend"]
    for kind, ending in (("rgb", "png"), ("depth", "npy")):
        folder = tmp_path / "pairs/train" / kind
        shutil.copy(folder / f"0.{ending}", folder / f"new.{ending}")
    with pytest.raises(ValueError, match="something else as the names of the samples than"):
        train(monkeypatch, files, tmp_path / "run", *more)
    for kind, ending in (("rgb", "png"), ("depth", "npy")):
        (tmp_path / "pairs/train" / kind / f"new.{ending}").unlink()
    model = DepthMaster.from_file(tmp_path / "sd2.safetensors")
    model.unet.conv_in.bias.data += 1
    model.save(tmp_path / "sd2.safetensors")
    with pytest.raises(ValueError, match="something else as the weights sd2.safetensors than"):
        train(monkeypatch, files, tmp_path / "run", *more)
    rows = train(monkeypatch, files, tmp_path / "run", *more, "--accept-changes")
    assert {"step": 2, "accepted": ["the weights sd2.safetensors"]} in rows
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_run_of_which_every_step_was_skipped_fails(files, tmp_path, monkeypatch):
    skipped = Outcome(None, ["x"], ["x"])
    replace_step(monkeypatch, lambda *arguments: skipped)
    with pytest.raises(ValueError, match="all of the 4 steps were skipped.*lower --lr"):
        train(monkeypatch, files, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("steps", [2, 4])
def test_a_validation_that_a_kill_prevented_is_made_up_for(files, tmp_path, monkeypatch, steps):
    def validated(rows):
        return [row["step"] for row in rows if "validation" in row]

    options = ["--steps", 4, "--decay-steps", 9]
    original, calls = train_stage1.check, []

    def killed(*arguments):
        calls.append(arguments[5])
        if arguments[5] == steps:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train_stage1, "check", killed)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, files, tmp_path, *options)
    monkeypatch.setattr(train_stage1, "check", original)
    assert validated(train(monkeypatch, files, tmp_path, *options)) == [2, 4]
    assert validated(train(monkeypatch, files, tmp_path, *options)) == [2, 4]


def test_weights_alone_are_trained_on_the_embedded_scenes(monkeypatch):
    monkeypatch.setattr(embedded.render, "ensure", lambda *_, **__: None)
    for words, crop, steps, sd2 in ((["--sd2", "x"], (96, 336), 20_000, Path("x")),
                                    ([], (96, 336), 590, embedded.SD2),
                                    (["--vkitti-crop", "64", "96"], [64, 96], 590, embedded.SD2)):
        monkeypatch.setattr(sys, "argv", ["train_stage1.py", *words])
        args = embedded.stand_in(train_stage1.options())
        assert (args.vkitti_crop, args.steps, args.sd2) == (crop, steps, sd2)
    small = train_stage1.teacher_file(embedded.SD2, Path("weights/nowhere.safetensors"))
    assert small == embedded.DINOV2


@pytest.mark.parametrize("place, channels", [("down1", 8), ("down2", 16), ("mid", 16)])
def test_the_objective_against_its_parts(files, place, channels):
    """`Stage1` is the sum of what the paper says, put together here by hand."""
    model = DepthMaster.from_file(files / "sd2.safetensors")
    teacher = DINOv2.from_file(files / "dinov2.safetensors")
    torch.manual_seed(1)
    objective = train_stage1.Stage1(model, teacher, place, "kl")
    assert objective.adapter[0].in_features == channels
    batch = dict(image=torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8),
                 target=torch.rand(2, 1, 32, 48) * 2 - 1, valid=torch.rand(2, 1, 32, 48) > 0.005)
    losses = objective(batch)

    image = batch["image"] / 127.5 - 1
    z, feature = model.unet(model.vae.encode(image), place)
    z_target = model.vae.encode(batch["target"].repeat(1, 3, 1, 1))
    torch.testing.assert_close(losses["latent"], latent_loss(z, z_target, batch["valid"]))
    seen = teacher_image(image, 14, DINOv2.mean, DINOv2.std)
    tokens = resize_tokens(teacher(seen), (2, 3), feature.shape[2:])
    adapted = objective.adapter(feature.permute(0, 2, 3, 1).reshape(2, -1, channels))
    torch.testing.assert_close(losses["alignment"], feature_alignment_loss(adapted, tokens))


def test_only_unet_and_adapter_get_gradients(files):
    model = DepthMaster.from_file(files / "sd2.safetensors")
    teacher = DINOv2.from_file(files / "dinov2.safetensors")
    objective = train_stage1.Stage1(model, teacher, "mid", "kl")
    batch = dict(image=torch.randint(256, (1, 3, 32, 48), dtype=torch.uint8),
                 target=torch.rand(1, 1, 32, 48), valid=torch.ones(1, 1, 32, 48, dtype=torch.bool))
    sum(loss.sum() for loss in objective(batch).values()).backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("unet.", "adapter.")), name


@pytest.mark.parametrize("options, kind, words", [
    (["--target", "depth"], "depth", {"latent", "alignment"}),
    (["--align-weight", "0"], "sqrt_disparity", {"latent"}),
    (["--align-loss", "cosine", "--align-at", "down1"], "sqrt_disparity", {"latent", "alignment"}),
    (["--rgb-resize", "antialias", "--size", "24", "40"], "sqrt_disparity",
     {"latent", "alignment"}),
    (["--precision", "bfloat16"], "sqrt_disparity", {"latent", "alignment"}),
])
def test_the_ablations_run(files, tmp_path, monkeypatch, options, kind, words):
    rows = train(monkeypatch, files, tmp_path, "--steps", 2, *options)
    named = {"loss", "step", "lr", "samples_per_second", "gradient_norm"}
    assert set(rows[0]) - named == words
    assert DepthMaster.from_file(tmp_path / "model.safetensors").target == kind


def by_hand(files, align_at="mid", align_loss="kl", weight=1.0, **data):
    """The loss of the first step of a run with these options."""
    torch.manual_seed(0)
    model = DepthMaster.from_file(files / "sd2.safetensors")
    teacher = DINOv2.from_file(files / "dinov2.safetensors")
    objective = train_stage1.Stage1(model, teacher, align_at, align_loss)
    means = first_losses(objective, files / "pairs", **data)
    return means["latent"] + weight * means["alignment"]


@pytest.mark.parametrize("options, expected", [
    (["--target", "disparity"], dict(target="disparity")),
    (["--align-at", "down2"], dict(align_at="down2")),
    (["--align-loss", "cosine"], dict(align_loss="cosine")),
    (["--align-weight", 0.25], dict(weight=0.25)),
])
def test_options_decide_the_loss(files, tmp_path, monkeypatch, options, expected):
    rows = train(monkeypatch, files, tmp_path, "--steps", 1, "--micro-batch", 1, *options)
    loss = by_hand(files, **expected)
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert abs(loss / by_hand(files) - 1) > 1e-5


@pytest.mark.parametrize("options, words", [
    (["--sd2", "dinov2.safetensors"], "holds a dinov2 model"),
    (["--teacher", "sd2.safetensors"], "holds a sd2 model"),
    (["--out", "sd2.safetensors"], "--out .*sd2.safetensors is a file: give a folder."),
    (["--cache", "sd2.safetensors"], "--cache .*sd2.safetensors is a file: give a folder."),
])
def test_mistakes_are_told(files, tmp_path, monkeypatch, options, words):
    options = [files / word if word.endswith("tensors") else word for word in options]
    with pytest.raises((ValueError, OSError), match=words):
        train(monkeypatch, files, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_empty_folder_is_told(files, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is empty"):
        train(monkeypatch, files, tmp_path / "run", "--data", tmp_path / "empty")


def test_data_without_virtual_kitti_is_told(files, tmp_path, monkeypatch, capsys):
    train(monkeypatch, files, tmp_path)
    assert "No --vkitti: every sample comes from --data" in capsys.readouterr().err


def test_real_data_without_weights_says_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train_stage1.py", "--data", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(FileNotFoundError, match="weights/miniature_sd2.safetensors"):
        train_stage1.main()
