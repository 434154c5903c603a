"""Save models with their tokenizers as folders that AutoModel and AutoTokenizer load alike."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile

import torch
import transformers

from distil.models.hub import quiet_transformers
from distil.models.tokenizer_folder import GENERIC, PreTrainedTokenizerFast
from distil.models.tokenizer_roles import ROLE_TOKENS
from distil.models.tokenizer_rules import other_ids
from utils import logger, one_line


def save_folder(network: torch.nn.Module, tokenizer, folder: str | os.PathLike) -> None:
    """Save a network and its tokenizer. tokenizer: see `tokenizer_for`."""
    with quiet_transformers():
        network.save_pretrained(folder)
        tokenizer_for(network, tokenizer).save_pretrained(folder)


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
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        network.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # loaders raise anything on files of another kind
            return one_line(error)
    return other_ids(found.backend_tokenizer, tokenizer.backend_tokenizer)


def _as_file(tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer's rules in the class that takes tokenizer.json as it stands."""
    options = {
        key: getattr(tokenizer, key)
        for key in ("model_max_length", "model_input_names", "padding_side", "truncation_side")
    }
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
