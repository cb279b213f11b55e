"""Scores a model, or any system's saved predictions, on data sets with ground truth.

    python evaluate.py --ckpt runs/stage2/model.safetensors --data ROOT
    python evaluate.py --predictions DIR --data ROOT --datasets nyu kitti
    python evaluate.py --compare DIR DIR
    torchrun --nproc_per_node 8 evaluate.py --ckpt ... --data ROOT      # shared by 8 GPUs

ROOT holds the sets, each in its folder (nyuv2/ kitti/ eth3d/ scannet/ diode/ hypersim/ vkitti/
pairs/), as the archive or its content; for a single set ROOT may be that folder itself. Without
--ckpt and --data the embedded miniature model is scored on its own held-out scenes. The table goes
to standard output (AbsRel, delta and F1 in per cent), metrics.json and per_image.csv (fractions)
into --out. After an interruption the same command goes on.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import metrics
from data.loading import preflight
from data.pairs import add_pair_options, pair_options
from data.sources import BENCHMARKS, find_benchmarks, locate, open_benchmark
from data.transforms import KITTI_CROP, normalise_target
from engine import job, run_folder, terminal
from engine.terminal import say, tell
from evaluation import predictions
from evaluation.journal import Journal, check_settings, prepare, write_metrics
from evaluation.loop import evaluate_dataset
from evaluation.table import table
from extras.compare import compare
from extras.report import PUBLISHED, has_pictures, save_pictures, write_report
from nets.depthmaster import DepthMaster
from nets.inference import memory
from nets.inference.precision import choose
from storage import sha256

# Table II's rows: time steps of the passes; i2l: only the autoencoder, on the ground truth.
PARADIGMS = {"single": (1,), "iterative": (4, 3, 2, 1), "i2l": (), "denoise": ()}


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("what is scored").add_mutually_exclusive_group()
    source.add_argument("--ckpt", type=Path, help="model (.safetensors)")
    source.add_argument("--predictions", type=Path, metavar="DIR", help="saved predictions, as "
                        "DIR/SET/IMAGE.npy, .png (16 bit) or .exr, IMAGE as in per_image.csv")
    source.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="compare "
                        "finished evaluations (their --out folders), score nothing")
    add = parser.add_argument_group("on what").add_argument
    add("--data", type=Path, metavar="ROOT", help="folder of the sets")
    add("--datasets", nargs="+", choices=BENCHMARKS, metavar="SET",
        help=f"of {' '.join(BENCHMARKS)} (all under ROOT)")
    add_pair_options(add)
    add("--vkitti-crop", type=terminal.positive, nargs=2, metavar=("H", "W"), default=KITTI_CROP,
        help="of Virtual KITTI 2, at the bottom (352 1216)")
    add("--hypersim-split", choices=("val", "test"), default="val", help="(%(default)s)")
    add("--batch", type=terminal.positive, help="images predicted at once (8 on CUDA, else 1)")
    add("--workers", type=terminal.number_from_0, default=terminal.readers(),
        help="processes that read ahead (here %(default)s)")
    add("--limit", type=terminal.positive, metavar="N", help="only the first N images of each set")
    add("--preflight", action="store_true", help="open every file, say what is wrong, and stop")
    add("--skip-bad", action="store_true", help="leave out, and count, what cannot be read")
    add = parser.add_argument_group("how").add_argument
    add("--align", choices=metrics.ALIGNMENTS, help="space of the fit (the model's; "
        "sqrt_disparity); for saved predictions that are depth: scale (by the median), or none, "
        "in metres (PNG: millimetres)")
    add("--align-negative", choices=metrics.NEGATIVE, default="clamp",
        help="aligned values below 0; square: as the released code (%(default)s)")
    add("--f1-mask", choices=metrics.F1_MASKS, default="pair",
        help="pixels of an edge that must be valid; owner: as the released code (%(default)s)")
    add("--processing-res", type=terminal.number_from_0, metavar="PIXELS",
        help="longest side in prediction, 0: native (the set's)")
    add("--paradigm", choices=PARADIGMS, default="single", help="Table II; iterative: four passes, "
        "each on the last one's output; i2l: the truth through the autoencoder; denoise: as "
        "Marigold, passes and maps as below (%(default)s)")
    add("--denoise-steps", type=terminal.positive, help="passes (50)")
    add("--ensemble", type=terminal.positive, help="maps to combine (10)")
    add("--autoencoder", choices=["full", "tiny"], help="of a model that has both (tiny: faster, "
        "approximate)")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="float32",
        help="of the model (%(default)s)")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    add("--out", type=Path, default=Path("scores"), help="folder (%(default)s)")
    add("--report", action="store_true", help="a page to look at, too: OUT/report.html")
    args = parser.parse_args()
    if args.predictions and (args.paradigm != "single" or args.autoencoder):
        parser.error("--paradigm is about a model (--ckpt), as --autoencoder is, and not about "
                     "saved predictions")
    if args.paradigm != "denoise" and (args.denoise_steps or args.ensemble):
        parser.error("--ensemble and --denoise-steps are for --paradigm denoise")
    if args.align in metrics.METRIC and not args.predictions:
        parser.error(f"--align {args.align} is for saved predictions (--predictions)")
    return args


def open_sets(root, names, vkitti_crop, hypersim_split, pairs):
    """[(name, reader)], opened before anything is computed; the miniature's scenes are rendered."""
    if root is None:
        others = [name for name in names or () if name != "miniature"]
        if others:
            raise ValueError(f"--datasets {others[0]} needs --data, the folder that it lies in.")
        names = ["miniature"]
    elif not names:
        names = find_benchmarks(root)
    sets = []
    for name in dict.fromkeys(names):
        if name == "miniature":
            from miniature.embedded import held_out
            root = held_out()
        folder = locate(name, root, alone=len(names) == 1)
        sets.append((name, open_benchmark(name, folder, vkitti_crop, hypersim_split, **pairs)))
    return sets


