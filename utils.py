"""Facts about a run that every program needs, and that depend on nothing else of ours.

The leaf of the import graph: input errors and exit statuses, logging, atomic writes, keyed seeds,
git facts. torch is imported where it is used: the programs that only prepare data start in a second
and in a few tens of MB without it.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

VERSION = "1.0.0"  # as in CHANGELOG.md and CITATION.cff

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
