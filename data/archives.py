"""Read a folder or a .tar in place: both map relative file names to file contents."""

import tarfile
from pathlib import Path, PurePosixPath

from data.files import blame, check_bytes
from data.transforms import BadSample
from storage import walk


class Folder:
    """The files below a folder."""

    def __init__(self, root):
        self.root = Path(root)
        self.names = set(walk(self.root))

    def place(self, name):
        """Where a file lies, for messages."""
        return self.root / name

    def read(self, name):
        """The bytes of a file; raises BadSample if it can't be read."""
        with blame(self.place(name)):
            check_bytes(self.place(name), self.place(name).stat().st_size)
            return self.place(name).read_bytes()


class Tar:
    """The plain files of an uncompressed .tar, found by reading its headers once.

    Each read opens the archive again, so processes and threads can share one object. Links, devices
    and names that begin with a dot or lead out of the archive are left out. Nothing is unpacked.
    Raises ValueError if the archive is truncated or compressed.
    """

    def __init__(self, path):
        self.root = Path(path)
        self.spans = index(self.root)  # name -> (offset, size)
        self.names = set(self.spans)

    def place(self, name):
        """Where a file lies, for messages."""
        return f"{self.root}/{name}"

    def read(self, name):
        """The bytes of a member; raises BadSample if it isn't there or can't be read."""
        if name not in self.spans:
            raise BadSample(f"{self.place(name)} is missing.")
        offset, size = self.spans[name]
        check_bytes(self.place(name), size)
        with blame(self.place(name)), open(self.root, "rb") as file:
            file.seek(offset)
            content = file.read(size)
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
                hidden = any(part.startswith(".") for part in name.parts)  # excludes .. too
                if not member.isreg() or name.is_absolute() or hidden:
                    continue
                if member.issparse():
                    raise tarfile.ReadError(f"{name} is packed as sparse, which is not read: pack "
                                            "it without -S")
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{name} is cut off")
                spans[str(name)] = member.offset_data, member.size
            # At a truncated or damaged header tarfile only stops reading: it raises no error.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"its end is missing after {len(spans)} files")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a complete, uncompressed .tar ({error}): download it "
                         "again or unpack it.") from None
    return spans


def open_tree(folder, tar):
    """The Tar named `tar` in a data set's folder or, if it is absent, the extracted Folder.

    The extracted files lie in `folder` itself or in a subfolder named like the archive. `folder`
    may also be the path of an archive with any name.
    """
    folder = Path(folder)
    if folder.is_file():
        return Tar(folder)
    if (folder / tar).is_file():
        return Tar(folder / tar)
    inside = folder / tar.removesuffix(".tar")
    return Folder(inside if inside.is_dir() else folder)
