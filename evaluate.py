"""Scores a model, or any system's saved predictions, on data sets with ground truth.

    python evaluate.py --ckpt runs/stage2/model.safetensors --data ROOT
    python evaluate.py --predictions DIR --data ROOT --datasets hypersim

ROOT holds the sets, each in the folder of its name (hypersim/, vkitti/, pairs/); for a single set
ROOT may be that folder itself. Without --ckpt and --data the embedded miniature model is scored on
its own held-out scenes. The table goes to standard output (AbsRel, delta and F1 in per cent),
metrics.json and per_image.csv (fractions) into --out.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

import engine
import metrics
from data.benchmarks import BENCHMARKS, find_benchmarks, locate, open_benchmark
from data.predictions import read_prediction
from data.transforms import normalise_target
from miniature import embedded, render
from nets.depthmaster import DepthMaster

COLUMNS = {  # score: heading, factor and digits of what is printed
    "abs_rel": ("AbsRel", 100, 2), "delta1": ("d1", 100, 2), "delta2": ("d2", 100, 2),
    "delta3": ("d3", 100, 2), "sq_rel": ("SqRel", 1, 3), "rmse": ("RMSE", 1, 3),
    "rmse_log": ("RMSElog", 1, 3), "log10": ("log10", 1, 4), "irmse": ("iRMSE", 1, 4),
    "silog": ("SILog", 1, 2), "boundary_f1": ("F1", 100, 2),
}

# Table II's rows: time steps of the passes; i2l has none, there the autoencoder gets the truth.
PARADIGMS = {"single": (1,), "iterative": (4, 3, 2, 1), "i2l": ()}


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("what is scored").add_mutually_exclusive_group()
    source.add_argument("--ckpt", type=Path, help="model (.safetensors)")
    source.add_argument("--predictions", type=Path, metavar="DIR", help="saved predictions, as "
                        "DIR/SET/IMAGE.npy or .png (16 bit), IMAGE as in per_image.csv")
    add = parser.add_argument_group("on what").add_argument
    add("--data", type=Path, metavar="ROOT", help="folder of the sets")
    add("--datasets", nargs="+", choices=BENCHMARKS, metavar="SET",
        help=f"of {' '.join(BENCHMARKS)} (all under ROOT)")
    add("--depth-scale", type=float, default=1000.0, help="of 16-bit pairs, per metre (1000)")
    add("--vkitti-crop", type=int, nargs=2, metavar=("H", "W"), default=(352, 1216),
        help="of Virtual KITTI 2, at the bottom (352 1216)")
    add("--limit", type=engine.positive, metavar="N", help="only the first N images of each set")
    add("--skip-bad", action="store_true", help="leave out, and count, what cannot be read")
    add = parser.add_argument_group("how").add_argument
    add("--align", choices=metrics.SPACES,
        help="space that scale and shift are fitted in (the model's; predictions: sqrt_disparity)")
    add("--align-negative", choices=metrics.NEGATIVE, default="clamp",
        help="aligned values below 0; square: as the released code (%(default)s)")
    add("--f1-mask", choices=metrics.F1_MASKS, default="pair",
        help="pixels of an edge that must be valid; owner: as the released code (%(default)s)")
    add("--processing-res", type=int, help="longest side in prediction, 0: native (the set's)")
    add("--paradigm", choices=PARADIGMS, default="single", help="Table II; iterative: four passes, "
        "each on the last one's output; i2l: the truth through the autoencoder (%(default)s)")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="float32",
        help="of the model (%(default)s)")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    add("--out", type=Path, default=Path("evaluation"), help="folder (%(default)s)")
    args = parser.parse_args()
    if args.predictions and args.paradigm != "single":
        parser.error("--paradigm is about a model (--ckpt), not about saved predictions")
    return args


def open_sets(root, names, depth_scale, vkitti_crop):
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
            render.ensure(embedded.SCENES, val=embedded.FRAMES["val"])
        inside = embedded.SCENES if name == "miniature" else root
        folder = locate(name, inside, alone=len(names) == 1)
        sets.append((name, open_benchmark(name, folder, depth_scale, vkitti_crop)))
    return sets


def open_model(path, device, precision):
    """The model at a path, ready to predict."""
    model = DepthMaster.from_file(path)
    if model.kind == "sd2":
        engine.say(f"warning: {path} was never trained for depth; its scores mean nothing.")
    return model.for_inference(device, precision)


def model_predictor(model, processing_res, paradigm):
    """sample -> prediction, in one of the ways of PARADIGMS."""
    def of_image(sample):
        image = sample["image"].permute(1, 2, 0).numpy()
        return model.predict(image, processing_res, PARADIGMS[paradigm])

    def of_truth(sample):
        target = normalise_target(sample["depth"], sample["valid"], model.target, sample["name"])
        return model.round_trip(target, processing_res)

    return of_truth if paradigm == "i2l" else of_image


def saved_predictor(folder):
    return lambda sample: read_prediction(folder, sample["name"], sample["depth"].shape[1:])


def score_set(name, reader, predict, spaces, negative, f1_mask, limit, skip_bad):
    """Scores a set, with a progress bar: ([ImageScores], number of images left out)."""
    benchmark, skipped = BENCHMARKS[name], []

    def skip(image, reason):
        skipped.append(image)
        tqdm.write(f"skipped {name}/{image}: {reason}", file=sys.stderr)

    count = min(len(reader), limit or len(reader))
    images = metrics.evaluate_dataset(
        predict, reader, spaces, benchmark.min_depth, benchmark.max_depth, negative, f1_mask,
        indices=range(count), on_bad=skip if skip_bad else None)
    images = list(tqdm(images, desc=name, total=count, unit="image", dynamic_ncols=True))
    if not images:
        raise ValueError(f"none of the {count} images of {name} could be scored.")
    return images, len(skipped)


def describe_sizes(images):
    """The sizes of the truths as text: a boundary F1 means nothing without."""
    found = [f"{height}x{width}" for height, width in sorted({image.size for image in images})]
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]} ({len(found)} sizes)"


def mean_in(images, space):
    return metrics.mean_scores([image.scores[space] for image in images])


def write_results(out, results, rows):
    """metrics.json and per_image.csv into the folder `out`; beside first, then renamed."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "per_image.csv.tmp", "w", newline="") as file:
        csv.writer(file).writerows([("dataset", "image", *metrics.SCORES), *rows])
    (out / "metrics.json.tmp").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("per_image.csv", "metrics.json"):
        os.replace(out / f"{name}.tmp", out / name)


