"""Cards: the JSON file beside a token file or a file of counts that says how it was made.

A card holds the tokenizer with fingerprints of its vocabulary and rules, what was counted, and
checksums: of the file, so that damage is found, and of the card itself. Files without a card are
read too.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distil.system.files import atomic_path, atomic_paths, json_digest, require_output
from distil.system.json_files import load_json, type_problem
from utils import InputError, logger, one_line

CARD_FORMAT, CARD_VERSION = "distil-tokens", 1
MAX_VOCAB_SIZE = 2**27  # larger than any vocabulary: a typing error
MAX_CARD_BYTES = 2**30  # checksums of the blocks of 6 TB of ids
# The types of a card's parts, each of which it may lack. Checksums are checked where they are used.
TEXT, COUNT = (str, None), (int, None)
TOKENIZER = {
    **{"type": TEXT, "name": TEXT, "vocab_size": COUNT, "special_ids": ({...: COUNT}, None)},
    **{"vocabulary_sha256": TEXT, "rules": (dict, None), "rules_sha256": TEXT},
    **{"do_lower_case": (bool, None), "strip_accents": (bool, None)},
}
CARD_PARTS = {
    **{"kind": TEXT, "sha256": TEXT, "tokenizer": (TOKENIZER, None), "shard": (dict, None)},
    **{"counts": ({...: int}, None), "many_unknown": ([int], None)},
}


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def is_card(path: str | os.PathLike) -> bool:
    """Return True for a file that begins as cards do, even if it is damaged."""
    with open(path, "rb") as file:
        return f'"format": "{CARD_FORMAT}"'.encode() in file.read(100)


def read_card(path: str | os.PathLike, flag: str) -> dict[str, Any]:
    """Read a card, {} if there is none; raise InputError if it is damaged, foreign or newer."""
    if not os.path.isfile(path):
        return {}
    try:
        card = load_json(path, {"format": str}, max_bytes=MAX_CARD_BYTES)
    except ValueError as error:
        raise InputError(
            f"{flag} {path}: is not the card of a token file ({one_line(error)}); make the token"
            " file again"
        ) from error
    if card["format"] != CARD_FORMAT:
        raise InputError(
            f"{flag} {path}: has format {card['format']!r:.40}, expected {CARD_FORMAT!r}; make the"
            " token file again"
        )
    if card.get("version") != CARD_VERSION:
        raise InputError(
            f"{flag} {path}: is of version {card.get('version')}, this program reads version"
            f" {CARD_VERSION}; update the program"
        )
    if card.pop("card_sha256", None) != json_digest(card):
        raise InputError(
            f"{flag} {path}: its checksum is wrong: damaged, or edited; make the token file again"
        )
    if problem := type_problem(card, CARD_PARTS):
        raise InputError(f"{flag} {path}: {problem}; make the token file again")
    return card


def read_verified_card(path: str | os.PathLike, flag: str) -> dict[str, Any]:
    """Read the card of the pickle at `path` and compare the pickle with its checksum; {} if none.

    Raises InputError where they differ, or where the card describes another kind of file.
    """
    card = read_card(f"{path}.json", flag)
    if not card:
        logger.info("%s %s: has no card (%s.json), so it is not verified.", flag, path, path)
    elif "sha256" not in card:
        raise InputError(
            f"{flag} {path}: {path}.json is the card of a {card.get('kind')}, not of this file;"
            " give one of them another name"
        )
    elif card["sha256"] != file_digest(path):
        raise InputError(
            f"{flag} {path}: differs from the checksum in {path}.json: damaged, or changed since;"
            " make it again, or remove the .json if the change was intended"
        )
    return card


def check_tokenizer(
    card: Mapping[str, Any], of_model: Mapping[str, Any] | None, source: str, model: str
) -> None:
    """Raise InputError if a file was made with another tokenizer than the model's.

    of_model: `tokenizer_facts` of the model's tokenizer, None if unknown. source, model: names of
    the file and the model for the message.
    """
    problem = tokenizer_problem(card, of_model, source, model)
    if problem:
        raise InputError(problem)
    of_file = card.get("tokenizer") or {}
    if of_file and "rules_sha256" in (of_model or {}) and "rules_sha256" not in of_file:
        text = "%s: its card is an older one, without the tokenizer's rules: only the vocabulary"
        logger.info(f"{text} was compared.", source)


def tokenizer_problem(
    card: Mapping[str, Any], of_model: Mapping[str, Any] | None, source: str, model: str
) -> str | None:
    """Describe how a file's tokenizer differs from a model's; None if they agree.

    The parameters are those of `check_tokenizer`.
    """
    of_file = card.get("tokenizer") or {}
    difference = tokenizer_difference(of_file, of_model or {}, "its", f"that of {model}")
    if difference is None:
        return None
    return (
        f"{source}: was made with the tokenizer {of_file.get('name')}, another than that of"
        f" {model}: {difference}; binarize and count with that model's tokenizer (--tokenizer_type"
        " auto)"
    )


def tokenizer_difference(
    facts: Mapping[str, Any], others: Mapping[str, Any], whose: str, other: str
) -> str | None:
    """Describe how two tokenizers differ in vocabulary or rules, as `tokenizer_facts` has them.

    Returns None if they agree in all that both state. whose, other: names for the message.
    """

    def differ(key: str) -> bool:
        return None not in (facts.get(key), others.get(key)) and facts[key] != others[key]

    if differ("vocabulary_sha256"):
        stated = [
            f"{one.get('vocab_size')} entries, fingerprint {one['vocabulary_sha256'][:12]}"
            for one in (facts, others)
        ]
        return f"{whose} vocabulary has {stated[0]}, {other} {stated[1]}"
    if differ("rules_sha256"):
        rules, known = facts.get("rules") or {}, others.get("rules") or {}
        part = next((part for part in known if rules.get(part) != known[part]), "rules")
        values = [
            found.get(part, f"digest {one['rules_sha256'][:12]}")
            for found, one in ((rules, facts), (known, others))
        ]
        return f"{whose} {part.replace('_', ' ')} is {values[0]}, {other} {values[1]}"
    # Older cards hold the flags of their program only.
    option = next(filter(differ, ("do_lower_case", "strip_accents")), None)
    if option and "rules_sha256" not in facts:
        return f"{whose} {option} is {facts[option]}, {other} {others[option]}"
    return None


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError if --vocab_size is outside 1 to MAX_VOCAB_SIZE."""
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(f"--vocab_size {vocab_size}: expected 1 to {MAX_VOCAB_SIZE}")


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write_card(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a card atomically."""
    with atomic_path(path) as temporary:
        write_card_to(temporary, content)


def write_card_to(path: Path, content: Mapping[str, Any]) -> None:
    """Write a card in place, with its format and version first and its checksum last."""
    card = {"format": CARD_FORMAT, "version": CARD_VERSION, **content}
    path.write_text(
        json.dumps({**card, "card_sha256": json_digest(card)}, indent=2) + "\n", encoding="utf-8"
    )


def require_card_output(
    path: str, flag: str, inputs: Sequence[str] = (), *, force: bool = False
) -> None:
    """Raise InputError if `path` can't be written, or is a file that is not a card."""
    require_output(path, flag, inputs, is_own=is_card, force=force)


def write_token_counts(
    path: str | os.PathLike, counts_V: np.ndarray, card: Mapping[str, Any]
) -> None:
    """Write counts as 2019 did, a pickled list of ints, and their card."""
    with atomic_paths(path, f"{path}.json", stale=[f"{path}.json"]) as (temporary, card_path):
        temporary.write_bytes(pickle.dumps(counts_V.tolist(), protocol=pickle.HIGHEST_PROTOCOL))
        write_card_to(card_path, {"kind": "counts", **card, "sha256": file_digest(temporary)})


def file_digest(path: str | os.PathLike) -> str:
    """Return a file's SHA-256 as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
