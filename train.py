"""Distil a language model: flags, the loop, the wall clock and the run folder. See README.md.

Launch as one process (`python train.py ..`) or as several (`torchrun`, `python -m
torch.distributed.launch`).
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import safetensors.torch
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distil.data.batches import MicroBatch, MlmPreparation, masking_weights, prepare_clm
from distil.data.cards import file_digest
from distil.data.token_files import MIN_LENGTH, token_file_problem
from distil.evaluation import (
    FixedMasks,
    Reader,
    figures_of,
    measure,
    next_tokens,
    passes_over,
    plan_batches,
)
from distil.flops import ModelSize, peak_flops, shown_size, update_flops
from distil.losses import LOSSES
from distil.models.architectures import ARCHITECTURES, AUTO, PAIRS, Architecture, row_of
from distil.models.checks import size_mismatches
from distil.models.first_weights import load_student_weights
from distil.models.forward import recompute_activations
from distil.models.heads import head_of, head_parameters, prediction_head
from distil.models.hub import load_config, quiet_transformers
from distil.models.language_model import (
    build_student,
    find_out,
    freeze_embeddings,
    load_model,
    load_teacher,
    max_input_length,
    read_student_config,
)
from distil.models.tokenizers import (
    load_tokenizer,
    special_ids,
    vocabulary_difference,
    vocabulary_fingerprint,
)
from distil.system.files import (
    atomic_path,
    atomic_paths,
    file_problem,
    flush_to_disk,
    make_folder,
    naming,
    naming_library_errors,
    output_problem,
    save_weights,
    write_json,
)
from distil.system.launch import (
    TIMEOUT_S,
    LostRankError,
    Runtime,
    check_compiler,
    is_another_rank,
    start_runtime,
)
from distil.system.locks import LOCK, is_restarted, require_unlocked, take_lock
from distil.system.prefetch import prefetched
from distil.system.signals import StopSignals, exit_status
from distil.system.watch import EXIT_LOST_RANK, report_lost_ranks
from distil.training import checkpointing
from distil.training.checkpointing import Checkpoint
from distil.training.optimizer import ADAM_BETAS, make_moments, split_for_weight_decay
from distiller import (
    NORMALIZATIONS,
    BegunStep,
    DistillationModel,
    Distiller,
    NonFiniteError,
    StepReport,
)
from grouped_batch_sampler import GroupedBatchSampler, PlannedBatch, Update
from lm_seqs_dataset import LmSeqsDataset, SpecialIds, read_token_counts
from utils import (
    InputError,
    OneLineParser,
    RankError,
    bar_options,
    git_facts,
    keep_freed_memory,
    keyed_seed,
    logger,
    one_line,
    run_program,
    setup_logging,
)

EXIT_NON_FINITE = 1
FEW_UPDATES = 20
MICRO_BATCHES_AHEAD = 8  # made ready while the step computes
COUNTED_TOKENS = 16  # of a forward pass that shows what a model computes

# --------------------------------------------------------------------------------------------------
# Configuration: each option once
# --------------------------------------------------------------------------------------------------


def option(help: str, default=dataclasses.MISSING, choices=None, bare=None):
    """Declare one flag: its help (with the unit), default and choices; bare: its value where it is
    given without one.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "bare": bare}
    )


STUDENT_TYPES = [*sorted({student for _, student in PAIRS}), AUTO]
TEACHER_TYPES = [*sorted({teacher for teacher, _ in PAIRS}), AUTO]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of a run. Raises InputError that names all problems at once."""

    force: bool = option(
        "move an existing dump_path aside (to DUMP_PATH.old-TIME) instead of refusing it", False
    )
    resume: str | None = option(
        "go on from the newest valid checkpoint in DUMP_PATH; with auto, start anew where there is"
        " none",
        None,
        choices=("required", "auto"),
        bare="required",
    )
    keep_checkpoints: int = option("checkpoints that stay, the newest", 3)
    dump_path: str = option("folder that receives log, checkpoints and the student")
    data_file: str = option(
        "token file made by scripts/binarized_data.py: a pickle, or a store by its prefix"
    )

    student: str | None = option(
        "a whole student made by scripts/extract.py --output, in place of the three flags below",
        None,
    )
    student_type: str = option("student's model type; auto: found out", AUTO, choices=STUDENT_TYPES)
    student_config: str | None = option("student's configuration, JSON", None)
    student_pretrained_weights: str | None = option(
        "student's first weights: of scripts/extract*.py, or .safetensors", None
    )
    teacher_type: str = option("teacher's model type; auto: found out", AUTO, choices=TEACHER_TYPES)
    teacher_name: str = option("teacher, hub name or local folder; its tokenizer is used")
    trust_remote_code: bool = option(
        "run Python files that come with teacher or student, where they need them", False
    )

    temperature: float = option("softmax temperature of the KL divergence", 2.0)
    alphas: dict[str, float] = dataclasses.field(
        default_factory=lambda: {name: loss.default_alpha for name, loss in LOSSES.items()}
    )
    mlm: bool = option("masked-language modelling (default: causal)", False)
    mlm_mask_prop: float = option("share of the real tokens to be predicted", 0.15)
    word_mask: float = option("share of predicted tokens that become [MASK]", 0.8)
    word_keep: float = option("share of predicted tokens that stay", 0.1)
    word_rand: float = option("share of predicted tokens that become a random token", 0.1)
    mlm_smoothing: float = option(
        "tokens are drawn for prediction with weight count ^ -MLM_SMOOTHING", 0.7
    )
    token_counts: str | None = option(
        "token counts made by scripts/token_counts.py; needed with --mlm", None
    )
    restrict_ce_to_mask: bool = option(
        "distil at masked positions only; without --mlm no effect", False
    )
    freeze_pos_embs: bool = option("keep the student's position embeddings as they are", False)
    freeze_token_type_embds: bool = option(
        "keep the student's token types as they are (roberta)", False
    )

    n_epoch: int = option("passes over the data", 3)
    max_steps: int | None = option(
        "number of updates, in place of N_EPOCH; the schedule spans them", None
    )
    max_length: int | None = option(
        "longest sequence, in token ids; default: what the teacher admits", None
    )
    batch_size: int = option("sequences a micro-batch, on each process", 5)
    max_tokens: int | None = option(
        "padded tokens a micro-batch, at the most, in place of BATCH_SIZE: long and short sequences"
        " cost alike",
        None,
    )
    # Differs from the original: 2019's flag switched grouping off.
    group_by_size: bool = option("make batches of sequences of like lengths", True)
    gradient_accumulation_steps: int = option("micro-batches an update, on each process", 50)
    warmup_prop: float = option("share of the updates over which the learning rate rises", 0.05)
    weight_decay: float = option("weight decay, biases and layer norms excepted", 0.0)
    learning_rate: float = option("highest learning rate", 5e-4)
    adam_epsilon: float = option("epsilon of AdamW", 1e-6)
    max_grad_norm: float = option("the gradient's norm is clipped to this", 5.0)
    initializer_range: float | None = option(
        "standard deviation of random first weights; default: the student configuration's (0.02 in"
        " those shipped)",
        None,
    )

    loss_normalization: str = option(
        "micro_batches: means over each micro-batch, then over the update's, as in 2019; tokens:"
        " over the update's tokens",
        "micro_batches",
        choices=NORMALIZATIONS,
    )

    bf16: bool = option("mixed precision in bfloat16", False)
    fp16: bool = option("mixed precision in float16, with a gradient scaler", False)
    fp16_opt_level: str = option(
        "accepted for old command lines, without effect: torch's own mixed precision is used", "O1"
    )
    activation_checkpointing: bool = option(
        "compute the student's activations twice, to keep fewer of them", False
    )
    compile: bool = option(
        "compile teacher and student (torch.compile): minutes at first, faster then", False
    )
    n_gpu: int = option("GPUs over all processes, one a process; 0: CPU", 1)
    local_rank: int = option("given by old launchers; leave it alone", -1)
    distributed_timeout_s: int = option(
        "seconds that processes wait for each other before a missing one ends the run", TIMEOUT_S
    )
    seed: int = option("seed of order, masks, dropout and first weights", 56)
    log_interval: int = option("micro-batches of one process between two logs to TensorBoard", 500)
    checkpoint_interval: int = option("micro-batches of one process between two checkpoints", 4000)
    eval_data_file: str | None = option(
        "token file of held-out text, made as DATA_FILE is: evaluated on fixed masks", None
    )
    eval_interval: int | None = option(
        "updates between two evaluations of EVAL_DATA_FILE; default: one, at the end", None
    )

    def __post_init__(self):
        problems = [
            *number_problems(self),
            *objective_problems(self),
            *type_problems(self),
            *path_problems(self),
        ]
        if problems:
            raise InputError("\n".join(problems))


def number_problems(config: TrainConfig) -> list[str]:
    """Say what is wrong with single numbers."""
    positive_int = [
        "n_epoch",
        "batch_size",
        "gradient_accumulation_steps",
        "log_interval",
        "checkpoint_interval",
        "max_steps",
        "max_tokens",
        "distributed_timeout_s",
        "eval_interval",
    ]
    bounds = {
        **{name: (lambda x: x >= 1, "at least 1") for name in positive_int},
        "keep_checkpoints": (lambda x: x >= 2, "at least 2, for one may be damaged"),
        "max_length": (
            lambda x: x > MIN_LENGTH,
            f"more than {MIN_LENGTH}, for shorter sequences are removed",
        ),
        "temperature": (lambda x: 0 < x <= 1e6, "above 0, at most 1e6"),
        "learning_rate": (lambda x: 0 < x <= 1e3, "above 0, at most 1e3"),
        "adam_epsilon": (lambda x: x > 0, "a number above 0"),
        "max_grad_norm": (lambda x: x > 0, "a number above 0"),
        "initializer_range": (lambda x: x > 0, "a number above 0"),
        "weight_decay": (lambda x: x >= 0, "0 or more"),
        "mlm_smoothing": (lambda x: x >= 0, "0 or more"),
        "n_gpu": (lambda x: x >= 0, "0 or more"),
        **{
            name: (lambda x: 0 <= x <= 1, "0 to 1")
            for name in ("mlm_mask_prop", "word_mask", "word_keep", "word_rand", "warmup_prop")
        },
    }
    values = {name: getattr(config, name) for name in bounds}
    problems = [
        f"--{name} {value}: expected {bounds[name][1]}"
        for name, value in values.items()
        if value is not None and not (math.isfinite(value) and bounds[name][0](value))
    ]
    total = config.word_mask + config.word_keep + config.word_rand
    if not abs(total - 1) <= 1e-6:
        problems.append(
            f"--word_mask + --word_keep + --word_rand: their sum is {total:g}, expected 1"
        )
    return problems


def objective_problems(config: TrainConfig) -> list[str]:
    """Say which objectives contradict each other or --mlm."""
    alphas = config.alphas
    problems = [
        f"--alpha_{name} {alpha}: expected a finite number, 0 or more"
        for name, alpha in alphas.items()
        if not (math.isfinite(alpha) and alpha >= 0)
    ]
    mlm, clm = alphas["mlm"], alphas["clm"]
    if config.mlm and not mlm > 0:
        problems.append(
            f"--mlm with --alpha_mlm {mlm}: expected --alpha_mlm above 0; set it, or leave"
            " --mlm out"
        )
    if not config.mlm and mlm > 0:
        problems.append(f"--alpha_mlm {mlm} without --mlm: add --mlm, or set --alpha_mlm 0")
    if (mlm > 0) == (clm > 0):
        problems.append(
            f"--alpha_mlm {mlm} and --alpha_clm {clm}: expected exactly one above 0; set the other"
            " to 0"
        )
    if not sum(alphas.values()) > 0:
        problems.append(
            f"{' '.join(f'--alpha_{name}' for name in alphas)}: their sum is not above 0; weigh an"
            " objective"
        )
    if config.mlm and config.token_counts is None:
        problems.append(
            "--mlm without --token_counts: expected the file that scripts/token_counts.py makes;"
            " name it"
        )
    if config.eval_interval is not None and config.eval_data_file is None:
        problems.append(
            f"--eval_interval {config.eval_interval} without --eval_data_file: name held-out text"
            " to evaluate"
        )
    return problems


def type_problems(config: TrainConfig) -> list[str]:
    """Say why teacher, student and objective don't go together."""
    student, teacher = config.student_type, config.teacher_type
    problems = student_problems(config)
    if AUTO not in (teacher, student) and (teacher, student) not in PAIRS:
        known = ", ".join(f"{t} -> {s}" for t, s in PAIRS)
        problems.append(
            f"--teacher_type {teacher} with --student_type {student}: no such pair; expected one of"
            f" {known}"
        )
    named = {
        flag: kind
        for flag, kind in (("--student_type", student), ("--teacher_type", teacher))
        if kind != AUTO
    }
    for flag, model_type in named.items():
        is_masked = ARCHITECTURES[model_type].is_masked
        if config.mlm != is_masked:
            kind = "masked" if is_masked else "causal"
            remedy = (
                "add --mlm, with --alpha_mlm above 0 and --alpha_clm 0"
                if is_masked
                else "leave --mlm out"
            )
            problems.append(
                f"{flag} {model_type} {'with' if config.mlm else 'without'} --mlm: it is a {kind}"
                f" model; {remedy}"
            )
    if config.bf16 and config.fp16:
        problems.append("--bf16 and --fp16: two precisions; leave one of them out")
    if config.max_tokens is not None and not config.group_by_size:
        problems.append(
            "--max_tokens with --no-group_by_size: the budget is planned by length; leave one of"
            " them out"
        )
    if (
        config.freeze_token_type_embds
        and student != AUTO
        and ARCHITECTURES[student].token_type_embeddings is None
    ):
        problems.append(
            f"--freeze_token_type_embds with --student_type {student}: it has no token types; leave"
            " it out"
        )
    return problems


