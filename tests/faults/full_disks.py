"""Trials of programs on a disk that gets full (T38): every program that writes, at eight sizes."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from faults.files import Ended, binarize, quietly, start_child, write_text
from faults.forked import ended as end_if_over
from faults.saves import mount, small_disk, training
from stand_ins import World, make_lines

import binarized_data
import compare_runs
import evaluate_lm
import extract
import extract_distilbert
import inspect_data
import join_tokens
import latency
import prepare_text
import report
import run_squad_w_distillation
import run_task
import token_counts
import train
import train_teacher
import trim_vocabulary
from distil.system.signals import exit_on_sigterm
from distil.tasks.scores import write_scores

NUM_SIZES = 8
LIMIT_S = 120
PAGE, LARGE = 4096, 2**28


@dataclasses.dataclass(frozen=True)
class Site:
    """The inputs of all programs, on another disk."""

    world: World
    folder: Path

    def path(self, name: str) -> Path:
        """Name a file or folder."""
        return self.folder / name


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that writes. flags: its command line for an output folder.

    over: flags with which it replaces old outputs; None: it never does. prepare: makes what it
    reads, and what lies in the output folder.
    """

    main: Callable[[list[str]], None]
    flags: Callable[[Site, Path], list]
    over: tuple[str, ...] | None = ()
    prepare: Callable[[Site, Path], None] = lambda site, out: None


def of_bert(site: Site, *names: str) -> list:
    """List flags that name the tiny BERT."""
    return [word for name in names for word in (f"--{name}", site.world.teachers["bert"])]


def binarizing(site: Site, out: Path, *more: object) -> list:
    """List the flags of binarized_data.py."""
    flags = ["--file_path", site.path("text.txt"), *of_bert(site, "tokenizer_name")]
    return [*flags, "--dump_file", out / "data", "--num_workers", 1, *more]


def make_shards(site: Site, out: Path) -> None:
    """Binarize two shards, once."""
    if not site.path("shards").exists():
        site.path("shards").mkdir()
        for number in (1, 2):
            flags = binarizing(site, site.path("shards"), "--format", "store")
            quietly(binarized_data.main, *flags, "--shard", f"{number}/2")


def joining(site: Site, out: Path) -> list:
    """List the flags of join_tokens.py: the output lies beside the shards."""
    counts = "--token_counts_dump", out / "counts", "--vocab_size", 200
    return ["--shards", out / "data.tiny-bert", *counts]


def place_shards(site: Site, out: Path) -> None:
    """Copy the shards into the output folder."""
    make_shards(site, out)
    for file in site.path("shards").iterdir():
        shutil.copy(file, out)


