"""Measure how well a language model predicts held-out text, alone or against a teacher.

Masked models (BERT, DistilBERT, RoBERTa, ModernBERT, ..): loss, perplexity and top-1 accuracy on
fixed masks, with every k-th token masked in k passes, so that each token is predicted once and
nothing is random; the same on masks drawn as in training; and the pseudo-perplexity of some
sentences, each token masked alone (Salazar et al., 2020). Causal models (GPT-2, Llama, ..): loss,
token perplexity and accuracy. With a teacher, at the same positions: KL(teacher || student) at
temperature 1, how often both rank the same token first, and the cosine of the last hidden states.
Don't compare a masked model's perplexity with a causal one's.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.held_out_options import parse
    from utils import read_flags_first

    read_flags_first(parse)

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from distil.data.encoding import Encoding
from distil.data.token_files import MIN_LENGTH, token_file_problem
from distil.evaluation import FixedMasks
from distil.held_out import (
    Measurement,
    as_metrics,
    causal_measurements,
    drawn_masks,
    encode_text,
    figures_table,
    masked_measurements,
    run_measurement,
)
from distil.held_out_options import parse
from distil.models.architectures import Architecture
from distil.models.checks import tokenizer_problem
from distil.models.language_model import LanguageModel, load_language_model, resolve_by_name
from distil.system.files import file_problem, output_problem
from distil.system.memory import reuse_memory
from distil.system.outputs import json_of
from distil.tasks.loading import require_same_vocabulary
from distil.tasks.scores import write_scores
from lm_seqs_dataset import LmSeqsDataset, read_token_counts
from utils import (
    InputError,
    logger,
    raise_problems,
    run_program,
    setup_logging,
)

RANGES = {
    "max_length": (MIN_LENGTH + 1, 1e6),
    "mask_every": (2, 1e6),
    "mlm_mask_prop": (1e-6, 1),
    "mlm_smoothing": (0, 100),
    "pseudo_perplexity": (1, 1e9),
}


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError with a line for each wrong value, missing file and contradiction."""
    problems = [
        f"--{name} {value}: expected {low:g} to {high:g}"
        for name, (low, high) in RANGES.items()
        if (value := getattr(args, name)) is not None and not low <= value <= high
    ]
    texts = [args.data_file, args.text_file]
    if texts.count(None) != 1:
        found = "neither is given" if texts[0] is None else f"got {texts[0]} and {texts[1]}"
        problems.append(
            f"--data_file, --text_file: {found}, expected one of them; name the held-out text once"
        )
    inputs = [*texts, args.token_counts, *model_files(args.model, args.teacher)]
    inputs += [f"{args.data_file}.{ending}" for ending in ("bin", "idx", "json")]
    options = {"is_own": json_of("task", "model_name", "score"), "force": args.force}
    inputs = [name for name in inputs if name]
    problems.append(output_problem(args.output, "--output", inputs, **options))
    if args.data_file is not None:
        problems.append(token_file_problem(args.data_file, "--data_file"))
    if args.token_counts is not None:
        problems.append(file_problem(args.token_counts, "--token_counts"))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append(
            "--device cuda: this machine has no GPU that torch can use; pass --device cpu"
        )
    raise_problems(problems)


# --------------------------------------------------------------------------------------------------
# Models and text
# --------------------------------------------------------------------------------------------------


