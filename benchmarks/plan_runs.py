"""How near `train.py --plan` comes to real runs: processor seconds, peak memory, disk, verdicts.

    python benchmarks/plan_runs.py --folder WORK --json FILE [--runs NAME ..]

Each run of RUNS is planned, then trained, by train.py as a program, on random models and random
ids. Compared are processor seconds, because others may use the machine, of the whole process from
start to end. Then runs of LIMITED are planned and trained under limits of memory around the peak
that the run had without (prlimit): the plan must refuse what dies, and no more. Prints tables.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import (
    PAIR_ROWS,
    ROOT,
    make_tokenizer,
    shrunk,
    student_config,
    synthetic_counts,
    teacher_config,
    write_random_ids,
)
from distil.data.cards import write_token_counts
from distil.models.architectures import ARCHITECTURES
from distil.models.hub import quiet_transformers
from distil.models.language_model import build_network
from distil.reporting.machine import describe_machine
from distil.reporting.tables import markdown
from distil.system.files import write_json
from distil.system.memory import ADDRESSES, DATA, RESIDENT, process_memory
from utils import keyed_numpy_generator

SEED, POLL_S = 56, 0.05
FIELDS = RESIDENT, ADDRESSES, DATA


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to plan and to train.

    sizes: teacher's layers, the student's, width, heads, vocabulary. lengths: mean and maximum of
    the sequences' lengths. evaluated: held-out sequences. flags: of train.py.
    """

    pair: str
    sizes: tuple[int, int, int, int, int]
    lengths: tuple[int, int]
    sequences: int
    flags: str
    evaluated: int = 0


BERT, BASE = (4, 2, 256, 4, 30522), (12, 6, 768, 12, 30522)
EVERY = "--log_interval 20 --checkpoint_interval 100"
RUNS = {
    "as typed": Run("bert", BERT, (50, 128), 350, "--batch_size 5"),
    "bf16, token budget": Run(
        "bert", BERT, (50, 128), 600, "--bf16 --max_tokens 4096 --gradient_accumulation_steps 2"
    ),
    "GPT-2": Run("gpt2", (4, 2, 256, 4, 50257), (90, 256), 100, "--batch_size 4"),
    "GPT-2, bf16, evaluated": Run(
        *("gpt2", (6, 3, 384, 6, 50257), (90, 256), 140),
        "--bf16 --batch_size 4 --gradient_accumulation_steps 4 --eval_interval 5",
        evaluated=24,
    ),
    "less memory": Run(
        *("bert", (6, 3, 512, 8, 30522), (50, 64), 400),
        "--activation_checkpointing --batch_size 16 --gradient_accumulation_steps 4",
    ),
    "RoBERTa, evaluated": Run(
        *("roberta", (4, 2, 384, 6, 50265), (40, 96), 400),
        "--bf16 --batch_size 16 --gradient_accumulation_steps 5 --eval_interval 4",
        evaluated=24,
    ),
    "small, many updates": Run(
        *("bert", (2, 1, 128, 2, 5000), (40, 64), 3000),
        f"--batch_size 32 --gradient_accumulation_steps 1 {EVERY}",
    ),
    "base": Run("bert", BASE, (80, 128), 120, "--bf16 --batch_size 5"),
    "long": Run(
        *("bert", BERT, (200, 512), 120),
        "--batch_size 4 --gradient_accumulation_steps 8 --loss_normalization tokens",
    ),
    "large vocabulary": Run(
        *("bert", (4, 2, 256, 4, 119547), (50, 128), 200),
        "--restrict_ce_to_mask --batch_size 8 --gradient_accumulation_steps 4 --keep_checkpoints 2",
    ),
}
# Planned and trained under limits: sequences of each.
LIMITED = {
    "bf16, token budget": 150,
    "GPT-2": 24,
    "less memory": 64,
    "RoBERTa, evaluated": 80,
    "long": 16,
}
# Of the peak of the run without a limit; each is tried on both kinds of limit.
SHARES = {ADDRESSES: (0.85, 1.1), DATA: (0.8, 1.15)}
NOT_TIMED = "--tokens_per_second", "1"
LIMIT_FLAGS = {ADDRESSES: "--as", DATA: "--data"}


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


