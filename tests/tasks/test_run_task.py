"""run_task.py: every task end to end on small files in the real formats; metrics; bad input."""

import csv
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import run_process
from stand_ins import POSITIONS, ROOT, make_lines, make_model, vocab_size_of

import report
import run_task
import utils
from distil.system import rank_zero
from distil.tasks import fine_tuning, metrics, readers, schema, seed_runs, task_options, tasks
from distil.tasks.features import text_features, word_features
from distil.tasks.fine_tuning import IGNORED_LABEL
from distil.tasks.plan import Plan, longest_example, make_plan
from distil.tasks.predictions import finite
from distil.tasks.schema import Example
from distil.tasks.tasks import TASKS, glue_macro
from utils import InputError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
PROGRAM = ROOT / "scripts" / "run_task.py"
QUICK = [
    "--max_steps",
    "2",
    "--per_gpu_train_batch_size",
    "4",
    "--no_cuda",
    "--save_models",
    "none",
]

# Column names of the real files; tasks.TASKS has the indices of the columns that are read.
HEADERS = {
    "sst2": "sentence label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
        " sentence2_parse sentence1 sentence2 label1 gold_label"
    ),
    "mnli dev": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
        " sentence2_parse sentence1 sentence2 label1 label2 label3 label4 label5 gold_label"
    ),
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
    "xnli": (
        "language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse"
        " sentence2_parse sentence1 sentence2 promptID pairID genre label1 label2 label3 label4"
        " label5 sentence1_tokenized sentence2_tokenized match"
    ),
}
NLI = ["contradiction", "entailment", "neutral"]
GLUE_FILES = {
    "cola": {"train.tsv": 12, "dev.tsv": 7},
    "sst2": {"train.tsv": 12, "dev.tsv": 7},
    "mrpc": {"train.tsv": 12, "dev.tsv": 7},
    "stsb": {"train.tsv": 12, "dev.tsv": 7},
    "qqp": {"train.tsv": 12, "dev.tsv": 7},
    "qnli": {"train.tsv": 12, "dev.tsv": 7},
    "mnli": {"train.tsv": 12, "dev_matched.tsv": 7, "dev_mismatched.tsv": 5},
    "rte": {"train.tsv": 12, "dev.tsv": 7},
    "wnli": {"train.tsv": 12, "dev.tsv": 7},
}
LABELS = {
    "mnli": NLI,
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}


class Writer:
    """Makes rows over the stand-ins' words, with quotes in them as the real files have."""

    def __init__(self):
        self.rng, self.lines = random.Random(3), make_lines(80)

    def text(self) -> str:
        words = self.rng.choice(self.lines).split()[:6]
        return self.rng.choice(["{}", '"{}', 'he said "{}"', "{} '"]).format(" ".join(words))

    def row(self, task: str, file: str, number: int) -> list[str]:
        a, b, n = self.text(), self.text(), str(number)
        label = LABELS.get(task, ["0", "1"])[number % len(LABELS.get(task, ["0", "1"]))]
        if task == "mnli":
            return [
                n,
                "31",
                "31n",
                "fiction",
                "( a )",
                "( b )",
                "(A)",
                "(B)",
                a,
                b,
                *["neutral"] * (1 if "train" in file else 5),
                label,
            ]
        return {
            "cola": ["gj04", label, "" if label == "1" else "*", a],
            "sst2": [a, label],
            "mrpc": [label, "702876", "702977", a, b],
            "stsb": [
                n,
                "main-news",
                "headlines",
                "2015",
                "1001",
                "none",
                "none",
                a,
                b,
                f"{number % 6 * 0.9:.3f}",
            ],
            "qqp": [n, "1", "2", a, b, label],
        }.get(task, [n, a, b, label])


def tsv(rows) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def header(name: str) -> list[str]:
    return HEADERS[name].split("|" if "|" in HEADERS[name] else " ")


def write_glue(folder: Path) -> None:
    writer = Writer()
    for task, files in GLUE_FILES.items():
        (folder / task).mkdir()
        for file, size in files.items():
            rows = [writer.row(task, file, number) for number in range(size)]
            names = (
                header("mnli dev" if task == "mnli" and "dev" in file else task)
                if task != "cola"
                else None
            )
            (folder / task / file).write_text(
                tsv([names, *rows] if names else rows), encoding="utf-8"
            )
    with open(
        folder / "qqp" / "dev.tsv", "a", encoding="utf-8"
    ) as file:  # as the real file has: a row cut short, an empty text
        file.write("17\t1\t2\tbroken\n18\t1\t2\tba ke\t\t1\n")


def write_xnli(folder: Path) -> None:
    writer, train, test = Writer(), folder / "XNLI-MT-1.0" / "multinli", folder / "XNLI-1.0"
    train.mkdir(parents=True)
    test.mkdir()
    labels = ["contradictory", "entailment", "neutral"]
    rows = [[writer.text(), writer.text(), labels[number % 3]] for number in range(12)]
    (train / "multinli.train.en.tsv").write_text(
        tsv([["premise", "hypo", "label"], *rows]), encoding="utf-8"
    )
    rows = [
        [language, NLI[number % 3], "", "", "", "", writer.text(), writer.text(), *["x"] * 11]
        for language in tasks.XNLI_LANGUAGES
        for number in range(3)
    ]
    (test / "xnli.test.tsv").write_text(tsv([header("xnli"), *rows]), encoding="utf-8")


def write_imdb(folder: Path) -> None:
    writer = Writer()
    for split, size in {"train": 6, "test": 4}.items():
        for label in ("neg", "pos"):
            (folder / split / label).mkdir(parents=True)
            for number in range(size):
                (folder / split / label / f"{number}_7.txt").write_text(
                    f"{writer.text()}<br /><br />{writer.text()}"
                )


def conll(sentences: int) -> str:
    """Write German CoNLL-2003: word, lemma, tag, chunk, label; IOB1."""
    text = "-DOCSTART- -X- -X- -X- O\n\n"
    for number in range(sentences):
        words = [
            ("Fiba", "I-PER"),
            ("Dako", "I-PER"),
            ("ke", "O"),
            ("Gomü", "I-LOC"),
            ("Go", "B-LOC"),
            (".", "O"),
        ]
        text += (
            "".join(
                f"{word} {word.lower()} NN I-NC {label}\n" for word, label in words[number % 2 :]
            )
            + "\n"
        )
    return text


def germeval(sentences: int) -> str:
    """Write GermEval 2014's columns, with a sentence of many words and a word without tokens."""
    text = ""
    for number in range(sentences):
        words = [
            ("Fiba", "B-PER", "B-LOC"),
            ("ke", "I-PER", "O"),
            ("\x96", "O", "O"),
            ("Go", "B-LOCderiv", "O"),
        ]
        text += "#\thttp://example.org\t[2010-07-04]\n"
        words = [*words, *[("li", "O", "O")] * (90 if number == 0 else 1)]
        text += (
            "".join(
                f"{place}\t{word}\t{outer}\t{inner}\n"
                for place, (word, outer, inner) in enumerate(words, 1)
            )
            + "\n"
        )
    return text


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with the files of every task, a folder a task."""
    folder = tmp_path_factory.mktemp("tasks")
    write_glue(folder)
    for name in ("xnli", "imdb", "ner", "conll", "wikitext"):
        (folder / name).mkdir()
    write_xnli(folder / "xnli")
    write_imdb(folder / "imdb")
    for split, size in {"train": 6, "testa": 2, "testb": 5}.items():
        (folder / "conll" / f"deu.{split}").write_text(conll(size), encoding="latin-1")
    for split, size in {"train": 6, "dev": 2, "test": 5}.items():
        (folder / "ner" / f"NER-de-{split}.tsv").write_text(germeval(size), encoding="utf-8")
    for split, size in {"train": 60, "valid": 10, "test": 40}.items():
        text = " \n = Title = \n \n" + "".join(
            f" {line} \n" for line in make_lines(size, seed=size)
        )
        (folder / "wikitext" / f"wiki.{split}.raw").write_text(text, encoding="utf-8")
    return folder


def run(task: str, model: Path, data_dir: Path, output: Path, *flags: str) -> dict:
    """Run a task in this process; return its scores.json."""
    arguments = [
        "--task",
        task,
        "--model_name_or_path",
        model,
        "--data_dir",
        data_dir,
        "--output_dir",
        output,
        *QUICK,
        *flags,
    ]
    run_task.main([str(argument) for argument in arguments])
    return json.loads((output / "scores.json").read_text())


def predictions_of(output: Path, seed: int = 42) -> list[list[str]]:
    lines = (output / f"seed-{seed}" / "predictions.tsv").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "id\tprediction" and lines[-1] == ""
    return [line.split("\t") for line in lines[1:-1]]


# --------------------------------------------------------------------------------------------------
# Every task from end to end
# --------------------------------------------------------------------------------------------------

# task: (model type, size of the scored set, metrics besides "score")
GLUE_RUNS = {
    "cola": ("bert", 7, {"matthews"}),
    "sst2": ("gpt2", 7, {"accuracy"}),
    "mrpc": ("roberta", 7, {"accuracy", "f1"}),
    "stsb": ("bert", 7, {"pearson", "spearman"}),
    "qqp": ("bert", 8, {"accuracy", "f1"}),
    "mnli": ("gpt2", 12, {"matched", "mismatched"}),
    "qnli": ("roberta", 7, {"accuracy"}),
    "rte": ("bert", 7, {"accuracy"}),
    "wnli": ("bert", 7, {"accuracy"}),
}


@pytest.mark.parametrize("task", GLUE_RUNS)
def test_every_glue_task_runs_from_its_files_to_its_scores(task, teachers, data, tmp_path):
    kind, size, metrics = GLUE_RUNS[task]
    scores = run(task, teachers[kind], data / task, tmp_path / "out")
    assert set(scores["score"]) == {"score", *metrics}
    assert scores["score"]["score"] == pytest.approx(
        sum(scores["score"][name] for name in metrics) / len(metrics)
    )
    assert scores["runs"][0]["num_examples"] == {"train": 12, "dev": size}
    rows = predictions_of(tmp_path / "out")
    assert len(rows) == size and len({row[0] for row in rows}) == size
    if task != "stsb":
        assert {label for _, label in rows} <= set(TASKS[task].labels)
    rescored = run_task.score_file(
        run_task.parse(
            [
                "--task",
                task,
                "--data_dir",
                str(data / task),
                "--score_predictions",
                str(tmp_path / "out" / "seed-42" / "predictions.tsv"),
            ]
        )
    )
    assert rescored == pytest.approx(scores["score"])


def test_a_task_is_one_row_of_one_table(teachers, data, tmp_path, monkeypatch):
    """A row added to TASKS is run, scored, and named in the report and in the model card."""
    rte = TASKS["rte"]
    hub = dataclasses.replace(rte.hub, name="me/toy", card_title="Toy set", card_config=None)
    row = dataclasses.replace(rte, title="Toy title", metric_title="Toy metric", hub=hub)
    monkeypatch.setitem(TASKS, "toy", row)
    student = tmp_path / "student"
    shutil.copytree(teachers["bert"], student)
    scores = run("toy", student, data / "rte", tmp_path / "out")
    models = ["--teacher", str(teachers["bert"]), "--student", str(student)]
    made = ["--scores", str(tmp_path / "out" / "scores.json"), "--no_run", "--write_card"]
    report.main([*models, "--output_dir", str(tmp_path / "report"), *made])
    (entry,) = json.loads((tmp_path / "report" / "report.json").read_text())["quality"].values()
    assert (entry["title"], entry["metric"]) == ("Toy title", "Toy metric")
    (result,) = huggingface_hub.ModelCard.load(student / "README.md").data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("Toy set", "me/toy")
    assert (result.task_type, result.metric_type) == ("text-classification", "accuracy")
    assert result.metric_value == pytest.approx(scores["score"]["accuracy"] / 100, abs=1e-6)


def test_imdb_runs_from_its_folders(teachers, data, tmp_path):
    scores = run("imdb", teachers["bert"], data / "imdb", tmp_path / "out")
    assert scores["runs"][0]["num_examples"] == {"train": 12, "test": 8}
    assert [row[0] for row in predictions_of(tmp_path / "out")][:2] == ["neg/0_7", "neg/1_7"]


def test_xnli_learns_english_and_is_scored_in_every_language(teachers, data, tmp_path):
    scores = run("xnli", teachers["bert"], data / "xnli", tmp_path / "out")["score"]
    assert set(scores) == {"score", *tasks.XNLI_LANGUAGES}
    assert scores["score"] == pytest.approx(
        sum(scores[name] for name in tasks.README_LANGUAGES) / 6
    )
    chosen = run(
        "xnli", teachers["bert"], data / "xnli", tmp_path / "two", "--languages", "de", "fr"
    )
    assert chosen["score"]["score"] == pytest.approx((scores["de"] + scores["fr"]) / 2)
    assert chosen["runs"][0]["num_examples"] == {"train": 12, "test": 6}


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_germeval_runs_and_every_word_is_predicted_once(kind, teachers, data, tmp_path):
    scores = run("ner", teachers[kind], data / "ner", tmp_path / "out", "--max_seq_length", "16")
    assert set(scores["score"]) == {"score", "f1", "precision", "recall"}
    assert scores["runs"][0]["num_examples"] == {"train": 6, "test": 5}
    lines = (data / "ner" / "NER-de-test.tsv").read_text(encoding="utf-8").split("\n")
    words = [f"NER-de-test-{row}" for row, line in enumerate(lines, 1) if line[:1].isdigit()]
    predictions = predictions_of(tmp_path / "out")
    assert [row[0] for row in predictions] == words
    if kind == "bert":  # for which a control character is nothing
        assert all(
            label == "O"
            for row_id, label in predictions
            if "\t\x96\t" in lines[int(row_id.rsplit("-", 1)[1]) - 1]
        )


def test_conll_runs_with_its_encoding_and_another_split(
    teachers, data, tmp_path, status_and_errors
):
    scores = run(
        "ner",
        teachers["bert"],
        data / "conll",
        tmp_path / "out",
        "--encoding",
        "latin-1",
        "--split",
        "dev",
    )
    assert scores["runs"][0]["num_examples"] == {"train": 6, "dev": 2}
    status, errors = status_and_errors(
        run_task.main,
        [
            "--task",
            "ner",
            "--model_name_or_path",
            str(teachers["bert"]),
            "--data_dir",
            str(data / "conll"),
            "--output_dir",
            str(tmp_path / "no"),
        ],
    )
    assert status == 2 and len(errors) == 1
    assert "deu.train:6" in errors[0] and "latin-1" in errors[0]


def test_wikitext_is_scored_untrained_and_trained(teachers, data, tmp_path):
    flags = ["--max_seq_length", "32"]
    before = run(
        "wikitext", teachers["gpt2"], data / "wikitext", tmp_path / "a", "--do_eval", *flags
    )
    after = run(
        "wikitext",
        teachers["gpt2"],
        data / "wikitext",
        tmp_path / "b",
        *flags,
        "--learning_rate",
        "1e-3",
    )
    assert after["score"]["token_perplexity"] < before["score"]["token_perplexity"]
    model = transformers.AutoModelForCausalLM.from_pretrained(teachers["gpt2"]).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["gpt2"])
    text = (data / "wikitext" / "wiki.test.raw").read_text()
    tokens = tokenizer(text)["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        mean = model(blocks, labels=blocks).loss.item()
    counts = before["runs"][0]["num_examples"]
    assert counts == {
        "test": len(blocks),
        "tokens": len(tokens),
        "words_and_line_ends": len(text.split()) + 43,
    }
    assert before["score"]["token_perplexity"] == pytest.approx(
        math.exp(mean), rel=1e-4
    )  # float32 against float64
    by_word = math.exp(mean * len(tokens) / counts["words_and_line_ends"])
    assert before["score"]["word_perplexity"] == pytest.approx(by_word, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Learning, seeds, teachers
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory) -> Path:
    """SST-2 files whose label hangs on the first word."""
    folder, rng = tmp_path_factory.mktemp("sentiment"), random.Random(5)
    for file, size in {"train.tsv": 96, "dev.tsv": 41}.items():
        words = [
            (rng.choice(["Da", "ze"]), rng.choice(["ba li", "mo mo ke", "ra so"]))
            for _ in range(size)
        ]
        rows = [[f"{first * 3} {rest}", str(int(first == "Da"))] for first, rest in words]
        (folder / file).write_text(tsv([["sentence", "label"], *rows]))
    return folder


LEARN = ["--max_steps", "24", "--learning_rate", "3e-3", "--per_gpu_train_batch_size", "8"]


@pytest.fixture(scope="module")
def three_seeds(sentiment, teachers, tmp_path_factory):
    """A run of three seeds: (folder, scores.json)."""
    output = tmp_path_factory.mktemp("seeds") / "out"
    return output, run(
        "sst2",
        teachers["bert"],
        sentiment,
        output,
        *LEARN,
        "--seeds",
        "42",
        "7",
        "8",
        "--save_models",
        "median",
    )


def test_a_task_is_learnt(three_seeds):
    assert three_seeds[1]["score"]["accuracy"] > 90  # the larger class has about half


def test_scores_are_the_median_of_the_seeds_and_its_model_is_kept(three_seeds, sentiment, tmp_path):
    output, scores = three_seeds
    values = {run["seed"]: run["metrics"]["accuracy"] for run in scores["runs"]}
    assert list(values) == [42, 7, 8] and scores["score"]["accuracy"] == sorted(values.values())[1]
    assert scores["spread"]["accuracy"] == [min(values.values()), max(values.values())]
    kept = [seed for seed in values if (output / f"seed-{seed}" / "model.safetensors").exists()]
    assert len(kept) == 1 and values[kept[0]] == scores["score"]["accuracy"]
    assert all((output / f"seed-{seed}" / "predictions.tsv").exists() for seed in values)
    again = run("sst2", output / f"seed-{kept[0]}", sentiment, tmp_path / "again", "--do_eval")
    assert again["score"] == scores["score"]
    assert predictions_of(tmp_path / "again") == predictions_of(output, kept[0])


def test_a_seed_gives_the_same_run_again(three_seeds, sentiment, teachers, tmp_path):
    run("sst2", teachers["bert"], sentiment, tmp_path / "out", *LEARN, "--seeds", "7")
    logs = [
        json.loads((folder / "seed-7" / "log.json").read_text())[-1]["train_loss"]
        for folder in (tmp_path / "out", three_seeds[0])
    ]
    assert logs[0] == logs[1]


def fine_tuned(three_seeds) -> Path:
    output = three_seeds[0]
    return next(path.parent for path in output.glob("seed-*/model.safetensors"))


def test_a_student_learns_from_the_teacher_alone(three_seeds, sentiment, teachers, tmp_path):
    flags = [
        "--teacher_name_or_path",
        str(fine_tuned(three_seeds)),
        "--alpha_task",
        "0",
        "--alpha_ce",
        "1",
        *LEARN,
    ]
    scores = run("sst2", teachers["bert"], sentiment, tmp_path / "out", *flags)
    assert scores["score"]["accuracy"] > 90 and scores["teacher"] == str(fine_tuned(three_seeds))


def plan_of(task: str, model: Path, data_dir: Path, output: Path, *flags: str) -> Plan:
    arguments = [
        "--task",
        task,
        "--model_name_or_path",
        model,
        "--data_dir",
        data_dir,
        "--output_dir",
        output,
        *flags,
    ]
    args = run_task.parse([str(argument) for argument in arguments])
    task_options.check_arguments(args)
    return make_plan(args)


def test_flags_and_the_tasks_settings_reach_the_trainer(teachers, data, tmp_path):
    changes = {
        "learning_rate": 1e-4,
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "logging_steps": 9,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4,
    }
    flags = [
        word
        for name, value in changes.items()
        for word in (f"--{name}".replace("per_device", "per_gpu"), str(value))
    ]
    plan = plan_of("rte", teachers["bert"], data / "rte", tmp_path / "out", "--no_cuda", *flags)
    args = seed_runs.make_trainer(plan, 7).args
    assert {name: getattr(args, name) for name in changes} == changes and args.seed == 7
    plain = seed_runs.make_trainer(
        plan_of("ner", teachers["bert"], data / "ner", tmp_path / "ner", "--no_cuda"), 42
    ).args
    found = (
        plain.learning_rate,
        plain.num_train_epochs,
        plain.per_device_train_batch_size,
        plain.weight_decay,
    )
    assert (
        found == (5e-5, 3, 32, 0)
        and plain.lr_scheduler_type == "linear"
        and plain.get_warmup_steps(100) == 0
    )


def test_the_second_step_is_its_formula_in_float64(three_seeds, sentiment, teachers, tmp_path):
    flags = [
        "--teacher_name_or_path",
        str(fine_tuned(three_seeds)),
        "--alpha_ce",
        "0.3",
        "--alpha_task",
        "0.7",
        "--temperature",
        "3",
        "--no_cuda",
    ]
    plan = plan_of("sst2", teachers["bert"], sentiment, tmp_path / "out", *flags)
    trainer = seed_runs.make_trainer(plan, 42)
    for model in (trainer.model.double(), trainer.teacher.double()):
        for module in model.modules():
            module.p = 0.0  # dropout
    batch = trainer.data_collator(plan.train_features[:6])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        s, t = trainer.model(**given).logits.tolist(), trainer.teacher(**given).logits.tolist()

    def probabilities(logits, temperature):
        powers = [math.exp(logit / temperature) for logit in logits]
        return [power / sum(powers) for power in powers]

    wanted = 0.0
    for student, teacher, label in zip(s, t, batch["labels"].tolist(), strict=True):
        pairs = zip(probabilities(teacher, 3), probabilities(student, 3), strict=True)
        wanted += 0.3 * 9 * sum(p * math.log(p / q) for p, q in pairs) / 6
        wanted -= 0.7 * math.log(probabilities(student, 1)[label]) / 6
    assert loss.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("task", ["stsb", "ner", "wikitext"])
def test_every_kind_of_head_has_a_second_step(task, teachers, data, tmp_path):
    kind, flags = "gpt2" if task == "wikitext" else "bert", ["--max_seq_length", "24"]
    run(task, teachers[kind], data / task, tmp_path / "teacher", *flags, "--save_models", "all")
    plain = tmp_path / "plain" / "seed-42" / "log.json"
    run(task, teachers[kind], data / task, tmp_path / "plain", *flags)
    taught = [
        "--teacher_name_or_path",
        str(tmp_path / "teacher" / "seed-42"),
        "--alpha_task",
        "1",
        "--alpha_ce",
        "2",
    ]
    run(task, teachers[kind], data / task, tmp_path / "student", *flags, *taught)
    losses = [
        json.loads(log.read_text())[-1]["train_loss"]
        for log in (plain, tmp_path / "student" / "seed-42" / "log.json")
    ]
    assert losses[1] > losses[0]  # the same first batches, and a distance from the teacher above 0


@pytest.mark.parametrize("rows", [(8, 40), (40, 8)])
def test_a_second_step_of_padded_vocabularies_is_over_the_tokenizers_entries(rows, teachers):
    size = vocab_size_of(teachers["gpt2"])
    student, teacher = (make_model("gpt2", size + more).eval() for more in rows)
    arguments = fine_tuning.training_arguments("x", seed=1, batch_size=2, eval_batch_size=2)
    trainer = fine_tuning.Trainer(
        distance="next tokens",
        teacher=teacher,
        alpha_task=0.0,
        alpha_ce=1.0,
        num_entries=size,
        model=student,
        args=arguments,
    )
    ids_BT = torch.arange(40).view(2, 20)
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = trainer.compute_loss(student, {"input_ids": ids_BT, "labels": ids_BT})
    p_NE = (teacher(ids_BT).logits[:, :-1, :size].flatten(0, 1) / 2).softmax(-1)
    log_q_NV = (student(ids_BT).logits[:, :-1].flatten(0, 1) / 2).log_softmax(-1)
    expected = 4 * (p_NE * (p_NE.log() - log_q_NV[:, :size])).sum(-1).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--teacher_name_or_path"])
def test_a_model_of_fewer_rows_than_tokens_is_refused(
    flag, teachers, data, tmp_path, status_and_errors
):
    short = tmp_path / "short"
    shutil.copytree(teachers["gpt2"], short)
    make_model("gpt2", 300).save_pretrained(short)
    changed = [flag, str(short), "--max_seq_length", "24"]
    argv = flags_of(
        "wikitext", teachers, data / "wikitext", tmp_path / "out", *changed, kind="gpt2"
    )
    status, errors = status_and_errors(run_task.main, argv)
    assert status == 2 and "ids up to 319, the model 300 embeddings" in errors[0]


def test_a_distilbert_student_learns_pairs_from_a_bert_teacher(teachers, data, tmp_path):
    run("rte", teachers["bert"], data / "rte", tmp_path / "teacher", "--save_models", "all")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["bert"])
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=POSITIONS,
    )
    for saved in (transformers.DistilBertForMaskedLM(config), tokenizer):
        saved.save_pretrained(tmp_path / "student")
    flags = [
        "--teacher_name_or_path",
        str(tmp_path / "teacher" / "seed-42"),
        "--save_models",
        "all",
    ]
    run("rte", tmp_path / "student", data / "rte", tmp_path / "out", *flags)
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "seed-42")
    assert saved.architectures == ["DistilBertForSequenceClassification"]
    assert saved.id2label == {0: "entailment", 1: "not_entailment"}


def test_a_model_of_mnli_is_scored_on_xnli_and_one_of_mrpc_not_on_cola(
    teachers, data, tmp_path, status_and_errors
):
    for task in ("mnli", "mrpc"):
        run(task, teachers["bert"], data / task, tmp_path / task, "--save_models", "all")
    scores = run(
        "xnli",
        tmp_path / "mnli" / "seed-42",
        data / "xnli",
        tmp_path / "out",
        "--do_eval",
        "--languages",
        "sw",
    )
    assert scores["runs"][0]["num_examples"] == {"test": 3}
    flags = flags_of(
        "cola", {"bert": tmp_path / "mrpc" / "seed-42"}, data / "cola", tmp_path / "no", "--do_eval"
    )
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2 and len(errors) == 1 and "was fine-tuned for mrpc, not for cola" in errors[0]


def test_outputs_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="lower --learning_rate"):
        finite(np.array([0.0, math.nan]), "out")


def test_the_order_of_labels_is_the_teachers(teachers, data, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        teachers["bert"],
        id2label={0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"},
        dtype=torch.float32,
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    for saved in (model, transformers.AutoTokenizer.from_pretrained(teachers["bert"])):
        saved.save_pretrained(tmp_path / "model")
    scores = run("mnli", tmp_path / "model", data / "mnli", tmp_path / "out", "--do_eval")["score"]
    assert {label for _, label in predictions_of(tmp_path / "out")} == {"neutral"}
    assert scores["matched"] == pytest.approx(100 * 2 / 7) and scores[
        "mismatched"
    ] == pytest.approx(100 / 5)


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_score_the_whole_set_once_as_one_does(teachers, data, tmp_path):
    """Fine-tuned and scored on two processes, in batches that do not divide; then scored on one."""
    flags = [
        "--task",
        "ner",
        "--data_dir",
        data / "ner",
        "--max_seq_length",
        "16",
        "--max_steps",
        "2",
        "--no_cuda",
    ]
    sizes = ["--per_gpu_train_batch_size", "2", "--per_gpu_eval_batch_size", "2"]
    places = ["--model_name_or_path", teachers["bert"], "--output_dir", tmp_path / "two"]
    done = run_process(*TORCHRUN, 2, PROGRAM, *flags, *sizes, *places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("precision") == 1  # one process prints the table
    two = json.loads((tmp_path / "two" / "scores.json").read_text())
    one = run(
        "ner",
        tmp_path / "two" / "seed-42",
        data / "ner",
        tmp_path / "one",
        "--do_eval",
        "--max_seq_length",
        "16",
    )
    assert two["score"] == one["score"] and two["runs"][0]["num_examples"]["test"] == 5
    assert predictions_of(tmp_path / "two") == predictions_of(tmp_path / "one")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["bert"])
    inputs = word_features(
        read("ner", data / "ner" / "NER-de-test.tsv"),
        tokenizer,
        16,
        {"O": 0, "B-PER": 1, "I-PER": 2, "B-LOCderiv": 3},
    )
    assert len(inputs) % 4 and len({label for _, label in predictions_of(tmp_path / "two")}) > 1


# --------------------------------------------------------------------------------------------------
# Readers and features
# --------------------------------------------------------------------------------------------------


def read(task: str, file: Path, part=None, encoding: str = "utf-8") -> list[Example]:
    return TASKS[task].read(
        file, part or next(iter(TASKS[task].scored.values()))[0], TASKS[task], encoding
    )


def test_rows_are_read_as_the_csv_module_reads_them_without_quotes(data):
    for task, files in GLUE_FILES.items():
        for file in files:
            examples = read(task, data / task / file)
            with open(data / task / file, encoding="utf-8", newline="") as stream:
                rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[
                    task != "cola" :
                ]
            columns = TASKS[task].train.columns
            wanted = [
                tuple(row[column] for column in columns.texts)
                for row in rows
                if len(row) >= columns.least_width
            ]
            assert [example.texts for example in examples] == wanted
            assert any('"' in text for texts in wanted for text in texts)


def test_line_ends_of_another_system_and_a_byte_order_mark_change_nothing(data, tmp_path):
    plain = data / "mrpc" / "dev.tsv"
    (tmp_path / "dev.tsv").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    pairs = zip(read("mrpc", plain), read("mrpc", tmp_path / "dev.tsv"), strict=True)
    assert all((a.id, a.texts, a.label) == (b.id, b.texts, b.label) for a, b in pairs)


def test_germeval_and_conll_are_told_apart_and_outer_labels_count(data, tmp_path):
    first = read("ner", data / "ner" / "NER-de-dev.tsv")[0]
    assert first.texts[:4] == ("Fiba", "ke", "\x96", "Go") and first.label[:4] == (
        "B-PER",
        "I-PER",
        "O",
        "B-LOCderiv",
    )
    sentences = read("ner", data / "conll" / "deu.testa", encoding="latin-1")
    assert [s.texts[0] for s in sentences] == ["Fiba", "Dako"] and sentences[0].label[3:5] == (
        "I-LOC",
        "B-LOC",
    )
    (tmp_path / "test.txt").write_text(
        "Fiba B-PER\nke O\n\n# O\n"
    )  # two columns, and a word that looks like a comment
    assert [s.texts for s in read("ner", tmp_path / "test.txt")] == [("Fiba", "ke"), ("#",)]
    # CoNLL's columns with tabs between, and a number for its first word: the second column is no
    # word, the third no label.
    (tmp_path / "test.txt").write_text("10\tCD\tB-NP\tO\nFiba \tNN  I-NP\tB-PER\n\n")
    assert [(s.texts, s.label) for s in read("ner", tmp_path / "test.txt")] == [
        (("10", "Fiba"), ("O", "B-PER"))
    ]


def test_long_sentences_are_split_not_cut_and_first_tokens_have_the_labels(teachers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["bert"])
    words, labels = ("Fiba", "\x96", *["bakelimo"] * 30), ("B-PER", "O", *["O"] * 30)
    example = Example("f-1", "f:1", words, labels)
    features = word_features([example], tokenizer, 16, {"O": 0, "B-PER": 1})
    assert len(features) > 1 and all(len(f["input_ids"]) <= 16 for f in features)
    assert [place for f in features for place in f["places"]] == [
        (0, n) for n in range(32) if n != 1
    ]
    for feature in features:
        tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
        starts = [
            token
            for token, label in zip(tokens, feature["labels"], strict=True)
            if label != IGNORED_LABEL
        ]
        assert len(starts) == len(feature["places"]) and not any(
            token.startswith("##") for token in starts
        )


def test_long_texts_are_cut_to_what_the_model_takes(teachers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["roberta"])
    config = transformers.AutoConfig.from_pretrained(teachers["roberta"])
    args = run_task.parse(["--task", "imdb"])
    assert longest_example({"--model_name_or_path": config}, tokenizer, args) == POSITIONS
    long = Example("a", "a", ("ba " * 500, "ke " * 10), "0")
    (feature,) = text_features([long], tokenizer, POSITIONS, {"0": 0})
    assert len(feature["input_ids"]) == POSITIONS


def test_a_gpt2_pair_is_joined_by_the_end_of_text(teachers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["gpt2"])
    (feature,) = text_features([Example("a", "a", ("ba", "ke"), "0")], tokenizer, 32, {"0": 0})
    assert tokenizer.decode(feature["input_ids"]) == "ba<|endoftext|>ke"


def test_rows_of_the_hub_give_the_same_examples_as_the_files(data):
    rows = datasets.Dataset.from_dict(
        {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]},
        features=datasets.Features(
            {
                "premise": datasets.Value("string"),
                "hypothesis": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            }
        ),
    )
    found = readers.hub_examples(TASKS["xnli"], rows, schema.HubPart("test", "de", "de"), "x")
    assert [(e.texts, e.label, e.group) for e in found] == [
        (("a", "c"), "entailment", "de"),
        (("b", "d"), "contradiction", "de"),
    ]
    rows = datasets.Dataset.from_dict(
        {"tokens": [["Fiba", "ke"]], "ner_tags": [[1, 0]]},
        features=datasets.Features(
            {
                "tokens": datasets.List(datasets.Value("string")),
                "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER"])),
            }
        ),
    )
    (sentence,) = readers.hub_examples(TASKS["ner"], rows, schema.HubPart("test"), "x")
    assert (sentence.texts, sentence.label) == (("Fiba", "ke"), ("B-PER", "O"))
    lines = (data / "wikitext" / "wiki.test.raw").read_text().splitlines(keepends=True)
    rows = datasets.Dataset.from_dict({"text": [line if line.strip() else "" for line in lines]})
    (text,) = readers.hub_examples(TASKS["wikitext"], rows, schema.HubPart("test"), "x")
    assert text.texts[0] == "".join(lines)


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------

# The README of the 2019 folder at its first revision (BERT-base, DistilBERT) and of January 2020
# (the others): macro score as printed, then the columns in the order of tasks.GLUE_TASKS.
PUBLISHED = {
    "BERT-base, 2019": (77.6, None, [48.9, 84.3, 88.6, 89.3, 89.5, 71.3, 91.7, 91.2, 43.7]),
    "DistilBERT, 2019": (76.8, None, [49.1, 81.8, 90.2, 90.2, 89.2, 62.9, 92.7, 90.7, 44.4]),
    "RoBERTa-base (reported)": (83.2, 86.4, [63.6, 87.6, 90.2, 92.8, 91.9, 78.7, 94.8, 91.2, 57.7]),
    "DistilRoBERTa": (79.0, 82.3, [59.4, 83.9, 86.6, 90.8, 89.4, 67.9, 92.5, 88.3, 52.1]),
    "BERT-base-uncased": (79.5, None, [56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5]),
    "DistilBERT-base-uncased": (77.0, None, [51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3]),
    "BERT-base-cased": (78.2, None, [58.2, 83.9, 87.8, 91.0, 89.2, 66.1, 91.7, 89.2, 46.5]),
    "DistilBERT-base-cased": (75.9, None, [47.2, 81.5, 85.6, 88.2, 87.8, 60.6, 90.4, 85.5, 56.3]),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_macro_scores_follow_from_their_columns(model):
    macro, without_wnli, columns = PUBLISHED[model]
    found = glue_macro(dict(zip(tasks.GLUE_TASKS, columns, strict=True)))
    assert abs(found["macro"] - macro) <= 0.05 + 1e-9  # printed with one digit
    if without_wnli:
        assert (
            abs(found["macro_without_wnli"] - without_wnli) <= 0.1
        )  # "agree to 0.1": columns are rounded, too


def test_a_macro_score_wants_all_nine_tasks():
    with pytest.raises(InputError, match="no figure for wnli"):
        glue_macro(dict.fromkeys(tasks.GLUE_TASKS[:-1], 50.0))


def test_metrics_equal_their_formulas():
    gold, found = ["1", "1", "0", "0", "1"], ["1", "0", "0", "1", "1"]  # tp 2, fp 1, fn 1, tn 1
    assert metrics.accuracy_and_f1(found, gold) == pytest.approx({"accuracy": 60, "f1": 200 / 3})
    assert metrics.matthews(found, gold)["matthews"] == pytest.approx(
        100 * (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    )
    values = metrics.correlations([1.0, 2.0, 4.0, 8.0], [1.0, 3.0, 2.0, 5.0])
    assert values["spearman"] == pytest.approx(100 * (1 - 6 * 2 / (4 * 15)))
    assert values["pearson"] == pytest.approx(100 * 13.75 / math.sqrt(28.75 * 8.75))


def test_metrics_of_one_class_or_value_are_zero_not_undefined():
    assert metrics.matthews(["0", "0"], ["0", "1"]) == {"matthews": 0}
    assert metrics.accuracy_and_f1(["0", "0"], ["0", "0"]) == {"accuracy": 100, "f1": 0}
    assert metrics.correlations([1.0, 1.0], [0.0, 5.0]) == {"pearson": 0, "spearman": 0}
    assert metrics.entities([("O", "O")], [("O", "O")]) == {"f1": 0, "precision": 0, "recall": 0}


def test_entities_count_whole_in_both_spellings():
    gold = [("I-PER", "I-PER", "O", "I-LOC", "B-LOC")]
    assert metrics.entities([("B-PER", "I-PER", "O", "B-LOC", "B-LOC")], gold)["f1"] == 100
    found = metrics.entities(
        [("B-PER", "O", "O", "B-LOC", "B-LOC")], gold
    )  # two of three right, three found
    assert found == pytest.approx({"f1": 200 / 3, "precision": 200 / 3, "recall": 200 / 3})


def test_word_perplexity_is_the_published_conversion():
    """A token perplexity of 16.3 on the WikiText test set is 25.9 by word, 21.1 is 35.0."""
    for by_token, by_word in {16.3: 25.9, 21.1: 35.0}.items():
        found = metrics.perplexities(math.log(by_token) * 285417, 285417, 286221, 245569)
        assert (
            found["token_perplexity"] == pytest.approx(by_token)
            and round(found["word_perplexity"], 1) == by_word
        )


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def edited(data: Path, task: str, folder: Path, file: str, old: str, new: str) -> Path:
    """Copy a task's folder with something replaced in one file."""
    target = folder / task
    target.mkdir(parents=True)
    for path in (data / task).iterdir():
        text = path.read_text(encoding="utf-8")
        assert path.name != file or old in text
        (target / path.name).write_text(
            text.replace(old, new, 1) if path.name == file else text, encoding="utf-8", newline=""
        )
    return target


