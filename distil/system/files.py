"""Atomic writes of files and folders, and checks of inputs and outputs before slow work."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distil.system.signals import holding_signals

if TYPE_CHECKING:
    import torch
from utils import InputError


def require_file(path: str | os.PathLike, what: str) -> None:
    """Raise InputError unless `path`, given by the flag `what`, is a readable, non-empty file."""
    problem = file_problem(path, what)
    if problem:
        raise InputError(problem)


def output_problem(
    path: str,
    flag: str,
    inputs: Sequence[str] = (),
    *,
    is_folder: bool = False,
    is_own: Callable[[str], bool] | None = None,
    force: bool = False,
) -> str | None:
    """Explain in one line why `path` can't be written, or None.

    An output must not overwrite one of `inputs`, nor lie in one. Without `force` a file must not
    replace one that the program did not write: is_own recognizes those (distil/system/outputs.py);
    None: they have no mark. Checked before any work is done.
    """
    if not path or "\0" in path:
        return f"{flag} {path!r}: expected the name of a {'folder' if is_folder else 'file'}"
    target = Path(path)
    if any(len(os.fsencode(part)) > 255 for part in target.parts):
        return f"{flag} {path[:60]}..: a name of more than 255 bytes; choose a shorter one"
    if target.is_dir() != is_folder and os.path.lexists(target):
        return f"{flag} {path}: is {'not ' if is_folder else ''}a folder; choose another name"
    ancestor = next(p for p in [target.absolute(), *target.absolute().parents] if p.exists())
    if not is_folder and ancestor == target.absolute():
        ancestor = target.absolute().parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        return f"{flag} {path}: {ancestor} is not a folder with write permission; choose another"
    for name in inputs:
        if name and os.path.exists(name) and target.resolve().is_relative_to(Path(name).resolve()):
            return f"{flag} {path}: would overwrite the input {name}; choose another name"
    return None if is_folder else _replacing_problem(path, flag, is_own, force)


def _replacing_problem(
    path: str, flag: str, is_own: Callable[[str], bool] | None, force: bool
) -> str | None:
    if not os.path.lexists(path):
        return None
    if os.path.exists(path) and not os.path.isfile(path):
        return f"{flag} {path}: is a device or a pipe, expected a file; choose another name"
    is_empty = is_regular(path) and os.path.getsize(path) == 0
    if force or is_empty or (is_regular(path) and is_own is not None and is_own(path)):
        return None
    what = "is a link" if os.path.islink(path) else "no mark shows that this program made it"
    return f"{flag} {path}: exists, and {what}; choose another name, or replace it with --force"


def require_output(path: str, flag: str, inputs: Sequence[str] = (), **options: Any) -> None:
    """Raise InputError where `output_problem`, of the same parameters, finds a problem."""
    problem = output_problem(path, flag, inputs, **options)
    if problem:
        raise InputError(problem)


def file_problem(path: str | os.PathLike, what: str) -> str | None:
    """Explain in one line why `path` is not a readable, non-empty file, or None."""
    if os.path.isdir(path):
        return f"{what} {path}: is a folder, expected a file; name the file inside it"
    if not os.path.isfile(path):
        return f"{what} {path}: no such file; check the path"
    if os.path.getsize(path) == 0:
        return f"{what} {path}: the file is empty; make it again"
    if not os.access(path, os.R_OK):
        return f"{what} {path}: this user can't read the file; change its permissions"
    return None


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; on success flush the file and rename it to `path`.

    A reader sees the old file or the whole new one. On failure the temporary file is deleted and
    `path` is unchanged.
    """
    with atomic_paths(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_paths(
    *paths: str | os.PathLike, stale: Sequence[str | os.PathLike] = ()
) -> Iterator[list[Path]]:
    """Write files that belong together as atomic_path does: flush all, then rename all in order.

    stale: old files that would contradict the new ones half-way, deleted before the first rename.
    Signals that end the program wait until the last rename.
    """
    targets = [Path(path) for path in paths]
    temporaries: list[Path] = []
    try:
        for target in targets:
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(
                prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
            )
            os.close(descriptor)
            temporaries.append(Path(name))
        with naming(targets[0]):
            yield temporaries
            for temporary in temporaries:
                give_default_permissions(temporary)
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


@contextlib.contextmanager
def naming_library_errors(path: str | os.PathLike) -> Iterator[None]:
    """Do as `naming`, also for system errors that libraries wrap, or hide."""
    try:
        with naming(path):
            yield
    except Exception as error:
        number = None if isinstance(error, OSError) else _wrapped_errno(error, path)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _wrapped_errno(error: Exception, path: str | os.PathLike) -> int | None:
    """Return the number of the system error behind a library's; None if there is none.

    safetensors and tokenizers (Rust) quote it. torch.save has it as its error's context where it
    writes to an open file, and forgets it where it writes to a path.
    """
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error.__context__, OSError):
        return error.__context__.errno
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if not raised_in.endswith(os.path.join("torch", "serialization.py")):
        return None
    folder = existing_parent(path)
    return errno.ENOSPC if shutil.disk_usage(folder).free < FULL_BYTES else errno.EIO


