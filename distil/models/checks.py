"""Checks of models before training, with one line for each problem."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distil.models.architectures import Architecture
from utils import InputError


def tokenizer_problem(model) -> str | None:
    """Describe the problem of a LanguageModel whose tokenizer has ids >= its vocabulary size."""
    return ids_problem(model.num_entries, model.vocab_size, model.source)


def ids_problem(num_entries: int, vocab_size: int, source: str) -> str | None:
    """Describe the problem of a tokenizer of more entries than the model has."""
    if num_entries <= vocab_size:
        return None
    return (
        f"{source}: its tokenizer has ids up to {num_entries - 1}, the model's vocabulary"
        f" {vocab_size} entries; take a model and tokenizer that belong together"
    )


def vocabulary_problem(
    student_config, teacher, source: str, is_fixed: bool, is_proven: bool
) -> str | None:
    """Describe the problem of a student whose vocabulary does not fit its teacher's tokenizer.

    Either may have further rows, which pad its tables. teacher: a LanguageModel. is_fixed: the
    student has weights. is_proven: where the sizes differ, the student is known to be of the same
    tokenizer, by its folder's or because its weights are random.
    """
    size, needed = student_config.vocab_size, teacher.num_entries
    if size == teacher.vocab_size or (size >= needed and is_proven):
        return None
    sizes = f"{source}: vocabulary is {size}, the teacher's is {teacher.vocab_size}"
    if size < needed:
        remedy = f"set vocab_size {needed} or more in the student's JSON"
        remedy = "take a student of the teacher's tokenizer" if is_fixed else remedy
        return f"{sizes}, with a tokenizer of {needed} entries; {remedy}"
    return (
        f"{sizes}, and the folder has no tokenizer that shows them to be of one; if they are, copy"
        " the teacher's tokenizer files into it"
    )


def is_finite(tensor: torch.Tensor | None) -> bool:
    """True where every entry is finite, or there is no tensor.

    A sum takes a tenth of the time; it is finite where all entries are, unless it overflows.
    """
    return (
        tensor is None or bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
    )


def check_finite(state_dict: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise InputError naming the tensors that hold NaN or infinite values."""
    wrong = [name for name, tensor in state_dict.items() if not is_finite(tensor)]
    if wrong:
        raise InputError(
            f"{where}: {some_of(wrong)} hold NaN or infinite values; take another checkpoint"
        )


def some_of(names: Sequence[str], limit: int = 4) -> str:
    """List the first `limit` names and count the others."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def size_mismatches(
    student_config,
    teacher_config,
    source: str,
    student: Architecture,
    needs_width: bool = True,
    is_fixed: bool = False,
) -> list[str]:
    """Describe each size in which a student must equal its teacher but does not.

    Students of ARCHITECTURES must have its number of positions, as in 2019; all its width if last
    hidden states are compared (needs_width). is_fixed: the student has weights, of these sizes.
    """
    sizes = {}
    # Differs from the original: hidden states alone need one width. 2019 refused any other.
    if needs_width:
        sizes["hidden_size"] = "width"
    if student.is_named:
        sizes["max_position_embeddings"] = "number of positions"
    if student.reserved_positions:  # positions are numbered from the padding id
        sizes["pad_token_id"] = "padding id"
    return [
        f"{source}: {what} is {getattr(student_config, name)}, the teacher's is"
        f" {getattr(teacher_config, name, None)}; they must be equal, "
        + (
            "extract the student from this teacher"
            if is_fixed
            else f"set {student_config.attribute_map.get(name, name)} in the student's JSON"
        )
        for name, what in sizes.items()
        if getattr(student_config, name) != getattr(teacher_config, name, None)
    ]


CHECK_TOKENS = 12
TOLERANCE = 1e-4  # relative to the largest logit, in float32: kernels may sum in another order


def some_ids(model: nn.Module, num_sequences: int) -> torch.Tensor:
    """Draw token ids (num_sequences, at most CHECK_TOKENS), without padding."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or CHECK_TOKENS
    length = min(CHECK_TOKENS, positions - 2)
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(config.vocab_size, (num_sequences, max(length, 2)), generator=generator)
    ids_BT[ids_BT == pad] = (pad + 1) % config.vocab_size
    return ids_BT.to(next(model.parameters()).device)


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Test whether two tensors have one shape and agree within rounding errors."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-3))


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the forward options that switch off a model's cache of keys and values, if any."""
    parameters = inspect.signature(model.forward).parameters
    has_cache = "use_cache" in parameters or hasattr(model.config, "use_cache")
    return {"use_cache": False} if has_cache else {}


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode and restore their modes afterwards."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