def make_mrpc(site: Site, out: Path) -> None:
    """Write a small MRPC."""
    folder = site.path("mrpc")
    if not folder.exists():
        folder.mkdir()
        lines, header = make_lines(60, 5), "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        for name, part in (("train", lines[:40]), ("dev", lines[40:])):
            rows = [f"{k % 2}\t1\t2\t{line[:40]}\t{line[-40:]}" for k, line in enumerate(part)]
            (folder / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def fine_tuning(site: Site, out: Path) -> list:
    """List the flags of run_task.py, for two seeds."""
    flags = ["--task", "mrpc", *of_bert(site, "model_name_or_path"), "--data_dir"]
    flags += [site.path("mrpc"), "--output_dir", out / "mrpc", "--seeds", 1, 2, "--max_steps", 2]
    return [*flags, "--per_gpu_train_batch_size", 4, "--no_cuda", "--save_models", "all"]


def make_squad(site: Site, out: Path) -> None:
    """Write a small SQuAD."""
    if not site.path("squad.json").exists():
        paragraphs = []
        for number, line in enumerate(make_lines(12, 3)):
            word, start = line.split()[2], len(" ".join(line.split()[:2])) + 1
            answers = [{"text": word, "answer_start": start}]
            qas = [{"id": f"q{number}", "question": f"{line.split()[1]}?", "answers": answers}]
            paragraphs.append({"context": line, "qas": qas})
        data = [{"title": "made", "paragraphs": paragraphs}]
        content = json.dumps({"version": "made", "data": data})
        site.path("squad.json").write_text(content, encoding="utf-8")


def answering(site: Site, out: Path) -> list:
    """List the flags of run_squad_w_distillation.py, with a checkpoint on the way."""
    flags = ["--model_type", "bert", *of_bert(site, "model_name_or_path"), "--do_train"]
    flags += ["--do_eval", "--train_file", site.path("squad.json"), "--predict_file"]
    flags += [site.path("squad.json"), "--output_dir", out / "squad", "--max_steps", 4]
    flags += ["--save_steps", 2, "--logging_steps", 1000, "--max_seq_length", 48, "--no_cuda"]
    return [*flags, "--doc_stride", 10, "--max_query_length", 8]


def place_student(site: Site, out: Path) -> None:
    """Copy a student into the output folder, and make scores of it and of its teacher."""
    shutil.copytree(site.path("student"), out / "student")
    for role, model in (("teacher", site.world.teachers["bert"]), ("student", out / "student")):
        metrics = {"score": 80.0, "accuracy": 79.0, "f1": 81.0}
        runs = [{"seed": 1, "metrics": metrics, "num_examples": {"dev": 20}}]
        kept = site.path(f"scores-{role}.json")
        write_scores(kept, task="mrpc", model=str(model), runs=runs, flags={})


def reporting(site: Site, out: Path) -> list:
    """List the flags of report.py, with scores from elsewhere, sizes, a picture and a card."""
    flags = [*of_bert(site, "teacher"), "--student", out / "student", "--output_dir"]
    flags += [out / "report", "--no_speed", "--write_card", "--scores"]
    return [*flags, site.path("scores-teacher.json"), site.path("scores-student.json")]


def training_teacher(site: Site, out: Path) -> list:
    """List the flags of train_teacher.py."""
    flags = ["--config", site.path("bert.json"), *of_bert(site, "tokenizer_name"), "--data_file"]
    flags += [site.world.data("bert"), "--output_dir", out / "teacher", "--num_steps", 2]
    return flags


def evaluating(site: Site, out: Path) -> list:
    """List the flags of evaluate_lm.py."""
    flags = [*of_bert(site, "model"), "--text_file", site.path("few.txt"), "--device", "cpu"]
    return [*flags, "--output", out / "scores.json"]


def distilling(site: Site, out: Path) -> list:
    """List the flags of train.py."""
    sizes = {"batch_size": 40, "max_steps": 3, "checkpoint_interval": 2, "log_interval": 1}
    return site.world.flags("bert", out / "run", **sizes)


# The first two are the smoke trials.
PROGRAMS = {
    "extract": Program(
        extract.main,
        lambda site, out: [*of_bert(site, "teacher"), "--output", out / "student"],
        None,
    ),
    "train_teacher": Program(train_teacher.main, training_teacher, ("--force", "--seed", "7")),
    "binarized_data, pickle": Program(
        binarized_data.main,
        lambda site, out: binarizing(site, out, "--token_counts_dump", out / "counts"),
        ("--seed", "7"),
    ),
    "binarized_data, store": Program(
        binarized_data.main,
        lambda site, out: binarizing(
            site, out, "--format", "store", "--token_counts_dump", out / "counts"
        ),
        ("--seed", "7"),
    ),
    "binarized_data, shard": Program(
        binarized_data.main,
        lambda site, out: binarizing(site, out, "--format", "store", "--shard", "1/2"),
        ("--seed", "7"),
    ),
    "token_counts": Program(
        token_counts.main,
        lambda site, out: [
            *("--data_file", site.path("store.tiny-bert")),
            *("--token_counts_dump", out / "counts", "--vocab_size", 30522),
        ],
    ),
    "prepare_text": Program(
        prepare_text.main,
        lambda site, out: ["--file_path", site.path("text.txt"), "--output", out / "text"],
        ("--force",),
    ),
    "prepare_text, shuffled": Program(
        prepare_text.main,
        lambda site, out: [
            *("--file_path", site.path("text.txt"), "--output", out / "text"),
            *("--num_lines", "3000"),
        ],
        ("--force",),
    ),
    "join_tokens": Program(join_tokens.main, joining, prepare=place_shards),
    "extract_distilbert": Program(
        extract_distilbert.main,
        lambda site, out: [
            *("--model_type", "bert", *of_bert(site, "model_name")),
            *("--dump_checkpoint", out / "first.pth"),
        ],
        ("--force",),
    ),
    "train": Program(train.main, distilling, None),
    "run_task": Program(run_task.main, fine_tuning, ("--overwrite_output_dir",), prepare=make_mrpc),
    "run_squad": Program(
        run_squad_w_distillation.main, answering, ("--overwrite_output_dir",), prepare=make_squad
    ),
    "evaluate_lm": Program(evaluate_lm.main, evaluating),
    "report": Program(report.main, reporting, ("--measure",), prepare=place_student),
    "compare_runs": Program(
        compare_runs.main,
        lambda site, out: [site.path("run"), site.path("run-2"), "--output", out / "drawn.png"],
        ("--x", "epoch"),
    ),
    "inspect_data": Program(
        inspect_data.main,
        lambda site, out: [site.path("store.tiny-bert"), "--json", out / "facts.json"],
    ),
    "latency": Program(
        latency.main,
        lambda site, out: [
            *("--models", site.world.teachers["bert"], site.path("student"), "--passes", 3),
            *("--batch_sizes", 1, "--num_sentences", 2, "--json", out / "latency.json"),
        ],
    ),
    "trim_vocabulary": Program(
        trim_vocabulary.main,
        lambda site, out: [
            *of_bert(site, "teacher"),
            *("--data_file", site.path("store.tiny-bert"), "--keep", 100),
            *("--output", out / "trimmed"),
        ],
        None,
    ),
}


def make_site(bench) -> Site:
    """Make what the programs read, once for all calls."""
    site = Site(bench.world, bench.world.folder / "full-disks")
    own = Site(bench.world, bench.folder / "site")
    if site.folder.exists():
        return site
    own.folder.mkdir()
    write_text(own.path("text.txt"), 3000, 1)
    write_text(own.path("few.txt"), 20, 2)
    binarize(bench.world, "bert", own.path("text.txt"), own.path("store"), "store")
    config = json.loads((bench.world.teachers["bert"] / "config.json").read_text())
    config |= {"num_hidden_layers": 1}
    own.path("bert.json").write_text(json.dumps(config))
    quietly(extract.main, *of_bert(own, "teacher"), "--output", own.path("student"))
    quiet_run(bench, distilling(own, own.folder))
    shutil.copytree(own.path("run"), own.path("run-2"))
    with contextlib.suppress(OSError):  # another call was first
        os.rename(own.folder, site.folder)
    return site


def quiet_run(bench, flags: list) -> None:
    """Train in a forked process. Raises RuntimeError."""
    ended, _ = watched(training(list(map(str, flags))), bench.folder / "log-site", bench.folder)
    if ended.status != 0:
        raise RuntimeError(str(ended))


def watched(action: Callable[[], None], log: Path, disk: Path) -> tuple[Ended, int]:
    """Run a program in a forked process: (how it ended, the most bytes that the disk held)."""
    pid, deadline, most = start_child(action, log), time.monotonic() + LIMIT_S, 0
    while (status := end_if_over(pid)) is None and time.monotonic() < deadline:
        most = max(most, used(disk))
        time.sleep(0.001)
    if status is None:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return Ended(status, log.read_text(errors="replace")), most


def used(disk: Path) -> int:
    """Count the bytes in use on a disk."""
    facts = os.statvfs(disk)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def calling(program: Program, flags: list, scratch: Path | None) -> Callable[[], None]:
    """Return the call that `if __name__ ..` makes; scratch: a folder for temporary files."""

    def run() -> None:
        torch.set_num_threads(1)
        exit_on_sigterm()
        if scratch is not None:
            tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        program.main(list(map(str, flags)))

    return run


def disk_full(bench) -> None:
    """T38: a program on a disk of eight sizes: one line, nothing partial, old files intact."""
    torch.set_num_threads(1)
    name = list(PROGRAMS)[bench.number % len(PROGRAMS)]
    is_over = bench.number // len(PROGRAMS) % 2 == 1 and PROGRAMS[name].over is not None
    site = make_site(bench)
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(bench.folder))
        except (OSError, AttributeError) as error:
            bench.note(f"no disk was filled: {error}")
            return
        mount("-o", f"remount,size={LARGE}", disk)
        Trial(bench, name, site, disk, is_over).run()


