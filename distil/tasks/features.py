"""From examples to what a model reads: token ids, attention mask, token types, labels; and batches.

Every function of this kind takes (examples, tokenizer, max_length, ids), ids: {label: number}.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distil.tasks.fine_tuning import IGNORED_LABEL
from distil.tasks.schema import Example
from utils import InputError

Feature = dict[str, Any]


def text_features(
    examples: Sequence[Example], tokenizer, max_length: int, ids: Mapping[str, int]
) -> list[Feature]:
    """Tokenize texts or pairs of texts, truncated to max_length from the longer text.

    Without ids, labels are values.
    """
    pairs = list(zip(*(example.texts for example in examples), strict=True))
    if len(pairs) == 2 and tokenizer.sep_token is None:
        # GPT-2 has no other token to separate two texts.
        pairs[1] = [f"{tokenizer.eos_token}{text}" for text in pairs[1]]
    # Token types always: a DistilBERT student's tokenizer omits what its BERT teacher reads.
    encoded = tokenizer(
        *map(list, pairs), truncation=True, max_length=max_length, return_token_type_ids=True
    )
    names = ("input_ids", "attention_mask", "token_type_ids")
    return [
        {name: encoded[name][row] for name in names}
        | {"labels": ids[example.label] if ids else float(example.label)}
        for row, example in enumerate(examples)
    ]


def word_features(
    examples: Sequence[Example], tokenizer, max_length: int, ids: Mapping[str, int]
) -> list[Feature]:
    """Tokenize sentences word by word; the first token of a word has its label, others have none.

    A sentence longer than max_length is split between words. A word without tokens (control
    characters) is skipped, a word longer than max_length truncated. places: (sentence, word) of
    each label, in order.
    """
    words = sorted({word for example in examples for word in example.texts})
    # With a space in front: byte-level tokenizers encode a word at the start of a text differently.
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    tokens = dict(zip(words, encoded, strict=True))
    first, last = (
        [token] if token is not None else []
        for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    )
    room, features = max_length - len(first) - len(last), []
    for number, example in enumerate(examples):
        feature, size = None, 0
        for place, (word, label) in enumerate(zip(example.texts, example.label, strict=True)):
            word_tokens = tokens[word][:room]
            if not word_tokens:
                continue
            if feature is None or size + len(word_tokens) > room:
                feature, size = (
                    {"input_ids": [*first], "labels": [IGNORED_LABEL] * len(first), "places": []},
                    0,
                )
                features.append(feature)
            size += len(word_tokens)
            feature["input_ids"] += word_tokens
            feature["labels"] += [ids[label]] + [IGNORED_LABEL] * (len(word_tokens) - 1)
            feature["places"].append((number, place))
    for feature in features:
        feature["input_ids"] += last
        feature["labels"] += [IGNORED_LABEL] * len(last)
        feature["attention_mask"] = [1] * len(feature["input_ids"])
    return features


def block_features(
    examples: Sequence[Example], tokenizer, max_length: int, ids: Mapping[str, int]
) -> list[Feature]:
    """Tokenize one whole text and cut it into disjoint blocks, without special tokens or the tail.

    Raises InputError where the text is shorter than one block.
    """
    (example,) = examples
    tokens = tokenizer(example.texts[0], add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(tokens) - max_length + 1, max_length)
    if not starts:
        raise InputError(
            f"{example.where}: has {len(tokens)} tokens, fewer than one block of {max_length};"
            " lower --max_seq_length"
        )
    blocks = [tokens[start : start + max_length] for start in starts]
    return [
        {
            "input_ids": block,
            "attention_mask": [1] * max_length,
            "labels": block,
            "num_tokens": len(tokens),
        }
        for block in blocks
    ]


def collator(pad_id: int) -> Callable[[list[Feature]], dict[str, torch.Tensor]]:
    """Return the function that stacks features into a batch, padded on the right."""
    padding = {
        "input_ids": pad_id,
        "attention_mask": 0,
        "token_type_ids": 0,
        "labels": IGNORED_LABEL,
    }

    # Differs from the original: padded to the batch's longest, not to --max_seq_length. Masked
    # positions change no output.
    def collate(features: list[Feature]) -> dict[str, torch.Tensor]:
        width = max(len(feature["input_ids"]) for feature in features)
        return {
            name: torch.tensor([_padded(feature[name], width, fill) for feature in features])
            for name, fill in padding.items()
            if name in features[0]
        }

    return collate


def _padded(values: list[int] | float, width: int, fill: int) -> list[int] | float:
    return values + [fill] * (width - len(values)) if isinstance(values, list) else values
