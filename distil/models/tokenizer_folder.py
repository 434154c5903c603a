"""Build a tokenizer from the files of its folder: tokenizer.json, a vocabulary, or as in 2019.

transformers 5 rebuilds BertTokenizer, RobertaTokenizer and others from the vocabulary and drops
the normalizer and pre-tokenizer of tokenizer.json; here that file stands as it is.
"""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
import transformers

from distil.models.architectures import Architecture
from distil.models.casing import Casing
from distil.models.hub import fetch_files, quiet_transformers, read_model_json
from distil.models.tokenizer_roles import role_tokens
from distil.models.tokenizer_rules import casing_of, other_ids, rules_of
from distil.models.vocabulary_files import check_vocabulary_files
from distil.system.failures import naming_failures
from utils import InputError, logger, naming_panics, one_line

FILE, CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
FILES = (FILE, CONFIG, SPECIAL_MAP, "config.json", "vocab.txt", "vocab.json", "merges.txt")
MASK_TOKENS = {"[MASK]", "<mask>"}
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")


class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
    """A tokenizer that is its tokenizer.json, saved under a name that transformers 4 and 5 load.

    transformers 5 would save it as TokenizersBackend, which 4 does not know.
    """


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer's folder or hub repository: the model's row, its files, what the flags say."""

    architecture: Architecture
    name: str
    flag: str
    files: Mapping[str, str]
    casing: Casing | None

    @property
    def source(self) -> str:
        return f"{self.flag} {self.name}"

    def content(self, file: str) -> dict:
        """Read one of its JSON files, {} without it."""
        return read_model_json(self.files.get(file), self.source)

    def declared_switch(self, option: str) -> bool | None:
        """Return what tokenizer_config.json says of an option."""
        value = self.content(CONFIG).get(option)
        if value not in (None, True, False):
            raise InputError(
                f"{self.source}: {option} is {value!r} in {CONFIG}, expected true, false or null;"
                " correct it"
            )
        return value

    def declared_class(self) -> str | None:
        """Return the class that tokenizer_config.json names."""
        name = self.content(CONFIG).get("tokenizer_class")
        if not isinstance(name, str | None):
            raise InputError(
                f"{self.source}: tokenizer_class is {name!r} in {CONFIG}, expected a name; correct"
                " it"
            )
        return name

    def class_options(self) -> dict[str, bool]:
        return self.casing.options() if self.casing else {}


def find_files(name: str, flag: str, wanted: Sequence[str] = FILES) -> dict[str, str]:
    """Find a tokenizer's files: file name -> path."""
    if not os.path.isdir(name):
        return fetch_files(name, wanted, flag)
    paths = {file: os.path.join(name, file) for file in wanted}
    return {file: path for file, path in paths.items() if os.path.isfile(path)}


# --------------------------------------------------------------------------------------------------
# From tokenizer.json
# --------------------------------------------------------------------------------------------------


def of_file(folder: TokenizerFolder):
    """Load tokenizer.json as it stands, in the class that AutoTokenizer takes if that agrees."""
    with naming_failures(f"{folder.source}: {FILE} could not be read", "; take another copy"):
        backend = tokenizers.Tokenizer.from_file(folder.files[FILE])
    if getattr(backend.model, "dropout", None):
        raise InputError(
            f"{folder.source}: the model of its {FILE} has dropout {backend.model.dropout:g}, which"
            " draws ids at random; set it to null there"
        )
    backend.no_truncation()
    backend.no_padding()
    options, rules = _set_casing(backend, folder), rules_of(backend)
    named = _class_named(folder.declared_class() or _class_of_type(folder))
    for find in (lambda: named, lambda: transformers.AutoTokenizer):  # which imports torch
        automatic, reason = _of_class(find(), folder, options)
        is_own = automatic is not None and type(automatic).__name__ not in GENERIC
        if is_own and rules_of(automatic.backend_tokenizer) == rules:
            return _without_limits(automatic)
    if automatic is not None:
        added = sorted(set(automatic.get_vocab()) - set(backend.get_vocab()))
        reason = other_ids(automatic.backend_tokenizer, backend)
        reason = f"with more tokens: {', '.join(added[:4])}" if added else reason
    tokenizer = _wrapped(backend, folder, automatic)
    if reason:
        text = "%s: %s decides; AutoTokenizer would take another tokenizer (%s)."
        logger.info(text, folder.source, FILE, reason)
    # Text of a special token becomes that token, also where the file does not list it as one.
    difference = other_ids(tokenizer.backend_tokenizer, backend, tokenizer.all_special_tokens)
    if difference:
        raise InputError(
            f"{folder.source}: {CONFIG} changes its ids ({difference}); correct its special tokens"
        )
    return tokenizer


