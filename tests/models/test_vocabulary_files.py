"""Faults of a bare vocabulary's files are named by every program that loads a tokenizer of them."""

import json
import re
import shutil

import families
import pytest
from stand_ins import make_model

import binarized_data
import extract
from distil.models.architectures import ANY_TOKENIZER, ARCHITECTURES
from distil.models.tokenizers import load_tokenizer
from utils import InputError

LINES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat"]
TEXT = "".join(f"{line}\n" for line in LINES)

FAULTS = {  # -> content of vocab.txt, message
    "a byte-order mark": (b"\xef\xbb\xbf" + TEXT.encode(), "begins with a byte-order mark"),
    "blank last lines": (f"{TEXT}\n\n".encode(), r"ends with 2 blank line\(s\).* id 10; delete"),
    "a blank last line, CRLF": (f"{TEXT}\n".replace("\n", "\r\n").encode(), "ends with 1 blank"),
    "UTF-16": (TEXT.encode("utf-16"), "vocab.txt is UTF-16"),
    "Latin-1": (TEXT.encode() + b"\xe9\n", "vocab.txt is not UTF-8"),
    "carriage returns": (TEXT.replace("\n", "\r").encode(), "ends its lines with carriage returns"),
    "two columns": (
        "".join(f"{line}\t{n}\n" for n, line in enumerate(LINES)).encode(),
        r"'\[PAD\]\\t0' on line 1, expected \[PAD\] alone",
    ),
}


@pytest.mark.parametrize("row", [ARCHITECTURES["bert"], ANY_TOKENIZER], ids=["bert", "auto"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_bare_vocabulary_is_named(name, row, tmp_path):
    content, message = FAULTS[name]
    families.tiny_config("bert", 9).save_pretrained(tmp_path)  # for the class of `auto`
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(row, str(tmp_path), "--tokenizer_name")
    assert str(caught.value).startswith(f"--tokenizer_name {tmp_path}: vocab.txt")


@pytest.mark.parametrize("content", [TEXT, TEXT[:-1], TEXT.replace("\n", "\r\n")])
def test_line_ends_do_not_matter(content, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(content.encode())
    tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(tmp_path), "")
    assert tokenizer.get_vocab() == {line: number for number, line in enumerate(LINES)}


def test_blank_last_lines_with_rows_in_the_model_are_padding(tmp_path):
    (tmp_path / "vocab.txt").write_text(f"{TEXT}\n\n")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 16}))
    load_tokenizer(ARCHITECTURES["bert"], str(tmp_path), "")


def test_a_token_on_two_lines_is_a_warning(tmp_path, caplog):
    (tmp_path / "vocab.txt").write_text(f"{TEXT}cat\nmat\n")
    tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(tmp_path), "")
    assert "'cat' first: the id is of the last line, here 9" in caplog.text
    assert tokenizer.convert_tokens_to_ids("cat") == 9


MERGES, WORDS = b"#version: 0.2\na b\n", {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 9}
BPE_FAULTS = {  # -> vocab.json, merges.txt, message
    "BOM": (b"\xef\xbb\xbf{}", MERGES, "vocab.json begins with a byte-order mark"),
    "BOM of merges": (b"{}", b"\xef\xbb\xbf" + MERGES, "merges.txt begins with a byte-order mark"),
    "blank merges": (b"{}", MERGES + b"\n", r"merges.txt ends with 1 blank line\(s\)"),
    "an id twice": (b'{"a": 1, "b": 1}', MERGES, "vocab.json gives 2 tokens the id 1"),
    "no JSON": (b'{"a":', MERGES, "vocab.json is no JSON object of token and id"),
}


@pytest.mark.parametrize("name", BPE_FAULTS)
def test_a_fault_of_a_bare_bpe_is_named(name, tmp_path):
    vocabulary, merges, message = BPE_FAULTS[name]
    (tmp_path / "vocab.json").write_bytes(vocabulary)
    (tmp_path / "merges.txt").write_bytes(merges)
    with pytest.raises(InputError, match=message):
        load_tokenizer(ARCHITECTURES["gpt2"], str(tmp_path), "--tokenizer_name")


def test_ids_may_be_left_out(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    (tmp_path / "merges.txt").write_bytes(MERGES)
    tokenizer = load_tokenizer(ARCHITECTURES["gpt2"], str(tmp_path), "")
    assert tokenizer.encode("ab") == [9]


@pytest.mark.parametrize("name", ["a byte-order mark", "blank last lines"])
def test_extract_and_binarize_name_the_fault(name, tmp_path, status_and_errors):
    content, message = FAULTS[name]
    folder = tmp_path / "bare"
    make_model("bert", len(LINES)).save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(content)
    (tmp_path / "text").write_text("the cats sat\n" * 9)
    flags = ["--teacher", str(folder), "--num_layers", "2", "--output", str(tmp_path / "out")]
    found = [status_and_errors(extract.main, flags)]
    flags = ["--file_path", str(tmp_path / "text"), "--tokenizer_name", str(folder)]
    found.append(status_and_errors(binarized_data.main, [*flags, "--dump_file", str(folder / "d")]))
    for status, errors in found:
        assert status == 2 and len(errors) == 1
        assert re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


def test_extract_refuses_a_tokenizer_whose_ids_exceed_the_model(
    teachers, tmp_path, status_and_errors
):
    folder = tmp_path / "short"
    shutil.copytree(teachers["bert"], folder)
    make_model("bert", 150).save_pretrained(folder)
    flags = ["--teacher", str(folder), "--num_layers", "2", "--output", str(tmp_path / "out")]
    status, (error,) = status_and_errors(extract.main, flags)
    assert status == 2 and "ids up to 199, the model's vocabulary 150 entries" in error
