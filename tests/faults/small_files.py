"""Trials of small files that hold what they should not (T39), with each program that reads them.

A trial changes one file: wrong types, numbers that none are, names of code, nests without end. Each
program must end with status 0, or with 2 and a line that names the file; nothing of the file may be
executed, asked of the network, or shown as markup.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
from faults.bench import Bench
from faults.files import in_child, quietly, settle_manifest
from stand_ins import World

import binarized_data
import compare_runs
import evaluate_lm
import extract
import inspect_data
import join_tokens
import prepare_text
import report
import token_counts
import train
from distil.data.cards import write_card
from distil.tasks.scores import write_scores
from distil.tasks.squad import read_predictions, read_questions
from distil.training import checkpointing
from distil.workflow import Stages

LIMIT_S = 60
PER_CALL = 5
Action = Callable[[], None]


@dataclasses.dataclass
class Subject:
    """Files to change, by name below a folder, and what reads them.

    settle: name of a file -> what is called after it changed, so that checksums fit it. pages: what
    a program writes for people.
    """

    files: list[str]
    readers: dict[str, Action]
    settle: dict[str, Action] = dataclasses.field(default_factory=dict)
    pages: list[str] = dataclasses.field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# Changes
# --------------------------------------------------------------------------------------------------

MARKUP = "<script>alert(1)</script>|a](javascript:b)`c`*d* _e_ $f$"
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 10**4000, 1e308),
    *("", "x", "a\0b", "\ud800", "a" * 10**5, MARKUP, "../../../etc/passwd", "/dev/zero", "nan"),
    *("kernels-community/flash-attn2", "evil/kernel:run", "os.system", "7", "%s %d {0} {a}", "-1"),
    *([], {}, [1], [[]], ["x"], {"a": 1}, {"": None}, [None], {"content": 3}, [[1, "x"], {}]),
]
# Text that json.dumps does not write, in the place of a value.
TEXTS = ["1e400", "-1e400", "NaN", "Infinity", "-0", "9" * 5000, "[" * 10**5, '{"a":' * 10**5]
TEXTS += ['"' + "\\u0000" * 50 + '"', "[" * 90 + "]" * 90]
WHOLE = [
    *(b"", b" ", b"null", b"[]", b"{}", b"[1, 2]", b"7", b'"x"', b"true", b"\x00" * 5000),
    *(b"\xff\xfe{\x00}\x00", b"\x80\x04]q\x00.", b"{", b"[" * 10**5, b'{"a":' * 10**5, b"{}{}"),
    *(b'{"\\ud800": 1}', b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"-", b"1" * 10**5, b"{'a': 1}"),
]
PLACE = "@@here@@"


def places_of(content: Any, above: tuple = ()) -> list[tuple]:
    """List the way to each value of JSON content: keys and numbers."""
    found = [above] if above else []
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    for key, part in parts:
        if isinstance(part, dict | list):
            found += places_of(part, (*above, key))
        else:
            found.append((*above, key))
    return found


def changed_text(text: str, rng) -> tuple[str, str]:
    """Change one place of JSON: (what was done, the new text)."""
    content = json.loads(text)
    if not isinstance(content, dict | list) or not content:
        return "replaced", json.dumps(rng.choice(VALUES))
    *way, last = rng.choice(places_of(content))
    holder = functools.reduce(lambda part, key: part[key], way, content)
    where, how = ".".join(map(str, (*way, last))), rng.random()
    if how < 0.1:
        holder.pop(last)
        return f"without {where}", json.dumps(content)
    if how < 0.2 and isinstance(holder, dict):
        key = rng.choice([MARKUP, "\ud800", "a" * 10**4, "__class__", "get_lr", ""])
        holder[key] = holder[last]
        return f"{key[:20]!r} beside {where}", json.dumps(content)
    if how < 0.3 and isinstance(holder, dict):
        old, value = json.dumps(holder[last]), json.dumps(rng.choice(VALUES))
        holder[last] = PLACE
        twin = f"{old}, {json.dumps(last)}: {value}"
        return f"{where} twice", json.dumps(content).replace(f'"{PLACE}"', twin)
    if how < 0.45:
        holder[last], raw = PLACE, rng.choice(TEXTS)
        return f"{where} is {raw[:20]}", json.dumps(content).replace(f'"{PLACE}"', raw)
    if how < 0.55:
        holder[last] = [holder[last]] if rng.random() < 0.5 else {"a": holder[last]}
        return f"{where} wrapped", json.dumps(content)
    holder[last] = rng.choice(VALUES)
    return f"{where} is {str(holder[last])[:40]!r}", json.dumps(content)


def change(path: Path, rng) -> str:
    """Change a file, and say how."""
    if rng.random() < 0.2:
        whole = rng.choice(WHOLE)
        path.write_bytes(whole)
        return f"{path.name} is {whole[:20]!r}"
    if path.name == "counts":
        counts = pickle.loads(path.read_bytes())  # of this trial's own
        value = rng.choice([2**63, 2**64, -1, 1.5, "1", None, [1], 10**400, True, 2**62])
        counts[rng.randrange(len(counts))] = value
        path.write_bytes(pickle.dumps(counts if rng.random() < 0.8 else [value]))
        return f"a count is {str(value)[:20]}"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        how, lines[number] = changed_text(lines[number], rng)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"{path.name}, line {number + 1}: {how}"
    how, text = changed_text(text, rng)
    path.write_text(text, encoding="utf-8")
    return f"{path.name}: {how}"


# --------------------------------------------------------------------------------------------------
# Files and their readers
# --------------------------------------------------------------------------------------------------

SHORT = {"max_steps": 1, "gradient_accumulation_steps": 1}


def program(module, *flags: object) -> Action:
    """Return a call of a program."""
    return functools.partial(module.main, [str(flag) for flag in flags])


def training(world: World, run: Path, kind: str = "bert", **changes: object) -> Action:
    """Return a call of train.py."""
    return program(train, *world.flags(kind, run, **SHORT, **changes))


def of_report(world: World, here: Path) -> Subject:
    """Scores, figures and run files that a report and a card are made of."""
    student, teacher = here / "run" / "model", world.teachers["bert"]
    quietly(train.main, *world.flags("bert", here / "run", **SHORT))
    for name, model, value in (("s", student, 80.0), ("t", teacher, 90.0)):
        runs = [
            {"seed": k, "metrics": {"score": value + k, "accuracy": value + k}, "num_examples": {}}
            for k in range(3)
        ]
        path = here / f"{name}.json"
        write_scores(path, task="sst2", model=f"{model}", runs=runs, teacher="t", flags={})
    out = here / "out"
    flags = ["--teacher", teacher, "--student", student, "--output_dir", out, "--write_card"]
    scores = ["--scores", here / "s.json", here / "t.json"]
    timing = ["--tasks", "sst2", "--passes", 3, "--num_sentences", 2, "--batch_sizes", 1]
    quietly(report.main, *flags, *scores, *timing)
    kept = [path.relative_to(here).as_posix() for path in out.rglob("*.json")]
    names = ["run/parameters.json", "run/git_log.json", *kept]
    reader = {"report": program(report, *flags, "--no_run")}
    return Subject(names, reader, pages=["out/report.md", "run/model/README.md"])


def of_runs(world: World, here: Path) -> Subject:
    """The flags and figures of runs that are compared; flags that are read as --config."""
    for name in ("a", "b"):
        quietly(train.main, *world.flags("bert", here / name, **SHORT))
    flags = [here / "a", here / "b", "--output", here / "c.png"]
    config = ["--config", here / "a" / "parameters.json", "--dump_path", here / "new"]
    readers = {"compare": program(compare_runs, *flags), "train": program(train, *config)}
    return Subject(["a/parameters.json", "a/metrics.jsonl"], readers)


def of_checkpoint(world: World, here: Path) -> Subject:
    """A checkpoint's state and manifest, and the files of the run around it."""
    run, data = here / "run", world.data("bert")
    held_out = {"eval_data_file": data, "eval_interval": 1}
    sizes = {**held_out, "max_steps": 2, "checkpoint_interval": 1, "keep_checkpoints": 3}
    flags = world.flags("bert", run, gradient_accumulation_steps=1, **sizes)
    quietly(train.main, *flags)
    last, step, first = checkpointing.checkpoints_in(run / "checkpoints")
    shutil.rmtree(last)
    shutil.rmtree(first)
    step = step.relative_to(here)
    names = ["state.json", "MANIFEST.json"]
    files = [f"{step}/{name}" for name in (*names, "state.json", "state.json")]
    settle = {file: functools.partial(settled, here / step) for file in files}
    others = [f"run/{name}" for name in ("run.lock", "parameters.json", "best/best.json")]
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    return Subject([*files, *others], {"resume": program(train, *flags, "--resume")}, settle)


