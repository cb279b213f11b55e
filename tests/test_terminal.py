"""engine/terminal.py: messages and types of options."""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import terminal

ROOT = Path(__file__).resolve().parent.parent


def test_readers_share_the_cores(monkeypatch):
    for cores, ranks, expected in ((1, 1, 2), (6, 1, 6), (6, 2, 3), (64, 2, 8), (16, 8, 2)):
        monkeypatch.setattr(terminal.os, "cpu_count", lambda: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert terminal.readers() == expected


def test_messages_are_one_line_whatever_names_hold(capsys):
    terminal.say("a\nb\x1b[31m.png is bad")
    assert capsys.readouterr().err == "a?b?[31m.png is bad\n"


@pytest.mark.parametrize("kind, good, bad", [
    (terminal.positive, ["1", "32"], ["0", "-1", "1.5", "x"]),
    (terminal.number_from_0, ["0", "32"], ["-1", "1.5", "x"]),
    (terminal.number_between(8, 64), ["8", "64"], ["7", "65", "-8", "x"]),
    (terminal.not_negative, ["0", "3e-5"], ["-1", "nan", "inf", "x"])])
def test_option_types(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "deep" / "er"):
        with pytest.raises(FileExistsError, match=f"^--out {file} is a file: give a folder.$"):
            terminal.check_folder(path, "--out")
    terminal.check_folder(tmp_path, "--out")
    terminal.check_folder(tmp_path / "new" / "er", "--out")
    assert list(tmp_path.iterdir()) == [file]


def test_other_ranks_speak_only_when_any_may(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    terminal.say("from the first")
    terminal.say("from any", any_rank=True)
    assert capsys.readouterr().err == "from any\n"


@pytest.mark.parametrize("closed", ["gone", "never there"])
def test_what_nobody_reads_is_dropped(closed, tmp_path):
    """A program goes on, and ends well, when the one that reads what it says has ended."""
    code = ("import sys, time, tqdm\nfrom engine import job, terminal\n"
            "def main():\n"
            "    time.sleep(0.5)\n"
            "    bar = tqdm.tqdm(total=3, mininterval=0)\n"
            "    for _ in range(3):\n"
            "        terminal.say('x' * 100_000), terminal.tell('y' * 100_000), bar.update()\n"
            f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
            "job.run(main)")
    command = f"{sys.executable} -c \"$CODE\" " + {"gone": "2>&1 | true; exit ${PIPESTATUS[0]}",
                                                 "never there": ">&- 2>&-"}[closed]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"CODE": code},
                          timeout=60)
    assert done.returncode == 0 and (tmp_path / "done").exists()


def test_what_modules_log_is_printable_and_short(capsys):
    log = logging.Logger("alone")
    log.addHandler(terminal.Said())
    log.warning("%s is odd: %s", "a\x1b[2J\nerror: b", "x" * 100_000)
    said = capsys.readouterr().err
    assert said.startswith("a?[2J?error: b is odd: xxx") and said.count("\n") == 1
    assert len(said) < 2100