class Trial:
    """One program on one disk. is_over: old outputs are there, which it may replace."""

    def __init__(self, bench, name: str, site: Site, disk: Path, is_over: bool):
        self.bench, self.name, self.site, self.disk = bench, name, site, disk
        self.program, self.is_over = PROGRAMS[name], is_over
        self.out, self.scratch = disk / "out", disk / "scratch"
        self.kept = bench.folder / "kept"  # the output folder before the trial

    def run(self) -> None:
        """Run with room, then at each size."""
        self.out.mkdir()
        self.scratch.mkdir()
        (self.disk / "ballast").write_bytes(bytes(PAGE))  # a disk of 0 bytes has no end
        self.program.prepare(self.site, self.out)
        shutil.copytree(self.out, self.kept)
        flags = self.program.flags(self.site, self.out)
        ended, most = self.attempt(flags, None)
        whole = contents(self.out)
        if ended.status != 0:
            self.bench.fail(f"{self.name}: with room: {ended}")
            return
        if self.is_over:
            flags = [*flags, *self.program.over]
            shutil.rmtree(self.kept)
            shutil.copytree(self.out, self.kept)
            ended, most = self.attempt(flags, None)
            whole |= contents(self.out)
            if ended.status != 0:
                self.bench.fail(f"{self.name}: over old files, with room: {ended}")
                return
        self.put_back()
        before = used(self.disk) // PAGE * PAGE
        num_refused = 0
        for number in range(NUM_SIZES):
            has_scratch = number % 2 == 1
            room = (most - before) * number // NUM_SIZES // PAGE * PAGE
            mount("-o", f"remount,size={before + room}", self.disk)
            ended, _ = self.attempt(flags, self.scratch if has_scratch else None)
            mount("-o", f"remount,size={LARGE}", self.disk)
            what = f"{self.name}{', over old files' * self.is_over}, {room} bytes free"
            what += ", temporary files there, too" * has_scratch
            num_refused += ended.status != 0
            for problem in self.problems(ended, whole):
                self.bench.fail(f"{what}: {problem}")
            self.bench.count()
            self.put_back()
        self.bench.note(f"{self.name}: {num_refused} of {NUM_SIZES} refused")

    def attempt(self, flags: list, scratch: Path | None) -> tuple[Ended, int]:
        """Run the program once."""
        log = self.bench.folder / "log"
        return watched(calling(self.program, flags, scratch), log, self.disk)

    def put_back(self) -> None:
        """Restore the output folder."""
        for folder in (self.out, self.scratch):
            shutil.rmtree(folder)
        shutil.copytree(self.kept, self.out)
        self.scratch.mkdir()

    def problems(self, ended: Ended, whole: dict[str, bytes]) -> Iterator[str]:
        """List what is wrong with how the program ended and with what it left."""
        old, now = contents(self.kept), contents(self.out)
        if ended.status != 0:
            if ended.status != 2 or not ended.is_clean:
                yield str(ended)
            if len(ended.errors) != 1 or str(self.disk) not in ended.errors[0]:
                yield f"expected one line that names a path: {ended.errors}"
        moved = {ASIDE.sub("", name): name for name in now if ASIDE.search(name)}
        kept = {name for name, place in moved.items() if now.pop(place) == old.get(name)}
        for name in sorted(old.keys() - now.keys() - kept):
            if ended.status != 0 and "checkpoint-" not in name:
                yield f"{name} is gone"
        for name, content in now.items():
            if content == old.get(name) or GROWING.search(name):
                continue
            if name not in whole:
                yield f"left {name}"
            elif problem := partial(self.out / name, content, whole[name]):
                yield f"{name} is partial: {problem}"
        for folder in {Path(name).parent for name in whole if name.endswith("model.safetensors")}:
            names = {name for name in now if Path(name).parent == folder}
            wanted = {str(folder / part) for part in ("model.safetensors", "tokenizer.json")}
            if str(folder / "config.json") in names and not wanted <= names:
                yield f"{folder} is a part of a model: {sorted(names)}"
        if left := [str(path) for path in self.scratch.rglob("*") if path.is_file()]:
            yield f"left temporary files {left}"


ASIDE = re.compile(r"\.old-[\d-]+(?=/)")  # an earlier run that --force moved
# What a run of train.py leaves on purpose: lock, log, and checkpoints, which T7 reads back.
GROWING = re.compile(
    r"^(run|teacher/training)/(run\.lock|metrics\.jsonl|log/|checkpoints/step-\d{8}/)"
)


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def partial(path: Path, content: bytes, whole: bytes) -> str | None:
    """Say why a file is not complete; None if it is."""
    try:
        if path.suffix in (".json", ".ipynb"):
            json.loads(content)
        elif path.suffix == ".safetensors":
            safetensors.torch.load(content)
        elif path.suffix == ".png":
            return None if content.endswith(b"IEND\xaeB`\x82") else "no end"
        elif path.suffix in (".pth", ".pt") or path.name in (
            "pytorch_model.bin",
            "training_args.bin",
        ):
            torch.load(path, weights_only=False)  # made here
        elif path.suffix == ".pickle":
            pickle.loads(content)
        elif len(content) < 0.5 * len(whole):
            return f"{len(content)} bytes of {len(whole)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
