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

from distil.models.names import model_folder, short_name
from distil.objectives import LOSSES
from distil.reporting.run_comparison import METRICS, Run, held_out_table, metrics_lines
from distil.reporting.tables import code, plain
from distil.system.files import atomic_path, output_problem
from distil.system.json_files import load_json
from distil.tasks.metrics import HUB_METRICS
from distil.tasks.tasks import TASKS
from distil.training.config import TrainConfig
from distil.training.config_file import REPLACED_BY
from distil.training.options import resumable_options
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
    if os.path.isdir(args.student):  # a README.md that is there is looked at below
        problems += filter(None, [output_problem(str(path), "--write_card", force=True)])
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
                    metric_name=metric.replace("_", " "),
                    metric_value=round(metrics[metric] / unit_of(metric_type, task.head), 6),
                )
            )
    return results


def unit_of(metric_type: str, head: str) -> float:
    """Return what divides our figure, a rate x 100, to give the hub's.

    The hub's metrics are rates from 0 to 1, but SQuAD's exact match and F1, from 0 to 100.
    """
    return 1 if metric_type == "perplexity" or head == "spans" else 100


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
    path = run_file(student, name)
    if not path.is_file():
        return {}
    try:
        return load_json(path, RUN_FILES[name])
    except (OSError, ValueError) as error:
        logger.warning("%s is no readable JSON (%s): left out of the card.", path, one_line(error))
        return {}


# Flags that decide what is computed, though a resumed run may change them. Those that are paths are
# shown by their last part.
PATH_FLAGS = {"teacher_name", "student_config", "student_pretrained_weights", "token_counts"}
SHOWN_FLAGS = PATH_FLAGS | {"gradient_accumulation_steps", "num_processes"}
SOFTWARE = {"version": "Distil", "torch_version": "PyTorch", "transformers_version": "Transformers"}

RUN_FILES = {
    "parameters.json": {
        **dict.fromkeys((*PATH_FLAGS, "data_file", *SOFTWARE), (str, None)),
        **{f"alpha_{name}": (float, None) for name in LOSSES},
    },
    "git_log.json": {"repo_sha": (str, None)},
}


def run_file(student: str, name: str) -> Path:
    """Return the path of a file of the run whose folder, or the model/ in it, is given."""
    path = Path(student, name)
    is_in_run = not path.is_file() and path.parent.name == "model"
    return path.parent.parent / name if is_in_run else path


def held_out_text(student: str) -> list[str]:
    """Lay out the held-out figures that train.py logged, in lines; none where there are none."""
    path = run_file(student, METRICS)
    if not path.is_file():
        return []
    try:
        table = held_out_table(Run("", {}, metrics_lines(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        logger.warning("%s can't be read (%s): left out of the card.", path, one_line(error))
        return []
    return [table, ""] if table else []


def training_text(student: str, datasets: Sequence[str] | None) -> str:
    """Describe how the student was trained, from the files in its folder."""
    flags = read_run_file(student, "parameters.json")
    if not flags:
        return (
            "The model's folder holds no parameters.json of the run: its training flags are not"
            " known here."
        )
    weights = {name: flags.pop(f"alpha_{name}", None) for name in LOSSES}
    losses = [
        f"* {alpha:g} x {LOSSES[name].title} (`alpha_{name}`)"
        for name, alpha in weights.items()
        if alpha
    ]
    lines = ["The training loss was the sum of:", "", *losses, ""]
    if flags.get("data_file"):
        of_datasets = f", of {', '.join(datasets)}" if datasets else ""
        name = Path(flags["data_file"]).name
        lines += [f"Training data: the token file {code(name)}{of_datasets}.", ""]
    lines += held_out_text(student)
    lines += [software_text(flags, read_run_file(student, "git_log.json")), ""]
    hidden = resumable_options(TrainConfig) - SHOWN_FLAGS
    hidden |= {name for name, other in REPLACED_BY.items() if flags.get(other) is not None}
    rows = [
        f"| {code(name)} | {plain(without_folder(name, value))} |"
        for name, value in sorted(flags.items())
        if name not in hidden and value is not None and value is not False
    ]
    return "\n".join([*lines, "| flag | value |", "| --- | --- |", *rows])


def without_folder(name: str, value: object) -> object:
    """Return a flag's value; of a path the last part."""
    is_path = isinstance(value, str) and (name in PATH_FLAGS or os.path.isabs(value))
    return Path(value).name if is_path else value


def software_text(flags: dict, commit: Mapping) -> str:
    """Name the versions that a run was made with; take them out of its flags."""
    found = {title: flags.pop(name, None) for name, title in SOFTWARE.items()}
    made_by = [f"{title} {plain(version)}" for title, version in found.items() if version]
    made_by += [f"commit {code(commit['repo_sha'])}"] if commit.get("repo_sha") else []
    if not made_by:
        return "The versions of its software are not known."
    return f"Made with {', '.join(made_by)}."


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
    name = json.dumps(args.model_id or short_name(args.student), ensure_ascii=False)
    return (
        f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        f"model = {loader}.from_pretrained({name}).eval()\n\n"
        f"{USES.get(kind, OTHER_USE)}\n```"
    )


# The hub's kind of task: what a model of it is for.
INTENDED = {
    "fill-mask": (
        "To be fine-tuned where its teacher would be, at less cost: classification of sentences and"
        " of pairs, token classification, question answering. As it is, it predicts masked tokens."
        " It is not made for writing text."
    ),
    "text-generation": (
        "To continue text, and to be fine-tuned where its teacher would be, at less cost. What it"
        " writes may be untrue or offensive: do not publish it unread."
    ),
    "feature-extraction": "To be fine-tuned where its teacher would be, at less cost.",
}
OTHER_INTENDED = "For the task that it was fine-tuned on ({}), on text like that of its training."
CITATION = """```bibtex
@article{sanh2019distilbert,
  title={DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter},
  author={Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas},
  journal={arXiv preprint arXiv:1910.01108},
  year={2019}
}
```"""


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
        f"* It was trained to imitate {plain(short_name(args.teacher))}: expect that model's errors"
        " and biases, and some more.",
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
    kind = data.pipeline_tag
    title = f"# {plain(short_name(args.student))}"
    teacher = args.base_model or (
        short_name(args.teacher) if os.path.exists(args.teacher) else args.teacher
    )
    parts = [
        title,
        (
            f"A model distilled from {code(teacher)} by the method of DistilBERT ([Sanh et al.,"
            " 2019](https://arxiv.org/abs/1910.01108))."
        ),
        "## Intended use",
        INTENDED.get(kind, OTHER_INTENDED.format(kind.replace("-", " "))),
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
        "## Citation",
        CITATION,
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
