"""The files that predict.py writes for a picture, and the options that choose them.

Every file says in its metadata what it holds, if its kind has any.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from data.files import write_npy
from data.images import read_png16
from data.pairs import above_0
from engine.terminal import not_negative, say
from extras import libraries
from extras.metric import FAR_TO_NEAR, fit, read_points, source_for
from extras.pictures import MEANING, side_by_side, with_legend, write_described_png
from storage import cant_write, walk

ENDINGS = {"npy": ".npy", "png16": ".png", "color": "_color.png", "side": "_side.png",
           "exr": ".exr", "ply": ".ply", "glb": ".glb"}
METRES = {"metres": "_metres.npy", "metres_png": "_metres.png"}
SPACE = {"ply", "glb"}  # kinds that need a focal length
MILLIMETRES = 65535  # the largest number of a 16-bit PNG
SPACES = {
    "sqrt_disparity": MEANING,
    "disparity": "disparity up to scale: 1 at the nearest point, 1/{far} at the farthest, which is "
                 "assumed to be {far} times as far",
    "depth": "depth up to scale: 1 at the nearest point, {far} at the farthest by assumption",
}


def add_output_options(parser):
    """Adds to an argparse parser what `Outputs` takes."""
    add = parser.add_argument_group("what is written").add_argument
    add("--save", nargs="+", choices=ENDINGS, help="kinds of file (npy png16 color)")
    add("--output", choices=SPACES, default="sqrt_disparity", help="what .npy and .exr hold, if "
        "not metres (%(default)s)")
    add("--far-to-near", type=between(1, math.inf), default=FAR_TO_NEAR, metavar="RATIO",
        help="assumed ratio of the farthest to the nearest depth, if one is needed (%(default)s)")
    add("--half", action="store_true", help="16-bit floats in .exr, not 32-bit")
    add("--colormap", type=colour_map, default="Spectral", metavar="NAME",
        help="of matplotlib, near at its start (%(default)s)")
    add("--near-white", action="store_true", help="color in grey, near is white, without legend")
    add = parser.add_argument_group("metres").add_argument
    add("--metric", type=Path, metavar="SOURCE", help="known distances: a .csv with the columns "
        "x,y,metres (pixels of the upright picture; the upper left one's centre at 0.5,0.5), a "
        "depth map of any size, or a folder of these under the pictures' names")
    add("--depth-scale", type=above_0, default=1000, metavar="N",
        help="units per metre in SOURCE, if it holds integers (%(default)s)")
    points = parser.add_argument_group("points (ply) and meshes (glb)", "A mesh of 12 megapixels "
                                       "takes 4 GB of memory.")
    view = points.add_mutually_exclusive_group().add_argument
    view("--fov", type=between(0, 180), metavar="DEGREES",
         help="the camera's horizontal field of view (from EXIF, else 55)")
    view("--focal", type=above_0, metavar="PIXELS", help="or its focal length")
    points.add_argument("--edge-filter", type=not_negative, default=0.04, metavar="STEP",
                        help="leave out pixels at relative steps of depth above this, 0: none "
                        "(%(default)s)")


class Outputs:
    """Names, makes and writes the files for each picture."""

    def __init__(self, args, clip=False):
        """args: parsed options, of `add_output_options` and others. clip: for a clip's frames.

        ValueError if a library is not installed or --metric is not there.
        """
        self.out, self.args = args.out, args
        usual = ["png16"] if clip else ["npy", "png16", "color"]
        self.kinds = args.save or usual
        if clip and "png16" not in self.kinds:
            self.kinds = [*self.kinds, "png16"]  # a clip's video is made of them
        self.wide = clip and args.temporal  # maps have values beyond [0,1]
        self.colours = "gray" if args.near_white else reverse(args.colormap)
        self.entries = {}  # what was written: {name: entry of the record}
        self.said = set()
        for kind in {"exr", "ply", "glb"}.intersection(self.kinds):
            libraries.need(kind.upper())
        if args.metric and not args.metric.exists():
            raise FileNotFoundError(f"--metric {args.metric} is not there: give a file or a folder "
                                    "with known distances.")
        for option, given, needed in (("--half", args.half, {"exr"}), ("--fov", args.fov, SPACE),
                                      ("--focal", args.focal, SPACE)):
            if given and not needed.intersection(self.kinds):
                raise ValueError(f"{option} is about {' and '.join(sorted(needed))}: name it in "
                                 "--save.")

    def check(self, pictures, clips):
        """ValueError if a file for these would be written over an input or over another result.

        pictures, clips: {name: path}. Also if a library for clips is not installed, or --metric
        does not fit.
        """
        frames = [frame for clip in clips.values() for frame in map(clip.joinpath, walk(clip))]
        taken = {path.resolve(): f"the input {path}"
                 for path in (*pictures.values(), *clips.values(), *frames)}
        planned = [(path, picture) for name, picture in pictures.items()
                   for path in self.files(name).values()]
        planned += [(self.video(name), clip) for name, clip in clips.items()]
        for path, source in planned:
            if path.resolve() in taken:
                raise ValueError(f"{path} for {source} would be written over "
                                 f"{taken[path.resolve()]}: choose another folder (--out).")
            taken[path.resolve()] = f"the result for {source}"
        for name, clip in clips.items():
            maps = (self.out / name).resolve()
            inside = next((what for path, what in taken.items() if path.parent == maps), None)
            if inside:
                raise ValueError(f"the maps of {clip} would be written into {maps}, beside "
                                 f"{inside}: choose another folder (--out).")
        if clips:
            libraries.need("video")
        if self.args.temporal and not clips:
            raise ValueError("--temporal is about clips: give one, or --frames.")
        if self.args.metric and clips:
            raise ValueError("--metric is about pictures: give the frames as pictures.")
        if self.args.metric and self.args.metric.is_file() and len(pictures) > 1:
            raise ValueError(f"--metric {self.args.metric} is for one picture: give a folder with "
                             "a file of known distances for each picture, under its name.")

    def video(self, name):
        """The path of the coloured video of the clip `name`."""
        return self.out / f"{name}_color.mp4"

    def existing(self, pictures):
        """{path of a picture: number of its files that are there}, of {name: path}."""
        return {path: sum(file.exists() for file in self.files(name).values())
                for name, path in pictures.items()}

    def files(self, name):
        """{kind: path} of what is written for the picture `name`."""
        endings = {kind: ENDINGS[kind] for kind in self.kinds}
        if self.args.metric:
            endings |= {kind: ending for kind, ending in METRES.items()
                        if kind == "metres" or "png16" in self.kinds}
        return {kind: self.out / f"{name}{ending}" for kind, ending in endings.items()}

    def meaning(self):
        """One phrase that says what .npy holds, and .exr without --metric."""
        return SPACES[self.args.output].format(far=f"{self.args.far_to_near:g}")

    def write(self, name, source, image, values, target, seconds):
        """Writes all files for a picture, or none; then it is in `entries`.

        source: the picture's file. image: uint8 H,W,3. values: float32 H,W, the prediction in the
        space `target`, which took some seconds. ValueError, which names the picture, if its known
        distances don't fit, or a file can't be made of it.
        """
        entry = {"input": str(source), "size": list(image.shape[:2]), "seconds": seconds}
        files = self.files(name)
        near = to_sqrt_disparity(values, target, self.args.far_to_near)
        metres, done = None, []
        try:
            if self.args.metric:
                found = self.fit(name, source, image, values, target)
                metres = found.metres(values)
                entry["fit"] = {"scale": found.scale, "shift": found.shift, "target": target,
                                "points": len(found.inliers), "inliers": int(found.inliers.sum()),
                                "shift_assumed": found.shift_assumed,
                                "median_residual": float(found.quality()[0])}
            for kind, path in files.items():
                make_folder(path.parent)
                self.write_kind(kind, path, source, image, near, metres)
                done.append(path)
        except ValueError as error:
            for path in done:
                path.unlink(missing_ok=True)
            if str(source) in str(error):
                raise
            raise ValueError(f"{source}: {error}") from error
        entry["files"] = [path.relative_to(self.out).as_posix() for path in files.values()]
        self.entries[name] = entry

    def fit(self, name, source, image, values, target):
        """The fit to a picture's known distances; says how good it is."""
        path = source_for(self.args.metric, name)
        try:
            points = read_points(path, image.shape[:2], self.args.depth_scale)
            found = fit(values, points, target, self.args.far_to_near)
        except ValueError as error:
            named = "" if str(path) in str(error) else f"{path}: "
            raise ValueError(f"--metric: {named}{error}") from error
        say(f"{source}: {found}.")
        return found

    def write_kind(self, kind, path, source, image, near, metres):
        """Writes one file. near: square-root disparity H,W; metres: depth H,W or None."""
        match kind:
            case "npy":
                write_npy(path, self.in_space(near))
            case "metres":
                write_npy(path, metres)
            case "png16":
                self.write_png16(path, near)
            case "metres_png":
                write_millimetres(path, metres)
            case "color" if self.args.near_white:
                grey = (255 * near.clip(0, 1)).round().astype(np.uint8)
                write_described_png(path, grey, MEANING)
            case "color":
                write_described_png(path, with_legend(near, self.colours), MEANING)
            case "side":
                write_described_png(path, side_by_side(image, near, self.colours), MEANING)
            case "exr":
                from extras.exr import write_exr
                values, meaning = (self.in_space(near), self.meaning()) if metres is None else (
                    metres, "depth in metres along the optical axis")
                write_exr(path, values, {"comments": meaning}, self.args.half)
            case "ply":
                from extras.points import to_points, write_ply
                depth, focal, comments = self.geometry(source, near, metres)
                write_ply(path, *to_points(depth, focal, image, self.args.edge_filter), comments)
            case "glb":
                from extras.points import write_glb
                depth, focal, comments = self.geometry(source, near, metres)
                write_glb(path, depth, focal, image, self.args.edge_filter, comments)

    def in_space(self, near):
        return from_sqrt_disparity(near, self.args.output, self.args.far_to_near)

    def write_png16(self, path, near):
        meaning = f"{MEANING}; value = stored / 65535"
        if self.wide:
            near, meaning = near / 2 + 0.25, f"{meaning} * 2 - 0.5"
        steps = (65535 * near.astype(np.float64)).round().clip(0, 65535).astype(np.uint16)
        write_described_png(path, steps, meaning)

    def read_png16(self, path):
        """What `write_png16` wrote -> float32 H,W."""
        near = read_png16(path).astype(np.float32) / 65535
        return near * 2 - 0.5 if self.wide else near

    def geometry(self, source, near, metres):
        """Depth H,W, the focal length in pixels, and lines that say where both are from."""
        from extras.points import focal_pixels
        depth, lines = metres, ["camera axes: x right, y down, z forward; in metres"]
        if metres is None:
            depth = from_sqrt_disparity(near, "depth", self.args.far_to_near)
            lines = ["camera axes: x right, y down, z forward; up to scale: the nearest point is "
                     f"at 1, the farthest at {self.args.far_to_near:g} by assumption"]
        focal, how = focal_pixels(near.shape, self.args.fov, self.args.focal, source)
        lines.append(f"focal length {focal:.1f} pixels ({how})")
        if (what := (how, metres is None)) not in self.said:
            self.said.add(what)
            say(f"{source}: {'; '.join(lines)}.")
        return depth, focal, lines


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cant_write(folder, error) from error