def student_problems(config: TrainConfig) -> list[str]:
    """Say where the student is given twice, or not at all."""
    if config.student is None:
        missing = (
            "--student, --student_config: neither is given; name a folder made by"
            " scripts/extract.py --output, or a JSON"
        )
        return [missing] if config.student_config is None else []
    others = ("student_config", "student_pretrained_weights", "initializer_range")
    return [
        f"--{name} {getattr(config, name)} with --student {config.student}: the folder holds"
        " configuration and weights; leave one of them out"
        for name in others
        if getattr(config, name) is not None
    ]


def path_problems(config: TrainConfig) -> list[str]:
    """Say which files are missing, and whether the run folder is in the way."""
    files = {name: getattr(config, name) for name in INPUT_FILES}
    checks = {"data_file": token_file_problem, "eval_data_file": token_file_problem}
    problems = [
        checks.get(name, file_problem)(path, f"--{name}")
        for name, path in files.items()
        if path is not None
    ]
    if not is_another_rank(os.environ):  # rank 0 writes, and may have made the folder already
        problems.append(dump_path_problem(config))
    return [problem for problem in problems if problem]


INPUT_FILES = (
    "data_file",
    "student_config",
    "student_pretrained_weights",
    "token_counts",
    "eval_data_file",
)
# What a run writes: a folder with none of it is not taken for a run's.
RUN_FILES = ("parameters.json", "checkpoint.pth", "model_epoch_*.pth", "checkpoints/step-*")


def dump_path_problem(config: TrainConfig) -> str | None:
    """Say why the run folder can't be made, or moved aside, without harm."""
    path = Path(config.dump_path)
    problem = output_problem(config.dump_path, "--dump_path", is_folder=True)
    mode = resume_mode(config)
    if (
        problem
        or not os.path.lexists(path)
        or mode == "required"
        or (mode and checkpointing.exist(path / CHECKPOINTS))
    ):
        return problem
    if not config.force and not mode:
        return (
            f"--dump_path {path}: exists already; choose another, go on with --resume, or move it"
            " aside with --force"
        )
    stores = [f"{prefix}.bin" for prefix in (config.data_file, config.eval_data_file) if prefix]
    inputs = [getattr(config, name) for name in INPUT_FILES] + [
        config.teacher_name,
        config.student,
        *stores,
    ]
    inside = [name for name in inputs if name and os.path.exists(name) and _is_within(name, path)]
    if inside:
        return f"--dump_path {path}: holds {inside[0]}, which this run reads; choose another folder"
    if (
        _is_within(os.getcwd(), path)
        or _is_within(__file__, path)
        or _is_within(os.path.expanduser("~"), path)
    ):
        return (
            f"--dump_path {path}: is no run's folder; choose another, --force does not apply to it"
        )
    if any(path.iterdir()) and not any(any(path.glob(name)) for name in RUN_FILES):
        return (
            f"--dump_path {path}: holds other files than a run's; choose another, --force does not"
            " apply to it"
        )
    if not os.access(entry(config.dump_path).parent, os.W_OK):
        return (
            f"--dump_path {path}: can't be moved aside, for {entry(config.dump_path).parent} may"
            " not be written to"
        )
    return None


CHECKPOINTS, BEST = "checkpoints", "best"


def resume_mode(config: TrainConfig) -> str | None:
    """Say whether the run goes on from a checkpoint: "required", "auto" (if there is one), or None:
    it starts anew.

    A launcher that starts its processes again gives them the flags of the first time, --force among
    them: auto.
    """
    return config.resume or (
        "auto" if is_restarted(os.environ, Path(config.dump_path) / LOCK) else None
    )


