"""Fine-tune a model for a task and score it by the protocol of the published tables; with a
teacher: the second step.

    python scripts/run_task.py --task mrpc --model_name_or_path M --data_dir glue/MRPC --output_dir
    out --seeds 42 43 44 45 46

The task is a row of tasks.TASKS: files, columns, labels, metrics, settings. The model's folder
comes from train.py or the hub; report.py makes tables of the scores.json written here. Settings are
those of the 2019 run_*.py scripts, behind the numbers of Sanh et al., 2019 (sections 3 and 4).
Every example of the scored set counts exactly once, on any number of processes.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.models.checks import evaluating, is_close, some_ids, without_cache
from distil.models.hub import load_config, quiet_transformers
from distil.models.language_model import kind_of
from distil.system.files import atomic_path, file_problem, output_problem, write_json
from distil.system.rank_zero import reporting_on_rank_0
from distil.tasks.fine_tuning import (
    IGNORED_LABEL,
    Trainer,
    require_an_update,
    second_step_problems,
    training_arguments,
)
from distil.tasks.loading import (
    load_any_tokenizer,
    load_for_task,
    longest_input,
    require_same_vocabulary,
)
from distil.tasks.metrics import num_words, perplexities, score
from distil.tasks.predictions import finite, prediction_rows, read_predictions
from distil.tasks.readers import distinct_labels, has_part, read_hub, read_part
from distil.tasks.schema import Example, Settings, Task
from distil.tasks.scores import write_scores
from distil.tasks.tasks import TASKS, TWO_CLASSES
from utils import InputError, OneLineParser, logger, run_program

MIN_LENGTH = 8  # special tokens of a pair, and some text
WHAT_TO_SAVE = ("median", "all", "none")
RUN_HERE = [name for name, task in TASKS.items() if task.read]
OWN_FILES = ("predictions.tsv", "log.json")

Feature = dict[str, Any]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; settings that it leaves out are None."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--task", required=True, choices=RUN_HERE, help="what to fine-tune for")
    add(
        "--model_name_or_path",
        help="hub name or local folder of the model to fine-tune, or to score",
    )
    add("--tokenizer_name", help="hub name or local folder (default: the model's)")
    add("--data_dir", help="folder of the task's own files; without it the data comes from the hub")
    add("--dataset_name", help="data set on the hub (default: the task's)")
    add("--output_dir", help="folder for scores.json and a folder a seed")
    add(
        "--split",
        help=(
            "which set is scored, where a task has several (default: the one that is published: dev"
            " or test)"
        ),
    )
    add("--languages", nargs="+", help="XNLI: languages that are scored (default: all in the file)")
    add(
        "--encoding",
        default="utf-8",
        help="of the data files; German CoNLL-2003 is latin-1 (default: %(default)s)",
    )
    add("--do_train", action="store_true", help="fine-tune (default: both, where neither is named)")
    add("--do_eval", action="store_true", help="score")
    add(
        "--score_predictions", metavar="FILE", help="score a file of predictions, without any model"
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[42],
        help="one run a seed; scores are the median (default: 42)",
    )
    add(
        "--save_models",
        choices=WHAT_TO_SAVE,
        default="median",
        help="whose model is kept (default: the median seed's)",
    )
    add("--teacher_name_or_path", help="model fine-tuned for this task, to learn from as well")
    add(
        "--alpha_ce",
        type=float,
        default=0.5,
        help="weight of the distance from the teacher (default: %(default)s)",
    )
    add(
        "--alpha_task",
        type=float,
        default=0.5,
        help="weight of the task's loss, with a teacher (default: %(default)s)",
    )
    add("--temperature", type=float, default=2.0, help="of both softmaxes (default: %(default)s)")
    add(
        "--max_seq_length",
        type=int,
        help="longest input, in tokens; size of WikiText's blocks (default: the task's)",
    )
    add(
        "--per_gpu_train_batch_size",
        type=int,
        help="examples a process and micro-batch (default: the task's)",
    )
    add("--per_gpu_eval_batch_size", type=int, help="(default: the task's)")
    add("--learning_rate", type=float, help="(default: the task's)")
    add("--num_train_epochs", type=float, help="(default: the task's)")
    add("--max_steps", type=int, default=-1, help="updates, in place of epochs where above 0")
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="micro-batches an update (default: %(default)s)",
    )
    add("--warmup_steps", type=int, default=0, help="updates of rising rate (default: %(default)s)")
    add("--weight_decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--adam_epsilon", type=float, default=1e-8, help="(default: %(default)s)")
    add("--max_grad_norm", type=float, default=1.0, help="(default: %(default)s)")
    add(
        "--logging_steps",
        type=int,
        default=50,
        help="updates between two lines of log (default: %(default)s)",
    )
    add(
        "--do_lower_case", action="store_true", help="BERT: lower-case, whatever the tokenizer says"
    )
    add("--no_cuda", action="store_true", help="stay on the CPU")
    add("--fp16", action="store_true", help="mixed precision, float16 (GPU)")
    add("--bf16", action="store_true", help="mixed precision, bfloat16")
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="replace the results of an earlier run in output_dir",
    )
    return with_settings(parser.parse_args(argv))


def with_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the task's settings, and both --do_train and --do_eval where neither was named."""
    args.is_length_given = args.max_seq_length is not None
    for field in dataclasses.fields(Settings):
        if getattr(args, field.name) is None:
            setattr(args, field.name, getattr(TASKS[args.task].settings, field.name))
    if not (args.do_train or args.do_eval):
        args.do_train = args.do_eval = True
    args.split = args.split or next(iter(TASKS[args.task].scored))
    return args


