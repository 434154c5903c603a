"""Trials of saves: failing system calls (T3), their order (T4), damage (T6), full disks (T7).

strace lists the system calls and makes them fail. It is attached to a forked process that waits at
a gate, so that it traces the save and nothing before it.
"""

import collections
import contextlib
import ctypes
import dataclasses
import errno
import functools
import json
import os
import random
import re
import resource
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from faults.files import Ended, in_child, start_child
from faults.forked import end_of

import train
from distil.system import locks
from distil.training import checkpointing, log, run_folder
from utils import InputError, logger

STRACE = "/usr/bin/strace"
BEGIN, END = "/begin-of-trial", "/end-of-trial"  # arguments of access(), as marks in a trace
TENSORS = {
    "student": {"weight": torch.arange(64.0).reshape(8, 8), "bias": torch.ones(8)},
    "optimizer": {"exp_avg/weight": torch.zeros(8, 8)},
}


# --------------------------------------------------------------------------------------------------
# System calls of a forked process
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call.

    paths: of the files that it names or has open; result: its return value, None where it did not
    return.
    """

    name: str
    arguments: str
    result: int | None
    line: str

    @functools.cached_property
    def paths(self) -> list[str]:
        """List the files in the order of the arguments."""
        found, folder = [], None
        for opened, name, is_cut in PATH.findall(self.arguments):
            if opened:
                found += [folder] if folder else []
                folder = opened
            elif not is_cut:
                found.append(os.path.join(folder or "", name) if name else folder or "")
                folder = None
        return found + ([folder] if folder else [])


# Content is cut to nothing (-s 0), paths never are.
PATH = re.compile(r'(?:AT_FDCWD|\d+)<([^>]*)>|"([^"]*)"(\.\.\.)?')
CALL = re.compile(r"\d+ +(\w+)\((.*)\) += (-?\d+|\?)")
INTERRUPTED = re.compile(r"(\d+) +(.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)$")


def parse(trace: str) -> list[Call]:
    """Parse strace's output; an interrupted call is listed where it ended."""
    calls, begun = [], {}
    for line in trace.splitlines():
        if found := INTERRUPTED.match(line):
            begun[found[1]] = found[2]
            continue
        if (found := RESUMED.match(line)) and found[1] in begun:
            line = f"{found[1]} {begun.pop(found[1])}{found[2]}"
        if found := CALL.match(line):
            calls.append(Call(found[1], found[2], None if found[3] == "?" else int(found[3]), line))
    return calls


@dataclasses.dataclass(frozen=True)
class Traced:
    """The end of a traced process, and its calls since strace was attached."""

    ended: Ended
    calls: list[Call]

    def numbered(self) -> Iterator[tuple[Call, int]]:
        """Yield each call between the marks with its number among the calls of its name."""
        counts, is_inside = collections.Counter(), False
        for call in self.calls:
            counts[call.name] += 1
            if call.name == "access" and call.paths in ([BEGIN], [END]):
                is_inside = call.paths == [BEGIN]
            elif is_inside:
                yield call, counts[call.name]

    @property
    def injected(self) -> Call | None:
        """The call that strace made to fail."""
        return next((call for call in self.calls if call.line.endswith("(INJECTED)")), None)


def traced(action: Callable[[], None], folder: Path, *options: str, limit_s: float = 60) -> Traced:
    """Run a program's main in a forked process, traced with strace's options from a mark on."""
    ready_out, ready_in = os.pipe()
    gate_out, gate_in = os.pipe()
    pid = start_child(
        functools.partial(behind_gate, action, ready_in, gate_out, gate_in), folder / "log"
    )
    try:
        os.close(ready_in)
        os.read(ready_out, 1)
        with attached(pid, folder / "trace", options):
            os.write(gate_in, b".")
            status = end_of(pid, limit_s)
    finally:
        for descriptor in (ready_out, gate_out, gate_in):
            os.close(descriptor)
    return Traced(
        Ended(status, (folder / "log").read_text(errors="replace")),
        parse((folder / "trace").read_text()),
    )


def behind_gate(action: Callable[[], None], ready_in: int, gate_out: int, gate_in: int) -> None:
    """Signal that this process is ready, wait for the gate, then act between two marks."""
    os.close(gate_in)
    os.write(ready_in, b".")
    gate = select.poll()  # a call that no save makes
    gate.register(gate_out, select.POLLIN)
    gate.poll()
    os.access(BEGIN, os.F_OK)
    try:
        action()
    finally:
        os.access(END, os.F_OK)


