"""Text -> ids -> counts -> teacher -> first weights -> distillation -> table, in one command.

Each stage calls one of the project's programs as a user calls it. By default the text is the prose
that the installed packages carry, and a small BERT teacher is trained on it first; --text and
--teacher put in your own. The last program is study.py with its smallest table, which compares, on
held-out text, the teacher, the student's first weights, the distilled student, and the same student
trained for as many updates without the teacher. The same command continues an interrupted run.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.quickstart_options import parse
    from utils import read_flags_first

    read_flags_first(parse)

import argparse
import dataclasses
import logging
import time
from pathlib import Path

import torch
import transformers

from distil.data.hub_datasets import find_files
from distil.data.text_sources import STDIN, Source
from distil.data.token_files import MIN_LENGTH
from distil.models.architectures import ARCHITECTURES
from distil.models.hub import load_config
from distil.models.language_model import (
    LanguageModel,
    build_network,
    resolve_by_name,
)
from distil.models.tokenizers import load_tokenizer
from distil.quickstart_options import parse
from distil.reporting import latency
from distil.reporting.curves import draw_curves
from distil.reporting.plan import Plan as TimingPlan
from distil.study.measures import HeldOutText, load_student
from distil.study.variants import HALF, NO_TEACHER, REFERENCE
from distil.system.files import require_output
from distil.system.json_files import load_json
from distil.system.signals import exit_on_sigterm
from distil.workflow import (
    TEACHER,
    Plan,
    Scale,
    Stages,
    compare,
    lengthen_teacher,
    make_text,
    make_tokens,
    train_teacher,
    train_vocabulary,
)
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError, run_program, setup_logging

# In the output folder: flags, text and finished stages, and the sign of a quickstart's folder.
MARKER = "quickstart.json"
FULL = Scale()
SHORT = Scale(short_steps=200, teacher_steps=60, student_steps=60, num_held_out=96)


def make_plan(args: argparse.Namespace) -> tuple[Plan, Stages]:
    """Plan the run by its flags and claim its folder. Raises InputError."""
    scale = SHORT if args.short else FULL
    if args.student_steps is not None:
        scale = dataclasses.replace(scale, student_steps=args.student_steps)
    if scale.student_steps < 1:
        raise InputError(f"--student_steps {args.student_steps}: expected at least 1")
    if args.max_length <= MIN_LENGTH:
        raise InputError(
            f"--max_length {args.max_length}: sequences of {MIN_LENGTH} ids or fewer are removed;"
            " expected more"
        )
    sources = [] if args.text is None else find_files(args.text, flag="--text")
    is_embedded = args.teacher is None
    teacher = os.path.join(args.output, "teacher") if is_embedded else args.teacher
    architecture = (
        ARCHITECTURES["bert"] if is_embedded else resolve_by_name(args.teacher, "--teacher")
    )
    stages = claim_folder(args, sources)
    plan = Plan(
        Path(args.output),
        teacher,
        architecture,
        is_embedded,
        scale,
        args.seed,
        args.max_length,
    )
    return plan, stages


def claim_folder(args: argparse.Namespace, sources: list[Source]) -> Stages:
    """Make the output folder, or reuse an earlier quickstart's. Raises InputError for any other."""
    folder = Path(args.output)
    require_output(args.output, "--output", is_folder=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise InputError(
            f"--output {folder}: holds files that no quickstart made; choose another folder"
        )
    inputs = [("--text", path) for path in (args.text, *(s.path for s in sources)) if path != STDIN]
    for flag, path in (*inputs, ("--teacher", args.teacher)):
        if path is not None and Path(path).resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{flag} {path}: lies in --output {folder}, where files are replaced; choose"
                " another folder"
            )
    text = [
        [source.path, source.num_bytes, 0 if source.is_pipe else os.stat(source.path).st_mtime]
        for source in sources
    ]
    stages = Stages(folder / MARKER, {"flags": vars(args), "text": text})
    stages.start()
    return stages


def report(plan: Plan, started: float) -> None:
    """Draw the curves, time teacher and student, and print where everything is."""
    path = plan.folder / "curves.png"
    state = load_json(plan.study / "study.json", {"first": dict, "rows": dict})
    of_rows = {row["variant"]: row["reported"]["kl"] for row in state["rows"].values()}
    kl = {
        "first weights": state["first"][HALF]["reported"]["kl"],
        "distilled": of_rows[REFERENCE],
        "without teacher": of_rows[NO_TEACHER],
    }
    runs = plan.run(REFERENCE), plan.run(NO_TEACHER)
    draw_curves(path, *runs, "mlm" if plan.architecture.is_masked else "clm", kl)
    models = {"teacher": plan.teacher, "student": str(plan.run(REFERENCE) / "model")}
    timing = TimingPlan(batch_sizes=(1,), passes=3, num_sentences=16)
    times = latency.table(latency.measure(models, timing))
    sizes = " and ".join(
        f"the {name}'s {load_student(Path(place)).num_parameters():,}"
        for name, place in models.items()
    )
    print(f"\nA sentence at a time through {sizes} parameters, on one CPU thread:\n\n{times}\n")
    student = models["student"]
    print(f"Curves: {path}. Load the student with from_pretrained('{student}').")
    print(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes.", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run every stage, then print the table."""
    started = time.perf_counter()
    args = parse(argv)
    setup_logging(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    plan, stages = make_plan(args)
    stages.run("text", make_text, plan, args.text, args.text_field)
    if plan.is_embedded:
        stages.run("vocabulary", train_vocabulary, plan)
    architecture = plan.architecture
    tokenizer = load_tokenizer(architecture, plan.teacher, "--teacher")
    if plan.is_embedded:
        teacher_config = transformers.BertConfig(**TEACHER, vocab_size=len(tokenizer))
    else:
        teacher_config = load_config(None, plan.teacher, "--teacher")
    stages.run("tokens", make_tokens, plan, teacher_config.vocab_size)
    # Errors of the held-out text show now rather than after minutes of training.
    with torch.device("meta"):  # its sizes are enough
        network = build_network(architecture, teacher_config, "--teacher")
    model = LanguageModel(architecture, network, tokenizer, "--teacher")
    held_out = LmSeqsDataset.from_file(plan.token_file("held_out"), model, plan.max_length)
    HeldOutText(held_out, model)
    if plan.is_embedded:
        stages.run("short sequences", train_teacher, plan, teacher_config.vocab_size)
        stages.run("teacher", lengthen_teacher, plan)
    stages.run("study", compare, plan)
    stages.run("report", report, plan, started)


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
