"""The report and the model card: tables against hand-made sums, timings, metadata, bad input."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from stand_ins import make_lines, make_model, student_config_of, vocab_size_of

import evaluate_lm
import latency as latency_program
import report
from distil.reporting import (
    comparison,
    latency,
    model_card,
    report_plot,
    report_tables,
    sizes,
    tables,
)
from distil.reporting.plan import Plan
from distil.system import files
from distil.tasks.scores import write_scores

TASKS = report.TASKS
QUICK = ["--batch_sizes", "1", "4", "--passes", "3", "--num_sentences", "4"]
# What each run of three seeds found: {task: {model: [metrics of a seed]}}; "score" is the task's
# one number.
FOUND = {
    "mrpc": {
        "teacher": [
            {"score": (a + f) / 2, "accuracy": a, "f1": f}
            for a, f in ((86.0, 90.0), (86.4, 90.2), (85.6, 90.2))
        ],
        "student": [
            {"score": (a + f) / 2, "accuracy": a, "f1": f}
            for a, f in ((84.0, 88.0), (83.0, 88.0), (84.4, 88.4))
        ],
        "baseline": [
            {"score": (a + f) / 2, "accuracy": a, "f1": f}
            for a, f in ((70.0, 80.0), (71.0, 81.0), (69.0, 79.0))
        ],
    },
    "sst2": {
        "teacher": [{"score": value, "accuracy": value} for value in (92.0, 92.5, 96.0)],
        "student": [{"score": value, "accuracy": value} for value in (90.0, 89.5, 91.0)],
    },
    "mnli": {
        "teacher": [{"score": 84.25, "matched": 83.7, "mismatched": 84.8}],
        "student": [{"score": 82.1, "matched": 82.0, "mismatched": 82.2}],
    },
    "cola": {
        "teacher": [{"score": value, "matthews": value} for value in (-1.0, 0.0, 2.0)],
        "student": [{"score": value, "matthews": value} for value in (5.0, 6.0, 7.0)],
    },
    "wikitext": {
        "teacher": [{"score": 16.3, "token_perplexity": 16.3, "word_perplexity": 25.9}],
        "student": [{"score": 21.1, "token_perplexity": 21.1, "word_perplexity": 35.0}],
    },
    "squad": {
        "teacher": [{"exact": 81.2, "f1": 88.5}],
        "student": [{"exact": 79.1, "f1": 86.9}],
    },
}


@pytest.fixture(scope="module")
def student(tmp_path_factory, teachers) -> Path:
    """A student of the tiny BERT, as a run leaves it, with the run's own files."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-distilbert"
    config = transformers.DistilBertConfig(
        **student_config_of("bert", vocab_size_of(teachers["bert"]))
    )
    transformers.DistilBertForMaskedLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(teachers["bert"]).save_pretrained(folder)
    files.write_json(
        folder / "parameters.json",
        {
            "alpha_ce": 5.0,
            "alpha_mlm": 2.0,
            "alpha_clm": 0.0,
            "temperature": 2.0,
            "data_file": "/somewhere/data.pickle",
            "note": "a|b",
            "other": "/somewhere/else",
            "mlm_smoothing": 0.0,
            "n_epoch": 3,
            "max_steps": 60,
            "force": True,
            "version": "9.8.7",
            "torch_version": "2.99.0",
        },
    )
    files.write_json(folder / "git_log.json", {"repo_sha": "0123abc"})
    return folder


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, student) -> Path:
    return Path(shutil.copytree(student, tmp_path_factory.mktemp("others") / "no-teacher"))


@pytest.fixture
def own_student(tmp_path, student) -> Path:
    """A copy of the student that a test may write into."""
    return Path(shutil.copytree(student, tmp_path / "tiny-distilbert"))


def write_found(folder: Path, models: dict[str, Path], tasks: Iterable[str] = FOUND) -> list[str]:
    """Write the runs of FOUND as scores.json files; list them."""
    paths = []
    for task in tasks:
        for role, runs in FOUND[task].items():
            if role in models:
                paths.append(folder / f"{role}-{task}.json")
                entries = [
                    {"seed": k, "metrics": run, "num_examples": {"dev": 408}}
                    for k, run in enumerate(runs)
                ]
                write_scores(paths[-1], task=task, model=str(models[role]), runs=entries, flags={})
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def made(tmp_path_factory, teachers, student, baseline) -> tuple[Path, list[str]]:
    """A report of three models, all measured; and the flags that made it, without the scores."""
    folder = tmp_path_factory.mktemp("made")
    models = {"teacher": teachers["bert"], "student": student, "baseline": baseline}
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(student),
        "--baseline",
        str(baseline),
        "--output_dir",
        str(folder / "out"),
        *QUICK,
    ]
    report.main(
        flags
    )  # measures; with the scores, in the same call, what the baseline lacks would be run
    report.main([*flags, "--scores", *write_found(folder, models), "--no_run"])
    return folder / "out", flags


def content_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def without_dates(folder: Path) -> dict[str, bytes]:
    """Read what a report is made of, dates taken out."""
    files = {
        name: (folder / name).read_bytes() for name in ("report.md", "report.json", "report.png")
    }
    return {name: re.sub(rb"\d{4}-\d\d-\d\d", b"DATE", data) for name, data in files.items()}


# --------------------------------------------------------------------------------------------------
# Quality
# --------------------------------------------------------------------------------------------------

