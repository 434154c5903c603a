"""HEADS: what a task's head is to the libraries, and what a model's head must fit to."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from distil.models.checks import evaluating, is_close, some_ids, without_cache
from distil.models.language_model import is_masked_config
from distil.tasks.features import Feature, block_features, text_features, word_features
from distil.tasks.tasks import TASKS, TWO_CLASSES
from utils import InputError, logger


@dataclasses.dataclass(frozen=True)
class Head:
    """One row of HEADS.

    features: (examples, tokenizer, max_length, ids) -> features. reduce: (logits, labels) of a
    batch -> what scoring needs of them, first axis kept.
    """

    auto_class: Any
    features: Callable[..., list[Feature]]
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    problem_type: str | None = None


def _all_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.float()


def _best_class(logits_BTC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    # -1, no class's number, keeps NaN and infinity visible.
    return torch.where(torch.isfinite(logits_BTC).all(-1), logits_BTC.argmax(-1), -1)


def nll_of_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return each row's summed negative log-likelihood of its next tokens: (B,), float64."""
    # Row by row: a float32 copy of GPT-2's logits for one block of 1,024 is 0.2 GB.
    return torch.stack(
        [
            cross_entropy(logits_TV[:-1].float(), labels_T[1:], reduction="none").double().sum()
            for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
        ]
    )


HEADS = {
    "classes": Head(
        transformers.AutoModelForSequenceClassification,
        text_features,
        _all_logits,
        "single_label_classification",
    ),
    "values": Head(
        transformers.AutoModelForSequenceClassification, text_features, _all_logits, "regression"
    ),
    "tokens": Head(transformers.AutoModelForTokenClassification, word_features, _best_class),
    "next tokens": Head(transformers.AutoModelForCausalLM, block_features, nll_of_rows),
}


def require_causal(config, name: str, flag: str) -> None:
    """Raise InputError for a masked model, which the library would load as a causal one."""
    if is_masked_config(config, f"{flag} {name}"):
        raise InputError(
            f"{flag} {name}: is a masked model ({config.model_type}); wikitext needs a causal one,"
            " such as GPT-2"
        )


@torch.no_grad()
def require_no_look_ahead(model: torch.nn.Module, name: str, flag: str) -> None:
    """Raise InputError where a model with a causal head (BERT, XLNet) attends to later tokens."""
    ids_BT, options = some_ids(model, 1), without_cache(model)
    half = ids_BT.shape[1] // 2
    with evaluating(model):
        whole, alone = (
            model(ids_BT[:, :length], **options).logits[:, :half] for length in (2 * half, half)
        )
    if not is_close(whole, alone):
        raise InputError(
            f"{flag} {name}: sees the tokens that it is to predict ({type(model).__name__});"
            " wikitext needs a causal model"
        )


def labels_of_head(
    config,
    task_name: str,
    wanted: Sequence[str],
    name: str,
    flag: str,
    order: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the labels in the order of a fine-tuned model's outputs.

    order: of --label_order, before the model's own names. Raises InputError for other labels.
    """
    _require_made_for(getattr(config, "finetuning_task", None), task_name, name, flag)
    head = TASKS[task_name].head
    if head == "next tokens":
        return ()
    if head == "values":
        if config.num_labels != 1:
            raise InputError(
                f"{flag} {name}: its head has {config.num_labels} classes; {task_name} has one"
                " value"
            )
        return ()
    names = names_of_classes(config)
    if order and len(order) != len(names):
        raise InputError(
            f"--label_order {' '.join(order)}: {len(order)} names, the head of {flag} {name} has"
            f" {len(names)} classes; name each once"
        )
    if head == "tokens":
        return _labels_of_words(names, wanted, name, flag, order)
    own, said = (TASKS[task_name].labels_by_name(classes) for classes in (names, order))
    if own and said not in ((), own):
        _warn_of_other_names(order, names, name, flag)
    if len(names) == len(wanted) and (said or own or has_default_names(config)):
        return said or own or tuple(wanted)
    remedy = ", or say which is which by --label_order" if len(names) == len(wanted) else ""
    raise InputError(
        f"{flag} {name}: its head has {len(names)} classes ({', '.join(names[:6])}), {task_name}"
        f" has {len(wanted)} ({', '.join(wanted[:6])}); name a model fine-tuned for"
        f" {task_name}{remedy}"
    )


def names_of_classes(config) -> list[str]:
    """List the names of a head's classes, as its configuration has them."""
    return [str(config.id2label.get(number, "?")) for number in range(config.num_labels)]


def has_default_names(config) -> bool:
    """Return whether a head's classes have no names: LABEL_0, LABEL_1, .. tell no order."""
    return names_of_classes(config) == [f"LABEL_{number}" for number in range(config.num_labels)]


def _labels_of_words(
    names: Sequence[str], wanted: Sequence[str], name: str, flag: str, order: Sequence[str]
) -> tuple[str, ...]:
    found = tuple(order or names)
    if unknown := [label for label in wanted if label not in found]:
        raise InputError(
            f"{flag} {name}: its head has no class for the files' {', '.join(unknown[:6])},"
            f" only {', '.join(found[:6])}{', ..' if len(found) > 6 else ''}; name a model"
            " fine-tuned for such labels, or say which is which by --label_order"
        )
    if order and set(names) >= set(wanted) and found != tuple(names):
        _warn_of_other_names(order, names, name, flag)
    return found


def _warn_of_other_names(order: Sequence[str], names: Sequence[str], name: str, flag: str) -> None:
    logger.warning(
        "--label_order %s: %s %s calls them %s; the flag decides.",
        " ".join(order),
        flag,
        name,
        " ".join(names),
    )


def _require_made_for(made_for: str | None, task_name: str, name: str, flag: str) -> None:
    # A model of MNLI fits XNLI: equal labels by name. Labels called 0 and 1 don't tell tasks apart.
    is_like = made_for in TASKS and TASKS[made_for].labels == TASKS[task_name].labels not in (
        (),
        TWO_CLASSES,
    )
    if made_for not in (None, task_name) and not is_like:
        raise InputError(
            f"{flag} {name}: was fine-tuned for {made_for}, not for {task_name}; name another model"
        )