def _is_within(path: str | os.PathLike, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


# --------------------------------------------------------------------------------------------------
# The command line, made from the configuration
# --------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Make the command line from TrainConfig's fields and the LOSSES table."""
    parser = OneLineParser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name == "alphas":
            for name, loss in LOSSES.items():
                parser.add_argument(
                    f"--alpha_{name}",
                    type=float,
                    default=loss.default_alpha,
                    metavar="X",
                    help=f"weight of the {loss.help} (default: {loss.default_alpha})",
                )
        else:
            _add_option(parser, field, types[field.name])
    return parser


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: type) -> None:
    required = field.default is dataclasses.MISSING
    flags = [f"--{field.name}"] + (["--local-rank"] if field.name == "local_rank" else [])
    options: dict[str, typing.Any] = {
        "help": field.metadata["help"].replace("%", "%%"),
        "dest": field.name,
    }
    if required:
        options["required"] = True
    else:
        options["default"] = field.default
        options["help"] += (
            ""
            if field.default is None or field.default is False
            else f" (default: {field.default})"
        )
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
    else:
        options["type"] = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
        options["choices"] = field.metadata["choices"]
        options["metavar"] = None if options["choices"] else options["type"].__name__.upper()
        if field.metadata["bare"] is not None:
            options |= {"nargs": "?", "const": field.metadata["bare"]}
    parser.add_argument(*flags, **options)


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Read the command line. Raises InputError."""
    values = vars(make_parser().parse_args(argv))
    alphas = {name: values.pop(f"alpha_{name}") for name in LOSSES}
    return TrainConfig(alphas=alphas, **values)


def as_flags(config: TrainConfig) -> dict[str, typing.Any]:
    """List every flag with its value, as parameters.json records it."""
    values = dataclasses.asdict(config)
    return {
        **{k: v for k, v in values.items() if k != "alphas"},
        **{f"alpha_{k}": v for k, v in config.alphas.items()},
    }


# --------------------------------------------------------------------------------------------------
# Setup: everything that is read and checked before the first step
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What is evaluated on the way. batches: numbers of sequences; passes: see
    evaluation.passes_over.
    """

    dataset: LmSeqsDataset
    batches: list[np.ndarray]
    passes: typing.Callable


@dataclasses.dataclass(frozen=True)
class Work:
    """What a micro-batch has computed. teacher: None where no objective reads it; head_rows:
    lengths_B -> rows projected.
    """

    teacher: ModelSize | None
    student: ModelSize
    head_rows: typing.Callable[[np.ndarray], int]

    def flops(self, lengths_B: np.ndarray) -> int:
        """Count a micro-batch's model FLOPs."""
        return update_flops(self.teacher, self.student, lengths_B, self.head_rows(lengths_B))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    student: torch.nn.Module
    distiller: Distiller
    dataset: LmSeqsDataset
    sampler: GroupedBatchSampler
    prepare: typing.Callable
    tokenizer: typing.Any
    num_micro_batches: int
    identity: dict[str, typing.Any]
    held_out: HeldOut | None = None
    work: Work | None = None


def set_up(config: TrainConfig, runtime: Runtime) -> Parts:
    """Load and check data, tokenizer, teacher and student. Raises InputError."""
    if not config.mlm and config.restrict_ce_to_mask:
        logger.warning("--restrict_ce_to_mask has no effect without --mlm.")
    check_device(config, runtime.device)
    if config.fp16:
        logger.info(
            "--fp16: torch's own mixed precision; --fp16_opt_level %s has no effect.",
            config.fp16_opt_level,
        )
    student_config = find_student_config(config)
    student_type = found_type(config, config.student_type, student_config, student_source(config))
    teacher_type = find_teacher_type(config)
    tokenizer = load_tokenizer(teacher_type, config.teacher_name, "--teacher_name")
    teacher = load_teacher(teacher_type, config.teacher_name)
    check_vocabularies(config, student_type, tokenizer)
    check_sizes(config, student_type, student_config, teacher, tokenizer)
    vocabulary = vocabulary_fingerprint(tokenizer)
    dataset = make_dataset(config, teacher_type, tokenizer, teacher, vocabulary)
    held_out = make_held_out(config, teacher_type, tokenizer, teacher, vocabulary)
    prepare = make_preparation(
        config, teacher_type, tokenizer, teacher.config.vocab_size, vocabulary
    )
    student = make_student(config, student_type, student_config)
    longest_BT, _ = dataset.collate([int(np.argmax(dataset.lengths))])
    check_forward(student, student_source(config), longest_BT)
    check_forward(teacher, f"--teacher_name {config.teacher_name}", longest_BT)
    work = make_work(config, student, teacher, longest_BT) if runtime.is_main else None
    sampler = GroupedBatchSampler(
        dataset.lengths,
        config.batch_size,
        dataset.max_length,
        group_by_size=config.group_by_size,
        seed=config.seed,
        max_tokens=config.max_tokens,
    )
    num_micro_batches, num_updates = run_length(config, len(sampler), runtime.world_size)
    identity = (
        identify(config, student, teacher, dataset, vocabulary, held_out) if runtime.is_main else {}
    )
    distiller = make_distiller(config, runtime, student, teacher, num_updates)
    return Parts(
        student,
        distiller,
        dataset,
        sampler,
        prepare,
        tokenizer,
        num_micro_batches,
        identity,
        held_out,
        work,
    )


ModelType = str | Architecture  # the name of a row, or what was found out


def student_source(config: TrainConfig) -> str:
    """Name the student in a message: its flag and path."""
    return (
        f"--student_config {config.student_config}"
        if config.student is None
        else f"--student {config.student}"
    )


def find_student_config(config: TrainConfig):
    """Load the student's configuration: the folder's, or the JSON. Raises InputError."""
    if config.student is None:
        return read_student_config(
            config.student_type, config.student_config, config.initializer_range
        )
    named = None if config.student_type == AUTO else config.student_type
    return load_config(named, config.student, "--student", config.trust_remote_code)


def found_type(config: TrainConfig, model_type: str, model_config, source: str) -> ModelType:
    """Return a model type as given; for auto what its configuration tells. Raises InputError naming
    `source`.
    """
    return (
        find_out(model_config, config.mlm, source, config.trust_remote_code)
        if model_type == AUTO
        else model_type
    )


def find_teacher_type(config: TrainConfig) -> ModelType:
    """Return the teacher's type, found out where it is auto. Raises InputError."""
    if config.teacher_type != AUTO:
        return config.teacher_type
    teacher_config = load_config(
        None, config.teacher_name, "--teacher_name", config.trust_remote_code
    )
    return found_type(config, AUTO, teacher_config, f"--teacher_name {config.teacher_name}")


def identify(
    config: TrainConfig,
    student,
    teacher,
    dataset: LmSeqsDataset,
    vocabulary: str,
    held_out: HeldOut | None = None,
) -> dict[str, typing.Any]:
    """Describe what a run must find again when it goes on: digests of the inputs' content, whatever
    their paths.
    """
    student_config = {
        k: v
        for k, v in student.config.to_dict().items()
        if k not in ("transformers_version", "_name_or_path")
    }
    data, held_out_data = (
        dataset.tokens.digest(),
        held_out.dataset.tokens.digest() if held_out else None,
    )
    if data == held_out_data:
        logger.warning(
            "--eval_data_file is what is trained on: its figures say nothing about other text."
        )
    return {
        "student_config": json.loads(json.dumps(student_config, default=str)),
        "teacher_name": checkpointing.content_digest(teacher.state_dict()),
        "data_file": data,
        "token_counts": file_digest(config.token_counts) if config.token_counts else None,
        "vocabulary": vocabulary,
        "eval_data_file": held_out_data,
    }


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError where the device can't do what is asked; say what it does only slowly."""
    if (
        config.bf16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"--bf16: {name} does not compute in bfloat16; use --fp16, or neither for float32"
        )
    # avx512_bf16, amx_bf16, or what other processors call theirs.
    has_bf16 = any(
        value is True for name, value in torch.cpu.get_capabilities().items() if "bf16" in name
    )
    if config.bf16 and device.type == "cpu" and not has_bf16:
        logger.warning(
            "--bf16: this CPU has no instructions for bfloat16, which makes it slower than float32."
        )
    if config.fp16 and device.type == "cpu":
        logger.warning(
            "--fp16: on a CPU float16 is slow; --bf16 has the same size and needs no scaling."
        )
    if config.compile:
        check_compiler(device)


def check_sizes(
    config: TrainConfig, student_type: ModelType, student_config, teacher, tokenizer
) -> None:
    """Raise InputError, all lines at once, where student, teacher and tokenizer disagree in
    size.
    """
    needs_width = any(LOSSES[name].reads == "hidden" for name in active(config.alphas))
    problems = size_mismatches(
        student_config, teacher.config, student_source(config), student_type, needs_width
    )
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= teacher.config.vocab_size:
        problems.append(
            f"--teacher_name {config.teacher_name}: its tokenizer has ids up to {largest_id}, the"
            f" model's vocabulary {teacher.config.vocab_size} entries; take a model and tokenizer"
            " that belong together"
        )
    if problems:
        raise InputError("\n".join(problems))


