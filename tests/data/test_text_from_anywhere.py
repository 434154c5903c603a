"""Text from data sets, saved folders and pipes; interrupted runs; shards that join to the whole."""

import gzip
import itertools
import json
import os
import pickle
import random
import sys
import threading
from pathlib import Path

import datasets
import pytest
from conftest import run_process
from stand_ins import ROOT, make_lines

import binarized_data
import join_tokens
import prepare_text
from distil.data import shuffle
from distil.data.hub_datasets import Dataset, find_dataset, find_files
from distil.data.partial import partial_folder
from distil.data.sharding import Shard, parse_shard, part_of
from distil.data.text_sources import find_sources, read_blocks
from distil.data.token_files import open_token_file
from utils import InputError

ROWS = 2500  # of each shard: three blocks
SHARDS = 3


@pytest.fixture(scope="module")
def rows():
    lines = make_lines(ROWS * SHARDS // 10, seed=5)
    return [f"{line} {k}" for k in range(10) for line in lines]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, rows):
    """A local repository of three parquet files, as the hub holds them."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("hub") / "corpus"
    (folder / "data").mkdir(parents=True)
    for k in range(SHARDS):
        texts = rows[k * ROWS : (k + 1) * ROWS]
        table = pyarrow.table({"body": texts, "n": range(ROWS)})
        pyarrow.parquet.write_table(table, folder / f"data/train-{k:05d}-of-{SHARDS:05d}.parquet")
    return folder


def texts_of(sources, field="body") -> list:
    blocks = itertools.chain.from_iterable(read_blocks(source, field) for source in sources)
    return [text for block in blocks for text in block.content]


def test_a_data_set_is_the_same_streamed_and_copied(repository, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for streaming in (True, False):
        dataset = Dataset(str(repository), split="train", streaming=streaming)
        sources = find_dataset(dataset, "body")
        assert texts_of(sources) == rows and len(sources) == (SHARDS if streaming else 1)
        copies = list((tmp_path / "cache").glob("**/*.arrow"))
        assert bool(copies) != streaming, "streaming writes no copy"


def test_a_folder_of_save_to_disk_is_read_in_its_order(rows, tmp_path):
    table = datasets.Dataset.from_dict({"body": rows[:20]})
    table.save_to_disk(tmp_path / "one", num_shards=12)  # 10 comes before 2 by name
    datasets.DatasetDict({"test": table, "train": table}).save_to_disk(tmp_path / "two")
    assert texts_of(find_files(str(tmp_path / "one"))) == rows[:20]
    assert texts_of(find_files(str(tmp_path / "two"), "test")) == rows[:20]
    assert texts_of(find_dataset(Dataset(str(tmp_path / "one")), "body")) == rows[:20]
    with pytest.raises(InputError, match="holds the splits test, train; name one with --split"):
        find_files(str(tmp_path / "two"))


# --------------------------------------------------------------------------------------------------
# Interruptions
# --------------------------------------------------------------------------------------------------


def killed_at(program: str, flags: list[str], state: int, folder: Path) -> str:
    """Run a program that saves its state after every block, and kill it at one; return stderr.

    state: how many states are saved; 0: it runs to its end.
    """
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import {program}, utils
from distil.data import partial
partial.SAVE_S, replace, saved = 0, os.replace, []
def counting(*paths):
    replace(*paths)
    if str(paths[1]).endswith("state.json"):
        saved.append(paths)
        if len(saved) == {state}:
            os.kill(os.getpid(), signal.SIGKILL)
os.replace = counting
utils.run_program(lambda: {program}.main({flags!r}))
"""
    done = run_process(sys.executable, "-c", code, cwd=folder, HF_HUB_OFFLINE="1")
    assert done.returncode == (-9 if state else 0), done.stderr
    return done.stderr


