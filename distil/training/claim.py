"""Claim a run's folder: what may become one, its lock, and an old run moved aside.

A start that failed before its first save (killed, disk full) leaves a folder that holds nothing of
worth; the next start uses it, as it does an empty folder, such as a volume that is mounted there.
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from distil.system.files import (
    content_of,
    flush_to_disk,
    is_folder,
    is_regular,
    make_folder,
    output_problem,
)
from distil.system.locks import LOCK, is_restarted, is_signed, lock_problem, take_lock
from distil.training.layout import BEST, CHECKPOINTS, EVENTS, METRICS, MODEL, checkpoints_in
from distil.training.trackers import STORE
from utils import InputError, logger

ROOT = Path(__file__).resolve().parents[2]
# What a run writes: a folder with none of it is not taken for a run's.
RUN_FILES = ("parameters.json", "checkpoint.pth", "model_epoch_*.pth", "checkpoints/step-*")
# Present once a run has saved; before, a start has failed.
RESULTS = (*RUN_FILES[1:3], "pytorch_model.bin", BEST, MODEL, "nonfinite-step-*.safetensors")
OWN_FOLDERS = (CHECKPOINTS, BEST, MODEL, "log", *EVENTS.values(), "wandb")
GROWING_FILES = (METRICS, STORE)  # written in place
# No part of a run: what was moved aside in a volume.
IGNORED = re.compile(r"old-\d{8}-\d{6}(-\d+)?")


def resume_mode(resume: str | None, dump_path: str) -> str | None:
    """Say whether the run resumes: "required", "auto" (where there is a checkpoint), or None.

    A launcher that restarts its processes passes the flags of the first time, --force among them:
    such a run resumes as with auto.
    """
    return resume or ("auto" if is_restarted(os.environ, Path(dump_path) / LOCK) else None)


def checkpoints_of(dump_path: str) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(dump_path) / CHECKPOINTS


def dump_path_problem(
    dump_path: str, force: bool, mode: str | None, inputs: Iterable[str | None]
) -> str | None:
    """Say why the run folder can't be made, or moved aside, without harm.

    mode: see `resume_mode`; inputs: paths and names that the run reads.
    """
    path = Path(dump_path)
    problem = output_problem(dump_path, "--dump_path", is_folder=True)
    if problem or not os.path.lexists(path):
        return problem
    where, is_free = f"--dump_path {path}", is_vacant(path)
    if problem := lock_problem(path / LOCK):
        return f"{where}: {problem}"
    resumes = mode == "required" or (mode and checkpoints_in(path / CHECKPOINTS))
    if not (is_free or resumes or force or mode):
        return (
            f"{where}: exists already; choose another, resume it with --resume, or move it aside"
            " with --force"
        )
    if (is_free or resumes) and (foreign := foreign_problem(path)):
        return f"{where}: {foreign}"
    if resumes:
        return None
    read = [name for given in inputs if given for name in (given, f"{given}.bin")]
    inside = [name for name in read if os.path.exists(name) and _is_within(name, path)]
    if inside:
        return f"{where}: holds {inside[0]}, which this run reads; choose another folder"
    return None if is_free else _moving_problem(path, where)


def _moving_problem(path: Path, where: str) -> str | None:
    places = os.getcwd(), ROOT, os.path.expanduser("~")
    if any(_is_within(place, path) for place in places):
        return f"{where}: is no run's folder; choose another, --force does not apply to it"
    if not any(any(path.glob(name)) for name in RUN_FILES):
        return (
            f"{where}: holds other files than a run's; choose another, --force does not apply to it"
        )
    if not os.access(entry(path).parent, os.W_OK):
        return f"{where}: can't be moved aside, for {entry(path).parent} may not be written to"
    return None


def names_in(path: Path) -> list[str]:
    """List the names of a run in a folder."""
    return [name for name in content_of(path) if not IGNORED.fullmatch(name)]


def is_vacant(path: Path) -> bool:
    """True for a folder without content, or with that of a start that failed before its first save.

    Such a start has left its lock, and everything else after it.
    """
    names = names_in(path)
    if not names:
        return True
    if names == [LOCK] and is_regular(path / LOCK) and os.path.getsize(path / LOCK) == 0:
        return True  # killed before it signed
    has_results = any(any(path.glob(name)) for name in RESULTS)
    is_logged = is_regular(path / METRICS) and os.path.getsize(path / METRICS) > 0
    is_saved = has_results or is_logged or checkpoints_in(path / CHECKPOINTS)
    return is_signed(path / LOCK) and not is_saved


def foreign_problem(path: Path) -> str | None:
    """Name a link or another kind of file where a run writes in place, or into a folder."""
    for name in OWN_FOLDERS:
        place = path / name
        if os.path.lexists(place) and not is_folder(place):
            return f"{name} is a link or a file, expected a folder of the run; take it away"
    for name in GROWING_FILES:
        if os.path.lexists(path / name) and not is_regular(path / name):
            return f"{name} is no regular file, expected one of the run; take it away"
    return None


def _is_within(path: str | os.PathLike, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


def entry(path: str | os.PathLike) -> Path:
    """Name a folder by its entry in the folder above: links before it are followed, itself not.

    A rename then moves what was looked at: os.path.abspath takes "link/../run" for "run", and
    rename a slash behind a link for the folder behind it.
    """
    if Path(path).name in ("", ".."):
        return Path(path).resolve()
    return Path(path).parent.resolve() / Path(path).name


def _free_name(name: str) -> str:
    candidates = [name, *(f"{name}-{k}" for k in range(1, 1000))]
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


# --------------------------------------------------------------------------------------------------
# Claiming
# --------------------------------------------------------------------------------------------------


def claim(path: Path, *, may_move: bool) -> TextIO:
    """Make and lock the folder of a new run; move an old run aside where that is allowed.

    Return the lock. Raises InputError where another run holds the folder: it is never moved.
    """
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        flush_to_disk(path.parent)
    lock = take_lock(path / LOCK)
    try:
        if is_vacant(path):  # asked again, under the lock
            return lock
        if not may_move:
            raise InputError(f"{path}: another run was begun in it; choose another folder")
        return _moved_aside(path, lock)
    except BaseException:
        lock.close()
        raise


def _moved_aside(path: Path, lock: TextIO) -> TextIO:
    """Move an old run aside and make its folder anew; return the new folder's lock.

    lock: the old folder's, held until the new one is locked, so that no other run moves either.
    """
    # Differs from the original: moved aside, where 2019 deleted.
    aside = _free_name(f"{path}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        os.rename(path, aside)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        _move_content(path)  # a volume is mounted there
        return lock
    logger.info("Moved the existing %s aside to %s.", path, aside)
    try:
        path.mkdir()
    except FileExistsError as error:
        raise InputError(f"{path}: another run was begun in it; choose another folder") from error
    flush_to_disk(path.parent)
    new = take_lock(path / LOCK)
    lock.close()
    return new


def _move_content(path: Path) -> None:
    """Move the content of a folder that can't be renamed into a folder in it, but for the lock."""
    aside = Path(_free_name(f"{path}/old-{time.strftime('%Y%m%d-%H%M%S')}"))
    names = [name for name in names_in(path) if name != LOCK]
    # What tells a run's folder last: a start that is killed half-way can be repeated.
    names.sort(key=lambda name: any(pattern.startswith(name) for pattern in RUN_FILES))
    aside.mkdir()
    for name in names:
        os.rename(path / name, aside / name)
    flush_to_disk(aside)
    flush_to_disk(path)
    logger.info("Moved the content of the existing %s aside to %s.", path, aside)
