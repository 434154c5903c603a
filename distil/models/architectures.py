"""What differs from one architecture to the next, as tables: model classes, token roles, frozen
parameters, layers.

ARCHITECTURES has one row a model type, PAIRS one row a (teacher, student) that can be distilled.
The functions below load tokenizers, teachers and students by hub name or local folder, and make a
student's first weights out of a teacher's layers (Sanh et al., 2019, section 3: the student is
initialized by taking one layer out of two). torch is imported where it is used: programs that want
a tokenizer only do without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import numpy as np
import tokenizers
import transformers

from distil.system.files import require_file
from utils import InputError, logger, one_line

if TYPE_CHECKING:
    import torch

    StateDict = Mapping[str, torch.Tensor]


def _distilbert_transform(model, hidden_ND):
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_ND)))


def _roberta_transform(model, hidden_ND):
    head = model.lm_head
    return head.layer_norm(transformers.activations.gelu(head.dense(hidden_ND)))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model type: a row of ARCHITECTURES, or what find_out found out about a model that has
    none.

    model_class, config_class, tokenizer_class: names in transformers.
    vocab_files: what a tokenizer folder without tokenizer.json must hold.
    transform: (model, hidden states (N, D)) -> (N, D), the prediction head's own layers before the
        last linear map; None: not known apart from the model's own forward.
    projection: module path of that map, from (N, D) to logits (N, V).
    layers: what stands before the layer's number in a parameter's name.
    position_embeddings, token_type_embeddings: module paths, None where there are none.
    head_transform: prefixes of the prediction head's own dense layer and norm, which
    --vocab_transform takes along.
    aliases: parameters that only repeat another (tied) one under a second name.
    obsolete: pattern of names that old checkpoints hold and current models do not.
    reserved_positions: rows of the position table that no token uses (RoBERTa's positions begin at
    2).
    start_token, end_token, pad_token: attributes of the tokenizer that give the token of each role.
    pads_by_mask: whether a causal model is given a mask; GPT-2 goes without, as in 2019 (what is
    padded stands behind).
    masked: whether it is a masked-language model, where the class's name doesn't say so.
    runs_remote_code: whether Python files that come with a model are run, where it needs them.
    """

    model_class: str
    config_class: str
    tokenizer_class: str
    vocab_files: tuple[str, ...]
    transform: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] | None
    projection: str
    layers: str
    position_embeddings: str | None
    token_type_embeddings: str | None = None
    head_transform: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    obsolete: str = r"\.position_ids$"
    reserved_positions: int = 0
    start_token: str = "cls_token"
    end_token: str = "sep_token"
    pad_token: str = "pad_token"
    pads_by_mask: bool = True
    masked: bool | None = None
    runs_remote_code: bool = False

    @property
    def is_masked(self) -> bool:
        """True for masked-language models, False for causal ones."""
        return self.model_class.endswith("MaskedLM") if self.masked is None else self.masked


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        "BertForMaskedLM",
        "BertConfig",
        "BertTokenizer",
        ("vocab.txt",),
        transform=lambda model, hidden_ND: model.cls.predictions.transform(hidden_ND),
        projection="cls.predictions.decoder",
        layers="bert.encoder.layer.",
        position_embeddings="bert.embeddings.position_embeddings",
        token_type_embeddings="bert.embeddings.token_type_embeddings",
        head_transform=("cls.predictions.transform.",),
        aliases=("cls.predictions.decoder.bias",),
    ),
    "distilbert": Architecture(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        "BertTokenizer",
        ("vocab.txt",),
        transform=_distilbert_transform,
        projection="vocab_projector",
        layers="distilbert.transformer.layer.",
        position_embeddings="distilbert.embeddings.position_embeddings",
        head_transform=("vocab_transform.", "vocab_layer_norm."),
    ),
    "roberta": Architecture(
        "RobertaForMaskedLM",
        "RobertaConfig",
        "RobertaTokenizer",
        ("vocab.json", "merges.txt"),
        transform=_roberta_transform,
        projection="lm_head.decoder",
        layers="roberta.encoder.layer.",
        position_embeddings="roberta.embeddings.position_embeddings",
        token_type_embeddings="roberta.embeddings.token_type_embeddings",
        head_transform=("lm_head.dense.", "lm_head.layer_norm."),
        aliases=("lm_head.decoder.bias",),
        reserved_positions=2,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        "GPT2Tokenizer",
        ("vocab.json", "merges.txt"),
        transform=lambda model, hidden_ND: hidden_ND,
        projection="lm_head",
        layers="transformer.h.",
        position_embeddings="transformer.wpe",
        obsolete=r"\.attn\.(masked_)?bias$",
        start_token="bos_token",
        end_token="eos_token",
        pad_token="unk_token",
        pads_by_mask=False,
    ),
}

