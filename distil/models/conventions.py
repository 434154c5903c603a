"""What transformers' conventions tell about any masked or causal language model, without a row for
its family.

Where architectures.py has a row a model type, this module finds out: which class the model has,
which lists hold its layers, what its configuration lists by layer, where the output projection and
the position table are. Then a student is made of some of a teacher's layers, as in Sanh et al.,
2019, section 3, within one architecture.

Nothing is believed that a model doesn't show: heads, padding and extracted layers are compared on a
few tokens, and what differs is refused with a line that says so.

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
from distil.models.heads import head_by_convention
from utils import InputError, one_line

NUM_LAYERS = "num_hidden_layers"

# --------------------------------------------------------------------------------------------------
# Configurations with fewer layers
# --------------------------------------------------------------------------------------------------


def _gpt_neo_entries(config, layers: Sequence[int]) -> dict[str, Any]:
    """GPT-Neo writes its attention by layer as [[kinds in turn], how often]."""
    return {"attention_types": [[[config.attention_layers[layer]], 1] for layer in layers]}


# What no convention tells: model type -> entries of the configuration with some of its layers.
ENTRIES: dict[str, Callable[[Any, Sequence[int]], dict[str, Any]]] = {"gpt_neo": _gpt_neo_entries}


def key_of(config, name: str) -> str:
    """Return how this type of configuration calls a common entry: num_hidden_layers -> n_layer
    (GPT-2).
    """
    return config.attribute_map.get(name, name)


def listed_by_layer(config) -> list[str]:
    """List the entries of a configuration that hold one value a layer (layer_types, windows,
    ..).
    """
    num_layers, content = getattr(config, NUM_LAYERS), config.to_dict()
    return [
        key
        for key, value in content.items()
        if isinstance(value, (list, tuple))
        and len(value) == num_layers
        and ("layer" in key or _follows(config, key))
    ]


def _follows(config, key: str) -> bool:
    """Tell whether a default configuration lists `key` by layer: its length follows the number of
    layers.
    """
    lengths = []
    for num_layers in (5, 7):
        try:
            value = getattr(type(config)(**{key_of(config, NUM_LAYERS): num_layers}), key, None)
        except Exception:  # a configuration that can't be made so
            return False
        lengths.append(len(value) if isinstance(value, (list, tuple)) else 0)
    return lengths == [5, 7]


def config_with_layers(config, layers: Sequence[int], source: str):
    """Copy a configuration, with the entries of `layers` only. Raises InputError naming `source`
    where that can't be.
    """
    content = config.to_dict()
    content |= {key: [content[key][layer] for layer in layers] for key in listed_by_layer(config)}
    content |= ENTRIES.get(config.model_type, lambda config, layers: {})(config, layers)
    content[key_of(config, NUM_LAYERS)] = len(layers)
    try:
        return type(config).from_dict(content)
    except Exception as error:
        raise InputError(
            f"{source}: no configuration of {len(layers)} layers can be made of it"
            f" ({one_line(error)})"
        ) from error


# --------------------------------------------------------------------------------------------------
# Anatomy
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Where things are in a model.

    layer_lists: module paths of the lists that hold one module a layer (XLM has four). output: path
    of the linear map from (N, D) to logits (N, V). positions, token_types: paths of these tables,
    None where there is none. reserved_positions: rows of the position table that no token uses.
    """

    layer_lists: tuple[str, ...]
    output: str
    positions: str | None
    token_types: str | None
    reserved_positions: int


def skeleton(config, is_masked: bool, source: str, trust_remote_code: bool = False) -> nn.Module:
    """Make a language model without memory for its weights.

    Raises InputError where transformers has none of the kind asked for.
    """
    auto_class = (
        transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    )
    if not (trust_remote_code and auto_class.__name__ in (getattr(config, "auto_map", None) or {})):
        _require_class(config, is_masked, source)
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"{source}: no {config.model_type} model can be made of it ({one_line(error)})"
        ) from error


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
    remedy = (
        f"it has a {names[not is_masked]} one, {'leave --mlm out' if is_masked else 'add --mlm'}"
    )
    remedy = (
        remedy if type(config) in kinds[not is_masked] else "take a masked or causal language model"
    )
    raise InputError(
        f"{source}: transformers has no {names[is_masked]} language model of type"
        f" {config.model_type}; {remedy}"
    )


