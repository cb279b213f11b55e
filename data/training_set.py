"""The training set: samples of several data sets, drawn, normalised, resized and flipped."""

import hashlib
import logging
import math
import os
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from einops import reduce
from torch.utils.data import Dataset

from data.loading import preflight, read_ahead
from data.pairs import FolderOfPictures, add_pair_options
from data.sampler import StepBatchSampler, draw_step, replacements, shuffled_index
from data.sources import check_folder, open_reader, open_training_source
from data.transforms import (
    KITTI_CROP,
    TARGETS,
    BadSample,
    FilteredSample,
    normalise_target,
    resize_antialias,
    resize_nearest,
)
from data.vkitti import VirtualKITTI

log = logging.getLogger(__name__)

RGB_RESIZES = {"nearest-exact": resize_nearest, "antialias": resize_antialias}
# This many unusable samples in a row mean that the data set is broken, not only single files.
MAX_REPLACEMENTS = 100
# A run stops if a larger share of the drawn samples is bad; MIN_BAD samples are always allowed.
MAX_BAD_SHARE, MIN_BAD = 0.01, 10
CELL = 8  # pixels across a cell of the latent


class Replaced(NamedTuple):
    """A sample that was drawn and couldn't be used. filtered: left out on purpose, not bad."""

    name: str
    reason: str
    filtered: bool


class TrainingSet(Dataset):
    """Sample k is place k % batch of step k // batch: a pure function of (seed, batch, k).

    `sampler` returns the batch sampler that yields the k of one rank.
    """

    def __init__(self, sources, probabilities, sizes, target="sqrt_disparity", seed=0, batch=32,
                 rgb_resize="nearest-exact"):
        """sources: readers; probabilities: of drawing each reader; sizes: (h, w) of its samples.

        target: the space of the target, one of TARGETS; rgb_resize: one of RGB_RESIZES (target
        and mask are always resized by nearest-exact).
        """
        if target not in TARGETS:
            raise ValueError(f"the target is {target!r}, but must be one of {', '.join(TARGETS)}.")
        if rgb_resize not in RGB_RESIZES:
            raise ValueError(f"the resizing of images is {rgb_resize!r}, but must be one of "
                             f"{', '.join(RGB_RESIZES)}.")
        self.sources, self.probabilities = list(sources), list(probabilities)
        self.sizes = [tuple(size) for size in sizes]
        self.target, self.seed, self.batch, self.rgb_resize = target, seed, batch, rgb_resize
        self.reading = None  # a Reading, set by `read_ahead`

    def __getitem__(self, k):
        """dict(image uint8 3,h,w; target float32 1,h,w in [-1,1]; valid bool 1,h,w; name;
        replaced: list of Replaced; place int64: k).

        A sample that can't be used is replaced by another of its data set; `replaced` lists
        the unusable ones. Raises ValueError if 100 in a row can't be used.
        """
        step, place = divmod(k, self.batch)
        drawn, flips = draw_step(self.seed, step, self.batch, self.probabilities)
        number = int(drawn[place])
        source = self.sources[number]
        replaced = []
        first = shuffled_index(self.seed, number, len(source), k)
        others = replacements(self.seed, number, len(source), k)
        for index in islice(chain([first], others), MAX_REPLACEMENTS):
            if self.reading:
                self.reading.note(source.name(index))
            try:
                sample = self.prepared(number, index, flips[place])
            except BadSample as error:
                filtered = isinstance(error, FilteredSample)
                replaced.append(Replaced(source.name(index), str(error), filtered))
            else:
                return dict(sample, replaced=replaced, place=torch.tensor(k))
        raise ValueError(f"{source.root}: {MAX_REPLACEMENTS} samples in a row can't be used, the "
                         f"last being {replaced[-1].name} ({replaced[-1].reason.rstrip('.')}); "
                         "check the data set.")

    def sampler(self, micro_batch, first_step, last_step, ranks):
        """The StepBatchSampler of this set for a rank; steps first_step .. last_step - 1."""
        return StepBatchSampler(self.seed, self.batch, micro_batch, self.probabilities, self.sizes,
                                first_step, last_step, ranks.rank, ranks.world)

    def digest(self):
        """A digest of all sample names in order; this order decides which samples a step draws."""
        digest = hashlib.sha256()
        for source in self.sources:
            for index in range(len(source)):
                digest.update(os.fsencode(source.name(index)) + b"\0")
            digest.update(b"\0")
        return digest.hexdigest()

    def largest_size(self):
        """(height, width) of the samples that take the most memory."""
        return max(self.sizes, key=math.prod)

    def prepared(self, number, index, flip):
        """Image, target and valid of a sample of source `number`, and its name.

        Of a picture without depth: image and name.
        """
        sample, size = self.sources[number][index], self.sizes[number]
        if "depth" not in sample:
            image = RGB_RESIZES[self.rgb_resize](sample["image"], size)
            return dict(image=image.flip(-1) if flip else image, name=sample["name"])
        # The quantiles need the full resolution, so the target is computed before the resizing.
        target = normalise_target(sample["depth"], sample["valid"], self.target, sample["name"])
        target = resize_nearest(target, size)
        valid = resize_nearest(sample["valid"], size)
        image = RGB_RESIZES[self.rgb_resize](sample["image"], size)
        if flip:
            image, target, valid = image.flip(-1), target.flip(-1), valid.flip(-1)
        if not has_complete_cell(valid):  # a width that is no multiple of 8 has other cells flipped
            raise BadSample(f"{sample['name']}: at {size[0]}x{size[1]}, no cell of {CELL}x{CELL} "
                            "pixels is completely valid.")
        return dict(image=image, target=target, valid=valid, name=sample["name"])


