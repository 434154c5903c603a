"""Shared by every program: input errors and exit statuses, logging, keyed seeds, git facts.

The leaf of the import graph: imports no other module of the project, and no torch, so that programs
that only prepare data start in a second and in a few tens of MB.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import hashlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

VERSION = "1.0.0"  # as in CHANGELOG.md and CITATION.cff

logger = logging.getLogger("distil")

OUT_OF_MEMORY = (  # what errors say that have no type of their own
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory"),
    *("bad_alloc", "can't start new thread", "CUBLAS_STATUS_ALLOC_FAILED"),
    "could not create a primitive",  # oneDNN
)
EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130


# --------------------------------------------------------------------------------------------------
# Errors and programs
# --------------------------------------------------------------------------------------------------


REMEDIES = {
    errno.ENOSPC: "; free some space, or write elsewhere",
    errno.EDQUOT: "; free some of your quota, or write elsewhere",
    errno.EFBIG: (
        "; the system allows no file of that size, raise the limit (ulimit -f) or write elsewhere"
    ),
}


class InputError(ValueError):
    """An unusable input. Each line of the message names flag, value, expectation and remedy."""


class RankError(InputError):
    """An InputError of one rank that others may not have: printed by the rank that raises it."""


def run_program(main: Callable[[], None], *, prints_result: bool = True) -> None:
    """Run a program's `main`; convert InputError and OSError to one line a problem and status 2.

    Under a launcher each machine prints the message once; every rank exits with the same status.
    Output that can't be written ends no program; where it is the result, the status is 2.
    """
    tolerate_failed_output()
    try:
        status = run_main(main)
        if prints_result and status == 0:
            status = run_main(_require_written_output)
    except Exception:
        if not _is_among_others():
            raise
        # End the process here: the interpreter's shutdown can hang in the others' connections.
        traceback.print_exc()
        status = 1
    if _is_among_others():
        _leave_together(status)
    if status:
        sys.exit(status)


def read_flags_first(parse: Callable[[], object]) -> None:
    """End the program where its flags are wrong or ask for help, before its slow imports."""
    is_read = False

    def read() -> None:
        nonlocal is_read
        parse()
        is_read = True

    run_program(read)
    if not is_read:  # --help, --version
        sys.exit(0)


def run_main(main: Callable[[], None]) -> int:
    """Run a program's `main` and return its exit status; distil.system.start knows this name."""
    try:
        return _status_of(main)
    except KeyboardInterrupt:  # in main, or while its error was reported
        report_problems("interrupted")
        return EXIT_INTERRUPTED


def _status_of(main: Callable[[], None]) -> int:
    try:
        main()
    except InputError as error:
        report_problems(str(error), from_any_rank=isinstance(error, RankError))
        return EXIT_INPUT_ERROR
    except OSError as error:
        report_problems(f"{one_line(error, limit=None)}{REMEDIES.get(error.errno, '')}")
        return EXIT_INPUT_ERROR
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        said = f" ({one_line(error, 80)})" * bool(str(error))
        if is_out_of_memory(error):
            remedy = "end other programs, or use a machine with more memory"
            report_problems(f"out of memory{said}; {remedy}")
        elif is_panic(error):
            report_problems(f"a tokenizer fails{said}; take another one")
        else:
            raise
        return EXIT_INPUT_ERROR
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """True where the GPU or the machine ran out of memory."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or any(words in str(error) for words in OUT_OF_MEMORY)


def is_panic(error: BaseException) -> bool:
    """True for a panic of a library in Rust (tokenizers), which is no Exception."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def naming_panics(where: str) -> Iterator[None]:
    """Raise InputError in place of a panic: the pattern or table of a tokenizer that fails."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        reason = one_line(error)
        raise InputError(f"{where}: its tokenizer fails ({reason}); take another one") from error


def _is_among_others() -> bool:
    """True in a member of a process group, which has imported torch.distributed."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _leave_together(status: int) -> NoReturn:
    """End this process with a status; after success, wait for every rank first.

    Not by returning: in 1 of 28 runs of two ranks gloo's teardown aborted the rank that finished
    first ("terminate called without an active exception", torch 2.13), and the launcher then killed
    the rank that was still writing; so did an error that only one rank found.
    """
    if status == 0:
        try:
            sys.modules["torch.distributed"].barrier()
        except RuntimeError as error:
            report_problems(
                f"lost a process before all had finished ({one_line(error)}); continue with"
                " --resume"
            )
            status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def raise_problems(problems: Iterable[str | None]) -> None:
    """Raise InputError with a line for each problem, where there are any."""
    found = [problem for problem in problems if problem]
    if found:
        raise InputError("\n".join(found))


def and_others(first: object, num: int) -> str:
    """Name the first of `num` things, and how many more there are."""
    others = {1: "", 2: " and 1 other"}.get(num, f" and {num - 1} others")
    return f"{first}{others}"


def one_line(error: BaseException, limit: int | None = 160) -> str:
    """Return an error's message, or its type's name, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 2] + ".."


def report_problems(message: str, from_any_rank: bool = False) -> None:
    """Print one line a problem to stderr; under a launcher only on each machine's first process."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if from_any_rank or not is_launched or os.environ.get("LOCAL_RANK", "0") == "0":
        program = Path(sys.argv[0]).name or "distil"
        begin_line(sys.stderr)
        start = "\r" if sys.stderr.isatty() else ""  # over the terminal's `^C`
        for line in message.splitlines():
            print(f"{start}{program}: error: {line}", file=sys.stderr, flush=True)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises InputError of one line instead of printing the usage text.

    The error for an unknown flag suggests the nearest known one.
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
# Output, logging, git
# --------------------------------------------------------------------------------------------------


class Output:
    """Standard output or error, whose failed writes raise nothing: the program has work to do.

    A log's disk may be full; a terminal or a reader (`| tee`, `| head`) may be gone. failure: the
    last error but for that of a closed pipe, whose reader wanted no more.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.failure: OSError | None = None
        self.is_at_line_start = True

    def write(self, text: str) -> int:
        """Write text, if the stream takes it."""
        self._try(self.stream.write, text)
        if text:
            self.is_at_line_start = text[-1] in "\r\n"
        return len(text)

    def flush(self) -> None:
        """Flush what was written, if the stream takes it."""
        self._try(self.stream.flush)

    def _try(self, act: Callable, *arguments: str) -> None:
        try:
            act(*arguments)
        except BrokenPipeError:
            self.discard()
        except OSError as error:
            self.failure = error
        except ValueError:
            if not self.stream.closed:
                raise

    def discard(self) -> None:
        """Send to the null device what is still buffered, and all that comes."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def tolerate_failed_output() -> None:
    """Put Output before both streams; open those that were closed before the start (`2>&-`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, Output):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # any text on any terminal
        setattr(sys, name, Output(stream))


def _require_written_output() -> None:
    """Raise InputError where standard output could not be written."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "failure", None)
    if error is not None:
        sys.stdout.discard()  # what is buffered: the interpreter would try again
        remedy = REMEDIES.get(error.errno, "; write elsewhere")
        raise InputError(f"standard output: {one_line(error)}, it is not complete{remedy}")


def begin_line(stream: TextIO) -> None:
    """End the line of a progress bar, if one is shown."""
    if not getattr(stream, "is_at_line_start", True):
        stream.write("\n")


class LogHandler(logging.StreamHandler):
    """A handler whose lines begin at the start of a line, not behind a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        begin_line(self.stream)
        super().emit(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the project's log lines to stderr, prefixed with time and level."""
    handler = LogHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class LogLines:
    """A stream for progress bars outside a terminal: each state becomes a line of the log."""

    def write(self, text: str) -> None:
        """Log a state; skip what only moves a terminal's cursor or clears its line."""
        if text.startswith("\r") and text.strip():
            logger.info("%s", text.strip())

    def flush(self) -> None:
        """Do nothing: the log flushes its lines."""


def bar_options(line_s: float = 10) -> dict[str, Any]:
    """Return tqdm's options for a terminal, or for a log file: a line every `line_s` seconds."""
    if sys.stderr.isatty():
        return {"dynamic_ncols": True, "mininterval": 0.5}
    return {"file": LogLines(), **dict.fromkeys(("mininterval", "maxinterval", "delay"), line_s)}


def git_facts(folder: str | os.PathLike) -> dict[str, str | None]:
    """Describe the git checkout around `folder`: repo_id, repo_sha, repo_branch, each or None.

    "note" says that the checkout belongs to another user, where git reads nothing. Never raises:
    what was computed is not lost for want of a side fact.
    """
    facts: dict[str, str | None] = {"repo_id": None, "repo_sha": None, "repo_branch": None}
    found, problem = _ask_git(folder, "rev-parse", "--absolute-git-dir")
    if found is None:
        if "dubious ownership" in problem:
            facts["note"] = problem = "the checkout belongs to another user"
        logger.warning("No git facts of %s (%s): git_log.json has none.", folder, problem)
        return facts
    facts["repo_id"] = f"<git.repo.base.Repo {found!r}>"  # as GitPython wrote it in 2019
    facts["repo_sha"], problem = _ask_git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    facts["repo_branch"], others = _ask_git(folder, "symbolic-ref", "--short", "--quiet", "HEAD")
    if None in facts.values():
        reason = problem or others or "the head is unborn or detached"
        logger.warning("git_log.json names no commit or no branch: %s.", reason)
    return facts


def _ask_git(folder: str | os.PathLike, *words: str) -> tuple[str | None, str]:
    """Return (git's answer, "") or (None, why there is none)."""
    # Not by git.Repo: where git refuses the folder, its pipe to git breaks by chance.
    forget = [f"-u{name}" for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")]
    try:
        import git  # raises ImportError where no git program is installed

        status, answer, problem = git.Git(folder).execute(
            ["env", *forget, "LC_ALL=C", "GIT_TERMINAL_PROMPT=0", "git", *words],
            with_extended_output=True,
            with_exceptions=False,
            kill_after_timeout=GIT_LIMIT_S,
        )
    except Exception as error:  # a folder that is gone, a disk that hangs
        return None, one_line(error)
    if status or not answer:
        return None, " ".join(problem.split()).removeprefix("fatal: ")[:80]
    return answer, ""


GIT_LIMIT_S = 10


# --------------------------------------------------------------------------------------------------
# Randomness keyed by counters
# --------------------------------------------------------------------------------------------------


def keyed_seed(*key: int | str) -> int:
    """Hash a key such as (seed, micro-batch number, purpose) to a 63-bit seed.

    Hashed, because torch's CPU generator reads only the low 32 bits: plain counters would collide.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def concatenate_runs(
    values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate runs order[0], order[1], .. of a flat array: (values, lengths).

    starts, lengths: of every run in `values`. Makes a temporary index of 8 bytes a value.
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