FULL_BYTES = 2**20  # with less, a disk is called full where a library does not say why it failed


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add `path` to system errors that name no file, such as a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def give_default_permissions(path: Path) -> None:
    """Let others read a file as the umask says: mkstemp and safetensors make private ones."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder; on success flush its files and rename it to `path`.

    path: a new or empty folder. One that can't be replaced, because a volume is mounted there,
    receives the files one by one.
    """
    target = Path(path).resolve()
    if target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK)):
        with replacing_files(target) as temporary:
            yield temporary
        return
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        with naming_library_errors(target):
            yield temporary
            for file in temporary.iterdir():
                give_default_permissions(file)
                flush_to_disk(file)
            flush_to_disk(temporary)  # the files' names
        with holding_signals():
            try:
                if target.is_dir():
                    target.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                with replacing_files(target) as inside:  # a part of this volume is mounted there
                    shutil.copytree(temporary, inside, dirs_exist_ok=True)
                return
            temporary.rename(target)
            flush_to_disk(target.parent)
    except OSError as error:
        if error.filename and Path(error.filename).is_relative_to(temporary):
            error.filename = os.fspath(target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder; on success flush its files and move them into `folder`.

    Each replaces the file of its name, others stay. What is written in place would change under its
    other names, too, and behind a link.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target) as temporary:
        with naming_library_errors(target):
            yield Path(temporary)
            # The configuration last: without it nothing is taken for a model.
            files = sorted(Path(temporary).iterdir(), key=lambda file: file.name == "config.json")
            for file in files:
                give_default_permissions(file)
                flush_to_disk(file)
        with holding_signals():
            for file in files:
                os.replace(file, target / file.name)
            flush_to_disk(target)


def remove_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Delete a folder's regular files of these names, and the folder if it is empty then.

    Return the names of what is left.
    """
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if is_regular(path):
            path.unlink()
    left = os.listdir(folder)
    if not left:
        folder.rmdir()
    return sorted(left)


def is_regular(path: str | os.PathLike) -> bool:
    """True for a regular file, False for a link to one."""
    return os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode)


def is_folder(path: str | os.PathLike) -> bool:
    """True for a folder, False for a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def content_of(folder: str | os.PathLike) -> list[str]:
    """List the names in a folder, but for the one that the root of a volume may have."""
    return sorted(name for name in os.listdir(folder) if name != "lost+found")


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a file a second name, replacing `target` atomically; copy where there are no links."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            if os.path.islink(source):  # not the link, whose target is another's
                raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
            os.link(source, temporary)
        except OSError:  # a file system without hard links, or of another owner
            shutil.copyfile(source, temporary)


def existing_parent(path: str | os.PathLike) -> Path:
    """Return the nearest folder that exists: on its volume a path will lie."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder and its missing parents, and flush the name of each to the disk."""
    folder = Path(path)
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir()
        flush_to_disk(folder.parent)


def json_digest(content: Any) -> str:
    """Return the SHA-256 of JSON content in hexadecimal digits, for any order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(path: str | os.PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a plain state dict (name -> CPU tensor) in torch's format, atomically."""
    # An open file: given a name, torch.save would store the temporary name in the archive.
    with (
        naming_library_errors(path),
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
    ):
        save_plain(state_dict, file)


def save_plain(state_dict: Mapping[str, torch.Tensor], file) -> None:
    """Write a plain state dict to an open file; tied tensors are copied and written once."""
    import torch

    torch.save(on_host(state_dict, {}), file)


def on_host(
    tensors: Mapping[str, torch.Tensor], known: dict[tuple, torch.Tensor], *, copies: bool = False
) -> dict[str, torch.Tensor]:
    """Return tensors on the host, those that share memory as one.

    known: what was found before, and is added to. copies: copy those that are on the host, too.
    """
    found = {}
    for name, tensor in tensors.items():
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in known:
            known[key] = tensor.detach().to("cpu", copy=copies)
        found[name] = known[key]
    return found
