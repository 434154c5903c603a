"""Figures of a language model on held-out text, alone and against a teacher.

Called by train.py during training, by scripts/evaluate_lm.py and scripts/study.py. Every figure is
a sum over positions that is divided once, at the end: it depends neither on the division of the
text into batches nor on the division of batches among ranks.

A causal model predicts each next token. A masked model predicts every token once (FixedMasks):
every k-th token is masked, in k passes, so that two models, or one model at two times, predict the
same. With k as large as the longest text each token is masked alone: the pseudo-perplexity of
Salazar et al., 2020, "Masked Language Model Scoring", section 2.

Shape suffixes: B sequences, T padded length, N positions, V vocabulary, D width, S sums.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distil.data.batches import (
    MicroBatch,
    MlmPreparation,
    label_of_row,
    prepare_clm,
    real_positions,
)
from distil.held_out_options import DRAWN, MASK_EVERY, MASKS_SEED
from distil.kept_rows import KeptRows
from distil.kernels.cpu import faster_for
from distil.kernels.head import rows_per_chunk
from distil.losses import IGNORED_LABEL, at_least_float32, cosine_distance
from distil.models.forward import last_hidden_state
from distil.models.heads import Head, prediction_head
from distil.system.launch import Runtime

EVALUATED_TOKENS = 2**12  # padded tokens a batch: equal everywhere, so that drawn masks are equal
ARGMAX_BLOCK = 256  # entries among which the largest is found at once
MAX_LOSS = 100.0  # of a perplexity: beyond e^100 it means nothing, and JSON has no infinity

Passes = Callable[[int, torch.Tensor, torch.Tensor], Iterable[MicroBatch]]

# --------------------------------------------------------------------------------------------------
# Predictions asked of a model
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FixedMasks:
    """Mask every k-th token of each sequence in k passes: deterministic, each token once.

    special_ids: tokens that are never masked. every: k; MASK_EVERY by default, the longest
    sequence's length for the pseudo-perplexity.
    """

    mask_id: int
    special_ids: Sequence[int]
    every: int = MASK_EVERY

    def __call__(
        self, number: int, token_ids_BT: torch.Tensor, lengths_B: torch.Tensor
    ) -> Iterator[MicroBatch]:
        """Yield the passes over a batch, each without the sequences in which it masks nothing."""
        real_BT = real_positions(lengths_B, token_ids_BT.shape[1])
        asked_BT = real_BT & ~torch.isin(token_ids_BT, torch.tensor(list(self.special_ids)))
        turn_T = torch.arange(token_ids_BT.shape[1]) % self.every
        for turn in range(min(self.every, token_ids_BT.shape[1])):
            masked_BT = asked_BT & (turn_T == turn)
            has_any_B = masked_BT.any(1)
            if has_any_B.any():
                yield self._masked(
                    number, token_ids_BT[has_any_B], real_BT[has_any_B], masked_BT[has_any_B]
                )

    def _masked(self, number: int, token_ids_BT, real_BT, masked_BT) -> MicroBatch:
        rows = {
            "real": real_BT.flatten().nonzero()[:, 0],
            "masked": masked_BT.flatten().nonzero()[:, 0],
        }
        input_ids_BT = token_ids_BT.masked_fill(masked_BT, self.mask_id)
        labels_BT = token_ids_BT.masked_fill(~masked_BT, IGNORED_LABEL)
        return MicroBatch(number, input_ids_BT, real_BT.long(), labels_BT, rows, len(rows["real"]))


def next_tokens(
    number: int, token_ids_BT: torch.Tensor, lengths_B: torch.Tensor
) -> list[MicroBatch]:
    """Predict every token but the first with a causal model: one pass."""
    return [prepare_clm(number, token_ids_BT, lengths_B)]


def drawn_once(prepare: MlmPreparation) -> Passes:
    """Predict the tokens that `prepare` draws with a masked model: one pass."""
    return functools.partial(_drawn, prepare)


def _drawn(prepare: MlmPreparation, number: int, token_ids_BT, lengths_B) -> list[MicroBatch]:
    return [prepare(number, token_ids_BT, lengths_B)]


def plan_batches(lengths: np.ndarray, max_tokens: int = EVALUATED_TOKENS) -> list[np.ndarray]:
    """Divide sequences, longest first, into batches of at most max_tokens padded tokens.

    A batch has one sequence at least.
    """
    order, batches, first = np.argsort(-lengths.astype(np.int64), kind="stable"), [], 0
    while first < len(order):
        size = max(max_tokens // int(lengths[order[first]]), 1)
        batches.append(order[first : first + size])
        first += size
    return batches


def evenly_spaced(total: int, num: int) -> np.ndarray:
    """Return at most num of the numbers below total, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(num, total)).round().astype(np.int64))


