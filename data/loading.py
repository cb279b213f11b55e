"""Worker processes read ahead: any data set, samples in chunks, or a check of all samples."""

import atexit
import multiprocessing
import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_convert, get_worker_info
from tqdm import tqdm

from data.transforms import FilteredSample

SHARED, ROOM = "/dev/shm", 4 << 30  # bytes; enough for all batches read ahead
LONGEST_WAIT = 600  # seconds without a sample until reading fails
LOOK_AFTER = 5  # seconds without a sample until a loader checks that its workers are alive
TIMED_OUT = "DataLoader timed out"
DEAD = r"DataLoader worker .*(exited unexpectedly|is killed by signal)"


def read_ahead(dataset, workers, collate_fn=default_convert, **options):
    """Yields the batches of a DataLoader with these options; shortens a worker's error message.

    dataset: its attribute `reading` is set to a Reading. The data set may note each sample's name
    there: if a worker dies, the error message gives the noted names.
    """
    if not hasattr(signal, "SIGCHLD"):  # Windows has no signal for a worker's end
        workers = 0
    dataset.reading = Reading(workers)
    # Workers pass tensors through shared memory. In a container it may be too small, and the loader
    # would wait for ever. Then tensors are sent as plain bytes, at the cost of a copy.
    plain = bool(workers) and os.path.isdir(SHARED) and shutil.disk_usage(SHARED).free < ROOM
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=leave_signals_to_the_parent,
                        collate_fn=partial(as_arrays, collate_fn) if plain else collate_fn,
                        timeout=LOOK_AFTER if workers else 0, **options)
    try:
        atexit.register(end_readers)
        batches = iter(loader)
        # When a worker dies, torch's signal handler raises in any line of the main program.
        # Without the handler, the loader raises when the next batch is requested.
        if workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from map(as_tensors, patient(batches)) if plain else patient(batches)
    except (RuntimeError, ConnectionError, EOFError) as error:
        names = " and ".join(dataset.reading.names())
        if TIMED_OUT in str(error):
            raise ValueError(f"nothing was read for {LONGEST_WAIT} seconds, while the processes "
                             f"read {names}: look at that disk, or use --workers 0.") from error
        if isinstance(error, RuntimeError) and not re.search(DEAD, str(error)):
            error.add_note(f"This happened while {names or 'data'} was read.")
            raise
        raise ValueError(f"a process that reads data died (out of memory?) while the processes "
                         f"read {names}: look at these, or use fewer --workers.") from error
    except (ValueError, OSError) as error:  # a worker's message includes its traceback
        last_line = str(error).rstrip().split("\n")[-1]
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(re.sub(r"^\w+Error: ", "", last_line)) from error


def patient(batches):
    """Yields a loader's batches; ignores its timeouts up to LONGEST_WAIT seconds per batch."""
    waited = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            waited += LOOK_AFTER
            if TIMED_OUT not in str(error) or waited >= LONGEST_WAIT:
                raise
        else:
            waited = 0
            yield batch


def as_arrays(collate, samples):
    """The collated samples with arrays in place of tensors: arrays are sent as plain bytes."""
    return map_values(collate(samples), torch.Tensor, torch.Tensor.numpy)


def as_tensors(batch):
    return map_values(batch, np.ndarray, torch.from_numpy)


def map_values(value, kind, function):
    """Applies the function to all values of this kind inside dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: map_values(part, kind, function) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_values(part, kind, function) for part in value)
    return function(value) if isinstance(value, kind) else value


def leave_signals_to_the_parent(worker):
    """A worker ignores the signals of schedulers and terminals: it ends with its parent."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_readers():
    """Kills the remaining workers at exit: Python would send SIGTERM, which they ignore."""
    for process in multiprocessing.active_children():
        process.kill()


class Reading:
    """The name of the sample that each worker reads, in memory that outlives the worker."""

    def __init__(self, workers):
        self.rows = torch.zeros(max(workers, 1), 512, dtype=torch.uint8).share_memory_()

    def note(self, name):
        worker = get_worker_info()
        if worker:
            text = os.fsencode(name)[-511:]
            self.rows[worker.id, :len(text) + 1] = torch.tensor([*text, 0], dtype=torch.uint8)

    def names(self):
        texts = (bytes(row.tolist()).partition(b"\0")[0] for row in self.rows)
        return [os.fsdecode(text) for text in texts if text]


class Chunks(Dataset):
    """A list of samples for each chunk of indices; an unreadable sample is dict(name, reason)."""

    def __init__(self, reader, chunks):
        self.reader, self.chunks = reader, chunks

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, number):
        return [self.read(index) for index in self.chunks[number]]

    def read(self, index):
        self.reading.note(self.reader.name(index))
        try:
            return self.reader[index]
        except ValueError as error:
            return dict(name=self.reader.name(index), reason=str(error))


class Checked(Dataset):
    """For each sample (name, reason or None, kind); kind: `bad`, `filtered` or `doubtful`."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        self.reading.note(self.reader.name(index))
        try:
            reason, kind = self.reader[index].get("doubt"), "doubtful"
        except ValueError as error:
            kind = "filtered" if isinstance(error, FilteredSample) else "bad"
            reason = str(error)
        return self.reader.name(index), reason, kind


def preflight(readers, workers, tell):
    """Opens every sample of {title: reader}, and reports each problem on a line of its own.

    Raises ValueError if a sample is bad.
    """
    total = 0
    for what, reader in readers.items():
        rows = read_ahead(Checked(reader), workers, batch_size=None)
        rows = list(tqdm(rows, what, len(reader), unit="sample", dynamic_ncols=True))
        found = {kind: [(name, reason) for name, reason, which in rows if reason and which == kind]
                 for kind in ("bad", "filtered", "doubtful")}
        expected = "" if reader.expected is None else f" of {reader.expected:,}"
        doubtful = f", {len(found['doubtful']):,} doubtful" if found["doubtful"] else ""
        tell(f"{what}: {len(rows):,}{expected} samples, {len(found['bad']):,} bad, "
             f"{len(found['filtered']):,} left out by the filter{doubtful}")
        for name, reason in found["bad"] + found["doubtful"]:
            tell(f"  {name}: {reason}")
        total += len(found["bad"])
    if total:
        raise ValueError(f"{total} samples can't be used: they are listed above.")
