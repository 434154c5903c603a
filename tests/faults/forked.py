"""Programs in forked processes, for the trials: one second, where a new interpreter takes five."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from utils import run_program


def fork_program(prepare: Callable[[], None], action: Callable[[], None]) -> int:
    """Fork a process that calls `prepare`, then a program's main; return its id.

    It ends with the program's status, or with 1 and a traceback for unexpected exceptions.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        prepare()
        run_program(action)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # a panic of the tokenizers library is no Exception
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def ended(pid: int) -> int | None:
    """Return the status of an ended child, negative for a signal; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def end_of(pid: int, limit_s: float) -> int | None:
    """Wait for a child and return its status; None where it had to be killed."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if (status := ended(pid)) is not None:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
