"""Turn the results of jobs into rows, tables and a picture."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.measuring import STAGES
from benchmarks.workload import Job
from distil.flops import nominal_peak
from distil.reporting.plots import (
    INK,
    LOOKS,
    add_legend,
    draw_bars,
    name_rows,
    picture,
    set_heading,
)
from distil.reporting.tables import markdown, share, times

GIB = 2**30
STAGES_ARE = (
    "Stages come from a separate pass over the next updates, in which the device is waited for at"
    " each boundary. Head and losses: both projections, and in Distiller their gradients, too."
    " Data: waiting for the next batch."
)


def merged(job: Job, rounds: list[dict]) -> dict:
    """Merge the results of a variant's rounds into one row."""
    row = {"name": job.name, **dataclasses.asdict(job)}
    problems = [found["problem"] for found in rounds if "problem" in found]
    if problems:
        return {**row, "problem": problems[0]}
    lists = {
        key: [x for found in rounds for x in found[key]] for key in ("step_s", "tokens", "flops")
    }
    rates = [
        tokens / seconds for tokens, seconds in zip(lists["tokens"], lists["step_s"], strict=True)
    ]
    achieved = statistics.median(
        flops / s for flops, s in zip(lists["flops"], lists["step_s"], strict=True)
    )
    row |= {
        **lists,
        "tokens_s": spread(rates),
        "flops_s": achieved,
        "flops_per_token": sum(lists["flops"]) / sum(lists["tokens"]),
    }
    row["skipped_updates"] = sum(found["skipped_updates"] for found in rounds)
    row["round_tokens_s"] = [
        statistics.median(t / s for t, s in zip(found["tokens"], found["step_s"], strict=True))
        for found in rounds
    ]
    has_stages, has_memory = rounds[0]["stages_s"] is not None, rounds[0]["memory"] is not None
    row["stages_s"] = (
        {s: statistics.median(f["stages_s"][s] for f in rounds) for s in STAGES}
        if has_stages
        else None
    )
    row["memory"] = (
        max((f["memory"] for f in rounds), key=lambda memory: memory["peak"])
        if has_memory
        else None
    )
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, min and max of measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def add_shares(rows: list[dict], ceilings: dict[str, dict], device_name: str) -> None:
    """Add to each row its shares of the peaks, and its ratios to the references of its batch size.

    mfu_measured, mfu_nominal: of the measured peak and the data sheet's. ratio: to the reference in
    fp32; ratio_autocast: to the one under autocast in the row's precision, None where not run.
    """
    references = {
        (row["batch_size"], row["precision"]): row["tokens_s"]["median"]
        for row in rows
        if row["kind"] == "reference" and "problem" not in row
    }
    for row in (row for row in rows if "problem" not in row):
        measured = max(ceilings[row["precision"]]["matmul_flops"].values())
        nominal = nominal_peak(device_name, row["precision"])
        row["mfu_measured"] = row["flops_s"] / measured
        row["mfu_nominal"] = None if nominal is None else row["flops_s"] / nominal
        half = None if row["precision"] == "fp32" else row["precision"]
        for name, precision in (("ratio", "fp32"), ("ratio_autocast", half)):
            reference = references.get((row["batch_size"], precision))
            row[name] = None if reference is None else row["tokens_s"]["median"] / reference


def gib(memory: dict[str, int] | None) -> str:
    """Write peak memory: all / beyond the models / beyond gradients and moments, too."""
    if memory is None:
        return "-"
    beyond_models = memory["peak"] - memory["models"]
    return " / ".join(
        f"{value / GIB:.2f}"
        for value in (memory["peak"], beyond_models, beyond_models - memory["state"])
    )


def main_table(rows: list[dict]) -> str:
    """Lay out speed, shares, memory and ratios, a line a variant."""
    lines = [
        [
            "variant",
            "tokens/s (min..max)",
            "update, ms (min..max)",
            "MFU of measured",
            "of nominal",
            "GiB: all / beyond models / and state",
            "x reference",
            "x reference in autocast",
        ]
    ]
    for row in rows:
        if "problem" in row:
            lines.append([row["name"], row["problem"].removeprefix(f"{row['name']}: "), *["-"] * 6])
            continue
        rate, step_ms = row["tokens_s"], spread([1000 * seconds for seconds in row["step_s"]])
        lines.append(
            [
                row["name"],
                f"{rate['median']:,.0f} ({rate['min']:,.0f}..{rate['max']:,.0f})",
                f"{step_ms['median']:,.1f} ({step_ms['min']:,.1f}..{step_ms['max']:,.1f})",
                share(row["mfu_measured"]),
                share(row["mfu_nominal"]),
                gib(row["memory"]),
                times(row["ratio"]),
                times(row["ratio_autocast"]),
            ]
        )
    has_autocast = any(row.get("ratio_autocast") is not None for row in rows)
    return markdown(lines if has_autocast else [line[:-1] for line in lines])


