"""The method: student, head and objectives as one module, and an update over micro-batches.

Flow: micro-batches (distil/data/batches.py) -> teacher's and student's last hidden states -> the
rows that objectives read, selected once -> losses -> one backward a pass (of one micro-batch, or
of several joined), one gradient all-reduce, clip, update.

Source: Sanh et al., 2019, "DistilBERT, a distilled version of BERT", sections 2 and 3.

Shape suffixes: B sequences, T padded length, N selected positions, V vocabulary, D width, M
micro-batches (of a pass, of an update), K losses.
"""

import contextlib
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distil.data.batches import MicroBatch, Selection, select_rows, sent, to_device
from distil.kernels.cpu import TiedGradient, faster
from distil.kernels.head import apply_terms
from distil.kernels.terms import terms_of_micro_batches
from distil.models.checks import is_finite
from distil.models.forward import attend_without_masks, layers_read, read_outputs, select
from distil.models.heads import Head, head_parameters, prediction_head
from distil.objectives import LOSSES
from distil.system.compiler import compiles_on_gpu
from distil.system.prefetch import OnHost
from distil.training.log import gradient_statistics
from distil.training.post_mortem import NonFiniteError, check_losses
from distil.training.reports import PendingUpdate, StepReport
from distil.training.state import (
    Tensors,
    load_tensors,
    load_values,
    state_tensors,
    state_values,
)
from distil.training.unused import fill_missing_gradients, reaching_all
from utils import and_others, keyed_seed

MIN_LOSS_SCALE = 2**-10  # below this scale the gradient scaler will not find one that fits