PROGRAMS = {
    "binarized_data": ["--tokenizer_name", "{bert}", "--num_workers", "1", "--format", "store"],
    "prepare_text": ["--max_chars", "60"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_streamed_data_set_killed_twice_gives_the_same_bytes(
    program, repository, teachers, tmp_path
):
    read = ["--dataset_name", str(repository), "--streaming", "--text_field", "body"]
    flags = [*read, *(word.format(bert=teachers["bert"]) for word in PROGRAMS[program])]
    output = "--dump_file" if program == "binarized_data" else "--output"
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    main = {"binarized_data": binarized_data, "prepare_text": prepare_text}[program].main
    main([*flags, output, str(tmp_path / "whole" / "out")])
    flags += [output, "out"]
    killed_at(program, flags, 2, tmp_path / "cut")  # within the first shard
    left = [path.name for path in (tmp_path / "cut").iterdir()]
    assert len(left) == 1 and left[0].startswith(".out") and left[0].endswith(".partial")
    second = killed_at(program, flags, 5, tmp_path / "cut")  # in the second shard
    assert "shard 1, row 2001 is next" in second
    third = killed_at(program, flags, 0, tmp_path / "cut")
    assert "shard 2, row 2501 is next" in third or "shard 2, row 2001 is next" in third
    found = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("whole", "cut")
    ]
    assert found[0] == found[1] and found[0]


@pytest.mark.slow
def test_a_data_set_is_tokenized_on_several_processes(repository, rows, teachers, tmp_path):
    (tmp_path / "text").write_text("\n".join(rows))
    common = ["--tokenizer_name", teachers["bert"], "--dump_file", "out", "--num_workers"]
    found = []
    for flags in (
        ["--dataset_name", repository, "--streaming", "--text_field", "body", *common, 2],
        ["--file_path", "text", *common, 1],
    ):
        program = ROOT / "scripts" / "binarized_data.py"
        done = run_process(sys.executable, program, *flags, cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / "out.tiny-bert.pickle").read_bytes())
    assert found[0] == found[1]


def test_a_state_of_other_flags_or_text_is_not_continued(tmp_path, capsys):
    output = tmp_path / "out"
    for identity, expected in (({"a": 1}, {}), ({"a": 1}, {"rows": 7}), ({"a": 2}, {})):
        with pytest.raises(KeyError), partial_folder(output, identity) as partial:
            assert partial.state == expected
            if identity == {"a": 1}:
                partial.save({"rows": 7})
            raise KeyError
    assert not list(tmp_path.iterdir()), "nothing is kept where no state was saved"


def test_two_runs_do_not_share_a_partial_folder(tmp_path):
    with partial_folder(tmp_path / "out", {}) as partial:
        with (
            pytest.raises(InputError, match="another run writes it"),
            partial_folder(tmp_path / "out", {}),
        ):
            pass
        assert partial.folder.is_dir()


# --------------------------------------------------------------------------------------------------
# Pipes
# --------------------------------------------------------------------------------------------------


def tokens_of(tmp_path: Path, teacher: Path, *flags: str) -> list[int]:
    flags = [*flags, "--tokenizer_name", str(teacher), "--dump_file", str(tmp_path / "out")]
    binarized_data.main(flags)
    return open_token_file(tmp_path / f"out.{teacher.name}.pickle").ids_M[:].tolist()


