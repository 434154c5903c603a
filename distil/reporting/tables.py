"""Lay figures out: Markdown tables, and how numbers are written in them."""

import re
from collections.abc import Sequence

# What begins markup of Markdown or HTML in a name; underscores inside of words do not.
MARKUP = re.compile(r"[\\`*<>|~$]|\](?=[(\[:])|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])")


def on_one_line(text: object, limit: int = 200) -> str:
    """Write a name or value on one line, U+FFFD for what no text file or font can hold."""
    text = " ".join(f"{text}".split())
    text = text if len(text) <= limit else f"{text[: limit - 2]}.."
    return "".join(one if one.isprintable() else "\ufffd" for one in text)


def plain(text: object, limit: int = 200) -> str:
    """Write a name or value in Markdown so that it shows as it is, in a table too."""
    return MARKUP.sub(r"\\\g<0>", on_one_line(text, limit))


def code(text: object) -> str:
    """Write a name as code in Markdown, in a table too: no markup in it counts, nor ends it."""
    text = on_one_line(text).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay lines out as a Markdown table; the first is its head."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def share(value: float | None) -> str:
    """Write a share as a percentage, - where there is none."""
    return "-" if value is None else f"{value:.1%}"


def times(ratio: float | None) -> str:
    """Write a ratio, - where there is none."""
    return "-" if ratio is None else f"{ratio:.2f}"


def digits(value: float) -> str:
    """Write a number with three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Write a percentage, - where there is none."""
    return "-" if value is None else f"{value:.1f} %"


def megas(value: float) -> str:
    """Write millions with two digits after the point, small ones with three significant digits."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
