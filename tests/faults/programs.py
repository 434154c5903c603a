"""Trials of programs: mismatched files (T23), and preprocessing that is killed and rerun (T26)."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from faults.files import (
    Reader,
    binarize,
    digest,
    in_child,
    settle_manifest,
    start_child,
    write_text,
)
from faults.forked import end_of
from stand_ins import World, make_lines, save_tokenizer, vocab_size_of

import binarized_data
import prepare_text
import token_counts
import train
from distil.data.cards import read_card, write_card
from distil.models.architectures import architecture_named as row
from distil.models.tokenizer_rules import vocabulary_fingerprint
from distil.models.tokenizers import load_tokenizer
from distil.system.signals import exit_on_sigterm
from distil.training import checkpointing
from utils import InputError

# --------------------------------------------------------------------------------------------------
# T23: files that do not belong together
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Mix:
    """One mismatch in the making: flags of train.py and a separate folder."""

    world: World
    folder: Path
    kind: str = "bert"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of entries of the teacher's vocabulary."""
        return vocab_size_of(self.world.teachers[self.kind])

    def config(self, **values) -> None:
        """Change values of the student's configuration."""
        content = json.loads(Path(self.world.config(self.kind)).read_text()) | values
        self.changes["student_config"] = self.folder / "student.json"
        self.changes["student_config"].write_text(json.dumps(content))

    def teacher(self) -> Path:
        """Copy the teacher's folder, for changes."""
        self.changes["teacher_name"] = self.folder / "teacher"
        shutil.copytree(self.world.teachers[self.kind], self.changes["teacher_name"])
        return self.changes["teacher_name"]

    def teacher_json(self, name: str, change: Callable[[dict], None]) -> None:
        """Change a JSON file of the teacher's folder."""
        path = self.teacher() / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def data(self, sequences: list) -> None:
        """Train on these sequences, without a card."""
        self.changes["data_file"] = self.folder / "data.pickle"
        self.changes["data_file"].write_bytes(
            pickle.dumps([np.array(ids, np.uint16) for ids in sequences])
        )

    def counts(self, counts: list[int]) -> None:
        """Mask by these counts, without a card."""
        self.changes["token_counts"] = self.folder / "counts.pickle"
        self.changes["token_counts"].write_bytes(pickle.dumps(counts))

    def weights(self, change: Callable[[dict], None], kind: str | None = None) -> None:
        """Start from changed first weights."""
        state = torch.load(self.world.first_weights(kind or self.kind), weights_only=True)
        change(state)
        self.changes["student_pretrained_weights"] = self.folder / "first.pth"
        torch.save(state, self.folder / "first.pth")

    def without_token(self, token: str) -> None:
        """Remove a special token from the teacher's tokenizer."""

        def change(content: dict) -> None:
            vocabulary = content["model"]["vocab"]
            vocabulary["zzz-unused"] = vocabulary.pop(token)
            content["added_tokens"] = [
                entry for entry in content["added_tokens"] if entry["content"] != token
            ]
            content["post_processor"] = None

        self.teacher_json("tokenizer.json", change)


def of_other_tokenizer(mix: Mix) -> tuple[Path, Path]:
    """Binarize and count with another tokenizer of the same type; return data and counts."""
    text = write_text(mix.folder / "other.txt", 100, 77)
    (mix.folder / "other").mkdir()
    save_tokenizer(mix.kind, mix.folder / "other", text)
    counts = mix.folder / "counts.pickle"
    more = (
        "--token_counts_dump",
        counts,
        "--vocab_size",
        max(mix.vocab_size, vocab_size_of(mix.folder / "other")),
    )
    return (
        binarize(
            mix.world, mix.kind, text, mix.folder / "data", "pickle", mix.folder / "other", *more
        ),
        counts,
    )


def data_of_other_tokenizer(mix: Mix) -> None:
    """Use only the data: its ids are within the teacher's vocabulary."""
    mix.changes["data_file"] = of_other_tokenizer(mix)[0]


def counts_of_other_tokenizer(mix: Mix) -> None:
    """Use only the counts, with as many entries as the teacher's vocabulary."""
    counts = of_other_tokenizer(mix)[1]
    path = counts.with_name("equal.pickle")
    card = read_card(f"{counts}.json", "")
    path.write_bytes(pickle.dumps([1] * mix.vocab_size))
    write_card(
        f"{path}.json",
        {"kind": "counts", "tokenizer": card["tokenizer"], "sha256": digest(path.read_bytes())},
    )
    mix.changes["token_counts"] = path


