"""Load and check tokenizers, read the ids of their roles, and fingerprint vocabularies."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
import transformers

from distil.data.token_files import SpecialIds
from distil.models.architectures import ANY_TOKENIZER, ARCHITECTURES, AUTO, Architecture
from distil.models.hub import fetch_files, quiet_transformers, read_json
from distil.models.vocabulary_files import check_vocabulary_files, vocabulary_files
from utils import InputError, logger, one_line

MASK_TOKENS = {"[MASK]", "<mask>"}


def load_tokenizer(
    architecture: Architecture, name: str, flag: str, do_lower_case: bool | None = None
):
    """Load an architecture's tokenizer by hub name or folder and check its kind.

    do_lower_case (BERT only): None means as tokenizer_config.json says, or without that file, True
    if the vocabulary has no capitals (transformers 5 would always lower-case). Raises InputError
    naming `flag`.
    """
    try:
        load = _load_named_tokenizer if architecture.is_named else _load_any_tokenizer
        return load(architecture, name, flag, do_lower_case)
    except InputError:
        raise
    except Exception as error:  # loaders can raise anything on damaged files
        kind = f"{architecture.name} " if architecture.is_named else ""
        raise InputError(
            f"{flag} {name}: no {kind}tokenizer could be loaded ({one_line(error)})"
        ) from error


WORD_PIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_word_pieces(
    text_file: str | os.PathLike, vocab_size: int, lowercase: bool = True
) -> dict[str, int]:
    """Train a WordPiece vocabulary on a text, reproducibly: token -> id.

    The library numbers continuing characters ("##a") in the order of a hash table, which differs
    between processes, and breaks ties between merges by these numbers. A second training therefore
    gets them in alphabetical order.
    """
    continuing: list[str] = []
    for _ in range(2):
        trainer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
        special = [*WORD_PIECE_SPECIALS, *continuing]
        trainer.train(
            [str(text_file)], vocab_size=vocab_size, show_progress=False, special_tokens=special
        )
        vocabulary = trainer.get_vocab()
        continuing = sorted(t for t in vocabulary if t.startswith("##") and len(t) == 3)
    return vocabulary


def resolve_tokenizer(tokenizer_type: str, name: str) -> Architecture:
    """Return a tokenizer type's row; for AUTO the row of the model in the same folder."""
    if tokenizer_type != AUTO:
        return ARCHITECTURES[tokenizer_type]
    with quiet_transformers(), contextlib.suppress(Exception):  # a folder may hold no model
        found = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        return ARCHITECTURES.get(found, ANY_TOKENIZER)
    return ANY_TOKENIZER


def _load_any_tokenizer(
    architecture: Architecture, name: str, flag: str, do_lower_case: bool | None
):
    """Load a fast tokenizer of any class that has tokens for all required roles."""
    options = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    check_vocabulary_files(vocabulary_files(name), f"{flag} {name}")
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=architecture.runs_remote_code, **options
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{flag} {name}: its {type(tokenizer).__name__} is not a fast tokenizer; convert it to"
            " the tokenizers library"
        )
    required = [role for role in ROLES if role not in OPTIONAL_ROLES]
    missing = [role for role in required if _first_token(tokenizer, ROLES[role]) is None]
    if missing:
        wanted = "; ".join(f"{role} ({' or '.join(ROLES[role])})" for role in missing)
        raise InputError(
            f"{flag} {name}: its tokenizer has no token for {wanted}; add one to its"
            " tokenizer_config.json"
        )
    if _first_token(tokenizer, ROLES["start"]) is None:
        text = "%s %s: its tokenizer has no cls_token or bos_token: sequences get no start token."
        logger.info(text, flag, name)
    return tokenizer


# Role -> attributes of the tokenizer; the first one that is set gives the role's token.
ROLES = {
    "start": ("cls_token", "bos_token"),
    "end": ("sep_token", "eos_token"),
    "pad": ("pad_token", "eos_token", "unk_token"),
    "unknown": ("unk_token",),
}
OPTIONAL_ROLES = {"start", "unknown"}


def _first_token(tokenizer, names: Sequence[str]) -> str | None:
    """Return the first of these special tokens that is set and in the vocabulary, or None."""
    vocabulary = tokenizer.get_vocab()
    return next(
        (token for name in names if (token := getattr(tokenizer, name, None)) in vocabulary), None
    )


def _load_named_tokenizer(
    architecture: Architecture, name: str, flag: str, do_lower_case: bool | None
):
    """Load the tokenizer class of a row of ARCHITECTURES, as 2019 did."""
    files = _tokenizer_files(architecture, name, flag)
    check_vocabulary_files(files, f"{flag} {name}")
    declared = read_json(files.get("tokenizer_config.json"), f"{flag} {name}")
    _check_tokenizer_class(architecture, declared, name, flag)
    options = {}
    if architecture.tokenizer_class == "BertTokenizer":
        lower_case = do_lower_case
        if lower_case is None and "do_lower_case" not in declared:
            lower_case = not _has_capitals(files, f"{flag} {name}")
        if lower_case is not None:
            options["do_lower_case"] = lower_case
    with quiet_transformers():
        tokenizer_class = getattr(transformers, architecture.tokenizer_class)
        tokenizer = tokenizer_class.from_pretrained(name, trust_remote_code=False, **options)
    if not tokenizer.model_max_length > 2:
        raise InputError(
            f"{flag} {name}: model_max_length is {tokenizer.model_max_length}, expected above 2;"
            " correct it"
        )
    _check_special_tokens(architecture, tokenizer, files, name, flag)
    return tokenizer


