"""The roles of a tokenizer's special tokens: start, end, padding, unknown, mask."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence

import tokenizers

from distil.data.token_files import SpecialIds
from distil.models.architectures import Architecture
from utils import logger

# Role -> attributes of the tokenizer; the first one that is set gives the role's token.
ROLES = {
    "start": ("cls_token", "bos_token"),
    "end": ("sep_token", "eos_token"),
    "pad": ("pad_token", "eos_token", "unk_token"),
    "unknown": ("unk_token",),
}
OPTIONAL_ROLES = {"start", "unknown"}


def _role_names(architecture: Architecture, role: str) -> tuple[str, ...]:
    """List the attributes that may give a role: first the one of 2019 for the architecture."""
    if not architecture.is_named or role == "unknown":
        return ROLES[role]
    return (getattr(architecture, f"{role}_token"), *ROLES[role])


def _first_token(tokenizer, vocabulary: Mapping[str, int], names: Sequence[str]) -> str | None:
    """Return the first of these special tokens that is set and in the vocabulary, or None."""
    return next(
        (token for name in names if (token := getattr(tokenizer, name, None)) in vocabulary), None
    )


def special_ids(architecture: Architecture, tokenizer) -> SpecialIds:
    """Return the ids of start, end, padding and unknown token."""
    vocabulary = tokenizer.get_vocab()
    tokens = {
        role: _first_token(tokenizer, vocabulary, _role_names(architecture, role)) for role in ROLES
    }
    return SpecialIds(**{role: vocabulary.get(token) for role, token in tokens.items()})


# Role -> the names by which a special token is known where nothing states its role.
ROLE_TOKENS = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "unk_token": ("[UNK]", "<unk>"),
    "sep_token": ("[SEP]",),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def role_tokens(
    backend: tokenizers.Tokenizer,
    stated: Sequence[Mapping],
    automatic,
    kind: type | None,
    source: str,
) -> dict[str, str | list[str]]:
    """Name the tokens of roles: those of the vocabulary only, others would get new ids.

    Sources in this order: the file's model, for unknown text; what the folder's files state; the
    tokenizer that transformers makes of the folder (automatic), or the defaults of the class for
    the type of its model (kind); special tokens of usual names. source: names the tokenizer.
    """
    vocabulary, unknown = backend.get_vocab(), getattr(backend.model, "unk_token", None)
    if isinstance(backend.model, tokenizers.models.Unigram):
        number = json.loads(backend.model.__getstate__())["unk_id"]
        unknown = None if number is None else backend.id_to_token(number)
    parameters = inspect.signature(kind.__init__).parameters if kind else {}
    others = (
        {role: one.default for role, one in parameters.items()}
        if automatic is None
        else {role: getattr(automatic, role, None) for role in ROLE_TOKENS}
    )
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    found: dict[str, str | list[str]] = {}
    for role, names in ROLE_TOKENS.items():
        sources = {"unk_token": unknown}, *stated, others
        contents = [_content(one.get(role)) for one in sources]
        token = next((one for one in contents if one in vocabulary), None)
        if token is None and (token := next((one for one in names if one in special), None)):
            logger.info("%s: no file states the %s; by its name it is %s.", source, role, token)
        found |= {} if token is None else {role: token}
    extra = [
        token
        for source in stated
        for key in ("additional_special_tokens", "extra_special_tokens")
        for one in _items(source.get(key))
        if (token := _content(one)) in vocabulary and token not in found.values()
    ]
    return found | ({"extra_special_tokens": list(dict.fromkeys(extra))} if extra else {})


def _items(value) -> list:
    return list(value.values()) if isinstance(value, dict) else list(value or [])


def _content(token) -> str | None:
    """Return the text of a token, which files write as a string or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
