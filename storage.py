"""Files and folders, for every part of the project: found, known again, written whole."""

import codecs
import errno
import hashlib
import logging
import os
import platform
import stat
import zipfile
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError

log = logging.getLogger(__name__)

MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGEST = 1 << 26  # bytes of a table, or of a file of settings


def check_file(path, largest=None):
    """ValueError unless a path is a file, of `largest` bytes at most: pipes may have no end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a file, but a folder, a pipe or a device.")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"{path} has {status.st_size:,} bytes; no more than {largest:,} are read "
                         "of a file of its kind.")


def read_text(path):
    """The text of a small file; what is no UTF-8 in it is kept, as in names of files."""
    check_file(path, LARGEST)
    return Path(path).read_bytes().decode(errors="surrogateescape")


@contextmanager
def whole(path, lasting=False):
    """The name to write a file under first; it takes its own when it is whole.

    lasting: it survives a power failure, too. OSError that names the file if there is no room.
    Other processes may write the same file.
    """
    path = Path(path)
    remove_leftovers(path.parent)
    name = zlib.crc32(os.fsencode(path.name))  # short, as the file's own may be as long as can be
    temporary = path.with_name(f".{MACHINE}-{os.getpid()}-{name:08x}.tmp")
    temporary.unlink(missing_ok=True)  # what is there may be a link to elsewhere
    try:
        yield temporary
        if lasting:
            sync(temporary)
        os.replace(temporary, path)
        if lasting:
            sync(path.parent)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise ValueError(f"{path} is a longer name than files can have: shorten it.") from error
        raise cant_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def cant_write(path, error):
    """The OSError that names a file and says what to do."""
    reason = getattr(error, "strerror", None) or error
    other = getattr(error, "errno", None) not in (None, *FULL)
    return OSError(f"{path} can't be written ({reason}): {'see to that' if other else 'make room'} "
                   "and give the same command again.")


@lru_cache(maxsize=None)
def remove_leftovers(folder):
    """Removes what processes of this machine that were killed have left in a folder half-written.

    Once for each folder; by `whole`, before it writes there.
    """
    for path in folder.glob(f".{MACHINE}-*-*.tmp") if os.name != "nt" else ():
        try:
            os.kill(int(path.name.split("-")[1]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OSError):  # another's
            pass


def append(path, text):
    """Adds lines to a file, at once. OSError that names the file if there is no room."""
    try:
        with open(path, "ab") as file:
            file.write(text.encode(errors="surrogateescape"))
    except OSError as error:
        raise cant_write(path, error) from error


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
    check_file(path)
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
    nowhere = []
    for entry in entries:
        linked = entry.is_symlink()  # then it may lead anywhere, or nowhere
        if entry.name.startswith("."):
            continue
        if os.path.isfile(entry.path) if linked else entry.is_file():
            yield entry.name
        elif os.path.isdir(entry.path) if linked else entry.is_dir():
            yield from (f"{entry.name}/{path}" for path in walk(entry.path, (*above, here)))
        elif linked:
            nowhere.append(entry.path)
    if nowhere:
        log.warning("%d links in %s lead nowhere, such as %s: they are passed over.", len(nowhere),
                    folder, nowhere[0])


def compressed(path):
    """Whether a .zip has files that have to be unpacked; PyTorch's have none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.compress_type for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False  # damaged: who reads it will say so


def first_bytes(path):
    """Of a file, 100."""
    check_file(path)
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
