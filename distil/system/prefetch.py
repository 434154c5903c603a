"""Work done ahead of its use, in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator


def prefetched(items: Iterable, num_ahead: int) -> Iterator:
    """Yield `items`, made by a thread of its own that runs up to num_ahead of them ahead; its
    errors are raised here.
    """
    waiting: queue.Queue = queue.Queue(num_ahead)
    is_abandoned, end = threading.Event(), object()

    def make() -> None:
        try:
            for item in items:
                waiting.put((item, None))
                if is_abandoned.is_set():
                    return
            waiting.put((end, None))
        except BaseException as error:
            waiting.put((end, error))

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while (got := waiting.get())[0] is not end:
            yield got[0]
        if got[1] is not None:
            raise got[1]
    finally:
        is_abandoned.set()
        while thread.is_alive():  # it may wait for a place in the queue
            with contextlib.suppress(queue.Empty):
                waiting.get(timeout=0.01)
