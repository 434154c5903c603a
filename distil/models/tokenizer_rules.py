"""What decides a tokenizer's ids: its vocabulary and its rules, as fingerprints and as differences.

Two tokenizers of one vocabulary can give other ids: one lower-cases, strips accents, splits at
other places, matches other added tokens. Token files, counts, students and teachers are therefore
compared by vocabulary and rules.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from distil.data.cards import tokenizer_difference
from utils import naming_panics, one_line

SHOWN_CHARS = 120  # of a rule in a card or a message; longer ones end in a digest

# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


def rules_of(backend: Tokenizer) -> dict[str, Any]:
    """Return what decides a tokenizer's ids beside its vocabulary, in one form for equal rules.

    Decoder, post-processor, truncation and padding are left out: ids of a text without boundary
    tokens do not depend on them.
    """
    content = json.loads(backend.to_str())
    model, vocabulary = content["model"], content["model"].pop("vocab", None)
    if isinstance(vocabulary, list):  # Unigram: the scores decide
        model["scores"] = _digest(vocabulary)
    if "merges" in model:
        model["merges"] = _digest(model["merges"])
    pre_tokenizer = _unwrapped(content["pre_tokenizer"], "pretokenizers")
    if model["type"] == "BPE":
        model = {key: None if value == "" else value for key, value in model.items()}
        if _has_all_bytes(pre_tokenizer, vocabulary):  # nothing is unknown
            model |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    normalizer = _unwrapped(content["normalizer"], "normalizers")
    added = [
        {key: token[key] for key in ("id", "content", "special", "single_word", "lstrip", "rstrip")}
        # Without a normalizer, text is its own normalized form.
        | {"normalized": bool(normalizer and token["normalized"])}
        for token in content["added_tokens"]
    ]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
    }


def _unwrapped(part: dict | None, items: str) -> dict | None:
    """Remove a sequence of one part or none around it, and what concerns offsets only."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        parts = [found for one in part[items] if (found := _unwrapped(one, items)) is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        return {"type": "Sequence", items: parts}
    if part["type"] == "BertNormalizer" and part["strip_accents"] is None:
        part = {**part, "strip_accents": part["lowercase"]}
    return {key: value for key, value in part.items() if key != "trim_offsets"}


def _has_all_bytes(pre_tokenizer: dict | None, vocabulary: Mapping[str, int]) -> bool:
    parts = [pre_tokenizer] if pre_tokenizer else []
    parts = parts[0].get("pretokenizers", parts) if parts else []
    is_byte_level = any(part["type"] == "ByteLevel" for part in parts)
    return is_byte_level and all(letter in vocabulary for letter in ByteLevel.alphabet())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _shown(rule: Any) -> str:
    if isinstance(rule, list):  # of added tokens
        text = ", ".join(f"{token['id']} {token['content']}{_properties(token)}" for token in rule)
    else:
        text = json.dumps(rule, ensure_ascii=False)
    if len(text) <= SHOWN_CHARS:
        return text
    return f"{text[: SHOWN_CHARS - 30]}.. (digest {_digest(rule)[:12]})"


def _properties(token: Mapping[str, Any]) -> str:
    found = [key for key in ("single_word", "lstrip", "rstrip", "normalized") if token.get(key)]
    return f" ({', '.join(found)})" if found else ""


def casing_of(backend: Tokenizer) -> tuple[bool, bool]:
    """Return whether a tokenizer lower-cases, and whether it strips accents, as it behaves."""
    if backend.normalizer is None:
        return False, False
    capital, accented = (backend.normalizer.normalize_str(text) for text in ("A", "é"))
    composed = unicodedata.normalize("NFC", accented)
    return "a" in capital and "A" not in capital, "é" not in composed and "e" in composed


# --------------------------------------------------------------------------------------------------
# Fingerprints
# --------------------------------------------------------------------------------------------------


def vocabulary_fingerprint(tokenizer) -> str:
    """Return the SHA-256 of the vocabulary with added tokens."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return _digest(entries)


def tokenizer_facts(tokenizer) -> dict[str, Any]:
    """Describe what decides a tokenizer's ids, for cards and comparisons.

    vocab_size: the largest id + 1; vocabulary_sha256, rules_sha256: fingerprints, both equal if ids
    have one meaning and texts get the same ids; rules: {part: text}; do_lower_case, strip_accents:
    what the rules do, None for tokenizers in Python, whose rules are their class and options.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options = {k: v for k, v in tokenizer.init_kwargs.items() if isinstance(v, bool | int)}
        rules, casing = {"class": type(tokenizer).__name__, "options": options}, (None, None)
    else:
        rules, casing = _compared(rules_of(backend)), casing_of(backend)
    return {
        "do_lower_case": casing[0],
        "strip_accents": casing[1],
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
        "rules": {part: _shown(rule) for part, rule in rules.items()},
        "rules_sha256": _digest(rules),
    }


