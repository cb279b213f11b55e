"""The paper's Tables I to VI and open questions: each row's commands, and the rows in miniature.

    python -m benchmarks.tables --table III                      # prints, trains, scores, writes
    python -m benchmarks.tables --table all --real FOLDER        # also scored on a folder of pairs
    python -m benchmarks.tables --table all --scale full         # the commands at true size
    python -m benchmarks.tables --table I --scale full --run     # ... and runs them in order

In miniature all rows start from the same pre-trained models, and rows of one table train for about
as long, on the same rendered scenes; no pre-training has seen the scenes that are scored. Each
seed of each row is kept in docs/tables/results.json when it is done, so that the same command goes
on after an interruption; docs/tables.md is written from that file alone. --scale night trains four
times as long, and writes into the folder of the runs. Steps and sizes are fixed here, before the
seeds are run.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from benchmarks.rows import MODELS, TABLES, Scale, key, scoring, training
from benchmarks.tables_report import write_report
from data.pairs import FolderOfPairs
from engine import job, run_folder
from engine.terminal import say
from storage import read_text, write_text

SCENES = dict(train=640, val=140, streets_train=60, streets_val=60)
# Steps that take about two and a half minutes of one core: 16 samples a second of stage 1 and of
# denoising from their cache, 3.8 of stage 2. Chosen on the row "square_root" alone, seed 0: AbsRel
# of rooms was 24.5 with 300 steps of 8 (rate 1e-3), 23.4 with 600 of 4 (7e-4), 24.4 (1.4e-3).
BATCH = 4
STEPS = {"stage1": 600, "denoising": 600, "more": 600, "stage2": 144}
RATES = {"stage1": 7e-4, "denoising": 7e-4, "more": 1e-4, "stage2": 1e-4}
TEACHER_STEPS = 600
COMMON = ("--data {scenes}/hypersim --vkitti {scenes}/vkitti --vkitti-crop 96 336 "
          f"--batch {BATCH} --micro-batch {BATCH} --warmup 20 --workers 0 --log-every 10 "
          "--validate-every 1000000 --validate-images 1 --save-every 1000000 --device cpu "
          "--precision float32")
# One thread; freed memory is kept, because asking the system for it again takes time.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0",
               "MALLOC_TRIM_THRESHOLD_": "4000000000"}
KEPT = ("abs_rel", "delta1", "boundary_f1")
# The paper's seconds a picture, by a word of evaluate.py's options (else 0.42), and its pictures.
SECONDS, IMAGES = {"denoise": 12.91, "iterative": 0.83}, 654 + 652 + 454 + 800 + 771
HYPERSIM = "--data {root} --datasets hypersim --f1-mask owner --limit 80"
DOCS = Path("docs")


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", nargs="+", default=["all"], choices=[*TABLES, "open", "all"], help="(all)")
    add("--scale", choices=["miniature", "night", "full"], default="miniature", help="(miniature)")
    add("--seeds", type=int, choices=range(1, 7), help="(3; at full scale 1)")
    add("--real", type=Path, help="in miniature: a folder of pairs to score on, too (rgb/, depth/)")
    add("--runs", type=Path, default=Path("runs/tables"), help="folder of the runs (%(default)s)")
    add("--report", action="store_true", help="only write docs/tables.md from what is there")
    add("--run", action="store_true", help="at full scale: run what is printed")
    add("--data", default="/hypersim", help="at full scale: Hypersim (%(default)s)")
    add("--vkitti", default="/vkitti2", help="at full scale: Virtual KITTI 2 (%(default)s)")
    add("--root", default="/benchmarks", help="at full scale: the sets to score on (%(default)s)")
    return parser.parse_args()


def chosen_tables(names):
    """{number: (title, entries)} of the tables that are asked for."""
    return {number: table for number, table in TABLES.items() if "all" in names
            or number in names or number.split(":")[0] in names}


# ------------------------------------------------------------------------------- the two scales


def miniature(runs, steps_times, real):
    """The Scale of two cores. real: a folder of pairs or None."""
    steps = {kind: count * steps_times for kind, count in STEPS.items()}
    common = {kind: f"{COMMON} --steps {count} --decay-steps {count} --lr {RATES[kind]}"
              for kind, count in steps.items()}
    for kind in ("stage1", "denoising", "more"):
        common[kind] += " --cache {cache}"
    words = dict(
        cache=runs / "cache",
        sd2="weights/miniature_sd2.safetensors", dinov2="weights/miniature_dinov2.safetensors",
        stage1="weights/miniature.safetensors", teachers=runs / "teachers", scenes=runs / "scenes",
        denoise="--denoise-steps 10 --ensemble 3", size_dinov2="", size_openclip="", size_aimv2="",
        size_sam="")
    sets = "--data {scenes} --datasets hypersim vkitti" + " pairs" * bool(real)
    sets += " --vkitti-crop 96 336 --workers 0"
    return Scale(words, common, f"{sets} --device cpu", words["stage1"])


def full(data, vkitti, root, runs):
    """The Scale of the paper: its steps and rates are the scripts' defaults."""
    words = dict(
        sd2="weights/sd2.safetensors", dinov2="weights/dinov2_vitg14.safetensors",
        stage1=runs / "full/middle/0/model.safetensors", teachers="weights", data=data,
        vkitti=vkitti, root=root, denoise="--denoise-steps 50 --ensemble 10",
        size_dinov2="_vitg14", size_openclip="_vith14", size_aimv2="_large14", size_sam="_vith16")
    train = "--data {data} --vkitti {vkitti}"
    memory = memory_of_stages()
    # The paper's hours on one H800; the work of a step is the same for all rows of a kind.
    notes = {"stage1": f"30 h, {memory['stage 1']} GB", "stage2": f"30 h, {memory['stage 2']} GB",
             "more": f"30 h, {memory['stage 1']} GB", "denoising": "30 h, as stage 1"}
    same = {"as_dinov2": "middle", "start": "middle", "bfloat16": "full"}
    return Scale(words, {kind: train + " --lr 3e-6" * (kind == "more") for kind in notes},
                 "--data {root} --datasets nyu kitti eth3d scannet diode", words["stage1"], notes,
                 same)


