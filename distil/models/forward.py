"""Last hidden states of each family, from batches with and without padding."""

import contextlib
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
from distil.layer_losses import Sequences
from distil.losses import at_least_float32
from distil.models.layer_readings import Attention, recording_attention, recording_blocks
from distil.objectives import LOSSES

# Families whose attention takes a boolean mask (B, 1, T, T) as it is, and needs nothing else of it.
PLAIN_ATTENTION = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra"}


def _columns(model: nn.Module, ids_BT: torch.Tensor, columns_BT: torch.Tensor) -> torch.Tensor:
    return columns_BT


def _after_padding(model: nn.Module, ids_BT: torch.Tensor, columns_BT: torch.Tensor):
    """Count as RoBERTa does: from padding_idx + 1, its padding id, wherever it is, left out."""
    padding_id = model.base_model.embeddings.padding_idx
    is_counted = ids_BT.ne(padding_id).long()
    ends_BT = is_counted.cumsum(1)
    starts_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) - columns_BT
    before_BT = (ends_BT - is_counted).gather(1, starts_BT)
    return (ends_BT - before_BT) * is_counted + padding_id


# Families that take positions and a mask (B, 1, T, T) as they are, and need nothing else of packed
# sequences: (model, ids, places in sequences) -> positions.
PACKED_POSITIONS = {
    **dict.fromkeys(("bert", "distilbert", "electra", "gpt2"), _columns),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _after_padding),
}
CAUSAL_FAMILIES = {"gpt2"}
CAUSAL_ATTENTION = "sdpa_causal"  # registered here; not in any configuration file


def rows_of(read_BTX: torch.Tensor, batch: MicroBatch, kind: str) -> list[torch.Tensor]:
    """Select each micro-batch's rows (N, ..) of what was read (B, T, ..), at least float32."""
    rows_N = to_device(batch.rows[kind], read_BTX.device)
    return list(at_least_float32(read_BTX.flatten(0, 1)[rows_N]).split(batch.num_rows(kind)))


def rows_by_layer(read: Mapping[int, torch.Tensor], batch: MicroBatch, kind: str) -> list[dict]:
    """Select each micro-batch's rows (N, D) of each layer's hidden states."""
    rows = {layer: rows_of(hidden_BTD, batch, kind) for layer, hidden_BTD in read.items()}
    return [dict(zip(rows, parts, strict=True)) for parts in zip(*rows.values(), strict=True)]


def sequences_of(read: Mapping[int, Attention], batch: MicroBatch, kind: str) -> list[Sequences]:
    """Return each micro-batch's attention by layer, with its lengths: padding comes last."""
    num_sequences, length = batch.input_ids_BT.shape
    sequences_N, lengths_B = batch.rows[kind] // length, torch.zeros(num_sequences).long()
    lengths_B.index_add_(0, sequences_N, torch.ones_like(sequences_N))  # on the host
    sizes = [len(part.input_ids_BT) for part in batch.parts]
    return Sequences(read, lengths_B, batch.is_causal).split(sizes)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Something that objectives can read of a base model.

    take: selects a tensor (B, T, ..) from the output. options: forward keywords that this needs.
    record: in place of take, (model, layers) -> context of the forward pass that records by layer.
    by_sequence: what is selected are whole sequences, which packed passes do not keep together.
    select: (what was read, pass, kind of rows) -> what a formula gets, by micro-batch.
    """

    take: Callable[[ModelOutput], Any] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Callable[..., contextlib.AbstractContextManager[dict]] | None = None
    select: Callable[[Any, MicroBatch, str], list] = rows_of
    by_sequence: bool = False


READINGS: dict[str, Reading] = {
    "hidden": Reading(lambda output: output.last_hidden_state),
    "blocks": Reading(record=recording_blocks, select=rows_by_layer),
    "attention": Reading(record=recording_attention, select=sequences_of, by_sequence=True),
}


def layers_read(
    names: Iterable[str], modules: Mapping[str, nn.Module], side: int
) -> dict[str, set[int]]:
    """Return the rows of READINGS that objectives need, each with the layers to be recorded.

    names: rows of LOSSES. modules: of those that have one. side: 0: of the student, 1: of the
    teacher.
    """
    found: dict[str, set[int]] = {"hidden": set()}  # logits are made of it
    for name in names:
        layers = getattr(modules[name], "layers", ((), ())) if name in modules else ((), ())
        found.setdefault(LOSSES[name].reads, set()).update(layers[side])
    found.pop("logits", None)
    return found


def select(reading: str, read: Mapping[str, Any], batch: MicroBatch, kind: str) -> list:
    """Return what a formula gets of a model's outputs for each micro-batch of a pass.

    None for each where the model did not run.
    """
    if not read:
        return [None] * len(batch.parts)
    return READINGS[reading].select(read[reading], batch, kind)


def last_hidden_state(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return the last hidden states (B, T, D), GPT-2's after its final norm."""
    return read_outputs(model, batch, ["hidden"])["hidden"]


