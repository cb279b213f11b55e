"""The page of app.py: a photo in; depth, metres, a view in 3D and files out.

What comes before `build` knows nothing of gradio. A visitor's picture lies in a folder with a
random name, below one that the process removes at its end; no name is the visitor's choice.
"""

import argparse
import functools
import html
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
from data.images import PICTURES, read_rgb
from engine.job import out_of_memory
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
    canvas = Image.open(base).convert("RGB")
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


# ------------------------------------------------------------- the page

TITLE = "# Depth of a photo"
TOY = """**This is the embedded miniature**, a toy trained on procedural rooms: it shows that all
works, not how good the method is. For real weights run `python convert_sd2.py DepthMaster` (the
folder of the authors' released model), which writes `weights/stage2.safetensors`, then start
`app.py` again. The README says where weights are."""
NOTE = """**What the numbers mean.** The prediction is square-root disparity up to scale and shift:
1 = near, 0 = far. It is no distance. With two or more known distances, s and t are fitted in
metres = 1 / (s x + t)², and every point reads in metres along the camera's axis. x counts to the
right and y down, in pixels of the upright photo, from its upper left corner. Photos stay on this
machine, and are removed when you leave the page."""
CSS = """
.gradio-container {max-width: 1400px !important; margin: auto}
#marked img {cursor: crosshair}
input[type=number] {appearance: textfield}
#files .filename {display: table-cell; white-space: normal; word-break: break-all}
#files .stem {white-space: normal; overflow: visible}
#files .label-clear-button {display: none}
:focus-visible {outline: 3px solid #2563eb !important; outline-offset: 2px}
"""


def build(gr, desk):
    """The page as gradio's Blocks. gr: the module gradio."""
    with gr.Blocks(title="Depth of a photo", delete_cache=(60, 3600)) as page:
        gr.Markdown(TITLE)
        if list(desk.models.values()) == [MINIATURE]:
            gr.Markdown(TOY)
        with gr.Row():
            with gr.Column(scale=1, min_width=360):
                given = lay_input(gr, desk)
            with gr.Column(scale=2, min_width=360):
                shown = gr.ImageSlider(label="Photo and depth", type="filepath", max_height=440,
                                       interactive=False, elem_id="shown")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                marked = gr.Image(label="Click a point", type="filepath", interactive=False,
                                  buttons=[], elem_id="marked")
            with gr.Column(scale=1, min_width=360):
                asked = lay_metres(gr)
        with gr.Row():
            with gr.Column(scale=1, min_width=360):
                wanted = lay_files(gr)
            with gr.Column(scale=2, min_width=360):
                view = gr.Model3D(label="In 3D (drag to turn)", height=440, interactive=False,
                                  elem_id="view")
        gr.Markdown(NOTE)
        connect(gr, page, desk, given | asked | wanted
                | {"shown": shown, "marked": marked, "view": view})
    return page


def lay_input(gr, desk):
    """Photo, camera and settings -> {name: component}."""
    names = list(desk.models)
    with gr.Tab("Photo"):
        photo = gr.File(label="Drop a photo", file_types=list(PICTURES), height=150,
                        elem_id="photo")
    with gr.Tab("Camera"):
        camera = gr.Image(label="Take a photo", sources=["webcam"], type="filepath", height=260,
                          format="png", buttons=[], elem_id="camera",
                          webcam_options=gr.WebcamOptions(mirror=False))
        # Gradio's own way opens the file with all of Pillow's formats, and turns and converts it.
        camera.preprocess = lambda payload: payload and payload.path
    return {
        "photo": photo, "camera": camera,
        "name": gr.Dropdown(names, value=names[0], label="Model", elem_id="name"),
        "res": gr.Dropdown(list(RESOLUTIONS), value="the model's own", elem_id="res",
                           label="Longest side while predicting, pixels"),
        "colours": gr.Dropdown(COLOURS, value=COLOURS[0], label="Colours", elem_id="colours")}


def lay_metres(gr):
    """The value at a point, known distances -> {name: component}."""
    base = gr.Radio(["photo", "depth"], value="photo", label="Picture to click", elem_id="base")
    with gr.Row():
        x = gr.Number(label="x, pixels", min_width=100, elem_id="x")
        y = gr.Number(label="y, pixels", min_width=100, elem_id="y")
    read = gr.Button("Read this point", elem_id="read")
    said = gr.Textbox(label="What is known", lines=5, max_lines=12, interactive=False,
                      value=FIRST, elem_id="said")
    metres = gr.Number(label="The point's distance, metres", elem_id="metres")
    with gr.Row():
        know = gr.Button("Use the distance", variant="primary", min_width=130, elem_id="know")
        forget = gr.Button("Take the last back", min_width=130, elem_id="forget")
    return {"base": base, "x": x, "y": y, "read": read, "said": said, "metres": metres,
            "know": know, "forget": forget}


