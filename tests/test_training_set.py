"""data/training_set.py: telling data sets apart, samples as a pure function of k, replacement."""

import multiprocessing
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypersim_files import frame_path, scene_arrays, write_data_set, write_frame, write_split_csv
from torch.utils.data import DataLoader

from data import loading
from data.hypersim import Hypersim, ProcessedHypersim
from data.pairs import FolderOfPairs
from data.sampler import StepBatchSampler, draw_step, replacements, shuffled_index
from data.sources import open_training_source
from data.training_set import (
    TrainingSet,
    collate,
    has_complete_cell,
    open_training_set,
    read_batches,
)
from data.transforms import BadSample, FilteredSample, normalise_target, resize_nearest
from data.vkitti import VirtualKITTI

SIZE, WIDE = (32, 40), (24, 56)
MIX = [0.7, 0.3]


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """Ends workers that a test left; a loader that is collected later would wait ten seconds."""
    yield
    for worker in multiprocessing.active_children():
        worker.kill()



class Rooms:
    """A reader in memory; `faults` maps indices to the error that reading them raises."""

    root = "rooms"

    def __init__(self, length=13, size=(36, 44), faults=None, valid=None):
        self.length, self.size, self.faults, self.valid = length, size, faults or {}, valid

    def __len__(self):
        return self.length

    def name(self, i):
        return f"room_{i}"

    def __getitem__(self, i):
        if i in self.faults:
            raise self.faults[i]
        random = np.random.default_rng(i)
        depth_m = torch.from_numpy(random.uniform(0.5, 20, (1, *self.size)).astype(np.float32))
        valid = torch.ones_like(depth_m, dtype=torch.bool) if self.valid is None else self.valid
        image = torch.from_numpy(random.integers(0, 256, (3, *self.size), dtype=np.uint8))
        return dict(image=image, depth=depth_m, valid=valid, name=self.name(i))


def training_set(sources=None, batch=8, seed=3, probabilities=MIX, sizes=(SIZE, WIDE), target=None):
    sources = sources or [Rooms(), Rooms(5, WIDE)]
    return TrainingSet(sources, probabilities, sizes, target or "sqrt_disparity", seed, batch)


def same(one, other):
    return one["name"] == other["name"] and all(
        torch.equal(one[key], other[key]) for key in ("image", "target", "valid"))


# ---- samples ----


@pytest.mark.parametrize("target", ["sqrt_disparity", "disparity", "depth"])
def test_a_sample_is_the_readers_normalised_then_resized_then_flipped(target):
    samples = training_set(target=target)
    flipped = 0
    for k in range(40):
        step, place = divmod(k, 8)
        source, flip = draw_step(3, step, 8, MIX)
        reader, size = samples.sources[source[place]], samples.sizes[source[place]]
        original = reader[shuffled_index(3, source[place], len(reader), k)]
        # At full resolution first: the quantiles of the small picture would be others.
        y = resize_nearest(normalise_target(original["depth"], original["valid"], target), size)
        image = resize_nearest(original["image"], size)
        if flip[place]:
            y, image, flipped = y.flip(-1), image.flip(-1), flipped + 1
        sample = samples[k]
        assert sample["name"] == original["name"] and sample["replaced"] == []
        assert torch.equal(sample["target"], y) and torch.equal(sample["image"], image)
        assert sample["valid"].shape == (1, *size) and sample["valid"].dtype == torch.bool
    assert 0 < flipped < 40


def test_far_code_survives_resize_and_flip():
    mask = torch.ones(1, 36, 44, dtype=torch.bool)
    mask[:, :, 30:] = False
    for target, far in (("sqrt_disparity", -1), ("depth", 1)):
        samples = training_set([Rooms(valid=mask)], 8, 3, [1.0], [SIZE], target)
        for k in range(8):
            sample = samples[k]
            assert (sample["target"][~sample["valid"]] == far).all()
            assert (~sample["valid"]).any()


