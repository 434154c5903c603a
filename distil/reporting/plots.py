"""Pictures of figures: one look for all programs, drawn without a display.

A colour means one thing in every picture. In a grey print, lightness, dashes, markers, and hatches
tell things apart. matplotlib is imported only where a program draws: its import takes a while.
"""

import contextlib
import dataclasses
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from distil.system.files import atomic_path
from distil.system.outputs import SOFTWARE

DPI = 110
INK = "#1A1A1A"
MARKERS_A_LINE = 8
# Characters of the title's and the legend's sizes that an inch is sure to hold.
TITLE_CHARACTERS, LEGEND_CHARACTERS = 9.5, 11
LINE_HEIGHT = 0.22  # of title and legend, in inches
STYLE = {
    "text.parse_math": False,  # "$" in a name begins no formula
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "hatch.linewidth": 0.7,
}
TOO_LARGE = 1e16  # to be written in full
UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1, ""))


@dataclasses.dataclass(frozen=True)
class Look:
    """How a thing is drawn everywhere: its colour, dashes and marker of a line, hatch of a bar."""

    color: str
    dashes: str = "-"
    marker: str = "o"
    hatch: str = ""

    @property
    def line(self) -> dict:
        """Options of a line."""
        return {"color": self.color, "linestyle": self.dashes, "marker": self.marker}

    @property
    def bar(self) -> dict:
        """Options of a bar."""
        face = {"facecolor": self.color, "hatch": self.hatch}
        return {**face, "edgecolor": INK, "linewidth": 0.6}


# What is drawn -> its look. Models, then stages of an update, then figures with nothing beside.
LOOKS = {
    "teacher": Look(INK, "-", "D"),
    "student": Look("#0072B2", "-", "o"),
    "baseline": Look("#E69F00", "--", "s", "//"),
    "first weights": Look("#D9D9D9", ":", "^", ".."),
    "data": Look("#AA7744", hatch="oo"),
    "head and losses": Look("#88CCEE", hatch="\\\\"),
    "backward": Look("#44AA99", hatch="xx"),
    "optimizer": Look("#EEDD88", hatch="++"),
    "count": Look("#8A8FA3"),
}
LOOKS["student forward"] = LOOKS["student"]
RUN_COLORS = ("#332288", "#CC6677", "#117733", "#999933", "#882255", "#AA4499")
RUN_DASHES, RUN_MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")


def look_of_run(number: int) -> Look:
    """Return the look of a run among others; dashes and marker alone tell 20 apart."""
    kinds = RUN_COLORS, RUN_DASHES, RUN_MARKERS
    return Look(*(kind[number % len(kind)] for kind in kinds))


# --------------------------------------------------------------------------------------------------
# The figure
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def picture(
    path: str | os.PathLike,
    num_panels: int,
    size: tuple[float, float],
    columns: int | None = None,
    **shared: bool,
) -> Iterator[tuple]:
    """Yield (figure, its panels from left to right) to draw on; then save the figure as a PNG.

    size: width and height, in inches, without heading and legend, which add theirs. columns: panels
    in a row; None: all. shared: sharex or sharey of the panels.
    """
    import matplotlib.figure

    columns = min(columns or num_panels, num_panels)
    shape = -(-num_panels // columns), columns
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(size, layout="constrained")
        panels = figure.subplots(*shape, squeeze=False, **shared)
        for panel in panels.flat[num_panels:]:
            panel.set_visible(False)
        for panel in panels.flat:
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(_writing_alike(axis))
        yield figure, list(panels.flat[:num_panels])
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": SOFTWARE})


def set_heading(figure, what: str, facts: Mapping[str, object]) -> None:
    """Write above all panels what they show, and below it models, seed, updates, .. as known.

    A fact without a value is left out; of a list of values, the first three that differ are shown.
    """
    known = {name: _listed(value) for name, value in facts.items()}
    line = "; ".join(f"{name} {value}" for name, value in known.items() if value)
    width = int(figure.get_figwidth() * TITLE_CHARACTERS)
    lines = [row for text in (what, line) for row in textwrap.wrap(printable(text), width)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=12)
    _make_room(figure, len(lines))


def _listed(value: object) -> str:
    values = list(value) if isinstance(value, list | tuple) else [value]
    shown = list(dict.fromkeys(f"{one}" for one in values if one is not None))
    return ", ".join([*shown[:3], *([".."] if len(shown) > 3 else [])])


def short_path(path: str) -> str:
    """Return a hub name, or the last two parts of a path, for a heading."""
    return "/".join(os.path.normpath(path).split(os.sep)[-2:])


def add_legend(figure, names: Sequence[str], looks: Sequence[Look], kind: str) -> None:
    """Explain looks by name below all panels. kind: of a Look, "line" or "bar"."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width = int(figure.get_figwidth() * LEGEND_CHARACTERS)
    names = [textwrap.fill(printable(name), max(width - 8, 8)) for name in names]
    if kind == "line":
        handles = [Line2D([], [], **look.line) for look in looks]
    else:
        handles = [Patch(**look.bar) for look in looks]
    columns = max(1, width // (8 + max(len(row) for name in names for row in name.split("\n"))))
    where = {"loc": "outside lower left", "ncols": min(columns, len(names)), "handlelength": 3.5}
    figure.legend(handles, names, **where)
    _make_room(figure, -(-len(names) // columns) * max(name.count("\n") + 1 for name in names))


def _make_room(figure, num_lines: int) -> None:
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * num_lines)


MOST_CHARACTERS = 300  # of a name: longer ones are cut


def printable(text: str) -> str:
    """Put text on one line, with "?" for characters that cannot be drawn."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    text = " ".join(text.encode(errors="replace").decode().split())[:MOST_CHARACTERS]
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in text)


