"""Small parts that every program uses."""

import errno
import threading
import time

import pytest

from distil.system.files import atomic_path
from distil.system.prefetch import prefetched
from utils import and_others


def test_others_are_counted_in_words_that_fit():
    assert [and_others("a", num) for num in (1, 2, 3)] == ["a", "a and 1 other", "a and 2 others"]


def num_prefetching() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetched_items_come_in_order_and_the_thread_ends():
    assert list(prefetched(iter(range(100)), 3)) == list(range(100))
    assert num_prefetching() == 0


def test_prefetching_runs_ahead_but_not_further_than_told():
    taken = []
    items = prefetched((taken.append(k) or k for k in range(100)), 4)
    assert next(items) == 0
    end = time.monotonic() + 10
    while len(taken) < 6 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(taken) == 6  # one handed out, four waiting, one in hand
    items.close()
    assert num_prefetching() == 0


def test_an_error_is_raised_where_the_item_would_have_come():
    def failing():
        yield 1
        raise OSError("gone")

    items = prefetched(failing(), 4)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)
    assert num_prefetching() == 0


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="results.json"), atomic_path(tmp_path / "results.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
