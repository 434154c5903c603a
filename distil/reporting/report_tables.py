"""The report as Markdown: tables of quality, size and speed."""

from collections.abc import Mapping

from distil.reporting import latency
from distil.reporting.comparison import is_of_one_seed
from distil.reporting.tables import code, markdown, megas, percent, plain


def score_cell(figure: Mapping | None) -> str:
    """Write a score with its spread."""
    if figure is None:
        return "not run"
    spread = (
        f" ({figure['least']:.1f}-{figure['largest']:.1f})"
        if figure["num_seeds"] > 1
        else "¹" * is_of_one_seed(figure)
    )
    return f"{figure['score']:.2f}{spread}"


def quality_table(report: Mapping) -> str:
    """Lay out the scores: a row a task, then the macro scores."""
    roles = list(report["models"])
    others = roles[1:]
    lines = [
        [
            "task",
            "metric",
            *(f"{role} {plain(report['models'][role]['name'])}" for role in roles),
            *(f"{role}, % of teacher" for role in others),
        ]
    ]
    for entry in report["quality"].values():
        kept = [
            percent(entry["retention"].get(r)) + (" ≈" if entry["within_spread"].get(r) else "")
            for r in others
        ]
        arrow = " ↓" if entry["lower_is_better"] else ""
        cells = [score_cell(entry["models"].get(role)) for role in roles]
        lines.append([entry["title"], f"{entry['metric']}{arrow}", *cells, *kept])
    glue = report["glue"]
    for name, title in (("macro", "GLUE macro score"), ("macro_without_wnli", "GLUE without WNLI")):
        scores = [glue["scores"][role][name] for role in roles]
        if any(score is not None for score in scores):
            cells = ["-" if score is None else f"{score:.1f}" for score in scores]
            lines.append(
                [
                    title,
                    "mean of the tasks",
                    *cells,
                    *(percent(glue["retention"][r][name]) for r in others),
                ]
            )
    return markdown(lines) if len(lines) > 1 else "No scores: not run."


def metrics_table(report: Mapping) -> str:
    """Lay out all metrics of tasks that have several: a row a metric."""
    roles = list(report["models"])
    lines = [["task", "metric", *roles]]
    for entry in report["quality"].values():
        found = dict.fromkeys(
            name for figure in entry["models"].values() for name in figure["metrics"]
        )
        # The quality table has the one number; the teacher's column has the teacher's figures.
        names = [name for name in found if name != "score" and "teacher_" not in name]
        for name in names if len(names) > 1 else []:
            values = [
                entry["models"].get(role, {"metrics": {}})["metrics"].get(name) for role in roles
            ]
            lines.append(
                [
                    entry["title"],
                    plain(name),
                    *("-" if value is None else f"{value:.4g}" for value in values),
                ]
            )
    return markdown(lines) if len(lines) > 1 else ""


SIZE_ROWS = {
    "parameters, base model (M)": ("parameters_base", 1e6),
    "parameters, with head (M)": ("parameters", 1e6),
    "weights on disk (MB)": ("weights_bytes", 1e6),
    "float32 weights, computed (MB)": ("float32_bytes", 1e6),
    "float16 weights, computed (MB)": ("float16_bytes", 1e6),
}


def size_table(report: Mapping) -> str:
    """Lay out the sizes: a row a measure, with each model's ratio to the teacher."""
    sizes = report["sizes"]
    if not sizes:
        return "Sizes: not measured."
    others = list(sizes)[1:]
    lines = [
        [
            "size",
            *(f"{role} {plain(size['name'])}" for role, size in sizes.items()),
            *(f"{r} / teacher" for r in others),
        ]
    ]
    for title, (key, unit) in SIZE_ROWS.items():
        ratios = [f"{sizes[role][key] / sizes['teacher'][key]:.3f}" for role in others]
        lines.append([title, *(megas(size[key] / unit) for size in sizes.values()), *ratios])
    formats = [
        plain(", ".join(size["weights_dtypes"])) or "not said by the file"
        for size in sizes.values()
    ]
    lines.append(["number format on disk", *formats, *("" for _ in others)])
    lines.append(
        [
            "class of the head",
            *(plain(size["head"]) for size in sizes.values()),
            *("" for _ in others),
        ]
    )
    return markdown(lines)


def speed_text(report: Mapping) -> str:
    """Lay out the timings; describe their protocol, inputs and machine."""
    speed = report["speed"]
    if not speed:
        return "Latency: not measured."
    facts = {
        key: f"{value:.1f}" if isinstance(value, float) else value
        for key, value in speed["machine"].items()
    }
    machine = plain(", ".join(f"{key} {value}" for key, value in facts.items()), 1000)
    dtype, inputs = plain(speed["dtype"]), plain(speed["inputs"])
    return (
        f"{latency.table(speed)}\n\nForward passes of the model without its head, {dtype},"
        f" {speed['threads']} CPU thread(s); median of {speed['passes']} passes after warm-up, the"
        f" models in turns. Inputs: {inputs}. Speed-up: the teacher's time / the model's,"
        f" pass by pass. Measured on {plain(report['measured'])}.\n\nMachine: {machine}."
    )


def as_markdown(report: Mapping) -> str:
    """Write the report as Markdown."""
    models = report["models"]
    student, teacher = (plain(models[role]["name"]) for role in ("student", "teacher"))
    title = f"# {student}, distilled from {teacher}"
    listed = [f"* {role}: {code(model['path'])}" for role, model in models.items()]
    parts = [
        title,
        "\n".join(listed),
        "## Quality",
        quality_table(report),
        "\n".join(f"* {line}" for line in report["notes"]),
    ]
    if more := metrics_table(report):
        parts += ["All metrics:", more]
    parts += ["## Size", size_table(report), "## Speed", speed_text(report)]
    parts += [
        "![Quality kept, and size and speed](report.png)",
        f"Made by scripts/report.py on {report['date']}.",
    ]
    return "\n\n".join(parts) + "\n"
