"""Bounds of what a model's files ask for: checked before memory, time or foreign code is spent."""

from __future__ import annotations

import functools
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import psutil

from utils import InputError, logger

if TYPE_CHECKING:
    from torch import nn

# Entries of a configuration that count modules: the end of their names, and the most of them.
MOST = {r"layers?$": 1000, r"experts?$": 10_000}
MAX_SINUSOIDAL = 2**16  # positions: transformers computes their table in Python
# The types of the entries that this program reads. A configuration may lack any of them.
COUNT = (int, None)
ENTRIES = {
    **{"model_type": (str, None), "architectures": ([str], None), "auto_map": (dict, None)},
    **{"vocab_size": COUNT, "pad_token_id": COUNT, "max_position_embeddings": COUNT},
    **{"tie_word_embeddings": (bool, None), "is_encoder_decoder": (bool, None)},
}

# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


def check_counts(entries: Mapping[str, Any], source: str) -> None:
    """Raise InputError where a configuration asks for more modules than any model has."""
    for name, value in _numbers(entries):
        for ending, most in MOST.items():
            if value > most and re.search(ending, name):
                raise InputError(f"{source}: {name} is {value}, expected at most {most}")
    positions = entries.get("max_position_embeddings")
    if entries.get("sinusoidal_pos_embds") and (positions or 0) > MAX_SINUSOIDAL:
        raise InputError(
            f"{source}: max_position_embeddings is {positions}, expected at most {MAX_SINUSOIDAL}"
            " sinusoidal ones"
        )


def _numbers(entries: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration and of the configurations in it."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif type(value) is int:
            yield name, value


def check_memory(config, build: Callable[[], nn.Module], source: str) -> None:
    """Raise InputError where a model's float32 weights do not fit into this machine's memory.

    build: makes the model, here without memory. Small configurations are not built.
    """
    sizes = sorted(value for _, value in _numbers(config.to_dict()))
    num_layers = max(getattr(config, "num_hidden_layers", 1) or 1, 1)
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    if len(sizes) < 2 or 4 * num_layers * sizes[-1] * sizes[-2] < memory:  # no table is larger
        return
    import torch

    with torch.device("meta"):
        num_bytes = 4 * sum(parameter.numel() for parameter in build().parameters())
    if num_bytes > memory:
        raise InputError(
            f"{source}: its weights would take {num_bytes / 1e9:,.0f} GB, this machine has"
            f" {memory / 1e9:,.0f} GB; correct its sizes, or take a smaller model"
        )


def check_archive(path: str | os.PathLike, source: str) -> None:
    """Raise InputError for weights that unpack to more bytes than their file has.

    torch writes its archives uncompressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):  # of another format
        return
    if num_bytes > (size := os.path.getsize(path)):
        raise InputError(
            f"{source}: has {size:,} bytes and unpacks to {num_bytes:,}, which torch's files do"
            " not; save it again with torch.save"
        )


# --------------------------------------------------------------------------------------------------
# Code from the hub
# --------------------------------------------------------------------------------------------------

# What computes attention and experts without code from elsewhere.
BUILT_IN = {
    "_attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "_experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
}
# Ways to quantize, and types of models, for which transformers loads kernels of the hub.
QUANTIZED_BY_KERNELS = ("mxfp4", "fp8", "fbgemm_fp8", "eetq", "metal", "nvfp4")
WITH_KERNELS = ("rwkv", "yoso", "mra")


def without_kernels(config, source: str):
    """Return a configuration that names no kernels of the hub: they are code, run as any other.

    Raises InputError where a model can't do without.
    """
    from transformers.utils.import_utils import is_kernels_available

    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for name, built_in in BUILT_IN.items():
        stated = [getattr(part, name, None) for part in parts if part is not None]
        foreign = [one for one in stated if one not in built_in]
        if foreign:
            _warn_of_kernel(source, name[1:], f"{foreign[0]!r:.60}")
            setattr(config, name, None)
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if is_kernels_available() and (
        method in QUANTIZED_BY_KERNELS or config.model_type in WITH_KERNELS
    ):
        raise InputError(
            f"{source}: a {method or config.model_type} model loads code from the hub (kernels);"
            " take another model, or pass --trust_remote_code if you trust its authors"
        )
    return config


@functools.cache  # once: a configuration is read in several places
def _warn_of_kernel(source: str, name: str, value: str) -> None:
    text = "%s: its %s is %s, which may load code from the hub (a kernel): ignored, the default is"
    logger.warning(f"{text} used; --trust_remote_code admits it.", source, name, value)
