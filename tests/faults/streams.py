"""Trials of output that can't be written (T30), of signals (T31), of Ctrl-C at the start (T32).

Called by scripts/fault_injection.py.
"""

import contextlib
import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from faults.runs import (
    MICRO_BATCHES,
    SHAPES,
    Counted,
    Ranks,
    check_stop,
    digest,
    finish,
    reference,
    run_flags,
    wait_at_random,
)

import train
from distil.system.start import AS_SIGTERM, begin_program
from distil.training import checkpointing

# --------------------------------------------------------------------------------------------------
# T30: output
# --------------------------------------------------------------------------------------------------


class Broken:
    """The output of a run's processes, which breaks after a number of updates; 0: before them all.

    A pipe or a terminal is broken by this process, from outside; the others by each rank itself.
    """

    def __init__(self, how: str, moment: int):
        self.how, self.moment = how, moment
        self.ends: tuple[int, int] | None = None
        if how in ("closed pipe", "closed terminal"):
            self.ends = os.pipe() if how == "closed pipe" else pty.openpty()

    def plant(self, rank: int) -> None:
        """Direct a rank's output to where it breaks."""
        if self.ends is not None:
            os.close(self.ends[0])
            redirect(self.ends[1])
        elif self.how == "closed streams":
            for name, descriptor in (("stdout", 1), ("stderr", 2)):
                os.close(descriptor)
                setattr(sys, name, None)  # as the interpreter does
            begin_program()
        elif self.moment == 0:
            self._fill()
        else:
            kept, updates = train.Distiller.launch, itertools.count(1)

            def launch(*arguments, **options):
                if next(updates) == self.moment:
                    self._fill()
                return kept(*arguments, **options)

            train.Distiller.launch = launch

    def _fill(self) -> None:
        redirect(os.open("/dev/full", os.O_WRONLY))

    def break_off(self) -> None:
        """Close the reader's end; the writer's is the ranks'."""
        if self.ends is not None:
            os.close(self.ends[0])
            self.ends = None


def redirect(descriptor: int) -> None:
    """Make a descriptor this process's output."""
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


HOWS = ("closed pipe", "full disk", "closed terminal", "closed streams")


def unwritable_output(bench) -> None:
    """T30: break a run's output at a random moment, or before it starts: nothing may change."""
    how, shape = HOWS[bench.number % len(HOWS)], bench.rng.choice(SHAPES)
    expected, _ = reference(bench, shape)
    run, updates = bench.folder / "run", MICRO_BATCHES // (shape[1] * shape[2])
    broken, counted = Broken(how, bench.rng.randint(0, updates)), Counted(0.005)
    what = f"{shape}, {how} at update {broken.moment}"

    def plant(rank: int) -> None:
        broken.plant(rank)
        counted.plant(rank)

    ranks = Ranks(run_flags(bench, shape, run), bench.folder / "log", shape[1], plant)
    if broken.ends is not None:
        os.close(broken.ends[1])
    counted.wait_for(b".", broken.moment, ranks)
    broken.break_off()
    statuses = ranks.wait()
    bench.note(how)
    if any(statuses):
        bench.fail(f"{what}: statuses {statuses}: {ranks.output()[-800:]}")
    elif digest(run) != expected:
        bench.fail(f"{what}: another digest than the undisturbed run's")


# --------------------------------------------------------------------------------------------------
# T31: signals
# --------------------------------------------------------------------------------------------------


