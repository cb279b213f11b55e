"""Starts trainers as processes of their own and does harm to them.

    python -m tests.faults.harness          # `make soak`: the long version, prints a table
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nets.depthmaster import DepthMaster

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(command, ranks=1, **options):
    """A script and its words as a process (with torchrun: several) on one thread each."""
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words += map(str, command)
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=ONE_THREAD, start_new_session=True, **options)


def finish(command, ranks=1, **options):
    """Runs a command to its end: (exit code, what it said)."""
    process = start(command, ranks, **options)
    said = process.communicate()[0]
    return process.returncode, said


def kill(process, number=signal.SIGKILL):
    """Kills a process with all that it started."""
    os.killpg(process.pid, number)
    process.communicate()


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


POISON = """
import {script}
from engine import job
original, steps = {script}.optimizer_step, iter(range(10**9))
def poisoned(objective, *rest):
    parameter = next(p for p in objective.parameters() if p.requires_grad)
    bad = next(steps) % {every} == {every} - 1
    hook = parameter.register_hook(lambda gradient: gradient * float("nan")) if bad else None
    try:
        return original(objective, *rest)
    finally:
        hook and hook.remove()
{script}.optimizer_step = poisoned
job.run({script}.main)
"""


UNREADABLE = """
import errno, zipfile, {script}
from engine import job
def fails(self):
    raise OSError(errno.EIO, "Input/output error")
zipfile.ZipFile.testzip = fails
job.run({script}.main)
"""


def unreadable(command, folder):
    """The command of a trainer, on a disk that gives errors while checkpoints are checked."""
    driver = folder / "unreadable.py"
    driver.write_text(UNREADABLE.format(script=command[0].removesuffix(".py")))
    return [driver, *command[1:]]


def poisoned(command, folder, every):
    """The command of a trainer, of which every so many steps' gradients are not finite."""
    driver = folder / f"poisoned {every}.py"
    driver.write_text(POISON.format(script=command[0].removesuffix(".py"), every=every))
    return [driver, *command[1:]]


def skipped(out):
    """How many steps a run has skipped."""
    return (out / "log.jsonl").read_text().count('"skipped"')