def memory_of_stages():
    """{stage: GB}, measured at full size with recomputed activations, from RESULTS.md."""
    rows = re.findall(r"^\| (stage [12]) \| recomputed \|(.*)\|$",
                      read_text("benchmarks/RESULTS.md"), re.MULTILINE)
    return {stage: cells.split("|")[3].strip() for stage, cells in rows}


def print_full(tables, scale, seeds, folder, run):
    """Prints the commands of a scale in order, with hours and memory; run: runs each, too."""
    done = set()
    for number, (title, entries) in tables.items():
        say(f"# Table {number}: {title}" if ":" not in number else f"# {title}")
        entries = [entry._replace(model=scale.same.get(entry.model, entry.model))
                   for entry in entries]
        needed = [entry.model for entry in entries]
        if any(MODELS[name].kind in ("stage2", "more") for name in needed):
            needed.insert(0, "middle")  # stage 1, where stage 2 begins
        for seed in range(seeds):
            for name in needed:
                if (name, seed) not in done:
                    done.add((name, seed))
                    command(training(name, scale, seed, folder / name / str(seed)), run,
                            scale.notes[MODELS[name].kind])
            for entry in entries:
                if (key(entry), "scores", seed) not in done:
                    done.add((key(entry), "scores", seed))
                    print_scoring(entry, scale, folder / entry.model / str(seed), run)


def print_scoring(entry, scale, folder, run):
    """The two commands that score a row: on the five sets, and F1 as the paper's on Hypersim."""
    ckpt, out = folder / "model.safetensors", folder / f"scores_{slug(entry)}"
    seconds = next((value for word, value in SECONDS.items() if word in entry.options), 0.42)
    command(scoring(entry, scale, ckpt, out), run, f"{seconds * IMAGES / 3600:.1f} h")
    words = scoring(entry, Scale(scale.words, {}, HYPERSIM), ckpt, f"{out}_hypersim")
    command(words, run, f"{seconds * 80 / 3600:.2f} h; which 80 images the paper took is unknown")


def command(words, run, note=""):
    print(shlex.join(["python", *map(str, words)]) + (f"    # {note}" if note else ""), flush=True)
    if run and subprocess.run([sys.executable, *map(str, words)]).returncode:
        raise ValueError("the command above failed: mend that and give the same command again.")


def slug(entry):
    return re.sub(r"[^a-z0-9]+", "_", key(entry).lower()).strip("_")


# ------------------------------------------------------------------------------- in miniature


def call(words, log):
    """Runs a script on one thread; what it says goes to a file, whose end is shown if it fails."""
    print(shlex.join(["python", *map(str, words)]), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=file,
                              env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise ValueError(f"the command above failed: {read_text(log)[-1500:]}")


class Results:
    """A JSON file: settings, and per row and seed the scores of each image."""

    def __init__(self, path, settings):
        self.path, self.lock = path, Lock()
        self.content = {"settings": settings, "scores": {}, "seconds": {}}
        if path.exists():
            before = json.loads(read_text(path))
            if before["settings"] != settings:
                raise ValueError(f"{path} holds rows with other settings or other real frames: "
                                 "move it away to begin anew.")
            self.content = before

    def has(self, name, seed):
        return str(seed) in self.content["scores"].get(name, {})

    def add(self, name, seed, scores, seconds):
        """Keeps the scores {set: {score: list}} of a row, and how long its model trained."""
        with self.lock:
            self.content["scores"].setdefault(name, {})[str(seed)] = scores
            self.content["seconds"].setdefault(name, {})[str(seed)] = seconds
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.content, sort_keys=True) + "\n")


