"""scores.json: the scores of a task's runs, from which report.py makes its tables."""

import datetime
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from distil.models.names import short_name
from distil.system.files import write_json
from utils import git_facts


def write_scores(
    path: str | os.PathLike,
    *,
    task: str,
    model: str,
    score: Mapping[str, float] | None = None,
    runs: Sequence[Mapping[str, Any]],
    teacher: str | None = None,
    flags: Mapping[str, Any],
) -> dict:
    """Write scores.json and return its content.

    runs: one entry per seed: {"seed": 42, "metrics": {name: value}, "num_examples": {split:
    count}}; rates are x100. score: {name: value}, by default the median over the seeds. "spread" is
    (least, largest) over the seeds.
    """
    names = list(runs[0]["metrics"])
    values = {name: [run["metrics"][name] for run in runs] for name in names}
    content = {
        "task": task,
        "model": model,
        "model_name": short_name(model),
        "teacher": teacher,
        "score": dict(score or {name: statistics.median(found) for name, found in values.items()}),
        "spread": {name: [min(found), max(found)] for name, found in values.items()},
        "runs": [dict(run) for run in runs],
        "flags": dict(flags),
        "commit": git_facts(Path(__file__).resolve().parents[2]).get("repo_sha"),
        "date": f"{datetime.date.today()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_json(path, content)
    return content
