"""Plot the curves of a distilled student and of its twin trained without the teacher."""

from collections.abc import Mapping
from pathlib import Path

from distil.objectives import LOSSES
from distil.reporting.plots import (
    LOOKS,
    add_legend,
    count_on,
    draw_bars,
    draw_line,
    name_rows,
    picture,
    set_heading,
)
from distil.reporting.run_comparison import TITLES, X_LABELS, facts_of, read_runs

# The quickstart's students -> what LOOKS calls them.
ROLES = {
    "first weights": "first weights",
    "distilled": "student",
    "without teacher": "baseline",
}


def draw_curves(
    path: Path, distilled: Path, without_teacher: Path, objective: str, kl: Mapping[str, float]
) -> None:
    """Plot the training losses of two runs' folders, and bars of each student's held-out KL.

    objective: mlm or clm. kl: a name of ROLES -> nats a token.
    """
    runs = dict(zip(("student", "baseline"), read_runs([distilled, without_teacher]), strict=True))
    temperature = runs["student"].flags["temperature"]
    with picture(path, 3, (14, 4.2)) as (figure, (left, middle, right)):
        draw_line(left, *runs["student"].curve("loss_ce", "update"), LOOKS["student"])
        left.set(title=f"In training: KL to the teacher (T = {temperature:g})", ylim=(0, None))
        for role, run in runs.items():
            draw_line(middle, *run.curve(f"loss_{objective}", "update"), LOOKS[role])
        middle.set_title(f"In training: {LOSSES[objective].title}")
        for panel, loss in ((left, "ce"), (middle, objective)):
            panel.set(xlabel=X_LABELS["update"], ylabel=TITLES[f"loss_{loss}"][1])
            count_on(panel.xaxis)
        for place, (name, value) in enumerate(kl.items()):
            draw_bars(right, [place], [value], LOOKS[ROLES[name]], "{:.4f}")
        name_rows(right, list(kl))
        right.set(title="Held out: KL to the teacher (T = 1)", xlabel=TITLES["eval/kl"][1])
        what = "The distilled student, and the same student trained without the teacher"
        set_heading(figure, what, facts_of(list(runs.values())))
        names = ["student, distilled", "student, without teacher"]
        add_legend(figure, names, [LOOKS[role] for role in runs], "line")
