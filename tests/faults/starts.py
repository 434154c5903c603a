"""Trials of starts: each system call on the run folder fails (T33); volumes as folders (T34)."""

import collections
import dataclasses
import functools
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from faults.files import Ended, in_child
from faults.inputs import drop_privileges
from faults.saves import (
    FAULTS,
    OF_MEMORY,
    Call,
    every,
    found_step,
    is_within,
    mount,
    own_mounts,
    quiet,
    traced,
    training,
    why_not_traced,
)

import extract
import train
from distil.system.locks import LOCK
from distil.training import resume
from distil.training.claim import checkpoints_of
from utils import logger

TINY = {"batch_size": 4, "max_steps": 1, "gradient_accumulation_steps": 1}
# The flags of the next start, and its end where the first one failed with or without a checkpoint.
NEXT = {"same flags": {}, "--force": {"force": True}, "--resume auto": {"resume": "auto"}}
REFUSED, MADE = 2, 0
NUM_CALLS = 37  # that share the points, as the plan says


# --------------------------------------------------------------------------------------------------
# Starts without loading: a run that is ready to claim its folder, forked once a start
# --------------------------------------------------------------------------------------------------


class ReadyError(Exception):
    """A run has loaded everything. trainer: it."""

    def __init__(self, trainer: train.Trainer):
        self.trainer = trainer


def ready_run(bench) -> train.Trainer:
    """Load a run's data and models, up to the claim of its folder."""
    kept = train.Trainer.open_folder

    def stop(trainer: train.Trainer, point) -> None:
        raise ReadyError(trainer)

    train.Trainer.open_folder = stop
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        train.main(bench.world.flags("bert", bench.folder / "none" / "run", **TINY))
    except ReadyError as ready:
        student = ready.trainer.student
        made = train.tokenizer_for(student.network, student.tokenizer)
        train.tokenizer_for = lambda *_: made  # the slow part, and the same for each start
        return ready.trainer
    finally:
        train.Trainer.open_folder = kept
        logger.handlers[:] = [logging.NullHandler()]
    raise AssertionError("a run ended before it claimed its folder")


def start(trainer: train.Trainer, path: Path, flags: dict) -> None:
    """Claim the folder and save, or resume, as train.run does. Raises InputError."""
    trainer.config = dataclasses.replace(trainer.config, dump_path=str(path), **flags)
    point = resume.find_resume_point(trainer.config, 1)
    if point is not None:
        trainer.restore(point)
    trainer.open_folder(point)
    trainer.folder.close()


# --------------------------------------------------------------------------------------------------
# T33: every system call of a start
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """One fault, at the number-th call of a name in any thread."""

    name: str
    number: int
    fault: str
    line: str

    def __str__(self) -> str:
        return f"{self.fault} at {self.name} {self.number} ({self.line[:120]})"


def calls_on(calls: Sequence[Call], run: Path) -> Iterator[tuple[Call, int]]:
    """Yield the calls that name the run folder or something in it, with their numbers by thread.

    strace counts the calls of each thread.
    """
    counts: collections.Counter = collections.Counter()
    for call in calls:
        thread = call.line.split()[0]
        counts[thread, call.name] += 1
        if call.name not in OF_MEMORY and any(is_within(path, str(run)) for path in call.paths):
            yield call, counts[thread, call.name]


def start_fails(bench) -> None:
    """T33: fail each call on the run folder of a start; the next start must work."""
    if reason := why_not_traced(bench.folder):
        bench.note(f"skipped: {reason}")
        return
    trainer = ready_run(bench)
    place = bench.folder / "plain"
    place.mkdir()
    found = traced(functools.partial(start, trainer, place / "run", {}), place)
    if found.ended.status != 0:
        raise RuntimeError(f"undisturbed: {found.ended}")
    calls = list(calls_on(found.calls, place / "run"))
    points = [
        Point(call.name, number, fault, call.line.replace(str(place), "..").split(" ", 1)[1])
        for (call, number), fault in itertools.product(calls, FAULTS)
    ]
    counts = collections.Counter(call.name for call, _ in calls)
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    bench.note(f"{len(calls)} calls, {len(points)} points: {listed}")
    share = points[bench.number % NUM_CALLS :: NUM_CALLS]
    try_points(bench, trainer, share[:: every()])


def try_points(bench, trainer: train.Trainer, points: Sequence[Point]) -> None:
    """Try points one after the other; keep the folders of failed ones."""
    seen, known = collections.Counter(), {}
    for index, point in enumerate(points):
        place = bench.folder / f"point-{index}"
        place.mkdir()
        problems, outcome = try_point(trainer, point, place, known)
        seen[outcome] += 1
        for problem in problems:
            bench.fail(f"{point}: {problem}")
        if not problems:
            shutil.rmtree(place)
    bench.count(len(points) - seen["not reached"])
    bench.note(f"outcomes: {', '.join(sorted(seen))}")


