"""extras/compare.py: intervals and p-values that are known, and what cannot be compared."""

import csv
import json

import numpy as np
import pytest

from extras.compare import bootstrap, compare, paired_p


def write(folder, scores, name="pairs", **about):
    """A folder of results with one set; scores: {image: abs_rel}."""
    folder.mkdir()
    settings = dict(align="depth", align_negative="clamp", f1_mask="pair", f1_resolution="4x4")
    (folder / "metrics.json").write_text(json.dumps({name: settings | about}))
    with open(folder / "per_image.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "image", "abs_rel", "delta1", "boundary_f1"])
        writer.writerows([name, image, value, 1 - value, value / 2]
                         for image, value in scores.items())
    return folder


def test_the_bootstrap_covers_the_known_mean():
    """The interval of normal scores is about 1.96 standard errors to each side."""
    values = np.random.default_rng(1).normal(0.1, 0.02, 400)
    low, high = bootstrap(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (low, high) == tuple(bootstrap(values))  # a fixed seed


def test_p_is_exact_where_it_can_be_counted():
    """Five differences of one sign: 2 of the 32 sign patterns are as extreme."""
    assert paired_p(np.arange(5) + 1.0, np.zeros(5)) == pytest.approx(2 / 32, abs=0.01)
    assert paired_p(np.array([1.0, -1.0]), np.zeros(2)) == 1
    rng = np.random.default_rng(0)
    one = rng.random(300)
    assert paired_p(one, one + rng.normal(0, 0.1, 300)) > 0.02
    assert paired_p(one, one + 0.05 + rng.normal(0, 0.1, 300)) < 0.001


def test_tables_side_by_side(tmp_path):
    one = write(tmp_path / "one", {f"a/{i}": 0.1 + 0.001 * i for i in range(20)})
    two = write(tmp_path / "two", {f"a/{i}": 0.2 + 0.001 * i for i in range(5, 25)})
    text = compare([one, two], {"pairs": {"Somebody": (0.05, 0.9)}})
    assert "pairs: 15 images that all have" in text
    assert "11.20 [" in text and "21.20 [" in text
    assert "Somebody (published)" in text and "warning" not in text


def test_another_protocol_is_said(tmp_path):
    one = write(tmp_path / "one", {"a": 0.1, "b": 0.2})
    two = write(tmp_path / "two", {"a": 0.1, "b": 0.2}, align="disparity")
    assert "warning: align differs (depth, disparity)" in compare([one, two], {})


def test_what_cannot_be_compared_is_told(tmp_path):
    one = write(tmp_path / "one", {"a": 0.1})
    with pytest.raises(ValueError, match="no data set in common"):
        compare([one, write(tmp_path / "two", {"a": 0.1}, name="kitti")], {})
    with pytest.raises(ValueError, match="no image in common"):
        compare([one, write(tmp_path / "three", {"b": 0.1})], {})
    with pytest.raises(FileNotFoundError, match="holds no metrics.json"):
        compare([one, tmp_path], {})
    for file, content in (("metrics.json", "{"), ("per_image.csv", "a,b\n1,2"),
                          ("per_image.csv", "dataset,image,abs_rel,delta1,boundary_f1\npairs,a,x")):
        damaged = write(tmp_path / f"damaged{file}{len(content)}", {"a": 0.1})
        (damaged / file).write_text(content)
        with pytest.raises(ValueError, match="damaged.* holds a damaged metrics.json or per_image"):
            compare([one, damaged], {})
