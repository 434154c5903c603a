"""Readers of the tasks' formats: TSV, folders, columns of words, raw text, data sets of the hub.

A row of TASKS names its reader: (path, part, task, encoding) -> examples.
"""

import argparse
import codecs
import math
import re
from collections.abc import Sequence
from pathlib import Path

from distil.system.files import require_file
from distil.tasks.schema import Columns, Example, HubPart, Part, Task
from utils import InputError, logger, one_line


def find_part(data_dir: str, part: Part, hint: str = "") -> Path:
    """Find a part's file (or folder) below data_dir; raise InputError unless there is one."""
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
    """Return whether data_dir has a part's file."""
    return any(any(Path(data_dir).glob(pattern)) for pattern in part.patterns)


def read_text(path: Path, encoding: str) -> str:
    """Read a text file with all line ends as line feeds.

    Raises InputError naming the row that can't be decoded.
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
    """Read a text file's lines."""
    # Not str.splitlines: texts contain U+0085 and U+2028.
    return read_text(path, encoding).removesuffix("\n").split("\n")


def read_tsv(path: Path, part: Part, task: Task, encoding: str) -> list[Example]:
    """Read a TSV file: tabs separate, quotes have no meaning. Raises InputError naming the row."""
    columns, rows = part.columns, [line.split("\t") for line in read_lines(path, encoding)]
    header = rows[0] if columns.has_header else None
    if header:
        _check_header(path, header, columns, task)
    examples, num_skipped, long_rows = [], 0, []
    for number, row in enumerate(rows[1:] if header else rows, 2 if header else 1):
        if len(row) < columns.least_width:
            if not columns.is_rough:
                raise InputError(_short_row(f"{path}:{number}", row, columns))
            num_skipped += 1
            continue
        if header and len(row) > len(header):
            long_rows.append(number)
        examples.append(_tsv_example(path, number, row, part, task))
    if num_skipped:
        logger.warning("%s: skipped %d row(s) with too few columns.", path, num_skipped)
    if long_rows:
        logger.warning(
            "%s: %d row(s) with more columns than the header, such as row %d; is a tab within a"
            " text?",
            path,
            len(long_rows),
            long_rows[0],
        )
    return examples


def _check_header(path: Path, header: list[str], columns: Columns, task: Task) -> None:
    if len(header) < columns.least_width:
        raise InputError(_short_row(f"{path}:1", header, columns))
    label = header[columns.label]
    if task.aliases.get(label, label) in task.labels or (not task.labels and is_number(label)):
        raise InputError(
            f"{path}:1: is an example (label {label}), expected the names of the columns; add a"
            " first row of names"
        )


def _short_row(where: str, row: list[str], columns: Columns) -> str:
    return (
        f"{where}: has {len(row)} of at least {columns.least_width} columns with tabs between; is"
        " it the task's own file? A line break or carriage return within a text ends the row:"
        " replace it by a blank"
    )


def is_number(text: str) -> bool:
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
    """Return a task's label, a class or a value from 0 to 5; raise InputError naming the place."""
    if task.head == "values":
        if not is_number(label) or not 0 <= float(label) <= 5:
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
    """Read one folder per label, one file per example.

    Raises InputError naming a missing folder or an empty file.
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
    """Read sentences of words and labels, in CoNLL's or GermEval's columns, detected by content.

    CoNLL: spaces or tabs separate, the first column is the word, the last its label; -DOCSTART-
    ends a sentence. GermEval: four columns separated by tabs (number, word, outer label, inner
    label), of which the outer label is read; # starts a comment. Blank lines end sentences. Raises
    InputError naming the row.
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
    """Return whether most rows begin with a number and a tab."""
    # Most, not the first: in CoNLL's columns a number can be a word, also the first one.
    rows = [line for line in lines if line.strip() and not re.match(r"#\t|-DOCSTART-", line)]
    return 2 * sum(bool(re.match(r"\d+\t[^\t]+\t[^\t]+", row)) for row in rows) > len(rows)


