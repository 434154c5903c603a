"""What a program does before its slow imports, so that a signal in them is no traceback.

Imports little: until it has run, Ctrl-C is a traceback.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import NoReturn

# What schedulers and terminals send beside SIGTERM. SIGHUP: the terminal was closed; SIGXCPU: the
# processor time is used up.
AS_SIGTERM = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
IMPORT_S, RETRY_S = 5.0, 0.02


def heeded(numbers: Iterable[int]) -> list[int]:
    """Leave out SIGHUP where it is ignored: the program was started by nohup."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def begin_program() -> None:
    """End the program at Ctrl-C with one line and status 130, at SIGHUP and others as by SIGTERM.

    Until signals.py knows better. Streams that are closed (`2>&-`) are opened, or files would take
    their numbers.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        raise_outside_imports(signal.SIGINT, KeyboardInterrupt())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see children.running
    for number in heeded(AS_SIGTERM):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))


def raise_outside_imports(number: int, error: BaseException) -> None:
    """Let a signal raise an error as soon as no import is in progress; imports lose or convert it.

    It is raised again where it was lost all the same (in a `__del__`). It ends the process where an
    import lasts longer than IMPORT_S; SIGINT also where utils.run_main is not there to handle it.
    """
    # Early, so that it runs late: a signal behind it would find no handler.
    atexit.register(_leave_signals)
    deadline: float | None = None
    is_raised = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal deadline, is_raised
        if number == signal.SIGINT and not _is_in_main(frame):
            _end()
        now = time.monotonic()
        if deadline is None:
            deadline = now + IMPORT_S
            signal.signal(signal.SIGALRM, again)
            signal.setitimer(signal.ITIMER_REAL, RETRY_S, RETRY_S)
        if not any(_is_of_imports(code) for code in _stack(frame)):
            is_raised = True
            raise error
        sys.setprofile(at_end_of_imports)
        if now > deadline and number == signal.SIGINT:
            _end()
        if now > deadline:
            os._exit(128 + signal.SIGTERM)

    def at_end_of_imports(frame: FrameType, event: str, _: object) -> None:
        """Raise the error when the outermost import returns: main may end before the next alarm."""
        nonlocal is_raised
        if event != "return" or not _is_of_imports(frame.f_code):
            return
        if not any(_is_of_imports(code) for code in _stack(frame.f_back)):
            sys.setprofile(None)
            is_raised = True
            raise error

    def again(_: int, frame: FrameType | None) -> None:
        if not is_raised:
            # By the signal itself, because another handler may hold it by then; again and again,
            # because a signal just before a blocking call is heeded only behind it.
            signal.raise_signal(number)
        elif not _is_in_main(frame):  # it was heeded
            signal.setitimer(signal.ITIMER_REAL, 0)
        elif not _is_handled(error):
            signal.raise_signal(number)

    signal.signal(number, handle)


def _leave_signals() -> None:
    """Let the interpreter end undisturbed, with the status that is settled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _is_of_imports(code: CodeType) -> bool:
    return "<frozen importlib" in code.co_filename


def _is_in_main(frame: FrameType | None) -> bool:
    return any(code.co_name == "run_main" for code in _stack(frame))


def _is_handled(error: BaseException) -> bool:
    """True while blocks clean up behind an error."""
    current = sys.exc_info()[1]
    while current is not None and current is not error:
        current = current.__context__
    return current is error


def _stack(frame: FrameType | None) -> Iterator[CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _end() -> NoReturn:
    """End the process with one line; rank 0's."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        start = "\r" if os.isatty(2) else ""  # over the terminal's `^C`
        line = f"{start}{os.path.basename(sys.argv[0])}: error: interrupted\n"
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, line.encode(errors="replace"))
    os._exit(130)