def check_vocabularies(config: TrainConfig, student_type: ModelType, tokenizer) -> None:
    """Raise InputError where the student's folder holds a tokenizer of another vocabulary than the
    teacher's.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
    if config.student is None or not any(
        os.path.exists(os.path.join(config.student, file)) for file in files
    ):
        return
    difference = vocabulary_difference(
        load_tokenizer(student_type, config.student, "--student"), tokenizer
    )
    if difference:
        raise InputError(
            f"--student {config.student}: {difference}; a student has its teacher's vocabulary"
        )


def make_dataset(
    config: TrainConfig,
    teacher_type: ModelType,
    tokenizer,
    teacher,
    vocabulary: str,
    flag: str = "data_file",
) -> LmSeqsDataset:
    """Read and filter the sequences of a flag's file. Raises InputError where it doesn't fit or
    nothing is left.
    """
    max_length = max_input_length(teacher_type, tokenizer, teacher.config)
    max_length = min(max_length, config.max_length or max_length)
    special = SpecialIds(**special_ids(teacher_type, tokenizer))
    model = f"--teacher_name {config.teacher_name}"
    path = getattr(config, flag)
    try:
        return LmSeqsDataset.from_file(
            path, special, max_length, teacher.config.vocab_size, model, vocabulary
        )
    except InputError as error:
        raise InputError(str(error).replace(f"--data_file {path}", f"--{flag} {path}")) from error


def make_held_out(
    config: TrainConfig, teacher_type: ModelType, tokenizer, teacher, vocabulary: str
) -> HeldOut | None:
    """Read the held-out sequences, and plan how they are evaluated: on all ranks alike. None where
    there are none.
    """
    if config.eval_data_file is None:
        return None
    logger.info("Held out: %s.", config.eval_data_file)
    dataset = make_dataset(config, teacher_type, tokenizer, teacher, vocabulary, "eval_data_file")
    passes = (
        FixedMasks(tokenizer.mask_token_id, tokenizer.all_special_ids)
        if config.mlm
        else next_tokens
    )
    return HeldOut(dataset, plan_batches(dataset.lengths), passes)


def check_forward(model: torch.nn.Module, source: str, token_ids_BT: torch.Tensor) -> None:
    """Raise InputError where a model fails, or gives NaN, on a sequence: better now than after
    moving folders.
    """
    try:
        with torch.no_grad():
            hidden_BTD = model.base_model(token_ids_BT).last_hidden_state
            logits_NV = head_of(model, hidden_BTD[0, :1])
    except Exception as error:
        where = f"{source}: the model fails on {token_ids_BT.shape[1]} tokens"
        raise InputError(f"{where} ({one_line(error)}); correct its JSON") from error
    if not (torch.isfinite(hidden_BTD).all() and torch.isfinite(logits_NV).all()):
        raise InputError(
            f"{source}: the model gives NaN or infinite values before any training; correct its"
            " JSON or weights"
        )


def make_work(config: TrainConfig, student, teacher, token_ids_BT: torch.Tensor) -> Work | None:
    """Find out on a sequence what the models compute, while they are on the CPU; None where they
    don't show it.
    """
    student_size = shown_size(student, token_ids_BT[:, :COUNTED_TOKENS])
    teacher_size = shown_size(teacher, token_ids_BT[:, :COUNTED_TOKENS])
    read_of_teacher = {
        LOSSES[name].reads for name in active(config.alphas) if LOSSES[name].needs_teacher
    }
    if student_size is None or (teacher_size is None and read_of_teacher):
        logger.info(
            "How much these models compute is not known for their families: no MFU is shown."
        )
        return None
    if "logits" not in read_of_teacher:
        teacher_size = dataclasses.replace(teacher_size, in_head=0) if read_of_teacher else None
    return Work(teacher_size, student_size, functools.partial(head_rows, config))


def active(alphas: typing.Mapping[str, float]) -> list[str]:
    """List the objectives that have a weight."""
    return [name for name, alpha in alphas.items() if alpha > 0]


def head_rows(config: TrainConfig, lengths_B: np.ndarray) -> int:
    """Return how many rows of a micro-batch are projected to the vocabulary: those that any
    objective on logits reads.
    """
    num_real = int(lengths_B.sum())
    num_masked = math.ceil(config.mlm_mask_prop * num_real)
    is_restricted = config.mlm and config.restrict_ce_to_mask
    num_rows = {
        "real": num_real,
        "masked": num_masked,
        "next": num_real - len(lengths_B),
        "distilled": num_masked if is_restricted else num_real,
    }
    read = [LOSSES[name].rows for name in active(config.alphas) if LOSSES[name].reads == "logits"]
    return max((num_rows[kind] for kind in read), default=0)


def make_preparation(
    config: TrainConfig, teacher_type: ModelType, tokenizer, vocab_size: int, vocabulary: str
) -> typing.Callable:
    """Choose how batches are prepared: masked (with the token counts) or causal. Raises
    InputError.
    """
    if not config.mlm:
        return functools.partial(prepare_clm, with_mask=row_of(teacher_type).pads_by_mask)
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"--teacher_name {config.teacher_name}: its tokenizer has no mask_token, which --mlm"
            " needs; add it"
        )
    model = f"--teacher_name {config.teacher_name}"
    counts_V = read_token_counts(config.token_counts, vocab_size, model, vocabulary)
    weights_V = masking_weights(
        torch.from_numpy(counts_V), config.mlm_smoothing, tokenizer.all_special_ids
    )
    return MlmPreparation(
        weights_V,
        tokenizer.mask_token_id,
        config.mlm_mask_prop,
        config.word_mask,
        config.word_keep,
        config.word_rand,
        config.restrict_ce_to_mask,
        config.seed,
    )


def make_student(config: TrainConfig, student_type: ModelType, student_config) -> torch.nn.Module:
    """Make the student: the folder's, or seeded random weights, then those given; what is to stay
    fixed is frozen.
    """
    torch.manual_seed(keyed_seed(config.seed, "student"))
    if config.student is not None:
        student = load_model(student_type, config.student, "--student")
    else:
        student = build_student(student_type, student_config, student_source(config))
    if config.student_pretrained_weights is not None:
        load_student_weights(student, student_type, config.student_pretrained_weights)
    freeze_embeddings(
        student,
        student_type,
        positions=config.freeze_pos_embs,
        token_types=config.freeze_token_type_embds,
    )
    if config.activation_checkpointing:
        recompute_activations(student, config.compile)
    return student


def run_length(config: TrainConfig, batches_per_epoch: int, world_size: int) -> tuple[int, int]:
    """Return the run's number of micro-batches over all ranks, and of updates that the schedule
    counts.
    """
    per_update = config.gradient_accumulation_steps * world_size
    if config.max_steps is not None:
        num_micro_batches = config.max_steps * per_update
    else:
        num_micro_batches = batches_per_epoch * config.n_epoch
    num_real = -(-num_micro_batches // per_update)
    if num_real < FEW_UPDATES:
        logger.warning(
            "Only %d update(s) (%d micro-batches, %d an update), the first at learning rate 0: take"
            " more data or epochs, or a smaller --gradient_accumulation_steps.",
            num_real,
            num_micro_batches,
            per_update,
        )
    return num_micro_batches, num_micro_batches // per_update + 1


def make_distiller(
    config: TrainConfig, runtime: Runtime, student, teacher, num_updates: int
) -> Distiller:
    """Put the models on the device, and optimizer and schedule around the student."""
    student.to(runtime.device)
    model = DistillationModel(
        student,
        prediction_head(student),
        head_parameters(student),
        config.alphas,
        config.temperature,
    )
    if not model.uses_fast_head:
        logger.info(
            "The student's head is more than layers and one linear map: the plain, slower head is"
            " used."
        )
    teacher = teacher.to(runtime.device) if model.needs_teacher else None
    groups = split_for_weight_decay(student, config.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=ADAM_BETAS, eps=config.adam_epsilon, fused=True
    )
    make_moments(optimizer)
    num_warmup = math.ceil(config.warmup_prop * num_updates)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, num_warmup, num_updates)
    return Distiller(
        model,
        teacher,
        prediction_head(teacher) if teacher is not None else None,
        optimizer,
        schedule,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        world_size=runtime.world_size,
        amp_dtype=torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None,
        normalization=config.loss_normalization,
        compiles=config.compile,
    )


# --------------------------------------------------------------------------------------------------
# The run folder
# --------------------------------------------------------------------------------------------------


# Flags that may change when a run goes on: where things are (their content is compared), how often
# and how, not what.
FREE_FLAGS = {
    "force",
    "resume",
    "keep_checkpoints",
    "dump_path",
    "data_file",
    "token_counts",
    "student_config",
    "teacher_name",
    "student",
    "trust_remote_code",
    "student_pretrained_weights",
    "initializer_range",
    "n_gpu",
    "local_rank",
    "distributed_timeout_s",
    "log_interval",
    "checkpoint_interval",
    "fp16_opt_level",
    "compile",
    "activation_checkpointing",
    "gradient_accumulation_steps",
    "eval_data_file",
    "eval_interval",
}
START_ANEW = "or start anew with another --dump_path"


def find_resume_point(config: TrainConfig, world_size: int) -> Checkpoint | None:
    """Find the checkpoint to go on from, before any model is loaded; None: the run starts anew.

    Raises InputError where one is asked for and there is none, all are damaged, or it is of a run
    of other flags.
    """
    mode, folder = resume_mode(config), Path(config.dump_path) / CHECKPOINTS
    if mode is None:
        return None
    found = checkpointing.newest(folder)
    if found is None:
        if mode == "required":
            raise InputError(
                f"--resume: there is no checkpoint in {folder}; name the run's --dump_path, or use"
                " --resume auto"
            )
        return None
    with saying_misfit(found):
        problems = flag_contradictions(config, world_size, found)
        if problems:
            raise InputError("\n".join(problems))
        logger.info(
            "Going on from %s: %d updates, %d micro-batches done.",
            found.path,
            found.step,
            found.state["micro_batches"],
        )
    return found


@contextlib.contextmanager
def saying_misfit(found: Checkpoint | None) -> Iterator[None]:
    """Turn what an odd state raises into InputError: it is whole, but not what this program
    writes.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = "--resume: the checkpoint" if found is None else found.path
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"{name}: does not fit this program and run ({reason}); {START_ANEW[3:]}"
        ) from error