def rows_of(out):
    """How many rows a run has logged."""
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def ranks_of(process):
    """The processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def kill_at_random(command, out, kills, seconds, rng):
    """Starts a run again and again and kills it, every third time while it saves.

    seconds: the longest that it is left alone. Returns how often it was killed when it was done.
    """
    for done in range(kills):
        process = start([*command, "--out", out])
        deadline = time.monotonic() + rng.uniform(0.1, 1) * seconds
        while process.poll() is None and time.monotonic() < deadline:
            if done % 3 == 0 and any(out.glob(".*.tmp")):  # it saves
                break
            time.sleep(0.001)
        if process.poll() is not None:
            code, said = process.returncode, process.communicate()[0]
            if code:
                raise AssertionError(f"exit code {code}: {said[-2000:]}")
            return done
        kill(process)
    code, said = finish([*command, "--out", out])
    if code:
        raise AssertionError(f"exit code {code}: {said[-2000:]}")
    return kills


# ---------------------------------------------------------------------------- the long version


def scenes_of(folder):
    code, said = finish(["-m", "miniature.render", folder, "--train", 40, "--val", 2,
                         "--streets-train", 4, "--streets-val", 2])
    if code:
        raise AssertionError(said)
    return ["--data", folder / "hypersim", "--vkitti", folder / "vkitti", "--vkitti-crop", 96, 336]


def commands(data, steps):
    """Both stages on the miniature, a few samples a step."""
    common = [*data, "--size", 96, 128, "--batch", 2, "--micro-batch", 2, "--steps", steps,
              "--save-every", 5, "--validate-every", 10**6, "--validate-images", 1, "--workers", 1,
              "--lr", 1e-4, "--warmup", 5, "--log-every", 1]
    return {
        "stage 1": ["train_stage1.py", "--sd2", "weights/miniature_sd2.safetensors", "--teacher",
                    "weights/miniature_dinov2.safetensors", *common],
        "stage 2": ["train_stage2.py", "--ckpt", "weights/miniature.safetensors", *common],
    }


def soak_kills(data, steps, kills, rng, folder):
    for name, command in commands(data, steps).items():
        whole, cut = folder / f"{name} whole", folder / f"{name} cut"
        began = time.monotonic()
        code, said = finish([*command, "--out", whole])
        assert code == 0, said
        seconds = min(time.monotonic() - began, 15)
        done = kill_at_random(command, cut, kills, seconds, rng)
        same = sha256(whole / "model.safetensors") == sha256(cut / "model.safetensors")
        yield f"{name}: {done} random kills", "model identical" if same else "MODEL DIFFERS"


def soak_full_disk(data, rng, folder):
    """On a disk of a few megabytes (a tmpfs, which only root can make)."""
    command = commands(data, 40)["stage 1"]
    disk = folder / "small disk"
    disk.mkdir()
    size = 180_000_000  # room for one checkpoint and a half
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
        yield "a disk that fills up", "not tried: no right to mount"
        return
    try:
        code, said = finish([*command, "--out", disk / "run"])
        clear = code == 1 and "has no room for the checkpoint" in said and "Traceback" not in said
        yield "a disk that fills up", "one sentence" if clear else f"UNCLEAR: {said[-500:]}"
        shutil.copytree(disk / "run", folder / "rescued")
        code, said = finish([*command, "--out", folder / "rescued"])
        yield "its last checkpoint", "resumes" if code == 0 and "Resuming" in said else said[-500:]
    finally:
        subprocess.run(["umount", disk], check=True)


def soak_truncations(data, rng, folder, count=40):
    """The newest checkpoint cut at all kinds of places: the one before it is taken."""
    command = commands(data, 20)["stage 1"]
    whole = folder / "checkpoints"
    code, said = finish([*command, "--out", whole])
    assert code == 0, said
    expected = sha256(whole / "model.safetensors")
    content, good = (whole / "state.pt").read_bytes(), 0
    for number in range(count):
        place = int(len(content) * rng.random())
        (whole / "state.pt").write_bytes(content[:place])
        code, said = finish([*command, "--out", whole])
        good += code == 0 and "damaged" in said and sha256(whole / "model.safetensors") == expected
    yield f"{count} truncated checkpoints", f"{good} resumed from the one before, model identical"


def soak_poison(data, folder):
    command, out = commands(data, 40)["stage 1"], folder / "poisoned"
    code, said = finish([*poisoned(command, folder, 3), "--out", out])
    yield "every third gradient not finite", (
        f"{skipped(out)} of 40 steps skipped, finished" if code == 0 else said[-500:])
    code, said = finish([*poisoned(command, folder, 1), "--out", folder / "poison"])
    stopped = code == 1 and "10 steps in a row" in said and "Traceback" not in said
    saved = (folder / "poison" / "state.pt").exists()
    yield "every gradient not finite", (
        f"one sentence, {'something' if saved else 'nothing'} saved" if stopped else said[-500:])


def soak_removed_files(data, rng, folder):
    """Frames vanish one by one while they are trained on."""
    places = [place for place in data if isinstance(place, Path)]
    copies = {place: folder / "vanishing" / place.name for place in places}
    for place, copy in copies.items():
        shutil.copytree(place, copy)
    command = commands([copies.get(word, word) for word in data], 10**4)["stage 1"]
    process = start([*command, "--out", folder / "losing"])
    files = sorted((folder / "vanishing" / "hypersim").rglob("*.hdf5"))
    while not (folder / "losing" / "state.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    while files and process.poll() is None:
        files.pop(rng.randrange(len(files))).unlink()
        time.sleep(0.1)
    said, code = process.communicate()[0], process.returncode
    clear = code == 1 and "can't be used" in said and "Traceback" not in said
    yield "all depth maps removed, one by one", (
        f"{said.count('Replaced a bad sample')} replaced, then one sentence" if clear
        else f"UNCLEAR, exit code {code}: {said[-500:]}")


def soak_broken_rank(data, rng, folder, count=3):
    command, out, longest = commands(data, 60)["stage 1"], folder / "ranks", 0
    for number in range(count):
        process = start([*command, "--out", out], ranks=2)
        while process.poll() is None and rows_of(out) < 8 + 6 * number:
            time.sleep(0.1)
        began = time.monotonic()
        os.kill(rng.choice(ranks_of(process)), signal.SIGKILL)
        process.communicate()
        longest = max(longest, time.monotonic() - began)
    code, said = finish([*command, "--out", out], ranks=2)
    yield f"{count} killed ranks of 2", f"job gone in {longest:.0f} s at most, " + (
        "finished when resumed" if code == 0 and "Resuming" in said else said[-500:])


def soak_small_shared_memory(data, folder):
    """A container's default, 64 MB, with more read ahead than that (only root can mount)."""
    command = [*commands(data, 2)["stage 1"], "--size", 480, 640, "--batch", 16, "--micro-batch", 1,
               "--workers", 8, "--out", folder / "small shm"]
    words = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && "$@"',
             "-", sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True,
                          timeout=1800)
    tried = "mount" not in done.stderr and "unshare" not in done.stderr
    yield "64 MB of shared memory, 8 workers", (
        "not tried: no right to mount" if not tried else
        "finished" if done.returncode == 0 else done.stderr[-500:])