def test_samples_do_not_depend_on_workers_micro_batches_or_restarts():
    expected = [training_set()[k] for k in range(48)]
    for workers, micro_batch, first_step in ((0, 8, 0), (2, 3, 4)):
        sampler = StepBatchSampler(3, 8, micro_batch, MIX, (SIZE, WIDE), first_step, 6)
        loader = DataLoader(training_set(), batch_sampler=sampler, num_workers=workers,
                            collate_fn=collate)
        places = list(sampler)
        for batch, ks in zip(loader, places, strict=True):
            assert batch["image"].shape[0] == len(ks) <= micro_batch
            assert same(batch, collate([expected[k] for k in ks]))
        assert sorted(sum(places, [])) == list(range(first_step * 8, 48))
    assert not all(same(training_set(seed=4)[k], expected[k]) for k in range(8))


def test_antialias_changes_the_image_alone():
    options = dict(sources=[Rooms()], probabilities=[1.0], sizes=[(16, 24)], seed=3, batch=8)
    plain, smooth = TrainingSet(**options)[0], TrainingSet(**options, rgb_resize="antialias")[0]
    assert torch.equal(plain["target"], smooth["target"])
    assert smooth["image"].float().std() < 0.8 * plain["image"].float().std()


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="target is 'metres'"):
        training_set(target="metres")
    with pytest.raises(ValueError, match="resizing of images is 'area'"):
        TrainingSet([Rooms()], [1.0], [SIZE], rgb_resize="area")


# ---- replacement ----


def test_a_bad_sample_is_replaced_by_another_from_a_stream_of_its_own():
    faults = {4: BadSample("room_4/depth.hdf5 is missing."),
              7: FilteredSample("room_7 is dull."), 8: BadSample("room_8 is cut off.")}
    broken, whole = (training_set([Rooms(faults=each), Rooms(5, WIDE)]) for each in (faults, {}))
    seen = set()
    for k in range(200):
        step, place = divmod(k, 8)
        source, flip = draw_step(3, step, 8, MIX)
        if source[place] == 1:
            assert same(broken[k], whole[k])
            continue
        order = [shuffled_index(3, 0, 13, k), *islice(replacements(3, 0, 13, k), 99)]
        chosen = next(i for i in order if i not in faults)
        passed = order[:order.index(chosen)]
        sample = broken[k]
        assert sample["name"] == f"room_{chosen}"
        assert [entry.name for entry in sample["replaced"]] == [f"room_{i}" for i in passed]
        for i, (_, reason, filtered) in zip(passed, sample["replaced"]):
            assert (reason, filtered) == (str(faults[i]), i == 7)
        image = resize_nearest(Rooms()[chosen]["image"], SIZE)
        assert torch.equal(sample["image"], image.flip(-1) if flip[place] else image)
        seen.update(passed)
    assert seen == set(faults)
    assert same(broken[77], broken[77])


def test_replacements_are_hardly_ever_what_the_step_draws_anyway():
    """With the 9.5 % that Hypersim's filter leaves out, the next of the order was, 2.5 times."""
    dull = np.random.default_rng(0).random(53_885) < 0.095
    doubles = 0
    for step in range(100):
        seen = []
        for k in range(32 * step, 32 * step + 32):
            row = [shuffled_index(0, 0, len(dull), k), *islice(replacements(0, 0, len(dull), k), 9)]
            seen.append(next(index for index in row if not dull[index]))
        doubles += len(seen) - len(set(seen))
    assert doubles <= 3  # 0.008 a step are to be expected


def test_the_largest_size_is_that_of_the_most_pixels():
    samples = training_set([Rooms(), Rooms(5, WIDE)], sizes=[(480, 640), (352, 1216)])
    assert samples.largest_size() == (352, 1216)


