"""Choose a student's layers by measurement: leave out, one at a time, the layer missed least.

A layer is missed by the KL divergence of the teacher's predictions from those without the layer, on
held-out text. Beside it stands block influence, 1 - the mean cosine between a layer's input and
output (Men et al., 2024, "ShortGPT", section 3.1).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distil.data.batches import MicroBatch
from distil.evaluation import (
    SUMS,
    HeldOut,
    Reader,
    evenly_spaced,
    measure,
    plan_batches,
    reader_of,
)
from distil.kept_rows import KeptRows
from distil.models.conventions import config_with_layers, layer_lists
from distil.models.first_weights import with_layers
from distil.models.forward import read_outputs, rows_of
from distil.models.layer_readings import EMBEDDINGS, blocks_of
from distil.reporting.plots import LOOKS, draw_bars, name_rows, picture, set_heading
from distil.reporting.tables import markdown
from utils import InputError

MEASURED_IDS = 2**13  # of the text: evenly spaced sequences


def asked_batches(dataset, tokenizer, is_masked: bool) -> list[MicroBatch]:
    """Ask each sequence of an LmSeqsDataset, or of a share with MEASURED_IDS, in one pass.

    Of a masked model every 7th token is asked, from another one on in each batch.
    """
    wanted = max(round(MEASURED_IDS / float(np.mean(dataset.lengths))), 1)
    chosen = evenly_spaced(len(dataset.lengths), wanted)
    passes, batches = HeldOut.of(dataset, tokenizer, is_masked).passes[""], []
    for number, places in enumerate(plan_batches(dataset.lengths[chosen])):
        asked = list(passes(number, *dataset.collate(chosen[places])))
        batches += itertools.islice(asked, number % len(asked), number % len(asked) + 1)
    return batches


@dataclasses.dataclass(frozen=True)
class Removal:
    """One step: the layer left out, and the KL divergence without each layer that was there.

    Both in nats a token; `without` lacks layers whose removal the family does not admit.
    """

    layer: int
    without: Mapping[int, float]

    @property
    def kl(self) -> float:
        """The KL divergence after the step."""
        return self.without[self.layer]


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """The layers kept, the steps to them, and each layer's block influence, where it is known."""

    kept: list[int]
    removals: list[Removal]
    influence: Mapping[int, float]


def choose_by_measurement(
    teacher: nn.Module,
    num_wanted: int,
    batches: Sequence[MicroBatch],
    source: str,
    advance: Callable[[], object] = lambda: None,
) -> LayerChoice:
    """Leave out layers, each time the one without which the predictions change least.

    batches: of held-out text, with labels where a prediction is asked. advance: called behind each
    measurement. Raises InputError where layers can't be told apart or taken away.
    """
    lists = layer_lists(teacher, source)
    if not lists:
        raise InputError(
            f"--choose_layers: {source} has no list of layers to choose from; leave it out"
        )
    reader, answers = reader_of(teacher), KeptRows()
    kept, removals = list(range(teacher.config.num_hidden_layers)), []
    while len(kept) > num_wanted:
        without = {}
        for layer in kept:
            others = [other for other in kept if other != layer]
            kl = _kl_without(teacher, reader, lists, others, batches, answers, source)
            advance()
            if kl is not None:
                without[layer] = kl
        if not without:
            raise InputError(
                f"--choose_layers: no layer of {source} can be left out of {len(kept)}; choose"
                " --layers"
            )
        removals.append(Removal(min(without, key=without.__getitem__), without))
        kept.remove(removals[-1].layer)
    return LayerChoice(kept, removals, block_influence(teacher, batches))


def num_measurements(num_layers: int, num_wanted: int) -> int:
    """Count the measurements of a choice."""
    return sum(range(num_wanted + 1, num_layers + 1))


def _kl_without(
    teacher, reader: Reader, lists, others, batches, answers, source: str
) -> float | None:
    """Measure the KL divergence without a layer; None where a family's pattern forbids it."""
    try:
        config = config_with_layers(teacher.config, others, source)
    except InputError:
        return None
    cut = with_layers(teacher, lists, others, config)
    sums_S = measure(reader_of(cut), reader, batches, answers)
    sums = dict(zip(SUMS, sums_S.tolist(), strict=True))
    return sums["kl"] / sums["positions"]


@torch.no_grad()
def block_influence(teacher: nn.Module, batches: Sequence[MicroBatch]) -> dict[int, float]:
    """Return 1 - the mean cosine of each layer's input and output over real tokens.

    {} for models whose layers cannot be told apart.
    """
    blocks = blocks_of(teacher)
    if blocks is None:
        return {}
    layers, sums = range(len(blocks)), torch.zeros(len(blocks), dtype=torch.float64)
    for batch in batches:
        found = read_outputs(teacher, batch, {"blocks": {EMBEDDINGS, *layers}})["blocks"]
        rows = {layer: rows_of(states, batch, "real")[0] for layer, states in found.items()}
        for layer in layers:  # its input is the output before it, or the embeddings
            before, after = (rows[k].double() for k in (layer - 1, layer))
            sums[layer] += torch.cosine_similarity(before, after, dim=-1).sum().cpu()
    num_rows = sum(len(batch.rows["real"]) for batch in batches)
    return {layer: 1 - total / num_rows for layer, total in enumerate(sums.tolist())}


# --------------------------------------------------------------------------------------------------
# What it costs to leave a layer out
# --------------------------------------------------------------------------------------------------


def _alone(choice: LayerChoice) -> Mapping[int, float]:
    """Return the KL divergence without each layer alone; {} where none was left out."""
    return choice.removals[0].without if choice.removals else {}


def as_markdown(choice: LayerChoice) -> str:
    """Lay out for each layer what its removal costs, alone and in its turn."""
    turns = {removal.layer: number for number, removal in enumerate(choice.removals, 1)}
    alone = _alone(choice)
    lines = [["layer", "KL without it alone", "block influence", "left out", "KL then"]]
    for layer in sorted({*choice.kept, *turns}):
        turn = turns.get(layer)
        after = "" if turn is None else f"{choice.removals[turn - 1].kl:.4f}"
        cells = (
            f"{known[layer]:.4f}" if layer in known else "" for known in (alone, choice.influence)
        )
        lines.append([str(layer), *cells, "kept" if turn is None else f"step {turn}", after])
    return markdown(lines)


def draw(choice: LayerChoice, path: Path, facts: Mapping[str, object]) -> None:
    """Draw what each layer's removal costs alone, and its block influence."""
    layers = sorted({*choice.kept, *(removal.layer for removal in choice.removals)})
    panels = {
        "KL to the teacher without the layer": _alone(choice),
        "block influence: 1 - cosine of input and output": choice.influence,
    }
    with picture(path, 2, (11, 0.32 * len(layers) + 1.2)) as (figure, drawn):
        for panel, (label, values) in zip(drawn, panels.items(), strict=True):
            for place, layer in enumerate(layers):
                look = LOOKS["student" if layer in choice.kept else "first weights"]
                if layer in values:
                    draw_bars(panel, [place], [values[layer]], look, "{:.4f}")
            name_rows(panel, [f"{n}{' (kept)' if n in choice.kept else ''}" for n in layers])
            panel.set_xlabel(label)
        set_heading(figure, "What leaving out one layer costs", facts)


def as_json(choice: LayerChoice) -> dict:
    """Return the choice for extraction.json."""
    return {
        "influence": {str(layer): value for layer, value in choice.influence.items()},
        "removals": [
            {"layer": r.layer, "without": {str(k): v for k, v in r.without.items()}}
            for r in choice.removals
        ],
    }
