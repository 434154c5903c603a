"""The flags of evaluate_lm.py. Imports no torch: a mistyped flag is found at once."""

import argparse
from collections.abc import Callable

from distil.data.text_flags import add_record_flags
from distil.system.outputs import add_force_flag
from utils import OneLineParser

DESCRIPTION = (
    "Measure how well a language model predicts held-out text, alone or against a teacher."
)
MASK_EVERY = 7  # masks 14 % of the tokens in a pass, about training's 15 %
DRAWN = "drawn_"  # prefix of figures on masks drawn as in training
MASKS_SEED = 56  # of drawn masks; train.py's, too, whatever its seed


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    _add_files(parser)
    _add_masks(parser.add_argument)
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the Python files that a model comes with, where it needs them",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="compute in bfloat16 (mixed precision), as a run with --bf16 evaluates",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="(default: a GPU where there is one)",
    )
    return parser.parse_args(argv)


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="model to be measured, hub name or local folder (a run's --dump_path, its best/)",
    )
    add(
        "--teacher",
        help="the model it is compared with, hub name or local folder, of the same vocabulary",
    )
    add(
        "--data_file",
        help="held-out token file made by binarized_data.py: a pickle, or a store by its prefix",
    )
    add(
        "--text_file",
        help="held-out text instead, one sequence a line, in what binarized_data.py reads",
    )
    add_record_flags(parser)
    add("--output", required=True, help="JSON that receives the scores")
    add_force_flag(parser)


def _add_masks(add: Callable) -> None:
    add(
        "--max_length",
        type=int,
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
        metavar="N",
        help=(
            "also mask the tokens of N sequences one by one, a pass a token; they are taken at even"
            " distances"
        ),
    )
    add(
        "--seed",
        type=int,
        default=MASKS_SEED,
        help="seed of the masks that are drawn (default: %(default)s)",
    )
