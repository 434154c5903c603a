"""A study's rows as a table, verdicts and a picture.

Each variant is compared with the reference seed by seed; an interval is that of Student's t for the
mean of these differences, at 95 %.
"""

import dataclasses
import math
import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence

from distil.reporting.plots import LOOKS, draw_bars, name_rows, picture, set_heading
from distil.reporting.tables import markdown
from distil.study.variants import HALF, NO_TEACHER, REFERENCE, Variant

TITLE_WIDTH = 36  # of a variant's title in the picture, in letters

# Two-sided 95 % quantiles of Student's t by degrees of freedom, 1, 2, ..; the last for all above.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean of values, one a seed; half: half the width of the mean's 95 % interval, or None."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize values; one alone has no interval."""
        num = len(values)
        if num < 2:
            return cls(values[0], None)
        quantile = T95[min(num - 1, len(T95)) - 1]
        return cls(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(num))

    def is_below(self, bound: float) -> bool:
        """True where the whole interval is below."""
        return self.half is not None and self.mean + self.half < bound

    def written(self, style: str) -> str:
        """Write mean and interval."""
        mean = f"{self.mean:{style}}"
        return mean if self.half is None else f"{mean} ± {self.half:{style.lstrip('+')}}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant's figures: the finished trainings at its rate, by seed."""

    name: str
    variant: Variant
    rate: float
    by_seed: Mapping[int, Mapping[str, float]]
    cost: float | None

    def spread(self, figure: str) -> Spread:
        """Summarize a figure over the seeds."""
        return Spread.of([figures[figure] for figures in self.by_seed.values()])

    def against(self, other: "Row", figure: str = "kl") -> Spread | None:
        """Summarize the relative difference to another row over the seeds of both."""
        seeds = [seed for seed in self.by_seed if seed in other.by_seed]
        if not seeds:
            return None
        pairs = [(self.by_seed[seed][figure], other.by_seed[seed][figure]) for seed in seeds]
        return Spread.of([own / others - 1 if others else math.nan for own, others in pairs])


def _answer(difference: Spread) -> str:
    """Answer whether a difference is below 0 by more than the spread, which one seed lacks."""
    if difference.half is None:
        return "yes, one seed" if difference.mean < 0 else "no"
    return "yes" if difference.is_below(0) else "no"


def verdict(row: Row, alone: Row | None) -> str:
    """Answer whether a variant is closer to the teacher than no teacher by more than the spread."""
    difference = None if alone is None or row is alone else row.against(alone)
    return "" if difference is None else _answer(difference)


def table(
    rows: Sequence[Row],
    first: Mapping[str, Mapping[str, float]],
    teacher: Mapping[str, float],
    tasks: Sequence[str] = (),
) -> str:
    """Lay rows out in Markdown, the closest to the teacher first.

    first: figures of first students by kind; that of the reference stands for those without.
    teacher: the teacher's. tasks: whose scores rows and teacher hold, too.
    """
    by_name = {row.name: row for row in rows}
    reference, alone = by_name.get(REFERENCE), by_name.get(NO_TEACHER)
    head = "variant|seeds|rate|cost|KL to teacher|against the triple|gap closed|loss|top-1|kept"
    cells = [[*head.split("|"), "agreement", *tasks, "closer than without teacher"]]
    ordered = sorted(rows, key=lambda row: row.spread("kl").mean)
    for row in ordered:
        kl, accuracy = row.spread("kl"), row.spread("accuracy")
        start = first.get(row.variant.student, first[HALF])
        against = None if reference is None or row is reference else row.against(reference)
        cells.append(
            [
                f"{row.variant.title} (`{row.name}`)",
                str(len(row.by_seed)),
                f"{row.rate:g}",
                "" if row.cost is None else f"{row.cost:.2f}",
                kl.written(".4f"),
                "" if against is None else against.written("+.1%"),
                _share(start["kl"] - kl.mean, start["kl"]),
                row.spread("loss").written(".4f"),
                accuracy.written(".2%"),
                _share(accuracy.mean, teacher["accuracy"]),
                row.spread("agreement").written(".2%"),
                *(_of_task(row.spread(task), teacher[task]) for task in tasks),
                verdict(row, alone),
            ]
        )
    for kind in dict.fromkeys([HALF, *(row.variant.student for row in ordered)]):
        name = "first weights" if kind == HALF else f"first weights of `{kind}`"
        if kind in first:
            cells.append(_plain(name, first[kind], teacher, [""] * len(tasks)))
    scores = [f"{teacher[task]:.1f}" for task in tasks]
    cells.append(_plain("teacher", {**teacher, "kl": 0.0, "agreement": 1.0}, teacher, scores))
    return markdown(cells)