def stage_table(rows: list[dict]) -> str:
    """Lay out each stage of an update, in milliseconds and as a share of their sum."""
    lines = [["stages of an update, ms", *STAGES, "sum"]]
    for row in (row for row in rows if row.get("stages_s")):
        total = sum(row["stages_s"].values())
        cells = [
            f"{1000 * row['stages_s'][stage]:,.1f} ({row['stages_s'][stage] / total:.0%})"
            for stage in STAGES
        ]
        lines.append([row["name"], *cells, f"{1000 * total:,.1f}"])
    return markdown(lines)


def print_report(found: dict) -> None:
    """Print machine, checks, ceilings and tables."""
    machine = found["machine"]
    print(
        f"\nPair {found['flags']['pair']}, {found['flags']['size']} size; {machine['device']};"
        f" {machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}."
    )
    print(
        f"Load of the machine when this began: {machine['load']:.1f} processes on"
        f" {machine['cores']} cores."
    )
    for how, check in found["check"].items():
        print(
            f"Distiller in {how} and the 2019 step in fp32, without dropout: losses differ by "
            f"{check['losses_differ_by']:.1e}, gradients by {check['gradients_differ_by']:.1e}."
        )
    for precision, ceiling in found["ceilings"].items():
        size, rate = max(ceiling["matmul_flops"].items(), key=lambda entry: entry[1])
        print(
            f"Ceilings, {precision}: {rate / 1e12:.3f} TFLOP/s ({size}^3 product), copy"
            f" {ceiling['copy_bytes_s'] / 1e9:.1f} GB/s read + written."
        )
    flops = [row["flops_per_token"] for row in found["rows"] if "problem" not in row]
    if flops:
        print(f"Model FLOPs: {min(flops) / 1e6:,.0f} million a real token.")
    print(f"\n{main_table(found['rows'])}\n\n{stage_table(found['rows'])}\n")
    print(STAGES_ARE, flush=True)
    skipped = {
        row["name"]: row["skipped_updates"] for row in found["rows"] if row.get("skipped_updates")
    }
    for name, number in skipped.items():
        print(
            f"{name}: {number} measured update(s) overflowed and skipped the optimizer.", flush=True
        )


def draw(rows: list[dict], path: str) -> None:
    """Draw tokens/s of each variant with their spread, and the stages of an update, stacked."""
    rows = [row for row in rows if "problem" not in row]
    places, rates = range(len(rows)), [row["tokens_s"] for row in rows]
    medians = [rate["median"] for rate in rates]
    spreads = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
    pairs = [f"{row['pair']} ({row['size']})" for row in rows]
    facts = {
        "pair": pairs,
        "device": [row["device"] for row in rows],
        "seed": [row["seed"] for row in rows],
        "measured updates": [len(row["step_s"]) for row in rows],
    }
    with picture(path, 2, (15, 1.6 + 0.42 * len(rows)), sharey=True) as (figure, (left, right)):
        errors = {"xerr": spreads, "ecolor": INK, "capsize": 3}
        draw_bars(left, places, medians, LOOKS["count"], "{:,.0f}", **errors)
        left.set(title="Speed: median, min to max", xlabel="speed (real tokens a second)")
        ends = np.zeros(len(rows))
        for stage in STAGES:
            stages_s = [row["stages_s"][stage] if row["stages_s"] else 0.0 for row in rows]
            widths = 1000 * np.array(stages_s)
            right.barh(places, widths, left=ends, **LOOKS[stage].bar)
            ends += widths
        for place in (n for n, row in enumerate(rows) if not row["stages_s"]):
            right.text(0, place, " not measured", va="center")
        right.set(title="Stages of an update (a separate pass)", xlabel="time of an update (ms)")
        name_rows(left, [row["name"] for row in rows])
        name_rows(right, [row["name"] for row in rows])
        what = "The distillation step; a name ends in micro-batches x sequences x ids"
        set_heading(figure, what, facts)
        add_legend(figure, STAGES, [LOOKS[stage] for stage in STAGES], "bar")
