"""Options of a program, each declared once: help, default, choices, bounds, group; flags follow.

`resumable` says that a resumed run may change the option: paths (whose content is compared), how
often something happens and how, never what is computed.
"""

import argparse
import dataclasses
import math
import typing

UNSET = dataclasses.MISSING


def option(
    help: str,
    default=UNSET,
    *,
    group: str,
    choices: typing.Sequence[str] | None = None,
    bare: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    why: str = "",
    resumable: bool = False,
):
    """Declare one flag of a dataclass; without a default it is required.

    help: one line, with the unit. group: its heading in --help. bare: its value where the flag is
    given without one.
    at_least, above, at_most: bounds of a number; why: the reason for them, for the message.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "choices": choices,
            "bare": bare,
            "bounds": {text: bound for text, bound in bounds.items() if bound is not None},
            "why": why,
            "resumable": resumable,
        },
    )


def is_inside(value: float, bounds: typing.Mapping[str, float]) -> bool:
    """Compare a number with the bounds of an option; NaN and infinity are outside of all."""
    return (
        math.isfinite(value)
        and value >= bounds.get("at least", -math.inf)
        and value > bounds.get("above", -math.inf)
        and value <= bounds.get("at most", math.inf)
    )


def bound_problems(config) -> list[str]:
    """List the options of a dataclass whose numbers are outside their bounds, a line each."""
    problems = []
    for field in dataclasses.fields(config):
        bounds, value = field.metadata.get("bounds"), getattr(config, field.name)
        if bounds and value is not None and not is_inside(value, bounds):
            expected = ", ".join(f"{text} {bound:g}" for text, bound in bounds.items())
            why = f", {field.metadata['why']}" if field.metadata["why"] else ""
            problems.append(f"--{field.name} {value}: expected {expected}{why}")
    return problems


def resumable_options(config_class: type) -> set[str]:
    """List the options that a resumed run may change."""
    return {f.name for f in dataclasses.fields(config_class) if f.metadata.get("resumable")}


def add_options(
    parser: argparse.ArgumentParser, config_class: type, headings: typing.Mapping[str, str]
) -> None:
    """Add a flag for each option of a dataclass, by groups; what is not given gets no value.

    headings: group -> its heading in --help. An option whose default is None also gets --no-X,
    which takes a value back that a file gave; --no-X of a switch is its value False.
    """
    types = typing.get_type_hints(config_class)
    groups = {name: parser.add_argument_group(heading) for name, heading in headings.items()}
    for field in dataclasses.fields(config_class):
        group = groups[field.metadata["group"]]
        if "add_to" in field.metadata:
            field.metadata["add_to"](group)
        else:
            _add_option(group, field, types[field.name])


def _add_option(group, field: dataclasses.Field, kind: type) -> None:
    name, metadata, default = field.name, field.metadata, field.default
    is_switch = bool in (kind, *typing.get_args(kind))
    flags = [f"--{name}"] + (["--local-rank"] if name == "local_rank" else [])
    options: dict[str, typing.Any] = {
        "help": metadata["help"].replace("%", "%%"),
        "dest": name,
        "default": argparse.SUPPRESS,
    }
    if default is not UNSET and default is not None and default is not False:
        shown = " ".join(default) if isinstance(default, tuple) else default
        options["help"] += f" (default: {shown})"
    if is_switch:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
        options["choices"] = metadata["choices"]
        options["metavar"] = None if options["choices"] else options["type"].__name__.upper()
        if typing.get_origin(kind) is tuple:
            options["nargs"] = "*"
        if metadata["bare"] is not None:
            options |= {"nargs": "?", "const": metadata["bare"]}
    group.add_argument(*flags, **options).takes_none = default is None  # in a file
    if default is None and not is_switch:
        unset = {"action": "store_const", "const": None, "default": argparse.SUPPRESS}
        group.add_argument(f"--no-{name}", dest=name, help=argparse.SUPPRESS, **unset)


def missing_options(config_class: type, values: typing.Container[str]) -> list[str]:
    """List the options without a default that have no value."""
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if field.default is UNSET and field.default_factory is UNSET and field.name not in values
    ]
