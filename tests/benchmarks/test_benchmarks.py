"""The benchmark programs run; no test asserts a time."""

import json

import pytest

import benchmark_data


@pytest.mark.long
def test_the_data_benchmark_measures_everything(teachers, text_file, tmp_path, capsys):
    path = tmp_path / "found.json"
    benchmark_data.main(
        [
            "--text",
            str(text_file),
            "--tokenizer_name",
            str(teachers["bert"]),
            "--languages",
            str(text_file),
            "--small_mb",
            "1",
            "--large_mb",
            "2",
            "--num_sequences",
            "3000",
            "--folder",
            str(tmp_path),
            "--json",
            str(path),
        ]
    )
    found = json.loads(path.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    for beginning in (
        "tokenizing: a line at a time",
        "tokenizing: the library",
        "tokenizing: binarized_data",
        "exactness",
        "binarizing 1 MB into a store",
        "binarizing 2 MB into a pickle",
        "counting the store",
        "opening the store",
        "store of 3,000 sequences",
        "pickle of 300 sequences: pickle.load",
        "collating",
    ):
        assert any(what.startswith(beginning) for what in rows), beginning
    assert found["flags"]["num_sequences"] == 3000 and found["tokenizers"]
    assert len(capsys.readouterr().out.splitlines()) == len(found["rows"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["found.json"]


def test_bad_numbers_are_one_line(status_and_errors):
    status, errors = status_and_errors(benchmark_data.main, ["--num_sequences", "0"])
    assert status == 2 and errors == ["--num_sequences 0: expected at least 1"]
