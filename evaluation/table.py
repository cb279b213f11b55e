"""The scores of an evaluation as text: a table with published scores, then the way of scoring."""

from data.sources import BENCHMARKS

COLUMNS = {  # score: heading, factor and digits of the printed number
    "abs_rel": ("AbsRel", 100, 2), "delta1": ("d1", 100, 2), "delta2": ("d2", 100, 2),
    "delta3": ("d3", 100, 2), "sq_rel": ("SqRel", 1, 3), "rmse": ("RMSE", 1, 3),
    "rmse_log": ("RMSElog", 1, 3), "log10": ("log10", 1, 4), "irmse": ("iRMSE", 1, 4),
    "silog": ("SILog", 1, 2), "boundary_f1": ("F1", 100, 2),
}
WIDTH = 9  # of a column
METRIC = {  # how predictions in metres are aligned
    "none": "Predictions in metres, as they are",
    "scale": "Predictions times the ratio of the medians of truth and prediction",
}


def table(results):
    """metrics.json's {set: results} -> lines."""
    heads = "".join(f"{head:>{WIDTH}}" for head, _, _ in COLUMNS.values())
    yield f"{'set':<10}{'images':>13}  {'aligned in':<15}{heads} at size"
    for name, result in results.items():
        resolution = f" at {result['f1_resolution']}"
        yield row(name, describe_count(result), result["align"], result, resolution)
        for space, scores in result["other_alignments"].items():
            yield row("", "", space, scores, resolution)
        if BENCHMARKS[name].published:
            of = BENCHMARKS[name].published_of
            yield row("", "", "(published)", BENCHMARKS[name].published, of and f" {of}")
    yield ""
    yield ("AbsRel, d1-d3 and F1 in per cent, SqRel and RMSE in m, iRMSE in 1/m; (published): the "
           "paper's DepthMaster.")
    aligned = {METRIC.get(result["align"], "Scale and shift by least squares in float64 at the "
                          "truth's size") for result in results.values()}
    yield f"{'; '.join(aligned)}. F1 is not comparable across resolutions."
    yield from (f"{name}: {'; '.join(describe(result))}." for name, result in results.items())


def row(name, images, align, scores, remark=""):
    """One line of the table; a missing score is a dash."""
    line = f"{name:<10}{images:>13}  {align:<15}"
    for key, (_, factor, digits) in COLUMNS.items():
        number = f"{scores[key] * factor:.{digits}f}" if key in scores else "-"
        line += f" {number:>{WIDTH - 1}}"
    return line + remark


def describe_count(result):
    """The number of images in a set's means and, if known, the expected number."""
    count, expected = result["images"], result["expected_images"]
    return str(count) if expected is None else f"{count} of {expected}"


def describe(result):
    """How a set was scored, as phrases."""
    yield f"{describe_count(result)} images"
    if result["expected_images"] not in (None, result["images"]):
        fewer = result["images"] < result["expected_images"]
        yield (f"the means are of {'fewer' if fewer else 'more'} images than the set has and do "
               "not compare with published ones")
    if result["limit"]:
        yield f"only the first {result['limit']} were asked for (--limit)"
    spaces = {result["align"]: result, **result["other_alignments"]}
    for space, scores in spaces.items():
        if scores["unfitted"]:
            yield (f"{scores['unfitted']} predictions could not fix scale and shift in {space} and "
                   "count as the flat map at the truth's mean")
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
