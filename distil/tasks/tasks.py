"""The tasks of run_task.py as a table: files and columns, labels, head, metrics, settings; and the
readers of their formats.

TASKS has one row a task. The protocols are those behind the tables of Sanh et al., 2019 (section 4,
Tables 1 to 3) and of its folder's README: GLUE's TSV files as the 2019 processors read them, IMDb's
folders, XNLI's TSV files, the columns of CoNLL-2003 and GermEval 2014, WikiText's raw text. What
the paper and the folder leave open is marked "our choice". Tables of macro scores come from
glue_macro. Metrics are the libraries': scikit-learn, scipy, seqeval.
"""

import codecs
import collections
import dataclasses
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distil.models.architectures import quiet_transformers
from distil.system.files import require_file
from utils import InputError, logger, one_line

README_LANGUAGES = ("en", "es", "zh", "de", "ar", "ur")
XNLI_LANGUAGES = (
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to predict for: one or two texts, or the words of a sentence.

    id: stem of the file and row in it, of the first word in a sentence. where: the same for
    messages. group: the part of the scored set that has a figure of its own (MNLI's matched, XNLI's
    languages); "" where there is one part.
    label: a class, a value, or the classes of the words.
    """

    id: str
    where: str
    texts: tuple[str, ...]
    label: Any
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a TSV file has what; numbers from 0, -1 for the last column.

    is_rough: rows that are too short are skipped, as in 2019, and an empty text is none to complain
    of (QQP holds both).
    """

    texts: tuple[int, ...]
    label: int
    group: int | None = None
    has_header: bool = True
    is_rough: bool = False

    @property
    def number(self) -> int:
        """The least number of columns."""
        return max(*self.texts, self.label, max(self.texts) + 1 if self.label < 0 else 0) + 1


@dataclasses.dataclass(frozen=True)
class Part:
    """One file (or folder) of a set. patterns: names below --data_dir, the first that fits is
    taken.
    """

    patterns: tuple[str, ...]
    columns: Columns | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True)
class HubPart:
    """One split of a data set of the hub."""

    split: str
    config: str | None = None
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Hub:
    """A task's data set on the hub. texts, label: columns; for words and their classes likewise."""

    name: str | None
    train: HubPart
    scored: Mapping[str, tuple[HubPart, ...]]
    texts: tuple[str, ...]
    label: str = "label"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a task's protocol, where the command line names no others."""

    max_seq_length: int = 128
    learning_rate: float = 2e-5
    num_train_epochs: float = 3.0
    per_gpu_train_batch_size: int = 32
    per_gpu_eval_batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of TASKS.

    head: row of fine_tuning.DISTANCES and of run_task.HEADS. scored: {split: parts}; the first
    split is the default.
    labels: in the order of their ids; () for those that the files hold. aliases: other spellings of
    labels.
    metrics: (predictions, gold) -> {name: value}, x100. figure: the metrics whose mean is the
    task's one number.
    main_groups: the groups whose mean is the task's number where all are scored; () for all groups.
    """

    head: str
    read: Callable[..., list[Example]]
    train: Part
    scored: Mapping[str, tuple[Part, ...]]
    hub: Hub
    labels: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Callable[[Sequence, Sequence], dict[str, float]] | None = None
    figure: tuple[str, ...] = ("accuracy",)
    main_groups: tuple[str, ...] = ()
    settings: Settings = Settings()


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------


def accuracy(predictions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return the share of equal labels, x100."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": 100 * float(accuracy_score(gold, predictions))}


def accuracy_and_f1(predictions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return accuracy, and F1 of class 1 (0 where neither side has any), x100."""
    from sklearn.metrics import f1_score

    f1 = f1_score(gold, predictions, labels=["0", "1"], pos_label="1", zero_division=0.0)
    return {**accuracy(predictions, gold), "f1": 100 * float(f1)}


