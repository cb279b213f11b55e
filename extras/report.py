"""A page to look at an evaluation with: the scores, how they were made, every image's pictures."""

import base64
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data.sources import BENCHMARKS
from evaluation.pictures import ERROR_MAX, colourise, nearness
from evaluation.journal import PICTURE_NAMES as PICTURES
from evaluation.journal import read_results
from evaluation.table import METRIC, describe_count
from storage import whole

TEMPLATE = Path(__file__).with_name("report.html")
MAX_SIDE = 320  # of the pictures

COLUMNS = {  # score: heading, unit, digits of what is shown, whether higher is better
    "abs_rel": ("AbsRel", "%", 2, False), "delta1": ("δ1", "%", 2, True),
    "delta2": ("δ2", "%", 2, True), "delta3": ("δ3", "%", 2, True),
    "sq_rel": ("SqRel", "m", 3, False), "rmse": ("RMSE", "m", 3, False),
    "rmse_log": ("RMSElog", "", 3, False), "log10": ("log10", "", 4, False),
    "irmse": ("iRMSE", "1/m", 4, False), "silog": ("SILog", "", 2, False),
    "boundary_f1": ("F1", "%", 2, True),
}

PUBLISHED_SETS = {"nyu": "NYUv2", "kitti": "KITTI", "eth3d": "ETH3D", "scannet": "ScanNet",
                  "diode": "DIODE"}
SECOND = "DepthMaster, Table I (version 2)"
SYSTEMS = (  # system; AbsRel and delta1 in per cent, on PUBLISHED_SETS; the paper they are from
    ("DepthMaster", "5.0 97.2  8.2 93.7  5.3 97.4  5.5 96.7  21.5 77.6",
     "DepthMaster, Table I (F1: Table VI)"),
    ("Lotus-D (final)", "5.1 97.2  8.1 93.1  6.1 97.0  5.5 96.5  22.8 73.8", "Lotus, ICLR 2025"),
    ("Marigold + E2E-FT", "5.2 96.6  9.6 91.9  6.2 95.9  5.8 96.2  30.2 77.9",
     "E2E-FT, WACV 2025"),
    ("GenPercept", "5.6 96.0  9.9 90.4  6.2 95.8  6.2 96.1  35.7 75.6", SECOND),
    ("DepthFM", "6.0 95.5  9.1 90.2  6.5 95.4  6.6 94.9  22.4 78.5", SECOND),
    ("GeoWizard", "5.2 96.6  9.7 92.1  6.4 96.1  6.1 95.3  29.7 79.2", SECOND),
    ("Marigold", "5.5 96.4  9.9 91.6  6.5 96.0  6.4 95.1  30.8 77.3", SECOND),
    ("Depth Anything V2", "4.4 97.9  7.5 94.8  6.2 98.0  4.3 98.1  26.0 75.9", SECOND),
    ("Depth Anything", "4.3 98.1  7.6 94.7  6.5 97.2  4.2 98.0  27.7 75.9", SECOND),
    ("DPT", "9.8 90.3  10.0 90.1  7.8 94.6  8.2 93.4  18.2 75.8", SECOND),
    ("HDN", "6.9 94.8  11.5 86.7  12.1 83.3  8.0 93.9  24.6 78.0", SECOND),
    ("Omnidata", "7.4 94.5  14.9 83.5  16.6 77.8  7.5 93.6  33.9 74.2", SECOND),
    ("LeReS", "9.0 91.6  14.9 78.4  17.1 77.7  9.1 91.7  27.1 76.6", SECOND),
    ("MiDaS", "11.1 88.5  23.6 63.0  18.4 75.2  12.1 84.6  33.2 71.5", SECOND),
    ("DiverseDepth", "11.7 87.5  19.0 70.4  22.8 69.4  10.9 88.2  37.6 63.1", SECOND),
)
PUBLISHED = {  # {set: {system: (AbsRel, delta1)}}, as fractions
    name: {system: tuple(float(number) / 100 for number in numbers.split()[2 * at : 2 * at + 2])
           for system, numbers, _ in SYSTEMS} for at, name in enumerate(PUBLISHED_SETS)}

SPACES = {"sqrt_disparity": "square-root disparity", "disparity": "disparity", "depth": "depth",
          "scale": "depth, by its scale", "none": "metres"}