# task, file, what is replaced, by what, words of the message
DAMAGE = {
    "unknown label": (
        "sst2",
        "train.tsv",
        "\t0\n",
        "\t2\n",
        ["train.tsv:2", "unknown label '2'", "0, 1"],
    ),
    "label of no number": (
        "stsb",
        "train.tsv",
        "\t0.900\n",
        "\tmany\n",
        ["train.tsv:3", "'many'", "0 to 5"],
    ),
    "label beyond the scale": ("stsb", "dev.tsv", "\t0.900\n", "\t7.0\n", ["dev.tsv:3", "'7.0'"]),
    "missing column": (
        "mrpc",
        "dev.tsv",
        "\t#1 String\t#2 String",
        "\t#1 String",
        ["dev.tsv:1", "4 of at least 5 columns"],
    ),
    "missing header": (
        "rte",
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel\n",
        "",
        ["train.tsv:1", "is an example"],
    ),
    "return in a text": (
        "qnli",
        "train.tsv",
        " ",
        "\r",
        ["train.tsv:2", "carriage return", "replace it"],
    ),
    "empty text": (
        "cola",
        "dev.tsv",
        "gj04\t0\t*\t",
        "gj04\t0\t*\t\t",
        ["dev.tsv:1", "an empty text"],
    ),
    "label of no entity": (
        "ner",
        "NER-de-train.tsv",
        "B-PER",
        "PER",
        ["NER-de-train.tsv:2", "'PER'"],
    ),
    "fewer columns": (
        "ner",
        "NER-de-train.tsv",
        "\tB-LOC\n",
        "\n",
        ["NER-de-train.tsv:2", "3 columns", "expected 4"],
    ),
}


