"""The tokenizer of a trimmed teacher, as the class that the teacher's has."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from distil.models.architectures import Architecture
from distil.models.hub import quiet_transformers
from distil.models.tokenizer_rules import other_ids
from distil.models.tokenizers import load_tokenizer
from utils import InputError

KEPT_FILES = {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


def renumbered_tokenizer(
    tokenizer, backend: Tokenizer, new_of: Mapping[int, int], architecture: Architecture, config
):
    """Return a tokenizer with the options of the given one and the rules of `backend`.

    Raises InputError where the library loads other rules for them.
    """
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():  # vocab.txt, merges.txt hold the whole vocabulary
            if file.is_file() and file.name not in KEPT_FILES:
                file.unlink()
        config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        file = folder / "tokenizer_config.json"
        declared = json.loads(file.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in declared:
            declared["added_tokens_decoder"] = {
                str(new_of[int(number)]): token
                for number, token in declared["added_tokens_decoder"].items()
            }
        file.write_text(json.dumps(declared), encoding="utf-8")
        own = load_tokenizer(architecture, name, "--teacher")
    problem = other_ids(own.backend_tokenizer, backend)
    if problem:
        raise InputError(f"--teacher: its tokenizer cannot be saved with fewer entries: {problem}")
    return own
