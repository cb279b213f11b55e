"""README.md names what is there: files, functions and options, and every deviation."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OUTSIDE = {"extras", "miniature", "benchmarks", "tests", "runs", "docs"}  # of the core
CORE = [name for name in sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
        if name.split("/")[0] not in OUTSIDE and not name.startswith(".")
        and not name.endswith("__init__.py")]


def section(title):
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_file_map_has_every_file_of_the_core():
    named = re.findall(r"`([\w/]+\.py)`", section("Files"))
    assert sorted(named) == sorted(CORE)


def test_what_is_named_is_there():
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", section("Files") + section("Deviations")):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_the_paper_is_where_the_table_says():
    rows = re.findall(r"`([\w/]+\.py)`((?: (?:and )?`\w[\w.]*`,?)+)",
                      section("From the paper to the code"))
    assert len(rows) == 10
    for file, names in rows:
        source = (ROOT / file).read_text()
        for name in re.findall(r"[\w.]+", names.replace(" and ", " ")):
            last = name.split(".")[-1]
            assert re.search(rf"\b(def|class) {last}\b|\b{last} = ", source), (file, name)


def test_deviations_are_commented_where_they_are_and_the_other_way_round():
    named = Counter(re.findall(r"^\|[^|]*`([\w/]+\.py)` \|", section("Deviations"), re.M))
    comments = Counter({name: (ROOT / name).read_text().count("# Deviation:") for name in CORE})
    assert named == +comments


def test_options_are_there():
    files = (*CORE, "extras/make_pairs.py", "extras/outputs.py", "benchmarks/tables.py")
    sources = "".join((ROOT / name).read_text() for name in files)
    known = set(re.findall(r"[\"'](--[a-z][a-z0-9-]+)[\"']", sources))
    named = set(re.findall(r"[ `](--[a-z][a-z0-9_-]+)", README))
    assert named <= known | {"--help", "--nproc_per_node", "--shutdown_timeout"}
