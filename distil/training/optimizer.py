"""The optimizer, its schedule, and the length of a run in updates.

Source: Sanh et al., 2019; AdamW with a linear warm-up and decay, as the 2019 program.
"""

import math

import torch
import transformers
from torch import nn

from utils import logger

ADAM_BETAS = (0.9, 0.98)
FEW_UPDATES = 20


def make_optimizer(
    student: nn.Module, learning_rate: float, weight_decay: float, epsilon: float
) -> torch.optim.AdamW:
    """Make a fused AdamW over the student's trained parameters, its moments allocated."""
    groups = split_for_weight_decay(student, weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate, betas=ADAM_BETAS, eps=epsilon, fused=True
    )
    make_moments(optimizer)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, num_updates: int, warmup_prop: float):
    """Make the schedule: linear from 0 over the warm-up, then linear to 0 at `num_updates`."""
    num_warmup = math.ceil(warmup_prop * num_updates)
    return transformers.get_linear_schedule_with_warmup(optimizer, num_warmup, num_updates)


def run_length(
    batches_per_epoch: int, per_update: int, num_epochs: int, max_steps: int | None
) -> tuple[int, int]:
    """Return a run's number of micro-batches over all ranks, and of updates in the schedule.

    per_update: micro-batches an update over all ranks.
    """
    if max_steps is not None:
        num_micro_batches = max_steps * per_update
    else:
        num_micro_batches = batches_per_epoch * num_epochs
    num_real = -(-num_micro_batches // per_update)
    if num_real < FEW_UPDATES:
        logger.warning(
            "Only %d update(s) (%d micro-batches, %d an update), the first at learning rate 0: take"
            " more data or epochs, or a smaller --gradient_accumulation_steps.",
            *(num_real, num_micro_batches, per_update),
        )
    return num_micro_batches, num_micro_batches // per_update + 1


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """Allocate the moments before anything short-lived, so that they lie together in memory."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            device = parameter.device if group["fused"] else "cpu"
            step = torch.zeros((), dtype=torch.float32, device=device)
            optimizer.state[parameter] = {"step": step, **moments}


def split_for_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group the trained parameters: decayed, or not (biases and layer norms); embeddings decay.

    Differs from the original: layer norms are told by their module. 2019 looked for the text
    "LayerNorm.weight", and so decayed DistilBERT's, GPT-2's and the RoBERTa head's.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__.endswith("Norm")
        for parameter in module.parameters(recurse=False)
    }
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = id(parameter) in norms or name.split(".")[-1] == "bias"
            (kept if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
