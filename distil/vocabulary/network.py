"""A network of fewer vocabulary entries: the same weights, some rows of the tables left out."""

import copy
import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from distil.models.checks import TOLERANCE, evaluating, some_ids, without_cache
from distil.system.failures import naming_failures
from utils import InputError

ID_ENTRY = re.compile(r"(^|_)token_ids?$")  # pad_token_id, eos_token_id, suppress_token_ids, ..


def config_numbers(config) -> set[int]:
    """Return the ids that a configuration names: of padding, start, end, .."""
    return {number for _, value in _id_entries(config) for number in _numbers(value)}


def _id_entries(config) -> Iterator[tuple[str, int | list[int]]]:
    for name, value in config.to_dict().items():
        if ID_ENTRY.search(name) and _numbers(value):
            yield name, value


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int) and not isinstance(one, bool)]


def _renumber(config, new_of: Mapping[int, int]) -> None:
    """Give a configuration the new ids; those outside the vocabulary stay."""
    for name, value in _id_entries(config):
        new = [new_of.get(number, number) for number in _numbers(value)]
        setattr(config, name, new if isinstance(value, list) else new[0])


def trim_network(
    network: nn.Module, kept_K: np.ndarray, new_of: Mapping[int, int], source: str
) -> nn.Module:
    """Build a network whose entry k is the given network's entry kept_K[k].

    Tables, heads and biases of the vocabulary lose their other rows, also those that only pad
    them. The logits of the kept entries are compared with the given network's.

    Raises InputError where they differ, or where some weight cannot be cut.
    """
    config = copy.deepcopy(network.config)
    if config.get_text_config() is not config:
        raise InputError(
            f"{source}: its vocabulary is part of a larger model ({config.model_type}); take a"
            " language model alone"
        )
    num_rows, config.vocab_size = config.vocab_size, len(kept_K)
    _renumber(config, new_of)
    config._attn_implementation = network.config._attn_implementation
    with naming_failures(f"{source}: no model of {len(kept_K)} entries can be built"):
        trimmed = type(network)(config)
    trimmed.to(next(network.parameters()).dtype)
    if getattr(network, "generation_config", None) is not None:
        trimmed.generation_config = copy.deepcopy(network.generation_config)
        _renumber(trimmed.generation_config, new_of)
    own, kept = trimmed.state_dict(), torch.from_numpy(kept_K)
    state = {
        name: _cut(tensor, own[name].shape, num_rows, kept) if name in own else tensor
        for name, tensor in network.state_dict().items()
    }
    wrong = sorted(set(state) ^ set(own))
    wrong = wrong or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise InputError(f"{source}: {wrong[0]} cannot be cut to {len(kept_K)} entries")
    trimmed.load_state_dict(state)
    _require_same_logits(network, trimmed, kept, source)
    return trimmed.eval()


def _cut(
    tensor: torch.Tensor, shape: torch.Size, num_rows: int, kept_K: torch.Tensor
) -> torch.Tensor:
    """Select the kept entries along the dimensions that have become shorter."""
    for dim in range(min(tensor.dim(), len(shape))):
        if tensor.shape[dim] == num_rows and shape[dim] == len(kept_K) != num_rows:
            tensor = tensor.index_select(dim, kept_K.to(tensor.device))
    return tensor


@torch.no_grad()
def _require_same_logits(
    network: nn.Module, trimmed: nn.Module, kept_K: torch.Tensor, source: str
) -> None:
    """Raise InputError unless both give the kept entries the same logits, within rounding."""
    ids_BT = some_ids(trimmed, 2)
    with evaluating(network, trimmed):
        expected = network(kept_K[ids_BT], **without_cache(network)).logits[..., kept_K]
        found = trimmed(ids_BT, **without_cache(trimmed)).logits
    largest = float(expected.abs().max())
    if float((found - expected).abs().max()) > TOLERANCE * max(largest, 1e-3):
        raise InputError(
            f"{source}: computes something else with fewer entries (logits differ); its"
            f" {type(network).__name__} uses ids in a way of its own"
        )
