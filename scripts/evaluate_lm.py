"""Measure how well a language model predicts held-out text and, beside a teacher, how near it is to
that.

Masked models (BERT, DistilBERT, RoBERTa, ModernBERT, ..): loss, perplexity and top-1 accuracy on
fixed masks, where every k-th token is masked in k passes, so that each is asked for once and
nothing is left to chance; the same on masks drawn as in training; and the pseudo-perplexity of some
sentences, each token masked alone (Salazar et al., 2020). Causal models (GPT-2, Llama, ..): loss,
token perplexity and accuracy. Beside a teacher, at the same positions: KL(teacher || student) at
temperature 1, how often both put the same token first, and the cosine of the last hidden states. A
masked model's perplexity is no causal one's: don't compare.
"""

import argparse
import dataclasses
import functools
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data.batches import MicroBatch, MlmPreparation, masking_weights
from distil.data.encoding import Encoding, LineEncoder
from distil.data.text_sources import ERRORS, find_sources, read_blocks, texts_of
from distil.data.token_files import MIN_LENGTH, TokenFile, token_file_problem
from distil.evaluation import (
    MASK_EVERY,
    FixedMasks,
    Passes,
    figures_of,
    measure,
    next_tokens,
    passes_over,
    plan_batches,
    reader_of,
)
from distil.models.architectures import Architecture, row_of
from distil.models.hub import load_config
from distil.models.language_model import find_out, kind_of, load_teacher, max_input_length
from distil.models.tokenizers import load_tokenizer, special_ids, vocabulary_fingerprint
from distil.system.files import file_problem, output_problem
from distil.tasks.loading import require_same_vocabulary
from distil.tasks.scores import write_scores
from lm_seqs_dataset import LmSeqsDataset, SpecialIds, read_token_counts
from utils import (
    InputError,
    OneLineParser,
    bar_options,
    keep_freed_memory,
    logger,
    run_program,
    setup_logging,
)

SHARES = ("accuracy", "agreement")  # shown in percent, and x100 in the scores


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="model to be measured, hub name or local folder (a run's --dump_path, its best/)",
    )
    add(
        "--teacher",
        default=None,
        help="the model it is compared with, hub name or local folder, of the same vocabulary",
    )
    add(
        "--data_file",
        default=None,
        help="held-out token file made by binarized_data.py: a pickle, or a store by its prefix",
    )
    add(
        "--text_file",
        default=None,
        help="held-out text instead, one sequence a line, in what binarized_data.py reads",
    )
    add(
        "--text_field",
        default="text",
        help="the text's field or column in .jsonl, .parquet, .. (default: %(default)s)",
    )
    add(
        "--errors",
        default="strict",
        choices=ERRORS,
        help="what becomes of text that is not UTF-8 (default: %(default)s)",
    )
    add("--output", required=True, help="JSON that receives the scores")
    add(
        "--max_length",
        type=int,
        default=None,
        help="longest sequence, in token ids (default: what the models admit)",
    )
    add(
        "--mask_every",
        type=int,
        default=MASK_EVERY,
        help="tokens from one fixed mask to the next (default: %(default)s)",
    )
    add(
        "--mlm_mask_prop",
        type=float,
        default=0.15,
        help="share of the tokens that is drawn (default: %(default)s)",
    )
    add(
        "--token_counts",
        default=None,
        help="draw by rarity, as training does, from these counts (default: uniformly)",
    )
    add(
        "--mlm_smoothing",
        type=float,
        default=0.7,
        help="with --token_counts: weight count ^ -MLM_SMOOTHING (default: %(default)s)",
    )
    add(
        "--pseudo_perplexity",
        type=int,
        default=None,
        metavar="N",
        help=(
            "also mask the tokens of N sequences one by one, a pass a token; they are taken at even"
            " distances"
        ),
    )
    add(
        "--seed",
        type=int,
        default=56,
        help="seed of the masks that are drawn (default: %(default)s)",
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="run the Python files that a model comes with, where it needs them",
    )
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError that names every argument out of its range, missing file and
    contradiction.
    """
    ranges = {
        "max_length": (MIN_LENGTH + 1, 1e6),
        "mask_every": (2, 1e6),
        "mlm_mask_prop": (1e-6, 1),
        "mlm_smoothing": (0, 100),
        "pseudo_perplexity": (1, 1e9),
    }
    problems = [
        f"--{name} {value}: expected {low:g} to {high:g}"
        for name, (low, high) in ranges.items()
        if (value := getattr(args, name)) is not None and not low <= value <= high
    ]
    if (args.data_file is None) == (args.text_file is None):
        found = (
            "neither is given"
            if args.data_file is None
            else f"got {args.data_file} and {args.text_file}"
        )
        problems.append(
            f"--data_file, --text_file: {found}, expected one of them; name the held-out text once"
        )
    stores = [f"{args.data_file}.{ending}" for ending in ("bin", "idx", "json")]
    inputs = [
        args.data_file,
        args.text_file,
        args.token_counts,
        *stores,
        *model_files(args.model, args.teacher),
    ]
    problems.append(output_problem(args.output, "--output", [name for name in inputs if name]))
    problems += (
        [token_file_problem(args.data_file, "--data_file")] if args.data_file is not None else []
    )
    problems += (
        [file_problem(args.token_counts, "--token_counts")] if args.token_counts is not None else []
    )
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append(
            "--device cuda: this machine has no GPU that torch can use; pass --device cpu"
        )
    problems = [problem for problem in problems if problem]
    if problems:
        raise InputError("\n".join(problems))


# --------------------------------------------------------------------------------------------------
# Models and text
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its tokenizer, checked. source: its flag and name; model_type: or what was found
    out about it.
    """

    source: str
    model_type: str | Architecture
    network: torch.nn.Module
    tokenizer: object

    @property
    def is_masked(self) -> bool:
        """True for masked-language models, False for causal ones."""
        return row_of(self.model_type).is_masked

    @property
    def max_length(self) -> int:
        """The longest sequence that it admits, in token ids."""
        return max_input_length(self.model_type, self.tokenizer, self.network.config)