PARADIGMS = {
    "single": "a single pass", "iterative": "four passes, each on the last one's output",
    "i2l": "no prediction, but the truth sent through the autoencoder",
    "denoise": "by denoising, as Marigold",
}
NEGATIVE = {
    "clamp": "Aligned values below 0 became 0 (far)",
    "square": "Aligned values below 0 were squared, which makes them near, as in the released code",
}
F1_MASKS = {
    "pair": "an edge counts where both of its pixels are valid",
    "owner": "an edge counts where its farther pixel is valid, as in the released code",
    "none": "an edge counts everywhere, valid or not",
}


def write_report(out):
    """OUT/report.html from OUT/metrics.json, OUT/per_image.csv and OUT/pictures/.

    The page needs no other file and no network. FileNotFoundError or ValueError if the two files
    are not there or do not belong together; an image without pictures is shown without.
    """
    out = Path(out)
    results, images = read_results(out)
    counts = Counter(image["dataset"] for image in images)
    if counts != {name: result.get("images") for name, result in results.items()}:
        raise ValueError(f"metrics.json and per_image.csv in {out} are not of one evaluation.")
    try:
        images, page = list(map(scores_of, images)), contents(results)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{out} holds results without {error}: run evaluate.py again.") from error
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    with whole(out / "report.html") as part, open(part, "w", encoding="utf-8") as file:
        file.write(before + as_json(page).removesuffix("}") + ', "images": [\n')
        for index, image in enumerate(images):  # one at a time: the pictures may be many
            pictures = read_pictures(out / "pictures" / image["dataset"] / image["image"])
            file.write((",\n" if index else "") + as_json({**image, "pictures": pictures}))
        file.write("\n]}" + after)


def contents(results):
    """What the page shows but for the images."""
    return dict(
        sets=list(results), scores=scores_table(results), published=published_table(results),
        ways=[dict(set=name, lines=list(describe(name, results[name]))) for name in results],
        columns=[dict(zip(("key", "head", "unit", "digits", "higher_is_better", "factor"),
                          (key, *column, factor_of(key)))) for key, column in COLUMNS.items()],
        brightest=f"{ERROR_MAX:.0%}")


