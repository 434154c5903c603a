"""Plan: what the runs of all seeds share, loaded and checked once before the first of them."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distil.models.casing import casing_of_flags
from distil.models.hub import load_config
from distil.tasks.features import Feature
from distil.tasks.heads import (
    HEADS,
    has_default_names,
    labels_of_head,
    names_of_classes,
    require_causal,
    require_no_look_ahead,
)
from distil.tasks.loading import (
    load_any_tokenizer,
    load_for_task,
    longest_input,
    require_ids,
    require_same_vocabulary,
)
from distil.tasks.readers import (
    distinct_labels,
    has_part,
    read_part,
    read_scored_set,
    read_training_set,
)
from distil.tasks.schema import Example, Task
from distil.tasks.tasks import TASKS
from utils import InputError, logger


def longest_example(configs: Mapping[str, Any], tokenizer, args: argparse.Namespace) -> int:
    """Return the length that inputs are truncated to: --max_seq_length, or a model's limit.

    configs: {flag: configuration}. Raises InputError where the user's length is above a limit.
    """
    length = args.max_seq_length
    for flag, config in configs.items():
        limit = min(tokenizer.model_max_length, longest_input(config) or tokenizer.model_max_length)
        if limit < length and args.is_length_given:
            raise InputError(
                f"--max_seq_length {args.max_seq_length}: {flag} takes at most {limit} tokens; name"
                " fewer"
            )
        if limit < length:
            logger.info("Inputs are cut to %d tokens: %s takes no more.", limit, flag)
            length = limit
    return length


def set_padding_token(tokenizer, flag: str, name: str) -> None:
    """Pad with the end of text where a tokenizer (GPT-2's) has no padding token.

    Raises InputError where it has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{flag} {name}: its tokenizer has no padding token and no end of text; set"
                " pad_token in it"
            )
        tokenizer.pad_token = tokenizer.eos_token


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the runs of all seeds share.

    labels: in the order of their ids. is_order_assumed: the model that is read names no classes.
    """

    args: argparse.Namespace
    task: Task
    tokenizer: Any
    teacher: torch.nn.Module | None
    labels: tuple[str, ...]
    is_order_assumed: bool
    train: list[Example]
    scored: list[Example]
    train_features: list[Feature]
    scored_features: list[Feature]


def make_plan(args: argparse.Namespace) -> Plan:
    """Load everything that does not depend on the seed; raise InputError for misfits."""
    task, flags = TASKS[args.task], {"--model_name_or_path": args.model_name_or_path}
    if args.teacher_name_or_path:
        flags["--teacher_name_or_path"] = args.teacher_name_or_path
    configs = {flag: load_config(None, name, flag) for flag, name in flags.items()}
    if task.head == "next tokens":
        for flag, config in configs.items():
            require_causal(config, flags[flag], flag)
    tokenizer = load_tokenizers(args)
    max_length = longest_example(configs, tokenizer, args)
    train = read_training_set(args, task) if args.do_train else []
    scored = read_scored_set(args, task) if args.do_eval else []
    labels = choose_labels(args, configs, flags, known_labels(args, task, train, scored))
    teacher = load_teacher(args, task, tokenizer)
    ids = {label: number for number, label in enumerate(labels)}
    features = [
        HEADS[task.head].features(part, tokenizer, max_length, ids) if part else []
        for part in (train, scored)
    ]
    for part, found in zip((train, scored), features, strict=True):
        if part and not found:
            raise InputError(
                f"{part[0].where}: no word of the file gives a token; is it in the --encoding of"
                " the tokenizer?"
            )
    is_assumed = not args.label_order and has_default_names(next(reversed(configs.values())))
    return Plan(args, task, tokenizer, teacher, labels, is_assumed, train, scored, *features)


def load_tokenizers(args: argparse.Namespace):
    """Load the student's tokenizer; raise InputError where the teacher has another vocabulary."""
    name = args.tokenizer_name or args.model_name_or_path
    flag = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    casing = casing_of_flags(args)
    tokenizer = load_any_tokenizer(name, flag, casing)
    if args.teacher_name_or_path:
        other = load_any_tokenizer(args.teacher_name_or_path, "--teacher_name_or_path", casing)
        require_same_vocabulary(tokenizer, other, name, args.teacher_name_or_path)
    set_padding_token(tokenizer, flag, name)
    return tokenizer


def known_labels(
    args: argparse.Namespace, task: Task, train: Sequence[Example], scored: Sequence[Example]
) -> tuple[str, ...]:
    """Return the task's labels; for words, all labels of all the task's files."""
    if task.head != "tokens":
        return task.labels
    others: list[Example] = []
    if args.do_train and args.data_dir:
        for (part,) in task.scored.values():
            if has_part(args.data_dir, part):
                others += read_part(task, args.data_dir, part, args.encoding)
    return distinct_labels(train, scored, others)


def choose_labels(
    args: argparse.Namespace,
    configs: Mapping[str, Any],
    flags: Mapping[str, str],
    wanted: tuple[str, ...],
) -> tuple[str, ...]:
    """Return the labels in the order of their ids: the teacher's or the scored model's, if any."""
    own = TASKS[args.task].labels_by_name(names_of_classes(configs["--model_name_or_path"]))
    if args.do_train and not args.teacher_name_or_path:
        return own or wanted  # its own: a head that is trained for the task is trained further
    flag = "--teacher_name_or_path" if args.teacher_name_or_path else "--model_name_or_path"
    order = args.label_order or ()
    labels = labels_of_head(configs[flag], args.task, wanted, flags[flag], flag, order)
    if args.do_train and own and own != labels:
        logger.warning(
            "--model_name_or_path %s: its head has %s, the teacher %s: it starts out wrong.",
            args.model_name_or_path,
            " ".join(own),
            " ".join(labels),
        )
    return labels


def load_teacher(args: argparse.Namespace, task: Task, tokenizer) -> torch.nn.Module | None:
    """Load the fine-tuned teacher; None without one."""
    if not args.teacher_name_or_path:
        return None
    auto_class = HEADS[task.head].auto_class
    name, flag = args.teacher_name_or_path, "--teacher_name_or_path"
    teacher = load_for_task(auto_class, name, flag, is_fine_tuned=True)
    require_ids(teacher, tokenizer, name, flag)
    if task.head == "next tokens":
        require_no_look_ahead(teacher, name, flag)
    teacher.config.pad_token_id = tokenizer.pad_token_id
    return teacher
