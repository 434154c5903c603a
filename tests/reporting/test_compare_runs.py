"""Runs are compared by one command: flags that differ, last figures, curves."""

import json
from pathlib import Path

import matplotlib.image
import pytest

import compare_runs
import train
from distil.reporting.run_comparison import draw, held_out_table, metrics_of, read_runs


def write_run(folder: Path, flags: dict, lines: list[dict], end: str = "") -> str:
    """Write the two files of a run that are read; end: what follows the last whole line."""
    folder.mkdir()
    (folder / "parameters.json").write_text(json.dumps(flags))
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + end)
    return str(folder)


def line(update: int, **figures: float | None) -> dict:
    return {"update": update, "micro_batches": 2 * update, "epoch": 0, **figures}


def test_two_runs_that_differ_in_a_flag_are_compared(world, tmp_path, capsys):
    for name, temperature in (("cold", 1.0), ("hot", 4.0)):
        changes = {"temperature": temperature, "max_steps": 4, "log_interval": 2, "batch_size": 20}
        train.main(world.flags("gpt2", tmp_path / name, **changes))
    capsys.readouterr()
    picture = tmp_path / "curves.png"
    compare_runs.main([str(tmp_path / "cold"), str(tmp_path / "hot"), "--output", str(picture)])
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in capsys.readouterr().out.splitlines()
    ]
    assert rows[:4] == [["flag", "cold", "hot"], rows[1], ["temperature", "1.0", "4.0"], [""]]
    last = {row[0]: row[1:] for row in rows[4:]}
    assert last["last update"] == ["4", "4"] and {"loss_ce", "loss_clm", "lr"} <= set(last)
    assert matplotlib.image.imread(picture).shape[1] > 1000


def test_runs_of_other_versions_and_metrics_are_compared(tmp_path, capsys):
    """Here one lacks a flag and a metric; a null is no point; a line that is written is skipped."""
    first = write_run(tmp_path / "a", {"seed": 1, "mlm": True}, [line(1, loss=2.0)], '{"update": 2')
    lines = [line(1, loss=3.0, grad_norm=None), line(2, **{"loss": 1.0, "eval/kl": 0.5})]
    second = write_run(tmp_path / "b", {"seed": 1, "mlm": True, "new": "x"}, lines)
    compare_runs.main([first, second, "--output", str(tmp_path / "c.png"), "--x", "epoch"])
    table = capsys.readouterr().out.splitlines()
    assert [row.split() for row in table if row.startswith("| new")] == [
        ["|", "new", "|", "-", "|", "x", "|"]
    ]
    assert not [row for row in table if row.startswith(("| seed", "| mlm"))]
    runs = read_runs([first, second])
    assert metrics_of(runs) == ["loss", "grad_norm", "eval/kl"]
    assert runs[1].curve("grad_norm", "update") == ([], [])
    assert runs[1].curve("loss", "micro_batches") == ([2, 4], [3.0, 1.0])


def test_held_out_figures_of_the_first_weights_are_compared_with_the_last(tmp_path, capsys):
    lines = [line(0, **{"eval/kl": 2.0}), line(1, loss=2.0), line(2, **{"eval/kl": 0.5})]
    new = write_run(tmp_path / "new", {"seed": 1}, lines)
    old = write_run(tmp_path / "old", {"seed": 1}, [line(2, **{"eval/kl": 0.25})])
    compare_runs.main([new, old, "--output", str(tmp_path / "c.png")])
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in capsys.readouterr().out.splitlines()
    ]
    assert ["eval/kl", "0.5", "0.25"] in rows and ["eval/kl, first weights", "2", "-"] in rows
    assert not [row for row in rows if row[0] == "loss, first weights"]
    runs = read_runs([new, old])
    assert held_out_table(runs[0]).splitlines()[-1].split("|")[2:4] == [
        f" {first:13} " if k == 0 else f" {first:4} " for k, first in enumerate(("2", "0.5"))
    ]


def test_equal_flags_are_said_to_be_equal(tmp_path, capsys):
    """The folder's name is no flag that matters; names that need it are shown whole."""
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        flags = {"seed": 1, "dump_path": name}
        paths.append(write_run(tmp_path / name / "run", flags, [line(1, loss=2.0)]))
    compare_runs.main([*paths, "--output", str(tmp_path / "c.png")])
    text = capsys.readouterr().out
    assert text.startswith("No flag differs.") and all(path in text for path in paths)


def test_a_name_with_signs_of_formulas_is_drawn(tmp_path):
    runs = [write_run(tmp_path / f"_{k}$x^$", {}, [line(1, loss=2.0)]) for k in range(2)]
    for run in runs:
        (Path(run) / "parameters.json").write_text('{"seed": 1}')
    draw(read_runs(runs), tmp_path / "c.png", "update")
    assert (tmp_path / "c.png").stat().st_size > 1000


BAD = {
    "no run": (lambda run: (run / "parameters.json").unlink(), "parameters.json: no such file"),
    "old": (lambda run: (run / "metrics.jsonl").unlink(), "older versions did not"),
    "empty": (lambda run: (run / "metrics.jsonl").write_text(""), "has not logged yet"),
    "cut": (lambda run: (run / "metrics.jsonl").write_text('{"up\n'), "is damaged (line 1"),
    "other": (lambda run: (run / "metrics.jsonl").write_text("3\n"), "is damaged (line 1"),
    "bytes": (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), "is damaged ("),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_no_run_is_one_line(name, tmp_path, status_and_errors):
    runs = [write_run(tmp_path / k, {"seed": 1}, [line(1, loss=2.0)]) for k in "ab"]
    damage, expected = BAD[name]
    damage(tmp_path / "b")
    output = tmp_path / "c.png"
    status, errors = status_and_errors(compare_runs.main, [*runs, "--output", str(output)])
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert str(tmp_path / "b") in errors[0] and not output.exists()


def test_one_run_is_nothing_to_compare(tmp_path, status_and_errors):
    run = write_run(tmp_path / "a", {"seed": 1}, [line(1, loss=2.0)])
    for runs in ([run], [run, f"{run}/../a"]):
        status, errors = status_and_errors(compare_runs.main, [*runs, "--output", "c.png"])
        assert status == 2 and len(errors) == 1 and "expected two or more run folders" in errors[0]


def test_the_picture_does_not_overwrite_a_run(tmp_path, status_and_errors):
    runs = [write_run(tmp_path / k, {"seed": 1}, [line(1, loss=2.0)]) for k in "ab"]
    output = f"{runs[0]}/metrics.jsonl"
    status, errors = status_and_errors(compare_runs.main, [*runs, "--output", output])
    assert status == 2 and len(errors) == 1 and "would overwrite" in errors[0]
