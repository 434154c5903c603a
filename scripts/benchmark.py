"""Measure the distillation step on this machine: real tokens a second, FLOP/s, memory, stages.

Times the update of distiller.py on batches as training makes them, with models of full size and
random weights; downloads nothing. --reference puts the same batches through a plain step of the
2019 kind in the same run. Each figure comes from a separate process; shares are of the rate that a
large matrix product reaches here, and of the GPU's data sheet. Before timing, both steps must give
the same losses and gradient. The code is in benchmarks/.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from benchmarks.options import make_parser
    from utils import read_flags_first

    read_flags_first(lambda: make_parser().parse_args())

import argparse
import dataclasses
import itertools
import json
import logging
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.jobs import do_job, measure_ceilings, run_rounds, start_job
from benchmarks.options import make_parser
from benchmarks.summary import add_shares, draw, merged, print_report
from benchmarks.workload import PAIR_ROWS, ROOT, Job, teacher_config, write_synthetic
from distil.data.token_files import MIN_LENGTH, token_file_problem
from distil.models.architectures import ARCHITECTURES
from distil.reporting.machine import describe_machine
from distil.system.compiler import check_compiler
from distil.system.files import require_output, write_json
from distil.system.outputs import is_picture, json_of
from utils import (
    InputError,
    git_facts,
    logger,
    raise_problems,
    run_program,
    setup_logging,
)

SWEPT_SIZES = {"cpu": [2, 5, 10], "cuda": [8, 32, 128]}  # sequences a micro-batch, of --sweep
# Measured, warm-up. On a CPU the heap settles in the third update: 92,000 page faults in the
# second, 500 from then on.
DEFAULT_UPDATES = {"cpu": (5, 3), "cuda": (20, 5)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; set defaults that depend on the device. Raises InputError."""
    args = make_parser().parse_args(argv)
    if args.job:
        return args
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; leave the flag out for the CPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    updates, warmup = DEFAULT_UPDATES[args.device]
    args.updates = args.updates or updates
    args.warmup = warmup if args.warmup is None else args.warmup
    args.batch_size = args.batch_size or (SWEPT_SIZES[args.device] if args.sweep else [5])
    args.precision = args.precision or (precisions_of(args.device) if args.sweep else ["fp32"])
    args.reference_precision = list(dict.fromkeys(["fp32", *(args.reference_precision or [])]))
    longest = longest_length(args)
    args.length = args.length or (longest if args.data_file else min(128, longest))
    problems = number_problems(args, longest) + path_problems(args)
    raise_problems(problems)
    return args


def precisions_of(device: str) -> list[str]:
    """List the precisions that a device computes in natively; most CPUs emulate float16."""
    has_fp16 = device == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return ["fp32", "bf16", "fp16"] if has_fp16 else ["fp32", "bf16"]


def longest_length(args: argparse.Namespace) -> int:
    """Return the length of the longest sequence that the pair's teacher admits."""
    config, row = teacher_config(args.pair, args.size), PAIR_ROWS[args.pair]
    return config.max_position_embeddings - ARCHITECTURES[row.teacher_type].reserved_positions


def number_problems(args: argparse.Namespace, longest: int) -> list[str]:
    """List the numbers, precisions and pieces that can't be used, a line each."""
    problems = [
        f"--{name} {value}: expected at least 1"
        for name in ("batch_size", "micro_batches", "updates", "rounds", "threads")
        for value in (getattr(args, name) if name == "batch_size" else [getattr(args, name)])
        if value is not None and value < 1
    ]
    problems += [
        f"--tokens_per_pass {limit}: expected 0, or {args.length}, the longest sequence, or more"
        for limit in args.tokens_per_pass
        if limit != 0 and limit < args.length
    ]
    if args.pack_sequences and not any(args.tokens_per_pass):
        problems.append("--pack_sequences: packs joined passes; give --tokens_per_pass above 0")
    if args.warmup < 0:
        problems.append(f"--warmup {args.warmup}: expected 0 or more")
    if not MIN_LENGTH < args.length <= longest:
        problems.append(
            f"--length {args.length}: expected {MIN_LENGTH + 1} to {longest}, what the {args.pair}"
            " teacher admits"
        )
    if args.mix and args.data_file:
        problems.append(
            "--mix with --data_file: the file has its own lengths; leave one of them out"
        )
    if args.reference_precision != ["fp32"] and not args.reference:
        problems.append("--reference_precision without --reference: add it, or leave it out")
    for flag in ("precision", "reference_precision"):
        for precision in set(getattr(args, flag)) - set(precisions_of(args.device)):
            problems.append(
                f"--{flag} {precision}: this CPU does not compute in it; take bf16, or a GPU"
            )
    if args.without and args.device != "cpu":
        problems.append(
            f"--without {args.without[0]}: serves a CPU only; leave it out, or take --device cpu"
        )
    return problems


