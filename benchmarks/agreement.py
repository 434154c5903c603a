"""The check before timing: our step and the plain 2019 step give the same losses and gradient."""

import copy
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.reference_step import PlainStep
from benchmarks.workload import Job, Workload, make_distiller, make_models, make_workload
from distil.data.batches import MicroBatch
from distil.data.packing import make_pass
from utils import InputError

CHECKED_LENGTH = 32
# precision: largest relative difference of a loss, and of the gradient (norm of the difference over
# the norm).
AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, 1e-1), "fp16": (1e-2, 3e-2)}


def run_check(job: Job) -> dict:
    """Compare losses and gradient of our step in a precision with the reference's in fp32.

    On two short micro-batches, in one pass where the job joins any, with the same weights and no
    dropout. Raises InputError where they differ by more than AGREEMENT.
    """
    workload = make_workload(job)
    batches = checked_batches(workload)
    passes, shape = batches, workload.sampler.shape
    if job.tokens_per_pass:
        way = workload.dataset.special.pad, shape and (1, shape[1])
        passes = [make_pass(batches, *way)]
    numbers = list(range(len(batches)))
    teacher, student = make_models(job, has_dropout=False)
    move_apart(student)
    # A Distiller converts and compiles the models that it is given.
    untouched = copy.deepcopy(teacher), copy.deepcopy(student)
    ours = make_distiller(job, teacher, student)
    losses_MK = ours.accumulate(passes, numbers, len(passes))[:, 1:]
    grads = flat_gradient(student) / ours.scaler.get_scale()
    reference = PlainStep(dataclasses.replace(job, kind="reference", precision="fp32"), *untouched)
    reference_MK = torch.tensor(
        reference.accumulate(batches, numbers, len(batches)), dtype=torch.float64
    )
    reference_grads = flat_gradient(reference.student)
    found = {
        "objectives": list(reference.alphas),
        "losses": losses_MK.tolist(),
        "reference_losses": reference_MK.tolist(),
        "losses_differ_by": ((losses_MK - reference_MK).abs() / reference_MK.abs()).max().item(),
        "gradients_differ_by": ((grads - reference_grads).norm() / reference_grads.norm()).item(),
        "gradient_cosine": F.cosine_similarity(grads, reference_grads, dim=0).item(),
    }
    of_losses, of_gradients = AGREEMENT[job.precision]
    if not (found["losses_differ_by"] < of_losses and found["gradients_differ_by"] < of_gradients):
        raise InputError(
            f"--precision {job.precision}{' --compile' if job.compiles else ''}: Distiller and the"
            " 2019 step compute different things, nothing is timed: losses differ by"
            f" {found['losses_differ_by']:.1e}, gradients by {found['gradients_differ_by']:.1e},"
            f" expected less than {of_losses:.0e} and {of_gradients:.0e}; take another precision,"
            " or report it"
        )
    return found


@torch.no_grad()
def move_apart(student: torch.nn.Module) -> None:
    """Add noise to a student's weights: with the teacher's layers, the KL would be all rounding."""
    for parameter in student.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


def checked_batches(workload: Workload) -> list[MicroBatch]:
    """Make two micro-batches of the first sequences, cut to CHECKED_LENGTH."""
    batches = []
    for sequences in np.array_split(np.arange(min(4, len(workload.dataset))), 2):
        if len(sequences):
            token_ids_BT, lengths_B = workload.dataset.collate(sequences)
            lengths_B = lengths_B.clamp(max=CHECKED_LENGTH)
            batches.append(
                workload.prepare(len(batches), token_ids_BT[:, : int(lengths_B.max())], lengths_B)
            )
    return batches


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Concatenate all gradients into one float64 vector."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