def state_of(run: Path) -> str:
    """Describe a folder but for what is drawn at random; equal states need one next start."""
    found = []
    for path in sorted(run.rglob("*")):
        name = re.sub(r"[a-z0-9_]{8}(\.tmp)?(/|$)|tfevents.*|-[a-z0-9_]{8}(/|$)", "X", str(path))
        size = path.lstat().st_size if path.is_file() else "folder"
        found.append(f"{name.removeprefix(str(run))} {'lock' if path.name == LOCK else size}")
    return "\n".join([str(run.exists()), *sorted(found)])


def try_point(
    trainer: train.Trainer, point: Point, place: Path, known: dict[str, list[str]]
) -> tuple[list[str], str]:
    """Fail one call; return the problems after it, and how the start ended.

    known: the problems of the next starts by the state of the folder.
    """
    run, neighbour = place / "run", place / "thesis.txt"
    neighbour.write_text("years of work")
    found = traced(
        functools.partial(start, trainer, run, {}),
        place,
        f"-etrace={point.name},access",
        f"-einject={point.name}:{FAULTS[point.fault]}:when={point.number}",
    )
    is_hit = found.ended.status == -9 if point.fault == "killed" else found.injected is not None
    if not is_hit:
        return [], "not reached"
    outcome = {0: "done", 2: "refused", -9: "killed"}.get(found.ended.status, "crashed")
    problems = [str(found.ended)] if outcome == "crashed" else []
    if outcome == "refused" and len(found.ended.errors) != 1:
        problems.append(f"expected one line: {found.ended}")
    if "--resume" in found.ended.text and found_step(checkpoints_of(run)) is None:
        problems.append(f"recommends a --resume that would refuse: {found.ended}")
    state = state_of(run)
    if state not in known:
        known[state] = []
        for name, flags in NEXT.items():
            after = place / name.strip("-").replace(" ", "-")
            after.mkdir()
            if run.exists():
                shutil.copytree(run, after / "run", symlinks=True)
            known[state] += [f"{name}: {what}" for what in next_problems(trainer, after, flags)]
    problems += [f"{outcome}, then {problem}" for problem in known[state]]
    if neighbour.read_text() != "years of work":
        problems.append("a neighbour was changed")
    return problems, outcome


def next_problems(trainer: train.Trainer, place: Path, flags: dict) -> list[str]:
    """List the problems of the next start; one that is not this start's own must be refused."""
    run = place / "run"
    step = found_step(checkpoints_of(run))
    ended = in_child(functools.partial(start, trainer, run, flags), place / "log")
    expected = REFUSED if step is not None and not flags else MADE
    if ended.status != expected:
        return [f"after {'a' if step is not None else 'no'} checkpoint: {ended}"]
    if expected == REFUSED:
        return []
    problems = [] if found_step(checkpoints_of(run)) == 0 else ["saved nothing"]
    names = [path.name for path in run.rglob("*")]
    left = [name for name in names if name.endswith(".tmp") or name.startswith(".")]
    aside = list(place.glob("run.old-*"))
    if left:
        problems.append(f"left {left[0]}")
    if bool(aside) != (step is not None and "force" in flags):
        problems.append(f"moved aside: {aside}")
    return problems


# --------------------------------------------------------------------------------------------------
# T34: volumes
# --------------------------------------------------------------------------------------------------

SHORT = {**TINY, "batch_size": 30, "max_steps": 4, "keep_checkpoints": 2}


@dataclasses.dataclass
class Volumes:
    """A folder with volumes, mounted for this process only. folder: for everything else."""

    bench: object
    folder: Path

    def tmpfs(self, name: str) -> Path:
        """Mount an empty volume."""
        path = self.folder / name
        path.mkdir()
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", path)
        return path

    def part(self, name: str) -> Path:
        """Mount a folder of this volume in another place; it has the same device."""
        (self.folder / f"source-of-{name}").mkdir()
        (self.folder / name).mkdir()
        mount("--bind", self.folder / f"source-of-{name}", self.folder / name)
        return self.folder / name

    def train(self, path: Path, status: int, *more: str, prepare=lambda: None, **changes) -> Ended:
        """Train into a folder; note another end than the expected one."""
        flags = [*self.bench.world.flags("bert", path, **{**SHORT, **changes}), *more]

        def run() -> None:
            prepare()
            training(flags)()

        ended = in_child(run, self.bench.folder / "log")
        if ended.status != status or not ended.is_clean:
            self.bench.fail(f"{' '.join(more)} in {path.name}: expected {status}: {ended}")
        if status == 0 and not (path / "model" / "config.json").exists():
            self.bench.fail(f"{' '.join(more)} in {path.name}: no model is in the folder")
        if status == 2 and len(ended.errors) != 1:
            self.bench.fail(f"{' '.join(more)} in {path.name}: expected one line: {ended}")
        return ended