def table_row(name, images, align, scores, f1_resolution=""):
    """One line of the table; a score that is not there is a dash."""
    line = f"{name:<10}{images:>13}  {align:<15}"
    for key, (head, factor, digits) in COLUMNS.items():
        number = f"{scores[key] * factor:.{digits}f}" if key in scores else "-"
        line += f"{number:>{max(len(head), 6) + 1}}"
    return line + f1_resolution


def print_table(results):
    """The scores, the published ones, and how they were computed, on standard output."""
    heads = "".join(f"{head:>{max(len(head), 6) + 1}}" for head, _, _ in COLUMNS.values())
    print(f"{'set':<10}{'images':>13}  {'aligned in':<15}{heads} at size")
    for name, result in results.items():
        count, resolution = describe_count(result), f" at {result['f1_resolution']}"
        print(table_row(name, count, result["align"], result, resolution))
        for space, scores in result["other_alignments"].items():
            print(table_row("", "", space, scores, resolution))
        if BENCHMARKS[name].published:
            print(table_row("", "", "(published)", BENCHMARKS[name].published))
    print("\nAbsRel, d1-d3 and F1 in per cent, SqRel and RMSE in m, iRMSE in 1/m; (published): the "
          "paper's DepthMaster.\nScale and shift by least squares in float64 at the truth's size. "
          "F1 is not comparable across resolutions.")
    for name, result in results.items():
        print(f"{name}: " + "; ".join(describe(result)) + ".")


def describe_count(result):
    count, expected = result["images"], result["expected_images"]
    return str(count) if expected is None else f"{count} of {expected}"


def describe(result):
    """How a set was scored, as phrases."""
    yield f"{describe_count(result)} images"
    if result["limit"]:
        yield f"only the first {result['limit']} were asked for (--limit)"
    if result["skipped"]:
        yield f"{result['skipped']} could not be used and were left out (--skip-bad)"
    if result["processing_res"] is None:
        yield "saved predictions"
    else:
        longest = result["processing_res"]
        yield f"processed at {f'{longest} px (longest side)' if longest else 'the native size'}"
        yield f"precision {result['precision']}"
        yield f"paradigm {result['paradigm']}"
    yield f"negative disparities: {result['align_negative']}; F1 mask: {result['f1_mask']}"


def say_defaults(ckpt, predictions, data):
    """Says what stands in for weights and data that were not given."""
    if not ckpt and not predictions:
        if data:
            raise ValueError("--data needs --ckpt, the model to score, or --predictions; to try "
                             f"it, give --ckpt {embedded.TRAINED}.")
        engine.say(f"No --ckpt: scoring the embedded miniature model, {embedded.TRAINED}.")
    if not data:
        engine.say(f"No --data: on the miniature's held-out scenes in {embedded.SCENES}.")


def main():
    args = options()
    say_defaults(args.ckpt, args.predictions, args.data)
    if args.predictions:
        model, align, precision = None, args.align or "sqrt_disparity", None
        spaces = [align, *(space for space in metrics.SPACES if space != align)]
    else:
        device = engine.start(args.device).device
        model = open_model(args.ckpt or embedded.TRAINED, device, args.precision)
        align, spaces = args.align or model.target, [args.align or model.target]
        precision = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")

    sets = open_sets(args.data, args.datasets, args.depth_scale, args.vkitti_crop)
    results, rows = {}, []
    for name, reader in sets:
        longest = None
        if model is None:
            predict = saved_predictor(locate(name, args.predictions, len(sets) == 1))
        else:
            choices = (args.processing_res, BENCHMARKS[name].processing_res, model.processing_res)
            longest = next(choice for choice in choices if choice is not None)
            predict = model_predictor(model, longest, args.paradigm)
        images, skipped = score_set(name, reader, predict, spaces, args.align_negative,
                                    args.f1_mask, args.limit, args.skip_bad)
        rows += [(name, image.image, *image.scores[align].values()) for image in images]
        results[name] = dict(
            images=len(images), expected_images=reader.expected, skipped=skipped,
            limit=args.limit, align=align, align_negative=args.align_negative,
            f1_mask=args.f1_mask, f1_resolution=describe_sizes(images), processing_res=longest,
            precision=precision, paradigm=args.paradigm if model else None,
            **mean_in(images, align),
            other_alignments={space: mean_in(images, space) for space in spaces[1:]})
        write_results(args.out, results, rows)  # after each set: a later one may fail
    print_table(results)
    engine.say(f"Written: {args.out / 'metrics.json'} and {args.out / 'per_image.csv'}.")


if __name__ == "__main__":
    engine.run(main)