def lay_files(gr):
    """Kinds of file, what is written, the view in 3D -> {name: component}."""
    fov = gr.Number(label="Camera's horizontal field of view, degrees (0: EXIF's, else 55)",
                    value=0, elem_id="fov")
    turn = gr.Button("Show in 3D", elem_id="turn")
    kinds = gr.CheckboxGroup(list(FILES), value=list(FILES)[:2], label="Files", elem_id="kinds")
    return {"fov": fov, "turn": turn, "kinds": kinds,
            "write": gr.Button("Write the files", variant="primary", elem_id="write"),
            "files": gr.File(label="Downloads", file_count="multiple", interactive=False,
                             elem_id="files")}


def connect(gr, page, desk, part):
    """Says what happens on each event. part: {name: component}.

    An action gets the values of its inputs and returns {component: new value}; what it refuses is
    said in a sentence. The long ones wait for each other.
    """
    emptied = [part["photo"], part["view"], part["files"]]  # by a new picture
    nothing = {part["said"]: FIRST}

    def on(events, action, inputs, outputs, long=False):
        inputs, outputs = ([part[name] for name in names.split()] for names in (inputs, outputs))
        refused = dict.fromkeys({part["photo"]} & set(outputs))  # so that another can be dropped
        gr.on(events, spoken(gr, action, part["said"], refused), inputs, [*outputs, part["said"]],
              concurrency_limit=1, concurrency_id="long" if long else None,
              show_progress_on=outputs or None, show_progress="full" if long else "hidden",
              api_visibility="private")

    def start(upload, name, res, colours, base, request: gr.Request, progress=gr.Progress()):
        picture = take(desk, request.session_hash, upload, name, RESOLUTIONS[res], progress)
        return drawn(picture, colours, base) | dict.fromkeys(emptied)

    def again(name, res, colours, base, request: gr.Request, progress=gr.Progress()):
        old = desk.pictures.get(request.session_hash)
        if not old:
            return nothing
        picture = take(desk, request.session_hash, old.photo, name, RESOLUTIONS[res], progress)
        picture.points, picture.place = old.points, old.place
        return drawn(picture, colours, base) | dict.fromkeys(emptied)

    def drawn(picture, colours, base):
        shown = colour(picture, colours)
        return {part["shown"]: tuple(map(str, shown))} | updated(picture, base)

    def updated(picture, base):
        return {part["marked"]: str(mark(picture, base == "depth")), part["said"]: report(picture)}

    def recolour(colours, base, request: gr.Request):
        picture = desk.pictures.get(request.session_hash)
        return drawn(picture, colours, base) if picture else nothing

    def click(base, request: gr.Request, event: gr.SelectData):
        picture = desk.picture(request.session_hash)
        scale = picture.size[1] / picture.shown_size()[0]
        x, y = (round((index + 0.5) * scale, 1) for index in event.index)
        look(picture, min(x, picture.size[1]), min(y, picture.size[0]))
        return {part["x"]: x, part["y"]: y} | updated(picture, base)

    def read(x, y, base, request: gr.Request):
        picture = desk.picture(request.session_hash)
        look(picture, x, y)
        return updated(picture, base)

    def rebase(base, request: gr.Request):
        picture = desk.pictures.get(request.session_hash)
        return updated(picture, base) if picture else nothing

    def known(metres, base, request: gr.Request):
        picture = desk.picture(request.session_hash)
        know(picture, metres)
        return {part["metres"]: 0} | updated(picture, base)

    def forgotten(base, request: gr.Request):
        picture = desk.picture(request.session_hash)
        forget(picture)
        return updated(picture, base)

    def files(kinds, colours, fov, request: gr.Request):
        picture = desk.picture(request.session_hash)
        paths = write_files(picture, [FILES[kind] for kind in kinds], colours, fov)
        return {part["files"]: [str(path) for path in paths]}

    def mesh(fov, request: gr.Request):
        path, distance = write_mesh(desk.picture(request.session_hash), fov)
        return {part["view"]: gr.Model3D(str(path), camera_position=(90, 90, 1.5 * distance))}

    def leave(request: gr.Request):
        desk.leave(request.session_hash)

    new = "shown marked view files photo"
    for source in ("photo", "camera"):
        event = part[source].upload if source == "photo" else part[source].input
        on(event, start, f"{source} name res colours base", new, long=True)
    on([part["name"].change, part["res"].change], again, "name res colours base", new, long=True)
    on(part["colours"].change, recolour, "colours base", "shown marked")
    on(part["marked"].select, click, "base", "x y marked")
    on([part["read"].click, part["x"].submit, part["y"].submit], read, "x y base", "marked")
    on(part["base"].input, rebase, "base", "marked")
    on([part["know"].click, part["metres"].submit], known, "metres base", "metres marked")
    on(part["forget"].click, forgotten, "base", "marked")
    on(part["write"].click, files, "kinds colours fov", "files", long=True)
    on(part["turn"].click, mesh, "fov", "view", long=True)
    page.unload(leave)


def spoken(gr, action, said, refused):
    """The action, but a mistake becomes a sentence in `said` and in a box over the page.

    refused: {component: value} for then.
    """
    @functools.wraps(action)
    def run(*inputs):
        try:
            return action(*inputs)
        except (ValueError, OSError) as error:
            text = GONE if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            text = "There is not enough memory: choose a smaller resolution or picture."
        gr.Warning(html.escape(text))
        return {said: text} | refused
    return run
