"""What frozen networks make of the training samples, computed once and kept on disk.

An image comes back many times in a training, in two flips; the frozen networks say the same each
time. `fill` asks them once per sample and flip; `CachedTrainingSet` then reads entries in place of
samples, in the same order. An entry is one file, complete or absent; what was made from another
model, target or size lies in another folder, named by a fingerprint.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.training import TrainingSet, collate
from data.transforms import BadSample, FilteredSample

BAD = ".bad.json"  # in place of an entry: why the sample can't be used


def fingerprint(settings, files):
    """A name for what entries depend on: plain settings (a dict) and the contents of files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class CachedTrainingSet(TrainingSet):
    """A training set whose samples are the cache's entries: dicts of what `frozen` returned."""

    def __init__(self, training_set, folder):
        vars(self).update(vars(training_set))
        self.folder = Path(folder)

    def entry(self, number, index, flip):
        """The file of a sample, without suffix; number: the source's."""
        name = self.sources[number].name(index).replace("/", "~")
        return self.folder / str(number) / f"{name}{'~flipped' if flip else ''}"

    def prepared(self, number, index, flip):
        entry = self.entry(number, index, flip)
        bad = entry.with_name(entry.name + BAD)
        if bad.exists():
            reason, filtered = json.loads(bad.read_text())
            raise (FilteredSample if filtered else BadSample)(reason)
        tensors = load_file(f"{entry}.safetensors")
        return dict(tensors, name=self.sources[number].name(index))


class Missing(Dataset):
    """The samples that have no entry yet, as micro-batches of one: raw, or why they are bad."""

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
                    if not {f"{name}.safetensors", name + BAD} & done:
                        self.todo.append((number, index, flip))

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, place):
        number, index, flip = self.todo[place]
        entry = self.cached.entry(number, index, flip)
        try:
            sample = TrainingSet.prepared(self.cached, number, index, flip)
        except BadSample as error:
            return entry, None, (str(error), isinstance(error, FilteredSample))
        return entry, collate([dict(sample, replaced=[])]), None


def fill(cached, frozen, dtype, workers, rank=0, world=1):
    """Computes the entries that are absent; each rank its share.

    frozen(batch) -> {name: tensor of batch 1}; floating-point tensors are kept in dtype.
    """
    loader = DataLoader(Missing(cached, rank, world), batch_size=None, num_workers=workers)
    for entry, batch, bad in tqdm(loader, desc="filling the cache", disable=rank > 0):
        if bad:
            write(entry.with_name(entry.name + BAD), lambda path: path.write_text(json.dumps(bad)))
            continue
        tensors = {name: value[0].to("cpu", dtype if value.is_floating_point() else None)
                   for name, value in frozen(batch).items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        write(entry.with_name(f"{entry.name}.safetensors"),
              lambda path: save_file(tensors, path))


def write(path, save):
    """save(temporary path), then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)
