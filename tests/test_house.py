"""The rule on the door: which module imports which; how long files, functions and lines may be.

Floors: utils < distil/ < the card's files < train.py < scripts/. Nothing imports upward, and there
is no circle. A change that needs more room than a budget leaves moves a wall first.
"""

import ast
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from stand_ins import ROOT

CARD = {"distiller", "lm_seqs_dataset", "grouped_batch_sampler"}
FLOORS = ("utils", "distil", "card", "train", "scripts", "benchmarks")
WIDTH, FUNCTION_LINES, FMT_SKIPS = 100, 60, 10
FILE_LINES = {"train.py": 400, "distiller.py": 450}
README_LINES, README_WORDS = 200, 2000
TOP_LEVEL = {
    *("train.py", "distiller.py", "grouped_batch_sampler.py", "lm_seqs_dataset.py", "utils.py"),
    *("scripts", "training_configs", "requirements.txt", "README.md", "tests"),
    *("distil", "benchmarks", "docs", ".ci", ".gitignore", ".git-blame-ignore-revs"),
    *("LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml"),
    *("requirements-dev.txt", "requirements-eval.txt"),
}


FOLDERS = "distil", "scripts", "benchmarks"
PROGRAMS = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))])


def name_of(path: Path) -> str:
    """Name a file as an import does: distil/losses.py is distil.losses, scripts/a.py is a."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[-1] if parts[0] == "scripts" else ".".join(parts)


MODULES = {name_of(path): path for path in PROGRAMS if path.name != "__init__.py"}


def floor_of(name: str) -> int:
    """Return the floor of a module, 0 at the bottom."""
    path = MODULES[name].relative_to(ROOT)
    room = "card" if name in CARD else path.parts[0] if len(path.parts) > 1 else name
    return FLOORS.index(room)


def imported_by(name: str) -> set[str]:
    """List the project's modules that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_upward(name):
    is_script = floor_of(name) == FLOORS.index("scripts")
    for other in imported_by(name):
        if is_script and floor_of(other) == FLOORS.index("benchmarks"):
            continue
        assert floor_of(other) <= floor_of(name), f"{name} imports {other}"
        # Programs start train.py as a process; a teacher is trained by its loop, in this one.
        is_allowed = name == "train_teacher"
        assert is_allowed or not (is_script and other == "train"), f"{name} imports {other}"


def test_there_is_no_circle_of_imports():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in imported_by(name):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_its_budget(path):
    name = str(path.relative_to(ROOT))
    lines = path.read_text(encoding="utf-8").splitlines()
    budget = FILE_LINES.get(name, 350 if path.parent == ROOT / "scripts" else 450)
    assert len(lines) <= budget, f"{name}: {len(lines)} lines"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{path}: {node.name} has {lines}"


def columns(line: str) -> int:
    """Count the columns of a line as the formatter does: combining marks take none."""
    return sum(unicodedata.category(letter) not in ("Mn", "Me") for letter in line)


def test_no_line_is_wide_and_the_formatter_is_on():
    skips = 0
    for path in [*PROGRAMS, *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        wide = [n for n, line in enumerate(text.splitlines(), 1) if columns(line) > WIDTH]
        assert not wide, f"{path}: lines {wide}"
        assert not re.search(r"#\s*fmt: off", text), path
        skips += len(re.findall(r"#\s*fmt: skip", text))
    assert skips <= FMT_SKIPS


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES and len(text.split()) <= README_WORDS


def test_the_top_level_holds_the_cards_names_and_small_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= TOP_LEVEL


def test_packages_hold_nothing_of_their_own():
    for path in (ROOT / "distil").rglob("__init__.py"):
        assert path.read_text(encoding="utf-8") == "", path


def test_importing_a_module_has_no_effect(tmp_path):
    program = f"""
import sys, logging, os, random, importlib
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import torch, numpy
def state():
    environment = dict(os.environ)
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # transformers.Trainer's import sets it
    seeds = torch.initial_seed(), random.getstate()
    return seeds, torch.get_num_threads(), environment, sorted(os.listdir())
before = state()
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
assert before == state()
assert not logging.getLogger("distil").handlers and not torch.cuda.is_initialized()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
