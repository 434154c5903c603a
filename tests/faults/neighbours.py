"""Trials of a checkout of another user (T35), and of links and others' files in folders (T36)."""

import dataclasses
import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from faults.files import Ended, in_child
from faults.saves import KINDS, training

import evaluate_lm
import extract
import prepare_text
import report
import run_squad_w_distillation
import run_task
import token_counts
import utils
from distil.reporting import comparison
from distil.tasks import scores
from distil.training import checkpointing, run_folder

TINY = {"batch_size": 8, "max_steps": 3, "gradient_accumulation_steps": 1}
NOBODY = 12345
NOTE = "the checkout belongs to another user"


def program(main: Callable, *argv: object) -> Callable[[], None]:
    """Make a call of a program's main."""

    def run() -> None:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        main([str(word) for word in argv])

    return run


# --------------------------------------------------------------------------------------------------
# Calls of the programs
# --------------------------------------------------------------------------------------------------


def task_flags(bench, output: Path, *more: object) -> list[object]:
    """List the flags of a run of run_task.py; make its data, once."""
    data = bench.folder / "sst2"
    if not data.exists():
        data.mkdir()
        for name in ("train.tsv", "dev.tsv"):
            (data / name).write_text("sentence\tlabel\n" + "bake limo\t1\nlimo\t0\n" * 4)
    flags = ["--task", "sst2", "--model_name_or_path", bench.world.teachers["bert"]]
    flags += ["--data_dir", data, "--output_dir", output, "--max_steps", 1, "--no_cuda"]
    return [*flags, "--max_seq_length", 32, *more]


def squad_flags(bench, output: Path, *more: object) -> list[object]:
    """List the flags of a run of run_squad_w_distillation.py; make its data, once."""
    data = bench.folder / "few.json"
    if not data.exists():
        answer = {"text": "limo", "answer_start": 5}
        question = {"id": "1", "question": "bake what", "answers": [answer]}
        paragraph = {"context": "bake limo nu ra so ti", "qas": [question]}
        content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
        data.write_text(json.dumps(content))
    flags = ["--model_type", "bert", "--model_name_or_path", bench.world.teachers["bert"]]
    flags += ["--train_file", data, "--predict_file", data, "--output_dir", output, "--do_train"]
    sizes = ["--max_seq_length", 32, "--max_query_length", 8, "--doc_stride", 8, "--max_steps", 2]
    return [*flags, "--do_eval", "--save_steps", 1, "--no_cuda", *sizes, *more]


def scoring(bench, output: Path, *more: object) -> list[object]:
    """List the flags of a run of evaluate_lm.py."""
    data = bench.world.data("bert")
    return ["--model", bench.world.teachers["bert"], "--data_file", data, "--output", output, *more]


# --------------------------------------------------------------------------------------------------
# T35: a checkout of another user
# --------------------------------------------------------------------------------------------------