def flag_contradictions(config: TrainConfig, world_size: int, found: Checkpoint) -> list[str]:
    """Say which flags, or which number of processes, contradict a checkpoint: one line each."""
    then, now = found.state["flags"], as_flags(config)
    problems = [
        f"--{name} {now[name]}: {found.path} was made with {then[name]}; pass that, {START_ANEW}"
        for name in now
        if name not in FREE_FLAGS and name in then and then[name] != now[name]
    ]
    per_update = config.gradient_accumulation_steps * world_size
    if per_update != found.state["per_update"]:
        problems.append(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps} on {world_size}"
            f" process(es): {per_update} micro-batches an update, {found.path} was made with"
            f" {found.state['per_update']}; keep their product, {START_ANEW}"
        )
    return problems


def check_identity(config: TrainConfig, now: dict, found: Checkpoint) -> None:
    """Raise InputError, a line each, where the inputs' content is not what the checkpoint was made
    with.
    """
    then, problems = found.state["identity"], []
    for key, value in now["student_config"].items():
        if key in then["student_config"] and then["student_config"][key] != value:
            was = then["student_config"][key]
            problems.append(
                f"{student_source(config)}: {key} is {value}, {found.path} was made with {was}"
            )
    for name in ("teacher_name", "data_file", "token_counts", "vocabulary"):
        if now[name] != then[name]:
            source = "the tokenizer of --teacher_name" if name == "vocabulary" else f"--{name}"
            path = getattr(config, "teacher_name" if name == "vocabulary" else name)
            digests = [str(digest)[:12] for digest in (now[name], then[name])]
            problems.append(
                f"{source} {path}: its digest is {digests[0]}, {found.path} was made with"
                f" {digests[1]}"
            )
    best = found.state.get("best")
    if best and now["eval_data_file"] not in (None, best["data"]):
        digests = [str(digest)[:12] for digest in (now["eval_data_file"], best["data"])]
        problems.append(
            f"--eval_data_file {config.eval_data_file}: its digest is {digests[0]}, the best"
            f" student so far was found on {digests[1]}"
        )
    if problems:
        raise InputError(
            "\n".join(f"{problem}; name the same, {START_ANEW}" for problem in problems)
        )


class RunFolder:
    """What a run writes, on the main process only. Every file is complete under its name or not
    there.
    """

    def __init__(self, config: TrainConfig, parts: Parts, point: Checkpoint | None):
        """point: the checkpoint that the run goes on from; without one the folder is made, an old
        one moved aside.
        """
        self.path = entry(config.dump_path)
        self.student = parts.student
        self.tokenizer = parts.tokenizer
        self.lock = self.log = None
        self._claim(config, point)
        try:
            self._begin(config, point)
        except BaseException:
            self.close()
            raise

    def _begin(self, config: TrainConfig, point: Checkpoint | None) -> None:
        write_json(self.path / "parameters.json", as_flags(config))
        # Differs from the original: outside a checkout, or with a detached head, the run goes on.
        write_json(self.path / "git_log.json", git_facts(Path(__file__).parent))
        with atomic_path(self.path / "config.json") as temporary:
            temporary.write_text(self.student.config.to_json_string(), encoding="utf-8")
        if point is not None:
            cut_log(self.log_path, point.state["log_bytes"])
            self._save_plain_checkpoint()  # the process may have been killed between the two
        self.log = Log(self.log_path)
        if point is None:
            student_config = self.student.config.to_json_string(use_diff=False)
            self.log.add_texts(
                {"config/training": json.dumps(as_flags(config)), "config/student": student_config}
            )

    @property
    def log_path(self) -> Path:
        """Where TensorBoard's event files are."""
        return self.path / "log" / "train"

    def _claim(self, config: TrainConfig, point: Checkpoint | None) -> None:
        problem = dump_path_problem(config)  # again: loading took a while
        if problem:
            raise InputError(problem)
        if point is None and os.path.lexists(self.path):
            # Differs from the original: moved aside, where 2019 deleted.
            require_unlocked(self.path / LOCK)
            aside = _free_name(f"{self.path}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.path, aside)
            logger.info("Moved the existing %s aside to %s.", self.path, aside)
        make_folder(self.path.parent)
        self.path.mkdir(exist_ok=point is not None)
        flush_to_disk(self.path.parent)
        self.lock = take_lock(self.path / LOCK)
        if point is not None:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what this run was writing when it was killed."""
        checkpointing.clean(self.path / CHECKPOINTS)
        for path in [*self.path.glob(".*.tmp"), *self.path.glob(f"{BEST}/.*.tmp")]:
            path.unlink(missing_ok=True)
        for path in self.path.glob(".export-*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let another process have the folder."""
        if self.lock is not None:
            self.lock.close()
        if self.log is not None:
            self.log.let_go()

    def save_checkpoint(self, distiller: Distiller, state: dict, step: int, keep: int) -> None:
        """Write all that the run needs to go on, then checkpoint.pth: the student's plain state
        dict.
        """
        state = {**state, "log_bytes": self._log_bytes()}
        checkpointing.write(self.path / CHECKPOINTS, step, distiller.tensors(), state, keep)
        self._save_plain_checkpoint()

    def _save_plain_checkpoint(self) -> None:
        save_weights(self.path / "checkpoint.pth", self.student.state_dict())

    def _log_bytes(self) -> dict[str, int]:
        """Flush the log to the disk; return the sizes of its files."""
        self.log.flush()
        files = sorted(self.log_path.iterdir())
        for file in files:
            flush_to_disk(file)
        return {file.name: file.stat().st_size for file in files}

    def save_epoch(self, epoch: int) -> None:
        """Write model_epoch_{epoch}.pth."""
        save_weights(self.path / f"model_epoch_{epoch}.pth", self.student.state_dict())

    def describe_saved(self) -> str:
        """Say what is on the disk to go on from."""
        saved = checkpointing.exist(self.path / CHECKPOINTS)
        return (
            f"The newest checkpoint is {saved[0]}."
            if saved
            else f"No checkpoint was saved yet in {self.path}."
        )

    def save_best(self, record: dict) -> None:
        """Keep the student as the best so far: best/, for from_pretrained, and best.json last,
        which says what it holds.
        """
        target = self.path / BEST
        with self._exported() as files:
            names = [target / file.name for file in files]
            with atomic_paths(
                *names, target / "best.json", stale=[target / "best.json"]
            ) as temporaries:
                for file, temporary in zip(files, temporaries, strict=False):
                    os.replace(file, temporary)
                temporaries[-1].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _exported(self) -> Iterator[list[Path]]:
        """Yield the files of the student and its tokenizer as from_pretrained wants them, in a
        folder to take them from.
        """
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.path) as folder:
            with quiet_transformers(), naming_library_errors(self.path):
                self.student.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            yield sorted(Path(folder).iterdir())

    def finish(self) -> None:
        """Make the folder one that from_pretrained loads, and write pytorch_model.bin last: its
        presence means done.
        """
        with self._exported() as files:
            for file in files:
                with atomic_path(self.path / file.name) as temporary:
                    os.replace(file, temporary)
        save_weights(self.path / "pytorch_model.bin", self.student.state_dict())
        self.log.close()


