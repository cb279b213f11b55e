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

from data.loading import read_ahead
from data.training_set import TrainingSet, collate
from data.transforms import BadSample, FilteredSample
from storage import read_text, sha256, whole, write_text

log = logging.getLogger(__name__)

# In place of an entry: why the sample can't be used, or why it is left out on purpose.
REASONS = {".bad": BadSample, ".filtered": FilteredSample}
BLOCK = 4096  # bytes, of which files take whole ones
LONGEST_NAME = 200  # bytes of an entry's name
CHECKSUM = "crc32"  # an entry's last tensor


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
    """{name: tensor} of an entry. ValueError if a bit of it is not as it was written."""
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
    """Of names, types, shapes and values: int64 1."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.numpy(), value)
    return torch.tensor([value])


class Entries(Dataset):
    """A rank's share of the entries: (entry, batch, error, damaged).

    batch: of one that is missing or damaged, the raw sample as a micro-batch of one; error: why it
    can't be used. Both are None for what is there.
    """

    def __init__(self, cached, rank, world):
        self.cached = cached
        self.todo = []  # (source, index, flip, whether it is there)
        for number, source in enumerate(cached.sources):
            (cached.folder / str(number)).mkdir(parents=True, exist_ok=True)
            done = set(os.listdir(cached.folder / str(number)))
            # Each rank has its share of all samples, whatever the others have done meanwhile.
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
        except ValueError:  # as a power failure leaves them
            pass
        try:
            sample = TrainingSet.prepared(self.cached, number, index, flip)
        except BadSample as error:
            return entry, None, error, there
        return entry, collate([dict(sample, replaced=[])]), None, there

    def bytes_like(self, place, tensors):
        """What the entries that are missing take, if the one at `place` is these tensors."""
        areas = [math.prod(size) for size in self.cached.sizes]
        per_pixel = sum(tensor.nbytes for tensor in tensors.values()) / areas[self.todo[place][0]]
        blocks = [per_pixel * area // BLOCK + 1 for area in areas]  # of each source's entries
        return int(sum(blocks[number] for number, *_, there in self.todo if not there)) * BLOCK


def fill(cached, frozen, dtype, workers, rank=0, world=1):
    """Computes the entries that are absent or damaged; each rank its share.

    frozen(batch) -> {name: tensor of batch 1}; floating-point tensors are kept in dtype. OSError if
    they would not fit on the disk: told after the first of them.
    """
    entries = Entries(cached, rank, world)
    rows = read_ahead(entries, workers, batch_size=None)
    sized, mended = rank > 0, 0  # the first rank speaks for all of the size
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
    """Says what the cache will take; OSError if there is not so much."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"the cache in {folder} would take {needed:,} bytes more, {free:,} are free: "
                      "make room, choose another --cache, or leave it out.")
    log.warning("The cache in %s will take %s bytes more, %s are free.", folder, f"{needed:,}",
                f"{free:,}")
