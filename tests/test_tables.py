"""benchmarks/tables.py and what it needs: rows, variants, the report."""

import json
import sys

import numpy as np
import pytest
import torch

import evaluate
import metrics
import train_stage1
import train_stage2
from benchmarks import rows, tables, tables_report, variants
from data import cache, training_set, transforms
from engine import run_folder
from extras import train_denoising
from losses import gradient
from nets import vae
from nets.fourier import FourierEnhancement
from tests.worlds import boxes

SCRIPTS = {"train_stage1.py": train_stage1, "train_stage2.py": train_stage2,
           "extras.train_denoising": train_denoising}
ENTRIES = [entry for _, entries in rows.TABLES.values() for entry in entries]


def scales(tmp_path):
    return {"miniature": tables.miniature(tmp_path, 1, None),
            "full": tables.full("/hypersim", "/vkitti2", "/benchmarks", tmp_path)}


def script_of(words):
    """The script and its options in the words of a command."""
    words = [str(word) for word in words]
    if words[:2] == ["-m", "benchmarks.variants"]:
        assert words[2] in variants.VARIANTS
        words = words[3:]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


@pytest.mark.parametrize("scale", ["miniature", "full"])
@pytest.mark.parametrize("name", rows.MODELS)
def test_a_trainer_takes_the_options_of_each_model(tmp_path, scale, name):
    words = rows.training(name, scales(tmp_path)[scale], 2, tmp_path / "out")
    script, given = script_of(words)
    args = SCRIPTS[script].options().parse_args(given)
    assert args.seed == 2 and args.out == tmp_path / "out"
    own = SCRIPTS[script].options().parse_args(
        rows.MODELS[name].options.format(**scales(tmp_path)[scale].words).split())
    default = SCRIPTS[script].options().parse_args([])
    for option, value in vars(own).items():  # what the model is about is not set back
        assert value == getattr(default, option) or value == getattr(args, option), option


