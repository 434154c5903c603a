"""The preprocessing and extraction programs: files, names, bad input."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import as_uint16, run_process, write_pickle
from stand_ins import ROOT, model_facts

import binarized_data
import extract
import extract_distilbert
import token_counts
from distil.data.encoding import Encoding
from distil.data.token_files import open_token_file
from distil.models.architectures import architecture_named as row
from distil.models.tokenizers import load_tokenizer
from lm_seqs_dataset import read_token_counts

TYPES = ("bert", "roberta", "gpt2")


def binarize(tmp_path, teacher, kind, text, **flags):
    """Binarize a text; return the sequences in the file's order."""
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = [
        "--file_path",
        str(path),
        "--tokenizer_type",
        kind,
        "--tokenizer_name",
        str(teacher),
    ]
    arguments += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    binarized_data.main([*arguments, "--dump_file", str(tmp_path / "out")])
    with open(tmp_path / f"out.tiny-{kind}.pickle", "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize("kind", TYPES)
def test_ids_of_a_line_stand_between_the_boundary_tokens(kind, teachers, lines, tmp_path):
    text = "\n".join(f"  {line}\t" for line in lines)
    found = binarize(tmp_path, teachers[kind], kind, text)
    tokenizer = load_tokenizer(row(kind), str(teachers[kind]), "")
    start, end = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}.get(
        kind, ("<|endoftext|>",) * 2
    )
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (start, end)]
    expected = [
        [ends[0], *tokenizer.encode(line, add_special_tokens=False), ends[1]] for line in lines
    ]
    assert all(
        isinstance(ids, np.ndarray) and ids.dtype == np.uint16 and ids.ndim == 1 for ids in found
    )
    assert sorted(ids.tolist() for ids in found) == sorted(expected)
    assert [ids.tolist() for ids in found] != expected, "the order is shuffled"


