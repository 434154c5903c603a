"""Fixtures of the stand-ins, made once a session, and functions that run programs."""

import json
import os
import pickle
import re
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from stand_ins import ROOT, World, make_lines, make_teachers

import utils

# What may be set where the tests are run, by a launcher or for scripts/*.sh.
OF_THE_CALLER = re.compile("RANK|LOCAL_RANK|WORLD_SIZE|PYTHON|VENV|(SLURM|OMPI|PMI)_.*")


# The files that take longest. Begun last, one of them would keep a core busy while others idle.
FIRST = (
    *("test_recipes.py", "test_distributed.py", "test_fault_injection.py", "test_quickstart.py"),
    *("test_benchmark_step.py", "test_output.py", "test_distiller.py", "test_benchmarks.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


def is_of_the_caller(name: str) -> bool:
    return OF_THE_CALLER.fullmatch(name) is not None


@pytest.fixture(autouse=True)
def surroundings():
    """Restore os.environ, which programs change (TOKENIZERS_PARALLELISM, ..), after each test."""
    with mock.patch.dict(os.environ):
        for name in filter(is_of_the_caller, list(os.environ)):
            del os.environ[name]
        yield


@pytest.fixture(scope="session")
def lines() -> list[str]:
    return make_lines(240)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, lines) -> Path:
    path = tmp_path_factory.mktemp("text") / "dump.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, text_file) -> dict[str, Path]:
    """Tiny teachers with tokenizers: model type -> folder."""
    return make_teachers(tmp_path_factory.mktemp("teachers"), text_file)


@pytest.fixture(scope="session")
def world(tmp_path_factory, teachers, text_file) -> World:
    return World(tmp_path_factory.mktemp("world"), teachers, text_file)


@pytest.fixture
def status_and_errors(capsys):
    """Call a program's main in this process; return its exit status and its error messages."""

    def call(main, argv: list[str]) -> tuple[int, list[str]]:
        capsys.readouterr()
        try:
            utils.run_program(lambda: main(argv))
            status = 0
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr().err.splitlines()
        return status, [line.split("error: ", 1)[1] for line in printed if ": error: " in line]

    return call


def run_process(
    *command: object, cwd: Path | None = None, timeout_s: float = 300, **environment: str
):
    """Run a command as a user would, without the variables of a launcher."""
    clean = {name: value for name, value in os.environ.items() if not is_of_the_caller(name)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    words = [str(word) for word in command]
    assert not words[0].startswith("python"), "the PATH's may lack the libraries: sys.executable"
    try:
        return subprocess.run(
            words, cwd=cwd, env=clean, timeout=timeout_s, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as error:
        texts = error.stdout, error.stderr
        printed = [(text or b"")[-2000:].decode(errors="replace") for text in texts]
        what = f"still running after {timeout_s:g} s: {' '.join(words)}"
        pytest.fail("\n".join([what, *printed]), pytrace=False)


def load_golden(name: str) -> dict:
    return json.loads((ROOT / "tests" / "golden" / name).read_text(encoding="utf-8"))


def write_pickle(path: Path, content) -> str:
    path.write_bytes(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL))
    return str(path)


def as_uint16(sequences) -> list[np.ndarray]:
    return [np.array(sequence, dtype=np.uint16) for sequence in sequences]