# The files that are read of a model's folder: the scores may join them, but not overwrite one.
MODEL_FILES = (
    *("*config.json", "*.safetensors*", "*.bin*"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
)


def model_files(*names: str | None) -> list[str]:
    """List the files that are read of models' folders."""
    folders = [Path(name) for name in names if name and os.path.isdir(name)]
    return [
        str(path) for folder in folders for pattern in MODEL_FILES for path in folder.glob(pattern)
    ]


def resolve_models(args: argparse.Namespace) -> list[Architecture]:
    """Resolve the architectures of the model and its teacher before loading either.

    Raises InputError with a line for each problem.
    """
    found: dict[str, Architecture] = {}
    problems: list[str] = []
    for flag, name in names_of(args).items():
        try:
            trust = args.trust_remote_code
            found[f"{flag} {name}"] = resolve_by_name(name, flag, trust_remote_code=trust)
        except InputError as error:
            problems.append(str(error))
    raise_problems(problems)
    kinds = ["masked" if architecture.is_masked else "causal" for architecture in found.values()]
    if kinds[0] != kinds[-1]:
        model, teacher = found
        problems.append(
            f"{teacher}: is a {kinds[1]} model, {model} a {kinds[0]} one; compare with a {kinds[0]}"
            " model"
        )
    if kinds[0] == "causal":
        problems += [
            f"--{name}: is for masked models, --model {args.model} is a causal one; leave it out"
            for name in ("pseudo_perplexity", "token_counts")
            if getattr(args, name) is not None
        ]
    raise_problems(problems)
    return list(found.values())


def names_of(args: argparse.Namespace) -> dict[str, str]:
    """Return {flag: name} of the model and, if there is one, its teacher."""
    return {"--model": args.model} | ({} if args.teacher is None else {"--teacher": args.teacher})


def load(architecture: Architecture, name: str, flag: str, device: str) -> LanguageModel:
    """Load a model and its tokenizer, in evaluation mode. Raises InputError."""
    model = load_language_model(architecture, name, flag)
    if model.is_masked and model.tokenizer.mask_token_id is None:
        raise InputError(
            f"{flag} {name}: its tokenizer has no mask_token; set it in tokenizer_config.json"
        )
    raise_problems([tokenizer_problem(model)])
    model.network.to(device)
    return model


def load_both(args: argparse.Namespace) -> list[LanguageModel]:
    """Load the model and, if there is one, its teacher. Raises InputError for other tokens."""
    found, names = resolve_models(args), names_of(args).items()
    loaded = [
        load(architecture, name, flag, args.device)
        for architecture, (flag, name) in zip(found, names, strict=True)
    ]
    if len(loaded) > 1:
        model, teacher = loaded
        require_same_vocabulary(model.tokenizer, teacher.tokenizer, args.model, args.teacher)
    return loaded


def read_sequences(
    args: argparse.Namespace, model: LanguageModel, max_length: int
) -> LmSeqsDataset:
    """Read the held-out sequences, split and filtered as in training. Raises InputError."""
    if args.data_file is not None:
        return LmSeqsDataset.from_file(args.data_file, model, max_length)
    tokenizer, special = model.tokenizer, model.special_ids
    encoding = Encoding(
        tokenizer.backend_tokenizer,
        special.start,
        special.end,
        max(tokenizer.get_vocab().values()),
        special.unknown,
        args.text_field,
        args.errors,
    )
    tokens = encode_text(args.text_file, "--text_file", encoding)
    dataset = LmSeqsDataset(tokens, special, max_length, f"--text_file {args.text_file}")
    if len(dataset) == 0:
        raise InputError(
            f"--text_file {args.text_file}: none of its lines is left after filtering (more than"
            f" {MIN_LENGTH} ids, less than half unknown tokens); put more text on a line, or check"
            " --max_length and the tokenizer"
        )
    return dataset


def measurements(
    args: argparse.Namespace, model: LanguageModel, lengths: np.ndarray
) -> list[Measurement]:
    """List the measurements by the model's kind and the flags."""
    if not model.is_masked:
        return causal_measurements(lengths)
    tokenizer = model.tokenizer
    counts_V, smoothing = np.ones(model.num_entries, np.int64), 0.0
    if args.token_counts is not None:
        counts_V, smoothing = read_token_counts(args.token_counts, model), args.mlm_smoothing
    fixed = FixedMasks(tokenizer.mask_token_id, tokenizer.all_special_ids, args.mask_every)
    drawn = drawn_masks(counts_V, smoothing, args.mlm_mask_prop, tokenizer, args.seed)
    return masked_measurements(lengths, fixed, drawn, args.pseudo_perplexity)


def main(argv: list[str] | None = None) -> None:
    """Run the program: load, measure, print, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_arguments(args)
    if args.device == "cpu":
        reuse_memory()
    loaded = load_both(args)
    model, teacher = loaded[0], loaded[1] if len(loaded) > 1 else None
    longest = min(one.max_length for one in loaded)
    dataset = read_sequences(args, model, min(longest, args.max_length or longest))
    figures: dict[str, float] = {}
    teacher_network = None if teacher is None else teacher.network
    amp_dtype = torch.bfloat16 if args.bf16 else None
    for measurement in measurements(args, model, dataset.lengths):
        networks = model.network, teacher_network
        given = dataset.collate, model.source, model.num_entries, amp_dtype
        figures |= run_measurement(measurement, *networks, *given)
    num_examples = {"sequences": len(dataset), "ids": int(dataset.lengths.sum())}
    runs = [{"seed": args.seed, "metrics": as_metrics(figures), "num_examples": num_examples}]
    task = "masked lm" if model.is_masked else "causal lm"
    write_scores(
        args.output, task=task, model=args.model, runs=runs, teacher=args.teacher, flags=vars(args)
    )
    print(figures_table(figures, teacher is not None))
    logger.info("Wrote %s: %d sequences, %d ids.", args.output, *num_examples.values())


if __name__ == "__main__":
    run_program(main)