def _conll_word(line: str, where: str) -> tuple[str, str] | None:
    fields = line.split()
    if not fields or fields[0] == "-DOCSTART-":
        return None
    if len(fields) < 2:
        raise InputError(f"{where}: has one column, expected a word and its label; correct the row")
    return fields[0], entity_label(fields[-1], where)


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
    return fields[1], entity_label(fields[2], where)


def entity_label(label: str, where: str) -> str:
    if not re.fullmatch(r"O|[BI]-\S+", label):
        raise InputError(
            f"{where}: label {label!r}, expected O, or B- or I- and a type; is the last column the"
            " label?"
        )
    return label


def read_raw(path: Path, part: Part, task: Task, encoding: str) -> list[Example]:
    """Read a whole file as one text; raise InputError where it has no word."""
    text = read_text(path, encoding)
    if not text.split():
        raise InputError(f"{path}: holds no word; take another copy")
    return [Example(path.stem, str(path), (text,), None)]


def read_part(
    task: Task, data_dir: str, part: Part, encoding: str, hint: str = ""
) -> list[Example]:
    """Read one part of a task's data; raise InputError where it is missing, damaged or empty."""
    path = find_part(data_dir, part, hint)
    examples = task.read(path, part, task, encoding)
    if not examples:
        raise InputError(f"{path}: holds no example; take another copy")
    return examples


def read_hub(task: Task, name: str, part: HubPart) -> list[Example]:
    """Read one split of a data set of the hub; raise InputError where it can't be loaded."""
    import datasets

    from distil.models.hub import quiet_transformers

    with quiet_transformers():
        try:
            rows = datasets.load_dataset(name, part.config, split=part.split)
        # No network, no such set or split, a set that would run a program: loaders raise anything.
        except Exception as error:
            raise InputError(
                f"data set {name} ({part.config or 'default'}, {part.split}): the hub did not give"
                f" it ({one_line(error)}); name a folder of the task's own files by --data_dir"
            ) from error
    return hub_examples(task, rows, part, name)


def hub_examples(task: Task, rows, part: HubPart, name: str) -> list[Example]:
    """Make examples of a split's rows (a datasets.Dataset).

    Raises InputError naming a missing column or a row.
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
        # An empty string is a line of the raw file with one space.
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
    return tuple(entity_label(names[label] if names else str(label), where) for label in labels)


def distinct_labels(*sets: Sequence[Example]) -> tuple[str, ...]:
    """List the labels of the sets' words, sorted."""
    return tuple(
        sorted({label for examples in sets for example in examples for label in example.label})
    )


def read_training_set(args: argparse.Namespace, task: Task) -> list[Example]:
    """Read the training set from --data_dir or the hub."""
    if args.data_dir is None:
        return read_hub(task, args.dataset_name or task.hub.name, task.hub.train)
    return read_part(
        task, args.data_dir, task.train, args.encoding, hint=", or score only with --do_eval"
    )


def read_scored_set(args: argparse.Namespace, task: Task) -> list[Example]:
    """Read all parts of the scored set, in order; raise InputError for absent languages."""
    if args.data_dir is None:
        name, parts = args.dataset_name or task.hub.name, task.hub.scored[args.split]
        wanted = [part for part in parts if not args.languages or part.group in args.languages]
        examples = [example for part in wanted for example in read_hub(task, name, part)]
    else:
        others = [f"--split {split}" for split in task.scored if split != args.split]
        hint = f", or score another set by {' or '.join(others)}" if others else ""
        parts = task.scored[args.split]
        examples = [
            row
            for part in parts
            for row in read_part(task, args.data_dir, part, args.encoding, hint)
        ]
    if not args.languages:
        return examples
    there = sorted({example.group for example in examples})
    if missing := [language for language in args.languages if language not in there]:
        raise InputError(
            f"--languages {missing[0]}: the scored set has {', '.join(there) or 'none of them'};"
            " correct the name"
        )
    return [example for example in examples if example.group in args.languages]
