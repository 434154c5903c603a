"""TASKS: one row per task, for run_task.py, report.py and model_card.py.

The protocols are those behind the tables of Sanh et al., 2019 (section 4, Tables 1 to 3) and of its
folder's README: GLUE's TSV files as the 2019 processors read them, IMDb's folders, XNLI's TSV
files, the columns of CoNLL-2003 and GermEval 2014, WikiText's raw text. Points that the paper and
the folder leave open are marked "our choice". SQuAD and held-out text have their own programs
(run_squad_w_distillation.py, evaluate_lm.py): their rows have no reader.
"""

import statistics
from collections.abc import Callable, Mapping

from distil.tasks.metrics import accuracy, accuracy_and_f1, correlations, entities, matthews
from distil.tasks.readers import read_columns, read_folders, read_raw, read_tsv
from distil.tasks.schema import Columns, Hub, HubPart, Part, Settings, Task
from utils import InputError

GLUE = "nyu-mll/glue"
NLI_LABELS = ("contradiction", "entailment", "neutral")
TWO_CLASSES, ENTAILED_OR_NOT = ("0", "1"), ("entailment", "not_entailment")
README_LANGUAGES = ("en", "es", "zh", "de", "ar", "ur")
XNLI_LANGUAGES = tuple(
    sorted((*README_LANGUAGES, "bg", "el", "fr", "hi", "ru", "sw", "th", "tr", "vi"))
)


def _glue(
    name: str,
    title: str,
    columns: Columns,
    hub_texts: tuple[str, ...],
    *,
    metric_title: str = "accuracy",
    head: str = "classes",
    labels: tuple[str, ...] = TWO_CLASSES,
    metrics: Callable[..., dict[str, float]] = accuracy,
    score_metrics: tuple[str, ...] = ("accuracy",),
) -> Task:
    return Task(
        title,
        metric_title,
        head,
        Hub(
            GLUE,
            f"GLUE {title}",
            name,
            "validation",
            train=HubPart("train", name),
            scored={"dev": (HubPart("validation", name),)},
            texts=hub_texts,
        ),
        read_tsv,
        train=Part(("train.tsv",), columns),
        scored={"dev": (Part(("dev.tsv",), columns),)},
        labels=labels,
        metrics=metrics,
        score_metrics=score_metrics,
    )


def _mnli() -> Task:
    columns, groups = Columns((8, 9), -1), ("matched", "mismatched")
    return Task(
        "MNLI",
        "accuracy, mean of matched and mismatched",
        "classes",
        Hub(
            GLUE,
            "GLUE MNLI",
            "mnli",
            "validation",
            train=HubPart("train", "mnli"),
            scored={
                "dev": tuple(HubPart(f"validation_{group}", "mnli", group) for group in groups)
            },
            texts=("premise", "hypothesis"),
        ),
        read_tsv,
        train=Part(("train.tsv",), columns),
        scored={"dev": tuple(Part((f"dev_{group}.tsv",), columns, group) for group in groups)},
        labels=NLI_LABELS,
        metrics=accuracy,
    )


def _squad(version: str, hub_name: str, hub_config: str) -> Task:
    return Task(
        f"SQuAD v{version}",
        "F1",
        "spans",
        Hub(hub_name, f"SQuAD v{version}", hub_config, "validation"),
        train=Part((f"train-v{version}.json",)),
        scored={"dev": (Part((f"dev-v{version}.json",)),)},
        score_key="f1",
    )


def _xnli() -> Task:
    columns = Columns((6, 7), 1, group=0)
    return Task(
        "XNLI",
        "accuracy, mean over languages",
        "classes",
        Hub(
            "facebook/xnli",
            "XNLI, trained in English",
            "all_languages",
            "test",
            train=HubPart("train", "en"),
            scored={
                split: tuple(HubPart(on_hub, language, language) for language in XNLI_LANGUAGES)
                for split, on_hub in {"test": "test", "dev": "validation"}.items()
            },
            texts=("premise", "hypothesis"),
        ),
        read_tsv,
        train=Part(
            ("XNLI-MT-1.0/multinli/multinli.train.en.tsv", "multinli.train.en.tsv"),
            Columns((0, 1), 2),
        ),
        scored={
            split: (Part((f"XNLI-1.0/xnli.{split}.tsv", f"xnli.{split}.tsv"), columns),)
            for split in ("test", "dev")
        },
        labels=NLI_LABELS,
        aliases={"contradictory": "contradiction"},
        metrics=accuracy,
        main_groups=README_LANGUAGES,
        settings=Settings(learning_rate=5e-5, num_train_epochs=2),
    )


def _test_and_dev(config: str | None = None) -> dict[str, tuple[HubPart, ...]]:
    return {"test": (HubPart("test", config),), "dev": (HubPart("validation", config),)}


