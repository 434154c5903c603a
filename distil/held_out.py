"""Held-out text, measured in one or several ways: fixed masks, drawn masks, each token alone.

Used by scripts/evaluate_lm.py; distil/evaluation.py has the figures themselves.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from distil.data.batches import mlm_preparation
from distil.data.decoding import texts_of
from distil.data.encoding import Encoding, LineEncoder
from distil.data.hub_datasets import find_files
from distil.data.text_sources import read_blocks
from distil.data.token_files import TokenFile
from distil.evaluation import (
    FixedMasks,
    Passes,
    drawn_once,
    evenly_spaced,
    figures_of,
    measure,
    next_tokens,
    passes_over,
    plan_batches,
    reader_of,
)
from distil.held_out_options import DRAWN
from distil.reporting.tables import markdown
from utils import InputError, bar_options

SHARES = ("accuracy", "agreement")  # printed in percent, and x100 in the scores


def encode_text(path: str, flag: str, encoding: Encoding) -> TokenFile:
    """Encode a text's lines in order, as binarized_data.py does. Raises InputError."""
    encoder = LineEncoder(encoding)
    parts = []
    for source in find_files(path, flag=flag):
        for block in read_blocks(source, encoding.text_field, flag):
            texts, _ = texts_of(block, encoding.text_field, encoding.errors, flag)
            parts.append(encoder.encode([line for text in texts if (line := text.strip())]))
    ids_M, lengths_N = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(lengths_N):
        raise InputError(f"{flag} {path}: has blank lines only; expected one sequence a line")
    return TokenFile(path, ids_M, lengths_N)


# --------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One way to measure a model.

    prefix: of the figures' names; batches: arrays of sequence numbers; passes: see passes_over.
    """

    prefix: str
    batches: Sequence[np.ndarray]
    passes: Passes


def causal_measurements(lengths: np.ndarray) -> list[Measurement]:
    """List the measurements of a causal model: every next token."""
    return [Measurement("", plan_batches(lengths), next_tokens)]


def masked_measurements(
    lengths: np.ndarray, fixed: FixedMasks, drawn: Passes, num_alone: int | None
) -> list[Measurement]:
    """List the measurements of a masked model: fixed masks, drawn masks, pseudo-perplexity.

    num_alone: evenly spaced sequences for the pseudo-perplexity; None leaves it out.
    """
    batches = plan_batches(lengths)
    found = [Measurement("", batches, fixed), Measurement(DRAWN, batches, drawn)]
    if num_alone is not None:
        chosen = evenly_spaced(len(lengths), num_alone)
        one_by_one = dataclasses.replace(fixed, every=int(lengths.max()))
        plan = [chosen[batch] for batch in plan_batches(lengths[chosen])]
        found.append(Measurement("pseudo_", plan, one_by_one))
    return found


def drawn_masks(
    counts_V: np.ndarray, smoothing: float, share: float, tokenizer, seed: int
) -> Passes:
    """Draw masks as in training: of the drawn tokens 80 % are masked, 10 % kept, 10 % random.

    counts_V, smoothing: weight count ^ -smoothing; share: of the tokens that is drawn.
    """
    counts_V = torch.from_numpy(counts_V)
    return drawn_once(mlm_preparation(tokenizer, counts_V, smoothing, seed, share))


def run_measurement(
    measurement: Measurement,
    network: torch.nn.Module,
    teacher: torch.nn.Module | None,
    collate: Callable,
    source: str,
    num_entries: int | None = None,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Measure a model, against its teacher if there is one; return figures by prefixed name.

    collate: see passes_over. source: the model's flag and name. num_entries: of the tokenizer.
    amp_dtype: dtype of mixed precision.
    Raises InputError for a figure that is not finite.
    """
    networks = network, teacher
    readers = [None if one is None else reader_of(one, num_entries, amp_dtype) for one in networks]
    title = f"{measurement.prefix}loss"
    with tqdm(total=len(measurement.batches), unit="batch", desc=title, **bar_options()) as bar:

        def collate_and_count(numbers):
            bar.update()
            return collate(numbers)

        passes = passes_over(collate_and_count, measurement.batches, measurement.passes)
        sums_S = measure(*readers, passes)
    has_teacher = teacher is not None
    same_width = has_teacher and network.config.hidden_size == teacher.config.hidden_size
    figures = figures_of(sums_S, has_teacher, same_width)
    if not all(map(math.isfinite, figures.values())):
        raise InputError(
            f"{source}: a figure is NaN or infinite; the text has nothing to be predicted but"
            " special tokens, or a model overflows: take other text, another model"
        )
    return {f"{measurement.prefix}{name}": value for name, value in figures.items()}


# --------------------------------------------------------------------------------------------------
# Figures as a table and as scores
# --------------------------------------------------------------------------------------------------


def figures_table(figures: dict[str, float], has_teacher: bool) -> str:
    """Lay figures out as a Markdown table, with a teacher's figures in the third column."""
    rows = [["figure", "model", "teacher"][: 2 + has_teacher]]
    for name, value in figures.items():
        stem = next((part for part in (DRAWN, "pseudo_") if name.startswith(part)), "")
        if not name.startswith(f"{stem}teacher_"):
            of_teacher = figures.get(f"{stem}teacher_{name.removeprefix(stem)}")
            cells = [_cell(name, value), "" if of_teacher is None else _cell(name, of_teacher)]
            rows.append([name.replace("_", " "), *cells[: 1 + has_teacher]])
    return markdown(rows)


def _cell(name: str, value: float) -> str:
    return f"{value:.2%}" if name.endswith(SHARES) else f"{value:.4f}"


def as_metrics(figures: dict[str, float]) -> dict[str, float]:
    """Convert figures to scores: shares x100."""
    return {
        name: 100 * value if name.endswith(SHARES) else value for name, value in figures.items()
    }
