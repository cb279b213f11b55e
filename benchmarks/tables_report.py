"""Writes docs/tables.md and its figures from the scores that benchmarks/tables.py keeps."""

import math
from pathlib import Path

import numpy as np

from benchmarks.rows import CAUSES, SCORES, TABLES, key
from storage import write_text

SETS = {"hypersim": "rooms", "vkitti": "streets", "pairs": "real frames"}
DRAWS, SEED = 2000, 0  # of the bootstrap
# The paper's figures are of KITTI (AbsRel) and Hypersim (F1): compared with streets and rooms.
LIKE = {"abs_rel": "vkitti", "boundary_f1": "hypersim"}
BETTER = {"abs_rel": -1, "boundary_f1": 1}  # sign of an improvement
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # two-sided 95 %, by number of seeds
POWER = 1.96 + 0.84  # standard deviations: 95 % two-sided, found in 80 % of experiments


def write_report(content, docs):
    """content: of results.json; docs: the folder. Returns the path of tables.md."""
    parts = [HEAD.format(**content["settings"], minutes=minutes(content))]
    for number, (title, entries) in TABLES.items():
        found = [(entry, scores(content, key(entry))) for entry in entries]
        found = [(entry, mine) for entry, mine in found if mine]
        name = f"Table {number}: {title}" if ":" not in number else title
        parts.append(f"## {name}\n")
        if len(found) < 2 or found[0][0] != entries[0]:
            parts.append("Not run yet.\n")
            continue
        picture = draw(number, name, found, docs / "tables")
        parts += [table(found), f"![{name}](tables/{picture.name})\n",
                  "\n".join(verdicts(found)) + "\n"]
        if number in CAUSES:
            parts.append(f"{CAUSES[number]}\n")
    path = Path(docs) / "tables.md"
    write_text(path, "\n".join(parts))
    return path


HEAD = """# The paper's tables, in miniature

Written by `python -m benchmarks.tables` from `docs/tables/results.json`; no number here is typed by
hand. Each row trains for about {minutes} minutes of one core ({steps[stage1]} steps of 8 samples in
stage 1 and its like, {steps[stage2]} in stage 2), from the same pre-trained models, and is scored
on rendered scenes that no pre-training has seen: {scenes[val]} frames of rooms and
{scenes[streets_val]} of streets. AbsRel and boundary F1 are means over images and seeds, in per
cent; ± is the standard deviation over seeds. Differences are to the first row, paired by image and
seed, with 95 % intervals (bootstrap over images, Student's t over seeds). The paper's figures stand
beside ours: AbsRel of KITTI (compared with our streets), F1 of Hypersim (with our rooms). The
miniature is a toy: what it can tell is whether a difference has the paper's sign.
"""


def minutes(content):
    """Median minutes that a training run's steps took."""
    seconds = [value for runs in content["seconds"].values() for value in runs.values() if value]
    return f"{np.median(seconds) / 60:.1f}" if seconds else "?"


def scores(content, name):
    """{set: {score: float array seeds,images}} of a row's seeds that are there; empty: none."""
    seeds = content["scores"].get(name, {})
    found = {}
    for which in SETS:
        there = [seeds[seed][which] for seed in sorted(seeds, key=int) if which in seeds[seed]]
        if there:
            found[which] = {score: np.array([each[score] for each in there]) for score in there[0]}
    return found


def paired(mine, first):
    """Differences seeds,images of two rows, for the seeds that both have; one seed serves all."""
    if len(first) == 1 or len(mine) == 1:
        return mine - first
    count = min(len(mine), len(first))
    return mine[:count] - first[:count]


def interval(differences):
    """95 % interval of the mean of differences seeds,images: low, high.

    Images: by bootstrap. Seeds, which are too few for that: Student's t. The two are independent.
    """
    rng = np.random.default_rng(SEED)
    count, images = differences.shape
    per_image, per_seed = differences.mean(axis=0), differences.mean(axis=1)
    draws = per_image[rng.integers(images, size=(DRAWS, images))].mean(axis=1)
    of_seeds = STUDENT[count] * per_seed.std(ddof=1) / count**0.5 if count > 1 else 0
    half = np.hypot(1.96 * draws.std(), of_seeds)
    return differences.mean() + np.array([-half, half])


