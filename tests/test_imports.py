"""Which file may import which: arrows go down only, and importing a file does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_stage1", "train_stage2", "distill", "convert_sd2", "evaluate", "predict", "app"}
PACKAGES = {"nets", "losses", "data", "miniature", "extras", "engine", "metrics", "evaluation"}
# What each part may import of the project and of the heavier libraries.
ALLOWED = {
    "nets": {"nets"},
    "losses": {"losses"},
    "data": {"data"},
    "metrics": {"data"},
    "evaluation": {"evaluation", "data", "metrics", "engine"},
    "engine": {"engine"},
    "storage": set(),
    "miniature": PACKAGES - {"extras"},
    "extras": {"extras", "evaluation", "data", "engine", "nets"},
    "benchmarks": PACKAGES,
    "docs": PACKAGES,
}
COMMANDS = {"data/prepare_hypersim.py"}  # run as python -m
TRAINERS = {"extras/train_denoising.py"}  # scripts like those at the top level
FORBIDDEN = {"diffusers", "transformers", "torchvision", "cv2", "timm", "scipy"}


def files():
    folders = ("nets", "engine", "losses", "data", "evaluation", "miniature", "extras",
               "benchmarks", "docs")
    return sorted(ROOT.glob("*.py")) + [
        path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def part_of(path):
    """The folder at the top level that a file is in, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """First words of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    names = set(imported(path))
    part = part_of(path)
    if path.relative_to(ROOT).as_posix() != "benchmarks/peer.py":  # what is compared with
        assert not names & FORBIDDEN
    if part != "benchmarks":
        assert not names & SCRIPTS, "scripts are not imported"
    if path.relative_to(ROOT).as_posix() in COMMANDS:
        names.discard("engine")  # for main()
    if part in ALLOWED and path.relative_to(ROOT).as_posix() not in TRAINERS:
        assert names & PACKAGES <= ALLOWED[part]
    if part in ("nets", "losses"):
        libraries = {"torch", "numpy", "einops", "safetensors"}
        assert names <= {part, "storage"} | libraries | sys.stdlib_module_names


def test_core_does_not_import_extras():
    for path in files():
        part = part_of(path)
        outside = part in ("extras", "benchmarks", "docs")
        if not outside and path.stem not in (
                "predict", "evaluate", "convert_sd2", "train_stage1", "app"):
            assert "extras" not in set(imported(path)), path


def test_engine_knows_nothing_of_depth():
    for path in (ROOT / "engine").glob("*.py"):
        assert "depth" not in path.read_text().lower()


def test_the_trainers_load_neither_miniature_nor_extras():
    code = ("import sys, train_stage1, train_stage2\n"
            "print(*{name.split('.')[0] for name in sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"miniature", "extras", "matplotlib"} & set(done.stdout.split()), done.stderr
    assert "torch" in done.stdout.split()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_importing_does_nothing(path):
    """At the top level: imports, definitions, constants and the call of main, nothing else."""
    for node in ast.parse(path.read_text()).body:
        main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
                 ast.AnnAssign)
        assert main or words or isinstance(node, kinds), ast.unparse(node)


def test_lines_fit():
    for path in files() + sorted((ROOT / "tests").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert len(line) <= 100, f"{path}:{number} has {len(line)} characters"
