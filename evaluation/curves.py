"""Curves of training runs as a picture: losses, learning rate, validation scores."""

import json
from pathlib import Path

from engine.run_folder import LOG
from storage import whole

FEWEST = 8  # logged steps: fewer give no curve
SCORES = {"abs_rel": "AbsRel", "boundary_f1": "boundary F1"}
# Keys of the log's rows that are no losses.
NO_LOSS = {"step", "lr", "samples_per_second", "gradient_norm", "validation", "left_out", "skipped",
           "spike", "usual", "samples"}


def read_log(folder):
    """The rows of a run's log as dicts; without those that are cut off."""
    rows = []
    path = Path(folder) / LOG
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows += [row] if "step" in row else []
        except (ValueError, TypeError):
            continue
    return rows


def draw_curves(folders, path):
    """Draws the curves of runs into one PNG at `path`; nothing if no run has FEWEST logged steps.

    All runs share the axes: losses (logarithmic), learning rate, and validation scores.
    """
    logs = {str(folder): read_log(folder) for folder in folders}
    if max((sum("lr" in row for row in rows) for rows in logs.values()), default=0) < FEWEST:
        return
    from matplotlib.figure import Figure  # here, as importing it takes a second
    figure = Figure(figsize=(15, 4), layout="constrained")
    losses, rate, scores = figure.subplots(1, 3)
    for run, rows in logs.items():
        label = f"{run}: " if len(logs) > 1 else ""
        logged = [row for row in rows if "lr" in row]
        for name in logged[0].keys() - NO_LOSS if logged else ():
            losses.plot(*zip(*((row["step"], row[name]) for row in logged if name in row)),
                        label=label + name)
        rate.plot([row["step"] for row in logged], [row["lr"] for row in logged], label=run)
        checked = [row for row in rows if "validation" in row]
        for name, title in SCORES.items():
            points = [(row["step"], row["validation"][name]) for row in checked]
            scores.plot(*zip(*points) if points else ([], []), marker=".", label=label + title)
    for axes, title in ((losses, "losses"), (rate, "learning rate"), (scores, "validation")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    losses.set_yscale("log")
    for axes in (losses, scores, *([rate] if len(logs) > 1 else [])):
        axes.legend(fontsize="small")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