def anatomy(model: nn.Module, source: str) -> Anatomy:
    """Find out where things are in a model. Raises InputError naming what it lacks."""
    projection = model.get_output_embeddings()
    output = next(
        (
            path
            for path, module in model.named_modules()
            if module is projection and module is not None
        ),
        None,
    )
    if model.base_model is model or output is None or not isinstance(projection, nn.Linear):
        raise InputError(
            f"{source}: a {type(model).__name__} has no prediction head apart from its layers; take"
            " another model"
        )
    tables = [
        path
        for path, module in model.base_model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    positions = next(
        (f"{model.base_model_prefix}.{path}" for path in tables if _is_of_positions(path)), None
    )
    return Anatomy(
        layer_lists(model, source),
        output,
        positions,
        next(
            (
                f"{model.base_model_prefix}.{path}"
                for path in tables
                if "token_type" in path.lower()
            ),
            None,
        ),
        _reserved(model, positions),
    )


def _reserved(model: nn.Module, positions: str | None) -> int:
    """Count the rows of the position table up to that of padding, which it counts from (RoBERTa's
    begin at 2).
    """
    table = None if positions is None else model.get_submodule(positions)
    limit = getattr(model.config, "max_position_embeddings", None)
    return (
        0
        if table is None or table.padding_idx is None or table.num_embeddings != limit
        else table.padding_idx + 1
    )


def _is_of_positions(path: str) -> bool:
    name = path.rsplit(".", 1)[-1].lower()
    return ("pos" in name and "rel" not in name) or name == "wpe"


def layer_lists(model: nn.Module, source: str) -> tuple[str, ...]:
    """Find the lists that hold one module a layer: those that are of another length in a model of
    other depth.

    None where layers are shared or nested, or their number can't be changed.
    """
    num_layers = getattr(model.config, NUM_LAYERS, None)
    if not isinstance(num_layers, int) or num_layers < 1:
        return ()
    others = list(range(num_layers - 1)) or [0, 0]
    try:
        with torch.device("meta"):
            smaller = type(model)(config_with_layers(model.config, others, source))
    except Exception:  # what a class refuses has no end
        return ()
    lengths = {path: len(module) for path, module in _outermost_lists(smaller)}
    return tuple(
        path
        for path, module in _outermost_lists(model)
        if len(module) == num_layers and lengths.get(path) == len(others)
    )


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules that are in no other list, with their paths."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(inside)):
            inside.append(f"{path}.")
            yield path, module


# --------------------------------------------------------------------------------------------------
# What a model has to show
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_conventions(model: nn.Module, is_masked: bool, source: str) -> None:
    """Raise InputError where a model is not what distillation takes it for.

    What is padded must not change the rest, and a causal model must not see what comes.
    """
    head_by_convention(model, source)
    ids_BT = some_ids(model, 2)
    half = ids_BT.shape[1] // 2
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, half:] = 0
    try:
        with evaluating(model):
            options = without_cache(model)
            batch_BTV = model(ids_BT, attention_mask=mask_BT, **options).logits
            alone_BTV = model(ids_BT[1:, :half], **options).logits
            unmasked_BTV = model(ids_BT[1:], **options).logits
    except Exception as error:
        raise InputError(
            f"{source}: can't be called with a mask ({one_line(error)}); take another model"
        ) from error
    if not is_close(batch_BTV[1:, :half], alone_BTV):
        raise InputError(
            f"{source}: padding changes what it computes for the real tokens; take another model"
        )
    if not is_masked and not is_close(unmasked_BTV[:, :half], alone_BTV):
        raise InputError(
            f"{source}: it sees the tokens that come, so it is no causal model; add --mlm, or take"
            " another"
        )
