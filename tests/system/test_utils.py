"""Small parts that every program uses."""

import errno
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from distil.system.files import atomic_path
from distil.system.prefetch import prefetched
from utils import and_others, git_facts


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


def test_outside_a_git_checkout_the_facts_are_empty(tmp_path):
    assert git_facts(tmp_path) == {"repo_id": None, "repo_sha": None, "repo_branch": None}


def make_checkout(folder: Path, owner: int) -> str:
    """Make a git checkout with one commit, owned by a user; return the commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    sha = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, owner, owner)
    return sha


def test_the_facts_of_a_checkout_are_its_folder_commit_and_branch(tmp_path, monkeypatch):
    sha = make_checkout(tmp_path, os.getuid())
    monkeypatch.setenv("GIT_DIR", "/elsewhere")  # as in a hook
    facts = git_facts(tmp_path)
    name = f"<git.repo.base.Repo '{tmp_path}/.git'>"
    assert facts == {"repo_id": name, "repo_sha": sha, "repo_branch": "main"}


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
def test_a_checkout_of_another_user_is_said_and_fails_nothing(tmp_path):
    make_checkout(tmp_path, 12345)
    for _ in range(20):  # GitPython raised BrokenPipeError in half of the calls
        facts = git_facts(tmp_path)
        assert facts.pop("note") == "the checkout belongs to another user"
        assert facts == {"repo_id": None, "repo_sha": None, "repo_branch": None}


def test_without_a_git_program_the_facts_are_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(git_facts(tmp_path).values()) == {None}
