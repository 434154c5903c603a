"""The distillation step: batch preparation, and one optimizer update over a list of micro-batches.

Flow: LmSeqsDataset.collate -> prepare_mlm / prepare_clm (on the host, keyed by seed and micro-batch
number) -> teacher's and student's last hidden states -> losses -> one backward a micro-batch, one
gradient all-reduce, clip, update.

Source: Sanh et al., 2019, section 3; masking by smoothed counts: Conneau and Lample, 2019 (XLM),
section 3.2.

Shape suffixes: B sequences, T padded length, N selected positions, V vocabulary, D width, M
micro-batches, K losses.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cpu_kernels import TiedGradient, checkpointing_contexts, faster
from losses import (
    IGNORED_LABEL,
    LOSSES,
    Projection,
    Term,
    at_least_float32,
    head_losses,
    projected_losses,
    rows_per_chunk,
)
from utils import keyed_seed

Head = Callable[[torch.Tensor], torch.Tensor]

ADAM_BETAS = (0.9, 0.98)
NORMALIZATIONS = ("micro_batches", "tokens")
MIN_LOSS_SCALE = (
    2**-10
)  # the scaler halves its scale at each overflow; below this it will not find one that fits

# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward needs, made on the host.

    attention_mask_BT: 1 on real tokens; None where the model is called without a mask. labels_BT:
    -100 where nothing is to be predicted. rows: kind of rows (see losses.Loss) -> ascending
    positions in the flattened (B, T).
    """

    number: int
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor | None
    labels_BT: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    num_tokens: int
    selection: "Selection | None" = None

    @property
    def is_causal(self) -> bool:
        """True where the next token is to be predicted, False where masked ones are."""
        return "next" in self.rows

    @property
    def is_padded(self) -> bool:
        """True where a position is no real token."""
        return self.num_tokens < self.input_ids_BT.numel()

    def pinned(self) -> "MicroBatch":
        """Return the batch in page-locked memory, from where a GPU copies it while the host goes
        on.
        """
        memo: dict[int, torch.Tensor] = {}
        return _pinned(self, memo)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which rows of a micro-batch the head projects, found on the host.

    rows_N: ascending positions in the flattened (B, T). offsets: objective -> places of its own
    rows among these; labels: objective -> the ids to be predicted there, or None.
    """

    rows_N: torch.Tensor
    offsets: Mapping[str, torch.Tensor]
    labels: Mapping[str, torch.Tensor | None]


def _pinned(value, memo: dict[int, torch.Tensor]):
    """Copy the tensors in a dataclass or mapping into page-locked memory, one that occurs twice
    once.
    """
    if isinstance(value, torch.Tensor):
        return memo.setdefault(id(value), value.pin_memory())
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value,
            **{f.name: _pinned(getattr(value, f.name), memo) for f in dataclasses.fields(value)},
        )
    if isinstance(value, Mapping):
        return {key: _pinned(content, memo) for key, content in value.items()}
    return value


def masking_weights(
    counts_V: torch.Tensor, smoothing: float, special_ids: Iterable[int]
) -> torch.Tensor:
    """Weigh each token id for masking: max(count, 1) ^ -smoothing, 0 for special tokens;
    float64.
    """
    # Differs from the original: always float64. In half precision frequent tokens' weights became
    # 0.
    weights_V = counts_V.clamp(min=1).double() ** -smoothing
    weights_V[list(special_ids)] = 0.0
    return weights_V


def real_positions(lengths_B: torch.Tensor, padded_length: int) -> torch.Tensor:
    """Mark the real tokens of a padded batch: bool (B, T)."""
    return torch.arange(padded_length) < lengths_B[:, None]


@dataclasses.dataclass(frozen=True)
class MlmPreparation:
    """How masked-LM batches are made.

    weights_V: see masking_weights. mask_prop: share of real tokens to be predicted. word_mask,
    word_keep, word_rand: what becomes of a drawn token: [MASK], itself, or an id uniform over the
    vocabulary.
    """

    weights_V: torch.Tensor
    mask_id: int
    mask_prop: float
    word_mask: float
    word_keep: float
    word_rand: float
    restrict_ce_to_mask: bool
    seed: int

    def __call__(
        self, number: int, token_ids_BT: torch.Tensor, lengths_B: torch.Tensor
    ) -> MicroBatch:
        """Draw ceil(mask_prop x real tokens) positions of the whole batch, without replacement, by
        weight.

        Never more than there are positions of positive weight. All randomness is keyed by (seed,
        number).
        """
        real_BT = real_positions(lengths_B, token_ids_BT.shape[1])
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, number, "mask"))
        drawn_BT = self._draw(token_ids_BT, real_BT, generator)
        labels_BT = torch.where(drawn_BT, token_ids_BT, IGNORED_LABEL)
        input_ids_BT = token_ids_BT.clone()
        input_ids_BT[drawn_BT] = self._replacements(token_ids_BT[drawn_BT], generator)
        real, masked = _positions(real_BT), _positions(drawn_BT)
        rows = {
            "real": real,
            "masked": masked,
            "distilled": masked if self.restrict_ce_to_mask else real,
        }
        return MicroBatch(number, input_ids_BT, real_BT.long(), labels_BT, rows, len(real))

    def _draw(self, token_ids_BT, real_BT, generator) -> torch.Tensor:
        weights_BT = self.weights_V[token_ids_BT] * real_BT
        num_real = int(real_BT.sum())
        # Differs from the original: capped. 2019 went on to mask [CLS] where nothing of positive
        # weight was left.
        num_drawn = min(math.ceil(self.mask_prop * num_real), int((weights_BT > 0).sum()))
        drawn_BT = torch.zeros_like(real_BT)
        if num_drawn:
            places = torch.multinomial(
                weights_BT.flatten(), num_drawn, replacement=False, generator=generator
            )
            drawn_BT.view(-1)[places] = True
        return drawn_BT

    def _replacements(self, original_N: torch.Tensor, generator) -> torch.Tensor:
        probabilities = torch.tensor(
            [self.word_mask, self.word_keep, self.word_rand], dtype=torch.float64
        )
        if not len(original_N):
            return original_N
        random_N = torch.randint(len(self.weights_V), original_N.shape, generator=generator)
        fate_N = torch.multinomial(
            probabilities, len(original_N), replacement=True, generator=generator
        )
        choices_3N = torch.stack([torch.full_like(original_N, self.mask_id), original_N, random_N])
        return choices_3N.gather(0, fate_N[None])[0]


def prepare_clm(
    number: int, token_ids_BT: torch.Tensor, lengths_B: torch.Tensor, with_mask: bool = False
) -> MicroBatch:
    """Make a causal-LM batch: the labels are the ids, -100 on padding.

    with_mask: give the model a mask where anything is padded; GPT-2 goes without, for what is
    padded stands behind.
    """
    real_BT = real_positions(lengths_B, token_ids_BT.shape[1])
    labels_BT = torch.where(real_BT, token_ids_BT, IGNORED_LABEL)
    next_is_real_BT = torch.zeros_like(real_BT)
    next_is_real_BT[:, :-1] = real_BT[:, 1:]
    real = _positions(real_BT)
    rows = {"real": real, "distilled": real, "next": _positions(next_is_real_BT)}
    mask_BT = real_BT.long() if with_mask and not real_BT.all() else None
    return MicroBatch(number, token_ids_BT, mask_BT, labels_BT, rows, len(real))


def _positions(selected_BT: torch.Tensor) -> torch.Tensor:
    return selected_BT.flatten().nonzero()[:, 0]


def label_of_row(kind: str, labels_BT: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor | None:
    """Return the id to be predicted at each row: its own label, the next position's ("next"), or
    None.
    """
    if kind == "masked":
        return labels_BT.flatten()[rows_N]
    if kind == "next":
        return labels_BT.flatten()[rows_N + 1]
    return None


# --------------------------------------------------------------------------------------------------
# Student, head and losses as one module
# --------------------------------------------------------------------------------------------------


class DistillationModel(nn.Module):
    """Student, prediction head and losses: forward returns the loss of a micro-batch. It alone is
    wrapped by DDP.

    head, head_parameters: the student's projection from hidden states to logits, and the parameters
    it reads.
    alphas: weight of each objective (rows of LOSSES); those of weight 0 cost nothing.
    """

    def __init__(
        self,
        student: nn.Module,
        head: Head,
        head_parameters: Sequence[nn.Parameter],
        alphas: Mapping[str, float],
        temperature: float,
        chunk_rows: int | None = None,
        fast_head: bool = True,
    ):
        super().__init__()
        self.student = student
        self.head = head
        self.head_parameters = list(head_parameters)
        self.alphas = {name: alpha for name, alpha in alphas.items() if alpha > 0}
        self.temperature = temperature
        self.chunk_rows = chunk_rows
        # Where the head is more than layers and one linear map, or the plain version is asked for,
        # autograd does it all.
        self.uses_fast_head = fast_head and hasattr(head, "projection")
        self.compiles_head = False

    @property
    def tied_weight(self) -> torch.Tensor | None:
        """The weights that the fast head gives a gradient to, in every backward; the student's
        embedding may share them.
        """
        weight = (
            self.head.projection.weight if self.uses_fast_head and self._active("logits") else None
        )
        return weight if weight is not None and weight.requires_grad else None

    @property
    def needs_teacher(self) -> bool:
        """True where an active objective reads the teacher."""
        return any(LOSSES[name].needs_teacher for name in self.alphas)

    def forward(
        self,
        batch: MicroBatch | None,
        teacher_hidden_BTD,
        teacher_head: Head | None,
        scale: float | torch.Tensor,
        counts_K: torch.Tensor | None = None,
    ):
        """Return (scale x weighted loss, unweighted losses_K in the order of alphas).

        A loss is the sum over its rows, divided by their number in this batch, or by counts_K where
        given. batch None: a rank without a micro-batch takes part in the gradient exchange with
        zeros.
        """
        if batch is None:
            touched = [
                parameter.flatten()[0] for parameter in self.parameters() if parameter.requires_grad
            ]
            return torch.stack(touched).sum() * 0.0, None
        hidden_ND = last_hidden_state(self.student, batch).flatten(0, 1)
        teacher_ND = None if teacher_hidden_BTD is None else teacher_hidden_BTD.flatten(0, 1)
        own = [max(len(batch.rows[LOSSES[name].rows]), 1) for name in self.alphas]
        counts = dict(zip(self.alphas, own if counts_K is None else counts_K, strict=True))
        total, means = self._logit_losses(batch, hidden_ND, teacher_ND, teacher_head, scale, counts)
        for name in self._active("hidden"):
            loss, rows_N = LOSSES[name], _copied(batch.rows[LOSSES[name].rows], hidden_ND.device)
            teacher_rows_ND = None if teacher_ND is None else at_least_float32(teacher_ND[rows_N])
            student_rows_ND = at_least_float32(hidden_ND[rows_N])
            mean = (
                loss.formula(student_rows_ND, teacher_rows_ND, None, self.temperature)
                / counts[name]
            )
            total = total + mean * (self.alphas[name] * scale)
            means[name] = mean.detach()
        return total, torch.stack([means[name] for name in self.alphas])

    @staticmethod
    def _projection(head, hidden_ND: torch.Tensor) -> Projection:
        return Projection(head.transform(hidden_ND), head.projection.weight, head.projection.bias)

    def _active(self, reads: str) -> list[str]:
        return [name for name in self.alphas if LOSSES[name].reads == reads]

    def _logit_losses(
        self, batch: MicroBatch, hidden_ND, teacher_ND, teacher_head, scale, counts: Mapping
    ):
        """Select once the rows that any logit objective reads, project them, apply the
        objectives.
        """
        names = self._active("logits")
        if not names:
            return hidden_ND[:0].sum(), {}
        selection = batch.selection or self.select(batch)
        selected_N = _copied(selection.rows_N, hidden_ND.device)
        terms = [
            self._term(name, selection, scale / counts[name], hidden_ND.device) for name in names
        ]
        reads_teacher = any(LOSSES[name].needs_teacher for name in names)
        student_ND = hidden_ND[selected_N]
        teacher_ND = teacher_ND[selected_N] if reads_teacher else None
        if self.uses_fast_head:
            with torch.no_grad():
                teacher = self._projection(teacher_head, teacher_ND) if reads_teacher else None
            student = self._projection(self.head, student_ND)
            total, sums_K = projected_losses(
                student, teacher, terms, self.temperature, self.chunk_rows, self.compiles_head
            )
        else:
            total, sums_K = head_losses(
                self.head,
                self.head_parameters,
                student_ND,
                teacher_head if reads_teacher else None,
                teacher_ND,
                terms,
                self.temperature,
                self.chunk_rows or rows_per_chunk(hidden_ND.device.type),
            )
        return total, {
            name: value / counts[name] for name, value in zip(names, sums_K, strict=True)
        }

    def select(self, batch: MicroBatch) -> Selection:
        """Find on the host what the active logit objectives read of a micro-batch."""
        rows = {name: batch.rows[LOSSES[name].rows] for name in self._active("logits")}
        rows_N = (
            torch.cat(list(rows.values())).unique() if rows else torch.zeros(0, dtype=torch.int64)
        )  # ascending
        offsets = {name: torch.searchsorted(rows_N, own_N) for name, own_N in rows.items()}
        labels = {
            name: label_of_row(LOSSES[name].rows, batch.labels_BT, own_N)
            for name, own_N in rows.items()
        }
        return Selection(rows_N, offsets, labels)

    def _term(self, name: str, selection: Selection, scale, device: torch.device) -> Term:
        loss, offsets, labels_N = LOSSES[name], selection.offsets[name], selection.labels[name]
        return Term(
            loss.formula,
            _copied(offsets, device),
            offsets,
            None if labels_N is None else _copied(labels_N, device),
            self.alphas[name] * scale,
            loss.gradient,
            loss.by_row,
        )


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device without waiting for it; from page-locked memory (see MicroBatch.pinned) the
    host goes on at once.
    """
    return tensor.to(device, non_blocking=True)