def read_outputs(model: nn.Module, batch: MicroBatch, readings: Iterable[str]) -> dict[str, Any]:
    """Run a language model without its prediction head; return rows of READINGS, (B, T, ..) each.

    readings: names, or a mapping from names to the layers to be recorded. Token types are not
    passed, and no mask without padding.
    """
    device = next(model.parameters()).device
    input_ids_BT = to_device(batch.input_ids_BT, device)
    options: dict[str, Any] = {"use_cache": False} if batch.is_causal else {}
    if batch.packing is not None:
        options |= _packed_options(model, batch, input_ids_BT)
    elif batch.attention_mask_BT is not None and batch.is_padded:
        mask_BT = to_device(batch.attention_mask_BT, device)
        options["attention_mask"] = _attention_mask(model.config, mask_BT)
    rows = {name: READINGS[name] for name in readings}
    for row in rows.values():
        options |= row.options
    with contextlib.ExitStack() as stack:
        found = {
            name: stack.enter_context(row.record(model, readings[name]))
            for name, row in rows.items()
            if row.record is not None
        }
        output = model.base_model(input_ids_BT, **options)
    return {name: found[name] if name in found else row.take(output) for name, row in rows.items()}


def _attention_mask(config, mask_BT: torch.Tensor) -> torch.Tensor:
    """Expand the mask to (B, 1, T, T) for families known to take it; else return it unchanged.

    transformers tests whether a (B, T) mask is all 1, for which the host waits for the device.
    """
    if config.model_type not in PLAIN_ATTENTION or config._attn_implementation != "sdpa":
        return mask_BT
    return mask_BT.bool()[:, None, None, :].expand(-1, 1, mask_BT.shape[1], -1)


def _packed_options(
    model: nn.Module, batch: MicroBatch, input_ids_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Make positions that restart in each sequence, and a mask of pairs within a sequence.

    Made on the device: a mask is large. Padding attends to its row's padding, which keeps it
    finite, and nothing attends to padding.
    """
    device, length = input_ids_BT.device, input_ids_BT.shape[1]
    sequences_BT = to_device(batch.packing.sequences_BT, device)
    columns_BT = to_device(batch.packing.columns_BT, device)
    mask_B1TT = (sequences_BT[:, :, None] == sequences_BT[:, None, :])[:, None]
    if batch.is_causal:
        mask_B1TT &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    positions = PACKED_POSITIONS[model.config.model_type]
    position_ids_BT = positions(model, input_ids_BT, columns_BT)
    return {"attention_mask": mask_B1TT, "position_ids": position_ids_BT}


def packing_problem(model: nn.Module, names: Iterable[str], is_causal: bool) -> str | None:
    """Say why a model's passes can't be packed for the objectives `names`; None: they can."""
    config = model.config
    reads = {name: LOSSES[name].reads for name in names}
    whole = [n for n, read in reads.items() if read in READINGS and READINGS[read].by_sequence]
    if whole:
        return f"{' and '.join(f'--alpha_{name}' for name in whole)} read whole sequences"
    kind, attention = config.model_type, config._attn_implementation
    if kind not in PACKED_POSITIONS:
        return f"a {kind} model is not known to keep packed sequences apart"
    if (kind in CAUSAL_FAMILIES) != is_causal or getattr(config, "is_decoder", False):
        return f"this {kind} model attends in another way than its family does"
    if attention not in ("sdpa", CAUSAL_ATTENTION):
        return f"the {kind} model's attention is {attention}, which takes other masks"
    return None


def attend_without_masks(model: nn.Module) -> None:
    """Let GPT-2 use SDPA's causal mode instead of a mask.

    transformers would inspect the positions for packed sequences, for which the host waits; when
    compiled, it always makes a mask, with which no fused kernel runs.
    """
    if model.config.model_type == "gpt2" and model.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
        model.set_attn_implementation(CAUSAL_ATTENTION)


def set_dropout(network: nn.Module, rate: float) -> None:
    """Set every dropout rate of a network; its saved configuration keeps the ones it had.

    Its class reads them from the configuration, before or in its forward pass, so both are set:
    numbers whose name has "drop" in it, but for the shares of layers that are skipped.
    """
    entries = {
        name: value for name, value in network.config.to_dict().items() if _is_rate(name, value)
    }
    for name in entries:
        setattr(network.config, name, rate)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            if _is_rate(name, value):
                setattr(module, name, rate)
    network.saved_entries = entries | getattr(network, "saved_entries", {})


def _is_rate(name: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and "drop" in name and "layer" not in name


def recompute_activations(student: nn.Module, compiles: bool = False) -> None:
    """Keep only the layers' inputs and recompute activations in backward, by the same kernels.

    On a CPU these are the kernels of distil/kernels/cpu.py.
    """
    contexts = {} if compiles else {"context_fn": checkpointing_contexts}
    student.activation_checkpointing_enable({"use_reentrant": False, **contexts})