def model_files(*names: str | None) -> list[str]:
    """List what models' folders hold that is read: scores may lie beside it, not over it."""
    folders = [Path(name) for name in names if name and os.path.isdir(name)]
    return [
        str(path)
        for folder in folders
        for pattern in MODEL_FILES
        for path in sorted(folder.glob(pattern))
    ]


MODEL_FILES = (
    "*config.json",
    "*.safetensors*",
    "*.bin*",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
)


def model_types(args: argparse.Namespace) -> list[str | Architecture]:
    """Find out of which types the model and its teacher are, before they are loaded. Raises
    InputError, a line a problem.
    """
    types: dict[str, str | Architecture] = {}
    problems: list[str] = []
    for flag, name in names_of(args).items():
        source = f"{flag} {name}"
        try:
            config = load_config(None, name, flag, args.trust_remote_code)
            types[source] = find_out(
                config, kind_of(config, source), source, args.trust_remote_code
            )
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    kinds = ["masked" if row_of(found).is_masked else "causal" for found in types.values()]
    if kinds[0] != kinds[-1]:
        model, teacher = types
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
    if problems:
        raise InputError("\n".join(problems))
    return list(types.values())


def names_of(args: argparse.Namespace) -> dict[str, str]:
    """Return {flag: name} of the model and, if there is one, its teacher."""
    return {"--model": args.model} | ({} if args.teacher is None else {"--teacher": args.teacher})


def load(model_type: str | Architecture, name: str, flag: str, device: str) -> Model:
    """Load a model and its tokenizer, in evaluation mode. Raises InputError."""
    tokenizer = load_tokenizer(model_type, name, flag)
    if row_of(model_type).is_masked and tokenizer.mask_token_id is None:
        raise InputError(
            f"{flag} {name}: its tokenizer has no mask_token; set it in tokenizer_config.json"
        )
    network = load_teacher(model_type, name, flag).to(device)
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= network.config.vocab_size:
        raise InputError(
            f"{flag} {name}: its tokenizer has ids up to {largest_id}, the model's vocabulary"
            f" {network.config.vocab_size} entries; take a model and tokenizer that belong together"
        )
    return Model(f"{flag} {name}", model_type, network, tokenizer)


