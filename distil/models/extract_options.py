"""The flags of extract.py and extract_distilbert.py. Imports no torch: a mistyped flag is found at
once.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from distil.models.architectures import PAIRS
from distil.system.outputs import add_force_flag
from utils import OneLineParser


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The differences between extract.py and extract_distilbert.py.

    student_types: teacher's type -> student's.
    """

    description: str
    student_types: Mapping[str, str]
    model_type: str
    model_name: str
    dump_checkpoint: str


EXTRACT = Defaults(
    description=(
        "Make a student's first weights from layers of a RoBERTa or GPT-2, or a student of any"
        " teacher."
    ),
    student_types={"roberta": "roberta", "gpt2": "gpt2"},
    model_type="roberta",
    model_name="roberta-large",
    dump_checkpoint="serialization_dir/tf_roberta_048131723.pth",
)


EXTRACT_DISTILBERT = Defaults(
    description="Make a DistilBERT student's first weights from layers of a BERT teacher.",
    student_types={"bert": "distilbert"},
    model_type="bert",
    model_name="bert-base-uncased",
    dump_checkpoint="serialization_dir/tf_bert-base-uncased_0247911.pth",
)


def parse(defaults: Defaults, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line of extract.py or extract_distilbert.py."""
    parser = OneLineParser(description=defaults.description, allow_abbrev=False)
    _add_state_dict_flags(parser, defaults)
    _add_student_flags(parser)
    return parser.parse_args(argv)


def _add_state_dict_flags(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    add = parser.add_argument
    add(
        "--model_type",
        default=defaults.model_type,
        choices=list(defaults.student_types),
        help="(default: %(default)s)",
    )
    add(
        "--model_name",
        default=defaults.model_name,
        help="hub name or folder (default: %(default)s)",
    )
    add("--dump_checkpoint", default=defaults.dump_checkpoint, help="output (default: %(default)s)")
    add_force_flag(parser)
    add(
        "--vocab_transform",
        action="store_true",
        help="take the prediction head's dense layer and norm too",
    )
    add(
        "--num_layers",
        type=int,
        help="layers of the student, taken evenly spaced (default: 6, at most half)",
    )
    add(
        "--layers",
        type=int,
        nargs="+",
        help="the teacher's layers to take, in place of --num_layers",
    )
    add(
        "--fold_token_types",
        action="store_true",
        help="add token type 0 to every position of a DistilBERT, which makes the copy exact",
    )


def _add_student_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--teacher",
        help=(
            "any masked or causal language model, hub name or folder: makes a whole student in"
            " --output"
        ),
    )
    add(
        "--output",
        help=(
            "folder that receives the student: configuration, weights, tokenizer, for train.py"
            " --student"
        ),
    )
    add(
        "--student_type",
        choices=sorted({s for t, s in PAIRS if t != s}),
        help="a student of another type than its --teacher",
    )
    add(
        "--choose_layers",
        metavar="TOKEN_FILE",
        help=(
            "choose --num_layers layers by measurement on held-out text, leaving out one at a time"
            " the layer whose absence changes the predictions least; what each costs is written"
            " into --output as a table and a picture"
        ),
    )
    for flag, what in (
        ("--hidden_size", "width"),
        ("--intermediate_size", "neurons of a feed-forward layer"),
        ("--num_heads", "attention heads of a layer, which keep their width"),
    ):
        add(flag, type=int, metavar="N", help=f"{what}, the most important ones of the teacher's")
    add(
        "--importance_file",
        metavar="TOKEN_FILE",
        help=(
            "text on which importance is measured by activations (default: --choose_layers'; else"
            " by the weights' norms)"
        ),
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python files that come with the teacher, where it needs them",
    )
