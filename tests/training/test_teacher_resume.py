"""train_teacher.py: a training that was killed or stopped goes on bit for bit; held-out figures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import run_process
from stand_ins import ROOT, make_lines
from whole_runs import as_words, dying_at, read_metrics, stop_after

import binarized_data
import evaluate_lm
import train
import train_teacher
from distil.training import checkpointing


@pytest.fixture(scope="module")
def held_out(world, tmp_path_factory) -> Path:
    """Write text that no training sees as token files, by kind of teacher."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "text").write_text("\n".join(make_lines(300)[240:]) + "\n", encoding="utf-8")
    for teacher in world.teachers.values():
        flags = {"file_path": folder / "text", "dump_file": folder / "ids", "num_workers": 1}
        flags |= {"tokenizer_type": "auto", "tokenizer_name": teacher}
        binarized_data.main(as_words(flags))
    return folder


def flags_of(world, held_out: Path, kind: str, output: Path, **changes: object) -> list[str]:
    """List flags that train a tiny teacher for 12 updates; None leaves a flag out."""
    teacher = world.teachers["gpt2" if kind == "causal" else "bert"]
    flags = {"output_dir": output, "num_steps": 12, "checkpoint_interval": 3}
    flags |= {"eval_data_file": held_out / f"ids.{teacher.name}.pickle", "eval_interval": 4}
    flags |= {"data_file": world.data("gpt2" if kind == "causal" else "bert")}
    if kind == "from a configuration":
        flags |= {"config": teacher / "config.json", "tokenizer_name": teacher}
    else:
        flags |= {"weights": teacher}
    given = {name: value for name, value in (flags | changes).items() if value is not None}
    return as_words(given) + {"the head": ["--train_head_only", "--bf16"]}.get(kind, [])