def _of_task(score: Spread, of_teacher: float) -> str:
    return f"{score.written('.1f')} ({_share(score.mean, of_teacher)} kept)"


def _share(part: float, whole: float) -> str:
    """Write a share; "-" of 0, such as an untrained teacher's top-1 accuracy."""
    return f"{part / whole:.1%}" if whole else "-"


def _plain(
    name: str, figures: Mapping[str, float], teacher: Mapping[str, float], scores: Sequence[str]
) -> list[str]:
    kept = _share(figures["accuracy"], teacher["accuracy"])
    shown = f"{figures['kl']:.4f}", "", "", f"{figures['loss']:.4f}", f"{figures['accuracy']:.2%}"
    return [name, "", "", "", *shown, kept, f"{figures['agreement']:.2%}", *scores, ""]


def conclusion(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    """Write which variant is closest to the teacher, and what the teacher gave: Markdown.

    teacher: the teacher's figures.
    """
    by_name = {row.name: row for row in rows}
    reference, alone = by_name.get(REFERENCE), by_name.get(NO_TEACHER)
    compared = [
        (row, difference)
        for row in rows
        if reference is not None and row is not reference
        if (difference := row.against(reference)) is not None
    ]
    if not compared:
        return "Nothing to compare yet."
    best, difference = min(compared, key=lambda pair: pair[0].spread("kl").mean)
    name = f"{best.variant.title} (`{best.name}`)"
    if best.spread("kl").mean >= reference.spread("kl").mean:
        name = f"{reference.variant.title} (`{reference.name}`); next: {name}"
    sure = {None: ", with one seed", True: "", False: ", within the spread"}[
        None if difference.half is None else abs(difference.mean) > difference.half
    ]
    closest = (
        f"Closest to the teacher: {name}, its KL {difference.written('+.1%')} against the"
        f" triple's{sure}."
    )
    if alone is None:
        return closest
    distilled = min(
        (row for row in rows if row is not alone), key=lambda row: row.spread("kl").mean
    )
    return "\n".join([closest, "", *_worth(distilled, alone, teacher)])


def _worth(distilled: Row, alone: Row, teacher: Mapping[str, float]) -> list[str]:
    """Answer what the teacher gave a student, and whether it predicts better than one without."""
    of_alone = alone.spread("loss").mean
    lines = [
        f"- {title} than the student without teacher: {_answer(difference)}"
        f" ({name} {difference.written('+.1%')})"
        for title, figure, name in (
            ("Closer to the teacher", "kl", "KL"),
            ("Better on the text", "loss", "loss"),
        )
        if (difference := distilled.against(alone, figure)) is not None
    ]
    answer = "yes" if teacher["loss"] < of_alone else "no"
    losses = f"loss {teacher['loss']:.4f} against {of_alone:.4f}"
    return [*lines, f"- Teacher better on the text than that student: {answer} ({losses})"]


def draw(
    rows: Sequence[Row], path: str | os.PathLike, facts: Mapping[str, object], first_kl: float
) -> None:
    """Draw each variant's KL with its interval, the closest on top."""
    ordered = sorted(rows, key=lambda row: row.spread("kl").mean)
    with picture(path, 1, (8, 0.5 * len(rows) + 1.2)) as (figure, (panel,)):
        for place, row in enumerate(ordered):
            kl = row.spread("kl")
            look = {REFERENCE: "count", NO_TEACHER: "baseline"}.get(row.name, "student")
            error = {"xerr": kl.half or 0.0, "error_kw": {"capsize": 3}}
            draw_bars(panel, [place], [kl.mean], LOOKS[look], "{:.4f}", **error)
        name_rows(panel, [textwrap.fill(row.variant.title, TITLE_WIDTH) for row in ordered])
        panel.set_xlabel("held-out KL to the teacher, mean and 95 % interval")
        shown = {**facts, "KL of the first weights": f"{first_kl:.4f}"}
        set_heading(figure, "Distillation at equal cost", shown)