RANGES = {
    "max_seq_length": (MIN_LENGTH, 1e6),
    "per_gpu_train_batch_size": (1, 1e6),
    "per_gpu_eval_batch_size": (1, 1e6),
    "learning_rate": (0, 1),
    "num_train_epochs": (1e-6, 1e6),
    "max_steps": (-1, 1e9),
    "gradient_accumulation_steps": (1, 1e6),
    "warmup_steps": (0, 1e9),
    "weight_decay": (0, 1),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 1e9),
    "logging_steps": (1, 1e9),
}


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError that names every argument problem, a line each."""
    problems = [
        f"--{name} {getattr(args, name)}: expected {low:g} to {high:g}"
        for name, (low, high) in RANGES.items()
        if not low <= getattr(args, name) <= high
    ]
    if args.max_steps == 0:
        problems.append("--max_steps 0: expected at least 1, or -1 for --num_train_epochs")
    problems += _data_problems(args)
    problems += _scoring_problems(args) if args.score_predictions else _run_problems(args)
    if problems:
        raise InputError("\n".join(problems))


def _data_problems(args: argparse.Namespace) -> list[str]:
    task, problems = TASKS[args.task], []
    if args.split not in task.scored:
        problems.append(f"--split {args.split}: {args.task} has {' and '.join(task.scored)}")
    if args.languages and args.task != "xnli":
        problems.append(f"--languages: {args.task} has one language; leave the flag out")
    if args.data_dir is not None and not os.path.isdir(args.data_dir):
        problems.append(f"--data_dir {args.data_dir}: no such folder; check the path")
    if args.data_dir is not None and args.dataset_name:
        problems.append(
            "--data_dir and --dataset_name: one source of data is expected; leave one out"
        )
    if args.data_dir is None and not (args.dataset_name or task.hub.name):
        problems.append(
            f"--data_dir: {args.task} has no data set of its own on the hub; name a folder, or a"
            " --dataset_name"
        )
    try:
        "a".encode(args.encoding)
    except (LookupError, ValueError):
        problems.append(
            f"--encoding {args.encoding}: no such encoding of text; utf-8 and latin-1 are usual"
        )
    return problems


def _scoring_problems(args: argparse.Namespace) -> list[str]:
    problems = [file_problem(args.score_predictions, "--score_predictions")]
    if TASKS[args.task].head == "next tokens":
        problems.append(
            f"--score_predictions: {args.task} has a perplexity, not predictions; run --do_eval"
        )
    return [problem for problem in problems if problem]


def _run_problems(args: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name}: is missing; see --help"
        for name in ("model_name_or_path", "output_dir")
        if not getattr(args, name)
    ]
    if args.output_dir:
        problems += _output_problems(args)
    problems += second_step_problems(
        args.teacher_name_or_path is not None,
        args.alpha_ce,
        args.alpha_task,
        args.temperature,
        "alpha_task",
    )
    if args.teacher_name_or_path and not args.do_train:
        problems.append(
            "--teacher_name_or_path: teaches in training only; add --do_train, or leave the"
            " teacher out"
        )
    if len(set(args.seeds)) < len(args.seeds) or any(not 0 <= seed < 2**32 for seed in args.seeds):
        problems.append(
            f"--seeds {' '.join(map(str, args.seeds))}: expected different ones from 0 to 2^32 - 1"
        )
    if len(args.seeds) > 1 and not args.do_train:
        problems.append("--seeds: without --do_train nothing depends on the seed; name one")
    if args.fp16 and (args.no_cuda or not torch.cuda.is_available()):
        problems.append("--fp16: needs a GPU; leave it out, or take --bf16")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16: one precision is expected; leave one out")
    return problems


def _output_problems(args: argparse.Namespace) -> list[str]:
    if problem := output_problem(args.output_dir, "--output_dir", is_folder=True):
        return [problem]
    inputs = {
        "--model_name_or_path": args.model_name_or_path,
        "--teacher_name_or_path": args.teacher_name_or_path,
        "--data_dir": args.data_dir,
    }
    is_full = os.path.isdir(args.output_dir) and os.listdir(args.output_dir)
    if is_full and not args.overwrite_output_dir:
        return [
            f"--output_dir {args.output_dir}: is not empty; name another, or replace its results"
            " with --overwrite_output_dir"
        ]
    places = {
        os.path.realpath(args.output_dir),
        *(os.path.realpath(folder) for folder in seed_folders(args)),
    }
    return [
        f"--output_dir {args.output_dir}: the folder of {flag}, which is read, would be written to;"
        " choose another"
        for flag, name in inputs.items()
        if name and os.path.isdir(name) and os.path.realpath(name) in places
    ]


# --------------------------------------------------------------------------------------------------
# Data and models
# --------------------------------------------------------------------------------------------------


def read_training_set(args: argparse.Namespace, task: Task) -> list[Example]:
    """Read the training set from --data_dir, or the hub."""
    if args.data_dir is None:
        return read_hub(task, args.dataset_name or task.hub.name, task.hub.train)
    return read_part(
        task, args.data_dir, task.train, args.encoding, hint=", or score only with --do_eval"
    )


def read_scored_set(args: argparse.Namespace, task: Task) -> list[Example]:
    """Read the scored set, all its parts in order. Raises InputError for languages that are not
    there.
    """
    if args.data_dir is None:
        name, parts = args.dataset_name or task.hub.name, task.hub.scored[args.split]
        wanted = [part for part in parts if not args.languages or part.group in args.languages]
        examples = [example for part in wanted for example in read_hub(task, name, part)]
    else:
        others = [f"--split {split}" for split in task.scored if split != args.split]
        hint = f", or score another set by {' or '.join(others)}" if others else ""
        parts = task.scored[args.split]
        examples = [
            row
            for part in parts
            for row in read_part(task, args.data_dir, part, args.encoding, hint)
        ]
    if not args.languages:
        return examples
    there = sorted({example.group for example in examples})
    if missing := [language for language in args.languages if language not in there]:
        raise InputError(
            f"--languages {missing[0]}: the scored set has {', '.join(there) or 'none of them'};"
            " correct the name"
        )
    return [example for example in examples if example.group in args.languages]


@dataclasses.dataclass(frozen=True)
class Head:
    """What a task's head is to the libraries. reduce: (logits, labels) -> what scoring needs of a
    batch, first axis kept.
    """

    auto_class: Any
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    problem_type: str | None = None


def _as_they_are(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.float()


def _best_class(logits_BTC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    # NaN and infinity are kept in sight: no class has the number -1.
    return torch.where(torch.isfinite(logits_BTC).all(-1), logits_BTC.argmax(-1), -1)


def nll_of_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return each row's summed negative log-likelihood of its next tokens, in float64: shape
    (B,).
    """
    # Row by row: a float32 copy of GPT-2's logits for one block of 1,024 is 0.2 GB.
    return torch.stack(
        [
            cross_entropy(logits_TV[:-1].float(), labels_T[1:], reduction="none").double().sum()
            for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
        ]
    )


