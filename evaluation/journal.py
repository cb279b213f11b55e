"""The files of an evaluation: one CSV row per image, written as soon as it is scored, and JSON.

The CSV is the journal: an interrupted evaluation continues where it stopped. Each rank appends to a
file of its own; the files are merged when an evaluation is opened and when it ends.
"""

import csv
import io
import json
import math
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from data.sources import BENCHMARKS
from storage import append, read_text, walk, write_text

PICTURES = "pictures"  # the report's folder of pictures
PICTURE_NAMES = ("image", "truth", "prediction", "error")  # of an image, .jpg
PER_IMAGE, METRICS, SETTINGS = "per_image.csv", "metrics.json", "evaluation.json"
KEY = ("dataset", "image")
WORDS = (*KEY, "unfitted")  # columns that hold no number
FORMULA = tuple("=+-@\t\r'")  # a spreadsheet computes text that begins so; ' prevents it


class Journal:
    """Rows {column: text} by (dataset, image)."""

    def __init__(self, out, columns, rank=0):
        """columns: those after `dataset` and `image`. Reads the rows that exist already."""
        self.out, self.columns = Path(out), (*KEY, *columns)
        self.path = self.out / (PER_IMAGE if rank == 0 else f"per_image.rank{rank}.csv")
        self.lost = 0  # unreadable rows; their images are scored again
        self.rows = self.read(self.out / PER_IMAGE)

    def read(self, path):
        """The rows of a file, without cut-off or damaged rows."""
        if not path.exists():
            return {}
        text = read_text(path)
        whole, _, cut = text.rpartition("\n")
        rows = rows_of(whole)
        sound = [row for row in rows if row.keys() == set(self.columns) and numeric(row)]
        self.lost += len(rows) - len(sound) + bool(cut)
        return {tuple(row[name] for name in KEY): row for row in sound}

    def add(self, dataset, image, values):
        """Appends a row; the row survives if the program is killed afterwards."""
        values = (value if isinstance(value, str) else repr(value) for value in values)
        row = dict(zip(self.columns, (dataset, image, *values), strict=True))
        self.rows[dataset, image] = row
        append(self.path, self.lines([row], heading=not self.path.exists()))

    def lines(self, rows, heading=True):
        """Rows as CSV; names are written so that a spreadsheet takes them for text."""
        text = io.StringIO()
        if heading:
            csv.writer(text).writerow(self.columns)
        for row in rows:
            name = row["image"]
            row = {**row, "image": f"'{name}" if name.startswith(FORMULA) else name}
            csv.writer(text).writerow(row.values())
        return text.getvalue()

    def merge(self, keys):
        """Merges the ranks' files into one: the rows of these keys, in the keys' order."""
        for path in sorted(self.out.glob("per_image.rank*.csv")):
            self.rows |= self.read(path)
        self.rows = {key: self.rows[key] for key in keys if key in self.rows}
        write_text(self.out / PER_IMAGE, self.lines(self.rows.values()))
        for path in self.out.glob("per_image.rank*.csv"):
            path.unlink()


def rows_of(text):
    """CSV -> a dict for each row, up to the first unreadable one."""
    rows = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            row["image"] = (row.get("image") or "").removeprefix("'")
            rows.append(row)
    except csv.Error:  # the rest is lost, too
        rows.append({})
    return rows


def numeric(row):
    """Whether all scores and sizes of a row are finite numbers."""
    try:
        return all(math.isfinite(float(row[name])) for name in row.keys() - WORDS)
    except (ValueError, TypeError):
        return False


def read_results(out):
    """metrics.json by set and per_image.csv as a list of dicts, of a finished evaluation.

    FileNotFoundError if one of them is missing, ValueError if one is damaged.
    """
    out = Path(out)
    for name in (METRICS, PER_IMAGE):
        if not (out / name).is_file():
            raise FileNotFoundError(f"{out} holds no {name}: give the --out folder of a finished "
                                    "evaluation.")
    try:
        results, rows = json.loads(read_text(out / METRICS)), rows_of(read_text(out / PER_IMAGE))
        whole = all(isinstance(found, dict) for found in results.values()) and rows and all(
            "dataset" in row and numeric(row) for row in rows)
    except (ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{out} holds a damaged {METRICS} or {PER_IMAGE}: run evaluate.py again.")
    return results, rows


def prepare(out, settings):
    """Prepares the folder for an evaluation; returns the names of the settings that changed.

    settings: all that the rows depend on, plain types. If the last evaluation had other settings,
    its rows and pictures are removed. ValueError if the file with its settings is damaged.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    path = out / SETTINGS
    before = read_settings(path) if path.exists() else None
    if before == settings:
        return []
    changed = sorted(name for name in settings if before and before.get(name) != settings[name])
    for old in (out / PER_IMAGE, *out.glob("per_image.rank[0-9]*.csv"), out / METRICS):
        old.unlink(missing_ok=True)
    places = walk(out / PICTURES) if before else ()  # a user's own files there stay
    for place in map(PurePosixPath, places):
        if place.parts[0] in BENCHMARKS and place.stem in PICTURE_NAMES and len(place.parts) > 2:
            (out / PICTURES / place).unlink()
            with suppress(OSError):  # not empty yet
                os.removedirs((out / PICTURES / place).parent)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return changed


def check_settings(out, settings):
    """ValueError if an evaluation with other settings has been begun in the folder meanwhile."""
    if read_settings(out / SETTINGS) != json.loads(json.dumps(settings)):
        raise ValueError(f"another evaluation has begun in {out}: give each its own --out.")


def read_settings(path):
    """The settings of an evaluation. ValueError if the file is damaged."""
    try:
        settings = json.loads(read_text(path))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: remove it to begin anew, or choose another --out.")
    return settings


def write_metrics(out, results):
    write_text(Path(out) / METRICS, json.dumps(results, indent=1) + "\n")
