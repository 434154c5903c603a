"""Compare runs of train.py: the flags that differ, the last figures, the curves.

Reads parameters.json and metrics.jsonl of each run folder, also while the run is being trained.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distil.losses import LOSSES
from distil.reporting.plots import picture
from distil.reporting.tables import markdown
from utils import InputError, one_line

PARAMETERS, METRICS = "parameters.json", "metrics.jsonl"
COUNTERS = ("update", "micro_batches", "epoch")
# Flags that say where and how often a run was started, not what it does.
UNRELATED = {"dump_path", "force", "resume", "local_rank"}
# Metric -> (title, unit); the losses' titles are those of LOSSES.
TITLES = {
    "loss": ("weighted sum of the losses", ""),
    **{f"loss_{name}": (loss.title, "") for name, loss in LOSSES.items()},
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm before clipping", ""),
    "tokens_per_s": ("speed", "tokens a second"),
    "mfu": ("model FLOPs utilization", "share of the peak"),
    "eval/loss": ("held out: language-model loss", "nats a token"),
    "eval/kl": ("held out: KL to the teacher (T = 1)", "nats a token"),
    "eval/perplexity": ("held out: perplexity", ""),
    "eval/accuracy": ("held out: accuracy, top-1", "share of tokens"),
    "eval/agreement": ("held out: agreement with the teacher, top-1", "share of tokens"),
}
STYLES = ("-", "--", "-.", ":")  # runs are told apart in a grey print, too


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's flags and the lines of its metrics. name: the folder's, for tables."""

    name: str
    flags: Mapping[str, Any]
    lines: Sequence[Mapping[str, float | None]]

    def curve(self, metric: str, x: str) -> tuple[list, list]:
        """Return a metric's values over the counter x: (xs, ys)."""
        lines = [line for line in self.lines if line.get(metric) is not None]
        return [line[x] for line in lines], [line[metric] for line in lines]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read runs; raise InputError, a line for each folder that holds none."""
    names = [Path(os.path.abspath(path)).name for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    runs, problems = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            flags = _read(path, PARAMETERS, json.loads)
            runs.append(Run(name, flags, _read(path, METRICS, _lines)))
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
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is damaged ({one_line(error)})") from error
    if not content:
        raise InputError(f"{file}: is empty; the run has not logged yet, see --log_interval")
    return content


def _lines(text: str) -> list[dict]:
    """Parse the lines of metrics.jsonl but a last one that is being written."""
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
            if not all(isinstance(lines[-1][name], int) for name in COUNTERS):
                raise ValueError(f"no {', '.join(COUNTERS)}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number}: {one_line(error)}") from error
    return lines


def flag_table(runs: Sequence[Run]) -> str:
    """Lay out the flags that differ, a column a run; flags that a version lacks are -."""
    names = sorted({name for run in runs for name in run.flags} - UNRELATED)
    rows = []
    for name in names:
        shown = [json.dumps(run.flags[name]) if name in run.flags else "-" for run in runs]
        if len(set(shown)) > 1:
            rows.append([name, *(text.strip('"') for text in shown)])
    if not rows:
        return "No flag differs."
    return markdown([["flag", *(run.name for run in runs)], *rows])


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """List the metrics that any run has, in the order of TITLES, then others."""
    found = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    known = [name for name in TITLES if name in found]
    return known + [name for name in found if name not in (*known, *COUNTERS)]


def figure_table(runs: Sequence[Run]) -> str:
    """Lay out the last value of each metric, and the update that each run has reached."""
    rows = [["last update", *(str(run.lines[-1]["update"]) for run in runs)]]
    for metric in metrics_of(runs):
        last = [run.curve(metric, "update")[1][-1:] for run in runs]
        rows.append([metric, *(f"{value[0]:.5g}" if value else "-" for value in last)])
    return markdown([["last figure", *(run.name for run in runs)], *rows])


def draw(runs: Sequence[Run], path: str | os.PathLike, x: str) -> None:
    """Draw every metric of the runs over the counter x, a panel each, a colour a run."""
    metrics = metrics_of(runs)
    columns = min(3, len(metrics))
    size = 5.2 * columns, 3.4 * -(-len(metrics) // columns) + 0.5
    with picture(path, len(metrics), size, columns) as (figure, panels):
        for panel, metric in zip(panels, metrics, strict=True):
            for number, run in enumerate(runs):
                style = STYLES[number % len(STYLES)]
                xs, ys = run.curve(metric, x)
                is_single = len(xs) == 1  # no line to see
                look = {"linestyle": style, "marker": "o" if is_single else None}
                panel.plot(xs, ys, color=f"C{number % 10}", label=_plain(run.name), **look)
            title, unit = TITLES.get(metric, (metric, ""))
            panel.set(title=title, xlabel=X_LABELS[x], ylabel=unit or metric)
            panel.grid(alpha=0.3)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)))


X_LABELS = {
    "update": "updates",
    "micro_batches": "micro-batches of all processes",
    "epoch": "epoch, from 0",
}


def _plain(text: str) -> str:
    """Escape what matplotlib takes for a formula or hides from a legend."""
    return text.replace("$", r"\$").lstrip("_") or "run"
