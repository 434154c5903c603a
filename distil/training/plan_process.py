"""Start of train.py: its flags; with --plan, the process that measures, and what ended it.

What is measured may need more memory than there is. So it runs in a child process: a system that
kills for memory, and libraries that abort where an allocation fails, end the child, and the parent
has a line to say. Imports no torch.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distil.system.children import running
from distil.system.memory import RESIDENT, Limit, memory_limits, process_memory
from distil.system.start import AS_SIGTERM, heeded
from distil.training.config import TrainConfig, parse_config
from distil.training.plan_verdict import Needs, memory_problem
from utils import EXIT_INPUT_ERROR, report_problems

CHILD = "DISTIL_PLAN_CHILD"  # set for the process that measures
WATCH_S = 0.05
KILLED = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)


def read_flags() -> None:
    """Read the flags; with --plan, run the rest in a child process and exit with its status.

    Raises InputError.
    """
    config = parse_config()
    if config.plan is not None and not os.environ.get(CHILD):
        raise SystemExit(watch_child(config, Path(sys.argv[0]), sys.argv[1:], memory_limits()))


def watch_child(
    config: TrainConfig, program: Path, flags: Sequence[str], limits: Sequence[Limit]
) -> int:
    """Run a program; return its status, that of a bad input where memory ended it.

    It is ended before it takes more memory than there is: Linux would choose what to kill, among
    all programs. Of the other limits (ulimit) its own allocations tell.
    """
    resident = [limit for limit in limits if limit.field == RESIDENT]
    problem, options = None, {"env": {**os.environ, CHILD: "1"}, "process_group": 0}
    with running(program, flags, **options) as child, _forwarding_signals(child):
        for used in _watched(child):
            problem = problem or memory_problem(config, resident, Needs({RESIDENT: used}))
            if problem:
                child.kill()
    status = child.returncode
    if problem is None and status < 0 and -status in KILLED:
        problem = memory_problem(config, limits, None, f"ended by signal {-status}")
    if problem is None:
        return status if status >= 0 else 128 - status
    report_problems(problem)
    return EXIT_INPUT_ERROR


@contextlib.contextmanager
def _forwarding_signals(child: subprocess.Popen) -> Iterator[None]:
    """Send what would end this process to the child, which ends with one line, within the block."""
    numbers = [signal.SIGINT, signal.SIGTERM, *heeded(AS_SIGTERM)]
    previous = {n: signal.signal(n, lambda n, _: child.send_signal(n)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _watched(child: subprocess.Popen) -> Iterator[int]:
    """Yield the memory that a child has, in bytes, until it has ended."""
    while True:
        try:
            child.wait(WATCH_S)
            return
        except subprocess.TimeoutExpired:
            yield process_memory("VmRSS", child.pid)
