"""Compare models: figures of each task, retention of the teacher's quality, notes."""

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from distil.models.names import short_name
from distil.reporting.scores import KINDS_OF_LM
from distil.reporting.tables import plain
from distil.tasks.tasks import GLUE_TASKS, TASKS, glue_macro
from utils import git_facts

FORMAT = "distil report 1"


def figure_of(task: str, content: Mapping) -> dict:
    """Extract a task's figure from its scores: {"score", "least", "largest", "num_seeds", ..}."""
    name = TASKS[task].score_key
    of_seeds = [run["metrics"][name] for run in content["runs"]]
    return {
        "score": content["score"][name],
        "least": min(of_seeds),
        "largest": max(of_seeds),
        "num_seeds": len(of_seeds),
        "metrics": content["score"],
        "fine_tuned_with_teacher": content.get("teacher"),
        "num_examples": content["runs"][0].get("num_examples"),
        "date": content.get("date"),
        "commit": content.get("commit"),
        "flags": content.get("flags"),
        "kind": content["kind"],
    }


def retention(score: float, teacher: float, lower_is_better: bool) -> float | None:
    """Return the share of its teacher's quality that a model keeps, in %; None for a teacher <= 0.

    100 x score / teacher; where lower is better 100 x teacher / score: twice the teacher's
    perplexity counts as 50.
    """
    part, whole = (teacher, score) if lower_is_better else (score, teacher)
    return 100 * part / whole if whole > 0 and teacher > 0 else None


def is_within_spread(figure: Mapping, teacher: Mapping) -> bool | None:
    """Return whether the difference is below the wider spread over seeds; None without a spread."""
    if max(figure["num_seeds"], teacher["num_seeds"]) < 2:
        return None
    spread = max(row["largest"] - row["least"] for row in (figure, teacher))
    return abs(figure["score"] - teacher["score"]) < spread


def compare(task: str, figures: Mapping[str, Mapping]) -> dict:
    """Compare the models' figures on a task; {role: figure}, retention only with a teacher."""
    row = TASKS[task]
    entry = {
        "title": row.title,
        "metric": row.metric_title,
        "lower_is_better": row.lower_is_better,
        "models": dict(figures),
    }
    others = (
        {role: figure for role, figure in figures.items() if role != "teacher"}
        if "teacher" in figures
        else {}
    )
    teacher = figures.get("teacher")
    entry["retention"] = {
        r: (
            retention(f["score"], teacher["score"], row.lower_is_better)
            if f["kind"] == teacher["kind"]
            else None
        )
        for r, f in others.items()
    }
    entry["within_spread"] = {r: is_within_spread(f, teacher) for r, f in others.items()}
    return entry


def macro_score(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Average GLUE's nine tasks, and its eight without WNLI; None where a task is missing."""
    if any(task not in scores for task in GLUE_TASKS if task != "wnli"):
        return {"macro": None, "macro_without_wnli": None}
    found = glue_macro({"wnli": math.nan, **scores})
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def macro_retention(
    macro: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float | None]]:
    """Return each role's macro scores in % of the teacher's; None where either is missing."""
    teacher = macro["teacher"]
    return {
        role: {
            k: retention(v, teacher[k], False) if v is not None and teacher[k] is not None else None
            for k, v in own.items()
        }
        for role, own in macro.items()
        if role != "teacher"
    }


def compose(
    models: Mapping[str, str],
    tasks: Sequence[str],
    found: Mapping[tuple[str, str], Mapping],
    measured: Mapping,
) -> dict:
    """Make the report's content, as report.json holds it.

    models: {role: hub name or folder}. found: {(role, task): scores}. measured: as measurements
    gives them.
    """
    roles = list(models)
    quality = {
        task: compare(
            task,
            {role: figure_of(task, found[role, task]) for role in roles if (role, task) in found},
        )
        for task in tasks
    }
    macro = {
        r: macro_score({t: q["models"][r]["score"] for t, q in quality.items() if r in q["models"]})
        for r in roles
    }
    return {
        "format": FORMAT,
        "date": f"{datetime.date.today()}",
        "commit": git_facts(Path(__file__).resolve().parents[2]).get("repo_sha"),
        "models": {role: {"name": short_name(name), "path": name} for role, name in models.items()},
        "quality": quality,
        "glue": {"scores": macro, "retention": macro_retention(macro)},
        "sizes": measured["sizes"],
        "speed": measured["speed"],
        "measured": measured["date"],
        "notes": notes(quality, measured["sizes"]),
    }


def notes(quality: Mapping[str, Mapping], sizes: Mapping[str, Mapping]) -> list[str]:
    """List what a reader must know to read the tables right, a sentence each."""
    lines = [
        "A score is the median over seeds unless its program says otherwise (least-largest in"
        " brackets); rates x 100."
    ]
    lines.append(
        "% of teacher: 100 x score / teacher's score; not given where the teacher's is not above 0."
    )
    if any(entry["lower_is_better"] for entry in quality.values()):
        lines.append(
            "↓ lower is better: % of teacher is 100 x teacher's / model's there, and no part of a"
            " macro score."
        )
    if any(
        is_within for entry in quality.values() for is_within in entry["within_spread"].values()
    ):
        lines.append(
            "≈ the difference from the teacher is smaller than the spread over seeds (the wider of"
            " the two)."
        )
    lines += [
        f"{entry['title']}: the models were scored on different examples; their scores can't be"
        " compared."
        for entry in quality.values()
        if not is_of_same_examples(entry)
    ]
    if any(
        is_of_one_seed(figure) for entry in quality.values() for figure in entry["models"].values()
    ):
        lines.append("¹ one seed: its spread is not known.")
    helped = {
        (q["title"], r): f["fine_tuned_with_teacher"]
        for q in quality.values()
        for r, f in q["models"].items()
    }
    lines += [
        f"{title}: the {role} was fine-tuned with a teacher for the task, {plain(teacher)}."
        for (title, role), teacher in helped.items()
        if teacher and title != TASKS["lm"].title
    ]
    if any(
        len({figure["kind"] for figure in entry["models"].values()}) > 1
        for entry in quality.values()
    ):
        lines.append(
            "A masked model's perplexity is no causal one's: no % of teacher is given for it."
        )
    if len({size["vocabulary_sha256"] for size in sizes.values()}) > 1:
        lines.append(
            "The models have different vocabularies: perplexities are a token's, and can't be"
            " compared; latency can."
        )
    return lines


def is_of_same_examples(entry: Mapping) -> bool:
    """Return whether all models were scored on as many examples, by the same metrics.

    A text has no examples.
    """
    counts = [
        {k: n for k, n in (figure["num_examples"] or {}).items() if k != "train"}
        for figure in entry["models"].values()
    ]
    names = [set(figure["metrics"]) for figure in entry["models"].values()]
    return entry["lower_is_better"] or (counts[1:] == counts[:-1] and names[1:] == names[:-1])


def is_of_one_seed(figure: Mapping) -> bool:
    """True for a score of one fine-tuning run; held-out text is scored without fine-tuning."""
    return figure["num_seeds"] < 2 and figure["kind"] not in KINDS_OF_LM
