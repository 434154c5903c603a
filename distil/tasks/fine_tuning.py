"""Fine-tuning for a task, optionally with a fine-tuned teacher: the loss and the Trainer.

The second step of distillation (Sanh et al., 2019, section 3, "DistilBERT (D)"), for run_task.py
and run_squad_w_distillation.py: the student learns the task and, at the same time, the logits of a
teacher that was fine-tuned for it before:

    loss = alpha_task x the task's own loss + alpha_ce x DISTANCES[head](student, teacher, T)

The loop is the transformers Trainer's; the optimizer is that of the 2019 scripts (AdamW, linear
decay to 0, no warm-up, clip at 1, no weight decay of biases and layer norms). On a CPU every
forward and backward runs in the kernels of distil/kernels/cpu.py.

Shape suffixes: B examples, T padded length, C classes or vocabulary, N selected positions.
"""

import inspect
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from distil.kernels.cpu import faster_for
from distil.losses import at_least_float32, kl_divergence, squared_error
from distil.models.export import complete_folder
from distil.system.files import naming_library_errors, replacing_files
from distil.system.memory import reuse_memory
from utils import InputError

IGNORED_LABEL = -100

# --------------------------------------------------------------------------------------------------
# The second step's loss
# --------------------------------------------------------------------------------------------------