def passes_over(
    collate: Callable,
    batches: Sequence[np.ndarray],
    passes: Passes,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """Yield the passes over a rank's share of the batches: each batch once over all ranks.

    collate: sequence numbers -> (token_ids_BT, lengths_B), as LmSeqsDataset's.
    """
    for number in range(rank, len(batches), world_size):
        yield from passes(number, *collate(batches[number]))


# --------------------------------------------------------------------------------------------------
# Sums over the predictions
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model in two steps: from a batch to hidden states, from these to predictions.

    amp_dtype: dtype of torch's mixed precision for both steps; None: the model's dtype.
    num_entries: of the tokenizer, over which a teacher with other rows than its student's is
    compared; None: all its rows.
    """

    model: nn.Module
    head: Head
    amp_dtype: torch.dtype | None = None
    num_entries: int | None = None

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Return the last hidden states, (B x T, D)."""
        with self._precision():
            return last_hidden_state(self.model, batch).flatten(0, 1)

    def predict(self, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most likely ids (N,), and log-probabilities_NV, in float32 or wider."""
        with self._precision():
            logits_NV = at_least_float32(self.head(hidden_ND))
        return first_largest(logits_NV), logits_NV.log_softmax(-1)

    def _precision(self):
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def reader_of(
    model: nn.Module, num_entries: int | None = None, amp_dtype: torch.dtype | None = None
) -> Reader:
    """Read a whole language model with its head."""
    return Reader(model, prediction_head(model), amp_dtype, num_entries)


@contextlib.contextmanager
def computing(*readers: Reader | None) -> Iterator[None]:
    """Compute without gradients, by the CPU's kernels where they apply.

    Within this context autocast casts a weight once; outside it, at each of `Reader`'s calls.
    """
    models = [reader.model for reader in readers if reader is not None]
    device_type = next(models[0].parameters()).device.type
    with torch.no_grad(), faster_for(*models), torch.autocast(device_type, enabled=False):
        yield


def first_largest(values_NV: torch.Tensor) -> torch.Tensor:
    """Compute argmax(-1), the first of equal ones: by blocks, as torch's visits single entries."""
    size, num = ARGMAX_BLOCK, values_NV.shape[1]
    if num < 2 * size:
        return values_NV.argmax(-1)
    whole_NKB = values_NV[:, : num - num % size].unflatten(1, (-1, size))
    last_N1 = values_NV[:, -size:].amax(-1, keepdim=True)  # overlaps the block before
    largest_NK = torch.cat([whole_NKB.amax(-1), last_N1], 1)
    start_N1 = (largest_NK.argmax(-1, keepdim=True) * size).clamp(max=num - size)
    block_NB = values_NV.gather(1, start_N1 + torch.arange(size, device=values_NV.device))
    return start_N1[:, 0] + block_NB.argmax(-1)


# The sums over labels; without a teacher the last five are 0.
SUMS = (
    "positions",
    "loss",
    "accuracy",
    "kl",
    "agreement",
    "teacher_loss",
    "teacher_accuracy",
    "cosine",
)


def measure(
    student: Reader,
    teacher: Reader | None,
    batches: Iterable[MicroBatch],
    kept: KeptRows | None = None,
    name: str = "",
) -> torch.Tensor:
    """Sum a model's figures over the labels of `batches`: (S,), float64, as in SUMS.

    The sums of several ranks can be added. The model is in evaluation mode meanwhile; no random
    number is drawn. kept: the teacher's rows of earlier calls with the same `name` and batches,
    which are read there, or computed and kept there.
    """
    device = next(student.model.parameters()).device
    sums_S = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    was_training = student.model.training
    student.model.eval()
    try:
        with computing(student, teacher):
            for number, batch in enumerate(batches):
                sums_S += _sums_of_batch(student, teacher, batch, kept, (name, number))
    finally:
        student.model.train(was_training)
    return sums_S


def _sums_of_batch(
    student: Reader, teacher: Reader | None, batch: MicroBatch, kept: KeptRows | None, key
) -> torch.Tensor:
    rows_N, labels_N = _asked(batch)
    student_ND = student.hidden(batch)[rows_N]
    given = [labels_N, student_ND]
    if teacher is not None:
        teacher_ND = None if kept is None else kept.recall(key)
        if teacher_ND is None:
            teacher_ND = teacher.hidden(batch)[rows_N]
            if kept is not None:
                kept.keep(key, teacher_ND)
        given.append(teacher_ND)
    sums_S = torch.zeros(len(SUMS), dtype=torch.float64, device=student_ND.device)
    for chunk in _chunks(student_ND.device, *given):
        sums_S += _sums_of_rows(student, teacher, *chunk)
    return sums_S


def _asked(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions with a label, and the labels."""
    kind = "masked" if "masked" in batch.rows else "next"
    return batch.rows[kind], label_of_row(kind, batch.labels_BT, batch.rows[kind])


def _chunks(device: torch.device, *tensors_N: torch.Tensor):
    """Divide tensors, on the device, so that a chunk's logits fit: no (B, T, V) tensor is made."""
    return zip(
        *(tensor_N.to(device).split(rows_per_chunk(device.type)) for tensor_N in tensors_N),
        strict=True,
    )


def _sums_of_rows(
    student: Reader, teacher: Reader | None, labels_C, student_CD, teacher_CD=None
) -> torch.Tensor:
    own = student.predict(student_CD)
    sums = [torch.tensor(len(labels_C)), *_label_sums(own, labels_C)]
    if teacher is not None:
        others = teacher.predict(teacher_CD)
        sums += [*_distance_sums(own, others, teacher.num_entries), *_label_sums(others, labels_C)]
        if student_CD.shape == teacher_CD.shape:
            distance = cosine_distance(
                at_least_float32(student_CD), at_least_float32(teacher_CD), None, 1.0
            )
            sums.append(len(labels_C) - distance)
    sums_K = torch.stack([value.to(labels_C.device, torch.float64) for value in sums])
    return F.pad(sums_K, (0, len(SUMS) - len(sums_K)))


Predicted = tuple[torch.Tensor, torch.Tensor]  # see Reader.predict


def _label_sums(predicted: Predicted, labels_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum -log p(label), and count the labels that are ranked first."""
    first_C, log_probs_CV = predicted
    return -log_probs_CV.gather(1, labels_C[:, None]).double().sum(), (first_C == labels_C).sum()


def _distance_sums(
    student: Predicted, teacher: Predicted, num_entries: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum KL(teacher || student) at temperature 1; count the positions of equal first tokens.

    Where the two have different rows, the teacher's first num_entries count, as in training.
    """
    student_first_C, student_log_probs_CV = student
    teacher_first_C, teacher_log_probs_CV = teacher
    if student_log_probs_CV.shape != teacher_log_probs_CV.shape:
        teacher_log_probs_CV = teacher_log_probs_CV[:, :num_entries].log_softmax(-1)
        teacher_first_C = first_largest(teacher_log_probs_CV)
        student_log_probs_CV = student_log_probs_CV[:, : teacher_log_probs_CV.shape[1]]
    log_ratio_CV = teacher_log_probs_CV - student_log_probs_CV
    teacher_probs_CV = teacher_log_probs_CV.softmax(-1)  # their exponential, in less time
    kl = torch.linalg.vecdot(teacher_probs_CV, log_ratio_CV)
    return kl.double().sum(), (student_first_C == teacher_first_C).sum()


def figures_of(
    sums_S: torch.Tensor, has_teacher: bool, same_width: bool = True
) -> dict[str, float]:
    """Divide `measure`'s sums to means; NaN without a label.

    loss: natural log; perplexity: its exponential; accuracy, agreement: shares, top-1; kl:
    KL(teacher || student); cosine: of last hidden states, where both have the same width;
    teacher_*: the teacher's figures.
    """
    sums = dict(zip(SUMS, sums_S.tolist(), strict=True))
    num = sums.pop("positions") or math.nan
    means = {name: value / num for name, value in sums.items()}
    figures = {
        "loss": means["loss"],
        "perplexity": perplexity(means["loss"]),
        "accuracy": means["accuracy"],
    }
    if has_teacher:
        figures |= {"kl": means["kl"], "agreement": means["agreement"]}
        figures |= {"cosine": means["cosine"]} if same_width else {}
        figures |= {
            "teacher_loss": means["teacher_loss"],
            "teacher_perplexity": perplexity(means["teacher_loss"]),
        }
        figures |= {"teacher_accuracy": means["teacher_accuracy"]}
    return figures


def perplexity(loss: float) -> float:
    """Return e^loss, at most e^MAX_LOSS."""
    return math.exp(min(loss, MAX_LOSS))


LOGGED_FIGURES = ("loss", "accuracy", "perplexity", "kl", "agreement")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out data that a run is evaluated on.

    dataset: an LmSeqsDataset; batches: numbers of its sequences; passes: prefix of the figures'
    names -> see passes_over.
    """

    dataset: object
    batches: list[np.ndarray]
    passes: Mapping[str, Passes]
    kept: KeptRows = dataclasses.field(default_factory=KeptRows)

    @classmethod
    def of(
        cls,
        dataset,
        tokenizer,
        is_masked: bool,
        prepare: MlmPreparation | None = None,
        folder: str | None = None,
    ) -> "HeldOut":
        """Plan the batches of an LmSeqsDataset, the same on all ranks.

        prepare: draws masks as the run does, where not uniformly; here the same for every seed.
        folder: where the teacher's answers may be kept: see KeptRows.
        """
        masks = FixedMasks(tokenizer.mask_token_id, tokenizer.all_special_ids)
        passes = {"": masks if is_masked else next_tokens}
        if prepare is not None:
            passes[DRAWN] = drawn_once(dataclasses.replace(prepare, seed=MASKS_SEED))
        return cls(dataset, plan_batches(dataset.lengths), passes, KeptRows(folder))

    def only(self, batches: list[np.ndarray]) -> "HeldOut":
        """Return held-out data of some batches, without the answers that were kept."""
        return dataclasses.replace(self, batches=batches, kept=KeptRows())

    def figures(
        self, student: Reader, teacher: Reader | None, runtime: Runtime
    ) -> dict[str, float]:
        """Measure a student, and its distance from the teacher if there is one, on all ranks."""
        ranks, sums = (runtime.rank, runtime.world_size), []
        with runtime.raise_on_all_ranks():
            self.dataset.tokens.forget()  # verified again in each evaluation
            for prefix, passes in self.passes.items():
                batches = passes_over(self.dataset.collate, self.batches, passes, *ranks)
                sums.append(measure(student, teacher, batches, self.kept, prefix))
        sums_PS = torch.stack(sums)
        if runtime.world_size > 1:
            torch.distributed.all_reduce(sums_PS)
        figures = {}
        for prefix, sums_S in zip(self.passes, sums_PS, strict=True):
            found = figures_of(sums_S, teacher is not None)
            figures |= {f"{prefix}{name}": found[name] for name in LOGGED_FIGURES if name in found}
        return figures
