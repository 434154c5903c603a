"""Heartbeats between ranks: a lost rank ends the run instead of hanging it."""

import contextlib
import os
import threading
import time
from collections.abc import Callable

from torch import distributed

from utils import report_problems


class Watch:
    """Send this process's heartbeats and watch the others', in a thread.

    In a thread, because the process may hang in a collective. Rank 0 watches all ranks, the others
    watch rank 0. A watched rank that is silent for timeout_s ends this process too.
    """

    def __init__(self, store: distributed.Store, rank: int, world_size: int, timeout_s: float):
        self.store = store.clone()  # a separate connection
        self.rank, self.timeout_s = rank, timeout_s
        self.interval_s = min(2.0, timeout_s / 10)
        self.heard_at = dict.fromkeys(range(1, world_size) if rank == 0 else [0], time.monotonic())
        self.last_beat: dict[int, bytes] = {}
        self.paused_s, self.resumed_at = 0.0, 0.0  # when this process itself last did not run
        self.parent = os.getppid()
        self.on_orphaned: Callable[[], None] = lambda: None  # called once, when the launcher ends
        self.is_closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop the heartbeats and the watch."""
        self.is_closed.set()
        self.thread.join(self.interval_s)

    def _run(self) -> None:
        num_beats, slept_at = 0, time.monotonic()
        while not self.is_closed.wait(self.interval_s):
            self._note_pause(time.monotonic() - slept_at - self.interval_s)
            num_beats += 1
            with contextlib.suppress(RuntimeError):  # the store may have ended with its process
                self.store.set(f"beat/{self.rank}", str(num_beats))
                for rank in self.heard_at:
                    self._listen(rank)
            if os.getppid() != self.parent:
                self.parent = os.getppid()
                self.on_orphaned()
            if silent := self.silent_for(self.timeout_s):
                self._give_up(silent)
            slept_at = time.monotonic()

    def _note_pause(self, paused_s: float) -> None:
        """Count no silence while this process was stopped, or its machine asleep."""
        if paused_s > self.interval_s:
            self.paused_s, self.resumed_at = paused_s, time.monotonic()
            self.heard_at = {rank: at + paused_s for rank, at in self.heard_at.items()}

    def _listen(self, rank: int) -> None:
        beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
        if beat != self.last_beat.get(rank, b""):
            self.last_beat[rank], self.heard_at[rank] = beat, time.monotonic()

    def silent_for(self, silence_s: float) -> list[int]:
        """List the watched ranks without a heartbeat for more than silence_s."""
        now = time.monotonic()
        return [rank for rank, heard_at in self.heard_at.items() if now - heard_at > silence_s]

    def describe(self) -> str:
        """Name the ranks missing after a failed collective; wait for the due heartbeats first."""
        time.sleep(2.5 * self.interval_s)
        silent = self.silent_for(2.5 * self.interval_s)
        if silent:
            return self._say(silent)
        return (
            "the processes lost each other, though the watched ranks still send heartbeats: see the"
            " other ranks' output, or check the network"
        )

    def _say(self, silent: list[int]) -> str:
        now = time.monotonic()
        is_resumed = now - self.resumed_at < 3 * self.timeout_s
        if is_resumed and self.paused_s > self.timeout_s / 2:
            return (
                f"rank {self.rank} itself did not run for {self.paused_s:.0f} s, and the others"
                " have given it up"
            )
        return "; ".join(
            f"rank {rank} was last heard of {now - self.heard_at[rank]:.0f} s ago"
            for rank in silent
        )

    def _give_up(self, silent: list[int]) -> None:
        report_lost_ranks(self._say(silent), self.rank)
        os._exit(EXIT_LOST_RANK)


EXIT_LOST_RANK = 1


def report_lost_ranks(message: str, rank: int) -> None:
    """Report missing ranks, on rank 0; where rank 0 is missing, on rank 1."""
    if rank == 0 or (rank == 1 and message.startswith("rank 0 ")):
        report_problems(
            f"stopped: {message}; see its output, then continue with --resume", from_any_rank=True
        )