HEADS = {
    "classes": Head(
        transformers.AutoModelForSequenceClassification, _as_they_are, "single_label_classification"
    ),
    "values": Head(transformers.AutoModelForSequenceClassification, _as_they_are, "regression"),
    "tokens": Head(transformers.AutoModelForTokenClassification, _best_class),
    "next tokens": Head(transformers.AutoModelForCausalLM, nll_of_rows),
}


def require_causal(config, name: str, flag: str) -> None:
    """Raise InputError for a masked model: the library would load it as a causal one, and it would
    see the answer.
    """
    if kind_of(config, f"{flag} {name}"):
        raise InputError(
            f"{flag} {name}: is a masked model ({config.model_type}); wikitext needs a causal one,"
            " such as GPT-2"
        )


@torch.no_grad()
def require_no_look_ahead(model: torch.nn.Module, name: str, flag: str) -> None:
    """Raise InputError where a model called causal (BERT, XLNet with such a head) predicts by
    tokens that come.
    """
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
    config, task_name: str, wanted: Sequence[str], name: str, flag: str
) -> tuple[str, ...]:
    """Return the labels in the order that a fine-tuned model's head has them. Raises InputError
    where they are others.
    """
    made_for, head = getattr(config, "finetuning_task", None), TASKS[task_name].head
    # MNLI's model is XNLI's, too: the same labels, by name. That a label is called 1 says nothing.
    is_like = made_for in TASKS and TASKS[made_for].labels == TASKS[task_name].labels not in (
        (),
        TWO_CLASSES,
    )
    if made_for not in (None, task_name) and not is_like:
        raise InputError(
            f"{flag} {name}: was fine-tuned for {made_for}, not for {task_name}; name another model"
        )
    if head == "next tokens":
        return ()
    if head == "values":
        if config.num_labels != 1:
            raise InputError(
                f"{flag} {name}: its head has {config.num_labels} classes; {task_name} has one"
                " value"
            )
        return ()
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    if head == "tokens":
        if unknown := [label for label in wanted if label not in names]:
            raise InputError(
                f"{flag} {name}: its head has no class for the files' {', '.join(unknown[:6])},"
                f" only {', '.join(names[:6])}{', ..' if len(names) > 6 else ''}; name a model"
                " fine-tuned for such labels"
            )
        return tuple(names)
    by_name = {label.lower(): label for label in wanted}
    if len(names) == len(wanted) and {found.lower() for found in names} == set(by_name):
        return tuple(by_name[found.lower()] for found in names)
    if len(names) == len(wanted) and names == [f"LABEL_{number}" for number in range(len(names))]:
        return tuple(wanted)
    raise InputError(
        f"{flag} {name}: its head has {len(names)} classes ({', '.join(names[:6])}), {task_name}"
        f" has {len(wanted)} ({', '.join(wanted[:6])}); name a model fine-tuned for {task_name}"
    )


