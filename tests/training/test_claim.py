"""The folder of a new run: starts that failed, volumes, two starts at one time, locks."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_process
from stand_ins import ROOT

import train
from distil.system import locks
from distil.training import checkpointing, claim
from utils import InputError

SHORT = {"batch_size": 30, "max_steps": 1}


def problem_of(path: Path, force: bool = False, mode: str | None = None) -> str | None:
    return claim.dump_path_problem(str(path), force, mode, ())


def fail_start(path: Path) -> None:
    """Leave what a start leaves that fails between its lock and its first checkpoint."""
    lock = claim.claim(path, may_move=False)
    locks.sign_lock(lock, path / locks.LOCK, {"run": "0123"}).close()
    (path / "parameters.json").write_text("{}")
    (path / ".config.json.abcd1234.tmp").write_text("")
    (path / "log" / "train").mkdir(parents=True)
    (path / "log" / "train" / "events.out.tfevents.1.distil-0123").write_text("")
    (path / "metrics.jsonl").write_text("")
    (path / "checkpoints" / "step-00000000.tmp").mkdir(parents=True)


@pytest.mark.parametrize("more", [[], ["--force"], ["--resume", "auto"]])
def test_a_start_after_one_that_failed_works(more, world, tmp_path):
    run = tmp_path / "run"
    fail_start(run)
    (run / "log" / "train" / "events.out.tfevents.1").write_text("")
    train.main([*world.flags("bert", run, **SHORT), *more])
    assert (run / "pytorch_model.bin").exists() and not list(tmp_path.glob("run.old-*"))
    assert not [path for path in run.rglob("*") if path.name.endswith((".tmp", "distil-0123"))]
    assert (run / "log" / "train" / "events.out.tfevents.1").exists(), "another program's"
    for mode in (None, "auto"):
        assert mode or "exists already" in problem_of(run, mode=mode)


@pytest.mark.parametrize("names", [[], ["run.lock"], ["lost+found/"], ["lost+found/", "run.lock"]])
def test_a_folder_without_content_is_free(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert problem_of(tmp_path) is None
    claim.claim(tmp_path, may_move=False).close()
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.old-*"))


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoint.pth", "checkpoints/step-00000000/"])
@pytest.mark.parametrize("lock", [None, "", "{}"])
def test_a_folder_of_something_else_is_not_free(name, lock, tmp_path):
    path = tmp_path / name
    (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    path.is_dir() or path.write_text("")
    if lock is not None:
        (tmp_path / locks.LOCK).write_text(lock)
    assert "exists already" in problem_of(tmp_path)
    with pytest.raises(InputError, match="another run was begun in it"):
        claim.claim(tmp_path, may_move=False)


def test_the_lock_of_another_program_is_not_ours(tmp_path):
    (tmp_path / locks.LOCK).write_text("{}")
    assert "exists already" in problem_of(tmp_path)


def test_a_start_that_failed_is_not_used_where_the_run_reads_from_it(tmp_path):
    fail_start(tmp_path)
    inputs = [str(tmp_path / "parameters.json")]
    assert "which this run reads" in claim.dump_path_problem(str(tmp_path), False, None, inputs)


@pytest.mark.parametrize("name", ["model", "best", "checkpoints", "log/train", "metrics.jsonl"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_run_writes_into_no_link_and_no_other_kind_of_file(name, is_link, tmp_path):
    run = tmp_path / "run"
    fail_start(run)
    subprocess.run(["rm", "-rf", str(run / name)], check=True)
    (tmp_path / "elsewhere").mkdir()
    (run / name).symlink_to(tmp_path / "elsewhere") if is_link else os.mkfifo(run / name)
    expected = "exists already" if name in ("model", "best") else f"{name} is"
    assert expected in problem_of(run)
    assert f"{name} is" in problem_of(run, mode="required")


def test_a_lock_that_is_a_pipe_does_not_hang(world, tmp_path, status_and_errors):
    run = tmp_path / "run"
    run.mkdir()
    os.mkfifo(run / locks.LOCK)
    (run / "parameters.json").touch()
    for more in ([], ["--force"], ["--resume", "auto"], ["--resume"]):
        started = time.monotonic()
        flags = [*world.flags("bert", run, **SHORT), *more]
        status, errors = status_and_errors(train.main, flags)
        assert (status, len(errors)) == (2, 1) and "run.lock: is no regular file" in errors[0]
        assert time.monotonic() - started < 5, "before anything is loaded"
    with pytest.raises(InputError, match="no regular file"), locks.lock_file(run / locks.LOCK, ""):
        pass


def test_the_loser_of_two_starts_never_moves_the_folder_of_the_other(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "parameters.json").touch()
    inside = claim.os.rename

    def rename(*names):
        """Start another run at the worst moment, before the old folder is moved."""
        with pytest.raises(InputError, match="another run trains in it"):
            claim.claim(run, may_move=True)
        inside(*names)
        with pytest.raises(InputError, match="another run"), claim.claim(run, may_move=True):
            raise InputError("another run, which came first")

    monkeypatch.setattr(claim.os, "rename", rename)
    with pytest.raises(InputError, match="another run"), claim.claim(run, may_move=True):
        pass
    assert len(list(tmp_path.glob("run.old-*"))) == 1 and os.listdir(run) == [locks.LOCK]


def test_a_lock_that_was_moved_aside_is_not_taken_for_the_folders(tmp_path, monkeypatch):
    """Between opening the lock and locking it, another start replaces the folder."""
    path, kept, calls = tmp_path / "run" / locks.LOCK, locks._lock, []
    path.parent.mkdir()
    held = locks.take_lock(path)

    def replace_first(file, *names):
        if not calls:
            calls.append(file)
            held.close()
            path.parent.rename(tmp_path / "aside")
            path.parent.mkdir()
        kept(file, *names)

    monkeypatch.setattr(locks, "_lock", replace_first)
    with locks.take_lock(path) as lock:
        assert os.fstat(lock.fileno()).st_ino == path.stat().st_ino


def test_a_signed_lock_in_a_copy_of_the_folder_stays(tmp_path):
    path, backup = tmp_path / locks.LOCK, tmp_path / "backup"
    locks.sign_lock(locks.take_lock(path), path, {"run": "first"}).close()
    os.link(path, backup)  # as `cp -al` makes one
    locks.sign_lock(locks.take_lock(path), path, {"run": "second"}).close()
    assert (locks.read_lock(backup)["run"], locks.read_lock(path)["run"]) == ("first", "second")


def test_the_content_of_a_volume_is_moved_aside_inside_it(tmp_path, monkeypatch):
    run, kept = tmp_path / "run", claim.os.rename
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name in ("parameters.json", "thesis.txt"):
        (run / name).write_text(name)
    locks.sign_lock(locks.take_lock(run / locks.LOCK), run / locks.LOCK, {}).close()
    (run / "lost+found").mkdir()

    def rename(old, new):  # as the system does with a mount point
        if Path(old) == run:
            raise OSError(claim.errno.EBUSY, "Device or resource busy")
        kept(old, new)

    monkeypatch.setattr(claim.os, "rename", rename)
    claim.claim(run, may_move=True).close()
    (aside,) = run.glob("old-*")
    assert sorted(os.listdir(run)) == sorted(["lost+found", aside.name, locks.LOCK])
    assert sorted(os.listdir(aside)) == ["checkpoints", "parameters.json", "thesis.txt"]
    assert problem_of(run) is None, "what was moved aside is no content"


def test_a_first_save_that_fails_recommends_no_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "ROOM_BYTES", 2**62)
    folder = tmp_path / "checkpoints"
    for expected in ("then start again", "then continue with --resume"):
        with pytest.raises(InputError, match=f"the disk is full: .*{expected}"):
            checkpointing.write(folder, 1, {}, {}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "ROOM_BYTES", 0)
            checkpointing.write(folder, 0, {}, {}, 1)


def test_checkpoints_with_other_files_and_links_stay(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    loader_file = tmp_path / "config.json"
    loader_file.write_text("{}")
    for step in range(1, 4):
        checkpointing.write(folder, step, {}, {}, 9, [loader_file])
    (folder / "step-00000002" / "notes.txt").write_text("mine")
    (folder / "step-00000003").rename(elsewhere)
    (folder / "step-00000003").symlink_to(elsewhere)
    (folder / "step-by-step.tmp").mkdir()
    (folder / "step-00000007.tmp").symlink_to(elsewhere)
    for step in (4, 5, 6):
        checkpointing.write(folder, step, {}, {}, 1, [loader_file])
    left = ["step-00000002", "step-00000003", "step-00000006", "step-00000007.tmp"]
    assert sorted(os.listdir(folder)) == sorted([*left, "step-by-step.tmp"])
    assert (folder / "step-00000002" / "notes.txt").read_text() == "mine"
    assert checkpointing.read(folder / "step-00000003").step == 3
    checkpointing.write(folder, 2, {}, {}, 9)  # an update repeated
    assert (folder / "damaged-step-00000002-1" / "notes.txt").read_text() == "mine"


def test_the_next_start_says_no_more_than_the_lock_knows(tmp_path):
    path = tmp_path / locks.LOCK
    for content in ("", "[]", "{", '{"host": "cut', "\x00", "[" * 100_000):
        path.write_text(content)
        assert locks.read_lock(path) == {} and not locks.is_restarted({}, path)
        assert locks.is_signed(path) == content.startswith('{"host')
    locks.sign_lock(locks.take_lock(path), path, {}).close()
    assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.slow
def test_two_starts_with_force_leave_one_run_and_the_old_one(world, tmp_path):
    flags = world.flags("bert", tmp_path / "run", **SHORT)
    train.main(flags)
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--force"]
    starts = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(start.communicate(timeout=200)[1], start.returncode) for start in starts]
    assert sorted(status for _, status in ended)[0] == 0, ended
    assert all("Traceback" not in text for text, _ in ended)
    done = run_process(*command[:2], *flags, "--resume")
    assert done.returncode == 0, done.stderr


def test_a_lock_without_room_for_its_words_is_named_and_closes(tmp_path):
    """Closing a file writes its buffer again: that error has no name, and hid the first."""
    path = tmp_path / "run.lock"
    lock, limits = locks.take_lock(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            locks.sign_lock(lock, path, {})
        lock.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
