"""How training runs are getting on: python -m extras.watch runs/stage1 runs/stage2

Prints a row for each run folder, and draws the curves of all into one picture (--out).
"""

import argparse
import json
import time
from pathlib import Path

from engine import job
from engine.run_folder import OPTIONS, STATE
from engine.terminal import tell
from evaluation.curves import draw_curves, read_log
from storage import read_text

HEADS = ("run", "step", "of", "loss", "AbsRel", "delta1", "F1", "samples/s", "left", "last save")


def describe(folder):
    """A run's row of the table: one text for each of HEADS."""
    rows = read_log(folder)
    if not rows and not (folder / OPTIONS).is_file():
        raise FileNotFoundError(f"{folder} is no run folder: give the --out of a trainer.")
    options = json.loads(read_text(folder / OPTIONS)) if (folder / OPTIONS).is_file() else {}
    step = max((row["step"] for row in rows), default=0)
    logged = next((row for row in reversed(rows) if "lr" in row), {})
    scores = next((row["validation"] for row in reversed(rows) if "validation" in row), {})
    speed, steps = logged.get("samples_per_second"), options.get("steps")
    left = (duration((steps - step) * options["batch"] / speed)
            if speed and steps and "batch" in options else "")
    saved = folder / STATE
    age = f"{duration(time.time() - saved.stat().st_mtime)} ago" if saved.is_file() else "never"
    return (str(folder), str(step), str(steps or ""), number(logged.get("loss"), 4),
            *(number(scores.get(name), 3) for name in ("abs_rel", "delta1", "boundary_f1")),
            number(speed, 2), left if step != steps else "finished", age)


def number(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def duration(seconds):
    """Seconds as hours and minutes, or minutes and seconds."""
    minutes = int(seconds) // 60
    return (f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else
            f"{minutes}:{int(seconds) % 60:02d} min")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curves.png"),
                        help="the picture (%(default)s)")
    args = parser.parse_args()
    table = [HEADS, *map(describe, args.runs)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        tell("  ".join(f"{text:<{width}}" if index == 0 else f"{text:>{width}}"
                       for index, (text, width) in enumerate(zip(row, widths))))
    draw_curves(args.runs, args.out)
    tell(f"Curves: {args.out}" if args.out.is_file() else "Curves: too few steps are logged yet.")


if __name__ == "__main__":
    job.run(main)
