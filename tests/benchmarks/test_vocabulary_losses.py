"""Losses across vocabularies: by hand on tiny teachers, equal where the models are equal."""

import re

import numpy as np
import pytest
import torch
import transformers

from benchmarks.vocabularies_trained import held_out_examples, table
from benchmarks.vocabulary_losses import (
    chunks_of,
    is_kept,
    kl_over_kept,
    loss_a_character,
    masked_words,
)
from distil.models.architectures import ARCHITECTURES
from distil.models.export import tokenizer_for
from distil.vocabulary.choice import choose, pieces_of, special_numbers, trimmed_tokenizer
from distil.vocabulary.folder import renumbered_tokenizer
from distil.vocabulary.network import trim_network

AUTO = {"bert": transformers.AutoModelForMaskedLM, "gpt2": transformers.AutoModelForCausalLM}


@pytest.fixture(scope="module", params=list(AUTO))
def pair(request, teachers, lines):
    """A tiny teacher, trimmed: (networks, tokenizers, choice, examples, examples on kept text)."""
    kind = request.param
    whole = AUTO[kind].from_pretrained(teachers[kind]).eval()
    full = transformers.AutoTokenizer.from_pretrained(teachers[kind])
    backend, counts_V = full.backend_tokenizer, np.zeros(len(full), np.int64)
    for encoding in backend.encode_batch(lines[:40], add_special_tokens=False):
        np.add.at(counts_V, encoding.ids, 1)
    pieces, special = pieces_of(backend, "teacher"), special_numbers(backend)
    special |= set(full.all_special_ids)
    choice = choose(pieces, special, counts_V, None, 0.9)
    cut = trimmed_tokenizer(backend, pieces, choice.new_of)
    trimmed = trim_network(whole, choice.kept_K, choice.new_of, "teacher").eval()
    own = renumbered_tokenizer(full, cut, choice.new_of, ARCHITECTURES[kind], trimmed.config)
    tokenizers = {"whole": full, "trimmed": tokenizer_for(trimmed, own)}
    found = held_out_examples(lines[40:60], tokenizers, choice, kind == "bert", (10, 6))
    return {"whole": whole, "trimmed": trimmed}, tokenizers, choice, *found


def log_probabilities(network, example) -> list[torch.Tensor]:
    with torch.no_grad():
        logits_TV = network(torch.tensor([example.ids])).logits[0].double()
    return [logits_TV[place].log_softmax(-1) for place in example.places]


def test_the_loss_a_character_is_the_sum_over_pieces_by_hand(pair):
    networks, _, _, examples, _ = pair
    for name, network in networks.items():
        total, characters = 0.0, 0
        for one in examples[name]:
            rows = log_probabilities(network, one)
            total -= sum(float(row[k]) for row, k in zip(rows, one.targets, strict=True))
            characters += one.characters
        assert loss_a_character(network, examples[name]) == pytest.approx(total / characters, 1e-5)


def test_both_vocabularies_are_measured_on_the_same_text(pair):
    _, tokenizers, choice, examples, kept = pair
    texts = []
    for name, tokenizer in tokenizers.items():
        unspaced = [tokenizer.decode(one.targets).replace(" ", "") for one in examples[name]]
        texts.append(unspaced)
        if tokenizer.mask_token_id is None:
            continue
        for one, text in zip(examples[name], unspaced, strict=True):
            assert one.characters == len(text) > 0
            assert {one.ids[place] for place in one.places} == {tokenizer.mask_token_id}
            assert one.ids.count(tokenizer.mask_token_id) == len(one.places)
    assert texts[0] == texts[1] and len(texts[0]) > 5
    pieces = [sum(len(one.targets) for one in examples[name]) for name in tokenizers]
    assert pieces[1] > pieces[0], "nothing falls back"
    assert kept and all(set(one.ids + one.targets) <= set(choice.new_of) for one in kept)


def test_a_trimmed_teacher_diverges_as_the_whole_one_does(pair):
    networks, _, choice, _, kept = pair
    torch.manual_seed(0)
    students = {name: type(one)(one.config).eval() for name, one in networks.items()}
    state = students["whole"].state_dict()
    small = students["trimmed"].state_dict()
    kept_K = torch.from_numpy(choice.kept_K)
    students["trimmed"].load_state_dict(
        {k: v if v.shape == small[k].shape else v[kept_K] for k, v in state.items()}
    )
    teacher, options = networks["whole"], {"whole": False, "trimmed": True}
    found = {
        name: kl_over_kept(teacher, student, kept, choice, is_trimmed=options[name])
        for name, student in students.items()
    }
    assert found["trimmed"] == pytest.approx(found["whole"], rel=1e-5) and found["whole"] > 0.1
    same = kl_over_kept(teacher, networks["trimmed"], kept, choice, is_trimmed=True)
    assert same == pytest.approx(0, abs=1e-8)
    total, number = 0.0, 0
    for one in kept:
        rows = zip(*(log_probabilities(x, one) for x in (teacher, students["whole"])), strict=True)
        for p_V, q_V in rows:
            p_K, q_K = (row[kept_K].exp() / row[kept_K].exp().sum() for row in (p_V, q_V))
            total += sum(float(p * (p / q).log()) for p, q in zip(p_K, q_K, strict=True))
            number += 1
    assert found["whole"] == pytest.approx(total / number, rel=1e-5)


def test_a_word_that_a_tokenizer_finds_unknown_is_not_measured(teachers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["bert"])
    text = "bake limo \u4eba kera"  # the third word's character is in no vocabulary
    (words,) = masked_words([tokenizer], [text], 1)
    assert sorted(text[start:end] for start, end in words.values()) == ["bake", "kera", "limo"]
    everything = set(range(len(tokenizer)))
    assert not is_kept(tokenizer, text, everything)
    assert is_kept(tokenizer, "bake limo kera", everything)


def test_texts_are_cut_into_equal_numbers_of_words():
    assert chunks_of(["a b c d e", "f", "g h"], 2) == ["a b", "c d", "g h"]


def test_the_table_holds_the_mean_and_the_farthest_seed():
    others = {"loss_on_kept": 1.0, "kl": 0.5}
    runs = [
        {"parameters": 2e6, "updates": 9, "cpu_s": 2 * loss, "loss": loss, **others}
        for loss in (1.0, 1.1, 1.5)
    ]
    line = table({"whole": runs}, {"whole": 0.25}).splitlines()[-1]
    cells = re.split(r"\s*\|\s*", line.strip("| "))
    assert cells == ["whole", "2.0", "9", "0.25", "2", "1.2000 ± 0.3000", *cells[6:]]
    assert cells[6:] == ["1.0000 ± 0.0000", "0.5000 ± 0.0000"]