COLUMNS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
# The 2019 README: (macro score as printed, without WNLI as printed, columns). First its revision of
# December 2019, then the one of January 2020 and after, whose figures were corrected.
PUBLISHED = {
    "BERT-base, 2019": (77.6, None, (48.9, 84.3, 88.6, 89.3, 89.5, 71.3, 91.7, 91.2, 43.7)),
    "DistilBERT, 2019": (76.8, None, (49.1, 81.8, 90.2, 90.2, 89.2, 62.9, 92.7, 90.7, 44.4)),
    "RoBERTa-base, 2019": (83.2, 86.4, (63.6, 87.6, 90.2, 92.8, 91.9, 78.7, 94.8, 91.2, 57.7)),
    "DistilRoBERTa, 2019": (79.0, 82.3, (59.4, 83.9, 86.6, 90.8, 89.4, 67.9, 92.5, 88.3, 52.1)),
    "BERT-base-uncased": (79.5, None, (56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5)),
    "DistilBERT-base-uncased": (77.0, None, (51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3)),
    "BERT-base-cased": (78.2, None, (58.2, 83.9, 87.8, 91.0, 89.2, 66.1, 91.7, 89.2, 46.5)),
    "DistilBERT-base-cased": (75.9, None, (47.2, 81.5, 85.6, 88.2, 87.8, 60.6, 90.4, 85.5, 56.3)),
    "RoBERTa-base (reported)": (83.2, 86.4, (63.6, 87.6, 90.2, 92.8, 91.9, 78.7, 94.8, 91.2, 57.7)),
    "DistilRoBERTa": (79.0, 82.3, (59.3, 84.0, 86.6, 90.8, 89.4, 67.9, 92.5, 88.3, 52.1)),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_macro_scores_follow_from_their_columns(row):
    macro, without_wnli, columns = PUBLISHED[row]
    found = comparison.macro_score(dict(zip(COLUMNS, columns, strict=True)))
    # 0.1: the printed columns are rounded to 0.05, and so is their mean.
    assert abs(found["macro"] - macro) <= 0.1
    assert without_wnli is None or abs(found["macro_without_wnli"] - without_wnli) <= 0.1


def test_a_macro_score_is_of_all_tasks_or_none():
    scores = dict.fromkeys(COLUMNS, 50.0) | {"cola": 59.0}
    assert comparison.macro_score(scores) == {
        "macro": 51.0,
        "macro_without_wnli": pytest.approx(51.125),
    }
    without_wnli = {task: score for task, score in scores.items() if task != "wnli"}
    assert comparison.macro_score(without_wnli) == {
        "macro": None,
        "macro_without_wnli": pytest.approx(51.125),
    }
    del scores["rte"]
    assert comparison.macro_score(scores) == {"macro": None, "macro_without_wnli": None}


def test_the_table_has_a_row_of_macro_scores(tmp_path, teachers, student):
    models, paths = {"teacher": (teachers["bert"], 80.0), "student": (student, 76.0)}, []
    for role, (model, value) in models.items():
        for task in COLUMNS:
            paths.append(str(tmp_path / f"{role}-{task}.json"))
            write_scores(
                paths[-1],
                task=task,
                model=str(model),
                runs=[{"metrics": {"score": value}}],
                flags={},
            )
    out = tmp_path / "out"
    report.main(
        [
            "--teacher",
            str(teachers["bert"]),
            "--student",
            str(student),
            "--output_dir",
            str(out),
            "--no_run",
            "--scores",
            *paths,
        ]
    )
    rows = [
        line for line in (out / "report.md").read_text().splitlines() if line.startswith("| GLUE")
    ]
    assert [re.findall(r"[\d.]+", row) for row in rows] == [["80.0", "76.0", "95.0"]] * 2


def test_the_tables_values_are_those_done_by_hand(made):
    quality = content_of(made[0])["quality"]
    assert list(quality) == [task for task in TASKS if task in FOUND]
    mrpc = quality["mrpc"]["models"]
    assert [mrpc[role]["score"] for role in ("teacher", "student", "baseline")] == pytest.approx(
        [88.0, 86.0, 75.0]
    )
    assert (mrpc["student"]["least"], mrpc["student"]["largest"]) == pytest.approx((85.5, 86.4))
    assert quality["mrpc"]["retention"] == pytest.approx(
        {"student": 100 * 86 / 88, "baseline": 100 * 75 / 88}
    )
    assert quality["sst2"]["retention"] == pytest.approx({"student": 100 * 90 / 92.5})
    assert quality["mnli"]["models"]["student"]["score"] == 82.1
    assert quality["squad"]["retention"] == pytest.approx(
        {"student": 100 * 86.9 / 88.5}
    )  # F1, not exact match
    text = (made[0] / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| MRPC"))
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [
        "88.00 (87.9-88.3)",
        "86.00 (85.5-86.4)",
        "75.00 (74.0-76.0)",
        "97.7 %",
        "85.2 %",
    ]
    assert re.search(r"\| SST-2 .* not run ", text) and "not run" in text


def test_a_lower_perplexity_keeps_more_and_is_labelled(made):
    entry = content_of(made[0])["quality"]["wikitext"]
    assert entry["lower_is_better"] and entry["retention"]["student"] == pytest.approx(
        100 * 16.3 / 21.1
    )
    text = (made[0] / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| WikiText +\| perplexity a token ↓ +\| 16\.30¹ ", text)
    assert "↓ lower is better: % of teacher is 100 x teacher's / model's" in text
    assert comparison.retention(32.0, 16.0, True) == 50.0


def test_a_teacher_at_zero_or_below_has_nothing_to_keep(made):
    cola = content_of(made[0])["quality"]["cola"]
    assert cola["models"]["teacher"]["score"] == 0.0 and cola["retention"]["student"] is None
    assert re.search(r"\| CoLA .*\| - +\|", (made[0] / "report.md").read_text(encoding="utf-8"))
    assert comparison.retention(10.0, -1.0, False) is None


def test_a_difference_below_the_seeds_spread_is_marked(made):
    quality = content_of(made[0])["quality"]
    assert quality["sst2"]["within_spread"] == {
        "student": True
    }  # 92.5 - 90.0 = 2.5, the teacher's spread is 4
    assert quality["mrpc"]["within_spread"] == {"student": False, "baseline": False}
    assert quality["mnli"]["within_spread"] == {"student": None}  # one seed: unknown
    text = (made[0] / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| SST-2 .*97\.3 % ≈", text) and "¹ one seed" in text


def test_masked_and_causal_perplexities_are_not_compared(tmp_path, teachers):
    paths = []
    for kind, task in (("bert", "masked lm"), ("gpt2", "causal lm")):
        paths.append(str(tmp_path / f"{kind}.json"))
        write_scores(
            paths[-1],
            task=task,
            model=str(teachers[kind]),
            runs=[{"metrics": {"perplexity": 9.0}}],
            flags={},
        )
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(teachers["gpt2"]),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    report.main([*flags, "--scores", *paths, "--no_run"])
    found = content_of(tmp_path / "out")
    assert found["quality"]["lm"]["retention"] == {"student": None}
    assert any("no causal one's" in note for note in found["notes"])


def test_scores_on_different_examples_are_noted(tmp_path, teachers, student, made):
    counts = {"sst2": (872, 872), "rte": (277, 270), "xnli": (6, 6)}
    groups = {"xnli": ({"de": 60.0}, {"de": 60.0, "fr": 60.0})}
    paths = []
    for task, numbers in counts.items():
        for model, size, more in zip(
            (teachers["bert"], student), numbers, groups.get(task, ({}, {})), strict=True
        ):
            paths.append(str(tmp_path / f"{task}-{model.name}.json"))
            runs = [
                {
                    "metrics": {"score": 60.0, **more},
                    "num_examples": {"train": size % 7, "dev": size},
                }
            ]
            write_scores(paths[-1], task=task, model=str(model), runs=runs, flags={})
    report.main(
        [
            "--teacher",
            str(teachers["bert"]),
            "--student",
            str(student),
            "--output_dir",
            str(tmp_path / "out"),
            "--scores",
            *paths,
            "--no_run",
        ]
    )
    found = [note for note in content_of(tmp_path / "out")["notes"] if "different examples" in note]
    assert [note.split(":")[0] for note in found] == ["RTE", "XNLI"]
    assert not any("different examples" in note for note in content_of(made[0])["notes"])


def test_a_table_is_made_again_without_a_run_byte_for_byte(made):
    folder, flags = made
    before = without_dates(folder)
    report.main([*flags, "--no_run"])
    assert without_dates(folder) == before
    assert before["report.png"].startswith(b"\x89PNG\r\n\x1a\n")


def test_what_is_kept_is_not_measured_again_unless_asked(made, tmp_path):
    folder, flags = shutil.copytree(made[0], tmp_path / "out"), list(made[1])
    flags[flags.index("--output_dir") + 1] = str(folder)
    measured = (folder / "measurements.json").read_bytes()
    report.main([*flags, "--tasks", "mrpc"])  # scored for all three models: nothing to run
    assert (folder / "measurements.json").read_bytes() == measured
    report.main([*flags, "--tasks", "mrpc", "--num_sentences", "3"])  # another plan
    assert (folder / "measurements.json").read_bytes() != measured


def test_a_report_without_scores_says_not_run(tmp_path, teachers, student):
    out = tmp_path / "out"
    report.main(
        [
            "--teacher",
            str(teachers["bert"]),
            "--student",
            str(student),
            "--output_dir",
            str(out),
            "--no_run",
            "--tasks",
            "sst2",
        ]
    )
    text = (out / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| SST-2 +\| accuracy +\| not run +\| not run +\| - ", text)
    assert "Sizes: not measured." in text and "Latency: not measured." in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "measurements.json").exists()


def test_a_picture_of_every_task_and_of_three_models_is_drawn(tmp_path):
    models = {role: {"name": role * 8, "path": role} for role in report.ROLES}
    quality = {
        t: {
            "title": r.title,
            "lower_is_better": r.lower_is_better,
            "models": {},
            "retention": {"student": 97.0, "baseline": -3.0},
        }
        for t, r in TASKS.items()
    }
    glue = {"retention": {"student": {"macro": 96.9}, "baseline": {"macro": None}}}
    report_plot.draw(
        {"models": models, "quality": quality, "glue": glue, "sizes": {}, "speed": None},
        tmp_path / "x.png",
    )
    height = int.from_bytes((tmp_path / "x.png").read_bytes()[20:24], "big")
    assert height > 110 * 0.3 * len(TASKS)  # it grows with its rows


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_missing_is_run_and_kept(tmp_path, teachers, student, capfd):
    text, out = tmp_path / "held out.txt", tmp_path / "out"
    text.write_text("\n".join(make_lines(6, seed=5)) + "\n", encoding="utf-8")
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(student),
        "--output_dir",
        str(out),
        "--no_speed",
    ]
    of_teacher = [
        "--model",
        str(teachers["bert"]),
        "--text_file",
        str(text),
        "--output",
        str(tmp_path / "teacher.json"),
    ]
    evaluate_lm.main([*of_teacher, "--device", "cpu"])
    report.main(
        [
            *flags,
            "--tasks",
            "lm",
            "--lm_text_file",
            str(text),
            "--scores",
            str(tmp_path / "teacher.json"),
        ]
    )
    assert capfd.readouterr().out.count("$ python scripts/evaluate_lm.py --model") == 1, (
        "the student's alone"
    )
    kept = {
        name: json.loads((out / "scores" / name / "lm" / "scores.json").read_text())
        for name in (teachers["bert"].name, student.name)
    }
    quality = content_of(out)["quality"]["lm"]
    of_teacher, of_student = (content["score"]["perplexity"] for content in kept.values())
    assert quality["retention"]["student"] == pytest.approx(100 * of_teacher / of_student)
    assert "kl" in kept[student.name]["score"]  # it was scored against the teacher
    report.main([*flags, "--tasks", "lm", "--lm_text_file", str(text)])
    assert "$ python" not in capfd.readouterr().out


@pytest.mark.slow
def test_a_program_that_fails_stops_the_report_with_its_line(
    tmp_path, teachers, student, status_and_errors
):
    (tmp_path / "data" / "SST-2").mkdir(parents=True)
    status, lines = status_and_errors(
        report.main,
        [
            "--teacher",
            str(teachers["bert"]),
            "--student",
            str(student),
            "--output_dir",
            str(tmp_path / "out"),
            "--tasks",
            "sst2",
            "--data_dir",
            str(tmp_path / "data"),
            "--no_speed",
        ],
    )
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(
        f"sst2 of tiny-bert: run_task.py: --data_dir {tmp_path / 'data' / 'SST-2'}: has no"
    ), lines
    assert not (tmp_path / "out" / "report.md").exists()


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


def test_sizes_are_those_counted_on_the_loaded_models(made, teachers, student):
    sizes = content_of(made[0])["sizes"]
    for role, folder in (("teacher", teachers["bert"]), ("student", student)):
        whole = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        tied = {tensor.data_ptr(): tensor.numel() for tensor in whole.state_dict().values()}
        buffers = sum(
            buffer.numel() for name, buffer in whole.named_buffers() if name in whole.state_dict()
        )
        assert sizes[role]["parameters"] == sum(tied.values()) - buffers
        assert sizes[role]["weights_bytes"] == (folder / "model.safetensors").stat().st_size
        assert (
            sizes[role]["float32_bytes"]
            == 4 * sizes[role]["parameters"]
            == 2 * sizes[role]["float16_bytes"]
        )
        assert sizes[role]["weights_dtypes"] == ["F32"]
    base = transformers.AutoModel.from_pretrained(student)
    assert sizes["student"]["parameters_base"] == sum(p.numel() for p in base.parameters())


def test_the_papers_parameter_counts_come_out():
    bert, distilbert = (transformers.AutoConfig.for_model(kind) for kind in ("bert", "distilbert"))
    bert.architectures, distilbert.architectures = ["BertForMaskedLM"], ["DistilBertForMaskedLM"]
    found = [sizes.count_parameters(config)[:2] for config in (bert, distilbert)]
    millions = [tuple(round(number / 1e6, 2) for number in row) for row in found]
    assert millions == [(109.48, 109.51), (66.36, 66.99)]


def test_a_model_whose_folder_names_no_class_has_no_head():
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8
    )
    base, whole, kind = sizes.count_parameters(config)
    assert base == whole and kind == "AutoModel"


def test_weights_in_parts_and_in_half_precision_are_added_up(tmp_path, teachers):
    folder = Path(shutil.copytree(teachers["bert"], tmp_path / "parts"))
    (folder / "model.safetensors").unlink()
    model = transformers.AutoModelForMaskedLM.from_pretrained(teachers["bert"]).half()
    model.save_pretrained(folder, max_shard_size="30KB")
    shards = list(folder.glob("model-*.safetensors"))
    size = sizes.measure_size("teacher", str(folder))
    assert len(shards) > 1 and size["weights_bytes"] == sum(path.stat().st_size for path in shards)
    assert size["weights_dtypes"] == ["F16"]


# --------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------


def test_batches_are_full_and_padded_as_said():
    padded = latency.make_batches([[5, 6], [7, 8, 9], [4]], 2, 5, 4, 0)
    assert [batch["input_ids"].tolist() for batch in padded] == [
        [[5, 6, 0, 0], [7, 8, 9, 0]],
        [[4, 0, 0, 0], [5, 6, 0, 0]],
        [[7, 8, 9, 0], [4, 0, 0, 0]],
    ]
    assert padded[0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    own = latency.make_batches([[5, 6], [7, 8, 9], [4]], 1, 3, None, 0)
    assert [batch["input_ids"].shape[1] for batch in own] == [2, 3, 1]
    (batch,) = latency.make_batches([[5]], 32, 1, None, 0)  # none is smaller than it is called
    assert len(batch["input_ids"]) == 32


def test_figures_are_of_whole_passes(made):
    speed = content_of(made[0])["speed"]
    assert [
        (row["batch_size"], row["padding"]) for row in speed["rows"] if row["device"] == "cpu"
    ] == [
        (1, "padded to 64"),
        (1, "own lengths"),
        (4, "padded to 64"),
        (4, "padded to the longest"),
    ]
    for row in speed["rows"]:
        assert list(row["models"]) == list(report.ROLES)
        for figures in row["models"].values():
            for figure in figures.values():
                assert 0 < figure["least"] <= figure["median"] <= figure["largest"]
            product = figures["latency_ms"]["median"] * figures["sentences_s"]["median"]
            assert product == pytest.approx(
                1000 * row["batch_size"]
            )  # 3 passes: the medians are of one
        assert row["models"]["teacher"]["speed_up"]["median"] == 1.0
    assert {"cpu", "cores", "threads", "torch", "transformers"} <= set(speed["machine"]) and speed[
        "threads"
    ] == 1


def test_seconds_become_latency_throughput_and_ratio():
    found = latency.summarize(
        {"teacher": [4.0, 2.0, 3.0], "student": [2.0, 2.0, 1.0]}, num_batches=10, batch_size=32
    )
    assert found["teacher"]["latency_ms"] == {"median": 300.0, "least": 200.0, "largest": 400.0}
    assert found["student"]["sentences_s"] == {"median": 160.0, "least": 160.0, "largest": 320.0}
    assert found["student"]["speed_up"] == {"median": 2.0, "least": 1.0, "largest": 3.0}


def test_a_model_of_two_layers_is_told_from_one_of_twelve(tmp_path):
    for layers in (12, 2):
        make_model("bert", 200, layers).save_pretrained(tmp_path / f"{layers}")
    names = {"deep": str(tmp_path / "12"), "flat": str(tmp_path / "2")}
    plan, threads = Plan((1,), passes=3, num_sentences=8), torch.get_num_threads()
    for _ in range(3):  # other work on the machine may disturb one
        rows = latency.measure(names, plan)["rows"]
        if all(row["models"]["flat"]["speed_up"]["median"] > 1.5 for row in rows):
            break
    else:
        pytest.fail(f"{rows}")
    assert torch.get_num_threads() == threads


def test_a_text_is_read_by_each_models_own_tokenizer(tmp_path, teachers):
    (tmp_path / "text").write_text("\n\n".join(make_lines(3)) + "\n", encoding="utf-8")
    names = {"a": str(teachers["bert"]), "b": str(teachers["gpt2"])}
    sentences = latency.read_sentences(str(tmp_path / "text"))
    config = transformers.AutoConfig.from_pretrained(names["a"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(names["a"])
    whole = [tokenizer.encode(sentence) for sentence in sentences]
    cut = latency.sequences_of(names["a"], config, sentences, 20)
    assert len(cut) == 3 and max(map(len, whole)) > 20
    assert cut == [ids if len(ids) <= 20 else [*ids[:19], tokenizer.sep_token_id] for ids in whole]
    inputs = latency.measure(names, Plan((1,), 3, num_sentences=3), sentences)["inputs"]
    assert re.fullmatch(
        r"3 sentences of a text, on average \d+ tokens for a, \d+ tokens for b", inputs
    )


def test_other_vocabularies_are_noted_and_latency_is_measured(tmp_path, teachers, capsys):
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(teachers["roberta"]),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    report.main([*flags, *QUICK])
    found = content_of(tmp_path / "out")
    assert any("different vocabularies" in note for note in found["notes"])
    assert found["speed"]["rows"][0]["models"]["student"]["latency_ms"]["median"] > 0
    capsys.readouterr()


def test_latency_runs_alone(tmp_path, teachers, capsys):
    flags = [
        "--models",
        str(teachers["bert"]),
        str(teachers["gpt2"]),
        "--json",
        str(tmp_path / "x.json"),
        *QUICK,
    ]
    latency_program.main(flags)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert capsys.readouterr().out.count("| tiny-gpt2") == len(rows) >= 4


# --------------------------------------------------------------------------------------------------
# The model card
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_card(tmp_path, teachers, own_student):
    """The flags that write a card for the test's own student, with scores."""
    models = {"teacher": teachers["bert"], "student": own_student}
    return [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(own_student),
        "--output_dir",
        str(tmp_path / "out"),
        "--no_run",
        "--write_card",
        "--scores",
        *write_found(tmp_path, models),
    ]


def test_the_cards_metadata_holds_the_figures(with_card, own_student):
    report.main(
        [
            *with_card,
            "--license",
            "apache-2.0",
            "--language",
            "en",
            "--base_model",
            "me/tiny-bert",
            "--datasets",
            "c4",
        ]
    )
    text = (own_student / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["license"], data["language"], data["base_model"], data["datasets"]) == (
        "apache-2.0",
        "en",
        "me/tiny-bert",
        ["c4"],
    )
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "fill-mask"
    assert data["tags"] == ["distillation", "distil"]
    assert data["metrics"] == [
        "accuracy",
        "exact_match",
        "f1",
        "matthews_correlation",
        "perplexity",
    ]
    card = huggingface_hub.ModelCard(text)
    found = {
        (r.dataset_name, r.metric_name): (r.metric_type, r.metric_value)
        for r in card.data.eval_results
    }
    assert card.data.model_name == own_student.name
    assert found == {  # rates from 0 to 1 but SQuAD's, as the hub's metrics give them
        ("GLUE MRPC", "accuracy"): ("accuracy", 0.84),
        ("GLUE MRPC", "f1"): ("f1", 0.88),
        ("GLUE SST-2", "accuracy"): ("accuracy", 0.9),
        ("GLUE MNLI", "matched"): ("accuracy", 0.82),
        ("GLUE MNLI", "mismatched"): ("accuracy", 0.822),
        ("GLUE CoLA", "matthews"): ("matthews_correlation", 0.06),
        ("WikiText, raw", "token perplexity"): ("perplexity", 21.1),
        ("WikiText, raw", "word perplexity"): ("perplexity", 35.0),
        ("SQuAD v1.1", "exact"): ("exact_match", 79.1),
        ("SQuAD v1.1", "f1"): ("f1", 86.9),
    }
    assert {json.dumps(r.dataset_args) for r in card.data.eval_results} == {
        '{"num_examples": {"dev": 408}}'
    }


def test_the_card_leaves_out_what_is_not_stated(with_card, own_student):
    report.main(with_card)
    text = (own_student / "README.md").read_text(encoding="utf-8")
    data = yaml.safe_load(text.split("---\n")[1])
    assert not {"license", "language", "base_model", "datasets"} & set(data)
    assert "No license is stated" in text and "language of its training text is not stated" in text


def test_the_card_tells_teacher_data_flags_and_commit(with_card, own_student):
    report.main(with_card)
    text = (own_student / "README.md").read_text(encoding="utf-8")
    assert (
        "A model distilled from `tiny-bert`" in text
        and "`data.pickle`" in text
        and "/somewhere" not in text
    )
    assert (
        "* 5 x KL divergence" in text
        and "* 2 x masked" in text
        and "causal-language-model loss" not in text
    )
    assert (
        "commit `0123abc`" in text
        and "| `note` | a\\|b |" in text
        and "| `temperature` | 2.0 |" in text
    )
    assert "Made with Distil 9.8.7, PyTorch 2.99.0, commit" in text and "`force`" not in text
    assert "| `mlm_smoothing` | 0.0 |" in text and "`n_epoch`" not in text
    assert "## Intended use\n\nTo be fine-tuned" in text and "@article{sanh2019" in text
    assert "97.3 % ≈" in text and "Measured on" in text


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_the_cards_code_runs(kind, tmp_path, teachers, own_student, monkeypatch, capsys):
    folder = (
        own_student
        if kind == "distilbert"
        else Path(shutil.copytree(teachers["gpt2"], tmp_path / "copy"))
    )
    flags = [
        "--teacher",
        str(teachers["roberta"]),
        "--student",
        str(folder),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    report.main([*flags, "--no_run", "--write_card"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert (
        ("AutoModelForMaskedLM" in code)
        == (kind == "distilbert")
        != ("AutoModelForCausalLM" in code)
    )
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_changed_card_is_kept_without_force(with_card, own_student, status_and_errors):
    readme = own_student / "README.md"
    readme.write_text("mine")
    status, lines = status_and_errors(report.main, with_card)
    assert status == 2 and lines == [
        f"--write_card {readme}: was not written by report.py, or was changed since; move it, or"
        " replace it with --force"
    ]
    assert readme.read_text() == "mine"
    report.main([*with_card, "--force"])
    report.main(with_card)  # an unchanged one is replaced
    readme.write_text(
        readme.read_text(encoding="utf-8").replace("## Limits", "## Known limits"), encoding="utf-8"
    )
    assert status_and_errors(report.main, with_card)[0] == 2  # changed by hand since


def test_a_card_counts_as_written_by_the_report_only_unchanged(tmp_path):
    assert not model_card.is_own(write(tmp_path / "a", b"\xff\xfe"))
    assert not model_card.is_own(
        write(tmp_path / "b", b"<!-- Written by Distil, scripts/report.py.")
    )


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BAD_FLAGS = {
    "no such student": (
        ["--student", "nowhere"],
        r"--student nowhere: no such folder; expected the folder",
    ),
    "no model in it": (
        ["--student", "{empty}"],
        r"--student .*empty: holds no readable config.json of a model",
    ),
    "teacher is student": (
        ["--student", "{teacher}"],
        r"--student .*: is the teacher, too; expected another model",
    ),
    "baseline is student": (
        ["--baseline", "{student}/"],
        r"--baseline .*: is the student, too; expected another model",
    ),
    "a model of two stacks": (
        ["--baseline", "{t5}"],
        r"--baseline .*t5: is a t5 model; expected an encoder or a causal model",
    ),
    "two of a name": (
        ["--baseline", "{twin}"],
        r"--baseline .*: has the student's name, tiny-distilbert, .*; rename one",
    ),
    "unknown task": (["--tasks", "mprc"], r"--tasks mprc: unknown; did you mean mrpc\?"),
    "no data": (
        ["--tasks", "sst2"],
        r"--data_dir: needed for sst2, which is not scored for each model yet; or --no_run",
    ),
    "no folder of the task": (
        ["--tasks", "sst2", "--data_dir", "{empty}"],
        r"has no folder sst2 or SST-2; put the task's files there",
    ),
    "no file for lm": (
        ["--tasks", "lm"],
        r"--lm_data_file, --lm_text_file: the task lm needs one of them",
    ),
    "no text for lm": (
        ["--tasks", "lm", "--lm_text_file", "no"],
        r"--lm_text_file no: no such file; check the path",
    ),
    "no tokens for lm": (
        ["--tasks", "lm", "--lm_data_file", "no"],
        r"--lm_data_file no: no such file",
    ),
    "no squad": (["--tasks", "squad", "--data_dir", "{squad}"], r"train-v1.1.json: no such file"),
    "bad seed": (["--seeds", "-1"], r"--seeds -1: expected 0 to 4294967295"),
    "open quotation": (
        ["--task_flags", "'a"],
        r"--task_flags 'a: No closing quotation; close the quotation",
    ),
    "few passes": (["--passes", "2"], r"--passes 2: expected 3 to 10000"),
    "no threads": (["--threads", "0"], r"--threads 0: expected 1 to 1024"),
    "no batch": (["--batch_sizes", "0"], r"--batch_sizes 0: expected 1 to 4096"),
    "no text": (["--data", "no"], r"--data no: no such file; check the path"),
    "inside the student": (
        ["--output_dir", "{student}/report"],
        r"--output_dir .*: would overwrite the input .*",
    ),
    "something foreign": (
        ["--output_dir", "{foreign}"],
        r"--output_dir .*: holds thesis.tex, which is no part of a report",
    ),
    "a foreign report": (
        ["--output_dir", "{report}"],
        r"its report.json is no report of ours; choose another folder",
    ),
    "a bad license": (
        ["--write_card", "--license", "my own!"],
        r"--license my own!: is no such name on the hub; expected",
    ),
    "a bad language": (
        ["--write_card", "--language", "English"],
        r"--language English: is no such name on the hub",
    ),
    "a misspelt flag": (["--taks", "sst2"], r"unknown argument --taks; did you mean --tasks\?"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_end_in_one_line(
    case, tmp_path, teachers, own_student, status_and_errors, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags, pattern = BAD_FLAGS[case]
    for name in ("empty", "foreign", "report", "squad/squad"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / "foreign" / "thesis.tex", "x")
    write(tmp_path / "report" / "report.json", "[]")
    places = {
        "teacher": teachers["bert"],
        "student": own_student,
        "twin": tmp_path / "twin" / own_student.name,
    }
    shutil.copytree(own_student, places["twin"])
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    places |= {name: tmp_path / name for name in ("empty", "foreign", "report", "squad", "t5")}
    good = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(own_student),
        "--output_dir",
        "out",
    ]
    status, lines = status_and_errors(
        report.main, [*good, *(flag.format(**places) for flag in flags)]
    )
    assert status == 2 and len(lines) <= 2 and re.search(pattern, lines[0]), lines
    assert not (tmp_path / "out").exists() and not (own_student / "README.md").exists()


def test_all_bad_flags_are_listed_together(tmp_path, teachers, status_and_errors):
    status, lines = status_and_errors(
        report.main,
        [
            "--teacher",
            str(teachers["bert"]),
            "--student",
            "nowhere",
            "--output_dir",
            str(tmp_path / "out"),
            "--tasks",
            "mprc",
            "nli",
            "--passes",
            "1",
        ],
    )
    assert status == 2 and len(lines) == 4


BAD_SCORES = {
    "no JSON": ("{", r"is no readable JSON \(.*\); make it again"),
    "no object": ("[1]", r"has no task; expected a scores.json as run_task.py writes it"),
    "no score": ('{"task": "sst2", "model_name": "tiny-bert"}', r"has no score"),
    "unknown task": (
        '{"task": "sst3", "model_name": "tiny-bert", "score": {}, "runs": []}',
        r"is of a task 'sst3'; expected",
    ),
    "no runs": (
        '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": 1}, "runs": []}',
        r"holds no metrics",
    ),
    "no numbers": (
        (
            '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": "1"}, "runs":'
            ' [{"metrics": {"score": 1}}]}'
        ),
        r"holds no metrics, or some that are no finite numbers",
    ),
    "infinite": (
        (
            '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": Infinity}, "runs":'
            ' [{"metrics": {"a": 1}}]}'
        ),
        r"no finite number",
    ),
    "no rate": (
        '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": 250}, "runs":'
        ' [{"metrics": {"score": 250}}]}',
        r"its score is 250, expected at most 100",
    ),
    "not of its runs": (
        '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": 80}, "runs":'
        ' [{"metrics": {"score": 20}}]}',
        r"its score is 80, its runs found 20 to 20",
    ),
    "examples": (
        '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": 1}, "runs":'
        ' [{"metrics": {"score": 1}, "num_examples": [3]}]}',
        r"runs.0.num_examples is a list, expected an object or null",
    ),
    "a teacher": (
        '{"task": "sst2", "model_name": "tiny-bert", "score": {"score": 1}, "teacher": {},'
        ' "runs": [{"metrics": {"score": 1}}]}',
        r"teacher is an object, expected a text or null",
    ),
    "another metric": (
        (
            '{"task": "sst2", "model_name": "tiny-bert", "score": {"bleu": 1}, "runs": [{"metrics":'
            ' {"bleu": 1}}]}'
        ),
        r"has bleu; expected score for sst2",
    ),
    "another model": (
        (
            '{"task": "sst2", "model_name": "elmo", "score": {"score": 1}, "runs": [{"metrics":'
            ' {"score": 1}}]}'
        ),
        r"is of elmo; expected one of tiny-bert, tiny-distilbert; leave it out",
    ),
    "another task": (
        (
            '{"task": "rte", "model_name": "tiny-bert", "score": {"score": 1}, "runs": [{"metrics":'
            ' {"score": 1}}]}'
        ),
        r"is of rte, which --tasks leaves out",
    ),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores_end_in_one_line_that_names_the_file(
    case, tmp_path, teachers, student, status_and_errors
):
    content, pattern = BAD_SCORES[case]
    path = write(tmp_path / "given.json", content)
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(student),
        "--output_dir",
        str(tmp_path / "out"),
        "--no_run",
    ]
    status, lines = status_and_errors(
        report.main, [*flags, "--tasks", "sst2", "--scores", str(path)]
    )
    assert (
        status == 2
        and len(lines) == 1
        and "given.json" in lines[0]
        and re.search(pattern, lines[0])
    ), lines
    assert not (tmp_path / "out").exists()


def test_scores_in_a_wrong_place_or_twice_are_refused(
    tmp_path, teachers, student, status_and_errors
):
    models, out = {"teacher": teachers["bert"]}, tmp_path / "out"
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(student),
        "--output_dir",
        str(out),
        "--no_run",
    ]
    (given,) = write_found(tmp_path, models, ["sst2"])
    status, lines = status_and_errors(report.main, [*flags, "--scores", given, given])
    assert status == 2 and "a second file of tiny-bert and sst2; leave one out" in lines[0]
    misplaced = out / "scores" / "tiny-bert" / "rte" / "scores.json"
    misplaced.parent.mkdir(parents=True)
    shutil.copy(given, misplaced)
    status, lines = status_and_errors(report.main, flags)
    assert status == 2 and "expected tiny-bert and rte; move it to its folder" in lines[0]
    misplaced.rename(out / "scores" / "tiny-bert" / "scores.json")
    report.main([*flags, "--scores", given])
    content = json.loads(Path(given).read_text())
    files.write_json(given, content | {"score": {"score": 92.0}})
    status, lines = status_and_errors(report.main, [*flags, "--scores", given])
    assert status == 2 and "holds another score; take one of the two away" in lines[0]


def test_the_folder_of_another_pair_is_refused(made, teachers, student, status_and_errors):
    flags = [
        "--teacher",
        str(teachers["roberta"]),
        "--student",
        str(student),
        "--output_dir",
        str(made[0]),
    ]
    status, lines = status_and_errors(report.main, [*flags, "--no_run"])
    assert (
        status == 2
        and "holds the report of teacher tiny-bert and student tiny-distilbert" in lines[0]
    )


def test_a_student_without_weights_ends_in_one_line(
    tmp_path, teachers, own_student, status_and_errors
):
    (own_student / "model.safetensors").unlink()
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(own_student),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    status, lines = status_and_errors(report.main, flags)
    assert status == 2 and re.search(
        r"--student .*: has neither model.safetensors nor pytorch_model.bin", lines[0]
    )


def test_damaged_measurements_end_in_one_line(made, tmp_path, status_and_errors):
    folder, flags = shutil.copytree(made[0], tmp_path / "out"), list(made[1])
    flags[flags.index("--output_dir") + 1] = str(folder)
    write(folder / "measurements.json", "{}")
    status, lines = status_and_errors(report.main, [*flags, "--no_run"])
    assert status == 2 and "measurements.json: is no readable file of ours" in lines[0]


BAD_LATENCY = {
    "no UTF-8": (b"\xff\n", r"--data .*: is no UTF-8 text \(.*\); convert it"),
    "blank lines": (b" \n\n", r"--data .*: holds blank lines only; expected a sentence a line"),
    "empty": (b"", r"--data .*: the file is empty"),
}


@pytest.mark.parametrize("case", BAD_LATENCY)
def test_bad_text_for_timing_ends_in_one_line(case, tmp_path, teachers, status_and_errors):
    content, pattern = BAD_LATENCY[case]
    path = write(tmp_path / "text", content)
    status, lines = status_and_errors(
        latency_program.main, ["--models", str(teachers["bert"]), "--data", str(path)]
    )
    assert status == 2 and len(lines) == 1 and re.search(pattern, lines[0]), lines


def test_damaged_weights_and_foreign_tokenizers_end_in_one_line(
    tmp_path, teachers, status_and_errors
):
    folder = shutil.copytree(teachers["bert"], tmp_path / "bert")
    write(tmp_path / "text", "bake limo\n")
    transformers.AutoTokenizer.from_pretrained(teachers["gpt2"]).save_pretrained(tmp_path / "gpt2")
    model = make_model("gpt2", 20)  # its tokenizer has more
    model.save_pretrained(tmp_path / "gpt2")
    status, lines = status_and_errors(
        latency_program.main, ["--models", str(tmp_path / "gpt2"), "--data", str(tmp_path / "text")]
    )
    assert status == 2 and re.search(
        r"gpt2: its tokenizer gave the id \d+, it has 20 embeddings", lines[0]
    ), lines
    write(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:500])
    status, lines = status_and_errors(latency_program.main, ["--models", str(folder)])
    assert (
        status == 2 and len(lines) == 1 and "bert: its weights could not be loaded (" in lines[0]
    ), lines
    student = shutil.move(folder, tmp_path / "student")  # under another name than the teacher's
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student",
        str(student),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    status, lines = status_and_errors(report.main, flags)
    assert (
        status == 2
        and len(lines) == 1
        and re.search(r"--student .*: its weights could not be read \(", lines[0])
    ), lines


def test_models_that_cannot_be_timed_end_in_a_line_each(tmp_path, teachers, status_and_errors):
    bert = str(teachers["bert"])
    flags = ["--models", bert, f"{bert}/", str(tmp_path), "--json", str(tmp_path)]
    status, lines = status_and_errors(latency_program.main, flags)
    assert status == 2 and len(lines) == 3
    assert (
        "two are named tiny-bert" in lines[0]
        and "holds no readable config.json" in lines[1]
        and "--json" in lines[2]
    )


def test_numbers_are_written_short():
    assert [tables.digits(value) for value in (1234.5, 99.95, 0.01234)] == [
        "1,234",
        "100",
        "0.0123",
    ]
    assert report_tables.percent(None) == "-" and report_tables.percent(96.94) == "96.9 %"
    assert report_tables.megas(66.362) == "66.36" and report_tables.megas(0.0438) == "0.0438"


MARKUP = "_a_ <script>x</script> ![b](c) `d` |e| $f$"


def test_markup_in_names_shows_as_it_is(tmp_path, teachers, own_student):
    """In a folder's name, a teacher's, a metric's, a flag's and its value: escaped, or in code."""
    student = own_student.rename(tmp_path / MARKUP.replace("/", ""))
    files.write_json(student / "parameters.json", {MARKUP: MARKUP, "data_file": MARKUP})
    files.write_json(student / "git_log.json", {"repo_sha": MARKUP})
    runs = [{"metrics": {"score": 80.0, MARKUP: 80.0}}]
    scores = write_found(tmp_path, {"teacher": teachers["bert"]}, ["sst2"])
    scores.append(str(tmp_path / "s.json"))
    write_scores(scores[-1], task="sst2", model=str(student), runs=runs, teacher=MARKUP, flags={})
    flags = ["--teacher", str(teachers["bert"]), "--student", str(student), "--no_run"]
    out = tmp_path / "out"
    report.main([*flags, "--output_dir", str(out), "--scores", *scores, "--write_card"])
    for page in (out / "report.md", student / "README.md"):
        text = page.read_text(encoding="utf-8")
        rest = re.sub(r"^---\n.*?^---\n|```.*?```|``.*?``|`[^`\n]*`", "", text, flags=re.S | re.M)
        assert "script" in rest and not re.search(r"(?<!\\)(<script|\]\(c|\|e)", rest), rest
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 5, 6}, rows


def test_a_name_is_written_plainly():
    written = {
        **{"tiny-bert": "tiny-bert", "my_model_2": "my_model_2", "a b": "a b", "[1, 2]": "[1, 2]"},
        **{
            **{"_x_": r"\_x\_", "a|b": r"a\|b", "<b>": r"\<b\>"},
            **{"[a](b)": r"[a\](b)", "&lt;": r"\&lt;"},
            "a|b": r"a\|b",
            "<b>": r"\<b\>",
            "[a](b)": r"[a\](b)",
            "&lt;": r"\&lt;",
        },
        **{"a\nb\x1b": "a b\ufffd", "\udcff": "\ufffd"},
    }
    assert {text: tables.plain(text) for text in written} == written
    assert tables.code("a`b|c") == r"``a`b\|c``" and tables.code("`a") == "`` `a ``"
