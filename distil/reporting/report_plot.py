"""The picture of a report: quality kept on the left, size and speed on the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.reporting.model_card import read_run_file
from distil.reporting.plots import (
    LOOKS,
    add_legend,
    draw_bars,
    name_rows,
    picture,
    say_instead,
    set_heading,
)
from distil.reporting.tables import on_one_line


def retention_bars(report: Mapping) -> dict[str, dict[str, float]]:
    """Collect the left bars: {task: {role: % of the teacher}}, the macro score last."""
    bars = {}
    for entry in report["quality"].values():
        kept = {role: value for role, value in entry["retention"].items() if value is not None}
        bars |= {entry["title"] + (" ↓" if entry["lower_is_better"] else ""): kept} if kept else {}
    macro = {
        r: own["macro"]
        for r, own in report["glue"]["retention"].items()
        if own["macro"] is not None
    }
    return bars | ({"GLUE macro": macro} if macro else {})


def ratio_bars(report: Mapping) -> dict[str, dict[str, float]]:
    """Collect the right bars: {measure: {role: times smaller or faster than the teacher}}."""
    sizes, bars = report["sizes"], {}
    for title, key in (("parameters", "parameters_base"), ("weights on disk", "weights_bytes")):
        if sizes:
            bars[title] = {
                role: sizes["teacher"][key] / sizes[role][key] for role in list(sizes)[1:]
            }
    for row in (report["speed"] or {"rows": []})["rows"]:
        facts = [on_one_line(row[name], 40) for name in ("device", "batch_size", "padding")]
        title = "speed, {}, batch {},\n{}".format(*facts)
        bars[title] = {r: row["models"][r]["speed_up"]["median"] for r in list(row["models"])[1:]}
    return bars


def facts_of(report: Mapping) -> dict[str, str | None]:
    """Collect what the heading says: models, and the student's training, if its folder tells."""
    models = report["models"]
    flags = read_run_file(models["student"]["path"], "parameters.json")
    seeds = [
        figure["num_seeds"]
        for entry in report["quality"].values()
        for figure in entry["models"].values()
    ]
    ends = sorted({min(seeds), max(seeds)}) if seeds else []
    return {
        **{role: model["name"] for role, model in models.items()},
        "distilled with seed": flags.get("seed"),
        "updates": flags.get("max_steps"),
        "fine-tuning runs a task": " to ".join(map(str, ends)),
    }


def draw(report: Mapping, path: Path) -> None:
    """Draw each model's share of the teacher's quality, and its gains in size and speed."""
    panels = (
        ("Quality kept", "of the teacher's (%)", retention_bars(report), 100, "{:.1f}"),
        ("Smaller, faster", "than the teacher (times)", ratio_bars(report), 1, "{:.2f}×"),
    )
    roles = [role for role in report["models"] if role != "teacher"]
    rows = max(2, *(len(bars) for _, _, bars, _, _ in panels))
    height = 1.2 + 0.3 * rows * (len(roles) + 0.6)
    with picture(path, 2, (13, height)) as (figure, axes):
        for panel, (title, unit, bars, mark, style) in zip(axes, panels, strict=True):
            draw_groups(panel, bars, roles, mark, style)
            panel.set(title=title, xlabel=unit)
        what = "Quality kept, and size and speed gained, against the teacher (solid line)"
        set_heading(figure, what, facts_of(report))
        add_legend(figure, roles, [LOOKS[role] for role in roles], "bar")


def draw_groups(
    panel, bars: Mapping[str, Mapping[str, float]], roles: Sequence[str], mark: float, style: str
) -> None:
    """Draw groups of horizontal bars, a bar a role, with values and a line at the teacher's."""
    if not bars:
        say_instead(panel, "not run")
        return
    thickness = 0.8 / len(roles)
    for k, role in enumerate(roles):
        shift = thickness * (k - (len(roles) - 1) / 2)
        places = [n + shift for n, kept in enumerate(bars.values()) if role in kept]
        values = [kept[role] for kept in bars.values() if role in kept]
        draw_bars(panel, places, values, LOOKS[role], style, height=thickness)
    teacher = LOOKS["teacher"]
    panel.axvline(mark, color=teacher.color, linestyle=teacher.dashes)
    name_rows(panel, list(bars))
    panel.set_xlim(right=max(panel.get_xlim()[1], mark * 1.05))
