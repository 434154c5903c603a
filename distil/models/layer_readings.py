"""What objectives read inside a model: its blocks' outputs, its attention's queries, keys, values.

Nothing of a model is changed for good: hooks and a registered attention function exist during one
forward pass, record the tensors of the layers asked for, and leave what is computed as it is. A
recomputation of activations in backward comes later and is not recorded.

Shape suffixes: B sequences, T padded length, D width, H heads, d width of a head, W = H d.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distil.models.checks import evaluating, some_ids, without_cache
from distil.models.conventions import outermost_lists
from distil.system.failures import naming_failures
from utils import InputError

EMBEDDINGS = -1  # in place of a layer: the input of the first block
PARTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Attention:
    """One layer's attention as it is computed: after rotary embeddings and norms.

    query, key, value: (B, T, W) each; keys and values may have fewer heads, so a smaller W.
    num_heads, num_key_heads: of the queries; of keys and values. scale: of the scores Q K'.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    num_heads: int
    num_key_heads: int
    scale: float

    def split(self, sizes: Sequence[int]) -> list["Attention"]:
        """Cut into ranges of `sizes` sequences; backward joins their gradients once."""
        parts = zip(*(getattr(self, part).split(list(sizes)) for part in PARTS), strict=True)
        return [dataclasses.replace(self, **dict(zip(PARTS, own, strict=True))) for own in parts]


Found = dict[int, "torch.Tensor | Attention | None"]  # by layer


def blocks_of(model: nn.Module) -> nn.ModuleList | None:
    """Return the one list that holds a module for each layer; None where a model has none."""
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [found for _, found in outermost_lists(model.base_model) if len(found) == num_layers]
    return lists[0] if len(lists) == 1 else None


@contextlib.contextmanager
def recording_blocks(model: nn.Module, layers: Iterable[int]) -> Iterator[Found]:
    """Record the outputs (B, T, D) of blocks, and of the embeddings, during a forward pass."""
    found: Found = {}
    blocks = blocks_of(model)
    hooks = []
    for layer in layers:
        if layer == EMBEDDINGS:
            keep = _keeping_input(found)
            hooks.append(blocks[0].register_forward_pre_hook(keep, with_kwargs=True))
        else:
            hooks.append(blocks[layer].register_forward_hook(_keeping_output(found, layer)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _keeping_output(found: Found, layer: int) -> Callable:
    def keep(block, inputs, output) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    return keep


def _keeping_input(found: Found) -> Callable:
    def keep(block, args, kwargs) -> None:
        found[EMBEDDINGS] = args[0] if args else kwargs["hidden_states"]

    return keep


@contextlib.contextmanager
def recording_attention(model: nn.Module, layers: Iterable[int]) -> Iterator[Found]:
    """Record the Attention of layers during a forward pass.

    transformers' table of attention functions gets one in place of the model's that records and
    calls it. The name in the configuration stays: masks are made by it.
    """
    found: Found = {}
    blocks = blocks_of(model)
    layer_of = {id(module): layer for layer in layers for module in blocks[layer].modules()}
    name = model.config._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name)  # None: each family's own

    def attend(module, query, key, value, *args, **options):
        if (layer := layer_of.get(id(module))) is not None:
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            heads = query.shape[1], key.shape[1]
            parts = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
            # Two calls in one block are none of the attention that was asked for.
            found[layer] = None if layer in found else Attention(*parts, *heads, scale)
        function = plain or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, *args, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not plain:  # it was set there, too
            ALL_ATTENTION_FUNCTIONS[name] = plain


@torch.no_grad()
def probe(model: nn.Module, recording: Callable, layers: Iterable[int], source: str) -> Found:
    """Record a few tokens' forward pass. Raises InputError where a layer cannot be read."""
    layers, name = list(layers), type(model).__name__
    if blocks_of(model) is None:
        raise InputError(f"{source}: the layers of a {name} cannot be told apart; leave it out")
    if getattr(model.config, "layerdrop", 0):
        raise InputError(
            f"{source}: a {name} with layerdrop {model.config.layerdrop:g} skips layers at random;"
            " leave it out, or set layerdrop 0 in its configuration"
        )
    ids_BT = some_ids(model, 2)
    reading = naming_failures(f"{source}: the layers of a {name} cannot be read", "; leave it out")
    with reading, evaluating(model), recording(model, layers) as found:
        hidden = model.base_model(ids_BT, **without_cache(model.base_model)).last_hidden_state
    for layer in layers:
        tensors = _tensors(found.get(layer))
        if not tensors or any(x.shape[:2] != hidden.shape[:2] or x.dim() != 3 for x in tensors):
            what = "output" if recording is recording_blocks else "attention"
            raise InputError(
                f"{source}: the {what} of layer {layer} of a {name} cannot be read: it bypasses"
                " transformers' interface; leave it out, or take another family"
            )
    return found


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, Attention):
        return [getattr(value, part) for part in PARTS]
    return [value] if isinstance(value, torch.Tensor) else []
