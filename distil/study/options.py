"""The flags of study.py. Imports no torch: a mistyped flag is found at once."""

import argparse
import shlex

from distil.study.runs import words_of
from distil.study.variants import REFERENCE, Variant, own_variant, read_own, variants
from distil.training.config import make_parser
from utils import InputError, OneLineParser

DESCRIPTION = (
    "Compare objectives, first weights and flags at equal cost: train every variant with every"
    " seed, and measure all students on the same masks."
)
EQUAL = ("updates", "flops")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises InputError."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    _add_inputs(parser.add_argument)
    _add_plan(parser.add_argument)
    _add_tasks(parser.add_argument)
    args = parser.parse_args(argv)
    if problem := _problem(args):
        raise InputError(problem)
    args.seeds = list(dict.fromkeys(args.seeds))
    own = [read_own(text) for text in args.own]
    args.own = dict(own)
    if len(args.own) < len(own):
        raise InputError(f"--own {' '.join(name for name, _ in own)}: a name occurs twice")
    of_training = {f"--own {name}": own_variant(name, own, True) for name, own in args.own.items()}
    words = {flag: words_of(variant.flags) for flag, variant in of_training.items()}
    for flag, own in {"--train_flags": shlex.split(args.train_flags), **words}.items():
        try:
            make_parser().parse_args(own)
        except InputError as error:
            raise InputError(f"{flag}: {error}") from error
    return args


def _add_inputs(add) -> None:
    add("--teacher", required=True, help="masked or causal language model, hub name or folder")
    add("--data_file", required=True, help="token file to train on, of binarized_data.py")
    add("--held_out", required=True, help="token file of held-out text, made in the same way")
    add(
        "--output",
        default="study",
        metavar="FOLDER",
        help="receives runs, study.json, DISTILLATION.md and .png; the same command continues"
        " there (default: %(default)s)",
    )
    add(
        "--num_held_out",
        type=int,
        metavar="N",
        help="measure on so many of the held-out sequences, evenly spaced (default: all)",
    )
    add("--title", help="the study's name in its page (default: the teacher's)")


def _add_plan(add) -> None:
    add(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="rows to compare; the reference and the row without teacher are always there"
        " (default: all)",
    )
    add(
        "--own",
        nargs="*",
        default=[],
        metavar="NAME=FLAGS",
        help="further rows: the triple but for these flags of train.py, and of extract.py for the"
        " first student's layers and widths, such as 'deep=--alpha_mlm 0 --alpha_hid 1'",
    )
    add("--seeds", type=int, nargs="+", default=[56, 57, 58], help="(default: 56 57 58)")
    add("--max_steps", type=int, default=1000, help="updates of the reference (default: 1000)")
    add(
        "--equal",
        choices=EQUAL,
        default="updates",
        help="what each variant gets as much of as the reference (default: %(default)s)",
    )
    add(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[5e-4],
        metavar="RATE",
        help="of several, each variant takes the best with the first seed, by the KL divergence on"
        " every 4th held-out sequence, which is not reported (default: 0.0005)",
    )
    add("--token_counts", help="of token_counts.py (default: counted from --data_file)")
    add("--max_length", type=int, help="longest sequence, in ids (default: the teacher's)")
    add(
        "--train_flags",
        default="--batch_size 16 --gradient_accumulation_steps 1",
        help="further flags of train.py for all runs, in one argument; a variant's win (default:"
        " %(default)r)",
    )
    add(
        "--extract_flags",
        help="further flags of extract.py for all first students, in one argument, such as"
        " '--student_type distilbert'; a variant's win",
    )
    add("--processes", type=int, default=1, help="runs at once (default: %(default)s)")


def _add_tasks(add) -> None:
    add("--tasks", nargs="+", default=[], help="tasks of run_task.py to fine-tune each student on")
    add("--data_dir", help="folder of the tasks' folders")
    add("--task_flags", default="", help="further flags of run_task.py, in one argument")


def _problem(args: argparse.Namespace) -> str | None:
    known = {**variants(is_masked=True), **variants(is_masked=False)}
    unknown = [name for name in args.variants or [] if name not in known]
    if unknown:
        return f"--variants {unknown[0]}: expected some of {', '.join(known)}"
    for flag in ("max_steps", "processes"):
        if getattr(args, flag) < 1:
            return f"--{flag} {getattr(args, flag)}: expected at least 1"
    if args.num_held_out is not None and args.num_held_out < 2:
        return f"--num_held_out {args.num_held_out}: expected at least 2"
    rates = [rate for rate in args.learning_rates if not 0 < rate < 1]
    if rates:
        return f"--learning_rates {rates[0]}: expected above 0, below 1"
    for flag in ("train_flags", "extract_flags", "task_flags"):
        try:
            shlex.split(getattr(args, flag) or "")
        except ValueError as error:
            return f"--{flag} {getattr(args, flag)}: {error}; close the quotation mark"
    if args.tasks and not args.data_dir:
        return "--data_dir: needed with --tasks; name the folder of the tasks' folders"
    return None


def chosen(args: argparse.Namespace, is_masked: bool) -> dict[str, Variant]:
    """Return the variants by name: the reference, the row without teacher, the chosen, one's own.

    Raises InputError for those of the other kind of model.
    """
    known = variants(is_masked)
    wrong = [name for name in args.variants or [] if name not in known]
    if wrong:
        raise InputError(
            f"--variants {wrong[0]}: not for a {'masked' if is_masked else 'causal'} teacher;"
            " leave it out"
        )
    found = {name: known[name] for name in [*list(known)[:2], *(args.variants or known)]}
    assert next(iter(found)) == REFERENCE
    return found | {name: own_variant(name, flags, is_masked) for name, flags in args.own.items()}
