"""The run folder's lock, for one run at a time, and the detection of restarts by a launcher."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import psutil

from distil.system.json_files import load_json
from utils import InputError, logger, one_line

LOCK = "run.lock"
TEXT = (str, None)


def launch_facts() -> dict[str, str | None]:
    """Return the launcher that started this process and the job's name; None for each unknown."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {"launcher": None, "job": None}
    launcher, job = psutil.Process(os.getppid()), os.environ["TORCHELASTIC_RUN_ID"]
    name = f"{socket.gethostname()}/{launcher.pid}/{launcher.create_time()}"
    return {"launcher": name, "job": None if job in ("", "none") else job}


def is_restarted(environment: Mapping[str, str], lock: Path) -> bool:
    """True where this launcher, or its job on another machine, has run in the lock's folder before.

    The launcher's restart count alone does not tell: the folder may be an earlier job's, and on
    several machines only the launcher whose process failed counts.
    """
    try:
        then, now = load_json(lock, {"launcher": TEXT, "job": TEXT}), launch_facts()
        is_same_launcher = now["launcher"] is not None and then["launcher"] == now["launcher"]
        is_same_job = now["job"] is not None and then["job"] == now["job"]
    except (OSError, ValueError):
        return False
    return is_same_launcher or (
        is_same_job and environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    )


def take_lock(path: Path) -> TextIO:
    """Lock a run's folder until the returned file is closed or the process ends.

    Raises InputError where another run holds the lock.
    """
    # Not through a link, which may lead to any file.
    file = os.fdopen(
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8"
    )
    _lock(file, path)
    file.truncate(0)
    file.write(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **launch_facts()}) + "\n"
    )
    file.flush()
    return file


def require_unlocked(path: Path) -> None:
    """Raise InputError where another run holds the lock; write nothing."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            _lock(file, path)


@contextlib.contextmanager
def lock_file(path: Path, problem: str) -> Iterator[None]:
    """Lock a file, made if need be, for the block. Raises InputError where another run holds it."""
    with open(path, "a+", encoding="utf-8") as file:
        _lock(file, path, problem)
        yield


def _lock(file: TextIO, path: Path, problem: str | None = None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = file.read(1000).strip()
        file.close()
        problem = problem or f"{path.parent}: another run trains in it ({holder})"
        raise InputError(f"{problem}; stop that run, or choose another folder") from error
    except OSError as error:  # a file system without locks
        logger.warning(
            "%s: can't be locked (%s); make sure that no two runs share the folder.",
            path,
            one_line(error),
        )
