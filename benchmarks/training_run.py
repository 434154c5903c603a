"""Time train.py as a program, on the sequences that the bare step was timed on."""

import dataclasses
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.workload import (
    LEARNING_RATE,
    PAIR_ROWS,
    ROOT,
    Job,
    configurations,
    make_models,
    make_tokenizer,
    make_workload,
    synthetic_counts,
)
from distil.data.cards import write_token_counts
from distil.flops import size_of, update_flops
from distil.models.architectures import ARCHITECTURES
from distil.models.hub import quiet_transformers
from distil.models.language_model import build_network
from distil.system.files import write_json
from utils import InputError

TRAIN_FLAGS = {"fp32": [], "fp16": ["--fp16"], "bf16": ["--bf16"]}  # of train.py


def run_training(job: Job) -> dict:
    """Run train.py on the job's sequences; read its speed after start-up from its log."""
    every, num_windows = max(job.updates, job.warmup), 3
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        write_training_inputs(job, folder)
        iterations = every * job.micro_batches
        done = subprocess.run(
            training_command(job, folder, every * (num_windows + 1), iterations),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise InputError(
                f"train.py: ended with status {done.returncode}:"
                f" {' '.join(done.stderr.splitlines()[-1:])}"
            )
        clocks = logged_times(folder / "run")
    workload = make_workload(job)
    sizes = [
        size_of(build_network(ARCHITECTURES[row_type], config))
        for row_type, config in configurations(job)
    ]
    updates = workload.updates(job, every * (num_windows + 1))
    windows = [
        workload.lengths(
            itertools.chain(*(one.planned for one in updates[k * every : (k + 1) * every]))
        )
        for k in range(1, num_windows + 1)
    ]
    return {
        "step_s": [
            (clocks[(k + 1) * iterations] - clocks[k * iterations]) / every
            for k in range(1, num_windows + 1)
        ],
        "skipped_updates": 0,
        "tokens": [int(lengths_B.sum()) / every for lengths_B in windows],
        "flops": [update_flops(*sizes, lengths_B) / every for lengths_B in windows],
        "stages_s": None,
        "memory": None,
    }


def write_training_inputs(job: Job, folder: Path) -> None:
    """Write teacher, tokenizer, the student's configuration and first weights, and the counts."""
    cpu_job = dataclasses.replace(job, device="cpu")
    teacher, student = make_models(cpu_job)
    with quiet_transformers():
        teacher.save_pretrained(folder / "teacher")
    make_tokenizer(job.pair, teacher.config.vocab_size, job.length).save_pretrained(
        folder / "teacher"
    )
    torch.save(student.state_dict(), folder / "first_weights.pth")
    content = {
        k: v
        for k, v in student.config.to_diff_dict().items()
        if k not in ("transformers_version", "dtype")
    }
    write_json(folder / "student.json", content)
    write_token_counts(folder / "counts", synthetic_counts(teacher.config.vocab_size), {})


def training_command(job: Job, folder: Path, max_steps: int, log_interval: int) -> list[str]:
    """Make the command line of train.py for a job's updates."""
    row = PAIR_ROWS[job.pair]
    flags = {
        "student_type": row.student_type,
        "student_config": folder / "student.json",
        "teacher_type": row.teacher_type,
        "teacher_name": folder / "teacher",
        "student_pretrained_weights": folder / "first_weights.pth",
        "data_file": job.data_file,
        "dump_path": folder / "run",
        "batch_size": job.batch_size,
        "max_steps": max_steps,
        "gradient_accumulation_steps": job.micro_batches,
        "tokens_per_pass": job.tokens_per_pass,
        "log_interval": log_interval,
        "seed": job.seed,
        "learning_rate": LEARNING_RATE,
        "n_gpu": int(job.device == "cuda"),
        "alpha_clm": 0.0,
    }
    flags |= {f"alpha_{name}": alpha for name, alpha in row.alphas.items()}
    words = [
        "--freeze_pos_embs",
        *TRAIN_FLAGS[job.precision],
        *(["--compile"] if job.compiles else []),
        "--pack_sequences" if job.packs else "--no-pack_sequences",
    ]
    if "mlm" in row.alphas:
        flags["token_counts"], words = folder / "counts", [*words, "--mlm"]
    pairs = itertools.chain.from_iterable(
        (f"--{name}", str(value)) for name, value in flags.items()
    )
    return [sys.executable, str(ROOT / "train.py"), *pairs, *words]


def logged_times(run_folder: Path) -> dict[int, float]:
    """Read the time of each log: {micro-batches since the start: seconds}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run_folder / "log" / "train"), size_guidance={"scalars": 0})
    log.Reload()
    return {event.step: event.wall_time for event in log.Scalars("losses/loss")}
