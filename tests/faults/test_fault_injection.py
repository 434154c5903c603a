"""A few trials of each row of scripts/fault_injection.py; RELIABILITY.md has the full counts.

Run as a program: a fork must not come from a process in which torch's threads have run.
"""

import json
import sys

import pytest
from conftest import run_process
from faults.mutants import MISTAKES
from faults.plan import PLAN
from stand_ins import ROOT

from fault_injection import Outcome, again_table, details, table


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """Run every row's smoke trials in one program."""
    folder = tmp_path_factory.mktemp("faults")
    command = [
        sys.executable,
        ROOT / "scripts" / "fault_injection.py",
        "--smoke",
        "--state",
        folder / "state.json",
    ]
    done = run_process(
        *command, "--scratch", folder / "scratch", "--output", folder / "table.md", timeout_s=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "table.md").read_text(encoding="utf-8").count("| T") >= 15
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", [row for row in PLAN if row.smoke], ids=lambda row: row.id)
def test_faults_do_no_harm(row, outcomes):
    outcome = outcomes[row.id]
    assert (
        outcome["calls"] == row.smoke and outcome["trials"] >= row.smoke and not outcome["failures"]
    )


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_planted_mistake_has_its_place_in_the_code(mistake):
    """The mistakes themselves are planted in full counts only (T18)."""
    assert (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.text) == 1


def test_a_row_made_again_leaves_the_full_count_and_shows_its_failures():
    full = Outcome(calls=200, trials=200, date="2026-01-01")
    again = Outcome(calls=20, trials=20, failures=["call 7: lost"], date="2026-02-02")
    outcomes = {"T1": full, "T1 again": again}
    assert "| 200 | 0 |" in table(outcomes) and "2026-02-02" not in table(outcomes)
    assert "| T1 | 20 | 1 | 0.05 seen | 2026-02-02, 0, 0 s |" in again_table(outcomes)
    assert "**T1 again**" in details(outcomes) and "- FAILED: call 7: lost" in details(outcomes)


def test_an_interrupted_row_makes_the_calls_that_later_ones_had_overtaken():
    outcome = Outcome()
    for number in (0, 2, 4):
        outcome.add({"number": number, "trials": 1, "failures": [], "notes": []})
    assert outcome.numbers_left(6) == [1, 3, 5] and outcome.calls == 3
    outcome.add({"number": 3, "trials": 1, "failures": [], "notes": []})
    assert outcome.numbers_left(6) == [1, 5]
