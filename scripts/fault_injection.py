"""Run the reliability trials: faults injected into real runs, and what became of them, as a table
with bounds.

Each row of PLAN is one kind of fault. A trial is one function call in a process of its own, forked
from a parent that has imported everything, with a seed of its own: `--only T2 --first 17 --trials
1` repeats trial 17 of T2 exactly. Results are kept in a file as they come, so that an interrupted
run goes on where it was (`--state`).
"""

import argparse
import contextlib
import dataclasses
import datetime
import faulthandler
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from distil.system.files import atomic_path  # noqa: E402
from utils import InputError, OneLineParser, keyed_seed, one_line, run_program  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of fault: what is injected, the figure to be reached, the best known elsewhere, and
    who tries it.

    trial: "module:function" under tests/; called with a Bench. smoke, full: numbers of calls. jobs:
    calls at one time.
    limit_s: a call that takes longer has hung. is_sampled: trials are drawn at random, so that
    their number bounds a rate; else they are cases chosen by hand.
    """

    id: str
    injected: str
    figure: str
    elsewhere: str
    trial: str
    smoke: int
    full: int
    jobs: int = 2
    limit_s: float = 120
    is_sampled: bool = True


PLAN = [
    Row(
        "T1",
        "SIGKILL at random moments, 3 and more a run, started again; 1 to 3 ranks, masked and"
        " causal, accumulation 1 and 4, over an epoch's end",
        "200 of 200 digests and logs equal the undisturbed run's",
        "Composer: 12 planned stops",
        "faults.runs:killed_at_random",
        4,
        200,
        limit_s=300,
    ),
    Row(
        "T2",
        "SIGKILL inside a save",
        "1000 of 1000 loadable, never more than one interval lost",
        "the 2019 program: 59 of 100 unreadable",
        "faults.runs:killed_in_a_save",
        20,
        1000,
    ),
    Row(
        "T3",
        "every system call of a save: killed, EIO, ENOSPC",
        "all points safe, their number printed",
        "none in the field (RocksDB, SQLite do it)",
        "faults.saves:system_call_fails",
        1,
        1,
        jobs=1,
        limit_s=900,
        is_sampled=False,
    ),
    Row(
        "T4",
        "order of write, fsync, rename in one save",
        "0 violations",
        "torch's distributed checkpoint: 2",
        "faults.saves:order_of_calls",
        1,
        3,
        jobs=1,
        is_sampled=False,
    ),
    Row(
        "T5",
        "bit flips, truncation, zeroed and swapped blocks, a file of another run: token file,"
        " counts, checkpoint files",
        "0 silent of 6000 and more; the message names the file",
        "850-999 of 1000 silent",
        "faults.files:damaged",
        8,
        240,
    ),
    Row(
        "T6",
        "newest of 3 checkpoints damaged; all damaged",
        "100 of 100 resume from the one before; all damaged: exit 2",
        "open request in transformers",
        "faults.saves:newest_is_damaged",
        6,
        100,
    ),
    Row(
        "T7",
        "disk full (6 MB tmpfs), read-only folder",
        "old checkpoint intact, error with path, no .tmp left over",
        '"unexpected pos 704 vs 598"',
        "faults.saves:disk_full",
        2,
        20,
    ),
    Row(
        "T8",
        "SIGTERM to launcher, one rank, all; during a save; twice",
        "100 of 100: agreed step saved, exit 143, resume bit-identical",
        "OLMo: agreed every 25 steps",
        "faults.runs:terminated",
        4,
        100,
        limit_s=300,
    ),
    Row(
        "T9",
        "kill -9 of a random rank, up to 3 times, --max-restarts 3; a rank calling os._exit(0)",
        "50 of 50 recovered, 0 hangs, same digest",
        "torchrun's default 9 of 17",
        "faults.ranks:killed_rank",
        1,
        50,
        jobs=1,
        limit_s=400,
    ),
    Row(
        "T10",
        "T9 with --force among the arguments",
        "0 checkpoints lost",
        "the 2019 program loses all",
        "faults.ranks:killed_rank_with_force",
        0,
        10,
        jobs=1,
        limit_s=400,
    ),
    Row(
        "T11",
        "one rank stopped (SIGSTOP)",
        "ends non-zero within timeout + 40 s, rank named",
        "30 min",
        "faults.ranks:stopped_rank",
        0,
        6,
        jobs=3,
        limit_s=300,
    ),
    Row(
        "T12",
        "NaN and Inf in teacher logits, one loss term, one rank's gradient, initial weights",
        "100 of 100 stop before the update, exit != 0, weights unchanged, nothing non-finite saved",
        "exit 0",
        "faults.runs:not_finite",
        6,
        100,
        limit_s=200,
    ),
    Row(
        "T14",
        "hypothesis over n, world, batch size, grouping, seed, epoch, position",
        "2000 examples: each sequence once an epoch, no rank waits, other order each epoch, rest"
        " after resume in order",
        "others sort before comparing",
        "faults.inputs:plans",
        1,
        20,
    ),
    Row(
        "T15",
        "world size changed on resume (2 -> 1, 1 -> 2) at equal A x W",
        "same micro-batches, masks and dropout; loss within 1e-5; else a one-line refusal",
        "torchtitan refuses",
        "faults.runs:other_world_size",
        1,
        12,
        limit_s=300,
    ),
    Row(
        "T16",
        "2 nodes x 2 ranks on loopback; one agent killed",
        "digest = 1 node x 4; survivor ends within the timeout",
        "real clusters only",
        "faults.ranks:two_nodes",
        0,
        4,
        jobs=1,
        limit_s=600,
    ),
    Row(
        "T18",
        "20 planted mistakes against the tests that guard them",
        "20 of 20 caught",
        "TrainCheck 18 of 20",
        "faults.mutants:planted_mistake",
        0,
        20,
        limit_s=900,
        is_sampled=False,
    ),
    Row(
        "T19",
        "60 malicious files x each entry point",
        "0 executed",
        "4-5 payloads tested",
        "faults.malicious:malicious",
        3,
        60,
        limit_s=300,
        is_sampled=False,
    ),
    Row(
        "T20",
        "mutated pickles, stores, checkpoints",
        "100,000: 0 crashes or hangs",
        "safetensors 38.4 M",
        "faults.files:mutated",
        2,
        200,
        limit_s=600,
    ),
    Row(
        "T21",
        "--force on 30 targets (/, ~, ., link/, a folder holding the data, a foreign folder, ..)",
        "0 foreign files lost",
        "a guard in one project",
        "faults.inputs:forced",
        6,
        30,
        is_sampled=False,
    ),
    Row(
        "T22",
        "corpora by hypothesis: empty, BOM, CRLF, NUL, invalid UTF-8, 10 MB line, only unknown, all"
        " too short",
        "5000: fine, or exit 2 with file:line; no traceback",
        "traceback",
        "faults.inputs:corpora",
        1,
        100,
        limit_s=600,
    ),
    Row(
        "T23",
        "40 mismatches: vocabulary, width, positions, missing special token, counts of another"
        " tokenizer, missing, extra, NaN student weights",
        "40 of 40 refused before the first step, both values named",
        "bare asserts",
        "faults.programs:mismatched",
        6,
        40,
        is_sampled=False,
    ),
    Row(
        "T24",
        "arguments and environment by hypothesis",
        "2000: no traceback, no hang > 10 s",
        "none",
        "faults.inputs:arguments",
        1,
        40,
        limit_s=600,
    ),
    Row(
        "T26",
        "preprocessing killed and rerun",
        "nothing partial under a final name; rerun byte-identical",
        "none",
        "faults.programs:preprocessing_killed",
        2,
        100,
        limit_s=300,
    ),
]


@dataclasses.dataclass
class Bench:
    """What a trial is given.

    number: of the call; rng: its own random numbers; folder: its own empty folder; world: tiny
    teachers with data, counts and first weights (tests/stand_ins.World).
    """

    number: int
    rng: random.Random
    folder: Path
    world: object
    num_trials: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, num: int = 1) -> None:
        """Say that this call made `num` more trials. A call that never says so made one."""
        self.num_trials += num

    def fail(self, what: str) -> None:
        """Record a failure and go on; an exception is one, too, and ends the call."""
        self.failures.append(f"call {self.number}: {what}")

    def note(self, what: str) -> None:
        """Record a fact for the table; the same fact of several calls is printed once."""
        self.notes.append(what)


@dataclasses.dataclass
class Outcome:
    """What became of a row's calls so far."""

    calls: int = 0
    trials: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    elapsed_s: float = 0.0
    seed: int = 0
    date: str = ""

    def add(self, result: dict) -> None:
        """Take in the result of one call."""
        self.calls += 1
        self.trials += result["trials"]
        self.failures += result["failures"]
        for note in result["notes"]:
            self.notes[note] = self.notes.get(note, 0) + 1


