"""Token files and counts of the whole vocabulary, converted to the trimmed one."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from distil.vocabulary.pieces import Pieces, WordPiece


@dataclasses.dataclass
class Converter:
    """Converts sequences of old ids to new ones.

    Ids that are all kept map one to one. A sequence with others is tokenized again: word by word
    for WordPiece, whose words can be read from the ids; else as its decoded text, where that gives
    the old ids again; else (counted in num_approximate) each lost piece by itself.
    """

    full: Tokenizer
    trimmed: Tokenizer
    pieces: Pieces
    new_V: np.ndarray  # old id -> new id; -1: lost
    special: frozenset[int]
    num_retokenized: int = 0
    num_approximate: int = 0

    def convert(self, ids_T: np.ndarray) -> np.ndarray:
        """Convert one sequence, boundary tokens included."""
        new_T = self.new_V[ids_T]
        if (new_T >= 0).all():
            return new_T
        self.num_retokenized += 1
        parts: list[int] = []
        for run in self._runs(ids_T.tolist()):
            if run[0] in self.special:
                parts += [int(self.new_V[number]) for number in run]
            elif isinstance(self.pieces, WordPiece):
                parts += self._words(run)
            else:
                parts += self._text(run)
        return np.array(parts, new_T.dtype)

    def _runs(self, ids: Sequence[int]) -> list[list[int]]:
        """Split ids where special tokens begin and end."""
        runs: list[list[int]] = []
        for number in ids:
            if runs and (runs[-1][0] in self.special) == (number in self.special):
                runs[-1].append(number)
            else:
                runs.append([number])
        return runs

    def _words(self, ids: Sequence[int]) -> list[int]:
        """Tokenize the words of WordPiece ids again."""
        prefix, words = self.pieces.prefix, []
        for number in ids:
            piece = self.pieces.piece_of[number]
            if piece.startswith(prefix) and words:
                words[-1].append(number)
            else:
                words.append([number])
        parts = []
        for word in words:
            if all(self.new_V[number] >= 0 for number in word):
                parts += [int(self.new_V[number]) for number in word]
            else:
                first, *rest = (self.pieces.piece_of[number] for number in word)
                text = first + "".join(piece.removeprefix(prefix) for piece in rest)
                parts += [token.id for token in self.trimmed.model.tokenize(text)]
        return parts

    def _text(self, ids: Sequence[int]) -> list[int]:
        """Tokenize the text of ids again; piece by piece where it gives other ids."""
        text = self.full.decode(list(ids), skip_special_tokens=False)
        if self.full.encode(text, add_special_tokens=False).ids == list(ids):
            return self.trimmed.encode(text, add_special_tokens=False).ids
        self.num_approximate += 1
        parts = []
        for number in ids:
            if self.new_V[number] >= 0:
                parts.append(int(self.new_V[number]))
            else:
                piece = self.pieces.piece_of[number]
                parts += [token.id for token in self.trimmed.model.tokenize(piece)]
        return parts