TASKS: dict[str, Task] = {
    "cola": _glue(
        "cola",
        "CoLA",
        Columns((3,), 1, has_header=False),
        ("sentence",),
        metric_title="Matthews correlation",
        metrics=matthews,
        score_metrics=("matthews",),
    ),
    "mnli": _mnli(),
    "mrpc": _glue(
        "mrpc",
        "MRPC",
        Columns((3, 4), 0),
        ("sentence1", "sentence2"),
        metric_title="(accuracy + F1) / 2",
        metrics=accuracy_and_f1,
        score_metrics=("accuracy", "f1"),
    ),
    "qnli": _glue(
        "qnli", "QNLI", Columns((1, 2), -1), ("question", "sentence"), labels=ENTAILED_OR_NOT
    ),
    "qqp": _glue(
        "qqp",
        "QQP",
        Columns((3, 4), 5, is_rough=True),
        ("question1", "question2"),
        metric_title="(accuracy + F1) / 2",
        metrics=accuracy_and_f1,
        score_metrics=("accuracy", "f1"),
    ),
    "rte": _glue(
        "rte", "RTE", Columns((1, 2), -1), ("sentence1", "sentence2"), labels=ENTAILED_OR_NOT
    ),
    "sst2": _glue("sst2", "SST-2", Columns((0,), 1), ("sentence",)),
    "stsb": _glue(
        "stsb",
        "STS-B",
        Columns((7, 8), -1),
        ("sentence1", "sentence2"),
        metric_title="(Pearson + Spearman) / 2",
        head="values",
        labels=(),
        metrics=correlations,
        score_metrics=("pearson", "spearman"),
    ),
    "wnli": _glue("wnli", "WNLI", Columns((1, 2), -1), ("sentence1", "sentence2")),
    "squad": _squad("1.1", "rajpurkar/squad", "plain_text"),
    "squad_v2": _squad("2.0", "rajpurkar/squad_v2", "squad_v2"),
    # Length, rate and epochs are our choice: the paper gives the accuracy only.
    "imdb": Task(
        "IMDb",
        "accuracy",
        "classes",
        Hub(
            "stanfordnlp/imdb",
            "IMDb",
            "plain_text",
            "test",
            train=HubPart("train"),
            scored={"test": (HubPart("test"),)},
            texts=("text",),
        ),
        read_folders,
        train=Part(("train", "aclImdb/train")),
        scored={"test": (Part(("test", "aclImdb/test")),)},
        labels=("neg", "pos"),
        metrics=accuracy,
        settings=Settings(max_seq_length=512),
    ),
    "xnli": _xnli(),
    "ner": Task(
        "NER",
        "F1 of entities",
        "tokens",
        Hub(
            None,
            "entities, local files",
            None,
            "test",
            train=HubPart("train"),
            scored=_test_and_dev(),
            texts=("tokens",),
            label="ner_tags",
        ),
        read_columns,
        train=Part(("train.txt", "train.tsv", "*train*")),
        scored={
            "test": (Part(("test.txt", "test.tsv", "*testb*", "*test*")),),
            "dev": (Part(("dev.txt", "dev.tsv", "*testa*", "*dev*", "*valid*")),),
        },
        metrics=entities,
        score_metrics=("f1",),
        settings=Settings(learning_rate=5e-5),
    ),
    "wikitext": Task(
        "WikiText",
        "perplexity a token",
        "next tokens",
        Hub(
            "Salesforce/wikitext",
            "WikiText, raw",
            None,
            "test",
            train=HubPart("train", "wikitext-103-raw-v1"),
            scored=_test_and_dev("wikitext-103-raw-v1"),
            texts=("text",),
        ),
        read_raw,
        train=Part(("wiki.train.raw", "train.txt")),
        scored={
            "test": (Part(("wiki.test.raw", "test.txt")),),
            "dev": (Part(("wiki.valid.raw", "dev.txt")),),
        },
        settings=Settings(1024, 5e-5, 1, 4, 2),
        lower_is_better=True,
    ),
    "lm": Task(
        "held-out text",
        "perplexity a token",
        "next tokens",
        Hub(None, "held-out text, local file", None, "test"),
        score_key="perplexity",
        lower_is_better=True,
    ),
}

GLUE_TASKS = tuple(name for name, task in TASKS.items() if task.hub.name == GLUE)


def glue_macro(columns: Mapping[str, float]) -> dict[str, float]:
    """Compute GLUE's macro scores, "macro" over nine tasks, "macro_without_wnli" over eight.

    WNLI's development set is 71 pairs, of which the majority class has 56.3 %. Raises InputError
    where a task is missing.
    """
    missing = [name for name in GLUE_TASKS if name not in columns]
    if missing:
        raise InputError(
            f"GLUE macro score: no figure for {', '.join(missing)}; run run_task.py --task"
            f" {missing[0]} first"
        )
    return {
        "macro": statistics.fmean(columns[name] for name in GLUE_TASKS),
        "macro_without_wnli": statistics.fmean(
            columns[name] for name in GLUE_TASKS if name != "wnli"
        ),
    }
