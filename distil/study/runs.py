"""Trainings of a study: several at once, each continued where an interrupted study left it."""

import contextlib
import dataclasses
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distil.system.children import running
from utils import InputError, logger

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: a variant, a seed, a rate and a number of updates; words: of train.py."""

    variant: str
    seed: int
    rate: float
    updates: int
    words: Sequence[str]
    folder: Path

    @property
    def name(self) -> str:
        """Name it in study.json."""
        return f"{self.variant}/{self.seed}/{self.rate:g}"


def words_of(flags: Mapping[str, object]) -> list[str]:
    """Write flags as on a command line; None: no value, a sequence: several words."""
    words = []
    for flag, value in flags.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        values = [] if value is None else value if several else [value]
        words += [flag, *map(str, values)]
    return words


def run_folder(study: Path, variant: str, seed: int, rate: float) -> Path:
    """Name the folder of a training in a study's folder."""
    return study / "runs" / f"{variant}-{seed}-{rate:g}"


def run_to_end(program: str, words: Sequence[str], log: Path) -> None:
    """Run one of the project's programs to its end. Raises InputError with its last line."""
    with _started(program, words, log, 1) as child:
        status = child.wait()
    _require_success(program, status, log)


def run_jobs(jobs: Sequence[Job], num: int, finished: Callable[[Job, float], None]) -> None:
    """Train, `num` jobs at once; call finished(job, seconds) after each, while others train.

    Raises InputError where one fails; the others save their state and end, too.
    """
    waiting, active = list(jobs), {}
    with contextlib.ExitStack() as stack:
        while waiting or active:
            ended = [name for name, (_, child, _) in active.items() if child.poll() is not None]
            done = [active.pop(name) for name in ended]
            for job, child, _ in done:
                _require_success(f"train.py ({job.name})", child.returncode, log_of(job))
            seconds = [time.monotonic() - since for _, _, since in done]
            while waiting and len(active) < num:  # before finished(), which takes a while
                job = waiting.pop(0)
                job.folder.parent.mkdir(parents=True, exist_ok=True)
                started = _started("train.py", job.words, log_of(job), num)
                active[job.name] = job, stack.enter_context(started), time.monotonic()
            for (job, _, _), elapsed_s in zip(done, seconds, strict=True):
                finished(job, elapsed_s)
            time.sleep(POLL_S)


def log_of(job: Job) -> Path:
    """Name the file of what a training prints."""
    return job.folder.with_name(f"{job.folder.name}.log")


@contextlib.contextmanager
def _started(program: str, words: Sequence[str], log: Path, num: int):
    logger.info("$ python %s %s >> %s", program, shlex.join(words), shlex.quote(str(log)))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // num, 1))
    with open(log, "ab") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT}
        options["env"] = {**os.environ, "OMP_NUM_THREADS": threads}
        with running(ROOT / program, words, **options) as child:
            yield child


def _require_success(what: str, status: int, log: Path) -> None:
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        raise InputError(f"{what} ended with status {status}: {lines[-1]} (all of it in {log})")
