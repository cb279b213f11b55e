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

import argparse
import hashlib
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import engine
import metrics
from data import predictions
from data.benchmarks import BENCHMARKS, find_benchmarks, locate, open_benchmark
from data.chunks import preflight
from data.results import Journal, prepare, write_metrics
from data.transforms import normalise_target
from extras.compare import compare
from extras.report import PUBLISHED, save_pictures, write_report
from miniature import embedded, render
from nets.depthmaster import DepthMaster, inference_dtype

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
    source.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="nothing: put "
                        "finished evaluations (their --out) side by side")
    add = parser.add_argument_group("on what").add_argument
    add("--data", type=Path, metavar="ROOT", help="folder of the sets")
    add("--datasets", nargs="+", choices=BENCHMARKS, metavar="SET",
        help=f"of {' '.join(BENCHMARKS)} (all under ROOT)")
    add("--depth-scale", type=float, default=1000.0, help="of 16-bit pairs, per metre (1000)")
    add("--vkitti-crop", type=int, nargs=2, metavar=("H", "W"), default=(352, 1216),
        help="of Virtual KITTI 2, at the bottom (352 1216)")
    add("--batch", type=engine.positive, help="images of one size predicted at once (8 on CUDA, "
        "else 1)")
    add("--workers", type=int, default=2, help="processes that read ahead (%(default)s)")
    add("--limit", type=engine.positive, metavar="N", help="only the first N images of each set")
    add("--preflight", action="store_true", help="open every file, say what is wrong, and stop")
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
    add("--report", action="store_true", help="a page to look at, too: OUT/report.html")
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
        if name == "miniature" and engine.is_first():
            render.ensure(embedded.SCENES, val=embedded.FRAMES["val"])
        engine.wait()
        inside = embedded.SCENES if name == "miniature" else root
        folder = locate(name, inside, alone=len(names) == 1)
        sets.append((name, open_benchmark(name, folder, depth_scale, vkitti_crop)))
    return sets


def open_model(path, device, precision, paradigm):
    """The model at a path, ready to predict in one of the ways of PARADIGMS."""
    model = DepthMaster.from_file(path, device, inference_dtype(device, precision))
    if model.kind == "sd2":
        engine.say(f"warning: {path} was never trained for depth; its scores mean nothing.")
    return model.for_inference(device, precision, PARADIGMS[paradigm])


def model_predictor(model, processing_res, paradigm):
    """samples of one size -> predictions, in one of the ways of PARADIGMS."""
    def of_images(samples):
        images = torch.stack([sample["image"] for sample in samples])
        return model.predict_batch(images, processing_res, PARADIGMS[paradigm])

    def of_truths(samples):
        targets = [normalise_target(sample["depth"], sample["valid"], model.target, sample["name"])
                   for sample in samples]
        return model.round_trip(torch.stack(targets), processing_res)

    return of_truths if paradigm == "i2l" else of_images


def saved_predictor(folder):
    return lambda samples: [predictions.read_prediction(
        folder, sample["name"], sample["depth"].shape[1:], sample.get("uncropped"))
        for sample in samples]


def columns(spaces):
    """Of per_image.csv, after the image's name: the scores in the first space, then the rest."""
    others = [f"{space}:{name}" for space in spaces[1:] for name in metrics.SCORES]
    return [*metrics.SCORES, "height", "width", "unfitted", *others]


def as_row(image):
    """The cells of an ImageScores."""
    first, *others = image.scores.values()
    return [*first.values(), *image.size, " ".join(image.unfitted),
            *(value for scores in others for value in scores.values())]


def score_set(name, reader, count, score, batch, journal, ranks):
    """Scores those of a set's first `count` images that the journal lacks, this rank's share.

    score(chunks) -> ImageScores; batch: images in a chunk.
    """
    # What is predicted together does not depend on what was done before an interruption.
    chunks = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    done = {index for index in range(count) if (name, reader.name(index)) in journal.rows}
    todo = [chunk for chunk in chunks[ranks.rank::ranks.world] if not done.issuperset(chunk)]
    left = sum(index not in done for chunk in todo for index in chunk)
    with tqdm(desc=name, total=left, unit="image", dynamic_ncols=True,
              disable=not ranks.first) as bar:
        for image in score(chunks=todo):
            if (name, image.image) not in journal.rows:
                journal.add(name, image.image, as_row(image))
                bar.update()


def say_skipped(name):
    """An `on_bad` that says which image of a set is left out."""
    return lambda image, reason: tqdm.write(f"skipped {name}/{image}: {reason}", file=sys.stderr)


def summarise(rows, spaces):
    """Rows of the journal -> what metrics.json says of a set's images."""
    def mean(prefix):
        return metrics.mean_scores([{score: float(row[prefix + score]) for score in metrics.SCORES}
                                    for row in rows])

    unfitted = {space: sum(space in row["unfitted"].split() for row in rows) for space in spaces}
    return dict(f1_resolution=describe_sizes(rows), unfitted=unfitted[spaces[0]], **mean(""),
                other_alignments={space: mean(f"{space}:") for space in spaces[1:]})


