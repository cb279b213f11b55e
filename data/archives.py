"""A folder or a .tar that is read in place, both as a table of relative names and contents."""

import os
import tarfile
from pathlib import Path, PurePosixPath

from data.files import check_bytes
from data.transforms import BadSample


class Folder:
    """The files below a folder."""

    def __init__(self, root):
        self.root = Path(root)
        paths = (Path(parent, file) for parent, _, files in os.walk(self.root) for file in files)
        self.names = {path.relative_to(self.root).as_posix() for path in paths}

    def place(self, name):
        """Where a file lies, for messages."""
        return self.root / name

    def read(self, name):
        """The bytes of a file; raises BadSample if it can't be read."""
        try:
            check_bytes(self.place(name), self.place(name).stat().st_size)
            return self.place(name).read_bytes()
        except OSError as error:
            raise BadSample(f"{self.place(name)} can't be read: {error.strerror}.") from None


class Tar:
    """The plain files of an uncompressed .tar, found by reading its headers once.

    Reading needs no position of the file, so one object serves several processes and threads.
    Links, devices and names that lead out of the archive are left out; nothing is ever unpacked.
    Raises ValueError if the archive is truncated or compressed.
    """

    def __init__(self, path):
        self.root = Path(path)
        self.spans = index(self.root)  # name -> (offset, size)
        self.names = set(self.spans)
        self.file = None

    def __getstate__(self):
        return {**vars(self), "file": None}  # each process opens its own

    def place(self, name):
        """Where a file lies, for messages."""
        return f"{self.root}/{name}"

    def read(self, name):
        """The bytes of a member; raises BadSample if it isn't there or can't be read."""
        if name not in self.spans:
            raise BadSample(f"{self.place(name)} is missing.")
        offset, size = self.spans[name]
        check_bytes(self.place(name), size)
        try:
            if self.file is None:
                self.file = open(self.root, "rb", buffering=0)
            content = os.pread(self.file.fileno(), size, offset)
        except OSError as error:
            raise BadSample(f"{self.place(name)} can't be read: {error.strerror}.") from None
        if len(content) != size:
            raise BadSample(f"{self.place(name)} can't be read: the archive ends before it does.")
        return content


def index(path):
    """{name without ./: (offset, size)} of the plain files in a .tar."""
    spans, end = {}, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg() or name.is_absolute() or ".." in name.parts:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{name} is cut off")
                spans[str(name)] = member.offset_data, member.size
            # tarfile also stops, without a word, at a header that is cut off or damaged.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"its end is missing after {len(spans)} files")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a complete, uncompressed .tar ({error}): download it "
                         "again or unpack it.") from None
    return spans


def open_tree(folder, tar):
    """What a set's folder holds: the archive of this name, or else its extracted content.

    The content may lie in the folder itself or in a folder named like the archive.
    """
    folder = Path(folder)
    if (folder / tar).is_file():
        return Tar(folder / tar)
    inside = folder / tar.removesuffix(".tar")
    return Folder(inside if inside.is_dir() else folder)
