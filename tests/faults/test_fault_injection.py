"""A few trials of each row of scripts/fault_injection.py; RELIABILITY.md has the full counts.

Run as a program: a fork must not come from a process in which torch's threads have run.
"""

import json
import sys

import pytest
from conftest import run_process
from faults.plan import PLAN
from stand_ins import ROOT


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