def longest_example(configs: Mapping[str, Any], tokenizer, args: argparse.Namespace) -> int:
    """Return the length that inputs are cut to: --max_seq_length, or fewer where a model (flag ->
    configuration) has fewer.

    Raises InputError where the user named a length that a model has not.
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


def give_padding(tokenizer, flag: str, name: str) -> None:
    """Let a tokenizer without a padding token, GPT-2's, pad with its end of text. Raises InputError
    where it has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{flag} {name}: its tokenizer has no padding token and no end of text; set"
                " pad_token in it"
            )
        tokenizer.pad_token = tokenizer.eos_token


# --------------------------------------------------------------------------------------------------
# Features: what a model reads
# --------------------------------------------------------------------------------------------------


def text_features(
    examples: Sequence[Example], tokenizer, max_length: int, ids: Mapping[str, int]
) -> list[Feature]:
    """Tokenize texts or pairs of texts, cut to max_length, the longer text first. ids: label ->
    number; values stay.
    """
    pairs = list(zip(*(example.texts for example in examples), strict=True))
    if len(pairs) == 2 and tokenizer.sep_token is None:
        pairs[1] = [
            f"{tokenizer.eos_token}{text}" for text in pairs[1]
        ]  # GPT-2 has no other token between two texts
    # Token types always: a DistilBERT student's tokenizer would leave out what its BERT teacher
    # reads.
    encoded = tokenizer(
        *map(list, pairs), truncation=True, max_length=max_length, return_token_type_ids=True
    )
    names = ("input_ids", "attention_mask", "token_type_ids")
    return [
        {name: encoded[name][row] for name in names}
        | {"labels": ids[example.label] if ids else float(example.label)}
        for row, example in enumerate(examples)
    ]


