"""The reliability trials of scripts/torture.py, a few of each: the full counts are in benchmarks/RELIABILITY.md."""

import pytest

import torture


@pytest.mark.parametrize("row", torture.PLAN, ids=lambda row: row.id)
def test_faults_do_no_harm(row, world, tmp_path):
    outcome = torture.Outcome()
    for result in torture.results(row, range(row.smoke), 56, world, tmp_path):
        outcome.add(result)
    assert outcome.trials >= row.smoke and not outcome.failures
