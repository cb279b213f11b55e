"""data/cache.py: entries are complete or absent, in the right folder, and shared by ranks."""

from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data import cache
from data.cache import CachedTrainingSet, fill, fingerprint
from data.pairs import FolderOfPairs
from data.training_set import TrainingSet, collate
from data.transforms import BadSample, FilteredSample


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
    names = [f"rgb%2F{number}{flip}" for number in range(4) for flip in ("", "%flipped")]
    wanted = [name + (".bad" if "F2" in name else ".safetensors") for name in names]
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
    entry = cached.folder / "0" / "rgb%2F1.safetensors"
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


def test_it_is_sized_before_it_starts(cached, caplog, monkeypatch):
    cached.sources = cached.sources * 2  # the second one's size is twice the first's
    cached.sizes = [(16, 24), (32, 24)]
    monkeypatch.setattr(cache, "BLOCK", 1)
    fill(cached, frozen, torch.float32, workers=0)
    one = 4 * 6 + 1  # six values and a cell; twice that in the second one, and a block begun
    assert f"will take {8 * (one + 1) + 8 * (2 * one + 1):,} bytes more" in caplog.text
    caplog.clear()
    fill(cached, frozen, torch.float32, workers=0)
    assert "will take" not in caplog.text  # nothing is missing


def test_what_does_not_fit_is_refused_after_the_first_entry(cached, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    calls = []
    with pytest.raises(OSError, match=r"would take 32,768 bytes more, 20,000 are free"):
        fill(cached, lambda batch: calls.append(1) or frozen(batch), torch.float32, workers=0)
    assert len(calls) == 1 and entries(cached) == []


def test_a_full_disk_leaves_no_half_entry(cached, monkeypatch):
    def full(tensors, path, *metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OSError, match="rgb%2F0.safetensors can't be written .*No space"):
        fill(cached, frozen, torch.float32, workers=0)
    assert entries(cached) == []


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_an_entry_that_is_damaged_while_it_is_used_is_named(cached, content):
    fill(cached, frozen, torch.float32, workers=0)
    for path in (cached.folder / "0").iterdir():
        path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(ValueError, match="rgb%2F.* in the cache is missing or damaged"):
        cached[0]


def test_damaged_entries_are_computed_again_and_counted(cached, caplog):
    """A bit that is wrong anywhere, blocks of zeros and what was cut off."""
    fill(cached, frozen, torch.float32, workers=0)
    folder = cached.folder / "0"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    paths = sorted(path for path in kept if path.suffix == ".safetensors")
    for place in range(0, len(kept[paths[0]]), 7):
        content = bytearray(kept[paths[0]])
        content[place] ^= 1 << place % 8
        paths[0].write_bytes(content)
        paths[1].write_bytes(bytes(len(kept[paths[1]])))
        paths[2].write_bytes(kept[paths[2]][:place])
        caplog.clear()
        fill(cached, frozen, torch.float32, workers=0)
        assert {path: path.read_bytes() for path in folder.iterdir()} == kept
        assert "3 entries of the cache were damaged" in caplog.text


def test_names_may_be_as_long_as_those_of_files_in_deep_folders(cached):
    name = "/".join(["n" * 240] * 3)
    cached.sources[0].name = lambda index: f"{name}{index}"
    fill(cached, frozen, torch.float32, workers=0)
    assert len(entries(cached)) == 8 and cached[0]["name"].startswith(name)


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
    assert "valid" in (cached.folder / "0" / "rgb%2F2.bad").read_text()


def test_what_could_not_be_read_is_tried_again(cached):
    fill(cached, frozen, torch.float32, workers=0)
    with pytest.raises(BadSample, match="2.npy has no valid"):
        cached.prepared(0, 2, True)
    root = cached.sources[0].root
    np.save(root / "depth/2.npy", np.load(root / "depth/1.npy"))
    fill(cached, frozen, torch.float32, workers=0)
    assert torch.equal(cached.prepared(0, 2, True)["z"], cached.prepared(0, 1, True)["z"])


def test_what_is_left_out_on_purpose_is_not_tried_again(cached, monkeypatch):
    def left_out(self, index):
        raise FilteredSample("too flat")

    monkeypatch.setattr(FolderOfPairs, "__getitem__", left_out)
    fill(cached, frozen, torch.float32, workers=0)
    with pytest.raises(FilteredSample, match="too flat"):
        cached.prepared(0, 0, False)
    monkeypatch.undo()
    fill(cached, lambda batch: pytest.fail("read again"), torch.float32, workers=0)


@pytest.mark.parametrize("names", [
    ("rgb/a", "rgb~a"), ("a", "a%flipped"), ("a/b", "a%2Fb"), ("a%b", "a%25b")])
def test_no_two_samples_share_an_entry(cached, monkeypatch, names):
    monkeypatch.setattr(FolderOfPairs, "name", lambda self, index: names[index])
    assert len({cached.entry(0, index, flip) for index in (0, 1) for flip in (0, 1)}) == 4


def test_a_long_name_in_any_script_has_an_entry(cached, monkeypatch):
    monkeypatch.setattr(FolderOfPairs, "name", lambda self, index: "rgb/" + f"写真{index}" * 30)
    fill(cached, frozen, torch.float32, workers=0)
    assert cached[0]["name"].startswith("rgb/写真")
