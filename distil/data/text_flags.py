"""The flags that say where text is, shared by the programs that read it, and the sources they name.

Imports neither torch, transformers nor datasets, so that programs start at once.
"""

import argparse

from distil.data.decoding import ERRORS
from distil.data.hub_datasets import Dataset, find_dataset, find_files, is_saved
from distil.data.text_sources import Source
from utils import InputError

TEXT_PATHS = (
    "UTF-8 text, one sequence a line: a file, a folder, or a quoted glob; .txt, .jsonl, both also"
    " as .gz; any file of the datasets library (.parquet, .csv, ..); a folder of its save_to_disk;"
    " a named pipe, or - for the standard input"
)


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the text in records and of text that is not valid."""
    add = parser.add_argument
    add(
        "--text_field",
        default="text",
        help="the text's field or column in .jsonl, .parquet, .. (default: %(default)s)",
    )
    add(
        "--errors",
        default="strict",
        choices=ERRORS,
        help=(
            "text that is not UTF-8: stop, skip the line, or replace the bytes by U+FFFD; counted"
            " (default: %(default)s)"
        ),
    )


def add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a data set of the datasets library."""
    add = parser.add_argument
    add(
        "--dataset_name",
        help=(
            "in place of --file_path, a data set of the datasets library: hub name, or folder of"
            " files; an interrupted run is continued by the same command"
        ),
    )
    add("--dataset_config", help="its configuration, where it has several")
    add("--split", help="its split; also of a folder of save_to_disk (default: train)")
    add(
        "--streaming",
        action="store_true",
        help="read the data set where it is, without a copy in the cache of the library",
    )


def dataset_of(args: argparse.Namespace) -> Dataset | None:
    """Return the data set that the flags name, None without one. Raises InputError."""
    if args.dataset_name is None:
        for flag in ("dataset_config", "streaming"):
            if getattr(args, flag):
                raise InputError(f"--{flag}: is for a data set; name it with --dataset_name")
        return None
    if args.file_path is not None:
        raise InputError(
            f"--file_path, --dataset_name {args.dataset_name}: give one of them, text is read from"
            " one place"
        )
    if not args.dataset_name:
        raise InputError("--dataset_name '': expected a hub name or a folder")
    return Dataset(args.dataset_name, args.dataset_config, args.split, args.streaming)


def flag_of(dataset: Dataset | None) -> str:
    """Return the flag that names the text, for messages."""
    return "--file_path" if dataset is None else "--dataset_name"


def check_split(paths: list[str], split: str | None) -> None:
    """Raise InputError for a --split of paths that have none."""
    if split is not None and not any(map(is_saved, paths)):
        raise InputError(
            f"--split {split}: is for --dataset_name or a folder of save_to_disk; omit it"
        )


def find_text(paths: list[str], dataset: Dataset | None, args: argparse.Namespace) -> list[Source]:
    """List the sources of a data set, or of all paths. Raises InputError."""
    if dataset is not None:
        return find_dataset(dataset, args.text_field)
    check_split(paths, args.split)
    return [source for path in paths for source in find_files(path, args.split)]