def _class_named(name: str | None) -> type | None:
    """Find a tokenizer's class by name; the auto module, which imports torch, only if need be."""
    if not name or name in GENERIC:
        return None
    kind = getattr(transformers, name.removesuffix("Fast"), None)
    if kind is None:
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        kind = tokenizer_class_from_name(name)
    return kind if hasattr(kind, "vocab_files_names") else None


def _class_of_type(folder: TokenizerFolder) -> str | None:
    """Name the class of tokenizer that transformers has for the type of model in the folder."""
    if folder.architecture.is_named:
        return folder.architecture.tokenizer_class
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(folder.content("config.json").get("model_type"))


def _of_class(kind, folder: TokenizerFolder, options: Mapping[str, bool]):
    """Load what a class makes of the folder: (a fast tokenizer or None, why not)."""
    if kind is None:
        return None, None
    with quiet_transformers():
        try:
            trust = folder.architecture.runs_remote_code
            with naming_panics(folder.source):
                tokenizer = kind.from_pretrained(folder.name, trust_remote_code=trust, **options)
        except Exception as error:
            return None, f"it fails: {one_line(error)}"
    if not getattr(tokenizer, "is_fast", False):
        return None, f"{type(tokenizer).__name__}, in Python"
    return tokenizer, None


def _without_limits(tokenizer):
    """Remove truncation and padding that a file fixes, also from what is saved."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _set_casing(backend: tokenizers.Tokenizer, folder: TokenizerFolder) -> dict[str, bool]:
    """Set a tokenizer's casing by the flags; return what changed.

    Raises InputError where tokenizer_config.json contradicts tokenizer.json, and no flag decides,
    or where a flag asks for what the file's rules cannot do.
    """
    does = dict(zip(OPTIONS, casing_of(backend), strict=True))
    flags = folder.class_options()
    stated = {option: folder.declared_switch(option) for option in OPTIONS}
    for option, says in stated.items():
        if option not in flags and says not in (None, does[option]):
            remedy = "correct one of them"
            if folder.casing is not None:
                remedy += f", or pass --{option} or --no-{option}"
            raise InputError(
                f"{folder.source}: {option} is {says} in {CONFIG}, but {FILE} does"
                f" {'' if does[option] else 'not '}{OPTIONS[option]}; {remedy}"
            )
    normalizer = backend.normalizer
    if all(does[option] == given for option, given in flags.items()):
        return {}
    if isinstance(normalizer, tokenizers.normalizers.BertNormalizer):
        wanted = {option: says for option, says in stated.items() if says is not None} | flags
        for option, value in wanted.items():
            setattr(normalizer, ATTRIBUTES[option], value)
        backend.normalizer = normalizer
    return flags


def check_flags(tokenizer, folder: TokenizerFolder) -> None:
    """Raise InputError where a tokenizer's rules do not do what a flag asks for."""
    flags, backend = folder.class_options(), getattr(tokenizer, "backend_tokenizer", None)
    does = dict(zip(OPTIONS, casing_of(backend), strict=True)) if backend else {}
    for option, given in flags.items():
        if does.get(option) != given:
            raise InputError(
                f"--{'' if given else 'no-'}{option}: {folder.source} has a tokenizer whose own"
                f" rules {'' if does.get(option) else 'do not '}{OPTIONS[option]}; leave the flag"
                " out"
            )


OPTIONS = {"do_lower_case": "lower-case", "strip_accents": "strip accents"}
ATTRIBUTES = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
COPIED = ("model_max_length", "model_input_names", "padding_side", "truncation_side")


def _wrapped(backend: tokenizers.Tokenizer, folder: TokenizerFolder, automatic):
    """Wrap a tokenizer of the tokenizers library with roles for tokens that it has."""
    declared = folder.content(CONFIG)
    found = declared if automatic is None else {**declared, **_attributes(automatic)}
    options = {key: found[key] for key in COPIED if found.get(key) is not None}
    stated = declared, folder.content(SPECIAL_MAP)
    kind = type(automatic) if automatic is not None else _class_named(_class_of_type(folder))
    options |= role_tokens(backend, stated, automatic, kind, folder.source)
    template = getattr(automatic, "chat_template", None) or declared.get("chat_template")
    if template:
        options["chat_template"] = template
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=folder.name,
        clean_up_tokenization_spaces=False,
        **options,
    )


