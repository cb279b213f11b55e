"""Files and folders, for every part of the project: found, known again, written whole."""

import codecs
import hashlib
import logging
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

log = logging.getLogger(__name__)


@contextmanager
def whole(path, lasting=False):
    """The name to write a file under first; it takes its own when it is whole.

    lasting: it survives a power failure, too. OSError that names the file if there is no room.
    Other processes may write the same file.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # what is there may be a link to elsewhere
    try:
        yield temporary
        if lasting:
            sync(temporary)
        os.replace(temporary, path)
        if lasting:
            sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} can't be written ({error}): make room and give the same command "
                      "again.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text, lasting=False):
    """Writes a text, whole or not at all; names of files in it may be no UTF-8."""
    with whole(path, lasting) as temporary:
        temporary.write_bytes(text.encode(errors="surrogateescape"))


def sync(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which opens no folders, and syncs only what it writes
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path):
    """The digest of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk(folder, above=()):
    """The files below a folder: paths relative to it, with /, those of a folder in order.

    Links are followed, but not into a folder that one is in. Names that begin with a dot are
    passed over: systems leave such files behind (.DS_Store, ._a.png).
    """
    if not os.path.isdir(folder):
        return
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        log.warning("%s may not be read: it is passed over.", folder)
        return
    for entry in entries:
        linked = entry.is_symlink()  # then it may lead anywhere, or nowhere
        if entry.name.startswith("."):
            continue
        if os.path.isfile(entry.path) if linked else entry.is_file():
            yield entry.name
        elif os.path.isdir(entry.path) if linked else entry.is_dir():
            yield from (f"{entry.name}/{path}" for path in walk(entry.path, (*above, here)))


def first_bytes(path):
    """Of a file, 100."""
    with open(path, "rb") as file:
        return file.read(100)


def stand_in(path, head=None):
    """What a file is that lies where another one should, in words; None: not known.

    head: its first bytes, if they were read before.
    """
    head = (first_bytes(path) if head is None else head).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which stands for the file: fetch it with git lfs pull"
    if head.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<!--")):
        return "is a web page (HTML), not the file: download it again, from the file's own address"
    return None