def load_both(args: argparse.Namespace) -> list[Model]:
    """Load the model and, if there is one, its teacher. Raises InputError where they don't predict
    the same tokens.
    """
    types, names = model_types(args), names_of(args).items()
    loaded = [
        load(found, name, flag, args.device)
        for found, (flag, name) in zip(types, names, strict=True)
    ]
    if len(loaded) > 1:
        model, teacher = loaded
        require_same_vocabulary(model.tokenizer, teacher.tokenizer, args.model, args.teacher)
        sizes = [one.network.config.vocab_size for one in loaded]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{teacher.source}: gives {sizes[1]} logits, {model.source} {sizes[0]}; take one of"
                " as many"
            )
    return loaded


def read_sequences(args: argparse.Namespace, model: Model, max_length: int) -> LmSeqsDataset:
    """Read the held-out sequences, split and filtered as in training. Raises InputError."""
    special = SpecialIds(**special_ids(model.model_type, model.tokenizer))
    if args.data_file is not None:
        vocabulary, vocab_size = (
            vocabulary_fingerprint(model.tokenizer),
            model.network.config.vocab_size,
        )
        return LmSeqsDataset.from_file(
            args.data_file, special, max_length, vocab_size, model.source, vocabulary
        )
    dataset = LmSeqsDataset(
        encoded_text(args, model, special), special, max_length, f"--text_file {args.text_file}"
    )
    if len(dataset) == 0:
        raise InputError(
            f"--text_file {args.text_file}: none of its lines is left after filtering (more than"
            f" {MIN_LENGTH} ids, less than half unknown tokens); put more text on a line, or check"
            " --max_length and the tokenizer"
        )
    return dataset


def encoded_text(args: argparse.Namespace, model: Model, special: SpecialIds) -> TokenFile:
    """Make token ids of a text's lines, in their order, as binarized_data.py does. Raises
    InputError.
    """
    largest_id = max(model.tokenizer.get_vocab().values())
    encoder = LineEncoder(
        Encoding(
            model.tokenizer.backend_tokenizer,
            special.start,
            special.end,
            largest_id,
            special.unknown,
        )
    )
    parts = []
    for source in find_sources(args.text_file, "--text_file"):
        for block in read_blocks(source, args.text_field, "--text_file"):
            texts, _ = texts_of(block, args.text_field, args.errors, "--text_file")
            parts.append(encoder.encode([line for text in texts if (line := text.strip())]))
    ids_M, lengths_N = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(lengths_N):
        raise InputError(
            f"--text_file {args.text_file}: has blank lines only; expected one sequence a line"
        )
    return TokenFile(args.text_file, ids_M, lengths_N)


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """One way to ask. prefix: before its figures' names; batches: numbers of sequences; passes: see
    passes_over.
    """

    prefix: str
    batches: list[np.ndarray]
    passes: Passes


def questions(args: argparse.Namespace, model: Model, dataset: LmSeqsDataset) -> list[Question]:
    """List the ways in which a model is asked, by its kind and the flags."""
    batches = plan_batches(dataset.lengths)
    if not model.is_masked:
        return [Question("", batches, next_tokens)]
    masks = FixedMasks(
        model.tokenizer.mask_token_id, model.tokenizer.all_special_ids, args.mask_every
    )
    found = [Question("", batches, masks), Question("drawn_", batches, drawing(args, model))]
    if args.pseudo_perplexity is not None:
        num = min(args.pseudo_perplexity, len(dataset))
        chosen = np.unique(np.linspace(0, len(dataset) - 1, num).round().astype(np.int64))
        one_by_one = dataclasses.replace(masks, every=int(dataset.lengths.max()))
        plan = [chosen[batch] for batch in plan_batches(dataset.lengths[chosen])]
        found.append(Question("pseudo_", plan, one_by_one))
    return found


