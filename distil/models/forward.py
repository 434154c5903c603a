"""Last hidden states of each family, from batches with and without padding."""

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

# Families whose attention takes a boolean mask (B, 1, T, T) as it is, and needs nothing else of it.
PLAIN_ATTENTION = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """Something that objectives can read of a base model's output.

    take: selects a tensor (B, T, ..) from the output. options: forward keywords that this needs.
    """

    take: Callable[[ModelOutput], torch.Tensor]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


READINGS: dict[str, Reading] = {"hidden": Reading(lambda output: output.last_hidden_state)}


def last_hidden_state(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return the last hidden states (B, T, D), GPT-2's after its final norm."""
    return read_outputs(model, batch, ["hidden"])["hidden"]


def read_outputs(
    model: nn.Module, batch: MicroBatch, readings: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Run a language model without its prediction head; return rows of READINGS, (B, T, ..) each.

    Token types are not passed, and no mask without padding.
    """
    device = next(model.parameters()).device
    input_ids_BT = to_device(batch.input_ids_BT, device)
    options: dict[str, Any] = {"use_cache": False} if batch.is_causal else {}
    if batch.attention_mask_BT is not None and batch.is_padded:
        mask_BT = to_device(batch.attention_mask_BT, device)
        options["attention_mask"] = _attention_mask(model.config, mask_BT)
    rows = {name: READINGS[name] for name in readings}
    for row in rows.values():
        options |= row.options
    output = model.base_model(input_ids_BT, **options)
    return {name: row.take(output) for name, row in rows.items()}


def _attention_mask(config, mask_BT: torch.Tensor) -> torch.Tensor:
    """Expand the mask to (B, 1, T, T) for families known to take it; else return it unchanged.

    transformers tests whether a (B, T) mask is all 1, for which the host waits for the device.
    """
    if config.model_type not in PLAIN_ATTENTION or config._attn_implementation != "sdpa":
        return mask_BT
    return mask_BT.bool()[:, None, None, :].expand(-1, 1, mask_BT.shape[1], -1)


CAUSAL_ATTENTION = "sdpa_causal"  # registered here; not in any configuration file


def attend_without_masks(model: nn.Module) -> None:
    """Let GPT-2 use SDPA's causal mode instead of a mask.

    transformers would inspect the positions for packed sequences, for which the host waits; when
    compiled, it always makes a mask, with which no fused kernel runs.
    """
    if model.config.model_type == "gpt2" and model.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
        model.set_attn_implementation(CAUSAL_ATTENTION)


def recompute_activations(student: nn.Module, compiles: bool = False) -> None:
    """Keep only the layers' inputs and recompute activations in backward, by the same kernels.

    On a CPU these are the kernels of distil/kernels/cpu.py.
    """
    contexts = {} if compiles else {"context_fn": checkpointing_contexts}
    student.activation_checkpointing_enable({"use_reentrant": False, **contexts})
