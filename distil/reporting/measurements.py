"""Sizes and speeds of a report's models: measured once, then kept in measurements.json."""

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path

from distil.reporting import latency
from distil.reporting.plan import Plan
from distil.reporting.sizes import measure_size
from distil.system.files import write_json
from distil.system.json_files import Above, load_json
from utils import InputError, one_line

# The types of what is kept.
SOME, SPREAD = Above(0), dict.fromkeys(("median", "least", "largest"), Above(0))
SIZE = {
    **dict.fromkeys(("name", "path", "model_type", "head", "vocabulary_sha256"), str),
    **dict.fromkeys(("parameters_base", "parameters", "weights_bytes"), SOME),
    **dict.fromkeys(("float32_bytes", "float16_bytes", "vocabulary_size"), SOME),
    **{"weights_dtypes": [str], "longest_input": (SOME, None)},
}
TIMES = dict.fromkeys(("latency_ms", "sentences_s", "speed_up"), SPREAD)
ROW = {"device": str, "batch_size": int, "padding": str, "models": {...: TIMES}}
SPEED = {
    **{"rows": [ROW], "inputs": str, "passes": int, "dtype": str, "threads": int},
    "machine": {...: (str, int, float, bool, None)},
}
MEASUREMENTS = {"sizes": {...: SIZE}, "speed": (SPEED, None), "date": (str, None)}


def plan_facts(plan: Plan | None, data: str | None) -> dict | None:
    """Describe a timing plan, to tell figures of another one apart; None without timing."""
    return None if plan is None else {**dataclasses.asdict(plan), "data": data}


def read_measurements(
    path: Path, models: Mapping[str, str], facts: dict | None, any_plan: bool
) -> dict | None:
    """Read kept figures; None where there are none of these models and this plan.

    facts: as plan_facts gives them. any_plan: accept figures of every plan.
    """
    if not path.exists():
        return None
    try:
        kept = load_json(path, MEASUREMENTS)
        for row in (kept["speed"] or {"rows": []})["rows"]:
            if row["models"].keys() != kept["sizes"].keys():
                raise ValueError("sizes and speed are of other models")
    except ValueError as error:
        raise InputError(
            f"{path}: is no readable file of ours ({one_line(error)}); take it away"
        ) from error
    paths = {role: size["path"] for role, size in kept["sizes"].items()}
    is_of_plan = any_plan or facts is None or kept.get("plan") == json.loads(json.dumps(facts))
    return kept if paths == models and is_of_plan else None


def measure(path: Path, models: Mapping[str, str], plan: Plan | None, data: str | None) -> dict:
    """Measure sizes and, by a plan, speed; keep them at `path`."""
    sizes = {role: measure_size(role, name) for role, name in models.items()}
    speed = None
    if plan is not None:
        sentences = latency.read_sentences(data)[: plan.num_sentences] if data else None
        speed = latency.measure(models, plan, sentences, "model")
    found = {
        "sizes": sizes,
        "speed": speed,
        "plan": plan_facts(plan, data),
        "date": f"{datetime.date.today()}",
    }
    write_json(path, found)
    return found


def measurements(
    path: Path,
    models: Mapping[str, str],
    plan: Plan | None,
    data: str | None,
    *,
    no_run: bool,
    again: bool,
) -> dict:
    """Return {"sizes": {role: ..}, "speed": latency.measure's, "plan", "date"}, kept or measured.

    plan, data: the timing and its text; plan None: leave speed out. no_run: measure nothing.
    again: measure though figures are kept.
    """
    if no_run or not again:
        kept = read_measurements(path, models, plan_facts(plan, data), any_plan=no_run)
        if kept is not None:
            return kept if plan is not None else {**kept, "speed": None}
    if no_run:
        return {"sizes": {}, "speed": None, "date": None}
    return measure(path, models, plan, data)