def has_complete_cell(valid):
    """valid bool 1,h,w -> whether one of the latent's cells has only valid pixels."""
    height, width = (length // CELL * CELL for length in valid.shape[-2:])
    cells = reduce(valid[:, :height, :width].byte(), "1 (h a) (w b) -> h w", "min", a=CELL, b=CELL)
    return bool(cells.any())


def collate(samples):
    """Samples of one size -> one dict: tensors stacked (image B,3,h,w; ...), the rest in lists."""
    batch = {key: torch.stack([sample[key] for sample in samples])
             for key, value in samples[0].items() if torch.is_tensor(value)}
    return dict(batch, name=[sample["name"] for sample in samples],
                replaced=[entry for sample in samples for entry in sample["replaced"]])


def add_data_options(parser, side):
    """Adds the data options of both stages; side: argparse type of a height or width in pixels."""
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="Hypersim (raw or prepared) or a folder of pairs")
    add("--vkitti", type=Path, help="Virtual KITTI 2: one sample in ten, or all without --data")
    add("--preflight", action="store_true", help="open every file, say what is wrong, and stop")
    add("--size", type=side, nargs=2, metavar=("H", "W"),
        help="that --data is resized to (the model's own; SD2: 480 640)")
    add("--vkitti-crop", type=side, nargs=2, metavar=("H", "W"), default=KITTI_CROP,
        help="of Virtual KITTI 2, at the bottom (352 1216)")
    add("--rgb-resize", choices=list(RGB_RESIZES), default="nearest-exact",
        help="antialias is the better one, nearest-exact the paper's (%(default)s)")
    add_pair_options(add)


def open_held_out(root, crop, pairs, say):
    """The reader of a data set's val split; None, and a message, if it has no val split."""
    try:
        return open_training_source(root, "val", crop, **pairs)
    except FileNotFoundError as error:
        say(f"No validation during training: {error}")
        return None


def open_training_set(data, vkitti, size, crop=KITTI_CROP, target="sqrt_disparity", seed=0,
                      batch=32, rgb_resize="nearest-exact", **pairs):
    """The training set of `data`, or of Virtual KITTI 2, or of both mixed 9 to 1.

    data, vkitti: folders, one of which may be None; size: (h, w) that `data` is resized to; Virtual
    KITTI 2 keeps the size of its crop. pairs: as for `open_training_source`.
    """
    sources, probabilities, sizes = [], [], []
    if data:
        sources.append(open_training_source(data, "train", crop, **pairs))
        probabilities.append(0.9)
        sizes.append(size)
    if vkitti:
        if sources and isinstance(sources[0], FolderOfPictures):
            raise ValueError(f"{data} holds pictures without depth: leave out --vkitti.")
        check_folder(Path(vkitti))
        sources.append(open_reader(VirtualKITTI, vkitti, "train", crop, **pairs))
        probabilities.append(0.1)
        sizes.append(crop)
    return TrainingSet(sources, probabilities, sizes, target, seed, batch, rgb_resize)


def check_data(training_set, held_out, workers, tell):
    """Opens every sample and reports each problem. Raises ValueError if a sample is bad."""
    readers = {f"{source.root}, to train on": source for source in training_set.sources}
    if held_out:
        readers[f"{held_out.root}, to validate on"] = held_out
    preflight(readers, workers, tell)


def read_batches(training_set, sampler, workers, on_bad):
    """Yields the sampler's micro-batches, read by `workers` processes ahead of time.

    on_bad(name, reason): called once for each bad sample, which was replaced.
    Raises ValueError if over 1 % of the drawn samples are bad (and more than MIN_BAD).
    """
    loaded = read_ahead(training_set, workers, batch_sampler=sampler, collate_fn=collate,
                        pin_memory=torch.cuda.is_available(),
                        prefetch_factor=4 if workers else None)
    drawn, count, bad = 0, 0, {}
    for batch in loaded:
        drawn += len(batch["name"])
        for name, reason, filtered in batch.pop("replaced"):
            if not filtered:
                count += 1
                if name not in bad:
                    on_bad(name, reason)
                bad[name] = reason
        if count > max(MAX_BAD_SHARE * drawn, MIN_BAD):
            raise ValueError(f"{count} of the {drawn} samples drawn can't be used, over "
                             f"{MAX_BAD_SHARE:.0%}: {'; '.join(bad.values())}")
        yield batch