def spread(values):
    """Mean and standard deviation over seeds of seeds,images, in per cent."""
    means = 100 * values.mean(axis=1)
    return f"{means.mean():.2f}" + (f" ± {means.std(ddof=1):.2f}" if len(means) > 1 else "")


def table(found):
    sets = [which for which in SETS if any(which in mine for _, mine in found)]
    heads = [f"{SETS[which]}, {head}" for which in sets for head in SCORES.values()]
    lines = ["| row | " + " | ".join(heads) + " | seeds | paper: AbsRel, F1 |",
             "|---" * (len(heads) + 3) + "|"]
    first = found[0][1]
    for entry, mine in found:
        cells = []
        for which in sets:
            for score in SCORES:
                if which not in mine:
                    cells.append("")
                    continue
                cell = spread(mine[which][score])
                if mine is not first and which in first:
                    difference = paired(mine[which][score], first[which][score])
                    low, high = 100 * interval(difference)
                    cell += f"<br>{100 * difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
                cells.append(cell)
        seeds = len(next(iter(mine.values()))["abs_rel"])
        figures = [f"{100 * entry.paper[score]:.1f}" if score in entry.paper else "-"
                   for score in SCORES]
        lines.append(f"| {entry.label} | {' | '.join(cells)} | {seeds} | {', '.join(figures)} |")
    return "\n".join(lines) + "\n"


def verdicts(found):
    """A sentence per row and score: whether the difference to the first row has a sign."""
    (first, base), *others = found
    for entry, mine in others:
        for score, head in SCORES.items():
            which = LIKE[score]
            if which in mine and which in base:
                yield f"- {entry.label}, {head} of {SETS[which]}: " + verdict(
                    paired(mine[which][score], base[which][score]), score, base[which][score],
                    entry.paper.get(score), first.paper.get(score))


def verdict(differences, score, base, paper, paper_first):
    low, high = interval(differences)
    sign = 0 if low <= 0 <= high else int(np.sign(differences.mean())) * BETTER[score]
    word = {1: "better", -1: "worse", 0: "cannot be told from the first row"}[sign]
    if paper is None or paper_first is None:
        return f"{word}; the paper's figure is not known here."
    theirs = int(np.sign(round(paper - paper_first, 4))) * BETTER[score]
    if sign:
        return f"{word}; " + ("**agrees in sign** with the paper." if sign == theirs else
                              "**disagrees** with the paper.")
    effect = abs(paper - paper_first) / paper_first * base.mean()
    means = differences.mean(axis=1)
    need = ""
    if len(means) > 1 and effect > 0:
        seeds = max(math.ceil((POWER * means.std(ddof=1) / effect) ** 2), len(means) + 1)
        need = (f" For a difference as large as the paper's, relatively, {seeds} seeds would tell "
                "in four of five experiments.")
    return f"**{word}**.{need}"


def draw(number, title, found, folder):
    """A figure of a table: means over images, a dot per seed, AbsRel and F1 side by side."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    sets = [which for which in SETS if any(which in mine for _, mine in found)]
    colours = {"hypersim": "#2563eb", "vkitti": "#ea580c", "pairs": "#16a34a"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.9 + 0.36 * len(found)), sharey=True)
    for axis, (score, head) in zip(axes, SCORES.items()):
        for row, (_, mine) in enumerate(found):
            for place, which in enumerate(sets):
                if which in mine:
                    means = 100 * mine[which][score].mean(axis=1)
                    height = row + 0.22 * (place - (len(sets) - 1) / 2)
                    axis.plot(means, [height] * len(means), "o", color=colours[which], alpha=0.5,
                              markersize=4, label=SETS[which] if row == 0 else None)
                    axis.plot(means.mean(), height, "|", color=colours[which], markersize=12)
        axis.set_xlabel(f"{head}, % ({'less' if BETTER[score] < 0 else 'more'} is better)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(found)), [entry.label for entry, _ in found])
    axes[0].invert_yaxis()
    axes[1].legend(loc="best", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number.replace(': ', '_').replace(' ', '_')}.png"
    figure.savefig(path, dpi=70, metadata={"Software": None})
    plt.close(figure)
    return path