def matthews(predictions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return Matthews' correlation, x100; 0 where one side has one class only."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": 100 * float(matthews_corrcoef(gold, predictions))}


def correlations(predictions: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, x100; 0 where one side is constant, which
    correlates with nothing.
    """
    from scipy.stats import pearsonr, spearmanr

    if len(set(predictions)) < 2 or len(set(gold)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": 100 * float(pearsonr(predictions, gold).statistic),
        "spearman": 100 * float(spearmanr(predictions, gold).statistic),
    }


def entities(
    predictions: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return F1, precision and recall of whole entities, x100: span and type equal, as conlleval
    counts (not strict IOB2).
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    functions = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    pair = [list(row) for row in gold], [list(row) for row in predictions]
    return {
        name: 100 * float(function(*pair, zero_division=0)) for name, function in functions.items()
    }


def perplexities(
    nll_sum: float, num_scored: int, num_tokens: int, num_words: int
) -> dict[str, float]:
    """Return perplexity by token and by word.

    nll_sum: over num_scored tokens, natural log. By word, the mean holds for all num_tokens of the
    text: what blocks leave unscored (their first tokens, the tail) is counted as the rest.
    """
    mean = nll_sum / num_scored
    by_token, by_word = math.exp(min(mean, 700)), math.exp(min(mean * num_tokens / num_words, 700))
    return {"score": by_token, "token_perplexity": by_token, "word_perplexity": by_word}


def score(task: Task, examples: Sequence[Example], predictions: Sequence) -> dict[str, float]:
    """Compute a task's metrics: "score", its one number, first; then the parts, or the number of
    each group.

    predictions: one an example, of its label's kind.
    """
    groups: dict[str, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
    for example, prediction in zip(examples, predictions, strict=True):
        groups[example.group][0].append(prediction)
        groups[example.group][1].append(example.label)
    parts = {group: task.metrics(*pair) for group, pair in groups.items()}
    figures = {
        group: statistics.fmean(values[name] for name in task.figure)
        for group, values in parts.items()
    }
    if set(parts) == {""}:
        return {"score": figures[""], **parts[""]}
    main = [group for group in task.main_groups if group in figures]
    chosen = main if main and len(main) == len(task.main_groups) else list(figures)
    return {"score": statistics.fmean(figures[group] for group in chosen), **figures}


GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


def glue_macro(columns: Mapping[str, float]) -> dict[str, float]:
    """Compute GLUE's macro scores from the nine tasks' numbers: "macro" over all,
    "macro_without_wnli" over eight.

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


# --------------------------------------------------------------------------------------------------
# Readers
# --------------------------------------------------------------------------------------------------


def find_part(data_dir: str, part: Part, hint: str = "") -> Path:
    """Find a part's file (or folder) below data_dir. Raises InputError where there is none, or more
    than one.
    """
    for pattern in part.patterns:
        found = sorted(
            path for path in Path(data_dir).glob(pattern) if not path.name.startswith(".")
        )
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:3])
            raise InputError(
                f"--data_dir {data_dir}: {names} all fit {pattern}; keep one of them in the folder"
            )
        if found:
            return found[0]
    raise InputError(
        f"--data_dir {data_dir}: has no file {' or '.join(part.patterns)}; put the task's file"
        f" there{hint}"
    )


def has_part(data_dir: str, part: Part) -> bool:
    """True where data_dir has a part's file."""
    return any(any(Path(data_dir).glob(pattern)) for pattern in part.patterns)


