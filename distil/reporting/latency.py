"""Latency and throughput of several models, measured next to each other in one process.

Times sentences of real lengths, padded to 128 tokens and as they are. The models take turns batch
by batch: other load on the machine meets all of them, and the ratio comes from one run. Times the
model without its head (AutoModel), in float32, from token ids on the device to hidden states.

Shape suffixes: B sentences of a batch, T padded length.
"""

import contextlib
import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from distil.models.bounds import check_memory
from distil.models.hub import check_weight_files, load_config, quiet_transformers
from distil.models.names import model_folder
from distil.reporting.machine import describe_machine
from distil.reporting.plan import Plan
from distil.reporting.tables import digits, markdown, plain
from distil.system.failures import naming_failures
from distil.tasks.fine_tuning import inputs_of
from distil.tasks.loading import load_any_tokenizer, longest_input
from utils import InputError, logger, one_line

PADDED_LENGTH = 128
# The 16 middle values of sixteenths of the lengths of the WikiText test set's 9,313 sentences, in
# word pieces of bert-base-uncased with both special tokens, shuffled; their mean is 30.
LENGTHS = (25, 9, 40, 31, 17, 65, 22, 29, 14, 51, 23, 34, 20, 44, 27, 36)
LENGTH_MIX = (
    "random tokens, 9 to 65 a sentence (mean 30): the lengths of the WikiText test set's sentences"
)
NUM_WARM_UP_BATCHES = 3

Batch = Mapping[str, torch.Tensor]

# --------------------------------------------------------------------------------------------------
# Sentences and batches
# --------------------------------------------------------------------------------------------------


def text_config(name: str, flag: str):
    """Load the configuration of a model of text alone. Raises InputError naming `flag`."""
    config = load_config(None, name, flag)
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "vocab_size", 0):
        raise InputError(
            f"{flag} {name}: is a {config.model_type} model; expected an encoder or a causal model"
            " of text"
        )
    return config


def read_sentences(path: str) -> list[str]:
    """Read the non-blank lines of a UTF-8 text. Raises InputError where there are none."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data {path}: is no UTF-8 text ({one_line(error)}); convert it"
        ) from error
    if not any(lines):
        raise InputError(f"--data {path}: holds blank lines only; expected a sentence a line")
    return [line for line in lines if line]


def sequences_of(
    name: str, config, sentences: Sequence[str] | None, limit: int, flag: str = "--models"
) -> list[list[int]]:
    """Tokenize sentences for a model, cut to `limit`; without any, draw ids in LENGTHS."""
    if sentences is not None:
        tokenizer = load_any_tokenizer(name, flag)
        found = tokenizer(list(sentences), truncation=True, max_length=limit)["input_ids"]
        if (largest := max(map(max, found))) >= config.vocab_size:
            raise InputError(
                f"{flag} {name}: its tokenizer gave the id {largest}, it has {config.vocab_size}"
                " embeddings; take its own tokenizer"
            )
        return found
    rng = random.Random(0)
    # Above the special tokens: RoBERTa counts no position for padding.
    lowest = min(10, config.vocab_size - 1)
    return [
        [rng.randrange(lowest, config.vocab_size) for _ in range(min(length, limit))]
        for length in LENGTHS
    ]


def make_batches(
    sequences: Sequence[Sequence[int]], batch_size: int, least: int, length: int | None, pad: int
) -> list[Batch]:
    """Make full batches of `least` sequences or a few more, cycling through those given.

    length: pad to it; None: to the longest of the batch.
    """
    num = -(-max(least, batch_size) // batch_size)
    endless = itertools.cycle(sequences)
    return [collate(list(itertools.islice(endless, batch_size)), length, pad) for _ in range(num)]


def collate(sequences: Sequence[Sequence[int]], length: int | None, pad: int) -> Batch:
    """Pad sequences at their ends: input_ids (B, T) and attention_mask (B, T)."""
    longest = length or max(map(len, sequences))
    ids = [[*sequence, *[pad] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(num: int) -> Iterator[None]:
    """Compute on `num` CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_base(name: str, flag: str) -> torch.nn.Module:
    """Load a model without its head, float32, in eval mode. Raises InputError naming `flag`."""
    config = load_config(None, name, flag)
    check_memory(config, lambda: transformers.AutoModel.from_config(config), f"{flag} {name}")
    what = f"{flag} {name}: its weights could not be loaded"
    with quiet_transformers(), naming_failures(what, "; take another copy"):
        check_weight_files(name, flag)
        model = transformers.AutoModel.from_pretrained(
            model_folder(name),
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
        )
    # A causal model would copy its keys and values for a next token.
    model.config.use_cache = False
    return model.eval()


