"""The page of app.py: its layout, and what each control does (extras/visit.py does the work)."""

import functools
import html
from pathlib import Path

from data.images import PICTURES
from engine.job import out_of_memory
from extras.visit import (
    COLOURS, FILES, FIRST, GONE, MINIATURE, RESOLUTIONS, codes, colour, forget, know, look,
    mark, report, take, write_files, write_mesh,
)

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
CURSOR = Path(__file__).with_name("cursor.js").read_text(encoding="utf-8")
CSS = """
.gradio-container {max-width: 1400px !important; margin: auto}
#marked img {cursor: crosshair}
input[type=number] {appearance: textfield}
#tip {position: fixed; top: 0; left: 0; z-index: 9; pointer-events: none; padding: 2px 6px;
  background: #000c; color: #fff; font: 14px monospace}
#tip:empty {display: none}
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
        values = gr.File(visible="hidden")  # for the cursor
        values.change(None, values, js="file => window.takeCodes(file)", api_visibility="private")
        connect(gr, page, desk, given | asked | wanted
                | {"shown": shown, "marked": marked, "view": view, "values": values})
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
        return {part["shown"]: tuple(map(str, shown))} | measured(picture, base)

    def updated(picture, base):
        return {part["marked"]: str(mark(picture, base == "depth")), part["said"]: report(picture)}

    def measured(picture, base):
        new = updated(picture, base)  # fits the metres
        return new | {part["values"]: str(codes(picture))}

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
        return {part["metres"]: 0} | measured(picture, base)

    def forgotten(base, request: gr.Request):
        picture = desk.picture(request.session_hash)
        forget(picture)
        return measured(picture, base)

    def files(kinds, colours, fov, request: gr.Request):
        picture = desk.picture(request.session_hash)
        paths = write_files(picture, [FILES[kind] for kind in kinds], colours, fov)
        return {part["files"]: [str(path) for path in paths]}

    def mesh(fov, request: gr.Request):
        path, distance = write_mesh(desk.picture(request.session_hash), fov)
        return {part["view"]: gr.Model3D(str(path), camera_position=(90, 90, 1.5 * distance))}

    def leave(request: gr.Request):
        desk.leave(request.session_hash)

    new = "shown marked values view files photo"
    for source in ("photo", "camera"):
        event = part[source].upload if source == "photo" else part[source].input
        on(event, start, f"{source} name res colours base", new, long=True)
    on([part["name"].change, part["res"].change], again, "name res colours base", new, long=True)
    on(part["colours"].change, recolour, "colours base", "shown marked values")
    on(part["marked"].select, click, "base", "x y marked")
    on([part["read"].click, part["x"].submit, part["y"].submit], read, "x y base", "marked")
    on(part["base"].input, rebase, "base", "marked")
    on([part["know"].click, part["metres"].submit], known, "metres base", "metres marked values")
    on(part["forget"].click, forgotten, "base", "marked values")
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
