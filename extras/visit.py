"""What app.py does for a visitor: a picture, its depth, metres, a mesh and files.

It knows nothing of gradio. A visitor's picture lies in a folder with a random name, below one that
the process removes at its end; no name is the visitor's choice.
"""

import argparse
import math
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.files import write_npy
from data.images import read_rgb
from evaluation.pictures import colourise, font_size
from extras.doctor import WEIGHTS
from extras.metric import FAR_TO_NEAR, Fit, fit, sample
from extras.outputs import Outputs, add_output_options, from_sqrt_disparity, reverse
from extras.outputs import to_sqrt_disparity
from nets.depthmaster import KINDS, DepthMaster
from nets.inference.precision import choose
from nets.model_file import read_header
from storage import write_text

MOST_BYTES = 64 << 20  # of an upload
MOST_PIXELS = 64_000_000  # of a picture
MOST_POINTS = 24_000_000  # pixels of a picture that becomes points: they take 100 bytes each
MOST_PICTURES = 20  # that are kept, one a visitor; the longest unused goes first
SHOWN = 1280  # pixels, longest side of what the browser shows
MESH = 480  # pixels, longest side of what becomes the mesh in the browser
MESH_FAR = 5  # times the median depth: what is farther is not in that mesh, which it would dwarf
MINIATURE = WEIGHTS / "miniature.safetensors"
RESOLUTIONS = {"the model's own": None, "256": 256, "384": 384, "512": 512, "768": 768,
               "1024": 1024}
COLOURS = ["Spectral", "turbo", "magma", "viridis", "gray"]
FILES = {"npy, float32": "npy", "PNG, 16 bits": "png16", "PNG, in colours": "color",
         "EXR, float32": "exr", "PLY, points": "ply"}
FIRST = "Give a photo first."
GONE = "There is no picture any more: give one again."


@dataclass
class Picture:
    """A visitor's picture, its prediction, and the distances that the visitor knows."""

    folder: Path  # holds photo (as uploaded), values.npy (H,W), photo.jpg, depth.jpg (as shown)
    size: tuple  # height, width, upright
    target: str  # the space of the values
    upload: Path  # the file that it came from, in gradio's care
    points: list = field(default_factory=list)  # x, y, metres
    place: tuple = ()  # x, y that was looked at last
    found: Fit | None = None

    @property
    def photo(self):
        return self.folder / "photo"

    def values(self):
        """The prediction, float32 H,W in [0,1], read from disk as far as it is used."""
        return np.load(self.folder / "values.npy", mmap_mode="r")

    def shown_size(self):
        """(width, height) at which the browser shows it."""
        part = SHOWN / max(self.size)
        return tuple(max(round(side * part), 1) for side in self.size[::-1])


@dataclass
class Desk:
    """What all visitors share: the models, one of them open, and the pictures by session."""

    folder: Path
    models: dict  # name: path
    device: torch.device
    pictures: dict = field(default_factory=dict)
    opened: tuple = ("", None)  # name, model
    pace: dict = field(default_factory=dict)  # name of a model: seconds a pixel, last time

    def model(self, name):
        """The model of this name, ready to predict; one at a time is in memory."""
        if self.opened[0] != name:
            self.opened = "", None
            precision, _ = choose("auto", self.device)
            model = DepthMaster.from_file(self.models[name], self.device, getattr(torch, precision))
            self.opened = name, model.for_inference(self.device, precision)
        return self.opened[1]

    def picture(self, session):
        """The picture of a session. ValueError if there is none."""
        if session not in self.pictures:
            raise ValueError(GONE)
        return self.pictures[session]

    def keep(self, session, picture):
        """Puts a session's picture in the place of the one before; the oldest of many goes."""
        self.leave(session)
        self.pictures[session] = picture
        while len(self.pictures) > MOST_PICTURES:
            self.leave(next(iter(self.pictures)))

    def leave(self, session):
        """Removes all that a session has."""
        picture = self.pictures.pop(session, None)
        if picture:
            shutil.rmtree(picture.folder, ignore_errors=True)
            self.discard(picture.upload)

    def discard(self, upload):
        """Removes an uploaded file, unless it is somebody's: equal uploads are one file."""
        if not any(upload in (each.upload, each.photo) for each in list(self.pictures.values())):
            upload.unlink(missing_ok=True)


def find_models(ckpt=None):
    """{name: path}: ckpt, then the depth models in weights/, the miniature last.

    ValueError or OSError if ckpt is no model file.
    """
    found = {}
    if ckpt:
        read_header(ckpt, kinds=KINDS)
        found[ckpt.name] = ckpt
    others = []
    for path in sorted(WEIGHTS.glob("*.safetensors")):
        try:
            kind = read_header(path, kinds=("stage1", "stage2"))["kind"]
        except ValueError:
            continue
        others.append((path == MINIATURE, kind != "stage2", path))
    for _, _, path in sorted(others):
        if not ckpt or path.resolve() != ckpt.resolve():
            found[path.name if path.name not in found else f"weights/{path.name}"] = path
    if not found:
        raise ValueError(f"{WEIGHTS} holds no model: give --ckpt.")
    return found


