"""evaluation/loop.py, on a small model and pictures of two sizes."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from evaluation import loop
from data.pairs import FolderOfPairs
from evaluation.loop import evaluate_dataset
from metrics import SCORES, mean_scores, score
from nets.depthmaster import DepthMaster
from tests.worlds import boxes, photo, save_tiny

SIZES = [(40, 60), (40, 60), (45, 50), (40, 60), (40, 60), (40, 60), (45, 50)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for kind in ("rgb", "depth"):
        (folder / kind).mkdir()
    for number, size in enumerate(SIZES):
        depth_m, _ = boxes(*size, holes=0.05, seed=number)
        depth_m[:5] = 90  # beyond what other sets' predictions are clipped to
        iio.imwrite(folder / f"rgb/{number}.png", photo(*size, seed=number))
        np.save(folder / f"depth/{number}.npy", depth_m.astype(np.float32))
    return FolderOfPairs(folder)


def model_of(folder, target):
    return DepthMaster.from_file(save_tiny(folder / f"{target}.safetensors", target=target))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("model"), "sqrt_disparity")


def by_hand(model, reader, indices):
    """Mean scores of samples, one after the other."""
    return mean_scores([score(model.predict(sample["image"].permute(1, 2, 0).numpy()),
                              sample["depth"][0], sample["valid"][0], model.target, 1e-5, np.inf)
                        for sample in (reader[index] for index in indices)])


@pytest.mark.parametrize("images, indices", [
    (1, [0]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (99, range(len(SIZES))),
])
def test_scores_are_those_of_samples_spread_over_the_reader(model, reader, images, indices):
    scores = loop.validate(model, reader, images, torch.float32)
    assert list(scores) == list(SCORES)
    assert scores == pytest.approx(by_hand(model, reader, indices), rel=1e-9)


@pytest.mark.parametrize("target", ["sqrt_disparity", "disparity", "depth"])
def test_all_samples_score_as_in_an_evaluation(reader, tmp_path, target):
    """In the space of the model's target."""
    model = model_of(tmp_path, target)
    rows = evaluate_dataset(lambda samples: model.predict_batch(torch.stack(
        [sample["image"] for sample in samples])), reader, [target], 1e-5, np.inf)
    expected = mean_scores([row.scores[target] for row in rows])
    assert loop.validate(model, reader, 99, torch.float32) == expected


@pytest.mark.parametrize("name, res, far", [("hypersim", 0, 65.0), ("vkitti", 0, 80.0),
                                            ("pairs", None, np.inf)])
def test_a_set_is_scored_as_in_its_evaluation(model, reader, name, res, far, monkeypatch):
    """At its own resolution, and clipped to its own range."""
    monkeypatch.setattr(reader, "benchmark", name)
    sample = reader[2]
    pred = model.predict(sample["image"].permute(1, 2, 0).numpy(), res)
    expected = score(pred, sample["depth"][0], sample["valid"][0], model.target, 1e-5, far)
    found = loop.validate(model, Only(reader, 2), 1, torch.float32)
    assert found == pytest.approx(expected, rel=1e-9)


class Only:
    """One sample of a reader."""

    def __init__(self, reader, index):
        self.reader, self.index, self.benchmark = reader, index, reader.benchmark

    def __len__(self):
        return 1

    def name(self, i):
        return self.reader.name(self.index)

    def __getitem__(self, i):
        return self.reader[self.index]


def test_precision_is_autocasts(model, reader):
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(model, reader, [0, 6])
    found = loop.validate(model, reader, 2, torch.bfloat16)
    assert found == pytest.approx(expected, rel=1e-9) and found != by_hand(model, reader, [0, 6])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model, reader, training):
    modes = []
    hook = model.unet.register_forward_hook(lambda *_: modes.append(model.training))
    loop.validate(model.train(training), reader, 2, torch.float32)
    hook.remove()
    assert modes == [False, False] and model.training == training


def test_the_picture_shows_the_first_samples_of_one_size(model, reader, tmp_path):
    """Of seven samples four are looked at, and the third's size is another."""
    path = tmp_path / "pictures/1.png"
    loop.validate(model, reader, 99, torch.float32, path)
    picture = iio.imread(path)
    height = len(picture) // 3
    assert picture.shape == (3 * height, 4 * 60, 3) and height > 40
    for row, index in enumerate([0, 1, 3]):
        shown = picture[(row + 1) * height - 40:(row + 1) * height, :60]
        assert np.array_equal(shown, reader[index]["image"].permute(1, 2, 0).numpy())


def test_a_check_is_a_row_a_line_and_a_picture(model, reader, tmp_path, capsys):
    rows, shown = [], []

    class Log:
        write, show = rows.append, lambda step, picture: shown.append((step, picture.shape))

    loop.check(model, reader, 2, torch.float32, tmp_path, 30, Log)
    scores = by_hand(model, reader, [0, 6])
    assert len(rows) == 1 and rows[0]["step"] == 30
    assert rows[0]["validation"] == pytest.approx(scores, rel=1e-9)
    assert (tmp_path / "pictures/000030.png").read_bytes() == (
        tmp_path / "validation.png").read_bytes()
    assert shown[0][0] == 30 and shown[0][1][2] == 3
    said = capsys.readouterr().err
    for name in ("abs_rel", "delta1", "boundary_f1"):
        assert f" {scores[name]:.3f}" in said
