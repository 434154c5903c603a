"""JSON files that others may have written: read within bounds, their types as a table wants them.

A table is data: `int`, `float`, `str`, `bool`, `list`, `dict` or None for a value of that type,
`Above(0)` for a number, `(A, B)` for one of several, `[A]` for a list of A, `{"name": A}` for an
object with that entry (an absent one is None), and `{...: A}` for an object of A by any names.
"""

import dataclasses
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from utils import InputError, one_line

MAX_BYTES = 2**26  # larger than any file of settings or figures
MAX_DEPTH = 100
LARGEST = 2**63 - 1
SHOWN_CHARS = 40
NAMES = {int: "a whole number below 2^63", float: "a finite number", bool: "true or false"}
NAMES |= {str: "a text", list: "a list", dict: "an object", None: "null", ...: "any value"}


@dataclasses.dataclass(frozen=True)
class Above:
    """Finite numbers larger than `bound`."""

    bound: float

    def __str__(self) -> str:
        return f"a number above {self.bound:g}"


# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------


def type_problem(value: Any, wanted: Any, name: str = "it") -> str | None:
    """Say in a few words which part of a value is not as the table `wanted` says, or None."""
    if isinstance(wanted, tuple):
        problems = [type_problem(value, one, name) for one in wanted]
        if None in problems:
            return None
        # An object that should have been one is told by the part that is wrong.
        inner = (problem for problem in problems if not problem.startswith(f"{name} is "))
        return next(inner, f"{name} is {_shown(value)}, expected {_title(wanted)}")
    if not _is_of(value, wanted):
        return f"{name} is {_shown(value)}, expected {_title(wanted)}"
    if isinstance(wanted, Mapping):
        is_open = ... in wanted
        parts = [(key, value[key], wanted[...]) for key in value] if is_open else []
        parts += [(key, value.get(key), kind) for key, kind in wanted.items() if key is not ...]
    elif isinstance(wanted, list):
        parts = [(number, one, wanted[0]) for number, one in enumerate(value)]
    else:
        return None
    prefix = "" if name == "it" else f"{name}."
    problems = (type_problem(one, kind, f"{prefix}{_key(key)}") for key, one, kind in parts)
    return next((problem for problem in problems if problem), None)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is ...:
        return True
    if kind is None:
        return value is None
    if isinstance(kind, Mapping | list):
        return isinstance(value, dict if isinstance(kind, Mapping) else list)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is float or isinstance(kind, Above):
        largest = sys.float_info.max
        is_number = type(value) in (int, float) and -largest <= value <= largest
        return is_number and (kind is float or value > kind.bound)
    return isinstance(value, kind)


def _title(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_title, kind))
    if isinstance(kind, Mapping | list):
        kind = dict if isinstance(kind, Mapping) else list
    return str(kind) if isinstance(kind, Above) else NAMES[kind]


def _key(key: object) -> str:
    return key if isinstance(key, str) and key.isidentifier() else repr(key)[:SHOWN_CHARS]


def _shown(value: Any) -> str:
    if value is None:
        return "absent or null"
    if isinstance(value, list | dict):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN_CHARS else f"{value[:SHOWN_CHARS]}..")
    is_long = type(value) is int and abs(value) > LARGEST
    return f"a whole number of {value.bit_length()} bits" if is_long else f"{value}"


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def parse_json(data: bytes | str, wanted: Any = dict, *, strict: bool = True) -> Any:
    """Parse JSON of the types `wanted`. Raises ValueError, with the reason in a few words.

    strict: for files of this project's, which hold finite numbers, and no name twice in an object.
    Other programs write NaN and Infinity.
    """
    hooks = {"parse_constant": _refuse, "parse_float": _finite}
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        hooks = hooks | {"object_pairs_hook": _without_twins} if strict else {}
        content = json.loads(text, **hooks)
        _check_depth(content)
        if "\\u" in text:  # halves of surrogate pairs, but those of names that are not UTF-8
            json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair") from error
    if problem := type_problem(content, wanted):
        raise ValueError(problem)
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:SHOWN_CHARS])


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next((name for name, value in pairs if found[name] != value), None)
        if twice is not None:
            raise ValueError(f"{_key(twice)} has two values")
    return found


def _check_depth(content: Any) -> None:
    """Raise RecursionError for what a copy, or a dump, of the content could not walk through."""
    layer = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        layer = [
            part
            for whole in layer
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
        if not layer:
            return
    raise RecursionError


def load_json(
    path: str | os.PathLike, wanted: Any = dict, *, strict: bool = True, max_bytes: int = MAX_BYTES
) -> Any:
    """Read a JSON file as `parse_json` does. Raises OSError, and ValueError also for other files.

    A pipe or a device may never end: such files are not read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"it has {status.st_size:,} bytes, expected at most {max_bytes:,}")
        return parse_json(file.read(max_bytes + 1), wanted, strict=strict)


def read_json(
    path: str | os.PathLike,
    where: str,
    remedy: str,
    wanted: Any = dict,
    *,
    strict: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Read a JSON file as `load_json` does. Raises InputError: WHERE: is no readable JSON .."""
    try:
        return load_json(path, wanted, strict=strict, max_bytes=max_bytes)
    except ValueError as error:
        raise InputError(f"{where}: is no readable JSON ({one_line(error)}); {remedy}") from error