def model_predictor(model, processing_res, paradigm):
    """A function: samples of one size -> predictions, by one of PARADIGMS."""
    def of_images(samples):
        images = torch.stack([sample["image"] for sample in samples])
        return model.predict_batch(images, processing_res, PARADIGMS[paradigm])

    def of_truths(samples):
        targets = [normalise_target(sample["depth"], sample["valid"], model.target, sample["name"])
                   for sample in samples]
        return model.round_trip(torch.stack(targets), processing_res)

    return of_truths if paradigm == "i2l" else of_images


def saved_predictor(folder, metric):
    """A function: samples -> their saved predictions, read from a folder; metric: in metres."""
    return lambda samples: [predictions.read_prediction(
        folder, sample["name"], sample["depth"].shape[1:], sample.get("uncropped"), metric)
        for sample in samples]


def state_of_weights(ckpt, before):
    """The digest of a model's file, the same on all ranks; before: its `identity` before loading.

    Raises ValueError if the file was replaced meanwhile.
    """
    found = sha256(ckpt)
    if identity(ckpt) != before or job.agreed(found) != found:
        raise ValueError(f"{ckpt} was replaced while it was read: give the same command again.")
    return {"weights": found}


def identity(path):
    """Inode, size and modification time of a file: they differ if another file replaces it."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def state_of_predictions(folder, keys, metric):
    """{set: state of its saved predictions}, for the images (set, name) in keys."""
    names, states = dict.fromkeys(name for name, _ in keys), {}
    for name in names:
        images = [image for which, image in keys if which == name]
        forms, states[name] = predictions.state(
            locate(name, folder, len(names) == 1), images, metric)
        if metric or forms.keys() - {"NAME"}:
            counts = ", ".join(f"{count} {form}" for form, count in forms.items())
            say(f"{name}: of {len(images)} predictions are there under the names: {counts}.")
    return states


def open_journal(out, settings, columns, keys, ranks):
    """The journal in a folder, with the rows that an interrupted evaluation left there.

    settings: all that the rows depend on; columns: names of the scores; keys: (set, image) of all
    expected rows.
    """
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        run_folder.claim(out)
        changed = prepare(out, settings)
        if changed:
            say(f"{out} held scores with other settings ({', '.join(changed)}); they are replaced.")
        before = Journal(out, columns)
        before.merge(keys)
        if before.lost:
            say(f"{before.lost} rows of {before.path} can't be read; they are scored again.")
    job.wait()
    journal = Journal(out, columns, ranks.rank)
    if journal.rows:
        say(f"{out} holds the scores of {len(journal.rows)} images already: going on "
            f"(remove {out / 'per_image.csv'} to begin anew).")
    return journal


def summarise(rows, spaces, expected, asked, limit):
    """Rows of the journal -> the entry of their set in metrics.json.

    expected: number of images of the complete set; asked: number of images to score.
    """
    def found(space, prefix=""):
        unfitted = sum(space in row["unfitted"].split() for row in rows)
        scores = [{name: float(row[prefix + name]) for name in metrics.SCORES} for row in rows]
        return dict(unfitted=unfitted, **metrics.mean_scores(scores))

    # The ground truth's sizes: without them a boundary F1 has no meaning.
    sizes = sorted({(int(row["height"]), int(row["width"])) for row in rows})
    sizes = [f"{height}x{width}" for height, width in sizes]
    return dict(images=len(rows), expected_images=expected, limit=limit, skipped=asked - len(rows),
                f1_resolution=sizes[0] if len(sizes) == 1 else
                f"{sizes[0]} to {sizes[-1]} ({len(sizes)} sizes)", **found(spaces[0]),
                other_alignments={space: found(space, f"{space}:") for space in spaces[1:]})


def main():
    args = options()
    if args.compare:
        return tell(compare(args.compare, PUBLISHED))
    opened = partial(open_sets, args.data, args.datasets, args.vkitti_crop, args.hypersim_split,
                     pair_options(args))
    if args.preflight:
        return preflight(dict(opened()), args.workers, tell)
    terminal.check_folder(args.out, "--out")
    ranks = job.start("cpu" if args.predictions else args.device)
    memory.keep_freed_memory(args.processing_res)
    ckpt = args.ckpt
    if not (ckpt or args.predictions):
        if args.data:
            raise ValueError("--data needs --ckpt, the model to score, or --predictions; to try "
                             "it, give --ckpt weights/miniature.safetensors.")
        from miniature.embedded import TRAINED as ckpt
        say(f"No --ckpt: scoring the embedded miniature model, {ckpt}.")
    args.precision, why = job.agreed(choose(args.precision, ranks.device))
    say(why)

    model, paradigm = None, args.paradigm
    if not args.predictions:
        before = identity(ckpt) if ckpt.is_file() else None
        kind = DepthMaster
        if args.paradigm == "denoise":
            from extras.denoising import Denoiser as kind
        model = kind.from_file(ckpt, ranks.device, getattr(torch, args.precision),
                               args.autoencoder)
        if args.paradigm == "denoise":
            model.steps, model.ensemble = args.denoise_steps or 50, args.ensemble or 10
            paradigm = f"denoise, {model.steps} passes x {model.ensemble}"
        if model.approximate:
            paradigm += ", tiny autoencoder"
            say("Tiny autoencoder: approximate.")
        if model.kind == "sd2":
            say(f"warning: {ckpt} was never trained for depth; its scores mean nothing.")
        model.for_inference(ranks.device, args.precision, PARADIGMS[args.paradigm])
    # Saved predictions are read one by one, so that a bad file affects no other image.
    batch = model and args.batch or (8 if ranks.device.type == "cuda" else 1)
    args.align = args.align or (model.target if model else "sqrt_disparity")
    metric = args.align in metrics.METRIC
    spaces = [args.align, *(s for s in metrics.SPACES
                            if s != args.align and not model and not metric)]
    sets = opened()
    keys = [(name, reader.name(index)) for name, reader in sets
            for index in range(len(reader))[:args.limit]]

    # All that the rows depend on.
    settings = {name: str(getattr(args, name)) for name in (
        "data", "align", "align_negative", "f1_mask", "depth_scale", "max_depth", "resize_depth",
        "exif", "vkitti_crop", "hypersim_split")}
    if model:
        settings |= {name: str(getattr(args, name)) for name in (
            "precision", "processing_res")} | {"batch": str(batch), "paradigm": paradigm}
        settings |= state_of_weights(ckpt, before)
    else:
        settings |= state_of_predictions(args.predictions, keys, metric)
    columns = [*metrics.SCORES, "height", "width", "unfitted",
               *(f"{space}:{name}" for space in spaces[1:] for name in metrics.SCORES)]
    journal = open_journal(args.out, settings, columns, keys, ranks)
    results = {}
    for name, reader in sets:
        benchmark, longest = BENCHMARKS[name], None  # longest side while predicting
        if model:
            choices = (args.processing_res, benchmark.processing_res, model.processing_res)
            longest = next(choice for choice in choices if choice is not None)
            predict = model_predictor(model, longest, args.paradigm)
        else:
            predict = saved_predictor(locate(name, args.predictions, len(sets) == 1), metric)
        images = [reader.name(index) for index in range(len(reader))[:args.limit]]
        done = {image for image in images if (name, image) in journal.rows
                and (not args.report or has_pictures(args.out, name, image))}
        # An interruption does not change which images are predicted together.
        chunks = [range(first, min(first + batch, len(images)))
                  for first in range(0, len(images), batch)]
        chunks = [chunk for chunk in chunks[ranks.rank::ranks.world]
                  if not done.issuperset(images[index] for index in chunk)]
        left = sum(images[index] not in done for chunk in chunks for index in chunk)
        scored = evaluate_dataset(
            predict, reader, spaces, benchmark.min_depth, benchmark.max_depth,
            args.align_negative, args.f1_mask, chunks, args.workers,
            on_bad=args.skip_bad and partial(say_skipped, name) or None,
            look=args.report and partial(save_pictures, args.out, name) or None)
        with tqdm(desc=name, total=left, unit="image", dynamic_ncols=True,
                  disable=not ranks.first) as bar:
            for image in scored:
                if (name, image.image) not in journal.rows:
                    first, *others = image.scores.values()
                    journal.add(name, image.image, [
                        *first.values(), *image.size, " ".join(image.unfitted),
                        *(value for scores in others for value in scores.values())])
                bar.update(image.image not in done)
        job.wait()
        if ranks.first:
            check_settings(args.out, settings)  # without file locks, another run may use the folder
            journal.merge(keys)
            rows = [row for key, row in journal.rows.items() if key[0] == name]
            if not rows:
                raise ValueError(f"none of the {len(images)} images of {name} could be scored.")
            found = summarise(rows, spaces, reader.expected, len(images), args.limit)
            results[name] = found | dict(
                processing_res=longest, precision=model and str(model.dtype).split(".")[1],
                paradigm=paradigm if model else None, align=args.align,
                align_negative=args.align_negative, f1_mask=args.f1_mask)
            write_metrics(args.out, results)  # after each set: a later set may fail
        job.wait()  # merge removes the ranks' files before they write the next set's rows
    if ranks.first:
        tell("\n".join(table(results)))
        say(f"Written: {args.out / 'metrics.json'} and {args.out / 'per_image.csv'}.")
        if args.report:
            write_report(args.out)
            say(f"The report: {args.out / 'report.html'}.")


def say_skipped(name, image, reason):
    say(f"skipped {name}/{image}: {reason}", any_rank=True)


if __name__ == "__main__":
    job.run(main)