AUTO = "auto"  # the model type that is found out


MASK_TOKENS = {"[MASK]", "<mask>"}


def row_of(model_type: str | Architecture) -> Architecture:
    """Return the row of a model type; what was found out is one already."""
    return ARCHITECTURES[model_type] if isinstance(model_type, str) else model_type


def find_out(
    config, is_masked: bool, source: str, trust_remote_code: bool = False
) -> str | Architecture:
    """Find the row of a model by its configuration: a named one where there is one of this kind,
    else by conventions.

    trust_remote_code: see load_config. Raises InputError naming `source` where transformers has no
    such language model, or it lacks what distillation needs.
    """
    named = ARCHITECTURES.get(config.model_type)
    if named is not None and named.is_masked == is_masked:
        return config.model_type
    from distil.models import conventions

    skeleton = conventions.skeleton(config, is_masked, source, trust_remote_code)
    parts = conventions.anatomy(skeleton, source)
    return Architecture(
        type(skeleton).__name__,
        type(config).__name__,
        "AutoTokenizer",
        (),
        transform=None,
        projection=parts.output,
        layers=f"{parts.layer_lists[0]}." if parts.layer_lists else "",
        position_embeddings=parts.positions,
        token_type_embeddings=parts.token_types,
        reserved_positions=parts.reserved_positions,
        masked=is_masked,
        runs_remote_code=trust_remote_code,
    )


def _called(model_type: str | Architecture) -> str:
    """Name a model type in a message."""
    return model_type if isinstance(model_type, str) else model_type.model_class


@dataclasses.dataclass(frozen=True)
class Pair:
    """One (teacher, student) that can be distilled.

    parameter_names: student's name -> teacher's name; {layer} is the layer's number in either. None
        where both are of one architecture: the student's own names serve.
    fold_token_types: (student's, teacher's) name of a table to whose every row --fold_token_types
        adds token type 0; None where the student has token types itself.
    config_entries: student's entry of the configuration -> teacher's, for a student of some of its
    layers.
    """

    parameter_names: Mapping[str, str] | None = None
    fold_token_types: tuple[str, str] | None = None
    config_entries: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _with_weight_and_bias(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{s}.{kind}": f"{t}.{kind}" for s, t in modules.items() for kind in ("weight", "bias")}


BERT_TO_DISTILBERT = {
    "distilbert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "distilbert.embeddings.position_embeddings.weight": (
        "bert.embeddings.position_embeddings.weight"
    ),
    "vocab_projector.weight": "cls.predictions.decoder.weight",
    "vocab_projector.bias": "cls.predictions.bias",
    **_with_weight_and_bias(
        {
            "distilbert.embeddings.LayerNorm": "bert.embeddings.LayerNorm",
            "vocab_transform": "cls.predictions.transform.dense",
            "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
            **{
                f"distilbert.transformer.layer.{{layer}}.{student}": (
                    f"bert.encoder.layer.{{layer}}.{teacher}"
                )
                for student, teacher in {
                    "attention.q_lin": "attention.self.query",
                    "attention.k_lin": "attention.self.key",
                    "attention.v_lin": "attention.self.value",
                    "attention.out_lin": "attention.output.dense",
                    "sa_layer_norm": "attention.output.LayerNorm",
                    "ffn.lin1": "intermediate.dense",
                    "ffn.lin2": "output.dense",
                    "output_layer_norm": "output.LayerNorm",
                }.items()
            },
        }
    ),
}

PAIRS: dict[tuple[str, str], Pair] = {
    ("bert", "distilbert"): Pair(
        BERT_TO_DISTILBERT,
        fold_token_types=(
            "distilbert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
        ),
        config_entries={
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_position_embeddings",
            "dim": "hidden_size",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "initializer_range": "initializer_range",
            "pad_token_id": "pad_token_id",
        },
    ),
    ("roberta", "roberta"): Pair(),
    ("gpt2", "gpt2"): Pair(),
}


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------


def short_name(name_or_folder: str) -> str:
    """Return the last component of a hub name or folder: 'dbmdz/bert-base-german-cased/' ->
    'bert-base-german-cased'.
    """
    return Path(os.path.abspath(name_or_folder)).name if name_or_folder else ""