def word_features(
    examples: Sequence[Example], tokenizer, max_length: int, ids: Mapping[str, int]
) -> list[Feature]:
    """Tokenize sentences word by word; the first token of each word has its label, all else counts
    nothing.

    A sentence longer than max_length is split between words. A word without any token (control
    characters) is left out, one longer than max_length is cut. places: (sentence, word) of each
    label, in order.
    """
    words = sorted({word for example in examples for word in example.texts})
    # With a blank in front: byte-level tokenizers have other tokens for a word at the beginning of
    # a text.
    tokens = dict(
        zip(
            words,
            tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"],
            strict=True,
        )
    )
    first, last = (
        [token] if token is not None else []
        for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    )
    room, features = max_length - len(first) - len(last), []
    for number, example in enumerate(examples):
        feature, size = None, 0
        for place, (word, label) in enumerate(zip(example.texts, example.label, strict=True)):
            word_tokens = tokens[word][:room]
            if not word_tokens:
                continue
            if feature is None or size + len(word_tokens) > room:
                feature, size = (
                    {"input_ids": [*first], "labels": [IGNORED_LABEL] * len(first), "places": []},
                    0,
                )
                features.append(feature)
            size += len(word_tokens)
            feature["input_ids"] += word_tokens
            feature["labels"] += [ids[label]] + [IGNORED_LABEL] * (len(word_tokens) - 1)
            feature["places"].append((number, place))
    for feature in features:
        feature["input_ids"] += last
        feature["labels"] += [IGNORED_LABEL] * len(last)
        feature["attention_mask"] = [1] * len(feature["input_ids"])
    return features


def block_features(
    examples: Sequence[Example], tokenizer, max_length: int, ids: Mapping[str, int]
) -> list[Feature]:
    """Tokenize a whole text at once and cut it into disjoint blocks; the tail is dropped, no token
    is added.
    """
    (example,) = examples
    tokens = tokenizer(example.texts[0], add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(tokens) - max_length + 1, max_length)
    if not starts:
        raise InputError(
            f"{example.where}: has {len(tokens)} tokens, fewer than one block of {max_length};"
            " lower --max_seq_length"
        )
    blocks = [tokens[start : start + max_length] for start in starts]
    return [
        {
            "input_ids": block,
            "attention_mask": [1] * max_length,
            "labels": block,
            "num_tokens": len(tokens),
        }
        for block in blocks
    ]


FEATURES = {
    "classes": text_features,
    "values": text_features,
    "tokens": word_features,
    "next tokens": block_features,
}


def collator(pad_id: int) -> Callable[[list[Feature]], dict[str, torch.Tensor]]:
    """Make the function that puts features into a batch, padded at the end to the longest of
    them.
    """
    padding = {
        "input_ids": pad_id,
        "attention_mask": 0,
        "token_type_ids": 0,
        "labels": IGNORED_LABEL,
    }

    # Differs from the original: padded to the batch's longest, not to --max_seq_length. Masked
    # positions change no output.
    def collate(features: list[Feature]) -> dict[str, torch.Tensor]:
        width = max(len(feature["input_ids"]) for feature in features)
        return {
            name: torch.tensor([_padded(feature[name], width, fill) for feature in features])
            for name, fill in padding.items()
            if name in features[0]
        }

    return collate


def _padded(values: list[int] | float, width: int, fill: int) -> list[int] | float:
    return values + [fill] * (width - len(values)) if isinstance(values, list) else values