def settled(step: Path) -> None:
    """Correct a manifest, where it is one."""
    with contextlib.suppress(Exception):
        settle_manifest(step)


def of_teacher(world: World, here: Path, kind: str = "bert") -> Subject:
    """Everything in a model's folder that is JSON, as teacher, student and tokenizer."""
    folder = Path(shutil.copytree(world.teachers[kind], here / "model"))
    (folder / "generation_config.json").write_text('{"max_length": 20, "eos_token_id": 3}')
    (folder / "special_tokens_map.json").write_text('{"unk_token": "[UNK]"}')
    (folder / "extraction.json").write_text('{"teacher": "a", "layers": [0, 1], "of": 4}')
    state = safetensors.torch.load_file(folder / "model.safetensors")
    if world.teachers[kind].name.endswith("gpt2"):  # weights in shards
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "part.bin")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "part.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    text, out = world.text, here / "out"
    binarize = ["--file_path", text, "--tokenizer_type", "auto", "--tokenizer_name", folder]
    scores = ["--data_file", world.data(kind), "--output", here / "scores.json"]
    readers = {
        "train": training(world, here / "run", kind, teacher_name=folder),
        "binarize": program(binarized_data, *binarize, "--dump_file", out / "dump"),
        "extract": program(extract, "--teacher", folder, "--output", out / "student"),
        "evaluate": program(evaluate_lm, "--model", folder, *scores),
    }
    if kind == "gpt2":
        flags = {"student": folder, "student_config": None, "student_type": None}
        readers["train student"] = training(world, here / "run2", kind, **flags)
    names = [path.name for path in folder.glob("*.json")]
    return Subject([f"model/{name}" for name in (*names, "config.json")], readers)