# --------------------------------------------------------------------------------------------------
# Calls, each in a process of its own
# --------------------------------------------------------------------------------------------------


def call(row: Row, number: int, seed: int, world: object, folder: Path) -> dict:
    """Call a row's trial once, in this process."""
    bench = Bench(number, random.Random(keyed_seed(seed, row.id, number)), folder, world)
    try:
        trial_of(row)(bench)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        bench.fail(f"{type(error).__name__}: {one_line(error, 300)} ({place})")
    return {"trials": bench.num_trials or 1, "failures": bench.failures, "notes": bench.notes}


def trial_of(row: Row) -> Callable[[Bench], None]:
    """Find the function that a row names."""
    module, name = row.trial.split(":")
    return getattr(importlib.import_module(module), name)


class ForkedCall:
    """One call in a forked process, with everything that it starts in a process group of its
    own.
    """

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
            # Where a call hangs, it and what it forked say where they stand.
            stacks = open(self.stacks, "a")  # noqa: SIM115
            faulthandler.register(signal.SIGUSR2, stacks, all_threads=False)
            result = call(self.row, self.number, seed, world, self.folder)
            self.result.write_text(json.dumps(result), encoding="utf-8")
            status = 0
        finally:
            os._exit(status)

    def finished(self) -> dict | None:
        """Return the result; None while there is none. Ends a call that has hung."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done and time.monotonic() < self.deadline:
            return None
        if not done:
            return self._failed(f"hung for more than {self.row.limit_s:g} s: {self.end()}")
        self._kill()  # what it left running
        if status or not self.result.exists():
            return self._failed(f"the call's own process ended with status {status}")
        result = json.loads(self.result.read_text(encoding="utf-8"))
        self.result.unlink()
        self.stacks.unlink()
        if not result["failures"]:
            shutil.rmtree(self.folder, ignore_errors=True)
        return result

    def end(self) -> str:
        """End a call that runs, and all that it started; return where it stood."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGUSR2)
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
    """Make a row's calls, up to row.jobs at a time; yield what became of each as it ends."""
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
                    yield result
            time.sleep(0.005)
    finally:
        for forked in running:
            forked.end()


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def bound(row: Row, outcome: Outcome) -> str:
    """Bound the rate of failures at 95 %: 3 / n after none in n trials (rule of three); else what
    was seen.
    """
    if not row.is_sampled:
        return "chosen cases"
    if not outcome.failures:
        return f"<= {min(3 / outcome.trials, 1):.2g}"
    return f"{len(outcome.failures) / outcome.trials:.2g} seen"


