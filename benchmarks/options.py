"""The flags of benchmark.py. Imports no torch: a mistyped flag is found at once."""

import argparse

from distil.system.outputs import add_force_flag
from utils import OneLineParser

DESCRIPTION = (
    "Measure the distillation step on this machine: real tokens a second, FLOP/s, memory, stages."
)
# The keys of the tables PAIR_ROWS (workload.py), DTYPES (distil/flops.py), PIECES (cpu_pieces.py).
PAIRS = ("bert", "mbert", "roberta", "gpt2")
PRECISIONS = ("fp32", "bf16", "fp16")
PIECES = ("dropout", "attention", "products", "tied")


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    add_workload_flags(parser)
    add_variant_flags(parser)
    add_measuring_flags(parser)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of models and batches."""
    add = parser.add_argument
    add(
        "--pair",
        default="bert",
        choices=PAIRS,
        help="teacher and student (default: %(default)s)",
    )
    add(
        "--size",
        default="base",
        choices=["base", "tiny"],
        help="tiny: 2 layers of width 64, to try this program",
    )
    add("--device", choices=["cpu", "cuda"], help="(default: a GPU where there is one)")
    add("--data_file", help="token file of the pair's vocabulary (default: synthetic sequences)")
    add(
        "--length",
        type=int,
        help="longest sequence, in ids (default: 128; with --data_file what the teacher admits)",
    )
    add(
        "--mix",
        action="store_true",
        help="synthetic lengths spread as Wikipedia's paragraphs' are (default: all of LENGTH)",
    )
    add(
        "--batch_size",
        type=int,
        nargs="+",
        help="sequences a micro-batch, one figure or more (default: 5)",
    )
    add(
        "--micro_batches",
        type=int,
        default=1,
        help="micro-batches an update (default: %(default)s)",
    )


def add_variant_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the variants to time."""
    add = parser.add_argument
    add("--precision", nargs="+", choices=PRECISIONS, help="one or more (default: fp32)")
    add(
        "--sweep",
        action="store_true",
        help="several micro-batch sizes, and all precisions of the device",
    )
    add(
        "--reference",
        action="store_true",
        help="also time a plain step of the 2019 kind, on the same batches",
    )
    add(
        "--reference_precision",
        nargs="+",
        choices=PRECISIONS,
        help="of it: fp32 always, another one under torch.autocast",
    )
    add(
        "--tuned",
        action="store_true",
        help="also time a loop of today by somebody who knows torch, in each precision",
    )
    add("--compile", action="store_true", help="also run what is ours through torch.compile")
    add(
        "--without",
        nargs="+",
        default=[],
        choices=PIECES,
        help="also time our step with one piece of distil/kernels/cpu.py off, a row a piece",
    )
    add(
        "--tokens_per_pass",
        type=int,
        nargs="+",
        default=[0],
        help="padded tokens up to which a pass of our step joins micro-batches, one figure or more"
        " (default: 0, none are joined)",
    )
    add(
        "--pack_sequences",
        action="store_true",
        help="also time joined passes with their sequences laid into rows",
    )
    add(
        "--end_to_end",
        action="store_true",
        help="also time train.py, as a program, on the same sequences",
    )


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of repetitions, threads, seed and outputs."""
    add = parser.add_argument
    add("--updates", type=int, help="measured updates (default: 5 on a CPU, 20 on a GPU)")
    add("--warmup", type=int, help="updates before them (default: 3 on a CPU, 5 on a GPU)")
    add(
        "--rounds",
        type=int,
        default=1,
        help="times that every variant is run, in turn (default: %(default)s)",
    )
    add("--threads", type=int, help="threads of the CPU (default: torch's choice)")
    add(
        "--seed",
        type=int,
        default=56,
        help="seed of ids, order, masks, weights and dropout (default: %(default)s)",
    )
    add("--json", help="write everything that was found to this file")
    add("--plot", help="draw it into this PNG file")
    add_force_flag(parser)
