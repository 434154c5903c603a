"""The state of a training step as tensors and numbers: what a checkpoint holds besides counters."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distil.models.checks import is_finite
from distil.training.post_mortem import NonFiniteError

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of a parameter's shape
Tensors = dict[str, dict[str, torch.Tensor]]


def named_parts(student: nn.Module, objectives: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter that is trained, by the name that checkpoints give it."""
    yield from student.named_parameters()
    yield from ((f"objectives/{name}", p) for name, p in objectives.named_parameters())


def state_tensors(
    student: nn.Module, objectives: nn.Module, optimizer: torch.optim.Optimizer
) -> Tensors:
    """Return the student's state, tied tensors once, and the optimizer's: "exp_avg/NAME" and so on.

    Parameters of objectives form a file of their own, where there are any.
    """
    weights, names = {}, {}
    for name, tensor in student.state_dict().items():
        names.setdefault(tensor.data_ptr(), name)
        if names[tensor.data_ptr()] == name:
            weights[name] = tensor
    moments = {
        f"{kind}/{name}": value
        for name, parameter in named_parts(student, objectives)
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    own = dict(objectives.state_dict())
    return {"student": weights, "optimizer": moments, **({"objectives": own} if own else {})}


def load_tensors(
    student: nn.Module,
    objectives: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Load what `state_tensors` returned.

    Raises ValueError where it is another model's, of other types, or not finite.
    """
    own = state_tensors(student, objectives, optimizer)
    parameters = dict(named_parts(student, objectives))
    with torch.no_grad():
        for file in own.keys() - {"optimizer"}:
            _require_same_shapes(given[file], own[file])
            for name, tensor in own[file].items():
                tensor.copy_(given[file][name])
    for key, value in given["optimizer"].items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        shape = list(parameter.shape) if kind in MOMENTS else []
        if kind not in (*MOMENTS, "step") or list(value.shape) != shape or not _is_sound(value):
            raise ValueError(f"{key}: {_described(value)}, expected finite numbers of {shape}")
        optimizer.state[parameter][kind] = value.to(parameter.device)


def _require_same_shapes(
    given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> None:
    for name in [*own, *given]:
        parts = (_described(state[name]) if name in state else "nothing" for state in (given, own))
        found, expected = parts
        if found != expected:
            raise ValueError(f"{name}: {found} in the checkpoint, {expected} in this run's student")
        if not is_finite(given[name]):
            raise ValueError(f"{name}: the checkpoint has NaN or infinite values")


def _described(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _is_sound(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and is_finite(tensor)


def state_values(schedule, scaler) -> dict[str, Any]:
    """Return the state of schedule (or None) and gradient scaler, as numbers."""
    state = {} if schedule is None else schedule.state_dict()
    numbers = {k: v for k, v in state.items() if isinstance(v, int | float) or k == "_last_lr"}
    return {"schedule": numbers, "scaler": scaler.state_dict()}


def load_values(optimizer, schedule, scaler, values: Mapping[str, Any]) -> None:
    """Load what `state_values` returned; the optimizer gets the schedule's learning rates."""
    if schedule is not None:
        lambdas = [None] * len(optimizer.param_groups)
        known = schedule.state_dict().keys() & values["schedule"].keys()
        numbers = {name: values["schedule"][name] for name in known}
        schedule.load_state_dict({**numbers, "lr_lambdas": lambdas})
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    scaler.load_state_dict(values["scaler"])


def check_finite_state(tensors: Tensors) -> None:
    """Raise NonFiniteError where a weight or moment is not finite: nothing of the kind is saved."""
    for file, content in tensors.items():
        for name, tensor in content.items():
            if not is_finite(tensor):
                raise NonFiniteError(
                    f"{name} of the {file} became NaN or infinite; nothing of it was saved"
                )