def foreign_checkout(folder: Path) -> Path:
    """Make a git checkout with one commit that belongs to another user. Raises PermissionError."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    folder.mkdir()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    return folder


def as_foreign(checkout: Path, action: Callable[[], None]) -> Callable[[], None]:
    """Let a program ask for the facts of a checkout in place of its own."""

    def run() -> None:
        for module in (run_folder, scores, comparison):
            module.git_facts = lambda folder: utils.git_facts(checkout)
        action()

    return run


def start_training(bench) -> list[tuple[Callable, Path]]:
    """Train for one update."""
    run = bench.folder / "run"
    flags = bench.world.flags(bench.rng.choice(KINDS), run, **{**TINY, "max_steps": 1})
    return [(training(flags), run / "pytorch_model.bin")]


def make_report(bench) -> list[tuple[Callable, Path]]:
    """Score two models and report."""
    student, out = bench.folder / "student", bench.folder / "report"
    shutil.copytree(bench.world.teachers["bert"], student)
    files = [bench.folder / f"{name}.json" for name in ("teacher", "student")]
    calls = [(program(evaluate_lm.main, *scoring(bench, files[0])), files[0])]
    flags = ["--model", student, "--data_file", bench.world.data("bert"), "--output", files[1]]
    calls.append((program(evaluate_lm.main, *flags), files[1]))
    flags = ["--teacher", bench.world.teachers["bert"], "--student", student, "--no_run"]
    flags += ["--output_dir", out, "--scores", *files]
    return [*calls, (program(report.main, *flags), out / "report.json")]


def score_task(bench) -> list[tuple[Callable, Path]]:
    """Fine-tune and score on a task."""
    out = bench.folder / "out"
    return [(program(run_task.main, *task_flags(bench, out)), out / "scores.json")]


def score_squad(bench) -> list[tuple[Callable, Path]]:
    """Fine-tune and score on SQuAD."""
    out, main = bench.folder / "out", run_squad_w_distillation.main
    return [(program(main, *squad_flags(bench, out)), out / "scores.json")]


def score_text(bench) -> list[tuple[Callable, Path]]:
    """Score held-out text."""
    out = bench.folder / "scores.json"
    return [(program(evaluate_lm.main, *scoring(bench, out)), out)]


# 10 starts of train.py for one call of each other program that records facts about git.
RECORDERS = [*[start_training] * 10, score_text, score_task, score_squad, make_report]


def foreign_owner(bench) -> None:
    """T35: run a program from a checkout of another user; nothing fails, nothing is lost."""
    try:
        checkout = foreign_checkout(bench.folder / "checkout")
    except PermissionError as error:
        bench.note(f"skipped: {error}")
        return
    calls = RECORDERS[bench.number % len(RECORDERS)](bench)
    for action, result in calls:
        ended = in_child(as_foreign(checkout, action), bench.folder / "log")
        if ended.status != 0 or not result.exists():
            bench.fail(f"{result.name}: {ended}")
        elif NOTE not in ended.text:
            bench.fail(f"{result.name}: not said: {ended}")
    log = bench.folder / "run" / "git_log.json"
    if log.exists() and json.loads(log.read_text()).get("note") != NOTE:
        bench.fail(f"not recorded: {log.read_text()}")


# --------------------------------------------------------------------------------------------------
# T36: links and others' files
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Neighbourhood:
    """Files of a user beside and inside the folders that a program writes to.

    kept: path -> content, mode and kind of each; they must stay.
    """

    folder: Path
    rng: random.Random
    kept: dict[Path, tuple] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outside = self.folder / "outside"
        (self.outside / "more").mkdir(parents=True)
        for name in ("thesis.txt", "more/photo.jpg", "more/config.json"):
            self.keep(self.outside / name, write=True)

    def keep(self, path: Path, *, write: bool = False) -> None:
        """Note a file or link that must stay; write it first."""
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{path.name} of years " * self.rng.randint(1, 3000))
            path.chmod(self.rng.choice([0o644, 0o600, 0o640]))
        self.kept[path] = facts(path)

    def plant(self, folder: Path) -> None:
        """Put files, links and hard links of others into a folder, with names like the run's."""
        names = self.rng.sample(FOREIGN_NAMES, 4)
        self.keep(folder / names[0], write=True)
        (folder / names[1]).symlink_to(self.outside / "thesis.txt")
        self.keep(folder / names[1])
        os.link(self.outside / "thesis.txt", folder / names[2])
        self.keep(folder / names[2])
        (folder / names[3]).symlink_to(self.outside / "more")
        self.keep(folder / names[3])

    def back_up(self, folder: Path) -> None:
        """Copy a folder as `cp -al` does: the copy shares its files."""
        copy = self.folder / f"backup-of-{folder.name}"
        shutil.copytree(folder, copy, copy_function=os.link, symlinks=True)
        for path in copy.rglob("*"):
            if stat.S_ISREG(path.lstat().st_mode):
                self.keep(path)

    def problems(self) -> list[str]:
        """List the files that were changed or are gone."""
        return [
            f"{path.relative_to(self.folder)} was {'changed' if os.path.lexists(path) else 'lost'}"
            for path, before in self.kept.items()
            if not os.path.lexists(path) or facts(path) != before
        ]


