"""Language models without a row in ARCHITECTURES, resolved by the conventions of transformers.

This module infers what a row of architectures.py states: the model's class, the lists that hold its
layers, the configuration's entries by layer, the paths of output projection and position table.
first_weights.py then copies some of a teacher's layers to a student of the same architecture, as in
Sanh et al., 2019, section 3.

Each assumption is tested: heads, padding and extracted layers are compared on a few tokens, and a
model that differs is refused in one line.

Shape suffixes: B sequences, T padded length, N positions, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from distil.models.checks import evaluating, is_close, some_ids, without_cache
from distil.models.heads import head_by_convention, path_of
from distil.system.failures import naming_failures
from utils import InputError

NUM_LAYERS = "num_hidden_layers"

# --------------------------------------------------------------------------------------------------
# Configurations with fewer layers
# --------------------------------------------------------------------------------------------------


def _gpt_neo_entries(config, layers: Sequence[int]) -> dict[str, Any]:
    """Write GPT-Neo's kinds of attention by layer as [[kinds], number of repetitions] pairs."""
    return {"attention_types": [[[config.attention_layers[layer]], 1] for layer in layers]}


# Exceptions: model type -> function that makes configuration entries for some of its layers.
ENTRIES: dict[str, Callable[[Any, Sequence[int]], dict[str, Any]]] = {"gpt_neo": _gpt_neo_entries}


def key_of(config, name: str) -> str:
    """Return the key of a common entry in this configuration: num_hidden_layers -> n_layer."""
    return config.attribute_map.get(name, name)


def listed_by_layer(config) -> list[str]:
    """List the configuration's entries with one value per layer (layer_types, windows, ..)."""
    num_layers, content = getattr(config, NUM_LAYERS), config.to_dict()
    return [
        key
        for key, value in content.items()
        if isinstance(value, (list, tuple))
        and len(value) == num_layers
        and ("layer" in key or _has_length_of_layers(config, key))
    ]


def _has_length_of_layers(config, key: str) -> bool:
    """Test whether the length of a default configuration's `key` equals its number of layers."""
    lengths = []
    for num_layers in (5, 7):
        try:
            value = getattr(type(config)(**{key_of(config, NUM_LAYERS): num_layers}), key, None)
        except Exception:  # a configuration that has no defaults
            return False
        lengths.append(len(value) if isinstance(value, (list, tuple)) else 0)
    return lengths == [5, 7]


def config_with_layers(config, layers: Sequence[int], source: str):
    """Copy a configuration with the entries of `layers` only. Raises InputError naming `source`."""
    content = config.to_dict()
    content |= {key: [content[key][layer] for layer in layers] for key in listed_by_layer(config)}
    content |= ENTRIES.get(config.model_type, lambda config, layers: {})(config, layers)
    content[key_of(config, NUM_LAYERS)] = len(layers)
    with naming_failures(f"{source}: cannot make a configuration of {len(layers)} layers from it"):
        copied = type(config).from_dict(content)
    copied._attn_implementation = config._attn_implementation
    return copied


