"""Facts about a run that every program needs, and that depend on nothing else of ours.

The leaf of the import graph: input errors and exit statuses, logging, atomic writes, keyed seeds,
git facts. torch is imported where it is used: the programs that only prepare data start in a second
and in a few tens of MB without it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("distil")

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130


# --------------------------------------------------------------------------------------------------
# Errors and programs
# --------------------------------------------------------------------------------------------------


REMEDIES = {
    errno.ENOSPC: "; free some space, or write elsewhere",
    errno.EDQUOT: "; free some of your quota, or write elsewhere",
    errno.EFBIG: (
        "; the system admits no file of that size, raise the limit (ulimit -f) or write elsewhere"
    ),
}


class InputError(ValueError):
    """What the user gave cannot be used. Each line of the message names what, got, expected, and a
    remedy.
    """


class RankError(InputError):
    """An InputError that other ranks may not have: said by the rank that has it, whichever it
    is.
    """


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`; turn an `InputError` or an operating-system error into one line a
    problem and status 2.

    Under a launcher the message comes once a machine; every rank exits with the same status.
    """
    try:
        status = _run(main)
    except Exception:
        if not _is_among_others():
            raise
        # And leave: the interpreter's own end can hang with the others' connections
        traceback.print_exc()
        status = 1
    if _is_among_others():
        _leave_together(status)
    if status:
        sys.exit(status)


