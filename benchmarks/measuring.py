"""Time a step whole and by stage, its memory, and the ceilings of the device."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.reference_step import PlainStep, TunedStep
from benchmarks.workload import STAGE_UPDATES, Job, make_distiller, make_models, make_workload
from distil.data.batches import MicroBatch
from distil.flops import DTYPES, best_seconds, clock_s, product_rate, size_of, update_flops
from distil.system.memory import process_memory
from distiller import Distiller
from grouped_batch_sampler import Update

STAGES = ("data", "teacher", "student forward", "head and losses", "backward", "optimizer")
# Of the ceilings: rows of square matrices that are multiplied, bytes that are copied.
MATMUL_SIZES = {"cpu": [1024, 2048], "cuda": [4096, 8192]}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}

# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Add up the seconds of each wrapped function, without those of wrapped ones inside it."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []  # of each running function: seconds of functions inside it

    def wrap(self, stage: str, function: Callable) -> Callable:
        """Return the function, timed as `stage` with a wait for the device at both ends."""

        def timed(*args, **kwargs):
            started = clock_s(self.device)
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = clock_s(self.device) - started
                self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inside.pop()
                if self._inside:
                    self._inside[-1] += elapsed

        return timed


def watch_stages(watch: Stopwatch, step: Distiller | PlainStep) -> None:
    """Time the stages of a step from now on.

    The rest of an update is the backward pass, the rest of a step the optimizer.
    """
    student = step.model.student if isinstance(step, Distiller) else step.student
    for stage, owner, method in (
        ("optimizer", step, "launch"),
        ("backward", step, "_accumulate" if isinstance(step, Distiller) else "accumulate"),
        (
            "head and losses",
            *((step.model, "forward") if isinstance(step, Distiller) else (step, "losses")),
        ),
        ("teacher", step.teacher.base_model, entrance(step.teacher.base_model)),
        ("student forward", student.base_model, entrance(student.base_model)),
    ):
        setattr(owner, method, watch.wrap(stage, getattr(owner, method)))


def entrance(module: torch.nn.Module) -> str:
    """Name the method that a call of a module enters.

    A compiled module's is not forward: a changed forward would be compiled again.
    """
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


def start_watching_memory(device: str) -> int:
    """Reset the peak; return the memory in use, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Not allowed everywhere: then the peak may be that of building the models.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def peak_memory(device: str) -> int:
    """Return the peak since the reset, in bytes: of a GPU's tensors, or of the whole process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")


# --------------------------------------------------------------------------------------------------
# Updates
# --------------------------------------------------------------------------------------------------


STEPS = {"distiller": make_distiller, "reference": PlainStep, "tuned": TunedStep}


def run_steps(job: Job) -> dict:
    """Time whole updates undisturbed, then a few more stage by stage."""
    workload = make_workload(job)
    teacher, student = make_models(job)
    sizes = size_of(teacher), size_of(student)
    step = STEPS[job.kind](job, teacher, student)
    num_timed, num_staged = job.warmup + job.updates, min(job.updates, STAGE_UPDATES)
    updates = workload.updates(job, num_timed + num_staged)
    baseline = start_watching_memory(job.device) - moment_bytes(step.optimizer)
    with contextlib.closing(workload.batches(updates, step.ready)) as batches:
        timed = time_updates(job, step, updates[:num_timed], batches)[job.warmup :]
        peak = peak_memory(job.device)
        watch = Stopwatch(job.device)
        watch_stages(watch, step)
        waiting = stopped_iterator(watch, batches)
        time_updates(job, step, updates[num_timed:], waiting)
    measured = updates[job.warmup : num_timed]
    return {
        "step_s": [seconds for seconds, _ in timed],
        "skipped_updates": sum(not np.isfinite(norm) for _, norm in timed),
        "tokens": [int(workload.lengths(update.planned).sum()) for update in measured],
        "flops": [update_flops(*sizes, workload.lengths(update.planned)) for update in measured],
        "stages_s": {stage: watch.seconds.get(stage, 0.0) / num_staged for stage in STAGES},
        # The kernel's counters lag by a few pages a thread.
        "memory": {"models": baseline, "peak": max(peak, baseline), "state": state_bytes(student)},
    }


def time_updates(
    job: Job, step, updates: list[Update], batches: Iterator[MicroBatch]
) -> list[tuple[float, float]]:
    """Do updates as training does between two logs: (seconds, gradient norm) of each.

    Includes waiting for batches. An update's report is read once the next one has been launched.
    """
    marks, begun = [mark(job.device)], []
    for update in updates:
        numbers, num = [planned.number for planned in update.planned], len(update.passes)
        begun.append(step.launch(itertools.islice(batches, num), numbers, num))
        marks.append(mark(job.device))
        for earlier in begun[-2:-1]:
            earlier.read()
    norms = [one.read().grad_norm for one in begun]
    return list(
        zip(itertools.starmap(seconds_between, itertools.pairwise(marks)), norms, strict=True)
    )


def mark(device: str) -> "float | torch.cuda.Event":
    """Mark a time: of the host's clock, or, without a wait, of the work launched on the GPU."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(
    earlier: "float | torch.cuda.Event", later: "float | torch.cuda.Event"
) -> float:
    """Return the time between two marks."""
    if isinstance(earlier, float):
        return later - earlier
    later.synchronize()
    return earlier.elapsed_time(later) / 1000


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of an optimizer's state."""
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def state_bytes(student: torch.nn.Module) -> int:
    """Count the bytes of the trained parameters' gradients and two moments."""
    return 3 * sum(
        parameter.nbytes for parameter in student.parameters() if parameter.requires_grad
    )


def stopped_iterator(watch: Stopwatch, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the batches; time the wait for each as the stage "data"."""
    next_batch = watch.wrap("data", functools.partial(next, batches, None))
    return iter(next_batch, None)


def run_ceilings(job: Job) -> dict:
    """Measure the fastest matrix product (FLOP/s) and copy (bytes read and written a second)."""
    dtype, is_tiny = DTYPES[job.precision], job.size == "tiny"
    rates = {}
    for size in [256] if is_tiny else MATMUL_SIZES[job.device]:
        left, right = (torch.randn(size, size, device=job.device).to(dtype) for _ in range(2))
        rates[size] = product_rate(left, right)
    source = torch.randint(
        127, (2**22 if is_tiny else COPY_BYTES[job.device],), dtype=torch.int8, device=job.device
    )
    target = torch.empty_like(source)
    copy_s = best_seconds(job.device, lambda: target.copy_(source))
    return {"matmul_flops": rates, "copy_bytes_s": 2 * source.numel() / copy_s}