def fill(value: float) -> Callable[[dict], None]:
    """Set one tensor to a value."""
    return lambda state: state["distilbert.embeddings.LayerNorm.bias"].__setitem__(3, value)


def change_teacher(change: Callable[[dict], None]) -> Callable[[Mix], None]:
    """Change tensors of the teacher."""

    def apply(mix: Mix) -> None:
        path = mix.teacher() / "model.safetensors"
        state = safetensors.torch.load_file(path)
        change(state)
        path.unlink()
        safetensors.torch.save_file(state, path, {"format": "pt"})

    return apply


def without_card(mix: Mix) -> None:
    """Use RoBERTa's data for BERT, without the card that would reveal it."""
    path = mix.folder / "data.pickle"
    shutil.copy(mix.world.data("roberta"), path)
    mix.changes["data_file"] = path


def fingerprints(*names: str) -> Callable[[Mix], list[str]]:
    """Expect the fingerprint of the teacher's vocabulary, and that of the flag's card."""

    def expect(mix: Mix) -> list[str]:
        card = json.loads(Path(f"{mix.changes[names[0]]}.json").read_text())
        tokenizer = load_tokenizer(row(mix.kind), str(mix.world.teachers[mix.kind]), "")
        return [card["tokenizer"]["vocabulary_sha256"][:12], vocabulary_fingerprint(tokenizer)[:12]]

    return expect


FFN, NORM = "distilbert.transformer.layer.1.ffn.lin1.weight", "distilbert.embeddings.LayerNorm.bias"
SENTENCE = [2, *range(5, 25), 3]
OTHER_VOCABULARY = ["its vocabulary has", "that of --teacher_name"]

