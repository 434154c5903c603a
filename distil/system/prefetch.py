"""Work done ahead of its use: batches made by a thread, results copied without waiting."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator

import torch

MICRO_BATCHES_AHEAD = 8  # made ready while the step computes


def prefetched(items: Iterable, num_ahead: int) -> Iterator:
    """Yield `items`, made by a thread up to num_ahead of them ahead; its errors are raised here."""
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


class OnHost:
    """A copy of a device's tensor on its way to the host."""

    def __init__(self, tensor: torch.Tensor):
        self.event = torch.cuda.Event() if tensor.device.type == "cuda" else None
        if self.event is None:
            self.tensor = tensor.clone()
            return
        self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.tensor.copy_(tensor, non_blocking=True)
        self.event.record()

    def read(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor
