"""The Hugging Face hub's model card of a distilled model: README.md with metadata, in its folder.

report.py --write_card makes it from the report's figures and from the files that train.py left in
the folder (parameters.json, git_log.json). huggingface_hub's classes write the metadata, and read
them back before the file is written.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
import transformers

from distil.losses import LOSSES
from distil.models.hub import model_folder, short_name
from distil.system.files import atomic_path, output_problem
from distil.tasks.metrics import HUB_METRICS
from distil.tasks.tasks import TASKS
from utils import logger, one_line

SIGNATURE = "<!-- Written by Distil, scripts/report.py. SHA-256 of the rest: {} -->"
IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def card_problems(args: argparse.Namespace) -> list[str]:
    """List why the card cannot be written, and flags that the hub would refuse, a line each."""
    problems = []
    for name, pattern, example in (
        ("license", re.compile(r"[a-z0-9][a-z0-9.+-]*"), "apache-2.0"),
        ("language", re.compile(r"[a-z]{2,3}|multilingual|code"), "en"),
        ("datasets", IDENTIFIER, "wikipedia or allenai/c4"),
        ("base_model", IDENTIFIER, "google-bert/bert-base-uncased"),
        ("model_id", IDENTIFIER, "me/my-distilbert"),
    ):
        value = getattr(args, name)
        for word in [value] if isinstance(value, str) else value or []:
            if not pattern.fullmatch(word):
                problems.append(
                    f"--{name} {word}: is no such name on the hub; expected one as {example}"
                )
    path = Path(model_folder(args.student), "README.md")
    problems += filter(
        None, [output_problem(str(path), "--write_card") if os.path.isdir(args.student) else None]
    )
    if path.is_file() and not args.force and not is_own(path):
        problems.append(
            f"--write_card {path}: was not written by report.py, or was changed since; move it, or"
            " replace it with --force"
        )
    return problems


def is_own(path: Path) -> bool:
    """True for a README.md that is unchanged since write_card wrote it."""
    try:
        head, _, rest = path.read_text(encoding="utf-8").partition(SIGNATURE.split("{}")[0])
    except ValueError:
        return False
    digest, _, tail = rest.partition(SIGNATURE.split("{}")[1])
    return bool(rest) and digest == digest_of(head + tail)


def digest_of(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Metadata
# --------------------------------------------------------------------------------------------------

# head of a task's row: the hub's kind of task
TASK_TYPES = {
    "classes": "text-classification",
    "values": "text-classification",
    "tokens": "token-classification",
    "next tokens": "text-generation",
    "spans": "question-answering",
}

# the end of a class's name: (what from_pretrained is called on, the hub's kind of task)
HEADS = {
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}


def head_of(student: str) -> tuple[str, str]:
    """Return (the auto class that loads a model's folder, the hub's kind of task)."""
    config = transformers.AutoConfig.from_pretrained(student, trust_remote_code=False)
    kind = (config.architectures or [""])[0]
    return next(
        (row for end, row in HEADS.items() if kind.endswith(end)),
        ("AutoModel", "feature-extraction"),
    )


def eval_results(report: Mapping) -> list[huggingface_hub.EvalResult]:
    """List the student's figures in the hub's form; where a task has groups, only the groups'."""
    results = []
    for name, entry in report["quality"].items():
        figure = entry["models"].get("student")
        task, metrics = TASKS[name], figure["metrics"] if figure else {}
        if task.has_groups:
            of_group = HUB_METRICS[task.score_metrics[0]]
            types = {metric: of_group for metric in metrics if metric != "score"}
        else:
            types = {metric: HUB_METRICS[metric] for metric in metrics if metric in HUB_METRICS}
        is_masked = figure and figure["kind"] == "masked lm"
        for metric, metric_type in types.items():
            results.append(
                huggingface_hub.EvalResult(
                    task_type="fill-mask" if is_masked else TASK_TYPES[task.head],
                    dataset_type=task.hub.name or "local",
                    dataset_name=task.hub.card_title,
                    dataset_config=task.hub.card_config,
                    dataset_split=task.hub.card_split,
                    dataset_args=(
                        {"num_examples": figure["num_examples"]} if figure["num_examples"] else None
                    ),
                    metric_type=metric_type,
                    metric_name=metric_name(metric),
                    metric_value=round(metrics[metric], 4),
                )
            )
    return results


def metric_name(name: str) -> str:
    """Word a metric and its unit."""
    return name.replace("_", " ") + ("" if name.endswith("perplexity") else " (x 100)")


def metadata(args: argparse.Namespace, report: Mapping) -> huggingface_hub.ModelCardData:
    """Make the card's metadata; leave out what no flag and no file says."""
    results = eval_results(report)
    base_model = args.base_model or (None if os.path.exists(args.teacher) else args.teacher)
    return huggingface_hub.ModelCardData(
        language=args.language[0] if args.language and len(args.language) == 1 else args.language,
        license=args.license,
        library_name="transformers",
        tags=["distillation", "distil"],
        base_model=base_model,
        datasets=args.datasets,
        pipeline_tag=head_of(args.student)[1],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=short_name(args.student),
        eval_results=results or None,
    )


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def read_run_file(student: str, name: str) -> dict:
    """Read a file that train.py left in the run folder; empty where it is missing or damaged.

    student: the run folder, or the model/ in it.
    """
    path = Path(student, name)
    if not path.is_file() and path.parent.name == "model":
        path = path.parent.parent / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s is no readable JSON (%s): left out of the card.", path, one_line(error))
        return {}
    return content if isinstance(content, dict) else {}