def test_flat_depth_and_no_complete_cell_are_replaced():
    holes = torch.ones(1, 36, 44, dtype=torch.bool)
    holes[:, ::6] = False  # a row in every six: no 8x8 cell is whole
    sparse = training_set([Rooms(valid=holes)], probabilities=[1.0], sizes=[SIZE])
    with pytest.raises(ValueError, match="rooms: 100 samples in a row.*at 32x40, no cell of 8x8"):
        sparse[0]

    class OneFlat(Rooms):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return dict(sample, depth=torch.full_like(sample["depth"], 3)) if i == 2 else sample

    samples = training_set([OneFlat()], probabilities=[1.0], sizes=[SIZE])
    replaced = [entry for k in range(13) for entry in samples[k]["replaced"]]
    assert {entry.name for entry in replaced} == {"room_2"}
    assert "room_2 has equal" in replaced[0].reason and not replaced[0].filtered


def test_cells_are_those_of_the_flipped_sample():
    """At a width of 12 the one cell is the first 8 columns, flipped or not."""
    valid = torch.ones(1, 8, 12, dtype=torch.bool)
    valid[..., 8:] = False
    samples = training_set([Rooms(size=(8, 12), valid=valid)], probabilities=[1.0],
                           sizes=[(8, 12)])
    assert has_complete_cell(samples.prepared(0, 0, False)["valid"])
    with pytest.raises(BadSample, match="no cell of 8x8"):
        samples.prepared(0, 0, True)


def test_other_errors_are_not_swallowed():
    samples = training_set([Rooms(faults={i: ZeroDivisionError() for i in range(13)})],
                           probabilities=[1.0], sizes=[SIZE])
    with pytest.raises(ZeroDivisionError):
        samples[0]


def test_complete_cells():
    valid = torch.zeros(1, 20, 27, dtype=torch.bool)
    valid[:, 3:11, 5:13] = True  # 8x8 pixels, but across cells
    assert not has_complete_cell(valid)
    valid[:, 8:16, 16:24] = True
    assert has_complete_cell(valid)
    valid[:, 12, 20] = False
    assert not has_complete_cell(valid)
    valid[:, 16:, :] = valid[:, :, 24:] = True  # beyond the last whole cell
    assert not has_complete_cell(valid)


def test_reading_stops_at_too_many_bad_samples():
    def names(faults, steps=20):
        samples = training_set([Rooms(faults=faults)], probabilities=[1.0], sizes=[SIZE])
        sampler = StepBatchSampler(3, 8, 8, [1.0], [SIZE], 0, steps)
        said = []
        batches = read_batches(samples, sampler, 0, lambda name, reason: said.append(reason))
        return [name for batch in batches for name in batch["name"]], said

    read, said = names({2: FilteredSample("dull")})
    assert len(read) == 160 and said == []
    with pytest.raises(ValueError, match="can't be used, over 1%: torn"):
        names({2: BadSample("torn")})
    assert names({2: BadSample("torn")}, steps=2)[1] == ["torn"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_is_all_torn_is_one_sentence(workers):
    faults = {i: BadSample(f"room_{i}.png is cut off.") for i in range(13)}
    samples = training_set([Rooms(faults=faults)], probabilities=[1.0], sizes=[SIZE])
    sampler = StepBatchSampler(3, 8, 8, [1.0], [SIZE], 0, 5)
    try:  # not pytest.raises: it keeps the error, which keeps the worker, which is awaited for 10 s
        next(read_batches(samples, sampler, workers, print))
    except ValueError as error:
        said = str(error)
    assert said.startswith("rooms: 100 samples in a row can't be used, the last being")
    assert "\n" not in said


LEFT = """
from itertools import islice
from data.sampler import replacements, StepBatchSampler
from data.training_set import read_batches
from tests.test_training_set import SIZE, Rooms, training_set
samples = training_set([Rooms()], probabilities=[1.0], sizes=[SIZE])
batches = read_batches(samples, StepBatchSampler(3, 8, 8, [1.0], [SIZE], 0, 500), 2, print)
next(batches)
raise ValueError("in the midst of reading")
"""


def test_a_program_that_fails_does_not_wait_for_its_readers():
    root = Path(__file__).parents[1]
    paths = os.pathsep.join((str(root), str(root / "tests")))
    done = subprocess.run([sys.executable, "-c", LEFT], cwd=root, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths}, timeout=60)
    assert done.returncode == 1 and "in the midst of reading" in done.stderr