def _compared(rules: dict[str, Any]) -> dict[str, Any]:
    """Reduce rules to what decides the ids of a text without special tokens' texts.

    White space around such a text is part of it or not (RoBERTa's <mask>), as each file says.
    """
    added = [
        {key: token[key] for key in (("id", "content") if token["special"] else token)}
        for token in rules["added_tokens"]
    ]
    return {**rules, "added_tokens": added}


def difference(own, others) -> str | None:
    """Describe how a tokenizer differs from its teacher's in vocabulary or rules, or None."""
    facts = [tokenizer_facts(tokenizer) for tokenizer in (own, others)]
    if facts[0]["vocabulary_sha256"] == facts[1]["vocabulary_sha256"]:
        return tokenizer_difference(*facts, "its", "the teacher's")
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


# --------------------------------------------------------------------------------------------------
# The same ids for a sample of text
# --------------------------------------------------------------------------------------------------

# Scripts, accents in both Unicode forms, ligatures, full-width forms, joined and control
# characters, white space of several kinds, numbers, punctuation, a word that no vocabulary holds.
TEXTS = (
    "The Quick brown fox isn't 1,234.50 dollars\tworth -- it's $5.00! (e.g. C++/C#) a_b@c.org",
    "Café CAFÉ naïve Über Straße Łódź Ångström İstanbul ğüşöçı Ñandú œuvre ĳ",
    unicodedata.normalize("NFD", "Café Über Ångström Việt Nam điện"),
    "ﬁne ﬂow ２０２０ Ａｂｃ ½ x² ™ № Ⅳ … — “quoted” ‘so’ «alors»",
    "Москва Ёлка йод Київ Αθήνα Ελλάδα ΐ",
    "日本語のテスト。カタカナ ｶﾞ が 東京都 中文维基百科 한국어 위키백과",
    "ภาษาไทย ประเทศไทย हिन्दी विकिपीडिया বাংলা தமிழ்",
    "العربية مَدْرَسَة ויקיפדיה שָׁלוֹם",
    "a\u00a0b\u2003c\u200bd\u00ade\ufefff  two  spaces\u0007bell\r\nnew line ",
    " leading space; emoji 😀👩‍👩‍👧 flags 🇩🇪 e\u0301",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
    "don't DON'T we'll 'tis 3.14e-10 1999-12-31 #tag @user http://example.org/?q=1&r=2",
)
NUM_SAMPLED, WORDS_A_LINE, MAX_ADDED = 400, 20, 200


def sample_texts(backend: Tokenizer, special: Iterable[str] = ()) -> list[str]:
    """Make texts of several scripts and of the tokenizer's own tokens, also in capitals and as NFD.

    Special tokens' texts are not among them. special: more of them than the tokenizer lists.
    """
    decoder = backend.get_added_tokens_decoder()
    special = [*special, *(one.content for one in decoder.values() if one.special and one.content)]
    number_of = backend.get_vocab()
    own = [token for token in sorted(number_of, key=number_of.get) if token not in special]
    chosen = own[:: max(len(own) // NUM_SAMPLED, 1)]
    chosen += [token.content for token in decoder.values() if not token.special][:MAX_ADDED]
    words = [_as_text(backend, number_of[token], token) for token in chosen]
    lines = [
        " ".join(words[start : start + WORDS_A_LINE])
        for start in range(0, len(words), WORDS_A_LINE)
    ]
    texts = [*TEXTS, *lines, *(line.upper() for line in lines)]
    texts += [unicodedata.normalize("NFD", line) for line in lines]
    return [_without(special, text) for text in texts]


def _as_text(backend: Tokenizer, number: int, token: str) -> str:
    text = backend.decode([number], skip_special_tokens=False) if backend.decoder else token
    return text.removeprefix("##").strip()


def _without(contents: Iterable[str], text: str) -> str:
    for content in contents:
        text = text.replace(content, " ")
    return text


def other_ids(used: Tokenizer, expected: Tokenizer, special: Iterable[str] = ()) -> str | None:
    """Describe the first text of a sample that two tokenizers give other ids, or return None.

    special: see sample_texts.
    """
    texts = sample_texts(expected, special)
    encoded = []
    for backend in (used, expected):
        backend.no_truncation()
        backend.no_padding()
        try:
            with naming_panics("on a sample of texts"):
                encoded.append(backend.encode_batch_fast(texts, add_special_tokens=False))
        except Exception as error:  # an unknown token that is not in the vocabulary
            return f"it fails: {one_line(error)}"
    for text, found, wanted in zip(texts, *encoded, strict=True):
        if found.ids != wanted.ids:
            pairs = zip(found.ids, wanted.ids, strict=False)
            at = next((k for k, (a, b) in enumerate(pairs) if a != b), -1)
            at = min(len(found.ids), len(wanted.ids)) if at < 0 else at
            return (
                f"{' '.join(text.split())[:30]!r}: {found.ids[at : at + 4]} where tokenizer.json"
                f" gives {wanted.ids[at : at + 4]}"
            )
    return None
