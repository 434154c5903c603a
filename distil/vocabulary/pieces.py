"""The models of the tokenizers library, and what each needs to split text as before with less.

A text whose pieces are all kept, and none of them unknown, keeps its pieces:

* WordPiece takes the longest entry at each place, and the longest one is still there.
* BPE repeats the merge of the lowest rank. A piece of a text is built by the same merges as the
  piece alone, for no merge crosses the border of two pieces. So a kept piece needs every piece on
  its way; a merge stays where left, right and result stay. At each step the old choice is there,
  and no merge is new.
* Unigram takes the split with the highest sum of scores, and no split is new. The score of an
  unknown character hangs on the lowest score, so the entry that has it stays.
* WordLevel looks words up.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


class Pieces:
    """The entries of one kind of model. content: "model" of a tokenizer.json."""

    prefix = suffix = ""

    def __init__(self, content: Mapping[str, Any], *, is_byte_level: bool):
        self.content, self.is_byte_level = content, is_byte_level
        self.id_of: dict[str, int] = dict(self.entries())
        self.piece_of = {number: piece for piece, number in self.id_of.items()}

    def entries(self) -> Iterable[tuple[str, int]]:
        """Yield (piece, id)."""
        return self.content["vocab"].items()

    def needed(self, number: int) -> set[int]:
        """Return the ids without which an entry would not be found in text, its own among them."""
        return {number}

    def obligatory(self) -> set[int]:
        """Return ids to keep whatever was counted: the unknown token's, and all bytes'."""
        names = [self.content.get("unk_token")]
        if self.is_byte_level:
            names += [byte + end for byte in ByteLevel.alphabet() for end in {"", self.suffix}]
        if self.content.get("byte_fallback"):
            names += BYTE_PIECES
        return self._known(names)

    def characters(self, numbers: Iterable[int]) -> set[int]:
        """Return the ids of the single characters of some entries, in each form that is there."""
        letters = {letter for number in numbers for letter in self._text(self.piece_of[number])}
        forms = {(start, end) for start in ("", self.prefix) for end in ("", self.suffix)}
        return self._known(start + letter + end for letter in letters for start, end in forms)

    def trimmed(self, new_of: Mapping[int, int]) -> dict[str, Any]:
        """Return the model with some entries, under new ids."""
        vocabulary = {
            piece: new_of[number] for piece, number in self.id_of.items() if number in new_of
        }
        return {**self.content, "vocab": dict(sorted(vocabulary.items(), key=lambda one: one[1]))}

    def _known(self, names: Iterable[str | None]) -> set[int]:
        return {self.id_of[name] for name in names if name in self.id_of}

    def _text(self, piece: str) -> str:
        return piece


class WordPiece(Pieces):
    """BERT's model: the longest match, pieces inside a word have a prefix."""

    def __init__(self, content: Mapping[str, Any], **options):
        self.prefix = content["continuing_subword_prefix"] or ""
        super().__init__(content, **options)

    def _text(self, piece: str) -> str:
        return piece.removeprefix(self.prefix)


class WordLevel(Pieces):
    """Words, looked up."""

    def characters(self, numbers: Iterable[int]) -> set[int]:
        """Return nothing: a word is never split."""
        return set()


class BPE(Pieces):
    """Byte-pair encoding: merges of adjacent pieces, in the order of their ranks."""

    def __init__(self, content: Mapping[str, Any], **options):
        self.prefix = content.get("continuing_subword_prefix") or ""
        self.suffix = content.get("end_of_word_suffix") or ""
        super().__init__(content, **options)
        pairs = content["merges"]
        self.pairs = [tuple(p.split(" ", 1)) if isinstance(p, str) else tuple(p) for p in pairs]
        self.rank_of = {pair: rank for rank, pair in enumerate(self.pairs)}

    def needed(self, number: int) -> set[int]:
        """Return the ids of the pieces on the way to an entry."""
        piece = self.piece_of[number]
        parts, found = self._letters(piece), set()
        while True:
            found |= set(parts)
            ranks = [self.rank_of.get(pair, len(self.pairs)) for pair in itertools.pairwise(parts)]
            best = min(ranks, default=len(self.pairs))
            if best == len(self.pairs):
                break
            place = ranks.index(best)
            parts[place : place + 2] = [self._joined(*parts[place : place + 2])]
        # Not by merges: looked up as a whole word (ignore_merges), or never found.
        return self._known(found) | {number} if parts == [piece] else {number}

    def trimmed(self, new_of: Mapping[int, int]) -> dict[str, Any]:
        """Return the model with some entries and the merges among them."""
        kept = {piece for piece, number in self.id_of.items() if number in new_of}
        merges = [
            [left, right]
            for left, right in self.pairs
            if {left, right, self._joined(left, right)} <= kept
        ]
        return {**super().trimmed(new_of), "merges": merges}

    def _joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.prefix)

    def _text(self, piece: str) -> str:
        return piece.removeprefix(self.prefix).removesuffix(self.suffix)

    def _letters(self, piece: str) -> list[str]:
        """Split an entry as the model splits a word before its first merge."""
        parts = list(self._text(piece))
        if not parts:
            return [piece]
        inside = self.prefix and piece.startswith(self.prefix)
        parts = [self.prefix * bool(k or inside) + part for k, part in enumerate(parts)]
        if self.suffix and piece.endswith(self.suffix):
            parts[-1] += self.suffix
        return parts


class Unigram(Pieces):
    """SentencePiece's Unigram: entries with scores, ids by their place in the list."""

    def entries(self) -> Iterable[tuple[str, int]]:
        """Yield (piece, id)."""
        return ((piece, number) for number, (piece, _) in enumerate(self.content["vocab"]))

    def obligatory(self) -> set[int]:
        """Add the unknown token, the entry with the lowest score, and the space."""
        scores = np.array([score for _, score in self.content["vocab"]])
        unknown = self.content["unk_id"]
        own = {int(scores.argmin())} | ({unknown} if unknown is not None else set())
        return super().obligatory() | own | self._known(["▁"])

    def trimmed(self, new_of: Mapping[int, int]) -> dict[str, Any]:
        """Return the model with some entries, scores as they are."""
        kept = sorted((new, old) for old, new in new_of.items() if old < len(self.content["vocab"]))
        unknown = self.content["unk_id"]
        return {
            **self.content,
            "vocab": [self.content["vocab"][old] for _, old in kept],
            "unk_id": None if unknown is None else new_of[unknown],
        }


KINDS = {kind.__name__: kind for kind in (WordPiece, BPE, Unigram, WordLevel)}
