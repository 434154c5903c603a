"""Token files: formats of equal content, the store's layout, damage is named, nothing executed."""

import json
import math
import pickle
import random
import re
import struct

import numpy as np
import pytest
from conftest import as_uint16, load_golden, write_pickle
from stand_ins import model_facts

from distil.data import cards, safe_pickle, token_files
from distil.data.cards import write_token_counts
from distil.data.token_files import SpecialIds, open_token_file, writing_tokens
from lm_seqs_dataset import LmSeqsDataset, read_token_counts
from utils import InputError

FORMATS = ("pickle", "store")
TOKENIZER = {
    "name": "t",
    "vocab_size": 100,
    "vocabulary_sha256": "a" * 64,
    "special_ids": {"start": 1, "end": 2, "pad": 0, "unknown": 3},
}
OTHER = TOKENIZER | {"vocabulary_sha256": "b" * 64}


def of_100(source: str, facts: dict | None = None):
    """Stand in for a model of 100 entries."""
    return model_facts(100, source, SpecialIds(1, 2, 0, 3), facts=facts)


def random_sequences(num: int, seed: int = 0, largest: int = 99) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *rng.choices(range(4, largest + 1), k=rng.randint(1, 60)), 2] for _ in range(num)]


def write_tokens(
    path, file_format: str, sequences, dtype=np.uint16, card=None, pieces: int = 3
) -> str:
    """Write sequences in several appends; return the value for --data_file."""
    with writing_tokens(str(path), file_format, np.dtype(dtype)) as (writer, written_card):
        for k in range(0, len(sequences), max(len(sequences) // pieces, 1)):
            part = sequences[k : k + max(len(sequences) // pieces, 1)]
            writer.append(
                np.concatenate([np.asarray(s) for s in part]), np.array([len(s) for s in part])
            )
        written_card |= card or {}
    return str(path)


def sequences_of(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.ids_M, np.cumsum(tokens.lengths_N)[:-1])]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dtype, largest", [(np.uint16, 65535), (np.int32, 119_546)])
@pytest.mark.parametrize("num", [1, 999, 1000, 1001, 2500])
def test_what_is_written_is_read_back(file_format, dtype, largest, num, tmp_path):
    sequences = random_sequences(num, largest=largest)
    tokens = open_token_file(write_tokens(tmp_path / "data", file_format, sequences, dtype))
    assert sequences_of(tokens) == sequences
    assert tokens.ids_M.dtype == dtype


def test_the_pickle_is_a_plain_list_of_writable_arrays(tmp_path):
    path = write_tokens(tmp_path / "data.pickle", "pickle", random_sequences(1500))
    content = pickle.loads((tmp_path / "data.pickle").read_bytes())
    assert type(content) is list and {type(ids) for ids in content} == {np.ndarray}
    assert all(ids.dtype == np.uint16 and ids.ndim == 1 and ids.flags.writeable for ids in content)
    assert [ids.tolist() for ids in content] == sequences_of(open_token_file(path))


@pytest.mark.parametrize("protocol", [*range(2, 6), "ours"])
def test_ids_are_read_from_a_pickle_without_making_arrays(protocol, tmp_path):
    sequences = random_sequences(300)
    path = tmp_path / "data"
    if protocol == "ours":
        write_tokens(path, "pickle", sequences)
    else:
        path.write_bytes(pickle.dumps(as_uint16(sequences), protocol=protocol))
    ids_M, lengths_N = safe_pickle.read_arrays(str(path))
    assert ids_M.dtype == np.uint16 and ids_M.tolist() == [
        i for sequence in sequences for i in sequence
    ]
    assert lengths_N.tolist() == list(map(len, sequences))


def test_pickles_that_are_not_plain_lists_of_arrays_are_read_as_objects(tmp_path):
    one = np.array([1, 5, 2], np.uint16)
    readable = [[one, one], [one, np.array([1, 5, 2])], [one, [1, 5, 2]]]
    others = [[one.reshape(1, 3)], [one[:0]], [one * 1.5], (one,), [one, [one]]]
    for content in [*readable, *others]:
        path = write_pickle(tmp_path / "data", content)
        assert safe_pickle.read_arrays(path) is None or content is readable[0]
    for content in readable:
        assert (
            sequences_of(open_token_file(write_pickle(tmp_path / "data", content)))
            == [[1, 5, 2]] * 2
        )


def test_the_stores_bytes_follow_the_published_layout(tmp_path):
    """Check Megatron-LM's indexed dataset, version 1, field by field."""
    sequences = random_sequences(7)
    write_tokens(tmp_path / "data", "store", sequences)
    index = (tmp_path / "data.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_documents = struct.unpack("<QBQQ", index[9:34])
    assert (version, code, num_sequences, num_documents) == (1, 8, 7, 8)  # 8: uint16
    lengths = [len(sequence) for sequence in sequences]
    assert struct.unpack("<7i", index[34:62]) == tuple(lengths)
    assert struct.unpack("<7q", index[62:118]) == tuple(2 * sum(lengths[:k]) for k in range(7))
    assert struct.unpack("<8q", index[118:]) == tuple(range(8))
    flat = [i for sequence in sequences for i in sequence]
    assert (tmp_path / "data.bin").read_bytes() == struct.pack(f"<{len(flat)}H", *flat)


def test_a_store_is_named_by_its_prefix_or_any_of_its_files(tmp_path):
    path = write_tokens(tmp_path / "data.v1", "store", random_sequences(5))
    for name in (path, f"{path}.bin", f"{path}.idx", f"{path}.json"):
        assert len(open_token_file(name).lengths_N) == 5


def test_a_store_of_another_program_is_read_without_a_card(tmp_path, caplog):
    path = write_tokens(tmp_path / "data", "store", random_sequences(5))
    (tmp_path / "data.json").unlink()
    index = (tmp_path / "data.idx").read_bytes()
    (tmp_path / "data.idx").write_bytes(
        index + b"\0" * 5
    )  # the modes that Megatron-LM writes for several modalities
    assert sequences_of(open_token_file(path)) == random_sequences(5)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "case",
    load_golden("parity.json")["dataset"],
    ids=lambda c: f"{c['max_model_input_size']}-{c['mlm']}",
)
def test_sequences_from_either_format_equal_the_2019_code(case, file_format, tmp_path):
    ids = case["special_ids"]
    roles = (
        ("cls_token", "sep_token", "pad_token")
        if case["mlm"]
        else ("bos_token", "eos_token", "unk_token")
    )
    special = SpecialIds(*(ids[role] for role in roles), ids["unk_token"])
    path = write_tokens(tmp_path / "data", file_format, case["input"])
    dataset = LmSeqsDataset(open_token_file(path), special, case["max_model_input_size"])
    assert [dataset[k].tolist() for k in range(len(dataset))] == case["output"]
    assert dataset.lengths.tolist() == case["lengths"]


def card_for(sequences, many_unknown="list") -> dict:
    """Make the part of a card that saves reading the ids."""
    flat = [i for sequence in sequences for i in sequence]
    listed = [k for k, s in enumerate(sequences) if s.count(3) >= token_files.MANY_UNKNOWN]
    inside = flat.count(1) + flat.count(2) - 2 * len(sequences)
    return {
        "tokenizer": TOKENIZER,
        "counts": {"largest_id": max(flat), "boundary_ids_inside": inside},
        "many_unknown": listed if many_unknown == "list" else None,
    }


@pytest.mark.parametrize("many_unknown", ["list", "too many to list"])
@pytest.mark.parametrize("inner_boundaries", [False, True])
@pytest.mark.parametrize("max_length", [12, 20, 64])
def test_a_card_saves_reading_ids_but_changes_nothing(
    many_unknown, inner_boundaries, max_length, tmp_path
):
    rng = random.Random(max_length)
    kinds = [3, *range(4, 40)] + [1, 2] * inner_boundaries
    weights = [30, *[1] * 36] + [2, 2] * inner_boundaries
    sequences = [[1, *rng.choices(kinds, weights, k=rng.randint(1, 90)), 2] for _ in range(400)]
    special = SpecialIds(1, 2, 0, 3)
    datasets = [
        LmSeqsDataset(
            open_token_file(write_tokens(tmp_path / name, "store", sequences, card=card)),
            special,
            max_length,
        )
        for name, card in (("with", card_for(sequences, many_unknown)), ("without", None))
    ]
    assert 0 < len(datasets[0]) < sum(-(-len(s) // (max_length - 2)) for s in sequences), (
        "some are left out"
    )
    for name in ("starts", "lengths", "adds_start", "adds_end"):
        assert np.array_equal(*(getattr(dataset, name) for dataset in datasets)), name


def test_many_unknown_is_the_smallest_number_that_matters():
    """The shortest piece that is kept has MIN_LENGTH + 1 ids, half of them MANY_UNKNOWN."""
    assert (
        math.ceil((token_files.MIN_LENGTH + 1) * token_files.MAX_UNKNOWN_SHARE)
        == token_files.MANY_UNKNOWN
        == 6
    )


# --------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------


def read_everything(path: str) -> None:
    """Read a token file as training does: open it, and touch every sequence."""
    dataset = LmSeqsDataset.from_file(path, of_100("a teacher", TOKENIZER))
    dataset.collate(np.arange(len(dataset)))


def written(tmp_path, file_format: str, num: int = 3000) -> tuple[str, list]:
    sequences = random_sequences(num)
    path = write_tokens(tmp_path / "data", file_format, sequences, card=card_for(sequences))
    names = (
        ["data", "data.json"] if file_format == "pickle" else ["data.bin", "data.idx", "data.json"]
    )
    return path, [tmp_path / name for name in names]


@pytest.mark.parametrize("file_format", FORMATS)
def test_no_flipped_bit_is_trained_on_silently(file_format, tmp_path):
    path, files = written(tmp_path, file_format)
    read_everything(path)
    rng = random.Random(1)
    for file in files:
        whole = file.read_bytes()
        for _ in range(40):
            place = rng.randrange(len(whole))
            file.write_bytes(
                whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
            )
            with pytest.raises(InputError, match="data"):
                read_everything(path)
        file.write_bytes(whole)
    read_everything(path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_cut_off_zeroed_and_swapped_files_are_named(file_format, tmp_path):
    path, files = written(tmp_path, file_format)
    for file in files:
        whole = file.read_bytes()
        half, block = len(whole) // 2, min(2**16, len(whole) // 4)
        swapped = whole[block : 2 * block] + whole[:block] + whole[2 * block :]
        zeroed = whole[:half] + bytes(block) + whole[half + block :]
        for damaged in (b"", whole[:1], whole[:half], whole[:-2], whole + b"\0", swapped, zeroed):
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=re.escape(str(file))):
                read_everything(path)
        file.write_bytes(whole)


def test_a_damaged_block_is_named_with_its_place(tmp_path):
    path, (data, *_) = written(tmp_path, "store")
    whole = bytearray(data.read_bytes())
    whole[2**16 + 5] ^= 1
    data.write_bytes(whole)
    with pytest.raises(
        InputError, match=r"data\.bin: bytes 65536 to 131071 differ from their checksum"
    ):
        read_everything(path)


def test_mixed_files_of_two_stores_are_refused(tmp_path):
    """As a crash between two renames leaves them, or a hand that copies one file only."""
    first, _ = written(tmp_path, "store")
    other = write_tokens(tmp_path / "other", "store", random_sequences(3000)[::-1])
    for suffix in (".bin", ".idx", ".json"):
        mine = (tmp_path / f"data{suffix}").read_bytes()
        (tmp_path / f"data{suffix}").write_bytes((tmp_path / f"other{suffix}").read_bytes())
        with pytest.raises(InputError, match="data"):
            read_everything(first)
        (tmp_path / f"data{suffix}").write_bytes(mine)
    read_everything(first)
    open_token_file(other)


BAD_STORES = {
    "another magic": (lambda index: b"TNTIDX\0\0\0" + index[9:], "is not the index of a store"),
    "another version": (
        lambda index: index[:9] + struct.pack("<Q", 2) + index[17:],
        "is of version 2, expected 1",
    ),
    "floats": (
        lambda index: index[:17] + b"\x07" + index[18:],
        "its dtype code 7 is not of integers",
    ),
    "another width": (
        lambda index: index[:17] + b"\x04" + index[18:],
        "does not follow from those before it",
    ),
    "no sequences": (
        lambda index: index[:18] + struct.pack("<QQ", 0, 1) + index[-8:],
        "0 sequences take",
    ),
    "an empty sequence": (
        lambda index: index[:34] + struct.pack("<i", 0) + index[38:],
        "sequence 0 has length 0",
    ),
    "huge counts": (
        lambda index: index[:18] + struct.pack("<QQ", 2**62, 1) + index[34:],
        "cut off or damaged",
    ),
}


@pytest.mark.parametrize("name", BAD_STORES)
def test_a_foreign_store_is_named(name, tmp_path):
    path = write_tokens(tmp_path / "data", "store", random_sequences(5))
    (tmp_path / "data.json").unlink()
    change, message = BAD_STORES[name]
    (tmp_path / "data.idx").write_bytes(change((tmp_path / "data.idx").read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        open_token_file(path)
    assert "data.idx" in str(caught.value)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_store_without_one_of_its_files_is_named(missing, tmp_path):
    path = write_tokens(tmp_path / "data", "store", random_sequences(5))
    (tmp_path / f"data{missing}").unlink()
    for name in (path, f"{path}.bin", f"{path}.idx"):
        with pytest.raises(InputError, match=rf"data{missing}: no such file"):
            open_token_file(name)
        assert f"data{missing}: no such file" in token_files.token_file_problem(name, "--data_file")


def test_a_pickle_is_found_by_its_card_and_not_mixed_up_with_a_store(tmp_path):
    path = write_tokens(tmp_path / "data.pickle", "pickle", random_sequences(5))
    assert len(open_token_file(f"{path}.json").lengths_N) == 5
    write_tokens(tmp_path / "both", "store", random_sequences(5))
    write_pickle(tmp_path / "both", as_uint16(random_sequences(5)))
    with pytest.raises(InputError, match=r"both\.json is the card of a store, not of this file"):
        open_token_file(tmp_path / "both")


def test_invalid_checksums_are_named(tmp_path):
    for digests in (7, "%%", "YWJj"):
        path = write_tokens(tmp_path / "data", "store", random_sequences(5))
        card = cards.read_card(f"{path}.json", "")
        card["checksums"]["bin"] = digests
        cards.write_card(f"{path}.json", card)
        with pytest.raises(InputError, match=r"data\.bin: the checksums in its card are invalid"):
            open_token_file(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 10**5, "is not the card of a token file"),
        (b"{", "is not the card of a token file"),
        (b"[]", "is not the card of a token file"),
        (b'{"format": "x"}', "has format 'x'"),
        (
            b'{"format": "distil-tokens", "version": 2}',
            "is of version 2, this program reads version 1",
        ),
        (b'{"format": "distil-tokens", "version": 1}', "its checksum is wrong"),
    ],
)
def test_a_card_of_another_kind_is_named(content, message, tmp_path):
    path = write_tokens(tmp_path / "data", "store", random_sequences(5))
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_token_file(path)


def test_a_file_of_another_vocabulary_is_refused_with_both_names(tmp_path):
    sequences = random_sequences(50)
    path = write_tokens(tmp_path / "data", "store", sequences, card=card_for(sequences))
    with pytest.raises(
        InputError,
        match=(
            r"made with the tokenizer t, another than that of the teacher X: its vocabulary has"
            r" 100 entries, fingerprint aaaaaaaaaaaa, that of the teacher X 100 entries,"
            r" fingerprint bbbbbbbbbbbb"
        ),
    ):
        LmSeqsDataset.from_file(path, of_100("the teacher X", OTHER))
    write_token_counts(tmp_path / "counts", np.ones(100, np.int64), {"tokenizer": TOKENIZER})
    assert read_token_counts(tmp_path / "counts", of_100("X", TOKENIZER)).sum() == 100
    with pytest.raises(InputError, match=r"--token_counts .*counts: was made with the tokenizer t"):
        read_token_counts(tmp_path / "counts", of_100("X", OTHER))


def test_damaged_counts_are_named(tmp_path):
    path = tmp_path / "counts"
    write_token_counts(path, np.arange(100), {})
    whole = path.read_bytes()
    path.write_bytes(
        whole.replace(bytes([75, 41]), bytes([75, 40]))
    )  # 41 becomes 40: a pickle as good as before
    with pytest.raises(InputError, match="counts: differs from the checksum"):
        read_token_counts(path, model_facts(100, "X"))


def test_a_changed_pickle_is_refused_until_its_card_is_removed(tmp_path):
    path = write_tokens(tmp_path / "data", "pickle", random_sequences(5))
    write_pickle(tmp_path / "data", as_uint16(random_sequences(6)))
    with pytest.raises(InputError, match=r"differs from the checksum in .*data\.json"):
        open_token_file(path)
    (tmp_path / "data.json").unlink()
    assert len(open_token_file(path).lengths_N) == 6


def test_a_failed_write_leaves_the_old_files(tmp_path):
    for file_format in FORMATS:
        path = write_tokens(tmp_path / file_format, file_format, random_sequences(5))
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with (
            pytest.raises(OSError, match="disk"),
            writing_tokens(path, file_format, np.dtype(np.uint16)) as (writer, _),
        ):
            writer.append(np.arange(5), np.array([5]))
            raise OSError("the disk went away")
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_nothing_is_read_when_a_store_is_opened(tmp_path):
    """Only batches read the ids of a store with a full card."""
    sequences = random_sequences(3000)
    path = write_tokens(tmp_path / "data", "store", sequences, card=card_for(sequences))
    dataset = LmSeqsDataset.from_file(path, of_100("X"))
    assert not dataset.tokens.blocks.is_checked.any()
    (tmp_path / "data.bin").write_bytes(bytes((tmp_path / "data.bin").stat().st_size))
    assert len(LmSeqsDataset.from_file(path, of_100("X"))) == len(dataset)
    index = json.loads((tmp_path / "data.json").read_text())
    assert index["kind"] == "store"