# name -> (makes the mismatch, both values, as texts in one line of the message, or their function).
MISMATCHES: dict[str, tuple[Callable[[Mix], None], list[str] | Callable[[Mix], list[str]]]] = {
    "smaller vocabulary": (
        lambda mix: mix.config(vocab_size=77),
        lambda mix: ["77", str(mix.vocab_size)],
    ),
    "a vocabulary of one row too few": (
        lambda mix: mix.config(vocab_size=mix.vocab_size - 1),
        lambda mix: [str(mix.vocab_size - 1), f"a tokenizer of {mix.vocab_size} entries"],
    ),
    "width": (lambda mix: mix.config(dim=40), ["40", "32"]),
    "more positions, gpt2": (lambda mix: mix.config(n_positions=128), ["128", "64"]),
    "padding id, roberta": (lambda mix: mix.config(pad_token_id=0), ["padding id is 0", "is 1"]),
    "heads": (lambda mix: mix.config(n_heads=5), ["5", "32"]),
    "negative layers": (lambda mix: mix.config(n_layers=-1), ["-1 layers", "at least 1"]),
    "tied tensors that differ": (
        lambda mix: mix.weights(lambda state: state["vocab_projector.weight"].add_(1)),
        [
            "another value for",
            "vocab_projector.weight (tied to distilbert.embeddings.word_embeddings.weight)",
        ],
    ),
    "another type of student": (lambda mix: mix.config(model_type="gpt2"), ["gpt2", "distilbert"]),
    "id beyond the vocabulary": (
        lambda mix: mix.data([[2, *range(5, 20), 9999, 3]]),
        lambda mix: ["9999", f"0 to {mix.vocab_size - 1}"],
    ),
    "another end": (lambda mix: mix.data([[*SENTENCE[:-1], 5]]), ["ends with id 5", "2 and 3"]),
    "another start": (lambda mix: mix.data([[5, *SENTENCE[1:]]]), ["begins with id 5", "2 and 3"]),
    "data of roberta": (
        lambda mix: mix.changes.update(data_file=mix.world.data("roberta")),
        fingerprints("data_file"),
    ),
    "data of roberta without a card": (
        without_card,
        lambda mix: ["token id", f"0 to {mix.vocab_size - 1}"],
    ),
    "data of another tokenizer": (data_of_other_tokenizer, fingerprints("data_file")),
    "fewer counts": (
        lambda mix: mix.counts([1, 2, 3]),
        lambda mix: ["3 entries", str(mix.vocab_size)],
    ),
    "more counts": (
        lambda mix: mix.counts([1] * 999),
        lambda mix: ["999 entries", str(mix.vocab_size)],
    ),
    "counts of another tokenizer": (counts_of_other_tokenizer, fingerprints("token_counts")),
    "no [MASK]": (lambda mix: mix.without_token("[MASK]"), OTHER_VOCABULARY),
    "no [CLS]": (lambda mix: mix.without_token("[CLS]"), OTHER_VOCABULARY),
    "no [PAD]": (lambda mix: mix.without_token("[PAD]"), OTHER_VOCABULARY),
    "no <mask>, roberta": (lambda mix: mix.without_token("<mask>"), OTHER_VOCABULARY),
    "no <|endoftext|>, gpt2": (
        lambda mix: mix.without_token("<|endoftext|>"),
        ["no token for end", "sep_token or eos_token"],
    ),
    "missing tensor": (lambda mix: mix.weights(lambda state: state.pop(FFN)), ["lacks", FFN]),
    "misshapen tensor": (
        lambda mix: mix.weights(lambda state: state.update({NORM: torch.zeros(5)})),
        [NORM, "[5]", "[32]"],
    ),
    "NaN tensor": (lambda mix: mix.weights(fill(float("nan"))), [NORM, "NaN or infinite"]),
    "infinite tensor": (lambda mix: mix.weights(fill(float("inf"))), [NORM, "NaN or infinite"]),
    "integers": (
        lambda mix: mix.weights(
            lambda state: state.update({NORM: torch.zeros(32, dtype=torch.int64)})
        ),
        [NORM, "torch.int64"],
    ),
    "weights of gpt2": (
        lambda mix: mix.weights(lambda state: None, "gpt2"),
        ["unexpected", "transformer."],
    ),
    "deeper student": (
        lambda mix: (mix.weights(lambda state: None), mix.config(n_layers=3)),
        ["lacks", ".layer.2."],
    ),
    "shallower student": (
        lambda mix: (mix.weights(lambda state: None), mix.config(n_layers=1)),
        ["unexpected", ".layer.1."],
    ),
    "teacher without weights": (
        lambda mix: (mix.teacher() / "model.safetensors").unlink(),
        ["teacher", "model.safetensors"],
    ),
    "teacher with NaN": (
        change_teacher(lambda state: state["cls.predictions.bias"].fill_(float("nan"))),
        ["cls.predictions.bias", "NaN or infinite"],
    ),
    "teacher of another type": (
        lambda mix: mix.changes.update(teacher_name=mix.world.teachers["roberta"]),
        ["is a roberta model", "expected bert"],
    ),
    # The other six resume from a checkpoint: see RESUMED.
}


def of_newer_version(mix: Mix) -> None:
    """Set a newer program's version in the manifests."""
    for folder in (mix.folder / "run" / "checkpoints").iterdir():
        path = folder / checkpointing.MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
        settle_manifest(folder)


def other_data(mix: Mix) -> None:
    """Resume with other text."""
    text = write_text(mix.folder / "other.txt", 200, 5)
    mix.changes["data_file"] = binarize(mix.world, "bert", text, mix.folder / "data", "pickle")


def other_student(mix: Mix) -> None:
    """Resume from the checkpoint of a deeper student with the same flags."""
    for folder in (mix.folder / "run" / "checkpoints").iterdir():
        path = folder / "student.safetensors"
        state = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: torch.zeros(3, 3) for name in state}, path)
        settle_manifest(folder)


RESUMED: dict[str, tuple[Callable[[Mix], None], list[str] | Callable[[Mix], list[str]]]] = {
    "resumed with another seed": (lambda mix: mix.changes.update(seed=57), ["--seed 57", "56"]),
    "resumed at another rate": (
        lambda mix: mix.changes.update(learning_rate=1e-4),
        ["--learning_rate 0.0001", "0.0005"],
    ),
    "resumed on other data": (other_data, ["--data_file", "digest", "made with"]),
    "resumed with another A x W": (
        lambda mix: mix.changes.update(gradient_accumulation_steps=3),
        ["3", "made with 2"],
    ),
    "resumed by an older program": (of_newer_version, ["version 2", "version 1"]),
    "resumed with another student": (other_student, ["[3, 3]", "[200, 32]"]),
}
KIND_OF = {"gpt2": "gpt2", "roberta": "roberta"}


