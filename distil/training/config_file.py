"""The file of --config: flags and their values, as parameters.json of a run holds them."""

import argparse
import contextlib
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from distil.system.files import file_problem
from distil.system.json_files import read_json
from utils import InputError, one_line, raise_problems

# What parameters.json holds beside the flags.
RECORDED = {"version", "torch_version", "transformers_version", "num_processes"}
# What belongs to one start of one run, not to what it computes.
IGNORED = RECORDED | {"force", "resume", "dump_path", "local_rank"}
# A flag -> the one that is used in its place wherever it has a value.
REPLACED_BY = {"n_epoch": "max_steps", "batch_size": "max_tokens"}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def read_config_file(
    path: str, given: Mapping[str, Any], parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """Read the values of the flags that are not given on the command line.

    Raises InputError, a line for each entry that is no flag's, or is not a value of its flag, or
    would silence a flag that is given.
    """
    entries = _read_entries(path)
    flags: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        flags.setdefault(action.dest, []).append(action)
    for name in ("config", "help", "version"):
        del flags[name]
    problems, values = [], {}
    for name, value in entries.items():
        if name in IGNORED or name in given:
            continue
        if name not in flags:
            problems.append(_unknown(name, flags))
            continue
        expected = _expected(flags[name], value)
        if expected:
            shown = one_line(ValueError(json.dumps(value)), 60)
            problems.append(f"{name} is {shown}, expected {expected}; correct it")
        else:
            values[name] = _as_given(flags[name][0], value)
    for name, other in REPLACED_BY.items():
        if name in given and values.get(other) is not None:
            problems.append(
                f"{other} is {values[other]}, which silences --{name} {given[name]}; add"
                f" --no-{other}, or leave --{name} out"
            )
    raise_problems(f"--config {path}: {problem}" for problem in problems)
    return values


def _read_entries(path: str) -> dict[str, Any]:
    """Read a JSON object. Raises InputError, also where it gives a name two values."""
    raise_problems([file_problem(path, "--config")])
    remedy = "expected an object of flags and values, as in parameters.json of a run"
    return read_json(path, f"--config {path}", remedy)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "take it out"
    return f"{one_line(ValueError(name), 60)} is no flag of train.py; {remedy}"


def _expected(actions: list[argparse.Action], value: Any) -> str | None:
    """Say what a flag takes in place of `value`; None: it takes it."""
    action = actions[0]
    if value is None and getattr(action, "takes_none", False):
        return None
    kind = bool if isinstance(action, argparse.BooleanOptionalAction) else action.type
    if action.nargs == "*":
        values, what = value, f"a list, each of it {EXPECTED[kind]}"
        if not isinstance(value, list):
            return what
    else:
        values, what = [value], EXPECTED[kind]
    if action.choices:
        what = f"{'some' if action.nargs == '*' else 'one'} of {', '.join(action.choices)}"
    fits = all(_is_of(kind, each) and each in (action.choices or [each]) for each in values)
    return None if fits else what


def _is_of(kind: type, value: Any) -> bool:
    """True if a JSON value is one that the command line could have given, for a type."""
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if kind is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind) and not (kind is str and "\0" in value)


def _as_given(action: argparse.Action, value: Any) -> Any:
    """Convert a value to the type that the command line gives: 1 for a float flag is 1.0."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if action.type is float and is_whole else value


@contextlib.contextmanager
def naming_the_file(path: str | None, from_file: Mapping[str, Any]) -> Iterator[None]:
    """Raise InputError with the flags in it that come from the file of --config named as such."""
    try:
        yield
    except InputError as error:
        lines = []
        for line in str(error).splitlines():
            named = dict.fromkeys(re.findall(r"--(?:no-)?(\w+)", line))
            names = ", ".join(name for name in named if name in from_file)
            lines.append(f"{line} ({names}: from --config {path})" if names else line)
        raise InputError("\n".join(lines)) from error
