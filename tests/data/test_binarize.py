"""Text to ids: sources of any kind, cached chunks, the shuffle from the disk, the program."""

import gc
import gzip
import json
import multiprocessing.queues
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import run_process
from stand_ins import ROOT, vocab_size_of

import binarized_data
import token_counts
from distil.data import encoding, shuffle, tally, text_sources
from distil.data.decoding import texts_of
from distil.data.encoding import Encoding, LineEncoder, WorkerPool
from distil.data.shuffle import Spool, shuffled
from distil.data.text_sources import Source, find_sources, read_blocks
from distil.data.token_files import open_token_file
from distil.models.architectures import architecture_named
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizers import load_tokenizer
from utils import InputError

TYPES = ("bert", "roberta", "gpt2")


def sequences_of(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.ids_M, np.cumsum(tokens.lengths_N)[:-1])]


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------


def all_texts(path, text_field="text", errors="strict", block_bytes=2**20) -> list[str]:
    sources = find_sources(str(path))
    blocks = [
        block
        for source in sources
        for block in read_blocks(source, text_field, block_bytes=block_bytes)
    ]
    assert sum(block.num_bytes for block in blocks) == sum(
        source.num_bytes for source in sources
    ), "the bar ends at 100 %"
    return [text for block in blocks for text in texts_of(block, text_field, errors)[0]]


TEXTS = ["ein Satz", "zwei Sätze, \u2028 mit Zeichen", "", "天地玄黃", "x" * 40]


def write_sources(folder: Path) -> list[Path]:
    """Write TEXTS in every form that is read."""
    import pyarrow
    import pyarrow.parquet

    plain = "\n".join(TEXTS) + "\n"
    records = "".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(TEXTS))
    (folder / "a.txt").write_text(plain, encoding="utf-8")
    (folder / "no_ending").write_text(plain, encoding="utf-8")
    (folder / "b.jsonl").write_text(records, encoding="utf-8")
    for name, text in (("c.txt.gz", plain), ("d.jsonl.gz", records)):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "e.parquet"
    )
    (folder / "f.json").write_text(records, encoding="utf-8")
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    for path in write_sources(tmp_path):
        assert all_texts(path) == TEXTS, path.name


def test_folders_and_globs_are_read_in_a_fixed_order(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    names = [os.path.relpath(source.path, tmp_path) for source in find_sources(str(tmp_path))]
    assert names == ["a.txt", "b.txt", "sub/c.txt"]
    assert [Path(source.path).name for source in find_sources(str(tmp_path / "**" / "*.txt"))][
        :2
    ] == ["a.txt", "b.txt"]
    assert len(find_sources(str(tmp_path / "**" / "*.txt"))) == 3


def write_parquet(path: Path, texts: list, **columns) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts, **columns}), path)


def test_a_file_name_is_not_a_pattern(tmp_path):
    write_parquet(tmp_path / "a[1].parquet", ["mine"])
    write_parquet(tmp_path / "a1.parquet", ["another's"])
    (tmp_path / "b*.json").write_text('{"text": "mine"}')
    (tmp_path / "bb.json").write_text('{"text": "another\'s"}')
    for name in ("a[1].parquet", "b*.json"):
        assert all_texts(tmp_path / name) == ["mine"]


def test_shards_without_rows_or_bytes_are_skipped(tmp_path):
    write_parquet(tmp_path / "a.parquet", [])
    (tmp_path / "b.parquet").touch()
    (tmp_path / "c.txt").touch()
    write_parquet(tmp_path / "d.parquet", ["x", None, "y"])
    assert all_texts(tmp_path) == ["x", "", "y"]


def test_only_the_texts_column_of_parquet_is_read(tmp_path):
    import pyarrow

    odd = pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    plain = pyarrow.array(["ein", "zwei"])
    columns = {
        "plain": plain,
        "large": plain.cast(pyarrow.large_string()),
        "dictionary": plain.dictionary_encode(),
    }
    for name, column in columns.items():
        write_parquet(tmp_path / f"{name}.parquet", column, odd=odd)
        assert all_texts(tmp_path / f"{name}.parquet") == ["ein", "zwei"]


