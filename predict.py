"""Depth of pictures and clips: square-root disparity up to scale and shift, 1 = near, 0 = far.

    python predict.py photo.jpg folder/ --ckpt runs/stage2/model.safetensors
    python predict.py photo.jpg --metric points.csv --save npy ply      # metres, points
    python predict.py clip.mp4 --temporal                               # one scale over the clip

Writes for each picture, under the same relative path in --out: NAME.npy (float32 H,W in [0,1], the
size of the picture), NAME.png (16 bits, 65535 = near) and NAME_color.png (near is red, with a
legend); with --metric also NAME_metres.npy and NAME_metres.png (millimetres). For a clip: a folder
NAME/ of 16-bit PNG and NAME_color.mp4. INPUT is a picture, a clip, a folder (with all below), a
glob, @FILE (a list of these) or - (standard input; --out - writes its 16-bit PNG to standard
output). Pictures are turned upright as their EXIF says. What can't be used is reported, and the
others are still written (exit code 1).
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.images import allow_pixels, read_rgb
from data.pairs import above_0
from engine import job, terminal
from engine.terminal import say
from extras.clip import predict_clip
from extras.inputs import find_inputs, is_clip
from extras.outputs import Outputs, add_output_options, to_sqrt_disparity
from extras.record import describe_run, left_to_do, write_record
from nets.depthmaster import DepthMaster
from nets.inference import memory
from nets.inference.precision import choose

THREADS = terminal.readers()  # that decode pictures and write results


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT",
        help="pictures, clips, folders, globs, @LIST or - (scenes of the embedded miniature)")
    add("--frames", type=Path, metavar="FOLDER", help="a folder whose pictures are a clip's frames")
    add("--fps", type=above_0, default=25, help="frames a second of --frames (%(default)s)")
    add("--temporal", action="store_true", help="one scale over all frames of a clip")
    add("--ckpt", type=Path, help="model (.safetensors; the embedded miniature)")
    add("--out", type=Path, default=Path("predictions"), help="folder (%(default)s)")
    add("--skip-existing", action="store_true", help="leave out what is there already")
    add("--processing-res", type=terminal.number_from_0, metavar="PIXELS",
        help="longest side while predicting, 0: the picture's own (the model's: 768)")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 where it is faster (GPUs, some CPUs), else float32")
    add("--autoencoder", choices=["full", "tiny"], help="of a model that has both (tiny: faster, "
        "approximate)")
    add("--batch", type=terminal.positive, help="pictures predicted at once (8 on CUDA, else 1)")
    add("--max-pixels", type=terminal.positive, metavar="N",
        help="refuse pictures of more (179 million): they take some 30 bytes of memory a pixel")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    add("--doctor", action="store_true", help="say what this machine has and can do")
    add("--selftest", action="store_true", help="check the model file and its result")
    add_output_options(parser)
    args = parser.parse_args()
    if args.selftest and args.autoencoder:
        parser.error("--selftest checks the file as it is: leave out --autoencoder")
    return args


def open_model(args, device):
    """The model, ready to predict; prints warnings about the meaning of its results."""
    precision, why = choose(args.precision, device)
    model = DepthMaster.from_file(args.ckpt, device, getattr(torch, precision), args.autoencoder)
    say(why)
    if model.approximate:
        say("Tiny autoencoder: approximate.")
    if model.kind == "sd2":
        say(f"warning: {args.ckpt} was never trained for depth; its results mean nothing.")
    if model.target != "sqrt_disparity":  # Deviation: the released code has no other target
        say(f"{args.ckpt} predicts {model.target}: converted to square-root disparity as if the "
            f"farthest point were {args.far_to_near:g} times as far as the nearest.")
    return model.for_inference(device, precision)


# ------------------------------------------------------------- reading, predicting, writing


def decoded(pool, pictures, count):
    """{name: path} -> (name, path, image uint8 H,W,3 or the error from reading it), in order.

    The pool reads up to `count` pictures ahead.
    """
    coming = deque()
    for name, path in pictures.items():
        coming.append((name, path, pool.submit(read_rgb, path)))
        if len(coming) > count:
            name, path, reading = coming.popleft()
            yield name, path, reading.exception() or reading.result()
    for name, path, reading in coming:
        yield name, path, reading.exception() or reading.result()


def batches(items, size):
    """(name, path, image) -> lists of at most `size` consecutive items with images of one size.

    An item with an error in place of the image forms a list of its own.
    """
    batch = []
    for item in items:
        shape = getattr(item[-1], "shape", None)
        if batch and (len(batch) == size or shape is None or shape != batch[0][-1].shape):
            yield batch
            batch = []
        batch.append(item)
        if shape is None:
            yield batch
            batch = []
    if batch:
        yield batch


def predict(model, images, processing_res):
    """Images uint8 H,W,3 of one size -> float32 B,H,W in [0,1], in the model's target space."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return model.predict_batch(stacked, processing_res).cpu().numpy()


def predict_all(pool, model, outputs, args, items, bar, adjust=None):
    """Predicts (name, path, image) items and writes the results; returns the paths that failed.

    Threads write the last few results in the background. adjust(map, image), for clips: called on
    each map of square-root disparity, in order; its result is written.
    """
    failed, writing = [], deque()
    for group in batches(items, args.batch):
        names, paths, images = zip(*group)
        started = time.perf_counter()
        try:
            if isinstance(images[0], Exception):
                raise images[0]
            maps = predict(model, images, args.processing_res)
        except ValueError as error:
            blamed = "" if str(paths[0]) in str(error) else f"{paths[0]}: "
            say(f"left out: {blamed}{error}")
            failed, maps = failed + list(paths), []
        seconds = round((time.perf_counter() - started) / len(group), 3)
        for name, path, image, values in zip(names, paths, images, maps):
            target = model.target
            if adjust:
                near = to_sqrt_disparity(values, target, args.far_to_near)
                values, target = adjust(near, image), "sqrt_disparity"
            result = name, path, image, values, target, seconds
            writing.append((path, pool.submit(outputs.write, *result)))
        while len(writing) > args.batch + THREADS:
            failed += unwritten(*writing.popleft())
        bar.update(len(group))
    for path, task in writing:
        failed += unwritten(path, task)
    return failed


def unwritten(path, task):
    """Waits for a writing task: [], or [path] and a message if a result is not possible."""
    try:
        task.result()
    except ValueError as error:
        say(f"left out: {error}")
        return [path]
    return []


def find(args, scratch):
    """What there is to predict: {name: picture}, {name: clip}. scratch: a folder for stdin."""
    if args.max_pixels:
        allow_pixels(args.max_pixels)
    if not args.ckpt:
        from miniature.embedded import TRAINED
        args.ckpt = TRAINED
        say(f"No --ckpt: predicting with the embedded miniature, {TRAINED}, a toy "
            "trained on procedural rooms.")
    if not args.inputs and not args.frames:
        from miniature.embedded import pictures
        args.inputs = [str(pictures())]
        say(f"No INPUT: predicting held-out scenes of the miniature, {args.inputs[0]}.")
    found = find_inputs(args.inputs, args.out, scratch)
    clips = {name: path for name, path in found.items() if is_clip(path)}
    pictures = {name: path for name, path in found.items() if name not in clips}
    if args.frames:
        if not args.frames.is_dir():
            raise FileNotFoundError(f"--frames {args.frames} is no folder of frames: give one.")
        if clips.setdefault(name := args.frames.resolve().name, args.frames) != args.frames:
            raise ValueError(f"{clips[name]} and {args.frames} would both be written as {name}.")
    return pictures, clips


def main():
    args = options()
    if args.doctor or args.selftest:
        from extras.doctor import examine
        return examine(args)
    scratch = tempfile.TemporaryDirectory()
    if to_stdout := args.out == Path("-"):
        if args.metric or args.save not in (None, ["png16"]):
            raise ValueError("--out - writes a 16-bit PNG: leave out --save and --metric.")
        args.out, args.save = Path(scratch.name) / "out", ["png16"]
    terminal.check_folder(args.out, "--out")
    outputs, of_clips = Outputs(args), Outputs(args, clip=True)
    if args.output != "sqrt_disparity":
        say(f".npy and .exr hold {outputs.meaning()}.")
    pictures, clips = find(args, Path(scratch.name))
    if to_stdout and (len(pictures) != 1 or clips):
        raise ValueError("--out - writes the depth of one picture: give one INPUT.")
    outputs.check(pictures, clips)
    with ThreadPoolExecutor(THREADS) as pool:
        run = pool.submit(describe_run, args)
        if args.skip_existing:
            pictures, clips = left_to_do(outputs, of_clips, pictures, clips, run.result())
        device = job.start(args.device).device
        memory.keep_freed_memory(args.processing_res)
        model = open_model(args, device)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        args.batch = args.batch or (8 if model.device.type == "cuda" else 1)
        existed, done_clips = outputs.existing(pictures), {}
        try:
            items = decoded(pool, pictures, args.batch + THREADS)
            with tqdm(total=len(pictures), unit="picture", dynamic_ncols=True,
                      disable=not pictures) as bar:
                failed = predict_all(pool, model, outputs, args, items, bar)
            for name, path in clips.items():
                work = partial(predict_all, pool, model, of_clips, args)
                try:
                    done_clips[name] = predict_clip(name, path, of_clips, work, run.result())
                except ValueError as error:
                    say(f"left out: {error}")
                    failed.append(path)
        finally:
            pool.shutdown()  # after that, all that could be written is
            precision = str(model.dtype).removeprefix("torch.")
            write_record(args.out, run.result() | {"precision": precision},
                         outputs.entries | done_clips)
    if to_stdout and not failed:
        sys.stdout.buffer.write(outputs.files(*pictures)["png16"].read_bytes())
    count, what = len(pictures) + len(clips), "inputs" if clips else "pictures"
    stale = sum(existed.pop(path, 0) for path in failed)
    replaced = sum(existed.values())
    say(f"{count - len(failed)} {what} predicted into {args.out}: {outputs.meaning()}."
        + (" Metres are in NAME_metres.npy." if args.metric else "")
        + (f" {replaced} files of an earlier run were replaced." if replaced else "")
        + (f" {stale} files of {what} that failed are still there." if stale else ""))
    if failed:
        raise ValueError(f"{len(failed)} of {count} {what} could not be predicted, {failed[0]} "
                         "first.")


if __name__ == "__main__":
    job.run(main)
