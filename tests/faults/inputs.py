"""Trials of user input: data of any size, targets of --force, corpora, arguments and environments.

Called by scripts/fault_injection.py (T14, T21, T22, T24). Programs that could do harm run in a
forked process: a guard ends it, and reports it, at any attempt to make, change or delete a file
outside the trial's folder.
"""

import contextlib
import csv
import ctypes
import dataclasses
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import huggingface_hub.constants
import hypothesis
import numpy as np
from faults.forked import end_of, fork_program
from hypothesis import strategies as st
from stand_ins import POSITIONS, ROOT, model_facts

import binarized_data
import extract
import extract_distilbert
import inspect_data
import prepare_text
import token_counts
import train
from distil.data.token_files import MIN_LENGTH, open_token_file
from distil.models.architectures import architecture_named
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizer_rules import tokenizer_facts
from distil.models.tokenizers import load_tokenizer
from grouped_batch_sampler import GroupedBatchSampler, Update
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError, one_line, run_program

KINDS = ("bert", "roberta", "gpt2")
LIMIT_S = 10  # a program that takes longer has hung
MAX_FAILURES = 5  # of one call


def generate(
    bench, num: int, strategy: st.SearchStrategy, check: Callable, *, shrinks: bool = False
) -> None:
    """Call check(value) for `num` values; record failed assertions.

    With `shrinks` the first failure ends the call, reduced to a small example.
    """
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(bench.folder / "hypothesis")
    phases = [hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * shrinks]

    @hypothesis.seed(bench.rng.getrandbits(64))
    @hypothesis.settings(
        max_examples=num,
        database=None,
        deadline=None,
        derandomize=False,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def example(value):
        bench.count(1)
        try:
            check(value)
        except AssertionError as error:
            if shrinks:
                raise
            if len(bench.failures) < MAX_FAILURES:
                bench.fail(f"{error} -- {one_line(ascii(value), 600)}")

    try:
        example()
    except AssertionError as error:
        bench.fail(f"{error} -- {one_line(' '.join(getattr(error, '__notes__', [])), 600)}")


# --------------------------------------------------------------------------------------------------
# Programs in forked processes
# --------------------------------------------------------------------------------------------------

LIBRARIES_CACHE = os.path.expanduser("~/.cache/huggingface")  # where datasets caches tables
GUARDED = 99  # status of a process that the guard has ended
CHANGES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
    "open": (0,),
}
FOLDER_DESCRIPTOR = {
    "os.rename": (2, 3),
    "os.remove": (1,),
    "os.rmdir": (1,),
    "os.mkdir": (2,),
    "os.link": (2, 3),
    "os.symlink": (2,),
    "os.chmod": (2,),
    "shutil.rmtree": (1,),
}


def keep_inside(folder: Path) -> None:
    """End this process at any later attempt to make, change or delete a file outside `folder`.

    Python's folder for temporary files is no harm: where TMPDIR can't be used, the system's.
    """
    folder = os.path.realpath(folder)
    inside = f"{folder}/", LIBRARIES_CACHE, f"{os.path.realpath(tempfile.gettempdir())}/"

    def look(event: str, arguments: tuple) -> None:
        for place in changed_places(event, arguments):
            is_harmless = place == os.devnull or (event == "os.mkdir" and os.path.isdir(place))
            is_harmless |= event == "open" and place == folder  # a file without a name
            if not place.startswith(inside) and not is_harmless:
                os.write(2, f"guard: {event} {ascii(place)} is outside\n".encode())
                os._exit(GUARDED)

    sys.dont_write_bytecode = True
    sys.addaudithook(look)


def changed_places(event: str, arguments: tuple) -> list[str]:
    """List the absolute names that an audited call would change, links resolved."""
    if event == "open" and not (arguments[2] or 0) & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    ):
        return []
    descriptors = [arguments[k] for k in FOLDER_DESCRIPTOR.get(event, ()) if k < len(arguments)]
    places = []
    for number, index in enumerate(CHANGES.get(event, ())):
        if isinstance(path := arguments[index], str | bytes | os.PathLike):
            in_folder = descriptors[min(number, len(descriptors) - 1)] if descriptors else None
            base = (
                os.getcwd()
                if in_folder in (None, -1)
                else os.readlink(f"/proc/self/fd/{in_folder}")
            )
            places.append(place_of(os.path.join(base, os.fsdecode(path))))
    return places


def place_of(path: str) -> str:
    """Resolve the folder of a name; the name's last part only where it ends in a slash."""
    head, tail = os.path.split(path)
    return (
        os.path.realpath(path)
        if tail in ("", ".", "..")
        else os.path.join(os.path.realpath(head), tail)
    )


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a program: exit status (None: hung, negative: the signal) and output."""

    status: int | None
    printed: str

    @property
    def errors(self) -> list[str]:
        """The problems in its error lines."""
        return [line for line in self.printed.splitlines() if ": error: " in line]

    def last_lines(self) -> str:
        """The end of its output, on one line."""
        return f"status {self.status}: {ascii(' | '.join(self.printed.splitlines()[-3:]))[-600:]}"


def run_forked(
    main: Callable,
    argv: Sequence[str],
    folder: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] = lambda: None,
    encoding: str = "utf-8",
) -> Ended:
    """Run a program's main in a forked process, which may change files in `folder` only."""
    with tempfile.TemporaryFile(dir=folder) as output:

        def set_up() -> None:
            _prepare_child(folder, cwd, environment or {}, output.fileno(), encoding)
            prepare()

        status = end_of(fork_program(set_up, lambda: main(list(argv))), LIMIT_S)
        output.seek(0)
        return Ended(status, output.read().decode(errors="replace"))


def _prepare_child(folder, cwd, environment, output: int, encoding: str) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    options = {"errors": "backslashreplace", "closefd": False}
    sys.stderr = open(2, "w", encoding=encoding, **options)  # noqa: SIM115
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # never query the hub for a random name
    tempfile.tempdir = None
    for name in [name for name in os.environ if name in LAUNCHER_VARIABLES]:
        del os.environ[name]
    os.environ |= {"HOME": str(cwd), "TMPDIR": str(cwd), **environment}
    os.chdir(cwd)
    keep_inside(folder)


def run_here(main: Callable, argv: Sequence[str]) -> Ended:
    """Run a program's main in this process."""
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            run_program(lambda: main(list(argv)))
        except SystemExit as end:
            status = end.code
        except BaseException:  # a panic of the tokenizers library is no Exception
            status = 1
            traceback.print_exc()
    return Ended(status, printed.getvalue())


