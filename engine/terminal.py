"""A script's messages to its user, and its command-line options."""

import argparse
import logging
import math
import os
import sys

from tqdm import tqdm

LONGEST_MESSAGE = 2000  # characters: a message may quote a part of a damaged file


class Said(logging.Handler):
    """A logging handler that prints modules' log messages through `say`."""

    def emit(self, record):
        say(record.getMessage(), any_rank=True)


class Heard:
    """Standard output or error; after its reader has ended (`| head`), drops text without error."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed from the start

    def write(self, text):
        self.heard(self.stream.write, text)
        return len(text)

    def flush(self):
        self.heard(self.stream.flush)

    def heard(self, function, *arguments):
        try:
            function(*arguments)
        except BrokenPipeError:  # all later output of the process is dropped, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:  # such as a full disk
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def say(text, any_rank=False):
    """Prints a line for the user on standard error, from the first rank only or from any rank."""
    if text and (any_rank or is_first()):
        tqdm.write(printable(text), file=sys.stderr)  # above a bar
        sys.stderr.flush()


def tell(text):
    """Prints lines of the result on standard output."""
    for line in text.split("\n"):
        print(printable(line))


def printable(text):
    """One line, shortened, without the control characters that file names may contain."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2:]}"
    return "".join(character if character.isprintable() else "?" for character in text)


def check_folder(path, option):
    """FileExistsError if a file is at the path or above it; call it before the work."""
    for part in (path, *path.parents):
        if os.path.lexists(part) and not part.is_dir():
            raise FileExistsError(f"{option} {part} is a file: give a folder."
                                  if part.exists() else
                                  f"{option} {part} is a link that leads nowhere: give a folder.")


def is_first():
    """Whether this process is the first rank or alone; works before `start`, too."""
    return int(os.environ.get("RANK", 0)) == 0


# ---------------------------------------------------------------------------- options


def add_training_options(parser, steps, lr):
    """Adds the training loop's options; the stages' defaults differ only for `steps` and `lr`."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=steps, help="optimizer steps (%(default)s)")
    add("--batch", type=positive, default=32, help="samples per step, all ranks (%(default)s)")
    add("--micro-batch", type=positive, default=1, help="samples at once, per rank (%(default)s)")
    add("--lr", type=not_negative, default=lr, help="peak learning rate (%(default)s)")
    add("--warmup", type=number_from_0, default=100, help="steps of linear warm-up (%(default)s)")
    add("--decay-steps", type=positive, default=25_000,
        help="step at which the rate has fallen to 1 %% (%(default)s)")
    add("--clip-gradient", type=not_negative, metavar="NORM",
        help="largest norm of a step's gradient")
    add("--extend", action="store_true", help="resume a run that had fewer --steps")
    add("--accept-changes", action="store_true", help="resume a run whose weights or data are not "
        "what they were")
    add("--seed", type=int, default=0, help="decides order, flips and new weights (%(default)s)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the networks; auto: bfloat16 on GPUs that compute in it and on CPUs that are "
        "measured to be faster in it, else float32; a resumed run keeps its precision")
    add("--compile", action="store_true", help="torch.compile the U-Net (not the Fourier "
        "block's complex numbers); takes minutes for each size of sample")
    add("--checkpoint-activations", nargs="?", choices=["auto", "on", "off"], const="on",
        default="auto", help="recompute activations in the backward pass: less memory, a third "
        "more time; auto: where they would not fit")
    add("--workers", type=number_from_0, default=readers(), help="processes that read data, per "
        "rank; each reads some 11 frames of raw Hypersim a second, 19 prepared, 350 cached (here "
        "%(default)s)")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    add("--log-every", type=positive, default=10, help="steps (%(default)s)")
    add("--save-every", type=positive, default=500, help="steps (%(default)s)")
    add("--tensorboard", action="store_true", help="write events for TensorBoard, too")
    add("--validate-every", type=positive, default=1000, help="steps (%(default)s)")
    add("--validate-images", type=positive, default=16, help="images to score (%(default)s)")


def readers():
    """The default number of data loader workers: one per core, at least 2, at most 8.

    Eight read some 150 prepared frames a second (benchmarks/loading.py).
    """
    return max(min(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8), 2)


def positive(text):
    """argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def number_from_0(text):
    """argparse type: a whole number, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or above, not {text}")
    return int(text)


def number_between(low, high):
    """An argparse type: a whole number from `low` to `high`."""
    def kind(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text}")
        return int(text)
    return kind


def not_negative(text):
    """argparse type: a number, 0 or above."""
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number, 0 or above, not {text}")