# ------------------------------------------------------------- a picture and its depth


def take(desk, session, upload, name, processing_res, tell):
    """Reads an uploaded file, predicts its depth, keeps both for the session -> Picture.

    tell(share or None, text): called several times a second. ValueError if the file is refused.
    """
    upload, folder = Path(upload), desk.folder / secrets.token_urlsafe(16)
    folder.mkdir(mode=0o700)
    try:
        if upload.stat().st_size > MOST_BYTES:
            raise ValueError(f"The file has more than {MOST_BYTES >> 20} MB: give a smaller one.")
        photo = shutil.copyfile(upload, folder / "photo")
        image = read_rgb(photo)
        if image.shape[0] * image.shape[1] > MOST_PIXELS:  # formats that Pillow does not limit
            raise ValueError(f"The picture has more than {MOST_PIXELS:,} pixels: make it smaller.")
        values, target = predict(desk, name, image, processing_res, tell)
        picture = Picture(folder, image.shape[:2], target, upload)
        write_npy(folder / "values.npy", values)
        shown = Image.fromarray(image).resize(picture.shown_size(), Image.Resampling.LANCZOS)
        shown.save(folder / "photo.jpg", quality=90)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        desk.discard(upload)
        if isinstance(error, ValueError):  # a name of ours means nothing to a visitor
            raise ValueError(str(error).replace(str(folder / "photo"), "The file")) from error
        raise
    desk.keep(session, picture)
    return picture


def predict(desk, name, image, processing_res, tell):
    """Image uint8 H,W,3 -> float32 H,W in [0,1] and the space that it is in; tells how far it is.

    The time left is told from the model's second picture on.
    """
    tell(None, "opening the model")
    model = desk.model(name)
    pixels = math.prod(model.processing_size(image.shape[:2], processing_res))
    expected, started = desk.pace.get(name, 0) * pixels, time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(model.predict, image, processing_res)
        while wait([task], timeout=0.2).not_done:
            passed = time.monotonic() - started
            if passed < expected:
                tell(passed / expected, f"predicting, about {expected - passed:.0f} s left")
            else:
                tell(None, f"predicting for {passed:.0f} s")
        values = task.result()
    desk.pace[name] = (time.monotonic() - started) / pixels
    return values, model.target


def nearness(values, target):
    """Predicted values in the space `target` -> square-root disparity in [0,1], 1 = near."""
    return to_sqrt_disparity(values, target, FAR_TO_NEAR)


def colour(picture, colours):
    """Draws the depth in a colour map as the browser shows it -> the paths of photo and depth."""
    small = Image.fromarray(picture.values()).resize(picture.shown_size(), reducing_gap=3)
    near = nearness(np.array(small), picture.target)
    for old in picture.folder.glob("depth_*.png"):
        old.unlink()
    path = picture.folder / f"depth_{secrets.token_hex(4)}.png"  # browsers keep what has a name
    Image.fromarray(colourise(near, reverse(colours))).save(path)
    return picture.folder / "photo.jpg", path


def mark(picture, depth):
    """Draws known points and the place on the photo or on the depth, as shown -> its path."""
    base = next(picture.folder.glob("depth_*.png")) if depth else picture.folder / "photo.jpg"
    canvas = Image.fromarray(read_rgb(base))
    draw, size = ImageDraw.Draw(canvas), font_size(canvas.width)
    marks = [(x, y, str(number)) for number, (x, y, _) in enumerate(picture.points, start=1)]
    if picture.place and picture.place not in [point[:2] for point in picture.points]:
        marks.append((*picture.place, "+"))
    for x, y, text in marks:
        x, y = x * canvas.width / picture.size[1], y * canvas.height / picture.size[0]
        box = x - size, y - size, x + size, y + size
        draw.ellipse(box, outline="black", width=4)
        draw.ellipse(box, outline="white", width=2)
        draw.text((x, y), text, "white", ImageFont.load_default(size), "mm", stroke_width=2,
                  stroke_fill="black")
    for old in picture.folder.glob("marked_*.jpg"):
        old.unlink()
    path = picture.folder / f"marked_{secrets.token_hex(4)}.jpg"
    canvas.save(path, quality=90)
    return path


# ------------------------------------------------------------- values and metres


def look(picture, x, y):
    """Chooses a place in pixels of the picture. ValueError if it is outside."""
    height, width = picture.size
    if x is None or y is None or not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"x must be from 0 to {width}, y from 0 to {height}.")
    picture.place = float(x), float(y)


def know(picture, metres):
    """Takes the distance of the place that was chosen, and fits metres to all known ones."""
    if not picture.place:
        raise ValueError("Choose a point first: click on the picture, or type x and y.")
    if not metres or not 0 < metres < math.inf:
        raise ValueError("Type the point's distance in metres, a number above 0.")
    picture.points = [point for point in picture.points if point[:2] != picture.place]
    picture.points.append((*picture.place, float(metres)))