def assert_same_training(one: Path, two: Path) -> None:
    """Check that two trainings have bit-equal weights, moments, counters, curves and figures."""
    for name in ("model.safetensors", "curve.json", "training/best/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    found = [checkpointing.newest(folder / "training" / "checkpoints") for folder in (one, two)]
    assert found[0].step == found[1].step == len(json.loads((one / "curve.json").read_text()))
    for file in ("student", "optimizer"):
        tensors = [point.tensors(file) for point in found]
        assert tensors[0].keys() == tensors[1].keys() and tensors[0]
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    states = [{**point.state, "log_bytes": 0, "flags": 0} for point in found]
    assert states[0] == states[1]
    metrics = [read_metrics(folder / "training") for folder in (one, two)]
    for line in metrics[0] + metrics[1]:
        line.pop("tokens_per_s", None)
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("kind", ["from a configuration", "the head", "causal"])
def test_a_training_killed_and_stopped_goes_on_bit_for_bit(
    kind, world, held_out, tmp_path, monkeypatch
):
    """It dies in its second save, is stopped in its fifth update, and dies in two evaluations."""
    train_teacher.main(flags_of(world, held_out, kind, tmp_path / "whole"))
    flags = [*flags_of(world, held_out, kind, tmp_path / "cut"), "--resume", "auto"]
    for place, call in (("save_checkpoint", 2), (None, 5), ("keep_figures", 1), ("save_best", 2)):
        with monkeypatch.context() as patch:
            if place is None:
                stop_after(patch, call)
            else:
                patch.setattr(
                    train.RunFolder, place, dying_at(getattr(train.RunFolder, place), call)
                )
            with pytest.raises((KeyboardInterrupt, SystemExit)) as end:
                train_teacher.main(flags)
        assert place is not None or end.value.code == 143
        assert not (tmp_path / "cut" / "model.safetensors").exists()
    train_teacher.main(flags)
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_process_killed_at_any_moment_goes_on_bit_for_bit(world, held_out, tmp_path):
    kind, more = "from a configuration", {"num_steps": 60, "eval_interval": 10}
    train_teacher.main(flags_of(world, held_out, kind, tmp_path / "whole", **more))
    flags = flags_of(world, held_out, kind, tmp_path / "cut", **more)
    command = [sys.executable, ROOT / "scripts" / "train_teacher.py", *flags, "--resume", "auto"]
    for step in (0, 9, 30, 45):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not (tmp_path / f"cut/training/checkpoints/step-{step:08d}").exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert run_process(*command, cwd=tmp_path, timeout_s=120).returncode == 0
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="module")
def stopped(world, held_out, tmp_path_factory) -> Path:
    """A training of a head stopped after five updates of twelve, to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5, signal.SIGINT)
        with pytest.raises(SystemExit) as end:
            train_teacher.main(flags_of(world, held_out, "the head", folder))
    assert end.value.code == 130
    return folder


REFUSED = {
    "updates": ({"num_steps": 9}, [], "--num_steps 9: .* was made with 12; pass that, or start"),
    "rate": ({"learning_rate": 1e-3}, [], r"--learning_rate 0\.001: .* was made with 0\.0007"),
    "seed": ({"seed": 3}, [], "--seed 3: .* was made with 56"),
    "all weights": ({}, ["--train_head_only"], "--train_head_only: no, .* was made with yes"),
    "precision": ({}, ["--bf16"], "--bf16 False: .* was made with True"),
    "other weights": ({"weights": "OTHER"}, [], "--weights .*OTHER: its digest is .* made with"),
    "other data": ({"data_file": "HELD"}, [], "--data_file .*: its digest is .* was made with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_teacher_is_refused_on_resuming(
    name, world, held_out, stopped, tmp_path, status_and_errors
):
    changes, without, expected = REFUSED[name]
    output = Path(shutil.copytree(stopped, tmp_path / "teacher"))
    if "weights" in changes:
        other = transformers.AutoModelForMaskedLM.from_pretrained(world.teachers["bert"])
        torch.nn.init.normal_(other.get_input_embeddings().weight)
        other.save_pretrained(tmp_path / "OTHER")
        tokenizer = transformers.AutoTokenizer.from_pretrained(world.teachers["bert"])
        tokenizer.save_pretrained(tmp_path / "OTHER")
        changes = {"weights": tmp_path / "OTHER"}
    if "data_file" in changes:
        changes = {"data_file": next(held_out.glob("ids.tiny-bert.pickle"))}
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    flags = [*flags_of(world, held_out, "the head", output, **changes), "--resume", "auto"]
    flags = [word for word in flags if word not in without]
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and len(errors) == 1 and re.search(expected, errors[0]), errors
    assert "--output_dir" in errors[0] and "--dump_path" not in errors[0]
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_without_resume_a_training_that_was_begun_stays_as_it_is(
    world, held_out, stopped, tmp_path, status_and_errors
):
    output = Path(shutil.copytree(stopped, tmp_path / "teacher"))
    flags = flags_of(world, held_out, "the head", output)
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and len(errors) == 1, errors
    assert errors[0].startswith(f"--output_dir {output}/training: exists already; choose another,")
    train_teacher.main([*flags, "--force"])
    aside = [path for path in output.iterdir() if path.name.startswith("training.old-")]
    assert len(aside) == 1 and checkpointing.newest(aside[0] / "checkpoints").step == 5


def test_without_a_checkpoint_only_resume_auto_starts(world, held_out, tmp_path, status_and_errors):
    flags = flags_of(world, held_out, "causal", tmp_path / "out", num_steps=2)
    status, errors = status_and_errors(train_teacher.main, [*flags, "--resume"])
    assert status == 2 and len(errors) == 1 and "--output_dir, or use --resume auto" in errors[0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("years of work")
    status, errors = status_and_errors(train_teacher.main, [*flags, "--resume", "auto"])
    assert status == 2 and "holds a model.safetensors already" in errors[0], errors
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_held_out_text_is_evaluated_from_update_0_and_changes_nothing(world, held_out, tmp_path):
    kind = "from a configuration"
    train_teacher.main(flags_of(world, held_out, kind, tmp_path / "with"))
    alone = {"eval_data_file": None, "eval_interval": None}
    train_teacher.main(flags_of(world, held_out, kind, tmp_path / "without", **alone))
    for name in ("model.safetensors", "curve.json"):
        with_it, without = ((tmp_path / run / name).read_bytes() for run in ("with", "without"))
        assert with_it == without
    lines = read_metrics(tmp_path / "with" / "training")
    figures = {line["update"]: line for line in lines if "eval/loss" in line}
    assert list(figures) == [0, 4, 8, 12]
    assert figures[12]["eval/loss"] < figures[0]["eval/loss"] - 0.1
    best = json.loads((tmp_path / "with" / "training" / "best" / "best.json").read_text())
    assert best["figures"]["loss"] == min(line["eval/loss"] for line in figures.values())
    model = tmp_path / "with" if best["step"] == 12 else tmp_path / "with" / "training" / "best"
    flags = {"model": model, "output": tmp_path / "scores", "device": "cpu", "max_length": 64}
    flags |= {"data_file": next(held_out.glob("ids.tiny-bert.pickle"))}
    evaluate_lm.main(as_words(flags))
    score = json.loads((tmp_path / "scores").read_text())["score"]
    assert score["loss"] == pytest.approx(best["figures"]["loss"], rel=1e-5)
    assert score["accuracy"] == pytest.approx(100 * best["figures"]["accuracy"], rel=1e-5)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"num_steps": 0}, "--num_steps 0: expected at least 1"),
        ({"eval_data_file": None}, "--eval_interval 4 without --eval_data_file"),
        ({"eval_data_file": "none"}, "--eval_data_file none: no such file"),
        ({"mlm_mask_prop": 0}, "--mlm_mask_prop 0.0: expected above 0"),
        ({"checkpoint_interval": 0}, "--checkpoint_interval 0: expected at least 1"),
        ({"config": "none"}, "--config none: no such file"),
    ],
)
def test_bad_flags_give_one_line_by_their_own_names(
    changes, expected, world, held_out, tmp_path, status_and_errors
):
    flags = flags_of(world, held_out, "from a configuration", tmp_path / "out", **changes)
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and len(errors) == 1 and errors[0].startswith(expected), errors
    assert not (tmp_path / "out").exists()
