"""Parameters that get no gradient: frozen before a run where nothing uses them, else counted as 0.

Many models hold parts that no objective of a run reaches (a pooler, a contact head). Others use a
part only for some tokens (experts in a list). DistributedDataParallel waits for a gradient of every
trained parameter, so several ranks need to know both.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from distil.data.batches import MicroBatch
from distil.models.checks import evaluating, some_of
from distil.models.heads import prediction_head
from distil.system.failures import naming_failures
from utils import InputError, logger

NUMBER = re.compile(r"\d+")


def freeze_unused(
    model: nn.Module,
    teacher: nn.Module,
    batch: MicroBatch,
    source: str,
    world_size: int = 1,
    teacher_head: Callable | None = None,
) -> None:
    """Freeze the parameters to which a run's losses give no gradient, and name them.

    model: a DistillationModel; its losses on `batch` decide. teacher_head: None: the teacher's own.
    A parameter without a gradient stays
    trained where another that differs only in the numbers in its name has one: it may be of an
    expert that no token chose. Leaves no gradient and draws no random numbers; every rank that is
    given the same batch decides alike. Raises InputError naming `source` if the model cannot be
    trained, or not by several ranks.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    what = f"{source}: the model cannot be trained on {batch.input_ids_BT.shape[1]} tokens"
    with naming_failures(what, "; take another"), _without_draws(model), evaluating(model):
        total = _loss(model, teacher, batch, teacher_head)
        grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        del total
    if world_size > 1:
        with naming_failures(what, "; take another"), _without_draws(model):
            _check_buffers(model, teacher, batch, teacher_head, source)
    missing = [name for name, grad in zip(trained, grads, strict=True) if grad is None]
    used = {NUMBER.sub("", name) for name in trained.keys() - set(missing)}
    unused = [name for name in missing if NUMBER.sub("", name) not in used]
    for name in unused:
        trained[name].requires_grad_(False)
    others = [name for name in missing if name not in unused]
    for names, what in (
        (unused, "get no gradient from this run's losses and are frozen"),
        (others, "got no gradient from the longest sequence; such gradients count as 0"),
    ):
        if names:
            named = some_of([name.removeprefix("student.") for name in names])
            logger.info("%d parameters %s: %s.", len(names), what, named)


def _loss(
    model: nn.Module, teacher: nn.Module, batch: MicroBatch, teacher_head: Callable | None
) -> torch.Tensor:
    read, head = {}, None
    if model.needs_teacher:
        head = teacher_head or prediction_head(teacher)
        with torch.no_grad():
            read = model.read_teacher(teacher, batch)
    return model(batch, read, head, 1.0)[0]


@torch.no_grad()
def _check_buffers(
    model: nn.Module,
    teacher: nn.Module,
    batch: MicroBatch,
    teacher_head: Callable | None,
    source: str,
) -> None:
    """Raise InputError where a forward pass changes what is saved: each rank would have its own."""
    saved = model.state_dict().keys()
    before = {name: b.clone() for name, b in model.named_buffers() if name in saved}
    if not before:
        return
    was_training = model.training
    _loss(model.train(), teacher, batch, teacher_head)
    model.train(was_training)
    after = dict(model.named_buffers())
    changed = [name for name, buffer in before.items() if not torch.equal(buffer, after[name])]
    for name in changed:
        after[name].copy_(before[name])
    if changed:
        names = some_of([name.removeprefix("student.") for name in changed])
        raise InputError(
            f"{source}: {len(changed)} buffers change in training ({names}), which several ranks"
            " do not exchange; train it in one process"
        )


@contextlib.contextmanager
def _without_draws(model: nn.Module) -> Iterator[None]:
    """Restore torch's generators."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def reaching_all(
    total: torch.Tensor | None, parameters: Iterable[nn.Parameter]
) -> torch.Tensor | None:
    """Add 0 x each trained parameter that a loss does not depend on, so that all get a gradient.

    total: None for a loss of 0.
    """
    reached = set() if total is None else _leaves(total)
    others = [p.flatten()[0] for p in parameters if p.requires_grad and id(p) not in reached]
    if not others:
        return total
    zero = torch.stack(others).sum() * 0.0
    return zero if total is None else total + zero


def _leaves(total: torch.Tensor) -> set[int]:
    """Return the ids of the leaves of a tensor's graph."""
    found, seen, waiting = set(), set(), [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.add(id(node.variable))
        waiting += [previous for previous, _ in node.next_functions]
    return found


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set absent gradients of trained parameters to 0, as several ranks do, so that one equals n.

    An optimizer skips a parameter without a gradient, though its moments should decay.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