def check_ended(ended: Ended) -> None:
    """Assert that a program ended, with success or with one line a problem."""
    assert ended.status is not None, f"hung for more than {LIMIT_S} s; {ended.last_lines()}"
    assert "Traceback" not in ended.printed, f"traceback; {ended.last_lines()}"
    is_non_finite = ended.status == 1 and " ERROR   Stopped: " in ended.printed
    assert ended.status in (0, 2) or is_non_finite, ended.last_lines()
    if ended.status == 2:
        lines = [line for line in ended.printed.splitlines() if line.strip()]
        behind = list(itertools.dropwhile(lambda line: ": error: " not in line, lines))
        assert behind, f"no error line; {ended.last_lines()}"
        assert behind == ended.errors, f"an error of several lines; {ended.last_lines()}"


# --------------------------------------------------------------------------------------------------
# T14: the plan of micro-batches
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlanCase:
    """A run's data and its division.

    room: max_tokens minus the longest sequence's length; None: no max_tokens.
    """

    num_sequences: int
    length_bounds: tuple[int, int]
    spare_length: int
    batch_size: int
    is_grouped: bool
    room: int | None
    seed: int
    accumulation: int
    world_size: int
    num_epochs: int
    num_more: int  # micro-batches of an epoch that --max_steps breaks off
    position: int

    def lengths(self) -> np.ndarray:
        low, high = sorted(self.length_bounds)
        return (
            np.random.default_rng(self.seed)
            .integers(low, high + 1, self.num_sequences)
            .astype(np.int32)
        )

    def max_tokens(self) -> int | None:
        return (
            None
            if self.room is None or not self.is_grouped
            else int(self.lengths().max()) + self.room
        )

    def sampler(self) -> GroupedBatchSampler:
        """Make a new sampler, as every process and every resumed run does."""
        lengths = self.lengths()
        max_length = int(lengths.max()) + self.spare_length
        return GroupedBatchSampler(
            lengths,
            self.batch_size,
            max_length,
            group_by_size=self.is_grouped,
            seed=self.seed,
            max_tokens=self.max_tokens(),
        )

    def num_micro_batches(self) -> int:
        num = len(self.sampler())
        return num * self.num_epochs + self.num_more % num

    def updates(self, rank: int, world_size: int, accumulation: int) -> list[Update]:
        return list(
            self.sampler().updates(self.num_micro_batches(), accumulation, rank, world_size)
        )


PLAN_CASES = st.builds(
    PlanCase,
    num_sequences=st.integers(1, 400),
    length_bounds=st.tuples(*[st.integers(12, 64)] * 2),
    spare_length=st.sampled_from([0, 1, 2, 3, 448]),
    batch_size=st.integers(1, 17),
    is_grouped=st.booleans(),
    room=st.none() | st.integers(0, 1000),
    seed=st.integers(0, 2**40),
    accumulation=st.integers(1, 5),
    world_size=st.integers(1, 4),
    num_epochs=st.integers(1, 3),
    num_more=st.integers(0, 400),
    position=st.integers(0, 1200),
)


def plans(bench) -> None:
    """T14: plan runs of any size for any number of ranks."""
    generate(bench, 100, PLAN_CASES, check_plan, shrinks=True)


def check_plan(case: PlanCase) -> None:
    """Assert all properties of a plan."""
    of_rank = [
        case.updates(rank, case.world_size, case.accumulation) for rank in range(case.world_size)
    ]
    planned = [batch for update in of_rank[0] for batch in update.planned]
    check_batches(case, planned)
    check_epochs(case, planned)
    check_shares(case, of_rank)
    alone = case.updates(0, 1, case.accumulation * case.world_size)
    assert keys_of(alone) == keys_of(of_rank[0]), (
        "one rank at A x W plans other updates than W ranks at A"
    )
    check_resumed(case, of_rank)


def key_of(batch) -> tuple:
    return batch.number, batch.epoch, tuple(batch.sequences.tolist())


def keys_of(updates: Sequence[Update], name: str = "planned") -> list[list[tuple]]:
    return [[key_of(batch) for batch in getattr(update, name)] for update in updates]


def check_batches(case: PlanCase, planned: list) -> None:
    """Assert that micro-batches are numbered in order, of the right size and within the budget."""
    lengths, num = case.lengths(), len(case.sampler())
    assert [batch.number for batch in planned] == list(range(case.num_micro_batches())), (
        "numbers are not 0, 1, .."
    )
    assert [batch.epoch for batch in planned] == [
        number // num for number in range(len(planned))
    ], "wrong epochs"
    sizes = [len(batch.sequences) for batch in planned]
    assert min(sizes) > 0, "an empty micro-batch"
    if case.max_tokens() is None:
        assert max(sizes) <= case.batch_size, "a micro-batch of more than batch_size"
        assert num == math.ceil(case.num_sequences / case.batch_size), (
            f"{num} micro-batches an epoch"
        )
    else:
        padded = [len(batch.sequences) * int(lengths[batch.sequences].max()) for batch in planned]
        assert max(padded) <= case.max_tokens(), (
            f"{max(padded)} padded tokens, more than {case.max_tokens()}"
        )


def check_epochs(case: PlanCase, planned: list) -> None:
    """Assert that each epoch holds every sequence once, in another order than the others."""
    orders = []
    for epoch in range(case.num_epochs):
        order = np.concatenate([batch.sequences for batch in planned if batch.epoch == epoch])
        assert sorted(order.tolist()) == list(range(case.num_sequences)), (
            f"epoch {epoch} is not every sequence once"
        )
        orders.append(order.tolist())
    broken_off = [
        sequence
        for batch in planned
        if batch.epoch == case.num_epochs
        for sequence in batch.sequences.tolist()
    ]
    assert len(set(broken_off)) == len(broken_off), (
        "a sequence twice in an epoch that was broken off"
    )
    if num_orders_log(case) > math.log(1e12):  # else chance alone may give one twice
        assert len({tuple(order) for order in orders}) == len(orders), "two epochs have one order"


def num_orders_log(case: PlanCase) -> float:
    """Bound the log of the number of distinct orders from below: the orders within each group."""
    groups = (case.lengths() + 1) // 4 if case.is_grouped else np.zeros(case.num_sequences, int)
    return sum(math.lgamma(count + 1) for count in np.bincount(groups).tolist())


def check_shares(case: PlanCase, of_rank: list[list[Update]]) -> None:
    """Assert that ranks plan alike and divide the update evenly, without overlap."""
    assert all(keys_of(updates) == keys_of(of_rank[0]) for updates in of_rank), (
        "ranks plan different updates"
    )
    for shares in zip(*of_rank, strict=True):
        numbers = [batch.number for update in shares for batch in update.mine]
        assert sorted(numbers) == [batch.number for batch in shares[0].planned], (
            "the shares are not the update, each once"
        )
        counts = [len(update.mine) for update in shares]
        assert max(counts) - min(counts) <= 1, f"shares of {counts} micro-batches"
    whole = case.accumulation * case.world_size
    assert all(len(update.planned) == whole for update in of_rank[0][:-1]), (
        "an update before the last is not whole"
    )


