"""What frozen networks make of the training samples, computed once and kept on disk.

An image comes back many times in a training, in two flips; the frozen networks say the same each
time. `fill` asks them once per sample and flip; `CachedTrainingSet` then reads entries in place of
samples, in the same order. An entry is one file, complete or absent; what was made from another
model, target or size lies in another folder, named by a fingerprint. What all will take is known
from the first one. Pictures are trusted to stay as they are, but those that could not be read are
tried again by each run.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from data.chunks import read_ahead
from data.training import TrainingSet, collate
from data.transforms import BadSample, FilteredSample
from storage import sha256, whole, write_text

# In place of an entry: why the sample can't be used, or why it is left out on purpose.
REASONS = {".bad": BadSample, ".filtered": FilteredSample}
BLOCK = 4096  # bytes, of which files take whole ones


def fingerprint(settings, files):
    """A name for what entries depend on: plain settings (a dict) and the contents of files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:16]


class CachedTrainingSet(TrainingSet):
    """A training set whose samples are the cache's entries: dicts of what `frozen` returned."""

    def __init__(self, training_set, folder):
        vars(self).update(vars(training_set))
        self.folder = Path(folder)

    def entry(self, number, index, flip):
        """The file of a sample, without suffix; number: the source's."""
        name = self.sources[number].name(index).replace("%", "%25").replace("/", "%2F")
        return self.folder / str(number) / f"{name}{'%flipped' if flip else ''}"

    def prepared(self, number, index, flip):
        entry = self.entry(number, index, flip)
        try:
            if os.path.exists(f"{entry}.safetensors"):
                tensors = load_file(f"{entry}.safetensors")
                return dict(tensors, name=self.sources[number].name(index))
            kind = ".filtered" if os.path.exists(f"{entry}.filtered") else ".bad"
            reason = Path(f"{entry}{kind}").read_text("utf-8", errors="surrogateescape")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{entry}* in the cache is missing or damaged ({error}): remove what "
                             "is left of it and give the same command again.") from error
        raise REASONS[kind](reason)


class Missing(Dataset):
    """The samples that have no entry yet, as micro-batches of one: raw, or why they are none."""

    def __init__(self, cached, rank, world):
        self.cached = cached
        self.todo = []
        for number, source in enumerate(cached.sources):
            (cached.folder / str(number)).mkdir(parents=True, exist_ok=True)
            done = set(os.listdir(cached.folder / str(number)))
            # Each rank has its share of all samples, whatever the others have done meanwhile.
            for index in range(rank, len(source), world):
                for flip in (False, True):
                    name = cached.entry(number, index, flip).name
                    if not {f"{name}.safetensors", f"{name}.filtered"} & done:
                        self.todo.append((number, index, flip))

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, place):
        number, index, flip = self.todo[place]
        entry = self.cached.entry(number, index, flip)
        self.reading.note(entry.name)
        try:
            sample = TrainingSet.prepared(self.cached, number, index, flip)
        except BadSample as error:
            return entry, None, error
        return entry, collate([dict(sample, replaced=[])]), None

    def bytes_like(self, place, tensors):
        """What the entries that are missing take, if the one at `place` is these tensors."""
        areas = [math.prod(size) for size in self.cached.sizes]
        per_pixel = sum(tensor.nbytes for tensor in tensors.values()) / areas[self.todo[place][0]]
        blocks = [per_pixel * area // BLOCK + 1 for area in areas]  # of each source's entries
        return int(sum(blocks[number] for number, _, _ in self.todo)) * BLOCK


def fill(cached, frozen, dtype, workers, rank=0, world=1):
    """Computes the entries that are absent; each rank its share.

    frozen(batch) -> {name: tensor of batch 1}; floating-point tensors are kept in dtype. OSError if
    they would not fit on the disk: told after the first of them.
    """
    missing = Missing(cached, rank, world)
    rows = read_ahead(missing, workers, batch_size=None)
    sized = rank > 0  # the first rank speaks for all
    for place, (entry, batch, error) in enumerate(
            tqdm(rows, desc="filling the cache", disable=rank > 0, total=len(missing))):
        if error:
            kind = ".filtered" if isinstance(error, FilteredSample) else ".bad"
            write_text(f"{entry}{kind}", str(error))
            continue
        tensors = {name: value[0].to("cpu", dtype if value.is_floating_point() else None)
                   for name, value in frozen(batch).items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        if not sized:
            check_room(cached.folder, world * missing.bytes_like(place, tensors))
            sized = True
        with whole(f"{entry}.safetensors") as temporary:
            save_file(tensors, temporary)


def check_room(folder, needed):
    """Says what the cache will take; OSError if there is not so much."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"the cache in {folder} would take {needed:,} bytes more, {free:,} are free: "
                      "make room, choose another --cache, or leave it out.")
    tqdm.write(f"The cache in {folder} will take {needed:,} bytes more, {free:,} are free.",
               file=sys.stderr)