# --------------------------------------------------------------------------------------------------
# One seed
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the runs of all seeds share."""

    args: argparse.Namespace
    task: Task
    tokenizer: Any
    teacher: torch.nn.Module | None
    labels: tuple[str, ...]
    train: list[Example]
    scored: list[Example]
    train_features: list[Feature]
    scored_features: list[Feature]


def make_plan(args: argparse.Namespace) -> Plan:
    """Load everything that does not depend on the seed; raise InputError for what does not fit
    together.
    """
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
        FEATURES[task.head](part, tokenizer, max_length, ids) if part else []
        for part in (train, scored)
    ]
    for part, found in zip((train, scored), features, strict=True):
        if part and not found:
            raise InputError(
                f"{part[0].where}: no word of the file gives a token; is it in the --encoding of"
                " the tokenizer?"
            )
    return Plan(args, task, tokenizer, teacher, labels, train, scored, *features)


def load_tokenizers(args: argparse.Namespace):
    """Load the student's tokenizer, ready to pad; raise InputError where the teacher has another
    vocabulary.
    """
    name = args.tokenizer_name or args.model_name_or_path
    flag = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    tokenizer = load_any_tokenizer(name, flag, args.do_lower_case or None)
    if args.teacher_name_or_path:
        other = load_any_tokenizer(
            args.teacher_name_or_path, "--teacher_name_or_path", args.do_lower_case or None
        )
        require_same_vocabulary(tokenizer, other, name, args.teacher_name_or_path)
    give_padding(tokenizer, flag, name)
    return tokenizer


def known_labels(
    args: argparse.Namespace, task: Task, train: Sequence[Example], scored: Sequence[Example]
) -> tuple[str, ...]:
    """Return the task's labels; of words all that the files have, those that are neither learnt nor
    scored included.
    """
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
):
    """Return the labels in the order of their numbers: the teacher's, or the scored model's own,
    where there is one.
    """
    if args.do_train and not args.teacher_name_or_path:
        return wanted
    flag = "--teacher_name_or_path" if args.teacher_name_or_path else "--model_name_or_path"
    return labels_of_head(configs[flag], args.task, wanted, flags[flag], flag)


def load_teacher(args: argparse.Namespace, task: Task, tokenizer) -> torch.nn.Module | None:
    """Load the fine-tuned teacher, if one is named."""
    if not args.teacher_name_or_path:
        return None
    auto_class = HEADS[task.head].auto_class
    name, flag = args.teacher_name_or_path, "--teacher_name_or_path"
    teacher = load_for_task(auto_class, name, flag, is_fine_tuned=True)
    if task.head == "next tokens":
        require_no_look_ahead(teacher, name, flag)
    teacher.config.pad_token_id = tokenizer.pad_token_id
    return teacher


def load_student(plan: Plan) -> torch.nn.Module:
    """Load the model to fine-tune, its new head drawn by the seed that is set; or the fine-tuned
    one to score.
    """
    args, head = plan.args, HEADS[plan.task.head]
    options: dict[str, Any] = {"pad_token_id": plan.tokenizer.pad_token_id}
    if plan.task.head != "next tokens":
        names = dict(enumerate(plan.labels or ["value"]))
        options |= {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {label: n for n, label in names.items()},
            "problem_type": head.problem_type,
        }
    is_fine_tuned = not args.do_train or plan.task.head == "next tokens"
    name, flag = args.model_name_or_path, "--model_name_or_path"
    model = load_for_task(head.auto_class, name, flag, is_fine_tuned=is_fine_tuned, **options)
    if len(plan.tokenizer) > model.config.vocab_size:
        raise InputError(
            f"{flag} {name}: the tokenizer has {len(plan.tokenizer)} tokens, the model"
            f" {model.config.vocab_size}; name the model's own tokenizer by --tokenizer_name"
        )
    if plan.task.head == "next tokens":
        require_no_look_ahead(model, name, flag)
        if model.loss_type is None:
            model.loss_type = (  # GPT-2's class name doesn't say it, and the library would warn
                "ForCausalLM"
            )
    model.config.finetuning_task = args.task
    return model


def make_trainer(plan: Plan, seed: int) -> Trainer:
    """Put the Trainer around a fresh model. Raises InputError where an epoch is too short for an
    update.
    """
    args = plan.args
    transformers.set_seed(seed)
    names = (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "weight_decay",
        "adam_epsilon",
        "max_grad_norm",
        "warmup_steps",
        "logging_steps",
        "bf16",
        "fp16",
    )
    arguments = training_arguments(
        seed_folder(args, seed),
        seed=seed,
        batch_size=args.per_gpu_train_batch_size,
        eval_batch_size=args.per_gpu_eval_batch_size,
        use_cpu=args.no_cuda or not torch.cuda.is_available(),
        **{name: getattr(args, name) for name in names},
    )
    if args.do_train:
        require_an_update(len(plan.train_features), arguments)
    return Trainer(
        distance=plan.task.head,
        teacher=plan.teacher,
        alpha_task=args.alpha_task if plan.teacher is not None else 1.0,
        alpha_ce=args.alpha_ce,
        temperature=args.temperature,
        model=load_student(plan),
        args=arguments,
        train_dataset=plan.train_features or None,
        data_collator=collator(plan.tokenizer.pad_token_id),
        preprocess_logits_for_metrics=HEADS[plan.task.head].reduce,
    )


def seed_folder(args: argparse.Namespace, seed: int) -> Path:
    """Name the folder of a seed's model and predictions."""
    return Path(args.output_dir) / f"seed-{seed}"