def table(outcomes: dict[str, Outcome]) -> str:
    """Lay the outcomes out as Markdown."""
    lines = [
        (
            "| id | injected | figure to reach | trials | failures | failure rate (95 %) | best"
            " elsewhere | date, seed, time |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in PLAN:
        if row.id in outcomes and outcomes[row.id].trials:
            out = outcomes[row.id]
            lines.append(
                f"| {row.id} | {row.injected} | {row.figure} | {out.trials:,} | {len(out.failures)}"
                f" | {bound(row, out)} | {row.elsewhere} | {out.date}, {out.seed},"
                f" {out.elapsed_s:,.0f} s |"
            )
    return "\n".join(lines) + "\n"


def details(outcomes: dict[str, Outcome]) -> str:
    """List the notes and the failures of each row."""
    lines = []
    for row in PLAN:
        out = outcomes.get(row.id)
        if out and (out.notes or out.failures):
            lines += [f"**{row.id}**", ""]
            lines += [
                f"- {note}{f' ({count} calls)' if count > 1 else ''}"
                for note, count in sorted(out.notes.items())
            ]
            lines += [f"- FAILED: {failure}" for failure in out.failures[:20]]
            lines += (
                [f"- and {len(out.failures) - 20} failures more"] if len(out.failures) > 20 else []
            )
            lines.append("")
    return "\n".join(lines)


def versions() -> str:
    """Name what the trials ran on."""
    import numpy
    import torch
    import transformers

    return (
        f"python {platform.python_version()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, numpy {numpy.__version__}, {platform.system()}"
        f" {platform.release()}, {os.cpu_count()} cores"
    )


class State:
    """Outcomes kept in a file, written after every few seconds of calls."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.outcomes = {name: Outcome(**values) for name, values in content.items()}

    def save(self) -> None:
        """Write the file, atomically."""
        with atomic_path(self.path) as temporary:
            content = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def run_row(row: Row, total: int, seed: int, world: object, scratch: Path, state: State) -> Outcome:
    """Make the calls that a row lacks of `total`."""
    outcome = state.outcomes.setdefault(row.id, Outcome(seed=seed))
    numbers = range(outcome.calls, total)
    before, started = outcome.elapsed_s, time.monotonic()
    saved = started
    for result in results(row, numbers, seed, world, scratch):
        outcome.add(result)
        now = time.monotonic()
        outcome.elapsed_s, outcome.date = before + now - started, f"{datetime.date.today()}"
        for failure in result["failures"][:3]:
            print(f"{row.id} FAILED {failure}", file=sys.stderr, flush=True)
        if now - saved > 5:
            state.save()
            saved = now
    state.save()
    return outcome


def make_world(folder: Path, rows: Sequence[Row]):
    """Make the stand-ins, and import what the trials need, once for all."""
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # nor does the tokenizers': where the surroundings say "true", it waits
    )
    # tqdm's own lock is one for all forked processes: one that is killed while it draws would stop
    # all others for ever.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    import stand_ins

    text = folder / "dump.txt"
    text.write_text("\n".join(stand_ins.make_lines(240)) + "\n", encoding="utf-8")
    for name in ("teachers", "world"):
        (folder / name).mkdir()
    world = stand_ins.World(
        folder / "world", stand_ins.make_teachers(folder / "teachers", text), text
    )
    for row in rows:
        trial_of(row)
    return world


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ID", help="rows to run (default: all)")
    parser.add_argument("--smoke", action="store_true", help="the few calls that the tests make")
    parser.add_argument(
        "--trials", type=int, metavar="N", help="calls a row, in place of the plan's"
    )
    parser.add_argument(
        "--first", type=int, metavar="K", help="repeat from call K on, keeping no record"
    )
    parser.add_argument("--seed", type=int, default=56, help="seed of all trials (default: 56)")
    parser.add_argument(
        "--state",
        default="fault_injection.json",
        metavar="FILE",
        help="results so far (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch", metavar="FOLDER", help="where trials work; a failed one's folder stays there"
    )
    parser.add_argument("--output", metavar="FILE", help="Markdown file that receives the table")
    return parser


def chosen_rows(names: Sequence[str] | None) -> list[Row]:
    """Find the rows by their ids. Raises InputError."""
    known = [row.id for row in PLAN]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise InputError(f"--only {unknown[0]}: no such row; expected some of {', '.join(known)}")
    return [row for row in PLAN if not names or row.id in names]


def repeat(row: Row, arguments: argparse.Namespace, world: object, scratch: Path) -> None:
    """Make some calls again, with all that they print."""
    for number in range(arguments.first, arguments.first + (arguments.trials or 1)):
        folder = scratch / f"{row.id}-{number}"
        folder.mkdir()
        print(row.id, number, call(row, number, arguments.seed, world, folder))


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    arguments = make_parser().parse_args(argv)
    rows = chosen_rows(arguments.only)
    if arguments.scratch:
        Path(arguments.scratch).mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="faults-", dir=arguments.scratch))
    world = make_world(scratch, rows)
    if arguments.first is not None:
        for row in rows:
            repeat(row, arguments, world, scratch)
        return
    state = State(Path(arguments.state))
    for row in rows:
        total = arguments.trials or (row.smoke if arguments.smoke else row.full)
        outcome = run_row(row, total, arguments.seed, world, scratch, state)
        print(
            f"{row.id}: {outcome.trials:,} trials, {len(outcome.failures)} failures,"
            f" {outcome.elapsed_s:.0f} s",
            flush=True,
        )
        if arguments.output:
            write_report(Path(arguments.output), state.outcomes)
    print(table(state.outcomes))
    if not any(state.outcomes[row.id].failures for row in rows):
        shutil.rmtree(scratch)
    else:
        print(f"What failed is in {scratch}.")


def write_report(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Put the table and the details between the marks of a Markdown file, or into a new one."""
    begin, end = "<!-- table: made by scripts/fault_injection.py -->", "<!-- end of table -->"
    text = (
        path.read_text(encoding="utf-8") if path.exists() else f"# Reliability\n\n{begin}\n{end}\n"
    )
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    body = f"{begin}\n\n{versions()}\n\n{table(outcomes)}\n{details(outcomes)}\n{end}"
    with atomic_path(path) as temporary:
        temporary.write_text(head + body + tail, encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