def time_one(model: torch.nn.Module, batch: Batch, device: str) -> float:
    """Return the seconds of one forward pass, with a wait for the device."""
    given = inputs_of(model, batch)
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(**given)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_passes(
    models: Mapping[str, torch.nn.Module],
    batches: Mapping[str, Sequence[Batch]],
    device: str,
    passes: int,
) -> dict:
    """Return {model: seconds of each pass}; the models take turns, and turns to be first."""
    seconds = {name: [0.0] * passes for name in models}
    names = list(models)
    num_batches = len(batches[names[0]])
    with torch.inference_mode():
        for name in names:
            for batch in list(
                itertools.islice(itertools.cycle(batches[name]), NUM_WARM_UP_BATCHES)
            ):
                time_one(models[name], batch, device)
        for turn, (number, place) in enumerate(
            itertools.product(range(passes), range(num_batches))
        ):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name][number] += time_one(models[name], batches[name][place], device)
    return seconds


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest of values."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def summarize(
    seconds: Mapping[str, Sequence[float]], num_batches: int, batch_size: int
) -> dict[str, dict]:
    """Turn seconds into latency (ms a batch), sentences/s, and speed-up over the first model."""
    reference = next(iter(seconds.values()))
    return {
        name: {
            "latency_ms": spread_of([1000 * s / num_batches for s in found]),
            "sentences_s": spread_of([num_batches * batch_size / s for s in found]),
            "speed_up": spread_of([r / s for r, s in zip(reference, found, strict=True)]),
        }
        for name, found in seconds.items()
    }


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to time, its configuration, and the token ids that it reads."""

    config: transformers.PretrainedConfig
    sequences: Sequence[Sequence[int]]
    model: torch.nn.Module


def measure(
    names: Mapping[str, str],
    plan: Plan,
    sentences: Sequence[str] | None = None,
    flag: str = "--models",
) -> dict[str, Any]:
    """Time models next to each other: {"rows": a row a setting, "inputs", "machine", ..}.

    names: {the model's name in the result: hub name or folder}; speed-ups are over the first. flag:
    precedes a model's name in an InputError.
    """
    configs = {name: text_config(where, flag) for name, where in names.items()}
    limit = min(
        PADDED_LENGTH, *(longest_input(config) or PADDED_LENGTH for config in configs.values())
    )
    subjects = {
        name: Subject(
            configs[name],
            sequences_of(where, configs[name], sentences, limit, flag),
            load_base(where, flag),
        )
        for name, where in names.items()
    }
    with threads(plan.threads):
        rows = [
            time_setting(subjects, plan, device, batch_size, length)
            for device in plan.devices
            for batch_size in plan.batch_sizes
            for length in (limit, None)
        ]
    return {
        "rows": rows,
        "inputs": describe_inputs(sentences, subjects),
        "passes": plan.passes,
        "dtype": "float32",
        "threads": plan.threads,
        "machine": describe_machine(plan.devices[-1], plan.threads),
    }


def time_setting(
    subjects: Mapping[str, Subject], plan: Plan, device: str, batch_size: int, length: int | None
) -> dict:
    """Time all models in one setting; length: to pad to, None: to the longest of each batch."""
    models = {name: subject.model.to(device) for name, subject in subjects.items()}
    batches = {
        name: [
            {key: tensor.to(device) for key, tensor in batch.items()}
            for batch in make_batches(
                subject.sequences,
                batch_size,
                plan.num_sentences,
                length,
                subject.config.pad_token_id or 0,
            )
        ]
        for name, subject in subjects.items()
    }
    padding = (
        f"padded to {length}"
        if length
        else "own lengths"
        if batch_size == 1
        else "padded to the longest"
    )
    logger.info("Timing on %s: batch size %d, %s.", device, batch_size, padding)
    seconds = time_passes(models, batches, device, plan.passes)
    num_batches = len(next(iter(batches.values())))
    figures = summarize(seconds, num_batches, batch_size)
    return {"device": device, "batch_size": batch_size, "padding": padding, "models": figures}


def describe_inputs(sentences: Sequence[str] | None, subjects: Mapping[str, Subject]) -> str:
    """Describe the text that the models were timed on."""
    if sentences is None:
        return LENGTH_MIX
    means = [
        f"{statistics.mean(map(len, subject.sequences)):.0f} tokens for {name}"
        for name, subject in subjects.items()
    ]
    return f"{len(sentences)} sentences of a text, on average {', '.join(means)}"


def table(found: dict) -> str:
    """Lay out the figures as a Markdown table, a row a setting and model."""
    lines = [
        [
            "device",
            "batch",
            "inputs",
            "model",
            "ms a batch (least-largest)",
            "sentences/s",
            "speed-up (least-largest)",
        ]
    ]
    for row in found["rows"]:
        for name, figures in row["models"].items():
            ms, rate, ratio = figures["latency_ms"], figures["sentences_s"], figures["speed_up"]
            lines.append(
                [
                    plain(row["device"]),
                    str(row["batch_size"]),
                    plain(row["padding"]),
                    plain(name),
                    f"{digits(ms['median'])} ({digits(ms['least'])}-{digits(ms['largest'])})",
                    digits(rate["median"]),
                    f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['largest']:.2f})",
                ]
            )
    return markdown(lines)