def load_tokenizer(
    model_type: str | Architecture, name: str, flag: str, do_lower_case: bool | None = None
):
    """Load a model type's tokenizer by hub name or folder; check that it is one of that type (AUTO:
    of any).

    do_lower_case (BERT only): None = what tokenizer_config.json says; without that file, whether
    the vocabulary has no capitals (transformers 5 would lower-case silently). Raises InputError
    that names `flag`.
    """
    try:
        return _load_tokenizer(model_type, name, flag, do_lower_case)
    except InputError:
        raise
    except Exception as error:  # what a damaged or foreign file can raise has no end
        kind = "" if _is_any(model_type) else f"{model_type} "
        raise InputError(
            f"{flag} {name}: no {kind}tokenizer could be loaded ({one_line(error)})"
        ) from error


WORD_PIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_word_pieces(
    text_file: str | os.PathLike, vocab_size: int, lowercase: bool = True
) -> dict[str, int]:
    """Train a WordPiece vocabulary on a text, the same in every process: token -> id.

    The library numbers the continuing characters ("##a") in the order of a hash table that each
    process seeds anew, and breaks ties between merges by these numbers: a second training is given
    them in alphabetical order.
    """
    continuing: list[str] = []
    for _ in range(2):
        trainer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
        special = [*WORD_PIECE_SPECIALS, *continuing]
        trainer.train(
            [str(text_file)], vocab_size=vocab_size, show_progress=False, special_tokens=special
        )
        vocabulary = trainer.get_vocab()
        continuing = sorted(
            token for token in vocabulary if token.startswith("##") and len(token) == 3
        )
    return vocabulary


def tokenizer_type(model_type: str, name: str) -> str:
    """Return a tokenizer's type; for AUTO the named one of the model that lies beside it, where
    that has one.
    """
    if model_type != AUTO:
        return model_type
    with quiet_transformers(), contextlib.suppress(Exception):  # a tokenizer may stand alone
        found = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        return found if found in ARCHITECTURES else AUTO
    return AUTO


def _is_any(model_type: str | Architecture) -> bool:
    return model_type not in ARCHITECTURES if isinstance(model_type, str) else True


def _load_any_tokenizer(name: str, flag: str, do_lower_case: bool | None, trust_remote_code: bool):
    """Load a tokenizer of whatever class; it has to be one of the tokenizers library, and to know a
    sequence's end.
    """
    options = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **options
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{flag} {name}: its {type(tokenizer).__name__} is none of the tokenizers library;"
            " convert it"
        )
    missing = [
        role
        for role, tokens in ROLES.items()
        if role not in MAY_LACK and _first_token(tokenizer, tokens) is None
    ]
    if missing:
        wanted = "; ".join(f"{role} ({' or '.join(ROLES[role])})" for role in missing)
        raise InputError(
            f"{flag} {name}: its tokenizer has no token for {wanted}; add one to its"
            " tokenizer_config.json"
        )
    if _first_token(tokenizer, ROLES["start"]) is None:
        logger.info(
            "%s %s: its tokenizer has no cls_token or bos_token: sequences begin without.",
            flag,
            name,
        )
    return tokenizer


# Role -> the tokenizer's attributes that may give its token, the first that is there.
ROLES = {
    "start": ("cls_token", "bos_token"),
    "end": ("sep_token", "eos_token"),
    "pad": ("pad_token", "eos_token", "unk_token"),
    "unknown": ("unk_token",),
}
MAY_LACK = {"start", "unknown"}


