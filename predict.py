"""Depth of pictures: square-root disparity up to scale and shift, 1 = near, 0 = far.

    python predict.py photo.jpg folder/ --ckpt runs/stage2/model.safetensors

Writes for each picture, under the same relative path in --out: NAME.npy (float32 H,W in [0,1], the
size of the picture), NAME.png (16 bits, 65535 = near) and NAME_color.png (near is red, with a
legend). Folders are searched recursively; pictures are turned upright as their EXIF says. A
picture that cannot be used is reported, and the others are still written (exit code 1).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import engine
from data.files import write_npy, write_png
from data.hypersim import Hypersim
from extras.pictures import MEANING, SUFFIXES, read_photograph, with_legend, write_described_png
from miniature import embedded, render
from nets.depthmaster import DepthMaster

ENDINGS = {"npy": ".npy", "png16": ".png", "color": "_color.png"}
FAR_TO_NEAR = 10  # assumed ratio of the farthest to the nearest depth, in `to_sqrt_disparity` only


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT",
        help="pictures or folders of pictures (some scenes of the embedded miniature)")
    add("--ckpt", type=Path, help="model (.safetensors; the embedded miniature)")
    add("--out", type=Path, default=Path("predictions"), help="folder (%(default)s)")
    add("--save", nargs="+", choices=ENDINGS, default=list(ENDINGS), help="what to write (all)")
    add("--processing-res", type=int, metavar="PIXELS",
        help="longest side while predicting, 0: the picture's own (the model's: 768)")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 on CUDA, else float32")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    return parser.parse_args()


def find_pictures(inputs, out):
    """Pictures and folders -> {path relative to its input, without suffix: path of the picture}.

    What lies in `out` inside of a folder (earlier predictions) is passed over. Raises
    FileNotFoundError for an input that is not there or holds no picture, and ValueError if two
    pictures have the same relative path.
    """
    found = {}
    for given in inputs:
        if given.is_dir():
            inside = out.resolve() != given.resolve() and out.resolve()
            paths = [path for path in sorted(given.rglob("*")) if path.is_file()
                     and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
                     and not (inside and path.resolve().is_relative_to(inside))]
            if not paths:
                raise FileNotFoundError(f"{given} holds no picture ({' '.join(SUFFIXES)}).")
        elif given.is_file():
            paths = [given]
        else:
            raise FileNotFoundError(f"{given} is not there: give an existing picture or folder.")
        for path in paths:
            relative = path.relative_to(given if given.is_dir() else given.parent)
            name = str(relative.with_suffix(""))
            if not path.samefile(found.setdefault(name, path)):
                raise ValueError(f"{found[name]} and {path} would both be written as {name}: "
                                 "rename one, or predict them into different folders (--out).")
    return found


def plan_outputs(pictures, out, save):
    """{name: picture} -> {name: {kind: file to write}}.

    Raises ValueError if a file would be written over an input or over another output.
    """
    outputs = {name: {kind: out / f"{name}{ENDINGS[kind]}" for kind in save} for name in pictures}
    taken = {path.resolve(): f"the input {path}" for path in pictures.values()}
    for name, files in outputs.items():
        for path in files.values():
            if path.resolve() in taken:
                raise ValueError(f"{path} for {pictures[name]} would be written over "
                                 f"{taken[path.resolve()]}: choose another folder (--out).")
            taken[path.resolve()] = f"the result for {pictures[name]}"
    return outputs


def embedded_pictures():
    """A folder with four pictures of held-out scenes of the miniature."""
    render.ensure(embedded.SCENES, val=embedded.FRAMES["val"])
    reader = Hypersim(embedded.SCENES / "hypersim", "val")
    folder = embedded.SCENES / "pictures"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        image = reader[number * len(reader) // 4]["image"]
        write_png(folder / f"room_{number}.png", image.permute(1, 2, 0).numpy())
    return folder


def open_model(path, device, precision):
    """The model at a path, ready to predict; says what one should know of its results."""
    model = DepthMaster.from_file(path)
    if model.kind == "sd2":
        engine.say(f"warning: {path} was never trained for depth; its results mean nothing.")
    if model.target != "sqrt_disparity":  # Deviation: released, there is no other target
        engine.say(f"{path} predicts {model.target}: converted to square-root disparity as if the "
                   f"farthest point were {FAR_TO_NEAR} times as far as the nearest.")
    return model.for_inference(device, precision)


def predict(model, image, processing_res):
    """image uint8 H,W,3 -> square-root disparity, float32 H,W in [0,1], 1 = near.

    If half precision overflows, the model goes on in float32, and says so.
    """
    pred = model.predict(image, processing_res)
    weights = model.unet.conv_in.weight
    if not np.isfinite(pred).all() and weights.element_size() < 4:
        engine.say(f"{weights.dtype} overflowed: going on in float32.")
        pred = model.for_inference(weights.device, "float32").predict(image, processing_res)
    if not np.isfinite(pred).all():
        raise ValueError("the model's result is not finite: its weights are damaged.")
    return to_sqrt_disparity(pred, model.target)


def to_sqrt_disparity(x, target):
    """x float32 in [0,1] in the space `target` -> square-root disparity in [0,1], 1 = near.

    From another space this needs the ratio of farthest to nearest depth, which nobody knows:
    FAR_TO_NEAR stands in for it.
    """
    if target == "sqrt_disparity":
        return x
    if target == "disparity":
        near = np.sqrt(x + (1 - x) / FAR_TO_NEAR)  # x: 1 = near
    else:
        near = np.sqrt(1 / (1 - x + x * FAR_TO_NEAR))  # x: 0 = near
    far = FAR_TO_NEAR**-0.5
    return ((near - far) / (1 - far)).clip(0, 1).astype(np.float32)


def write(near, files):
    """Writes a result H,W as each kind of file: {kind: path}."""
    for kind, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "npy":
            write_npy(path, near)
        elif kind == "png16":
            steps = (65535 * near.astype(np.float64)).round().astype(np.uint16)
            write_described_png(path, steps, MEANING)
        else:
            write_described_png(path, with_legend(near), MEANING)


def main():
    args = options()
    if not args.ckpt:
        engine.say(f"No --ckpt: predicting with the embedded miniature, {embedded.TRAINED}, a toy "
                   "trained on procedural rooms.")
    if not args.inputs:
        args.inputs = [embedded_pictures()]
        engine.say(f"No INPUT: predicting held-out scenes of the miniature, {args.inputs[0]}.")
    pictures = find_pictures(args.inputs, args.out)
    outputs = plan_outputs(pictures, args.out, args.save)
    replaced = sum(path.exists() for files in outputs.values() for path in files.values())
    model = open_model(args.ckpt or embedded.TRAINED, engine.start(args.device).device,
                       args.precision)
    failed = []
    for name, path in tqdm(pictures.items(), unit="picture", dynamic_ncols=True):
        try:
            near = predict(model, read_photograph(path), args.processing_res)
        except ValueError as error:
            blamed = "" if str(path) in str(error) else f"{path}: "
            tqdm.write(f"left out: {blamed}{error}", file=sys.stderr)
            failed.append(path)
        else:
            write(near, outputs[name])
    engine.say(f"{len(pictures) - len(failed)} pictures predicted into {args.out}: {MEANING}."
               + (f" {replaced} files of an earlier run were replaced." if replaced else ""))
    if failed:
        raise ValueError(f"{len(failed)} of {len(pictures)} pictures could not be predicted, "
                         f"{failed[0]} first.")


if __name__ == "__main__":
    engine.run(main)