def seed_folders(args: argparse.Namespace) -> list[Path]:
    """List the folders of seeds that are there, and those that the run will make."""
    return [
        *Path(args.output_dir).glob("seed-*"),
        *(seed_folder(args, seed) for seed in args.seeds),
    ]


def remove_earlier_run(args: argparse.Namespace) -> None:
    """Remove what an earlier run left, where --overwrite_output_dir was given: its seeds are none
    of the new scores'.
    """
    (Path(args.output_dir) / "scores.json").unlink(missing_ok=True)
    for folder in filter(Path.is_dir, seed_folders(args)):
        if any(folder.iterdir()):  # the Trainer has made its own, empty
            logger.warning("Removing %s, of an earlier run.", folder)
            shutil.rmtree(folder)


def run_seed(plan: Plan, seed: int) -> dict[str, Any] | None:
    """Fine-tune and score with one seed; write its folder. Return its entry for scores.json, None
    without --do_eval.
    """
    trainer, folder = make_trainer(plan, seed), seed_folder(plan.args, seed)
    if plan.args.do_train:
        if trainer.is_world_process_zero() and seed == plan.args.seeds[0]:
            remove_earlier_run(plan.args)
        trainer.train()
    outputs = trainer.predict(plan.scored_features).predictions if plan.args.do_eval else None
    if trainer.is_world_process_zero():
        write_seed(plan, trainer, folder)
    if outputs is None:
        return None
    if len(outputs) != len(plan.scored_features):
        raise AssertionError(f"{len(outputs)} outputs for {len(plan.scored_features)} inputs")
    metrics, predictions = INTERPRET[plan.task.head](plan, outputs)
    if trainer.is_world_process_zero():
        write_predictions(
            folder / "predictions.tsv", prediction_rows(plan.task, plan.scored, predictions)
        )
    return {"seed": seed, "metrics": metrics, "num_examples": num_examples(plan)}


def write_seed(plan: Plan, trainer: Trainer, folder: Path) -> None:
    """Write a fine-tuned model with its tokenizer, and the log of its training."""
    folder.mkdir(parents=True, exist_ok=True)
    if not plan.args.do_train:
        return
    write_json(folder / "log.json", trainer.state.log_history)
    if plan.args.save_models != "none":
        with quiet_transformers():
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
            plan.tokenizer.save_pretrained(folder)


def write_predictions(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write predictions: columns id and prediction, tabs between."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            "".join(f"{a}\t{b}\n" for a, b in [("id", "prediction"), *rows]),
            encoding="utf-8",
            newline="\n",
        )


def num_examples(plan: Plan) -> dict[str, int]:
    """Count what was learnt and scored."""
    counts = {"train": len(plan.train)} if plan.args.do_train else {}
    if plan.task.head == "next tokens":
        text = plan.scored[0].texts[0]
        counts = {"train": len(plan.train_features)} if plan.args.do_train else {}
        return counts | {
            plan.args.split: len(plan.scored_features),
            "tokens": plan.scored_features[0]["num_tokens"],
            "words_and_line_ends": num_words(text),
        }
    return counts | {plan.args.split: len(plan.scored)}


# --------------------------------------------------------------------------------------------------
# From outputs to scores
# --------------------------------------------------------------------------------------------------


def _classes(plan: Plan, logits_NC: np.ndarray) -> tuple[dict[str, float], list]:
    best = finite(logits_NC, plan.args.output_dir).argmax(-1)
    predictions = [plan.labels[number] for number in best]
    return score(plan.task, plan.scored, predictions), predictions


def _values(plan: Plan, logits_N1: np.ndarray) -> tuple[dict[str, float], list]:
    predictions = [float(value) for value in finite(logits_N1, plan.args.output_dir).reshape(-1)]
    return score(plan.task, plan.scored, predictions), predictions