def drawing(args: argparse.Namespace, model: Model) -> Passes:
    """Choose how masks are drawn: MLM_MASK_PROP of the tokens, of which 80 % are masked, 10 % kept,
    10 % random.
    """
    counts_V, smoothing = np.ones(model.network.config.vocab_size, np.int64), 0.0
    if args.token_counts is not None:
        vocabulary, smoothing = vocabulary_fingerprint(model.tokenizer), args.mlm_smoothing
        counts_V = read_token_counts(args.token_counts, len(counts_V), model.source, vocabulary)
    weights_V = masking_weights(
        torch.from_numpy(counts_V), smoothing, model.tokenizer.all_special_ids
    )
    mask_id = model.tokenizer.mask_token_id
    prepare = MlmPreparation(
        weights_V, mask_id, args.mlm_mask_prop, 0.8, 0.1, 0.1, False, args.seed
    )
    return functools.partial(_once, prepare)


def _once(prepare, number: int, token_ids_BT, lengths_B) -> list[MicroBatch]:
    return [prepare(number, token_ids_BT, lengths_B)]


def answer(
    question: Question, model: Model, teacher: Model | None, dataset: LmSeqsDataset
) -> dict[str, float]:
    """Ask a model, and its teacher, one way: their figures, the way's prefix in front. Raises
    InputError.
    """
    readers = [None if one is None else reader_of(one.network) for one in (model, teacher)]
    with tqdm(
        total=len(question.batches), unit="batch", desc=f"{question.prefix}loss", **bar_options()
    ) as bar:

        def collate(numbers):
            bar.update()
            return dataset.collate(numbers)

        sums_S = measure(*readers, passes_over(collate, question.batches, question.passes))
    same_width = (
        teacher is not None
        and model.network.config.hidden_size == teacher.network.config.hidden_size
    )
    figures = figures_of(sums_S, teacher is not None, same_width)
    if not all(map(math.isfinite, figures.values())):
        raise InputError(
            f"{model.source}: a figure is NaN or infinite; the text has nothing to be predicted but"
            " special tokens, or a model overflows: take other text, another model"
        )
    return {f"{question.prefix}{name}": value for name, value in figures.items()}


# --------------------------------------------------------------------------------------------------
# What is shown and written
# --------------------------------------------------------------------------------------------------


def table_lines(figures: dict[str, float], has_teacher: bool) -> list[str]:
    """Lay figures out as a Markdown table; the teacher's own stand beside the model's."""
    rows = [["figure", "model", "teacher"][: 2 + has_teacher]]
    for name, value in figures.items():
        stem = next((part for part in ("drawn_", "pseudo_") if name.startswith(part)), "")
        if not name.startswith(f"{stem}teacher_"):
            beside = figures.get(f"{stem}teacher_{name.removeprefix(stem)}")
            shown = [_shown(name, value), "" if beside is None else _shown(name, beside)]
            rows.append([name.replace("_", " "), *shown[: 1 + has_teacher]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _shown(name: str, value: float) -> str:
    return f"{value:.2%}" if name.endswith(SHARES) else f"{value:.4f}"


def as_metrics(figures: dict[str, float]) -> dict[str, float]:
    """Make figures into scores: shares x100."""
    return {
        name: 100 * value if name.endswith(SHARES) else value for name, value in figures.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Run the program: load, ask, show, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_arguments(args)
    if args.device == "cpu":
        keep_freed_memory()
    loaded = load_both(args)
    model, teacher = loaded[0], loaded[1] if len(loaded) > 1 else None
    longest = min(one.max_length for one in loaded)
    dataset = read_sequences(args, model, min(longest, args.max_length or longest))
    figures: dict[str, float] = {}
    for question in questions(args, model, dataset):
        figures |= answer(question, model, teacher, dataset)
    num_examples = {"sequences": len(dataset), "ids": int(dataset.lengths.sum())}
    runs = [{"seed": args.seed, "metrics": as_metrics(figures), "num_examples": num_examples}]
    task = "masked lm" if model.is_masked else "causal lm"
    write_scores(
        args.output, task=task, model=args.model, runs=runs, teacher=args.teacher, flags=vars(args)
    )
    print("\n".join(table_lines(figures, teacher is not None)))
    logger.info("Wrote %s: %d sequences, %d ids.", args.output, *num_examples.values())


if __name__ == "__main__":
    run_program(main)