def hung_up(bench) -> None:
    """T31: send SIGHUP or its like to one rank or all; every fifth run ignores SIGHUP."""
    shape, run = SHAPES[bench.number % len(SHAPES)], bench.folder / "run"
    expected, _ = reference(bench, shape)
    is_ignored = bench.number % 5 == 4
    number = signal.SIGHUP if is_ignored else bench.rng.choice(AS_SIGTERM)
    who = [bench.rng.randrange(shape[1])] if bench.rng.random() < 0.5 else None
    what = f"{signal.Signals(number).name}{', ignored' if is_ignored else ''}"
    counted = Counted(0.01)

    def plant(rank: int) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        begin_program()
        counted.plant(rank)

    ranks = Ranks(run_flags(bench, shape, run), bench.folder / "stop.log", shape[1], plant)
    wait_at_random(bench, shape, counted, ranks)
    ranks.send(number, who)
    bench.note(what)
    if is_ignored:
        if any(ranks.wait()) or digest(run) != expected:
            bench.fail(f"{shape} {what}: {ranks.statuses}: {ranks.output()[-600:]}")
        return
    statuses = ranks.wait()
    if "Stopped after update" in ranks.output():
        check_stop(bench, shape, run, what, signal.SIGTERM, ranks)
    elif -signal.SIGTERM not in statuses:  # 143 to a shell: before or after the training
        bench.fail(f"{shape} {what}: statuses {statuses}: {ranks.output()[-600:]}")
    if checkpointing.newest(run / "checkpoints") is None:
        shutil.rmtree(run, ignore_errors=True)
    finish(bench, shape, run, expected, what)


# --------------------------------------------------------------------------------------------------
# T32: Ctrl-C at the start
# --------------------------------------------------------------------------------------------------

ROOT = Path(train.__file__).resolve().parent
# Until a program's first statement, which takes Ctrl-C over, Python prints a traceback.
BEGIN = f"""
import os, runpy, sys
sys.path[:1] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
from distil.system import start

def begin_program(begin=start.begin_program):
    begin()
    os.write(1, b".")

start.begin_program = begin_program
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LOOKED_AT_S = 5  # from then on; of a shorter program a part
ENDING_S = 1  # in which a program that was ending ends with its own status


def commands(bench) -> dict[str, list]:
    """List each program with flags for a small job, or with some that are refused late."""
    world, folder, teacher = bench.world, bench.folder, bench.world.teachers["bert"]
    data, model = world.data("bert"), ["--model_type", "bert", "--model_name", teacher]
    tokenizer = ["--tokenizer_type", "bert", "--tokenizer_name", teacher]
    pair = ["--teacher", teacher, "--student", teacher]
    task = ["--model_name_or_path", teacher, "--do_train", "--do_eval", "--max_steps", 1]
    return {
        "train.py": world.flags("bert", folder / "run", max_steps=4),
        "benchmark.py": ["--size", "tiny", "--json", folder / "out.json"],
        "benchmark_data.py": ["--text", world.text, "--json", folder / "out.json"],
        "binarized_data.py": [*tokenizer, "--file_path", world.text, "--dump_file", folder / "out"],
        "compare_runs.py": [folder / "missing", "--output", folder / "out.png"],
        "evaluate_lm.py": [
            "--model",
            teacher,
            "--data_file",
            data,
            "--output",
            folder / "out.json",
        ],
        "extract.py": [*model, "--dump_checkpoint", folder / "out.pth"],
        "extract_distilbert.py": [*model, "--dump_checkpoint", folder / "out.pth"],
        "fault_injection.py": ["--only", "T4", "--scratch", folder, "--state", folder / "out.json"],
        "inspect_data.py": [data, *tokenizer, "--json", folder / "out.json"],
        "join_tokens.py": ["--shards", folder / "missing"],
        "latency.py": ["--models", teacher, "--json", folder / "out.json"],
        "prepare_text.py": ["--file_path", world.text, "--output", folder / "out.txt"],
        "publish.py": [teacher, "--dry_run"],
        "quickstart.py": ["--short", "--text", world.text, "--output", folder / "out"],
        "report.py": [*pair, "--output_dir", folder / "out"],
        "run_squad_w_distillation.py": ["--model_type", "bert", *task, *squad_files(folder)],
        "run_task.py": ["--task", "sst2", *task, *task_files(folder)],
        "study.py": ["--teacher", teacher, "--data_file", data, "--held_out", data]
        + ["--output", folder / "out", "--seeds", 1, "--max_steps", 2, "--variants", "mse_alone"],
        "token_counts.py": ["--data_file", data, "--token_counts_dump", folder / "out.pickle"],
        "train_teacher.py": [
            *("--config", world.config("bert"), "--tokenizer_name", teacher, "--data_file", data),
            *("--output_dir", folder / "out", "--num_steps", 2),
        ],
        "trim_vocabulary.py": ["--teacher", teacher, "--data_file", data, "--keep", 100]
        + ["--output", folder / "out"],
    }


NUM_PROGRAMS = 22


def task_files(folder: Path) -> list:
    """Write a task of two rows; return the flags."""
    (folder / "task").mkdir(exist_ok=True)
    for name in ("train.tsv", "dev.tsv"):
        (folder / "task" / name).write_text("sentence\tlabel\nba ke\t1\nli mo\t0\n")
    return ["--data_dir", folder / "task", "--output_dir", folder / "out"]


def squad_files(folder: Path) -> list:
    """Write a question; return the flags."""
    question = {"id": "q", "question": "ba", "answers": [{"text": "ke", "answer_start": 3}]}
    paragraphs = [{"context": "ba ke li", "qas": [question]}]
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    files = [f"--{name}_file" for name in ("train", "predict")]
    return [*(x for f in files for x in (f, folder / "squad.json")), "--output_dir", folder / "out"]


def start(bench, program: str) -> subprocess.Popen:
    """Start a program in its own process group; return when its first statement ran."""
    path = ROOT / program if program == "train.py" else ROOT / "scripts" / program
    words = [sys.executable, "-c", BEGIN, path, *commands(bench)[program]]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "PYTEST"))}
    with open(bench.folder / "log", "wb") as log:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=log,
            env=clean | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
            # A shell's background job ignores Ctrl-C, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    process.stdout.read(1)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process


def ends_within(process: subprocess.Popen, limit_s: float) -> bool:
    """Wait so long for the end of a program; return whether it came."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit_s)
    return process.returncode is not None


