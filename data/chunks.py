"""Reading ahead in processes: any data set, a reader's samples in lists, a check of all samples."""

import atexit
import multiprocessing
import os
import signal

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from data.transforms import FilteredSample


def read_ahead(dataset, workers, **options):
    """What a DataLoader with these options yields; a worker's error becomes one sentence.

    dataset: gets a `reading`, a Reading that it may note its samples in, for a worker that dies.
    """
    if not hasattr(signal, "SIGCHLD"):  # Windows: what tells of a worker's end is not there
        workers = 0
    dataset.reading = Reading(workers)
    loader = DataLoader(dataset, num_workers=workers, worker_init_fn=leave_signals_to_the_parent,
                        **options)
    try:
        atexit.register(end_readers)
        batches = iter(loader)
        # For a worker that dies, torch raises wherever the program is at that moment. Without its
        # handler the loader notices, when its next batch is wanted.
        if workers:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except ValueError as error:
        last_line = str(error).rstrip().split("\n")[-1]
        raise ValueError(last_line.removeprefix("ValueError: ")) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        names = " and ".join(dataset.reading.names())
        raise ValueError(f"a process that reads data died (out of memory?) while the processes "
                         f"read {names}: look at these, or use fewer --workers.") from error


def leave_signals_to_the_parent(worker):
    """A scheduler or a terminal may signal the workers, too: they end when their parent does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_readers():
    """Ends the workers that are left at exit, where Python's way is SIGTERM and to wait."""
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
    """The samples of each chunk of indices, as a list; of one that can't be read, the reason."""

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
    """For each sample (name, what is wrong with it or None, `bad`, `filtered` or `doubtful`)."""

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
    """Opens every sample of {what: reader} and tells what is wrong, a line each.

    ValueError if anything is.
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