def of_student(world: World, here: Path, kind: str = "bert") -> Subject:
    """A student's configuration."""
    shutil.copy(world.config(kind), here / "student.json")
    reader = training(world, here / "run", kind, student_config=here / "student.json")
    return Subject(["student.json"], {"train": reader})


def of_counts(world: World, here: Path) -> Subject:
    """Counts, with their card and without, and the cards of token files."""
    for source, name in ((world.counts("bert"), "counts"), (world.data("bert"), "data.pickle")):
        shutil.copy(source, here / name)
        shutil.copy(f"{source}.json", here / f"{name}.json")
    settle = {
        "counts": functools.partial(os.unlink, here / "counts.json"),
        **{
            f"{name}.json": functools.partial(settled_card, here / f"{name}.json")
            for name in ("counts", "data.pickle")
        },
    }
    files = {"data_file": here / "data.pickle", "token_counts": here / "counts"}
    count = ["--data_file", here / "data.pickle", "--token_counts_dump", here / "new"]
    readers = {
        "train": training(world, here / "run", **files),
        "inspect": program(inspect_data, here / "data.pickle"),
        "count": program(token_counts, *count, "--vocab_size", 400),
    }
    return Subject(["counts", *(name for name in settle if name != "counts")], readers, settle)


def settled_card(path: Path) -> None:
    """Correct a card's checksum, where it is one."""
    with contextlib.suppress(Exception):
        card = json.loads(path.read_text(encoding="utf-8"))
        card.pop("card_sha256", None)
        write_card(path, card)


def of_shards(world: World, here: Path) -> Subject:
    """The cards of shards that are joined."""
    flags = ["--file_path", world.text, "--tokenizer_type", "bert", "--dump_file", here / "d"]
    for number in (1, 2):
        shard = ["--tokenizer_name", world.teachers["bert"], "--shard", f"{number}/2"]
        quietly(binarized_data.main, *flags, *shard)
    names = [path.name for path in here.glob("*.json")]
    settle = {name: functools.partial(settled_card, here / name) for name in names}
    return Subject(names, {"join": program(join_tokens, "--shards", here / "d.tiny-bert")}, settle)


