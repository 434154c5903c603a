"""Text -> ids -> counts -> teacher -> first weights -> distillation -> table, in one command.

Each stage calls one of the project's programs as a user calls it. By default the text is the prose
that the installed packages carry, and a small BERT teacher is trained on it first; --text and
--teacher put in your own. The table compares four models on held-out text: the teacher, the student
before and after distillation, and the same student trained for as many steps without the teacher.
The same command continues an interrupted run.
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
import functools
import logging
import statistics
import time
from pathlib import Path

import torch
import transformers

from distil.data.batches import MicroBatch
from distil.data.hub_datasets import find_files
from distil.data.text_sources import STDIN, Source
from distil.data.token_files import MIN_LENGTH
from distil.evaluation import evaluate
from distil.models.architectures import ARCHITECTURES
from distil.models.first_weights import load_student_weights
from distil.models.heads import head_of
from distil.models.hub import load_config
from distil.models.language_model import (
    LanguageModel,
    build_network,
    load_language_model,
    load_network,
    read_student_config,
    resolve_by_name,
)
from distil.models.tokenizers import load_tokenizer
from distil.quickstart_options import parse
from distil.reporting.curves import draw_curves
from distil.reporting.tables import markdown
from distil.system.files import atomic_path, require_output, write_json
from distil.system.signals import exit_on_sigterm
from distil.workflow import (
    ALONE_ALPHAS,
    README_ALPHAS,
    TEACHER,
    Plan,
    Scale,
    Stages,
    extract_first_weights,
    make_text,
    make_tokens,
    train_student,
    train_teacher,
    train_vocabulary,
    write_student_config,
)
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset, make_preparation
from utils import InputError, run_program, setup_logging

# In the output folder: flags, text and finished stages, and the sign of a quickstart's folder.
MARKER = "quickstart.json"
TRAINED = {"student after": "distilled", "without teacher": "without_teacher"}  # name -> folder
MASKS_SEED = 1  # of the held-out masks: the same for every row of the table, whatever --seed
FULL = Scale()
SHORT = Scale(teacher_steps=200, student_steps=60, num_held_out=96)


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def held_out_batches(plan: Plan, teacher: LanguageModel) -> list[MicroBatch]:
    """Make the held-out batches, with masks that depend on the text alone.

    Raises InputError where no sequence is left.
    """
    dataset = LmSeqsDataset.from_file(plan.token_file("held_out"), teacher, plan.max_length)
    # Smoothing 0: positions uniform over the text, for figures of all tokens alike.
    prepare = make_preparation(teacher, plan.counts, smoothing=0.0, seed=MASKS_SEED)
    sampler = GroupedBatchSampler(
        dataset.lengths,
        plan.scale.batch_size,
        dataset.max_length,
        group_by_size=True,
        seed=MASKS_SEED,
    )
    num_batches = min(len(sampler), max(plan.scale.num_held_out // plan.scale.batch_size, 1))
    return [
        prepare(planned.number, *dataset.collate(planned.sequences))
        for planned in sampler.micro_batches(num_batches)
    ]


def latency_ms(model, batch: MicroBatch) -> float:
    """Return the median time of one sequence through the model, in milliseconds, after warm-up."""
    ids_BT = batch.input_ids_BT[:1]
    times = []
    with torch.no_grad():
        for _ in range(35):
            started = time.perf_counter()
            model(ids_BT)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[5:])


def table_rows(plan: Plan) -> dict[str, dict[str, float]]:
    """Measure the table's four models on held-out text."""
    model = load_language_model(plan.architecture, plan.teacher, "--teacher")
    teacher, batches = model.network, held_out_batches(plan, model)
    if plan.student_type is None:
        of_student = plan.architecture
        before = load_network(of_student, str(plan.first_student), "student")
    else:
        of_student = ARCHITECTURES[plan.student_type]
        before = build_network(
            of_student, read_student_config(plan.student_type, str(plan.student_config))
        )
        load_student_weights(before, of_student, str(plan.folder / "first_weights.pth"))
    trained = {
        name: load_network(of_student, str(plan.folder / folder), "student").eval()
        for name, folder in TRAINED.items()
    }
    models = {"teacher": teacher, "student before": before.eval(), **trained}
    longest = max(batches, key=lambda batch: batch.input_ids_BT.shape[1])
    rows = {}
    for name, model in models.items():
        measured = evaluate(
            model,
            functools.partial(head_of, model),
            teacher,
            functools.partial(head_of, teacher),
            batches,
        )
        rows[name] = {
            "parameters": model.num_parameters(),
            **measured,
            "latency_ms": latency_ms(model, longest),
        }
    return rows


def format_table(rows: dict[str, dict[str, float]], objective: str) -> str:
    """Lay the rows out as a Markdown table."""
    kind = "masked-LM" if objective == "mlm" else "causal-LM"
    head = f"model|parameters|{kind} loss|top-1|KL to teacher|agreement|CPU latency".split("|")
    cells = [
        [
            name,
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}",
            f"{row['latency_ms']:.1f} ms",
        ]
        for name, row in rows.items()
    ]
    return markdown([head, *cells])


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


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
        resumes=bool(stages.done),
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
    """Print and write the table, draw the curves, and print whether distillation paid."""
    rows = table_rows(plan)
    table = format_table(rows, plan.objective)
    write_json(
        plan.folder / "results.json",
        {"seed": plan.seed, "rows": rows, "seconds": time.perf_counter() - started},
    )
    with atomic_path(plan.folder / "results.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    path = plan.folder / "curves.png"
    kl = {name: row["kl"] for name, row in rows.items() if name != "teacher"}
    draw_curves(path, *(plan.folder / name for name in TRAINED.values()), plan.objective, kl)
    print(f"\nOn held-out text (seed {plan.seed}):\n\n{table}\n")
    is_closest = kl["student after"] < min(kl["student before"], kl["without teacher"])
    verdict = f"is {'' if is_closest else 'NOT '}closer to the teacher than both"
    print(
        f"The distilled student {verdict} the student before and the one trained without teacher."
    )
    student = plan.folder / "distilled" / "model"
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
    held_out_batches(plan, LanguageModel(architecture, network, tokenizer, "--teacher"))
    if plan.is_embedded:
        stages.run("teacher", train_teacher, plan, teacher_config.vocab_size)
    num_layers = max(teacher_config.num_hidden_layers // 2, 1)
    stages.run("first student", make_first_student, plan, teacher_config, num_layers)
    for name, alphas in (("distilled", README_ALPHAS), ("without_teacher", ALONE_ALPHAS)):
        stages.run(name, train_student, plan, name, alphas[plan.objective])
    stages.run("report", report, plan, started)


def make_first_student(plan: Plan, teacher_config, num_layers: int) -> None:
    """Make the student before training: its configuration and first weights."""
    if plan.student_type is not None:
        write_student_config(plan, teacher_config, num_layers)
    extract_first_weights(plan, num_layers)


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
