"""Depth of pictures: square-root disparity up to scale and shift, 1 = near, 0 = far.

    python predict.py photo.jpg folder/ --ckpt runs/stage2/model.safetensors

Writes for each picture, under the same relative path in --out: NAME.npy (float32 H,W in [0,1], the
size of the picture), NAME.png (16 bits, 65535 = near) and NAME_color.png (near is red, with a
legend). Folders are searched with all below them; pictures are turned upright as their EXIF says. A
picture that can't be used is reported, and the others are still written (exit code 1).
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.files import write_npy
from data.images import PICTURES, allow_pixels, read_rgb
from data.pairs import describe_passed_over
from engine import job, terminal
from engine.terminal import say
from extras.pictures import MEANING, with_legend, write_described_png
from nets.depthmaster import DepthMaster
from nets.inference import memory
from nets.inference.precision import choose
from storage import walk

ENDINGS = {"npy": ".npy", "png16": ".png", "color": "_color.png"}
THREADS = terminal.readers()  # that decode pictures and write results
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
    add("--processing-res", type=terminal.number_from_0, metavar="PIXELS",
        help="longest side while predicting, 0: the picture's own (the model's: 768)")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 where it is faster (GPUs, some CPUs), else float32")
    add("--batch", type=terminal.positive, help="pictures of one size that are predicted at once "
        "(8 on CUDA, else 1)")
    add("--max-pixels", type=terminal.positive, metavar="N",
        help="refuse pictures of more (179 million): they take some 30 bytes of memory a pixel")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    return parser.parse_args()


def find_pictures(inputs, out):
    """Pictures and folders -> {path relative to its input, without suffix: path of the picture}.

    Files in `out` (earlier predictions) are skipped if `out` is inside an input folder. Raises
    FileNotFoundError for an input that is not there or holds no picture, and ValueError if two
    pictures have the same relative path.
    """
    found = {}
    for given in inputs:
        if given.is_dir():
            inside = out.resolve() != given.resolve() and out.resolve()
            files = [path for path in map(given.joinpath, walk(given))
                     if not (inside and path.resolve().is_relative_to(inside))]
            paths = [path for path in files if path.suffix.lower() in PICTURES]
            if not paths:
                raise FileNotFoundError(f"{given} holds no picture ({' '.join(PICTURES)}).")
            if len(paths) < len(files):
                others = [str(path) for path in files if path.suffix.lower() not in PICTURES]
                say(describe_passed_over(others) + ".")
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


def open_model(path, device, precision):
    """The model at a path, ready to predict; prints warnings about the meaning of its results."""
    precision, why = choose(precision, device)
    model = DepthMaster.from_file(path, device, getattr(torch, precision))
    say(why)
    if model.kind == "sd2":
        say(f"warning: {path} was never trained for depth; its results mean nothing.")
    if model.target != "sqrt_disparity":  # Deviation: the released code has no other target
        say(f"{path} predicts {model.target}: converted to square-root disparity as if the "
            f"farthest point were {FAR_TO_NEAR} times as far as the nearest.")
    return model.for_inference(device, precision)


# ------------------------------------------------------------- reading, predicting, writing


def decoded(pool, pictures, count):
    """{name: path} -> (name, image uint8 H,W,3 or the error from reading it), in order.

    The pool reads up to `count` pictures ahead.
    """
    coming = deque()
    for name, path in pictures.items():
        coming.append((name, pool.submit(read_rgb, path)))
        if len(coming) > count:
            name, reading = coming.popleft()
            yield name, reading.exception() or reading.result()
    for name, reading in coming:
        yield name, reading.exception() or reading.result()


def batches(images, size):
    """(name, image) pairs -> lists of at most `size` consecutive pairs with images of one size.

    A pair with an error in place of the image forms a list of its own.
    """
    batch = []
    for name, image in images:
        shape = getattr(image, "shape", None)
        if batch and (len(batch) == size or shape is None or shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((name, image))
        if shape is None:
            yield batch
            batch = []
    if batch:
        yield batch


def predict(model, images, processing_res):
    """Images uint8 H,W,3 of one size -> square-root disparity, float32 B,H,W in [0,1], 1 = near."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    pred = model.predict_batch(stacked, processing_res).cpu().numpy()
    return to_sqrt_disparity(pred, model.target)


def predict_all(model, pictures, outputs, processing_res, batch):
    """Predicts {name: path} into {name: files}; reports unusable pictures, returns their paths.

    Threads decode the next few pictures and write the last few results in the background.
    """
    failed, writing = [], deque()
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(pictures), unit="picture",
                                                   dynamic_ncols=True) as bar:
        for group in batches(decoded(pool, pictures, batch + THREADS), batch):
            names, images = zip(*group)
            try:
                if isinstance(images[0], Exception):
                    raise images[0]
                maps = predict(model, images, processing_res)
            except ValueError as error:
                paths = [pictures[name] for name in names]
                blamed = "" if str(paths[0]) in str(error) else f"{paths[0]}: "
                say(f"left out: {blamed}{error}")
                failed += paths
            else:
                writing += [(pictures[name], pool.submit(write, near, outputs[name]))
                            for name, near in zip(names, maps)]
            while len(writing) > batch + THREADS:
                failed += unwritten(*writing.popleft())
            bar.update(len(names))
        for path, task in writing:
            failed += unwritten(path, task)
    return failed


def unwritten(path, task):
    """Waits for a writing task: [], or [path] and a message if its file names are not possible."""
    try:
        task.result()
    except ValueError as error:
        say(f"left out: {error}")
        return [path]
    return []


def to_sqrt_disparity(x, target):
    """x float32 in [0,1] in the space `target` -> square-root disparity in [0,1], 1 = near.

    Another space needs the ratio of the farthest to the nearest depth. It is unknown: FAR_TO_NEAR
    is assumed.
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
    terminal.check_folder(args.out, "--out")
    if args.max_pixels:
        allow_pixels(args.max_pixels)
    if not args.ckpt:
        from miniature.embedded import TRAINED
        say(f"No --ckpt: predicting with the embedded miniature, {TRAINED}, a toy "
            "trained on procedural rooms.")
    if not args.inputs:
        from miniature.embedded import pictures
        args.inputs = [pictures()]
        say(f"No INPUT: predicting held-out scenes of the miniature, {args.inputs[0]}.")
    pictures = find_pictures(args.inputs, args.out)
    outputs = plan_outputs(pictures, args.out, args.save)
    existed = {pictures[name]: sum(path.exists() for path in files.values())
               for name, files in outputs.items()}
    device = job.start(args.device).device
    memory.keep_freed_memory(args.processing_res)
    model = open_model(args.ckpt or TRAINED, device, args.precision)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    batch = args.batch or (8 if model.device.type == "cuda" else 1)
    failed = predict_all(model, pictures, outputs, args.processing_res, batch)
    stale = sum(existed.pop(path) for path in failed)
    replaced = sum(existed.values())
    say(f"{len(pictures) - len(failed)} pictures predicted into {args.out}: {MEANING}."
        + (f" {replaced} files of an earlier run were replaced." if replaced else "")
        + (f" {stale} of pictures that could not be predicted are still there." if stale else ""))
    if failed:
        raise ValueError(f"{len(failed)} of {len(pictures)} pictures could not be predicted, "
                         f"{failed[0]} first.")


if __name__ == "__main__":
    job.run(main)
