"""The flags of train_teacher.py. Imports no torch: a mistyped flag is found at once."""

import argparse
from collections.abc import Callable

from utils import OneLineParser

DESCRIPTION = (
    "Train a teacher on a token file: a small BERT from scratch, for experiments and the"
    " quickstart, or any model from given weights."
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    _add_start(parser)
    parser.add_argument("--data_file", required=True, help="token file made by binarized_data.py")
    parser.add_argument(
        "--token_counts",
        help="counts made by token_counts.py; not needed, all tokens are predicted alike",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for model, tokenizer and curve.json, the loss of each update; its training/ is"
        " the run folder, with checkpoints, metrics.jsonl and best/",
    )
    parser.add_argument(
        "--num_steps", type=int, default=1000, help="updates (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="sequences an update (default: %(default)s)"
    )
    parser.add_argument(
        "--max_length", type=int, default=64, help="longest sequence, in ids (default: %(default)s)"
    )
    parser.add_argument(
        "--mlm_mask_prop",
        type=float,
        default=0.3,
        help="share of predicted tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=7e-4,
        help="high enough for random weights; trained ones take about a tenth (default:"
        " %(default)s)",
    )
    parser.add_argument("--warmup_prop", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument(
        "--bf16", action="store_true", help="mixed precision in bfloat16, as of train.py"
    )
    parser.add_argument("--seed", type=int, default=56, help="(default: %(default)s)")
    _add_run(parser.add_argument)
    args = parser.parse_args(argv)
    if args.train_head_only and args.weights is None:
        parser.error("--train_head_only: expected with --weights, which has an encoder to keep")
    if args.tokenizer_name is None and args.weights is None:
        parser.error("--tokenizer_name: expected with --config, which names no tokenizer")
    return args


def _add_start(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is trained, from which weights."""
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config", help="BERT configuration, JSON: trained from random weights")
    start.add_argument(
        "--weights",
        help="hub name or folder of a masked or causal language model, whose training is"
        " continued, or of an encoder, which gets a new prediction head",
    )
    parser.add_argument(
        "--train_head_only",
        action="store_true",
        help="freeze all but the prediction head, to fit one to the encoder of --weights; a table"
        " that it shares with the embeddings is frozen, too",
    )
    parser.add_argument(
        "--tokenizer_name", help="hub name or local folder (default: that of --weights)"
    )


def _add_run(add: Callable) -> None:
    """Add the flags of checkpoints and evaluation, which are train.py's."""
    add(
        "--force",
        action="store_true",
        help="replace a model that output_dir holds, and move its training/ aside",
    )
    add(
        "--resume",
        nargs="?",
        const="required",
        choices=["required", "auto"],
        help="continue from the newest valid checkpoint; with auto, start anew if there is none",
    )
    add(
        "--checkpoint_interval",
        type=int,
        default=500,
        help="updates between two checkpoints (default: %(default)s)",
    )
    add(
        "--eval_data_file",
        help="token file of held-out text: evaluated on fixed masks, first weights too",
    )
    add(
        "--eval_interval",
        type=int,
        help="updates between two evaluations (default: first and last weights only)",
    )
