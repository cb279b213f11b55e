"""extras/denoising.py, extras/train_denoising.py, evaluate.py --paradigm denoise."""

import json

import numpy as np
import pytest
import torch

import convert_sd2
import evaluate
from extras import train_denoising
from extras.denoising import Denoiser, Schedule, combine, drawn_noise, schedule_of
from nets.depthmaster import DepthMaster
from tests import worlds
from tests.worlds import files, interrupt

torch.manual_seed(0)


def test_the_last_step_is_noise_alone_and_ddim_goes_back_all_the_way():
    schedule = Schedule(zero_snr=True, end_at_one=True)
    assert schedule.alphas[-1] == 0 and schedule.alphas[0] == pytest.approx(1 - 0.00085)
    assert schedule.timesteps(4).tolist() == [999, 749, 499, 249]
    assert Schedule(spacing="leading").timesteps(4).tolist() == [751, 501, 251, 1]
    z, noise = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    x = noise
    for t in schedule.timesteps(10).tolist():  # with the true v each step stays on the line
        _, v = schedule.noisy(z, noise, torch.tensor([t, t]))
        x = schedule.step(x, v, t, 10)
    torch.testing.assert_close(x, z, atol=1e-5, rtol=0)


def test_noise_is_a_function_of_its_key():
    first, t = drawn_noise(3, 17, (4, 24, 32), 1000, 0.9)
    again, same = drawn_noise(3, 17, (4, 24, 32), 1000, 0.9)
    other, _ = drawn_noise(3, 18, (4, 24, 32), 1000, 0.9)
    assert torch.equal(first, again) and t == same and not torch.equal(first, other)
    assert {drawn_noise(0, place, (1, 2, 2), 4, 0.9)[1] for place in range(99)} == {0, 1, 2, 3}


def test_noise_is_coarser_at_large_time_steps():
    """The share of neighbours' correlation grows with the time step; plain noise has none."""
    draws = [drawn_noise(0, place, (4, 24, 32), 1000, 0.9) for place in range(300)]
    near, far = ([(x[..., 1:] * x[..., :-1]).mean().item() for x, t in draws if low <= t < high]
                 for low, high in ((0, 200), (800, 1000)))
    assert abs(np.mean(near)) < 0.05 and np.mean(far) > 0.2
    assert all(x.std().item() == pytest.approx(1) for x, _ in draws)
    plain = [drawn_noise(0, place, (4, 24, 32), 1000, 0)[0] for place in range(50)]
    assert abs(np.mean([(x[..., 1:] * x[..., :-1]).mean() for x in plain])) < 0.02


def test_an_ensemble_is_freed_of_its_members_scales():
    truth = torch.linspace(-1, 1, 48).reshape(1, 1, 6, 8).sin()
    maps = torch.cat([0.2 * truth, 0.7 * truth - 0.3, 0.4 * truth + 0.5], dim=1)
    low, high = truth.amin(), truth.amax()
    torch.testing.assert_close(combine(maps), 2 * (truth - low) / (high - low) - 1)
    maps[0, 1, 2, 3] = 1.0  # one member's gross error does not reach the median
    assert (combine(maps) - combine(maps[:, [0, 2]])).abs().max() < 0.1
    assert torch.isfinite(combine(torch.zeros(2, 3, 4, 5))).all()


def test_stable_diffusion_s_weights_serve_both_latents(files):
    sd2 = DepthMaster.from_file(files / "sd2.safetensors")
    model = Denoiser.from_sd2(files / "sd2.safetensors", "depth")
    latent = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        expected = sd2.unet(latent, timestep=500)[0]
        found = model.unet(torch.cat([latent, latent], dim=1), timestep=500)[0]
    torch.testing.assert_close(found, expected)


def train(monkeypatch, files, out, *options):
    return worlds.run(monkeypatch, train_denoising, out, "--sd2", files / "sd2.safetensors",
                      "--data", files / "pairs", "--size", 32, 48, *options)


