"""data/cache.py: entries are complete or absent, in the right folder, and shared by ranks."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data.cache import BAD, CachedTrainingSet, fill, fingerprint
from data.pairs import FolderOfPairs
from data.training import TrainingSet, collate


@pytest.fixture
def cached(tmp_path):
    """Four pairs, the third without depth; nothing computed yet."""
    rng = np.random.default_rng(0)
    for kind in ("rgb", "depth"):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
    for number in range(4):
        depth_m = rng.uniform(1, 9, (16, 24)).astype(np.float32) * (number != 2)
        iio.imwrite(tmp_path / f"pairs/rgb/{number}.png",
                    rng.integers(256, size=(16, 24, 3), dtype=np.uint8))
        np.save(tmp_path / f"pairs/depth/{number}.npy", depth_m)
    training_set = TrainingSet([FolderOfPairs(tmp_path / "pairs")], [1.0], [(16, 24)], batch=2)
    return CachedTrainingSet(training_set, tmp_path / "cache")


def frozen(batch):
    """What stands for the networks: it tells flips and samples apart."""
    return {"z": batch["target"][:, :, ::8, ::8].clone(), "cells": batch["valid"][:, :, :1, :1]}


def entries(cached):
    return sorted(path.name for path in (cached.folder / "0").iterdir())


def test_every_sample_and_flip_gets_an_entry_or_a_reason(cached):
    fill(cached, frozen, torch.float32, workers=0)
    names = [f"rgb~{number}{flip}" for number in range(4) for flip in ("", "~flipped")]
    wanted = [name + (BAD if "~2" in name else ".safetensors") for name in names]
    assert entries(cached) == sorted(wanted)


def test_samples_are_those_of_the_training_set_in_its_order(cached):
    fill(cached, frozen, torch.float32, workers=0)
    plain = TrainingSet(cached.sources, [1.0], cached.sizes, batch=2)
    for k in range(12):
        kept, sample = cached[k], plain[k]
        assert kept["name"] == sample["name"]
        assert [r.name for r in kept["replaced"]] == [r.name for r in sample["replaced"]]
        expected = frozen(collate([sample]))
        assert torch.equal(kept["z"], expected["z"][0])
        assert kept["cells"].dtype == torch.bool


def test_half_precision_keeps_masks(cached):
    fill(cached, frozen, torch.float16, workers=0)
    assert cached[0]["z"].dtype == torch.float16 and cached[0]["cells"].dtype == torch.bool


def test_only_what_is_missing_is_computed_and_a_torn_write_is_no_entry(cached):
    fill(cached, frozen, torch.float32, workers=0)
    entry = cached.folder / "0" / "rgb~1.safetensors"
    entry.rename(entry.with_name(entry.name + ".tmp"))  # killed before the rename
    calls = []
    fill(cached, lambda batch: calls.append(batch["name"]) or frozen(batch), torch.float32, 0)
    assert calls == [["rgb/1"]] and entry.exists()


def test_ranks_share_the_work(cached):
    seen = []
    for rank in range(2):
        fill(cached, lambda batch: seen.append(batch["name"]) or frozen(batch), torch.float32, 0,
             rank, 2)
    fill(cached, lambda batch: pytest.fail("computed twice"), torch.float32, 0)
    assert len(seen) == 6  # of 8, two are bad


def test_fingerprint_depends_on_settings_and_contents(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = fingerprint({"target": "depth"}, [file])
    assert first == fingerprint({"target": "depth"}, [file])
    assert first != fingerprint({"target": "disparity"}, [file])
    file.write_bytes(b"two")
    assert first != fingerprint({"target": "depth"}, [file])


def test_a_reason_is_kept(cached):
    fill(cached, frozen, torch.float32, workers=0)
    reason, filtered = json.loads((cached.folder / "0" / f"rgb~2{BAD}").read_text())
    assert "valid" in reason and not filtered