def save_pictures(out, dataset, sample, pred_m):
    """Small pictures of an image, its truth, the aligned prediction (H,W, metres) and the error."""
    image, depth_m, valid = (sample[name].numpy() for name in ("image", "depth", "valid"))
    depth_m, valid, pred_m = depth_m[0], valid[0], pred_m.cpu().numpy()
    known_m = np.where(valid, depth_m, np.nan)
    truth, prediction = nearness(depth_m, valid, [known_m, pred_m])
    error = np.abs(pred_m - depth_m) / known_m
    small = [shrink(x) for x in (truth, prediction, error / ERROR_MAX)]
    pictures = (shrink(image.transpose(1, 2, 0)).round().astype(np.uint8), colourise(small[0]),
                colourise(small[1]), colourise(small[2], "inferno"))
    folder = Path(out) / "pictures" / dataset / sample["name"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(PICTURES, pictures):
        Image.fromarray(picture).save(folder / f"{name}.jpg", quality=80)


def shrink(x):
    """H,W or H,W,C -> at most MAX_SIDE a side: means over squares of what is known (not NaN).

    So the truth of a laser scanner, which knows a pixel here and there, can still be seen.
    """
    cell = -(-max(x.shape[:2]) // MAX_SIDE)
    starts = [np.arange(0, length, cell) for length in x.shape[:2]]

    def sums(values):
        return np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)

    known = np.isfinite(x)
    count = sums(known.astype(np.float64))
    return np.where(count, sums(np.where(known, x, 0.0)), np.nan) / np.maximum(count, 1)


def as_json(value):
    """JSON that may stand in a <script>: no name can end that or begin another."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def scores_of(row):
    """A row of per_image.csv as {dataset, image, score: number}."""
    return {"dataset": row["dataset"], "image": row["image"],
            **{key: float(row[key]) for key in COLUMNS}}


def has_pictures(out, dataset, image):
    """Whether all four of an image are there."""
    folder = Path(out) / "pictures" / dataset / image
    return all((folder / f"{name}.jpg").is_file() for name in PICTURES)


def read_pictures(folder):
    """{name: base64 of the JPEG} of an image; None unless all four are there."""
    paths = {name: folder / f"{name}.jpg" for name in PICTURES}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {name: base64.b64encode(path.read_bytes()).decode() for name, path in paths.items()}


def factor_of(key):
    return 100 if COLUMNS[key][1] == "%" else 1


def scores_table(results):
    """A row for each set, below it those in other alignment spaces."""
    rows = []
    for name, result in results.items():
        for space, scores in {result["align"]: result, **result["other_alignments"]}.items():
            ours = scores is result
            numbers = [f"{scores[key] * factor_of(key):.{digits}f}"
                       for key, (_, _, digits, _) in COLUMNS.items()]
            first = [name, describe_count(result)] if ours else ["", ""]
            cells = [*first, space.replace("_", " "), *numbers, result["f1_resolution"]]
            rows.append(dict(cells=cells, ours=ours))
    heads = [head for head, _, _, _ in COLUMNS.values()]
    return dict(head=["Set", "Images", "Aligned in", *heads, "F1 at"], rows=rows)


def published_table(results):
    """The scores of published systems on those of the sets that were evaluated; None for none."""
    sets = [name for name in PUBLISHED_SETS if name in results]
    head = [f"{PUBLISHED_SETS[name]} {score}" for name in sets for score in ("AbsRel", "δ1")]
    ours = [f"{results[name][key] * 100:.1f}" for name in sets for key in ("abs_rel", "delta1")]
    rows = []
    for system, _, paper in SYSTEMS if sets else SYSTEMS[:1]:
        numbers = [f"{100 * number:.1f}" for name in sets for number in PUBLISHED[name][system]]
        rows.append([system, *numbers, paper])
    if "hypersim" in results:
        paper = BENCHMARKS["hypersim"]
        f1 = f"{paper.published['boundary_f1'] * 100:.1f} ({paper.published_of})"
        head.append("Hypersim F1")
        result = results["hypersim"]
        ours.append(f"{result['boundary_f1'] * 100:.1f} at {result['f1_resolution']}")
        rows = [[*row[:-1], "–" if index else f1, row[-1]] for index, row in enumerate(rows)]
    if not head:
        return None
    return dict(head=["System", *head, "From"], rows=[
        dict(cells=["This evaluation", *ours, ""], ours=True),
        *(dict(cells=row, ours=False) for row in rows)])


def describe(name, result):
    """How a set was scored, as pairs of a label and a sentence."""
    count, expected, space = result["images"], result["expected_images"], result["align"]
    yield "Images", f"{describe_count(result)}."
    if expected is not None and count < expected:
        yield "Note", "These are fewer images than the set has."
    if result["limit"]:
        yield "Limit", f"Only the first {result['limit']} were asked for (--limit)."
    if result["skipped"]:
        yield "Left out", f"{result['skipped']} that could not be used (--skip-bad)."
    longest = result["processing_res"]
    if longest is None:
        yield "Prediction", "Saved predictions."
    else:
        size = f"With the longest side at {longest} px" if longest else "At the native size"
        way, *more = result["paradigm"].split(", ")  # such as passes, the tiny autoencoder
        how = ", ".join([PARADIGMS[way], *more])
        yield "Prediction", f"{size}, in {result['precision']}; {how}."
    yield "Alignment", f"{METRIC[space]}." if space in METRIC else (
        f"In {SPACES[space]}: scale and shift by least squares in float64, at the truth's size, "
        f"over its valid pixels{'' if space == 'depth' else ' that were predicted above 0'}.")
    for fitted, scores in {space: result, **result["other_alignments"]}.items():
        if scores.get("unfitted"):
            yield "Flat", (f"{scores['unfitted']} predictions could not fix scale and shift in "
                           f"{SPACES[fitted]} and count as the mean of the truth.")
    if space == "sqrt_disparity":
        yield "Negative", f"{NEGATIVE[result['align_negative']]}."
    yield "Clipping", describe_range(name, space)
    yield "Scores", "Over the valid pixels of each image, then the mean over the images."
    yield "Boundary F1", f"At {result['f1_resolution']}; {F1_MASKS[result['f1_mask']]}."


def describe_range(name, space):
    """What the aligned predictions of a set were clipped to, as a sentence."""
    low, high = BENCHMARKS[name].min_depth, BENCHMARKS[name].max_depth
    far = "" if "disparity" not in space else "Disparity to at least 0.001/m, then depth to "
    return (far or "Depth to ") + f"{low:g} m " + (
        f"at least, {high:g} m at most." if math.isfinite(high) else "at least.")
