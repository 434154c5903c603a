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
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distil.data.batches import MicroBatch, Selection, label_of_row, to_device
from distil.kernels.cpu import TiedGradient, faster
from distil.kernels.head import Projection, Term, head_losses, projected_losses, rows_per_chunk
from distil.losses import LOSSES, at_least_float32
from distil.models.forward import attend_without_masks, last_hidden_state
from distil.models.heads import Head
from utils import keyed_seed

NORMALIZATIONS = ("micro_batches", "tokens")
MIN_LOSS_SCALE = (
    2**-10
)  # the scaler halves its scale at each overflow; below this it will not find one that fits

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
            loss, rows_N = LOSSES[name], to_device(batch.rows[LOSSES[name].rows], hidden_ND.device)
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
        selected_N = to_device(selection.rows_N, hidden_ND.device)
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
            to_device(offsets, device),
            offsets,
            None if labels_N is None else to_device(labels_N, device),
            self.alphas[name] * scale,
            loss.gradient,
            loss.by_row,
        )


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
        counts_K = to_device(
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
