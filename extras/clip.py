"""A clip through predict.py: a folder of depth maps, and an mp4 of frames and maps side by side.

It goes on where it was interrupted: every SEGMENT frames the file UNFINISHED in the folder notes
how many are done, and of what.
"""

import json
import re
import time
from fractions import Fraction
from itertools import islice
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from data.images import read_rgb
from engine.terminal import say
from evaluation.pictures import colourise
from extras.inputs import pictures_in
from extras.pictures import MEANING
from extras.video import Steady, about, read_frames, write_clip
from nets.inference import memory
from storage import whole

SEGMENT = 64  # frames
UNFINISHED = "unfinished.npz"
EDGES = np.linspace(-0.5, 1.5, 2001)  # of the histogram of aligned maps
DARKEST, BRIGHTEST = 0.005, 0.995  # quantiles of a clip's maps that get the ends of the colours


class File:
    """A video file."""

    def __init__(self, path):
        self.path = path
        self.count, self.rate, self.size = about(path)

    def frames(self, start=0):
        """Yields (seconds, name, file it is from, uint8 H,W,3) from frame `start` on."""
        for number, (seconds, image) in enumerate(read_frames(self.path, start), start + 1):
            yield seconds, f"frame_{number:06d}", self.path, image


class Folder:
    """A folder of frames of one size, in the order of the numbers in their names."""

    def __init__(self, path, rate, out):
        self.path, self.rate = path, Fraction(rate).limit_denominator(1001)
        self.pictures = sorted(pictures_in(path, out), key=lambda file: [
            int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(file))])
        stems = {}
        for file in self.pictures:
            if (other := stems.setdefault(file.with_suffix(""), file)) != file:
                raise ValueError(f"{other} and {file} would both be written as {file.stem}: rename "
                                 "one.")
        self.count = len(self.pictures)
        self.size = read_rgb(self.pictures[0]).shape[:2]

    def frames(self, start=0):
        """As those of a File."""
        for number, file in enumerate(self.pictures[start:], start):
            image = read_rgb(file)
            if image.shape[:2] != self.size:
                raise ValueError(f"{file} has {image.shape[1]} x {image.shape[0]} pixels, unlike "
                                 f"the first frame's {self.size[1]} x {self.size[0]}.")
            name = file.relative_to(self.path).with_suffix("")
            yield float(number / self.rate), str(name), file, image


class Progress:
    """How many frames of a clip are done, and what the next one needs to know of them."""

    def __init__(self, path, identity):
        """path: where it is kept; it counts only if it was kept with the same text identity."""
        self.path, self.identity, state = path, identity, {}
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    state = dict(arrays) if str(arrays["identity"]) == identity else {}
            except (OSError, ValueError, KeyError, BadZipFile):
                say(f"{path} is damaged: starting the clip again.")
        self.done = int(state.get("done", 0))
        self.steady = Steady(state)
        self.histogram = state.get("histogram", np.zeros(len(EDGES) - 1, np.int64))

    def align(self, near, image):
        near = self.steady(near, image)
        self.histogram = self.histogram + np.histogram(near, EDGES)[0]
        return near

    def save(self):
        with whole(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, done=self.done, identity=self.identity, histogram=self.histogram,
                     **self.steady.state())

    def range(self):
        """The quantiles DARKEST and BRIGHTEST of all aligned maps."""
        share = self.histogram.cumsum() / self.histogram.sum()
        return [float(EDGES[np.searchsorted(share, part)]) for part in (DARKEST, BRIGHTEST)]


def predict_clip(name, path, outputs, predict_all, run):
    """Writes a clip's maps into OUT/NAME and OUT/NAME_color.mp4 -> the clip's entry in the record.

    predict_all(items, bar, adjust): predicts and writes (name, file, image) items, with
    adjust(map, image) in place of each map, in order; returns the files that failed.
    path: of the video file, or of the folder of frames. run: what is the same for the run; an
    unfinished clip goes on if this, the clip and the kinds of file are the same. Raises ValueError.
    """
    folder, started = outputs.out / name, time.perf_counter()
    clip = Folder(path, outputs.args.fps, outputs.out) if path.is_dir() else File(path)
    state = path.stat()
    identity = [run, outputs.kinds, str(path.resolve()), state.st_size, state.st_mtime_ns]
    progress = Progress(folder / UNFINISHED, json.dumps(identity))
    if progress.done:
        say(f"{clip.path}: going on after {progress.done} frames.")
    items = ((f"{name}/{frame}", file, image)
             for _, frame, file, image in clip.frames(progress.done))
    with tqdm(total=clip.count, initial=progress.done, unit="frame", dynamic_ncols=True) as bar:
        while True:
            outputs.entries.clear()
            try:
                failed = predict_all(islice(items, SEGMENT), bar,
                                     progress.align if outputs.args.temporal else None)
            except ValueError as error:
                say(f"left out: {error}")
                failed = True
            if failed:
                raise ValueError(f"{path} is left out from frame {progress.done + 1} on: when that "
                                 "is mended, the same command goes on there.")
            if not outputs.entries:
                break
            progress.done += len(outputs.entries)
            progress.save()
    memory.give_back()  # the encoder takes some 300 MB at 1920 x 1080
    video = outputs.video(name)
    colours = progress.range() if outputs.wide else (0, 1)  # the values at their ends
    meaning = f"{MEANING}; colours from {colours[0]:.3f} to {colours[1]:.3f}"
    write_clip(video, clip.rate, beside(clip, folder, outputs, progress.done, *colours), meaning)
    progress.path.unlink()
    return {"input": str(path), "size": list(clip.size), "frames": progress.done,
            "frames_per_second": float(clip.rate), "colours": colours, "save": outputs.kinds,
            "seconds": round(time.perf_counter() - started, 3),
            "files": [video.relative_to(outputs.out).as_posix(), f"{name}/"]}


def beside(clip, folder, outputs, count, low, high):
    """Yields (seconds, frame and map side by side); the colours run from low to high."""
    for seconds, name, _, image in tqdm(clip.frames(), total=count, unit="frame", desc="mp4",
                                        dynamic_ncols=True):
        near = (outputs.read_png16(folder / f"{name}.png") - low) / max(high - low, 1e-6)
        yield seconds, np.concatenate([image, colourise(near, outputs.colours)], axis=1)
