"""Checkpoints: all that a run needs to resume, in folders that are complete and verified or absent.

A checkpoint is a folder `step-00000012` of safetensors files, `state.json`, and `MANIFEST.json`,
which holds the size and SHA-256 of each file and its own checksum. It is written under another
name, flushed, read back and renamed once, and then the parent folder is flushed: at every instant
the previous checkpoint is whole. The file formats don't detect a flipped bit; the manifest does.
Reading a checkpoint executes no code from it.

One process writes everything: randomness is keyed by counters (see utils.keyed_seed), so processes
have no random state to save.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distil.system.files import flush_to_disk, json_digest, link, make_folder, naming
from distil.system.json_files import load_json, parse_json
from distil.training.layout import STEP, checkpoints_in
from utils import REMEDIES, InputError, logger, one_line

FORMAT, VERSION = "distil-checkpoint", 1
MANIFEST, STATE, STUDENT = "MANIFEST.json", "state.json", "student.safetensors"
WEIGHTS = "model.safetensors"  # the student's, as from_pretrained reads it
MANIFEST_PARTS = {
    **{"format": str, "version": (int, None), "step": int, "manifest_sha256": str},
    "files": {...: {"bytes": int, "sha256": str}},
}
TENSOR_PARTS = {...: {"dtype": str, "shape": [int], "data_offsets": [int]}}
UNFINISHED, DISCARDED = ".tmp", ".trash-"
WRITE_BYTES = 2**24
ROOM_BYTES = 2**20  # for state, manifest and headers

# What a model and its optimizer may hold, by the names of the safetensors format, in its order.
DTYPES = {
    **{torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"},
    **{torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
OPTIMIZER = "optimizer"  # the file of AdamW's moments

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
Buffer = bytes | memoryview


class DamagedError(InputError):
    """A checkpoint that differs from what was written; an older one may be whole."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was compared with its manifest.

    step: updates done. state: content of state.json. manifest: file name -> size and SHA-256.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    manifest: Mapping[str, Mapping[str, Any]]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Load a file of tensors on the CPU; its bytes are verified again. Raises DamagedError.

        Of the optimizer before its first update: nothing.
        """
        path = self.path / f"{name}.safetensors"
        if self.step == 0 and name == OPTIMIZER and path.name not in self.manifest:
            return {}
        with _raise_as_damaged(path):
            return _read_tensors(path, self.manifest[path.name])


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def write(
    folder: str | os.PathLike,
    step: int,
    tensors: Tensors,
    state: Mapping[str, Any],
    keep: int,
    loader_files: Iterable[Path] = (),
) -> Path:
    """Write a checkpoint into `folder`, delete all but the newest `keep`, and return its path.

    tensors: file name (without suffix) -> name -> tensor; before the first update AdamW's are all
    zero, and only their room on the disk is looked for. loader_files: configuration and
    tokenizer, linked into the folder so that from_pretrained loads the student. Raises InputError
    that names path and bytes where the disk is full or not writable: nothing half-written stays,
    and the previous checkpoints are unchanged.
    """
    final = Path(folder) / f"step-{step:08d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    num_bytes = ROOM_BYTES + sum(
        tensor.nbytes for file in tensors.values() for tensor in file.values()
    )
    if step == 0:
        tensors = {name: content for name, content in tensors.items() if name != OPTIMIZER}
    loader_files = list(loader_files)
    own = {MANIFEST, STATE, WEIGHTS, *(f"{name}.safetensors" for name in tensors)}
    own |= {file.name for file in loader_files}
    with _raise_with_size(final, num_bytes), naming(final):
        make_folder(final.parent)
        clean(final.parent)
        _require_room(final.parent, num_bytes)
        try:
            unfinished.mkdir()
            _write_files(unfinished, step, tensors, state)
            for file in loader_files:
                link(file, unfinished / file.name)
            if os.path.exists(unfinished / STUDENT):
                link(unfinished / STUDENT, unfinished / WEIGHTS)
            if os.path.lexists(final):  # an update repeated after its damaged checkpoint
                _make_way(final, own)
            os.rename(unfinished, final)
            flush_to_disk(final.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        prune(final.parent, keep, final, own)
    return final


def _require_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"{folder}: the disk is full: a checkpoint takes {num_bytes:,} bytes, {free:,} are"
            f" free{_free_space(folder)}"
        )


def _free_space(folder: Path) -> str:
    """Word the remedy of a full disk: there is something to resume from, or not yet."""
    try:
        again = "continue with --resume" if checkpoints_in(folder) else "start again"
    except OSError:
        again = "start again, with --resume auto"
    return f"; free disk space, then {again}"


@contextlib.contextmanager
def _raise_with_size(path: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _free_space(path.parent) if error.errno in REMEDIES else ""
        raise InputError(
            f"{one_line(error, limit=None)} (a checkpoint takes {num_bytes:,} bytes){remedy}"
        ) from error


def _write_files(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
    manifest = {
        f"{name}.safetensors": _write_file(
            folder / f"{name}.safetensors", functools.partial(as_safetensors, content)
        )
        for name, content in tensors.items()
    }
    content = json.dumps({"step": step, **state}, indent=1, allow_nan=False).encode()
    manifest[STATE] = _write_file(folder / STATE, lambda: [content])
    body = {"format": FORMAT, "version": VERSION, "step": step, "files": manifest}
    signed = json.dumps({**body, "manifest_sha256": json_digest(body)}, indent=1).encode()
    _write_file(folder / MANIFEST, lambda: [signed])
    flush_to_disk(folder)


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[Buffer]:
    """Yield a safetensors file of tensors, one at a time: the bytes of safetensors.torch.save.

    That returns them all at once, a copy of the model or of its moments.
    """
    kinds = list(DTYPES)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield bytes_of(tensors[name])


def bytes_of(tensor: torch.Tensor) -> Buffer:
    """Return the bytes of a tensor, row by row, without a copy if it lies so on the host."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