def path_problems(args: argparse.Namespace) -> list[str]:
    """List the paths that can't be read or written, a line each."""
    problems = [token_file_problem(args.data_file, "--data_file")] if args.data_file else []
    inputs = [args.data_file] if args.data_file else []
    for flag, own in {"json": json_of("date", "machine", "git_sha"), "plot": is_picture}.items():
        try:
            if path := getattr(args, flag):
                require_output(path, f"--{flag}", inputs, is_own=own, force=args.force)
        except InputError as error:
            problems.append(str(error))
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        problems.append(f"--plot {args.plot}: expected a name that ends in .png")
    return [problem for problem in problems if problem]


# --------------------------------------------------------------------------------------------------
# From jobs to figures
# --------------------------------------------------------------------------------------------------

# Flags that every job takes as they are.
SHARED = "pair", "size", "device", "length", "micro_batches", "updates", "warmup", "threads", "seed"


def make_jobs(args: argparse.Namespace, data_file: str) -> list[Job]:
    """List the variants; the reference first in each micro-batch size."""
    ours = [
        {"precision": precision, **way}
        for precision, way in itertools.product(args.precision, ways(args))
    ]
    variants = [
        *({"kind": "reference", "precision": p} for p in args.reference_precision),
        *({"kind": "tuned", "precision": p} for p in args.precision),
        *({"kind": "distiller", **variant} for variant in ours),
        *({"kind": "train.py", **variant} for variant in ours if "without" not in variant),
    ]
    wanted = {"reference": args.reference, "tuned": args.tuned, "train.py": args.end_to_end}
    shared = {name: getattr(args, name) for name in SHARED}
    return [
        Job(data_file=data_file, batch_size=batch_size, **variant, **shared)
        for batch_size in args.batch_size
        for variant in variants
        if wanted.get(variant["kind"], True)
    ]


def ways(args: argparse.Namespace) -> list[dict]:
    """List the ways to run our step: its passes, compiled, with one piece of the CPU's kernels off.

    Each is a change of Job's defaults.
    """
    joined = [{"tokens_per_pass": limit} for limit in dict.fromkeys(args.tokens_per_pass)]
    if args.pack_sequences:
        joined += [{**one, "packs": True} for one in joined if one["tokens_per_pass"]]
    compiled = [{"compiles": True, **one} for one in joined] if args.compile else []
    return [*joined, *compiled, *({"without": piece} for piece in dict.fromkeys(args.without))]


def make_checks(args: argparse.Namespace, job: Job) -> dict[str, Job]:
    """List the checks of our step against the reference: every precision, every way to run it."""
    precisions = dict.fromkeys(["fp32", *args.precision])
    checks = [
        dataclasses.replace(job, kind="check", precision=precision, **way)
        for precision, way in itertools.product(precisions, ways(args))
    ]
    return {f"{one.precision} ({one.way})" if one.way else one.precision: one for one in checks}


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, folder: Path) -> dict:
    """Write the sequences, check, measure. Raises InputError where --compile does not work here."""
    if args.compile:
        check_compiler(torch.device(args.device))
    data_file = str(folder / "synthetic") if args.data_file is None else args.data_file
    jobs = make_jobs(args, data_file)
    if args.data_file is None:
        write_synthetic(jobs, args.mix)
    machine = describe_machine(args.device, args.threads)
    check = {how: start_job(one) for how, one in make_checks(args, jobs[0]).items()}
    ceilings = measure_ceilings(jobs)
    rounds = run_rounds(jobs, args.rounds, tolerates_problems=args.sweep)
    rows = [merged(job, found) for job, found in zip(jobs, rounds, strict=True)]
    add_shares(rows, ceilings, machine["device"])
    flags = {name: value for name, value in vars(args).items() if name != "job"}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine,
        "git_sha": git_facts(ROOT)["repo_sha"],
        "flags": flags,
        "check": check,
        "ceilings": ceilings,
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; or run the one job of --job."""
    args = parse(argv)
    if args.job:
        do_job(Job(**json.loads(args.job)))
        return
    setup_logging(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        found = run_all(args, Path(folder))
    print_report(found)
    if args.json:
        write_json(args.json, found)
        logger.info("Wrote %s.", args.json)
    if args.plot:
        draw(found["rows"], args.plot)
        logger.info("Wrote %s.", args.plot)


if __name__ == "__main__":
    run_program(main)