# Families whose attention reads nothing of a mask but who may be attended to, and takes one of (B,
# 1, T, T) as it is.
PLAIN_ATTENTION = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra"}


def last_hidden_state(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Run a language model without its prediction head: hidden states (B, T, D), for GPT-2 after
    the final norm.

    No token types are passed, and no mask where nothing is padded.
    """
    device = next(model.parameters()).device
    input_ids_BT = _copied(batch.input_ids_BT, device)
    options = {"use_cache": False} if batch.is_causal else {}
    if batch.attention_mask_BT is not None and batch.is_padded:
        options["attention_mask"] = _attention_mask(
            model.config, _copied(batch.attention_mask_BT, device)
        )
    return model.base_model(input_ids_BT, **options).last_hidden_state


def _attention_mask(config, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the mask as a model takes it: made ready here where that is known to be the same, (B,
    1, T, T).

    Of a (B, T) one transformers asks first whether all of it is 1, for which the host waits.
    """
    if config.model_type not in PLAIN_ATTENTION or config._attn_implementation != "sdpa":
        return mask_BT
    return mask_BT.bool()[:, None, None, :].expand(-1, 1, mask_BT.shape[1], -1)


CAUSAL_ATTENTION = "sdpa_causal"  # our name of it; no configuration file has it


def attend_without_masks(model: nn.Module) -> None:
    """Have GPT-2, called without a mask, attend through SDPA's own causal one.

    transformers would look at the positions first, for packed sequences: the host waits for that,
    and compiled it makes a mask always, with which no fused kernel runs.
    """
    if model.config.model_type == "gpt2" and model.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
        model.set_attn_implementation(CAUSAL_ATTENTION)


# --------------------------------------------------------------------------------------------------
# The step
# --------------------------------------------------------------------------------------------------


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight became NaN or infinite; the update was not applied, or nothing was
    saved.

    numbers: the micro-batches in question. is_located: they are the culprits, and not all that may
    be.
    """

    def __init__(self, message: str, numbers: Sequence[int] = (), is_located: bool = False):
        super().__init__(message)
        self.numbers, self.is_located = list(numbers), is_located


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What an update did. losses_MK: float64, each micro-batch's weighted loss, then its unweighted
    terms.

    num_asking: ranks that asked to stop after it; the same on every rank.
    """

    losses_MK: torch.Tensor
    grad_norm: float
    grad_statistics: dict[str, tuple[float, float]]
    num_asking: int = 0


class BegunStep:
    """An update that the device was given, and may still compute.

    read() waits for it: its StepReport, or NonFiniteError, on every rank alike, where it was not
    applied.
    """

    def __init__(self, read: Callable[[], StepReport]):
        self._read, self._report = read, None

    def read(self) -> StepReport:
        """Return the report; the same at every call."""
        if self._report is None:
            self._report = self._read()
        return self._report


class Distiller:
    """Update a student towards its teacher.

    model: the DistillationModel. teacher, teacher_head: None where no teacher is used. optimizer,
    schedule: stepped once an update. max_grad_norm: gradients' norm is clipped to it. seed: keys
    dropout by micro-batch. world_size: ranks that share an update. amp_dtype: None, or the dtype of
    torch's mixed precision, to which the teacher is converted.
    normalization: "micro_batches" takes the mean over each micro-batch's rows, then over the
    update's micro-batches, as in 2019; "tokens" the mean over the update's rows, so that every
    token counts alike however the update is cut up.
    compiles: run teacher, student and the head's element-wise part through torch.compile. waits:
    read what an update gave before the optimizer is stepped; False: the device itself leaves out
    what is not finite, and all updates after it, and the host reads when it likes. None: False on a
    GPU, but for float16, whose overflows change the schedule, and for optimizers that cannot leave
    out an update.
    """

    def __init__(
        self,
        model: DistillationModel,
        teacher: nn.Module | None,
        teacher_head: Head | None,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        *,
        max_grad_norm: float,
        seed: int,
        world_size: int = 1,
        amp_dtype: torch.dtype | None = None,
        normalization: str = "micro_batches",
        compiles: bool = False,
        waits: bool | None = None,
    ):
        self.model = model
        self.teacher, self.teacher_head = (
            (teacher, teacher_head) if model.needs_teacher else (None, None)
        )
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.world_size = world_size
        self.amp_dtype = amp_dtype
        self.normalization = normalization
        if amp_dtype is not None and self.teacher is not None:
            self.teacher.to(amp_dtype)
        for module in filter(None, (model.student, self.teacher)):
            attend_without_masks(module)
        if compiles:
            for module in filter(None, (model.student, self.teacher)):
                module.base_model.compile(dynamic=True)  # in place: parameters keep their names
        model.compiles_head = compiles
        self.device = next(model.parameters()).device
        self.has_cpu_kernels = self.device.type == "cpu" and not compiles
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        can_skip = (
            getattr(optimizer, "_step_supports_amp_scaling", False) and not self.scaler.is_enabled()
        )
        self.waits = not can_skip or (self.device.type == "cpu" if waits is None else waits)
        self.alphas_K = torch.tensor(
            list(model.alphas.values()), dtype=torch.float64, device=self.device
        )
        self.is_broken = torch.zeros(
            (), device=self.device
        )  # 1 from an update on that was not finite
        self.wrapped = _wrap_for_ranks(model) if world_size > 1 else model
        if world_size > 1:
            self._settle_buckets()

    def ready(self, batch: MicroBatch) -> MicroBatch:
        """Do on the host what the step needs of a batch beforehand, in a loader's thread: it then
        waits for nothing.
        """
        batch = dataclasses.replace(batch, selection=self.model.select(batch))
        return batch.pinned() if self.device.type == "cuda" else batch

    def step(
        self,
        batches: Iterable[MicroBatch],
        numbers: Sequence[int],
        num_mine: int,
        wants_statistics: bool = False,
        asks_to_stop: Callable[[], bool] = lambda: False,
    ) -> StepReport:
        """Do one update and wait for it: see begin_step. Raises NonFiniteError."""
        return self.begin_step(batches, numbers, num_mine, wants_statistics, asks_to_stop).read()

    def begin_step(
        self,
        batches: Iterable[MicroBatch],
        numbers: Sequence[int],
        num_mine: int,
        wants_statistics: bool = False,
        asks_to_stop: Callable[[], bool] = lambda: False,
    ) -> BegunStep:
        """Give the device one update over the micro-batches `numbers`, of which this rank computes
        `batches` (num_mine).

        The gradient is the mean over all of the update's micro-batches, on whichever rank.
        asks_to_stop: asked after the last micro-batch, and told to all ranks with the losses. Where
        the distiller waits, NonFiniteError is raised here.
        """
        self.optimizer.zero_grad(set_to_none=True)
        shared = self._accumulate(batches, numbers, num_mine, asks_to_stop)
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        statistics = self._grad_statistics() if wants_statistics else {}
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        begun = BegunStep(
            functools.partial(self._report, _OnHost(shared), _OnHost(norm), numbers, statistics)
        )
        # Differs from the original: nothing non-finite is applied. 2019 ended with exit status 0.
        if self.waits:
            is_applied = math.isfinite(begun.read().grad_norm)
            self.scaler.step(
                self.optimizer
            )  # skips where the gradient overflowed in half precision
            self.scaler.update()
        else:
            is_applied = True
            self._step_if_finite(shared, norm)
        if self.schedule is not None and is_applied:
            self.schedule.step()
        return begun

    def _step_if_finite(self, shared: torch.Tensor, norm: torch.Tensor) -> None:
        """Step the optimizer unless this update, or one since the host last looked, is not finite:
        decided by the device.
        """
        is_finite = torch.isfinite(shared).all() & torch.isfinite(norm)
        self.is_broken.copy_(torch.maximum(self.is_broken, (~is_finite).float()))
        self.optimizer.found_inf = self.is_broken  # as a gradient scaler tells it
        self.optimizer.step()
        del self.optimizer.found_inf

    def _report(
        self, shared: "_OnHost", norm: "_OnHost", numbers: Sequence[int], statistics: dict
    ) -> StepReport:
        """Say what an update gave, once it is there. Raises NonFiniteError."""
        losses_MK, num_asking, norm = (
            shared.read()[:-1],
            int(shared.read()[-1, 0]),
            norm.read().item(),
        )
        try:
            self._check_losses(losses_MK, numbers)
            if not math.isfinite(norm):
                self._check_overflow(norm, numbers)
                statistics = {}
        except NonFiniteError:
            self.is_broken.zero_()
            raise
        return StepReport(losses_MK, norm, statistics, num_asking)

    def accumulate(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> torch.Tensor:
        """Leave the update's mean gradient in .grad; return every rank's losses_MK. One gradient
        all-reduce.
        """
        return self._accumulate(batches, numbers, num_mine).cpu()[:-1]

    def _accumulate(
        self,
        batches: Iterable[MicroBatch],
        numbers: Sequence[int],
        num_mine: int,
        asks_to_stop: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """Do as `accumulate`; return losses_MK on the device, with a last row whose first entry
        counts who asks to stop.
        """
        self.model.train()
        # Differs from the original: a last partial update is divided by its own size.
        share, counts_K = self.world_size / len(numbers), None  # DDP takes the mean over ranks
        if self.normalization == "tokens":
            batches = list(
                batches
            )  # all of the update's masks are drawn before the first is counted in
            counts_K = self._count_rows(batches) / len(numbers)
        scale = (
            self.scaler.scale(torch.full((), share, device=self.device))
            if self.scaler.is_enabled()
            else share
        )
        shared = torch.zeros(
            len(numbers) + 1, 1 + len(self.model.alphas), dtype=torch.float64, device=self.device
        )
        losses_MK = shared[:-1]
        for done, batch in enumerate(batches, start=1):
            # Differs from the original: gradients travel once an update, not with each micro-batch.
            with self._without_reduction(done < num_mine):
                means_K = self._backward(batch, scale, counts_K)
            losses_MK[batch.number - numbers[0], 1:] = means_K
        if num_mine == 0:
            self.wrapped(None, None, None, scale)[0].backward()
        shared[-1, 0] = float(asks_to_stop())
        if self.world_size > 1:
            torch.distributed.all_reduce(shared)
        losses_MK[:, 0] = losses_MK[:, 1:] @ self.alphas_K
        return shared

    def _count_rows(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Count the rows of each objective in the whole update, on every rank: (K,), 1 at least."""
        rows = [LOSSES[name].rows for name in self.model.alphas]
        counts = [sum(len(batch.rows[kind]) for batch in batches) for kind in rows]
        counts_K = torch.tensor(counts, dtype=torch.float64)
        counts_K = _copied(
            counts_K.pin_memory() if self.device.type == "cuda" else counts_K, self.device
        )
        if self.world_size > 1:
            torch.distributed.all_reduce(counts_K)
        return counts_K.clamp(min=1)

    def _settle_buckets(self) -> None:
        """Exchange zeros once: after its first backward DDP lays out anew in which order gradients
        are summed.

        Three ranks or more would sum otherwise in the first update of a run that goes on than in
        the same update of one that was never stopped, which differs by rounding.
        """
        self.wrapped(None, None, None, 1.0)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _without_reduction(self, is_wanted: bool) -> contextlib.AbstractContextManager:
        return (
            self.wrapped.no_sync()
            if is_wanted and self.world_size > 1
            else contextlib.nullcontext()
        )

    def _backward(self, batch: MicroBatch, scale, counts_K: torch.Tensor | None) -> torch.Tensor:
        torch.manual_seed(keyed_seed(self.seed, batch.number, "dropout"))
        tied = (
            TiedGradient(self.model.tied_weight)
            if self.has_cpu_kernels and self.model.tied_weight is not None
            else None
        )
        with tied or contextlib.nullcontext():
            with faster(tied) if self.has_cpu_kernels else contextlib.nullcontext():
                hidden_BTD = self._teacher_hidden(batch)
                with torch.autocast(
                    self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
                ):
                    loss, means_K = self.wrapped(
                        batch, hidden_BTD, self.teacher_head, scale, counts_K
                    )
            loss.backward()
        return means_K

    @torch.no_grad()
    def _teacher_hidden(self, batch: MicroBatch) -> torch.Tensor | None:
        return None if self.teacher is None else last_hidden_state(self.teacher, batch)

    def _check_losses(self, losses_MK: torch.Tensor, numbers: Sequence[int]) -> None:
        wrong = (~torch.isfinite(losses_MK[:, 1:])).nonzero().tolist()
        if wrong:
            place, column = wrong[0]
            name, value = list(self.model.alphas)[column], losses_MK[place, column + 1].item()
            message = (
                f"loss_{name} became {value} in micro-batch {numbers[place]}; the update was not"
                " applied"
            )
            raise NonFiniteError(
                message, sorted({numbers[row] for row, _ in wrong}), is_located=True
            )

    def _check_overflow(self, norm: float, numbers: Sequence[int]) -> None:
        """Leave a gradient that overflowed half precision to the scaler while it has smaller scales
        to try; else stop.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() >= MIN_LOSS_SCALE:
            return
        where = f"micro-batches {numbers[0]} to {numbers[-1]}"
        raise NonFiniteError(
            f"the gradient norm became {norm} in {where}; the update was not applied", numbers
        )

    def non_finite_gradients(self, batches: Iterable[MicroBatch]) -> dict[int, str]:
        """Compute this rank's micro-batches again, one objective at a time: number -> what is not
        finite in its gradient.

        For the post-mortem of an update whose gradient was not; nothing is exchanged between ranks.
        """
        alphas, found = self.model.alphas, {}
        for batch in batches:
            batch = dataclasses.replace(batch, selection=None)  # each objective selects its own
            for name in alphas:
                self.optimizer.zero_grad(set_to_none=True)
                self.model.alphas = {name: alphas[name]}
                with self._without_reduction(True):
                    self._backward(batch, 1.0, None)
                wrong = [
                    n for n, p in self.model.student.named_parameters() if not _is_finite(p.grad)
                ]
                if wrong:
                    found.setdefault(
                        batch.number,
                        f"loss_{name}'s gradient for {wrong[0]} and {len(wrong) - 1} others",
                    )
        self.model.alphas = alphas
        self.optimizer.zero_grad(set_to_none=True)
        return found

    # ---- what a run needs to go on ---------------------------------------------------------------

    def check_finite(self) -> None:
        """Raise NonFiniteError where a weight or moment is not finite: nothing of the kind is
        saved.
        """
        for name, content in self.tensors().items():
            for key, tensor in content.items():
                if not _is_finite(tensor):
                    raise NonFiniteError(
                        f"{key} of the {name} became NaN or infinite; nothing of it was saved"
                    )

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the student's state, tied tensors once, and the optimizer's by parameter:
        "exp_avg/NAME" and so on.
        """
        student, names = {}, {}
        for name, tensor in self.model.student.state_dict().items():
            names.setdefault(tensor.data_ptr(), name)
            if names[tensor.data_ptr()] == name:
                student[name] = tensor
        states = (
            (name, self.optimizer.state.get(p, {}))
            for name, p in self.model.student.named_parameters()
        )
        return {
            "student": student,
            "optimizer": {
                f"{kind}/{name}": value for name, state in states for kind, value in state.items()
            },
        }

    def values(self) -> dict:
        """Return the state of schedule and gradient scaler, as numbers."""
        schedule = {} if self.schedule is None else self.schedule.state_dict()
        schedule = {
            name: value
            for name, value in schedule.items()
            if isinstance(value, (int, float)) or name == "_last_lr"
        }
        return {"schedule": schedule, "scaler": self.scaler.state_dict()}

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], values: Mapping) -> None:
        """Take the state that `tensors` and `values` returned. Raises ValueError where it is
        another model's.
        """
        own = self.tensors()["student"]
        _require_same_shapes(tensors["student"], own)
        parameters = dict(self.model.student.named_parameters())
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors["student"][name])
        for key, value in tensors["optimizer"].items():
            kind, name = key.split("/", 1)
            self.optimizer.state[parameters[name]][kind] = value.to(self.device)
        if self.schedule is not None:
            self.schedule.load_state_dict(
                {**values["schedule"], "lr_lambdas": [None] * len(self.optimizer.param_groups)}
            )
            for group, rate in zip(
                self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True
            ):
                group["lr"] = rate
        self.scaler.load_state_dict(values["scaler"])

    def _grad_statistics(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each parameter's accumulated gradient, before clipping."""
        return {
            name: (
                parameter.grad.mean().item(),
                parameter.grad.std(correction=int(parameter.numel() > 1)).item(),
            )
            for name, parameter in self.model.student.named_parameters()
            if parameter.grad is not None
        }


class _OnHost:
    """A copy of a device's tensor that is on its way to the host."""

    def __init__(self, tensor: torch.Tensor):
        self.event = torch.cuda.Event() if tensor.device.type == "cuda" else None
        if self.event is None:
            self.tensor = tensor.clone()
            return
        self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.tensor.copy_(tensor, non_blocking=True)
        self.event.record()

    def read(self) -> torch.Tensor:
        """Wait for it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


def _is_finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


def _require_same_shapes(
    given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> None:
    for name in [*own, *given]:
        found, expected = (
            list(state[name].shape) if name in state else "nothing" for state in (given, own)
        )
        if found != expected:
            raise ValueError(f"{name}: {found} in the checkpoint, {expected} in this run's student")


def _wrap_for_ranks(model: DistillationModel) -> DistributedDataParallel:
    # Buffers are constants (position ids), the same on every rank: no broadcast.
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def recompute_activations(student: nn.Module, compiles: bool = False) -> None:
    """Save a layer's inputs only, and compute the rest again in backward: as it was computed, see
    `cpu_kernels`.
    """
    contexts = {} if compiles else {"context_fn": checkpointing_contexts}
    student.activation_checkpointing_enable({"use_reentrant": False, **contexts})


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """Make the moments now, before anything short-lived: made in the first update they would lie
    scattered among it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros(
                (), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu"
            )
            optimizer.state[parameter] = {"step": step, **moments}


def split_for_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group the trained parameters: decayed, and not decayed (biases and layer norms). Embeddings
    are decayed.

    Differs from the original: layer norms are told by their module. 2019 looked for the text
    "LayerNorm.weight", and so decayed DistilBERT's, GPT-2's and the RoBERTa head's.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__.endswith("Norm")
        for parameter in module.parameters(recurse=False)
    }
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = id(parameter) in norms or name.split(".")[-1] == "bias"
            (kept if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