def read_text(path: Path, encoding: str) -> str:
    """Read a text file; every line end becomes a line feed. Raises InputError that names the row
    that can't be decoded.
    """
    require_file(path, "data file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeError as error:
        row = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        likely = (
            "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
        )
        raise InputError(
            f"{path}:{row}: is not {encoding} ({one_line(error)}); name its --encoding, such as"
            f" {likely}"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, encoding: str) -> list[str]:
    """Read a text file's lines. Not by str.splitlines: U+0085 and U+2028 stand within texts,
    too.
    """
    return read_text(path, encoding).removesuffix("\n").split("\n")


def read_tsv(path: Path, part: Part, task: Task, encoding: str) -> list[Example]:
    """Read a TSV file raw: tabs divide, quotes are characters like any other. Raises InputError
    that names the row.
    """
    columns, rows = part.columns, [line.split("\t") for line in read_lines(path, encoding)]
    header = rows[0] if columns.has_header else None
    if header:
        _check_header(path, header, columns, task)
    examples, num_skipped, long_rows = [], 0, []
    for number, row in enumerate(rows[1:] if header else rows, 2 if header else 1):
        if len(row) < columns.number:
            if not columns.is_rough:
                raise InputError(_short_row(f"{path}:{number}", row, columns))
            num_skipped += 1
            continue
        if header and len(row) > len(header):
            long_rows.append(number)
        examples.append(_tsv_example(path, number, row, part, task))
    if num_skipped:
        logger.warning("%s: %d rows have too few columns and were skipped.", path, num_skipped)
    if long_rows:
        logger.warning(
            "%s: %d rows have more columns than the header, such as row %d; is a tab within a"
            " text?",
            path,
            len(long_rows),
            long_rows[0],
        )
    return examples


def _check_header(path: Path, header: list[str], columns: Columns, task: Task) -> None:
    if len(header) < columns.number:
        raise InputError(_short_row(f"{path}:1", header, columns))
    label = header[columns.label]
    if task.aliases.get(label, label) in task.labels or (not task.labels and _is_number(label)):
        raise InputError(
            f"{path}:1: is an example (label {label}), expected the names of the columns; add a"
            " first row of names"
        )


def _short_row(where: str, row: list[str], columns: Columns) -> str:
    return (
        f"{where}: has {len(row)} of at least {columns.number} columns with tabs between; is it the"
        " task's own file? A line break or carriage return within a text ends the row: replace it"
        " by a blank"
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _tsv_example(path: Path, number: int, row: list[str], part: Part, task: Task) -> Example:
    columns, where = part.columns, f"{path}:{number}"
    texts = tuple(row[column] for column in columns.texts)
    if not columns.is_rough and not all(text.strip() for text in texts):
        raise InputError(f"{where}: an empty text; fill it in or remove the row")
    group = part.group if columns.group is None else row[columns.group]
    return Example(
        f"{path.stem}-{number}", where, texts, checked_label(row[columns.label], task, where), group
    )


def checked_label(label: str, task: Task, where: str) -> str | float:
    """Return a label as the task has it: a class, or a value from 0 to 5. Raises InputError that
    names the place.
    """
    if task.head == "values":
        if not _is_number(label) or not 0 <= float(label) <= 5:
            raise InputError(
                f"{where}: label {label!r}, expected a number from 0 to 5; correct the row"
            )
        return float(label)
    label = task.aliases.get(label, label)
    if label not in task.labels:
        raise InputError(
            f"{where}: unknown label {label!r}, expected one of {', '.join(task.labels)}; is it"
            " this task's file?"
        )
    return label


def read_folders(path: Path, part: Part, task: Task, encoding: str) -> list[Example]:
    """Read a folder a label, a file an example. Raises InputError that names a missing folder or an
    empty file.
    """
    examples = []
    for label in task.labels:
        files = sorted((path / label).glob("*.txt"))
        if not files:
            raise InputError(f"{path / label}: has no .txt files; unpack the whole data set there")
        for file in files:
            text = read_text(file, encoding)
            if not text.strip():
                raise InputError(f"{file}: an empty text; fill it in or remove the file")
            examples.append(Example(f"{label}/{file.stem}", str(file), (text,), label))
    return examples


def read_columns(path: Path, part: Part, task: Task, encoding: str) -> list[Example]:
    """Read sentences of words and labels: CoNLL's columns, or GermEval's, told apart by content.

    CoNLL: blanks or tabs divide, the first column is the word, the last its label; -DOCSTART- ends
    a sentence. GermEval: four columns with tabs between (number, word, outer label, inner label),
    the outer one counts; # starts a comment. Blank lines end sentences. Raises InputError that
    names the row.
    """
    lines = read_lines(path, encoding)
    parse, examples, words = (_germeval_word if _is_germeval(lines) else _conll_word), [], []
    for row, line in enumerate([*lines, ""], 1):
        pair = parse(line, f"{path}:{row}")
        if pair:
            words.append(pair)
        elif words:
            first = row - len(words)
            texts, labels = zip(*words, strict=True)
            examples.append(Example(f"{path.stem}-{first}", f"{path}:{first}", texts, labels))
            words = []
    return examples


def _is_germeval(lines: Sequence[str]) -> bool:
    """Tell by most rows: a number and a tab stand first. In CoNLL's columns a number can be a word,
    at the beginning, too.
    """
    rows = [line for line in lines if line.strip() and not re.match(r"#\t|-DOCSTART-", line)]
    return 2 * sum(bool(re.match(r"\d+\t[^\t]+\t[^\t]+", row)) for row in rows) > len(rows)


def _conll_word(line: str, where: str) -> tuple[str, str] | None:
    fields = line.split()
    if not fields or fields[0] == "-DOCSTART-":
        return None
    if len(fields) < 2:
        raise InputError(f"{where}: has one column, expected a word and its label; correct the row")
    return fields[0], _entity_label(fields[-1], where)


def _germeval_word(line: str, where: str) -> tuple[str, str] | None:
    fields = line.split("\t")
    if not line.strip() or fields[0].startswith("#"):
        return None
    if len(fields) != 4:
        raise InputError(
            f"{where}: has {len(fields)} columns, expected 4 with tabs between (number, word,"
            " labels); correct it"
        )
    if not fields[1].strip(" "):
        raise InputError(f"{where}: an empty word; remove the row")
    return fields[1], _entity_label(fields[2], where)


def _entity_label(label: str, where: str) -> str:
    if not re.fullmatch(r"O|[BI]-\S+", label):
        raise InputError(
            f"{where}: label {label!r}, expected O, or B- or I- and a type; is the last column the"
            " label?"
        )
    return label


def read_raw(path: Path, part: Part, task: Task, encoding: str) -> list[Example]:
    """Read a whole file as one text. Raises InputError where it has no word."""
    text = read_text(path, encoding)
    if not text.split():
        raise InputError(f"{path}: holds no word; take another copy")
    return [Example(path.stem, str(path), (text,), None)]


def read_part(
    task: Task, data_dir: str, part: Part, encoding: str, hint: str = ""
) -> list[Example]:
    """Read one part of a task's data. Raises InputError where it is missing, damaged or empty."""
    path = find_part(data_dir, part, hint)
    examples = task.read(path, part, task, encoding)
    if not examples:
        raise InputError(f"{path}: holds no example; take another copy")
    return examples


# --------------------------------------------------------------------------------------------------
# The hub
# --------------------------------------------------------------------------------------------------


def read_hub(task: Task, name: str, part: HubPart) -> list[Example]:
    """Read one split of a data set of the hub. Raises InputError where the hub does not give it."""
    import datasets

    with quiet_transformers():
        try:
            rows = datasets.load_dataset(name, part.config, split=part.split)
        except (
            Exception
        ) as error:  # no network, no such set, no such split, a set that wants to run a program
            raise InputError(
                f"data set {name} ({part.config or 'default'}, {part.split}): the hub did not give"
                f" it ({one_line(error)}); name a folder of the task's own files by --data_dir"
            ) from error
    return hub_examples(task, rows, part, name)


def hub_examples(task: Task, rows, part: HubPart, name: str) -> list[Example]:
    """Turn a split's rows (a datasets.Dataset) into examples. Raises InputError that names a
    missing column or a row.
    """
    hub, where = task.hub, f"{name} ({part.split})"
    missing = [
        column
        for column in (*hub.texts, *([hub.label] if task.head != "next tokens" else []))
        if column not in rows.column_names
    ]
    if missing:
        raise InputError(
            f"{where}: has no column {missing[0]}, only {', '.join(rows.column_names)}; name"
            " another data set"
        )
    if task.head == "next tokens":
        # The set keeps an empty string for each line of the raw file that holds a blank only.
        return [
            Example(
                part.split, where, ("".join(text or " \n" for text in rows[hub.texts[0]]),), None
            )
        ]
    to_label = _words_label if task.head == "tokens" else _row_label
    feature = rows.features[hub.label]
    return [
        Example(
            f"{part.split}-{number}",
            f"{where}, row {number}",
            (
                tuple(row[hub.texts[0]])
                if task.head == "tokens"
                else tuple(row[column] for column in hub.texts)
            ),
            to_label(row[hub.label], feature, task, f"{where}, row {number}"),
            part.group,
        )
        for number, row in enumerate(rows)
    ]


def _row_label(label, feature, task: Task, where: str) -> str | float:
    names = getattr(feature, "names", None)
    if names and label in range(len(names)) and names[label] in task.labels:
        label = names[label]
    return checked_label(str(label), task, where)


def _words_label(labels, feature, task: Task, where: str) -> tuple[str, ...]:
    names = getattr(getattr(feature, "feature", None), "names", None)
    return tuple(_entity_label(names[label] if names else str(label), where) for label in labels)


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

NLI_LABELS = ("contradiction", "entailment", "neutral")
TWO_CLASSES, ENTAILED_OR_NOT = ("0", "1"), ("entailment", "not_entailment")


def _glue(
    hub_config: str,
    columns: Columns,
    hub_texts: tuple[str, ...],
    *,
    labels: tuple[str, ...] = TWO_CLASSES,
    head: str = "classes",
    metrics=accuracy,
    figure=("accuracy",),
) -> Task:
    hub = Hub(
        "nyu-mll/glue",
        HubPart("train", hub_config),
        {"dev": (HubPart("validation", hub_config),)},
        hub_texts,
    )
    parts = Part(("train.tsv",), columns), {"dev": (Part(("dev.tsv",), columns),)}
    return Task(head, read_tsv, *parts, hub, labels, metrics=metrics, figure=figure)


def _mnli() -> Task:
    columns, groups = Columns((8, 9), -1), ("matched", "mismatched")
    return Task(
        "classes",
        read_tsv,
        Part(("train.tsv",), columns),
        {"dev": tuple(Part((f"dev_{group}.tsv",), columns, group) for group in groups)},
        Hub(
            "nyu-mll/glue",
            HubPart("train", "mnli"),
            {"dev": tuple(HubPart(f"validation_{group}", "mnli", group) for group in groups)},
            ("premise", "hypothesis"),
        ),
        NLI_LABELS,
        metrics=accuracy,
    )


def _xnli() -> Task:
    columns = Columns((6, 7), 1, group=0)
    return Task(
        "classes",
        read_tsv,
        Part(
            ("XNLI-MT-1.0/multinli/multinli.train.en.tsv", "multinli.train.en.tsv"),
            Columns((0, 1), 2),
        ),
        {
            split: (Part((f"XNLI-1.0/xnli.{split}.tsv", f"xnli.{split}.tsv"), columns),)
            for split in ("test", "dev")
        },
        Hub(
            "facebook/xnli",
            HubPart("train", "en"),
            {
                split: tuple(HubPart(on_hub, language, language) for language in XNLI_LANGUAGES)
                for split, on_hub in {"test": "test", "dev": "validation"}.items()
            },
            ("premise", "hypothesis"),
        ),
        NLI_LABELS,
        {"contradictory": "contradiction"},
        accuracy,
        main_groups=README_LANGUAGES,
        settings=Settings(learning_rate=5e-5, num_train_epochs=2),
    )


def _three_splits(
    name: str | None, texts: tuple[str, ...], label: str, config: str | None = None
) -> Hub:
    scored = {"test": (HubPart("test", config),), "dev": (HubPart("validation", config),)}
    return Hub(name, HubPart("train", config), scored, texts, label)


TASKS: dict[str, Task] = {
    "cola": _glue(
        "cola",
        Columns((3,), 1, has_header=False),
        ("sentence",),
        metrics=matthews,
        figure=("matthews",),
    ),
    "sst2": _glue("sst2", Columns((0,), 1), ("sentence",)),
    "mrpc": _glue(
        "mrpc",
        Columns((3, 4), 0),
        ("sentence1", "sentence2"),
        metrics=accuracy_and_f1,
        figure=("accuracy", "f1"),
    ),
    "stsb": _glue(
        "stsb",
        Columns((7, 8), -1),
        ("sentence1", "sentence2"),
        labels=(),
        head="values",
        metrics=correlations,
        figure=("pearson", "spearman"),
    ),
    "qqp": _glue(
        "qqp",
        Columns((3, 4), 5, is_rough=True),
        ("question1", "question2"),
        metrics=accuracy_and_f1,
        figure=("accuracy", "f1"),
    ),
    "mnli": _mnli(),
    "qnli": _glue("qnli", Columns((1, 2), -1), ("question", "sentence"), labels=ENTAILED_OR_NOT),
    "rte": _glue("rte", Columns((1, 2), -1), ("sentence1", "sentence2"), labels=ENTAILED_OR_NOT),
    "wnli": _glue("wnli", Columns((1, 2), -1), ("sentence1", "sentence2")),
    # Length, rate and epochs are our choice: the paper gives the accuracy only.
    "imdb": Task(
        "classes",
        read_folders,
        Part(("train", "aclImdb/train")),
        {"test": (Part(("test", "aclImdb/test")),)},
        Hub("stanfordnlp/imdb", HubPart("train"), {"test": (HubPart("test"),)}, ("text",)),
        ("neg", "pos"),
        metrics=accuracy,
        settings=Settings(max_seq_length=512),
    ),
    "xnli": _xnli(),
    "ner": Task(
        "tokens",
        read_columns,
        Part(("train.txt", "train.tsv", "*train*")),
        {
            "test": (Part(("test.txt", "test.tsv", "*testb*", "*test*")),),
            "dev": (Part(("dev.txt", "dev.tsv", "*testa*", "*dev*", "*valid*")),),
        },
        _three_splits(None, ("tokens",), "ner_tags"),
        metrics=entities,
        figure=("f1",),
        settings=Settings(learning_rate=5e-5),
    ),
    "wikitext": Task(
        "next tokens",
        read_raw,
        Part(("wiki.train.raw", "train.txt")),
        {
            "test": (Part(("wiki.test.raw", "test.txt")),),
            "dev": (Part(("wiki.valid.raw", "dev.txt")),),
        },
        _three_splits("Salesforce/wikitext", ("text",), "", "wikitext-103-raw-v1"),
        settings=Settings(1024, 5e-5, 1, 4, 2),
    ),
}


# --------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------


def prediction_rows(
    task: Task, examples: Sequence[Example], predictions: Sequence
) -> list[tuple[str, str]]:
    """List (id, prediction) as a file of predictions holds them: a row an example, or a word."""
    if task.head != "tokens":
        return [
            (example.id, str(prediction))
            for example, prediction in zip(examples, predictions, strict=True)
        ]
    return [
        (word_id, label)
        for example, labels in zip(examples, predictions, strict=True)
        for word_id, label in zip(word_ids(example), labels, strict=True)
    ]


def word_ids(example: Example) -> list[str]:
    """Name the words of a sentence: stem of the file and row."""
    stem, first = example.id.rsplit("-", 1)
    return [f"{stem}-{int(first) + place}" for place in range(len(example.texts))]


def read_predictions(path: str | os.PathLike, task: Task, examples: Sequence[Example]) -> list:
    """Read a file of predictions (columns id and prediction, tabs between); one an example, in the
    examples' order.

    Raises InputError for other ids, ids that are missing or there twice, and labels that the task
    has not.
    """
    lines = read_lines(Path(path), "utf-8")
    if lines[0].split("\t") != ["id", "prediction"]:
        raise InputError(
            f"{path}:1: {lines[0][:60]!r}, expected the columns id and prediction with a tab"
            " between"
        )
    gold = prediction_rows(task, examples, [example.label for example in examples])
    known, found = {row_id for row_id, _ in gold}, {}
    for row, line in enumerate(lines[1:], 2):
        row_id, tab, label = line.partition("\t")
        if not tab:
            raise InputError(
                f"{path}:{row}: {line[:60]!r}, expected an id and a prediction with a tab between;"
                " correct the row"
            )
        if row_id not in known or row_id in found:
            what = (
                "there twice"
                if row_id in found
                else f"not one of the scored set's ({gold[0][0]}, ..)"
            )
            raise InputError(
                f"{path}:{row}: id {row_id} is {what}; are the predictions for this task and"
                " --data_dir?"
            )
        found[row_id] = _checked_prediction(label, task, f"{path}:{row}")
    if missing := [row_id for row_id, _ in gold if row_id not in found]:
        raise InputError(
            f"{path}: has no prediction for {missing[0]} and {len(missing) - 1} others; predict for"
            " the whole set"
        )
    if task.head != "tokens":
        return [found[row_id] for row_id, _ in gold]
    return [tuple(found[word_id] for word_id in word_ids(example)) for example in examples]


def _checked_prediction(label: str, task: Task, where: str) -> str | float:
    if task.head == "tokens":
        return _entity_label(label, where)
    if task.head == "values":
        if not _is_number(label):
            raise InputError(f"{where}: prediction {label!r}, expected a number")
        return float(label)
    return checked_label(label, task, where)


def distinct_labels(*sets: Sequence[Example]) -> tuple[str, ...]:
    """List the labels of words in alphabetical order."""
    return tuple(
        sorted({label for examples in sets for example in examples for label in example.label})
    )


def num_words(text: str) -> int:
    """Count a text's words, and one end a line."""
    return len(text.split()) + text.count("\n")


def finite(values: np.ndarray, where: str) -> np.ndarray:
    """Return `values`. Raises InputError where one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise InputError(
            f"{where}: the model's outputs are NaN or infinite; lower --learning_rate, or train in"
            " float32"
        )
    return values