def write_to_end(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb") as file:
        file.write(content)


@pytest.mark.parametrize("is_record", [False, True])
def test_pipes_are_read_as_files_are(is_record, teachers, lines, tmp_path, monkeypatch, caplog):
    records = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    content = (records if is_record else "\n".join(lines)).encode()
    (tmp_path / ("file.jsonl" if is_record else "file.txt")).write_bytes(content)
    expected = tokens_of(tmp_path, teachers["bert"], "--file_path", str(tmp_path / "file.*"))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    assert expected == tokens_of(tmp_path, teachers["bert"], "--file_path", str(tmp_path / "pipe"))
    writer.join()
    read_end, write_end = os.pipe()
    writer = threading.Thread(target=write_to_end, args=(write_end, content))
    kept = os.dup(0)
    os.dup2(read_end, 0)
    try:
        os.close(read_end)
        writer.start()
        assert expected == tokens_of(tmp_path, teachers["bert"], "--file_path", "-")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        writer.join()


# --------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------


def test_the_parts_of_machines_are_the_lines_of_the_whole(tmp_path):
    rng = random.Random(3)
    for number in range(60):
        data = "".join(rng.choice(["a", "bé", " ", "\n", "\r\n", "\r"]) for _ in range(80)).encode()
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + data)
        (tmp_path / "b.txt").write_bytes(b"one\ntwo" * rng.randrange(1, 9))
        sources, of = find_sources(str(tmp_path)), rng.randrange(1, 9)
        parts = [part_of(sources, Shard(k, of)) for k in range(1, of + 1)]
        size = rng.randrange(1, 40)
        found = [
            (Path(block.path).name, block.first + k, line)
            for part in parts
            for source in part
            for block in read_blocks(source, "text", block_bytes=size)
            for k, line in enumerate(block.content.decode().splitlines())
        ]
        assert found == [
            (source.path.rpartition("/")[2], 1 + k, line)
            for source in sources
            for k, line in enumerate(Path(source.path).read_bytes().decode().splitlines())
        ]


def write_files(folder: Path, lines: list[str]) -> None:
    folder.mkdir()
    (folder / "a.txt").write_bytes("\r\n".join(lines[:100]).encode())
    records = [json.dumps({"text": line}) for line in lines[100:]]
    (folder / "b.jsonl").write_text("\n".join(records[:100]) + "\n\n")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(records[100:]).encode()))


@pytest.mark.parametrize("file_format", ["pickle", "store"])
@pytest.mark.parametrize("what", ["files", "data set"])
def test_joined_shards_are_the_bytes_of_one_machine(
    what, file_format, teachers, lines, repository, tmp_path, monkeypatch
):
    monkeypatch.setattr(shuffle, "SPOOL_IDS", 2000)
    write_files(tmp_path / "text", lines)
    flags = ["--tokenizer_name", str(teachers["bert"]), "--format", file_format, "--seed", "9"]
    flags += ["--num_workers", "1"]
    if what == "files":
        flags += ["--file_path", str(tmp_path / "text")]
    else:
        flags += ["--dataset_name", str(repository), "--streaming", "--text_field", "body"]
    found = []
    for of in (0, 1, 2, 5):
        folder = tmp_path / str(of)
        folder.mkdir()
        flags_of_run = [*flags, "--dump_file", str(folder / "out")]
        counts = ["--token_counts_dump", str(folder / "counts")]
        if not of:
            binarized_data.main([*flags_of_run, *counts])
        for number in range(1, of + 1):
            binarized_data.main([*flags_of_run, "--shard", f"{number}/{of}"])
        if of:
            join_tokens.main(["--shards", str(folder / "out.tiny-bert"), *counts])
        for path in folder.glob("*.shard-*"):
            path.unlink()
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert all(one == found[0] for one in found) and len(found[0]) == (
        5 if file_format == "store" else 4
    )
    assert sum(pickle.loads(found[0]["counts"])) > 0


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="expected I/N with I from 1 to N"):
        parse_shard(text)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, teachers, text_file):
    folder = tmp_path_factory.mktemp("shards")
    flags = ["--tokenizer_name", str(teachers["bert"]), "--file_path", str(text_file)]
    for shard, seed in (("1/2", 1), ("2/2", 1), ("2/2", 2), ("1/3", 1)):
        name = str(folder / ("other" if seed == 2 else "out"))
        binarized_data.main([*flags, "--dump_file", name, "--shard", shard, "--seed", str(seed)])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