FOREIGN_NAMES = (
    *("notes.txt", "step-by-step.tmp", ".mine.tmp", ".export-mine", ".trash-mine"),
    *("events.out.tfevents.17.host.1.0", "events.out.tfevents.18.host.1.0.distil-99999999"),
    *("seed-corpus", "checkpoint-mine", "step-9", "model-notes.safetensors.txt", "old-notes"),
    *("model_epoch_last.pth.txt", "thesis.json", "log.txt", "best-of.json", "README.old.md"),
)


def facts(path: Path) -> tuple:
    """Describe a file by its kind, mode and content; a link by its target."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link", os.readlink(path)
    return stat.S_IFMT(mode), stat.S_IMODE(mode), path.read_bytes()


def stopped_run(bench, run: Path, **changes) -> list[str]:
    """Make a run that has not finished, with held-out figures; return its flags."""
    kind, held_out = bench.rng.choice(KINDS), {"eval_interval": 1, "log_interval": 1}
    held_out |= {"checkpoint_interval": 1, "keep_checkpoints": 2, **changes}
    data = bench.world.data(kind)
    flags = bench.world.flags(kind, run, **TINY, eval_data_file=data, **held_out)
    must_end(in_child(training(flags), bench.folder / "log"), 0)
    (run / "pytorch_model.bin").unlink()
    shutil.rmtree(checkpointing.checkpoints_in(run / "checkpoints")[0])
    return flags


def must_end(ended: Ended, *statuses: int) -> None:
    """Raise RuntimeError for another end."""
    if ended.status not in statuses or "Traceback" in ended.text:
        raise RuntimeError(str(ended))


def resumed(bench, near: Neighbourhood) -> Callable[[], None]:
    """Resume a run: others' files are in each of its folders."""
    run = bench.folder / "run"
    flags = stopped_run(bench, run)
    near.back_up(run)
    for folder in ("", "log/train", "log/parameters", "checkpoints", "best", "model"):
        near.plant(run / folder)
    for path in checkpointing.checkpoints_in(run / "checkpoints"):
        near.plant(path)
    return training([*flags, "--resume"])


