"""storage.py: folders walked, files written whole, what lies in a file's place."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import storage
from storage import sha256, wrong_content, walk, whole, write_text

ROOT = Path(__file__).resolve().parents[1]


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path / "elsewhere/deep/b.png")
    touch(tmp_path / "root/a.png")
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/again").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "root/file.png").symlink_to(tmp_path / "elsewhere/deep/b.png")
    (tmp_path / "root/nowhere.png").symlink_to(tmp_path / "missing")
    (tmp_path / "root/self").symlink_to("self")
    (tmp_path / "root/up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/deep/round").symlink_to(tmp_path / "root")  # a loop through two links
    assert list(walk(tmp_path / "root")) == ["a.png", "again/b.png", "file.png",
                                             "linked/deep/b.png"]


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    for name in ("._a.png", ".DS_Store", ".hidden/b.png", "a.png", "c/.thumbs/d.png", "c/e.png"):
        touch(tmp_path / name)
    assert list(walk(tmp_path)) == ["a.png", "c/e.png"]
    assert list(walk(tmp_path / "missing")) == [] == list(walk(tmp_path / "a.png"))


def test_pipes_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert list(walk(tmp_path)) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_said(tmp_path, caplog):
    touch(tmp_path / "closed/a.png")
    touch(tmp_path / "b.png")
    (tmp_path / "closed").chmod(0)
    assert list(walk(tmp_path)) == ["b.png"]
    assert "closed may not be read" in caplog.text


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "caf\udce9\n", lasting=True)
    assert path.read_bytes() == b"caf\xe9\n"
    with pytest.raises(OSError, match="a.txt can't be written.*make room"):
        with whole(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"caf\xe9\n" and list(tmp_path.iterdir()) == [path]
    assert sha256(path).startswith("") and len(sha256(path)) == 64


@pytest.mark.parametrize("head, said", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    (b"\n <!DOCTYPE html><html>", "web page"), (b"<HTML lang='en'>", "web page")])
def test_stand_ins_are_named(head, said):
    assert said in wrong_content(None, head)


def test_other_beginnings_are_not_known():
    assert wrong_content(None, b"\x89PNG\r\n\x1a\n") is None and wrong_content(None, b"") is None


@pytest.mark.parametrize("call, places", [
    (r"os\.walk\(|\.rglob\(|os\.scandir\(", {"storage.py"}),
    (r"\bImage\.open\(|\biio\.imread\(", {"data/images.py"}),
    (r"\bsafe_open\(", {"nets/model_file.py"}),
    (r"file_digest\(", {"storage.py"}),
    (r"os\.replace\(", {"storage.py", "engine/run_folder.py", "nets/official/export.py"}),
])
def test_there_is_one_place_for_each(call, places):
    """(engine/run_folder.py moves one whole checkpoint, nets/official/export.py a whole folder.)"""
    folders = ("nets", "engine", "losses", "data", "evaluation", "extras", "miniature")
    files = [*ROOT.glob("*.py"), *(path for folder in folders
                                   for path in (ROOT / folder).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix() for path in files
             if re.search(call, path.read_text())}
    assert found == places


def test_only_files_of_a_bounded_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(storage.LARGEST + 1)
    for name in ("pipe", "zero", "."):
        for function in (storage.read_text, sha256, storage.first_bytes, storage.check_file):
            with pytest.raises(ValueError, match="is not a file, but a folder, a pipe or a device"):
                function(tmp_path / name)
    with pytest.raises(ValueError, match="no more than 67,108,864 are read"):
        storage.read_text(tmp_path / "large")


def test_what_the_dead_left_half_written_is_removed(tmp_path):
    """Of this machine; what lives, or is another's, is left."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {name: tmp_path / f".{name}-00000000.tmp" for name in (
        f"{storage.MACHINE}-{dead.pid}", f"{storage.MACHINE}-{os.getppid()}", f"0000-{dead.pid}",
        f"{storage.MACHINE}-x")}
    for path in names.values():
        touch(path)
    write_text(tmp_path / "new", "text")
    assert [path.exists() for path in names.values()] == [False, True, True, True]


def test_names_may_be_as_long_as_names_can_be(tmp_path):
    write_text(tmp_path / ("n" * 255), "text")
    with pytest.raises(ValueError, match="is a longer name than files can have: shorten it"):
        write_text(tmp_path / ("n" * 256), "text")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_sentence_with_the_path():
    with pytest.raises(OSError, match="/dev/full can't be written .No space left on device"):
        storage.append("/dev/full", "text")


def test_links_that_lead_nowhere_are_said(tmp_path, caplog):
    touch(tmp_path / "a.png")
    for number in range(3):
        (tmp_path / f"{number}.png").symlink_to("not fetched")
    assert list(walk(tmp_path)) == ["a.png"]
    assert f"3 links in {tmp_path} lead nowhere" in caplog.text and len(caplog.records) == 1
