"""train_stage1.py and train_stage2.py alike: each test runs both, on networks of a few thousand
parameters and some pairs. What only one of them does is in its own file."""

import sys
from types import SimpleNamespace

import pytest
import torch

import train_stage1
import train_stage2
from engine import run_folder
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.unet import UNet
from tests.worlds import (
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


def objective_1(files, dtype):
    model = DepthMaster.from_file(files / "sd2.safetensors")
    teacher = DINOv2.from_file(files / "dinov2.safetensors", dtype=dtype)
    return train_stage1.Stage1(model, teacher, "mid", "kl")


def objective_2(files, dtype):
    model = DepthMaster.from_file(files / "stage1.safetensors")
    model.add_fourier()
    return train_stage2.Stage2(model)


# Of each stage: the script, its objective, the weights to begin with, its losses and their weights.
STAGES = {
    "stage1": (train_stage1, train_stage1.Stage1, objective_1,
               {"--sd2": "sd2.safetensors", "--teacher": "dinov2.safetensors"},
               {"latent": 1, "alignment": 1}),
    "stage2": (train_stage2, train_stage2.Stage2, objective_2, {"--ckpt": "stage1.safetensors"},
               {"pixel": 1, "gradient": 0.001}),
}


@pytest.fixture(params=STAGES)
def stage(request, files, monkeypatch):
    """A stage's script and names, and train(out, *options), which runs it and gives the log."""
    script, kind, objective, begin, weights = STAGES[request.param]
    begin = [word for option, name in begin.items() for word in (option, files / name)]

    def train(out, *options, data=("--data", files / "pairs")):
        return run(monkeypatch, script, out, *begin, *data, *options)

    def first_loss(seed=0, dtype=torch.float32, **data):
        """The loss of the first step of a run with these options, put together by hand."""
        torch.manual_seed(seed)
        means = first_losses(objective(files, dtype), files / "pairs", seed=seed, dtype=dtype,
                             **data)
        return sum(weights[name] * means[name] for name in weights)

    return SimpleNamespace(name=request.param, script=script, objective=kind, weights=weights,
                           begin=begin[-1] if request.param == "stage2" else begin[1],
                           train=train, first_loss=first_loss)


def test_a_run_leaves_what_it_promises(stage, tmp_path):
    rows = stage.train(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert set(row) == {"step", "loss", "lr", "samples_per_second", "gradient_norm",
                            *stage.weights}
        total = sum(stage.weights[name] * row[name] for name in stage.weights)
        assert row["loss"] == pytest.approx(total, rel=1e-6)
    assert [row["lr"] for row in steps[:3]] == [0, 0.5e-3, 1e-3]
    validated = [row for row in rows if "validation" in row]
    assert [row["step"] for row in validated] == [2, 4]
    assert 0 < validated[0]["validation"]["abs_rel"] < 1
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["000002.png", "000004.png"]
    model = DepthMaster.from_file(tmp_path / "model.safetensors")
    assert (model.kind, model.target, model.train_size) == (stage.name, "sqrt_disparity", (32, 48))
    before = DepthMaster.from_file(stage.begin).state_dict()
    after = model.state_dict()
    assert not torch.equal(after["unet.conv_in.weight"], before["unet.conv_in.weight"])
    for name, weight in before.items():
        if name.startswith("vae."):
            assert torch.equal(after[name], weight), f"{name} should be frozen"
    new = {name for name in after if name not in before}
    assert new == {name for name in after if name.startswith("unet.fourier.")}
    assert len(new) == (16 if stage.name == "stage2" else 0)


def test_curves_pictures_and_events(stage, tmp_path, monkeypatch, capsys):
    """Events of a later step than the one that a run resumes at are hidden."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    stage.train(tmp_path, "--steps", 8, "--save-every", 4, "--validate-every", 4, "--tensorboard")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "validation.png").read_bytes() == (
        tmp_path / "pictures/000008.png").read_bytes()
    rows = stage.train(tmp_path, "--steps", 9, "--extend", "--tensorboard", "--validate-every", 4)
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 10))
    assert [event.value for event in losses] == pytest.approx(
        [row["loss"] for row in rows if "loss" in row], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/abs_rel")] == [4, 8, 9]
    assert [event.step for event in events.Images("validation")][-1] == 9
    monkeypatch.setattr(run_folder, "find_spec", lambda name: None if name == "tensorboard" else 1)
    with pytest.raises(ValueError, match="--tensorboard needs tensorboard: pip install"):
        stage.train(tmp_path / "other", "--tensorboard")
    assert not (tmp_path / "other").exists()


def test_the_loss_falls(stage, tmp_path):
    rows = stage.train(tmp_path, "--steps", 60, "--lr", 3e-3, "--log-every", 10,
                       "--validate-every", 99)
    first = next(iter(stage.weights))
    losses = [row[first] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("interrupted", [2, 3])
def test_a_resumed_run_is_the_same_to_the_bit(stage, tmp_path, monkeypatch, interrupted):
    stage.train(tmp_path / "whole")
    revive = interrupt(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.train(tmp_path / "cut")
    revive()
    rows = stage.train(tmp_path / "cut")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_lost_model_file_comes_back(stage, tmp_path):
    assert comes_back(lambda: stage.train(tmp_path), tmp_path / "model.safetensors")


def test_the_micro_batch_does_not_change_the_result(stage, tmp_path):
    one = stage.train(tmp_path / "1", "--micro-batch", 1)
    four = stage.train(tmp_path / "4", "--micro-batch", 4, "--workers", 2)
    assert losses_of(one) == pytest.approx(losses_of(four), rel=1e-4)


@pytest.mark.parametrize("options, expected", [
    (["--rgb-resize", "antialias"], dict(rgb_resize="antialias")),
    (["--precision", "bfloat16"], dict(dtype=torch.bfloat16)),
    (["--size", 24, 40], dict(size=(24, 40))),
    (["--seed", 8], dict(seed=8)),
])
def test_options_decide_the_loss(stage, tmp_path, options, expected):
    rows = stage.train(tmp_path, "--steps", 1, "--micro-batch", 1, *options)
    loss = stage.first_loss(**expected)
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert abs(loss / stage.first_loss() - 1) > 1e-5


def test_the_mix_with_virtual_kitti(stage, streets, tmp_path):
    """With this seed the second of the four samples is a street."""
    options = ["--vkitti", streets, "--vkitti-crop", *CROP, "--seed", 8, "--steps", 1]
    rows = stage.train(tmp_path, *options)
    loss = stage.first_loss(vkitti=streets, crop=CROP, seed=8)
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_gradients_are_clipped(stage, tmp_path):
    for out, options in (("plain", []), ("clipped", ["--clip-gradient", 0.01])):
        [row, _] = stage.train(tmp_path / out, "--steps", 1, *options)
        norm = row["gradient_norm"] if out == "plain" else 0.01
        assert row["gradient_norm"] > 0.1
        assert gradient_that_adam_had(tmp_path / out) == pytest.approx(norm, rel=1e-3)


def test_options_reach_the_readers_and_the_validation(stage, streets, tmp_path, monkeypatch):
    samples, held_out, images, dtype = opened(monkeypatch, stage.script, lambda: stage.train(
        tmp_path / "pairs", "--steps", 1, "--depth-scale", 256, "--validate-images", 7,
        "--precision", "bfloat16"))
    assert [reader.depth_scale for reader in (*samples.sources, held_out)] == [256, 256]
    assert (images, dtype) == (7, torch.bfloat16)
    samples, held_out, *_ = opened(monkeypatch, stage.script, lambda: stage.train(
        tmp_path / "streets", "--vkitti", streets, "--vkitti-crop", *CROP, "--steps", 1, data=()))
    assert [reader.crop for reader in (*samples.sources, held_out)] == [CROP, CROP]


@pytest.mark.parametrize("options, calls", [([], 0), (["--compile"], 5)])
def test_only_the_unet_is_compiled(stage, tmp_path, monkeypatch, options, calls):
    """In training: two micro-batches, in validation: two images; and once when it is saved.

    That call is not compiled: `set_stance` says so, of which the stand-in does not know.
    """
    found = compiled_calls(monkeypatch, lambda: stage.train(tmp_path, "--steps", 1, *options))
    assert [type(module) for module in found] == [UNet] * calls


def test_auto_asks_what_the_largest_size_needs(stage, streets, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stage.objective, "activation_bytes",
                        lambda self, samples, size, dtype: asked.append(tuple(size)) or 0)
    stage.train(tmp_path / "pairs", "--steps", 1)
    stage.train(tmp_path / "both", "--steps", 1, "--size", 16, 24, "--vkitti", streets,
                "--vkitti-crop", *CROP)
    assert asked == [(32, 48), CROP]


def test_no_folder_of_data_is_told(stage, tmp_path):
    with pytest.raises(FileNotFoundError, match="/nowhere is not a folder"):
        stage.train(tmp_path / "run", data=("--data", "/nowhere"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


WRONG = {  # options -> words of the answer
    ("--size", 16, 9000): "--size: must be a whole number from 8 to 8192",
    ("--size", 4, 16): "--size: must be a whole number from 8 to 8192",
    ("--vkitti-crop", 0, 0): "--vkitti-crop: must be a whole number from 8 to 8192",
    ("--vkitti-crop", -1, 16): "--vkitti-crop: must be a whole number from 8 to 8192",
    ("--batch", 0): "above 0, not 0", ("--micro-batch", 0): "above 0, not 0",
    ("--steps", 0): "above 0, not 0",
}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(map(str, words)))
def test_wrong_options(stage, tmp_path, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        stage.train(tmp_path, *words)
    assert stopped.value.code == 2
    assert WRONG[words] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["align", "pixel", "gradient"])
@pytest.mark.parametrize("weight", ["-1", "nan"])
def test_a_weight_below_zero_is_a_wrong_option(monkeypatch, option, weight, capsys):
    script = train_stage1 if option == "align" else train_stage2
    monkeypatch.setattr(sys, "argv", [script.__name__, f"--{option}-weight", weight])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert "must be a number, 0 or above" in capsys.readouterr().err