def describe_sizes(rows):
    """The sizes of the truths as text: a boundary F1 means nothing without."""
    sizes = sorted({(int(row["height"]), int(row["width"])) for row in rows})
    found = [f"{height}x{width}" for height, width in sizes]
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]} ({len(found)} sizes)"


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
    if result["unfitted"]:
        yield (f"{result['unfitted']} predictions could not fix scale and shift and count as the "
               "flat map at the truth's mean")
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


def open_journal(out, settings, names, keys, ranks):
    """The journal in a folder, with the rows that an interrupted evaluation left there.

    settings: what the rows depend on; names: of the columns; keys: the rows that there should be.
    """
    if ranks.first:
        changed = prepare(out, settings)
        if changed:
            engine.say(f"{out} held scores with other settings ({', '.join(changed)}); they are "
                       "replaced.")
        Journal(out, names).merge(keys)
    engine.wait()
    journal = Journal(out, names, ranks.rank)
    if journal.rows:
        engine.say(f"{out} holds the scores of {len(journal.rows)} images already: going on "
                   f"(remove {out / 'per_image.csv'} to begin anew).")
    return journal


def decisive(options, source):
    """What rows depend on: of the options (a dict) these, and the source, as plain types."""
    names = ["data", "align", "align_negative", "f1_mask", "depth_scale", "vkitti_crop"]
    if not options["predictions"]:
        names += ["precision", "paradigm", "processing_res", "batch"]
    return source | {name: str(options[name]) for name in names}


def state_of_weights(ckpt):
    with open(ckpt, "rb") as file:
        return {"weights": hashlib.file_digest(file, "sha256").hexdigest()}


def state_of_predictions(folder, keys):
    """{set: state of its saved predictions}, for the images (set, name) in keys."""
    names = dict.fromkeys(name for name, _ in keys)
    return {name: predictions.state(locate(name, folder, len(names) == 1),
                                    [image for which, image in keys if which == name])
            for name in names}


def check_data(sets, workers):
    """--preflight: opens every image of the sets. ValueError if anything is wrong."""
    bad = preflight(dict(sets), workers)
    if bad:
        raise ValueError(f"{bad} images can't be used: they are listed above.")


def main():
    args = options()
    if args.compare:
        return print(compare(args.compare, PUBLISHED))
    if args.preflight:
        return check_data(open_sets(args.data, args.datasets, args.depth_scale, args.vkitti_crop),
                          args.workers)
    ranks = engine.start("cpu" if args.predictions else args.device)
    say_defaults(args.ckpt, args.predictions, args.data)
    ckpt = args.ckpt or embedded.TRAINED
    model = None if args.predictions else open_model(
        ckpt, ranks.device, args.precision, args.paradigm)
    # Saved predictions are read one by one, so that a bad file is alone.
    args.batch = model and args.batch or (8 if ranks.device.type == "cuda" else 1)
    args.align = args.align or (model.target if model else "sqrt_disparity")
    spaces = [args.align, *(s for s in metrics.SPACES if s != args.align and not model)]
    sets = open_sets(args.data, args.datasets, args.depth_scale, args.vkitti_crop)
    asked = {name: min(len(reader), args.limit or len(reader)) for name, reader in sets}
    keys = [(name, reader.name(index)) for name, reader in sets for index in range(asked[name])]
    source = state_of_weights(ckpt) if model else state_of_predictions(args.predictions, keys)
    journal = open_journal(args.out, decisive(vars(args), source), columns(spaces), keys, ranks)
    about = dict(limit=args.limit, align=args.align, align_negative=args.align_negative,
                 f1_mask=args.f1_mask, paradigm=args.paradigm if model else None,
                 precision=model and str(model.dtype).removeprefix("torch."))
    results = {}
    for name, reader in sets:
        benchmark, longest = BENCHMARKS[name], None
        if model:
            choices = (args.processing_res, benchmark.processing_res, model.processing_res)
            longest = next(choice for choice in choices if choice is not None)
            predict = model_predictor(model, longest, args.paradigm)
        else:
            predict = saved_predictor(locate(name, args.predictions, len(sets) == 1))
        score = partial(metrics.evaluate_dataset, predict, reader, spaces, benchmark.min_depth,
                        benchmark.max_depth, args.align_negative, args.f1_mask,
                        workers=args.workers, on_bad=say_skipped(name) if args.skip_bad else None,
                        look=partial(save_pictures, args.out, name) if args.report else None)
        score_set(name, reader, asked[name], score, args.batch, journal, ranks)
        engine.wait()
        if ranks.first:
            journal.merge(keys)
            rows = [row for key, row in journal.rows.items() if key[0] == name]
            if not rows:
                raise ValueError(f"none of the {asked[name]} images of {name} could be scored.")
            results[name] = dict(images=len(rows), expected_images=reader.expected,
                                 skipped=asked[name] - len(rows), processing_res=longest, **about,
                                 **summarise(rows, spaces))
            write_metrics(args.out, results)  # after each set: a later one may fail
        engine.wait()  # the ranks' files are gone before the next set's rows are written
    if ranks.first:
        print_table(results)
        engine.say(f"Written: {args.out / 'metrics.json'} and {args.out / 'per_image.csv'}.")
        if args.report:
            write_report(args.out)
            engine.say(f"The report: {args.out / 'report.html'}.")
    engine.stop()


if __name__ == "__main__":
    engine.run(main)
