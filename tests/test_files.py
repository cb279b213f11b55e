"""Writing files: whole or not at all. (Reading: tests/test_hostile.py, tests/test_pairs.py.)"""

import contextlib
import resource

import numpy as np
import pytest

from data.files import read_npy, write_npy, write_png
from storage import whole


@contextlib.contextmanager
def no_room():
    """Inside, no file of this process grows beyond 500 bytes, as on a full disk.

    Not a fixture: pytest's own output may be such a file, and it is written before fixtures end.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # closing it, too
@pytest.mark.parametrize("write, name, array", [
    (write_npy, "depth.npy", np.zeros((30, 40), np.float32)),
    (write_png, "image.png", np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype="u1")),
])
def test_without_room_the_old_file_stays(tmp_path, write, name, array):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=f"{name} can't be written .*: make room"), no_room():
        write(path, array)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_fails_while_a_file_is_written_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        1 / 0
    assert not list(tmp_path.iterdir())


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "depth.npy"
    write_npy(path, np.ones((2, 3), np.float32))
    before = path.read_bytes()
    with open(path, "rb") as reader:  # who reads meanwhile has the old one, whole
        write_npy(path, np.full((2, 3), 2, np.float32))
        assert reader.read() == before
    assert (read_npy(path) == 2).all() and list(tmp_path.iterdir()) == [path]
