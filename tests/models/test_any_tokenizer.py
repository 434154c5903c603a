"""Tokenizers that nobody named: the ids of tokenizer.json everywhere, or a refusal in one line."""

import inspect
import json
import random
import shutil
from pathlib import Path

import drawn_tokenizers
import numpy as np
import pytest
import transformers
from drawn_tokenizers import SENTENCES, Draw

import binarized_data
import extract
import run_task
import token_counts
import train
from distil.data.token_files import open_token_file
from distil.tasks.loading import load_any_tokenizer
from utils import InputError

NUM_DEFAULT, NUM_SLOW = 20, 100


@pytest.fixture(scope="session")
def text_of_languages() -> list[str]:
    """Lines of words of 18 languages, mixed and apart."""
    rng, lines = random.Random(0), []
    for number in range(300):
        words = SENTENCES[number % len(SENTENCES)].split()
        if number % 3 == 0:
            words += rng.choice(SENTENCES).split()
        rng.shuffle(words)
        lines.append(" ".join(words[: rng.randint(5, 16)] + ["end"] * 4))
    return lines


def words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def expected_ids(one: Draw, backend, lines: list[str]) -> list[list[int]]:
    """Encode by tokenizer.json alone, with the boundary tokens of its roles."""
    backend.no_truncation()
    backend.no_padding()
    vocabulary, tokens = backend.get_vocab(), one.tokens
    is_gpt2 = one.model_type == "gpt2"
    starts = ("bos_token", "cls_token") if is_gpt2 else ("cls_token", "bos_token")
    ends = ("eos_token", "sep_token") if is_gpt2 else ("sep_token", "eos_token")
    if one.style == "gpt2" and not (is_gpt2 or one.states_roles):
        starts = ()  # no name says that <|endoftext|> begins a text
    first, last = (
        [vocabulary[tokens[role]] for role in roles if role in tokens][:1]
        for roles in (starts, ends)
    )
    encoded = backend.encode_batch(lines, add_special_tokens=False)
    return [[*first, *found.ids, *last] for found in encoded]


def check_works(one: Draw, folder: Path, lines: list[str]) -> None:
    """Assert the ids of tokenizer.json in binarized data, the exported student, the second step.

    Raises InputError where a program refuses.
    """
    teacher, text = folder / "teacher", folder / "text"
    teacher.mkdir(parents=True)
    backend = drawn_tokenizers.make_teacher(one, teacher, lines)
    expected = expected_ids(one, backend, lines)
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"file_path": text, "tokenizer_name": teacher, "dump_file": folder / "ids"}
    binarized_data.main(words(flags | {"tokenizer_type": "auto", "num_workers": 1}))
    data = folder / "ids.teacher.pickle"
    check_ids(data, expected)
    student = folder / "student"
    extract.main(words({"teacher": teacher, "num_layers": 1, "output": student}))
    train.main(train_flags(one, folder, student, teacher, data))
    for exported in (student, folder / "run"):
        check_folder(exported, backend, lines, one.is_masked)
    check_second_step(folder, backend, lines)


def check_ids(data: Path, expected: list[list[int]]) -> None:
    tokens = open_token_file(str(data))
    ends = np.cumsum(tokens.lengths_N)
    found = [
        tokens.ids_M[end - n : end].tolist() for end, n in zip(ends, tokens.lengths_N, strict=True)
    ]
    assert sorted(found) == sorted(expected), "the data has other ids than tokenizer.json gives"


def train_flags(one: Draw, folder: Path, student: Path, teacher: Path, data: Path) -> list[str]:
    flags = {
        "student": student,
        "teacher_name": teacher,
        "data_file": data,
        "dump_path": folder / "run",
        "n_gpu": 0,
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "alpha_ce": 5.0,
        "alpha_clm": 0.0 if one.is_masked else 0.5,
    }
    if one.is_masked:
        flags |= {"alpha_mlm": 2.0, "token_counts": folder / "counts", "mlm_smoothing": 0.7}
        num = json.loads((teacher / "config.json").read_text())["vocab_size"]
        counts = {"data_file": data, "token_counts_dump": folder / "counts", "vocab_size": num}
        token_counts.main(words(counts))
    return words(flags) + ["--mlm"] * one.is_masked


def check_folder(folder: Path, backend, lines: list[str], is_masked: bool) -> None:
    """Assert that AutoTokenizer gives a folder the ids of `backend`, and inputs for its model."""
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    found = loaded(lines, add_special_tokens=False)["input_ids"]
    expected = [one.ids for one in backend.encode_batch(lines, add_special_tokens=False)]
    assert found == expected, f"{folder.name}: AutoTokenizer gives other ids"
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    inputs = loaded(lines[0], lines[1], return_tensors="pt", truncation=True, max_length=32)
    assert set(inputs) <= set(inspect.signature(model.forward).parameters), f"inputs {set(inputs)}"
    model(**inputs)


def check_second_step(folder: Path, backend, lines: list[str]) -> None:
    tokenizer = load_any_tokenizer(str(folder / "run"), "--model_name_or_path")
    found = tokenizer(lines, add_special_tokens=False)["input_ids"]
    expected = [one.ids for one in backend.encode_batch(lines, add_special_tokens=False)]
    assert found == expected, "the second step has other ids"
    data = folder / "data"
    data.mkdir()
    rows = [f"{line.replace(chr(9), ' ')}\t{k % 2}" for k, line in enumerate(lines[:6])]
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    flags = {"task": "sst2", "model_name_or_path": folder / "run", "data_dir": data}
    flags |= {"output_dir": folder / "task", "max_steps": 1, "max_seq_length": 32, "seeds": 1}
    run_task.main(words(flags) + ["--no_cuda", "--save_models", "all"])
    saved = transformers.AutoTokenizer.from_pretrained(folder / "task" / "seed-1")
    found = saved(lines, add_special_tokens=False)["input_ids"]
    assert found == expected, "the fine-tuned folder has other ids"


def outcome(one: Draw, folder: Path, lines: list[str]) -> str:
    """Say "works", "refused: ..", or "wrong: .."."""
    try:
        check_works(one, folder, lines)
    except InputError as error:
        assert "\n" not in str(error) or all(str(error).split("\n")), error
        return f"refused: {error}"
    except Exception as error:  # any other error is a fault
        return f"wrong: {type(error).__name__}: {error}"
    return "works"


@pytest.mark.parametrize("seed", range(NUM_DEFAULT))
def test_a_tokenizer_nobody_named_works_or_is_refused(seed, text_of_languages, tmp_path, capsys):
    one = drawn_tokenizers.draw(seed)
    found = outcome(one, tmp_path / "case", text_of_languages)
    assert not found.startswith("wrong"), (one, found)


@pytest.mark.long
def test_most_tokenizers_nobody_named_work(text_of_languages, tmp_path, capsys):
    outcomes = {}
    for seed in range(NUM_DEFAULT, NUM_SLOW):
        one = drawn_tokenizers.draw(seed)
        outcomes[one] = outcome(one, tmp_path / "case", text_of_languages)
        shutil.rmtree(tmp_path / "case")
    wrong = {one: found for one, found in outcomes.items() if found.startswith("wrong")}
    assert not wrong
    assert sum(found == "works" for found in outcomes.values()) >= 0.8 * len(outcomes), outcomes
