"""The dataclasses of a row of TASKS (tasks.py), and Example, which every reader returns."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One input to predict for: one or two texts, or the words of a sentence.

    id: stem of the file and number of the row; for a sentence, of its first word's row. where: the
    same place for messages. group: part of the scored set with a figure per part (MNLI's matched,
    XNLI's languages); "" where the set has one part.
    label: a class, a value, or the classes of the words.
    """

    id: str
    where: str
    texts: tuple[str, ...]
    label: Any
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a TSV file, counted from 0; -1 is the last column.

    is_rough: skip rows that are too short, as in 2019, and accept empty texts (QQP has both).
    """

    texts: tuple[int, ...]
    label: int
    group: int | None = None
    has_header: bool = True
    is_rough: bool = False

    @property
    def least_width(self) -> int:
        """Return the least number of columns of a row."""
        return max(*self.texts, self.label, max(self.texts) + 1 if self.label < 0 else 0) + 1


@dataclasses.dataclass(frozen=True)
class Part:
    """One file (or folder) of a set; patterns: names below --data_dir, the first match is read."""

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
    """A task's data set on the hub.

    name: None where the hub has none. card_title, card_config, card_split: how a model card's
    metadata names the scored set. train, scored, texts, label: splits and columns that run_task.py
    reads (texts: for "tokens" the column of words).
    """

    name: str | None
    card_title: str
    card_config: str | None
    card_split: str
    train: HubPart | None = None
    scored: Mapping[str, tuple[HubPart, ...]] = dataclasses.field(default_factory=dict)
    texts: tuple[str, ...] = ()
    label: str = "label"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a task's protocol: the defaults of run_task.py's flags of the same names."""

    max_seq_length: int = 128
    learning_rate: float = 2e-5
    num_train_epochs: float = 3.0
    per_gpu_train_batch_size: int = 32
    per_gpu_eval_batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of TASKS.

    For people:
    title: name in tables, and of GLUE's data folder. metric_title: what the task's one number is.

    For report.py and the model card:
    score_key: the one number's name in scores.json. lower_is_better: a perplexity, not a rate.

    For fine-tuning:
    head: row of fine_tuning.DISTANCES and of run_task.HEADS. read: reader of the files, None for
    tasks with another program. scored: {split: parts}; the first split is the default.
    labels: in the order of their ids; () where the files define them. aliases: other spellings of
    labels.
    metrics: (predictions, gold) -> {name: value}, x100. score_metrics: the metrics whose mean is
    the task's one number.
    main_groups: the groups whose mean is the task's number where all are scored; () for all groups.
    """

    title: str
    metric_title: str
    head: str
    hub: Hub
    read: Callable[..., list[Example]] | None = None
    train: Part | None = None
    scored: Mapping[str, tuple[Part, ...]] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Callable[[Sequence, Sequence], dict[str, float]] | None = None
    score_metrics: tuple[str, ...] = ("accuracy",)
    main_groups: tuple[str, ...] = ()
    settings: Settings = Settings()
    score_key: str = "score"
    lower_is_better: bool = False

    @property
    def has_groups(self) -> bool:
        """Return whether the scored set has a figure per group."""
        return any(
            part.group or (part.columns is not None and part.columns.group is not None)
            for parts in self.scored.values()
            for part in parts
        )

    def labels_by_name(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the labels in the order of `names`, in any case; () where those are others."""
        by_name = {label.lower(): label for label in self.labels} | dict(self.aliases)
        found = tuple(by_name.get(name.lower(), "") for name in names)
        return found if sorted(found) == sorted(self.labels) else ()