def _mean_kl(
    student_NC: torch.Tensor, teacher_NC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the mean over rows of T^2 KL(softmax(t / T) || softmax(s / T)); 0 without rows."""
    total = kl_divergence(
        at_least_float32(student_NC), at_least_float32(teacher_NC), None, temperature
    )
    return total / max(len(student_NC), 1)


def _of_classes(student, teacher, labels, temperature: float) -> torch.Tensor:
    return _mean_kl(student.logits, teacher.logits, temperature)


def _of_values(student, teacher, labels, temperature: float) -> torch.Tensor:
    total = squared_error(
        at_least_float32(student.logits), at_least_float32(teacher.logits), None, temperature
    )
    return total / max(student.logits.numel(), 1)


def _of_tokens(student, teacher, labels_BT: torch.Tensor, temperature: float) -> torch.Tensor:
    counts_BT = labels_BT != IGNORED_LABEL
    return _mean_kl(student.logits[counts_BT], teacher.logits[counts_BT], temperature)


def _of_next_tokens(student, teacher, labels_BT: torch.Tensor, temperature: float) -> torch.Tensor:
    counts_BT = labels_BT[:, 1:] != IGNORED_LABEL
    return _mean_kl(
        student.logits[:, :-1][counts_BT], teacher.logits[:, :-1][counts_BT], temperature
    )


def _of_spans(student, teacher, labels, temperature: float) -> torch.Tensor:
    """Return the mean of start and end, over all T positions, padding and question included."""
    start = _mean_kl(student.start_logits, teacher.start_logits, temperature)
    return (start + _mean_kl(student.end_logits, teacher.end_logits, temperature)) / 2


DISTANCES: dict[str, Callable[..., torch.Tensor]] = {
    "classes": _of_classes,
    "values": _of_values,
    "tokens": _of_tokens,
    "next tokens": _of_next_tokens,
    "spans": _of_spans,
}


def inputs_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Select the inputs that a model's forward knows; token types only with more than one type."""
    known = inspect.signature(model.forward).parameters
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    return {
        name: t
        for name, t in batch.items()
        if name in known and (has_types or name != "token_type_ids")
    }


class Trainer(transformers.Trainer):
    """The library's Trainer with a teacher; inputs_of selects what each of the two models reads.

    distance: row of DISTANCES. teacher: run in evaluation mode, without gradients; None for plain
    fine-tuning. num_entries: of the tokenizer, over which a teacher predicts the next token where
    its vocabulary is padded to other rows than the student's.
    """

    def __init__(
        self,
        *,
        distance: str,
        teacher: torch.nn.Module | None = None,
        alpha_task: float = 1.0,
        alpha_ce: float = 0.0,
        temperature: float = 2.0,
        num_entries: int | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.distance, self.num_entries = distance, num_entries
        self.alpha_task, self.alpha_ce, self.temperature = alpha_task, alpha_ce, temperature
        self.teacher = (
            None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        )
        self.model_accepts_loss_kwargs = False  # the mean of micro-batch means, as in 2019

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Return the second step's loss; in evaluation the task's loss alone."""
        with faster_for(model, self.teacher):
            return self._compute_loss(model, inputs, return_outputs)

    def _compute_loss(self, model, inputs, return_outputs: bool):
        plain = self.accelerator.unwrap_model(model)
        student = model(**inputs_of(plain, inputs))
        loss = student.loss
        if self.teacher is not None and model.training:
            labels = {"labels", "start_positions", "end_positions"}
            with torch.no_grad():
                given = {name: tensor for name, tensor in inputs.items() if name not in labels}
                teacher = self.teacher(**inputs_of(self.teacher, given))
            if self.distance == "next tokens" and teacher.logits.shape != student.logits.shape:
                teacher.logits = teacher.logits[..., : self.num_entries]
            distance = DISTANCES[self.distance](
                student, teacher, inputs.get("labels"), self.temperature
            )
            loss = self.alpha_task * loss + self.alpha_ce * distance
        return (loss, student) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Select the inputs that the model's forward knows; the library's Trainer passes all."""
        kept = inputs_of(self.accelerator.unwrap_model(model), inputs)
        with faster_for(model):
            return super().prediction_step(model, kept, prediction_loss_only, ignore_keys)

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Save the model's files as every program does, once all are complete."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with replacing_files(output_dir or self.args.output_dir) as folder:
            super()._save(str(folder), state_dict)
            if self.processing_class is not None:
                network = self.accelerator.unwrap_model(self.model)
                complete_folder(network, self.processing_class, folder)

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint; remove what was written of it where that fails."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial), name)
        is_new = not os.path.lexists(folder)
        try:
            with naming_library_errors(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _get_train_sampler(self, train_dataset=None):
        """Shuffle, and end an epoch with its last whole update."""
        # Differs from the original: left-over batches are not read, so that updates = (batches //
        # accumulation) x epochs. 2019 added their gradients to the next epoch's first update.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        num_left = (
            num_micro_batches(len(dataset), self.args) % self.args.gradient_accumulation_steps
        )
        num_whole = num_micro_batches(len(dataset), self.args) - num_left
        num_samples = (
            num_whole * self.args.train_batch_size * self.args.world_size
            if num_left
            else len(dataset)
        )
        return torch.utils.data.RandomSampler(dataset, num_samples=num_samples)


def num_micro_batches(num_examples: int, arguments: transformers.TrainingArguments) -> int:
    """Return the number of micro-batches per epoch and process."""
    return math.ceil(num_examples / (arguments.train_batch_size * arguments.world_size))


def require_an_update(num_examples: int, arguments: transformers.TrainingArguments) -> None:
    """Raise InputError where an epoch is too short for one update."""
    num, wanted = num_micro_batches(num_examples, arguments), arguments.gradient_accumulation_steps
    if num < wanted:
        raise InputError(
            f"--gradient_accumulation_steps {wanted}: an epoch has {num} micro-batches, too few for"
            " one update; lower it"
        )


# --------------------------------------------------------------------------------------------------
# The Trainer's arguments
# --------------------------------------------------------------------------------------------------


def training_arguments(
    folder: str | os.PathLike, *, seed: int, batch_size: int, eval_batch_size: int, **changes: Any
):
    """Make the Trainer's arguments: those of the 2019 scripts, except for `changes`.

    No trackers, no hub, progress bars on terminals only. changes: learning_rate (5e-5),
    num_train_epochs (3), max_steps, gradient_accumulation_steps, weight_decay (0), adam_epsilon
    (1e-8), max_grad_norm (1), warmup_steps (0), save_strategy, save_steps, logging_steps, bf16,
    fp16, use_cpu.
    """
    on_cpu = changes.get("use_cpu", False) or not torch.cuda.is_available()
    if on_cpu:
        reuse_memory()  # as train.py does
    options = {
        "learning_rate": 5e-5,
        "num_train_epochs": 3,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch_fused" if on_cpu else "adamw_torch",  # the same, in less time
        "save_strategy": "no",
        "logging_steps": 50,
        **changes,
        # Otherwise each of several processes without GPUs would consider itself the only one.
        "use_cpu": on_cpu,
    }
    return transformers.TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=eval_batch_size,
        report_to="none",
        push_to_hub=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        ddp_backend="gloo" if on_cpu and "RANK" in os.environ else None,
        disable_tqdm=not sys.stderr.isatty(),
        **options,
    )
