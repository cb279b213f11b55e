"""Reading ahead: a reader's samples in lists, and a check that every one can be read."""

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.transforms import FilteredSample


class Chunks(Dataset):
    """The samples of each chunk of indices, as a list; of one that can't be read, the reason."""

    def __init__(self, reader, chunks):
        self.reader, self.chunks = reader, chunks

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, number):
        return [self.read(index) for index in self.chunks[number]]

    def read(self, index):
        try:
            return self.reader[index]
        except ValueError as error:
            return dict(name=self.reader.name(index), reason=str(error))


class Checked(Dataset):
    """For each sample (name, why it can't be read or None, whether it is left out on purpose)."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        try:
            self.reader[index]
        except ValueError as error:
            return self.reader.name(index), str(error), isinstance(error, FilteredSample)
        return self.reader.name(index), None, False


def preflight(readers, workers, tell):
    """Opens every sample of {what: reader} and tells what is wrong, a line each.

    ValueError if anything is.
    """
    total = 0
    for what, reader in readers.items():
        rows = DataLoader(Checked(reader), batch_size=None, num_workers=workers)
        rows = list(tqdm(rows, desc=what, unit="sample", dynamic_ncols=True))
        bad = [(name, reason) for name, reason, filtered in rows if reason and not filtered]
        left_out = sum(filtered for _, _, filtered in rows)
        expected = "" if reader.expected is None else f" of {reader.expected:,}"
        tell(f"{what}: {len(rows):,}{expected} samples, {len(bad):,} bad, {left_out:,} left out "
             "by the filter")
        for name, reason in bad:
            tell(f"  {name}: {reason}")
        total += len(bad)
    if total:
        raise ValueError(f"{total} samples can't be used: they are listed above.")