def make_inputs(run: Run, folder: Path) -> list[str]:
    """Write a run's models, counts and data; return its flags but for dump_path."""
    folder.mkdir(parents=True, exist_ok=True)
    row, (deep, shallow, *widths) = PAIR_ROWS[run.pair], run.sizes
    torch.manual_seed(SEED)
    config = shrunk(teacher_config(run.pair, "base"), deep, *widths)
    with quiet_transformers():
        teacher = build_network(ARCHITECTURES[row.teacher_type], config)
        teacher.save_pretrained(folder / "teacher")
    tokenizer = make_tokenizer(run.pair, config.vocab_size, run.lengths[1])
    tokenizer.save_pretrained(folder / "teacher")
    content = shrunk(student_config(run.pair, "base"), shallow, *widths).to_diff_dict()
    left_out = "transformers_version", "dtype"
    write_json(folder / "student.json", {k: v for k, v in content.items() if k not in left_out})
    write_token_counts(folder / "counts", synthetic_counts(config.vocab_size), {})
    generator = keyed_numpy_generator(SEED, "plan")
    for name, num in {"data": run.sequences, "held_out": run.evaluated}.items():
        if num and not (folder / f"{name}.bin").exists():
            mean, longest = run.lengths
            drawn = np.clip(generator.gamma(2.0, mean / 2, num), 12, longest).astype(np.int64)
            write_random_ids(str(folder / name), run.pair, tokenizer, drawn, generator)
    return flags_of(run, folder)


def flags_of(run: Run, folder: Path) -> list[str]:
    """List the flags of train.py for a run, but for dump_path."""
    row = PAIR_ROWS[run.pair]
    flags = {"student_type": row.student_type, "student_config": folder / "student.json"}
    flags |= {"teacher_type": row.teacher_type, "teacher_name": folder / "teacher"}
    flags |= {"data_file": folder / "data", "n_gpu": 0, "n_epoch": 1, "alpha_clm": 0.0}
    flags |= {f"alpha_{name}": alpha for name, alpha in row.alphas.items()}
    if run.evaluated:
        flags["eval_data_file"] = folder / "held_out"
    if "mlm" in row.alphas:
        flags["token_counts"] = folder / "counts"
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [*words, *["--mlm"] * ("mlm" in row.alphas), *run.flags.split()]


# --------------------------------------------------------------------------------------------------
# Plans and runs
# --------------------------------------------------------------------------------------------------


def watch(command: list[str], log: Path) -> dict:
    """Run a command; return its status, seconds, processor seconds and peaks of memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISTIL_PLAN_CHILD": ""}
    peaks, started = dict.fromkeys(FIELDS, 0), time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while True:
            for field in FIELDS:
                peaks[field] = max(peaks[field], process_memory(field, process.pid))
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                break
            time.sleep(POLL_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s, cpu_s = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return {"status": process.returncode, "wall_s": wall_s, "cpu_s": cpu_s, "peaks": peaks}


def limited(kind: str | None, num_bytes: int) -> list[str]:
    """Begin a command line that sets a limit."""
    return [] if kind is None else ["prlimit", f"{LIMIT_FLAGS[kind]}={num_bytes}"]


def plan_of(flags: list[str], folder: Path, kind: str | None = None, num_bytes: int = 0) -> dict:
    """Plan a run; return its plan, or {"refused": the line}."""
    command = [*limited(kind, num_bytes), sys.executable, str(ROOT / "train.py"), "--plan", "json"]
    done = subprocess.run(
        [*command, "--dump_path", str(folder / "planned"), *flags],
        **{"capture_output": True, "text": True},
        env={**os.environ, "OMP_NUM_THREADS": "1", "DISTIL_PLAN_CHILD": ""},
    )
    assert not (folder / "planned").exists(), "a plan writes nothing"
    if done.returncode == 2:
        return {"refused": done.stderr.splitlines()[-1].split("error: ", 1)[-1]}
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train(flags: list[str], folder: Path, kind: str | None = None, num_bytes: int = 0) -> dict:
    """Train a run; return what it took, and the bytes of its folder on the disk."""
    run = folder / "run"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    command = [*limited(kind, num_bytes), sys.executable, str(ROOT / "train.py")]
    found = watch([*command, "--dump_path", str(run), *flags], folder / "run.log")
    stats = [path.stat() for path in run.rglob("*") if path.is_file() and "log" not in path.parts]
    return {**found, "disk": sum({stat.st_ino: stat.st_size for stat in stats}.values())}


def measure(name: str, folder: Path) -> dict:
    """Plan and train one run; return both."""
    flags = make_inputs(RUNS[name], folder)
    plan = plan_of(flags, folder)
    found = train(flags, folder)
    assert found["status"] == 0, (folder / "run.log").read_text()
    return {"name": name, "flags": RUNS[name].flags, "plan": plan, "run": found}


def judge(name: str, folder: Path) -> list[dict]:
    """Plan and train a short run under limits; return verdicts and what happened."""
    run = dataclasses.replace(RUNS[name], sequences=LIMITED[name], evaluated=4)
    flags = make_inputs(run, folder)
    found = train(flags, folder)
    assert found["status"] == 0, (folder / "run.log").read_text()
    rows, peaks = [], found["peaks"]
    for kind, shares in SHARES.items():
        for share in shares:
            num_bytes = int(peaks[kind] * share)
            plan = plan_of([*flags, *NOT_TIMED], folder, kind, num_bytes)
            found = train(flags, folder, kind, num_bytes)
            rows.append(
                {
                    **{"name": name, "kind": kind, "share": share, "bytes": num_bytes},
                    **{"refused": plan.get("refused"), "status": found["status"]},
                    "said": (folder / "run.log").read_text().splitlines()[-1],
                }
            )
            print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def off(planned: float, real: float) -> str:
    """Write a planned figure's distance from the real one."""
    return f"{planned / real - 1:+.1%}"


