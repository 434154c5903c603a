"""Signals that end a program: held while files are renamed, or converted to a request to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from distil.system.start import AS_SIGTERM, heeded, raise_outside_imports
from utils import logger

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, *AS_SIGTERM)


def note_signal(number: int, frame: object) -> None:
    """Ignore a signal in its handler: StopSignals reads it from the wake-up descriptor."""


@contextlib.contextmanager
def holding_signals() -> Iterator[None]:
    """Delay signals that end the program until the end of the block.

    By handlers, not by a mask: a mask holds for one thread, and the system may choose another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    ending = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not note_signal]
    previous = {
        number: signal.signal(number, lambda got, _: caught.append(got)) for number in ending
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if caught:
            signal.raise_signal(caught[0])


def exit_on_sigterm() -> None:
    """Let SIGTERM and its like end the program as Ctrl-C does, cleaning up, with status 143."""
    for number in heeded([signal.SIGTERM, *AS_SIGTERM]):
        raise_outside_imports(number, SystemExit(128 + signal.SIGTERM))


SAME_EVENT_S = 1.0


class StopSignals:
    """Record signals that stop a run at its next update; a second one ends the process at once.

    A thread reads them: the main thread may wait in a collective, where Python's handlers do not
    run. Signals within SAME_EVENT_S count as one: a scheduler and a launcher may both forward it.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._noted_at = 0.0

    def request(self, number: int) -> None:
        """Request a stop at the next update; at the second request end the process."""
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._noted_at = number, now
            name = signal.Signals(number).name
            logger.info(
                "%s: stopping after this update, with a checkpoint; once more to stop at once.",
                name,
            )
        # The system repeats SIGXCPU every second.
        elif now - self._noted_at > SAME_EVENT_S and number != signal.SIGXCPU:
            os._exit(exit_status(number))

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            self._restore: Callable[[], None] = lambda: None
            return self
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        previous = {number: signal.signal(number, note_signal) for number in heeded(ENDING_SIGNALS)}
        previous_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(read_end,), name="signals", daemon=True)
        thread.start()

        def restore() -> None:
            signal.set_wakeup_fd(previous_descriptor)
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.close(write_end)
            thread.join()
            os.close(read_end)

        self._restore = restore
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _read(self, descriptor: int) -> None:
        while number := os.read(descriptor, 1):
            if number[0] in ENDING_SIGNALS:
                self.request(number[0])


def exit_status(number: int) -> int:
    """Return a signal's exit status: 130 for SIGINT, 143 for SIGTERM and its like (restartable)."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to resume. status: the exit status."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status