def _run(main: Callable[[], None]) -> int:
    try:
        main()
    except InputError as error:
        report_problems(str(error), from_any_rank=isinstance(error, RankError))
        return EXIT_INPUT_ERROR
    except OSError as error:
        report_problems(f"{one_line(error, limit=None)}{REMEDIES.get(error.errno, '')}")
        return EXIT_INPUT_ERROR
    except MemoryError:
        report_problems("the memory is full; end other programs, or take a machine with more")
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        report_problems("interrupted")
        return EXIT_INTERRUPTED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _is_among_others() -> bool:
    """True where this process has joined a process group; without torch.distributed imported it
    can't have.
    """
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _leave_together(status: int) -> NoReturn:
    """End this process with a status; after success, when every rank has finished its own work.

    Not by returning: in 1 of 28 runs of two ranks gloo's teardown aborted the rank that was done
    first ("terminate called without an active exception", torch 2.13), and the launcher then killed
    the one that was still writing; the same was seen where one rank found an error that the others
    could not know.
    """
    if status == 0:
        try:
            sys.modules["torch.distributed"].barrier()
        except RuntimeError as error:
            report_problems(
                f"a process was lost before all were done ({one_line(error)}); go on with --resume"
            )
            status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def one_line(error: Exception, limit: int | None = 160) -> str:
    """Put an error's message on one line, cut to `limit` characters (None: whole); its type's name
    where it has none.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 2] + ".."


def report_problems(message: str, from_any_rank: bool = False) -> None:
    """Print one line a problem to the standard error stream; of a launcher's processes the first on
    a machine does.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if from_any_rank or not is_launched or os.environ.get("LOCAL_RANK", "0") == "0":
        program = Path(sys.argv[0]).name or "distil"
        for line in message.splitlines():
            print(f"{program}: error: {line}", file=sys.stderr, flush=True)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line without the usage text, raised as InputError.

    An unknown flag is answered with the nearest known one.
    """

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def parse_args(self, args=None, namespace=None):
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            raise InputError(
                f"unknown argument {unknown[0]};"
                f" {f'did you mean {near[0]}?' if near else 'see --help'}"
            )
        return arguments


def require_file(path: str | os.PathLike, what: str) -> None:
    """Raise InputError unless `path` is a file that holds something; `what` names the flag it came
    from.
    """
    problem = file_problem(path, what)
    if problem:
        raise InputError(problem)


def output_problem(
    path: str, flag: str, inputs: Sequence[str] = (), *, is_folder: bool = False
) -> str | None:
    """Say in one line why `path` can't be written, or would overwrite one of the `inputs` or lie in
    one; None if it can.

    Asked before any work is done, so that none is lost.
    """
    if not path or "\0" in path:
        return f"{flag} {path!r}: expected the name of a {'folder' if is_folder else 'file'}"
    target = Path(path)
    if any(len(os.fsencode(part)) > 255 for part in target.parts):
        return f"{flag} {path[:60]}..: a name of more than 255 bytes; choose a shorter one"
    if target.is_dir() != is_folder and os.path.lexists(target):
        return f"{flag} {path}: is {'no' if is_folder else 'a'} folder; choose another name"
    ancestor = next(p for p in [target.absolute(), *target.absolute().parents] if p.exists())
    if not is_folder and ancestor == target.absolute():
        ancestor = target.absolute().parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        return (
            f"{flag} {path}: {ancestor} is no folder that this user may write to; choose another"
            " place"
        )
    for name in inputs:
        if name and os.path.exists(name) and target.resolve().is_relative_to(Path(name).resolve()):
            return f"{flag} {path}: would overwrite {name}, which is read; choose another name"
    return None


def require_output(
    path: str, flag: str, inputs: Sequence[str] = (), *, is_folder: bool = False
) -> None:
    """Raise InputError where `output_problem` finds one."""
    problem = output_problem(path, flag, inputs, is_folder=is_folder)
    if problem:
        raise InputError(problem)


def file_problem(path: str | os.PathLike, what: str) -> str | None:
    """Say in one line why `path` is no readable, non-empty file; None if it is one."""
    if os.path.isdir(path):
        return f"{what} {path}: is a folder, a file is expected; name the file inside it"
    if not os.path.isfile(path):
        return f"{what} {path}: no such file; check the path"
    if os.path.getsize(path) == 0:
        return f"{what} {path}: the file is empty; make it again"
    if not os.access(path, os.R_OK):
        return f"{what} {path}: the file may not be read by this user; change its permissions"
    return None


# --------------------------------------------------------------------------------------------------
# Logging, files, git
# --------------------------------------------------------------------------------------------------


def setup_logging(level: int = logging.INFO) -> None:
    """Send the project's log lines to the standard error stream, time and level in front."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def bar_options() -> dict[str, Any]:
    """Return tqdm's options for a terminal, or for a log file, where a line every ten seconds is
    enough.
    """
    return {"dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 10}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to the disk and rename it to
    `path`.

    A reader sees the old file or the whole new one. On failure the temporary file goes and `path`
    is as before.
    """
    with atomic_paths(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_paths(
    *paths: str | os.PathLike, stale: Sequence[str | os.PathLike] = ()
) -> Iterator[list[Path]]:
    """Do as atomic_path for files that belong together: all are flushed before the first is
    renamed, in their order.

    stale: old files that would contradict the new ones half-way, removed before the first is
    renamed. Signals that end the program wait until the last one is.
    """
    targets = [Path(path) for path in paths]
    temporaries: list[Path] = []
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(
                prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
            )
            os.close(descriptor)
            temporaries.append(Path(name))
        with naming(targets[0]):
            yield temporaries
            for temporary in temporaries:
                _give_default_permissions(temporary)
                flush_to_disk(temporary)
        with holding_signals():
            for path in stale:
                Path(path).unlink(missing_ok=True)
            for temporary, target in zip(temporaries, targets, strict=True):
                os.replace(temporary, target)
            flush_to_disk(targets[0].parent)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


ENDING_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def note_signal(number: int, frame: object) -> None:
    """Handle a signal by doing nothing: whoever waits on the wake-up descriptor learns of it, and
    decides.
    """


@contextlib.contextmanager
def holding_signals() -> Iterator[None]:
    """Let signals that end the program wait until the end of the block.

    By handlers, not by a mask: a mask is one thread's, and the system gives a signal to any thread.
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


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, for the next of their size; True where it
    can.

    glibc gives them back to the system at once, and each call of a large operation faults its pages
    in again: a log-softmax of 512 x 30522 took 20 ms, and 4 ms so.
    """
    try:
        import ctypes

        library = ctypes.CDLL(None)
        return all(
            library.mallopt(parameter, 2**31 - 1)
            for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)
        )
    except (OSError, AttributeError):  # not glibc
        return False


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextlib.contextmanager
def naming_library_errors(path: str | os.PathLike) -> Iterator[None]:
    """Do as `naming`, also for what safetensors and tokenizers, written in Rust, make of a system
    error.
    """
    try:
        with naming(path):
            yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path)) from error


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Put `path` into a system error that names no file: a full disk shows in a write, which knows
    none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def exit_on_sigterm() -> None:
    """Let SIGTERM, or SIGUSR1, end the program as Ctrl-C does, by way of every clean-up, with
    status 143.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))