def _words(plan: Plan, best_NT: np.ndarray) -> tuple[dict[str, float], list]:
    """Put the pieces of split sentences together again; a word that no token stands for is outside
    of all entities.

    Differs from the original: whole sentences are scored, whatever the tokenizer split, so that
    models of different vocabularies are measured on the same entities.
    """
    predictions = [["O"] * len(example.texts) for example in plan.scored]
    for best_T, feature in zip(best_NT, plan.scored_features, strict=True):
        labelled = [
            place for place, label in enumerate(feature["labels"]) if label != IGNORED_LABEL
        ]
        best_of_words = best_T[labelled]
        finite(np.where(best_of_words < 0, np.nan, best_of_words), plan.args.output_dir)
        for (sentence, word), best in zip(feature["places"], best_of_words, strict=True):
            predictions[sentence][word] = plan.labels[best]
    return score(plan.task, plan.scored, predictions), predictions


def _text(plan: Plan, nll_N: np.ndarray) -> tuple[dict[str, float], list]:
    total = float(finite(nll_N, plan.args.output_dir).sum())
    num_scored = sum(len(feature["labels"]) - 1 for feature in plan.scored_features)
    num_tokens = plan.scored_features[0]["num_tokens"]
    return perplexities(total, num_scored, num_tokens, num_words(plan.scored[0].texts[0])), [total]


INTERPRET: dict[str, Callable[[Plan, np.ndarray], tuple[dict[str, float], list]]] = {
    "classes": _classes,
    "values": _values,
    "tokens": _words,
    "next tokens": _text,
}


def median_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the run whose score is nearest to the median of all (the first of several)."""
    middle = statistics.median(run["metrics"]["score"] for run in runs)
    return min(runs, key=lambda run: abs(run["metrics"]["score"] - middle))


def keep_median_model(args: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> None:
    """Remove the models of all seeds but the median one; predictions and logs stay."""
    kept = median_run(runs)["seed"]
    for run in runs:
        if run["seed"] != kept:
            for file in seed_folder(args, run["seed"]).iterdir():
                if file.is_file() and file.name not in OWN_FILES:
                    file.unlink()


def table(metrics: Sequence[Mapping[str, float]], seeds: Sequence[int | str]) -> str:
    """Lay out metrics as a table: the median over the seeds, then a column a seed."""
    header = (
        ["metric", "median", *(f"{seed}" for seed in seeds)]
        if len(seeds) > 1
        else ["metric", f"{seeds[0]}"]
    )
    rows = [header]
    for name in metrics[0]:
        values = [found[name] for found in metrics]
        shown = [statistics.median(values), *values] if len(seeds) > 1 else values
        rows.append([name, *(f"{value:.2f}" for value in shown)])
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join([row[0].ljust(width), *(cell.rjust(10) for cell in row[1:])]) for row in rows
    )


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def score_file(args: argparse.Namespace) -> dict[str, float]:
    """Compute a task's metrics for a file of predictions, and print them."""
    task = TASKS[args.task]
    examples = read_scored_set(args, task)
    metrics = score(task, examples, read_predictions(args.score_predictions, task, examples))
    print(f"{args.task} ({args.split}, {len(examples)} examples)\n{table([metrics], ['value'])}")
    return metrics


def run_all(args: argparse.Namespace) -> None:
    """Run every seed; scores.json is written anew after each, so that an interrupted series keeps
    what it has.
    """
    plan, runs = make_plan(args), []
    is_first = os.environ.get("RANK", "0") == "0"
    flags = {name: value for name, value in vars(args).items() if name != "is_length_given"}
    for seed in args.seeds:
        entry = run_seed(plan, seed)
        if entry is None:
            continue
        runs.append(entry)
        if is_first:
            write_scores(
                Path(args.output_dir) / "scores.json",
                task=args.task,
                model=args.model_name_or_path,
                runs=runs,
                teacher=args.teacher_name_or_path,
                flags=flags,
            )
    if not runs or not is_first:
        return
    if args.do_train and args.save_models == "median":
        keep_median_model(args, runs)
    counts = ", ".join(f"{number} {name}" for name, number in runs[0]["num_examples"].items())
    names = [f"seed {run['seed']}" for run in runs]
    print(f"{args.task} ({counts})\n{table([run['metrics'] for run in runs], names)}")


def main(argv: list[str] | None = None) -> None:
    """Run the program: read, fine-tune, score, write."""
    with reporting_on_rank_0():
        args = parse(argv)
        check_arguments(args)
        if args.score_predictions:
            score_file(args)
        else:
            run_all(args)


if __name__ == "__main__":
    run_program(main)
