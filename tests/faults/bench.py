"""Calls of trials, each in a forked process with a seed from its number, and their records."""

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from faults.plan import Row

from utils import keyed_seed, one_line


@dataclasses.dataclass
class Bench:
    """The inputs of a trial, and its record of trials, failures and notes.

    number: of the call; rng: the call's random numbers; folder: the call's empty folder; world:
    tiny teachers with data, counts and first weights (tests/stand_ins.World).
    """

    number: int
    rng: random.Random
    folder: Path
    world: object
    num_trials: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, num: int = 1) -> None:
        """Count `num` more trials of this call. A call that counts none is one trial."""
        self.num_trials += num

    def fail(self, what: str) -> None:
        """Record a failure and continue; an exception is a failure that ends the call."""
        self.failures.append(f"call {self.number}: {what}")

    def note(self, what: str) -> None:
        """Record a fact for the report; equal facts of several calls are printed once."""
        self.notes.append(what)


def call(row: Row, number: int, seed: int, world: object, folder: Path) -> dict:
    """Call a row's trial once, in this process; return its trials, failures and notes."""
    bench = Bench(number, random.Random(keyed_seed(seed, row.id, number)), folder, world)
    try:
        trial_of(row)(bench)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        bench.fail(f"{type(error).__name__}: {one_line(error, 300)} ({place})")
    return {"trials": bench.num_trials or 1, "failures": bench.failures, "notes": bench.notes}


def trial_of(row: Row) -> Callable[[Bench], None]:
    """Import the function that a row names."""
    module, name = row.trial.split(":")
    return getattr(importlib.import_module(module), name)


class ForkedCall:
    """One call in a forked process, which leads the process group of all that it starts."""

    def __init__(self, row: Row, number: int, seed: int, world: object, scratch: Path):
        self.row, self.number = row, number
        self.folder = scratch / f"{row.id}-{number}"
        self.folder.mkdir()
        self.result = scratch / f"{row.id}-{number}.json"
        self.stacks = scratch / f"{row.id}-{number}.stacks"
        self.deadline = time.monotonic() + row.limit_s
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(seed, world)

    def _run(self, seed: int, world: object) -> None:
        status = 1
        try:
            os.setsid()
            # A hung call, and the processes that it forked, dump their stacks.
            stacks = open(self.stacks, "a")  # noqa: SIM115
            faulthandler.register(signal.SIGQUIT, stacks, all_threads=False)
            result = call(self.row, self.number, seed, world, self.folder)
            self.result.write_text(json.dumps(result), encoding="utf-8")
            status = 0
        finally:
            os._exit(status)

    def finished(self) -> dict | None:
        """Return the result, None while there is none; end a call that has hung."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done and time.monotonic() < self.deadline:
            return None
        if not done:
            return self._failed(f"hung for more than {self.row.limit_s:g} s: {self.end()}")
        self._kill()  # processes that the call left running
        if status or not self.result.exists():
            return self._failed(f"the call's process ended with status {status}")
        result = json.loads(self.result.read_text(encoding="utf-8"))
        self.result.unlink()
        self.stacks.unlink()
        if not result["failures"]:
            shutil.rmtree(self.folder, ignore_errors=True)
        return result

    def end(self) -> str:
        """End a running call and all that it started; return its stacks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGQUIT)
            time.sleep(0.5)
        self._kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return self.stacks.read_text(encoding="utf-8")[-1500:] if self.stacks.exists() else ""

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _failed(self, what: str) -> dict:
        return {"trials": 1, "failures": [f"call {self.number}: {what}"], "notes": []}


def results(
    row: Row, numbers: Iterable[int], seed: int, world: object, scratch: Path
) -> Iterator[dict]:
    """Make a row's calls, up to row.jobs at a time; yield each result as the call ends."""
    waiting, running = iter(numbers), []
    try:
        while True:
            while len(running) < row.jobs and (number := next(waiting, None)) is not None:
                running.append(ForkedCall(row, number, seed, world, scratch))
            if not running:
                return
            for forked in list(running):
                if (result := forked.finished()) is not None:
                    running.remove(forked)
                    yield result | {"number": forked.number}
            time.sleep(0.005)
    finally:
        for forked in running:
            forked.end()