@pytest.mark.parametrize("scale", ["miniature", "full"])
@pytest.mark.parametrize("entry", ENTRIES, ids=rows.key)
def test_evaluate_takes_the_options_of_each_row(tmp_path, monkeypatch, scale, entry):
    script, given = script_of(rows.scoring(entry, scales(tmp_path)[scale], "a", tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", [script, *given])
    assert evaluate.options().out == tmp_path / "out"


def test_full_scale_prints_each_command_once_and_stage_1_first(tmp_path, capsys):
    scale = tables.full("/hypersim", "/vkitti2", "/benchmarks", tmp_path)
    tables.print_full(tables.chosen_tables(["all"]), scale, 1, tmp_path / "full", run=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 80
    assert all(line.startswith("python ") for line in lines)
    place = {line.split("--out ")[1].split()[0]: number for number, line in enumerate(lines)}
    assert place[f"{tmp_path}/full/middle/0"] < place[f"{tmp_path}/full/full/0"]
    assert any("30 h, 19.3 GB" in line for line in lines)
    assert any("--paradigm denoise" in line and "11.9 h" in line for line in lines)
    assert not any("as_dinov2" in line or "/bfloat16/" in line for line in lines)


# ------------------------------------------------------------------------------- variants


@pytest.fixture
def restored(monkeypatch):
    """Sets back what variants replace."""
    for owner, name in ((transforms, "to_target_space"), (metrics, "to_target_space"),
                        (metrics, "align"), (gradient, "gradient_loss"), (vae, "in_float32"),
                        (FourierEnhancement, "frequency_pass"),
                        (training_set, "normalise_target")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.parametrize("name, exponent", [("power_1_3", 1 / 3), ("power_2_3", 2 / 3),
                                            ("log", 0)])
def test_another_power_of_depth_is_learnt_and_aligned(restored, name, exponent):
    depth_m, valid = map(torch.from_numpy, boxes())
    variants.VARIANTS[name]()
    y = transforms.normalise_target(depth_m[None], valid[None])
    assert y.max() == 1 and y.min() == -1
    t = depth_m**-exponent if exponent else -depth_m.log()
    inside = (y[0] > -1) & (y[0] < 1)
    assert np.corrcoef(y[0][inside], t[inside])[0, 1] > 0.99999
    aligned = metrics.align(0.3 * t + 2, depth_m, valid, "sqrt_disparity")
    torch.testing.assert_close(aligned, depth_m.double(), rtol=1e-4, atol=1e-4)
    before = metrics.align(1 / depth_m, depth_m, valid, "disparity")
    torch.testing.assert_close(before, depth_m.double(), rtol=1e-4, atol=1e-4)


def test_plain_convolutions_are_as_many(restored):
    torch.manual_seed(0)
    block = FourierEnhancement(16)
    x = torch.randn(2, 16, 6, 8)
    before = block(x)
    variants.plain_convolutions()
    after = block(x)
    assert after.shape == before.shape and not torch.allclose(after, before)
    after.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_the_released_mask(restored):
    pred, target = torch.randn(2, 1, 6, 7), torch.randn(2, 1, 6, 7)
    valid = torch.rand(2, 1, 6, 7) > 0.3
    ours = gradient.gradient_loss(pred, target, torch.ones_like(valid))
    variants.zero_filled()
    torch.testing.assert_close(gradient.gradient_loss(pred, target, torch.ones_like(valid)), ours)
    differences = (gradient.directional_gradients(torch.where(valid, pred, 0))
                   - gradient.directional_gradients(torch.where(valid, target, 0)))
    expected = gradient.reversed_huber(differences).flatten(1).mean(dim=1)
    torch.testing.assert_close(gradient.gradient_loss(pred, target, valid), expected)


def test_invalid_pixels_get_their_neighbours_value(restored):
    variants.filled_with_neighbours()
    depth_m = torch.tensor([[[1.0, 0, 0, 0, 4], [2, 3, 0, 0, 0], [0, 0, 0, 0, 0]]])
    y = training_set.normalise_target(depth_m, depth_m > 0)
    assert y[0, 0].tolist()[:2] == [1, 1] and y[0, 0, 3:].tolist() == [-1, -1]
    assert (y[0, 1, 1:] == y[0, 1, 1]).all() and (y[0, 2] == -1).all()


def test_the_last_convolution_in_bfloat16(restored):
    conv = torch.nn.Conv2d(4, 3, 3, padding=1)
    x = torch.randn(1, 4, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert vae.in_float32(conv, x, padding=1).dtype == torch.float32
        variants.last_convolution_in_bfloat16()
        assert vae.in_float32(conv, x, padding=1).dtype == torch.bfloat16


# ------------------------------------------------------------------------------- the report


def scored(rng, better, seeds=3, images=200):
    """Made-up scores of a row that is better by a factor."""
    images_own = rng.uniform(0.5, 1.5, images)
    return {str(seed): {which: {
        "abs_rel": list(0.1 * images_own / better * rng.normal(1, 0.01)),
        "delta1": list(np.full(images, 0.8)),
        "boundary_f1": list(0.1 * images_own * better * rng.normal(1, 0.01))}
        for which in ("hypersim", "vkitti")} for seed in range(seeds)}


def test_the_report_finds_what_was_made_up(tmp_path):
    rng = np.random.default_rng(0)
    settings = dict(real=[["a", 3]], batch=4, scenes=tables.SCENES, steps=tables.STEPS)
    content = {"settings": settings, "seconds": {"depth": {"0": 180}}, "scores": {
        "square_root": scored(rng, 1.2), "disparity": scored(rng, 1.5), "depth": scored(rng, 1.0)}}
    path = tables_report.write_report(content, tmp_path)
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert "- depth, AbsRel of streets: worse; **agrees in sign** with the paper." in lines
    assert "- disparity, AbsRel of streets: better; **disagrees** with the paper." in lines
    assert "- disparity, F1 of rooms: better; the paper's figure is not known here." in lines
    assert "3.0 minutes" in text and "Not run yet" in text
    assert (tmp_path / "tables" / "III.png").stat().st_size > 1000
    assert path.read_text() == tables_report.write_report(content, tmp_path).read_text()


def test_a_difference_that_chance_explains():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (3, 200)) + rng.normal(0, 0.01, (3, 1))
    said = tables_report.verdict(noise, "abs_rel", 0.2, 0.083, 0.087)
    assert said.startswith("**cannot be told") and "seeds." in said
    rough = rng.normal(0, 0.5, (1, 200)) + rng.normal(0, 0.001, (3, 200))
    assert "images or rooms" in tables_report.verdict(rough, "abs_rel", 0.2, 0.083, 0.087)
    assert "not judged" in tables_report.verdict(noise[:1], "abs_rel", 0.2, 0.083, 0.087)


def test_the_number_of_seeds_finds_the_effect():
    """Simulated: with as many seeds as the sentence says, about four of five experiments find it.
    """
    rng = np.random.default_rng(0)

    def experiment(seeds):
        return (0.008 + rng.normal(0, 0.03, (1, 200)) + rng.normal(0, 0.006, (seeds, 1))
                + rng.normal(0, 0.001, (seeds, 200)))
    said = tables_report.needed(experiment(6), 0.008)
    seeds = int(said.split(" seeds")[0].split()[-1])
    found = [tables_report.interval(experiment(seeds))[0] > 0 for _ in range(100)]
    assert 3 <= seeds <= 12 and np.mean(found) > 0.6


def test_rows_are_paired_by_seed_and_rooms():
    mine = {"0": np.arange(4.0), "2": np.arange(4.0) + 1}
    first = {"2": np.zeros(4), "0": np.ones(4), "1": np.ones(4)}
    expected = [[-1, 0, 1, 2], [1, 2, 3, 4]]
    np.testing.assert_array_equal(tables_report.paired(mine, first, False), expected)
    rooms = tables_report.paired(mine, first, True)
    np.testing.assert_array_equal(rooms, [[-0.5, 1.5], [1.5, 3.5]])
    begun = tables_report.paired(mine, {"0": np.ones(4)}, False)  # its seed 2 is not there yet
    np.testing.assert_array_equal(begun, [[-1, 0, 1, 2]])
    once = tables_report.paired(mine, {"0": np.ones(4)}, False, trained=False)
    np.testing.assert_array_equal(once, [[-1, 0, 1, 2], [0, 1, 2, 3]])
    assert len(tables_report.paired({"0": np.ones(4)}, first, False)) == 1


def test_rows_are_kept_and_other_settings_refused(tmp_path):
    results = tables.Results(tmp_path / "results.json", {"steps": 1})
    results.add("depth", 0, {"vkitti": {"abs_rel": [0.1]}}, 12)
    again = tables.Results(tmp_path / "results.json", {"steps": 1})
    assert again.has("depth", 0) and not again.has("depth", 1)
    with pytest.raises(ValueError, match="other settings"):
        tables.Results(tmp_path / "results.json", {"steps": 2})


def test_a_variant_is_part_of_a_cache_and_of_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "fingerprint", cache.fingerprint)
    monkeypatch.setattr(run_folder, "decisive", run_folder.decisive)
    before = cache.fingerprint({"target": "depth"}, []), run_folder.decisive({"lr": 1})
    variants.remember("log")
    assert cache.fingerprint({"target": "depth"}, []) != before[0]
    assert run_folder.decisive({"lr": 1}) == before[1] | {"variant": "log"}


def test_scores_and_seconds_are_read(tmp_path):
    (tmp_path / "per_image.csv").write_text(
        "dataset,image,abs_rel,delta1,boundary_f1\nvkitti,a,0.123456,0.5,0.25\n")
    assert tables.scores_of(tmp_path) == {"vkitti": {"abs_rel": [0.12346], "delta1": [0.5],
                                                     "boundary_f1": [0.25]}}
    rows_ = [{"step": 10, "samples_per_second": 4}, {"step": 30, "samples_per_second": 2}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows_)))
    assert tables.seconds_of(tmp_path) == 10 + 40