WRONG_SHARDS = {
    "none": ({}, "found none"),
    "one missing": ({"1-of-2": "out 1-of-2"}, "1 of 2 shards are missing, such as 2/2"),
    "two sets": (
        {"1-of-2": "out 1-of-2", "2-of-2": "out 2-of-2", "1-of-3": "out 1-of-3"},
        "found shards of 2 and of 3 machines",
    ),
    "another seed": ({"1-of-2": "out 1-of-2", "2-of-2": "other 2-of-2"}, "its seed is 2"),
    "renamed": ({"1-of-2": "out 1-of-2", "2-of-2": "out 1-of-2"}, "not the card of shard 2/2"),
    "damaged": ({"1-of-2": "out 1-of-2", "2-of-2": "out 2-of-2"}, "differ from their checksum"),
    "no ids": ({"1-of-2": "out 1-of-2", "2-of-2": "out 2-of-2"}, "2-of-2.bin: no such file"),
}


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_wrong_shards_are_one_line_and_leave_nothing(name, shards, tmp_path, status_and_errors):
    files, expected = WRONG_SHARDS[name]
    for target, source in files.items():
        stem, number = source.split()
        for suffix in (".bin", ".idx", ".json"):
            content = shards[f"{stem}.tiny-bert.shard-{number}{suffix}"]
            (tmp_path / f"all.tiny-bert.shard-{target}{suffix}").write_bytes(content)
    if name == "damaged":
        path = tmp_path / "all.tiny-bert.shard-2-of-2.bin"
        path.write_bytes(damaged(path.read_bytes()))
    if name == "no ids":
        (tmp_path / "all.tiny-bert.shard-2-of-2.bin").unlink()
    (tmp_path / "all.tiny-bert.pickle").write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["--shards", str(tmp_path / "all.tiny-bert"), "--force"]
    status, errors = status_and_errors(join_tokens.main, arguments)
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

STREAMED = ["--dataset_name", "{repository}", "--streaming"]
BAD = {
    "no data set": (["--dataset_name", "{tmp}/nowhere"], "nowhere --split train: the data set"),
    "no split": ([*STREAMED, "--split", "dev"], "Available splits: ['train']"),
    "no configuration": ([*STREAMED, "--dataset_config", "de"], "'de' not found"),
    "no field": (STREAMED, "corpus[train]:1: has no field 'text', only body, n"),
    "no text": ([*STREAMED, "--text_field", "n"], "'n' is of type int, expected text"),
    "two places": ([*STREAMED, "--file_path", "{tmp}/text"], "give one of them"),
    "streamed file": (["--file_path", "{tmp}/text", "--streaming"], "--streaming: is for a data"),
    "split of a file": (["--file_path", "{tmp}/text", "--split", "a"], "--split a: is for"),
}
OF_TOKENS = {
    "extras of a shard": (
        ["--file_path", "{tmp}/text", "--shard", "1/2", "--report"],
        "--report is of the whole text; pass it to scripts/join_tokens.py",
    ),
    "pipe of a table": (["--file_path", "{tmp}/pipe.csv"], "is a pipe of csv, expected lines"),
    "shard of a pipe": (["--file_path", "-", "--shard", "1/2"], "no two machines can read"),
}
OF_LINES = {
    "nothing": ([], "--file_path or --dataset_name: expected one of them"),
    "languages": ([*STREAMED, "--by_language"], "--by_language: is for --file_path"),
}
CASES = [
    *((binarized_data.main, name, *row) for name, row in (BAD | OF_TOKENS).items()),
    *((prepare_text.main, name, *row) for name, row in (BAD | OF_LINES).items()),
]


@pytest.mark.parametrize("main, name, arguments, expected", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(
    main, name, arguments, expected, repository, teachers, tmp_path, status_and_errors, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "text").write_text("bake limo\n")
    os.mkfifo(tmp_path / "pipe.csv")
    words = [word.format(tmp=tmp_path, repository=repository) for word in arguments]
    if main is binarized_data.main:
        words += ["--tokenizer_name", str(teachers["bert"]), "--num_workers", "1"]
        words += ["--dump_file", str(tmp_path / "text")]
    else:
        (tmp_path / "old").write_text("old")
        words += ["--output", str(tmp_path / "old"), "--force"]
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    status, errors = status_and_errors(main, words)
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    found = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    assert found == before