def resumed_through_links(bench, near: Neighbourhood) -> Callable[[], None]:
    """Resume a run whose own files are links: refused, or the links are replaced."""
    run = bench.folder / "run"
    flags = stopped_run(bench, run)
    near.back_up(run)
    files = [path for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    for number, path in enumerate(bench.rng.sample(files, 5)):
        elsewhere = near.outside / f"{number}-{path.name}"
        shutil.move(path, elsewhere)
        path.symlink_to(elsewhere)
        near.keep(elsewhere)
    return training([*flags, "--resume"])


def resumed_in_links(bench, near: Neighbourhood) -> Callable[[], None]:
    """Resume a run one of whose folders is a link: refused."""
    run = bench.folder / "run"
    flags = stopped_run(bench, run)
    name = bench.rng.choice(["log/train", "log/parameters", "log", "best", "model", "checkpoints"])
    elsewhere = near.outside / "folder"
    shutil.move(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    for path in elsewhere.rglob("*"):
        if path.is_file():
            near.keep(path)
    return training([*flags, "--resume"])


def started_again(bench, near: Neighbourhood) -> Callable[[], None]:
    """Start in the folder of a start that failed."""
    run = bench.folder / "run"
    flags = stopped_run(bench, run)
    for name in ("checkpoints", "best", "model", "checkpoint.pth", "model_epoch_0.pth"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (run / "metrics.jsonl").write_text("")
    near.back_up(run)
    for folder in ("", "log/train", "log/parameters"):
        near.plant(run / folder)
    return training(flags)


def forced(bench, near: Neighbourhood) -> Callable[[], None]:
    """Move an old run aside, with all that lies in it."""
    run = bench.folder / "run"
    flags = stopped_run(bench, run)
    near.back_up(run)
    return training([*flags, "--force"])


def task_again(bench, near: Neighbourhood) -> Callable[[], None]:
    """Replace the results of run_task.py."""
    out, main = bench.folder / "out", run_task.main
    flags = task_flags(bench, out, "--seeds", 1, 2, "--save_models", "all")
    must_end(in_child(program(main, *flags), bench.folder / "log"), 0)
    near.back_up(out)
    for folder in ("", "seed-1", "seed-2"):
        near.plant(out / folder)
    data = shutil.copytree(bench.folder / "sst2", out / "seed-corpus-of-mine")
    for path in data.iterdir():
        near.keep(path)
    more = ["--seeds", *bench.rng.choice([(1,), (3,), (2, 1)]), "--overwrite_output_dir"]
    return program(main, *task_flags(bench, out, "--data_dir", data, *more))


def squad_again(bench, near: Neighbourhood) -> Callable[[], None]:
    """Replace the results of run_squad_w_distillation.py."""
    out, main = bench.folder / "out", run_squad_w_distillation.main
    must_end(in_child(program(main, *squad_flags(bench, out)), bench.folder / "log"), 0)
    near.back_up(out)
    for folder in ("", "checkpoint-1", "checkpoint-2"):
        near.plant(out / folder)
    return program(main, *squad_flags(bench, out, "--overwrite_output_dir", "--seed", 3))


def output_again(bench, near: Neighbourhood) -> Callable[[], None]:
    """Write an output whose name is taken by a file or link of others: refused without --force."""
    folder = bench.folder / "outputs"
    folder.mkdir()
    teacher = bench.world.teachers["gpt2"]
    main, flags = bench.rng.choice(
        [
            (evaluate_lm.main, scoring(bench, folder / "name")),
            (extract.main, ["--model_type", "gpt2", "--model_name", teacher, "--dump_checkpoint"]),
            (prepare_text.main, ["--file_path", bench.world.text, "--output"]),
            (
                token_counts.main,
                ["--data_file", bench.world.data("bert"), "--token_counts_dump"],
            ),
        ]
    )
    path = folder / "name"
    flags = flags if path in flags else [*flags, path]
    kind = bench.rng.choice(["file", "link", "hard link"])
    if kind == "file":
        near.keep(path, write=True)
    elif kind == "link":
        path.symlink_to(near.outside / "thesis.txt")
        near.keep(path)
    else:
        os.link(near.outside / "thesis.txt", path)
        near.keep(path)
    if kind != "file" and bench.rng.random() < 0.5:
        del near.kept[path]  # the name is replaced, and what it led to stays
        flags.append("--force")
    near.plant(folder)
    return program(main, *flags)


SCENES = [
    resumed,
    task_again,
    resumed_through_links,
    output_again,
    started_again,
    squad_again,
    resumed_in_links,
    resumed,
    forced,
    output_again,
]


def among_neighbours(bench) -> None:
    """T36: run a program among links and files of others; none may be changed or deleted."""
    near = Neighbourhood(bench.folder, bench.rng)
    scene = SCENES[bench.number % len(SCENES)]
    action = scene(bench, near)
    ended = in_child(action, bench.folder / "log", limit_s=90)
    what = scene.__name__
    if ended.status not in (0, 2) or "Traceback" in ended.text:
        bench.fail(f"{what}: {ended}")
    if ended.status != 0 and scene in (resumed, started_again, forced, task_again, squad_again):
        bench.fail(f"{what}: refused: {ended}")
    for problem in near.problems():
        bench.fail(f"{what}: {problem}; {ended}")
    bench.note(f"{what}: {'done' if ended.status == 0 else 'refused'}")