def of_texts(world: World, here: Path) -> Subject:
    """Records of text, and what `datasets` writes beside them."""
    rows = [{"text": line} for line in world.text.read_text().splitlines()[:40]]
    (here / "rows.json").write_text(json.dumps(rows))
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": table}).save_to_disk(here / "saved")
    readers = {}
    for name in ("rows.json", "rows.jsonl", "saved"):
        flags = ["--file_path", here / name, "--output", here / f"{name}.txt", "--min_chars", 1]
        readers[name] = program(prepare_text, *flags)
        flags = ["--tokenizer_type", "bert", "--tokenizer_name", world.teachers["bert"]]
        flags = ["--file_path", here / name, "--dump_file", here / f"{name}.out", *flags]
        readers[f"binarize {name}"] = program(binarized_data, *flags)
    inner = [f"saved/train/{name}" for name in ("state.json", "dataset_info.json")]
    return Subject(["rows.json", "rows.jsonl", "saved/dataset_dict.json", *inner], readers)


def of_tasks(world: World, here: Path) -> Subject:
    """SQuAD's questions and predictions, and the marker of the quickstart."""
    entry = {"id": "q", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    article = {"title": "t", "paragraphs": [{"context": "Ann sings.", "qas": [entry]}]}
    (here / "squad.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    (here / "predictions.json").write_text('{"q": "Ann"}')
    (here / "marker.json").write_text('{"a": 1, "done": ["teacher"]}')
    options = {"with_impossible": False, "for_training": True}
    readers = {
        "questions": lambda: read_questions(here / "squad.json", "--train_file", **options),
        "predictions": lambda: read_predictions(here / "predictions.json", "--predictions"),
        "stages": lambda: Stages(here / "marker.json", {"a": 1}).run("student", print),
    }
    return Subject(["squad.json", "predictions.json", "marker.json"], readers)


SUBJECTS: list[Callable[[World, Path], Subject]] = [
    *(of_report, of_teacher, of_checkpoint, of_student, of_runs, of_counts, of_shards, of_texts),
    *(functools.partial(of_teacher, kind="gpt2"), of_tasks, of_report, of_checkpoint),
    *(functools.partial(of_student, kind="roberta"), functools.partial(of_teacher, kind="roberta")),
]


# --------------------------------------------------------------------------------------------------
# The trial
# --------------------------------------------------------------------------------------------------


def watch() -> None:
    """Report what this process asks of the network or starts, git apart, and stop it."""

    def on_event(event: str, arguments: tuple) -> None:
        told = f"{arguments}"[:200]
        is_git = event == "subprocess.Popen" and "git" in f"{arguments[1]}"
        if event in ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec") or (
            event == "subprocess.Popen" and not is_git
        ):
            os.write(2, f"ASKED {event} {told!r}\n".encode(errors="replace"))
            raise OSError("not in a trial")

    sys.addaudithook(on_event)


def hostile(bench: Bench) -> None:
    """T39: change small files, and read them by every program that does."""
    here, kept = bench.folder / "here", bench.folder / "kept"
    here.mkdir()
    subject = SUBJECTS[bench.number % len(SUBJECTS)](bench.world, here)
    shutil.copytree(here, kept)
    for _ in range(PER_CALL):
        name = bench.rng.choice(subject.files)
        how = change(here / name, bench.rng)
        if settle := subject.settle.get(name):
            settle()
        for label, read in subject.readers.items():
            attempt(bench, here / name, f"{how} ({label})", read)
        for page in subject.pages:
            check_page(bench, here / page, how)
        bench.count()
        shutil.rmtree(here)
        shutil.copytree(kept, here)


def attempt(bench: Bench, file: Path, what: str, read: Action) -> None:
    """Run a program in a child; it must end well, or name the file."""

    def run() -> None:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        watch()
        read()

    ended = in_child(run, bench.folder / "log", LIMIT_S)
    what = what.encode("ascii", "backslashreplace").decode()
    if "ASKED" in ended.text:
        bench.fail(f"{what}: {next(line for line in ended.text.splitlines() if 'ASKED' in line)}")
    if not ended.is_clean:
        bench.fail(f"{what}: {ended}")
    elif ended.status == 2:
        known = (file.name, str(file.parent))
        if not any(name in line for line in ended.errors for name in known):
            bench.fail(f"{what}: no line names {file.name}: {ended.errors}")
        if (longest := max(map(len, ended.errors), default=0)) > 2000:
            bench.fail(f"{what}: a line of {longest} characters")


def check_page(bench: Bench, page: Path, how: str) -> None:
    """Fail where markup of a name is markup of a page, outside of code."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    text = re.sub(r"```.*?```|`[^`\n]*`|^---\n.*?^---\n", "", text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?<!\\)<script|(?<!\\)\]\(javascript", text):
        bench.fail(f"{how}: {page.name} has {text[found.start() - 40 : found.end()]!r}")