def scores_of(folder):
    """{set: {score: [one per image, rounded]}} from evaluate.py's per_image.csv."""
    found = {}
    with open(folder / "per_image.csv", newline="") as file:
        for row in csv.DictReader(file):
            scores = found.setdefault(row["dataset"], {name: [] for name in KEPT})
            for name in KEPT:
                scores[name].append(round(float(row[name]), 5))
    return found


def seconds_of(folder):
    """Seconds that a run's steps took, from its log; 0 without a log."""
    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in read_text(log).splitlines()] if log.exists() else []
    steps = [row for row in rows if "samples_per_second" in row]
    counts = [row["step"] - before for row, before in
              zip(steps, [0, *(row["step"] for row in steps)])]
    return round(sum(BATCH * count / row["samples_per_second"]
                     for row, count in zip(steps, counts)))


def run_row(name, entries, seed, scale, args, results):
    """Trains a model with a seed and scores all its entries; what is kept is not done again."""
    todo = [entry for entry in entries if not results.has(key(entry), seed)]
    if not todo:
        return
    folder = args.runs / args.scale / name / str(seed)
    ckpt = scale.start if name == "start" else folder / "model.safetensors"
    # A model without a checkpoint to resume from was finished: see below.
    if name != "start" and not (ckpt.exists() and not list(folder.glob("state*.pt"))):
        call(training(name, scale, seed, folder), folder / "train.txt")
    for entry in todo:
        out = folder / f"scores_{slug(entry)}"
        call(scoring(entry, scale, ckpt, out), folder / "score.txt")
        results.add(key(entry), seed, scores_of(out), seconds_of(folder))
    for state in folder.glob("state*.pt"):  # large, and not needed once the scores are kept
        state.unlink()


def prepare(args):
    """Renders the scenes, puts the real frames beside them, pre-trains the teachers of Table IV."""
    from miniature import render
    render.ensure(args.runs / "scenes", **SCENES)
    if args.real and not (link := args.runs / "scenes" / "pairs").is_symlink():
        link.symlink_to(args.real.absolute())
    wanted = chosen_tables(args.table)
    if "IV" in wanted:
        folder = args.runs / "teachers"
        kinds = [kind for kind in ("dinov2", "openclip", "aimv2", "sam")
                 if not (folder / f"{kind}.safetensors").exists()]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda kind: call(
                ["-m", "benchmarks.teachers", kind, folder / f"{kind}.safetensors", "--scenes",
                 args.runs / "scenes", "--steps", TEACHER_STEPS], folder / f"{kind}.txt"), kinds))


def run_miniature(tables, args, scale, results):
    """Runs all rows, two at a time, the first seed of all rows first."""
    (args.runs / args.scale).mkdir(parents=True, exist_ok=True)
    run_folder.claim(args.runs / args.scale)
    prepare(args)
    rows = {}
    for _, entries in tables.values():
        for entry in entries:
            mine = rows.setdefault(entry.model, [])
            mine += [entry] if key(entry) not in map(key, mine) else []
    todo = [(name, entries, seed) for seed in range(args.seeds or 3)
            for name, entries in rows.items() if seed == 0 or name != "start"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda row: run_row(*row, scale, args, results), todo))


def real_frames(folder):
    """[name, bytes] of each file of a folder of pairs: two folders are not mixed in one file."""
    if folder is None:
        return None
    reader = FolderOfPairs(folder)
    return [[reader.name(index), os.path.getsize(reader.root / depth)]
            for index, (_, depth) in enumerate(reader.pairs)]


def main():
    args = options()
    tables = chosen_tables(args.table)
    if args.scale == "full":
        if args.real:
            raise ValueError("--real is for the miniature: leave it out at full scale.")
        scale = full(args.data, args.vkitti, args.root, args.runs)
        return print_full(tables, scale, args.seeds or 1, args.runs / "full", args.run)
    night = args.scale == "night"
    times = 4 if night else 1
    settings = dict(scenes=SCENES, teacher_steps=TEACHER_STEPS, rates=RATES, batch=BATCH,
                    steps={kind: count * times for kind, count in STEPS.items()},
                    real=real_frames(args.real))
    docs = args.runs / "night_docs" if night else DOCS
    path = docs / "tables" / "results.json"
    if args.report:
        if not path.exists():
            raise ValueError(f"{path} is not there: leave out --report to run the rows first.")
        content = json.loads(read_text(path))
    else:
        results = Results(path, settings)
        run_miniature(tables, args, miniature(args.runs, times, args.real), results)
        content = results.content
    say(f"Written: {write_report(content, docs)}.")


if __name__ == "__main__":
    job.run(main)
