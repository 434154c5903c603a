"""The picture of a report: quality kept on the left, size and speed on the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.reporting.plots import picture

COLORS = {"student": "tab:blue", "baseline": "tab:orange"}


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
        title = f"speed, {row['device']}, batch {row['batch_size']},\n{row['padding']}"
        bars[title] = {r: row["models"][r]["speed_up"]["median"] for r in list(row["models"])[1:]}
    return bars


def draw(report: Mapping, path: Path) -> None:
    """Draw each model's share of the teacher's quality, and its gains in size and speed."""
    panels = (
        ("Quality kept, % of the teacher", retention_bars(report), 100, "{:.1f}"),
        ("Times smaller, or faster, than the teacher", ratio_bars(report), 1, "{:.2f}×"),
    )
    roles = [role for role in report["models"] if role != "teacher"]
    rows = max(2, *(len(bars) for _, bars, _, _ in panels))
    height = 1.6 + 0.3 * rows * (len(roles) + 0.6)
    names = " and ".join(f"{report['models'][role]['name']} ({role})" for role in roles)
    with picture(path, 2, (13, height)) as (figure, axes):
        for axis, (title, bars, mark, style) in zip(axes, panels, strict=True):
            draw_bars(axis, bars, roles, mark, style)
            axis.set_title(title)
        figure.suptitle(f"{names}; teacher {report['models']['teacher']['name']}", wrap=True)
        if len(roles) > 1:
            legend = next(a for a in axes if a.has_data()).get_legend_handles_labels()
            figure.legend(*legend, loc="outside lower center", ncols=2)


def draw_bars(
    axis, bars: Mapping[str, Mapping[str, float]], roles: Sequence[str], mark: float, style: str
) -> None:
    """Draw groups of horizontal bars, a bar a role, with values and a line at the teacher's."""
    if not bars:
        axis.text(0.5, 0.5, "not run", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    thickness = 0.8 / len(roles)
    for k, role in enumerate(roles):
        places = [
            n + thickness * (k - (len(roles) - 1) / 2)
            for n, kept in enumerate(bars.values())
            if role in kept
        ]
        values = [kept[role] for kept in bars.values() if role in kept]
        drawn = axis.barh(places, values, thickness, color=COLORS[role], label=role)
        labels = [style.format(value) for value in values]
        axis.bar_label(
            drawn, labels, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}
        )
    axis.axvline(mark, color="black", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set_ylim(len(bars) - 0.5, -0.5)  # the first on top
    axis.set_xlim(min(0, *axis.get_xlim()), max(axis.get_xlim()[1], mark) * 1.12)