def mismatched(bench) -> None:
    """T23: train with mismatched files: refused before writing, both values in one line."""
    name, (make, expected) = [*MISMATCHES.items(), *RESUMED.items()][bench.number % 40]
    kind = name.rpartition(", ")[2]
    mix = Mix(bench.world, bench.folder, kind if kind in World.STUDENTS else "bert")
    run = bench.folder / "run"
    if name in RESUMED:
        mix.changes |= {"resume": True, "max_steps": 4}
        flags = bench.world.flags("bert", run, max_steps=4, checkpoint_interval=4)
        made = in_child(lambda: train.main(flags), bench.folder / "first-log")
        if made.status != 0:
            bench.fail(f"{name}: the first run: {made}")
    quietly_made(make, mix)
    before = content_of(run)
    ended = in_child(
        lambda: train.main(bench.world.flags(mix.kind, run, **mix.changes)), bench.folder / "log"
    )
    wanted = expected(mix) if callable(expected) else expected
    if ended.status != 2 or not ended.is_clean:
        bench.fail(f"{name}: {ended}")
    elif not any(all(text in line for text in wanted) for line in ended.errors):
        bench.fail(f"{name}: no line has {wanted}: {ended.errors}")
    if content_of(run) != before:
        bench.fail(f"{name}: the run's folder was changed")


def quietly_made(make: Callable[[Mix], None], mix: Mix) -> None:
    """Make a mismatch without the output of the programs that help."""
    with contextlib.redirect_stderr(io.StringIO()):
        make(mix)