def _give_default_permissions(path: Path) -> None:
    # mkstemp makes files that only their owner reads; results are to be shared like any other file.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Have a file, or a folder's entries, written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is new or empty; on success flush its files and
    rename it to `path`.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        with naming(temporary):
            yield temporary
        for file in temporary.iterdir():
            flush_to_disk(file)
        with holding_signals():
            if target.is_dir():
                target.rmdir()
            temporary.rename(target)
            flush_to_disk(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder, and those above it that are missing; the name of each is flushed to the
    disk.
    """
    folder = Path(path)
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir()
        flush_to_disk(folder.parent)


def json_digest(content: Any) -> str:
    """Return the SHA-256 of what JSON can hold, as hexadecimal digits, whatever the order of its
    keys.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(path: str | os.PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a plain state dict (name -> CPU tensor) in torch's format, atomically."""
    import torch

    on_host: dict[tuple, torch.Tensor] = {}  # a tied tensor is copied, and so written, once
    plain = {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        plain[name] = on_host.setdefault(
            key, tensor.detach().cpu() if key not in on_host else tensor
        )
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
    ):  # by name, the archive would carry the temporary one
        try:
            torch.save(plain, file)
        except (
            RuntimeError
        ) as error:  # of a position in the file, where the system said that the disk is full
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def git_facts(folder: str | os.PathLike) -> dict[str, str | None]:
    """Describe the git checkout around `folder`: repo_id, repo_sha, repo_branch; None for what
    there is not.
    """
    facts: dict[str, str | None] = {"repo_id": None, "repo_sha": None, "repo_branch": None}
    try:
        import git  # raises ImportError where no git program is installed

        repo = git.Repo(folder, search_parent_directories=True)
    except Exception as error:
        logger.warning(
            "No git checkout around %s (%s): git_log.json says so.", folder, type(error).__name__
        )
        return facts
    facts["repo_id"] = str(repo)
    try:
        facts["repo_sha"] = repo.head.object.hexsha
        facts["repo_branch"] = repo.active_branch.name
    except (ValueError, TypeError) as error:
        logger.warning(
            "The git head is unborn or detached (%s): git_log.json says so.", one_line(error)
        )
    return facts


# --------------------------------------------------------------------------------------------------
# Randomness keyed by counters
# --------------------------------------------------------------------------------------------------


def keyed_seed(*key: int | str) -> int:
    """Hash a key such as (seed, micro-batch number, purpose) to a 63-bit seed.

    Hashed because torch's CPU generator looks at the low 32 bits only: neighbouring counters would
    not do.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gathered(
    values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bring runs order[0], order[1], .. of a flat array together: (their values end to end, their
    lengths).

    starts, lengths: of every run in `values`. An index of 8 bytes a value is made in between.
    """
    lengths = lengths[order]
    new_starts = np.cumsum(lengths, dtype=np.int64) - lengths
    places = np.arange(int(lengths.sum(dtype=np.int64))) + np.repeat(
        starts[order] - new_starts, lengths
    )
    return values[places], lengths


def keyed_numpy_generator(*key: int | str) -> np.random.Generator:
    """Make a numpy generator whose stream depends on the key alone."""
    return np.random.Generator(np.random.Philox(keyed_seed(*key)))
