"""Checks of models before they are trained, a line for each problem."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distil.models.architectures import Architecture
from utils import InputError


def tokenizer_problem(model) -> str | None:
    """Describe the problem of a LanguageModel whose tokenizer has ids beyond its logits."""
    largest_id = max(model.tokenizer.get_vocab().values())
    if largest_id < model.vocab_size:
        return None
    return (
        f"{model.source}: its tokenizer has ids up to {largest_id}, the model's vocabulary"
        f" {model.vocab_size} entries; take a model and tokenizer that belong together"
    )


def check_finite(state_dict: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise InputError naming the tensors in which something is NaN or infinite."""
    wrong = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise InputError(
            f"{where}: {some_of(wrong)} hold NaN or infinite values; take another checkpoint"
        )


def some_of(names: Sequence[str], limit: int = 4) -> str:
    """List the first of many names, and count the others."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def size_mismatches(
    student_config,
    teacher_config,
    source: str,
    student: Architecture,
    needs_width: bool = True,
) -> list[str]:
    """List, a line each, the sizes in which a student wrongly differs from its teacher.

    Students of ARCHITECTURES equal their teachers, as in 2019; others need the teacher's vocabulary
    only, and its width where hidden states are compared (needs_width).
    """
    sizes = {"vocab_size": "vocabulary"}
    if student.is_named or needs_width:
        sizes["hidden_size"] = "width"
    if student.is_named:
        sizes["max_position_embeddings"] = "number of positions"
    if student.reserved_positions:  # its positions are counted from the padding id
        sizes["pad_token_id"] = "padding id"
    return [
        f"{source}: {what} is {getattr(student_config, name)}, the teacher's is"
        f" {getattr(teacher_config, name, None)}; they must be equal, set"
        f" {student_config.attribute_map.get(name, name)} in the student's JSON"
        for name, what in sizes.items()
        if getattr(student_config, name) != getattr(teacher_config, name, None)
    ]


CHECK_TOKENS = 12


TOLERANCE = 1e-4  # relative to the largest logit, float32: other kernels may sum in another order


def some_ids(model: nn.Module, num_sequences: int) -> torch.Tensor:
    """Draw token ids, (num_sequences, CHECK_TOKENS at most), none of them the padding id, from
    which some count positions.
    """
    config = model.config.get_text_config()
    length = min(
        CHECK_TOKENS, (getattr(config, "max_position_embeddings", None) or CHECK_TOKENS) - 2
    )
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(config.vocab_size, (num_sequences, max(length, 2)), generator=generator)
    ids_BT[ids_BT == pad] = (pad + 1) % config.vocab_size
    return ids_BT.to(next(model.parameters()).device)


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two tensors agree but for rounding."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-3))


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return what a model is called with besides ids and mask: no cache of keys and values, where
    it knows one.
    """
    parameters = inspect.signature(model.forward).parameters
    return (
        {"use_cache": False}
        if "use_cache" in parameters or hasattr(model.config, "use_cache")
        else {}
    )


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode for a while."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
