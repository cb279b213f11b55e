"""The embedded models in weights/: sizes, kinds, and what they score on scenes they never saw."""

import numpy as np
import pytest
import torch

from data.hypersim import Hypersim
from data.transforms import normalise_target
from evaluation.loop import evaluate_dataset
from metrics import mean_scores, score
from miniature import embedded, pretrain, render
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2

FRAMES = 8  # of those held out, where a few are enough


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    render.ensure(folder, val=embedded.FRAMES["val"], workers=1)
    return Hypersim(folder / "hypersim", "val")


def test_files_are_small():
    files = [embedded.SD2, embedded.DINOV2, embedded.TRAINED]
    assert sum(path.stat().st_size for path in files) < 24e6


def scores_of(path, reader, indices):
    """Of a model, one dict for each of a reader's samples."""
    model = DepthMaster.from_file(path).for_inference(precision="float32")
    rows = evaluate_dataset(lambda samples: model.predict_batch(torch.stack(
        [sample["image"] for sample in samples])), reader, ["sqrt_disparity"], 1e-5, 65.0,
        chunks=[[index] for index in indices])
    return [row.scores["sqrt_disparity"] for row in rows]


def test_the_trained_model_sees_depth(held_out):
    """What it must reach on all frames that are held out, and what no training did not."""
    assert DepthMaster.from_file(embedded.TRAINED).kind in ("stage1", "stage2")
    assert DepthMaster.from_file(embedded.SD2).kind == "sd2"
    trained = scores_of(embedded.TRAINED, held_out, range(len(held_out)))
    means = mean_scores(trained)
    assert len(trained) == 48 and means["abs_rel"] <= 0.15 and means["delta1"] >= 0.8
    untrained = mean_scores(scores_of(embedded.SD2, held_out, range(FRAMES)))
    assert mean_scores(trained[:FRAMES])["abs_rel"] < 0.6 * untrained["abs_rel"]


def test_the_autoencoder_keeps_depth_edges(held_out):
    model = DepthMaster.from_file(embedded.SD2)
    rows = []
    for sample in (held_out[index] for index in range(FRAMES)):
        target = normalise_target(sample["depth"], sample["valid"])
        rows.append(score(model.round_trip(target[None])[0], sample["depth"][0],
                          sample["valid"][0], "sqrt_disparity", 1e-5, 65.0))
    means = mean_scores(rows)
    assert means["boundary_f1"] >= 0.4 and means["abs_rel"] < 0.05


def test_the_base_and_the_trained_model_share_the_autoencoder():
    base, trained = (DepthMaster.from_file(path) for path in (embedded.SD2, embedded.TRAINED))
    for name, value in base.vae.state_dict().items():
        assert torch.equal(value, trained.vae.state_dict()[name])


def test_the_teacher_tells_places_apart(held_out):
    """Tokens of patches of one class are closer to each other than to those of other classes."""
    teacher = DINOv2.from_file(embedded.DINOV2)
    from losses.alignment import teacher_image
    from miniature.pretrain import semantic_classes
    within, across = [], []
    for index in range(FRAMES):
        image = held_out[index]["image"][None] / 127.5 - 1
        with torch.no_grad():
            tokens = teacher(teacher_image(image, 14, DINOv2.mean, DINOv2.std))[0]
        classes = semantic_classes(held_out, index)[8::16, 8::16].flatten()
        tokens = torch.nn.functional.normalize(tokens - tokens.mean(0), dim=1)
        similar = tokens @ tokens.T
        same = classes[:, None] == classes[None]
        within.append(similar[same].mean().item())
        across.append(similar[~same].mean().item())
    assert np.mean(within) > np.mean(across) + 0.2


def test_publishing_needs_a_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "publish"])
    with pytest.raises(SystemExit) as stopped:
        pretrain.main()
    assert stopped.value.code == 2 and "publish needs --ckpt" in capsys.readouterr().err