def soak_output_that_nobody_reads(data, folder, count=8):
    """`| tee log`, where tee dies of the signal first: saved, and resumed to the same weights."""
    command, saved, same, runs = commands(data, 30)["stage 1"], 0, 0, 0
    for ranks in (1, 2):
        heard = folder / f"heard by {ranks}"
        code, said = finish([*command, "--out", heard], ranks)
        assert code == 0, said
        expected = sha256(heard / "model.safetensors")
        for number in (signal.SIGINT, signal.SIGTERM):
            for _ in range(count):
                out, runs = folder / f"unheard {runs}", runs + 1
                process = start([*command, "--save-every", 10**6, "--out", out], ranks)
                while rows_of(out) < 3 + runs % 5 and process.poll() is None:
                    time.sleep(0.02)
                process.stdout.close()
                os.killpg(process.pid, number)
                process.wait(timeout=120)
                saved += (out / "state.pt").exists()
                code, said = finish([*command, "--save-every", 10**6, "--out", out], ranks)
                same += code == 0 and sha256(out / "model.safetensors") == expected
                shutil.rmtree(out)
    yield f"{runs} signals, output not read any more", f"{saved} saved, {same} with the same model"


def soak_two_evaluations(data, folder):
    """At once, with the same --out: one model's scores are never filed as the other's."""
    out, models = folder / "scores", ["weights/miniature_sd2.safetensors",
                                      "weights/miniature.safetensors"]
    both = [start(["evaluate.py", "--ckpt", model, "--data", data[1].parent,
                   "--datasets", "hypersim", "--out", out])
            for model in models]
    said = [process.communicate()[0] for process in both]
    codes = [process.returncode for process in both]
    refused = [text for code, text in zip(codes, said) if code and "is at work in" in text]
    kept = json.loads((out / "evaluation.json").read_text())["weights"]
    clear = sorted(codes) == [0, 1] and len(refused) == 1 and (
        kept == sha256(ROOT / models[codes.index(0)]))
    yield "two evaluations into one folder", (
        "one is refused, the other's scores are its own" if clear else f"UNCLEAR: {said}")


def soak_changes(data, folder):
    """Weights that are replaced, and a checkpoint that can't be read, between two starts."""
    command, out = commands(data, 10)["stage 1"], folder / "changes"
    sd2 = shutil.copy(ROOT / "weights/miniature_sd2.safetensors", folder / "sd2.safetensors")
    command = [sd2 if word == "weights/miniature_sd2.safetensors" else word for word in command]
    code, said = finish([*command, "--out", out])
    assert code == 0, said
    longer = [*command, "--steps", 20, "--extend", "--out", out]
    content = {path: path.read_bytes() for path in out.glob("[!.]*.*")}
    code, said = finish(unreadable(longer, folder))
    left = {path: path.read_bytes() for path in out.glob("[!.]*.*")} == content
    yield "a disk that gives errors", ("one sentence, all files left" if code == 1 and left
          and "can't be read now" in said and "Traceback" not in said else said[-500:])
    model = DepthMaster.from_file(sd2)
    model.vae.scaling_factor *= 2
    model.config["vae"]["scaling_factor"] = model.vae.scaling_factor
    model.save(sd2)
    code, said = finish(longer)
    refused = code == 1 and "something else as the weights sd2.safetensors" in said
    code, said = finish([*longer, "--accept-changes"])
    logged = '"accepted"' in (out / "log.jsonl").read_text()
    yield "weights replaced between two starts", (
        "refused; goes on and logs it with --accept-changes" if refused and code == 0 and logged
        else said[-500:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = scenes_of(folder / "scenes")
        for rows in (soak_kills(data, args.steps, args.kills, rng, folder),
                     soak_full_disk(data, rng, folder), soak_truncations(data, rng, folder),
                     soak_poison(data, folder), soak_removed_files(data, rng, folder),
                     soak_broken_rank(data, rng, folder), soak_small_shared_memory(data, folder),
                     soak_output_that_nobody_reads(data, folder),
                     soak_two_evaluations(data, folder), soak_changes(data, folder)):
            for what, result in rows:
                print(f"{what:<40}{result}", flush=True)


if __name__ == "__main__":
    main()
