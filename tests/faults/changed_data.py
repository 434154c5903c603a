"""Trials of data that changes on the disk while a run reads it (T37)."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from faults.files import Ended, binarize, in_child, write_text
from faults.saves import at_a_moment_of, differences, training

import train
from distil.training import checkpointing
from utils import InputError

NUM_CHANGES = 3  # disturbed runs a call
LIMIT_S = 150  # of a run, on a busy machine
FLAGS = {"n_epoch": 2, "log_interval": 8, "checkpoint_interval": 8}
FLAGS |= {"eval_interval": 16, "keep_checkpoints": 2}
# Lines of text and batch size: 36 updates and one block of ids, or two.
SIZES = [(400, 11), (400, 11), (1150, 32)]
# When: (object, its method, how often a run calls it). The first three are before the training.
MOMENTS = [
    (train.LmSeqsDataset, "from_file", 1),
    (train, "make_preparation", 1),
    (train.RunFolder, "_begin", 1),
    *[(train.Distiller, "launch", 34)] * 5,
    (train.RunFolder, "save_checkpoint", 4),
    (train.HeldOut, "figures", 2),
]

Change = Callable[[Path, bytes, object], None]


def flip(path: Path, other: bytes, rng) -> None:
    """Flip a bit in place."""
    with open(path, "r+b") as file:
        place = rng.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def rot(path: Path, other: bytes, rng) -> None:
    """Flip a bit and keep the file's time, as a failing disk does."""
    facts = path.stat()
    flip(path, other, rng)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def cut(path: Path, other: bytes, rng) -> None:
    """Cut the file off somewhere."""
    os.truncate(path, rng.choice([0, rng.randrange(path.stat().st_size)]))


def overwrite(path: Path, other: bytes, rng) -> None:
    """Write another run's file in place, as cp does."""
    path.write_bytes(other)


def replace(path: Path, other: bytes, rng) -> None:
    """Rename another run's file to the name, as the programs here do."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(other)
    os.replace(new, path)


def renew(path: Path, other: bytes, rng) -> None:
    """Replace the file by a copy of itself."""
    replace(path, path.read_bytes(), rng)


def touch(path: Path, other: bytes, rng) -> None:
    """Set the file's time."""
    os.utime(path)


def remove(path: Path, other: bytes, rng) -> None:
    """Delete the file."""
    path.unlink()


def grow(path: Path, other: bytes, rng) -> None:
    """Append bytes."""
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 4096])))


CHANGES: list[Change] = [flip, flip, rot, rot, cut, cut, cut]
CHANGES += [overwrite, replace, renew, touch, remove, grow]
STORE = (".bin", ".idx")


def data_changed(bench) -> None:
    """T37: change a file of data in a run: it stops and names it, or warns and is not harmed."""
    torch.set_num_threads(1)
    kind = bench.rng.choice(["bert", "gpt2"])
    file_format = bench.rng.choice(["store", "store", "pickle"])
    folder = bench.folder / "data"
    num_lines, batch_size = bench.rng.choice(SIZES)
    paths = make_data(bench, kind, file_format, folder, num_lines)
    make_data(bench, kind, file_format, bench.folder / "other", num_lines)
    whole = bench.folder / "whole"
    flags = {**FLAGS, "data_file": paths[0], "eval_data_file": paths[1], "token_counts": None}
    flags["batch_size"] = batch_size
    if kind == "bert":
        flags["token_counts"] = folder / "counts"
    many = {**flags, "keep_checkpoints": 50}
    done = in_child(training(bench.world.flags(kind, whole, **many)), bench.folder / "log", LIMIT_S)
    if done.status != 0:
        bench.fail(f"undisturbed: {done}")
        return
    for number in range(NUM_CHANGES):
        kept = {path: path.read_bytes() for path in folder.iterdir()}
        run = bench.folder / f"run-{number}"
        target, change = choose(bench, paths, flags["token_counts"])
        what, ended = disturb(bench, target, change, bench.world.flags(kind, run, **flags))
        for problem in problems_of(ended, target, change, whole, run):
            bench.fail(f"{what}: {problem}")
        bench.note(f"{change.__name__} {target.suffix or 'counts'}: {said(ended)}")
        bench.count()
        for path, content in kept.items():
            path.write_bytes(content)


def disturb(bench, target: Path, change: Change, flags: list[str]) -> tuple[str, Ended]:
    """Train, and change a file at some moment: (what was done when, how the run ended)."""
    done = bench.folder / "done"
    done.unlink(missing_ok=True)

    def act() -> None:
        change(target, (bench.folder / "other" / target.name).read_bytes(), bench.rng)
        done.touch()

    prepare, moment = at_a_moment_of(bench.rng, MOMENTS, act)
    what = f"{change.__name__} {target.name} at {moment}"
    ended = in_child(
        lambda: (prepare(), training(flags)()), bench.folder / "log-disturbed", LIMIT_S
    )
    if not done.exists():
        bench.fail(f"{what}: never came")
    return what, ended


def make_data(bench, kind: str, file_format: str, folder: Path, num_lines: int) -> list[Path]:
    """Make a token file, a held-out one and counts; return the values of the two flags."""
    folder.mkdir()
    paths = []
    seed = 10 * bench.number + (folder.name == "other")
    for name, num in (("train", num_lines), ("held", 40)):
        text = write_text(bench.folder / f"{folder.name}-{name}.txt", num, seed + 1000)
        more = () if name == "held" else ("--token_counts_dump", folder / "counts")
        args = kind, text, folder / name, file_format, None, *more
        paths.append(binarize(bench.world, *args))
    return paths


def choose(bench, paths: list[Path], counts: Path | None) -> tuple[Path, Change]:
    """Choose a file of the run, and what happens to it; most often to what is trained on."""
    data, held_out = (
        [Path(f"{path}{suffix}") for suffix in STORE] if not path.exists() else [path]
        for path in paths
    )
    targets = [*[data[0]] * 4, *data[1:], held_out[0], held_out[0], *([counts] if counts else [])]
    return bench.rng.choice(targets), bench.rng.choice(CHANGES)


def said(ended: Ended) -> str:
    """Say in a few words how a run ended."""
    if ended.status == 0:
        return "warned, result as undisturbed"
    return f"refused with status {ended.status}"


def problems_of(ended: Ended, target: Path, change: Change, whole: Path, run: Path) -> list[str]:
    """List what is wrong with how a disturbed run ended, and with what it left."""
    name = str(target)
    if ended.status == 0:
        warned = any("WARNING" in line and name in line for line in ended.text.splitlines())
        unread = target.suffix != ".bin" and change is rot  # in memory: nobody needs the disk's
        problems = [] if warned or unread else ["finished without a word"]
        return problems + differences(whole, run)
    problems = [] if ended.status == 2 and ended.is_clean else [str(ended)]
    if len(ended.errors) != 1 or name not in ended.errors[0]:
        problems.append(f"expected one line that names the file: {ended.errors}")
    try:
        newest = checkpointing.newest(run / "checkpoints")
    except InputError as error:
        return [*problems, f"a checkpoint is damaged: {error}"]
    if newest is None:
        return problems + (["no checkpoint"] if " Training " in ended.text else [])
    if change is rot:  # noticed at the next reading: a save may have been before it
        return problems
    for part in ("student", "optimizer"):
        mine = newest.path / f"{part}.safetensors"
        same = whole / mine.relative_to(run)
        if mine.read_bytes() != same.read_bytes():
            problems.append(f"{newest.path.name} was trained on other bytes")
    return problems
