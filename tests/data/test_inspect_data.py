"""inspect_data: the report equals a plain recount, and --verify notices every change."""

import json
import os
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import as_uint16, run_process, write_pickle
from stand_ins import ROOT, vocab_size_of

import binarized_data
import inspect_data
import lm_seqs_dataset
from distil.data import inspection, inspection_text, survey
from distil.data.cards import read_card, write_card
from distil.data.token_files import MANY_UNKNOWN, open_token_file, writing_tokens
from distil.models.architectures import architecture_named
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizer_rules import vocabulary_fingerprint
from distil.models.tokenizers import load_tokenizer

FORMATS = ("store", "pickle")
START, END, PAD, UNKNOWN, VOCAB_SIZE = 2, 3, 0, 1, 150
ROLES = {"start": START, "end": END, "pad": PAD, "unknown": UNKNOWN}


def make_sequences(num: int, seed: int = 0, longest: int = 700) -> list[np.ndarray]:
    """Make sequences between boundary ids: some with unknown ids, some mostly unknown."""
    rng = np.random.default_rng(seed)
    sequences = []
    for k in range(num):
        ids = rng.integers(5, VOCAB_SIZE, int(longest ** rng.random()))
        ids[rng.random(len(ids)) < (0.7 if k % 10 == 0 else 0.02)] = UNKNOWN
        ids[rng.random(len(ids)) < 0.005] = END
        sequences.append(np.array([START, *ids, END], np.uint16))
    return sequences


def make_card(sequences: list[np.ndarray], **tokenizer) -> dict:
    """Describe sequences as binarized_data.py does, counted in plain Python."""
    flat = [int(number) for ids in sequences for number in ids]
    inside = [int(number) for ids in sequences for number in ids[1:-1]]
    return {
        "tokenizer": {
            "type": "bert",
            "name": "/no/such/folder",
            "do_lower_case": True,
            "vocab_size": VOCAB_SIZE,
            "special_ids": ROLES,
            **tokenizer,
        },
        "dtype": "uint16",
        "seed": 56,
        "errors": "strict",
        "text_field": "text",
        "sources": [{"path": "a/dump.txt", "bytes": 123456}],
        "counts": {
            "sequences": len(sequences),
            "ids": len(flat),
            "words": 77,
            "unknown": flat.count(UNKNOWN),
            "blank_lines": 4,
            "bad_lines": 0,
            "longest": max(map(len, sequences)),
            "largest_id": max(flat),
            "boundary_ids_inside": sum(number in (START, END) for number in inside),
        },
        "many_unknown": [
            k for k, ids in enumerate(sequences) if (ids == UNKNOWN).sum() >= MANY_UNKNOWN
        ],
    }


def make_file(
    folder: Path, file_format: str, sequences: list[np.ndarray], card: dict | None = None
) -> str:
    """Write a token file with a card; return its path or prefix."""
    path = str(folder / ("data.pickle" if file_format == "pickle" else "data"))
    with writing_tokens(path, file_format, np.uint16) as (writer, written):
        writer.append(np.concatenate(sequences), np.array([len(ids) for ids in sequences]))
        written |= make_card(sequences) if card is None else card
    return path


def report_of(folder: Path, *arguments: object) -> dict:
    """Run the program; return its report as the JSON file has it."""
    path = folder / "report.json"
    inspect_data.main([*map(str, arguments), "--json", str(path)])
    return json.loads(path.read_text())


