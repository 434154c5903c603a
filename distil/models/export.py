"""Save models with their tokenizers as folders that AutoModel and AutoTokenizer load alike."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from distil.models.hub import quiet_transformers
from distil.models.tokenizer_folder import COPIED, GENERIC, PreTrainedTokenizerFast
from distil.models.tokenizer_roles import ROLE_TOKENS
from distil.models.tokenizer_rules import other_ids
from distil.system.files import is_regular, naming_library_errors, replacing_files
from utils import logger, one_line

# Entries that the loader leaves in a tokenizer's configuration.
LEFT_OVERS = ("is_local", "local_files_only", "name_or_path", "max_length", "files_loaded")


# Names of what save_folder writes, whatever the model and the tokenizer.
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "bpe.codes"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


def save_folder(network: torch.nn.Module, tokenizer, folder: str | os.PathLike) -> list[str]:
    """Save a network and its tokenizer (see `tokenizer_for`), for transformers 4 and 5.

    Replace the files of these names, and shards of an earlier model; leave the others. Return the
    names.
    """
    with replacing_files(folder) as temporary:
        with quiet_transformers():
            network.save_pretrained(temporary)
        complete_folder(network, tokenizer, temporary)
        written = sorted(os.listdir(temporary))
    for old in Path(folder).glob("model*.safetensors*"):
        if old.name not in written and is_regular(old):
            old.unlink()
    return written


def complete_folder(network: torch.nn.Module, tokenizer, folder: str | os.PathLike) -> None:
    """Make of a new folder that a network was saved to what `save_folder` makes."""
    _change_json(Path(folder, "config.json"), functools.partial(_config_of_4, network))
    save_tokenizer(tokenizer, folder)


def save_config(network: torch.nn.Module, folder: str | os.PathLike) -> None:
    """Save a network's configuration as `save_folder` does."""
    config = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    config.save_pretrained(folder)
    _change_json(Path(folder, "config.json"), functools.partial(_config_of_4, network))


def save_tokenizer(tokenizer, folder: str | os.PathLike) -> None:
    """Save a tokenizer as transformers 4 and 5 read it, without what its loading left."""
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    change = functools.partial(_tokenizer_config_of_4, tokenizer)
    _change_json(Path(folder, "tokenizer_config.json"), change)


def _change_json(path: Path, change: Callable[[dict], dict]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(change(content), indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _config_of_4(network: torch.nn.Module, config: dict) -> dict:
    """Write a configuration for transformers 4, too, without code that the network does not use."""
    left_out = () if _is_remote(network) else ("auto_map",)
    config |= getattr(network, "saved_entries", {})  # see forward.set_dropout
    return _with_rope_of_4({key: value for key, value in config.items() if key not in left_out})


def _is_remote(thing: object) -> bool:
    """True for an object whose class came with a model (--trust_remote_code)."""
    return type(thing).__module__.startswith("transformers_modules")


def _with_rope_of_4(config: dict) -> dict:
    """State the angles of rotary embeddings as transformers 4 reads them, too.

    It ignores rope_parameters and would compute other logits, silently.
    """
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "modernbert":
        return _modernbert_of_4(config, rope)
    theta = rope.get("rope_theta")
    if theta is None or "rope_theta" in config:  # absent, by kind of layer, or stated
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return config | {"rope_theta": theta} | ({"rope_scaling": scaling} if is_scaled else {})


def _modernbert_of_4(config: dict, rope: dict) -> dict:
    """State ModernBERT's kinds of attention as transformers 4 does: every n-th layer is global."""
    kinds = config.get("layer_types") or []
    periods = [
        period
        for period in range(1, len(kinds) + 1)
        if kinds == [f"{'sliding' if k % period else 'full'}_attention" for k in range(len(kinds))]
    ]
    if not periods:
        text = "transformers 4 cannot express these kinds of layers: %s. It computes other logits."
        logger.warning(text, ", ".join(kinds))
        return config
    return config | {
        "global_attn_every_n_layers": periods[0],
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }


def _tokenizer_config_of_4(tokenizer, config: dict) -> dict:
    """List further special tokens under the name that transformers 4 and 5 read."""
    left_out = LEFT_OVERS if _is_remote(tokenizer) else (*LEFT_OVERS, "auto_map")
    kept = {key: value for key, value in config.items() if key not in left_out}
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept


def tokenizer_for(network: torch.nn.Module, tokenizer):
    """Return a copy of a tokenizer to save with a network.

    It declares the inputs that the network's forward takes, and a class with which AutoTokenizer
    gives its ids from the folder: its own, or the class that takes tokenizer.json as it stands
    where the class of the network's type would be built from the vocabulary.
    """
    tokenizer = copy.deepcopy(tokenizer)
    names = input_names(network, tokenizer)
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # in Python, for tasks only
        return tokenizer
    if type(tokenizer).__name__ == "TokenizersBackend":  # a name that transformers 4 lacks
        tokenizer = _as_file(tokenizer)
    problem = _reload_problem(network, tokenizer)
    if problem is None:
        return tokenizer
    as_file = _as_file(tokenizer)
    if _reload_problem(network, as_file) is not None:
        text = (
            "AutoTokenizer loads other rules for a %s (%s): load it with PreTrainedTokenizerFast."
        )
        logger.warning(text, network.config.model_type, problem)
    return as_file


def input_names(network: torch.nn.Module, tokenizer) -> list[str]:
    """List the tokenizer's outputs that are parameters of the network's forward.

    A class that serves any model lists token types, too; they are left out where the model has at
    most one: GPT-2's forward would look them up among the words.
    """
    parameters = inspect.signature(network.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in parameters]
    num_types = getattr(network.config, "type_vocab_size", 0)
    if type(tokenizer).__name__ in GENERIC and num_types < 2:
        names = [name for name in names if name != "token_type_ids"]
    return names


def _reload_problem(network: torch.nn.Module, tokenizer) -> str | None:
    """Say how AutoTokenizer's reading of a saved tokenizer differs from it, or return None."""
    with (
        tempfile.TemporaryDirectory() as folder,
        naming_library_errors(folder),
        quiet_transformers(),
    ):
        save_config(network, folder)
        save_tokenizer(tokenizer, folder)
        try:
            found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # loaders raise anything on files of another kind
            return one_line(error)
    return other_ids(found.backend_tokenizer, tokenizer.backend_tokenizer)


def _as_file(tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer's rules in the class that takes tokenizer.json as it stands."""
    options = {key: getattr(tokenizer, key) for key in COPIED}
    if tokenizer.extra_special_tokens:
        options["extra_special_tokens"] = tokenizer.extra_special_tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template=tokenizer.chat_template,
        **options,
        **{
            role: token
            for role, token in tokenizer.special_tokens_map.items()
            if role in ROLE_TOKENS
        },
    )