def _first_token(tokenizer, names: Sequence[str]) -> str | None:
    """Return the first of these special tokens that a tokenizer has, and has in its vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return next(
        (token for name in names if (token := getattr(tokenizer, name, None)) in vocabulary), None
    )


def _load_tokenizer(
    model_type: str | Architecture, name: str, flag: str, do_lower_case: bool | None
):
    if _is_any(model_type):
        return _load_any_tokenizer(
            name,
            flag,
            do_lower_case,
            not isinstance(model_type, str) and model_type.runs_remote_code,
        )
    architecture = row_of(model_type)
    files = _tokenizer_files(architecture, name, flag)
    declared = _read_json(files.get("tokenizer_config.json"), f"{flag} {name}")
    _check_tokenizer_class(architecture, declared, model_type, name, flag)
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
    _check_special_tokens(architecture, tokenizer, files, model_type, name, flag)
    return tokenizer


def _tokenizer_files(architecture: Architecture, name: str, flag: str) -> dict[str, str]:
    """Find the tokenizer's files: {file name: path}. transformers 5 makes an empty tokenizer where
    there are none.
    """
    wanted = ("tokenizer_config.json", "tokenizer.json", *architecture.vocab_files)
    if os.path.isdir(name):
        found = {
            file: os.path.join(name, file)
            for file in wanted
            if os.path.isfile(os.path.join(name, file))
        }
    else:
        found = _fetch(name, wanted, flag)
    if "tokenizer.json" not in found and any(
        file not in found for file in architecture.vocab_files
    ):
        raise InputError(
            f"{flag} {name}: has neither tokenizer.json nor"
            f" {' and '.join(architecture.vocab_files)}; name a {architecture.tokenizer_class}"
            " tokenizer, or another tokenizer type"
        )
    return found


def _fetch(name: str, files: Sequence[str], flag: str) -> dict[str, str]:
    paths: dict[str, str | None] = {}
    with quiet_transformers():
        try:
            for file in files:
                paths[file] = transformers.utils.cached_file(
                    name, file, _raise_exceptions_for_missing_entries=False
                )
                if not _is_in_hub_cache(
                    name
                ):  # without network each file takes its retries: one is enough
                    raise OSError("the hub did not answer, and nothing of it was downloaded before")
        except Exception as error:  # no such repository, no access, no network
            raise InputError(_not_found(flag, name, error)) from error
    return {file: path for file, path in paths.items() if path is not None}


def _is_in_hub_cache(name: str) -> bool:
    """True where the hub's client has noted anything of a repository, be it that a file is not
    there.
    """
    return os.path.isdir(
        os.path.join(huggingface_hub.constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    )


def _not_found(flag: str, name: str, error: Exception) -> str:
    if os.path.isdir(name):
        return (
            f"{flag} {name}: holds no readable config.json of a model ({one_line(error)}); name a"
            " model's folder"
        )
    return (
        f"{flag} {name}: neither a local folder nor a model that the hub gave ({one_line(error)})"
    )


def _read_json(path: str | None, where: str) -> dict:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{where}: {Path(path).name} is no readable JSON ({one_line(error)}); take another copy"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{where}: {Path(path).name} holds a {type(content).__name__}, expected an object; take"
            " another copy"
        )
    return content


def _check_tokenizer_class(
    architecture: Architecture, declared: dict, model_type: str, name: str, flag: str
) -> None:
    kinds = {
        row.tokenizer_class.removesuffix("Tokenizer"): row.tokenizer_class
        for row in ARCHITECTURES.values()
    }
    declared_class = str(declared.get("tokenizer_class") or "")
    kind = declared_class.removesuffix("Fast").removesuffix("Tokenizer").removeprefix("Distil")
    if kinds.get(kind, architecture.tokenizer_class) != architecture.tokenizer_class:
        raise InputError(
            f"{flag} {name}: holds a {declared_class}, which is no {model_type} tokenizer; give the"
            " type that it has"
        )


def _has_capitals(files: Mapping[str, str], where: str) -> bool:
    if "vocab.txt" in files:
        tokens = Path(files["vocab.txt"]).read_text(encoding="utf-8").splitlines()
    else:
        tokens = _read_json(files["tokenizer.json"], where).get("model", {}).get("vocab", {})
    return any(token != token.lower() for token in tokens if not token.startswith("["))


def _check_special_tokens(
    architecture: Architecture, tokenizer, files: dict, model_type: str, name: str, flag: str
) -> None:
    """transformers adds a missing special token to the vocabulary in silence; such an id means
    nothing to the model.
    """
    known = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    known |= {
        token["content"]
        for token in _read_json(files.get("tokenizer.json"), f"{flag} {name}").get(
            "added_tokens", []
        )
    }
    roles = [architecture.start_token, architecture.end_token, architecture.pad_token]
    roles += ["mask_token"] if architecture.is_masked else []
    missing = [
        f"{role} {getattr(tokenizer, role)}"
        for role in roles
        if getattr(tokenizer, role) not in known
    ]
    foreign = sorted(MASK_TOKENS & known) if not architecture.is_masked else []
    if foreign:  # RoBERTa's vocabulary holds GPT-2's boundary token, too
        raise InputError(
            f"{flag} {name}: its vocabulary has {foreign[0]}, a masked model's; expected a"
            f" {model_type} vocabulary"
        )
    if missing:
        raise InputError(
            f"{flag} {name}: its vocabulary has no {', no '.join(dict.fromkeys(missing))}; "
            f"expected a {model_type} vocabulary, is the type right?"
        )


def special_ids(model_type: str | Architecture, tokenizer) -> dict[str, int | None]:
    """Read the ids by role: start and end of a sequence, pad, and unknown (None where the tokenizer
    has none).

    Of a type that is found out start may be None, too.
    """
    if _is_any(model_type):
        tokens = {role: _first_token(tokenizer, names) for role, names in ROLES.items()}
        return {
            role: None if token is None else tokenizer.convert_tokens_to_ids(token)
            for role, token in tokens.items()
        }
    row = row_of(model_type)
    roles = {
        "start": row.start_token,
        "end": row.end_token,
        "pad": row.pad_token,
        "unknown": "unk_token",
    }
    return {role: getattr(tokenizer, f"{token}_id") for role, token in roles.items()}


def vocabulary_fingerprint(tokenizer) -> str:
    """Return the SHA-256 of the vocabulary, added tokens included: files of one fingerprint mean
    the same by their ids.
    """
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def vocabulary_difference(own, others) -> str | None:
    """Say where two tokenizers' vocabularies first differ; None where they are the same."""
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
    return f"{sizes}, and id {number} is {first}, there {second}"