@pytest.mark.parametrize("chunks", [(2**20, 2**17), (64, 7), (1, 1)])
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_numbers_are_those_of_a_plain_recount(file_format, chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "CHUNK_IDS", chunks[0])
    monkeypatch.setattr(survey, "CHUNK_SEQUENCES", chunks[1])
    sequences = make_sequences(60, seed=1)
    report = report_of(tmp_path, make_file(tmp_path, file_format, sequences), "--top", 1000)
    lists = [ids.tolist() for ids in sequences]
    lengths, flat = [len(ids) for ids in lists], sum(lists, [])
    counted = Counter(flat)
    assert (report["sequences"], report["ids"], report["dtype"]) == (60, len(flat), "uint16")
    assert {row["id"]: row["count"] for row in report["most_frequent"]} == counted
    assert [row["count"] for row in report["most_frequent"]] == sorted(
        counted.values(), reverse=True
    )
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert report["lengths"][name] == np.quantile(lengths, share, method="inverted_cdf")
    assert report["lengths"]["mean"] == pytest.approx(np.mean(lengths))
    assert (report["lengths"]["shortest"], report["lengths"]["longest"]) == (
        min(lengths),
        max(lengths),
    )
    assert report["lengths"]["short"] == sum(
        length <= lm_seqs_dataset.MIN_LENGTH for length in lengths
    )
    for row in report["lengths"]["histogram"]:
        within = [length for length in lengths if row["from"] <= length <= (row["to"] or 10**9)]
        assert (row["sequences"], row["ids"]) == (len(within), sum(within))
    assert sum(row["sequences"] for row in report["lengths"]["histogram"]) == 60
    half = sum(2 * ids.count(UNKNOWN) >= len(ids) for ids in lists)
    assert (report["unknown"]["count"], report["unknown"]["half_unknown_sequences"]) == (
        counted[UNKNOWN],
        half,
    ) and half
    assert (
        report["vocabulary"]["occur"] == len(counted) == VOCAB_SIZE - report["vocabulary"]["never"]
    )
    inside = Counter(number for ids in lists for number in ids[1:-1])
    assert {row["id"]: (row["first"], row["last"], row["inside"]) for row in report["special"]} == {
        PAD: (0, 0, 0),
        UNKNOWN: (0, 0, inside[UNKNOWN]),
        START: (60, 0, 0),
        END: (0, 60, inside[END]),
    }
    assert report["boundaries"]["wrong_sequences"] == 0 and report["problems"] == [] and inside[END]


@pytest.mark.parametrize("file_format", FORMATS)
def test_sequences_shown_are_those_of_the_file(file_format, tmp_path):
    sequences = make_sequences(41, seed=2)
    shown = report_of(tmp_path, make_file(tmp_path, file_format, sequences), "--num_sequences", 5)[
        "shown"
    ]
    assert [row["number"] for row in shown[:5]] == [0, 10, 20, 30, 40]
    for row in shown:
        ids = sequences[row["number"]].tolist()
        assert (row["ids"], row["length"], row["unknown"]) == (
            ids[: len(row["ids"])],
            len(ids),
            ids.count(UNKNOWN),
        )
    why = {word: row for row in shown for word in row["why"].split(", ")}
    assert why["shortest"]["length"] == min(map(len, sequences)) and why["longest"][
        "length"
    ] == max(map(len, sequences))
    assert why["most unknown"]["number"] == max(
        range(41), key=lambda k: (sequences[k] == UNKNOWN).mean()
    )


def test_no_sequences_and_no_ids_are_shown_on_request(tmp_path):
    path = make_file(tmp_path, "store", make_sequences(5))
    report = report_of(tmp_path, path, "--num_sequences", 0, "--top", 0)
    assert report["shown"] == report["most_frequent"] == []
    assert len(report_of(tmp_path, path, "--num_sequences", 99)["shown"]) == 5


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_printed_report_equals_the_json(file_format, tmp_path, capsys):
    path = make_file(tmp_path, file_format, make_sequences(30))
    report = report_of(tmp_path, path, "--verify")
    printed = capsys.readouterr().out
    assert printed == "\n".join(inspection_text.report_lines(report)) + "\n"
    card = report["card"]
    for fact in (
        f"{report['ids']:,}",
        "56",
        "a/dump.txt 123.5 kB",
        "4 blank lines",
        "77, ",
        "150 entries",
        "verified: ",
    ):
        assert fact in printed
    assert card["counts"]["ids"] == report["ids"] and not {
        "checksums",
        "sha256",
        "many_unknown",
    } & set(card)
    assert report["bytes"] == sum(os.path.getsize(file["path"]) for file in report["files"])


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx", ".json"])
def test_a_store_is_named_by_its_prefix_or_any_of_its_files(suffix, tmp_path):
    path = make_file(tmp_path, "store", make_sequences(30))
    report = report_of(tmp_path, path + suffix, "--verify")
    assert report["path"] == path
    size = os.path.getsize(f"{path}.bin") + os.path.getsize(f"{path}.idx")
    assert report["verified"] == {"blocks": 2, "bytes": size}