def check_resumed(case: PlanCase, of_rank: list[list[Update]]) -> None:
    """Assert that a run resumed at an update continues as the uninterrupted one, on every rank."""
    position = case.position % len(of_rank[0])
    first = of_rank[0][position].planned[0]
    place = first.number % len(case.sampler())
    assert key_of(first)[2] == tuple(case.sampler().epoch_batches(first.epoch)[place].tolist()), (
        "another batch after resume"
    )
    for rank, updates in enumerate(of_rank):
        resumed = resumed_updates(case, rank, position, first.number)
        for name in ("planned", "mine"):
            assert keys_of(resumed, name) == keys_of(updates[position:], name), (
                f"after resume others are {name}"
            )


def resumed_updates(case: PlanCase, rank: int, position: int, number: int) -> list[Update]:
    """Plan the updates from this micro-batch number on, as a new process does."""
    sampler = case.sampler()
    arguments = case.num_micro_batches(), case.accumulation, rank, case.world_size
    if "first" in inspect.signature(sampler.updates).parameters:
        return list(sampler.updates(*arguments, first=number))
    return list(sampler.updates(*arguments))[position:]


# --------------------------------------------------------------------------------------------------
# T21: --force
# --------------------------------------------------------------------------------------------------

REFUSED, MOVED, MADE, KEPT = "refused", "moved aside", "made", "nothing lost"
OLD = re.compile(r"\.old-\d{8}-\d{6}(-\d+)?")


class Arena:
    """A folder with a user's files, in which one target of --force is made and tried."""

    def __init__(self, folder: Path, world):
        self.folder, self.world = folder, world
        self.home, self.cwd = folder / "home", folder / "work"
        self.changes: dict[str, str] = {}
        self.movable: set[str] = set()  # what may be moved aside
        self.prepare: Callable[[], None] = lambda: None
        for place in (self.home, self.cwd):
            self.foreign(place.name)
        (folder / "tmp").mkdir()
        self.first_run = folder / "first"
        ended = self.train(str(self.first_run))
        assert ended.status == 0, f"the run to be replaced failed: {ended.last_lines()}"

    def train(self, name: str, **changes) -> Ended:
        """Train for one update into a folder."""
        flags = self.world.flags(
            "bert", name, max_steps=1, gradient_accumulation_steps=1, batch_size=4, **changes
        )
        environment = {"HOME": str(self.home), "TMPDIR": str(self.folder / "tmp")}
        return run_forked(
            train.main,
            flags,
            self.folder,
            cwd=self.cwd,
            environment=environment,
            prepare=self.prepare,
        )

    def foreign(self, name: str, *files: str) -> str:
        """Make a folder of a user's files."""
        for file in ("thesis.txt", "photos/cat.jpg", *files):
            (self.folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name / file).write_text(f"{name}/{file} of years\n")
        self.movable |= {name} if files else set()
        return str(self.folder / name)

    def run(self, name: str, *files: str) -> str:
        """Make a run's folder with some of the user's files in it."""
        shutil.copytree(self.first_run, self.folder / name, dirs_exist_ok=True)
        for file in files:
            (self.folder / name / file).write_text("mine\n")
        self.movable.add(name)
        return str(self.folder / name)

    def holding(self, flag: str, path: str, through: str = "") -> str:
        """Make a run's folder with a copy of an input in it, named by its flag.

        through: the flag names a link to it.
        """
        folder = self.run("holding")
        self.movable.clear()
        place = Path(folder) / Path(path).name
        if os.path.isdir(path):
            shutil.copytree(path, place)
        else:
            shutil.copy(path, place)
        self.changes[flag] = str(place)
        if through:
            self.changes[flag] = f"{self.link(through, folder)}/{place.name}"
        return folder

    def holding_store(self, suffix: str) -> str:
        """Make a run's folder with a store in it, named by its prefix and a suffix."""
        folder = self.run("holding")
        self.movable.clear()
        argv = [
            "--file_path",
            str(self.world.text),
            "--tokenizer_name",
            str(self.world.teachers["bert"]),
            "--num_workers",
            "1",
        ]
        ended = run_forked(
            binarized_data.main,
            [*argv, "--format", "store", "--dump_file", f"{folder}/data"],
            self.folder,
            cwd=self.cwd,
        )
        assert ended.status == 0, ended.last_lines()
        self.changes["data_file"] = f"{folder}/data.tiny-bert{suffix}"
        return folder

    def link(self, name: str, target: str) -> str:
        """Make a link; of a link to a run's folder only the link is moved."""
        os.symlink(target, self.folder / name)
        behind = os.path.relpath(target, self.folder)
        if behind in self.movable:
            self.movable ^= {behind, name}
        return str(self.folder / name)

    def around(self, spelling: str) -> str:
        """Make a run's folder behind a link and "..", where the plain path is a user's folder."""
        self.foreign("run")
        self.run("elsewhere/run")
        self.link("link", self.foreign("elsewhere/place"))
        return str(self.folder / f"link/../{spelling}")

    def standing_in(self, folder: str, name: str) -> str:
        self.cwd = Path(folder)
        return name

    def at_home(self, folder: str) -> str:
        self.home = Path(folder)
        return folder

    def file(self, name: str) -> str:
        (self.folder / name).write_text("mine\n")
        return str(self.folder / name)

    def empty(self, name: str) -> str:
        (self.folder / name).mkdir()
        self.movable.add(name)
        return str(self.folder / name)

    def in_read_only(self, name: str) -> str:
        """Make a run's folder in a folder that is not writable, not even by root."""
        path = self.run(f"closed/{name}")
        os.chmod(self.folder / "closed", 0o555)
        self.prepare = drop_privileges
        return path