class DistillationModel(nn.Module):
    """Student, prediction head and objectives; forward gives a pass's loss.

    It alone is wrapped by DDP. alphas: weight of each row of LOSSES; weight 0 costs nothing. head:
    the student's projection from hidden states to logits, found where not given. teacher, options:
    needed by objectives with modules. chunk_rows: rows of logits made at once; None: by the device.
    fast_head: False = the plain head, which is the reference.
    """

    def __init__(
        self,
        student: nn.Module,
        alphas: Mapping[str, float],
        temperature: float,
        *,
        head: Head | None = None,
        teacher: nn.Module | None = None,
        options: Mapping[str, Any] = types.MappingProxyType({}),
        chunk_rows: int | None = None,
        fast_head: bool = True,
    ):
        super().__init__()
        self.student = student
        self.head = prediction_head(student) if head is None else head
        self.head_parameters = head_parameters(student)
        self.alphas = {name: alpha for name, alpha in alphas.items() if alpha > 0}
        self.temperature = temperature
        self.chunk_rows = chunk_rows
        # A head that is more than layers and one linear map is left to autograd.
        self.uses_fast_head = fast_head and hasattr(self.head, "projection")
        self.compiles_head = False
        makers = {name: LOSSES[name] for name in self.alphas if LOSSES[name].make_module}
        self.objectives = nn.ModuleDict(
            {name: loss.module(student, teacher, options) for name, loss in makers.items()}
        )

    @property
    def tied_weight(self) -> torch.Tensor | None:
        """The weight that the fast head gives a gradient to; the embedding may share it."""
        if not (self.uses_fast_head and self._active("logits")):
            return None
        weight = self.head.projection.weight
        return weight if weight.requires_grad else None

    @property
    def readings(self) -> dict[str, set[int]]:
        """Rows of READINGS that the active objectives need, with the student's layers to read."""
        return layers_read(self.alphas, self.objectives, side=0)

    @torch.no_grad()
    def read_teacher(self, teacher: nn.Module | None, batch: MicroBatch) -> dict[str, Any]:
        """Run a teacher, if there is one, and return what the active objectives read of it."""
        readings = layers_read(self.alphas, self.objectives, side=1)
        return {} if teacher is None else read_outputs(teacher, batch, readings)

    @property
    def needs_teacher(self) -> bool:
        """True where an active objective reads the teacher."""
        return any(LOSSES[name].needs_teacher for name in self.alphas)

    def _active(self, reads: str) -> list[str]:
        return [name for name in self.alphas if LOSSES[name].reads == reads]

    def forward(
        self,
        batch: MicroBatch | None,
        teacher_read: Mapping[str, Any],
        teacher_head: Head | None,
        scale: float | torch.Tensor,
        counts_K: torch.Tensor | None = None,
    ):
        """Return (scale x weighted loss, unweighted losses_MK in the order of alphas).

        teacher_read: the teacher's outputs by reading, (B, T, ..), where it runs. A loss is the sum
        over a micro-batch's rows, divided by their number, or by counts_K where given; the weighted
        loss adds up the pass's micro-batches. batch None: a rank without a pass joins the gradient
        exchange with zeros.
        """
        if batch is None:
            return reaching_all(None, self.parameters()), None
        read = read_outputs(self.student, batch, self.readings)
        hidden_ND = read["hidden"].flatten(0, 1)
        teacher_ND = teacher_read["hidden"].flatten(0, 1) if teacher_read else None
        if counts_K is None:
            kinds = [LOSSES[name].rows for name in self.alphas]
            counts = [[max(num, 1) for num in batch.num_rows(kind)] for kind in kinds]
        else:
            counts = [[count] * len(batch.parts) for count in counts_K]
        counts = dict(zip(self.alphas, counts, strict=True))
        total, means = self._logit_losses(batch, hidden_ND, teacher_ND, teacher_head, scale, counts)
        for name in (name for name in self.alphas if LOSSES[name].reads != "logits"):
            sums = self._output_sums(name, batch, read, teacher_read)
            means[name] = [value / count for value, count in zip(sums, counts[name], strict=True)]
            for value in means[name]:
                total = total + value * (self.alphas[name] * scale)
        losses = [torch.stack(means[name]).detach() for name in self.alphas]
        return total, torch.stack(losses, dim=1)

    def _output_sums(self, name: str, batch: MicroBatch, own: Mapping, others: Mapping) -> list:
        """Sum an objective on what it reads of both models over each micro-batch's rows."""
        loss = LOSSES[name]
        pairs = zip(
            *(select(loss.reads, read, batch, loss.rows) for read in (own, others)), strict=True
        )
        module = [self.objectives[name]] if name in self.objectives else []
        return [loss.formula(*pair, None, self.temperature, *module) for pair in pairs]

    def _logit_losses(
        self, batch: MicroBatch, hidden_ND, teacher_ND, teacher_head, scale, counts: Mapping
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Project once the rows that any logit objective reads: (weighted total, means by name)."""
        names = self._active("logits")
        if not names:
            return hidden_ND[:0].sum(), {}
        selection = batch.selection or self.select(batch)
        selected_N, terms = to_device(selection.rows_N, hidden_ND.device), []
        for name in names:
            weights = [self.alphas[name] * (scale / count) for count in counts[name]]
            rows = batch.num_rows(LOSSES[name].rows), selection.offsets[name]
            rows += selection.labels[name], hidden_ND.device
            terms += terms_of_micro_batches(LOSSES[name], weights, *rows)
        student = self.head, self.head_parameters, hidden_ND[selected_N]
        reads_teacher = any(LOSSES[name].needs_teacher for name in names)
        teacher = (teacher_head, teacher_ND[selected_N]) if reads_teacher else (None, None)
        way = self.chunk_rows, self.uses_fast_head, self.compiles_head
        total, sums_K = apply_terms(*student, *teacher, terms, self.temperature, *way)
        sums = iter(sums_K)
        return total, {name: [next(sums) / count for count in counts[name]] for name in names}

    def select(self, batch: MicroBatch) -> Selection:
        """Find on the host the rows of a micro-batch that the active logit objectives read."""
        return select_rows(batch, {name: LOSSES[name].rows for name in self._active("logits")})


# --------------------------------------------------------------------------------------------------
# The update
# --------------------------------------------------------------------------------------------------


class Distiller:
    """Update a student towards its teacher.

    teacher: None where no objective reads one. teacher_head: hidden states to the logits compared;
    None: all. optimizer, schedule: stepped once an update.
    max_grad_norm: bound of the gradient's norm. seed: keys dropout by pass. world_size:
    ranks that share an update. amp_dtype: None, or the dtype of mixed precision, to which the
    teacher is converted. normalization: "micro_batches" = the mean over each micro-batch's rows,
    then over the update's micro-batches, as in 2019; "tokens" = the mean over the update's rows.
    compiles: run teacher and student through torch.compile; on a GPU the objectives always are.

    waits: read each update before the optimizer is stepped. False: the device skips an update that
    is not finite, and all after it, and the host reads later. None: False on a GPU, but for
    float16, whose overflows change the schedule, and for optimizers that cannot skip.
    """

    def __init__(
        self,
        model: DistillationModel,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        *,
        teacher_head: Head | None = None,
        max_grad_norm: float,
        seed: int,
        world_size: int = 1,
        amp_dtype: torch.dtype | None = None,
        normalization: str = "micro_batches",
        compiles: bool = False,
        waits: bool | None = None,
    ):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.teacher = teacher if model.needs_teacher else None
        own_head = None if self.teacher is None else prediction_head(self.teacher)
        self.teacher_head = teacher_head or own_head
        model.uses_fast_head &= own_head is None or hasattr(self.teacher_head, "projection")
        self.max_grad_norm, self.seed, self.world_size = max_grad_norm, seed, world_size
        self.amp_dtype, self.normalization = amp_dtype, normalization
        if amp_dtype is not None and self.teacher is not None:
            self.teacher.to(amp_dtype)
        for module in filter(None, (model.student, self.teacher)):
            attend_without_masks(module)
            if compiles:
                module.base_model.compile(dynamic=True)  # in place: parameters keep their names
        self.device = next(model.parameters()).device
        model.compiles_head = compiles or compiles_on_gpu(self.device)
        self.has_cpu_kernels = self.device.type == "cpu" and not compiles
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        can_skip = (
            getattr(optimizer, "_step_supports_amp_scaling", False) and amp_dtype != torch.float16
        )
        self.waits = not can_skip or (self.device.type == "cpu" if waits is None else waits)
        self.alphas_K = torch.tensor([*model.alphas.values()], dtype=torch.float64).to(self.device)
        self.is_broken = torch.zeros((), device=self.device)  # 1 once an update was not finite
        self.wrapped: nn.Module = model
        if world_size > 1:
            # Buffers are constants (position ids), the same on every rank: no broadcast.
            self.wrapped = DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
            self._settle_buckets()

    def ready(self, batch: MicroBatch) -> MicroBatch:
        """Prepare a batch on the host, in a loader's thread, so that the step waits for nothing."""
        batch = dataclasses.replace(batch, selection=self.model.select(batch))
        return batch.pinned() if self.device.type == "cuda" else batch

    def step(self, batches, numbers, num_mine: int, wants_statistics: bool = False) -> StepReport:
        """Launch an update and wait for it: see `launch`. Raises NonFiniteError."""
        return self.launch(batches, numbers, num_mine, wants_statistics).read()

    def launch(
        self,
        batches: Iterable[MicroBatch],
        numbers: Sequence[int],
        num_mine: int,
        wants_statistics: bool = False,
        asks_to_stop: Callable[[], bool] = lambda: False,
    ) -> PendingUpdate:
        """Launch one update over the micro-batches `numbers`, without waiting for the device.

        batches: the num_mine passes over them that this rank computes. The gradient is the mean
        over all of the update's micro-batches, on whichever rank. asks_to_stop: asked after the
        last pass, and told to all ranks with the losses. Raises NonFiniteError where the distiller
        waits.
        """
        self.optimizer.zero_grad(set_to_none=True)
        shared = self._accumulate(batches, numbers, num_mine, asks_to_stop)
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        statistics = gradient_statistics(self.model.student) if wants_statistics else {}
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        found = OnHost(shared), OnHost(norm), numbers, statistics
        pending = PendingUpdate(functools.partial(self._report, *found))
        # Differs from the original: nothing non-finite is applied. 2019 ended with exit status 0.
        is_applied = True
        if self.waits:
            is_applied = math.isfinite(pending.read().grad_norm)
            self.scaler.step(self.optimizer)  # skips where the gradient overflowed in float16
            self.scaler.update()
        else:
            self._step_if_finite(shared, norm)
        if self.schedule is not None and is_applied:
            self.schedule.step()
        return pending

    def _step_if_finite(self, shared: torch.Tensor, norm: torch.Tensor) -> None:
        """Step the optimizer unless this update, or one since the last read, is not finite.

        The device decides, so that the host need not wait.
        """
        update_is_finite = torch.isfinite(shared).all() & torch.isfinite(norm)
        self.is_broken.copy_(torch.maximum(self.is_broken, (~update_is_finite).float()))
        self.optimizer.found_inf = self.is_broken  # as a gradient scaler tells it
        self.optimizer.step()
        del self.optimizer.found_inf

    def _report(
        self, shared: OnHost, norm: OnHost, numbers: Sequence[int], statistics: dict
    ) -> StepReport:
        """Read an update's result once it is there. Raises NonFiniteError."""
        losses_MK, num_asking = shared.read()[:-1], int(shared.read()[-1, 0])
        grad_norm = norm.read().item()
        try:
            check_losses(losses_MK, list(self.model.alphas), numbers)
            if not math.isfinite(grad_norm):
                self._check_overflow(grad_norm, numbers)
                statistics = {}
        except NonFiniteError:
            self.is_broken.zero_()
            raise
        return StepReport(losses_MK, grad_norm, statistics, num_asking)

    def accumulate(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> torch.Tensor:
        """Leave the update's mean gradient in .grad, with one all-reduce; return losses_MK."""
        return self._accumulate(batches, numbers, num_mine, lambda: False).cpu()[:-1]

    def _accumulate(
        self,
        batches: Iterable[MicroBatch],
        numbers: Sequence[int],
        num_mine: int,
        asks_to_stop: Callable[[], bool],
    ) -> torch.Tensor:
        """Accumulate as `accumulate`; return losses_MK and a row that counts the asks to stop."""
        self.model.train()
        # Differs from the original: a last partial update is divided by its own size.
        share, counts_K = self.world_size / len(numbers), None  # DDP takes the mean over ranks
        if self.normalization == "tokens":
            batches = list(batches)  # the update's masks are drawn before rows are counted
            counts_K = self._count_rows(batches) / len(numbers)
        scale: float | torch.Tensor = share
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.full((), share, device=self.device))
        shape = len(numbers) + 1, 1 + len(self.model.alphas)
        shared = torch.zeros(shape, dtype=torch.float64, device=self.device)
        losses_MK, places, found = shared[:-1], [], []
        for done, batch in enumerate(batches, start=1):
            # Differs from the original: gradients travel once an update, not with each micro-batch.
            with self._without_reduction(done < num_mine):
                found.append(self._backward(batch, scale, counts_K, done == num_mine))
            places += [part.number - numbers[0] for part in batch.parts]
        if found:
            rows_M = sent(torch.tensor(places), self.device)
            losses_MK[:, 1:].index_copy_(0, rows_M, torch.cat(found).double())
        else:
            self.wrapped(None, {}, None, scale)[0].backward()
        fill_missing_gradients(self.model.parameters())
        shared[-1, 0] = float(asks_to_stop())
        if self.world_size > 1:
            torch.distributed.all_reduce(shared)
        losses_MK[:, 0] = losses_MK[:, 1:] @ self.alphas_K
        return shared

    def _backward(self, batch: MicroBatch, scale, counts_K, is_last: bool = False) -> torch.Tensor:
        """Run teacher, student and losses of a pass, then backward; return its losses_MK."""
        torch.manual_seed(keyed_seed(self.seed, batch.number, "dropout"))
        weight = self.model.tied_weight if self.has_cpu_kernels else None
        tied = None if weight is None else TiedGradient(weight)
        with tied or contextlib.nullcontext():
            with faster(tied) if self.has_cpu_kernels else contextlib.nullcontext():
                teacher_read = self.model.read_teacher(self.teacher, batch)
                given = batch, teacher_read, self.teacher_head, scale, counts_K
                is_mixed = self.amp_dtype is not None
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=is_mixed):
                    loss, losses_MK = self.wrapped(*given)
            if is_last and self.world_size > 1:  # DDP waits for a gradient of every parameter
                loss = reaching_all(loss, self.model.parameters())
            loss.backward()
        return losses_MK

    def _count_rows(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Count each objective's rows in the whole update, on every rank: (K,), at least 1."""
        rows = [LOSSES[name].rows for name in self.model.alphas]
        counts = [sum(len(batch.rows[kind]) for batch in batches) for kind in rows]
        counts_K = sent(torch.tensor(counts, dtype=torch.float64), self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(counts_K)
        return counts_K.clamp(min=1)

    def _settle_buckets(self) -> None:
        """Exchange zeros once: DDP reorders its gradient sums after the first backward.

        With three ranks or more the first update of a resumed run would otherwise differ by
        rounding from the same update of a run that was never stopped.
        """
        self.wrapped(None, {}, None, 1.0)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _without_reduction(self, is_wanted: bool) -> contextlib.AbstractContextManager:
        is_needed = is_wanted and self.world_size > 1
        return self.wrapped.no_sync() if is_needed else contextlib.nullcontext()

    def _check_overflow(self, norm: float, numbers: Sequence[int]) -> None:
        """Leave an overflow in float16 to the scaler while it has smaller scales to try."""
        if self.scaler.is_enabled() and self.scaler.get_scale() >= MIN_LOSS_SCALE:
            return
        raise NonFiniteError(
            f"the gradient norm became {norm} in micro-batches {numbers[0]} to {numbers[-1]}; the"
            " update was not applied",
            numbers,
        )

    def non_finite_gradients(self, batches: Iterable[MicroBatch]) -> dict[int, str]:
        """Recompute this rank's micro-batches, one objective at a time, for a post-mortem.

        Returns number -> what is not finite in its gradient. Nothing is exchanged between ranks.
        """
        alphas, found = self.model.alphas, {}
        for batch in (part for joined in batches for part in joined.parts):
            batch = dataclasses.replace(batch, selection=None)  # each objective selects its own
            for name in alphas:
                self.optimizer.zero_grad(set_to_none=True)
                self.model.alphas = {name: alphas[name]}
                with self._without_reduction(True):
                    self._backward(batch, 1.0, None)
                named = self.model.student.named_parameters()
                wrong = [n for n, p in named if not is_finite(p.grad)]
                if wrong:
                    what = f"loss_{name}'s gradient for {and_others(wrong[0], len(wrong))}"
                    found.setdefault(batch.number, what)
        self.model.alphas = alphas
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def tensors(self) -> Tensors:
        """Return weights and moments, by file and name: see `state_tensors`."""
        return state_tensors(self.model.student, self.model.objectives, self.optimizer)

    def values(self) -> dict:
        """Return the state of schedule and gradient scaler, as numbers."""
        return state_values(self.schedule, self.scaler)

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], values: Mapping) -> None:
        """Load what `tensors` and `values` returned. Raises ValueError on another model's state."""
        load_tensors(self.model.student, self.model.objectives, self.optimizer, tensors)
        load_values(self.optimizer, self.schedule, self.scaler, values)
