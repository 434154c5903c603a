"""Compare runs of train.py: the flags that differ, the last figures, the curves.

Reads parameters.json and metrics.jsonl of each run folder, also while the run is being trained.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distil.held_out_options import DRAWN
from distil.models.architectures import AUTO
from distil.objectives import LOSSES
from distil.reporting.plots import (
    Look,
    add_legend,
    count_on,
    draw_line,
    look_of_run,
    picture,
    printable,
    say_instead,
    set_heading,
    set_log,
    short_path,
)
from distil.reporting.tables import markdown, plain
from distil.system.json_files import parse_json, type_problem
from utils import InputError, one_line

PARAMETERS, METRICS = "parameters.json", "metrics.jsonl"
COUNTERS = ("update", "micro_batches", "epoch")
LINE = {**dict.fromkeys(COUNTERS, int), ...: (float, None)}
# The flags that a heading shows.
SHOWN = ("teacher_type", "teacher_name", "student_type", "student", "student_config")
FLAGS = dict.fromkeys(SHOWN, (str, None))
# Flags that say where and how often a run was started, not what it does.
UNRELATED = {"dump_path", "force", "resume", "local_rank"}
NATS = "nats a token"
# Metric -> (title, label with the unit); the losses' titles are those of LOSSES.
UNITS_OF_LOSSES = {
    "ce": f"KL × T² ({NATS})",
    "mlm": f"cross-entropy ({NATS})",
    "clm": f"cross-entropy ({NATS})",
    "mse": "squared error (logits² a token)",
    "cos": "1 - cosine (no unit)",
    "rkl": f"KL × T² ({NATS})",
    "rel": f"KL ({NATS}, over queries, keys and values)",
    "jsd": f"JSD × T² ({NATS})",
}
TITLES = {
    "loss": ("weighted sum of the losses", "loss (no unit)"),
    **{f"loss_{k}": (v.title, UNITS_OF_LOSSES.get(k, "loss (no unit)")) for k, v in LOSSES.items()},
    "lr": ("learning rate", "learning rate (no unit)"),
    "grad_norm": ("gradient norm before clipping", "norm (no unit)"),
    "tokens_per_s": ("speed", "real tokens (number a second)"),
    "mfu": ("model FLOPs utilization", "MFU (share of the peak)"),
    "eval/loss": ("held out: language-model loss", f"cross-entropy ({NATS})"),
    "eval/kl": ("held out: KL to the teacher (T = 1)", f"KL ({NATS})"),
    "eval/perplexity": ("held out: perplexity", "perplexity (no unit)"),
    "eval/accuracy": ("held out: accuracy, top-1", "accuracy (share of tokens)"),
    "eval/agreement": ("held out: agreement with the teacher", "top-1 equal (share of tokens)"),
}
TITLES |= {  # on masks drawn by rarity, as in training
    name.replace("/", f"/{DRAWN}"): (title.replace(":", " (drawn):"), label)
    for name, (title, label) in TITLES.items()
    if name.startswith("eval/")
}
X_LABELS = {
    "update": "updates (number)",
    "micro_batches": "micro-batches of all processes (number)",
    "epoch": "epoch (number, from 0)",
}
LOGARITHMIC = {"eval/perplexity", f"eval/{DRAWN}perplexity"}  # it falls by orders of magnitude


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's flags and the lines of its metrics. name: the folder's, for tables."""

    name: str
    flags: Mapping[str, Any]
    lines: Sequence[Mapping[str, float | None]]

    def curve(self, metric: str, x: str) -> tuple[list, list]:
        """Return a metric's values over the counter x: (xs, ys)."""
        lines = [line for line in self.lines if isinstance(line.get(metric), int | float)]
        return [line[x] for line in lines], [line[metric] for line in lines]


def read_runs(paths: Sequence[str | os.PathLike]) -> list[Run]:
    """Read runs; raise InputError, a line for each folder that holds none."""
    names = [Path(os.path.abspath(path)).name for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    runs, problems = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            flags = _read(path, PARAMETERS, lambda text: parse_json(text, FLAGS))
            runs.append(Run(name, flags, _read(path, METRICS, metrics_lines)))
        except InputError as error:
            problems.append(str(error))
    if len(set(map(os.path.realpath, paths))) < max(len(paths), 2):
        problems.append(f"{' '.join(paths)}: expected two or more run folders, each once")
    if problems:
        raise InputError("\n".join(problems))
    return runs


def _read(path: str, name: str, parse: Callable[[str], Any]):
    """Parse a file of a run folder. Raises InputError."""
    file = Path(path) / name
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; expected the --dump_path of a run of train.py"
            + (" that writes it (older versions did not)" if name == METRICS else "")
        )
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: is damaged ({one_line(error)})") from error
    if not content:
        raise InputError(f"{file}: is empty; the run has not logged yet, see --log_interval")
    return content