def drop_privileges() -> None:
    """Give up every capability, so that permissions hold for this process even as root."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


@dataclasses.dataclass(frozen=True)
class Target:
    """A target of --force. ends: the expected end; make: (arena, spelling) -> --dump_path."""

    ends: str
    make: Callable[[Arena, str], str]
    spellings: tuple[str, ...] = ("",)


TARGETS = [
    Target(REFUSED, lambda a, s: s, ("/", "//", "/.")),
    Target(MADE, lambda a, s: s, ("~", "~/")),  # no shell expands it here: a folder of that name
    Target(REFUSED, lambda a, s: a.at_home(a.run("user", "letter.txt")) + s, ("", "/")),
    Target(REFUSED, lambda a, s: a.standing_in(a.run("run"), s), (".", "./", "../run")),
    Target(
        REFUSED, lambda a, s: a.standing_in(a.run("run") + "/log", s), ("..", "../", "../../run")
    ),
    Target(REFUSED, lambda a, s: str(ROOT) + s, ("", "/")),
    Target(REFUSED, lambda a, s: str(ROOT.parent) + s, ("", "/")),
    Target(REFUSED, lambda a, s: a.link("link", a.foreign("foreign")) + s, ("", "/", "//", "/.")),
    Target(MOVED, lambda a, s: a.link("link", a.run("run")) + s, ("", "/", "//", "/.")),
    Target(MOVED, lambda a, s: a.around(s), ("run", "run/", "place/../run")),
    Target(REFUSED, lambda a, s: a.link("link", str(a.folder / "nowhere")) + s, ("", "/")),
    Target(REFUSED, lambda a, s: a.foreign("foreign") + s, ("", "/")),
    Target(
        KEPT,
        lambda a, s: a.foreign("foreign", *s.split()),
        (
            "checkpoint.pth",
            "parameters.json",
            "checkpoint.pth .lock",
            "checkpoints/step-3",
            "log",
            "config.json",
        ),
    ),
    Target(REFUSED, lambda a, s: a.holding("data_file", a.world.data("bert"), s), ("", "link")),
    Target(REFUSED, lambda a, s: a.holding_store(s), ("", ".bin", ".idx", ".json")),
    Target(
        REFUSED, lambda a, s: a.holding("student_config", a.world.config("bert"), s), ("", "link")
    ),
    Target(
        REFUSED, lambda a, s: a.holding("token_counts", a.world.counts("bert"), s), ("", "link")
    ),
    Target(
        REFUSED,
        lambda a, s: a.holding("student_pretrained_weights", a.world.first_weights("bert"), s),
        ("", "link"),
    ),
    Target(
        REFUSED,
        lambda a, s: a.holding("teacher_name", str(a.world.teachers["bert"]), s),
        ("", "link"),
    ),
    Target(REFUSED, lambda a, s: str(Path(a.run("runs/run")).parent) + s, ("", "/")),
    Target(REFUSED, lambda a, s: a.file("file") + s, ("", "/")),
    Target(MADE, lambda a, s: a.empty("empty") + s, ("", "/")),
    Target(MOVED, lambda a, s: a.run("run") + s, ("", "/", "//", "/../run", "/.")),
    Target(KEPT, lambda a, s: a.run("run", "letter.txt") + s, ("", "/")),
    Target(REFUSED, lambda a, s: a.in_read_only("run") + s, ("", "/", "/deeper/../../new")),
    Target(REFUSED, lambda a, s: s, ("/tmp", "/tmp/", "/usr", "/etc")),
    Target(
        REFUSED,
        lambda a, s: s,
        ("/proc", "/proc/self/cwd", "/dev", "/dev/null", "/dev/null/run", "/sys"),
    ),
    Target(REFUSED, lambda a, s: s, ("", "a\0b", "\0")),
    Target(REFUSED, lambda a, s: s, ("x" * 300, "x/" * 3000, f"new/{'x' * 300}")),
    Target(
        REFUSED,
        lambda a, s: s + Path(a.foreign("foreign")).name,
        ("../work/../", "../home/../work/photos/../../"),
    ),
]


def snapshot(folder: Path) -> dict[str, str]:
    """List all below a folder: relative name -> content; SHA-256 of files, targets of links."""
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (os.path.join(place, name) for name in folders + files):
            if os.path.islink(path):
                what = f"-> {os.readlink(path)}"
            else:
                what = "folder" if os.path.isdir(path) else content_of(Path(path))
            found[os.path.relpath(path, folder)] = what
    return found


def content_of(path: Path) -> str:
    """Return a file's SHA-256; for a run's lock, which each run rewrites, a constant."""
    content = path.read_bytes()
    return (
        "lock"
        if path.name == ".lock" and b'"pid"' in content
        else hashlib.sha256(content).hexdigest()
    )


def forced(bench) -> None:
    """T21: point --force at a target in every spelling, and check the files around it."""
    target = TARGETS[bench.number % len(TARGETS)]
    for number, spelling in enumerate(target.spellings):
        bench.count(1)
        folder = bench.folder / str(number)
        folder.mkdir()
        arena = Arena(folder, bench.world)
        name = target.make(arena, spelling)
        before = snapshot(folder)
        ended = arena.train(name, force=True, **arena.changes)
        for problem in harm(target.ends, arena.movable, before, snapshot(folder), ended):
            bench.fail(
                f"--dump_path {ascii(name)[:200]} (expected: {target.ends}): {problem};"
                f" {ended.last_lines()}"
            )


def harm(
    ends: str, movable: set[str], before: dict[str, str], after: dict[str, str], ended: Ended
) -> list[str]:
    """List the harm: lost files, moved folders that are not a run's, another end than expected."""
    problems = [f"lost {name}" for name in lost(before, after)[:3]]
    moved = {OLD.sub("", name) for name in after if OLD.search(Path(name).name)}
    problems += [f"moved {name} aside" for name in moved - movable]
    is_new = any(name not in before and what != "folder" for name, what in after.items())
    is_right = {
        REFUSED: not moved and not is_new,
        MADE: is_new and not moved,
        MOVED: is_new and moved,
        KEPT: True,
    }
    if not is_right[ends]:
        problems.append(f"moved {sorted(moved)}, {'some' if is_new else 'no'} new files")
    if ended.status not in {REFUSED: (2,), KEPT: (0, 2)}.get(ends, (0,)) or (
        ended.status == 2 and len(ended.errors) != 1
    ):
        problems.append(f"{len(ended.errors)} error lines")
    return problems


