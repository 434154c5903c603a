"""What is said and saved of an update that failed: a value that is not finite, or no memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from distil.data.batches import MicroBatch
from distil.system.files import atomic_path
from utils import RankError, is_out_of_memory, one_line


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight became NaN or infinite: no update was applied, nothing was saved.

    numbers: the micro-batches in question. is_located: they are the culprits, not only suspects.
    """

    def __init__(self, message: str, numbers: Sequence[int] = (), is_located: bool = False):
        super().__init__(message)
        self.numbers, self.is_located = list(numbers), is_located

    def culprits(self, shape: tuple[int, int] | None) -> dict[int, str]:
        """Return the culprits' numbers, with nothing said of each; none if all are only suspects.

        So they are in packed passes, of a shape: what is not finite spreads, since 0 x NaN is NaN.
        """
        return dict.fromkeys(self.numbers, "") if self.is_located and shape is None else {}


def check_losses(losses_MK: torch.Tensor, names: Sequence[str], numbers: Sequence[int]) -> None:
    """Raise NonFiniteError where a loss of a micro-batch is not finite.

    losses_MK: the total in the first column, then one column for each objective of `names`.
    """
    wrong = (~torch.isfinite(losses_MK[:, 1:])).nonzero().tolist()
    if wrong:
        place, column = wrong[0]
        value = losses_MK[place, column + 1].item()
        raise NonFiniteError(
            f"loss_{names[column]} became {value} in micro-batch {numbers[place]}; the update was"
            " not applied",
            sorted({numbers[row] for row, _ in wrong}),
            is_located=True,
        )


def culprit_lines(
    planned: Iterable, shares: Sequence[Iterable[Sequence]], found: Mapping[int, str]
) -> list[str]:
    """Describe the micro-batches found, number -> what is wrong: rank and sequences.

    planned: the update's micro-batches; shares: the passes of each rank.
    """
    ranks = {b.number: rank for rank, share in enumerate(shares) for one in share for b in one}
    lines = []
    for batch in planned:
        if batch.number in found:
            what = f"micro-batch {batch.number}{found[batch.number] and ': '}{found[batch.number]}"
            sequences = ", ".join(map(str, batch.sequences.tolist()))
            lines.append(f"{what}, on rank {ranks[batch.number]}, sequences {sequences}")
    return lines or ["computed again everything was finite: suspect the machine"]


def explain(
    error: NonFiniteError,
    number: int,
    planned: Sequence,
    shares: Sequence[Iterable[Sequence]],
    found: Mapping[int, str],
    folder: Path,
    prepare: Callable[[Iterable], Iterable[MicroBatch]],
) -> NonFiniteError:
    """Return the error with update, rank and sequences, its batches saved in the run folder.

    found: number -> what is wrong; prepare: makes planned micro-batches as they went into models.
    """
    lines = [f"update {number}: {error}", *culprit_lines(planned, shares, found)]
    if error.is_located and set(found) != set(error.numbers):
        lines[0] += ", or in another of its packed pass; computed apart"
    culprits = [batch for batch in planned if batch.number in (found or error.numbers)]
    path = folder / f"nonfinite-step-{number}.safetensors"
    sequences = [batch.sequences for batch in culprits]
    try:
        save_batches(path, prepare(culprits), sequences, "; ".join(lines))
        lines.append(f"the batch is in {path}")
    except OSError as problem:
        lines.append(f"the batch could not be saved ({one_line(problem)})")
    return NonFiniteError("; ".join(lines), error.numbers, error.is_located)


def merged(mine: Mapping[int, str], world_size: int) -> dict[int, str]:
    """Merge what each rank found, on all ranks."""
    found = [mine] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(found, mine)
    return {number: what for part in found for number, what in part.items()}


def save_batches(
    path: Path, batches: Iterable[MicroBatch], sequences: Iterable[np.ndarray], message: str
) -> None:
    """Save micro-batches as they went into the models, with the numbers of their sequences."""
    tensors = {}
    for batch, numbers in zip(batches, sequences, strict=True):
        content = {
            "input_ids": batch.input_ids_BT,
            "labels": batch.labels_BT,
            "attention_mask": batch.attention_mask_BT,
            "sequences": torch.from_numpy(numbers.astype(np.int64)),
        }
        given = {name: value for name, value in content.items() if value is not None}
        tensors |= {f"{batch.number}/{name}": value.contiguous() for name, value in given.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"error": message}))


@contextlib.contextmanager
def naming_out_of_memory(
    passes: Iterable[Sequence], lengths: np.ndarray, shape: tuple[int, int] | None = None
) -> Iterator[None]:
    """Raise RankError where an allocation fails, naming the largest pass and the remedy.

    passes: this rank's, of planned micro-batches; there may be none. lengths: of all sequences.
    shape: of packed passes.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        shapes = []
        for one in passes:
            lengths_B = lengths[np.concatenate([batch.sequences for batch in one])]
            shapes.append((len(lengths_B), int(lengths_B.max()), len(one) > 1))
        largest = max(shapes, key=lambda found: found[0] * found[1], default=(0, 0, False))
        largest = largest if shape is None else (*shape, True)
        num, length, is_joined = largest
        what = "pass" if is_joined else "micro-batch"
        remedy = "--max_tokens or --batch_size (and raise --gradient_accumulation_steps)"
        raise RankError(
            f"out of memory in a {what} of {num} x {length} = {num * length} padded tokens; lower"
            f" {'--tokens_per_pass' if is_joined else remedy}, or try --bf16 or"
            " --activation_checkpointing"
        ) from error
