"""Last hidden states: how each family is called with padding, without attending across it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import ModelOutput

from distil.data.batches import MicroBatch, to_device
from distil.kernels.cpu import checkpointing_contexts

# Families whose attention reads nothing of a mask but who may be attended to, and takes one of (B,
# 1, T, T) as it is.
PLAIN_ATTENTION = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an objective can read of a base model.

    take: from the model's output, a tensor (B, T, ..). options: keywords of its forward for it.
    """

    take: Callable[[ModelOutput], torch.Tensor]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


READINGS: dict[str, Reading] = {"hidden": Reading(lambda output: output.last_hidden_state)}


def last_hidden_state(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return the last hidden states (B, T, D), for GPT-2 after the final norm."""
    return read_outputs(model, batch, ["hidden"])["hidden"]


def read_outputs(
    model: nn.Module, batch: MicroBatch, readings: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Run a language model without its prediction head; return rows of READINGS, (B, T, ..) each.

    No token types are passed, and no mask where nothing is padded.
    """
    device = next(model.parameters()).device
    input_ids_BT = to_device(batch.input_ids_BT, device)
    options: dict[str, Any] = {"use_cache": False} if batch.is_causal else {}
    if batch.attention_mask_BT is not None and batch.is_padded:
        options["attention_mask"] = _attention_mask(
            model.config, to_device(batch.attention_mask_BT, device)
        )
    rows = {name: READINGS[name] for name in readings}
    for row in rows.values():
        options |= row.options
    output = model.base_model(input_ids_BT, **options)
    return {name: row.take(output) for name, row in rows.items()}


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


def recompute_activations(student: nn.Module, compiles: bool = False) -> None:
    """Save a layer's inputs only, and compute the rest again in backward: as it was computed, see
    `cpu_kernels`.
    """
    contexts = {} if compiles else {"context_fn": checkpointing_contexts}
    student.activation_checkpointing_enable({"use_reentrant": False, **contexts})
