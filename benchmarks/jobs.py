"""Jobs: the measurements of the benchmark, each in a separate process, unaffected by others.

scripts/benchmark.py starts itself anew with --job for each; a job answers with one line of JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys

import torch

from benchmarks.agreement import run_check
from benchmarks.cpu_pieces import without
from benchmarks.measuring import run_ceilings, run_steps
from benchmarks.training_run import run_training
from benchmarks.workload import ROOT, Job
from utils import InputError, is_out_of_memory, logger, one_line

PROGRAM = ROOT / "scripts" / "benchmark.py"
JOBS = {
    "check": run_check,
    "ceilings": run_ceilings,
    "distiller": run_steps,
    "reference": run_steps,
    "tuned": run_steps,
    "train.py": run_training,
}
# Of processes that run the tuned step: the C library keeps freed memory, as train.py asks it to.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def out_of_memory(job: Job) -> str:
    """Word the problem of a micro-batch that was too large, with the flags to lower."""
    tokens = job.batch_size * job.length
    return (
        f"{job.name}: out of memory at micro-batches of up to {tokens} tokens; lower --batch_size"
        " or --length"
    )


def do_job(job: Job) -> None:
    """Run a job in this process; print its result as one line of JSON."""
    if job.threads:
        torch.set_num_threads(job.threads)
    try:
        with without(job.without):
            found = JOBS[job.kind](job)
    except (RuntimeError, MemoryError) as error:
        problem = (
            out_of_memory(job) if is_out_of_memory(error) else f"{job.name}: {one_line(error)}"
        )
        found = {"problem": problem}
    print(json.dumps(found), flush=True)


def start_job(job: Job) -> dict:
    """Run a job in a new process; return its result. Raises InputError with its last line."""
    command = [sys.executable, str(PROGRAM), "--job", json.dumps(dataclasses.asdict(job))]
    environment = {**os.environ, **(MALLOC if job.kind == "tuned" else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == -9:
        return {"problem": out_of_memory(job)}  # killed by Linux
    if done.returncode != 0:
        said = (done.stderr.splitlines() or [f"ended with status {done.returncode}"])[-1]
        raise InputError(said.split("error: ", 1)[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_ceilings(jobs: list[Job]) -> dict[str, dict]:
    """Measure the device's ceilings in every precision that occurs."""
    precisions = dict.fromkeys(job.precision for job in jobs)
    return {
        p: start_job(dataclasses.replace(jobs[0], kind="ceilings", precision=p)) for p in precisions
    }


def run_rounds(jobs: list[Job], num_rounds: int, tolerates_problems: bool) -> list[list[dict]]:
    """Run all jobs in turn, round after round; return the results of each job's rounds.

    A job with a problem is not run again. Raises InputError with it unless `tolerates_problems`.
    """
    rounds: list[list[dict]] = [[] for _ in jobs]
    for number in range(num_rounds):
        for found, job in zip(rounds, jobs, strict=True):
            if any("problem" in one for one in found):
                continue
            logger.info("Round %d of %d: %s.", number + 1, num_rounds, job.name)
            found.append(start_job(job))
            if "problem" in found[-1] and not tolerates_problems:
                raise InputError(found[-1]["problem"])
    return rounds