class Log:
    """TensorBoard's event files; a system error names their folder."""

    def __init__(self, path: Path):
        self.path = path
        # Their writer's thread prints a traceback of its own where the disk is full, besides
        # handing the error on.
        self.kept_hook, threading.excepthook = threading.excepthook, self._thread_failed
        with naming(path):
            self.writer = SummaryWriter(str(path))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        if not (
            type(failure.thread).__name__ == "_AsyncWriterThread"
            and issubclass(failure.exc_type, OSError)
        ):
            self.kept_hook(failure)

    def add_texts(self, texts: dict[str, str]) -> None:
        """Write texts by tag, as code."""
        with naming(self.path):
            for tag, text in texts.items():
                self.writer.add_text(tag, f"    {text}", 0)

    def add_scalars(self, scalars: dict[str, float], x: int) -> None:
        """Write a point for each tag."""
        with naming(self.path):
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, x)

    def flush(self) -> None:
        """Have all points in the files."""
        with naming(self.path):
            self.writer.flush()

    def let_go(self) -> None:
        """Have threads' errors printed as before."""
        threading.excepthook = self.kept_hook

    def close(self) -> None:
        """Write what is left."""
        with naming(self.path):
            self.writer.close()


def cut_log(folder: Path, sizes: dict[str, int]) -> None:
    """Cut TensorBoard's files to what they held at a checkpoint: what came after it will come
    again.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        size = sizes.get(file.name, 0)
        if file.stat().st_size < size:
            logger.warning("%s is shorter than it was: the log lacks points.", file)
        elif size:
            os.truncate(file, size)
        elif file.name.startswith("events.out.tfevents."):
            file.unlink()  # written by this run after the checkpoint


def entry(path: str) -> Path:
    """Name a folder by its place in the folder above: links on the way are followed, as the system
    does, one at the end not.

    A rename then moves what was looked at: os.path.abspath takes "link/../run" for "run", and
    rename a slash behind a link for the folder behind it.
    """
    return (
        Path(path).resolve()
        if Path(path).name in ("", "..")
        else Path(path).parent.resolve() / Path(path).name
    )


def _free_name(name: str) -> str:
    candidates = [name, *(f"{name}-{k}" for k in range(1, 1000))]
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


class Progress:
    """Counters and means of a run, and what is shown and logged of them (on the main process)."""

    def __init__(self, parts: Parts, runtime: Runtime):
        self.parts = parts
        self.world_size = runtime.world_size
        self.names = ["loss", *(f"loss_{name}" for name in parts.distiller.model.alphas)]
        self.step = 0  # updates done
        self.micro_batches = 0  # done, over all processes
        self.log_sums_K, self.log_count = torch.zeros(len(self.names), dtype=torch.float64), 0
        # Others wait for rank 0 at the first exchange: it measures undisturbed, with its share of a
        # CPU's threads.
        self.peak_flops = (
            self._find_peak(runtime) if runtime.is_main and parts.work is not None else None
        )
        self.num_tokens, self.num_flops, self.logged_at = (
            0,
            0,
            time.perf_counter(),
        )  # of all ranks, since the last log
        self.epoch_sums: dict[int, tuple[float, int]] = {}
        self.evaluated_step = 0  # the last update after which held-out data was evaluated
        self.best: dict | None = None  # what best.json holds
        self.training_text = self.held_out_text = ""  # what the bar shows
        self.bar = tqdm(
            total=parts.num_micro_batches,
            unit="batch",
            desc="epoch 0",
            smoothing=0.05,
            disable=not runtime.is_main,
            **bar_options(),
        )

    def _find_peak(self, runtime: Runtime) -> float:
        dtype = self.parts.distiller.amp_dtype or torch.float32
        return peak_flops(runtime.device, dtype) * runtime.world_size

    @property
    def iterations(self) -> int:
        """Micro-batches that each process has taken."""
        return -(-self.micro_batches // self.world_size)

    def crosses(self, interval: int, num_iterations: int) -> bool:
        """True where the next num_iterations micro-batches reach a multiple of the interval."""
        return (self.iterations + num_iterations) // interval > self.iterations // interval

    def state(self) -> dict[str, typing.Any]:
        """Return the counters and sums as numbers, for a checkpoint."""
        return {
            "micro_batches": self.micro_batches,
            "log_sums": self.log_sums_K.tolist(),
            "log_count": self.log_count,
            "epoch_sums": [[epoch, *sums] for epoch, sums in self.epoch_sums.items()],
            "evaluated_step": self.evaluated_step,
            "best": self.best,
        }

    def load(self, step: int, state: typing.Mapping[str, typing.Any]) -> None:
        """Take what `state` returned after update number `step`."""
        self.step, self.micro_batches = step, state["micro_batches"]
        self.log_sums_K, self.log_count = (
            torch.tensor(state["log_sums"], dtype=torch.float64),
            state["log_count"],
        )
        self.epoch_sums = {epoch: (total, count) for epoch, total, count in state["epoch_sums"]}
        self.evaluated_step, self.best = state.get("evaluated_step", 0), state.get("best")
        self.bar.initial = self.micro_batches  # the bar's rate is of what is done now
        self.bar.update(self.micro_batches - self.bar.n)

    def advancing(self, batches: Iterator, num_ranks: int) -> Iterator:
        """Pass this rank's micro-batches on, moving the bar as each is done; it stands for one on
        every rank.
        """
        for batch in batches:
            yield batch
            self.bar.update(num_ranks)

    def advance(self, update: Update) -> None:
        """Count an update that was begun."""
        self.step += 1
        self.micro_batches = update.planned[-1].number + 1

    def record(self, update: Update, report: StepReport) -> None:
        """Take an update's losses into the means and the progress bar."""
        self.log_sums_K += report.losses_MK.sum(0)
        self.log_count += len(update.planned)
        for batch, loss in zip(update.planned, report.losses_MK[:, 0].tolist(), strict=True):
            total, count = self.epoch_sums.get(batch.epoch, (0.0, 0))
            self.epoch_sums[batch.epoch] = (total + loss, count + 1)
        for batch in update.planned:
            lengths_B = self.parts.dataset.lengths[batch.sequences]
            self.num_tokens += int(lengths_B.sum())
            self.num_flops += 0 if self.parts.work is None else self.parts.work.flops(lengths_B)
        rates = self.rates(time.perf_counter())
        self.bar.set_description(f"epoch {update.planned[-1].epoch}", refresh=False)
        self.training_text = (
            f"loss {report.losses_MK[:, 0].mean():.4f}, {rates['tokens_per_s']:,.0f} tokens/s"
        )
        if "mfu" in rates:
            self.training_text += f", {rates['mfu']:.1%} MFU"
        self.bar.set_postfix_str(self.training_text + self.held_out_text, refresh=False)
        self.bar.update(
            max(update.planned[-1].number + 1 - self.bar.n, 0)
        )  # the next update may have moved it on

    def rates(self, now: float) -> dict[str, float]:
        """Return real tokens a second over all ranks, and, where it is known, their model FLOPs'
        share of the peak.

        Of the time since the last log, or since this process began to train.
        """
        elapsed_s = now - self.logged_at
        rates = {"tokens_per_s": self.num_tokens / elapsed_s}
        return (
            rates
            if self.peak_flops is None
            else {**rates, "mfu": self.num_flops / elapsed_s / self.peak_flops}
        )

    def epoch_mean(self, epoch: int) -> float:
        """Mean loss over an epoch's micro-batches so far."""
        total, count = self.epoch_sums[epoch]
        return total / count

    def log_to(self, log: Log, epoch: int, report: StepReport) -> None:
        """Write the scalars of SummaryWriter; x = micro-batches that each process has taken."""
        now = time.perf_counter()
        # Differs from the original: means since the last log, over all ranks; 2019 logged one
        # micro-batch.
        means = (self.log_sums_K / self.log_count).tolist()
        scalars = {f"losses/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        scalars |= {
            "losses/cum_avg_loss_epoch": self.epoch_mean(epoch),
            "learning_rate/lr": self.parts.distiller.schedule.get_last_lr()[0],
            "global/memory_usage": psutil.virtual_memory().used / 1e6,
            "global/speed": now - self.logged_at,
            **{f"global/{name}": rate for name, rate in self.rates(now).items()},
        }
        for name, parameter in self.parts.student.named_parameters():
            scalars[f"parameter_mean/{name}"] = parameter.detach().mean().item()
            scalars[f"parameter_std/{name}"] = (
                parameter.detach().std(correction=int(parameter.numel() > 1)).item()
            )
        for name, (mean, std) in report.grad_statistics.items():
            scalars |= {f"grad_mean/{name}": mean, f"grad_std/{name}": std}
        log.add_scalars(scalars, self.iterations)
        self.log_sums_K.zero_()
        self.log_count, self.num_tokens, self.num_flops, self.logged_at = 0, 0, 0, now

    def evaluation_is_due(self, interval: int | None) -> bool:
        """True where held-out data is to be evaluated after the last update, and was not yet."""
        is_last = self.micro_batches == self.parts.num_micro_batches
        return self._is_evaluated(self.step, interval, is_last) and self.step > self.evaluated_step

    def will_evaluate(self, interval: int | None, is_last: bool) -> bool:
        """True where held-out data is to be evaluated after the next update."""
        return self._is_evaluated(self.step + 1, interval, is_last)

    def _is_evaluated(self, step: int, interval: int | None, is_last: bool) -> bool:
        return self.parts.held_out is not None and (
            is_last or (interval is not None and step % interval == 0)
        )

    def take_figures(self, figures: dict[str, float], elapsed_s: float) -> bool:
        """Take an evaluation in, its time out of the rates; True where the student is the best so
        far.
        """
        self.evaluated_step = self.step
        self.logged_at += elapsed_s
        measure = "kl" if "kl" in figures else "loss"
        self.held_out_text = (
            f", held-out {measure} {figures[measure]:.4f}, top-1 {figures['accuracy']:.1%}"
        )
        self.bar.set_postfix_str(self.training_text + self.held_out_text)
        # A comparison with NaN is false: such a student is never the best.
        is_best = figures[measure] < (
            math.inf if self.best is None else self.best["figures"][measure]
        )
        if is_best:
            data = self.parts.identity.get("eval_data_file")
            self.best = {"step": self.step, "lowest": measure, "figures": figures, "data": data}
        return is_best


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint. status: the exit status."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Begun:
    """An update that the device was given. number: updates done before it."""

    update: Update
    step: BegunStep
    number: int


