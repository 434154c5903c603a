"""Data sets of the `datasets` library as sources: on the hub, in a local repository, or saved.

A data set is read shard by shard: with streaming the shards are its files, which are read where
they are; without, the library first writes a copy into its cache, read in runs of rows.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distil.data.text_sources import (
    DATASET,
    Source,
    find_sources,
    missing_field,
    quiet_datasets,
)
from distil.system.files import json_digest
from distil.system.json_files import MAX_BYTES, read_json
from utils import InputError, one_line

ROWS_PER_SOURCE = 2**17  # of a data set that is not streamed
# The files by which `save_to_disk` marks the folders of a data set, and of one for each split.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
TEXT = (str, None)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Which data set is read, and how: see `datasets.load_dataset`; config, split: None if open."""

    name: str
    config: str | None = None
    split: str | None = None
    streaming: bool = False

    @property
    def label(self) -> str:
        """Name for messages: 'NAME/CONFIG[SPLIT]'."""
        return "/".join(filter(None, (self.name, self.config))) + f"[{self.split or 'train'}]"


def find_dataset(dataset: Dataset, text_field: str, flag: str = "--dataset_name") -> list[Source]:
    """List a data set's shards as sources. Raises InputError naming what can't be found."""
    if is_saved(dataset.name):
        return saved_sources(dataset.name, dataset.split, flag)
    datasets = quiet_datasets()
    split = dataset.split or "train"
    try:
        with _quiet_hub():
            builder = datasets.load_dataset_builder(dataset.name, dataset.config)
            content = _content_digest(builder, split)
            if dataset.streaming:
                table = builder.as_streaming_dataset(split=split)
            else:
                builder.download_and_prepare()
                table = builder.as_dataset(split=split)
            fields = list(table.features or next(iter(table), {}))
    except Exception as error:  # the library raises anything
        flags = f"{flag} {dataset.name}"
        flags += f" --dataset_config {dataset.config}" if dataset.config else ""
        raise InputError(
            f"{flags} --split {split}: the data set can't be opened ({one_line(error, 300)}); check"
            " the names"
        ) from error
    if text_field not in fields:
        raise InputError(missing_field(flag, dataset.label, 1, text_field, fields))
    if table.features:
        table = table.select_columns([text_field])
    shards = list(_shards(table, dataset.streaming))
    if not shards:
        raise InputError(f"{flag} {dataset.label}: the data set is empty; expected text")
    return [
        Source(f"{dataset.label}, shard {k} of {len(shards)}", DATASET, 0, table=shard, tag=content)
        for k, shard in enumerate(shards, start=1)
    ]


def _shards(table: Any, streaming: bool) -> Iterator[Any]:
    if streaming:
        num = table.num_shards
        yield from (table.shard(num_shards=num, index=k) for k in range(num))
    else:
        for start in range(0, len(table), ROWS_PER_SOURCE):
            yield table.select(range(start, min(start + ROWS_PER_SOURCE, len(table))))


def _content_digest(builder: Any, split: str) -> str:
    """Return a digest of the files' names and versions: commits on the hub, times in a folder."""
    files = getattr(builder.config, "data_files", None) or {}
    known = {str(name): part for name, part in files.items()}.get(split, [])
    versions = [list(map(str, one)) for one in getattr(known, "origin_metadata", [])]
    return json_digest([builder.hash, list(map(str, known)), versions])


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's lines on each retry: our message takes one line."""
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logger.setLevel(level)


# --------------------------------------------------------------------------------------------------
# Folders of save_to_disk
# --------------------------------------------------------------------------------------------------


def is_saved(path: str) -> bool:
    """True for a folder that `save_to_disk` wrote: its files alone do not say their order."""
    marks = (Path(path, SAVED), b'"_data_files"'), (Path(path, SAVED_SPLITS), b'"splits"')
    return any(
        file.is_file() and file.stat().st_size <= MAX_BYTES and mark in file.read_bytes()
        for file, mark in marks
    )


def find_files(path: str, split: str | None = None, flag: str = "--file_path") -> list[Source]:
    """List the sources of a path of any kind: see find_sources and saved_sources."""
    return saved_sources(path, split, flag) if is_saved(path) else find_sources(path, flag)


def saved_sources(path: str, split: str | None, flag: str) -> list[Source]:
    """List the files of a folder of `save_to_disk` in their order. Raises InputError."""
    folder = Path(path)
    try:
        if (folder / SAVED_SPLITS).is_file():
            splits = _read(folder / SAVED_SPLITS, {"splits": [str]}, flag)["splits"]
            if split is None and len(splits) == 1:
                (split,) = splits
            if split not in splits:
                raise InputError(
                    f"{flag} {path}: holds the splits {', '.join(splits)}; name one with"
                    " --split, or its folder"
                )
            folder /= split
        state = _read(folder / SAVED, {"_data_files": [{"filename": str}], "_split": TEXT}, flag)
        names = [file["filename"] for file in state["_data_files"]]
        files = [str(folder / name) for name in names]
        sources = [Source(file, "arrow", os.path.getsize(file)) for file in files]
    except OSError as error:
        raise InputError(
            f"{flag} {path}: is no readable folder of save_to_disk ({one_line(error)}); save it"
            " again"
        ) from error
    if split is not None and state.get("_split") not in (None, split):
        raise InputError(
            f"{flag} {path}: holds the split {state['_split']}, not --split {split}; correct it"
        )
    return sources


def _read(path: Path, wanted: dict, flag: str) -> dict:
    return read_json(path, f"{flag} {path}", "save the data set again", wanted)
