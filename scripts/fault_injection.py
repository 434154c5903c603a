"""Inject faults into real runs, and tabulate the outcomes with bounds on the failure rates.

Each row of PLAN (tests/faults/plan.py) is one kind of fault. A trial is one function call in a
process forked from a parent that has imported everything, with a seed from its number: `--only T2
--first 17 --trials 1` repeats trial 17 of T2 exactly. Results are saved as they come, and an
interrupted run continues from them (`--state`). `--again` makes a tenth of the calls on later code,
and leaves the full counts as they are.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
sys.path.insert(1, os.path.join(sys.path[0], "tests"))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import dataclasses
import datetime
import json
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from faults.bench import call, results, trial_of
from faults.plan import PLAN, Row
from tqdm import tqdm

from distil.system.files import atomic_path
from utils import InputError, OneLineParser, run_program

AGAIN = " again"  # after a row's id: its outcome in the table of --again


@dataclasses.dataclass
class Outcome:
    """The sum of a row's results so far.

    pending: numbers of calls that had not ended when later ones had; an interrupted run makes them.
    """

    calls: int = 0
    trials: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    elapsed_s: float = 0.0
    seed: int = 0
    date: str = ""
    pending: list[int] = dataclasses.field(default_factory=list)

    def numbers_left(self, total: int) -> list[int]:
        """Return the numbers of the calls that are still to be made."""
        return [*self.pending, *range(self.calls + len(self.pending), total)]

    def add(self, result: dict) -> None:
        """Add the result of one call."""
        left = self.numbers_left(result["number"] + 1)
        self.pending = [number for number in left if number != result["number"]]
        self.calls += 1
        self.trials += result["trials"]
        self.failures += result["failures"]
        for note in result["notes"]:
            self.notes[note] = self.notes.get(note, 0) + 1


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def bound(row: Row, outcome: Outcome) -> str:
    """Bound the failure rate at 95 %: 3 / n where none of n fail (rule of three), else the rate."""
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


def again_table(outcomes: dict[str, Outcome]) -> str:
    """Lay out the outcomes of --again, "" where there are none."""
    lines = [
        "Again on later code, the newest run of each row, by default a tenth of its calls:",
        "",
        "| id | trials | failures | failure rate (95 %) | date, seed, time |",
        "|---|---|---|---|---|",
    ]
    found = [(row, outcomes[row.id + AGAIN]) for row in PLAN if row.id + AGAIN in outcomes]
    lines += [
        f"| {row.id} | {out.trials:,} | {len(out.failures)} | {bound(row, out)} | {out.date},"
        f" {out.seed}, {out.elapsed_s:,.0f} s |"
        for row, out in found
        if out.trials
    ]
    return "\n".join(lines) + "\n\n" if found else ""


def details(outcomes: dict[str, Outcome]) -> str:
    """List the notes and the failures of each row."""
    lines = []
    for name in (row.id + ending for row in PLAN for ending in ("", AGAIN)):
        out = outcomes.get(name)
        if out and (out.notes or out.failures):
            lines += [f"**{name}**", ""]
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
    """Name the versions and the machine of the trials."""
    import numpy
    import torch
    import transformers

    return (
        f"python {platform.python_version()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, numpy {numpy.__version__}, {platform.system()}"
        f" {platform.release()}, {os.cpu_count()} cores"
    )


class State:
    """Outcomes kept in a file, which is written every few seconds."""

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


def run_row(
    row: Row, name: str, total: int, seed: int, world: object, scratch: Path, state: State
) -> Outcome:
    """Make the remaining calls of a row, up to `total`, recorded under a name."""
    outcome = state.outcomes.setdefault(name, Outcome(seed=seed))
    numbers = outcome.numbers_left(total)
    before, started = outcome.elapsed_s, time.monotonic()
    saved = started
    try:
        for result in results(row, numbers, seed, world, scratch):
            outcome.add(result)
            now = time.monotonic()
            outcome.elapsed_s, outcome.date = before + now - started, f"{datetime.date.today()}"
            for failure in result["failures"][:3]:
                print(f"{row.id} FAILED {failure}", file=sys.stderr, flush=True)
            if now - saved > 5:
                state.save()
                saved = now
    finally:
        state.save()
    return outcome


def make_world(folder: Path, rows: Sequence[Row]):
    """Make the stand-ins and import the rows' trials, once for all forks."""
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    # Nor does the pool of the tokenizers library: with "true" a fork would wait for it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # tqdm shares one lock among forked processes: one killed while it draws would block all others.
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
        "--again",
        action="store_true",
        help="begin a tenth of the calls anew, in a table of their own: for later code",
    )
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
    """Select the rows by their ids. Raises InputError."""
    known = [row.id for row in PLAN]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise InputError(f"--only {unknown[0]}: no such row; expected some of {', '.join(known)}")
    return [row for row in PLAN if not names or row.id in names]


def repeat(row: Row, arguments: argparse.Namespace, world: object, scratch: Path) -> None:
    """Make some calls again in this process, and print their results."""
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
    ending, share = (AGAIN, 10) if arguments.again else ("", 1)
    for row in rows:
        total = arguments.trials or (row.smoke if arguments.smoke else -(-row.full // share))
        if arguments.again:
            state.outcomes.pop(row.id + ending, None)
        outcome = run_row(row, row.id + ending, total, arguments.seed, world, scratch, state)
        print(
            f"{row.id}: {outcome.trials:,} trials, {len(outcome.failures)} failures,"
            f" {outcome.elapsed_s:.0f} s",
            flush=True,
        )
        if arguments.output:
            write_report(Path(arguments.output), state.outcomes)
    print(table(state.outcomes))
    if not any(state.outcomes[row.id + ending].failures for row in rows):
        shutil.rmtree(scratch)
    else:
        print(f"The folders of failed calls are in {scratch}.")


def write_report(path: Path, outcomes: dict[str, Outcome]) -> None:
    """Write the table and the details between the marks of a Markdown file, or to a new file."""
    begin, end = "<!-- table: made by scripts/fault_injection.py -->", "<!-- end of table -->"
    text = (
        path.read_text(encoding="utf-8") if path.exists() else f"# Reliability\n\n{begin}\n{end}\n"
    )
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    tables = f"{table(outcomes)}\n{again_table(outcomes)}"
    body = f"{begin}\n\n{versions()}\n\n{tables}{details(outcomes)}\n{end}"
    with atomic_path(path) as temporary:
        temporary.write_text(head + body + tail, encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
