"""Held-out figures of a study's students, all on the same masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from distil.evaluation import (
    HeldOut,
    evenly_spaced,
    figures_of,
    measure,
    passes_over,
    plan_batches,
    reader_of,
)
from distil.flops import count_update
from distil.kept_rows import KeptRows
from distil.models.language_model import LanguageModel, load_network, resolve_by_name
from distil.objectives import LOSSES
from distil.training.config import TrainConfig, parse_config
from distil.training.models import objective_options
from utils import InputError

TUNING_EVERY = 4  # of the held-out sequences these choose the rate; the others are reported
COST_SEQUENCES = 200  # of the data, whose model FLOPs show what a variant costs


class HeldOutText:
    """The held-out sequences, those that tune and those that are reported apart."""

    def __init__(self, dataset, teacher: LanguageModel, num: int | None = None):
        """Plan the measurement of an LmSeqsDataset. Raises InputError where it is too small.

        num: of its sequences, evenly spaced; None: all.
        """
        self.dataset, self.teacher = dataset, teacher
        self.passes = HeldOut.of(dataset, teacher.tokenizer, teacher.is_masked).passes[""]
        self.kept = KeptRows()  # the teacher answers once
        total = len(dataset.lengths)
        numbers = evenly_spaced(total, total if num is None else num)
        tunes = np.arange(len(numbers)) % TUNING_EVERY == 0
        if tunes.all():
            raise InputError(
                f"--held_out: has {len(numbers)} sequence; expected several, for every"
                f" {TUNING_EVERY}th is not reported"
            )
        self.parts = {"tuning": self._plan(numbers[tunes]), "reported": self._plan(numbers[~tunes])}

    def _plan(self, numbers: np.ndarray) -> list[np.ndarray]:
        return [numbers[batch] for batch in plan_batches(self.dataset.lengths[numbers])]

    def _passes(self, batches: list[np.ndarray]):
        return passes_over(self.dataset.collate, batches, self.passes)

    def figures(self, network, against_teacher: bool = True) -> dict[str, dict[str, float]]:
        """Measure a network: part -> figures, see evaluation.figures_of."""
        student = reader_of(network, self.teacher.num_entries)
        teacher = reader_of(self.teacher.network, self.teacher.num_entries)
        readers = student, teacher if against_teacher else None
        same_width = network.config.hidden_size == self.teacher.network.config.hidden_size
        return {
            part: figures_of(
                measure(*readers, self._passes(batches), self.kept, part),
                against_teacher,
                same_width,
            )
            for part, batches in self.parts.items()
        }


def load_student(folder: Path):
    """Load a student for evaluation."""
    path = str(folder)
    return load_network(resolve_by_name(path, "--student"), path, "--student").eval()


def read_trainable(
    words: Mapping[str, Sequence[str]], networks: Mapping[str, nn.Module], teacher: LanguageModel
) -> dict[str, TrainConfig]:
    """Read each variant's words of train.py, and make its objectives for its first student.

    Raises InputError naming the variant, hours before its training would.
    """
    configs = {}
    for name, own in words.items():
        try:
            config, student = parse_config(own), networks[name]
            options = objective_options(config, student.config, teacher.network.config)
            for loss in (LOSSES[objective] for objective in config.active):
                if loss.make_module:
                    loss.module(student, teacher.network, options)
        except InputError as error:
            raise InputError(
                f"{error} (the variant {name}; change --train_flags or --own, or leave it out)"
            ) from error
        configs[name] = config
    return configs


def costs(
    configs: Mapping[str, TrainConfig],
    networks: Mapping[str, nn.Module],
    teacher: LanguageModel,
    dataset,
) -> dict[str, float] | None:
    """Count each variant's model FLOPs of an update against the first's; None where unknown.

    configs: of a run of each. networks: their first students. dataset: an LmSeqsDataset.
    """
    some = np.linspace(0, len(dataset.lengths) - 1, COST_SEQUENCES).astype(np.int64)
    ids_BT, _ = dataset.collate(some[:1])
    lengths, found = dataset.lengths[some], {}
    for name, config in configs.items():
        rows = config.mlm_mask_prop, config.restrict_ce_to_mask
        counted = count_update(networks[name], teacher.network, config.active, ids_BT, *rows)
        if counted is None:
            return None
        num_sequences = config.batch_size
        if config.max_tokens is not None:
            num_sequences = config.max_tokens / lengths.mean()
        in_update = num_sequences * config.gradient_accumulation_steps
        found[name] = counted.of_batch(lengths) * in_update
    first = next(iter(found.values()))
    return {name: value / first for name, value in found.items()}
