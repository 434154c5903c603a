"""Trials of files: damage, which must be noticed (T5), and mutations, which must not crash (T20).

Also the forked programs that these trials share with faults/programs.py and faults/malicious.py.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from faults.forked import end_of, ended, fork_program
from stand_ins import World, make_lines

import binarized_data
from distil.data.cards import write_card
from distil.data.token_files import SpecialIds, open_token_file
from distil.models.architectures import architecture_named
from distil.models.first_weights import load_student_weights
from distil.models.language_model import build_network, read_student_config
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizer_rules import tokenizer_facts
from distil.models.tokenizers import load_tokenizer
from distil.system.files import json_digest
from distil.training import checkpointing
from lm_seqs_dataset import LmSeqsDataset, read_token_counts
from utils import InputError, keyed_seed, logger, one_line

# --------------------------------------------------------------------------------------------------
# Programs in forked processes
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a child.

    status: negative for a signal, None where it hung; text: its output.
    """

    status: int | None
    text: str

    @property
    def errors(self) -> list[str]:
        """List the errors that the program printed."""
        return [
            line.split(": error: ", 1)[1] for line in self.text.splitlines() if ": error: " in line
        ]

    @property
    def is_clean(self) -> bool:
        """True after success or a message, False after a traceback, a hang or a crash."""
        return self.status in (0, 2) and "Traceback (most recent call last)" not in self.text

    def __str__(self) -> str:
        return f"status {self.status}: {one_line(ValueError(self.text[-1500:]), 400)}"