def write_millimetres(path, metres):
    """Writes depth H,W in metres as 16-bit PNG in millimetres; says if some are too far for it."""
    beyond = metres > MILLIMETRES / 1000
    if beyond.any():
        say(f"{path}: {beyond.mean():.1%} of the pixels are beyond 65.535 m and have 0 there.")
    steps = np.where(beyond, 0, (1000 * metres.astype(np.float64)).round()).astype(np.uint16)
    write_described_png(path, steps, "depth in millimetres; 0 = none or beyond 65.535 m")


# ------------------------------------------------------------- spaces


def to_sqrt_disparity(x, target, far_to_near):
    """x float32 in [0,1] in the space `target` -> square-root disparity in [0,1], 1 = near.

    Another space needs the ratio of the farthest to the nearest depth. It is unknown: far_to_near
    is assumed.
    """
    if target == "sqrt_disparity":
        return x
    if target == "disparity":
        near = np.sqrt(x + (1 - x) / far_to_near)  # x: 1 = near
    else:
        near = np.sqrt(1 / (1 - x + x * far_to_near))  # x: 0 = near
    far = far_to_near**-0.5
    return ((near - far) / (1 - far)).clip(0, 1).astype(np.float32)


def from_sqrt_disparity(near, space, far_to_near):
    """Square-root disparity in [0,1], 1 = near -> a space of SPACES, float32, by assumption.

    Depth is 1 at the nearest point and far_to_near at the farthest, disparity its reciprocal.
    """
    if space == "sqrt_disparity":
        return near
    far = far_to_near**-0.5
    root = np.maximum(far + (1 - far) * near.astype(np.float64), 0.1 * far)  # --temporal: below 0
    return (root**2 if space == "disparity" else root**-2).astype(np.float32)


# ------------------------------------------------------------- types of options


def between(low, high):
    """An argparse type: a number between two others."""
    def kind(text):
        try:
            if low < float(text) < high:
                return float(text)
        except ValueError:
            pass
        words = f"above {low}" if high == math.inf else f"between {low} and {high}"
        raise argparse.ArgumentTypeError(f"must be a number {words}, not {text}")
    return kind


def colour_map(text):
    from matplotlib import colormaps
    if text not in colormaps:
        raise argparse.ArgumentTypeError("must be a colour map of matplotlib, such as Spectral, "
                                         f"turbo, magma or gray, not {text}")
    return text


def reverse(name):
    """The name of a matplotlib colour map that runs the other way."""
    return name.removesuffix("_r") if name.endswith("_r") else f"{name}_r"
