"""What scripts/extract.py and scripts/extract_distilbert.py share: flags, checks, the call, the report."""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence

from architectures import PAIRS, evenly_spaced_layers, extract_student, load_teacher
from utils import InputError, OneLineParser, logger, require_output, save_weights, setup_logging

DEFAULT_NUM_LAYERS = 6  # the students of the paper; half of a teacher with fewer than twice as many layers


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What differs between the two programs. student_types: teacher's type -> student's."""

    description: str
    student_types: Mapping[str, str]
    model_type: str
    model_name: str
    dump_checkpoint: str


def make_parser(defaults: Defaults) -> argparse.ArgumentParser:
    """Make the command line of one of the two programs."""
    parser = OneLineParser(description=defaults.description, allow_abbrev=False)
    parser.add_argument(
        "--model_type", default=defaults.model_type, choices=list(defaults.student_types), help="(default: %(default)s)"
    )
    parser.add_argument("--model_name", default=defaults.model_name, help="hub name or folder (default: %(default)s)")
    parser.add_argument("--dump_checkpoint", default=defaults.dump_checkpoint, help="output (default: %(default)s)")
    parser.add_argument("--vocab_transform", action="store_true", help="take the prediction head's dense layer and norm too")
    parser.add_argument("--num_layers", type=int, help="layers of the student, taken evenly spaced (default: 6, at most half)")
    parser.add_argument("--layers", type=int, nargs="+", help="the teacher's layers to take, in place of --num_layers")
    if any(PAIRS[pair].fold_token_types for pair in defaults.student_types.items()):
        parser.add_argument(
            "--fold_token_types", action="store_true", help="add token type 0 to every position, which makes the copy exact"
        )
    return parser


def choose_layers(num_teacher_layers: int, num_layers: int | None, layers: Sequence[int] | None) -> list[int]:
    """Choose the teacher's layers by the flags. Raises InputError where the teacher has no such layers."""
    if layers is not None and num_layers is not None:
        raise InputError("--layers and --num_layers: give one of them")
    if layers is not None:
        wrong = [layer for layer in layers if not 0 <= layer < num_teacher_layers]
        if wrong:
            raise InputError(f"--layers {wrong[0]}: the teacher has layers 0 to {num_teacher_layers - 1}")
        return list(layers)
    wanted = num_layers if num_layers is not None else max(min(DEFAULT_NUM_LAYERS, num_teacher_layers // 2), 1)
    if not 1 <= wanted <= num_teacher_layers:
        raise InputError(f"--num_layers {wanted}: expected 1 to {num_teacher_layers}, the teacher's layers")
    return evenly_spaced_layers(num_teacher_layers, wanted)


def extract(defaults: Defaults, argv: list[str] | None = None) -> None:
    """Run the program: load the teacher, take its layers, write the student's state dict."""
    args = make_parser(defaults).parse_args(argv)
    setup_logging(logging.INFO)
    require_output(args.dump_checkpoint, "--dump_checkpoint", [args.model_name])
    teacher = load_teacher(args.model_type, args.model_name, "--model_name")
    layers = choose_layers(teacher.config.num_hidden_layers, args.num_layers, args.layers)
    state = extract_student(
        teacher,
        defaults.student_types[args.model_type],
        layers,
        vocab_transform=args.vocab_transform,
        fold_token_types=getattr(args, "fold_token_types", False),
    )
    save_weights(args.dump_checkpoint, state)
    print(f"Took {len(layers)} layers ({' '.join(map(str, layers))}) and {len(state)} tensors.", flush=True)
    logger.info("Wrote %s.", args.dump_checkpoint)
