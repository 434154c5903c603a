"""Load the tokenizer that lies in a model's folder, and describe it.

tokenizer.json decides where there is one, else the class that the configuration names is built from
the vocabulary (tokenizer_folder.py). tokenizer_roles.py names the special tokens,
tokenizer_rules.py compares tokenizers.
"""

from __future__ import annotations

import dataclasses
import os

import tokenizers

from distil.models.architectures import ANY_TOKENIZER, ARCHITECTURES, AUTO, Architecture
from distil.models.casing import Casing
from distil.models.hub import read_model_json
from distil.models.tokenizer_folder import (
    CONFIG,
    FILE,
    TokenizerFolder,
    check_flags,
    check_not_added,
    find_files,
    of_2019,
    of_file,
    of_vocabulary,
)
from distil.models.tokenizer_roles import OPTIONAL_ROLES, ROLES, special_ids
from distil.models.tokenizer_rules import tokenizer_facts
from distil.system.failures import naming_failures
from utils import InputError, logger, naming_panics


def load_tokenizer(
    architecture: Architecture,
    name: str,
    flag: str,
    casing: Casing | None = None,
    *,
    needs_roles: bool = True,
):
    """Load the tokenizer of a hub name or folder: its tokenizer.json, else of its vocabulary.

    architecture: of the model in the folder. casing: None where the program has no such flags.
    needs_roles: require a fast tokenizer with tokens for all required roles, for distillation.
    Raises InputError naming `flag`.
    """
    naming = naming_failures(f"{flag} {name}: no tokenizer could be loaded")
    with naming, naming_panics(f"{flag} {name}"):
        files = find_files(name, flag)
        folder = TokenizerFolder(architecture, name, flag, files, casing)
        tokenizer = of_file(folder) if FILE in files else of_vocabulary(folder)
        check_flags(tokenizer, folder)
        if needs_roles:
            _check_roles(tokenizer, folder)
    return tokenizer


def load_tokenizer_of_2019(architecture: Architecture, name: str, flag: str, casing: Casing):
    """Load the tokenizer of a row of ARCHITECTURES, with the ids that 2019's class gives.

    Raises InputError naming `flag` where the folder's own tokenizer.json gives other ids.
    """
    files, what = find_files(name, flag), f"no {architecture.name} tokenizer could be loaded"
    remedy = "; pass --tokenizer_type auto" if FILE in files else ""
    with naming_failures(f"{flag} {name}: {what}", remedy), naming_panics(f"{flag} {name}"):
        folder = TokenizerFolder(architecture, name, flag, files, casing)
        tokenizer = of_2019(folder)
        check_flags(tokenizer, folder)
    return load_tokenizer(architecture, name, flag, casing) if FILE in files else tokenizer


def resolve_tokenizer(
    tokenizer_type: str, name: str, flag: str = "--tokenizer_name"
) -> Architecture:
    """Return a tokenizer type's row; for AUTO the row of the model in the same folder."""
    if tokenizer_type != AUTO:
        return ARCHITECTURES[tokenizer_type]
    files = find_files(name, flag)
    config = read_model_json(files.get("config.json"), f"{flag} {name}")
    return ARCHITECTURES.get(config.get("model_type"), ANY_TOKENIZER)


def _check_roles(tokenizer, folder: TokenizerFolder) -> None:
    """Raise InputError for a tokenizer in Python, or without tokens for all required roles."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{folder.source}: its {type(tokenizer).__name__} runs in Python only; take a model"
            f" with a {FILE}, or convert it to the tokenizers library and save that file"
        )
    if not (isinstance(tokenizer.model_max_length, int | float) and tokenizer.model_max_length > 2):
        raise InputError(
            f"{folder.source}: model_max_length is {tokenizer.model_max_length}, expected above 2;"
            " correct it"
        )
    if FILE not in folder.files and folder.architecture.is_named:
        check_not_added(tokenizer, folder)
    ids = special_ids(folder.architecture, tokenizer)
    missing = [role for role in ROLES if role not in OPTIONAL_ROLES and getattr(ids, role) is None]
    if missing:
        wanted = "; ".join(f"{role} ({' or '.join(ROLES[role])})" for role in missing)
        raise InputError(
            f"{folder.source}: its tokenizer has no token for {wanted}; add one to its {CONFIG}"
        )
    if ids.start is None:
        text = "%s: its tokenizer has no cls_token or bos_token: sequences get no start token."
        logger.info(text, folder.source)


def describe_tokenizer(architecture: Architecture, name: str, tokenizer) -> dict:
    """Describe a tokenizer for the card of a token file."""
    return {
        "type": architecture.name,
        "name": name,
        **tokenizer_facts(tokenizer),
        "special_ids": dataclasses.asdict(special_ids(architecture, tokenizer)),
    }


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

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