def describe_tokenizer(
    model_type: str | Architecture, name: str, tokenizer, do_lower_case: bool | None = None
) -> dict:
    """Describe a tokenizer for the card of a token file."""
    return {
        "type": _called(model_type),
        "name": name,
        "do_lower_case": do_lower_case,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
        "special_ids": special_ids(model_type, tokenizer),
    }


def max_input_length(model_type: str | Architecture, tokenizer, config) -> int:
    """Return the longest sequence, in ids, that both the tokenizer and the teacher's position table
    admit.

    MAX_LENGTH at the most where neither names an end (models without a position table).
    """
    # Differs from the original: not from a table of model names, which fails for any other name.
    positions = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
    return int(min(tokenizer.model_max_length, positions - row_of(model_type).reserved_positions))


MAX_LENGTH = 2**20


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings, progress bars and retry messages back: what is wrong is said by
    us, in one line.
    """
    hub_logger = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers.logging.get_verbosity(), hub_logger.level
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    hub_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        hub_logger.setLevel(hub_level)
        if bars:
            transformers.logging.enable_progress_bar()


def load_config(model_type: str | None, name: str, flag: str, trust_remote_code: bool = False):
    """Load a model's configuration by hub name or folder. Raises InputError where it is not of
    model_type (None: any).

    trust_remote_code: run Python files that come with the model, where it needs them.
    """
    with quiet_transformers():
        try:  # transformers' default asks the terminal
            config = transformers.AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"{flag} {name}: needs Python files of its own, which would run with all your"
                    " rights (remote code); take another model, or pass --trust_remote_code where"
                    " you trust whoever made it (extract.py, train.py, evaluate_lm.py)"
                ) from error
            raise InputError(_not_found(flag, name, error)) from error
    if model_type is not None and config.model_type != model_type:
        raise InputError(
            f"{flag} {name}: is a {config.model_type} model, expected {model_type}; correct the"
            " type or the name"
        )
    return config


def load_model(model_type: str | Architecture, name: str, flag: str) -> torch.nn.Module:
    """Load a whole language model in float32. Raises InputError where weights are missing or not
    finite.

    One whose type was found out has to show that it is what distillation takes it for
    (conventions.check_conventions).
    """
    import torch

    row = row_of(model_type)
    load_config(
        model_type if isinstance(model_type, str) else None, name, flag, row.runs_remote_code
    )
    with quiet_transformers():
        try:
            model, report = _loader(row).from_pretrained(
                name,
                dtype=torch.float32,
                return_dict=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=row.runs_remote_code,
                weights_only=True,
            )
        except Exception as error:
            raise InputError(
                f"{flag} {name}: its weights could not be loaded ({one_line(error)})"
            ) from error
    misfits = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    of_a_layer = re.compile(rf"(^|\.){re.escape(row.layers.partition('.')[2] or chr(0))}\d+\.")
    misfits += [
        n
        for n in report["unexpected_keys"]
        if of_a_layer.search(n) and not re.search(row.obsolete, n)
    ]
    if misfits:
        raise InputError(
            f"{flag} {name}: {_some(sorted(misfits))} do not fit its config.json; take a whole,"
            " unedited model"
        )
    missing = sorted(
        set(report["missing_keys"])
        - set(row.aliases)
        - _repeated(model, set(report["missing_keys"]))
    )
    if missing:
        raise InputError(
            f"{flag} {name}: has no weights for {_some(missing)}; a whole {row.model_class} is"
            " expected, with its head"
        )
    check_finite(model.state_dict(), f"{flag} {name}")
    if not isinstance(model_type, str):
        from distil.models import conventions

        conventions.check_conventions(model, row.is_masked, f"{flag} {name}")
    return model


def _loader(row: Architecture):
    """Return the class that loads a model: by name where transformers has it, else by its
    configuration.
    """
    if row.transform is not None:
        return getattr(transformers, row.model_class)
    return transformers.AutoModelForMaskedLM if row.is_masked else transformers.AutoModelForCausalLM


def _repeated(model: torch.nn.Module, names: set[str]) -> set[str]:
    """Return those names under which a tensor stands that also has another name."""
    others = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name not in names}
    return {
        name
        for name, tensor in model.state_dict().items()
        if name in names and tensor.data_ptr() in others
    }


def load_teacher(
    model_type: str | Architecture, name: str, flag: str = "--teacher_name"
) -> torch.nn.Module:
    """Load a teacher: evaluation mode, no gradients."""
    return load_model(model_type, name, flag).eval().requires_grad_(False)


def check_finite(state_dict: StateDict, where: str) -> None:
    """Raise InputError naming the tensors in which something is NaN or infinite."""
    import torch

    wrong = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise InputError(
            f"{where}: {_some(wrong)} hold NaN or infinite values; take another checkpoint"
        )


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# What a run decides for itself, whatever a configuration that was saved by another run says.
OF_THE_RUN = (
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "quantization_config",
)


def read_student_config(
    model_type: str,
    path: str,
    initializer_range: float | None = None,
    flag: str = "--student_config",
):
    """Read a model's JSON configuration. Raises InputError where it is not one of `model_type`
    (AUTO: of its own).
    """
    require_file(path, flag)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if model_type == AUTO:
            model_type = content.get("model_type", "none")
        declared = content.pop("model_type", model_type)
        config_class = type(transformers.AutoConfig.for_model(model_type))
        unknown = [key for key in content if not hasattr(config_class(), key)]
        config = config_class(
            **{key: value for key, value in content.items() if key not in OF_THE_RUN}
        )
    except Exception as error:
        raise InputError(
            f"{flag} {path}: not a {model_type} configuration ({one_line(error)}); correct it"
        ) from error
    if declared != model_type:
        raise InputError(
            f"{flag} {path}: is for a {declared} model, expected {model_type}; name another file"
        )
    if config.num_hidden_layers < 1:
        raise InputError(
            f"{flag} {path}: has {config.num_hidden_layers} layers, expected at least 1; correct it"
        )
    if unknown and model_type in ARCHITECTURES:
        logger.warning(
            "%s %s: %s mean nothing to a %s model; misspelt?",
            flag,
            path,
            _some(unknown),
            model_type,
        )
    # Differs from the original: 2019 parsed the flag and ignored it.
    if initializer_range is not None:
        config.initializer_range = initializer_range
    if model_type in ARCHITECTURES:
        config.architectures = [ARCHITECTURES[model_type].model_class]
    return config


def build_student(
    model_type: str | Architecture, config, source: str = "--student_config"
) -> torch.nn.Module:
    """Make a student with random weights. Raises InputError naming `source` where the configuration
    contradicts itself.
    """
    with quiet_transformers():
        try:
            row = row_of(model_type)
            if row.transform is None:
                return _loader(row).from_config(config, trust_remote_code=row.runs_remote_code)
            return getattr(transformers, row.model_class)(config)
        except (
            Exception
        ) as error:  # sizes and names of layers that don't exist: each fails in its own way
            raise InputError(
                f"{source}: no model can be made of it ({one_line(error)}); correct the JSON"
            ) from error


def size_mismatches(
    student_config,
    teacher_config,
    source: str,
    student_type: str | Architecture | None = None,
    needs_width: bool = True,
) -> list[str]:
    """Say, a line each, in which sizes a student's configuration and its teacher's disagree though
    they must not.

    Students of a named type (None: the configuration's own) are like their teachers, as in 2019;
    one whose type was found out has its teacher's vocabulary, and its width where hidden states are
    compared (needs_width).
    """
    student_type = student_config.model_type if student_type is None else student_type
    sizes = {"vocab_size": "vocabulary"}
    if isinstance(student_type, str) or needs_width:
        sizes["hidden_size"] = "width"
    if isinstance(student_type, str):
        sizes["max_position_embeddings"] = "number of positions"
    if row_of(student_type).reserved_positions:  # its positions are counted from the padding id
        sizes["pad_token_id"] = "padding id"
    return [
        f"{source}: {what} is {getattr(student_config, name)}, the teacher's is"
        f" {getattr(teacher_config, name, None)}; they must be equal, set"
        f" {student_config.attribute_map.get(name, name)} in the student's JSON"
        for name, what in sizes.items()
        if getattr(student_config, name) != getattr(teacher_config, name, None)
    ]


def freeze_embeddings(
    student: torch.nn.Module, model_type: str | Architecture, *, positions: bool, token_types: bool
) -> None:
    """Stop the gradients of position embeddings (always where they are sinusoidal) and of token
    types.

    Differs from the original: DistilBERT's positions obey --freeze_pos_embs, which the README
    passes and 2019 ignored.
    """
    architecture = row_of(model_type)
    if positions and architecture.position_embeddings is None:
        logger.warning(
            "--freeze_pos_embs: a %s has no table of positions; nothing to keep.",
            type(student).__name__,
        )
    elif positions or getattr(student.config, "sinusoidal_pos_embds", False):
        student.get_submodule(architecture.position_embeddings).requires_grad_(False)
    if token_types and architecture.token_type_embeddings:
        student.get_submodule(architecture.token_type_embeddings).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# First weights from a teacher's layers
# --------------------------------------------------------------------------------------------------


def evenly_spaced_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Choose layers, first and last kept: round(linspace(0, L - 1, l)), which gives 0 2 4 7 9 11
    for 12 -> 6.
    """
    return np.rint(np.linspace(0, num_teacher_layers - 1, num_student_layers)).astype(int).tolist()


def extract_student(
    teacher: torch.nn.Module,
    student_type: str,
    layers: Sequence[int],
    *,
    vocab_transform: bool = False,
    fold_token_types: bool = False,
) -> dict[str, torch.Tensor]:
    """Make a student's first state dict out of a teacher's layers `layers` -> 0, 1, ..

    vocab_transform: take the dense layer and norm of the prediction head too. fold_token_types: add
    token type 0 to every position row where the student has no token types, which makes the copy
    exact (never to the word embeddings, which the output projection shares). Raises InputError
    naming a parameter that the teacher lacks.
    """
    teacher_type = teacher.config.model_type
    pair, student_row = PAIRS[teacher_type, student_type], ARCHITECTURES[student_type]
    teacher_state = teacher.state_dict()
    names = pair.parameter_names or _names_of_one_architecture(
        teacher_state, ARCHITECTURES[teacher_type]
    )
    if not vocab_transform:
        names = {
            s: t
            for s, t in names.items()
            if not s.startswith(student_row.head_transform or ("\0",))
        }
    state = {}
    for student_name, teacher_name in names.items():
        targets = list(enumerate(layers)) if "{layer}" in student_name else [(0, 0)]
        for student_layer, teacher_layer in targets:
            source = teacher_name.format(layer=teacher_layer)
            if source not in teacher_state:
                raise InputError(
                    f"the teacher has no parameter {source}; a {teacher_type} language model is"
                    " expected"
                )
            state[student_name.format(layer=student_layer)] = (
                teacher_state[source].detach().clone().contiguous()
            )
    if fold_token_types and pair.fold_token_types:
        target, source = pair.fold_token_types
        state[target] += teacher_state[source][0]
    return state


def student_of_pair(
    teacher: torch.nn.Module,
    student_type: str,
    layers: Sequence[int],
    fold_token_types: bool = False,
):
    """Make a whole student of another architecture than its teacher's, out of the teacher's layers
    `layers`.

    Raises InputError where PAIRS has no such pair.
    """
    pair = PAIRS.get((teacher.config.model_type, student_type))
    if pair is None or not pair.config_entries:
        known = ", ".join(f"{t} -> {s}" for (t, s), row in PAIRS.items() if row.config_entries)
        raise InputError(
            f"--student_type {student_type}: no student of a {teacher.config.model_type} teacher;"
            f" expected {known}"
        )
    config = getattr(transformers, ARCHITECTURES[student_type].config_class)(
        num_hidden_layers=len(layers),
        **{s: getattr(teacher.config, t) for s, t in pair.config_entries.items()},
    )
    student = build_student(student_type, config, f"{student_type} of {len(layers)} layers")
    state = extract_student(
        teacher, student_type, layers, vocab_transform=True, fold_token_types=fold_token_types
    )
    student.load_state_dict(state, strict=False)
    return student


def kind_of(config, source: str) -> bool:
    """Tell whether a model is a masked-language model (True) or a causal one, by its configuration.

    By the class that it was saved from; else masked where transformers has both. Raises InputError
    where it has neither.
    """
    kinds = {
        True: transformers.MODEL_FOR_MASKED_LM_MAPPING,
        False: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    found = [kind for kind, mapping in kinds.items() if type(config) in mapping]
    saved = [
        kind for kind in found if kinds[kind][type(config)].__name__ in (config.architectures or [])
    ]
    if not found and not getattr(config, "auto_map", None):
        raise InputError(
            f"{source}: is a {config.model_type} model; expected a masked or causal language model"
        )
    return (saved or found or ["AutoModelForMaskedLM" in config.auto_map])[0]


def _names_of_one_architecture(teacher_state: StateDict, row: Architecture) -> dict[str, str]:
    """Map a model's own names to themselves, layer numbers replaced by {layer}; aliases and old
    buffers left out.
    """
    pattern = re.compile(re.escape(row.layers) + r"\d+\.")
    names = [n for n in teacher_state if n not in row.aliases and not re.search(row.obsolete, n)]
    templates = [pattern.sub(f"{row.layers}{{layer}}.", name) for name in names]
    return {template: template for template in templates}


def load_student_weights(
    student: torch.nn.Module, model_type: str | Architecture, path: str
) -> None:
    """Load first weights (a plain state dict) into a student, checked name by name.

    Raises InputError naming every tensor that is missing, unexpected, of another shape or not
    finite. Absent tensors of the head's transform are named in a warning only: they are absent
    without --vocab_transform.
    """
    source = f"--student_pretrained_weights {path}"
    row, own = row_of(model_type), student.state_dict()
    given = _read_state_dict(path, "--student_pretrained_weights")
    given = {n: t for n, t in given.items() if n in own or not re.search(row.obsolete, n)}
    storages = {own[n].data_ptr() for n in given if n in own}
    missing = [n for n in own if n not in given and own[n].data_ptr() not in storages]
    optional = [n for n in missing if n.startswith(row.head_transform or ("\0",))]
    # Differs from the original: 2019 loaded whatever fitted, in silence.
    kinds = {"lacks": [n for n in missing if n not in optional], **_misfits(given, own)}
    remedy = "extract them anew for this student's configuration"
    problems = [
        f"{source}: {kind} {_some(names)}; {remedy}" for kind, names in kinds.items() if names
    ]
    if problems:
        raise InputError("\n".join(problems))
    check_finite(given, source)
    student.load_state_dict(given, strict=False)
    if optional:
        remedy = "they start at random (extract with --vocab_transform to take them)"
        logger.warning("%s has no %s: %s.", path, _some(optional), remedy)
    logger.info("Loaded %d tensors from %s.", len(given), path)


def _misfits(given: StateDict, own: StateDict) -> dict[str, list[str]]:
    """Describe the given tensors that a model with the state `own` cannot take, by kind of
    misfit.
    """
    shared = [n for n in given if n in own and _is_plain(given[n])]
    first_name: dict[int, str] = {}
    for name in shared:
        first_name.setdefault(own[name].data_ptr(), name)
    twins = [(n, first_name[own[n].data_ptr()]) for n in shared]
    return {
        "has unexpected": [n for n in given if n not in own],
        "has odd": [f"{n} ({t.dtype}, {t.layout})" for n, t in given.items() if not _is_plain(t)],
        "has misshapen": [
            f"{n} {list(given[n].shape)} (the student's is {list(own[n].shape)})"
            for n in shared
            if own[n].shape != given[n].shape
        ],
        "has another value for": [
            f"{n} (tied to {m})" for n, m in twins if n != m and not given[n].equal(given[m])
        ],
    }


def _read_state_dict(path: str, flag: str) -> dict[str, torch.Tensor]:
    import torch

    require_file(path, flag)
    try:
        if _is_safetensors(path):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{flag} {path}: not a state dict that can be loaded safely ({one_line(error)})"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state.items()
    ):
        raise InputError(
            f"{flag} {path}: expected a plain state dict (name -> tensor); make it with extract.py"
        )
    return dict(state)


def _is_safetensors(path: str) -> bool:
    """Tell by the content: the size of a JSON object comes first. Torch's own files begin
    otherwise.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path)


def _is_plain(tensor: object) -> bool:
    import torch

    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in kinds
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )
