"""What the benchmark times: a pair's models at full size, batches as in training, our step.

Models have random weights, tokenizers meaningless tokens at the published special ids, sequences
random ids: nothing is downloaded, and every job of a run makes the same ones from its seed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from distil.data.batches import MicroBatch, mlm_preparation, prepare_clm
from distil.data.packing import make_pass
from distil.data.token_files import MIN_LENGTH, writing_tokens
from distil.flops import DTYPES
from distil.models.architectures import ARCHITECTURES
from distil.models.first_weights import evenly_spaced_layers, extract_student
from distil.models.forward import set_dropout
from distil.models.language_model import (
    LanguageModel,
    build_network,
    freeze_embeddings,
    read_student_config,
)
from distil.models.tokenizer_roles import special_ids
from distil.system.memory import reuse_memory
from distil.system.prefetch import MICRO_BATCHES_AHEAD, prefetched
from distil.training.optimizer import make_optimizer
from distiller import DistillationModel, Distiller
from grouped_batch_sampler import GroupedBatchSampler, PlannedBatch, Update
from lm_seqs_dataset import LmSeqsDataset
from utils import keyed_numpy_generator, keyed_seed

ROOT = Path(__file__).resolve().parent.parent
TEMPERATURE, LEARNING_RATE, ADAM_EPSILON, MAX_GRAD_NORM = 2.0, 5e-4, 1e-6, 5.0
SMOOTHING, MASK_PROP, WORD_MASK, WORD_KEEP, WORD_RAND = 0.7, 0.15, 0.8, 0.1, 0.1
SMALL_DEPTHS = {"tiny": (2, 1), "narrow": (12, 6)}  # layers of teacher and student, width 64
STAGE_UPDATES = 3  # timed stage by stage, after the measured ones

# --------------------------------------------------------------------------------------------------
# Pairs and jobs
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairRow:
    """One teacher and student at base size.

    teacher_sizes: settings that differ from transformers' defaults. special_tokens: text -> id in
    the published vocabulary; an id beyond a smaller vocabulary becomes its last. alphas: the
    documented weights of the losses.
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


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process measures, in plain values.

    kind: a key of jobs.JOBS. length: the longest sequence, in ids. compiles: run our step through
    torch.compile. without: a piece of distil/kernels/cpu.py to switch off (cpu_pieces.PIECES).
    tokens_per_pass: padded tokens up to which a pass joins micro-batches; 0: it joins none. packs:
    lay their sequences into rows.
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
    without: str | None = None
    tokens_per_pass: int = 0
    packs: bool = False

    @property
    def name(self) -> str:
        """Name the variant in the tables."""
        names = {"distiller": "Distiller.step", "reference": "2019 step", "tuned": "tuned step"}
        what = names.get(self.kind, self.kind)
        size = f"{self.micro_batches} x {self.batch_size} x {self.length}"
        return f"{what}{' ' * bool(self.way)}{self.way}, {self.precision}, {size}"

    @property
    def way(self) -> str:
        """Say how the step runs where it runs otherwise than by default; "" by default."""
        if self.is_autocast_reference:
            return "in autocast"
        if self.tokens_per_pass:
            how = "packed" if self.packs else "joined"
            return f"{how} to {self.tokens_per_pass}{', compiled' * self.compiles}"
        return "compiled" if self.compiles else f"without {self.without}" if self.without else ""

    @property
    def is_autocast_reference(self) -> bool:
        """True for others' steps in half precision: the student's weights stay in float32."""
        return self.kind in ("reference", "tuned") and self.precision != "fp32"


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


def teacher_config(pair: str, size: str):
    """Make the configuration of the pair's teacher."""
    row = PAIR_ROWS[pair]
    config = getattr(transformers, ARCHITECTURES[row.teacher_type].config_class)(
        **row.teacher_sizes
    )
    return shrunk(config, SMALL_DEPTHS[size][0]) if size in SMALL_DEPTHS else config


