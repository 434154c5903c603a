"""Lay figures out: Markdown tables, and how numbers are written in them."""

from collections.abc import Sequence


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
