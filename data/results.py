"""The files of an evaluation: one CSV row per image, written as soon as it is scored, and JSON.

The CSV is the journal: what was interrupted goes on where it stopped. Each rank appends to a file
of its own; they are brought together when an evaluation is opened and when it ends.
"""

import csv
import io
import json
import shutil
from pathlib import Path

from storage import write_text

PICTURES = "pictures"  # of the report: a folder
PER_IMAGE, METRICS, SETTINGS = "per_image.csv", "metrics.json", "evaluation.json"
KEY = ("dataset", "image")
WORDS = (*KEY, "unfitted")  # columns that hold no number


class Journal:
    """Rows {column: text} by (dataset, image)."""

    def __init__(self, out, columns, rank=0):
        """columns: those after `dataset` and `image`. The rows that are there are read."""
        self.out, self.columns = Path(out), (*KEY, *columns)
        self.path = self.out / (PER_IMAGE if rank == 0 else f"per_image.rank{rank}.csv")
        self.rows = read_rows(self.out / PER_IMAGE, self.columns)

    def add(self, dataset, image, values):
        """Appends a row; a program that is killed afterwards has not lost it.

        OSError with the path if there is no room.
        """
        row = dict(zip(self.columns, (dataset, image, *map(text, values)), strict=True))
        self.rows[dataset, image] = row
        line = io.StringIO()
        if not self.path.exists():
            csv.writer(line).writerow(self.columns)
        csv.writer(line).writerow(row.values())
        try:
            with open(self.path, "ab") as file:
                file.write(line.getvalue().encode(errors="surrogateescape"))
        except OSError as error:
            raise OSError(f"{self.path} can't be written ({error.strerror}): make room and give "
                          "the same command again (the scores so far are kept).") from error

    def merge(self, keys):
        """Brings the ranks' files together into one: the rows of these keys, in their order."""
        for path in sorted(self.out.glob("per_image.rank*.csv")):
            self.rows |= read_rows(path, self.columns)
        self.rows = {key: self.rows[key] for key in keys if key in self.rows}
        lines = io.StringIO()
        csv.writer(lines).writerow(self.columns)
        csv.writer(lines).writerows(row.values() for row in self.rows.values())
        write_text(self.out / PER_IMAGE, lines.getvalue())
        for path in self.out.glob("per_image.rank*.csv"):
            path.unlink()


def text(value):
    """A value as a cell: of a float all its digits."""
    return value if isinstance(value, str) else repr(value)


def read_rows(path, columns):
    """The complete rows of a journal; what was cut off or holds no number is scored again."""
    if not path.exists():
        return {}
    content = path.read_bytes().decode(errors="surrogateescape")
    whole = content[:content.rfind("\n") + 1]
    rows = [row for row in csv.reader(io.StringIO(whole, newline="")) if len(row) == len(columns)]
    rows = [dict(zip(columns, row)) for row in rows[1:]]
    return {tuple(row[name] for name in KEY): row for row in rows if numeric(row)}


def numeric(row):
    """Whether all scores and sizes of a row are numbers."""
    try:
        for name in row.keys() - WORDS:
            float(row[name])
    except ValueError:
        return False
    return True


def prepare(out, settings):
    """Readies the folder for an evaluation with these settings; what differs from the last one's.

    settings: what the rows depend on, plain types. Rows that were made with others are removed, and
    their pictures. ValueError if the file can't tell what the last one's were.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    path = out / SETTINGS
    before = read_settings(path) if path.exists() else None
    if before == settings:
        return []
    changed = sorted(name for name in settings if before and before.get(name) != settings[name])
    for old in (*out.glob("per_image*.csv"), out / METRICS):
        old.unlink(missing_ok=True)
    if before:
        shutil.rmtree(out / PICTURES, ignore_errors=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")
    return changed


def check_settings(out, settings):
    """ValueError if an evaluation with other settings has been begun in the folder meanwhile."""
    if read_settings(out / SETTINGS) != json.loads(json.dumps(settings)):
        raise ValueError(f"another evaluation has begun in {out}: give each its own --out.")


def read_settings(path):
    """What an evaluation was started with. ValueError if the file can't tell."""
    try:
        settings = json.loads(path.read_text())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: remove it to begin anew, or choose another --out.")
    return settings


def write_metrics(out, results):
    write_text(Path(out) / METRICS, json.dumps(results, indent=1) + "\n")