def test_tables_of_text_are_read_verbatim(tmp_path):
    rows = ["NA", "null", "12", "a, b", 'say "x"', '"quoted', "ein\u2028zwei"]
    quoted = "".join(f'"{row.replace(chr(34), chr(34) * 2)}",1\n' for row in rows)
    (tmp_path / "a.csv").write_text("text,id\n" + quoted, encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(("text,id\n" + quoted).encode()))
    (tmp_path / "c.tsv").write_text(
        "id\ttext\n" + "".join(f"1\t{row}\n" for row in rows), encoding="utf-8"
    )
    for name in ("a.csv", "b.csv.gz", "c.tsv"):
        assert all_texts(tmp_path / name) == rows, name
    (tmp_path / "bad.csv").write_bytes(b"text\ngut\nab\xfc\n")
    assert all_texts(tmp_path / "bad.csv", errors="skip") == ["gut"]
    assert all_texts(tmp_path / "bad.csv", errors="replace") == ["gut", "ab\ufffd"]


def test_no_file_is_read_twice_and_links_are_followed(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a\n")
    (tmp_path / "elsewhere" / "b.txt").write_text("b\n")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "again.txt").symlink_to(tmp_path / "corpus" / "a.txt")
    (tmp_path / "corpus" / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert (
        sorted(all_texts(tmp_path / "corpus"))
        == sorted(all_texts(tmp_path / "corpus" / "**"))
        == ["a", "b"]
    )


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
def test_blocks_may_end_anywhere(block_bytes, tmp_path):
    data = "\ufeffab\r\ncd\ref\n\n\u2028gh\u0085i\r\n\rzé".encode()
    (tmp_path / "a.txt").write_bytes(data)
    expected = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    blocks = list(
        read_blocks(
            Source(str(tmp_path / "a.txt"), "lines", len(data)), "text", block_bytes=block_bytes
        )
    )
    assert [text for block in blocks for text in texts_of(block, "text")[0]] == expected
    numbers = [block.first for block in blocks]
    assert numbers == sorted(numbers) and numbers[-1] <= len(expected)


def test_text_that_is_not_utf8_is_named_skipped_or_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgut\r\nab\xfcc\nend\xe2\x82\n\xff\n")
    for errors, expected in (
        ("skip", ["gut"]),
        ("replace", ["gut", "ab\ufffdc", "end\ufffd", "\ufffd"]),
    ):
        (block,) = read_blocks(find_sources(str(path))[0], "text")
        assert texts_of(block, "text", errors) == (expected, 3)
    for block_bytes in (1, 5, 100):
        with pytest.raises(InputError, match=r"a\.txt:2: byte 3 of the line is not UTF-8 \(0xfc\)"):
            all_texts(path, block_bytes=block_bytes)


BAD_SOURCES = {
    "a.txt": ("ab\n".encode("utf-16"), r"a\.txt:1: byte 1 .* looks like UTF-16"),
    "cut.txt.gz": (
        gzip.compress(b"ab\n" * 10**5)[:-20],
        r"cut\.txt\.gz: after line \d+ the compressed data is damaged",
    ),
    "no.gz": (b"no gzip", r"no\.gz: after line 0 the compressed data is damaged"),
    "a.jsonl": (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: is not a JSON object"),
    "list.jsonl": (b'{"text": "a"}\n\n[1]\n', r"list\.jsonl:3: is not a JSON object \(a list"),
    "field.jsonl": (
        b'{"text": "a"}\n{"title": 1, "body": "b"}\n',
        r"field\.jsonl:2: has no field 'text', only title, body",
    ),
    "number.jsonl": (b'{"text": 5}\n', r"number\.jsonl:1: 'text' is of type int"),
    "half.jsonl": (
        b'{"text": "\\ud83d"}\n',
        r"half\.jsonl:1: 'text' is not UTF-8, or holds half of a surrogate pair",
    ),
    "latin.csv": (b"id,text\n1,gut\n2,ab\xfc\n", r"latin\.csv:2: 'text' is not UTF-8"),
    "open.csv": (b'id,text\n1,"gut\n', r"open\.csv: from row 1 on it can't be read as csv"),
    "list.json": (b'[{"text": ["a", "b"]}]', r"list\.json:1: 'text' is of type list"),
    "packed.zst": (b"\x28\xb5\x2f\xfd", r"packed\.zst: is compressed in an unsupported format"),
    "deep.jsonl": (b'{"text": ' + b"[" * 10**5 + b"\n", r"deep\.jsonl:1: is not a JSON object"),
    "field.csv": (b"title,body\na,b\n", r"field\.csv:1: has no field 'text', only title, body"),
    "bad.parquet": (b"PAR1nothing", r"bad\.parquet: from row 1 on it can't be read as parquet"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_cannot_be_used_is_named_with_its_place(name, tmp_path):
    content, message = BAD_SOURCES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        all_texts(tmp_path / name)


def test_broken_records_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": "\\ud83d"}\n{"text": "b"}\n'
    )
    (block,) = read_blocks(find_sources(str(tmp_path / "a.jsonl"))[0], "text")
    assert texts_of(block, "text", "skip") == (["a", "b"], 3)


def test_a_line_of_ten_megabytes_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("a b\n" + "word " * 2_000_000 + "\nc\n")
    assert list(map(len, all_texts(tmp_path / "a.txt"))) == [3, 10_000_000, 1]


def test_a_line_without_end_is_not_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"ab\nc\n" + bytes(5000))
    with pytest.raises(InputError, match=r"a\.txt:3: the line has more than"):
        all_texts(tmp_path / "a.txt", block_bytes=100)


# --------------------------------------------------------------------------------------------------
# Encoding
# --------------------------------------------------------------------------------------------------


def make_encoding(kind: str, folder) -> tuple[Encoding, object]:
    tokenizer = load_tokenizer(architecture_named(kind), str(folder), "")
    special = special_ids(architecture_named(kind), tokenizer)
    largest = max(tokenizer.get_vocab().values())
    return (
        Encoding(
            tokenizer.backend_tokenizer,
            special.start,
            special.end,
            largest,
            special.unknown,
        ),
        tokenizer,
    )


ODD = [
    *(
        " ",
        "  ",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u0085",
        "\x1c",
        "\x00",
        "\u180e",
        "\u200b",
        "\u0301",
        "\u0345",
    ),
    *("é", "İ", "ß", "ς", "Σ", "天", "\u0e4c", "한", "\U0001f642", "\ufb01", "\u1e9e"),
    *("[MASK]", "<mask>", "<|endoftext|>", "'s", "'", ".", "1"),
]


def odd_lines(num: int, seed: int, words: list[str]) -> list[str]:
    rng = random.Random(seed)
    pool = [*ODD, *words]
    made = (
        "".join(rng.choice(pool) + rng.choice(["", " "]) for _ in range(rng.randint(1, 30))).strip()
        for _ in range(num)
    )
    return [line for line in made if line]


@pytest.mark.parametrize("kind", TYPES)
def test_cached_chunks_give_the_librarys_ids(kind, teachers, lines):
    """Compare on words of the text and odd Unicode characters in any combination."""
    how, tokenizer = make_encoding(kind, teachers[kind])
    cached, plain = LineEncoder(how), LineEncoder(how, is_cached=False)
    assert cached.rule is not None
    words = sorted({word for line in lines for word in line.split()})
    for seed in range(4):
        batch = odd_lines(1500, seed, words) + lines
        found, expected = cached.encode(batch), plain.encode(batch)
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    own = [
        [how.start_id, *ids, how.end_id]
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]
    ]
    assert [i for ids in own for i in ids] == expected[0].tolist()


def test_the_cache_stays_bounded_and_exact(teachers, lines, monkeypatch):
    monkeypatch.setattr(encoding, "MAX_CACHED", 50)
    how, _ = make_encoding("bert", teachers["bert"])
    cached, plain = LineEncoder(how), LineEncoder(how, is_cached=False)
    for k in range(0, len(lines), 5):
        batch = [*lines[k : k + 5], f"{'long' * 20}{k} {lines[k]}"]
        assert np.array_equal(cached.encode(batch)[0], plain.encode(batch)[0])
        largest = len({word for line in batch for word in line.split(" ")})
        assert max(len(cached.young), len(cached.old)) <= 50 + largest
    assert not any("longlong" in chunk for chunk in cached.old)


def test_chunks_are_cached_only_if_that_is_exact(teachers):
    for kind, change in (
        ("bert", {"content": "New York"}),
        ("gpt2", {"content": "<x>", "rstrip": True}),
    ):
        how, tokenizer = make_encoding(kind, teachers[kind])
        tokenizer.add_tokens([transformers.AddedToken(**change)])
        assert encoding.chunk_rule(tokenizer.backend_tokenizer, how.end_id) is None


def test_words_are_separated_by_white_space():
    for line in ["a b  c", "a\tb", "a\u00a0b\u3000c", "a", "é b", "a \x1c b", "天地 玄黃"]:
        assert encoding.count_words(line) == len(line.split())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_blocks_come_back_in_order(num_workers, teachers, text_file):
    how, _ = make_encoding("bert", teachers["bert"])
    source = find_sources(str(text_file))[0]
    (whole,) = WorkerPool(how, 1).map(read_blocks(source, "text"))
    with WorkerPool(how, num_workers) as pool:
        parts = list(pool.map(read_blocks(source, "text", block_bytes=500)))
    assert len(parts) > 20
    assert np.array_equal(np.concatenate([part.ids_M for part in parts]), whole.ids_M)
    assert sum(part.num_words for part in parts) == whole.num_words


def test_an_error_in_a_worker_is_the_programs(teachers, tmp_path):
    how, _ = make_encoding("bert", teachers["bert"])
    (tmp_path / "a.txt").write_bytes(b"bake\n" * 400 + b"\xff\n" + b"bake\n" * 400)
    with WorkerPool(how, 2) as pool, pytest.raises(InputError, match=r"a\.txt:401: byte 1"):
        list(
            pool.map(read_blocks(find_sources(str(tmp_path / "a.txt"))[0], "text", block_bytes=100))
        )


def test_a_worker_that_dies_at_its_start_is_reported(teachers, monkeypatch):
    how, _ = make_encoding("bert", teachers["bert"])
    monkeypatch.setattr(encoding, "_start_worker", lambda *_: os._exit(9))
    with pytest.raises(InputError, match="a worker process was killed"):
        WorkerPool(how, 2)


def test_a_worker_that_dies_is_reported(teachers, text_file):
    how, _ = make_encoding("bert", teachers["bert"])
    with WorkerPool(how, 2) as pool:
        os.kill(pool.executor.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(InputError, match="a worker process was killed"):
            list(pool.map(read_blocks(find_sources(str(text_file))[0], "text", block_bytes=100)))


def hand_over_half_a_result(block: object = None) -> None:
    """Begin a message to the parent, as large as a pipe does not hold, and die."""
    for thing in gc.get_objects():
        if type(thing) is multiprocessing.queues.SimpleQueue:  # the executor's for results
            os.write(thing._writer.fileno(), struct.pack("!i", 10**6) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_sending_a_result_is_reported(teachers, tmp_path, monkeypatch):
    """A half-written message kept the parent waiting, once in 150 SIGTERMs to all processes."""
    how, _ = make_encoding("bert", teachers["bert"])
    monkeypatch.setattr(encoding, "WORKER_CHECK_S", 0.1)
    (tmp_path / "a.txt").write_text("bake limo\n")
    monkeypatch.setattr(encoding, "_encode_block", hand_over_half_a_result)
    with (
        pytest.raises(InputError, match="a worker process was killed"),
        WorkerPool(how, 2) as pool,
    ):
        list(pool.map(read_blocks(find_sources(str(tmp_path / "a.txt"))[0], "text")))


def test_an_error_ends_workers_that_are_sending_a_result(teachers):
    how, _ = make_encoding("bert", teachers["bert"])
    with pytest.raises(ZeroDivisionError), WorkerPool(how, 2) as pool:
        pool.executor.submit(hand_over_half_a_result)
        time.sleep(0.3)
        raise ZeroDivisionError


# --------------------------------------------------------------------------------------------------
# Shuffling
# --------------------------------------------------------------------------------------------------


def spool_of(folder, sequences) -> Spool:
    spool = Spool(folder / "spool", np.uint16)
    for sequence in sequences:
        spool.append(np.array(sequence, np.uint16), np.array([len(sequence)]))
    spool.close()
    return spool


def shuffled_sequences(folder, sequences, *key) -> list[list[int]]:
    pieces = list(shuffled(spool_of(folder, sequences), *key))
    assert not list(folder.iterdir()), "the spools are used up"
    return [
        part.tolist()
        for ids_M, lengths_N in pieces
        for part in np.split(ids_M, np.cumsum(lengths_N)[:-1])
    ]


@pytest.mark.parametrize("spool_ids", [10**6, 500, 60])
def test_shuffling_from_the_disk_loses_nothing_and_follows_its_key(
    spool_ids, tmp_path, monkeypatch
):
    monkeypatch.setattr(shuffle, "SPOOL_IDS", spool_ids)
    monkeypatch.setattr(shuffle, "CHUNK_IDS", 40)
    monkeypatch.setattr(shuffle, "MAX_FAN_OUT", 4)
    rng = random.Random(0)
    sequences = [[number, *[7] * rng.randint(0, 30)] for number in range(300)] + [[999] * 200]
    first, again, other = (
        shuffled_sequences(tmp_path, sequences, seed, "shuffle") for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(sequences) and first != sequences


def test_every_place_is_as_likely_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "SPOOL_IDS", 12)
    num, trials = 8, 1600
    counts = np.zeros((num, num), int)
    for seed in range(trials):
        order = shuffled_sequences(tmp_path, [[k] * 4 for k in range(num)], seed)
        counts[[sequence[0] for sequence in order], range(num)] += 1
    expected = trials / num
    assert (
        np.abs(counts - expected).max() < 5 * (expected * (1 - 1 / num)) ** 0.5
    )  # 5 sigma of a binomial, 64 cells


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def run(tmp_path, teacher, kind, source, *flags) -> Path:
    """Run the program into tmp_path/out..; return the value for --data_file."""
    binarized_data.main(
        [
            "--file_path",
            str(source),
            "--tokenizer_type",
            kind,
            "--tokenizer_name",
            str(teacher),
            "--dump_file",
            str(tmp_path / "out"),
            *flags,
        ]
    )
    return tmp_path / f"out.{Path(teacher).name}{'' if 'store' in flags else '.pickle'}"


@pytest.mark.parametrize("kind", TYPES)
def test_both_formats_hold_the_same_sequences_in_the_same_order(
    kind, teachers, text_file, tmp_path
):
    files = [
        run(tmp_path, teachers[kind], kind, text_file, "--format", file_format)
        for file_format in ("pickle", "store")
    ]
    pickled, stored = map(open_token_file, files)
    assert np.array_equal(pickled.ids_M, stored.ids_M) and np.array_equal(
        pickled.lengths_N, stored.lengths_N
    )
    facts = [
        {**tokens.card, "kind": None, "checksums": None, "sha256": None}
        for tokens in (pickled, stored)
    ]
    assert facts[0] == facts[1] and facts[0]["counts"]["sequences"] == 240


def test_outputs_in_the_corpus_folder_are_not_taken_for_text(teachers, tmp_path):
    (tmp_path / "a.txt").write_text("bake limo\n")
    flags = ["--token_counts_dump", str(tmp_path / "counts.pickle")]
    first, again = (
        open_token_file(run(tmp_path, teachers["bert"], "bert", tmp_path, *flags)).ids_M
        for _ in range(2)
    )
    assert first.tolist() == again.tolist()


def test_every_source_gives_the_same_ids(teachers, tmp_path):
    found = []
    for path in write_sources(tmp_path):
        folder = tmp_path / f"made-{path.name}"
        folder.mkdir()
        found.append(sequences_of(open_token_file(run(folder, teachers["bert"], "bert", path))))
    assert all(sequences == found[0] for sequences in found) and len(found) == 7


def test_a_rerun_gives_the_same_bytes_on_any_number_of_processes(
    teachers, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoding, "MIN_BYTES_PER_WORKER", 500)
    monkeypatch.setattr(shuffle, "SPOOL_IDS", 2000)
    found = []
    for num_workers in ("1", "2", "2"):
        run(
            tmp_path,
            teachers["bert"],
            "bert",
            text_file,
            "--format",
            "store",
            "--num_workers",
            num_workers,
        )
        found.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory) -> Path:
    """A tokenizer folder with more words than 16 bits can number, as multilingual BERT's."""
    folder = tmp_path_factory.mktemp("large") / "large-bert"
    folder.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"w{number}" for number in range(5, 119_547)),
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.mark.parametrize("file_format", ["pickle", "store"])
def test_ids_above_16_bits_are_kept(file_format, large_vocabulary, tmp_path):
    numbers = [5, 65_535, 65_536, 65_541, 119_546]
    (tmp_path / "text").write_text(" ".join(f"w{number}" for number in numbers))
    path = run(
        tmp_path,
        large_vocabulary,
        "bert",
        tmp_path / "text",
        "--format",
        file_format,
        "--token_counts_dump",
        str(tmp_path / "counts"),
    )
    tokens = open_token_file(path)
    assert tokens.ids_M[:].tolist() == [2, *numbers, 3] and tokens.ids_M.dtype == np.int32
    counts = pickle.loads((tmp_path / "counts").read_bytes())
    assert len(counts) == 119_547 and [k for k, count in enumerate(counts) if count] == [
        2,
        3,
        *numbers,
    ]


@pytest.mark.parametrize("file_format", ["pickle", "store"])
def test_counts_during_binarizing_equal_counts_afterwards(
    file_format, teachers, text_file, tmp_path
):
    size = str(vocab_size_of(teachers["bert"]) + 7)
    path = run(
        tmp_path,
        teachers["bert"],
        "bert",
        text_file,
        "--format",
        file_format,
        "--token_counts_dump",
        str(tmp_path / "counts"),
        "--vocab_size",
        size,
    )
    token_counts.main(
        [
            "--data_file",
            str(path),
            "--token_counts_dump",
            str(tmp_path / "after"),
            "--vocab_size",
            size,
        ]
    )
    assert (tmp_path / "counts").read_bytes() == (tmp_path / "after").read_bytes()
    token_counts.main(
        [
            "--data_file",
            str(path),
            str(path),
            "--token_counts_dump",
            str(tmp_path / "twice"),
            "--vocab_size",
            size,
        ]
    )
    once, twice = (
        np.array(pickle.loads((tmp_path / name).read_bytes())) for name in ("counts", "twice")
    )
    assert np.array_equal(2 * once, twice) and once.sum() == len(open_token_file(path).ids_M)


def test_the_card_counts_the_files_content(teachers, tmp_path):
    text = "\ufeffbake limo\n\n \nbake [UNK] limo\r\n" + "[UNK] " * 9 + "\nb\xe4 [CLS]\n"
    (tmp_path / "text").write_bytes(text.encode() + b"\xff\n")
    path = run(
        tmp_path,
        teachers["bert"],
        "bert",
        tmp_path / "text",
        "--format",
        "store",
        "--errors",
        "skip",
    )
    tokens = open_token_file(path)
    sequences = sequences_of(tokens)
    flat = [i for sequence in sequences for i in sequence]
    tokenizer = load_tokenizer(architecture_named("bert"), str(teachers["bert"]), "")
    many = [
        k for k, sequence in enumerate(sequences) if sequence.count(tokenizer.unk_token_id) >= 6
    ]
    assert tokens.card["counts"] == {
        "sequences": 4,
        "ids": len(flat),
        "words": 2 + 3 + 9 + 2,
        "unknown": flat.count(tokenizer.unk_token_id),
        "blank_lines": 2,
        "bad_lines": 1,
        "longest": max(map(len, sequences)),
        "largest_id": max(flat),
        "boundary_ids_inside": 1,
    }
    assert tokens.card["many_unknown"] == many and len(many) >= 1
    assert tokens.card["sources"] == [
        {"path": str(tmp_path / "text"), "bytes": (tmp_path / "text").stat().st_size}
    ]


def test_any_name_can_be_drawn(tmp_path):
    for name in ("a_$b^{", "x\udcff", "c\\d"):
        tally.draw_lengths({12: 3, 40: 1}, str(tmp_path / "picture.png"), {"file": name})


def test_the_report_is_a_picture(teachers, text_file, tmp_path):
    run(tmp_path, teachers["bert"], "bert", text_file, "--report")
    assert (tmp_path / "out.tiny-bert.lengths.png").read_bytes().startswith(b"\x89PNG")
    run(tmp_path, teachers["bert"], "bert", text_file, "--report", str(tmp_path / "own.png"))
    assert (tmp_path / "own.png").read_bytes() == (
        tmp_path / "out.tiny-bert.lengths.png"
    ).read_bytes()


def test_the_summary_says_what_was_made(teachers, tmp_path, capsys):
    (tmp_path / "text").write_text("bake limo\n\n" + "bake " * 30 + "\n")
    run(tmp_path, teachers["bert"], "bert", tmp_path / "text")
    printed = capsys.readouterr().err
    assert "2 sequences (1 of them of 11 ids or fewer, which are not trained on)" in printed
    assert "32 words," in printed and "Skipped 1 blank lines" in printed


@pytest.mark.parametrize(
    ("num_known", "num_unknown", "expected"), [(0, 1, "100.0%"), (19, 1, "5.0%"), (20, 1, None)]
)
def test_from_5_percent_of_unknown_ids_on_a_warning_says_so(
    num_known, num_unknown, expected, teachers, tmp_path, capsys
):
    """A FASTA file without spaces became one unknown id a line, with status 0 and no word."""
    tokenizer = load_tokenizer(architecture_named("bert"), str(teachers["bert"]), "")
    word = next(word for word in ("a", "e", "i", "o", "u") if len(tokenizer.tokenize(word)) == 1)
    words = [word] * num_known + ["ACGT" * 60] * num_unknown
    (tmp_path / "text").write_text((" ".join(words) + "\n") * 3)
    run(tmp_path, teachers["bert"], "bert", tmp_path / "text")
    warnings = [line for line in capsys.readouterr().err.splitlines() if " WARNING " in line]
    assert [expected in line for line in warnings] == ([True] if expected else [])


BAD = {
    "folder without text": (["--file_path", "{tmp}/void"], "the folder holds no text"),
    "no match": (["--file_path", "{tmp}/*.none"], "no file matches"),
    "empty files": (["--file_path", "{tmp}/em*"], "every file of it is empty"),
    "latin": (["--file_path", "{tmp}/latin"], "latin:2: byte 3 of the line is not UTF-8"),
    "all bad": (
        ["--file_path", "{tmp}/bad", "--errors", "skip"],
        "1 lines, all blank or unreadable",
    ),
    "field": (
        ["--file_path", "{tmp}/a.jsonl", "--text_field", "body"],
        "a.jsonl:1: has no field 'body', only text",
    ),
    "workers": (
        ["--file_path", "{tmp}/text", "--num_workers", "0"],
        "--num_workers 0: expected 1 to 1024",
    ),
    "vocab alone": (
        ["--file_path", "{tmp}/text", "--vocab_size", "9"],
        "is for --token_counts_dump only",
    ),
    "vocab small": (
        ["--file_path", "{tmp}/text", "--vocab_size", "9", "--token_counts_dump", "{tmp}/c"],
        "has ids up to",
    ),
    "one name": (
        ["--file_path", "{tmp}/text", "--token_counts_dump", "{tmp}/old.tiny-bert.pickle"],
        "two outputs have one name",
    ),
    "card over input": (
        ["--file_path", "{tmp}/corpus.json", "--token_counts_dump", "{tmp}/corpus"],
        "would overwrite",
    ),
    "card over notes": (
        ["--file_path", "{tmp}/text", "--token_counts_dump", "{tmp}/notes"],
        "{tmp}/notes.json: exists, and no mark shows that this program made it",
    ),
    "counts over a store": (
        ["--file_path", "{tmp}/text", "--token_counts_dump", "{tmp}/st"],
        "st: is the prefix of a store",
    ),
    "report": (
        ["--file_path", "{tmp}/text", "--report", "{tmp}/void"],
        "--report {tmp}/void: is a folder",
    ),
    "input": (["--file_path", "{tmp}/text", "--report", "{tmp}/text"], "would overwrite"),
    "inside input": (
        ["--file_path", "{tmp}/latin", "--token_counts_dump", "{tmp}/latin/x"],
        "latin is not a folder",
    ),
    "format": (["--file_path", "{tmp}/text", "--format", "numpy"], "invalid choice: 'numpy'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, teachers, tmp_path, status_and_errors):
    (tmp_path / "void").mkdir()
    for file, content in {
        "empty": b"",
        "latin": b"gut\nab\xfc\n",
        "bad": b"\xff\n",
        "text": b"bake limo\n",
        "a.jsonl": b'{"text": "bake"}\n',
        "corpus.json": b'{"text": "bake"}\n',
        "notes.json": b"{}",
        "st.idx": b"x",
        "old.tiny-bert.pickle": b"old",
        "old.tiny-bert.pickle.json": b'{"format": "distil-tokens"}',  # known as this program's
    }.items():
        (tmp_path / file).write_bytes(content)
    arguments, expected = (
        [part.format(tmp=tmp_path) for part in parts] for parts in (BAD[name][0], [BAD[name][1]])
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    flags = [
        *arguments,
        "--tokenizer_name",
        str(teachers["bert"]),
        "--dump_file",
        str(tmp_path / "old"),
    ]
    status, errors = status_and_errors(binarized_data.main, flags)
    assert status == 2 and len(errors) == 1 and expected[0] in errors[0], errors
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file_format", ["pickle", "store"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_between_the_renames_leaves_no_mix_of_old_and_new(
    number, file_format, teachers, lines, tmp_path
):
    (tmp_path / "text").write_text("\n".join(lines))
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import binarized_data, utils
from distil.system.signals import exit_on_sigterm
exit_on_sigterm()
rename, renamed = os.replace, []
def replace(*paths):
    rename(*paths)
    renamed.append(paths)
    if len(renamed) == 1 and sys.argv[1] != "0":
        os.kill(os.getpid(), int(sys.argv[1]))
os.replace = replace
flags = ["--file_path", "text", "--tokenizer_name", {str(teachers["bert"])!r}, "--dump_file", "out"]
flags += ["--format", {file_format!r}, "--seed", sys.argv[2]]
utils.run_program(lambda: binarized_data.main(flags))
"""
    name = "out.tiny-bert" + (".pickle" if file_format == "pickle" else "")
    contents = []
    for how, seed in ((0, 1), (0, 2), (0, 1)):
        assert run_process(sys.executable, "-c", code, how, seed, cwd=tmp_path).returncode == 0
        contents.append(open_token_file(tmp_path / name).ids_M[:].tolist())
    done = run_process(sys.executable, "-c", code, int(number), 2, cwd=tmp_path)
    assert done.returncode == (143 if number == signal.SIGTERM else -9)
    if (
        number == signal.SIGTERM or file_format == "pickle"
    ):  # the signal waited; a pickle alone is whole
        assert open_token_file(tmp_path / name).ids_M[:].tolist() == contents[1]
    else:
        with pytest.raises(InputError, match="no such file"):
            open_token_file(tmp_path / name)


def wait_for(condition, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_leaves_nothing_under_a_final_name(
    number, status, teachers, lines, tmp_path
):
    (tmp_path / "text").write_text("".join(f"{line} {k}\n" for k in range(400) for line in lines))
    command = [
        sys.executable,
        str(ROOT / "scripts" / "binarized_data.py"),
        "--file_path",
        str(tmp_path / "text"),
        "--tokenizer_name",
        str(teachers["bert"]),
        "--dump_file",
        str(tmp_path / "out"),
        "--format",
        "store",
        "--num_workers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob(".out*/spool.ids")))
    process.send_signal(number)
    assert process.wait(30) == status
    left = [path.name for path in tmp_path.iterdir() if path.name != "text"]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
    assert number == signal.SIGKILL or not left
    done = run_process(*command)
    assert done.returncode == 0, done.stderr
    assert len(open_token_file(tmp_path / "out.tiny-bert").lengths_N) == 400 * 240


@pytest.mark.parametrize("limit", [2**12, 2**16])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(limit, teachers, lines, tmp_path):
    """A limit on file sizes simulates the full disk: in the spool, and in the output."""
    (tmp_path / "text").write_text("\n".join(lines * 4))
    (tmp_path / "out.tiny-bert.pickle").write_text("old")
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import binarized_data, utils
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
flags = ["--file_path", "text", "--tokenizer_name", {str(teachers["bert"])!r}, "--dump_file", "out"]
utils.run_program(lambda: binarized_data.main([*flags, "--force"]))
"""
    done = run_process(sys.executable, "-c", code, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "error: [Errno 27]" in last and "out.tiny-bert" in last, (
        done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tiny-bert.pickle", "text"]
    assert (tmp_path / "out.tiny-bert.pickle").read_text() == "old"


def test_files_of_two_vocabularies_are_not_counted_together(
    teachers, large_vocabulary, text_file, tmp_path, status_and_errors
):
    first = run(tmp_path, teachers["bert"], "bert", text_file)
    second = run(tmp_path, large_vocabulary, "bert", text_file, "--format", "store")
    flags = [
        "--data_file",
        str(first),
        str(second),
        "--token_counts_dump",
        str(tmp_path / "counts"),
        "--vocab_size",
        "119547",
    ]
    status, errors = status_and_errors(token_counts.main, flags)
    assert (
        status == 2
        and "was made with the tokenizer" in errors[0]
        and str(first) in errors[0]
        and len(errors) == 1
    )
    assert not (tmp_path / "counts").exists()
