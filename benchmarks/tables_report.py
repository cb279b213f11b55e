"""Writes docs/tables.md and its figures from the scores that benchmarks/tables.py keeps."""

import math
from pathlib import Path

import numpy as np

from benchmarks.rows import CAUSES, MODELS, SCORES, TABLES, key
from storage import write_text

SETS = {"hypersim": "rooms", "vkitti": "streets", "pairs": "real frames"}
DRAWS, SEED = 2000, 0  # of the bootstrap
# The paper's figures are of KITTI (AbsRel) and Hypersim (F1): compared with streets and rooms.
LIKE = {"abs_rel": "vkitti", "boundary_f1": "hypersim"}
BETTER = {"abs_rel": -1, "boundary_f1": 1}  # sign of an improvement
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # two-sided 95 %, by number of seeds
POWER = 1.96 + 0.84  # standard deviations: 95 % two-sided, found in 80 % of experiments
MOST_SEEDS = 100


def write_report(content, docs):
    """content: of results.json; docs: the folder. Returns the path of tables.md."""
    real = content["settings"]["real"]
    names = ", ".join(name for name, _ in real or ())
    parts = [HEAD.format(**content["settings"] | {
        "minutes": minutes(content), "real": REAL.format(len(real), names) if real else ""})]
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

Written by `python -m benchmarks.tables` from `tables/results.json`; no number here is typed by
hand. Each row trains for {steps[stage1]} steps of {batch} samples in stage 1 and its like, for
{steps[stage2]} in stage 2: about {minutes} minutes of one core. Rows of stage 1 start from the same
pre-trained base, rows of stage 2 from the embedded miniature, whose stage 1 was long. They are
scored on rendered scenes that no pre-training has seen: {scenes[val]} frames of rooms, two of a
room, and {scenes[streets_val]} of streets.{real} AbsRel and boundary F1 are means over images and
seeds, in per cent; ± is the standard deviation over seeds. Differences are to the first row,
paired by image and seed, with 95 % intervals: bootstrap over rooms or images, Student's t over
seeds. The paper's figures stand beside ours: AbsRel of KITTI (compared with our streets), F1 of
Hypersim (with our rooms). The miniature is a toy: what it can tell is whether a difference has the
paper's sign.
"""
REAL = " Also on {} real frames: {}."


def minutes(content):
    """Median minutes that a training run's steps took."""
    seconds = [value for runs in content["seconds"].values() for value in runs.values() if value]
    return f"{np.median(seconds) / 60:.1f}" if seconds else "?"


def scores(content, name):
    """{set: {score: {seed: float array of images}}} of a row's seeds that are there."""
    found = {}
    for seed, sets in content["scores"].get(name, {}).items():
        for which, values in sets.items():
            for score, each in values.items():
                found.setdefault(which, {}).setdefault(score, {})[seed] = np.array(each)
    return found


def paired(mine, first, of_rooms, trained=True):
    """Differences seeds,images of two rows {seed: images}, for the seeds that both have.

    trained: whether the first row is; if not, its one seed serves for all. of_rooms: two frames in
    sequence are of one room, and become one image.
    """
    first = first if trained else dict.fromkeys(mine, first["0"])
    seeds = sorted(mine.keys() & first.keys())
    differences = np.array([mine[seed] - first[seed] for seed in seeds])
    return differences.reshape(len(seeds), -1, 2).mean(axis=2) if of_rooms else differences


def parts_of_interval(differences):
    """(standard error over images, standard deviation over seeds) of differences seeds,images."""
    rng = np.random.default_rng(SEED)
    count, images = differences.shape
    draws = differences.mean(axis=0)[rng.integers(images, size=(DRAWS, images))].mean(axis=1)
    return draws.std(), differences.mean(axis=1).std(ddof=1) if count > 1 else np.nan


def interval(differences):
    """95 % interval of the mean of differences seeds,images: low, high.

    Images: by bootstrap. Seeds, which are too few for that: Student's t. The two are independent.
    """
    of_images, of_seeds = parts_of_interval(differences)
    count = len(differences)
    of_seeds = student(count) * of_seeds / count**0.5 if count > 1 else 0
    return differences.mean() + np.hypot(1.96 * of_images, of_seeds) * np.array([-1, 1])


def spread(values):
    """Mean and standard deviation over seeds of {seed: images}, in per cent."""
    means = np.array([100 * each.mean() for each in values.values()])
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
                    difference = paired(mine[which][score], first[which][score],
                                        which == "hypersim", found[0][0].model in MODELS)
                    low, high = 100 * interval(difference)
                    cell += f"<br>{100 * difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
                cells.append(cell)
        figures = [f"{100 * entry.paper[score]:.1f}" if score in entry.paper else "-"
                   for score in SCORES]
        seeds = len(next(iter(mine.values()))["abs_rel"])
        lines.append(f"| {entry.label} | {' | '.join(cells)} | {seeds} | {', '.join(figures)} |")
    return "\n".join(lines) + "\n"


def verdicts(found):
    """A sentence per row and score: whether the difference to the first row has a sign."""
    (first, base), *others = found
    for entry, mine in others:
        if entry.unequal:
            yield f"- {entry.label}: not judged, as {entry.unequal}."
            continue
        for score, head in SCORES.items():
            which = LIKE[score]
            if which in mine and which in base:
                mean = np.mean([each.mean() for each in base[which][score].values()])
                yield f"- {entry.label}, {head} of {SETS[which]}: " + verdict(
                    paired(mine[which][score], base[which][score], which == "hypersim",
                           first.model in MODELS),
                    score, mean, entry.paper.get(score), first.paper.get(score))


def verdict(differences, score, base, paper, paper_first):
    """base: the first row's mean. paper, paper_first: the published figures, or None."""
    if len(differences) < 2:
        return "one seed only, not judged."
    low, high = interval(differences)
    sign = 0 if low <= 0 <= high else int(np.sign(differences.mean())) * BETTER[score]
    word = {1: "better", -1: "worse", 0: "cannot be told from the first row"}[sign]
    if paper is None or paper_first is None:
        return f"{word}; the paper's figure is not known here."
    theirs = int(np.sign(round(paper - paper_first, 4))) * BETTER[score]
    if sign:
        return f"{word}; " + ("**agrees in sign** with the paper." if sign == theirs else
                              "**disagrees** with the paper.")
    return f"**{word}**." + (needed(differences, abs(paper / paper_first - 1) * base)
                             if theirs else "")


def needed(differences, effect):
    """A sentence: how many seeds would find an effect in four of five experiments, or images."""
    of_images, of_seeds = parts_of_interval(differences)
    for seeds in range(2, MOST_SEEDS):
        half = np.hypot(1.96 * of_images, student(seeds) * of_seeds / seeds**0.5)
        if half * POWER / 1.96 <= effect:
            return (" To find a difference as large as the paper's, relatively, in four of five "
                    f"experiments takes {seeds} seeds.")
    images = math.ceil(differences.shape[1] * (1.5 * POWER * of_images / effect) ** 2)
    return (" To find a difference as large as the paper's, relatively, seeds alone do not do: it "
            f"takes some {max(images, differences.shape[1]):,} images or rooms, too, or longer "
            "training.")


def student(count):
    """Two-sided 95 % quantile of Student's t, by number of seeds; of the normal from 30 on."""
    return STUDENT.get(count, 2.57 if count < 10 else 2.26 if count < 30 else 1.96)


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
                    means = np.array([100 * x.mean() for x in mine[which][score].values()])
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
