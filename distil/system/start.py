"""What a program does before its slow imports, so that a signal in them is no traceback.

Imports little: until it has run, Ctrl-C is a traceback.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from types import FrameType

# What schedulers and terminals send beside SIGTERM. SIGHUP: the terminal was closed; SIGXCPU: the
# processor time is used up.
AS_SIGTERM = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)


def heeded(numbers: Iterable[int]) -> list[int]:
    """Leave out SIGHUP where it is ignored: the program was started by nohup."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def begin_program() -> None:
    """End the program at Ctrl-C with one line and status 130, at SIGHUP and others as by SIGTERM.

    Until utils.run_program and signals.py know better. Streams that are closed (`2>&-`) are opened,
    or files would take their numbers.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    for number in heeded(AS_SIGTERM):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))


def _end(number: int, frame: FrameType | None) -> None:
    """End the process: an import may lose a KeyboardInterrupt, or convert it to another error."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        start = "\r" if os.isatty(2) else ""  # over the terminal's `^C`
        line = f"{start}{os.path.basename(sys.argv[0])}: error: interrupted\n"
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, line.encode(errors="replace"))
    os._exit(130)