def fit(
    config: TrainConfig,
    parts: Parts,
    runtime: Runtime,
    folder: RunFolder | None,
    progress: Progress,
    stop: StopSignals,
):
    """Train: an update, then whatever falls due after it. Raises Stopped.

    Where the distiller does not wait, what an update gave is read when the next one has been given
    to the device, so that this is never idle; before anything that falls due all is read.
    """
    updates = parts.sampler.updates(
        parts.num_micro_batches,
        config.gradient_accumulation_steps,
        runtime.rank,
        runtime.world_size,
        progress.micro_batches,
    )
    stream = contextlib.closing(prefetched(prepared(parts, updates), MICRO_BATCHES_AHEAD))
    progress.logged_at = time.perf_counter()  # a checkpoint was read or written before
    unread: list[Begun] = []
    with progress.bar, logging_redirect_tqdm([logger]), stream as items:
        evaluate_if_due(
            config, parts, runtime, folder, progress
        )  # the run was stopped before it could
        for update in items:
            due = what_is_due(config, progress, update)
            batches = progress.advancing(
                itertools.islice(items, len(update.mine)), runtime.world_size
            )
            unread.append(begin(parts, runtime, folder, progress, update, batches, due, stop))
            reports = read_some(parts, runtime, folder, progress, unread, len(unread) - 1)
            if parts.distiller.waits or due.is_any or any(report.num_asking for report in reports):
                reports += read_some(parts, runtime, folder, progress, unread, len(unread))
            is_stopped = any(report.num_asking for report in reports)
            if (
                due.is_last or not is_stopped
            ):  # whoever asks to stop may not wait: it is done when the run goes on
                evaluate_if_due(config, parts, runtime, folder, progress)
            if due.is_any or is_stopped:
                after_update(config, parts, folder, progress, update, reports[-1], due, is_stopped)
            if is_stopped and not due.is_last:
                raise Stopped(exit_status(stop.requested or signal.SIGTERM))


@dataclasses.dataclass(frozen=True)
class Due:
    """What is to be done after an update."""

    is_last: bool
    is_logged: bool
    is_saved: bool
    is_evaluated: bool
    epochs: list[int]

    @property
    def is_any(self) -> bool:
        """True where the update must be read at once."""
        return (
            self.is_last
            or self.is_logged
            or self.is_saved
            or self.is_evaluated
            or bool(self.epochs)
        )


def what_is_due(config: TrainConfig, progress: Progress, update: Update) -> Due:
    """Find out what falls due after the next update."""
    num_iterations = -(-len(update.planned) // progress.world_size)
    is_last = update.planned[-1].number == progress.parts.num_micro_batches - 1
    return Due(
        is_last,
        is_logged=is_last or progress.crosses(config.log_interval, num_iterations),
        is_saved=is_last or progress.crosses(config.checkpoint_interval, num_iterations),
        is_evaluated=progress.will_evaluate(config.eval_interval, is_last),
        epochs=epochs_ended(update, len(progress.parts.sampler)),
    )


def begin(
    parts: Parts,
    runtime: Runtime,
    folder: RunFolder | None,
    progress: Progress,
    update: Update,
    batches: Iterator,
    due: Due,
    stop: StopSignals,
) -> Begun:
    """Give the device an update."""
    number = progress.step
    with (
        saying_out_of_memory(parts, update),
        explaining_non_finite(parts, runtime, folder, update, number),
    ):
        step = parts.distiller.begin_step(
            batches,
            [batch.number for batch in update.planned],
            len(update.mine),
            wants_statistics=due.is_logged and runtime.is_main,
            asks_to_stop=lambda: stop.requested is not None,
        )
    progress.advance(update)
    return Begun(update, step, number)


def read_some(
    parts: Parts,
    runtime: Runtime,
    folder: RunFolder | None,
    progress: Progress,
    unread: list[Begun],
    num: int,
) -> list[StepReport]:
    """Read the oldest `num` of the updates not read yet, and take what they gave into the means."""
    reports = []
    for begun in unread[:num]:
        explained = explaining_non_finite(parts, runtime, folder, begun.update, begun.number)
        with saying_out_of_memory(parts, begun.update), explained:
            reports.append(begun.step.read())
        progress.record(begun.update, reports[-1])
    del unread[:num]
    return reports


def after_update(
    config: TrainConfig,
    parts: Parts,
    folder: RunFolder | None,
    progress: Progress,
    update: Update,
    report: StepReport,
    due: Due,
    is_stopped: bool,
) -> None:
    """Log and save what is due. Raises NonFiniteError, on every rank alike, where what is to be
    saved is not finite.
    """
    # Differs from the original: logs and checkpoints follow the update that they fall in; 2019's
    # came before it.
    is_saved = due.is_saved or is_stopped
    if is_saved or due.epochs:
        parts.distiller.check_finite()
    if folder is None:
        return
    if due.is_logged:
        progress.log_to(folder.log, update.planned[-1].epoch, report)
    for epoch in due.epochs:
        end_epoch(folder, epoch, progress.epoch_mean(epoch))
    if is_saved:
        save(config, parts, folder, progress)


def evaluate_if_due(
    config: TrainConfig,
    parts: Parts,
    runtime: Runtime,
    folder: RunFolder | None,
    progress: Progress,
) -> None:
    """Evaluate held-out data where that falls due: show it, log it, keep the best student.

    The checkpoint that follows remembers all three; a run that dies before it does them again.
    Training is not touched. Raises NonFiniteError, on every rank alike, before anything not finite
    is kept.
    """
    if not progress.evaluation_is_due(config.eval_interval):
        return
    parts.distiller.check_finite()
    started = time.perf_counter()
    figures = held_out_figures(parts, runtime)
    is_best = progress.take_figures(figures, time.perf_counter() - started)
    if folder is None:
        return
    folder.log.add_scalars(
        {f"eval/{name}": value for name, value in figures.items()}, progress.iterations
    )
    listed = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    logger.info(
        "Update %d, held out: %s%s.", progress.step, listed, "; the best so far" if is_best else ""
    )
    if is_best:
        folder.save_best(progress.best)


LOGGED_FIGURES = ("loss", "accuracy", "perplexity", "kl", "agreement")


def held_out_figures(parts: Parts, runtime: Runtime) -> dict[str, float]:
    """Measure the student, against its teacher if it has one, on held-out data: each rank its
    share, summed once.
    """
    held_out, distiller = parts.held_out, parts.distiller
    student = Reader(parts.student, distiller.model.head, distiller.amp_dtype)
    teacher = (
        None if distiller.teacher is None else Reader(distiller.teacher, distiller.teacher_head)
    )
    with runtime.sharing_errors():
        mine = passes_over(
            held_out.dataset.collate,
            held_out.batches,
            held_out.passes,
            runtime.rank,
            runtime.world_size,
        )
        sums_S = measure(student, teacher, mine)
    if runtime.world_size > 1:
        torch.distributed.all_reduce(sums_S)
    figures = figures_of(sums_S, teacher is not None)
    return {name: figures[name] for name in LOGGED_FIGURES if name in figures}


def end_epoch(folder: RunFolder, epoch: int, mean_loss: float) -> None:
    """Save the student under the epoch's name, and log the epoch's mean loss."""
    folder.save_epoch(epoch)
    folder.log.add_scalars({"epoch/loss": mean_loss}, epoch)
    logger.info("Epoch %d: mean loss %.4f.", epoch, mean_loss)


def save(config: TrainConfig, parts: Parts, folder: RunFolder, progress: Progress) -> None:
    """Write a checkpoint of the run as it stands."""
    state = {
        **progress.state(),
        **parts.distiller.values(),
        "identity": parts.identity,
        "flags": as_flags(config),
        "per_update": config.gradient_accumulation_steps * progress.world_size,
        "torch": torch.__version__,
    }
    folder.save_checkpoint(parts.distiller, state, progress.step, config.keep_checkpoints)


def restore(
    config: TrainConfig,
    parts: Parts,
    runtime: Runtime,
    progress: Progress,
    point: Checkpoint | None,
) -> None:
    """Take the state of the checkpoint that rank 0 found onto every rank. Raises InputError where
    it is another run's.
    """
    with runtime.sharing_errors():
        if point is not None:
            with saying_misfit(point):
                check_identity(config, parts.identity, point)
        tensors = {
            name: point.tensors(name) if point is not None else {}
            for name in ("student", "optimizer")
        }
    tensors = {name: runtime.tensors_from_main(content) for name, content in tensors.items()}
    step, state = runtime.from_main((point.step, dict(point.state)) if point is not None else None)
    with runtime.sharing_errors(), saying_misfit(point):
        parts.distiller.load(tensors, state)
        progress.load(step, state)
    if state.get("torch") != torch.__version__:
        logger.warning(
            "The checkpoint is of torch %s, this is %s: results may differ.",
            state.get("torch"),
            torch.__version__,
        )


@contextlib.contextmanager
def explaining_non_finite(
    parts: Parts, runtime: Runtime, folder: RunFolder | None, update: Update, number: int
):
    """Say of a NonFiniteError which update, rank and sequences it came from, and save their batches
    for a post-mortem.
    """
    try:
        yield
    except NonFiniteError as error:
        found = (
            dict.fromkeys(error.numbers, "")
            if error.is_located
            else located(parts, runtime, update)
        )
        if folder is None:
            raise
        lines = [f"update {number}: {error}", *culprit_lines(parts, runtime, update, found)]
        culprits = [batch for batch in update.planned if batch.number in (found or error.numbers)]
        path = folder.path / f"nonfinite-step-{number}.safetensors"
        try:
            save_batches(path, parts, culprits, "; ".join(lines))
            lines.append(f"the batch is in {path}")
        except OSError as problem:
            lines.append(f"the batch could not be saved ({one_line(problem)})")
        raise NonFiniteError("; ".join(lines), error.numbers, error.is_located) from error


def culprit_lines(
    parts: Parts, runtime: Runtime, update: Update, found: dict[int, str]
) -> list[str]:
    """Describe the micro-batches found, number -> what is wrong: on which rank, of which
    sequences.
    """
    shares = [
        parts.sampler.deal(update.planned, rank, runtime.world_size)
        for rank in range(runtime.world_size)
    ]
    ranks = {batch.number: rank for rank, share in enumerate(shares) for batch in share}
    lines = []
    for batch in update.planned:
        if batch.number in found:
            what = f"micro-batch {batch.number}{found[batch.number] and ': '}{found[batch.number]}"
            lines.append(
                f"{what}, on rank {ranks[batch.number]}, sequences"
                f" {', '.join(map(str, batch.sequences.tolist()))}"
            )
    return lines or ["computed again everything was finite: suspect the machine"]


def located(parts: Parts, runtime: Runtime, update: Update) -> dict[int, str]:
    """Find on all ranks which micro-batches of an update give a gradient that is not finite."""
    mine = parts.distiller.non_finite_gradients(prepared_batches(parts, update.mine))
    found = [mine] * runtime.world_size
    if runtime.world_size > 1:
        torch.distributed.all_gather_object(found, mine)
    return {number: what for part in found for number, what in part.items()}


def save_batches(path: Path, parts: Parts, planned: list[PlannedBatch], message: str) -> None:
    """Save micro-batches as they went into the models, with the numbers of their sequences."""
    tensors = {}
    for batch, plan in zip(prepared_batches(parts, planned), planned, strict=True):
        content = {
            "input_ids": batch.input_ids_BT,
            "labels": batch.labels_BT,
            "attention_mask": batch.attention_mask_BT,
            "sequences": torch.from_numpy(plan.sequences.astype(np.int64)),
        }
        tensors |= {
            f"{batch.number}/{name}": value.contiguous()
            for name, value in content.items()
            if value is not None
        }
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"error": message}))


