"""Token files and counts under the new ids of a trimmed vocabulary, with cards that follow."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from distil.data.cards import (
    check_tokenizer,
    read_card,
    read_verified_card,
    require_card_output,
    tokenizer_problem,
    write_token_counts,
)
from distil.data.encoding import EncodedBlock, Encoding
from distil.data.safe_pickle import read_pickle
from distil.data.tally import ManyUnknown, Tally
from distil.data.token_files import (
    FORMATS,
    TokenFile,
    check_ids_below,
    files_of,
    find_token_file,
    open_token_file,
    writing_tokens,
)
from distil.system.files import require_output
from distil.system.outputs import is_beside_card
from distil.vocabulary.remap import Converter
from utils import InputError, bar_options, logger, raise_problems

CHUNK_SEQUENCES = 4096
KEPT_FACTS = ("errors", "text_field", "seed", "sources")


def output_of(path: str, name: str) -> tuple[str, str]:
    """Name the file that `path` is converted to: (format, path). name: of the trimmed teacher."""
    file_format, place = find_token_file(path)
    suffix = FORMATS[file_format].suffix
    return file_format, f"{place.removesuffix(suffix)}.{name}{suffix}"


def require_outputs(paths: list[str], name: str, *, force: bool) -> None:
    """Raise InputError where a converted file can't be written."""
    options = {"is_own": is_beside_card, "force": force}
    for path in paths:
        file_format, output = output_of(path, name)
        *files, card = FORMATS[file_format].files(output)
        for file in files:
            require_output(file, "--remap", files_of(path), **options)
        require_card_output(card, "--remap", files_of(path), force=force)


def require_tokenizer(paths: list[str], old: Mapping[str, Any]) -> None:
    """Raise InputError, a line for each file whose card names another tokenizer.

    old: the tokenizer's part of a card.
    """
    cards = {path: read_card(files_of(path)[-1], "--remap") for path in paths}
    problems = (tokenizer_problem(c, old, f"--remap {p}", old["name"]) for p, c in cards.items())
    raise_problems(filter(None, problems))


def remap_file(
    path: str, name: str, converter: Converter, old: Mapping[str, Any], new: Mapping[str, Any]
) -> str:
    """Convert a token file, or counts; return the new file's path.

    old, new: the tokenizers' parts of cards. Raises InputError for files of another tokenizer.
    """
    file_format, output = output_of(path, name)
    if file_format == "pickle" and _holds_counts(path):
        _remap_counts(path, output, converter, old, new)
        return output
    tokens = open_token_file(path, "--remap")
    check_tokenizer(tokens.card, old, f"--remap {path}", old["name"])
    check_ids_below(tokens.ids_M, len(converter.new_V), f"--remap {path}", old["name"])
    _remap_tokens(tokens, output, file_format, converter, new)
    return output


def _holds_counts(path: str) -> bool:
    content = read_pickle(path, "--remap")
    return isinstance(content, list) and bool(content) and isinstance(content[0], int)


def _remap_counts(
    path: str, output: str, converter: Converter, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Convert counts; refuse those that count lost ids: the pieces in their place are not known."""
    card = read_verified_card(path, "--remap")
    check_tokenizer(card, old, f"--remap {path}", old["name"])
    counts_V = np.asarray(read_pickle(path, "--remap"), np.int64)
    lost = np.flatnonzero(counts_V[: len(converter.new_V)] * (converter.new_V < 0)[: len(counts_V)])
    if len(counts_V) < len(converter.new_V) or counts_V[len(converter.new_V) :].any() or len(lost):
        what = f"{len(lost)} ids that are lost" if len(lost) else "another vocabulary's ids"
        raise InputError(
            f"--remap {path}: counts {what}; convert the token file, and count that with"
            " token_counts.py"
        )
    is_kept = converter.new_V >= 0
    new_V = np.zeros(int(converter.new_V.max()) + 1, np.int64)
    new_V[converter.new_V[is_kept]] = counts_V[: len(is_kept)][is_kept]
    write_token_counts(output, new_V, {"tokenizer": dict(new), "sources": [{"path": path}]})


def _remap_tokens(
    tokens: TokenFile, output: str, file_format: str, converter: Converter, new: Mapping[str, Any]
) -> None:
    special = new["special_ids"]
    encoding = Encoding(
        None, special["start"], special["end"], new["vocab_size"] - 1, special["unknown"]
    )
    tally, many_unknown = Tally(encoding), ManyUnknown(special["unknown"])
    bar = tqdm(total=len(tokens.ids_M), unit="id", unit_scale=True, desc="remap", **bar_options())
    with bar, writing_tokens(output, file_format, encoding.dtype) as (writer, card):
        for ids_M, lengths_N, num_read in _converted(tokens, converter, encoding.dtype):
            writer.append(ids_M, lengths_N)
            tally.add(EncodedBlock(ids_M, lengths_N, 0, 0, 0, 0))
            many_unknown.add(ids_M, lengths_N)
            bar.update(num_read)
        old = tokens.card.get("counts") or {}
        counts = {name: old.get(name, 0) for name in ("words", "blank_lines", "bad_lines")}
        facts = {name: tokens.card[name] for name in KEPT_FACTS if name in tokens.card}
        card |= {"tokenizer": dict(new), "dtype": encoding.dtype.name, **facts}
        card |= {"counts": tally.counts() | counts, "many_unknown": many_unknown.numbers}
    text = "%s: tokenized %d of %d sequences again, for they hold lost ids%s."
    about = f" ({converter.num_approximate} of them not as their text would be)"
    about = about if converter.num_approximate else ""
    logger.info(text, output, converter.num_retokenized, len(tokens.lengths_N), about)


def _converted(
    tokens: TokenFile, converter: Converter, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield (ids_M, lengths_N, old ids read) of the sequences that follow, under new ids."""
    place = 0
    for first in range(0, len(tokens.lengths_N), CHUNK_SEQUENCES):
        lengths = tokens.lengths_N[first : first + CHUNK_SEQUENCES].astype(np.int64)
        ends = place + np.cumsum(lengths)
        tokens.check(np.array([place]), np.array([ends[-1]]))
        found = [
            converter.convert(tokens.ids_M[start:end])
            for start, end in zip(ends - lengths, ends, strict=True)
        ]
        new_N = np.fromiter(map(len, found), tokens.lengths_N.dtype, len(found))
        yield np.concatenate(found).astype(dtype), new_N, int(ends[-1]) - place
        place = int(ends[-1])
