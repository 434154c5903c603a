"""Training sequences: split and filtered as in 2019, batches, pickles that execute nothing."""

import os
import pickle

import numpy as np
import pytest
import torch
from conftest import as_uint16, load_golden, write_pickle
from stand_ins import model_facts

from distil.data.token_files import SpecialIds, TokenFile, check_ids_below, open_token_file
from lm_seqs_dataset import LmSeqsDataset, read_token_counts
from utils import InputError

SPECIAL = SpecialIds(start=1, end=2, pad=0, unknown=3)


def make_dataset(sequences, special: SpecialIds, max_length: int) -> LmSeqsDataset:
    arrays = [np.asarray(sequence) for sequence in sequences]
    tokens = TokenFile("tokens", np.concatenate(arrays), np.array([len(array) for array in arrays]))
    return LmSeqsDataset(tokens, special, max_length)


def read_counts(path):
    return read_token_counts(path, model_facts(3, "a teacher"))


def golden_special(case) -> SpecialIds:
    ids = case["special_ids"]
    if case["mlm"]:
        return SpecialIds(ids["cls_token"], ids["sep_token"], ids["pad_token"], ids["unk_token"])
    return SpecialIds(ids["bos_token"], ids["eos_token"], ids["unk_token"], ids["unk_token"])


@pytest.mark.parametrize(
    "case",
    load_golden("parity.json")["dataset"],
    ids=lambda c: f"{c['max_model_input_size']}-{c['mlm']}",
)
def test_sequences_equal_the_2019_code(case):
    dataset = make_dataset(case["input"], golden_special(case), case["max_model_input_size"])
    assert [dataset[k].tolist() for k in range(len(dataset))] == case["output"]
    assert dataset.lengths.tolist() == case["lengths"]


def test_a_batch_is_padded_to_its_longest_sequence():
    sequences = [[1, *range(10, 10 + n), 2] for n in (12, 30, 17)]
    dataset = make_dataset(sequences, SPECIAL, 64)
    token_ids_BT, lengths_B = dataset.collate([1, 0])
    assert token_ids_BT.dtype == lengths_B.dtype == torch.int64
    assert lengths_B.tolist() == [32, 14]
    assert token_ids_BT.tolist() == [sequences[1], sequences[0] + [0] * 18]


def test_nothing_is_copied_by_splitting():
    long = np.array([1, *np.arange(500) % 40 + 5, 2], dtype=np.uint16)
    dataset = LmSeqsDataset(TokenFile("tokens", long, np.array([len(long)])), SPECIAL, 34)
    assert dataset.tokens.ids_M is long and dataset.lengths.max() == 34
    inner = np.concatenate([dataset[k][1:-1] for k in range(len(dataset))])
    assert inner.tolist() == long[1:-1].tolist()[: len(inner)]


def test_a_sequence_without_boundary_tokens_is_named():
    with pytest.raises(
        InputError,
        match=r"the data: sequence 1 begins with id 7 and ends with id 2, expected 1 and 2 \(1 such"
        " sequence near it\\)",
    ):
        make_dataset([[1, 9, 2], [7, 9, 2]], SPECIAL, 64)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("read", [open_token_file, read_counts])
def test_a_pickle_that_executes_code_is_refused_unexecuted(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "evil.pickle", [Evil()])
    with pytest.raises(InputError, match="evil.pickle: not a readable pickle"):
        read(path)
    assert not (tmp_path / "executed").exists()


def test_only_exact_names_are_admitted_to_a_pickle(tmp_path):
    code = b"\x80\x04cnumpy.testing\nrundocs\n."
    path = tmp_path / "prefix.pickle"
    path.write_bytes(code)
    with pytest.raises(InputError, match="numpy.testing.rundocs"):
        open_token_file(path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_token_files_of_any_pickle_protocol_are_read(protocol, tmp_path):
    path = tmp_path / "data.pickle"
    path.write_bytes(pickle.dumps(as_uint16([[1, 5, 2], [1, 6, 7, 2]]), protocol=protocol))
    tokens = open_token_file(path)
    ids_M, lengths_N = tokens.ids_M, tokens.lengths_N
    assert ids_M.tolist() == [1, 5, 2, 1, 6, 7, 2] and lengths_N.tolist() == [3, 4]


@pytest.mark.parametrize(
    "content, found",
    [
        ([], "an empty list"),
        ({}, "got dict"),
        ([np.array([1.5])], "sequence 0 is float64"),
        ([np.array([[1]])], "sequence 0 is int64 of shape"),
        ([np.array([1, 2]), np.array([], dtype=np.uint16)], "sequence 1 is uint16 of shape"),
        ([1, 2], "sequence 0 is int"),
        ([[1, [2], 3]], "sequence 0 is list"),
        (np.array([1, 2]), "got ndarray"),
    ],
)
def test_a_pickle_of_something_else_is_named(content, found, tmp_path):
    path = write_pickle(tmp_path / "data.pickle", content)
    with pytest.raises(InputError, match=found) as caught:
        open_token_file(path)
    assert "data.pickle" in str(caught.value)


@pytest.mark.parametrize("content", [[], [1, -1], ["a"], [1.5], {"a": 1}, [[1, 2], [3]], 7])
def test_counts_of_another_kind_are_refused(content, tmp_path):
    with pytest.raises(InputError, match="counts.pickle"):
        read_counts(write_pickle(tmp_path / "counts.pickle", content))


def test_a_cut_off_pickle_is_named(tmp_path):
    path = tmp_path / "data.pickle"
    whole = pickle.dumps(as_uint16([[1, 5, 2]] * 50))
    for size in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="data.pickle"):
            open_token_file(path)


def test_an_id_outside_the_vocabulary_is_named_with_both_files():
    with pytest.raises(
        InputError,
        match=r"data\.pickle: token id 30 is outside the vocabulary of teacher, ids 0 to 29",
    ):
        check_ids_below(np.array([3, 30, 4]), 30, "data.pickle", "teacher")
