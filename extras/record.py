"""predictions.json: which model made the files in a folder, with which options, from what."""

import json

from engine.terminal import say
from storage import read_text, sha256, write_text

VERSION = "1.0"  # of this project
RECORD = "predictions.json"
# Options that change no value, or that each picture's entry tells.
OTHER = {"inputs", "frames", "ckpt", "out", "save", "skip_existing", "device", "batch",
         "max_pixels", "doctor", "selftest"}


def describe_run(args):
    """What is the same for all pictures of a run of predict.py: model and options."""
    options = {name: value if isinstance(value, int | float | None) else str(value)
               for name, value in sorted(vars(args).items()) if name not in OTHER
               and (name, value) != ("autoencoder", None)}  # older records lack this option
    return {"version": VERSION, "checkpoint": str(args.ckpt),
            "checkpoint_sha256": sha256(args.ckpt), "options": options}


def write_record(folder, about, pictures):
    """Writes or extends a folder's record. about: from describe_run; pictures: {name: entry}.

    The entries of an earlier run stay if all that is said about it is the same.
    """
    earlier = read_record(folder)
    if not pictures:
        return
    if earlier and {key: earlier.get(key) for key in about} == about:
        for name, entry in earlier["pictures"].items():
            files = pictures.setdefault(name, entry)["files"]
            files += [file for file in entry["files"] if file not in files]
    write_text(folder / RECORD, json.dumps(about | {"pictures": pictures}, indent=1) + "\n")


def read_record(folder):
    """The record in a folder, or None if there is none that can be read."""
    try:
        record = json.loads(read_text(folder / RECORD))
        return record if isinstance(record["pictures"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def left_to_do(outputs, of_clips, pictures, clips, about):
    """What --skip-existing leaves of {name: picture} and {name: clip}: what is not there yet.

    ValueError if the folder's record tells of another model or of other options.
    """
    earlier = read_record(outputs.out)
    if not earlier and any(outputs.existing(pictures).values()):
        say(f"{outputs.out} has no {RECORD}: nothing tells with which options its files were made.")
    if earlier and (differ := [key for key in about if earlier.get(key) != about[key]]):
        raise ValueError(f"{outputs.out} holds results of another model, version or options "
                         f"({RECORD}: {', '.join(differ)}): choose another folder (--out), or "
                         "leave out --skip-existing.")
    return ({name: path for name, path in pictures.items()
             if not all(file.exists() for file in outputs.files(name).values())},
            {name: path for name, path in clips.items()
             if not outputs.video(name).exists() or not earlier
             or not set(of_clips.kinds) <= set(earlier["pictures"].get(name, {}).get("save", ()))})
