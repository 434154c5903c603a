"""What a trimmed vocabulary keeps and saves: figures, their table, a picture."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer

from distil.data.decoding import texts_of
from distil.data.hub_datasets import find_files
from distil.data.text_sources import read_blocks
from distil.flops import size_of
from distil.reporting.plots import LOOKS, draw_line, picture, set_heading
from distil.reporting.tables import digits, markdown, megas, share
from distil.vocabulary.choice import Choice

LENGTH = 128  # ids of the sequence that model FLOPs are counted for


@dataclasses.dataclass
class HeldOut:
    """Counts over held-out text: ids and words of the whole vocabulary, and what became of them.

    changed: words with other pieces; newly_unknown: those of them with an unknown piece that had
    none.
    """

    ids: int = 0
    kept_ids: int = 0
    words: int = 0
    changed: int = 0
    newly_unknown: int = 0
    new_ids: int = 0

    def shares(self) -> dict[str, float]:
        """Return the shares, and by how much the text becomes longer."""
        ids, words = max(self.ids, 1), max(self.words, 1)
        return {
            "ids_kept": self.kept_ids / ids,
            "words_changed": self.changed / words,
            "words_newly_unknown": self.newly_unknown / words,
            "longer": self.new_ids / ids,
        }


def lines_of(path: str, text_field: str, errors: str) -> list[str]:
    """Read a text's lines, as binarized_data.py does. Raises InputError."""
    flag, lines = "--held_out", []
    for source in find_files(path, flag=flag):
        for block in read_blocks(source, text_field, flag):
            lines += texts_of(block, text_field, errors, flag)[0]
    return [text for line in lines if (text := line.strip())]


def compare_on_text(
    lines: Iterable[str], full: Tokenizer, trimmed: Tokenizer, choice: Choice, unknown: str | None
) -> HeldOut:
    """Tokenize lines with both tokenizers and compare, word by word. unknown: the token's text."""
    found, kept = HeldOut(), set(map(int, choice.kept_K))
    lines = list(lines)
    pairs = (backend.encode_batch(lines, add_special_tokens=False) for backend in (full, trimmed))
    for old, new in zip(*pairs, strict=True):
        found.ids += len(old.ids)
        found.new_ids += len(new.ids)
        found.kept_ids += sum(number in kept for number in old.ids)
        words, others = _words(old), _words(new)
        found.words += len(words)
        for number, pieces in words.items():
            now = others.get(number)
            found.changed += pieces != now
            found.newly_unknown += unknown in (now or []) and unknown not in pieces
    return found


def _words(encoding: Encoding) -> dict[Any, list[str]]:
    """Group pieces by the word that they are of; added tokens count as words of their own."""
    words: dict[Any, list[str]] = {}
    for place, (number, piece) in enumerate(zip(encoding.word_ids, encoding.tokens, strict=True)):
        words.setdefault(("added", place) if number is None else number, []).append(piece)
    return words


def sizes_of(network: torch.nn.Module) -> dict[str, float]:
    """Count a network's entries, parameters, and model FLOPs a token of a forward pass."""
    flops = size_of(network).forward_flops(np.array([LENGTH])) / LENGTH
    parameters = {id(one): one.numel() for one in network.parameters()}
    return {
        "entries": network.config.vocab_size,
        "parameters": sum(parameters.values()),
        "flops_a_token": flops,
    }


def table(before: dict, after: dict, choice: Choice, held_out: HeldOut | None) -> str:
    """Lay the figures out."""
    rows = [["", "before", "after", "after / before"]]
    for title, name, scale, write in (
        ("vocabulary entries", "entries", 1, digits),
        ("parameters (M)", "parameters", 1e6, megas),
        (f"MFLOP a token, forward, {LENGTH} ids", "flops_a_token", 1e6, digits),
    ):
        old, new = before[name] / scale, after[name] / scale
        rows.append([title, write(old), write(new), f"{new / old:.3f}"])
    lines = [markdown(rows), "", f"Counted ids that are kept: {share_of(choice.coverage)}."]
    if held_out:
        found = held_out.shares()
        lines.append(
            f"Held-out text: {share_of(found['ids_kept'])} of {held_out.ids:,} ids are kept;"
            f" {share_of(found['words_changed'])} of {held_out.words:,} words have other pieces,"
            f" {share_of(found['words_newly_unknown'])} become unknown;"
            f" {found['longer']:.4f} x as many ids."
        )
    return "\n".join(lines)


def share_of(value: float) -> str:
    """Write a share with the digits that tell 99.9 from 99.99 %."""
    return share(value) if value < 0.99 else f"{value:.3%}"


def draw_coverage(path: str | os.PathLike, choice: Choice, facts: dict[str, Any]) -> None:
    """Draw what share of the counted ids how many entries cover, and the entries that are kept."""
    entries, shares = zip(*choice.curve, strict=True)
    with picture(path, 1, (8, 4.2)) as (figure, (panel,)):
        draw_line(panel, entries, [100 * share for share in shares], LOOKS["count"])
        panel.axvline(len(choice.kept_K), color="black", linewidth=1, linestyle="--")
        panel.set(xlabel="vocabulary entries (number)", ylabel="counted ids covered (%)")
        set_heading(figure, "Coverage by the most frequent entries (dashed: kept)", facts)