def _write_file(path: Path, parts: Callable[[], Iterable[Buffer]]) -> dict[str, Any]:
    """Write and flush a file, compare it with `parts`, and return its manifest row.

    The row is computed from `parts`, not from the file. Raises DamagedError where they differ.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for piece in _pieces(parts()):
            digest.update(piece)
            num_bytes += len(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    _require_same(path, parts())
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _pieces(parts: Iterable[Buffer]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), WRITE_BYTES):
            yield view[start : start + WRITE_BYTES]


def _require_same(path: Path, parts: Iterable[Buffer]) -> None:
    """Read a file back and compare it with what was written: a third of a checksum's time."""
    room = memoryview(bytearray(WRITE_BYTES))
    with open(path, "rb") as file:
        for piece in _pieces(parts):
            found = room[: file.readinto(room[: len(piece)])]
            if not np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(piece, np.uint8)):
                raise DamagedError(f"{path}: differs from what was written: the disk is damaged")
        if file.read(1):
            raise DamagedError(f"{path}: is longer than what was written: the disk is damaged")


def _discard(path: Path) -> None:
    """Rename a folder, then delete it: a folder with a checkpoint's name is always whole."""
    trash = path.with_name(f"{DISCARDED}{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _make_way(path: Path, own: Collection[str]) -> None:
    """Delete a damaged checkpoint; rename one that holds other files than a checkpoint's."""
    if not path.is_symlink() and not _others(path, own):
        _discard(path)
        return
    aside = next(
        name
        for k in itertools.count(1)
        if not os.path.lexists(name := path.with_name(f"damaged-{path.name}-{k}"))
    )
    os.rename(path, aside)
    logger.warning("Moved %s aside to %s: it holds other files.", path, aside)


def _others(path: Path, own: Collection[str]) -> list[str]:
    """List what a checkpoint's folder holds beside a checkpoint's files. own: further names."""
    try:
        known = {*own, *json.loads((path / MANIFEST).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it is damaged
        known = own
    modes = {name: os.lstat(path / name).st_mode for name in os.listdir(path)}
    return [name for name, mode in modes.items() if name not in known or not stat.S_ISREG(mode)]


def prune(folder: Path, keep: int, written: Path, own: Collection[str]) -> None:
    """Delete all checkpoints but the newest `keep` and `written`: newer ones may be damaged.

    own: names of a checkpoint's files. One that holds other files stays, and so does a link.
    """
    for path in checkpoints_in(folder)[keep:]:
        if path == written or path.is_symlink():
            continue
        if others := _others(path, own):
            _say_kept(path, others[0])
        else:
            _discard(path)


@functools.cache  # once, not at each save
def _say_kept(path: Path, other: str) -> None:
    logger.warning("The old checkpoint %s stays: it holds %s, too.", path, other)


def clean(folder: str | os.PathLike) -> None:
    """Delete half-written and half-deleted folders that a killed save left."""
    for path in Path(folder).glob("*step-*"):
        name = path.name.removeprefix(DISCARDED).removesuffix(UNFINISHED)
        if name != path.name and STEP.fullmatch(name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint and compare every byte with its manifest.

    Raises DamagedError naming the file that is missing, cut off, changed or of another checkpoint;
    InputError where a newer version of this program wrote it.
    """
    path = Path(path)
    with _raise_as_damaged(path):
        manifest = _read_manifest(path)
        for name, expected in manifest["files"].items():
            if name != Path(name).name:
                raise DamagedError(f"{path}: its manifest names {name!r}, not one of its files")
            _check_file(path / name, expected)
        content = _checked_bytes(path / STATE, manifest["files"])
        state = parse_json(content, {"step": int}, strict=False)
        step, named = state.pop("step"), STEP.fullmatch(path.name.removesuffix(UNFINISHED))
        if not named or not step == manifest["step"] == int(named[1]):
            raise DamagedError(
                f"{path}: its {STATE} is of step {step}: the folder was renamed, or mixed from two"
            )
        return Checkpoint(path, step, state, manifest["files"])


@contextlib.contextmanager
def _raise_as_damaged(path: Path) -> Iterator[None]:
    """Convert errors of damaged files to DamagedError."""
    try:
        with naming(path):
            yield
    except InputError:
        raise
    except OSError as error:
        raise DamagedError(one_line(error, limit=None)) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedError(
            f"{path}: is damaged ({type(error).__name__}: {one_line(error)})"
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    name = path / MANIFEST
    with _raise_as_damaged(name):
        manifest = load_json(name, MANIFEST_PARTS)
        if manifest.pop("manifest_sha256") != json_digest(manifest) or manifest["format"] != FORMAT:
            raise DamagedError(f"{name}: differs from its own checksum: damaged, or edited")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path}: is of version {manifest.get('version')}, this program reads version"
            f" {VERSION}; update the program"
        )
    return manifest


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():  # reading a device or a pipe may never end
        raise DamagedError(f"{path}: no such file")
    size = os.path.getsize(path)
    if size != expected["bytes"]:
        raise DamagedError(
            f"{path}: has {size} bytes, its manifest says {expected['bytes']}: cut off, or another"
            " file"
        )
    with naming(path), open(path, "rb") as file:
        _compare(path, hashlib.file_digest(file, "sha256").hexdigest(), expected)


def _read_tensors(path: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read what `as_safetensors` yields, one tensor at a time, and compare it with its checksum.

    Not through a mapped file: where that is cut off meanwhile, the process dies of SIGBUS.
    """
    tensors, digest, kinds = {}, hashlib.sha256(), {name: kind for kind, name in DTYPES.items()}
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - 8
        start = file.read(8)
        text = file.read(min(int.from_bytes(start, "little"), max(left, 0)))
        digest.update(start + text)
        left -= len(text)
        rows = parse_json(text, TENSOR_PARTS).items()
        for name, row in sorted(rows, key=lambda item: item[1]["data_offsets"]):
            kind, shape = kinds[row["dtype"]], row["shape"]
            num_bytes = math.prod(shape) * kind.itemsize
            if min(shape, default=0) < 0 or num_bytes > left:
                raise ValueError(f"{name}: of shape {shape}, {left} bytes are left")
            tensors[name] = torch.empty(shape, dtype=kind)
            if num_bytes:
                file.readinto(buffer := bytes_of(tensors[name]))
                digest.update(buffer)
            left -= num_bytes
        digest.update(file.read(1))
    _compare(path, digest.hexdigest(), expected)
    return tensors


def _compare(path: Path, digest: str, expected: Mapping[str, Any]) -> None:
    if digest != expected["sha256"]:
        raise DamagedError(
            f"{path}: differs from its checksum: the file is damaged, or another checkpoint's"
        )


def _checked_bytes(path: Path, manifest: Mapping[str, Mapping[str, Any]]) -> bytes:
    with naming(path):
        content = path.read_bytes()
    _compare(path, hashlib.sha256(content).hexdigest(), manifest[path.name])
    return content


def newest(folder: str | os.PathLike) -> Checkpoint | None:
    """Read the newest whole checkpoint, with a warning for each one skipped; None without any.

    Raises InputError where all are damaged: the user decides what to lose, not the program.
    """
    problems = []
    for path in checkpoints_in(folder):
        try:
            found = read(path)
        except DamagedError as error:
            problems.append(f"skipped the checkpoint {path.name}: {error}")
            continue
        for problem in problems:
            logger.warning("%s", problem)
        return found
    if problems:
        remedy = "restore one from a copy, or start anew in another folder"
        raise InputError(
            "\n".join(
                [*problems, f"{folder}: all {len(problems)} checkpoint(s) are damaged; {remedy}"]
            )
        )
    return None


def content_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