def empty_volume(volumes: Volumes) -> None:
    """Train into an empty volume."""
    volumes.train(volumes.tmpfs("run"), 0)


def forced_into_empty(volumes: Volumes) -> None:
    """Train into an empty volume with --force."""
    volumes.train(volumes.tmpfs("run"), 0, "--force")


def lost_and_found(volumes: Volumes) -> None:
    """Train into a volume that holds lost+found."""
    run = volumes.tmpfs("run")
    (run / "lost+found").mkdir(mode=0o700)
    volumes.train(run, 0, "--resume", "auto")
    if not (run / "lost+found").is_dir():
        volumes.bench.fail("lost+found is gone")


def forced_over_a_run(volumes: Volumes, make: Callable = Volumes.tmpfs) -> None:
    """Train with --force where a volume holds a run: its content moves aside inside the volume."""
    run = make(volumes, "run")
    volumes.train(run, 0)
    before = (run / "pytorch_model.bin").read_bytes()
    volumes.train(run, 0, "--force", seed=3)
    aside = list(run.glob("old-*/pytorch_model.bin"))
    if [path.read_bytes() for path in aside] != [before]:
        volumes.bench.fail(f"the old run is not in the volume: {aside}")


def forced_over_a_part(volumes: Volumes) -> None:
    """Do as forced_over_a_run where a folder of the same volume is mounted."""
    forced_over_a_run(volumes, Volumes.part)


def resumed_in_a_volume(volumes: Volumes) -> None:
    """Resume a run whose folder is a volume."""
    run = volumes.tmpfs("run")
    volumes.train(run, 0)
    (run / "pytorch_model.bin").unlink()
    volumes.train(run, 0, "--resume")


def read_only_volume(volumes: Volumes) -> None:
    """Refuse a volume that is read-only."""
    run = volumes.tmpfs("run")
    mount("-o", "remount,ro", run)
    for more in ([], ["--force"], ["--resume", "auto"]):
        volumes.train(run, 2, *more)


def linked_volume(volumes: Volumes) -> None:
    """Train through a link to a folder of another volume; move the link of an old run aside."""
    big, run = volumes.tmpfs("big"), volumes.folder / "run"
    (big / "run").mkdir()
    run.symlink_to(big / "run")
    volumes.train(run, 0)
    before = (big / "run" / "pytorch_model.bin").read_bytes()
    volumes.train(run, 0, "--force", seed=3)
    if (big / "run" / "pytorch_model.bin").read_bytes() != before:
        volumes.bench.fail("the run behind the link was changed")


def closed_above(volumes: Volumes) -> None:
    """Train into an empty folder of the user's in a folder that is not theirs."""
    run = volumes.folder / "closed" / "run"
    run.mkdir(parents=True)
    run.parent.chmod(0o555)
    volumes.train(run, 0, prepare=drop_privileges)
    volumes.train(run, 2, "--force", prepare=drop_privileges)
    run.parent.chmod(0o755)


def student_in_a_volume(volumes: Volumes) -> None:
    """Extract a student into an empty volume, and into a part of the same one."""
    for output in (volumes.tmpfs("student"), volumes.part("other")):
        flags = ["--teacher", volumes.bench.world.teachers["bert"], "--output", output]
        main = functools.partial(extract.main, [str(word) for word in flags])
        ended = in_child(main, volumes.bench.folder / "log")
        if ended.status != 0 or not (output / "config.json").exists():
            volumes.bench.fail(f"extract.py into {output.name}: {ended}")
        if left := [name for name in os.listdir(output) if name.startswith(".")]:
            volumes.bench.fail(f"extract.py left {left}")


VOLUMES = [
    empty_volume,
    forced_over_a_run,
    forced_into_empty,
    lost_and_found,
    forced_over_a_part,
    resumed_in_a_volume,
    read_only_volume,
    linked_volume,
    closed_above,
    student_in_a_volume,
]


def volumes_as_folders(bench) -> None:
    """T34: use a volume as the folder of a run or of a student."""
    quiet()
    try:
        own_mounts()
        (bench.folder / "volumes").mkdir()
        case = VOLUMES[bench.number % len(VOLUMES)]
        case(Volumes(bench, bench.folder / "volumes"))
    except (PermissionError, AttributeError) as error:
        bench.note(f"skipped: {error}")
