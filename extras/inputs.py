"""What predict.py's INPUT may be: pictures, folders, globs, lists, clips and standard input."""

import glob
import os
import shutil
import sys
from itertools import takewhile
from pathlib import Path

from data.images import PICTURES
from data.pairs import describe_passed_over
from engine.terminal import say
from storage import read_text, walk

CLIPS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".ts", ".mpg", ".mpeg",
         ".wmv", ".flv", ".ogv", ".3gp")  # suffixes of video files
STDIN = "-"


def find_inputs(given, out, temporary):
    """Texts from the command line -> {name: path of a picture or clip}.

    A text is a picture, a clip, a folder (its pictures, with all below), a glob, @FILE (a list with
    one of these per line) or - (a picture on standard input, which is put into the folder
    `temporary`). The name is the path relative to the folder, to the glob's fixed part, or to what
    all of a list have in common, without suffix. Files in `out` (earlier predictions) are skipped
    if `out` is inside an input folder. Raises FileNotFoundError for a text that is not there or
    holds no picture, and ValueError if two files have the same name.
    """
    found = {}
    for text in given:
        if not text:
            raise FileNotFoundError("an INPUT is empty: give a picture, a clip or a folder.")
        if text == STDIN:
            files = [(receive(temporary), temporary)]
        elif text.startswith("@") and not Path(text).exists():
            files = listed(Path(text[1:]), out)
        else:
            files = expand(text, out)
        for path, base in files:
            name = str(Path(os.path.relpath(path, base)).with_suffix(""))
            if name.startswith(os.pardir):  # a glob may lead out of its fixed part
                name = path.stem
            if not path.samefile(found.setdefault(name, path)):
                raise ValueError(f"{found[name]} and {path} would both be written as {name}: "
                                 "rename one, or predict them into different folders (--out).")
    return found


def receive(folder):
    """Standard input as a file in a folder -> its path."""
    with open(folder / "stdin", "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return folder / "stdin"


def listed(path, out):
    """The files that a list names, one per line -> (file, folder they all are in)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give @ and a file with one path per line.")
    lines = [line.strip() for line in read_text(path).removeprefix("\ufeff").splitlines()]
    files = [file for line in lines if line and not line.startswith("#")
             for file, _ in expand(line, out)]
    if not files:
        raise FileNotFoundError(f"{path} names no picture: write one path per line.")
    common = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    return [(file, Path(common)) for file in files]


def expand(text, out):
    """A file, folder or glob -> (file, folder that its name is relative to) for each file."""
    path = Path(text)
    if path.is_dir():
        return [(found, path) for found in pictures_in(path, out)]
    if path.is_file():
        return [(path, path.parent)]
    if glob.has_magic(text):
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        matches = map(Path, sorted(glob.glob(text, recursive=True)))
        files = [match for match in matches if match.suffix.lower() in (*PICTURES, *CLIPS)]
        if files:
            return [(file, base) for file in files]
        raise FileNotFoundError(f"{text} matches no picture ({' '.join(PICTURES)}).")
    raise FileNotFoundError(f"{text} is not there: give an existing picture or folder.")


def pictures_in(folder, out):
    """Paths of the pictures in a folder and below; says which other files are passed over."""
    inside = out.resolve() != folder.resolve() and out.resolve()
    files = [path for path in map(folder.joinpath, walk(folder))
             if not (inside and path.resolve().is_relative_to(inside))]
    paths = [path for path in files if path.suffix.lower() in PICTURES]
    if not paths:
        clips = "; give clips by their names" if any(map(is_clip, files)) else ""
        raise FileNotFoundError(f"{folder} holds no picture ({' '.join(PICTURES)}){clips}.")
    if len(paths) < len(files):
        others = [str(path) for path in files if path.suffix.lower() not in PICTURES]
        say(describe_passed_over(others) + ".")
    return paths


def is_clip(path):
    return path.suffix.lower() in CLIPS