def flags_of(
    task: str, teachers, data_dir: Path, output: Path, *more: str, kind: str = "bert"
) -> list[str]:
    values = [
        "--task",
        task,
        "--model_name_or_path",
        teachers[kind],
        "--data_dir",
        data_dir,
        "--output_dir",
        output,
        *more,
    ]
    return [str(value) for value in values]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_file_and_row(
    damage, teachers, data, tmp_path, status_and_errors
):
    task, file, old, new, words = DAMAGE[damage]
    folder = edited(data, task, tmp_path, file, old, new)
    status, errors = status_and_errors(
        run_task.main, flags_of(task, teachers, folder, tmp_path / "out")
    )
    assert status == 2 and len(errors) == 1 and all(word in errors[0] for word in words), errors
    assert not (tmp_path / "out").exists()


def test_argument_problems_are_told_together(teachers, data, tmp_path, status_and_errors):
    flags = flags_of(
        "sst2",
        teachers,
        tmp_path / "nowhere",
        data,
        "--split",
        "test",
        "--languages",
        "de",
        "--seeds",
        "1",
        "1",
        "--encoding",
        "rot13",
        "--learning_rate",
        "-1",
        "--temperature",
        "0",
        "--max_seq_length",
        "2",
        "--max_steps",
        "0",
    )
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2
    for word in (
        "--max_seq_length 2",
        "--learning_rate -1",
        "--split test",
        "--languages",
        "no such folder",
        "--encoding rot13",
        "--max_steps 0",
        "is not empty",
        "--temperature 0",
        "--seeds 1 1",
    ):
        assert sum(word in line for line in errors) == 1, word


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "sst3"], ["invalid choice: 'sst3'", "sst2"]),
        (["--task", "sst2"], ["--model_name_or_path: is missing"]),
        (["--task", "sst2", "--encoding", "utf-9"], ["--encoding utf-9: no such encoding"]),
        (
            ["--task", "ner", "--model_name_or_path", "x", "--output_dir", "new"],
            ["no default data set on the hub"],
        ),
        (["--task", "wikitext", "--score_predictions", "pyproject.toml"], ["has a perplexity"]),
    ],
)
def test_what_is_missing_or_unknown_is_named(flags, words, status_and_errors, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2 and all(any(word in line for line in errors) for word in words), errors


@pytest.fixture(scope="module")
def misfits(teachers, data, tmp_path_factory) -> dict[str, list[str]]:
    """Flags that don't fit together, and the words of the message at their end."""
    folder = tmp_path_factory.mktemp("misfits")
    run("rte", teachers["bert"], data / "rte", folder / "rte", "--save_models", "all")
    run("mnli", teachers["gpt2"], data / "mnli", folder / "mnli", "--save_models", "all")
    bare = folder / "bare"
    transformers.AutoModelForMaskedLM.from_pretrained(teachers["bert"]).save_pretrained(bare)
    seeing = folder / "seeing"
    transformers.BertLMHeadModel.from_pretrained(teachers["bert"]).save_pretrained(seeing)
    transformers.AutoTokenizer.from_pretrained(teachers["bert"]).save_pretrained(seeing)
    teacher = ["--teacher_name_or_path", str(folder / "rte" / "seed-42")]
    return {
        "teacher of another task": [
            "mnli",
            "bert",
            *teacher,
            "| was fine-tuned for rte, not for mnli",
        ],
        "teacher with another tokenizer": ["rte", "roberta", *teacher, "| different tokenizers"],
        "teacher without training": [
            "rte",
            "bert",
            *teacher,
            "--do_eval",
            "| teaches in training only",
        ],
        "teacher without a head": [
            "sst2",
            "bert",
            "--teacher_name_or_path",
            str(teachers["bert"]),
            "| fine-tuned for this",
        ],
        "teacher with other classes": [
            "mnli",
            "bert",
            "--teacher_name_or_path",
            str(teachers["bert"]),
            "| has 2 classes",
        ],
        "model without a head": ["sst2", "bert", "--do_eval", "| fine-tuned for this very task"],
        "model without a tokenizer": [
            "sst2",
            str(bare),
            "| has neither tokenizer.json nor a vocabulary",
        ],
        "masked model for wikitext": ["wikitext", "roberta", "| is a masked model"],
        "masked model with a causal head": [
            "wikitext",
            str(seeing),
            "| sees the tokens that it is to predict",
        ],
        "longer than the model takes": [
            "sst2",
            "bert",
            "--max_seq_length",
            "65",
            "| takes at most 64",
        ],
        "unknown language": [
            "xnli",
            "bert",
            "--languages",
            "de",
            "nl",
            "| --languages nl: the scored set has ar, bg",
        ],
        "half precision without a GPU": [
            "sst2",
            "bert",
            "--fp16",
            "--no_cuda",
            "| --fp16: needs a GPU",
        ],
    }


MISFITS = [
    "teacher of another task",
    "teacher with another tokenizer",
    "teacher without training",
    "teacher without a head",
    "teacher with other classes",
    "model without a head",
    "model without a tokenizer",
    "masked model for wikitext",
    "masked model with a causal head",
    "longer than the model takes",
    "unknown language",
    "half precision without a GPU",
]


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together_is_refused_in_one_line(
    case, misfits, teachers, data, tmp_path, status_and_errors
):
    task, model, *flags, words = misfits[case]
    places = {**teachers, model: teachers.get(model, model)}
    arguments = flags_of(task, places, data / task, tmp_path / "out", *flags, kind=model)
    status, errors = status_and_errors(run_task.main, arguments)
    assert status == 2 and len(errors) == 1 and words.removeprefix("| ") in errors[0], errors
    assert not (tmp_path / "out" / "scores.json").exists()


def test_earlier_seeds_are_replaced_when_asked_and_never_what_is_read(
    teachers, data, tmp_path, status_and_errors
):
    output = tmp_path / "out"
    run(
        "sst2", teachers["bert"], data / "sst2", output, "--seeds", "1", "2", "--save_models", "all"
    )
    corpus = shutil.copytree(data / "sst2", output / "seed-corpus")
    (output / "seed-2" / "notes.txt").write_text("mine")
    (output / "seed-7").symlink_to(output / "seed-1")
    (output / "seed-8").mkdir()
    (output / "seed-8" / "thesis.txt").write_text("years of work")
    kept = sorted(output.rglob("*"))
    inside = str(output / "seed-2" / "notes.txt")
    refused = [
        (["--overwrite_output_dir", "--seeds", "8"], "its seed-8 is of no earlier run"),
        (["--overwrite_output_dir", "--seeds", "7"], "its seed-7 is of no earlier run"),
        (["--overwrite_output_dir", "--tokenizer_name", inside], "--tokenizer_name, which is read"),
        ([], f"--output_dir {output}: is not empty"),
        (
            ["--overwrite_output_dir", "--gradient_accumulation_steps", "9"],
            "an epoch has 1 micro-batches, too few",
        ),
        (
            ["--overwrite_output_dir", "--model_name_or_path", str(output / "seed-1")],
            "--model_name_or_path, which is read",
        ),
        (
            ["--overwrite_output_dir", "--teacher_name_or_path", str(output / "seed-2")],
            "--teacher_name_or_path, which is read",
        ),
        (["--overwrite_output_dir", "--data_dir", str(output)], "--data_dir, which is read"),
    ]
    for more, words in refused:
        flags = flags_of("sst2", teachers, data / "sst2", output, *more)
        status, errors = status_and_errors(run_task.main, flags)
        assert status == 2 and len(errors) == 1 and words in errors[0], errors
        assert sorted(output.rglob("*")) == kept
    run("sst2", teachers["bert"], corpus, output, "--seeds", "3", "--overwrite_output_dir")
    left = ["scores.json", "seed-2", "seed-3", "seed-7", "seed-8", "seed-corpus"]
    assert sorted(path.name for path in output.iterdir()) == left
    assert os.listdir(output / "seed-2") == ["notes.txt"] and os.listdir(corpus)
    (output / "scores.json").write_text("my own scores")
    flags = flags_of("sst2", teachers, corpus, output, "--overwrite_output_dir")
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2 and "its scores.json is of no earlier run" in errors[0]


def test_labels_that_a_model_does_not_know_are_named(teachers, data, tmp_path, status_and_errors):
    run("ner", teachers["bert"], data / "ner", tmp_path / "model", "--save_models", "all")
    folder = edited(data, "ner", tmp_path, "NER-de-test.tsv", "B-PER", "B-ZZZ")
    flags = flags_of(
        "ner", {"bert": tmp_path / "model" / "seed-42"}, folder, tmp_path / "out", "--do_eval"
    )
    status, errors = status_and_errors(run_task.main, flags)
    assert (
        status == 2
        and len(errors) == 1
        and "has no class for the files' B-ZZZ, only B-LOCderiv, B-PER" in errors[0]
    )


def test_another_process_says_nothing_and_is_not_the_first_to_fail(monkeypatch, status_and_errors):
    monkeypatch.setattr(rank_zero, "RANK_0_FIRST_S", 0.3)
    for rank, least_s in (("0", 0), ("1", 0.3)):
        monkeypatch.setenv("RANK", rank)
        started = time.monotonic()
        assert (
            status_and_errors(run_task.main, ["--task", "sst2", "--model_name_or_path", "x"])[0]
            == 2
        )
        assert time.monotonic() - started >= least_s
        assert utils.logger.isEnabledFor(logging.WARNING) == (rank == "0")


def test_a_text_without_words_is_refused(teachers, tmp_path, status_and_errors):
    (tmp_path / "wiki.test.raw").write_text(" \n" * 100)
    flags = flags_of(
        "wikitext",
        teachers,
        tmp_path,
        tmp_path / "out",
        "--do_eval",
        "--max_seq_length",
        "8",
        kind="gpt2",
    )
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2 and errors == [
        f"{tmp_path / 'wiki.test.raw'}: holds no word; take another copy"
    ]


@pytest.mark.parametrize("encoding, likely", [("utf-16", "utf-16"), ("latin-1", "latin-1")])
def test_a_file_of_another_encoding_is_told_which_to_name(encoding, likely, tmp_path):
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\nbä\t1\n".encode(encoding))
    with pytest.raises(
        InputError, match=f"dev.tsv:[12]: is not utf-8 .*; name its --encoding, such as {likely}"
    ):
        read("sst2", tmp_path / "dev.tsv")
    assert read("sst2", tmp_path / "dev.tsv", encoding=encoding)[0].texts == ("bä",)


def test_a_text_shorter_than_a_block_is_refused(teachers, tmp_path, status_and_errors):
    (tmp_path / "wiki.test.raw").write_text("ba ke li\n")
    flags = flags_of("wikitext", teachers, tmp_path, tmp_path / "out", "--do_eval", kind="gpt2")
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2 and "fewer than one block of 64" in errors[0], errors


def test_a_missing_file_and_two_that_fit_are_named(teachers, data, tmp_path, status_and_errors):
    status, errors = status_and_errors(
        run_task.main, flags_of("sst2", teachers, tmp_path, tmp_path / "out")
    )
    assert status == 2 and "has no file train.tsv" in errors[0] and "--do_eval" in errors[0]
    for name in ("a.train", "b.train"):
        (tmp_path / name).write_text(conll(1), encoding="latin-1")
    status, errors = status_and_errors(
        run_task.main, flags_of("ner", teachers, tmp_path, tmp_path / "out")
    )
    assert status == 2 and "a.train, b.train all fit" in errors[0]


def test_the_hub_out_of_reach_is_one_line(teachers, tmp_path, status_and_errors, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    flags = [
        "--task",
        "mrpc",
        "--model_name_or_path",
        str(teachers["bert"]),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    status, errors = status_and_errors(run_task.main, flags)
    assert (
        status == 2
        and len(errors) == 1
        and "nyu-mll/glue" in errors[0]
        and "--data_dir" in errors[0]
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[:-1], ["no prediction for dev-8; predict"]),
        (lambda rows: [*rows, ["dev-99", "0"]], [":9", "dev-99 is not one of", "dev-2"]),
        (lambda rows: [*rows, rows[0]], [":9", "there twice"]),
        (lambda rows: [["dev-2", "yes"], *rows[1:]], [":2", "unknown label 'yes'"]),
        (lambda rows: [["dev-2"], *rows[1:]], [":2", "with a tab between"]),
    ],
)
def test_predictions_that_are_not_the_sets_are_refused(
    change, words, data, tmp_path, status_and_errors
):
    rows = [[f"dev-{row}", "0"] for row in range(2, 9)]
    (tmp_path / "p.tsv").write_text(tsv([["id", "prediction"], *change(rows)]))
    flags = [
        "--task",
        "sst2",
        "--data_dir",
        str(data / "sst2"),
        "--score_predictions",
        str(tmp_path / "p.tsv"),
    ]
    status, errors = status_and_errors(run_task.main, flags)
    assert status == 2 and len(errors) == 1 and all(word in errors[0] for word in words), errors
