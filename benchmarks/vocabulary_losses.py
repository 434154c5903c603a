"""Losses that models of different vocabularies can be compared by: a character, not an id.

A masked model predicts whole words, all pieces of a word masked together and the same words of the
text whatever the pieces; a causal model predicts a whole text. The divergence from the teacher is
taken over the kept entries, on texts whose ids are all kept.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from distil.vocabulary.choice import Choice

BATCH_TEXTS = 16


@dataclasses.dataclass(frozen=True)
class Example:
    """Ids that go in, the places whose logits are read, the ids that are right there."""

    ids: list[int]
    places: list[int]
    targets: list[int]
    characters: int

    def renumbered(self, new_of: Mapping[int, int]) -> "Example":
        """Return the same under the new ids. Raises KeyError for a lost one."""
        ids, targets = ([new_of[k] for k in old] for old in (self.ids, self.targets))
        return dataclasses.replace(self, ids=ids, targets=targets)


def chunks_of(lines: Sequence[str], num_words: int) -> list[str]:
    """Cut lines into texts of num_words words; what is left of a line is dropped."""
    words = [line.split() for line in lines]
    return [
        " ".join(line[k : k + num_words])
        for line in words
        for k in range(0, len(line) - num_words + 1, num_words)
    ]


def words_of(tokenizer, text: str) -> dict[int, tuple[int, int]]:
    """Find the words of a text without unknown pieces: number -> (start, end) in the text."""
    encoding = tokenizer.backend_tokenizer.encode(text)
    spans: dict[int, tuple[int, int]] = {}
    for number, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if number is not None:
            spans[number] = (min(start, spans.get(number, (start, end))[0]), end)
    pairs = zip(encoding.word_ids, encoding.ids, strict=True)
    unknown = {number for number, id_ in pairs if id_ == tokenizer.unk_token_id}
    return {number: span for number, span in spans.items() if number not in unknown}


def masked_words(
    tokenizers: Sequence, texts: Sequence[str], one_of: int
) -> list[dict[int, tuple[int, int]]]:
    """Choose every one_of-th word that no tokenizer finds unknown, by its number, of each text."""
    found = []
    for place, text in enumerate(texts):
        first, *others = (words_of(tokenizer, text) for tokenizer in tokenizers)
        common = {n: span for n, span in first.items() if all(o.get(n) == span for o in others)}
        found.append({n: span for n, span in common.items() if n % one_of == place % one_of})
    return found


def masked_example(tokenizer, text: str, words: Mapping[int, tuple[int, int]]) -> Example:
    """Mask all pieces of some words."""
    encoding = tokenizer.backend_tokenizer.encode(text)
    places = [place for place, number in enumerate(encoding.word_ids) if number in words]
    ids, characters = list(encoding.ids), sum(end - start for start, end in words.values())
    targets = [ids[place] for place in places]
    for place in places:
        ids[place] = tokenizer.mask_token_id
    return Example(ids, places, targets, characters)


def causal_example(tokenizer, text: str) -> Example:
    """Predict each piece from the start token and the pieces before it."""
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    places = list(range(len(ids)))
    return Example([tokenizer.bos_token_id, *ids[:-1]], places, ids, len(text))


def is_kept(tokenizer, text: str, kept: set[int]) -> bool:
    """True if all ids of a text are kept, none of them unknown."""
    ids = set(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    return ids <= kept - {tokenizer.unk_token_id}


@torch.no_grad()
def logits_of(
    network: nn.Module, examples: Sequence[Example]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits_NV, targets_N) of some examples at a time."""
    network.eval()
    for first in range(0, len(examples), BATCH_TEXTS):
        some = examples[first : first + BATCH_TEXTS]
        longest = max(len(one.ids) for one in some)
        ids_BT = torch.zeros(len(some), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, one in enumerate(some):
            ids_BT[row, : len(one.ids)] = torch.tensor(one.ids)
            mask_BT[row, : len(one.ids)] = 1
        logits_BTV = network(input_ids=ids_BT, attention_mask=mask_BT).logits
        rows = [row for row, one in enumerate(some) for _ in one.places]
        places = [place for one in some for place in one.places]
        yield logits_BTV[rows, places], torch.tensor([t for one in some for t in one.targets])


def loss_a_character(network: nn.Module, examples: Sequence[Example]) -> float:
    """Return the negative log-likelihood of the targets, in nats a character."""
    total = 0.0
    for logits_NV, targets_N in logits_of(network, examples):
        losses_N = nn.functional.cross_entropy(logits_NV.double(), targets_N, reduction="none")
        total += float(losses_N.sum())
    return total / sum(one.characters for one in examples)


def kl_over_kept(
    teacher: nn.Module,
    student: nn.Module,
    examples: Sequence[Example],
    choice: Choice,
    *,
    is_trimmed: bool,
) -> float:
    """Return the mean KL(teacher || student), each renormalised over the kept entries.

    examples: in the ids of the whole vocabulary, all kept. is_trimmed: the student has the kept
    entries alone.
    """
    kept_K, total, number = torch.from_numpy(choice.kept_K), 0.0, 0
    own = [one.renumbered(choice.new_of) for one in examples] if is_trimmed else examples
    pairs = zip(logits_of(teacher, examples), logits_of(student, own), strict=True)
    for (whole_NV, _), (found_NV, targets_N) in pairs:
        found_NK = found_NV if is_trimmed else found_NV[:, kept_K]
        log_p_NK = whole_NV[:, kept_K].double().log_softmax(-1)
        log_q_NK = found_NK.double().log_softmax(-1)
        total += float((log_p_NK.exp() * (log_p_NK - log_q_NK)).sum())
        number += len(targets_N)
    return total / number