# --------------------------------------------------------------------------------------------------
# Anatomy
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Module paths of a model's parts.

    layer_lists: lists with one module per layer (XLM has four).
    output: linear map from (N, D) to logits (N, V).
    positions, token_types: embedding tables, or None.
    reserved_positions: number of unused first rows of the position table.
    """

    layer_lists: tuple[str, ...]
    output: str
    positions: str | None
    token_types: str | None
    reserved_positions: int


def skeleton(config, is_masked: bool, source: str, trust_remote_code: bool = False) -> nn.Module:
    """Build a language model on the meta device, without memory for its weights.

    Raises InputError if transformers has no model of the requested kind for the configuration.
    """
    auto_class = (
        transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    )
    if not (trust_remote_code and auto_class.__name__ in (getattr(config, "auto_map", None) or {})):
        _require_class(config, is_masked, source)
    what = f"{source}: cannot build a {config.model_type} model from it"
    with naming_failures(what), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def _require_class(config, is_masked: bool, source: str) -> None:
    kinds = {
        True: transformers.MODEL_FOR_MASKED_LM_MAPPING,
        False: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{source}: {config.model_type} is an encoder-decoder; expected an encoder or a decoder"
            " alone"
        )
    if type(config) in kinds[is_masked]:
        return
    names = {True: "masked", False: "causal"}
    remedy = "take a masked or causal language model"
    if type(config) in kinds[not is_masked]:
        change = "leave --mlm out" if is_masked else "add --mlm"
        remedy = f"it has a {names[not is_masked]} one, {change}"
    raise InputError(
        f"{source}: transformers has no {names[is_masked]} language model of type"
        f" {config.model_type}; {remedy}"
    )


def anatomy(model: nn.Module, source: str) -> Anatomy:
    """Locate a model's parts. Raises InputError if its prediction head cannot be separated."""
    projection = model.get_output_embeddings()
    output = path_of(model, projection)
    if model.base_model is model or output is None or not isinstance(projection, nn.Linear):
        raise InputError(
            f"{source}: a {type(model).__name__} has no prediction head separate from its layers;"
            " take another model"
        )
    tables = [
        f"{model.base_model_prefix}.{path}"
        for path, module in model.base_model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    positions = next(filter(_is_of_positions, tables), None)
    token_types = next(filter(_is_of_token_types, tables), None)
    reserved = _reserved_positions(model, positions)
    return Anatomy(layer_lists(model, source), output, positions, token_types, reserved)


def _is_of_positions(path: str) -> bool:
    name = path.rsplit(".", 1)[-1].lower()
    return ("pos" in name and "rel" not in name) or name == "wpe"


def _is_of_token_types(path: str) -> bool:
    return "token_type" in path.lower()


def _reserved_positions(model: nn.Module, positions: str | None) -> int:
    """Count a position table's rows up to the padding id (RoBERTa's positions begin behind it)."""
    if positions is None:
        return 0
    table = model.get_submodule(positions)
    limit = getattr(model.config, "max_position_embeddings", None)
    is_reserved = table.padding_idx is not None and table.num_embeddings == limit
    return table.padding_idx + 1 if is_reserved else 0


def layer_lists(model: nn.Module, source: str) -> tuple[str, ...]:
    """Find the lists with one module per layer: those that are shorter in a model of fewer layers.

    Returns () if layers are shared or nested, or if their number cannot be changed.
    """
    num_layers = getattr(model.config, NUM_LAYERS, None)
    if not isinstance(num_layers, int) or num_layers < 1:
        return ()
    others = list(range(num_layers - 1)) or [0, 0]
    try:
        with torch.device("meta"):
            smaller = type(model)(config_with_layers(model.config, others, source))
    except Exception:  # model classes raise anything on sizes that they do not support
        return ()
    lengths = {path: len(module) for path, module in outermost_lists(smaller)}
    return tuple(
        path
        for path, module in outermost_lists(model)
        if len(module) == num_layers and lengths.get(path) == len(others)
    )


def outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield (path, list) of the module lists that are not inside another one."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(inside)):
            inside.append(f"{path}.")
            yield path, module


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_conventions(model: nn.Module, is_masked: bool, source: str) -> None:
    """Raise InputError unless a model computes what distillation assumes.

    Padding must not change the real tokens' logits, nor later tokens those of a causal model.
    """
    head_by_convention(model, source)
    ids_BT = some_ids(model, 2)
    half = ids_BT.shape[1] // 2
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, half:] = 0
    what = f"{source}: cannot be called with a mask"
    with naming_failures(what, "; take another model"), evaluating(model):
        options = without_cache(model)
        batch_BTV = model(ids_BT, attention_mask=mask_BT, **options).logits
        alone_BTV = model(ids_BT[1:, :half], **options).logits
        unmasked_BTV = model(ids_BT[1:], **options).logits
    if not is_close(batch_BTV[1:, :half], alone_BTV):
        raise InputError(
            f"{source}: padding changes what it computes for the real tokens; take another model"
        )
    if not is_masked and not is_close(unmasked_BTV[:, :half], alone_BTV):
        raise InputError(
            f"{source}: it attends to later tokens, so it is not a causal model; add --mlm, or take"
            " another"
        )
