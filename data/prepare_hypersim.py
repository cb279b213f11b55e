"""Turns raw Hypersim into PNG pairs: 8-bit colour, and planar depth in millimetres.

    python -m data.prepare_hypersim RAW OUT

writes OUT/{train,val,test}/ai_VVV_NNN/{rgb,depth_plane}_cam_XX_frIIII.png. Run it again to go on
where it stopped. What can't be used goes into OUT/dropped.csv: training frames that Marigold's
filter rejects, and files that can't be read (which the next run tries again).
"""

import argparse
import csv
import io
import logging
import os
import sys
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from data.loading import read_ahead
from data.files import write_png
from data.hypersim import PUBLISHED_COUNTS, SPLITS, Hypersim, are_present, depth_of
from data.transforms import BadSample, FilteredSample
from engine import job, terminal
from storage import append, read_text, write_text

log = logging.getLogger(__name__)

REPORT = "dropped.csv"
COLUMNS = ("split", "frame", "kind", "reason")
FILTERED, BAD = "filtered", "bad"  # the values of `kind`


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", metavar="RAW", type=Path, help="root of the raw release")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS,
                        help="splits to convert (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes; 0 works in this one (default: one per core)")
    options = parser.parse_args(argv)
    if options.workers < 0:
        parser.error(f"--workers is {options.workers}, but must be 0 or more")
    terminal.check_folder(options.out, "OUT")
    prepare(options.raw, options.out, options.splits, options.workers)


def prepare(raw, out, splits, workers):
    """Converts the remaining frames, writes the report and prints the counts."""
    if raw.resolve() == out.resolve():
        raise ValueError(f"{out} is the raw data set itself; give another folder to write to.")
    readers = open_splits(raw, splits)
    pairs = [(split, i) for split, reader in readers.items() for i in range(len(reader))]
    dropped = read_report(out)
    finished = are_finished(out, readers, pairs)
    todo = [(split, i) for (split, i), is_finished in zip(pairs, finished)
            if not is_finished and not was_filtered(dropped, split, readers[split].name(i))]
    converted = read_ahead(Conversion(readers, out, todo), workers, batch_size=None)
    out.mkdir(parents=True, exist_ok=True)
    for split, frame, kind, reason in tqdm(converted, "converting", len(todo), file=sys.stderr):
        dropped.pop((split, frame), None)
        if kind:
            dropped[split, frame] = (kind, reason)
            append(out / REPORT, as_csv([(split, frame, kind, reason)]))  # saved if killed
    write_report(out, dropped)
    print_counts(readers, dropped, pairs, are_finished(out, readers, pairs))


def open_splits(raw, splits):
    """{split: reader} of the splits that have frames on disk; raises if none has."""
    readers, errors = {}, []
    for split in splits:
        try:
            readers[split] = Hypersim(raw, split)
        except FileNotFoundError as error:
            errors.append(error)
    if not readers:
        raise errors[0]
    for error in errors:
        log.warning("%s", error)
    return readers


class Conversion(Dataset):
    """Item j converts frame todo[j] and is (split, frame, kind, reason); kind "" if written.

    It is a Dataset so that a DataLoader can serve as a process pool: it copies the list of
    frames to each worker only once.
    """

    def __init__(self, readers, out, todo):
        self.readers, self.out, self.todo = readers, out, todo

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, j):
        split, i = self.todo[j]
        reader = self.readers[split]
        self.reading.note(reader.name(i))
        try:
            sample = reader[i]
        except BadSample as error:
            kind = FILTERED if isinstance(error, FilteredSample) else BAD
            return split, reader.name(i), kind, str(error)
        image = self.out / image_file(split, reader, i)
        image.parent.mkdir(parents=True, exist_ok=True)
        # The image is written last: a pair without an image is unfinished, and readers ignore it.
        write_png(depth_of(str(image)), to_millimetres(sample["depth"], sample["valid"]))
        write_png(image, sample["image"].numpy().transpose(1, 2, 0))
        return split, reader.name(i), "", ""


def image_file(split, reader, i):
    """Where the image of a frame goes, relative to the output folder."""
    scene, camera, frame = reader.frames[i]
    return Path(split) / scene / f"rgb_{camera}_fr{frame:04d}.png"


def to_millimetres(depth_m, valid):
    """Depth 1,H,W in metres -> uint16 H,W in millimetres, 0 where it is invalid.

    A valid depth is below 65 m, so nothing wraps round at 65.536 m.
    """
    # Deviation: the usual script's depths wrap round.
    return np.rint(np.where(valid[0], depth_m[0], 0) * 1000).astype(np.uint16)


def are_finished(out, readers, pairs):
    """For each (split, i), whether both of its files are written."""
    images = [out / image_file(split, readers[split], i) for split, i in pairs]
    depth_maps = [Path(depth_of(str(image))) for image in images]
    return [both == (True, True) for both in zip(are_present(images), are_present(depth_maps))]


def read_report(out):
    """{(split, frame): (kind, reason)} of what earlier runs dropped."""
    if not (out / REPORT).exists():
        return {}
    lines = csv.reader(io.StringIO(read_text(out / REPORT), newline=""))
    rows = [row for row in lines if len(row) == len(COLUMNS)]  # skip cut-off lines
    return {(split, frame): (kind, reason) for split, frame, kind, reason in rows
            if kind in (FILTERED, BAD)}


def was_filtered(dropped, split, frame):
    return dropped.get((split, frame), ("",))[0] == FILTERED


def write_report(out, dropped):
    write_text(out / REPORT, as_csv([COLUMNS, *(key + dropped[key] for key in sorted(dropped))]))


def as_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def print_counts(readers, dropped, pairs, finished):
    """A line for each split: listed, on disk, dropped, kept, and the published lists' length."""
    heads = ("listed", "on disk", "filtered", "bad", "kept")
    print("split " + "".join(f"{head:>9}" for head in heads) + "  published")
    for split, reader in readers.items():
        kinds = [kind for (where, _), (kind, _) in dropped.items() if where == split]
        kept = sum(where == split for (where, _), there in zip(pairs, finished) if there)
        print(f"{split:6}{reader.expected:9,}{len(reader):9,}{kinds.count(FILTERED):9,}"
              f"{kinds.count(BAD):9,}{kept:9,}{PUBLISHED_COUNTS[split]:11,}")


if __name__ == "__main__":
    job.run(main)