# Flags of train.py that are paths: the card shows the last part only.
PATH_FLAGS = (
    *("dump_path", "student", "student_config", "student_pretrained_weights"),
    *("token_counts", "data_file", "eval_data_file", "teacher_name"),
)


def training_text(student: str, datasets: Sequence[str] | None) -> str:
    """Describe how the student was trained, from the files in its folder."""
    flags = read_run_file(student, "parameters.json")
    commit = read_run_file(student, "git_log.json")
    if not flags:
        return (
            "The model's folder holds no parameters.json of the run: its training flags are not"
            " known here."
        )
    weights = {name: flags.get(f"alpha_{name}") for name in LOSSES}
    losses = [
        f"* {alpha:g} x {LOSSES[name].title} (`alpha_{name}`)"
        for name, alpha in weights.items()
        if alpha
    ]
    lines = ["The training loss was the sum of:", "", *losses, ""]
    if flags.get("data_file"):
        of_datasets = f", of {', '.join(datasets)}" if datasets else ""
        name = Path(flags["data_file"]).name
        lines += [f"Training data: the token file `{name}`{of_datasets}.", ""]
    code = [f"Distil {flags['version']}"] if flags.get("version") else []
    code += [f"commit `{commit['repo_sha']}`"] if commit.get("repo_sha") else []
    lines += [f"Code: {', '.join(code)}.", ""] if code else []
    shown = {
        name: Path(value).name if name in PATH_FLAGS and value else value
        for name, value in flags.items()
    }
    rows = [f"| `{name}` | {cell(value)} |" for name, value in sorted(shown.items())]
    head = ["<details><summary>All flags of the run</summary>", "", "| flag | value |"]
    return "\n".join([*lines, *head, "| --- | --- |", *rows, "", "</details>"])


def cell(value: object) -> str:
    """Write a flag's value for a table's cell."""
    return ("" if value is None else f"{value}").replace("|", "\\|").replace("\n", " ")


USES = {
    "fill-mask": (
        'text = f"The capital of France is {tokenizer.mask_token}."\n'
        'inputs = tokenizer(text, return_tensors="pt")\n'
        "place = (inputs.input_ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]\n"
        "logits = model(**inputs).logits[0, place]\n"
        "print(tokenizer.convert_ids_to_tokens(logits.topk(5).indices.tolist()))"
    ),
    "text-generation": (
        'inputs = tokenizer("The capital of France is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=10, do_sample=False)[0]))"
    ),
}
OTHER_USE = (
    'inputs = tokenizer("The capital of France is Paris.", return_tensors="pt")\n'
    "print(model(**inputs))"
)


def usage_text(args: argparse.Namespace) -> str:
    """Write code that loads the model and runs it on a sentence."""
    loader, kind = head_of(args.student)
    name = args.model_id or short_name(args.student)
    return (
        f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = {loader}.from_pretrained("{name}").eval()\n\n'
        f"{USES.get(kind, OTHER_USE)}\n```"
    )


def limits_text(args: argparse.Namespace, report: Mapping) -> str:
    """List the limits of the model and of its figures."""
    measured = [
        entry["title"] for entry in report["quality"].values() if "student" in entry["models"]
    ]
    longest = report["sizes"].get("student", {}).get("longest_input")
    is_language_model = head_of(args.student)[1] in ("fill-mask", "text-generation")
    lines = [
        f"* Measured on {', '.join(measured)} only."
        if measured
        else "* Its quality was not measured on any task.",
        f"* It was trained to imitate {short_name(args.teacher)}: expect that model's errors and"
        " biases, and some more.",
    ]
    if is_language_model and set(report["quality"]) - {"lm"}:
        lines.append(
            "* The scores on tasks are of models fine-tuned from this one, not of this one as"
            " it is."
        )
    if longest:
        lines.append(f"* It reads at most {longest} tokens at once.")
    if not args.language:
        lines.append("* The language of its training text is not stated.")
    if not args.license:
        lines.append("* No license is stated: ask its authors before you use it.")
    return "\n".join(lines)


def card_text(args: argparse.Namespace, report: Mapping, tables: Mapping[str, str]) -> str:
    """Write the whole card; tables: "quality", "size" and "speed" of report_tables."""
    data = metadata(args, report)
    title = f"# {short_name(args.student)}"
    teacher = args.base_model or (
        short_name(args.teacher) if os.path.exists(args.teacher) else args.teacher
    )
    parts = [
        title,
        (
            f"A model distilled from `{teacher}` by the method of DistilBERT ([Sanh et al.,"
            " 2019](https://arxiv.org/abs/1910.01108))."
        ),
        "## Results",
        tables["quality"],
        "\n".join(f"* {note}" for note in report["notes"]),
        tables["size"],
        tables["speed"],
        "## How to use it",
        usage_text(args),
        "## How it was made",
        training_text(args.student, args.datasets),
        "## Limits",
        limits_text(args, report),
    ]
    head = f"---\n{data.to_yaml()}\n---\n\n"
    body = "\n\n".join(parts) + "\n"
    return head + SIGNATURE.format(digest_of(f"{head}\n\n{body}")) + f"\n\n{body}"


def write_card(args: argparse.Namespace, report: Mapping, tables: Mapping[str, str]) -> None:
    """Write README.md into the student's folder once the hub's classes have read it back."""
    text = card_text(args, report, tables)
    read_back = huggingface_hub.ModelCard(text).data
    assert read_back.to_dict() == metadata(args, report).to_dict()
    path = Path(model_folder(args.student), "README.md")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    missing = [
        f"--{name}"
        for name in ("license", "language", "datasets", "base_model")
        if getattr(read_back, name) is None
    ]
    logger.info(
        "Wrote %s%s.",
        path,
        f"; say what it leaves out with {', '.join(missing)}" if missing else "",
    )
