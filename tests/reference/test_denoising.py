"""Denoising against diffusers: the schedule, Marigold's folder and pipeline, the ensemble."""

import json

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import convert_sd2  # noqa: E402
from extras.denoising import Denoiser, Schedule, combine, schedule_of  # noqa: E402
from tests.fixtures.make_fixtures import UNET, VAE  # noqa: E402
from tests.fixtures.weights import noise, relative_error  # noqa: E402
from tests.reference.test_files import write  # noqa: E402

torch.set_grad_enabled(False)
V = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085,
         beta_end=0.012, clip_sample=False, prediction_type="v_prediction", steps_offset=1)
SCHEDULES = {
    "Marigold 1.0": dict(V, timestep_spacing="leading", set_alpha_to_one=False),
    "Marigold 1.1": dict(V, timestep_spacing="trailing", rescale_betas_zero_snr=True,
                         set_alpha_to_one=False),
    "the trainer's": dict(V, timestep_spacing="trailing", set_alpha_to_one=False),
    "to no noise": dict(V, timestep_spacing="trailing", set_alpha_to_one=True)}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [1, 4, 10, 50])
def test_ddim(name, count):
    theirs = diffusers.DDIMScheduler.from_config(SCHEDULES[name])
    ours = Schedule(**schedule_of(SCHEDULES[name], "a file"))
    theirs.set_timesteps(count)
    assert ours.timesteps(count).tolist() == theirs.timesteps.tolist()
    x = y = noise("x", (2, 4, 6, 8))
    for t in theirs.timesteps:
        v = noise(f"v{t}", x.shape)
        x = theirs.step(v, t, x).prev_sample
        y = ours.step(y, v, int(t), count)
        # A step is equal to 1e-5; what float32 loses in their betas adds up over 50 of them.
        assert relative_error(y, x) < (1e-5 if count < 50 else 5e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_learnt(name):
    theirs = diffusers.DDIMScheduler.from_config(SCHEDULES[name])
    ours = Schedule(**schedule_of(SCHEDULES[name], "a file"))
    z, draw, t = noise("z", (3, 4, 6, 8)), noise("draw", (3, 4, 6, 8)), torch.tensor([0, 500, 999])
    noisy, v = ours.noisy(z, draw, t)
    assert relative_error(noisy, theirs.add_noise(z, draw, t)) < 1e-5
    assert relative_error(v, theirs.get_velocity(z, draw, t)) < 1e-5


def marigold(folder, name):
    """A small folder in Marigold's layout, by the libraries' own writers."""
    write(folder, dict(UNET, in_channels=8), VAE, freshly_made=("unet",))
    diffusers.DDIMScheduler.from_config(SCHEDULES[name]).save_pretrained(folder / "scheduler")
    return folder


def pipeline(folder, text):
    """diffusers' pipeline of a folder's networks; text: the empty prompt's embedding."""
    pipe = diffusers.MarigoldDepthPipeline(
        diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"), None, None)
    pipe.empty_text_embedding = text[None]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def initial_noise(model, size):
    draw = torch.Generator().manual_seed(model.seed)
    return torch.randn(4, *size, generator=draw)[None]


@pytest.mark.parametrize("name", ["Marigold 1.0", "Marigold 1.1"])
@pytest.mark.parametrize("steps", [1, 10])
def test_marigold_s_pipeline(tmp_path, name, steps):
    folder = marigold(tmp_path / "source", name)
    file = convert_sd2.convert(folder, tmp_path / "model.safetensors")
    image = (noise("image", (90, 150, 3)) * 60 + 128).clamp(0, 255).byte()
    model = Denoiser.from_file(file)
    assert (model.kind, model.target) == ("denoise", "depth")
    model.steps = steps
    # 80x128: multiples of 8, to which diffusers pads; its rounding of the picture is avoided, too.
    small = image[:80, :128]
    ours = model.predict(small.numpy(), 128)
    theirs = pipeline(folder, model.unet.text_embedding)(
        small.permute(2, 0, 1)[None].float() / 255, num_inference_steps=steps,
        processing_resolution=128, latents=initial_noise(model, (10, 16))).prediction[0, ..., 0]
    assert theirs.std() > 0.01
    assert np.abs(ours - theirs).max() < 1e-4


def test_what_is_exported_diffusers_loads(tmp_path):
    folder = marigold(tmp_path / "source", "Marigold 1.1")
    file = convert_sd2.convert(folder, tmp_path / "model.safetensors")
    again = convert_sd2.export(file, tmp_path / "exported")
    text = Denoiser.from_file(file).unet.text_embedding
    before, after = pipeline(folder, text), pipeline(again, text)
    assert all(torch.equal(a, b) for a, b in zip(before.unet.state_dict().values(),
                                                 after.unet.state_dict().values()))
    said = json.loads((again / "scheduler" / "scheduler_config.json").read_text())
    first = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert {name: first[name] for name in said if name in first} == {
        name: said[name] for name in said if name in first}
    back = convert_sd2.convert(again, tmp_path / "back.safetensors")
    assert Denoiser.from_file(back).config == Denoiser.from_file(file).config


def test_the_ensemble_is_near_diffusers():
    rng = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 1, 6, 8, generator=rng)
    truth = torch.nn.functional.interpolate(truth, (48, 64), mode="bilinear")
    low, high = truth.amin(), truth.amax()
    members = [(0.5 + 0.1 * i) * truth + 0.05 * i
               + 0.02 * torch.randn(truth.shape, generator=rng) for i in range(5)]
    maps = torch.cat(members, dim=1)
    theirs, _ = diffusers.MarigoldDepthPipeline.ensemble_depth(maps.transpose(0, 1))
    ours = (combine(maps) + 1) / 2
    assert (ours - theirs).abs().mean() < 0.01
    expected = (truth - low) / (high - low)
    fit = np.polyfit(ours.flatten(), expected.flatten(), 1)
    assert np.abs(np.polyval(fit, ours.flatten()) - expected.flatten().numpy()).mean() < 0.02