def end_group(process: subprocess.Popen) -> None:
    """Kill a program and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def status_of(bench, program: str) -> int:
    """Return a program's status without Ctrl-C."""
    process = start(bench, program)
    try:
        return process.wait(60)
    finally:
        end_group(process)


def interrupted_start(bench) -> None:
    """T32: Ctrl-C at a random moment of a program's start: one line, status 130, nothing left."""
    program = list(commands(bench))[bench.number % NUM_PROGRAMS]
    moment_s, undisturbed = bench.rng.uniform(0, LOOKED_AT_S), None
    while (process := start(bench, program)) and ends_within(process, moment_s):
        moment_s, undisturbed = moment_s / 2, process.returncode
    os.killpg(process.pid, signal.SIGINT)
    interrupted = time.monotonic()
    try:
        status = process.wait(30)
    finally:
        end_group(process)
    took_s = time.monotonic() - interrupted
    printed = (bench.folder / "log").read_text(errors="replace")
    if status not in (130, -signal.SIGINT, undisturbed) and took_s < ENDING_S:
        undisturbed = status_of(bench, program)  # also where an earlier start left its output
    what = f"{program} at {moment_s:.2f} s: status {status} {took_s:.2f} s later: {printed[-600:]}"
    expected = printed.count(f"{program}: error: interrupted\n")
    if program == "train.py" and "Stopped after update" in printed:
        expected = 1
    unexpected = [
        word for word in ("Traceback", "Exception", "KeyboardInterrupt") if word in printed
    ]
    # It was ending: of the interpreter's own end the status is 130 to a shell.
    if status in (undisturbed, -signal.SIGINT) and not unexpected:
        bench.note(f"{program} had done its work")
        return
    if status != 130 or expected != 1 or unexpected:
        bench.fail(what)
    left = [path for path in bench.folder.rglob("*") if ".tmp" in path.name]
    if left:
        bench.fail(f"left {left}: {what}")
