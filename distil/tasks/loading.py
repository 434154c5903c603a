"""Load models with a task's head, and their tokenizers; check that two of them fit together."""

import os
from pathlib import Path
from typing import Any

import torch

from distil.models.architectures import AUTO, architecture_named
from distil.models.bounds import check_memory
from distil.models.casing import Casing
from distil.models.checks import check_finite
from distil.models.hub import check_weight_files, load_config, quiet_transformers
from distil.models.language_model import is_masked_config, resolve_architecture
from distil.models.names import model_folder
from distil.models.tokenizer_rules import difference
from distil.models.tokenizers import load_tokenizer
from distil.system.failures import naming_failures
from utils import InputError, and_others


def load_any_tokenizer(name: str, flag: str, casing: Casing | None = None):
    """Load a model's tokenizer by hub name or folder.

    casing: None where the program has no such flags. A model type of ARCHITECTURES gets the checks
    of distillation. Raises InputError naming `flag`.
    """
    has_config = os.path.isfile(Path(name, "config.json"))
    row = architecture_named(load_config(None, name, flag).model_type if has_config else AUTO)
    return load_tokenizer(row, name, flag, casing, needs_roles=row.is_named)


def longest_input(config) -> int | None:
    """Return the number of tokens that a model's position table admits; None without a table."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # XLNet's is -1
        return None
    try:
        architecture = resolve_architecture(config, is_masked_config(config, ""), "")
        return positions - architecture.reserved_positions
    except InputError:  # not a language model whose structure can be resolved
        return positions


def load_for_task(
    auto_class, name: str, flag: str, *, is_fine_tuned: bool, **options: Any
) -> torch.nn.Module:
    """Load a model with a task's head, in float32.

    auto_class: AutoModelForSequenceClassification, ... is_fine_tuned: require the head's weights,
    too; otherwise require the encoder's and initialize the head where it is missing or has another
    shape. options: values of the configuration (num_labels, id2label, ..), or all of it as config.
    Raises InputError naming `flag`.
    """
    config = options.pop("config", None)
    config = load_config(None, name, flag, **options) if config is None else config
    check_memory(config, lambda: auto_class.from_config(config), f"{flag} {name}")
    what = f"{flag} {name}: could not be loaded with a head for the task"
    with quiet_transformers(), naming_failures(what):
        check_weight_files(name, flag)
        model, report = auto_class.from_pretrained(
            model_folder(name),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            weights_only=True,
        )
    prefix = f"{model.base_model_prefix}."
    absent = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    # Language models have no pooler: fine-tuning learns it together with the head.
    of_encoder = [key for key in absent if key.startswith(prefix) and ".pooler." not in key]
    if wrong := absent if is_fine_tuned else of_encoder:
        what = "a model fine-tuned for this very task" if is_fine_tuned else "a whole encoder"
        raise InputError(
            f"{flag} {name}: has no fitting weights for {and_others(wrong[0], len(wrong))};"
            f" expected {what}"
        )
    check_finite(model.state_dict(), f"{flag} {name}")
    return model


def require_ids(model: torch.nn.Module, tokenizer, name: str, flag: str) -> None:
    """Raise InputError where a tokenizer has ids beyond a model's embeddings."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise InputError(
            f"{flag} {name}: the tokenizer has ids up to {largest}, the model"
            f" {model.config.vocab_size} embeddings; name the model's own tokenizer by"
            " --tokenizer_name"
        )


def require_same_vocabulary(
    student_tokenizer, teacher_tokenizer, student: str, teacher: str
) -> None:
    """Raise InputError unless both tokenizers give the same token ids."""
    found = difference(student_tokenizer, teacher_tokenizer)
    if found:
        raise InputError(
            f"teacher {teacher} and student {student} have different tokenizers: the student's:"
            f" {found}; logits can be compared on the same token ids only: fine-tune a teacher of"
            " the student's tokenizer"
        )
