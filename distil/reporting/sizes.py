"""Sizes of models: parameters, bytes of weights, number formats, vocabulary."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from distil.models.hub import load_config, quiet_transformers, weight_files
from distil.models.names import short_name
from distil.models.tokenizer_rules import vocabulary_fingerprint
from distil.system.failures import naming_failures
from distil.tasks.loading import load_any_tokenizer, longest_input
from utils import InputError


def count_parameters(config) -> tuple[int, int, str]:
    """Count (parameters of the base model, with its head, the head's class); tied ones once.

    As for the 2019 figures the base model is AutoModel's: BERT's with its pooler, which its
    masked-LM class lacks.
    """
    kind = (config.architectures or ["AutoModel"])[0]
    with quiet_transformers(), torch.device("meta"):
        base = transformers.AutoModel.from_config(config)
        head_class = getattr(transformers, kind, None)
        has_head = isinstance(head_class, type) and issubclass(
            head_class, transformers.PreTrainedModel
        )
        whole = head_class(config) if has_head else base
    return tuple(sum(p.numel() for p in model.parameters()) for model in (base, whole)) + (kind,)


def dtypes_of(files: Sequence[Path]) -> list[str]:
    """List the number formats of safetensors files by their names there; none for other files."""
    import safetensors

    found = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return sorted(found)


def measure_size(role: str, name: str) -> dict:
    """Measure a model's size; describe its inputs. Raises InputError naming the flag of `role`."""
    config = load_config(None, name, f"--{role}")
    tokenizer = load_any_tokenizer(name, f"--{role}")
    files = weight_files(name)
    if not files:
        raise InputError(
            f"--{role} {name}: has neither model.safetensors nor pytorch_model.bin; name a whole"
            " model"
        )
    with naming_failures(f"--{role} {name}: its weights could not be read", "; take another copy"):
        dtypes = dtypes_of(files)
    what = f"--{role} {name}: no model can be made of its config.json"
    with naming_failures(what, "; correct it"):
        base, whole, kind = count_parameters(config)
    return {
        "name": short_name(name),
        "path": name,
        "model_type": config.model_type,
        "head": kind,
        "parameters_base": base,
        "parameters": whole,
        "weights_bytes": sum(path.stat().st_size for path in files),
        "weights_dtypes": dtypes,
        "float32_bytes": 4 * whole,
        "float16_bytes": 2 * whole,
        "longest_input": longest_input(config),
        "vocabulary_size": len(tokenizer),
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
    }
