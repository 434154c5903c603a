"""What latency is measured with: the flags that latency.py and report.py share."""

import argparse
import dataclasses
from collections.abc import Sequence

from distil.system.files import file_problem

# flag: (least, largest)
RANGES = {"threads": (1, 1024), "passes": (3, 10_000), "num_sentences": (1, 1_000_000)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Batch sizes, timed passes, CPU threads, the least number of sentences a pass, devices."""

    batch_sizes: Sequence[int] = (1, 32)
    passes: int = 5
    threads: int = 1
    num_sentences: int = 32
    devices: Sequence[str] = ("cpu",)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a plan."""
    plan = Plan()
    parser.add_argument(
        "--data", help="text, a sentence a line, to time with (default: a built-in mix of lengths)"
    )
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=list(plan.batch_sizes), help="(default: 1 32)"
    )
    parser.add_argument(
        "--passes",
        type=int,
        default=plan.passes,
        help="timed passes, at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=plan.threads, help="CPU threads (default: %(default)s)"
    )
    parser.add_argument(
        "--num_sentences",
        type=int,
        default=plan.num_sentences,
        help="a pass (default: %(default)s)",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=["cpu", "cuda"],
        help="(default: the CPU, and a GPU if there is one)",
    )


def plan_problems(args: argparse.Namespace) -> list[str]:
    """List the problems of a plan's flags, a line each."""
    import torch

    problems = [
        f"--{name} {getattr(args, name)}: expected {low} to {high}"
        for name, (low, high) in RANGES.items()
        if not low <= getattr(args, name) <= high
    ]
    problems += [
        f"--batch_sizes {size}: expected 1 to 4096"
        for size in args.batch_sizes
        if not 1 <= size <= 4096
    ]
    if "cuda" in (args.devices or []) and not torch.cuda.is_available():
        problems.append("--devices cuda: torch sees no GPU here; leave it out")
    if args.data and (problem := file_problem(args.data, "--data")):
        problems.append(problem)
    return problems


def plan_of(args: argparse.Namespace) -> Plan:
    """Make the plan from its flags."""
    import torch

    devices = args.devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    return Plan(
        tuple(dict.fromkeys(args.batch_sizes)),
        args.passes,
        args.threads,
        args.num_sentences,
        tuple(devices),
    )