def _attributes(tokenizer) -> dict:
    return {key: getattr(tokenizer, key) for key in COPIED if hasattr(tokenizer, key)}


# --------------------------------------------------------------------------------------------------
# From a vocabulary
# --------------------------------------------------------------------------------------------------


def of_vocabulary(folder: TokenizerFolder):
    """Build the class that the configuration names; without a name, the one that the files fit."""
    declared, config = folder.content(CONFIG), folder.content("config.json")
    name = folder.declared_class() or config.get("tokenizer_class")
    if name in GENERIC:
        raise InputError(
            f"{folder.source}: declares a {name}, but has no {FILE}; take a whole copy"
        )
    if name is None:
        candidates = [_class_of_type(folder), _class_of_files(folder)]
        name = next((one for one in candidates if one and _has_files(folder, one)), None)
    kind = _class_named(name)
    if name is None or (kind is not None and not _has_files(folder, name)):
        files = folder.architecture.vocab_files or ("vocab.txt",)
        needed = f"{' and '.join(files)} of a {name}" if name else "a vocabulary"
        raise InputError(
            f"{folder.source}: has neither {FILE} nor {needed}; name a folder with a tokenizer, or"
            " another tokenizer type"
        )
    _check_files(folder, kind)
    if kind is not None and issubclass(kind, transformers.BertTokenizer):
        return _bert(folder, kind)
    options = {"trust_remote_code": folder.architecture.runs_remote_code}
    load = transformers.AutoTokenizer if kind is None or declared.get("auto_map") else kind
    with quiet_transformers():
        try:
            return load.from_pretrained(folder.name, **options)
        except ImportError as error:  # MeCab's and others
            raise InputError(
                f"{folder.source}: its {name} runs in Python only and needs more packages"
                f" ({one_line(error)}); take a model with a {FILE}, or convert it to the tokenizers"
                " library and save that file"
            ) from error


def _has_files(folder: TokenizerFolder, name: str) -> bool:
    """Test for a class's vocabulary files: without, transformers 5 makes an empty tokenizer."""
    wanted = getattr(_class_named(name), "vocab_files_names", {})
    wanted = [file for role, file in wanted.items() if role in ("vocab_file", "merges_file")]
    return bool(wanted) and len(find_files(folder.name, folder.flag, wanted)) == len(wanted)


def _check_files(folder: TokenizerFolder, kind: type | None) -> None:
    """Check the files that a class of 2019 reads; others read other content under their names."""
    own = getattr(kind, "vocab_files_names", {}).values()
    known = {"BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer"}
    if known & {one.__name__ for one in getattr(kind, "__mro__", ())}:
        found = {file: path for file, path in folder.files.items() if file in own}
        check_vocabulary_files(found, folder.source)


def _class_of_files(folder: TokenizerFolder) -> str | None:
    """Name the class that a vocabulary without any configuration fits."""
    if "vocab.txt" in folder.files:
        return "BertTokenizer"
    if {"vocab.json", "merges.txt"} <= set(folder.files):
        _check_files(folder, transformers.GPT2Tokenizer)
        return "RobertaTokenizer" if "<mask>" in folder.content("vocab.json") else "GPT2Tokenizer"
    return None


# Options of the tokenizers in Python that fast ones drop: the values that change nothing.
SLOW_OPTIONS = {"never_split": (None, [], ()), "do_basic_tokenize": (None, True)}


def _bert(folder: TokenizerFolder, kind: type):
    """Build a BertTokenizer. transformers 5 would lower-case unless told otherwise."""
    declared, options = folder.content(CONFIG), folder.class_options()
    tokens = _word_pieces(folder)
    dropped = [key for key, harmless in SLOW_OPTIONS.items() if declared.get(key) not in harmless]
    if dropped:
        raise InputError(
            f"{folder.source}: {dropped[0]} is {declared[dropped[0]]!r} in {CONFIG}, which no fast"
            f" tokenizer applies; remove it, or take a folder whose {FILE} has such rules"
        )
    if "do_lower_case" not in {**declared, **options}:
        options["do_lower_case"] = (
            casing_of(tokenizers.Tokenizer.from_file(folder.files[FILE]))[0]
            if FILE in folder.files
            else not any(token != token.lower() for token in tokens)
        )
    with quiet_transformers():
        tokenizer = kind.from_pretrained(folder.name, trust_remote_code=False, **options)
    accented = [token for token in tokens if _has_accent(token)]
    if (
        accented
        and casing_of(tokenizer.backend_tokenizer)[1]
        and "strip_accents" not in {**declared, **options}
    ):
        text = (
            "%s: strips accents, but %d entries of its vocabulary have some (%s): set %s in %s%s."
        )
        flags = ", or pass --no-strip_accents" if folder.casing is not None else ""
        setting = '"strip_accents": false'
        logger.warning(text, folder.source, len(accented), accented[0], setting, CONFIG, flags)
    return tokenizer


