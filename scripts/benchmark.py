"""Measure the distillation step on this machine: real tokens a second, FLOP/s, memory, time by
stage; beside the 2019 step.

The update of distiller.py is timed on batches that come as in training, with models of full size
and random weights; nothing is downloaded. With --reference the same batches go through a plain step
of the 2019 kind, in the same run. Every figure comes from a process of its own; shares are of what
a large matrix product reaches here, and of the GPU's data sheet. Before anything is timed, both
steps must give the same losses and gradient.

Model FLOPs: see flops.py.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data.batches import MicroBatch, MlmPreparation, masking_weights, prepare_clm
from distil.data.cards import write_token_counts
from distil.data.token_files import MIN_LENGTH, token_file_problem, writing_tokens
from distil.flops import (
    DTYPES,
    best_seconds,
    clock_s,
    nominal_peak,
    product_rate,
    size_of,
    update_flops,
)
from distil.losses import IGNORED_LABEL
from distil.models.architectures import ARCHITECTURES
from distil.models.first_weights import evenly_spaced_layers, extract_student
from distil.models.heads import head_parameters, prediction_head
from distil.models.hub import quiet_transformers
from distil.models.language_model import (
    build_student,
    freeze_embeddings,
    max_input_length,
    read_student_config,
)
from distil.models.tokenizers import special_ids
from distil.reporting.machine import describe_machine
from distil.reporting.tables import markdown, share, times
from distil.system.files import require_output, write_json
from distil.system.launch import check_compiler
from distil.system.prefetch import prefetched
from distil.training.optimizer import ADAM_BETAS, make_moments, split_for_weight_decay
from distiller import BegunStep, DistillationModel, Distiller, StepReport
from grouped_batch_sampler import GroupedBatchSampler, PlannedBatch
from lm_seqs_dataset import LmSeqsDataset, SpecialIds
from utils import (
    InputError,
    OneLineParser,
    git_facts,
    keep_freed_memory,
    keyed_numpy_generator,
    keyed_seed,
    logger,
    one_line,
    run_program,
    setup_logging,
)

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
TEMPERATURE, LEARNING_RATE, ADAM_EPSILON, MAX_GRAD_NORM = 2.0, 5e-4, 1e-6, 5.0
SMOOTHING, MASK_PROP, WORD_MASK, WORD_KEEP, WORD_RAND = 0.7, 0.15, 0.8, 0.1, 0.1
MICRO_BATCHES_AHEAD = 8  # made ready while the step computes, as in training
STAGE_UPDATES = 3
CHECKED_LENGTH = 32

# --------------------------------------------------------------------------------------------------
# What can be measured: tables
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairRow:
    """One teacher and student at base size.

    teacher_sizes: what the teacher's configuration has beyond transformers' defaults.
    special_tokens: the published vocabulary's, text -> id; an id beyond a smaller vocabulary
    becomes its last. alphas: the README's.
    """

    teacher_type: str
    student_type: str
    student_config: str
    teacher_sizes: dict
    special_tokens: dict[str, int]
    alphas: dict[str, float]


OF_BERT = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
OF_ROBERTA = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264}
ROBERTA_SIZES = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
MASKED = {"ce": 5.0, "mlm": 2.0, "cos": 1.0}
CAUSAL = {"ce": 5.0, "clm": 0.5, "cos": 1.0}
PAIR_ROWS = {
    "bert": PairRow(
        "bert", "distilbert", "distilbert-base-uncased", {"vocab_size": 30522}, OF_BERT, MASKED
    ),
    "mbert": PairRow(
        "bert",
        "distilbert",
        "distilbert-base-multilingual-cased",
        {"vocab_size": 119547},
        OF_BERT,
        MASKED,
    ),
    "roberta": PairRow(
        "roberta", "roberta", "distilroberta-base", ROBERTA_SIZES, OF_ROBERTA, MASKED
    ),
    "gpt2": PairRow(
        "gpt2", "gpt2", "distilgpt2", {"vocab_size": 50257}, {"<|endoftext|>": 50256}, CAUSAL
    ),
}

TRAIN_FLAGS = {"fp32": [], "fp16": ["--fp16"], "bf16": ["--bf16"]}  # of train.py

# Micro-batches, in sequences, of --sweep; sizes, in rows, of square matrix products, and bytes
# copied, at base size.
SWEPT_SIZES = {"cpu": [2, 5, 10], "cuda": [8, 32, 128]}
MATMUL_SIZES = {"cpu": [1024, 2048], "cuda": [4096, 8192]}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
# Measured, warm-up. On a CPU the heap settles in the third update: 92,000 page faults in the
# second, 500 from then on.
DEFAULT_UPDATES = {"cpu": (5, 3), "cuda": (20, 5)}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process of its own does, in plain values.

    kind: a key of JOBS. length: the longest sequence, in ids. compiles: through torch.compile. The
    reference in another precision than fp32 is under autocast.
    """

    kind: str
    pair: str
    size: str
    device: str
    data_file: str
    length: int
    batch_size: int
    micro_batches: int
    precision: str
    updates: int
    warmup: int
    threads: int | None
    seed: int
    compiles: bool = False

    @property
    def name(self) -> str:
        """Name the variant in the tables."""
        what = {"distiller": "Distiller.step", "reference": "2019 step"}.get(self.kind, self.kind)
        how = " compiled" if self.compiles else " in autocast" if self.is_autocast_reference else ""
        return (
            f"{what}{how}, {self.precision}, {self.micro_batches} x {self.batch_size} x"
            f" {self.length}"
        )

    @property
    def is_autocast_reference(self) -> bool:
        """True for the 2019 step in half precision: its weights stay in float32."""
        return self.kind == "reference" and self.precision != "fp32"


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--pair",
        default="bert",
        choices=list(PAIR_ROWS),
        help="teacher and student (default: %(default)s)",
    )
    add(
        "--size",
        default="base",
        choices=["base", "tiny"],
        help="tiny: 2 layers of width 64, to try this program",
    )
    add("--device", choices=["cpu", "cuda"], help="(default: a GPU where there is one)")
    add("--data_file", help="token file of the pair's vocabulary (default: synthetic sequences)")
    add(
        "--length",
        type=int,
        help="longest sequence, in ids (default: 128; with --data_file what the teacher admits)",
    )
    add(
        "--mix",
        action="store_true",
        help="synthetic lengths spread as Wikipedia's paragraphs' are (default: all of LENGTH)",
    )
    add(
        "--batch_size",
        type=int,
        nargs="+",
        help="sequences a micro-batch, one figure or more (default: 5)",
    )
    add(
        "--micro_batches",
        type=int,
        default=1,
        help="micro-batches an update (default: %(default)s)",
    )
    add("--precision", nargs="+", choices=list(DTYPES), help="one or more (default: fp32)")
    add(
        "--sweep",
        action="store_true",
        help="several micro-batch sizes, and all precisions of the device",
    )
    add(
        "--reference",
        action="store_true",
        help="also time a plain step of the 2019 kind, on the same batches",
    )
    add(
        "--reference_precision",
        nargs="+",
        choices=list(DTYPES),
        help="of it: fp32 always, another one under torch.autocast",
    )
    add("--compile", action="store_true", help="also run what is ours through torch.compile")
    add(
        "--end_to_end",
        action="store_true",
        help="also time train.py, as a program, on the same sequences",
    )
    add("--updates", type=int, help="measured updates (default: 5 on a CPU, 20 on a GPU)")
    add("--warmup", type=int, help="updates before them (default: 3 on a CPU, 5 on a GPU)")
    add(
        "--rounds",
        type=int,
        default=1,
        help="times that every variant is run, in turn (default: %(default)s)",
    )
    add("--threads", type=int, help="threads of the CPU (default: torch's choice)")
    add(
        "--seed",
        type=int,
        default=56,
        help="seed of ids, order, masks, weights and dropout (default: %(default)s)",
    )
    add("--json", help="write everything that was found to this file")
    add("--plot", help="draw it into this PNG file")
    add("--job", help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and settle what depends on the device. Raises InputError."""
    args = make_parser().parse_args(argv)
    if args.job:
        return args
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; leave the flag out for the CPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    updates, warmup = DEFAULT_UPDATES[args.device]
    args.updates, args.warmup = (
        args.updates or updates,
        warmup if args.warmup is None else args.warmup,
    )
    args.batch_size = args.batch_size or (SWEPT_SIZES[args.device] if args.sweep else [5])
    args.precision = args.precision or (precisions_of(args.device) if args.sweep else ["fp32"])
    args.reference_precision = list(dict.fromkeys(["fp32", *(args.reference_precision or [])]))
    longest = longest_length(args)
    args.length = args.length or (longest if args.data_file else min(128, longest))
    problems = number_problems(args, longest) + path_problems(args)
    if problems:
        raise InputError("\n".join(problems))
    return args


def precisions_of(device: str) -> list[str]:
    """List the precisions that a device computes in by itself; float16 is emulated on most CPUs."""
    has_fp16 = device == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return ["fp32", "bf16", "fp16"] if has_fp16 else ["fp32", "bf16"]


def longest_length(args: argparse.Namespace) -> int:
    """Return the longest sequence that the pair's teacher admits."""
    config, row = teacher_config(args.pair, args.size), PAIR_ROWS[args.pair]
    return config.max_position_embeddings - ARCHITECTURES[row.teacher_type].reserved_positions


def number_problems(args: argparse.Namespace, longest: int) -> list[str]:
    """Say which numbers and precisions can't be used."""
    problems = [
        f"--{name} {value}: expected at least 1"
        for name in ("batch_size", "micro_batches", "updates", "rounds", "threads")
        for value in (getattr(args, name) if name == "batch_size" else [getattr(args, name)])
        if value is not None and value < 1
    ]
    if args.warmup < 0:
        problems.append(f"--warmup {args.warmup}: expected 0 or more")
    if not MIN_LENGTH < args.length <= longest:
        problems.append(
            f"--length {args.length}: expected {MIN_LENGTH + 1} to {longest}, what the {args.pair}"
            " teacher admits"
        )
    if args.mix and args.data_file:
        problems.append(
            "--mix with --data_file: the file has its own lengths; leave one of them out"
        )
    if args.reference_precision != ["fp32"] and not args.reference:
        problems.append("--reference_precision without --reference: add it, or leave it out")
    for flag in ("precision", "reference_precision"):
        for precision in set(getattr(args, flag)) - set(precisions_of(args.device)):
            problems.append(
                f"--{flag} {precision}: this CPU does not compute in it; take bf16, or a GPU"
            )
    return problems


def path_problems(args: argparse.Namespace) -> list[str]:
    """Say which paths can't be read or written."""
    problems = [token_file_problem(args.data_file, "--data_file")] if args.data_file else []
    for flag in ("json", "plot"):
        try:
            if getattr(args, flag) is not None:
                require_output(
                    getattr(args, flag), f"--{flag}", [args.data_file] if args.data_file else []
                )
        except InputError as error:
            problems.append(str(error))
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        problems.append(f"--plot {args.plot}: expected a name that ends in .png")
    return [problem for problem in problems if problem]


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


def teacher_config(pair: str, size: str):
    """Make the configuration of the pair's teacher."""
    row = PAIR_ROWS[pair]
    config = getattr(transformers, ARCHITECTURES[row.teacher_type].config_class)(
        **row.teacher_sizes
    )
    return shrunk(config, num_layers=2) if size == "tiny" else config


def student_config(pair: str, size: str):
    """Read the configuration of the pair's student."""
    row = PAIR_ROWS[pair]
    config = read_student_config(
        row.student_type, str(ROOT / "training_configs" / f"{row.student_config}.json")
    )
    return shrunk(config, num_layers=1) if size == "tiny" else config


def shrunk(config, num_layers: int):
    """Make a configuration small: width 64, 500 token ids; positions stay as they are."""
    sizes = {
        "num_hidden_layers": num_layers,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 500,
    }
    sizes |= {name: 128 for name in ("intermediate_size", "hidden_dim") if hasattr(config, name)}
    sizes |= {
        name: 499
        for name in ("bos_token_id", "eos_token_id")
        if (getattr(config, name, None) or 0) > 499
    }
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


def make_tokenizer(pair: str, vocab_size: int, max_length: int):
    """Make a tokenizer of the pair's kind with the published special tokens; its other tokens mean
    nothing.
    """
    row = PAIR_ROWS[pair]
    special = {
        token: min(token_id, vocab_size - 1) for token, token_id in row.special_tokens.items()
    }
    others = sorted(set(range(vocab_size)) - set(special.values()))
    tokenizer_class = getattr(transformers, ARCHITECTURES[row.teacher_type].tokenizer_class)
    merges = {} if row.teacher_type == "bert" else {"merges": []}
    vocabulary = {**special, **{f"w{token_id}": token_id for token_id in others}}
    return tokenizer_class(vocab=vocabulary, model_max_length=max_length, **merges)


def make_models(job: Job, has_dropout: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Make teacher and student on the device: the student's layers are the teacher's, what training
    freezes is frozen.
    """
    row = PAIR_ROWS[job.pair]
    torch.manual_seed(keyed_seed(job.seed, "models"))
    teacher = (
        build_student(row.teacher_type, teacher_config(job.pair, job.size))
        .eval()
        .requires_grad_(False)
    )
    student = build_student(row.student_type, student_config(job.pair, job.size))
    layers = evenly_spaced_layers(
        teacher.config.num_hidden_layers, student.config.num_hidden_layers
    )
    is_masked = ARCHITECTURES[row.student_type].is_masked
    student.load_state_dict(
        extract_student(teacher, row.student_type, layers, vocab_transform=is_masked), strict=False
    )
    freeze_embeddings(student, row.student_type, positions=True, token_types=True)
    if not has_dropout:
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return teacher.to(job.device), student.to(job.device)


# --------------------------------------------------------------------------------------------------
# Batches, as in training
# --------------------------------------------------------------------------------------------------


def synthetic_counts(vocab_size: int) -> np.ndarray:
    """Return the occurrences that synthetic ids are drawn by, and masked by: 1 / rank, as words'
    are.
    """
    return (1e9 / (np.arange(vocab_size) + 10)).astype(np.int64)


def synthetic_lengths(args: argparse.Namespace, generator: np.random.Generator) -> np.ndarray:
    """Choose as many lengths as any variant needs."""
    updates = args.warmup + args.updates + STAGE_UPDATES
    num = min(updates * args.micro_batches * max(args.batch_size), 10**6)
    if not args.mix:
        return np.full(num, args.length)
    return np.clip(generator.gamma(2.0, 26.0, num), MIN_LENGTH + 1, args.length).astype(np.int64)


def write_synthetic(args: argparse.Namespace, path: Path) -> None:
    """Write a store of sequences of random ids between the vocabulary's boundary tokens."""
    vocab_size = teacher_config(args.pair, args.size).vocab_size
    tokenizer = make_tokenizer(args.pair, vocab_size, args.length)
    special = special_ids(PAIR_ROWS[args.pair].teacher_type, tokenizer)
    generator = keyed_numpy_generator(args.seed, "synthetic")
    lengths = synthetic_lengths(args, generator)
    counts_V = synthetic_counts(vocab_size)
    counts_V[tokenizer.all_special_ids] = 0
    ids = generator.choice(vocab_size, int(lengths.sum()), p=counts_V / counts_V.sum())
    ends = np.cumsum(lengths)
    ids[ends - lengths], ids[ends - 1] = special["start"], special["end"]
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    with writing_tokens(str(path), "store", dtype) as (writer, _card):
        writer.append(ids.astype(dtype), lengths)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Where a job's micro-batches come from."""

    dataset: LmSeqsDataset
    sampler: GroupedBatchSampler
    prepare: Callable

    def planned(self, job: Job, num_updates: int) -> list[list[PlannedBatch]]:
        """List the micro-batches of each update."""
        numbers = self.sampler.micro_batches(num_updates * job.micro_batches)
        return [list(itertools.islice(numbers, job.micro_batches)) for _ in range(num_updates)]

    def lengths(self, update: Iterable[PlannedBatch]) -> np.ndarray:
        """Return the lengths of an update's sequences, in ids."""
        return self.dataset.lengths[
            np.concatenate([planned.sequences for planned in update])
        ].astype(np.int64)

    def batches(
        self, updates: Iterable[list[PlannedBatch]], ready: Callable[[MicroBatch], MicroBatch]
    ) -> Iterator[MicroBatch]:
        """Collate, prepare and make ready micro-batches, a few ahead."""

        def make() -> Iterator[MicroBatch]:
            for planned in itertools.chain.from_iterable(updates):
                yield ready(self.prepare(planned.number, *self.dataset.collate(planned.sequences)))

        return prefetched(make(), MICRO_BATCHES_AHEAD)


def make_workload(job: Job) -> Workload:
    """Open the token file and plan it as training does."""
    config, row = teacher_config(job.pair, job.size), PAIR_ROWS[job.pair]
    tokenizer = make_tokenizer(job.pair, config.vocab_size, job.length)
    special = SpecialIds(**special_ids(row.teacher_type, tokenizer))
    max_length = max_input_length(row.teacher_type, tokenizer, config)
    dataset = LmSeqsDataset.from_file(
        job.data_file, special, max_length, config.vocab_size, f"--pair {job.pair}"
    )
    sampler = GroupedBatchSampler(
        dataset.lengths, job.batch_size, max_length, group_by_size=True, seed=job.seed
    )
    prepare = prepare_clm
    if ARCHITECTURES[row.teacher_type].is_masked:
        counts_V = torch.from_numpy(synthetic_counts(config.vocab_size))
        weights_V = masking_weights(counts_V, SMOOTHING, tokenizer.all_special_ids)
        fates = (MASK_PROP, WORD_MASK, WORD_KEEP, WORD_RAND)
        prepare = MlmPreparation(
            weights_V, tokenizer.mask_token_id, *fates, restrict_ce_to_mask=False, seed=job.seed
        )
    return Workload(dataset, sampler, prepare)


# --------------------------------------------------------------------------------------------------
# The steps that are compared
# --------------------------------------------------------------------------------------------------


def make_distiller(job: Job, teacher: torch.nn.Module, student: torch.nn.Module) -> Distiller:
    """Put our step around the models, as training does."""
    model = DistillationModel(
        student,
        prediction_head(student),
        head_parameters(student),
        PAIR_ROWS[job.pair].alphas,
        TEMPERATURE,
    )
    groups = split_for_weight_decay(student, 0.0)
    if job.device == "cpu":
        keep_freed_memory()  # as train.py does
    optimizer = torch.optim.AdamW(
        groups, lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=True
    )
    make_moments(optimizer)
    return Distiller(
        model,
        teacher,
        prediction_head(teacher),
        optimizer,
        None,
        max_grad_norm=MAX_GRAD_NORM,
        seed=job.seed,
        amp_dtype=None if job.precision == "fp32" else DTYPES[job.precision],
        compiles=job.compiles,
    )


class PlainStep:
    """The update as a program of 2019 would write it, from the same formulas, with a Distiller's
    methods.

    Float32, or float32 weights under autocast; attention spelt out, logits of every position,
    selections copied, a wait for the device at every loss, an optimizer that goes from parameter to
    parameter.
    """

    def __init__(self, job: Job, teacher: torch.nn.Module, student: torch.nn.Module):
        self.teacher, self.student = teacher, student
        self.alphas = PAIR_ROWS[job.pair].alphas
        for model in (teacher, student):
            model.set_attn_implementation("eager")
        groups = split_for_weight_decay(student, 0.0)
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPSILON, foreach=False, fused=False
        )
        self.schedule = transformers.get_constant_schedule(self.optimizer)
        self.precision = functools.partial(
            torch.autocast,
            job.device,
            dtype=DTYPES[job.precision],
            enabled=job.is_autocast_reference,
        )
        self.scaler = torch.amp.GradScaler(
            job.device, enabled=job.is_autocast_reference and job.precision == "fp16"
        )

    def ready(self, batch: MicroBatch) -> MicroBatch:
        """Pin a batch for a GPU."""
        return batch.pinned() if next(self.student.parameters()).is_cuda else batch

    def begin_step(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> BegunStep:
        """Do one update."""
        losses_MK = torch.tensor(self.accumulate(batches, numbers, num_mine))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.student.parameters(), MAX_GRAD_NORM, foreach=False
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        self.schedule.step()
        report = StepReport(losses_MK, norm.item(), {})
        return BegunStep(lambda: report)

    def accumulate(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> list[list[float]]:
        """Add up the micro-batches' gradients; return each one's losses, unweighted."""
        self.student.train()
        logged = []
        for batch in batches:
            with self.precision():
                losses, _outputs = self.losses(
                    batch
                )  # in a plain program variables of one function, until the update is done
            logged.append([loss.item() for loss in losses.values()])
            total = sum(self.alphas[name] * loss for name, loss in losses.items())
            self.scaler.scale(total / len(numbers)).backward()
        return logged

    def losses(self, batch: MicroBatch) -> tuple[dict[str, torch.Tensor], list]:
        """Compute the micro-batch's losses, unweighted, from whole logits: (losses, what the models
        returned).
        """
        device = next(self.student.parameters()).device
        inputs = {"input_ids": batch.input_ids_BT.to(device), "output_hidden_states": True}
        if batch.attention_mask_BT is not None:
            inputs["attention_mask"] = batch.attention_mask_BT.to(device)
        with torch.no_grad():
            teacher = self.teacher(**inputs)
        student = self.student(**inputs)
        labels_BT = batch.labels_BT.to(device)
        real_BT = (
            labels_BT != IGNORED_LABEL
            if batch.attention_mask_BT is None
            else inputs["attention_mask"].bool()
        )
        losses = {
            "ce": self._divergence(student.logits, teacher.logits, real_BT),
            **self._prediction(
                student.logits, labels_BT, is_causal=batch.attention_mask_BT is None
            ),
            "cos": self._cosine(student.hidden_states[-1], teacher.hidden_states[-1], real_BT),
        }
        return losses, [student, teacher]

    def _divergence(self, student_BTV, teacher_BTV, real_BT) -> torch.Tensor:
        is_real_BTV = real_BT[:, :, None].expand_as(student_BTV)
        student_NV = torch.masked_select(student_BTV, is_real_BTV).view(-1, student_BTV.shape[-1])
        teacher_NV = torch.masked_select(teacher_BTV, is_real_BTV).view(-1, student_BTV.shape[-1])
        log_probs_NV, probs_NV = (
            F.log_softmax(student_NV / TEMPERATURE, -1),
            F.softmax(teacher_NV / TEMPERATURE, -1),
        )
        return torch.nn.KLDivLoss(reduction="batchmean")(log_probs_NV, probs_NV) * TEMPERATURE**2

    def _prediction(self, student_BTV, labels_BT, is_causal: bool) -> dict[str, torch.Tensor]:
        cross_entropy = torch.nn.CrossEntropyLoss(ignore_index=IGNORED_LABEL)
        if is_causal:
            student_BTV, labels_BT = student_BTV[:, :-1].contiguous(), labels_BT[:, 1:].contiguous()
        loss = cross_entropy(student_BTV.view(-1, student_BTV.shape[-1]), labels_BT.view(-1))
        return {"clm" if is_causal else "mlm": loss}

    def _cosine(self, student_BTD, teacher_BTD, real_BT) -> torch.Tensor:
        is_real_BTD = real_BT[:, :, None].expand_as(student_BTD)
        student_ND = torch.masked_select(student_BTD, is_real_BTD).view(-1, student_BTD.shape[-1])
        teacher_ND = torch.masked_select(teacher_BTD, is_real_BTD).view(-1, student_BTD.shape[-1])
        return torch.nn.CosineEmbeddingLoss()(
            student_ND, teacher_ND, student_ND.new_ones(len(student_ND))
        )


# --------------------------------------------------------------------------------------------------
# Correct first
# --------------------------------------------------------------------------------------------------


# By precision: the largest relative difference of a loss, and of the gradient (the norm of the
# difference over the norm).
AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, 1e-1), "fp16": (1e-2, 3e-2)}


def run_check(job: Job) -> dict:
    """Compare losses and gradient of our step in a precision with the reference's: same weights, no
    dropout.

    On two short micro-batches. Raises InputError where they are not the same function.
    """
    batches = checked_batches(make_workload(job))
    numbers = list(range(len(batches)))
    teacher, student = make_models(job, has_dropout=False)
    move_apart(student)
    untouched = (
        copy.deepcopy(teacher),
        copy.deepcopy(student),
    )  # Distiller converts and compiles its own
    ours = make_distiller(job, teacher, student)
    losses_MK = ours.accumulate(batches, numbers, len(batches))[:, 1:]
    grads = flat_gradient(student) / ours.scaler.get_scale()
    reference = PlainStep(dataclasses.replace(job, kind="reference", precision="fp32"), *untouched)
    reference_MK = torch.tensor(
        reference.accumulate(batches, numbers, len(batches)), dtype=torch.float64
    )
    reference_grads = flat_gradient(reference.student)
    found = {
        "objectives": list(reference.alphas),
        "losses": losses_MK.tolist(),
        "reference_losses": reference_MK.tolist(),
        "losses_differ_by": ((losses_MK - reference_MK).abs() / reference_MK.abs()).max().item(),
        "gradients_differ_by": ((grads - reference_grads).norm() / reference_grads.norm()).item(),
        "gradient_cosine": F.cosine_similarity(grads, reference_grads, dim=0).item(),
    }
    of_losses, of_gradients = AGREEMENT[job.precision]
    if not (found["losses_differ_by"] < of_losses and found["gradients_differ_by"] < of_gradients):
        raise InputError(
            f"--precision {job.precision}{' --compile' if job.compiles else ''}: Distiller and the"
            " 2019 step compute different things, nothing is timed: losses differ by"
            f" {found['losses_differ_by']:.1e}, gradients by {found['gradients_differ_by']:.1e},"
            f" expected less than {of_losses:.0e} and {of_gradients:.0e}; take another precision,"
            " or report it"
        )
    return found


@torch.no_grad()
def move_apart(student: torch.nn.Module) -> None:
    """Add noise to a student's weights: beside an untrained teacher whose layers it has, the KL
    would be all rounding.
    """
    for parameter in student.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


def checked_batches(workload: Workload) -> list[MicroBatch]:
    """Make two micro-batches out of the first sequences' beginnings."""
    batches = []
    for sequences in np.array_split(np.arange(min(4, len(workload.dataset))), 2):
        if len(sequences):
            token_ids_BT, lengths_B = workload.dataset.collate(sequences)
            lengths_B = lengths_B.clamp(max=CHECKED_LENGTH)
            batches.append(
                workload.prepare(len(batches), token_ids_BT[:, : int(lengths_B.max())], lengths_B)
            )
    return batches


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Copy all gradients into one vector, float64."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


# --------------------------------------------------------------------------------------------------
# Clocks and memory
# --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds spent in wrapped functions, those of wrapped functions inside them left
    out.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inside: list[
            float
        ] = []  # a frame for each running function: seconds of the functions inside it

    def wrap(self, stage: str, function: Callable) -> Callable:
        """Return the function, timed as `stage`; the device is waited for at both ends."""

        def timed(*args, **kwargs):
            started = clock_s(self.device)
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = clock_s(self.device) - started
                self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._inside.pop()
                if self._inside:
                    self._inside[-1] += elapsed

        return timed


def watch_stages(watch: Stopwatch, step: Distiller | PlainStep) -> None:
    """Time the stages of a step from now on: what is left of an update is backward, what is left of
    a step the optimizer.
    """
    student = step.model.student if isinstance(step, Distiller) else step.student
    for stage, owner, method in (
        ("optimizer", step, "begin_step"),
        ("backward", step, "_accumulate" if isinstance(step, Distiller) else "accumulate"),
        (
            "head and losses",
            *((step.model, "forward") if isinstance(step, Distiller) else (step, "losses")),
        ),
        ("teacher", step.teacher.base_model, entrance(step.teacher.base_model)),
        ("student forward", student.base_model, entrance(student.base_model)),
    ):
        setattr(owner, method, watch.wrap(stage, getattr(owner, method)))


def entrance(module: torch.nn.Module) -> str:
    """Name the method by which a call enters a module: a compiled one's own, for a changed forward
    would be compiled anew.
    """
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


STAGES_ARE = (
    "Stages come from a separate pass over the next updates, in which the device is waited for at"
    " each boundary. Head and losses: both projections, and in Distiller their gradients, too."
    " Data: waiting for the next batch."
)
STAGES = ("data", "teacher", "student forward", "head and losses", "backward", "optimizer")


def process_memory(field: str) -> int:
    """Return a figure of this process's memory from Linux, in bytes: VmRSS, now; VmHWM, the largest
    so far.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def start_watching_memory(device: str) -> int:
    """Forget the largest use so far; return the use now, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(
        OSError
    ):  # not everywhere allowed: then the peak may be that of building the models
        Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def peak_memory(device: str) -> int:
    """Return the largest use since then, in bytes: of the GPU's tensors, or of the whole process on
    a CPU.
    """
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")


# --------------------------------------------------------------------------------------------------
# Jobs: each in a process of its own
# --------------------------------------------------------------------------------------------------


def run_steps(job: Job) -> dict:
    """Time whole updates undisturbed, then a few more stage by stage."""
    workload = make_workload(job)
    teacher, student = make_models(job)
    sizes = size_of(teacher), size_of(student)
    step = (make_distiller if job.kind == "distiller" else PlainStep)(job, teacher, student)
    num_timed, num_staged = job.warmup + job.updates, min(job.updates, STAGE_UPDATES)
    updates = workload.planned(job, num_timed + num_staged)
    baseline = start_watching_memory(job.device) - moment_bytes(step.optimizer)
    with contextlib.closing(workload.batches(updates, step.ready)) as batches:
        timed = time_updates(job, step, updates[:num_timed], batches)[job.warmup :]
        peak = peak_memory(job.device)
        watch = Stopwatch(job.device)
        watch_stages(watch, step)
        waiting = stopped_iterator(watch, batches)
        time_updates(job, step, updates[num_timed:], waiting)
    measured = updates[job.warmup : num_timed]
    return {
        "step_s": [seconds for seconds, _ in timed],
        "skipped_updates": sum(not np.isfinite(norm) for _, norm in timed),
        "tokens": [int(workload.lengths(update).sum()) for update in measured],
        "flops": [update_flops(*sizes, workload.lengths(update)) for update in measured],
        "stages_s": {stage: watch.seconds.get(stage, 0.0) / num_staged for stage in STAGES},
        # The kernel's counters lag by a few pages a thread.
        "memory": {"models": baseline, "peak": max(peak, baseline), "state": state_bytes(student)},
    }


def time_updates(
    job: Job, step, updates: list[list[PlannedBatch]], batches: Iterator[MicroBatch]
) -> list[tuple[float, float]]:
    """Do updates as training does between two logs, waiting for batches included: (seconds, norm of
    the gradient) of each.

    What an update gave is read when the next one has been begun.
    """
    marks, begun = [mark(job.device)], []
    for update in updates:
        numbers = [planned.number for planned in update]
        begun.append(
            step.begin_step(itertools.islice(batches, len(numbers)), numbers, len(numbers))
        )
        marks.append(mark(job.device))
        for earlier in begun[-2:-1]:
            earlier.read()
    norms = [one.read().grad_norm for one in begun]
    return list(
        zip(itertools.starmap(seconds_between, itertools.pairwise(marks)), norms, strict=True)
    )


def mark(device: str) -> "float | torch.cuda.Event":
    """Mark a point of time: of the host's clock, or, without waiting, of what the GPU was given so
    far.
    """
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(
    earlier: "float | torch.cuda.Event", later: "float | torch.cuda.Event"
) -> float:
    """Return the time between two marks."""
    if isinstance(earlier, float):
        return later - earlier
    later.synchronize()
    return earlier.elapsed_time(later) / 1000


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of an optimizer's state so far."""
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def state_bytes(student: torch.nn.Module) -> int:
    """Count the bytes of gradients and moments: of all trained parameters, in their precision."""
    return 3 * sum(
        parameter.nbytes for parameter in student.parameters() if parameter.requires_grad
    )


def stopped_iterator(watch: Stopwatch, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the batches, the waiting for each timed."""
    next_batch = watch.wrap("data", functools.partial(next, batches, None))
    return iter(next_batch, None)


def run_ceilings(job: Job) -> dict:
    """Measure the fastest matrix product in a precision, FLOP/s, and the fastest copy, bytes read
    and written a second.
    """
    dtype, is_tiny = DTYPES[job.precision], job.size == "tiny"
    rates = {}
    for size in [256] if is_tiny else MATMUL_SIZES[job.device]:
        left, right = (torch.randn(size, size, device=job.device).to(dtype) for _ in range(2))
        rates[size] = product_rate(left, right)
    source = torch.randint(
        127, (2**22 if is_tiny else COPY_BYTES[job.device],), dtype=torch.int8, device=job.device
    )
    target = torch.empty_like(source)
    copy_s = best_seconds(job.device, lambda: target.copy_(source))
    return {"matmul_flops": rates, "copy_bytes_s": 2 * source.numel() / copy_s}


def run_training(job: Job) -> dict:
    """Run train.py on the same sequences, and read from its log how fast it went once it had
    started.
    """
    every, num_windows = max(job.updates, job.warmup), 3
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        write_training_inputs(job, folder)
        iterations = every * job.micro_batches
        done = subprocess.run(
            training_command(job, folder, every * (num_windows + 1), iterations),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise InputError(
                f"train.py: ended with status {done.returncode}:"
                f" {' '.join(done.stderr.splitlines()[-1:])}"
            )
        clocks = logged_times(folder / "run")
    workload = make_workload(job)
    sizes = [size_of(build_student(row_type, config)) for row_type, config in configurations(job)]
    updates = workload.planned(job, every * (num_windows + 1))
    windows = [
        workload.lengths(itertools.chain(*updates[k * every : (k + 1) * every]))
        for k in range(1, num_windows + 1)
    ]
    return {
        "step_s": [
            (clocks[(k + 1) * iterations] - clocks[k * iterations]) / every
            for k in range(1, num_windows + 1)
        ],
        "skipped_updates": 0,
        "tokens": [int(lengths_B.sum()) / every for lengths_B in windows],
        "flops": [update_flops(*sizes, lengths_B) / every for lengths_B in windows],
        "stages_s": None,
        "memory": None,
    }


def configurations(job: Job) -> list[tuple[str, transformers.PretrainedConfig]]:
    """List (model type, configuration) of teacher and student."""
    row = PAIR_ROWS[job.pair]
    return [
        (row.teacher_type, teacher_config(job.pair, job.size)),
        (row.student_type, student_config(job.pair, job.size)),
    ]


def write_training_inputs(job: Job, folder: Path) -> None:
    """Write the teacher with a tokenizer, the student's configuration and first weights, and the
    counts.
    """
    cpu_job = dataclasses.replace(job, device="cpu")
    teacher, student = make_models(cpu_job)
    with quiet_transformers():
        teacher.save_pretrained(folder / "teacher")
    make_tokenizer(job.pair, teacher.config.vocab_size, job.length).save_pretrained(
        folder / "teacher"
    )
    torch.save(student.state_dict(), folder / "first_weights.pth")
    content = {
        k: v
        for k, v in student.config.to_diff_dict().items()
        if k not in ("transformers_version", "dtype")
    }
    write_json(folder / "student.json", content)
    write_token_counts(folder / "counts", synthetic_counts(teacher.config.vocab_size), {})


def training_command(job: Job, folder: Path, max_steps: int, log_interval: int) -> list[str]:
    """Write the command line of train.py that does a job's updates."""
    row = PAIR_ROWS[job.pair]
    flags = {
        "student_type": row.student_type,
        "student_config": folder / "student.json",
        "teacher_type": row.teacher_type,
        "teacher_name": folder / "teacher",
        "student_pretrained_weights": folder / "first_weights.pth",
        "data_file": job.data_file,
        "dump_path": folder / "run",
        "batch_size": job.batch_size,
        "max_steps": max_steps,
        "gradient_accumulation_steps": job.micro_batches,
        "log_interval": log_interval,
        "seed": job.seed,
        "learning_rate": LEARNING_RATE,
        "n_gpu": int(job.device == "cuda"),
        "alpha_clm": 0.0,
    }
    flags |= {f"alpha_{name}": alpha for name, alpha in row.alphas.items()}
    words = [
        "--freeze_pos_embs",
        *TRAIN_FLAGS[job.precision],
        *(["--compile"] if job.compiles else []),
    ]
    if "mlm" in row.alphas:
        flags["token_counts"], words = folder / "counts", [*words, "--mlm"]
    pairs = itertools.chain.from_iterable(
        (f"--{name}", str(value)) for name, value in flags.items()
    )
    return [sys.executable, str(ROOT / "train.py"), *pairs, *words]


def logged_times(run_folder: Path) -> dict[int, float]:
    """Read when each log was written: micro-batches since the start -> seconds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run_folder / "log" / "train"), size_guidance={"scalars": 0})
    log.Reload()
    return {event.step: event.wall_time for event in log.Scalars("losses/loss")}


JOBS = {
    "check": run_check,
    "ceilings": run_ceilings,
    "distiller": run_steps,
    "reference": run_steps,
    "train.py": run_training,
}


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory, of the GPU or of the machine, from other errors."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in said
        for words in (
            "can't allocate memory",
            "not enough memory",
            "out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
        )
    )


def out_of_memory(job: Job) -> str:
    """Say which micro-batch was too large, and what to lower."""
    tokens = job.batch_size * job.length
    return (
        f"{job.name}: out of memory at micro-batches of up to {tokens} tokens; lower --batch_size"
        " or --length"
    )


def do_job(job: Job) -> None:
    """Do a job in this process; print what was found as one line of JSON."""
    if job.threads:
        torch.set_num_threads(job.threads)
    try:
        found = JOBS[job.kind](job)
    except (RuntimeError, MemoryError) as error:
        found = {
            "problem": (
                out_of_memory(job) if is_out_of_memory(error) else f"{job.name}: {one_line(error)}"
            )
        }
    print(json.dumps(found), flush=True)


def start_job(job: Job) -> dict:
    """Do a job in a process of its own: what it found. Raises InputError with what it said where it
    failed.
    """
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -9:
        return {"problem": out_of_memory(job)}  # by Linux's own choice
    if done.returncode != 0:
        said = (done.stderr.splitlines() or [f"ended with status {done.returncode}"])[-1]
        raise InputError(said.split("error: ", 1)[-1])
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------
# From jobs to figures
# --------------------------------------------------------------------------------------------------


def make_jobs(args: argparse.Namespace, data_file: str) -> list[Job]:
    """List the variants; the reference first in each micro-batch size."""
    shared = {
        name: getattr(args, name)
        for name in (
            "pair",
            "size",
            "device",
            "length",
            "micro_batches",
            "updates",
            "warmup",
            "threads",
            "seed",
        )
    }
    variants = [
        ("reference", precision, False) for precision in args.reference_precision if args.reference
    ]
    for kind in ["distiller", "train.py"] if args.end_to_end else ["distiller"]:
        variants += [(kind, *rest) for rest in itertools.product(args.precision, ways(args))]
    return [
        Job(
            kind,
            data_file=data_file,
            batch_size=batch_size,
            precision=precision,
            compiles=compiles,
            **shared,
        )
        for batch_size in args.batch_size
        for kind, precision, compiles in variants
    ]


def ways(args: argparse.Namespace) -> list[bool]:
    """List the ways that what is ours runs: False as it is, True compiled."""
    return [False, True] if args.compile else [False]


def run_checks(args: argparse.Namespace, job: Job) -> dict[str, dict]:
    """Check every precision, and every way to run it, against the reference."""
    checks = {}
    for precision, compiles in itertools.product(
        dict.fromkeys(["fp32", *args.precision]), ways(args)
    ):
        one = dataclasses.replace(job, kind="check", precision=precision, compiles=compiles)
        checks[f"{precision} (compiled)" if compiles else precision] = start_job(one)
    return checks


def measure_ceilings(jobs: list[Job]) -> dict[str, dict]:
    """Measure the device's ceilings in every precision that occurs."""
    precisions = dict.fromkeys(job.precision for job in jobs)
    return {
        p: start_job(dataclasses.replace(jobs[0], kind="ceilings", precision=p)) for p in precisions
    }


def measure(args: argparse.Namespace, jobs: list[Job]) -> list[dict]:
    """Run every variant, round after round, and merge its rounds. Raises InputError where a lone
    variant fails.
    """
    rounds: list[list[dict]] = [[] for _ in jobs]
    for number in range(args.rounds):
        for found, job in zip(rounds, jobs, strict=True):
            if any("problem" in one for one in found):
                continue
            logger.info("Round %d of %d: %s.", number + 1, args.rounds, job.name)
            found.append(start_job(job))
            if "problem" in found[-1] and not args.sweep:
                raise InputError(found[-1]["problem"])
    return [merged(job, found) for job, found in zip(jobs, rounds, strict=True)]


def merged(job: Job, rounds: list[dict]) -> dict:
    """Join what the rounds of a variant found."""
    row = {"name": job.name, **dataclasses.asdict(job)}
    problems = [found["problem"] for found in rounds if "problem" in found]
    if problems:
        return {**row, "problem": problems[0]}
    lists = {
        key: [x for found in rounds for x in found[key]] for key in ("step_s", "tokens", "flops")
    }
    rates = [
        tokens / seconds for tokens, seconds in zip(lists["tokens"], lists["step_s"], strict=True)
    ]
    achieved = statistics.median(
        flops / s for flops, s in zip(lists["flops"], lists["step_s"], strict=True)
    )
    row |= {
        **lists,
        "tokens_s": spread(rates),
        "flops_s": achieved,
        "flops_per_token": sum(lists["flops"]) / sum(lists["tokens"]),
    }
    row["skipped_updates"] = sum(found["skipped_updates"] for found in rounds)
    row["round_tokens_s"] = [
        statistics.median(t / s for t, s in zip(found["tokens"], found["step_s"], strict=True))
        for found in rounds
    ]
    has_stages, has_memory = rounds[0]["stages_s"] is not None, rounds[0]["memory"] is not None
    row["stages_s"] = (
        {s: statistics.median(f["stages_s"][s] for f in rounds) for s in STAGES}
        if has_stages
        else None
    )
    row["memory"] = (
        max((f["memory"] for f in rounds), key=lambda memory: memory["peak"])
        if has_memory
        else None
    )
    return row


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarize measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def add_shares(rows: list[dict], ceilings: dict[str, dict], device_name: str) -> None:
    """Add to each row its share of the measured and the nominal peak, and its ratios to the
    references of its batch size.

    ratio: to the one in fp32; ratio_autocast: to the one under autocast, where one of the row's own
    precision was run.
    """
    references = {
        (row["batch_size"], row["precision"]): row["tokens_s"]["median"]
        for row in rows
        if row["kind"] == "reference" and "problem" not in row
    }
    for row in (row for row in rows if "problem" not in row):
        measured = max(ceilings[row["precision"]]["matmul_flops"].values())
        nominal = nominal_peak(device_name, row["precision"])
        row["mfu_measured"] = row["flops_s"] / measured
        row["mfu_nominal"] = None if nominal is None else row["flops_s"] / nominal
        half = None if row["precision"] == "fp32" else row["precision"]
        for name, precision in (("ratio", "fp32"), ("ratio_autocast", half)):
            reference = references.get((row["batch_size"], precision))
            row[name] = None if reference is None else row["tokens_s"]["median"] / reference


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def gib(memory: dict[str, int] | None) -> str:
    """Show peak memory: all of it; beyond the models; beyond gradients and moments, too."""
    if memory is None:
        return "-"
    beyond_models = memory["peak"] - memory["models"]
    return " / ".join(
        f"{value / GIB:.2f}"
        for value in (memory["peak"], beyond_models, beyond_models - memory["state"])
    )


def main_table(rows: list[dict]) -> str:
    """Lay out a line a variant."""
    lines = [
        [
            "variant",
            "tokens/s (min..max)",
            "update, ms (min..max)",
            "MFU of measured",
            "of nominal",
            "GiB: all / beyond models / and state",
            "x reference",
            "x reference in autocast",
        ]
    ]
    for row in rows:
        if "problem" in row:
            lines.append([row["name"], row["problem"].removeprefix(f"{row['name']}: "), *["-"] * 6])
            continue
        rate, step_ms = row["tokens_s"], spread([1000 * seconds for seconds in row["step_s"]])
        lines.append(
            [
                row["name"],
                f"{rate['median']:,.0f} ({rate['min']:,.0f}..{rate['max']:,.0f})",
                f"{step_ms['median']:,.1f} ({step_ms['min']:,.1f}..{step_ms['max']:,.1f})",
                share(row["mfu_measured"]),
                share(row["mfu_nominal"]),
                gib(row["memory"]),
                times(row["ratio"]),
                times(row["ratio_autocast"]),
            ]
        )
    has_autocast = any(row.get("ratio_autocast") is not None for row in rows)
    return markdown(lines if has_autocast else [line[:-1] for line in lines])


def stage_table(rows: list[dict]) -> str:
    """Lay out the time of each stage of an update, in milliseconds and as a share of their sum."""
    lines = [["stages of an update, ms", *STAGES, "sum"]]
    for row in (row for row in rows if row.get("stages_s")):
        total = sum(row["stages_s"].values())
        cells = [
            f"{1000 * row['stages_s'][stage]:,.1f} ({row['stages_s'][stage] / total:.0%})"
            for stage in STAGES
        ]
        lines.append([row["name"], *cells, f"{1000 * total:,.1f}"])
    return markdown(lines)


def print_report(found: dict) -> None:
    """Print what was found."""
    machine = found["machine"]
    print(
        f"\nPair {found['flags']['pair']}, {found['flags']['size']} size; {machine['device']};"
        f" {machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}."
    )
    print(
        f"Load of the machine when this began: {machine['load']:.1f} processes on"
        f" {machine['cores']} cores."
    )
    for how, check in found["check"].items():
        print(
            f"Distiller in {how} and the 2019 step in fp32, without dropout: losses differ by "
            f"{check['losses_differ_by']:.1e}, gradients by {check['gradients_differ_by']:.1e}."
        )
    for precision, ceiling in found["ceilings"].items():
        size, rate = max(ceiling["matmul_flops"].items(), key=lambda entry: entry[1])
        print(
            f"Ceilings, {precision}: {rate / 1e12:.3f} TFLOP/s ({size}^3 product), copy"
            f" {ceiling['copy_bytes_s'] / 1e9:.1f} GB/s read + written."
        )
    flops = [row["flops_per_token"] for row in found["rows"] if "problem" not in row]
    if flops:
        print(f"Model FLOPs: {min(flops) / 1e6:,.0f} million a real token.")
    print(f"\n{main_table(found['rows'])}\n\n{stage_table(found['rows'])}\n")
    print(STAGES_ARE, flush=True)
    skipped = {
        row["name"]: row["skipped_updates"] for row in found["rows"] if row.get("skipped_updates")
    }
    for name, number in skipped.items():
        print(
            f"{name}: {number} measured update(s) overflowed and skipped the optimizer.", flush=True
        )


def draw(rows: list[dict], path: str) -> None:
    """Draw tokens/s a variant, with the spread, and the stages of an update in a stack."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "problem" not in row][::-1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, 1.8 + 0.42 * len(rows)), layout="constrained", sharey=True
    )
    names, rates = [row["name"] for row in rows], [row["tokens_s"] for row in rows]
    medians = [rate["median"] for rate in rates]
    spreads = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
    left.bar_label(
        left.barh(names, medians, xerr=spreads, color="tab:blue", ecolor="tab:gray"),
        fmt="{:,.0f}",
        padding=4,
    )
    left.set(title="Real tokens a second: median, min to max", xlabel="tokens/s")
    left.margins(x=0.15)
    ends = np.zeros(len(rows))
    for stage in STAGES:
        widths = np.array(
            [1000 * row["stages_s"][stage] if row["stages_s"] else 0.0 for row in rows]
        )
        right.barh(names, widths, left=ends, label=stage)
        ends += widths
    right.set(title="Stages of an update (a separate pass)", xlabel="ms")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=len(STAGES))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, folder: Path) -> dict:
    """Make the sequences, check, measure. Raises InputError where torch.compile is wanted and does
    not work.
    """
    if args.compile:
        check_compiler(torch.device(args.device))
    data_file = args.data_file
    if data_file is None:
        data_file = str(folder / "synthetic")
        write_synthetic(args, Path(data_file))
    jobs = make_jobs(args, data_file)
    machine = describe_machine(args.device, args.threads)
    check = run_checks(args, jobs[0])
    ceilings = measure_ceilings(jobs)
    rows = measure(args, jobs)
    add_shares(rows, ceilings, machine["device"])
    flags = {name: value for name, value in vars(args).items() if name != "job"}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine,
        "git_sha": git_facts(ROOT)["repo_sha"],
        "flags": flags,
        "check": check,
        "ceilings": ceilings,
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; or do one job in a process of its own."""
    args = parse(argv)
    if args.job:
        do_job(Job(**json.loads(args.job)))
        return
    setup_logging(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        found = run_all(args, Path(folder))
    print_report(found)
    if args.json:
        write_json(args.json, found)
        logger.info("Wrote %s.", args.json)
    if args.plot:
        draw(found["rows"], args.plot)
        logger.info("Wrote %s.", args.plot)


if __name__ == "__main__":
    run_program(main)
