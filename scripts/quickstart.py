"""Text -> token ids -> counts -> teacher -> student's first weights -> distillation -> a table, in
one command.

Every stage is one of the programs that the README describes, called as a user calls it. By default
the text is the prose that the installed packages carry, and a small BERT teacher is trained on it
first; --text and --teacher put in your own. The table compares, on held-out text, the teacher, the
student before and after distillation, and the same student trained for as many steps without the
teacher.
"""

import argparse
import dataclasses
import functools
import logging
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data import builtin_corpus
from distil.data.batches import MicroBatch, MlmPreparation, masking_weights, prepare_clm
from distil.data.token_files import MIN_LENGTH
from distil.evaluation import evaluate
from distil.models.architectures import ARCHITECTURES, PAIRS
from distil.models.first_weights import load_student_weights
from distil.models.heads import head_of
from distil.models.hub import load_config, short_name
from distil.models.language_model import (
    build_student,
    load_model,
    load_teacher,
    max_input_length,
    read_student_config,
)
from distil.models.tokenizers import load_tokenizer, special_ids, train_word_pieces
from distil.system.files import atomic_path, require_file, require_output, write_json
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset, SpecialIds, read_token_counts
from utils import InputError, OneLineParser, logger, run_program, setup_logging

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 8000
# No dropout and wide first weights: a teacher that sees each sequence once, for a few minutes,
# learns faster so.
TEACHER = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.05,
}
MARKER = (  # in the output folder: its flags, and the sign that it is a quickstart's
    "quickstart.json"
)
HELD_OUT_EVERY = 40  # one document out of so many is held out of everything
MASKS_SEED = 1  # of the held-out masks: the same for every row of the table, whatever --seed
README_ALPHAS = {
    "mlm": [
        "--alpha_ce",
        "5.0",
        "--alpha_mlm",
        "2.0",
        "--alpha_cos",
        "1.0",
        "--alpha_clm",
        "0.0",
        "--mlm",
    ],
    "clm": ["--alpha_ce", "5.0", "--alpha_clm", "2.0", "--alpha_cos", "1.0"],
}
ALONE_ALPHAS = {
    "mlm": ["--alpha_ce", "0", "--alpha_mlm", "1.0", "--alpha_clm", "0", "--mlm"],
    "clm": ["--alpha_ce", "0", "--alpha_clm", "1.0"],
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is done: updates of teacher and student, the student's sequences an update, held-out
    sequences.
    """

    teacher_steps: int = 3000
    student_steps: int = 700
    batch_size: int = 16
    num_held_out: int = 512


FULL = Scale()
SHORT = Scale(teacher_steps=200, student_steps=60, num_held_out=96)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--text",
        help="your own text, UTF-8, one sequence a line (default: the installed packages' prose)",
    )
    parser.add_argument(
        "--teacher",
        help="your own BERT, RoBERTa or GPT-2, hub name or folder (default: one is trained)",
    )
    parser.add_argument(
        "--output",
        default="quickstart",
        help="folder for everything that is made (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=56, help="seed of everything (default: %(default)s)"
    )
    parser.add_argument(
        "--max_length", type=int, default=64, help="longest sequence, in ids (default: %(default)s)"
    )
    parser.add_argument(
        "--student_steps", type=int, help="updates of the student (default: 700, with --short 60)"
    )
    parser.add_argument(
        "--short", action="store_true", help="a version of two minutes, to see that it works"
    )
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What this run is about: where things are, and what kind of pair it distils."""

    folder: Path
    teacher: str
    teacher_type: str
    student_type: str
    scale: Scale
    seed: int
    max_length: int

    @property
    def objective(self) -> str:
        """The language-model objective of the pair: mlm or clm."""
        return "mlm" if ARCHITECTURES[self.teacher_type].is_masked else "clm"

    def token_file(self, part: str) -> Path:
        """Where binarized_data.py puts a part's ids."""
        return self.folder / f"{part}.{short_name(self.teacher)}.pickle"

    @property
    def counts(self) -> Path:
        """Where token_counts.py puts the counts."""
        return self.folder / "token_counts.pickle"

    @property
    def student_config(self) -> Path:
        """Where the student's configuration is written."""
        return self.folder / "student.json"


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------


def call(program: str, *arguments: object) -> None:
    """Run one of the project's programs, shown as a user would type it; stop where it fails."""
    command = [str(ROOT / program), *map(str, arguments)]
    print(f"\n$ python {program} {shlex.join(command[1:])}", flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    if status != 0:
        raise InputError(f"{program} ended with status {status}; its message stands above")


def make_text(plan: Plan, text: str | None) -> None:
    """Write train.txt and held_out.txt, documents kept whole on one side."""
    documents = (
        ([line] for line in user_lines(text))
        if text
        else (list(builtin_corpus.lines(d)) for d in builtin_corpus.documents())
    )
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for number, document in enumerate(documents):
        parts["held_out" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"] += document
    if not parts["held_out"]:
        raise InputError(
            f"--text {text}: expected at least {HELD_OUT_EVERY} lines of text, different from one"
            " another"
        )
    for part, lines in parts.items():
        with atomic_path(plan.folder / f"{part}.txt") as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    logger.info(
        "Text: %s lines to train on, %s held out.", *(f"{len(lines):,}" for lines in parts.values())
    )


def user_lines(path: str) -> Iterator[str]:
    """Yield a user's lines once each: a line that stands twice could otherwise be on both sides."""
    seen = set()
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                stripped = line.strip()
                if stripped and stripped not in seen:
                    seen.add(stripped)
                    yield stripped
        except UnicodeDecodeError as error:
            raise InputError(f"--text {path}: is not UTF-8 ({error}); convert it") from error


def train_vocabulary(plan: Plan) -> None:
    """Train a WordPiece vocabulary on train.txt, and write it as a BERT tokenizer."""
    vocabulary = train_word_pieces(plan.folder / "train.txt", VOCAB_SIZE)
    transformers.BertTokenizer(
        vocab=vocabulary, do_lower_case=True, model_max_length=512
    ).save_pretrained(plan.teacher)
    logger.info("Vocabulary: %d WordPiece tokens.", len(vocabulary))


def make_tokens(plan: Plan, vocab_size: int) -> None:
    """Binarize both parts, count the first."""
    for part in ("train", "held_out"):
        call(
            "scripts/binarized_data.py",
            "--file_path",
            plan.folder / f"{part}.txt",
            "--tokenizer_type",
            plan.teacher_type,
            "--tokenizer_name",
            plan.teacher,
            "--dump_file",
            plan.folder / part,
        )
    call(
        "scripts/token_counts.py",
        "--data_file",
        plan.token_file("train"),
        "--token_counts_dump",
        plan.counts,
        "--vocab_size",
        vocab_size,
    )


def train_teacher(plan: Plan, vocab_size: int) -> None:
    """Train the embedded default's teacher."""
    write_json(plan.folder / "teacher.json", {**TEACHER, "vocab_size": vocab_size})
    call(
        "scripts/train_teacher.py",
        "--config",
        plan.folder / "teacher.json",
        "--tokenizer_name",
        plan.teacher,
        "--data_file",
        plan.token_file("train"),
        "--token_counts",
        plan.counts,
        "--output_dir",
        plan.teacher,
        "--num_steps",
        plan.scale.teacher_steps,
        "--max_length",
        plan.max_length,
        "--seed",
        plan.seed,
        "--force",
    )


def write_student_config(plan: Plan, teacher_config, num_layers: int) -> None:
    """Write the configuration of a student with num_layers layers, all else as the teacher's."""
    if plan.student_type == "distilbert":
        content = {
            "model_type": "distilbert",
            "vocab_size": teacher_config.vocab_size,
            "dim": teacher_config.hidden_size,
            "n_layers": num_layers,
            "n_heads": teacher_config.num_attention_heads,
            "hidden_dim": teacher_config.intermediate_size,
            "activation": teacher_config.hidden_act,
            "max_position_embeddings": teacher_config.max_position_embeddings,
            "sinusoidal_pos_embds": True,
        }
    else:
        content = {
            k: v
            for k, v in teacher_config.to_diff_dict().items()
            if k not in ("transformers_version", "dtype")
        }
        content["n_layer" if plan.student_type == "gpt2" else "num_hidden_layers"] = num_layers
    write_json(plan.student_config, content)


def extract_first_weights(plan: Plan, num_layers: int) -> None:
    """Take num_layers layers of the teacher, evenly spaced."""
    flags = ["--vocab_transform"] if plan.objective == "mlm" else []
    program = "scripts/extract.py"
    if plan.teacher_type == "bert":
        program, flags = "scripts/extract_distilbert.py", [*flags, "--fold_token_types"]
    call(
        program,
        "--model_type",
        plan.teacher_type,
        "--model_name",
        plan.teacher,
        "--dump_checkpoint",
        plan.folder / "first_weights.pth",
        "--num_layers",
        num_layers,
        *flags,
    )


def train_student(plan: Plan, name: str, alphas: list[str]) -> None:
    """Train a student from the first weights, with the teacher or alone."""
    # Smoothing 0: the table asks for tokens drawn uniformly from the text. Minutes on a few MB are
    # too few to afford 2019's emphasis on rare tokens (0.7), which moves a small student away from
    # its teacher at the frequent ones.
    masking = (
        ["--token_counts", plan.counts, "--mlm_smoothing", 0] if plan.objective == "mlm" else []
    )
    call(
        "train.py",
        "--student_type",
        plan.student_type,
        "--student_config",
        plan.student_config,
        "--teacher_type",
        plan.teacher_type,
        "--teacher_name",
        plan.teacher,
        *alphas,
        "--freeze_pos_embs",
        "--student_pretrained_weights",
        plan.folder / "first_weights.pth",
        "--data_file",
        plan.token_file("train"),
        *masking,
        "--dump_path",
        plan.folder / name,
        "--force",
        "--max_steps",
        plan.scale.student_steps,
        "--batch_size",
        plan.scale.batch_size,
        "--gradient_accumulation_steps",
        1,
        "--max_length",
        plan.max_length,
        "--log_interval",
        10,
        "--seed",
        plan.seed,
    )


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def held_out_batches(plan: Plan, tokenizer, teacher_config) -> list[MicroBatch]:
    """Make the held-out batches, with masks that depend on nothing but the text. Raises InputError
    where there are none.
    """
    max_length = min(
        max_input_length(plan.teacher_type, tokenizer, teacher_config), plan.max_length
    )
    special = SpecialIds(**special_ids(plan.teacher_type, tokenizer))
    vocab_size, model = teacher_config.vocab_size, f"--teacher {plan.teacher}"
    dataset = LmSeqsDataset.from_file(
        plan.token_file("held_out"), special, max_length, vocab_size, model
    )
    prepare = prepare_clm
    if plan.objective == "mlm":
        counts_V = torch.from_numpy(read_token_counts(plan.counts, vocab_size, model))
        # Smoothing 0: positions uniform over the text, so that the table speaks of all tokens
        # alike.
        weights_V = masking_weights(counts_V, 0.0, tokenizer.all_special_ids)
        prepare = MlmPreparation(
            weights_V, tokenizer.mask_token_id, 0.15, 0.8, 0.1, 0.1, False, MASKS_SEED
        )
    sampler = GroupedBatchSampler(
        dataset.lengths, plan.scale.batch_size, max_length, group_by_size=True, seed=MASKS_SEED
    )
    num_batches = min(len(sampler), max(plan.scale.num_held_out // plan.scale.batch_size, 1))
    return [
        prepare(planned.number, *dataset.collate(planned.sequences))
        for planned in sampler.micro_batches(num_batches)
    ]


def latency_ms(model, batch: MicroBatch) -> float:
    """Median time of one sequence through the whole model, in milliseconds, after warm-up."""
    ids_BT = batch.input_ids_BT[:1]
    times = []
    with torch.no_grad():
        for _ in range(35):
            started = time.perf_counter()
            model(ids_BT)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[5:])


def table_rows(plan: Plan) -> dict[str, dict[str, float]]:
    """Measure the four models of the table on held-out text."""
    teacher = load_teacher(plan.teacher_type, plan.teacher)
    tokenizer = load_tokenizer(plan.teacher_type, plan.teacher, "--teacher")
    batches = held_out_batches(plan, tokenizer, teacher.config)
    before = build_student(
        plan.student_type, read_student_config(plan.student_type, str(plan.student_config))
    )
    load_student_weights(before, plan.student_type, str(plan.folder / "first_weights.pth"))
    models = {
        "teacher": teacher,
        "student before": before.eval(),
        "student after": (
            load_model(plan.student_type, str(plan.folder / "distilled"), "student").eval()
        ),
        "without teacher": (
            load_model(plan.student_type, str(plan.folder / "without_teacher"), "student").eval()
        ),
    }
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
    head = [
        "model",
        "parameters",
        f"{kind} loss",
        "top-1",
        "KL to teacher",
        "agreement",
        "CPU latency",
    ]
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
    widths = [max(len(line[k]) for line in [head, *cells]) for k in range(len(head))]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def scalar_curve(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """Read one scalar of a run's TensorBoard log: (x, values)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "log" / "train"), size_guidance={"scalars": 0})
    log.Reload()
    if tag not in log.Tags()["scalars"]:
        return [], []
    events = log.Scalars(tag)
    return [event.step for event in events], [event.value for event in events]


def draw_curves(plan: Plan, rows: dict[str, dict[str, float]]) -> Path:
    """Draw the training losses, and the held-out KL of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    left.plot(
        *scalar_curve(plan.folder / "distilled", "losses/loss_ce"), label="student, distilled"
    )
    left.set(
        title="KL to the teacher in training (T = 2, x T²)",
        xlabel="micro-batches",
        ylabel="loss_ce",
        ylim=(0, None),
    )
    tag = f"losses/loss_{plan.objective}"
    for name, label in (
        ("distilled", "student, distilled"),
        ("without_teacher", "student, without teacher"),
    ):
        middle.plot(*scalar_curve(plan.folder / name, tag), label=label)
    middle.set(
        title="Language-model loss in training", xlabel="micro-batches", ylabel=tag.split("/")[1]
    )
    middle.legend()
    names = [name for name in rows if name != "teacher"]
    bars = right.bar(
        names, [rows[name]["kl"] for name in names], color=["tab:gray", "tab:blue", "tab:orange"]
    )
    right.bar_label(bars, fmt="%.4f")
    right.margins(y=0.12)
    right.set(title="KL to the teacher, held-out text (T = 1)", ylabel="nats a token")
    path = plan.folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def make_plan(args: argparse.Namespace) -> Plan:
    """Decide what this run is about, and claim its folder. Raises InputError where flags or folder
    don't fit.
    """
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
    if args.text is not None:
        require_file(args.text, "--text")
    teacher, teacher_type = os.path.join(args.output, "teacher"), "bert"
    if args.teacher is not None:
        teacher, teacher_type = args.teacher, teacher_model_type(args.teacher)
    student_type = next(student for known, student in PAIRS if known == teacher_type)
    plan = Plan(
        Path(args.output), teacher, teacher_type, student_type, scale, args.seed, args.max_length
    )
    claim_folder(plan, args)
    return plan


def claim_folder(plan: Plan, args: argparse.Namespace) -> None:
    """Make the output folder, or take that of an earlier quickstart. Raises InputError for any
    other.
    """
    require_output(args.output, "--output", is_folder=True)
    if plan.folder.exists() and any(plan.folder.iterdir()) and not (plan.folder / MARKER).exists():
        raise InputError(
            f"--output {plan.folder}: holds files that no quickstart made; choose another folder"
        )
    for flag, path in (("--text", args.text), ("--teacher", args.teacher)):
        if path is not None and Path(path).resolve().is_relative_to(plan.folder.resolve()):
            raise InputError(
                f"{flag} {path}: lies in --output {plan.folder}, where files are replaced; choose"
                " another folder"
            )
    write_json(plan.folder / MARKER, vars(args))


def teacher_model_type(name: str) -> str:
    """Find out a teacher's model type. Raises InputError where it is none that can be distilled."""
    model_type = load_config(None, name, "--teacher").model_type
    known = [teacher for teacher, _ in PAIRS]
    if model_type not in known:
        raise InputError(
            f"--teacher {name}: is a {model_type} model, expected one of {', '.join(known)}"
        )
    return model_type


def report(plan: Plan, started: float) -> None:
    """Print the table, write it as JSON with the curves, and say whether distillation paid."""
    rows = table_rows(plan)
    table = format_table(rows, plan.objective)
    write_json(
        plan.folder / "results.json",
        {"seed": plan.seed, "rows": rows, "seconds": time.perf_counter() - started},
    )
    (plan.folder / "results.md").write_text(table + "\n", encoding="utf-8")
    path = draw_curves(plan, rows)
    print(f"\nOn held-out text (seed {plan.seed}):\n\n{table}\n")
    after, best_other = (
        rows["student after"]["kl"],
        min(rows["student before"]["kl"], rows["without teacher"]["kl"]),
    )
    verdict = (
        "is closer to the teacher than both"
        if after < best_other
        else "is NOT closer to the teacher than both"
    )
    print(
        f"The distilled student {verdict} the student before and the one trained without teacher."
    )
    print(f"Curves: {path}. Load the student with from_pretrained('{plan.folder / 'distilled'}').")
    print(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes.", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run every stage, then the table."""
    started = time.perf_counter()
    args = parse(argv)
    setup_logging(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    plan = make_plan(args)
    make_text(plan, args.text)
    is_embedded = args.teacher is None
    if is_embedded:
        train_vocabulary(plan)
    tokenizer = load_tokenizer(plan.teacher_type, plan.teacher, "--teacher")
    if is_embedded:
        teacher_config = transformers.BertConfig(**TEACHER, vocab_size=len(tokenizer))
    else:
        teacher_config = load_config(plan.teacher_type, plan.teacher, "--teacher")
    make_tokens(plan, teacher_config.vocab_size)
    held_out_batches(
        plan, tokenizer, teacher_config
    )  # an error here costs seconds, after training minutes
    if is_embedded:
        train_teacher(plan, teacher_config.vocab_size)
    num_layers = max(teacher_config.num_hidden_layers // 2, 1)
    write_student_config(plan, teacher_config, num_layers)
    extract_first_weights(plan, num_layers)
    train_student(plan, "distilled", README_ALPHAS[plan.objective])
    train_student(plan, "without_teacher", ALONE_ALPHAS[plan.objective])
    report(plan, started)


if __name__ == "__main__":
    run_program(main)