def metrics_lines(text: str) -> list[dict]:
    """Parse the lines of metrics.jsonl but a last one that is being written.

    A figure that is not finite becomes None, as train.py writes it.
    """
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            found = parse_json(line, strict=False)
            lost = [name for name, value in found.items() if is_not_finite(value)]
            finite = found | dict.fromkeys(lost)
            if problem := type_problem(finite, LINE):
                raise ValueError(problem)
            lines.append(finite)
        except ValueError as error:
            raise ValueError(f"line {number}: {one_line(error)}") from error
    return lines


def is_not_finite(value: object) -> bool:
    """True for NaN and infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def flag_table(runs: Sequence[Run]) -> str:
    """Lay out the flags that differ, a column a run; flags that a version lacks are -."""
    names = sorted({name for run in runs for name in run.flags} - UNRELATED)
    rows = []
    for name in names:
        shown = [json.dumps(run.flags[name]) if name in run.flags else "-" for run in runs]
        if len(set(shown)) > 1:
            rows.append([plain(name), *(plain(text.strip('"')) for text in shown)])
    if not rows:
        return "No flag differs."
    return markdown([["flag", *(plain(run.name) for run in runs)], *rows])


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """List the metrics that any run has, in the order of TITLES, then others."""
    found = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    known = [name for name in TITLES if name in found]
    return known + [name for name in found if name not in (*known, *COUNTERS)]


def figure_table(runs: Sequence[Run]) -> str:
    """Lay out the last value of each metric, and the update that each run has reached.

    Of held-out figures those of the first weights, too.
    """
    rows = [["last update", *(str(run.lines[-1]["update"]) for run in runs)]]
    for metric in metrics_of(runs):
        curves = [run.curve(metric, "update") for run in runs]
        rows.append([plain(metric), *(figure_cell(values[-1:]) for _, values in curves)])
        first = [[y for x, y in zip(*curve, strict=True) if x == 0] for curve in curves]
        if any(first):
            rows.append([f"{plain(metric)}, first weights", *map(figure_cell, first)])
    return markdown([["last figure", *(plain(run.name) for run in runs)], *rows])


def figure_cell(values: Sequence[float]) -> str:
    """Write the first of some figures; - where there is none."""
    return f"{values[0]:.5g}" if values else "-"


def held_out_table(run: Run) -> str | None:
    """Lay out a run's held-out figures, of its first weights and of its last; None without any."""
    rows = []
    for metric in metrics_of([run]):
        steps, values = run.curve(metric, "update")
        if metric.startswith("eval/") and values:
            first, last = values[:1] if steps[0] == 0 else [], values[-1:]
            rows.append([plain(TITLES.get(metric, (metric,))[0]), *map(figure_cell, (first, last))])
    return markdown([["while training", "first weights", "last"], *rows]) if rows else None


def facts_of(runs: Sequence[Run]) -> dict[str, list]:
    """Collect what a heading says of runs: their models, seeds, updates."""

    def model(flags: Mapping[str, Any], role: str, path: str | None) -> str | None:
        kind = flags.get(f"{role}_type")
        shown = [
            *([kind] if kind not in (None, AUTO) else []),
            *([short_path(path)] if path else []),
        ]
        return " ".join(shown) or None

    flags = [run.flags for run in runs]
    return {
        "teacher": [model(own, "teacher", own.get("teacher_name")) for own in flags],
        "student": [
            model(own, "student", own.get("student") or own.get("student_config")) for own in flags
        ],
        "seed": [own.get("seed") for own in flags],
        "updates": [f"{run.lines[-1]['update']:,}" for run in runs],
    }


def draw(runs: Sequence[Run], path: str | os.PathLike, x: str) -> None:
    """Draw every metric of the runs over the counter x, a panel each, a look a run."""
    metrics = metrics_of(runs)
    columns = min(3, len(metrics))
    size = 5.2 * columns, 3.4 * -(-len(metrics) // columns)
    looks = [look_of_run(number) for number in range(len(runs))]
    with picture(path, len(metrics), size, columns) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            draw_metric(panel, runs, looks, metric, x)
        set_heading(figure, f"{len(runs)} runs of train.py", facts_of(runs))
        add_legend(figure, [run.name for run in runs], looks, "line")


def draw_metric(panel, runs: Sequence[Run], looks: Sequence[Look], metric: str, x: str) -> None:
    """Draw a metric of the runs over the counter x."""
    curves = [run.curve(metric, x) for run in runs]
    for number, (curve, look) in enumerate(zip(curves, looks, strict=True)):
        draw_line(panel, *curve, look, number)
    title, label = TITLES.get(metric, (metric, f"{metric} (unit not known)"))
    panel.set_title(printable(title))
    values = [y for _, ys in curves for y in ys if math.isfinite(y)]
    if not values:
        say_instead(panel, "no finite figure")
        return
    panel.set(xlabel=X_LABELS[x], ylabel=printable(label))
    count_on(panel.xaxis)
    if metric in LOGARITHMIC and min(values) > 0:
        set_log(panel, "y", min(values), max(values))
