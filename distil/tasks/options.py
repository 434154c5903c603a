"""Flags that the two fine-tuning programs declare as tables, and checks that both make.

Imports neither torch nor transformers: programs parse first and import the rest after.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class NumberFlag:
    """A row of a table of flags.

    default: None for the task's setting. bounds: least and largest value, both admitted.
    """

    default: float | None
    help: str
    bounds: tuple[float, float] | None = None
    kind: type | None = None

    @property
    def type(self) -> type:
        """Return the type of the flag's value: `kind`, by default that of `default`."""
        return self.kind or type(self.default)


def add_number_flags(parser: argparse.ArgumentParser, flags: Mapping[str, NumberFlag]) -> None:
    """Add a flag per row."""
    for name, flag in flags.items():
        default = "the task's" if flag.default is None else "%(default)s"
        text = f"{flag.help} (default: {default})".strip()
        parser.add_argument(f"--{name}", type=flag.type, default=flag.default, help=text)


def add_switches(parser: argparse.ArgumentParser, switches: Mapping[str, str]) -> None:
    """Add a switch per row; switches: {name: help}."""
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def number_problems(args: argparse.Namespace, flags: Mapping[str, NumberFlag]) -> list[str]:
    """Name the numbers out of their bounds, one line each."""
    problems = [
        f"--{name} {getattr(args, name)}: expected {flag.bounds[0]:g} to {flag.bounds[1]:g}"
        for name, flag in flags.items()
        if flag.bounds and not flag.bounds[0] <= getattr(args, name) <= flag.bounds[1]
    ]
    if args.max_steps == 0:
        problems.append("--max_steps 0: expected at least 1, or -1 for --num_train_epochs")
    return problems


def second_step_problems(
    has_teacher: bool, alpha_ce: float, alpha_task: float, temperature: float, task_flag: str
) -> list[str]:
    """Name what is wrong with the weights of the second step's loss, one line each."""
    problems = []
    if not (math.isfinite(temperature) and temperature > 0):
        problems.append(f"--temperature {temperature:g}: expected above 0; 2 is usual")
    if not has_teacher:
        return problems
    if not (math.isfinite(alpha_ce) and alpha_ce > 0):
        problems.append(
            f"--alpha_ce {alpha_ce:g}: expected above 0 with a teacher; leave the teacher out for"
            " plain fine-tuning"
        )
    if not (math.isfinite(alpha_task) and alpha_task >= 0):
        problems.append(f"--{task_flag} {alpha_task:g}: expected at least 0")
    return problems


def lacks_gpu(args: argparse.Namespace) -> bool:
    """Return whether --fp16 is given without a GPU to run on."""
    if not args.fp16 or args.no_cuda:
        return args.fp16
    import torch

    return not torch.cuda.is_available()