def _tokenizer_files(architecture: Architecture, name: str, flag: str) -> dict[str, str]:
    """Find a tokenizer's files: file name -> path. Raises InputError if the vocabulary is missing.

    transformers 5 would silently make an empty tokenizer.
    """
    wanted = ("tokenizer_config.json", "tokenizer.json", *architecture.vocab_files)
    if os.path.isdir(name):
        paths = {file: os.path.join(name, file) for file in wanted}
        found = {file: path for file, path in paths.items() if os.path.isfile(path)}
    else:
        found = fetch_files(name, wanted, flag)
    if "tokenizer.json" not in found and any(
        file not in found for file in architecture.vocab_files
    ):
        raise InputError(
            f"{flag} {name}: has neither tokenizer.json nor"
            f" {' and '.join(architecture.vocab_files)}; name a {architecture.tokenizer_class}"
            " tokenizer, or another tokenizer type"
        )
    return found


def _check_tokenizer_class(
    architecture: Architecture, declared: dict, name: str, flag: str
) -> None:
    kinds = {
        row.tokenizer_class.removesuffix("Tokenizer"): row.tokenizer_class
        for row in ARCHITECTURES.values()
    }
    declared_class = str(declared.get("tokenizer_class") or "")
    kind = declared_class.removesuffix("Fast").removesuffix("Tokenizer").removeprefix("Distil")
    if kinds.get(kind, architecture.tokenizer_class) != architecture.tokenizer_class:
        raise InputError(
            f"{flag} {name}: holds a {declared_class}, which is no {architecture.name} tokenizer;"
            " pass the matching type"
        )


def _has_capitals(files: Mapping[str, str], where: str) -> bool:
    if "vocab.txt" in files:
        tokens = Path(files["vocab.txt"]).read_text(encoding="utf-8").splitlines()
    else:
        tokens = read_json(files["tokenizer.json"], where).get("model", {}).get("vocab", {})
    return any(token != token.lower() for token in tokens if not token.startswith("["))


def _check_special_tokens(
    architecture: Architecture, tokenizer, files: dict, name: str, flag: str
) -> None:
    """Raise InputError if special tokens of the type are missing from the vocabulary.

    transformers silently adds them, with ids that the model has no embedding for.
    """
    known = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    content = read_json(files.get("tokenizer.json"), f"{flag} {name}")
    known |= {token["content"] for token in content.get("added_tokens", [])}
    roles = [architecture.start_token, architecture.end_token, architecture.pad_token]
    roles += ["mask_token"] if architecture.is_masked else []
    tokens = {role: getattr(tokenizer, role) for role in roles}
    missing = [f"{role} {token}" for role, token in tokens.items() if token not in known]
    foreign = sorted(MASK_TOKENS & known) if not architecture.is_masked else []
    if foreign:  # RoBERTa's vocabulary holds GPT-2's special token, too
        raise InputError(
            f"{flag} {name}: its vocabulary has {foreign[0]}, a masked model's; expected a"
            f" {architecture.name} vocabulary"
        )
    if missing:
        raise InputError(
            f"{flag} {name}: its vocabulary has no {', no '.join(dict.fromkeys(missing))}; "
            f"expected a {architecture.name} vocabulary; check the type"
        )


def special_ids(architecture: Architecture, tokenizer) -> SpecialIds:
    """Return the ids of start, end, padding and unknown token."""
    if not architecture.is_named:
        tokens = {role: _first_token(tokenizer, names) for role, names in ROLES.items()}
        ids = {
            role: None if token is None else tokenizer.convert_tokens_to_ids(token)
            for role, token in tokens.items()
        }
        return SpecialIds(**ids)
    roles = architecture.start_token, architecture.end_token, architecture.pad_token, "unk_token"
    return SpecialIds(*(getattr(tokenizer, f"{role}_id") for role in roles))


def vocabulary_fingerprint(tokenizer) -> str:
    """Return the SHA-256 of the vocabulary with added tokens; equal ones give ids one meaning."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def vocabulary_difference(own, others) -> str | None:
    """Describe the first difference between two tokenizers' vocabularies, or return None."""
    if vocabulary_fingerprint(own) == vocabulary_fingerprint(others):
        return None
    tokens = [
        {number: token for token, number in tokenizer.get_vocab().items()}
        for tokenizer in (own, others)
    ]
    number = next(
        n
        for n in range(max(map(len, tokens)) + max(map(max, tokens)))
        if tokens[0].get(n) != tokens[1].get(n)
    )
    first, second = (repr(found[number]) if number in found else "nothing" for found in tokens)
    sizes = f"its vocabulary has {len(tokens[0])} tokens, the teacher's {len(tokens[1])}"
    return f"{sizes}, and id {number} is {first}, the teacher's {second}"


def describe_tokenizer(
    architecture: Architecture, name: str, tokenizer, do_lower_case: bool | None = None
) -> dict:
    """Describe a tokenizer for the card of a token file."""
    return {
        "type": architecture.name,
        "name": name,
        "do_lower_case": do_lower_case,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
        "special_ids": dataclasses.asdict(special_ids(architecture, tokenizer)),
    }