def test_the_shuffle_is_seeded(teachers, lines, tmp_path):
    text = "\n".join(lines)
    orders = [
        [ids.tolist() for ids in binarize(tmp_path, teachers["bert"], "bert", text, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_text_of_a_special_token_becomes_that_token(teachers, tmp_path):
    (found,) = binarize(tmp_path, teachers["bert"], "bert", "bake [MASK] limo")
    assert load_tokenizer(row("bert"), str(teachers["bert"]), "").mask_token_id in found


@pytest.mark.parametrize(
    "text", [b"bake\n\n  \r\nlimo\n\t\n", b"\xef\xbb\xbfbake\r\nlimo", b"bake\nlimo\n\n"]
)
def test_blank_lines_byte_order_marks_and_line_ends_are_not_text(text, teachers, tmp_path):
    plain = binarize(tmp_path, teachers["bert"], "bert", "bake\nlimo")
    assert sorted(map(list, binarize(tmp_path, teachers["bert"], "bert", text))) == sorted(
        map(list, plain)
    )


def test_a_trailing_slash_does_not_reach_the_name(teachers, tmp_path):
    binarize(tmp_path, f"{teachers['bert']}/", "bert", "bake limo")
    assert (tmp_path / "out.tiny-bert.pickle").exists()


def test_long_lines_are_kept_whole(teachers, tmp_path, recwarn):
    (found,) = binarize(tmp_path, teachers["gpt2"], "gpt2", "bake " * 3000)
    assert len(found) > 3000 and not recwarn.list


def test_the_dtype_follows_the_largest_id():
    for largest, dtype in ((65534, np.uint16), (65535, np.int32), (119546, np.int32)):
        assert Encoding(None, 1, 2, largest, None).dtype == dtype


def test_counts_are_a_list_of_the_vocabularys_length(tmp_path):
    data = write_pickle(tmp_path / "data.pickle", as_uint16([[2, 5, 5, 3], [2, 9, 3]]))
    token_counts.main(
        [
            "--data_file",
            data,
            "--token_counts_dump",
            str(tmp_path / "counts.pickle"),
            "--vocab_size",
            "12",
        ]
    )
    with open(tmp_path / "counts.pickle", "rb") as file:
        counts = pickle.load(file)
    assert counts == [0, 0, 2, 2, 0, 2, 0, 0, 0, 1, 0, 0] and {type(count) for count in counts} == {
        int
    }
    assert read_token_counts(tmp_path / "counts.pickle", model_facts(12, "a teacher")).sum() == 7


def test_extraction_programs_write_plain_state_dicts(world):
    for kind in TYPES:
        state = torch.load(world.first_weights(kind), weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_layers_are_chosen_by_flag(teachers, tmp_path):
    path = str(tmp_path / "first.pth")
    extract.main(
        [
            "--model_type",
            "gpt2",
            "--model_name",
            str(teachers["gpt2"]),
            "--dump_checkpoint",
            path,
            "--layers",
            "3",
            "1",
        ]
    )
    state = torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    teacher = load_file(teachers["gpt2"] / "model.safetensors")
    for new, old in ((0, 3), (1, 1)):
        name = "transformer.h.{}.attn.c_attn.weight"
        assert torch.equal(
            state[name.format(new)],
            teacher.get(name.format(old), teacher.get(f"h.{old}.attn.c_attn.weight")),
        )


def test_extraction_says_what_it_took(teachers, tmp_path, capsys):
    path = str(tmp_path / "first.pth")
    extract_distilbert.main(
        ["--model_name", str(teachers["bert"]), "--dump_checkpoint", path, "--num_layers", "2"]
    )
    assert "Took 2 layers (0 3) and 38 tensors." in capsys.readouterr().out


@pytest.mark.parametrize("files", ["all", "vocabulary"])
def test_hub_names_work_like_folders(files, teachers, tmp_path):
    """A hub cache as a download leaves it, read offline; with a bare vocabulary, too."""
    snapshot = tmp_path / "home" / "hub" / "models--owner--tiny-bert" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(teachers["bert"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    if files == "vocabulary":
        vocabulary = json.loads((snapshot / "tokenizer.json").read_text())["model"]["vocab"]
        (snapshot / "vocab.txt").write_text(
            "\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n"
        )
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer_config.json").unlink()
    (tmp_path / "text").write_text("bake limo\n")
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    commands = [
        [
            "binarized_data.py",
            "--file_path",
            "text",
            "--tokenizer_name",
            "owner/tiny-bert",
            "--dump_file",
            "out",
        ],
        [
            "extract_distilbert.py",
            "--model_name",
            "owner/tiny-bert",
            "--dump_checkpoint",
            "first.pth",
        ],
    ]
    for program, *arguments in commands:
        done = run_process(
            sys.executable,
            ROOT / "scripts" / program,
            *arguments,
            cwd=tmp_path,
            timeout_s=60,
            **offline,
        )
        assert done.returncode == 0, done.stderr
    tokens = open_token_file(tmp_path / "out.tiny-bert.pickle")
    found, _ = tokens.ids_M, tokens.lengths_N
    tokenizer = load_tokenizer(row("bert"), str(teachers["bert"]), "")
    assert found.tolist() == tokenizer.encode("bake limo")
    missing = [*commands[0][1:4], "owner/no-such", "--dump_file", "other"]
    done = run_process(
        sys.executable,
        ROOT / "scripts" / commands[0][0],
        *missing,
        cwd=tmp_path,
        timeout_s=60,
        **offline,
    )
    assert (
        done.returncode == 2
        and "--tokenizer_name owner/no-such: neither a local folder nor" in done.stderr
    )


BAD = {
    "no text": (binarized_data, ["--file_path", "nowhere"], "--file_path nowhere: no such file"),
    "empty text": (binarized_data, ["--file_path", "{tmp}/empty"], "empty: the file is empty"),
    "blank text": (
        binarized_data,
        ["--file_path", "{tmp}/blank", "--tokenizer_name", "{bert}"],
        "2 lines, all blank",
    ),
    "not utf-8": (
        binarized_data,
        ["--file_path", "{tmp}/latin", "--tokenizer_name", "{bert}"],
        "latin:2: byte 3 of the line",
    ),
    "wrong type": (
        binarized_data,
        ["--file_path", "{tmp}/text", "--tokenizer_name", "{gpt2}"],
        "--tokenizer_name",
    ),
    "unknown flag": (
        binarized_data,
        ["--file-path", "x"],
        "unknown argument --file-path; did you mean --file_path?",
    ),
    "prefix": (
        binarized_data,
        ["--file_path", "{tmp}/text", "--dump_file", "{tmp}/"],
        "ends with a slash",
    ),
    "output is input": (
        token_counts,
        ["--data_file", "{tmp}/data", "--token_counts_dump", "{tmp}/data"],
        "would overwrite",
    ),
    "output is a folder": (
        token_counts,
        ["--data_file", "{tmp}/data", "--token_counts_dump", "{tmp}"],
        "is a folder",
    ),
    "output below a file": (
        binarized_data,
        ["--file_path", "{tmp}/text", "--dump_file", "{tmp}/old/x"],
        "old is not a folder",
    ),
    "output in the model": (
        extract,
        ["--model_name", "{roberta}", "--dump_checkpoint", "{roberta}/model.safetensors"],
        "would overwrite",
    ),
    "huge vocabulary": (
        token_counts,
        ["--data_file", "{tmp}/data", "--vocab_size", "1000000000000"],
        "--vocab_size",
    ),
    "no data": (token_counts, ["--data_file", "nowhere"], "--data_file nowhere: no such file"),
    "vocabulary": (
        token_counts,
        ["--data_file", "{tmp}/data", "--vocab_size", "5"],
        "token id 9 is outside the vocabulary",
    ),
    "no layer": (
        extract,
        ["--model_name", "{roberta}", "--layers", "4"],
        "--layers 4: the teacher has layers 0 to 3",
    ),
    "too many": (
        extract,
        ["--model_name", "{roberta}", "--num_layers", "5"],
        "--num_layers 5: expected 1 to 4",
    ),
    "zero": (
        extract_distilbert,
        ["--model_name", "{bert}", "--num_layers", "0"],
        "--num_layers 0: expected 1 to 4",
    ),
    "other model": (
        extract_distilbert,
        ["--model_name", "{gpt2}"],
        "is a gpt2 model, expected bert",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_the_output_alone(
    name, teachers, tmp_path, status_and_errors
):
    program, arguments, expected = BAD[name]
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n\n")
    (tmp_path / "latin").write_bytes(b"gut\nab\xfc\n")
    (tmp_path / "text").write_text("bake limo")
    write_pickle(tmp_path / "data", as_uint16([[2, 9, 3]]))
    output = {"binarized_data": "--dump_file", "token_counts": "--token_counts_dump"}.get(
        program.__name__, "--dump_checkpoint"
    )
    target = tmp_path / "old"
    target.write_text("old")
    arguments = [word.format(tmp=tmp_path, **teachers) for word in arguments]
    if output not in arguments:
        arguments += [output, str(target)]
    arguments.append("--force")
    before = sorted(path.name for path in tmp_path.iterdir())
    status, errors = status_and_errors(program.main, arguments)
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert (
        target.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == before
    )


def test_token_files_from_the_program_are_read_back(world):
    for kind in TYPES:
        tokens = open_token_file(world.data(kind))
        assert tokens.lengths_N.sum() == len(tokens.ids_M) and len(tokens.lengths_N) == 240


def test_preparing_data_does_without_torch(teachers, text_file, tmp_path):
    """A second to start, and memory for as many processes as there are cores."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import binarized_data, token_counts, utils
flags = ["--tokenizer_name", {str(teachers["bert"])!r}, "--dump_file", "out"]
utils.run_program(lambda: binarized_data.main(["--file_path", {str(text_file)!r}, *flags]))
flags = ["--token_counts_dump", "counts", "--vocab_size", "200"]
token_counts.main(["--data_file", "out.tiny-bert.pickle", *flags])
assert "torch" not in sys.modules
"""
    done = run_process(sys.executable, "-c", code, cwd=tmp_path, timeout_s=60)
    assert done.returncode == 0, done.stderr
