"""Writing behind a device that trains on: a copy of the state on the host, and a thread."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from distil.system.files import on_host


class Behind:
    """Run one task at a time in a thread; the next one, or `wait`, waits for its end."""

    def __init__(self):
        self._executor: ThreadPoolExecutor | None = None
        self._task: Future | None = None

    def start(self, task: Callable[[], object]) -> None:
        """Begin a task when the one before has ended. Raises what that one raised."""
        self.wait()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._task = self._executor.submit(task)

    def wait(self) -> None:
        """Wait for the end of the task, and raise what it raised, once."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def close(self) -> BaseException | None:
        """Wait for the end of the task and of the thread; return what was raised."""
        task, self._task = self._task, None
        if self._executor is not None:
            self._executor.shutdown()
        return None if task is None else task.exception()


def is_on_gpu(tensors: Iterable[torch.Tensor]) -> bool:
    """True where a tensor lies on a GPU."""
    return any(tensor.is_cuda for tensor in tensors)


def copied_to_host(
    files: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, dict[str, torch.Tensor]]:
    """Copy tensors to the host, by file and name; what shares memory is copied once."""
    known: dict[tuple, torch.Tensor] = {}
    return {file: on_host(content, known, copies=True) for file, content in files.items()}