# --------------------------------------------------------------------------------------------------
# A panel
# --------------------------------------------------------------------------------------------------


def draw_line(panel, xs: Sequence[float], ys: Sequence[float], look: Look, number: int = 0) -> None:
    """Draw a curve with a few markers; it breaks where a value is not finite.

    number: of the curve in its panel; the markers of curves that coincide are at other points.
    """
    ys = [y if math.isfinite(y) else math.nan for y in ys]
    every = max(1, len(ys) // MARKERS_A_LINE)
    panel.plot(xs, ys, **look.line, markevery=(number % every, every))


def draw_bars(
    panel, places: Sequence[float], values: Sequence[float], look: Look, style: str, **options
) -> None:
    """Draw horizontal bars with their values, written in `style`, at their ends."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    labels = [style.format(v) if math.isfinite(v) else "not finite" for v in values]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    panel.bar_label(panel.barh(places, finite, **look.bar, **options), labels, padding=3, bbox=box)
    panel.margins(x=0.2)
    panel.locator_params("x", nbins=6)


def name_rows(panel, names: Sequence[str]) -> None:
    """Name the rows 0, 1, .. of horizontal bars that are drawn, the first on top."""
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(axis="y", visible=False)
    if panel.dataLim.x0 >= 0:
        panel.set_xlim(left=0)


def say_instead(panel, text: str) -> None:
    """Write a few words in a panel without figures."""
    panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes)
    panel.set_axis_off()


def count_on(axis) -> None:
    """Put ticks of an axis that counts at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def set_log(panel, which: str, least: float, most: float) -> None:
    """Make an axis, "x" or "y", logarithmic: ticks at powers of two, or, if few, at round numbers.

    least, most: positive ends of the data.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    exponents = range(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1)
    ticks = [2.0**k for k in exponents[:: max(1, -(-len(exponents) // 9))]]
    if len(ticks) < 3:
        locator = MaxNLocator(6, integer=least >= 1, steps=[1, 2, 5, 10])
        ticks = [tick for tick in locator.tick_values(least, most) if least <= tick <= most]
    getattr(panel, f"set_{which}scale")("log", base=2)
    axis = getattr(panel, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks or [least]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, position: written(value))


def written(value: float, size: float | None = None, digits: int | None = None) -> str:
    """Write a number in full: 32, 0.0005, 12,000, 1.2 M; no powers but of a diverged run's figures.

    size: 1, 1e6, .. to write it in; default: its own. digits: after the point; default: all.
    """
    if abs(value) >= TOO_LARGE:
        return f"{value:.3g}"
    size = size or _size_of(value)
    number = f"{value / size:,.{12 if digits is None else digits}f}"
    number = number.rstrip("0").rstrip(".") if digits is None else number
    return "0" if float(number.replace(",", "")) == 0 else number + dict(UNITS)[size]


def _size_of(value: float) -> float:
    return next(size for size, _ in UNITS if size <= max(abs(value), 1))


def _writing_alike(axis):
    """Make a formatter that writes all ticks of an axis in one unit, with equally many digits."""

    def write(value: float, position: int | None) -> str:
        ticks = [value, *axis.get_majorticklocs()]
        size = _size_of(max(ticks, key=abs))
        digits = max(len(written(tick / size, 1).partition(".")[2]) for tick in ticks)
        return written(value, size, digits)

    return write
