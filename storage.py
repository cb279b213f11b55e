"""Files and folders, for the whole project: search, identification and complete writing."""

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
    """ValueError unless a path is a file of at most `largest` bytes: a pipe may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a file, but a folder, a pipe or a device.")
    if largest is not None and status.st_size > largest:
        raise ValueError(f"{path} has {status.st_size:,} bytes; no more than {largest:,} are read "
                         "of a file of its kind.")


def read_text(path):
    """The text of a small file; bytes that are not UTF-8 are kept, as in file names."""
    check_file(path, LARGEST)
    return Path(path).read_bytes().decode(errors="surrogateescape")


@contextmanager
def whole(path, lasting=False):
    """Yields a temporary path to write to; then renames the complete file to `path`.

    lasting: the file also survives a power failure. Raises an OSError that names the file if it
    can't be written. Other processes may write the same file.
    """
    path = Path(path)
    remove_leftovers(path.parent)
    name = zlib.crc32(os.fsencode(path.name))  # short: path.name may have the maximum length
    temporary = path.with_name(f".{MACHINE}-{os.getpid()}-{name:08x}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link to another place
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
    """Removes the incomplete files that killed processes of this machine left in a folder.

    `whole` calls it before it writes; it runs only once for each folder.
    """
    for path in folder.glob(f".{MACHINE}-*-*.tmp") if os.name != "nt" else ():
        try:
            os.kill(int(path.name.split("-")[1]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OSError):  # another user's process or file
            pass


def append(path, text):
    """Appends lines to a file at once. Raises an OSError that names the file on failure."""
    try:
        with open(path, "ab") as file:
            file.write(text.encode(errors="surrogateescape"))
    except OSError as error:
        raise cant_write(path, error) from error


def write_text(path, text, lasting=False):
    """Writes a text, whole or not at all; file names in it need not be valid UTF-8."""
    with whole(path, lasting) as temporary:
        temporary.write_bytes(text.encode(errors="surrogateescape"))


def sync(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows can't open folders, and syncs only files opened to write
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
    """Yields the files below a folder as relative paths with /, sorted within each folder.

    Links are followed, except to a folder that contains the link (`above`). Names that begin with a
    dot are skipped: operating systems leave such files behind (.DS_Store, ._a.png).
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
        linked = entry.is_symlink()  # to a file or a folder, or broken
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
    """Whether a .zip contains compressed files; PyTorch's .zip files contain none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.compress_type for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False  # damaged: the code that reads the file reports it


def first_bytes(path):
    """The first 100 bytes of a file."""
    check_file(path)
    with open(path, "rb") as file:
        return file.read(100)


def wrong_content(path, head=None):
    """Says that a Git LFS pointer or a web page was saved in place of the file; None: neither.

    head: the file's first bytes, if already read.
    """
    head = (first_bytes(path) if head is None else head).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which stands for the file: fetch it with git lfs pull"
    if head.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<!--")):
        return "is a web page (HTML), not the file: download it again, from the file's own address"
    return None