# ---- real readers ----


def test_raw_hypersim_with_corrupt_files(tmp_path):
    write_data_set(tmp_path, train=6)
    write_frame(tmp_path, frame=6, color=np.full_like(scene_arrays()[0], 3))
    write_split_csv(tmp_path, [("ai_001_001", frame, "train") for frame in range(7)])
    frame_path(tmp_path, "ai_001_001", 2, "depth_meters").write_bytes(b"torn")
    samples = TrainingSet([open_training_source(tmp_path)], [1.0], [SIZE], seed=1, batch=7)
    replaced, names = [], set()
    for k in range(7):
        sample = samples[k]
        assert torch.isfinite(sample["target"]).all() and sample["target"].abs().max() == 1
        names.add(sample["name"])
        replaced += sample["replaced"]
    assert {(entry.name[-10:-6], entry.filtered) for entry in replaced} == {
        ("0002", False), ("0006", True)}
    assert len(names) == 5


def test_mix_of_hypersim_and_virtual_kitti(tmp_path):
    write_data_set(tmp_path / "rooms")
    write_street(tmp_path / "streets")
    mixed = open_training_set(tmp_path / "rooms", tmp_path / "streets", SIZE, crop=WIDE)
    shapes = {samples["image"].shape[1:] for samples in (mixed[k] for k in range(32))}
    assert shapes == {SIZE, WIDE} and mixed.probabilities == [0.9, 0.1]


# ---- telling data sets apart ----


def write_street(root):
    frames = root / "Scene02/clone/frames"
    for kind, file in (("rgb", "rgb_00000.jpg"), ("depth", "depth_00000.png")):
        (frames / kind / "Camera_0").mkdir(parents=True)
        array = np.random.default_rng(0).integers(1, 5000, (30, 60)).astype(np.uint16)
        if kind == "rgb":
            array = (array % 256).astype(np.uint8)[..., None].repeat(3, -1)
        iio.imwrite(frames / kind / "Camera_0" / file, array)


def write_pair(folder, image="rgb/a.png", depth="depth/a.png"):
    random = np.random.default_rng(0)
    for path, array in ((image, random.integers(0, 256, (16, 16, 3), dtype=np.uint8)),
                        (depth, random.integers(1, 9000, (16, 16)).astype(np.uint16))):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(folder / path, array)


def test_tells_data_sets_apart_by_content(tmp_path):
    write_data_set(tmp_path / "raw")
    for name, folder in (("processed", "train/ai_001_001"), ("flat", "ai_001_001")):
        write_pair(tmp_path / name / folder, "rgb_cam_00_fr0000.png",
                   "depth_plane_cam_00_fr0000.png")
    write_split_csv(tmp_path / "flat", [("ai_001_001", 0, "train")])  # as some copy it along
    write_street(tmp_path / "streets")
    (tmp_path / "archives/rgb").mkdir(parents=True)
    (tmp_path / "archives/depth").mkdir()
    write_street(tmp_path / "archives/rgb")
    write_street(tmp_path / "archives/depth")
    write_pair(tmp_path / "pairs")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed/pairs.csv").write_text("image,depth\na.png,b.png\n")
    kinds = {"raw": Hypersim, "processed": ProcessedHypersim, "flat": ProcessedHypersim,
             "streets": VirtualKITTI, "archives": VirtualKITTI, "pairs": FolderOfPairs,
             "listed": FolderOfPairs}
    for name, kind in kinds.items():
        reader = open_training_source(tmp_path / name)
        assert type(reader) is kind and len(reader) == (4 if name == "raw" else 1)
    assert open_training_source(tmp_path / "pairs", depth_scale=250.0).depth_scale == 250
    assert open_training_source(tmp_path / "streets", crop=WIDE)[0]["depth"].shape == (1, *WIDE)