def start_child(action: Callable[[], None], log: Path) -> int:
    """Start a program's main in a forked process, output to `log`, with yes to every question."""

    def prepare() -> None:
        keyboard = log.with_name("keyboard")
        keyboard.write_text("y\n" * 100)
        os.dup2(os.open(keyboard, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.stderr = open(log, "w", buffering=1, errors="replace")  # noqa: SIM115
        for stream in (1, 2):
            os.dup2(sys.stderr.fileno(), stream)

    return fork_program(prepare, action)


def in_child(action: Callable[[], None], log: Path, limit_s: float = 60) -> Ended:
    """Run a program's main in a forked process; return how it ended."""
    status = end_of(start_child(action, log), limit_s)
    return Ended(status, log.read_text(errors="replace"))


def quietly(main: Callable, *arguments: object) -> None:
    """Run a program's main in this process without its log and progress bars."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        main([str(argument) for argument in arguments])
    logger.handlers.clear()


def binarize(
    world: World,
    kind: str,
    text: Path,
    prefix: Path,
    file_format: str,
    tokenizer: Path | None = None,
    *more,
) -> Path:
    """Make a token file; return the value for --data_file."""
    tokenizer = tokenizer or world.teachers[kind]
    quietly(
        binarized_data.main,
        "--file_path",
        text,
        "--tokenizer_type",
        kind,
        "--tokenizer_name",
        tokenizer,
        "--dump_file",
        prefix,
        "--format",
        file_format,
        "--num_workers",
        1,
        *more,
    )
    path = prefix.with_name(f"{prefix.name}.{tokenizer.name}")
    return path if file_format == "store" else path.with_name(f"{path.name}.pickle")


def write_text(path: Path, num_lines: int, seed: int) -> Path:
    """Write lines of invented words."""
    path.write_text("\n".join(make_lines(num_lines, seed)) + "\n", encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------
# Reading all of a file as training does
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reader:
    """Read files for one teacher, and digest their content."""

    kind: str
    special_ids: SpecialIds
    num_entries: int
    tokenizer_facts: dict
    max_length: int = 64
    source: str = "the teacher"

    @property
    def vocab_size(self) -> int:
        """Return the rows of the teacher's vocabulary: it has no padding."""
        return self.num_entries

    @classmethod
    def of(cls, world: World, kind: str) -> "Reader":
        """Make a reader with the world's teacher of a kind."""
        tokenizer = load_tokenizer(architecture_named(kind), str(world.teachers[kind]), "")
        size = max(tokenizer.get_vocab().values()) + 1
        return cls(
            kind,
            special_ids(architecture_named(kind), tokenizer),
            size,
            tokenizer_facts(tokenizer),
        )

    def tokens(self, path: Path) -> str:
        """Read every sequence of a token file."""
        dataset = LmSeqsDataset.from_file(path, self)
        token_ids_BT, lengths_B = dataset.collate(np.arange(len(dataset)))
        return digest(token_ids_BT.numpy().tobytes() + lengths_B.numpy().tobytes())

    def counts(self, path: Path) -> str:
        """Read token counts."""
        return digest(read_token_counts(path, self).tobytes())


def read_checkpoint(path: Path) -> str:
    """Read everything in a checkpoint."""
    found = checkpointing.read(path)
    contents = [
        checkpointing.content_digest(found.tensors(name)) for name in ("student", "optimizer")
    ]
    return digest(json.dumps([found.step, found.state, *contents], sort_keys=True).encode())


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def write_checkpoint(folder: Path, student: Mapping[str, torch.Tensor], step: int = 2) -> Path:
    """Write a checkpoint that is fast to read: some of a student's weights, with moments."""
    names = sorted(student)[:8]
    moments = {
        f"{name}/{kind}": torch.rand_like(student[name].float())
        for name in names
        for kind in ("exp_avg", "exp_avg_sq")
    }
    tensors = {"student": {name: student[name] for name in names}, "optimizer": moments}
    return checkpointing.write(
        folder, step, tensors, {"flags": {"seed": 1}, "position": 3.5, "names": names}, keep=3
    )


# --------------------------------------------------------------------------------------------------
# T5: damage
# --------------------------------------------------------------------------------------------------


def flip(content: bytes, other: bytes, rng) -> bytes:
    """Flip one bit."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def cut(content: bytes, other: bytes, rng) -> bytes:
    """Truncate at a random place."""
    return content[: rng.randrange(len(content))]


def cut_at_block(content: bytes, other: bytes, rng) -> bytes:
    """Truncate at the end of a disk block, as a crash does."""
    size = rng.choice([512, 4096])
    return content[: rng.randrange(0, len(content), size)]


def zero_block(content: bytes, other: bytes, rng) -> bytes:
    """Zero one block, as a lost write does; half of a small file."""
    size = min(rng.choice([512, 4096]), -(-len(content) // 2))
    place = rng.randrange(-(-len(content) // size)) * size
    return content[:place] + bytes(len(content[place : place + size])) + content[place + size :]


def swap_blocks(content: bytes, other: bytes, rng) -> bytes:
    """Exchange two blocks."""
    size = min(rng.choice([512, 4096]), len(content) // 2)
    first, second = sorted(rng.sample(range(len(content) // size), 2))
    blocks = [content[k * size : (k + 1) * size] for k in (first, second)]
    between = content[(first + 1) * size : second * size]
    return (
        content[: first * size] + blocks[1] + between + blocks[0] + content[(second + 1) * size :]
    )


DAMAGES: dict[str, Callable[[bytes, bytes, Any], bytes]] = {
    "a flipped bit": flip,
    "cut off": cut,
    "cut off at a block": cut_at_block,
    "emptied": lambda content, other, rng: b"",
    "a zeroed block": zero_block,
    "two swapped blocks": swap_blocks,
    "appended bytes": lambda content, other, rng: content + rng.randbytes(rng.choice([1, 8, 512])),
    "appended zeros": lambda content, other, rng: content + bytes(rng.choice([1, 512, 4096])),
    "another run's file": lambda content, other, rng: other,
}


@dataclasses.dataclass
class Subject:
    """Files that are read together.

    others: another run's files under the same names; read: digests their content.
    """

    files: list[Path]
    others: list[Path]
    read: Callable[[], str]


def make_subjects(bench) -> Iterator[Subject]:
    """Make a token file in both formats, counts and a checkpoint, each of two runs."""
    mine, other = bench.folder / "mine", bench.folder / "other"
    kind = bench.rng.choice(["bert", "roberta"])
    reader = Reader.of(bench.world, kind)
    for seed, folder in enumerate((mine, other)):
        folder.mkdir()
        text = write_text(folder / "text.txt", 150, 1000 * bench.number + seed)
        counts = folder / "counts.pickle"
        pickled = binarize(
            bench.world, kind, text, folder / "data", "pickle", None, "--token_counts_dump", counts
        )
        store = binarize(bench.world, kind, text, folder / "data", "store")
        weights = {f"layer.{k}": torch.randn(40, 32) for k in range(8)}
        checkpoint = write_checkpoint(folder / "checkpoints", weights)
    readings = {
        functools.partial(reader.tokens, mine / pickled.name): [pickled, f"{pickled}.json"],
        functools.partial(reader.tokens, mine / store.name): [
            f"{store}.bin",
            f"{store}.idx",
            f"{store}.json",
        ],
        functools.partial(reader.counts, mine / counts.name): [counts, f"{counts}.json"],
        functools.partial(read_checkpoint, mine / checkpoint.relative_to(other)): sorted(
            checkpoint.iterdir()
        ),
    }
    for read, paths in readings.items():
        others = [Path(path) for path in paths]
        yield Subject([mine / path.relative_to(other) for path in others], others, read)


def damaged(bench) -> None:
    """T5: damage a file; reading must raise an error that names it, or give the old content."""
    for subject in make_subjects(bench):
        expected = subject.read()
        for file, other in zip(subject.files, subject.others, strict=True):
            content = file.read_bytes()
            for _ in range(3):
                kind, changed = one_damage(content, other.read_bytes(), bench.rng)
                put(file, changed)
                judge(bench, subject, file, kind, expected)
                bench.count()
            put(file, content)
        if subject.read() != expected:
            bench.fail(f"{subject.files[0].name}: mended, it reads otherwise")


def one_damage(content: bytes, other: bytes, rng) -> tuple[str, bytes]:
    """Damage a file: (kind of damage, new content different from the old)."""
    while True:
        kind = rng.choice(list(DAMAGES))
        changed = DAMAGES[kind](content, other, rng)
        if changed != content:
            return kind, changed


def put(path: Path, content: bytes) -> None:
    """Replace a file without shrinking what an earlier reading has mapped into memory."""
    fresh = path.with_name("fresh")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def judge(bench, subject: Subject, file: Path, kind: str, expected: str) -> None:
    """Read a damaged subject; record silent damage, and errors without the file's name."""
    try:
        found = subject.read()
    except InputError as error:
        # Of two files that do not fit, neither is known to be the wrong one.
        names = (
            [path.name for path in subject.files] if kind == "another run's file" else [file.name]
        )
        if not any(name in str(error) for name in names):
            bench.fail(f"{file.name}, {kind}: the message does not name it: {error}")
        return
    if found != expected:
        bench.fail(f"{file.name}, {kind}: read in silence")
        shutil.copy(file, bench.folder / f"silent-{bench.num_trials}-{file.name}")
    else:
        bench.note("harmless: read as before (white space of JSON)")


# --------------------------------------------------------------------------------------------------
# T20: mutation
# --------------------------------------------------------------------------------------------------

NUM_MUTANTS = 500  # a call
SLOW_S, HUNG_S = 1.0, 10.0
MAX_BYTES = 2**30
OUT_OF_MEMORY = re.compile("MemoryError|allocate|not enough memory|out of memory", re.IGNORECASE)
FIELDS = [b"\0", b"\xff", b"\x7f", b"\x80", b"\1"]
ODD_VALUES = [
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    "",
    "x",
    None,
    True,
    [],
    {},
    [[]],
    {"a": []},
    "0" * 300,
    float("nan"),
]


def edit_bytes(content: bytearray, rng) -> None:
    """Set a few bytes."""
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(len(content))] = rng.randrange(256)


def flip_bit(content: bytearray, rng) -> None:
    """Flip one bit."""
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def edit_field(content: bytearray, rng) -> None:
    """Set an integer of 2, 4 or 8 bytes to zero or a huge value."""
    size = rng.choice([2, 4, 8])
    place = rng.randrange(max(len(content) - size, 1))
    head = rng.choice([b"", rng.randbytes(1)])
    content[place : place + size] = (head + rng.choice(FIELDS) * 8)[:size]


def delete(content: bytearray, rng) -> None:
    """Delete a piece."""
    place = rng.randrange(len(content))
    del content[place : place + rng.choice([1, 2, 8, 100, 5000])]


def insert(content: bytearray, rng) -> None:
    """Insert noise."""
    place = rng.randrange(len(content))
    content[place:place] = rng.randbytes(rng.choice([1, 2, 8, 100]))


def duplicate(content: bytearray, rng) -> None:
    """Repeat a piece, in place or elsewhere."""
    place, size = rng.randrange(len(content)), rng.choice([1, 4, 16, 300])
    target = rng.choice([place, rng.randrange(len(content))])
    content[target:target] = content[place : place + size]


def splice(content: bytearray, rng) -> None:
    """Copy a piece of the file over another."""
    size = rng.choice([1, 4, 16, 300])
    source, target = rng.randrange(len(content)), rng.randrange(len(content))
    content[target : target + size] = content[source : source + size]


MUTATIONS = [edit_bytes, flip_bit, edit_field, delete, insert, duplicate, splice]


def mutate(content: bytes, rng) -> bytes:
    """Change a file in one to four ways, mostly near its ends, where its structure is."""
    mutated = bytearray(content)
    margin = rng.choice([0, 60, 200, 1000])
    if 0 < 2 * margin < len(mutated):  # the middle stays
        head, middle, tail = mutated[:margin], mutated[margin:-margin], mutated[-margin:]
        part = rng.choice([head, tail])
        for _ in range(rng.randint(1, 2)):
            rng.choice(MUTATIONS)(part, rng) if part else None
        return bytes(head + middle + tail)
    for _ in range(rng.randint(1, 4)):
        rng.choice(MUTATIONS)(mutated, rng) if mutated else None
    return bytes(mutated)


def mutate_json(content: bytes, rng) -> bytes:
    """Change values of a JSON object at any level; the result is valid JSON."""
    parsed = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        place = parsed
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            inner = place[key]
            if not (isinstance(inner, (dict, list)) and inner and rng.random() < 0.7):
                break
            place = inner
        place[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return json.dumps(parsed).encode()


@dataclasses.dataclass
class Target:
    """A file to be mutated.

    read: opens it; mutate: changes it; settle: corrects its checksums.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    mutate: Callable[[bytes, Any], bytes] = mutate
    settle: Callable[[], None] | None = None


def make_targets(bench) -> list[Target]:
    """Make small files, each in its own folder."""
    reader = Reader.of(bench.world, "bert")
    text = write_text(bench.folder / "text.txt", 30, bench.number)
    store = binarize(bench.world, "bert", text, bench.folder / "data", "store")
    return [
        *pickle_targets(bench.folder, store, reader),
        *store_targets(bench.folder, store, reader),
        *weight_targets(bench.folder, bench.world),
        *checkpoint_targets(bench.folder, bench.world),
    ]


def pickle_targets(folder: Path, store: Path, reader: Reader) -> Iterator[Target]:
    """Write token files and counts in every pickle protocol."""
    tokens = open_token_file(store)
    sequences = np.split(np.array(tokens.ids_M), np.cumsum(tokens.lengths_N)[:-1])
    counts = np.bincount(tokens.ids_M, minlength=reader.vocab_size)
    for protocol in (2, 4, 5):
        for content, read in (
            (sequences, reader.tokens),
            (counts.tolist(), reader.counts),
            (counts, reader.counts),
        ):
            path = folder / f"{read.__name__}.{type(content).__name__}.{protocol}.pickle"
            path.write_bytes(pickle.dumps(content, protocol))
            yield Target(path.name, path, functools.partial(read, path))


def store_targets(folder: Path, store: Path, reader: Reader) -> Iterator[Target]:
    """Copy a store: without a card, with one, and with one whose checksum is always corrected."""
    for name, suffix, change, settle in (
        ("bare", "bin", mutate, None),
        ("bare", "idx", mutate, None),
        ("carded", "idx", mutate, None),
        ("carded", "bin", mutate, None),
        ("carded", "json", mutate, None),
        ("settled", "json", mutate_json, settle_card),
    ):
        place = folder / f"{name}-{suffix}"
        place.mkdir()
        for part in ("bin", "idx") if name == "bare" else ("bin", "idx", "json"):
            shutil.copy(f"{store}.{part}", place / f"data.{part}")
        path = place / f"data.{suffix}"
        read = functools.partial(reader.tokens, place / "data")
        yield Target(
            f"{name} {suffix}", path, read, change, settle and functools.partial(settle, path)
        )


def settle_card(path: Path) -> None:
    """Correct a card's checksum."""
    card = json.loads(path.read_bytes())
    card.pop("card_sha256", None)
    write_card(
        path, {key: value for key, value in card.items() if key not in ("format", "version")}
    )


def weight_targets(folder: Path, world: World) -> Iterator[Target]:
    """Write first weights in three formats, and the student's configuration."""
    config = read_student_config("distilbert", world.config("bert"))
    row = architecture_named("distilbert")
    student = build_network(row, config)
    state = torch.load(world.first_weights("bert"), weights_only=True)
    torch.save(state, folder / "first.pth")
    torch.save(state, folder / "first.old.pth", _use_new_zipfile_serialization=False)
    plain = {name: tensor for name, tensor in state.items() if name != "vocab_projector.weight"}
    safetensors.torch.save_file(plain, folder / "first.safetensors")
    for name in ("first.pth", "first.old.pth", "first.safetensors"):
        path = folder / name
        yield Target(name, path, functools.partial(load_student_weights, student, row, str(path)))
    for change in (mutate, mutate_json):
        path = folder / f"config.{change.__name__}.json"
        shutil.copy(world.config("bert"), path)
        yield Target(
            path.name, path, functools.partial(read_student_config, "distilbert", str(path)), change
        )


def checkpoint_targets(folder: Path, world: World) -> Iterator[Target]:
    """Write a checkpoint for each file: unchanged, and with a corrected manifest."""
    state = torch.load(world.first_weights("bert"), weights_only=True)
    whole = write_checkpoint(folder / "checkpoints", state)
    for name in sorted(path.name for path in whole.iterdir()):
        for settle in (None, settle_manifest):
            place = folder / f"checkpoint-{name}-{bool(settle)}" / whole.name
            shutil.copytree(whole, place)
            is_json = name.endswith(".json") and settle
            read = functools.partial(read_checkpoint, place)
            change = mutate_json if is_json else mutate
            yield Target(
                f"{name} {bool(settle)}",
                place / name,
                read,
                change,
                settle and functools.partial(settle, place),
            )


def settle_manifest(folder: Path) -> None:
    """Correct a manifest's checksums of its files and of itself."""
    path = folder / checkpointing.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest.pop("manifest_sha256", None)
    files = manifest.get("files")
    for name, row in files.items() if isinstance(files, dict) else ():
        if isinstance(row, dict) and (folder / name).is_file():
            row |= {
                "bytes": (folder / name).stat().st_size,
                "sha256": digest((folder / name).read_bytes()),
            }
    path.write_text(json.dumps({**manifest, "manifest_sha256": json_digest(manifest)}))


def mutated(bench) -> None:
    """T20: open mutated files in a child: may refuse, but not crash, hang or fill the memory."""
    logger.disabled = True
    targets, seed = make_targets(bench), bench.rng.getrandbits(32)
    for target in targets:
        target.read()
    progress = mmap.mmap(-1, PROGRESS.size)
    first = 0
    while first < NUM_MUTANTS:
        progress[:] = PROGRESS.pack(first, time.monotonic())
        log = bench.folder / f"log-{first}"
        status = watch(
            start_child(functools.partial(read_mutants, targets, seed, first, progress), log),
            progress,
        )
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("FAILED "):
                bench.fail(line.removeprefix("FAILED "))
        if status == 0:
            break
        number = PROGRESS.unpack(progress)[0]
        name, how = (
            targets[number % len(targets)].name,
            "hung" if status is None else f"ended with status {status}",
        )
        bench.fail(
            f"mutant {number} of {name}: the process {how}"
            f" ({one_line(ValueError(log.read_text(errors='replace')[-200:]))})"
        )
        first = number + 1
    bench.count(NUM_MUTANTS)


PROGRESS = struct.Struct("<qd")  # number of the mutant, and when it was begun


def watch(pid: int, progress: mmap.mmap) -> int | None:
    """Wait for a child as long as it makes progress."""
    while True:
        if (status := ended(pid)) is not None:
            return status
        if time.monotonic() - PROGRESS.unpack(progress)[1] > HUNG_S:
            return end_of(pid, 0)
        time.sleep(0.01)


def read_mutants(targets: list[Target], seed: int, first: int, progress: mmap.mmap) -> None:
    """Open one mutant after another."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * MAX_BYTES, size + 8 * MAX_BYTES))
    for number in range(first, NUM_MUTANTS):
        progress[:] = PROGRESS.pack(number, time.monotonic())
        target = targets[number % len(targets)]
        content = target.path.read_bytes()
        problem = problem_of(target, content, random.Random(keyed_seed(seed, number)))
        if problem:
            kept = target.path.with_name(f"mutant-{number}-{target.path.name}")
            shutil.copy(target.path, kept)
            print(f"FAILED mutant {number} of {target.name}: {problem}", flush=True)
        put(target.path, content)
        if target.settle:
            target.settle()


def problem_of(target: Target, content: bytes, rng) -> str | None:
    """Open one mutant; return the problem of how that ended, or None."""
    put(target.path, target.mutate(content, rng))
    if target.settle:
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            target.settle()
    problem = problem_of_reading(target.read)
    if problem != ASKS_FOR_TOO_MUCH:
        return problem
    # Python reserves address space for as many bytes as a file announces; unread, they cost none.
    with more_address_space():
        problem = problem_of_reading(target.read)
    return None if problem == ASKS_FOR_TOO_MUCH else problem


ASKS_FOR_TOO_MUCH = "asks for more memory than there is"


@contextlib.contextmanager
def more_address_space() -> Iterator[None]:
    """Raise this process's address limit by a few GB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (soft + 5 * MAX_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def problem_of_reading(read: Callable[[], Any]) -> str | None:
    """Open a file; return a problem unless it opens or raises InputError within a second."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = None
    try:
        read()
    except (InputError, OSError) as error:
        problem = ASKS_FOR_TOO_MUCH if OUT_OF_MEMORY.search(str(error)) else None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__}: {one_line(error)}"
            f" ({Path(where.filename).name}:{where.lineno})"
        )
    elapsed_s = time.monotonic() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MAX_BYTES or elapsed_s > SLOW_S:
        return f"took {elapsed_s:.1f} s and {grown / 1e9:.1f} GB"
    return problem