@contextlib.contextmanager
def saying_out_of_memory(parts: Parts, update: Update) -> Iterator[None]:
    """Turn an allocation that failed into one line that names the largest micro-batch and the flags
    to lower.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_memory = isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) or "not enough memory" in str(error)
        if not is_memory:
            raise
        shapes = [
            (len(b.sequences), int(parts.dataset.lengths[b.sequences].max())) for b in update.mine
        ]
        num, length = max(
            shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0)
        )  # a rank may have none
        raise RankError(
            f"out of memory in a micro-batch of {num} x {length} = {num * length} padded tokens;"
            " lower --max_tokens or --batch_size (and raise --gradient_accumulation_steps), or try"
            " --bf16 or --activation_checkpointing"
        ) from error


def prepared(parts: Parts, updates: Iterable[Update]) -> Iterator[Update | MicroBatch]:
    """Yield each update, then this rank's micro-batches of it, collated, masked and ready to be
    copied to the device.
    """
    for update in updates:
        yield update
        yield from prepared_batches(parts, update.mine)


def prepared_batches(parts: Parts, batches: Iterable[PlannedBatch]) -> Iterator[MicroBatch]:
    """Collate and prepare micro-batches, one at a time."""
    for planned in batches:
        batch = parts.prepare(planned.number, *parts.dataset.collate(planned.sequences))
        yield parts.distiller.ready(batch)


def epochs_ended(update: Update, batches_per_epoch: int) -> list[int]:
    """List the epochs whose last micro-batch is in this update."""
    return [batch.epoch for batch in update.planned if (batch.number + 1) % batches_per_epoch == 0]


def run(config: TrainConfig, runtime: Runtime, stop: StopSignals) -> None:
    """Set up, go on from a checkpoint if that is wanted, train, export. Raises InputError,
    NonFiniteError, Stopped.
    """
    point, folder = None, None
    with runtime.sharing_errors():
        if runtime.is_main:
            point = find_resume_point(config, runtime.world_size)
    goes_on = runtime.from_main(point is not None)
    with runtime.sharing_errors():
        parts = set_up(config, runtime)
    progress = Progress(parts, runtime)
    if goes_on:
        restore(config, parts, runtime, progress, point)
    try:
        with runtime.sharing_errors():
            if runtime.is_main:
                folder = RunFolder(config, parts, point)
                if not goes_on:
                    save(
                        config, parts, folder, progress
                    )  # shows now that there is room, and ever after there is one
        logger.info(
            "Training %s parameters on %d sequences (%d ids), %d micro-batches in all.",
            f"{parts.student.num_parameters():,}",
            len(parts.dataset),
            int(np.sum(parts.dataset.lengths)),
            parts.num_micro_batches,
        )
        fit_and_export(config, parts, runtime, folder, progress, stop)
    finally:
        if folder is not None:
            folder.close()


def fit_and_export(
    config: TrainConfig,
    parts: Parts,
    runtime: Runtime,
    folder: RunFolder | None,
    progress: Progress,
    stop: StopSignals,
) -> None:
    """Run the loop with what ends it early said; then export the student."""
    try:
        with stop:
            fit(config, parts, runtime, folder, progress, stop)
    except NonFiniteError as error:
        if runtime.is_main:
            logger.error("Stopped: %s. %s", error, folder.describe_saved())
        sys.exit(EXIT_NON_FINITE)
    except Stopped as end:
        if runtime.is_main:
            logger.info(
                "Stopped after update %d; go on with --resume. %s",
                progress.step,
                folder.describe_saved(),
            )
        sys.exit(end.status)
    if folder is not None:
        folder.finish()
        logger.info("Done: %s holds the student, for from_pretrained.", config.dump_path)


def main(argv: list[str] | None = None) -> None:
    """Run the program: read the flags, join the other processes, run."""
    config = parse_config(argv)
    setup_logging(logging.ERROR if is_another_rank(os.environ) else logging.INFO)
    runtime = start_runtime(config.n_gpu, config.local_rank, timeout_s=config.distributed_timeout_s)
    if runtime.device.type == "cpu":
        keep_freed_memory()
    stop = StopSignals()
    try:
        with runtime.watching(lambda: stop.request(signal.SIGTERM)):
            run(config, runtime, stop)
    except LostRankError as error:
        report_lost_ranks(str(error), runtime.rank)
        sys.exit(EXIT_LOST_RANK)


if __name__ == "__main__":
    run_program(main)