def content_of(folder: Path) -> dict[str, str]:
    """Digest every file below a folder."""
    return {
        str(path): digest(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()
    }


# --------------------------------------------------------------------------------------------------
# T26: preprocessing killed
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A program that prepares data. outputs: the files that it writes into its folder, by name."""

    main: Callable[[list[str]], None]
    flags: Callable[["Site", Path], list[object]]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """The inputs of all jobs of a call."""

    world: World
    text: Path
    tokens: Path


def binarizing(file_format: str, num_workers: int) -> Job:
    """Make the job of binarized_data.py."""

    def flags(site: Site, folder: Path) -> list[object]:
        return [
            "--file_path",
            site.text,
            "--tokenizer_type",
            "bert",
            "--tokenizer_name",
            site.world.teachers["bert"],
            "--dump_file",
            folder / "data",
            "--format",
            file_format,
            "--num_workers",
            num_workers,
            "--token_counts_dump",
            folder / "counts",
        ]

    pickled, store = (
        ("data.tiny-bert.pickle", "data.tiny-bert.pickle.json"),
        [f"data.tiny-bert.{s}" for s in ("bin", "idx", "json")],
    )
    return Job(
        binarized_data.main,
        flags,
        (*(pickled if file_format == "pickle" else store), "counts", "counts.json"),
    )


def preparing(*more: str) -> Job:
    """Make the job of prepare_text.py."""
    return Job(
        prepare_text.main,
        lambda site, folder: ["--file_path", site.text, "--output", folder / "text", *more],
        ("text",),
    )


JOBS = [
    *(
        binarizing(file_format, num_workers)
        for file_format in ("pickle", "store")
        for num_workers in (1, 2)
    ),
    Job(
        token_counts.main,
        lambda site, folder: [
            "--data_file",
            site.tokens,
            "--token_counts_dump",
            folder / "counts",
            "--vocab_size",
            30522,
        ],
        ("counts", "counts.json"),
    ),
    preparing(),
    preparing("--num_lines", "20000"),
]
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
NUM_KILLED = 3  # a call


def preprocessing_killed(bench) -> None:
    """T26: kill a program that prepares data, check its files, and run it again."""
    job = JOBS[bench.number % len(JOBS)]
    text = make_long_text(bench)
    reader = Reader.of(bench.world, "bert")
    tokens = (
        binarize(bench.world, "bert", text, bench.folder / "tokens", "store")
        if job.main is token_counts.main
        else text
    )
    site = Site(bench.world, text, tokens)
    started = time.monotonic()
    expected = finish(bench, job, site, bench.folder / "reference")
    duration_s = time.monotonic() - started
    for number in range(NUM_KILLED):
        folder = bench.folder / f"killed-{number}"
        has_older = bench.rng.random() < 0.3
        older = (
            finish(bench, job, site, folder, "--seed", "1")
            if has_older and job.main is not token_counts.main
            else {}
        )
        how = kill_at_random(bench, job, site, folder, duration_s)
        check_left(bench, job, folder, expected, older, how, reader)
        again = finish(bench, job, site, folder)
        if again != expected:
            bench.fail(
                f"{how}: run again, it gives other bytes in"
                f" {sorted(k for k in expected if again.get(k) != expected[k])}"
            )
        bench.count()


def make_long_text(bench) -> Path:
    """Write a text that takes about half a second to binarize."""
    lines = make_lines(2000, bench.number)
    path = bench.folder / "text.txt"
    bench.rng.shuffle(lines)
    path.write_text("\n".join(lines * 10) + "\n", encoding="utf-8")
    return path


def program(job: Job, site: Site, folder: Path, *more: str) -> Callable[[], None]:
    """Return the call that the program's `if __name__ ..` makes."""

    def run() -> None:
        exit_on_sigterm()
        job.main([*map(str, job.flags(site, folder)), *more, "--force"])  # over an older text

    return run


def finish(bench, job: Job, site: Site, folder: Path, *more: str) -> dict[str, bytes]:
    """Run a job to its end; return its outputs."""
    folder.mkdir(exist_ok=True)
    ended = in_child(program(job, site, folder, *more), bench.folder / "log")
    if ended.status != 0:
        bench.fail(f"undisturbed: {ended}")
    return {name: (folder / name).read_bytes() for name in job.outputs if (folder / name).exists()}


def kill_at_random(bench, job: Job, site: Site, folder: Path, duration_s: float) -> str:
    """Kill a job's process group at a random moment, in half of the cases near the end."""
    folder.mkdir(exist_ok=True)
    number = bench.rng.choice(SIGNALS)
    share = bench.rng.choice([bench.rng.random(), bench.rng.uniform(0.8, 1.02)])

    def run() -> None:
        os.setpgid(0, 0)
        program(job, site, folder)()

    pid = start_child(run, bench.folder / "log")
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    time.sleep(share * duration_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
    status = end_of(pid, 30)
    how = f"{signal.Signals(number).name} after {share:.2f} of the time, status {status}"
    text = (bench.folder / "log").read_text(errors="replace")
    if status is None or (number != signal.SIGKILL and "Traceback" in text):
        bench.fail(f"{how}: {text[-400:]}")
    if number != signal.SIGKILL and (
        left := [path.name for path in folder.iterdir() if path.name not in job.outputs]
    ):
        bench.fail(f"{how}: left {left}")
    bench.note(
        f"ended by {signal.Signals(number).name}:"
        f" {'before it was done' if status else 'it was done'}"
    )
    return how


def check_left(
    bench, job: Job, folder: Path, expected: dict, older: dict, how: str, reader: Reader
) -> None:
    """Check the files that a killed program left: each old or new, whole, and consistent."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.read_bytes() not in (expected.get(path.name), older.get(path.name)):
            bench.fail(f"{how}: {path.name} is neither the old file nor the new one")
    wholes = [
        read_whole(outputs, bench.folder / "whole", reader)
        for outputs in (expected, older)
        if outputs
    ]
    found = read_whole(
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name in expected},
        bench.folder / "whole",
        reader,
    )
    for name, content in found.items():
        if content is not None and content not in [whole.get(name) for whole in wholes]:
            bench.fail(f"{how}: {name} opens as what is neither the old content nor the new")


def read_whole(outputs: Mapping[str, bytes], folder: Path, reader: Reader) -> dict[str, str | None]:
    """Open the files as training would; None for those that can't be opened."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in outputs.items():
        (folder / name).write_bytes(content)
    found: dict[str, str | None] = {}
    for name in ("data.tiny-bert.pickle", "data.tiny-bert"):
        if any(other.startswith(name) for other in outputs):
            try:
                found[name] = reader.tokens(folder / name)
            except InputError:
                found[name] = None
    return found
