"""Configurations and files by hub name or local folder, with one line for each error."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from distil.models.bounds import ENTRIES, check_archive, check_counts, without_kernels
from distil.models.names import model_folder
from distil.system.json_files import read_json
from utils import InputError, one_line

MODEL_JSON_BYTES = 2**28  # of a tokenizer.json with a million entries


def fetch_files(name: str, files: Sequence[str], flag: str) -> dict[str, str]:
    """Fetch files of a hub repository: name -> path of each that exists. Raises InputError."""
    paths: dict[str, str | None] = {}
    with quiet_transformers():
        try:
            for file in files:
                paths[file] = transformers.utils.cached_file(
                    name, file, _raise_exceptions_for_missing_entries=False
                )
                # Without a network, stop after one file: each is retried for a while.
                if not _is_in_hub_cache(name):
                    raise OSError("the hub did not answer, and no file of it is cached")
        except Exception as error:  # no such repository, no access, no network
            raise InputError(_not_found(flag, name, error)) from error
    return {file: path for file, path in paths.items() if path is not None}


def _is_in_hub_cache(name: str) -> bool:
    """Test whether the hub's cache knows a repository, if only that it lacks some file."""
    folder = f"models--{name.replace('/', '--')}"
    return os.path.isdir(os.path.join(huggingface_hub.constants.HF_HUB_CACHE, folder))


def _not_found(flag: str, name: str, error: Exception) -> str:
    if os.path.isdir(name):
        return (
            f"{flag} {name}: holds no readable config.json of a model ({one_line(error)}); name a"
            " model's folder"
        )
    return f"{flag} {name}: neither a local folder nor a model on the hub ({one_line(error)})"


def read_model_json(path: str | None, where: str, wanted: Any = dict) -> dict:
    """Read a JSON file of a model; {} without a path. Raises InputError naming `where`."""
    if path is None:
        return {}
    where, remedy = f"{where}: {Path(path).name}", "take another copy"
    return read_json(path, where, remedy, wanted, strict=False, max_bytes=MODEL_JSON_BYTES)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings, progress bars and retries: our messages take one line."""
    hub_logger = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers.logging.get_verbosity(), hub_logger.level
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    hub_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        hub_logger.setLevel(hub_level)
        if bars:
            transformers.logging.enable_progress_bar()


def _read_entries(name: str, source: str) -> dict[str, Any]:
    """Read config.json before any class makes something of it; {} where there is none."""
    path = None
    with quiet_transformers(), contextlib.suppress(Exception):  # AutoConfig says what is missing
        path = transformers.utils.cached_file(
            name, "config.json", _raise_exceptions_for_missing_entries=False
        )
    return read_model_json(path, source, ENTRIES)


def load_config(
    model_type: str | None,
    name: str,
    flag: str,
    trust_remote_code: bool = False,
    **entries: Any,
):
    """Load a model's configuration by hub name or folder.

    trust_remote_code: run Python files that come with the model if it needs them, and kernels of
    the hub. entries: override those of the file. Raises InputError if the model is not of
    model_type (None: any), or its sizes are no model's.
    """
    name = model_folder(name)
    source = f"{flag} {name}"
    check_counts(_read_entries(name, source), source)
    with quiet_transformers():
        try:  # trust_remote_code is always passed: the default asks on the terminal
            config = transformers.AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code, **entries
            )
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"{flag} {name}: needs its own Python files, which would run with all your"
                    " rights (remote code); take another model, or pass --trust_remote_code if you"
                    " trust its author (extract.py, train.py, evaluate_lm.py)"
                ) from error
            raise InputError(_not_found(flag, name, error)) from error
    if model_type is not None and config.model_type != model_type:
        raise InputError(
            f"{flag} {name}: is a {config.model_type} model, expected {model_type}; correct the"
            " type or the name"
        )
    return config if trust_remote_code else without_kernels(config, source)


def check_weight_files(name: str, flag: str) -> None:
    """Raise InputError where a model's archives of weights unpack to more bytes than they have."""
    with quiet_transformers():
        paths = weight_files(name)
    for path in paths:
        check_archive(path, f"{flag} {path}")


def weight_files(name: str) -> list[Path]:
    """List a model's files of weights: one, or the shards that an index names."""
    name = model_folder(name)
    for file in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        with quiet_transformers():
            path = transformers.utils.cached_file(
                name, file, _raise_exceptions_for_missing_entries=False
            )
        if path and file.endswith(".index.json"):
            index = read_model_json(path, name, {"weight_map": {...: str}})
            shards = set(index["weight_map"].values())
            return [Path(transformers.utils.cached_file(name, shard)) for shard in sorted(shards)]
        if path:
            return [Path(path)]
    return []