def lost(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """List files that are neither unchanged in place nor in a folder that was moved aside."""
    remaining: dict[str, set[str]] = {}
    for name, what in after.items():
        for known in (name, OLD.sub("", name)):
            remaining.setdefault(known, set()).add(what)
    return [name for name, what in before.items() if what not in remaining.get(name, ())]


# --------------------------------------------------------------------------------------------------
# T22: corpora
# --------------------------------------------------------------------------------------------------

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINE_ENDS = ("\n", "\r\n", "\r")
FILE_NAMES = ("corpus", "two words", "[1]", "üñï-語", "-x", "%s", "a.b", "#?&")
ODD_TEXTS = (
    "",
    " ",
    "\t",
    "\0",
    "\0" * 20,
    "\ufeff",
    "\u2028",
    "\u0085",
    "\u00a0",
    "\u200b",
    "\u202eabc\u202c",
    "e\u0301" * 9,
    "\u0301",
    "\U0001f469\u200d\U0001f680",
    "\U0001f1e9",
    "שלום עולם",
    "مرحبا",
    "語" * 40,
    "ﬀ",
    "İ",
    "ß",
    "\x7f",
    "\x1b[31m",
    "\x1c",
    "\x0b",
    "\x0c",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "\ue000",
    "[CLS]",
    "[SEP] [PAD]",
    "[MASK]" * 3,
    "[UNK]",
    "<s>",
    "</s><pad>",
    "<mask>",
    "<unk>",
    "<|endoftext|>",
    "Ġ",
    "Ġba",
    "##ba",
    ";",
    " ; ",
    "a" * 300,
    '"',
    '""',
    ",",
    "\\",
    "{}",
)
BAD_BYTES = (
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80",
    b"\xc0\x80",
    b"\xe2\x82",
    b"\x80",
    b"\xf4\x90\x80\x80",
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text file.

    num_texts: texts that are not blank; bad_line: the first faulty line; None: unknown, or none.
    """

    name: str
    data: bytes
    kind: str = "bert"
    file_format: str = "pickle"
    errors: str = "strict"
    num_texts: int | None = None
    bad_line: int | None = None
    must_fail: bool = False

    def __repr__(self) -> str:
        what = (
            f"{self.name!r}, {self.kind}, {self.file_format}, --errors {self.errors},"
            f" {len(self.data)} bytes"
        )
        return f"Corpus({what}: {self.data[:300]!r})"


@st.composite
def texts(draw) -> list[str]:
    """Make texts: plain, odd, and of random characters."""
    words = st.lists(
        st.sampled_from(["ba", "ke", "Dafi", "vuze", "limo", *ODD_TEXTS]), max_size=40
    ).map(" ".join)
    plain = st.lists(st.sampled_from(["ba", "ke", "Dafi", "vuze"]), min_size=15, max_size=90).map(
        " ".join
    )
    one = (
        plain
        | plain
        | words
        | st.sampled_from(ODD_TEXTS)
        | st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
    )
    return draw(st.lists(one, min_size=draw(st.sampled_from([0, 1, 4])), max_size=12))


@st.composite
def line_files(draw) -> dict:
    """Make a file with one text a line, or a file without text."""
    parts = [text.encode() + draw(st.sampled_from(LINE_ENDS)).encode() for text in draw(texts())]
    parts = [draw(st.sampled_from([b"", b"", BYTE_ORDER_MARK])), *parts]
    for bad in draw(st.one_of(st.just([]), st.lists(st.sampled_from(BAD_BYTES), max_size=2))):
        parts.insert(draw(st.integers(0, len(parts))), bad)
    data = b"".join(parts)
    data = data[:-1] if draw(st.booleans()) else data
    data = draw(st.one_of(*[st.just(data)] * 8, st.just(recoded(data)), st.binary(max_size=200)))
    errors = draw(st.sampled_from(["strict", "strict", "skip", "replace"]))
    return {
        "suffix": draw(st.sampled_from([".txt", "", ".text", ".dat"])),
        "data": data,
        "errors": errors,
        **by_hand(data, errors),
    }


def recoded(data: bytes) -> bytes:
    """Write text as UTF-16."""
    return data.decode("utf-8", "replace").encode("utf-16")


def by_hand(data: bytes, errors: str) -> dict:
    """Count a file's texts line by line, and find the first that is not UTF-8."""
    lines = re.split(rb"\r\n|\n|\r", data.removeprefix(BYTE_ORDER_MARK))
    bad = [number for number, line in enumerate(lines, start=1) if not is_utf8(line)]
    kept = [line for line in lines if errors != "skip" or is_utf8(line)]
    num_texts = sum(bool(line.decode("utf-8", "replace").strip()) for line in kept)
    return {"num_texts": num_texts, "bad_line": bad[0] if bad and errors == "strict" else None}


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@st.composite
def record_files(draw) -> dict:
    """Make a .jsonl with an invalid record here and there."""
    lines, good = [], draw(texts())
    for text in good:
        lines.append(json.dumps({"text": text}, ensure_ascii=draw(st.booleans())).encode())
    found = {"num_texts": sum(bool(text.strip()) for text in good), "bad_line": None}
    odd = [
        b"{",
        b"[]",
        b"3",
        b'{"text": 3}',
        b'{"other": "ba"}',
        b'{"text": ["ba"]}',
        b'{"text": "\\ud800"}',
        b"\xff",
        b"nul",
        b"[" * 9000,
        b'{"text": "\0"}',
        b'{"text": NaN}',
        b'"ba"',
        b'{"text": ' + b"1" * 5000 + b"}",
    ]
    if draw(st.integers(0, 2)) == 0:
        place = draw(st.integers(0, len(lines)))
        lines.insert(place, draw(st.sampled_from(odd)))
        found["bad_line"] = place + 1
    end = draw(st.sampled_from(LINE_ENDS)).encode()
    return {
        "suffix": draw(st.sampled_from([".jsonl", ".ndjson"])),
        "data": end.join(lines),
        **found,
    }


@st.composite
def table_files(draw) -> dict:
    """Make a .csv or .tsv, whole or cut off, or other bytes under such a name."""
    suffix, rows, table = (
        draw(st.sampled_from([".csv", ".tsv"])),
        draw(texts()),
        io.StringIO(newline=""),
    )
    if suffix == ".tsv":
        table.write(
            "".join(
                f"{text}\t3\n"
                for text in ["text", *[re.sub(r"[\t\n\r]", " ", text) for text in rows]]
            )
        )
    else:
        csv.writer(table).writerows(
            [
                ["number", draw(st.sampled_from(["text", "text", "Text"]))],
                *[[1, text] for text in rows],
            ]
        )
    data = table.getvalue().encode()
    cut = draw(st.one_of(st.none(), st.none(), st.integers(0, len(data))))
    data = draw(st.one_of(*[st.just(data[:cut])] * 5, st.binary(max_size=200)))
    return {"suffix": suffix, "data": data}


@st.composite
def json_files(draw) -> dict:
    """Make a .json: an array of records, or something else."""
    rows = draw(texts())
    whole = json.dumps([{"text": text} for text in rows], ensure_ascii=draw(st.booleans())).encode()
    if draw(st.booleans()):
        return {
            "suffix": ".json",
            "data": whole,
            "num_texts": sum(bool(text.strip()) for text in rows),
        }
    return {
        "suffix": ".json",
        "data": draw(
            st.sampled_from([whole[:-1], b"", b"[]", b"{}", b"3", b"\xff", b"[3]", b"nul"])
        ),
    }


@st.composite
def corpora_cases(draw) -> Corpus:
    """Make a corpus of any kind; some packed with gzip, some of these damaged."""
    made = draw(
        st.one_of(*[line_files()] * 5, *[record_files()] * 3, *[table_files()] * 2, json_files())
    )
    suffix, data = made.pop("suffix"), made.pop("data")
    must_fail = False
    packing = draw(st.sampled_from(["no"] * 6 + ["gz", "gz", "cut", "false"]))
    if packing != "no":
        suffix += ".gz"
        data = data if packing == "false" else gzip.compress(data, mtime=0)
        if packing == "cut":
            data = data[: draw(st.integers(0, len(data) - 1))]
        must_fail = packing in ("cut", "false")
        made |= {"num_texts": None, "bad_line": None} if must_fail else {}
    # datasets reads a bracket in a packed file's name as a network address, and raises.
    name = (
        draw(
            st.sampled_from(
                [name for name in FILE_NAMES if suffix != ".json.gz" or "[" not in name]
            )
        )
        + suffix
    )
    kind, file_format = draw(st.sampled_from(KINDS)), draw(st.sampled_from(["pickle", "store"]))
    return Corpus(name, data, kind, file_format, must_fail=must_fail, **made)


def long_line(number: int) -> Corpus:
    """Make a corpus with a line of 10 MB: of words, of one word, or of unknown characters."""
    word = ("ba ke ", "ba", "語")[number // 10 % 3].encode()
    line = word * (10_000_000 // len(word))
    return Corpus(
        "long.txt",
        b"\n".join([b"ba ke", line, b"ba ke"]),
        KINDS[number // 10 % 3],
        "store",
        num_texts=3,
    )


def corpora(bench) -> None:
    """T22: binarize possible text, count it, and open it as training does."""
    opened = {kind: facts_of(kind, str(folder)) for kind, folder in bench.world.teachers.items()}
    numbers = itertools.count()

    def check(corpus: Corpus) -> None:
        folder = bench.folder / f"{next(numbers)}"
        folder.mkdir()
        check_corpus(corpus, folder, str(bench.world.teachers[corpus.kind]), opened[corpus.kind])
        shutil.rmtree(folder)

    if bench.number % 10 == 0:
        bench.count(1)
        check(long_line(bench.number))
    generate(bench, 50, corpora_cases(), check)


def facts_of(kind: str, name: str) -> dict:
    """Return the facts of a tokenizer with which training opens a token file."""
    tokenizer = load_tokenizer(architecture_named(kind), name, "--teacher_name")
    special = special_ids(architecture_named(kind), tokenizer)
    return {
        "special": special,
        "vocab_size": len(tokenizer),
        "tokenizer": tokenizer_facts(tokenizer),
    }


def check_corpus(corpus: Corpus, folder: Path, teacher: str, facts: dict) -> None:
    """Assert that a corpus gives a sound token file, or an error naming it and no file."""
    path = folder / corpus.name
    path.write_bytes(corpus.data)
    argv = [
        "--file_path",
        str(path),
        "--tokenizer_type",
        corpus.kind,
        "--tokenizer_name",
        teacher,
        "--num_workers",
        "1",
        "--errors",
        corpus.errors,
        "--format",
        corpus.file_format,
        "--dump_file",
        str(folder / "out"),
    ]
    ended = run_here(binarized_data.main, argv)
    check_ended(ended)
    if ended.status == 2:
        check_refused(corpus, path, ended)
        return
    assert not corpus.must_fail and corpus.bad_line is None, f"succeeded, of line {corpus.bad_line}"
    prefix = folder / f"out.{Path(teacher).name}"
    written = f"{prefix}.pickle" if corpus.file_format == "pickle" else str(prefix)
    check_tokens(corpus, written, facts)
    counted = run_here(
        token_counts.main,
        [
            "--data_file",
            written,
            "--token_counts_dump",
            str(folder / "counts"),
            "--vocab_size",
            str(facts["vocab_size"]),
        ],
    )
    assert counted.status == 0, f"token_counts: {counted.last_lines()}"


def check_refused(corpus: Corpus, path: Path, ended: Ended) -> None:
    """Assert that the error names the file and the faulty line, and that no file is left."""
    assert sorted(os.listdir(path.parent)) == [path.name], (
        f"left behind: {sorted(os.listdir(path.parent))}"
    )
    assert all(str(path) in line for line in ended.errors), (
        f"the file is not named; {ended.last_lines()}"
    )
    if corpus.bad_line is not None:
        assert f"{path}:{corpus.bad_line}:" in ended.errors[0], (
            f"expected line {corpus.bad_line}; {ended.last_lines()}"
        )
    is_blank = corpus.num_texts == 0 or not corpus.data
    is_known = corpus.num_texts is not None and corpus.bad_line is None and not corpus.must_fail
    assert not is_known or is_blank, f"refused {corpus.num_texts} good texts; {ended.last_lines()}"


def check_tokens(corpus: Corpus, written: str, facts: dict) -> None:
    """Assert that a token file holds the corpus's texts and gives a sound dataset."""
    tokens = open_token_file(written)
    num = len(tokens.lengths_N)
    assert corpus.num_texts in (None, num), f"{num} sequences of {corpus.num_texts} texts"
    ids_M = tokens.ids_M[:]
    assert int(ids_M.max()) < facts["vocab_size"] and int(ids_M.min()) >= 0, (
        "an id outside the vocabulary"
    )
    try:
        teacher = model_facts(
            facts["vocab_size"],
            "--teacher_name t",
            facts["special"],
            POSITIONS,
            facts["tokenizer"],
        )
        dataset = LmSeqsDataset.from_file(written, teacher)
    except InputError as error:
        assert written in str(error) and "\n" not in str(error), f"the file is not named: {error}"
        return
    assert dataset.lengths.min() > MIN_LENGTH and dataset.lengths.max() <= POSITIONS, (
        "a length outside"
    )
    ids_BT, lengths_B = dataset.collate(range(min(len(dataset), 64)))
    assert int(ids_BT.min()) >= 0 and int(ids_BT.max()) < facts["vocab_size"], (
        "an id outside in a batch"
    )
    ends_B = ids_BT[range(len(ids_BT)), lengths_B - 1]
    assert (ids_BT[:, 0] == facts["special"].start).all() and (
        ends_B == facts["special"].end
    ).all(), "no boundary tokens"


# --------------------------------------------------------------------------------------------------
# T24: arguments and environment
# --------------------------------------------------------------------------------------------------

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "N_GPU_NODE",
    "N_NODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
)
OTHER_VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "PYTHONHASHSEED",
    "COLUMNS",
    "LINES",
    "TERM",
    "TZ",
    "USER",
    "TQDM_MININTERVAL",
    "TOKENIZERS_PARALLELISM",
)
NUMBERS = (
    "",
    " ",
    "0",
    "1",
    "2",
    "-1",
    "1.5",
    " 1",
    "1_0",
    "\u0661",
    "x",
    "9" * 25,
    "9" * 5000,
    "nan",
    "ü",
    "\udcff",
    "a" * 3000,
)
ADDRESSES = (
    "",
    " ",
    "127.0.0.1",
    "localhost",
    "::1",
    "127.0.0.1:80",
    "no such host",
    "256.1.1.1",
    "x" * 70,
    "\udcff",
    "ü",
)
ODD_NUMBERS = (
    "nan",
    "NaN",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "1e308",
    "3.5e38",
    "1e-45",
    "1e6",
    "1e3",
    "-0",
    "0",
    "-1",
    "1",
    "2",
    "11",
    "12",
    "0.5",
    "1.5",
    "0.999999",
    "1.0000001",
    "100000",
    "9" * 30,
    "9" * 5000,
    "-" + "9" * 30,
    "0x10",
    "1_0",
    " 1",
    "1\n",
    "\u0661",
    "½",
)
ODD_WORDS = (
    "",
    " ",
    "-",
    "--",
    "---",
    "true",
    "None",
    "[]",
    "%s",
    "%(default)s",
    "{0}",
    "$HOME",
    "?",
    "ü",
    "\u202e",
    "\U0001f917",
    "\udcff",
    "\0",
    "a\0b",
    "a\nb",
    "\r",
    "\x85",
    "bert",
    "gpt2",
    "roberta",
    "distilbert",
    "micro_batches",
    "tokens",
    "strict",
    "pickle",
    "whole",
    "auto",
    "--mlm",
    "-h",
    "@file",
    "a" * 5000,
)
ODD_PATHS = (
    "..",
    ".",
    "/",
    "~",
    "*",
    "[",
    "a/b",
    "a/b/c",
    "a/" * 3000,
    "x" * 300,
    "http://localhost/a",
    "/dev/null",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/etc/passwd",
    "text.txt",
    "text.txt/x",
    "empty",
    "folder",
    "folder/",
    "fifo",
    "loop",
    "dangling",
    "teacher.bert",
    "teacher.gpt2/",
    "teacher.roberta/config.json",
    "teacher.bert/model.safetensors",
    "data.bert.pickle",
    "data.gpt2.pickle",
    "data.roberta.pickle.json",
    "counts.bert.pickle",
    "counts.gpt2.pickle",
    "student.bert.json",
    "student.gpt2.json",
    "first.bert.pth",
    "first.gpt2.pth",
    "new/deep/er",
    "ü\udcff",
    "a\nb",
    "%s",
)
ODD_FLAGS = (
    "--",
    "-",
    "-h",
    "--help",
    "---x",
    "--no-force",
    "--force",
    "--no_such_flag",
    "--alpha_",
    "--mlm=1",
    "-1",
    "@file",
    "",
    "--\0",
    "--ü",
    "--fp16",
    "--bf16",
    "--activation_checkpointing",
    "--no-group_by_size",
    "--restrict_ce_to_mask",
    "--freeze_pos_embs",
    "--freeze_token_type_embds",
    "--n_gpu=0",
    "--local-rank=0",
    "--vocab_transform",
)
# Long runs and large batches are what the user asks for, not faults: these flags get no large
# values.
NOT_LARGE = ("--gradient_accumulation_steps", "--num_lines")
LAST = ["--max_steps=1"]  # of train.py: whatever came before, it ends at the first update


def programs() -> dict[str, tuple[Callable, Callable[[str], list[list[str]]]]]:
    """List the programs: name -> (main, kind -> a valid command line, flag by flag)."""
    masked = [
        ["--alpha_mlm", "2.0"],
        ["--alpha_clm", "0"],
        ["--mlm"],
        ["--token_counts", "counts.bert.pickle"],
    ]
    students = {"bert": "distilbert", "roberta": "roberta", "gpt2": "gpt2"}

    def training(kind: str) -> list[list[str]]:
        own = (
            [["--alpha_clm", "0.5"]]
            if kind == "gpt2"
            else [*masked[:-1], ["--token_counts", f"counts.{kind}.pickle"]]
        )
        return [
            ["--student_type", students[kind]],
            ["--student_config", f"student.{kind}.json"],
            ["--teacher_type", kind],
            ["--teacher_name", f"teacher.{kind}"],
            ["--data_file", f"data.{kind}.pickle"],
            ["--dump_path", "run"],
            ["--student_pretrained_weights", f"first.{kind}.pth"],
            ["--alpha_ce", "5.0"],
            ["--alpha_cos", "1.0"],
            *own,
            ["--batch_size", "4"],
            ["--gradient_accumulation_steps", "1"],
            ["--n_epoch", "1"],
            ["--seed", "7"],
            ["--learning_rate", "1e-3"],
            ["--warmup_prop", "0.1"],
            ["--temperature", "2"],
            ["--max_length", "40"],
            ["--max_tokens", "400"],
            ["--log_interval", "1"],
            ["--mlm_smoothing", "0.7"],
            ["--weight_decay", "0.1"],
            ["--max_grad_norm", "5"],
            ["--initializer_range", "0.02"],
            ["--loss_normalization", "tokens"],
        ]

    def extracting(kind: str) -> list[list[str]]:
        return [
            ["--model_type", kind],
            ["--model_name", f"teacher.{kind}"],
            ["--dump_checkpoint", "weights.pth"],
            ["--num_layers", "2"],
        ]

    return {
        "train": (train.main, training),
        "binarized_data": (
            binarized_data.main,
            lambda kind: [
                ["--file_path", "text.txt"],
                ["--tokenizer_type", kind],
                ["--tokenizer_name", f"teacher.{kind}"],
                ["--seed", "3"],
                ["--dump_file", "out"],
                ["--format", "store"],
                ["--num_workers", "1"],
                ["--errors", "skip"],
                ["--text_field", "text"],
                ["--token_counts_dump", "counts"],
                ["--vocab_size", "400"],
            ],
        ),
        "token_counts": (
            token_counts.main,
            lambda kind: [
                ["--data_file", f"data.{kind}.pickle"],
                ["--token_counts_dump", "counts"],
                ["--vocab_size", "400"],
            ],
        ),
        "inspect_data": (
            inspect_data.main,
            lambda kind: [
                [f"data.{kind}.pickle"],
                ["--tokenizer_type", kind],
                ["--tokenizer_name", f"teacher.{kind}"],
                ["--top", "3"],
                ["--num_sequences", "2"],
                ["--verify"],
                ["--json", "facts.json"],
            ],
        ),
        "prepare_text": (
            prepare_text.main,
            lambda kind: [
                ["--file_path", "text.txt"],
                ["--output", "prepared.txt"],
                ["--errors", "skip"],
                ["--documents", "line"],
                ["--max_chars", "300"],
                ["--min_chars", "5"],
                ["--by_language"],
                ["--sampling_exponent", "0.7"],
                ["--num_lines", "50"],
                ["--seed", "3"],
            ],
        ),
        "extract": (extract.main, lambda kind: extracting("gpt2" if kind == "bert" else kind)),
        "extract_distilbert": (extract_distilbert.main, lambda kind: extracting("bert")),
    }


PROGRAMS = programs()


@dataclasses.dataclass(frozen=True)
class Command:
    """A program call with arguments and environment. encoding: of its output streams."""

    program: str
    argv: list[str]
    environment: dict[str, str]
    encoding: str


def _odd_value(draw, item: list[str]) -> str:
    """Make a value for a flag: mostly of the same kind as in a valid command line."""
    is_number, is_path = (
        re.fullmatch(r"[\d.e-]+", item[-1]),
        re.search(r"[./]|^(run|out|counts)$", item[-1]),
    )
    likely = st.sampled_from(ODD_NUMBERS if is_number else ODD_PATHS if is_path else ODD_WORDS)
    value = draw(
        likely
        | likely
        | likely
        | st.sampled_from(ODD_WORDS + ODD_NUMBERS + ODD_PATHS)
        | st.text(max_size=12)
    )
    if item[0] == "--file_path" and value == "/":
        return "."  # all files of this machine are read below it, which takes as long as they do
    return (
        "0" if item[0] in NOT_LARGE and value.strip("-").isdecimal() and len(value) > 2 else value
    )


def _drop(draw, words: list[list[str]], k: int) -> None:
    del words[k]


def _drop_value(draw, words: list[list[str]], k: int) -> None:
    words[k] = words[k][:1]


def _repeat(draw, words: list[list[str]], k: int) -> None:
    words.insert(draw(st.integers(0, len(words))), [*words[k][:-1], _odd_value(draw, words[k])])


def _replace_value(draw, words: list[list[str]], k: int) -> None:
    words[k] = [*words[k][:-1], _odd_value(draw, words[k])]


def _join(draw, words: list[list[str]], k: int) -> None:
    words[k] = [
        "=".join([words[k][0], _odd_value(draw, words[k]) if draw(st.booleans()) else words[k][-1]])
    ]


def _misspell(draw, words: list[list[str]], k: int) -> None:
    flag = words[k][0]
    place = draw(st.integers(0, max(len(flag) - 1, 0)))
    words[k] = [
        flag[:place] + draw(st.sampled_from(["", "_", "-", "x", "="])) + flag[place + 1 :],
        *words[k][1:],
    ]


def _insert(draw, words: list[list[str]], k: int) -> None:
    words.insert(k, [draw(st.sampled_from(ODD_FLAGS) | st.sampled_from(ODD_WORDS))])


MUTATIONS = (
    *[_replace_value] * 8,
    *[_drop] * 2,
    _repeat,
    _repeat,
    _join,
    _join,
    _drop_value,
    _misspell,
    _insert,
    _insert,
)


@st.composite
def environments(draw) -> dict[str, str]:
    """Make an environment: a launcher's with a change, or any."""
    found = {}
    if draw(st.integers(0, 3)):
        port = str(draw(st.integers(20_000, 60_000)))
        found = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    for name in draw(
        st.lists(st.sampled_from(LAUNCHER_VARIABLES + OTHER_VARIABLES), min_size=1, max_size=4)
    ):
        found[name] = draw(st.sampled_from(ADDRESSES if name == "MASTER_ADDR" else NUMBERS))
    return alone(found)


def alone(environment: dict[str, str]) -> dict[str, str]:
    """Replace the address in an environment of several processes: their waiting is no fault."""
    try:
        is_alone = int(environment.get("WORLD_SIZE") or 1) <= 1
    except ValueError:  # no number: an error by itself
        is_alone = True
    return environment if is_alone else {**environment, "MASTER_ADDR": "no such host"}


@st.composite
def commands(draw) -> Command:
    """Make a command line: a valid one with up to three mistakes."""
    program = draw(st.sampled_from(["train"] * len(PROGRAMS) + list(PROGRAMS)))
    words = [list(item) for item in PROGRAMS[program][1](draw(st.sampled_from(KINDS)))]
    environment = draw(st.just({}) | st.just({}) | environments())
    num_mistakes = draw(st.integers(0, 1) if environment else st.integers(1, 3))
    for mutate in draw(st.tuples(*[st.sampled_from(MUTATIONS)] * num_mistakes)):
        if words:
            mutate(draw, words, draw(st.integers(0, len(words) - 1)))
    words = draw(st.permutations(words)) if draw(st.integers(0, 4)) == 4 else words
    argv = [word for item in words for word in item] + LAST * (program == "train")
    return Command(
        program, argv, environment, draw(st.sampled_from(["utf-8", "utf-8", "ascii", "latin-1"]))
    )


def lay_out(folder: Path, world) -> None:
    """Fill a folder with every file that a command line can name."""
    for kind in KINDS:
        shutil.copy(world.config(kind), folder / f"student.{kind}.json")
        shutil.copy(world.first_weights(kind), folder / f"first.{kind}.pth")
        for source, name in ((world.data(kind), "data"), (world.counts(kind), "counts")):
            shutil.copy(source, folder / f"{name}.{kind}.pickle")
            shutil.copy(f"{source}.json", folder / f"{name}.{kind}.pickle.json")
        shutil.copytree(world.teachers[kind], folder / f"teacher.{kind}")
    shutil.copy(world.text, folder / "text.txt")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "file").write_text("--mlm\n--seed\n3\n")
    os.mkfifo(folder / "fifo")
    os.symlink("loop", folder / "loop")
    os.symlink("nowhere", folder / "dangling")


def arguments(bench) -> None:
    """T24: start programs with wrong arguments, in wrong environments."""
    numbers = itertools.count()
    statuses: dict[str, int] = {}

    def check(command: Command) -> None:
        folder = bench.folder / f"{next(numbers)}"
        folder.mkdir()
        lay_out(folder, bench.world)
        ended = run_forked(
            PROGRAMS[command.program][0],
            command.argv,
            folder,
            cwd=folder,
            environment=command.environment,
            encoding=command.encoding,
        )
        statuses[f"{command.program} {ended.status}"] = (
            statuses.get(f"{command.program} {ended.status}", 0) + 1
        )
        check_ended(ended)
        shutil.rmtree(folder)

    generate(bench, 50, commands(), check)
