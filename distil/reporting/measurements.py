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
from utils import InputError, one_line


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
        kept = json.loads(path.read_text(encoding="utf-8"))
        paths = {role: size["path"] for role, size in kept["sizes"].items()}
        is_of_plan = any_plan or kept["plan"] == json.loads(json.dumps(facts)) or facts is None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is no readable file of ours ({one_line(error)}); take it away"
        ) from error
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