def test_too_many_passes():
    with pytest.raises(ValueError, match="a smaller --denoise-steps"):
        Schedule().timesteps(1001)


def test_a_folder_without_its_scheduler(files, tmp_path):
    model = Denoiser.from_sd2(files / "sd2.safetensors", "depth")
    model.save(tmp_path / "a.safetensors")
    folder = convert_sd2.export(tmp_path / "a.safetensors", tmp_path / "folder")
    assert Denoiser.from_file(convert_sd2.convert(folder, tmp_path / "b.safetensors")
                              ).config["schedule"] == model.schedule_keywords()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="scheduler_config.json is not there"):
        convert_sd2.convert(folder, tmp_path / "c.safetensors")


def test_passes_are_for_denoising_only(files, monkeypatch, capsys):
    assert worlds.call(monkeypatch, evaluate, "--ckpt", "a", "--ensemble", 3) == 2
    assert "--ensemble and --denoise-steps are for --paradigm denoise" in capsys.readouterr().err


def test_it_learns_resumes_and_is_scored(files, tmp_path, monkeypatch, capsys):
    rows = train(monkeypatch, files, tmp_path / "whole")
    assert all(np.isfinite(loss) for loss in worlds.losses_of(rows))
    assert any("validation" in row for row in rows)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        train(patch, files, tmp_path / "cut")
    train(monkeypatch, files, tmp_path / "cut")
    whole, cut = (Denoiser.from_file(tmp_path / name / "model.safetensors").state_dict()
                  for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    train(monkeypatch, files, tmp_path / "cached", "--cache", tmp_path / "cache",
          "--cache-precision", "float32")
    cached = Denoiser.from_file(tmp_path / "cached" / "model.safetensors").state_dict()
    assert all(torch.allclose(whole[name], cached[name], atol=1e-5) for name in whole)
    scores = []
    for number, options in enumerate([(), (), ("--ensemble", 1)]):
        assert worlds.call(
            monkeypatch, evaluate, "--ckpt", tmp_path / "whole" / "model.safetensors", "--data",
            files / "pairs", "--datasets", "pairs", "--paradigm", "denoise", "--denoise-steps", 2,
            "--ensemble", 3, *options, "--out", tmp_path / str(number), "--workers", 0) == 0
        scores.append(json.loads((tmp_path / str(number) / "metrics.json").read_text())["pairs"])
    assert scores[0] == scores[1] != scores[2]
    assert scores[0]["paradigm"] == "denoise, 2 passes x 3" and scores[0]["align"] == "depth"


@pytest.mark.parametrize("kind, paradigm", [("stage1", "denoise"), ("denoise", "single")])
def test_a_model_of_the_other_kind(files, tmp_path, monkeypatch, capsys, kind, paradigm):
    file = files / "stage1.safetensors"
    if kind == "denoise":
        Denoiser.from_sd2(files / "sd2.safetensors", "depth").save(file := tmp_path / "a")
    assert worlds.call(monkeypatch, evaluate, "--ckpt", file, "--data", files / "pairs",
                       "--datasets", "pairs", "--paradigm", paradigm, "--out",
                       tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"holds a {kind} model" in said and "--paradigm denoise" in said


@pytest.mark.parametrize("settings, words", [
    ({"prediction_type": "epsilon"}, "prediction_type = epsilon"),
    ({"beta_schedule": "linear"}, "beta_schedule"),
    ({"num_train_timesteps": "many"}, "describes no schedule"),
    ({"timestep_spacing": "linspace"}, "not trailing or leading"),
    ({"_class_name": "LCMScheduler"}, "_class_name = LCMScheduler"),
])
def test_a_scheduler_of_another_kind(settings, words):
    usual = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction",
             "beta_schedule": "scaled_linear", "clip_sample": False}
    assert schedule_of(usual, "a file")["spacing"] == "leading"  # as diffusers means it
    with pytest.raises(ValueError, match=words):
        schedule_of(usual | settings, "scheduler_config.json")
