"""--config: a run is repeated from its parameters.json; flags on the line win; --help in groups."""

import argparse
import dataclasses
import json
import re
import shutil
import typing
from pathlib import Path

import pytest
from whole_runs import assert_same_run

import train
from distil.training.config import HEADINGS, make_parser
from distil.training.config_file import IGNORED, RECORDED, REPLACED_BY

FIELDS = {field.name: field for field in dataclasses.fields(train.TrainConfig)}


@pytest.fixture(scope="module")
def recorded(world, tmp_path_factory) -> Path:
    """Train a run whose flags are mostly not the defaults."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    changes = {"batch_size": 6, "max_steps": 4, "log_interval": 2, "checkpoint_interval": 4}
    changes |= {"seed": 7, "learning_rate": 3e-3, "alpha_mse": 0.1, "weight_decay": 1e-2}
    changes |= {"mlm_smoothing": 0.3, "word_mask": 0.7, "word_keep": 0.2, "bf16": True}
    changes |= {"loss_normalization": "tokens", "initializer_range": 0.1, "force": True}
    changes |= {"eval_data_file": world.data("bert"), "eval_interval": 2, "keep_checkpoints": 2}
    changes |= {"no-group_by_size": True, "freeze_pos_embs": True}
    train.main(world.flags("bert", run, **changes))
    return run


@pytest.fixture
def edited(recorded, tmp_path):
    """Write a copy of the run's parameters.json with changed entries; None takes one out."""

    def edit(**changes) -> str:
        entries = json.loads((recorded / "parameters.json").read_text()) | changes
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(entries))
        return str(path)

    return edit


def test_a_run_is_repeated_bit_for_bit_from_its_parameters_and_a_folder(recorded, tmp_path):
    again = tmp_path / "again"
    train.main(["--config", str(recorded / "parameters.json"), "--dump_path", str(again)])
    assert_same_run(recorded, again)
    one, two = (json.loads((run / "parameters.json").read_text()) for run in (recorded, again))
    assert {name for name in one if one[name] != two[name]} == {"dump_path", "force"}


