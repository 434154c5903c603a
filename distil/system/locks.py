"""The run folder's lock, for one run at a time, and the detection of restarts by a launcher."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil

from distil.system.files import naming
from utils import InputError, logger, one_line

LOCK = "run.lock"
SIGNATURE = '{"host": '  # of a lock that a run signed


def launch_facts() -> dict[str, str | None]:
    """Return the launcher that started this process and the job's name; None for each unknown."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {"launcher": None, "job": None}
    name, job = None, os.environ["TORCHELASTIC_RUN_ID"]
    with contextlib.suppress(psutil.Error):  # its process may be out of sight
        launcher = psutil.Process(os.getppid())
        name = f"{socket.gethostname()}/{launcher.pid}/{launcher.create_time()}"
    return {"launcher": name, "job": None if job in ("", "none") else job}


def is_restarted(environment: Mapping[str, str], lock: Path) -> bool:
    """True where this launcher, or its job on another machine, has run in the lock's folder before.

    The launcher's restart count alone does not tell: the folder may be an earlier job's, and on
    several machines only the launcher whose process failed counts.
    """
    then, now = read_lock(lock), launch_facts()
    is_same_launcher = now["launcher"] is not None and then.get("launcher") == now["launcher"]
    is_same_job = now["job"] is not None and then.get("job") == now["job"]
    return is_same_launcher or (
        is_same_job and environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    )


def read_lock(path: Path) -> dict[str, Any]:
    """Return what the last run signed the lock with; {} where no run did."""
    try:
        with _open(path, os.O_RDONLY) as file:
            found = json.loads(file.readline(LONGEST_LINE))
    except (OSError, ValueError, InputError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


LONGEST_LINE = 10_000


def is_signed(path: Path) -> bool:
    """True for a lock that a run signed, even if the disk was full before the end of the line."""
    try:
        with _open(path, os.O_RDONLY) as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except (OSError, ValueError, InputError):
        return False


def lock_problem(path: Path) -> str | None:
    """Say why a lock can't be used: another kind of file has its name."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        return f"{path}: is no regular file, expected a run's lock; take it away"
    return None


def _open(path: Path, flags: int) -> TextIO:
    """Open a regular file; not through a link, which may lead to any file, nor a pipe, which hangs.

    Raises InputError.
    """
    if problem := lock_problem(path):
        raise InputError(problem)
    mode = "r" if flags & os.O_ACCMODE == os.O_RDONLY else "r+"
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    return os.fdopen(descriptor, mode, encoding="utf-8", errors="replace")


def take_lock(path: Path) -> TextIO:
    """Lock a run's folder until the returned file is closed or the process ends; change nothing.

    Raises InputError where another run holds the lock.
    """
    for _ in range(100):
        try:
            file = _open(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS) or not path.exists():
                raise
            file = _open(path, os.O_RDONLY)
        _lock(file, path)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return file
        file.close()  # the folder was moved aside, or the lock replaced, since it was opened
    raise InputError(f"{path}: is replaced again and again; stop the other runs in this folder")


def sign_lock(lock: TextIO, path: Path, facts: Mapping[str, str]) -> TextIO:
    """Write host, process and `facts` into a lock that is held; return the lock.

    A file with other names gets a copy in its place: it may be in a user's copy of the folder.
    """
    if not lock.writable():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    if os.fstat(lock.fileno()).st_nlink > 1:
        path.unlink()
        lock.close()
        lock = take_lock(path)
    line = {"host": socket.gethostname(), "pid": os.getpid(), **launch_facts(), **facts}
    with naming(path):
        # Not emptied first: one that is not signed is taken for another program's. Not through the
        # file's buffer, which closing it would write again.
        text = f"{json.dumps(line)}\n".encode()
        os.lseek(lock.fileno(), 0, os.SEEK_SET)
        if os.write(lock.fileno(), text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(lock.fileno(), len(text))
    return lock


@contextlib.contextmanager
def lock_file(path: Path, problem: str) -> Iterator[None]:
    """Lock a file, made if need be, for the block. Raises InputError where another run holds it."""
    with _open(path, os.O_RDWR | os.O_CREAT) as file:
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