def table_of_runs(rows: list[dict]) -> str:
    """Lay out what was planned beside what was."""
    head = ["run", "CPU s: plan", "run", "off", "peak MB: plan", "run", "off", "disk MB: plan"]
    lines = [[*head, "run"]]
    for row in rows:
        plan, run = row["plan"], row["run"]
        cpu_s, memory = sum(plan["cpu_s"].values()), plan["memory"]["main"]
        peak, disk = run["peaks"][RESIDENT], plan["disk"]["final"]
        lines.append([row["name"], f"{cpu_s:.1f}", f"{run['cpu_s']:.1f}", off(cpu_s, run["cpu_s"])])
        lines[-1] += [f"{memory / 1e6:,.0f}", f"{peak / 1e6:,.0f}", off(memory, peak)]
        lines[-1] += [f"{disk / 1e6:,.1f}", f"{run['disk'] / 1e6:,.1f}"]
    return markdown(lines)


def is_right(row: dict) -> bool:
    """True where the plan refused what died, or let pass what was trained."""
    return (row["refused"] is None) == (row["status"] == 0)


def table_of_verdicts(rows: list[dict]) -> str:
    """Lay out the verdicts beside what happened."""
    names = {ADDRESSES: "addresses (--as)", DATA: "data (--data)"}
    lines = [["run", "limit of", "MB", "of the peak", "plan", "run", "right"]]
    for row in rows:
        said = "fits" if row["refused"] is None else "refused"
        happened = "trained" if row["status"] == 0 else f"status {row['status']}"
        sizes = f"{row['bytes'] / 1e6:,.0f}", f"{row['share']:.2f}"
        right = "yes" if is_right(row) else "no"
        lines.append([row["name"], names[row["kind"]], *sizes, said, happened, right])
    return markdown(lines)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True, type=Path, help="of inputs and runs")
    parser.add_argument("--json", required=True, help="output")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--limited", nargs="*", default=list(LIMITED), choices=list(LIMITED))
    args = parser.parse_args()
    folders = {name: args.folder / name.replace(" ", "-").replace(",", "") for name in RUNS}
    rows, verdicts = [], []
    for name in args.runs:
        rows.append(measure(name, folders[name]))
        print(table_of_runs(rows[-1:]), flush=True)
    for name in args.limited:
        verdicts += judge(name, folders[name] / "limited")
    machine = describe_machine("cpu", 1)
    write_json(args.json, {"machine": machine, "runs": rows, "verdicts": verdicts})
    print(table_of_runs(rows), "", table_of_verdicts(verdicts), sep="\n")


if __name__ == "__main__":
    main()
