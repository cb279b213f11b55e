"""The outputs of the frozen networks for the training samples, computed once and kept on disk.

A training run reads each image many times, in two flips; the frozen networks' outputs are the same
each time. `fill` computes them once per sample and flip; `CachedTrainingSet` then reads these
entries instead of samples, in the same order. An entry is one file, complete or absent. Entries of
another model, target or size lie in another folder, named by a fingerprint. The first entry's size
gives an estimate of the whole cache's size. Picture files are assumed not to change, but each run
tries the unreadable ones again.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from data.hypersim_geometry import CAMERA_CSV
from data.loading import read_ahead
from data.pairs import PAIRS_CSV
from data.training_set import TrainingSet, collate
from data.transforms import BadSample, FilteredSample
from storage import read_text, sha256, whole, write_text

log = logging.getLogger(__name__)

# Suffixes of text files that replace an entry and hold the reason: a bad or a filtered sample.
REASONS = {".bad": BadSample, ".filtered": FilteredSample}
BLOCK = 4096  # bytes of a disk block; a file occupies whole blocks
LONGEST_NAME = 200  # bytes of an entry's name
CHECKSUM = "crc32"  # name of the additional tensor in each entry


def fingerprint(settings, files):
    """A name from all that entries depend on: plain settings (a dict) and the contents of files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()[:16]


def open_cache(training_set, folder, settings, files):
    """The training set whose samples are entries below a folder; `fill` computes missing ones.

    settings, files: all that the entries depend on besides the data's paths and sizes.
    """
    roots = [source.root.resolve() for source in training_set.sources]
    places = [(str(root), size) for root, size in zip(roots, training_set.sizes)]
    tables = [root / name for root in roots for name in (CAMERA_CSV, PAIRS_CSV)]
    name = fingerprint(settings | dict(places=places),
                       files + [table for table in tables if table.exists()])
    return CachedTrainingSet(training_set, folder / name)


class CachedTrainingSet(TrainingSet):
    """A training set whose samples are cache entries: dicts of the outputs of `frozen`."""

    def __init__(self, training_set, folder):
        vars(self).update(vars(training_set))
        self.folder = Path(folder)

    def entry(self, number, index, flip):
        """The path of a sample's entry, without suffix; number: the source's number."""
        name = self.sources[number].name(index).replace("%", "%25").replace("/", "%2F")
        if len(whole_name := os.fsencode(name)) > LONGEST_NAME:
            name = hashlib.sha256(whole_name).hexdigest()
        return self.folder / str(number) / f"{name}{'%flipped' if flip else ''}"

    def prepared(self, number, index, flip):
        entry = self.entry(number, index, flip)
        try:
            if os.path.exists(f"{entry}.safetensors"):
                tensors = read_entry(f"{entry}.safetensors")
                return dict(tensors, name=self.sources[number].name(index))
            kind = ".filtered" if os.path.exists(f"{entry}.filtered") else ".bad"
            reason = read_text(f"{entry}{kind}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{entry}* in the cache is missing or damaged ({error}): give the "
                             "same command again, which mends it.") from error
        raise REASONS[kind](reason)


def read_entry(path):
    """{name: tensor} of an entry. Raises ValueError if even one bit of the file has changed."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if CHECKSUM not in tensors or tensors.pop(CHECKSUM) != checksum(tensors):
        raise ValueError("it does not fit its checksum")
    return tensors


def write_entry(path, tensors):
    with whole(path) as temporary:
        save_file(tensors | {CHECKSUM: checksum(tensors)}, temporary)


def checksum(tensors):
    """The CRC-32 of the tensors' names, types, shapes and values: int64 of shape (1,)."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.numpy(), value)
    return torch.tensor([value])


class Entries(Dataset):
    """A rank's share of the entries, as (path without suffix, batch, error, damaged).

    For a missing or damaged entry, batch is the raw sample as a micro-batch of one; if the sample
    can't be used, error is its BadSample instead. For an intact entry both are None. damaged: the
    entry's file exists, but does not fit its checksum.
    """

    def __init__(self, cached, rank, world):
        self.cached = cached
        self.todo = []  # (source, index, flip, whether the file exists)
        for number, source in enumerate(cached.sources):
            (cached.folder / str(number)).mkdir(parents=True, exist_ok=True)
            done = set(os.listdir(cached.folder / str(number)))
            # A share depends only on the indices, not on entries that other ranks write meanwhile.
            for index in range(rank, len(source), world):
                for flip in (False, True):
                    name = cached.entry(number, index, flip).name
                    if f"{name}.filtered" not in done:
                        self.todo.append((number, index, flip, f"{name}.safetensors" in done))

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, place):
        number, index, flip, there = self.todo[place]
        entry = self.cached.entry(number, index, flip)
        self.reading.note(entry.name)
        try:
            if there and read_entry(f"{entry}.safetensors"):
                return entry, None, None, False
        except ValueError:  # for example, damaged by a power failure
            pass
        try:
            sample = TrainingSet.prepared(self.cached, number, index, flip)
        except BadSample as error:
            return entry, None, error, there
        return entry, collate([dict(sample, replaced=[])]), None, there

    def bytes_like(self, place, tensors):
        """Estimates the bytes of all missing entries from the tensors of the entry at `place`."""
        areas = [math.prod(size) for size in self.cached.sizes]
        per_pixel = sum(tensor.nbytes for tensor in tensors.values()) / areas[self.todo[place][0]]
        blocks = [per_pixel * area // BLOCK + 1 for area in areas]  # of each source's entries
        return int(sum(blocks[number] for number, *_, there in self.todo if not there)) * BLOCK


def fill(cached, frozen, dtype, workers, rank=0, world=1):
    """Computes the missing and damaged entries; each rank computes its share.

    frozen(batch) -> {name: tensor of batch size 1}; floating-point tensors are stored in dtype.
    Raises OSError, after the first entry is computed, if all entries would not fit on the disk.
    """
    entries = Entries(cached, rank, world)
    rows = read_ahead(entries, workers, batch_size=None)
    sized, mended = rank > 0, 0  # only rank 0 checks the size, for all ranks
    for place, (entry, batch, error, damaged) in enumerate(
            tqdm(rows, desc="filling the cache", disable=rank > 0, total=len(entries))):
        mended += damaged
        if error:
            kind = ".filtered" if isinstance(error, FilteredSample) else ".bad"
            write_text(f"{entry}{kind}", str(error))
            Path(f"{entry}.safetensors").unlink(missing_ok=True)
        if batch is None:
            continue
        tensors = {name: value[0].to("cpu", dtype if value.is_floating_point() else None)
                   for name, value in frozen(batch).items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        if not sized:
            check_room(cached.folder, world * entries.bytes_like(place, tensors))
            sized = True
        write_entry(f"{entry}.safetensors", tensors)
    if mended:
        log.warning("%s: %d entries of the cache were damaged and were computed again.",
                    cached.folder, mended)


def check_room(folder, needed):
    """Logs how many bytes the cache will take; raises OSError if the disk has fewer free bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"the cache in {folder} would take {needed:,} bytes more, {free:,} are free: "
                      "make room, choose another --cache, or leave it out.")
    log.warning("The cache in %s will take %s bytes more, %s are free.", folder, f"{needed:,}",
                f"{free:,}")