def _word_pieces(folder: TokenizerFolder) -> list[str]:
    """List the entries of a WordPiece vocabulary, without the special ones."""
    if "vocab.txt" in folder.files:
        tokens = Path(folder.files["vocab.txt"]).read_text(encoding="utf-8").splitlines()
    else:
        tokens = folder.content(FILE).get("model", {}).get("vocab", {})
    return [token for token in tokens if not token.startswith("[")]


def _has_accent(token: str) -> bool:
    return any(unicodedata.category(one) == "Mn" for one in unicodedata.normalize("NFD", token))


# --------------------------------------------------------------------------------------------------
# As in 2019
# --------------------------------------------------------------------------------------------------


def of_2019(folder: TokenizerFolder):
    """Build the class of a row from the vocabulary, and compare it with tokenizer.json."""
    row, declared = folder.architecture, folder.content(CONFIG)
    if FILE not in folder.files and any(file not in folder.files for file in row.vocab_files):
        raise InputError(
            f"{folder.source}: has neither {FILE} nor {' and '.join(row.vocab_files)}; name a"
            f" {row.tokenizer_class} tokenizer, or another tokenizer type"
        )
    _check_declared_class(folder, declared)
    _check_files(folder, getattr(transformers, row.tokenizer_class))
    if row.tokenizer_class == "BertTokenizer":
        tokenizer = _bert(folder, transformers.BertTokenizer)
    else:
        with quiet_transformers():
            kind = getattr(transformers, row.tokenizer_class)
            tokenizer = kind.from_pretrained(folder.name, trust_remote_code=False)
    _check_tokens_of_2019(tokenizer, folder)
    if FILE in folder.files:
        backend = tokenizers.Tokenizer.from_file(folder.files[FILE])
        _set_casing(backend, folder)
        difference = other_ids(tokenizer.backend_tokenizer, backend)
        if difference:
            raise InputError(
                f"{folder.source}: the {row.name} tokenizer of 2019 gives other ids than its"
                f" {FILE} ({difference}); pass --tokenizer_type auto"
            )
    return tokenizer


def _check_declared_class(folder: TokenizerFolder, declared: Mapping) -> None:
    """Raise InputError where the configuration names a class of other rules."""
    row = folder.architecture
    name = folder.declared_class() or row.tokenizer_class
    kind, wanted = _class_named(name), getattr(transformers, row.tokenizer_class)
    if name in GENERIC or (kind is not None and issubclass(kind, wanted)):
        return
    if kind is None and FILE in folder.files:  # compared by its ids
        return
    raise InputError(
        f"{folder.source}: holds a {name}, which is no {row.name} tokenizer; pass the matching"
        " type, or auto"
    )


def _check_tokens_of_2019(tokenizer, folder: TokenizerFolder) -> None:
    row = folder.architecture
    check_not_added(tokenizer, folder)
    known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    foreign = sorted(MASK_TOKENS & set(known)) if not row.is_masked else []
    if foreign:  # RoBERTa's vocabulary holds GPT-2's special token, too
        raise InputError(
            f"{folder.source}: its vocabulary has {foreign[0]}, a masked model's; expected a"
            f" {row.name} vocabulary, or pass --tokenizer_type auto"
        )


def check_not_added(tokenizer, folder: TokenizerFolder) -> None:
    """Raise InputError if special tokens of the model's type are missing from the vocabulary.

    transformers silently adds them, with ids that the model has no embedding for.
    """
    row = folder.architecture
    known = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    known |= {token["content"] for token in folder.content(FILE).get("added_tokens", [])}
    roles = [row.start_token, row.end_token, row.pad_token]
    roles += ["mask_token"] if row.is_masked else []
    tokens = {role: getattr(tokenizer, role) for role in roles}
    missing = [f"{role} {token}" for role, token in tokens.items() if token and token not in known]
    if missing:
        raise InputError(
            f"{folder.source}: its vocabulary has no {', no '.join(dict.fromkeys(missing))}; "
            f"expected a {row.name} vocabulary; check the type"
        )
