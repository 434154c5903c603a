"""What a run logs: metrics.jsonl, event files, the console and log files."""

import io
import json
import logging
import math
import os
import sys

import pytest
from stand_ins import logged
from tqdm import tqdm
from whole_runs import read_metrics

import train
import utils
from distil.training.log import Log, Place, cut_log
from distil.training.reports import describe_update

COUNTERS = ["update", "micro_batches", "epoch"]


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def followed(world, tmp_path_factory):
    """Run with held-out text on a terminal: (run folder, what the terminal got)."""
    folder, terminal = tmp_path_factory.mktemp("followed") / "run", Terminal()
    changes = {"max_steps": 7, "log_interval": 4, "eval_data_file": world.data("bert")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(utils.logger, "handlers", [])
        patch.setattr(utils.logger, "propagate", False)
        flags = world.flags("bert", folder, **changes, eval_interval=4, batch_size=20)
        train.main(flags)
    return folder, terminal.getvalue()


def test_metrics_hold_every_term_at_each_log_and_the_held_out_figures(followed):
    lines = read_metrics(followed[0])
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval/kl" in line]
    terms = ["loss", "loss_ce", "loss_mlm", "loss_cos", "lr", "grad_norm", "tokens_per_s"]
    assert all(list(line) == [*COUNTERS, *terms] for line in trained)
    assert [line["update"] for line in trained] == [2, 4, 6, 7]
    assert [line["micro_batches"] for line in trained] == [4, 8, 12, 14]
    assert [line["update"] for line in evaluated] == [0, 4, 7]
    assert {"eval/kl", "eval/loss", "eval/accuracy"} <= set(evaluated[0])
    assert len(lines) == len(trained) + len(evaluated)
    assert [line["epoch"] for line in trained] == [0, 0, 0, 1]
    for line in trained:
        total = 5 * line["loss_ce"] + 2 * line["loss_mlm"] + line["loss_cos"]
        assert line["loss"] == pytest.approx(total, rel=1e-12)


def test_metrics_and_event_files_agree(followed):
    points = {(tag, x): float(value[1:-1]) for tag, x, value in logged(followed[0]) if x}
    lines = [line for line in read_metrics(followed[0]) if "loss" in line]
    tags = {"losses/loss_ce": "loss_ce", "learning_rate/lr": "lr", "global/grad_norm": "grad_norm"}
    for line in lines:
        for tag, key in tags.items():
            assert points[tag, line["micro_batches"]] == pytest.approx(line[key], rel=1e-6)


def test_each_log_is_a_console_line_with_the_terms(followed):
    text = followed[1]
    for line in (line for line in read_metrics(followed[0]) if "loss" in line):
        terms = ", ".join(f"{name} {line[f'loss_{name}']:.4f}" for name in ("ce", "mlm", "cos"))
        start = f"Update {line['update']} of 7, epoch {line['epoch']}: loss {line['loss']:.4f}"
        assert f"{start} ({terms}), lr {line['lr']:.3g}, gradient norm" in text


def test_nothing_is_written_over_the_bar(followed):
    """On the terminal, lines of the log stand alone, before, within and after the bar."""
    shown = [overwritten(line) for line in followed[1].split("\n")]
    bars = [line for line in shown if line.startswith("epoch ")]
    lines = [line for line in shown if " INFO " in line or " WARNING " in line]
    assert bars and len(lines) > 10
    assert not [line for line in lines if "tok/s" in line and "Update" not in line]
    assert not [line for line in lines if not line[:4].isdigit() or "█" in line]
    assert set(shown) == {*bars, *lines, ""}


def overwritten(line: str) -> str:
    """Return what a terminal's line shows after its carriage returns."""
    shown = ""
    for part in line.replace("\x1b[A", "").split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def test_in_a_file_a_bar_is_lines_of_the_log(capsys, caplog):
    caplog.set_level(logging.INFO, logger="distil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.logger, "propagate", True)
        with tqdm(total=3, desc="work", **utils.bar_options(line_s=0)) as bar:
            for _ in range(3):
                bar.update()
    assert "\r" not in caplog.text and not capsys.readouterr().err.count("\r")
    assert [line for line in caplog.messages if line.startswith("work: 100%")]


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    log = Log(tmp_path, "0123")
    log.add_figures({"losses/loss": 1.5, "global/grad_norm": math.inf}, Place(3, 6, 1, 6))
    log.close()
    log.release()
    counters = dict(zip(COUNTERS, (3, 6, 1), strict=True))
    assert read_metrics(tmp_path) == [{**counters, "loss": 1.5, "grad_norm": None}]
    assert "global/grad_norm" not in {tag for tag, _, _ in logged(tmp_path)}


@pytest.mark.parametrize("is_old", [False, True])
def test_a_resumed_run_cuts_every_file_of_its_log(is_old, tmp_path):
    """Older checkpoints name files of log/train without their folder, and have no metrics."""
    names = [f"log/{name}/events.out.tfevents.1" for name in ("train", "parameters")]
    names += ["metrics.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"before after")
    sizes = {"events.out.tfevents.1": 6} if is_old else dict.fromkeys(names, 6)
    late = tmp_path / "log" / "parameters" / "events.out.tfevents.2.distil-0123"
    late.write_bytes(b"after")
    cut_log(tmp_path, sizes, "0123")
    left = [b"before", b"before", b"" if is_old else b"before"]
    assert [(tmp_path / name).read_bytes() for name in names] == left and not late.exists()


def test_a_resumed_run_cuts_and_deletes_no_other_file(tmp_path):
    run, elsewhere, backup = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "backup"
    (run / "log" / "train").mkdir(parents=True)
    name = "log/train/events.out.tfevents.1.distil-0123"
    link = "log/train/events.out.tfevents.2.distil-0123"
    elsewhere.write_bytes(b"before after")
    (run / link).symlink_to(elsewhere)
    (run / name).write_bytes(b"before after")
    os.link(run / name, backup)  # as `cp -al` makes a copy of the run
    others = [run / f"log/train/events.out.tfevents.3{end}" for end in ("", ".distil-9999")]
    for path in others:
        path.write_bytes(b"another program's")
    cut_log(run, {name: 6, link: 6}, "0123")
    assert (run / name).read_bytes() == b"before" and (run / link).is_symlink()
    assert elsewhere.read_bytes() == backup.read_bytes() == b"before after"
    assert all(path.read_bytes() == b"another program's" for path in others)


def test_without_tensorboard_there_are_metrics_alone(world, tmp_path):
    flags = world.flags("gpt2", tmp_path / "run", max_steps=2, batch_size=20)
    train.main([*flags, "--report_to"])
    assert not (tmp_path / "run" / "log").exists() and len(read_metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 5, None, 1), "An update: 1 micro-batch of 5 sequences, 5 in all."),
        ((50, 5, None, 1), "An update: 50 micro-batches of 5 sequences, 250 in all."),
        (
            (50, 5, None, 4),
            "An update: 4 processes x 50 micro-batches of 5 sequences, 1,000 in all; one process"
            " alone: 250. Divide --gradient_accumulation_steps by 4 to keep that.",
        ),
        (
            (2, 5, 4000, 1),
            "An update: 2 micro-batches of up to 4,000 padded tokens, 8,000 in all.",
        ),
    ],
)
def test_the_size_of_an_update_is_said(sizes, expected):
    assert describe_update(*sizes) == expected


def test_the_help_says_what_intervals_count(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--log_interval", "--checkpoint_interval"):
        said = text.split(f"{flag} INT ")[-1]
        assert said.startswith("micro-batches of one process, not updates"), said[:80]


def test_metrics_are_strict_json(followed):
    for line in (followed[0] / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
