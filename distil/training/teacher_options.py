"""The flags of train_teacher.py. Imports no torch: a mistyped flag is found at once."""

import argparse

from utils import OneLineParser

DESCRIPTION = (
    "Train a small BERT from scratch on a token file, as a teacher for experiments and the"
    " quickstart."
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="BERT configuration, JSON")
    parser.add_argument("--tokenizer_name", required=True, help="hub name or local folder")
    parser.add_argument("--data_file", required=True, help="token file made by binarized_data.py")
    parser.add_argument(
        "--token_counts",
        help="counts made by token_counts.py; not needed, all tokens are predicted alike",
    )
    parser.add_argument(
        "--output_dir", required=True, help="folder for model, tokenizer and curve.json"
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
    parser.add_argument("--learning_rate", type=float, default=7e-4, help="(default: %(default)s)")
    parser.add_argument("--warmup_prop", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument(
        "--force", action="store_true", help="replace a model that output_dir holds"
    )
    parser.add_argument("--seed", type=int, default=56, help="(default: %(default)s)")
    return parser.parse_args(argv)
