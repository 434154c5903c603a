"""Start another of the project's programs, and end it with the block that waits for it."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def running(program: Path, flags: Sequence[str], **options) -> Iterator[subprocess.Popen]:
    """Run a program until the end of the block; an error in the block ends it: it saves its state.

    options: of subprocess.Popen. Ctrl-C in a terminal reaches all programs; the new one holds it
    back until its `begin_program`, for the interpreter's own start would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        child = subprocess.Popen([sys.executable, str(program), *flags], **options)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    with child:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # raises a Ctrl-C that waited
            yield child
        except BaseException:
            child.terminate()
            raise
