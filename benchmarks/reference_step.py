"""Others' updates, in the same formulas, for comparison: a plain one of 2019, and a tuned one."""

import functools
import types
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
import transformers

from benchmarks.workload import (
    ADAM_EPSILON,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PAIR_ROWS,
    TEMPERATURE,
    Job,
)
from distil.data.batches import MicroBatch
from distil.flops import DTYPES
from distil.losses import IGNORED_LABEL
from distil.training.optimizer import ADAM_BETAS, split_for_weight_decay
from distil.training.reports import PendingUpdate, StepReport


class PlainStep:
    """Update a student as a program of 2019 would; has the methods of a Distiller that are timed.

    float32 weights, also under autocast; eager attention; logits of every position; selections
    copied; a wait for the device at every loss; an optimizer that loops over parameters.
    """

    OPTIMIZER: Mapping[str, bool] = types.MappingProxyType({"foreach": False, "fused": False})

    def __init__(self, job: Job, teacher: torch.nn.Module, student: torch.nn.Module):
        self.teacher, self.student = teacher, student
        self.alphas = PAIR_ROWS[job.pair].alphas
        self._choose_kernels(job)
        groups = split_for_weight_decay(student, 0.0)
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPSILON, **self.OPTIMIZER
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

    def _choose_kernels(self, job: Job) -> None:
        for model in (self.teacher, self.student):
            model.set_attn_implementation("eager")

    def ready(self, batch: MicroBatch) -> MicroBatch:
        """Pin a batch for a GPU."""
        return batch.pinned() if next(self.student.parameters()).is_cuda else batch

    def launch(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> PendingUpdate:
        """Do one update; its report is ready at once."""
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
        return PendingUpdate(lambda: report)

    def accumulate(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> list[list[float]]:
        """Accumulate the micro-batches' gradients; return the unweighted losses of each."""
        self.student.train()
        logged = []
        for batch in batches:
            with self.precision():
                # A plain program has them as variables of one function until the update is done.
                losses, _outputs = self.losses(batch)
            logged.append([loss.item() for loss in losses.values()])
            total = sum(self.alphas[name] * loss for name, loss in losses.items())
            self.scaler.scale(total / len(numbers)).backward()
        return logged

    def losses(self, batch: MicroBatch) -> tuple[dict[str, torch.Tensor], list]:
        """Compute unweighted losses from whole logits: ({name: loss}, the models' outputs)."""
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


class TunedStep(PlainStep):
    """Update a student as somebody does today who knows torch, with a loop like a Trainer's.

    Mixed precision, the teacher converted to it; scaled-dot-product attention; rows selected by
    index; a fused optimizer; losses that are not read. The C library keeps freed memory (MALLOC
    in jobs.py).
    """

    OPTIMIZER = types.MappingProxyType({"fused": True})

    def _choose_kernels(self, job: Job) -> None:
        if job.precision != "fp32":
            self.teacher.to(DTYPES[job.precision])

    def accumulate(
        self, batches: Iterable[MicroBatch], numbers: Sequence[int], num_mine: int
    ) -> list[list[float]]:
        """Accumulate the micro-batches' gradients; the losses stay on the device."""
        self.student.train()
        for batch in batches:
            with self.precision():
                losses, _outputs = self.losses(batch)
            total = sum(self.alphas[name] * loss for name, loss in losses.items())
            self.scaler.scale(total / len(numbers)).backward()
        return []

    def _divergence(self, student_BTV, teacher_BTV, real_BT) -> torch.Tensor:
        student_NV, teacher_NV = student_BTV[real_BT], teacher_BTV[real_BT]
        log_probs_NV = F.log_softmax(student_NV / TEMPERATURE, -1)
        divergence = F.kl_div(
            log_probs_NV, F.softmax(teacher_NV / TEMPERATURE, -1), reduction="batchmean"
        )
        return divergence * TEMPERATURE**2

    def _prediction(self, student_BTV, labels_BT, is_causal: bool) -> dict[str, torch.Tensor]:
        if is_causal:
            student_BTV, labels_BT = student_BTV[:, :-1], labels_BT[:, 1:]
        asked_BT = labels_BT != IGNORED_LABEL
        loss = F.cross_entropy(student_BTV[asked_BT], labels_BT[asked_BT])
        return {"clm" if is_causal else "mlm": loss}

    def _cosine(self, student_BTD, teacher_BTD, real_BT) -> torch.Tensor:
        return 1 - F.cosine_similarity(student_BTD[real_BT], teacher_BTD[real_BT], dim=-1).mean()