def student_config(pair: str, size: str):
    """Read the configuration of the pair's student."""
    row = PAIR_ROWS[pair]
    config = read_student_config(
        row.student_type, str(ROOT / "training_configs" / f"{row.student_config}.json")
    )
    return shrunk(config, SMALL_DEPTHS[size][1]) if size in SMALL_DEPTHS else config


def shrunk(config, num_layers: int, width: int = 64, num_heads: int = 2, vocab_size: int = 500):
    """Shrink a configuration, by default to width 64 and 500 token ids; leave its positions."""
    sizes = {
        "num_hidden_layers": num_layers,
        "hidden_size": width,
        "num_attention_heads": num_heads,
        "vocab_size": vocab_size,
    }
    inner = 2 * width
    sizes |= {name: inner for name in ("intermediate_size", "hidden_dim") if hasattr(config, name)}
    sizes |= {
        name: vocab_size - 1
        for name in ("bos_token_id", "eos_token_id")
        if (getattr(config, name, None) or 0) >= vocab_size
    }
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


def configurations(job: Job) -> list[tuple[str, transformers.PretrainedConfig]]:
    """List (model type, configuration) of teacher and student."""
    row = PAIR_ROWS[job.pair]
    return [
        (row.teacher_type, teacher_config(job.pair, job.size)),
        (row.student_type, student_config(job.pair, job.size)),
    ]


def make_tokenizer(pair: str, vocab_size: int, max_length: int):
    """Make a tokenizer of the pair's kind: published special tokens, meaningless others."""
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
    """Make teacher and student on the device.

    As in training the student starts from the teacher's layers, and its position and token-type
    embeddings are frozen.
    """
    row = PAIR_ROWS[job.pair]
    torch.manual_seed(keyed_seed(job.seed, "models"))
    of_teacher, of_student = ARCHITECTURES[row.teacher_type], ARCHITECTURES[row.student_type]
    teacher = build_network(of_teacher, teacher_config(job.pair, job.size))
    teacher.eval().requires_grad_(False)
    student = build_network(of_student, student_config(job.pair, job.size))
    layers = evenly_spaced_layers(
        teacher.config.num_hidden_layers, student.config.num_hidden_layers
    )
    is_masked = of_student.is_masked
    student.load_state_dict(
        extract_student(teacher, row.student_type, layers, vocab_transform=is_masked), strict=False
    )
    freeze_embeddings(student, of_student, positions=True, token_types=True)
    if not has_dropout:
        set_dropout(student, 0.0)
    return teacher.to(job.device), student.to(job.device)


def make_distiller(job: Job, teacher: torch.nn.Module, student: torch.nn.Module) -> Distiller:
    """Make our step over the models, as train.py does."""
    model = DistillationModel(student, PAIR_ROWS[job.pair].alphas, TEMPERATURE)
    if job.device == "cpu":
        reuse_memory()  # as train.py does
    optimizer = make_optimizer(model, LEARNING_RATE, 0.0, ADAM_EPSILON)
    return Distiller(
        model,
        teacher,
        optimizer,
        None,
        max_grad_norm=MAX_GRAD_NORM,
        seed=job.seed,
        amp_dtype=None if job.precision == "fp32" else DTYPES[job.precision],
        compiles=job.compiles,
    )


# --------------------------------------------------------------------------------------------------
# Batches, as in training
# --------------------------------------------------------------------------------------------------


def synthetic_counts(vocab_size: int) -> np.ndarray:
    """Return the counts by which synthetic ids are drawn and masked: 1 / rank, as words' are."""
    return (1e9 / (np.arange(vocab_size) + 10)).astype(np.int64)


def synthetic_lengths(jobs: list[Job], is_mixed: bool, generator) -> np.ndarray:
    """Draw as many lengths as the job with the largest micro-batches needs."""
    job = max(jobs, key=lambda job: job.batch_size)
    updates = job.warmup + job.updates + STAGE_UPDATES
    num = min(updates * job.micro_batches * job.batch_size, 10**6)
    if not is_mixed:
        return np.full(num, job.length)
    return np.clip(generator.gamma(2.0, 26.0, num), MIN_LENGTH + 1, job.length).astype(np.int64)


def write_synthetic(jobs: list[Job], is_mixed: bool = False) -> None:
    """Write the jobs' store: random ids between the vocabulary's boundary tokens.

    is_mixed: draw lengths as Wikipedia's paragraphs have; False: the jobs' longest for all.
    """
    job = jobs[0]
    vocab_size = teacher_config(job.pair, job.size).vocab_size
    tokenizer = make_tokenizer(job.pair, vocab_size, job.length)
    generator = keyed_numpy_generator(job.seed, "synthetic")
    lengths = synthetic_lengths(jobs, is_mixed, generator)
    write_random_ids(job.data_file, job.pair, tokenizer, lengths, generator)


def write_random_ids(path: str, pair: str, tokenizer, lengths: np.ndarray, generator) -> None:
    """Write a store of sequences of these lengths: random ids between boundary tokens."""
    special = special_ids(ARCHITECTURES[PAIR_ROWS[pair].teacher_type], tokenizer)
    vocab_size = len(tokenizer)
    counts_V = synthetic_counts(vocab_size)
    counts_V[tokenizer.all_special_ids] = 0
    ids = generator.choice(vocab_size, int(lengths.sum()), p=counts_V / counts_V.sum())
    ends = np.cumsum(lengths)
    ids[ends - lengths], ids[ends - 1] = special.start, special.end
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    with writing_tokens(path, "store", dtype) as (writer, _card):
        writer.append(ids.astype(dtype), lengths)


@dataclasses.dataclass(frozen=True)
class Workload:
    """The sequences of a job, their plan, and the preparation of a micro-batch."""

    dataset: LmSeqsDataset
    sampler: GroupedBatchSampler
    prepare: Callable

    def updates(self, job: Job, num_updates: int) -> list[Update]:
        """List the first updates, with their passes."""
        plan = num_updates * job.micro_batches, job.micro_batches
        return list(self.sampler.updates(*plan, rank=0, world_size=1))

    def lengths(self, update: Iterable[PlannedBatch]) -> np.ndarray:
        """Return the lengths of an update's sequences, in ids."""
        return self.dataset.lengths[
            np.concatenate([planned.sequences for planned in update])
        ].astype(np.int64)

    def batches(
        self, updates: Iterable[Update], ready: Callable[[MicroBatch], MicroBatch]
    ) -> Iterator[MicroBatch]:
        """Yield the updates' passes, collated and prepared a few ahead."""

        def prepared(planned: PlannedBatch) -> MicroBatch:
            return self.prepare(planned.number, *self.dataset.collate(planned.sequences))

        def make() -> Iterator[MicroBatch]:
            way = self.dataset.special.pad, self.sampler.shape
            for one in itertools.chain.from_iterable(update.passes for update in updates):
                yield ready(make_pass(map(prepared, one), *way))

        return prefetched(make(), MICRO_BATCHES_AHEAD)


def make_workload(job: Job) -> Workload:
    """Open the job's token file and plan its micro-batches as train.py does."""
    config, row = teacher_config(job.pair, job.size), PAIR_ROWS[job.pair]
    tokenizer = make_tokenizer(job.pair, config.vocab_size, job.length)
    architecture = ARCHITECTURES[row.teacher_type]
    source = f"--pair {job.pair}"
    with torch.device("meta"):  # only its sizes are read
        network = build_network(architecture, config)
    model = LanguageModel(architecture, network, tokenizer, source)
    dataset = LmSeqsDataset.from_file(job.data_file, model)
    sampler = GroupedBatchSampler(
        dataset.lengths, job.batch_size, dataset.max_length, group_by_size=True, seed=job.seed
    )
    sampler.join(job.tokens_per_pass, job.micro_batches, None, job.packs)
    prepare = prepare_clm
    if architecture.is_masked:
        counts_V = torch.from_numpy(synthetic_counts(config.vocab_size))
        fates = (WORD_MASK, WORD_KEEP, WORD_RAND)
        prepare = mlm_preparation(tokenizer, counts_V, SMOOTHING, job.seed, MASK_PROP, fates)
    return Workload(dataset, sampler, prepare)
