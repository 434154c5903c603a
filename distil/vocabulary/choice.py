"""Which entries of a vocabulary are kept: what is obligatory, then the most frequent."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distil.vocabulary.pieces import KINDS, Pieces
from utils import InputError

UNNUMBERED = ("truncation", "padding")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The entries that are kept.

    kept_K: their old ids, ascending; the new id is the place. curve: (entries, share of the counted
    ids that they cover) as entries are added, from the obligatory ones to all that were counted.
    """

    kept_K: np.ndarray
    curve: list[tuple[int, float]]

    @property
    def new_of(self) -> dict[int, int]:
        """Old id -> new id."""
        return {int(old): new for new, old in enumerate(self.kept_K)}

    @property
    def coverage(self) -> float:
        """The share of the counted ids, without special tokens, that is kept."""
        reached = [share for entries, share in self.curve if entries <= len(self.kept_K)]
        return reached[-1]


def pieces_of(backend: Tokenizer, source: str) -> Pieces:
    """Return the entries of a tokenizer's model.

    Raises InputError for a kind of model that is not known, and for merges drawn at random.
    """
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] not in KINDS:
        raise InputError(
            f"{source}: its tokenizer's model is {model['type']}; only {', '.join(KINDS)} can be"
            " trimmed"
        )
    if model.get("dropout"):
        raise InputError(
            f"{source}: its tokenizer drops merges at random (dropout {model['dropout']}); set it"
            " to null in tokenizer.json"
        )
    parts = json.dumps(content["pre_tokenizer"])
    return KINDS[model["type"]](model, is_byte_level='"ByteLevel"' in parts)


def special_numbers(backend: Tokenizer) -> set[int]:
    """Return the ids of added tokens, and of those that are put around a text."""
    content = json.loads(backend.to_str())
    return {token["id"] for token in content["added_tokens"]} | set(
        _ids_in(content["post_processor"])
    )


def _ids_in(part: Any) -> Iterator[int]:
    """Yield the ids in a post-processor's JSON."""
    if isinstance(part, dict):
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            yield from (part["sep"][1], part["cls"][1])
        yield from part.get("ids", [])
        for value in part.values():
            yield from _ids_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from _ids_in(value)


def choose(
    pieces: Pieces,
    special: Iterable[int],
    counts_V: np.ndarray,
    keep: int | None,
    coverage: float | None,
) -> Choice:
    """Choose entries: `keep` of them, or as few as cover a share of the counted ids.

    special: ids that stay whatever was counted; the counted ids do not include them. counts_V: of
    each id. Raises InputError where `keep` is less than what must stay.
    """
    special = set(special)
    counted_V = counts_V.copy()
    counted_V[list(special)] = 0
    counted = [int(number) for number in np.flatnonzero(counted_V) if number in pieces.piece_of]
    if not counted:
        raise InputError("--token_counts, --data_file: counts no ids but special tokens'")
    kept = special | _closed(pieces, pieces.obligatory() | pieces.characters(counted))
    if keep is not None and keep < len(kept):
        raise InputError(
            f"--keep {keep}: {len(kept)} entries must stay (special tokens, bytes, characters of"
            " the counted text); expected at least that"
        )
    total = int(counted_V.sum())
    reached = int(counted_V[list(kept)].sum())
    curve = [(len(kept), reached / total)]
    ids = np.array(sorted(pieces.piece_of), np.int64)
    limit = keep if keep is not None else len(special | set(pieces.piece_of))
    chosen: set[int] | None = None
    for number in map(int, ids[np.argsort(-counted_V[ids], kind="stable")]):
        is_enough = len(kept) >= limit if keep is not None else reached >= coverage * total
        if chosen is None and is_enough:
            chosen, limit = set(kept), len(counted_V)
        if chosen is not None and not counted_V[number]:  # the curve's end
            break
        new = pieces.needed(number) - kept
        if new and len(kept) + len(new) <= limit:
            kept |= new
            reached += int(counted_V[list(new)].sum())
            curve.append((len(kept), reached / total))
    return Choice(np.array(sorted(chosen or kept), np.int64), curve)


def _closed(pieces: Pieces, numbers: Iterable[int]) -> set[int]:
    """Add to entries what they are built from."""
    return set().union(*(pieces.needed(number) for number in numbers))


# --------------------------------------------------------------------------------------------------
# The tokenizer of the kept entries
# --------------------------------------------------------------------------------------------------


def trimmed_tokenizer(backend: Tokenizer, pieces: Pieces, new_of: Mapping[int, int]) -> Tokenizer:
    """Return the tokenizer of the kept entries under their new ids."""
    content = json.loads(backend.to_str())
    added = [{**token, "id": new_of[token["id"]]} for token in content["added_tokens"]]
    content |= {
        **dict.fromkeys(UNNUMBERED),
        "model": pieces.trimmed(new_of),
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": _renumbered(content["post_processor"], new_of),
    }
    return Tokenizer.from_str(json.dumps(content))


def _renumbered(part: Any, new_of: Mapping[int, int]) -> Any:
    """Return a post-processor's JSON with new ids."""
    if isinstance(part, list):
        return [_renumbered(value, new_of) for value in part]
    if not isinstance(part, dict):
        return part
    found = {key: _renumbered(value, new_of) for key, value in part.items()}
    if part.get("type") in ("BertProcessing", "RobertaProcessing"):
        for end in ("sep", "cls"):
            found[end] = [part[end][0], new_of[part[end][1]]]
    if isinstance(part.get("ids"), list):
        found["ids"] = [new_of[number] for number in part["ids"]]
    return found