def test_splits_of_pairs(tmp_path, caplog):
    write_pair(tmp_path / "flat")
    assert len(open_training_source(tmp_path / "flat")) == 1 and not caplog.records
    assert len(open_training_source(tmp_path / "flat", "val")) == 1
    assert "all of it serves as val" in caplog.text
    write_pair(tmp_path / "split/train")
    assert open_training_source(tmp_path / "split").root == tmp_path / "split/train"
    with pytest.raises(FileNotFoundError, match="split/val has no pair"):
        open_training_source(tmp_path / "split", "val")


def test_roots_that_are_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_training_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is empty"):
        open_training_source(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no data set that is known; looked for raw Hyper"):
        open_training_source(tmp_path / "photos")
    (tmp_path / "raw/ai_001_001/images").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="split_scene_v1.csv is missing; put"):
        open_training_source(tmp_path / "raw")


def test_a_data_set_one_level_off_is_named(tmp_path):
    """The folder above it, or one inside it."""
    write_data_set(tmp_path / "sets/hypersim")
    inside = tmp_path / "sets/hypersim/ai_001_001"
    for given in (tmp_path / "sets", inside):
        with pytest.raises(FileNotFoundError, match="is no data set that is known, but "
                           f"{tmp_path}/sets/hypersim is: give that"):
            open_training_source(given)
    for kind in ("rgb", "depth"):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"but {tmp_path}/pairs is: give that"):
        open_training_source(tmp_path / "pairs/rgb")
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="a.tar is a file: unpack it"):
        open_training_source(tmp_path / "a.tar")


def test_without_room_in_shared_memory_samples_are_sent_as_bytes(monkeypatch):
    monkeypatch.setattr(loading, "SHARED", "/")
    monkeypatch.setattr(loading, "ROOM", 1 << 62)
    sampler = StepBatchSampler(3, 8, 2, MIX, [SIZE, WIDE], 0, 2)
    sent = list(read_batches(training_set(), sampler, 2, on_bad=None))
    monkeypatch.setattr(loading, "ROOM", 0)
    shared = list(read_batches(training_set(), sampler, 2, on_bad=None))
    assert len(sent) == len(shared) > 4
    for one, other in zip(sent, shared):
        assert one["name"] == other["name"]
        assert all(torch.equal(one[key], other[key]) for key in ("image", "target", "valid"))


class Breaks(Rooms):
    def __getitem__(self, i):
        raise RuntimeError("CUDA is unhappy" if i % 2 else "of another kind")


def test_an_error_of_a_worker_is_not_called_its_death():
    samples = training_set([Breaks()], probabilities=[1.0], sizes=[SIZE])
    with pytest.raises(RuntimeError, match="CUDA is unhappy|of another kind") as caught:
        list(loading.read_ahead(samples, 1, batch_size=None, sampler=[0]))
    assert "died" not in str(caught.value) and "room_" in "".join(caught.value.__notes__)


def test_a_worker_that_gives_nothing_is_noticed(monkeypatch):
    class Sleeps(Rooms):
        def __getitem__(self, i):
            time.sleep(3)

    monkeypatch.setattr(loading, "LONGEST_WAIT", 1)
    monkeypatch.setattr(loading, "LOOK_AFTER", 0.5)
    samples = training_set([Sleeps()], probabilities=[1.0], sizes=[SIZE])
    with pytest.raises(ValueError, match="nothing was read for 1 seconds.*room_.*--workers 0"):
        list(loading.read_ahead(samples, 1, batch_size=None, sampler=[0]))