@contextlib.contextmanager
def attached(pid: int, trace: Path, options: Sequence[str]) -> Iterator[None]:
    """Trace a process and its threads until it ends. Raises PermissionError where not allowed."""
    command = [STRACE, "-f", "-y", "-s", "0", "-o", str(trace), *options, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            if "attached" not in (said := strace.stderr.readline()):
                raise PermissionError(errno.EPERM, said.strip())
            yield
            strace.wait(10)
        finally:
            strace.kill()


def why_not_traced(folder: Path) -> str | None:
    """Explain why strace can't be used here, or return None."""
    if not os.path.exists(STRACE):
        return "no strace"
    pid = os.fork()
    if pid == 0:
        select.select([], [], [], 20)
        os._exit(0)
    try:
        with attached(pid, folder / "trace", []):
            os.kill(pid, 9)
    except PermissionError as error:
        return f"strace may not trace ({error.strerror})"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        os.waitpid(pid, 0)
    return None


# --------------------------------------------------------------------------------------------------
# Saves to be traced
# --------------------------------------------------------------------------------------------------


def write(folder: Path, step: int, keep: int = 2) -> None:
    """Write a tiny checkpoint."""
    checkpointing.write(folder, step, TENSORS, {"micro_batches": 2 * step}, keep)


def found_step(folder: Path) -> int | None:
    """Read the step of the newest whole checkpoint; None without any."""
    found = checkpointing.newest(folder)
    return found.step if found else None


def make_two(folder: Path) -> None:
    """Make two checkpoints, and the leftovers of a killed save and a killed removal."""
    for step in (1, 2):
        write(folder, step)
    shutil.copytree(folder / "step-00000002", folder / "step-00000003.tmp")
    shutil.copytree(folder / "step-00000001", folder / ".trash-step-00000000")


def make_damaged(folder: Path) -> None:
    """Make three checkpoints, the newest damaged: its step is repeated."""
    for step in (1, 2, 3):
        write(folder, step, keep=3)
    (folder / "step-00000003" / "state.json").write_text("{}")


def save_third(folder: Path) -> None:
    """Save; nothing but InputError may be raised."""
    try:
        write(folder, 3)
    except OSError as error:
        raise RuntimeError("a save raised another error than InputError") from error


def read_newest(folder: Path) -> None:
    """Read as --resume does; it must find something where there are checkpoints."""
    if found_step(folder) is None:
        raise RuntimeError("newest says that there is no checkpoint")


@dataclasses.dataclass(frozen=True)
class Scene:
    """An action and its folder.

    steps: allowed as the newest whole one after a fault; the last of them is expected without a
    fault.
    """

    make: Callable[[Path], None]
    act: Callable[[Path], None]
    steps: tuple[int | None, ...]
    damaged: tuple[int, ...] = ()


SCENES = {
    "save": Scene(make_two, save_third, (2, 3)),
    "save of a step again": Scene(make_damaged, save_third, (2, 3), damaged=(3,)),
    "first save": Scene(lambda folder: folder.parent.mkdir(exist_ok=True), save_third, (None, 3)),
    "look for the newest": Scene(make_two, read_newest, (2,)),
}


def place(scene: Scene, folder: Path) -> Path:
    """Make a scene's folder, once; return its path."""
    target = folder / "run" / "checkpoints"
    target.parent.mkdir(parents=True)
    scene.make(target)
    return target


def quiet() -> None:
    """Suppress this process's log of skipped checkpoints."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel("CRITICAL")


# --------------------------------------------------------------------------------------------------
# T3: every system call of a save
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """One fault, at the number-th call of a name.

    how: strace's words for it; is_cleaning: a call of the clean-up.
    """

    scene: str
    name: str
    number: int
    fault: str
    how: str
    is_cleaning: bool

    def __str__(self) -> str:
        return f"{self.scene}, {self.fault} at {self.name} {self.number}"


FAULTS = {"killed": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
# Memory and threads: the C library may end the process where these fail; the disk must stay safe.
# How often they are called depends on the heap: some of these points may not be reached.
OF_MEMORY = {
    "brk",
    "mmap",
    "munmap",
    "mremap",
    "mprotect",
    "madvise",
    "futex",
    "sched_yield",
    "rt_sigreturn",
}
# These can't return EIO or ENOSPC in reality; must be safe nevertheless.
NEVER_SO = {"lseek", "fcntl", "ioctl", "getpid", "gettid"} | OF_MEMORY
MUST_BE_SAID = {"write", "fsync", "rename", "mkdir"}
NUM_WORKERS = 2


def every() -> int:
    """Return n where every n-th point is tried."""
    return int(os.environ.get("TORTURE_EVERY", 60 if "PYTEST_CURRENT_TEST" in os.environ else 1))


def system_call_fails(bench) -> None:
    """T3: a kill, EIO and ENOSPC at every system call of a save; lost writes without an error."""
    if reason := why_not_traced(bench.folder):
        bench.note(f"skipped: {reason}")
        return
    quiet()
    points = []
    for name, scene in SCENES.items():
        template = place(scene, bench.folder / name)
        scene.act(place(scene, bench.folder / f"{name}, warm"))  # a first call does set-up work
        points += points_of(bench, name, template)
    chosen = points[:: every()]
    for result in in_workers(
        functools.partial(try_points, bench),
        [chosen[k::NUM_WORKERS] for k in range(NUM_WORKERS)],
        bench,
    ):
        for failure in result["failures"]:
            bench.fail(failure)
        for note in result["notes"]:
            bench.note(note)
        bench.count(result["tried"])


def points_of(bench, name: str, template: Path) -> list[Point]:
    """List the faults of a scene from its undisturbed trace."""
    folder = copy_of(template, bench.folder / "plain")
    undisturbed = traced(functools.partial(SCENES[name].act, folder), bench.folder)
    if undisturbed.ended.status != 0:
        raise RuntimeError(f"{name}, undisturbed: {undisturbed.ended}")
    calls = list(undisturbed.numbered())
    shutil.rmtree(bench.folder / "plain")
    # statfs follows the clean-up.
    room = next((k for k, (call, _) in enumerate(calls) if call.name == "statfs"), 0)
    points = [
        Point(name, call.name, number, fault, how, k < room)
        for k, (call, number) in enumerate(calls)
        for fault, how in faults_of(call)
    ]
    counts = collections.Counter(point.name for point in points)
    bench.note(
        f"{name}: {len(calls)} calls, {len(points)} points:"
        f" {', '.join(f'{n} {c}' for n, c in counts.most_common())}"
    )
    unreal = sum(point.fault in ("EIO", "ENOSPC") and point.name in NEVER_SO for point in points)
    bench.note(f"{name}: {unreal} of its points are errors that such a call never returns")
    return points


def faults_of(call: Call) -> list[tuple[str, str]]:
    """List the faults of a call, in strace's words."""
    lost = [("lost", f"retval={call.result}")] if call.name == "write" else []
    return [*FAULTS.items(), *lost]


def copy_of(template: Path, folder: Path) -> Path:
    """Copy the surroundings of a scene's folder; return the copy of that folder."""
    shutil.copytree(template.parent, folder / "run")
    return folder / "run" / template.name


def in_workers(work: Callable[[list], dict], shares: Sequence[list], bench) -> list[dict]:
    """Run the shares in parallel, in forked processes; return their results."""
    results = [bench.folder / f"share-{k}.json" for k in range(len(shares))]

    def work_and_tell(share: list, result: Path) -> None:
        result.write_text(json.dumps(work(share)))

    actions = [
        functools.partial(work_and_tell, *pair) for pair in zip(shares, results, strict=True)
    ]
    pids = [
        start_child(action, result.with_suffix(".log"))
        for action, result in zip(actions, results, strict=True)
    ]
    for pid, result in zip(pids, results, strict=True):
        if end_of(pid, 800) != 0:
            raise RuntimeError(f"a worker failed: {result.with_suffix('.log').read_text()[-500:]}")
    return [json.loads(result.read_text()) for result in results]


def try_points(bench, points: Sequence[Point]) -> dict:
    """Try points one after the other in this process's folder; keep the folders of failed ones."""
    quiet()
    failures, missed, seen = [], 0, collections.Counter()
    for index, point in enumerate(points):
        folder = bench.folder / f"points-{os.getpid()}" / str(index)
        checkpoints = copy_of(bench.folder / point.scene / "run" / "checkpoints", folder)
        problems, outcome = try_point(point, checkpoints, folder)
        missed += outcome == "missed"
        seen[outcome] += 1
        failures += [f"{point}: {problem}" for problem in problems]
        if not problems:
            shutil.rmtree(folder)
    notes = [f"{missed} points of memory calls were not reached"] if missed else []
    return {"tried": len(points) - missed, "failures": failures, "notes": notes, "seen": seen}


def try_point(point: Point, checkpoints: Path, folder: Path) -> tuple[list[str], str]:
    """Inject one fault; return the problems after it, and how the save ended."""
    scene = SCENES[point.scene]
    options = [
        f"-etrace={point.name},access",
        f"-einject={point.name}:{point.how}:when={point.number}",
    ]
    found = traced(functools.partial(scene.act, checkpoints), folder, *options)
    is_hit = found.ended.status == -9 if point.fault == "killed" else found.injected is not None
    if not is_hit:
        return ([] if point.name in OF_MEMORY else [f"was not reached: {found.ended}"]), "missed"
    outcome = {0: "done", 2: "refused", -9: "killed"}.get(found.ended.status, "crashed")
    problems = end_problems(point, outcome, found.ended, folder)
    if scene.act is save_third:
        try:
            problems += folder_problems(scene, outcome, checkpoints, point.is_cleaning)
            problems += again_problems(checkpoints)
        except InputError as error:  # all are damaged
            problems.append(f"{outcome}: {error}")
    return problems, outcome


def end_problems(point: Point, outcome: str, ended: Ended, folder: Path) -> list[str]:
    """List the problems of how the process ended."""
    if point.name in OF_MEMORY:
        return []
    if outcome == "crashed":
        return [str(ended)]
    if outcome == "done" and point.name in MUST_BE_SAID and point.fault != "killed":
        return ["the save says that all is well"]
    if outcome == "refused" and not any(str(folder) in line for line in ended.errors):
        return [f"the error names no path: {ended.errors}"]
    return []


def folder_problems(scene: Scene, outcome: str, checkpoints: Path, may_leave: bool) -> list[str]:
    """List broken promises: one whole checkpoint always, nothing half-written under its name.

    may_leave: the call that failed was to delete the leftovers of an earlier save.
    """
    expected, problems = scene.steps[-1:] if outcome == "done" else scene.steps, []
    if (step := found_step(checkpoints)) not in expected:
        problems.append(
            f"{outcome}, and the newest whole checkpoint is {step}, expected one of {expected}"
        )
    for path in checkpointing.checkpoints_in(checkpoints):
        try:
            checkpointing.read(path)
        except InputError as error:
            if outcome == "done" or int(path.name[5:]) not in scene.damaged:
                problems.append(f"{outcome}, and there is half a checkpoint: {error}")
    if (
        outcome in ("done", "refused")
        and not may_leave
        and (left := list(checkpoints.parent.rglob("*.tmp")))
    ):
        problems.append(f"{outcome}, and there is {left[0].name}")
    return problems


def again_problems(checkpoints: Path) -> list[str]:
    """List the problems after an undisturbed save."""
    before = [path.name for path in checkpointing.checkpoints_in(checkpoints)]
    write(checkpoints, 4)
    names, expected = sorted(os.listdir(checkpoints)), sorted(["step-00000004", *before[:1]])
    problems = (
        [] if names == expected else [f"after another save there are {names}, expected {expected}"]
    )
    return (
        problems if found_step(checkpoints) == 4 else [*problems, "another save is not the newest"]
    )


# --------------------------------------------------------------------------------------------------
# T4: the order of write, fsync and rename
# --------------------------------------------------------------------------------------------------

OWN_NAME = re.compile(r"/step-\d{8,}(/|$)")
FLAGS = {"batch_size": 24, "n_epoch": 2, "log_interval": 4, "checkpoint_interval": 4}


class Disk:
    """A model of what would survive a power cut, by the system calls, and of calls out of order."""

    def __init__(self, root: Path):
        self.root = root
        self.contents: dict[str, Call] = {}  # files written since they were flushed
        self.entries: dict[str, Call] = {}  # names made since their folder was flushed
        self.written: set[str] = set()
        self.renamed: collections.Counter[str] = collections.Counter()
        self.violations: list[str] = []
        self.num_checked = self.num_saves = 0

    def know_checkpoints(self) -> None:
        """Assume that the existing checkpoints are correct."""
        for path in self.root.rglob("step-*"):
            self.renamed[os.path.relpath(path, self.root)] = 1
            self.written |= {os.path.relpath(file, self.root) for file in path.iterdir()}

    def take(self, call: Call) -> None:
        """Apply one call; failed calls, and those elsewhere, change nothing."""
        paths = [
            os.path.relpath(path, self.root)
            for path in call.paths
            if is_within(path, str(self.root))
        ]
        if call.name in self.EFFECTS and paths and call.result is not None and call.result >= 0:
            self.EFFECTS[call.name](self, call, *paths)

    def _require(self, is_kept: bool, rule: str, *calls: Call) -> None:
        self.num_checked += 1
        if not is_kept:
            self.violations.append(f"{rule}: {' after '.join(call.line for call in calls)}")

    def _write(self, call: Call, path: str, *_: str) -> None:
        self._require(is_temporary(path) or is_in_place(path), "written under its own name", call)
        self.contents[path] = call
        self.written.add(path)

    def _open(self, call: Call, path: str) -> None:
        if "O_CREAT" in call.arguments:
            self.entries[path] = call
        if "O_TRUNC" in call.arguments:
            self.contents[path] = call

    def _make_folder(self, call: Call, path: str) -> None:
        self.entries[path] = call

    def _flush(self, call: Call, path: str) -> None:
        self.contents.pop(path, None)
        for name in [name for name in self.entries if (os.path.dirname(name) or ".") == path]:
            del self.entries[name]

    def _rename(self, call: Call, old: str, new: str) -> None:
        if not is_temporary(new):
            self._check_published(call, old, new)
        if OWN_NAME.search(old):
            self._check_dropped(call, old, new)
        self.contents = {
            moved(path, old, new): at
            for path, at in self.contents.items()
            if not is_within(path, new)
        }
        self.entries = {
            moved(path, old, new): at
            for path, at in self.entries.items()
            if not is_within(path, new)
        }
        self.written = {moved(path, old, new) for path in self.written if not is_within(path, new)}
        self.entries[new] = call
        self.renamed[new] += 1

    def _check_published(self, call: Call, old: str, new: str) -> None:
        """Check a file or folder that gets the name under which it is read."""
        contents = [at for path, at in self.contents.items() if is_within(path, old)]
        self._require(not contents, "renamed before its content was flushed", call, *contents)
        entries = [at for path, at in self.entries.items() if is_within(path, old) and path != old]
        self._require(not entries, "renamed before its folder was flushed", call, *entries)
        above = {
            path: at for path, at in self.entries.items() if is_within(new, path) and path != new
        }
        self._require(
            not above, "renamed into a folder whose own name was not flushed", call, *above.values()
        )
        for path in above:  # reported once
            del self.entries[path]
        if OWN_NAME.search(new):
            logs = [at for path, at in self.contents.items() if "/log/" in path]
            self.num_saves += 1
            self._require(
                not logs,
                "a checkpoint is published before the log that it counts was flushed",
                call,
                *logs,
            )

    def _check_dropped(self, call: Call, old: str, new: str) -> None:
        """Check an old checkpoint that loses its name."""
        del self.renamed[old]
        self._require(
            os.path.basename(new).startswith(checkpointing.DISCARDED),
            "an old checkpoint is not put away",
            call,
        )
        others = [
            at
            for path, at in self.entries.items()
            if OWN_NAME.search(path) and not is_within(path, old)
        ]
        unfinished = {
            os.path.dirname(path) for path in self.written if f"{checkpointing.UNFINISHED}/" in path
        }
        is_again = unfinished <= {old + checkpointing.UNFINISHED}  # the new one takes its place
        self._require(
            is_again, f"an old checkpoint is put away before {unfinished} has its name", call
        )
        self._require(
            not others,
            "an old checkpoint is put away before the new one's name was flushed",
            call,
            *others,
        )

    def _link(self, call: Call, source: str, target: str) -> None:
        self._require(is_temporary(target), "linked under its own name", call)
        self.entries[target] = call
        self.written.add(target)
        if source in self.contents:
            self.contents[target] = self.contents[source]

    def _remove(self, call: Call, path: str) -> None:
        self._require(not OWN_NAME.search(path), "removed under a checkpoint's own name", call)
        self.contents.pop(path, None)
        self.entries.pop(path, None)
        self.written.discard(path)

    def check_end(self) -> None:
        """Check what is left at the end of the program."""
        for path, call in {**self.contents, **self.entries}.items():
            self._require(is_temporary(path) or is_in_place(path), "never flushed", call)
        for folder in self.root.rglob("step-*"):
            path = os.path.relpath(folder, self.root)
            self._require(
                self.renamed[path] == 1, f"{self.renamed[path]} renames gave {path} its name"
            )
            unseen = {f"{path}/{name}" for name in os.listdir(folder)} - self.written
            self._require(not unseen, f"no write was seen of {unseen}")

    EFFECTS = {
        **dict.fromkeys(
            ["write", "pwrite64", "writev", "pwritev", "ftruncate", "sendfile", "copy_file_range"],
            _write,
        ),
        **dict.fromkeys(["openat", "open", "creat"], _open),
        **dict.fromkeys(["mkdir", "mkdirat"], _make_folder),
        **dict.fromkeys(["fsync", "fdatasync"], _flush),
        **dict.fromkeys(["rename", "renameat", "renameat2"], _rename),
        **dict.fromkeys(["link", "linkat"], _link),
        **dict.fromkeys(["unlink", "unlinkat", "rmdir"], _remove),
    }


def is_within(path: str, folder: str) -> bool:
    """True for the folder and its content."""
    return path == folder or path.startswith(f"{folder}/")


def moved(path: str, old: str, new: str) -> str:
    """Return a path's name after a rename."""
    return new + path[len(old) :] if is_within(path, old) else path


def is_temporary(path: str) -> bool:
    """True for a name that nothing reads."""
    return any(part.startswith(".") or part.endswith(".tmp") for part in path.split("/"))


def is_in_place(path: str) -> bool:
    """True for the log's files, which grow under their names, their folders, and the lock."""
    return re.search("/log/(train|parameters)/", f"{path}/") is not None or path.endswith(
        ("/log", f"/{log.METRICS}", f"/{locks.LOCK}")
    )


def order_of_calls(bench) -> None:
    """T4: trace saves, and a run that saves; check that all needed flushes come first."""
    if reason := why_not_traced(bench.folder):
        bench.note(f"skipped: {reason}")
        return
    quiet()
    saves = {name: scene for name, scene in SCENES.items() if scene.act is save_third}
    for name, scene in saves.items():
        checkpoints = place(scene, bench.folder / name)
        audit(bench, name, functools.partial(scene.act, checkpoints), bench.folder / name)
    kind = bench.rng.choice(["bert", "gpt2", "roberta"])
    (bench.folder / "a run").mkdir()
    action = training(
        bench.world.flags(kind, bench.folder / "a run" / "run", **FLAGS, keep_checkpoints=2)
    )
    audit(bench, "a run", action, bench.folder / "a run")


def audit(bench, name: str, action: Callable[[], None], root: Path) -> None:
    """Trace an action in `root`; each checked rule counts as a trial."""
    disk = Disk(root)
    disk.know_checkpoints()
    found = traced(action, bench.folder, "-etrace=%file,%desc")
    if found.ended.status != 0:
        raise RuntimeError(f"{name}: {found.ended}")
    for call, _ in found.numbered():
        disk.take(call)
    disk.check_end()
    for violation in disk.violations:
        bench.fail(f"{name}: {violation}")
    bench.count(disk.num_checked)
    bench.note(
        f"{name}: {disk.num_saves} save(s), {disk.num_checked} rules checked over"
        f" {len(found.calls)} calls"
    )


def training(flags: list[str]) -> Callable[[], None]:
    """Make a run of train.py."""

    def run() -> None:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        train.main(flags)

    return run


# --------------------------------------------------------------------------------------------------
# T6: damaged checkpoints
# --------------------------------------------------------------------------------------------------

KINDS = ("bert", "gpt2", "roberta")
FINAL = "pytorch_model.bin"


def reference(bench, kind: str) -> Path:
    """Make the undisturbed run with all its checkpoints, once for all calls."""
    made = bench.world.folder / f"undisturbed-{kind}"
    if not made.exists():
        own = bench.folder / "undisturbed"
        ended = in_child(
            training(bench.world.flags(kind, own, **FLAGS, keep_checkpoints=50)),
            bench.folder / "log",
        )
        if ended.status != 0:
            raise RuntimeError(f"undisturbed: {ended}")
        with contextlib.suppress(OSError):  # another call was first
            os.rename(own, made)
    return made


def cut_short(bench, whole: Path, run: Path) -> list[Path]:
    """Copy a run as if it had died after a checkpoint; keep three, return them newest first."""
    shutil.copytree(whole, run)
    (run / FINAL).unlink()
    found = checkpointing.checkpoints_in(run / "checkpoints")
    first = bench.rng.randrange(len(found) - 2)
    for path in [*found[:first], *found[first + 3 :]]:
        shutil.rmtree(path)
    return found[first : first + 3]


def flip(content: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Flip a bit."""
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def zero(content: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Zero a block that holds other bytes."""
    place = rng.choice([place for place, byte in enumerate(content) if byte])
    size = min(rng.choice([1, 64, 512]), len(content) - place)
    content[place : place + size] = bytes(size)
    return content


DAMAGES: dict[str, Callable[[bytearray, bytes, random.Random], bytes | None]] = {
    "bit flipped": flip,
    "cut off": lambda content, other, rng: content[: rng.randrange(len(content))],
    "missing": lambda content, other, rng: None,
    "block zeroed": zero,
    "swapped": lambda content, other, rng: other,
}


@dataclasses.dataclass(frozen=True)
class Damage:
    """A change to a checkpoint. named: the text that the message must contain."""

    what: str
    named: str


def damage(path: Path, other: Path, rng: random.Random) -> Damage:
    """Damage one file of a checkpoint; `other` is the source of swapped files."""
    # Configuration and tokenizer lie there for from_pretrained: nothing resumes from them.
    manifest = json.loads((path / checkpointing.MANIFEST).read_bytes())
    read = [path / name for name in sorted([checkpointing.MANIFEST, *manifest["files"]])]
    file, kind = rng.choice(read), rng.choice(list(DAMAGES))
    content = DAMAGES[kind](bytearray(file.read_bytes()), (other / file.name).read_bytes(), rng)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    # With a swapped manifest the other files differ from it.
    is_mixed = kind == "swapped" and file.name == checkpointing.MANIFEST
    return Damage(
        f"{path.name}/{file.name} {kind}", path.name if is_mixed else f"{path.name}/{file.name}"
    )


def newest_is_damaged(bench) -> None:
    """T6: damage the newest of three checkpoints, in every third call all, then resume."""
    kind = KINDS[bench.number // 3 % 3]
    whole, run = reference(bench, kind), bench.folder / "run"
    newest, *older = cut_short(bench, whole, run)
    flags = bench.world.flags(kind, run, **FLAGS)
    if bench.number % 3 < 2:
        done = damage(newest, bench.rng.choice(older), bench.rng)
        resume_from_the_one_before(bench, whole, flags, [newest, older[0]], done)
        return
    others = checkpointing.checkpoints_in(whole / "checkpoints")
    done = [
        damage(path, bench.rng.choice([o for o in others if o.name != path.name]), bench.rng)
        for path in [newest, *older]
    ]
    refuse_all(bench, run, flags, done)


def resume_from_the_one_before(
    bench, whole: Path, flags: list[str], paths: list[Path], done: Damage
) -> None:
    """Resume: the damaged checkpoint is named and skipped, the run ends undisturbed."""
    mode = bench.rng.choice([["--resume"], ["--resume", "auto"], ["--force", "--resume"]])
    ended = in_child(training([*flags, *mode]), bench.folder / "log")
    newest, before = paths
    told = f"skipped the checkpoint {newest.name}: ", f"Resuming from {before}: "
    if ended.status != 0 or not all(text in ended.text for text in told):
        bench.fail(f"{done.what}, {mode}: expected {told}, got {ended}")
    elif not any(told[0] in line and done.named in line for line in ended.text.splitlines()):
        bench.fail(f"{done.what}: no line names {done.named}: {ended}")
    for problem in differences(whole, bench.folder / "run"):
        bench.fail(f"{done.what}, {mode}: {problem}")


def differences(whole: Path, run: Path) -> list[str]:
    """List differences from the undisturbed run: the student, the newest checkpoint's tensors."""
    last = checkpointing.checkpoints_in(whole / "checkpoints")[0].name
    names = [FINAL, *(f"checkpoints/{last}/{name}.safetensors" for name in TENSORS)]
    return [
        f"{name} is not the undisturbed run's"
        for name in names
        if contents(run).get(name) != contents(whole)[name]
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refuse_all(bench, run: Path, flags: list[str], done: list[Damage]) -> None:
    """Resume with every checkpoint damaged: refused, all named, nothing changed or started anew."""
    before = contents(bench.folder)
    what = "; ".join(damage.what for damage in done)
    for mode in (
        ["--resume"],
        ["--resume", "auto"],
        ["--force", "--resume"],
        ["--force", "--resume", "auto"],
    ):
        ended = in_child(training([*flags, *mode]), bench.folder / "log")
        if ended.status != 2 or not ended.is_clean:
            bench.fail(f"{what}, {mode}: {ended}")
        for damaged in done:
            if not any(damaged.named in line for line in ended.errors):
                bench.fail(f"{what}, {mode}: no line names {damaged.named}: {ended.errors}")
        after = contents(bench.folder)
        names = (before.keys() | after.keys()) - {"log", "keyboard"}
        if changed := [name for name in sorted(names) if before.get(name) != after.get(name)]:
            bench.fail(f"{what}, {mode}: changed {changed}")


# --------------------------------------------------------------------------------------------------
# T7: a full disk, a folder that is read-only
# --------------------------------------------------------------------------------------------------

DISK_BYTES = 6 * 2**20
CLONE_NEWNS = 0x20000


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk for this process and its children, which ends with them.

    Raises OSError where mounting is not allowed.
    """
    own_mounts()
    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def own_mounts() -> None:
    """Keep this process's mounts for it and its children. Raises PermissionError."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mounts of its own for this process")
    mount("--make-rprivate", "/")


def mount(*words: object) -> None:
    """Call mount. Raises PermissionError."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(errno.EPERM, f"mount: {done.stderr.strip()}")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only, also for files open there: root ignores permission bits."""
    make_read_only(folder)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(folder: Path) -> None:
    """Mount a folder over itself, read-only."""
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)


def disk_full(bench) -> None:
    """T7: fill a disk of 6 MB by checkpoints or in a run; make it read-only before or in a run."""
    quiet()
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(bench.folder))
        except (OSError, AttributeError) as error:
            bench.note(f"no disk was filled: {error}; limits of the size of a file instead")
            fill_a_file(bench)
            return
        for trial in (fill_by_checkpoints, fill_in_a_run, READ_ONLY[bench.number % len(READ_ONLY)]):
            place = disk / trial.__name__
            place.mkdir()
            trial(bench, place)
            bench.count()
            shutil.rmtree(place)


def big_tensors(rng: random.Random, num_bytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Make tensors of so many bytes, divided between two files at random."""
    share = rng.randint(1, num_bytes // 4 - 1)
    return {
        "student": {"weight": torch.ones(share)},
        "optimizer": {"exp_avg/weight": torch.ones(num_bytes // 4 - share)},
    }


@contextlib.contextmanager
def claimed_room(folder: Path, rng: random.Random) -> Iterator[None]:
    """Fake free space, so that the write itself meets the end of the disk."""
    kept = shutil.disk_usage
    claim_room()
    try:
        yield
    finally:
        shutil.disk_usage = kept


def claim_room() -> None:
    """Make the standard library report free space on any disk."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)


@contextlib.contextmanager
def no_names(folder: Path, rng: random.Random) -> Iterator[None]:
    """Leave bytes free, but few or no inodes."""
    shutil.rmtree(checkpointing.checkpoints_in(folder)[-1])
    disk, facts = folder.parent.parent, os.statvfs(folder)
    mount("-o", f"remount,nr_inodes={facts.f_files - facts.f_ffree + rng.randrange(5)}", disk)
    try:
        with claimed_room(folder, rng):
            yield
    finally:
        mount("-o", "remount,nr_inodes=100000", disk)


BYTES = r"a checkpoint takes [\d,]{6,} bytes"
FULL = {
    "room asked for": (
        lambda folder, rng: contextlib.nullcontext(),
        rf"the disk is full: {BYTES}, [\d,]+ are free",
    ),
    "room claimed": (claimed_room, rf"No space left on device: .*step-\d+.* \({BYTES}\)"),
    "no names": (no_names, rf"No space left on device: .*step-\d+.* \({BYTES}\)"),
}


def fill_by_checkpoints(bench, place: Path) -> None:
    """Write checkpoints until the disk is full; each refusal must leave the earlier ones."""
    folder, size = place / "checkpoints", bench.rng.randrange(400_000, 1_300_000)
    tensors, step = big_tensors(bench.rng, size), 0
    for name, (condition, expected) in FULL.items():
        with condition(folder, bench.rng):
            problem, step = write_until_refused(folder, tensors, step)
        if not re.search(expected, problem) or str(folder) not in problem:
            bench.fail(f"{name}, {size} bytes: {problem}")
        for wrong in left_by_refusal(folder, step):
            bench.fail(f"{name}, {size} bytes: {wrong}")
    for path in checkpointing.checkpoints_in(folder)[1:]:
        shutil.rmtree(path)
    checkpointing.write(folder, step + 1, tensors, {}, 100)


def write_until_refused(folder: Path, tensors: Mapping, step: int) -> tuple[str, int]:
    """Write checkpoints until one fails: (reason, last written step)."""
    for number in range(step + 1, step + 100):
        try:
            checkpointing.write(folder, number, tensors, {}, 100)
        except InputError as error:
            return str(error), number - 1
    raise RuntimeError("the disk never got full")


def left_by_refusal(folder: Path, step: int) -> list[str]:
    """List the problems of a folder whose last good step is `step`."""
    names = sorted(path.name for path in checkpointing.checkpoints_in(folder))
    problems = [] if sorted(os.listdir(folder)) == names else [f"left {sorted(os.listdir(folder))}"]
    problems += (
        [] if names and names[-1] == f"step-{step:08d}" else [f"the last is not {step}: {names}"]
    )
    for path in checkpointing.checkpoints_in(folder):
        try:
            checkpointing.read(path)
        except InputError as error:
            problems.append(f"{path.name} is not intact: {error}")
    return problems


# Where in a run a disk gets full: (the object, its method, how often a run calls it).
MOMENTS = [
    (train.RunFolder, "_begin", 1),
    (train.RunFolder, "save_checkpoint", 6),
    (train.RunFolder, "save_epoch", 2),
    (train.RunFolder, "finish", 1),
    (log.Log, "flushed_sizes", 6),
    (train.Progress, "take_scalars", 5),
    (train.Distiller, "launch", 10),
    (checkpointing, "write", 6),
    (run_folder, "save_weights", 8),
]


def at_a_moment(rng: random.Random, action: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """Choose one of MOMENTS: see at_a_moment_of."""
    return at_a_moment_of(rng, MOMENTS, action)


def at_a_moment_of(
    rng: random.Random, moments: Sequence[tuple], action: Callable[[], None]
) -> tuple[Callable[[], None], str]:
    """Choose a moment of a run: (hook that makes a forked run act then, the moment's name)."""
    owner, name, num_calls = rng.choice(moments)
    number = rng.randint(1, num_calls)

    def prepare() -> None:
        kept, calls = getattr(owner, name), []

        def hooked(*arguments, **options):
            calls.append(1)
            if len(calls) == number:
                action()
            return kept(*arguments, **options)

        setattr(owner, name, hooked)

    return prepare, f"{owner.__name__}.{name} {number}"


def fill(disk: Path, num_left: int) -> None:
    """Fill the disk with a file, up to some bytes."""
    facts = os.statvfs(disk)
    num_bytes = facts.f_bavail * facts.f_frsize - num_left
    if num_bytes > 0:
        with open(disk / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)


def fill_in_a_run(bench, place: Path) -> None:
    """Let another program fill the disk at some moment of a run, then free space and resume."""
    num_left = bench.rng.randrange(bench.rng.choice([1, 30_000, 300_000, 1_800_000]))
    claims = bench.rng.random() < 0.7
    prepare, moment = at_a_moment(bench.rng, lambda: fill(place.parent, num_left))
    preparations = [prepare, claim_room] if claims else [prepare]
    what = f"{num_left} bytes left at {moment}{', room claimed' if claims else ''}"
    disturbed_run(
        bench,
        place / "run",
        preparations,
        what,
        lambda: (place.parent / "ballast").unlink(missing_ok=True),
    )


def disturbed_run(
    bench, run: Path, preparations: Sequence, what: str, repair: Callable[[], None]
) -> None:
    """Run until refused or done; repair the cause, resume, and compare."""
    kind = bench.rng.choice(KINDS)
    whole, flags = reference(bench, kind), bench.world.flags(kind, run, **FLAGS, keep_checkpoints=2)

    def disturbed() -> None:
        for prepare in preparations:
            prepare()
        training(flags)()

    ended = in_child(disturbed, bench.folder / "log-run")
    has_begun = " Training " in ended.text  # after the first checkpoint
    for problem in refusal_problems(ended, run, has_begun) if ended.status else []:
        bench.fail(f"{what}: {problem}")
    repair()
    if ended.status:
        bench.note(f"a disturbed run was refused {'on its way' if has_begun else 'at its start'}")
        mode = ["--resume"] if has_begun else ["--resume", "auto"]
        again = in_child(training([*flags, *mode]), bench.folder / "log-again")
        if again.status != 0:
            bench.fail(f"{what}: gone on with {mode}: {again}")
    for problem in differences(whole, run):
        bench.fail(f"{what}: {problem}")


def refusal_problems(ended: Ended, run: Path, has_begun: bool) -> list[str]:
    """List the problems of how a run gave up and of what it left."""
    problems = [] if ended.status == 2 else [str(ended)]
    problems += [f"a traceback: {ended.text[-1500:]}"] if "Traceback" in ended.text else []
    if len(ended.errors) != 1 or str(run.parent.parent) not in ended.errors[0]:
        problems.append(f"expected one line that names a path: {ended.errors}")
    elif re.search(r"step-\d{8}", ended.errors[0]) and not re.search(BYTES, ended.errors[0]):
        problems.append(f"the line does not say how many bytes: {ended.errors}")
    left = [
        path.name
        for path in run.rglob("*")
        if path.name.endswith(".tmp") or path.name.startswith(".export-")
    ]
    problems += [f"left {left}"] if left else []
    try:
        if found_step(run / "checkpoints") is None and has_begun:
            problems.append("there is no checkpoint")
    except InputError as error:
        problems.append(f"the old checkpoint is not intact: {error}")
    return problems


def read_only_write(bench, place: Path) -> None:
    """Save into a read-only folder."""
    folder = place / "checkpoints"
    for step in (1, 2):
        write(folder, step)
    with read_only(place):
        problem, step = write_until_refused(folder, TENSORS, 2)
    if not re.search(rf"Read-only file system: .*{folder}.* \({BYTES}\)", problem):
        bench.fail(f"read-only: {problem}")
    for wrong in left_by_refusal(folder, step):
        bench.fail(f"read-only: {wrong}")


def read_only_resume(bench, place: Path) -> None:
    """Resume, or start anew, in a read-only folder."""
    kind, run = bench.rng.choice(KINDS), place / "run"
    whole, flags = reference(bench, kind), bench.world.flags(kind, run, **FLAGS)
    cut_short(bench, whole, run)
    before = contents(place)
    for mode in (["--resume"], ["--resume", "auto"], ["--force"]):
        with read_only(place):
            ended = in_child(training([*flags, *mode]), bench.folder / "log")
        for problem in refusal_problems(ended, run, True):
            bench.fail(f"read-only, {mode}: {problem}")
        if contents(place) != before:
            bench.fail(f"read-only, {mode}: files were changed")
    again = in_child(training([*flags, "--resume"]), bench.folder / "log-again")
    for problem in ([str(again)] if again.status else []) + differences(whole, run):
        bench.fail(f"read-only, then not any more: {problem}")


def read_only_run(bench, place: Path) -> None:
    """Make the run's folder, or its checkpoints' folder, read-only at some moment."""
    run = place / "run"
    target = bench.rng.choice([run, run / "checkpoints"])

    def lock() -> None:
        if target.exists():
            make_read_only(target)

    def unlock() -> None:
        subprocess.run(["umount", "--lazy", str(target)], check=False, capture_output=True)

    prepare, moment = at_a_moment(bench.rng, lock)
    disturbed_run(bench, run, [prepare], f"{target.name} read-only at {moment}", unlock)


READ_ONLY = [read_only_write, read_only_run, read_only_resume, read_only_run]


def fill_a_file(bench) -> None:
    """Where mounting is not allowed: limit the file size below a checkpoint's."""
    folder = bench.folder / "checkpoints"
    tensors = big_tensors(bench.rng, 1_500_000)
    checkpointing.write(folder, 1, tensors, {}, 100)
    limit = bench.rng.randrange(20_000, 700_000)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpointing.write(folder, 2, tensors, {}, 100)

    ended = in_child(limited, bench.folder / "log")
    if ended.status != 2 or not re.search(
        rf"File too large: .*step-\d+.* \({BYTES}\)", "".join(ended.errors)
    ):
        bench.fail(f"no file above {limit} bytes: {ended}")
    for wrong in left_by_refusal(folder, 1):
        bench.fail(f"no file above {limit} bytes: {wrong}")