@pytest.mark.parametrize(
    ("file_format", "suffix"),
    [("store", ".bin"), ("store", ".idx"), ("store", ".json"), ("pickle", ""), ("pickle", ".json")],
)
def test_any_changed_byte_is_noticed(file_format, suffix, tmp_path, status_and_errors):
    path = make_file(tmp_path, file_format, make_sequences(900))
    file = Path(path + suffix)
    whole = file.read_bytes()
    rng = random.Random(3)
    for place in [0, len(whole) - 2, *(rng.randrange(len(whole)) for _ in range(10))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        status, errors = status_and_errors(
            inspect_data.main, [path, "--verify", "--num_sequences", "0"]
        )
        assert status == 2 and len(errors) == 1 and path in errors[0], (place, errors)
        if suffix == ".bin":
            first = place // 2**16 * 2**16
            assert (
                f"{file}: bytes {first} to {min(first + 2**16, len(whole)) - 1} differ" in errors[0]
            )
    assert len(whole) > 2**17 or suffix != ".bin", "more than one block"
    file.write_bytes(whole)
    assert status_and_errors(inspect_data.main, [path, "--verify"]) == (0, [])


def test_a_changed_byte_of_the_ids_is_reported_on_without_verify(tmp_path, status_and_errors):
    path = make_file(tmp_path, "store", make_sequences(30))
    data = bytearray(Path(f"{path}.bin").read_bytes())
    data[100:102] = b"\xff\xff"
    Path(f"{path}.bin").write_bytes(data)
    assert status_and_errors(inspect_data.main, [path]) == (0, [])
    report = report_of(tmp_path, path)
    assert (
        any("the file has 65535" in problem for problem in report["problems"])
        and "verified" not in report
    )


CONTRADICTIONS = {
    "sequences": ({"counts": {"sequences": 31}}, "the card counts sequences 31, the file has 30"),
    "ids": ({"counts": {"ids": 5}}, "the card counts ids 5"),
    "unknown": ({"counts": {"unknown": 0}}, "the card counts unknown 0"),
    "longest": ({"counts": {"longest": 9}}, "the card counts longest 9"),
    "largest": ({"counts": {"largest_id": 9}}, "the card counts largest_id 9"),
    "inside": ({"counts": {"boundary_ids_inside": 999}}, "the card counts boundary_ids_inside 999"),
    "dtype": ({"dtype": "int32"}, "the card says dtype int32, the file is uint16"),
    "kind": ({"kind": "counts"}, "the card says kind counts, the file is"),
    "vocabulary": ({"tokenizer": {"vocab_size": 100}}, "are outside the vocabulary, ids 0 to 99"),
    "list": ({"many_unknown": []}, "6 unknown ids or more, but is not in the card's list"),
    "boundaries": (
        {"tokenizer": {"special_ids": ROLES | {"start": 9}}, "counts": {}, "many_unknown": None},
        "30 sequences, sequence 0 the first, do not begin with id 9 and end with id 3",
    ),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_card_that_contradicts_its_file_is_reported_and_fails_verify(
    name, file_format, tmp_path, capsys, status_and_errors
):
    changes, expected = CONTRADICTIONS[name]
    path = make_file(tmp_path, file_format, make_sequences(30))
    card = read_card(f"{path}.json", "")
    for key, value in changes.items():
        card[key] = {**card[key], **value} if isinstance(value, dict) and value else value
    write_card(f"{path}.json", card)
    inspect_data.main([path])
    assert expected in capsys.readouterr().out.split("PROBLEMS")[1]
    status, errors = status_and_errors(inspect_data.main, [path, "--verify"])
    assert status == 2 and len(errors) == 1 and expected in errors[0] and path in errors[0]


@pytest.mark.parametrize(
    ("special", "wrong", "first_wrong"),
    [(ROLES, 7, 1), (ROLES | {"start": 9, "end": 9}, 8, 0), (ROLES | {"start": 3}, 9, 0)],
)
def test_the_sequences_without_boundaries_are_counted(special, wrong, first_wrong, tmp_path):
    sequences = as_uint16(
        [[2, 9, 3], [9, 9, 3], [2, 9, 9], [2], [2, 3], [3, 2], [9], [9, 9], [2, 1, 1]]
    )
    report = report_of(
        tmp_path, make_file(tmp_path, "store", sequences, {"tokenizer": {"special_ids": special}})
    )
    facts = report["boundaries"]
    assert (facts["wrong_sequences"], facts["first_wrong"]) == (wrong, first_wrong)


@pytest.mark.parametrize("chunk", [1, 2, 2**20])
def test_unknown_ids_are_counted_in_their_sequence(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "CHUNK_IDS", chunk)
    sequences = as_uint16([[9, 9, 9, 9], [1, 9], [1], [9, 1, 1], [1, 9, 9], [9, 9]])
    report = report_of(
        tmp_path,
        make_file(tmp_path, "store", sequences, {"tokenizer": {"special_ids": ROLES}}),
        "--num_sequences",
        6,
    )
    assert {row["number"]: row["unknown"] for row in report["shown"]} == {
        0: 0,
        1: 1,
        2: 1,
        3: 2,
        4: 1,
        5: 0,
    }
    assert report["unknown"] == {"id": 1, "count": 5, "share": 5 / 15, "half_unknown_sequences": 3}
    (row,) = [row for row in report["special"] if row["id"] == UNKNOWN]
    assert (row["first"], row["last"], row["inside"]) == (
        3,
        1,
        1,
    ), "a sequence of one id begins with it"


def test_percentiles_are_lengths_that_the_share_does_not_exceed():
    assert [
        survey.percentile({3: 9, 5: 81, 7: 9, 9: 1}, percent)
        for percent in (1, 9, 10, 90, 91, 99, 100)
    ] == [
        3,
        3,
        5,
        5,
        7,
        7,
        9,
    ]


ODD_CARDS = [
    ({"tokenizer": [1], "counts": 7, "sources": {}}, "tokenizer is a list"),
    ({"tokenizer": {"special_ids": {"start": "x"}}}, "special_ids.start is 'x'"),
]


@pytest.mark.parametrize(("card", "problem"), ODD_CARDS)
def test_a_card_whose_facts_have_other_types_is_refused(card, problem, tmp_path, status_and_errors):
    path = make_file(tmp_path, "store", make_sequences(5), card)
    status, errors = status_and_errors(inspect_data.main, [path])
    assert status == 2 and len(errors) == 1 and problem in errors[0]


def test_a_card_without_the_usual_facts_is_shown(tmp_path):
    path = make_file(tmp_path, "store", make_sequences(5), {"tokenizer": None, "counts": None})
    report = report_of(tmp_path, path, "--verify")
    assert report["problems"] == [] and report["boundaries"] is None and report["unknown"] is None


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_without_a_card_is_shown_but_not_verified(file_format, tmp_path, status_and_errors):
    path = make_file(tmp_path, file_format, make_sequences(20))
    os.unlink(f"{path}.json")
    report = report_of(tmp_path, path)
    assert (
        report["card"] == {} and report["vocabulary"]["size"] is None and report["sequences"] == 20
    )
    assert (
        "unknown, so ids are not decoded" in report["tokenizer"]
        and report["shown"][0]["text"] is None
    )
    status, errors = status_and_errors(inspect_data.main, [path, "--verify"])
    assert (
        status == 2
        and len(errors) == 1
        and "no checksums to verify" in errors[0]
        and f"{path}.json" in errors[0]
    )


def test_pickles_of_2019_are_read(tmp_path):
    path = write_pickle(tmp_path / "old.pickle", [[2, 9, 3], [2, 7, 7, 3]])
    report = report_of(tmp_path, path)
    assert (report["sequences"], report["ids"], report["lengths"]["longest"]) == (2, 7, 4)


def test_ids_that_no_vocabulary_has_are_counted_together(teachers, tmp_path):
    odd = [np.array([2, -5, 2**40, 9, 3], np.int64), np.array([2, 9, 2**31 - 1, 3], np.int64)]
    path = write_pickle(tmp_path / "odd.pickle", odd)
    report = report_of(
        tmp_path, path, "--tokenizer_type", "bert", "--tokenizer_name", teachers["bert"]
    )
    vocabulary = report["vocabulary"]
    assert (vocabulary["outside"], vocabulary["smallest"], vocabulary["largest"]) == (3, -5, 2**40)
    assert all(f"<id {number}>" in report["shown"][0]["text"] for number in (-5, 2**40))
    assert "3 ids are outside the vocabulary" in report["problems"][0]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_sequences_are_decoded_with_the_tokenizer_of_the_flags(kind, teachers, lines, tmp_path):
    tokenizer = load_tokenizer(architecture_named(kind), str(teachers[kind]), "")
    special = special_ids(architecture_named(kind), tokenizer)
    ids = [special.start, *tokenizer.encode(lines[0], add_special_tokens=False), special.end]
    path = write_pickle(tmp_path / "data.pickle", as_uint16([ids, ids * 200]))
    report = report_of(tmp_path, path, "--tokenizer_type", kind, "--tokenizer_name", teachers[kind])
    expected = " ".join(tokenizer.decode(ids).split())
    text = report["shown"][0]["text"]
    assert text == expected if len(expected) <= 200 else text == expected[:200] + "..."
    assert len(report["shown"][1]["text"]) == 203 and report["vocabulary"]["size"] == vocab_size_of(
        teachers[kind]
    )
    tokens = {row["id"]: row["token"] for row in report["most_frequent"]}
    assert tokens == {number: tokenizer.convert_ids_to_tokens(number) for number in tokens}


def test_a_tokenizer_of_the_card_is_used_only_if_it_is_unchanged(teachers, tmp_path):
    tokenizer = load_tokenizer(architecture_named("bert"), str(teachers["bert"]), "")
    sequences = as_uint16([[START, *range(5, 40), END]])
    for fingerprint in (vocabulary_fingerprint(tokenizer), "0" * 64):
        card = make_card(sequences, name=str(teachers["bert"]), vocabulary_sha256=fingerprint)
        report = report_of(tmp_path, make_file(tmp_path, "store", sequences, card))
        is_same = fingerprint != "0" * 64
        assert (
            (report["shown"][0]["text"] is not None)
            == is_same
            == ("differs now" not in report["tokenizer"])
        )
    report = report_of(tmp_path, tmp_path / "data", "--tokenizer_name", teachers["bert"])
    assert (
        "texts and tokens may be wrong" in report["tokenizer"]
        and report["shown"][0]["text"] is not None
    )


def test_a_missing_tokenizer_of_the_card_is_reported_in_one_line(tmp_path, capsys):
    inspect_data.main([make_file(tmp_path, "store", make_sequences(9))])
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("tokenizer")
    ]
    assert "/no/such/folder (bert), not loaded, so ids are not decoded" in line


def test_control_characters_do_not_reach_the_terminal():
    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return ["x" if number < 9 else None for number in ids]

        def decode(self, ids, **options):
            return "a\x1b[31m\tb\n" * len(ids)

    assert inspection.decode(Tokenizer(), [1, 99, 2]) == "a\ufffd[31m b <id 99> a\ufffd[31m b"


BAD = {
    "no file": (["nowhere"], "FILE nowhere: no such file"),
    "folder": (["{tmp}"], "is a folder"),
    "foreign": (["{tmp}/text"], "not a readable pickle of token ids"),
    "no flag": (["{tmp}/data", "--tops", "3"], "did you mean --top?"),
    "negative": (["{tmp}/data", "--num_sequences", "-1"], "--num_sequences -1: expected 0 to"),
    "top": (["{tmp}/data", "--top", "-1"], "--top -1: expected 0 to"),
    "cut off": (["{tmp}/cut"], "{tmp}/cut.bin: has"),
    "cut index": (["{tmp}/short.bin"], "{tmp}/short.idx: has"),
    "no tokenizer": (
        ["{tmp}/data", "--tokenizer_type", "bert", "--tokenizer_name", "{tmp}/none"],
        "--tokenizer_name {tmp}/none",
    ),
    "no name": (
        ["{tmp}/text.pickle", "--tokenizer_type", "bert"],
        "--tokenizer_type bert: the file has no card",
    ),
    "no type": (
        ["{tmp}/text.pickle", "--tokenizer_name", "x"],
        "--tokenizer_name x: the file has no card",
    ),
    "over ids": (["{tmp}/data", "--json", "{tmp}/data.bin"], "would overwrite"),
    "over card": (["{tmp}/data", "--json", "{tmp}/data.json"], "would overwrite"),
    "as a card": (
        ["{tmp}/text.pickle", "--json", "{tmp}/text.pickle.json"],
        "token file's own file or card",
    ),
    "a store's card": (
        ["{tmp}/text.pickle", "--json", "{tmp}/bare.json"],
        "token file's own file or card",
    ),
    "json folder": (["{tmp}/data", "--json", "{tmp}"], "--json {tmp}: is a folder"),
    "json place": (["{tmp}/data", "--json", "{tmp}/text/x.json"], "text is not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, tmp_path, status_and_errors):
    arguments, expected = BAD[name]
    for prefix in ("cut", "short", "bare", "data"):
        path = make_file(tmp_path, "store", make_sequences(20))
        if prefix != "data":
            for suffix in (".bin", ".idx", ".json"):
                os.rename(path + suffix, tmp_path / (prefix + suffix))
            os.unlink(tmp_path / f"{prefix}.json")
    os.truncate(tmp_path / "cut.bin", 100)
    os.truncate(tmp_path / "short.idx", 100)
    (tmp_path / "text").write_text("no token file")
    write_pickle(tmp_path / "text.pickle", [[2, 9, 3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, errors = status_and_errors(
        inspect_data.main, [word.format(tmp=tmp_path) for word in arguments]
    )
    assert status == 2 and len(errors) == 1 and expected.format(tmp=tmp_path) in errors[0], errors
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("kind", "file_format"), [("bert", "store"), ("roberta", "pickle"), ("gpt2", "store")]
)
def test_files_of_binarized_data_are_verified_and_decoded(
    kind, file_format, teachers, text_file, lines, tmp_path, capsys
):
    binarized_data.main(
        [
            "--file_path",
            str(text_file),
            "--tokenizer_type",
            kind,
            "--tokenizer_name",
            str(teachers[kind]),
            "--dump_file",
            str(tmp_path / "out"),
            "--format",
            file_format,
            "--num_workers",
            "1",
        ]
    )
    path = tmp_path / f"out.tiny-{kind}{'.pickle' if file_format == 'pickle' else ''}"
    report = report_of(tmp_path, path, "--verify", "--num_sequences", 240)
    assert "verified: " in capsys.readouterr().out and report["problems"] == []
    tokenizer = load_tokenizer(architecture_named(kind), str(teachers[kind]), "")
    special = special_ids(architecture_named(kind), tokenizer)
    start, end = (
        tokenizer.convert_ids_to_tokens(getattr(special, role)) for role in ("start", "end")
    )
    words = {
        line: tokenizer.decode(tokenizer.encode(line, add_special_tokens=False)) for line in lines
    }
    beginnings = {
        " ".join(f"{start} {text} {end}".split())[:60].replace(" ", "") for text in words.values()
    }
    shown = {row["text"][:70].replace(" ", "") for row in report["shown"]}
    assert all(any(text.startswith(beginning[:40]) for text in shown) for beginning in beginnings)


def test_memory_does_not_grow_with_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "CHUNK_IDS", 2**14)
    monkeypatch.setattr(survey, "CHUNK_SEQUENCES", 2**10)
    path = str(tmp_path / "large")
    with writing_tokens(path, "store", np.uint16) as (writer, _):
        for _ in range(64):
            writer.append(np.arange(2**16) % 500, np.full(2**11, 2**5))
    tokens = open_token_file(path)
    counted = survey.Survey(ROLES)
    tracemalloc.start()
    counted.read(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counted.length_counts == {32: 2**17} and peak < 2**20 < tokens.ids_M.nbytes / 7


def test_the_program_needs_no_torch_and_ignores_a_closed_pipe(teachers, tmp_path):
    sequences = make_sequences(300)
    path = make_file(tmp_path, "store", sequences, make_card(sequences, name=str(teachers["bert"])))
    program = ROOT / "scripts" / "inspect_data.py"
    code = (
        f"import sys; sys.path.insert(0, {str(program.parent)!r}); import inspect_data;"
        f" inspect_data.main([{path!r}]); sys.exit('torch' in sys.modules)"
    )
    done = run_process(sys.executable, "-c", code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "sequence 0" in done.stdout, done.stderr
    command = f"set -o pipefail; {sys.executable} {program} {path} --num_sequences 300 | head -n 1"
    done = run_process("bash", "-c", command)
    assert (
        done.returncode == 0
        and done.stdout.startswith("path ")
        and "error" not in done.stderr.lower()
    ), done.stderr
