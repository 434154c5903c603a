"""Launchers that start a program several times without the variables that make the copies one run.

`srun python train.py` starts one copy a task. Their ranks could be read from SLURM's variables, but
not surely: which GPUs a task sees depends on the cluster's binding, and the address and port where
the tasks meet are in none of them. torchrun knows both.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from utils import EXIT_INPUT_ERROR, InputError

FIRST_COPY_S = 3  # in which the first copy reports: the launcher may end all when one exits
MPI = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


def refuse_srun(environment: Mapping[str, str]) -> None:
    """Raise InputError in one of several tasks that srun started; not in a shell (--pty)."""
    rank = _number(environment, "SLURM_PROCID")
    if rank is None or "SLURM_PTY_PORT" in environment:
        return
    copies = _number(environment, "SLURM_STEP_NUM_TASKS")
    if copies is None and rank > 0:  # no batch script's, whose rank is 0
        copies = _number(environment, "SLURM_NTASKS")
    if copies is not None and copies > 1:
        _refuse(
            environment,
            f"srun started {copies} copies",
            copies,
            rank,
            "SLURM_PROCID",
        )


def refuse_copies(environment: Mapping[str, str]) -> None:
    """Raise InputError in a process that is meant to be one of several, without a launcher.

    srun's tasks, MPI's, and the one process that a batch script starts in place of its job's tasks.
    Interactive shells of salloc have no SLURM_PROCID, or are a step of one task.
    """
    refuse_srun(environment)
    if "SLURM_PTY_PORT" in environment:
        return
    for size, rank_name in MPI:
        copies, rank = _number(environment, size), _number(environment, rank_name)
        if copies is not None and copies > 1 and rank is not None:
            _refuse(
                environment,
                f"MPI started {copies} copies",
                copies,
                rank,
                rank_name,
            )
    tasks, rank = _number(environment, "SLURM_NTASKS"), _number(environment, "SLURM_PROCID")
    is_step = "SLURM_STEP_NUM_TASKS" in environment
    if tasks is not None and tasks > 1 and rank is not None and not is_step:
        what = f"SLURM_NTASKS is {tasks}, this is one process"
        _refuse(environment, what, tasks, rank, "SLURM_PROCID")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def _refuse(
    environment: Mapping[str, str], what: str, copies: int, rank: int, rank_name: str
) -> NoReturn:
    """Raise InputError with the command to start instead; end the other copies in silence."""
    if rank > 0:
        time.sleep(FIRST_COPY_S)
        sys.exit(EXIT_INPUT_ERROR)
    raise InputError(
        f"{what}: without RANK and LOCAL_RANK each runs alone; start"
        f" `{_command(environment, copies)}` (see docs/several-gpus.md), or unset {rank_name} for"
        " independent runs"
    )


def _command(environment: Mapping[str, str], copies: int) -> str:
    """Write the command that starts as many processes with torchrun, one of it on each machine."""
    nodes = [_number(environment, name) for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")]
    machines = min(next((num for num in nodes if num), 1), copies)
    where = "--standalone"
    if machines > 1:
        where = f"--nnodes={machines} --rdzv_backend=c10d --rdzv_endpoint=FIRST_MACHINE:29500"
    command = f"torchrun {where} --nproc_per_node={copies // machines} {Path(sys.argv[0]).name} .."
    is_slurm = "SLURM_PROCID" in environment
    srun = f"srun --ntasks={machines} --ntasks-per-node=1 "
    return f"{srun}{command}" if is_slurm else command