def test_a_run_is_resumed_from_its_parameters_and_its_folder(recorded, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(recorded, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000004")
    parameters = str(stopped / "parameters.json")
    train.main(["--config", parameters, "--dump_path", str(stopped), "--resume"])
    assert_same_run(recorded, stopped)


def test_flags_on_the_line_win_wherever_they_stand(edited):
    line = ["--seed", "8", "--no-bf16", "--group_by_size", "--alpha_mse", "0", "--no-eval_interval"]
    for argv in (line + ["--config", edited()], ["--config", edited()] + line):
        found = train.as_flags(train.parse_config([*argv, "--dump_path", "new"]))
        then = json.loads(Path(edited()).read_text())
        then = {name: value for name, value in then.items() if name not in RECORDED}
        changed = {"seed": 8, "bf16": False, "group_by_size": True, "alpha_mse": 0.0}
        changed |= {"eval_interval": None, "dump_path": "new", "force": False}
        assert json.loads(json.dumps(found)) == then | changed


def test_what_belongs_to_one_start_is_ignored(edited):
    path = edited(version=[], force="x", resume=7, dump_path=None, local_rank="first")
    config = train.parse_config(["--config", path, "--dump_path", "new"])
    assert (config.force, config.resume, config.dump_path) == (False, None, "new")
    assert config.local_rank == -1 and set(FIELDS) >= IGNORED - RECORDED


def test_entries_that_are_missing_have_the_defaults(world, tmp_path):
    (tmp_path / "few.json").write_text(json.dumps({"teacher_name": str(world.teachers["gpt2"])}))
    flags = world.flags("gpt2", tmp_path / "run", teacher_name=None)
    assert train.parse_config([*flags, "--config", str(tmp_path / "few.json")]) == (
        train.parse_config([*flags, "--teacher_name", str(world.teachers["gpt2"])])
    )


def test_whole_numbers_serve_as_numbers(edited):
    config = train.parse_config(["--config", edited(temperature=3), "--dump_path", "new"])
    assert config.temperature == 3 and isinstance(config.temperature, float)


BAD = {
    "unknown": (
        {"alpha_cee": 1.0},
        [],
        ["alpha_cee is no flag of train.py; did you mean alpha_ce?"],
    ),
    "unknown, far": ({"qwxyz": 1, "zzzz": 2}, [], ["qwxyz is no flag", "zzzz is no flag"]),
    "of another program": ({"config": "x"}, [], ["config is no flag of train.py"]),
    "text for a number": ({"batch_size": "6"}, [], ['batch_size is "6", expected a whole number']),
    "a fraction": ({"batch_size": 6.5}, [], ["batch_size is 6.5, expected a whole number"]),
    "a switch for a number": ({"seed": True}, [], ["seed is true, expected a whole number"]),
    "a number for a switch": ({"mlm": 1}, [], ["mlm is 1, expected true or false"]),
    "a large number": ({"temperature": 10**400}, [], ["expected a number; correct it"]),
    "a list": ({"data_file": ["a"]}, [], ['data_file is ["a"], expected a text']),
    "a zero byte": ({"teacher_name": "a\0"}, [], ["teacher_name is", "expected a text"]),
    "null": ({"batch_size": None}, [], ["batch_size is null, expected a whole number"]),
    "a choice": ({"teacher_type": "t5"}, [], ['"t5", expected one of bert, gpt2, roberta, auto']),
    "a bound": ({"n_epoch": 0}, [], ["--n_epoch 0: expected at least 1 (n_epoch: from --config "]),
    "two precisions": ({"fp16": True}, [], ["leave one of them out (bf16, fp16: from --config "]),
    "steps and epochs": (
        {},
        ["--n_epoch", "2"],
        ["max_steps is 4, which silences --n_epoch 2; add --no-max_steps, or leave --n_epoch out"],
    ),
    "tokens and sequences": (
        {"max_tokens": 100},
        ["--batch_size", "2"],
        ["max_tokens is 100, which silences --batch_size 2; add --no-max_tokens"],
    ),
    "a student twice": (
        {},
        ["--student", "s"],
        [
            "--student_config {config} with --student s: the folder holds configuration and"
            " weights; leave one of them out (student_config: from --config {path})",
            "--initializer_range 0.1 with --student s",
        ],
    ),
    "a moved file": ({"data_file": "gone"}, [], ["--data_file gone: no such file"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_entries_give_one_line_each(name, edited, world, tmp_path, status_and_errors):
    changes, flags, expected = BAD[name]
    path, run = edited(**changes), tmp_path / "run"
    argv = ["--config", path, "--dump_path", str(run), *flags]
    status, errors = status_and_errors(train.main, argv)
    assert status == 2 and not run.exists()
    for text in expected:
        text = text.format(config=world.config("bert"), path=path)
        assert sum(text in line for line in errors) == 1, (text, errors)
    assert all(path in line for line in errors) and len(errors) <= len(expected)


FILES = {
    "no file": (None, "no such file"),
    "empty": (b"", "the file is empty"),
    "not JSON": (b"{'seed': 1}", "is no readable JSON (Expecting property name"),
    "deep": (b"[" * 100_000, "nested more than 100 deep"),
    "not UTF-8": (b'{"seed": "\xff"}', "is no readable JSON ('utf-8' codec"),
    "a list": (b"[1]", "it is a list, expected an object"),
    "two values": (b'{"seed": 1, "mlm": true, "seed": 2, "mlm": true}', "seed has two values"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(name, tmp_path, status_and_errors):
    content, expected = FILES[name]
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    argv = ["--config", str(path), "--dump_path", str(tmp_path / "run")]
    status, (error,) = status_and_errors(train.main, argv)
    assert status == 2 and error.startswith(f"--config {path}: ") and expected in error
    assert not (tmp_path / "run").exists()


def test_obligatory_flags_that_nothing_gives_are_named(tmp_path, status_and_errors):
    (tmp_path / "few.json").write_text(json.dumps({"teacher_name": "t", "dump_path": "old"}))
    found = status_and_errors(train.main, ["--config", str(tmp_path / "few.json")])
    assert found == (
        2,
        ["the following arguments are required: --dump_path, --data_file; see --help"],
    )


def test_every_switch_has_its_opposite_and_every_option_its_way_back(edited):
    values = json.loads(Path(edited()).read_text())
    for name, field in FIELDS.items():
        is_switch = bool in (field.type, *typing.get_args(field.type))
        if is_switch or field.default is None:
            back = False if is_switch else None
            given = edited(**{name: values.get(name)})  # a plan's flags are not recorded
            argv = ["--config", given, f"--no-{name}", "--dump_path", "d"]
            assert vars(make_parser().parse_args(argv))[name] is back


def test_what_silences_a_flag_is_a_flag_with_a_way_back():
    for name, other in REPLACED_BY.items():
        assert name in FIELDS and FIELDS[other].default is None


def test_help_stands_in_groups_the_obligatory_flags_first(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    headings = re.findall(r"^(\w.*):$", text, flags=re.M)
    assert headings == [*HEADINGS.values(), "general"]
    first = text.split(f"\n{headings[0]}:\n")[1].split("\n\n")[0]
    obligatory = [name for name, field in FIELDS.items() if field.metadata["group"] == "obligatory"]
    assert re.findall(r"^  --(\w+)", first, flags=re.M) == obligatory
    assert {"dump_path", "data_file", "teacher_name", "student_config"} <= set(obligatory)
    groups = {field.metadata["group"] for field in FIELDS.values()}
    assert groups == set(HEADINGS) and isinstance(make_parser(), argparse.ArgumentParser)