def forget(picture):
    """Takes the last known distance back."""
    if not picture.points:
        raise ValueError("There is no known distance to take back.")
    picture.points.pop()


def fitted(picture):
    """Fits metres to the known distances -> a sentence about that; `found` is set or None."""
    picture.found = None
    if not picture.points:
        return "No distance is known: no metres yet."
    if len(picture.points) == 1:
        return "One distance is known: give another, nearer or farther, for metres."
    try:
        picture.found = found = fit(picture.values(), picture.points, picture.target)
    except ValueError as error:
        return f"No metres: {error}"
    median, most = found.quality()
    return (f"Metres are known: {found.inliers.sum()} of {found.inliers.size} distances fit, half "
            f"of them within {median:.1%}."
            + (" They do not tell the shift: the farthest point is taken to be "
               f"{FAR_TO_NEAR} times as far as the nearest." if found.shift_assumed else "")
            + (" This is a poor fit: check them." if most > 0.1 else ""))


def report(picture):
    """Lines for the visitor: the value at the place, the known distances, the fit."""
    about, lines = fitted(picture), []
    if picture.place:
        x, y = picture.place
        value = sample(picture.values(), np.array([picture.place]))
        near = nearness(value, picture.target)[0]
        metres = f", {picture.found.metres(value)[0]:.2f} m" if picture.found else ""
        lines.append(f"At x {x:g}, y {y:g}: {near:.4f}{metres}")
    lines += [f"Point {number}: x {x:g}, y {y:g}, {metres:g} m"
              for number, (x, y, metres) in enumerate(picture.points, start=1)]
    return "\n".join([*lines, about])


def codes(picture):
    """Writes what the browser shows under the cursor, of each pixel as shown -> the file's path.

    uint16 (1 or 2),h,w without a header: nearness x 65535; depth in centimetres, if it is known.
    """
    width, height = picture.shown_size()
    rows, columns = (((np.arange(shown) + 0.5) * size / shown).astype(int)
                     for size, shown in zip(picture.size, (height, width)))
    values = picture.values()[rows[:, None], columns]
    planes = [nearness(values, picture.target) * 65535]
    if picture.found:
        planes.append(picture.found.metres(values) * 100)
    for old in picture.folder.glob("codes_*.bin"):
        old.unlink()
    path = picture.folder / f"codes_{secrets.token_hex(4)}.bin"
    path.write_bytes(np.stack(planes).round().clip(0, 65535).astype("<u2").tobytes())
    return path


# ------------------------------------------------------------- files


def check_fov(fov):
    """ValueError unless it is 0 (unknown) or an angle in degrees."""
    if not 0 <= (fov or 0) < 180:
        raise ValueError("The field of view must be between 0 and 180 degrees.")


def write_files(picture, kinds, colours, fov):
    """Writes files as predict.py does -> their paths. fov: degrees, 0: unknown. ValueError."""
    check_fov(fov)
    if not kinds:
        raise ValueError("Choose at least one kind of file.")
    if "ply" in kinds and math.prod(picture.size) > MOST_POINTS:
        raise ValueError(f"Points are made of pictures of at most {MOST_POINTS:,} pixels.")
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    args = parser.parse_args([])
    args.out, args.save, args.colormap = picture.folder / "files", kinds, colours
    args.fov = fov if fov and "ply" in kinds else None
    shutil.rmtree(args.out, ignore_errors=True)
    if picture.found:
        args.metric = picture.folder / "points.csv"
        rows = [f"{x!r},{y!r},{metres!r}\n" for x, y, metres in picture.points]
        write_text(args.metric, "".join(["x,y,metres\n", *rows]))
    outputs = Outputs(args)
    image, values = read_rgb(picture.photo), np.array(picture.values())
    outputs.write("depth", picture.photo, image, values, picture.target, 0)
    return list(outputs.files("depth").values())


def write_mesh(picture, fov):
    """Writes a mesh of fewer pixels for the browser, in metres if they are known.

    Returns its path and how far in front of its middle the camera of the photo stood.
    """
    from extras.points import focal_pixels, write_glb
    check_fov(fov)
    step = math.ceil(max(picture.size) / MESH)
    values = np.array(picture.values()[::step, ::step])
    depth = (picture.found.metres(values) if picture.found else
             from_sqrt_disparity(nearness(values, picture.target), "depth", FAR_TO_NEAR))
    focal, _ = focal_pixels(picture.size, fov, picture=picture.photo)
    depth[depth > MESH_FAR * np.median(depth)] = np.nan
    for old in picture.folder.glob("mesh_*.glb"):
        old.unlink()
    path = picture.folder / f"mesh_{secrets.token_hex(4)}.glb"
    image = read_rgb(picture.photo)[::step, ::step]
    write_glb(path, depth, focal / step, np.ascontiguousarray(image))
    return path, float(np.nanmin(depth) + np.nanmax(depth)) / 2
