"""Puts the results of several evaluations side by side, with intervals and a paired test."""

import numpy as np

from evaluation.journal import read_results

SHOWN = {"abs_rel": "AbsRel", "delta1": "d1", "boundary_f1": "F1"}
PROTOCOL = ("align", "align_negative", "f1_mask", "f1_resolution")
DRAWS, SEED, AT_ONCE = 10_000, 0, 500


def compare(folders, published):
    """Text: for each set that all folders have, a table of their scores.

    folders: results of evaluate.py; the differences are to the first. published: {set: {system:
    (AbsRel, delta1)}} as fractions. Only images that all have are compared. Raises ValueError where
    nothing can be compared, FileNotFoundError where there are no results.
    """
    results = [(folder, *read(folder)) for folder in dict.fromkeys(folders)]
    sets = [name for name in results[0][1] if all(name in found for _, found, _ in results)]
    if not sets:
        raise ValueError(f"{', '.join(map(str, folders))} have no data set in common: evaluate "
                         "them on the same one.")
    return "\n\n".join(table(name, results, published.get(name, {})) for name in sets)


def read(folder):
    """What evaluate.py found, and {set: {image: {score: number}}}."""
    results, rows = read_results(folder)
    images = {name: {} for name in results}
    try:
        for row in rows:
            scores = {score: float(row[score]) for score in SHOWN}
            images.setdefault(row["dataset"], {})[row["image"]] = scores
    except KeyError as error:
        raise ValueError(f"{folder} holds scores without {error}: run evaluate.py again.") from None
    return results, images


def table(name, results, published):
    common = [image for image in results[0][2][name]
              if all(image in images[name] for _, _, images in results)]
    if not common:
        raise ValueError(f"the evaluations of {name} have no image in common.")
    lines = [f"{name}: {len(common)} images that all have; in per cent, 95 % intervals over images",
             f"{'':<32}" + "".join(f"{head:>24}" for head in SHOWN.values()) + "   p (AbsRel)"]
    scores = {folder: {score: np.array([images[name][image][score] for image in common])
                       for score in SHOWN} for folder, _, images in results}
    first = results[0][0]
    for folder, mine in scores.items():
        cells = "".join(f"{interval(values):>24}" for values in mine.values())
        p = "" if folder == first else f"{paired_p(mine['abs_rel'], scores[first]['abs_rel']):.4f}"
        lines.append(f"{str(folder)[-32:]:<32}{cells}{p:>14}")
    for system, (abs_rel, delta1) in published.items():
        cells = f"{100 * abs_rel:>24.1f}{100 * delta1:>24.1f}"
        lines.append(f"{system + ' (published)':<32}{cells}")
    for key in PROTOCOL:
        values = {str(found[name].get(key)) for _, found, _ in results}
        if len(values) > 1:
            lines.append(f"warning: {key} differs ({', '.join(sorted(values))}), so the scores are "
                         "not of one protocol")
    lines.append("p: of a difference in AbsRel to the first row at least this large, were the two "
                 "equally good (sign flips of the images' differences)")
    return "\n".join(lines)


def interval(values):
    """Mean and bootstrap interval of scores, in per cent."""
    low, high = bootstrap(values)
    return f"{100 * values.mean():.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def bootstrap(values, draws=DRAWS, seed=SEED):
    """95 % percentile interval of the mean of `values` over the images drawn."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(AT_ONCE, len(values)))].mean(axis=1)
             for _ in range(draws // AT_ONCE)]
    return np.quantile(np.concatenate(means), (0.025, 0.975))


def paired_p(values, others, draws=DRAWS, seed=SEED):
    """Two-sided p of the mean difference of paired scores, by random sign flips."""
    rng = np.random.default_rng(seed)
    differences = values - others
    observed = abs(differences.mean())
    extreme = 0
    for _ in range(draws // AT_ONCE):
        signs = 1 - 2 * rng.integers(2, size=(AT_ONCE, len(differences)), dtype=np.int8)
        means = np.abs(signs @ differences) / len(differences)
        extreme += np.count_nonzero(means >= observed * (1 - 1e-12))
    return (extreme + 1) / (draws + 1)
