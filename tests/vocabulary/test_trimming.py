"""Trimmed vocabularies: the same pieces where all are kept, the same logits, converted files."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import families
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import load_golden, write_pickle
from drawn_tokenizers import MODELS, SENTENCES, draw, make_backend

import binarized_data
import extract
import token_counts
import train
import trim_vocabulary
from distil.models.architectures import ARCHITECTURES
from distil.models.tokenizers import load_tokenizer
from distil.vocabulary.choice import Choice, choose, pieces_of, special_numbers, trimmed_tokenizer
from distil.vocabulary.network import trim_network
from distil.vocabulary.remap import Converter

REAL_VOCABULARIES = os.environ.get("DISTIL_VOCABULARIES")


def counted(backend: tokenizers.Tokenizer, lines: list[str]) -> np.ndarray:
    counts_V = np.zeros(max(backend.get_vocab().values()) + 1, np.int64)
    for encoding in backend.encode_batch(lines, add_special_tokens=False):
        np.add.at(counts_V, encoding.ids, 1)
    return counts_V


def trimmed_of(backend: tokenizers.Tokenizer, lines: list[str], **wanted) -> tuple[Choice, object]:
    pieces, special = pieces_of(backend, "teacher"), special_numbers(backend)
    options = {"keep": None, "coverage": None, **wanted}
    choice = choose(pieces, special, counted(backend, lines), **options)
    return choice, trimmed_tokenizer(backend, pieces, choice.new_of)


def words_of(lines: list[str]) -> list[str]:
    """Short texts: few pieces each, so that many of them are kept whole."""
    words = [line.split() for line in lines]
    return [" ".join(line[k : k + 2]) for line in words for k in range(len(line))]


def drawn(kind: str, number: int) -> tokenizers.Tokenizer:
    """Draw tokenizers until one is of a kind of model."""
    found = (one for seed in range(10_000) if (one := draw(seed)).model == kind)
    one = next(one for k, one in enumerate(found) if k == number)
    return make_backend(dataclasses.replace(one, is_limited=False), list(SENTENCES) * 2)


def check_kept_text(backend: tokenizers.Tokenizer) -> None:
    """Check that texts whose pieces are all kept, none unknown, keep them under the new ids."""
    text = words_of(list(SENTENCES))
    unknown = {backend.token_to_id(token) for token in ("[UNK]", "<unk>", "<|endoftext|>")}
    num_same = 0
    for coverage in (0.5, 0.9, 1.0):
        choice, trimmed = trimmed_of(backend, list(SENTENCES), coverage=coverage)
        assert choice.coverage >= coverage
        new_of = choice.new_of
        for line in text:
            inside = backend.encode(line, add_special_tokens=False).ids
            if all(number in new_of and number not in unknown for number in inside):
                num_same += 1
                ids, found = backend.encode(line).ids, trimmed.encode(line)
                assert found.ids == [new_of[number] for number in ids], line
                assert trimmed.decode(found.ids) == backend.decode(ids), line
    assert num_same > len(text)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("number", range(8))
def test_kept_text_keeps_its_pieces(kind, number):
    check_kept_text(drawn(kind, number))


@pytest.mark.skipif(not REAL_VOCABULARIES, reason="needs DISTIL_VOCABULARIES, a folder of them")
@pytest.mark.parametrize("name", load_golden("tokens.json")["ids"])
def test_kept_text_keeps_its_pieces_in_real_vocabularies(name):
    row = ARCHITECTURES[{"roberta-base": "roberta", "gpt2": "gpt2"}.get(name, "bert")]
    folder = f"{REAL_VOCABULARIES}/{name}/"
    check_kept_text(load_tokenizer(row, folder, "--teacher").backend_tokenizer)


def test_no_byte_and_no_counted_character_is_lost(teachers, lines):
    for kind in ("gpt2", "bert"):
        backend = tokenizers.Tokenizer.from_file(str(teachers[kind] / "tokenizer.json"))
        _, trimmed = trimmed_of(backend, lines[:2], coverage=0.01)
        assert len(trimmed.get_vocab()) < len(backend.get_vocab())
        for line in (*lines[:2], *(SENTENCES if kind == "gpt2" else ())):
            now = trimmed.encode(line, add_special_tokens=False)
            assert "[UNK]" not in now.tokens
            old = backend.encode(line, add_special_tokens=False).ids
            assert trimmed.decode(now.ids) == backend.decode(old)


def test_keep_keeps_so_many_and_coverage_as_few_as_suffice(teachers, lines):
    backend = tokenizers.Tokenizer.from_file(str(teachers["bert"] / "tokenizer.json"))
    least = len(trimmed_of(backend, lines, coverage=1e-9)[0].kept_K)
    for keep in (least, least + 1, least + 17):
        choice, trimmed = trimmed_of(backend, lines, keep=keep)
        assert len(choice.kept_K) == len(trimmed.get_vocab()) == keep
    choice, _ = trimmed_of(backend, lines, coverage=0.8)
    before_last = [share for entries, share in choice.curve if entries < len(choice.kept_K)]
    assert choice.coverage >= 0.8 and all(share < 0.8 for share in before_last)


FAMILIES = [
    ("bert", True),
    ("distilbert", True),
    ("roberta", True),
    ("xlm-roberta", True),
    ("modernbert", True),
    ("electra", True),
    ("deberta-v2", True),
    ("gpt2", False),
    ("opt", False),
    ("llama", False),
    ("qwen3", False),
    ("gemma2", False),
]


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize(("model_type", "is_masked"), FAMILIES)
def test_the_logits_of_kept_entries_are_the_teachers(model_type, is_masked, padding):
    model = families.tiny_model(model_type, is_masked, 99 + padding).double()
    kept_K = np.array([0, 1, 2, *range(5, 99, 3)])
    new_of = {int(old): new for new, old in enumerate(kept_K)}
    trimmed = trim_network(model, kept_K, new_of, "teacher")
    ids_BT = torch.arange(3, 25)[None]
    with torch.no_grad():
        expected = model(torch.from_numpy(kept_K)[ids_BT]).logits[..., kept_K]
        found = trimmed(ids_BT).logits
    assert trimmed.config.vocab_size == len(kept_K) == found.shape[-1]
    assert float((found - expected).abs().max()) < 1e-10


def test_untied_tables_and_biases_are_cut_each(teachers):
    config = families.tiny_config("bert", 99, pad_token_id=0)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).double().eval()
    torch.nn.init.normal_(model.cls.predictions.decoder.bias)
    kept_K = np.arange(0, 99, 2)
    new_of = {int(old): new for new, old in enumerate(kept_K)}
    trimmed = trim_network(model, kept_K, new_of, "teacher")
    ids_BT = torch.arange(1, 20)[None]
    expected = model(torch.from_numpy(kept_K)[ids_BT]).logits[..., kept_K]
    assert torch.allclose(trimmed(ids_BT).logits, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["WordPiece", "bytes", "BPE", "Unigram"])
def test_a_converted_sequence_is_the_text_tokenized_again(kind):
    for number in range(4):
        backend = drawn(kind, number)
        choice, trimmed = trimmed_of(backend, list(SENTENCES), coverage=0.6)
        pieces, special = pieces_of(backend, "teacher"), frozenset(special_numbers(backend))
        new_V = np.full(max(backend.get_vocab().values()) + 1, -1, np.int64)
        new_V[choice.kept_K] = np.arange(len(choice.kept_K))
        converter = Converter(backend, trimmed, pieces, new_V, special)
        for line in SENTENCES:
            before = converter.num_approximate
            ids = backend.encode(line, add_special_tokens=False).ids
            found = converter.convert(np.array(ids))
            if converter.num_approximate == before:
                assert found.tolist() == trimmed.encode(line, add_special_tokens=False).ids
            assert found.min() >= 0
        assert converter.num_retokenized > 0
        # An added token that takes the space before it with it hides it from the decoder.
        assert kind in ("BPE", "Unigram") or converter.num_approximate <= (kind == "bytes")


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory, teachers, text_file) -> dict[str, tuple[str, str]]:
    """Token file and counts for the tiny BERT and GPT-2: kind -> (data, counts)."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    for kind in ("bert", "gpt2"):
        binarized_data.main(
            [
                *("--file_path", str(text_file), "--tokenizer_type", kind),
                *("--tokenizer_name", str(teachers[kind]), "--dump_file", str(folder / kind)),
                *("--token_counts_dump", str(folder / f"{kind}.counts")),
            ]
        )
        (path,) = folder.glob(f"{kind}.*.pickle")
        found[kind] = str(path), str(folder / f"{kind}.counts")
    return found


def flags_of(teacher: Path, output: Path, **more) -> list[str]:
    found = ["--teacher", str(teacher), "--output", str(output)]
    for name, value in more.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *map(str, values)]
    return found


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_trimmed_teacher_is_distilled_with_converted_data(
    kind, teachers, data, text_file, tmp_path, capsys
):
    tokens, counts = data[kind]
    output, least = tmp_path / "small", {"bert": 120, "gpt2": 290}[kind]
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(text_file.read_text())
    copies = [str(tmp_path / Path(path).name) for path in (tokens, counts)]
    for path, copy in zip((tokens, counts), copies, strict=True):
        for end in ("", ".json"):
            Path(copy + end).write_bytes(Path(path + end).read_bytes())
    more = {"token_counts": counts, "keep": least, "held_out": held_out, "remap": copies[0]}
    trim_vocabulary.main(flags_of(teachers[kind], output, **more))
    assert f"{least}" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == least
    (remapped,) = tmp_path.glob("*.small.pickle")
    again = tmp_path / "again"
    binarized_data.main(
        [
            *("--file_path", str(text_file), "--tokenizer_type", "auto"),
            *("--tokenizer_name", str(output), "--dump_file", str(again)),
        ]
    )
    (fresh,) = tmp_path.glob("again.*.pickle")
    sequences = [pickle.loads(path.read_bytes()) for path in (remapped, fresh)]
    assert [one.tolist() for one in sequences[0]] == [one.tolist() for one in sequences[1]]
    token_counts.main(
        [
            *("--data_file", str(remapped), "--vocab_size", str(least)),
            *("--token_counts_dump", str(tmp_path / "small.counts")),
        ]
    )
    student = tmp_path / "student"
    extract.main(["--teacher", str(output), "--output", str(student), "--num_layers", "2"])
    flags = ["--student", str(student), "--teacher_name", str(output), "--data_file", str(remapped)]
    flags += ["--dump_path", str(tmp_path / "run"), "--max_steps", "2", "--n_gpu", "0"]
    flags += ["--gradient_accumulation_steps", "1", "--batch_size", "4", "--alpha_ce", "1"]
    masked = ["--mlm", "--alpha_mlm", "1", "--alpha_clm", "0"]
    masked += ["--token_counts", str(tmp_path / "small.counts")]
    train.main(flags + (masked if kind == "bert" else ["--alpha_mlm", "0", "--alpha_clm", "1"]))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run/model").vocab_size == least


def test_counts_are_converted_where_all_counted_ids_are_kept(teachers, data, tmp_path):
    tokens, counts = data["bert"]
    output = tmp_path / "small"
    trim_vocabulary.main(flags_of(teachers["bert"], output, data_file=tokens, coverage=1))
    copy = write_pickle(tmp_path / "c.counts", pickle.loads(Path(counts).read_bytes()))
    trim_vocabulary.main(flags_of(teachers["bert"], output, remap=copy))
    kept = json.loads((output / "trimming.json").read_text())["kept"]
    old = pickle.loads(Path(counts).read_bytes())
    found = pickle.loads((tmp_path / "c.counts.small.pickle").read_bytes())
    assert found == [old[number] for number in kept] and len(kept) < len(old)


BAD = {
    "neither": ({"token_counts": "COUNTS"}, "--keep, --coverage: expected one of them"),
    "both": ({"token_counts": "COUNTS", "keep": 9, "coverage": 1}, "give one of them"),
    "no counts": ({"keep": 150}, "--token_counts, --data_file: expected one of them"),
    "too few": ({"token_counts": "COUNTS", "keep": 3}, "--keep 3: "),
    "share": ({"token_counts": "COUNTS", "coverage": 1.5}, "--coverage 1.5: expected a share"),
    "others": ({"token_counts": "OTHERS", "keep": 150}, "another than that of"),
    "no file": ({"token_counts": "nowhere", "keep": 150}, "--token_counts nowhere"),
    "no text": (
        {"token_counts": "COUNTS", "keep": 150, "held_out": "nowhere"},
        "--held_out nowhere",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    name, teachers, data, tmp_path, status_and_errors
):
    more, message = BAD[name]
    places = {"COUNTS": data["bert"][1], "OTHERS": data["gpt2"][1]}
    more = {key: places.get(value, value) for key, value in more.items()}
    command = flags_of(teachers["bert"], tmp_path / "out", **more)
    status, errors = status_and_errors(trim_vocabulary.main, command)
    assert status == 2 and any(message in line for line in errors), errors
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(teachers, data, tmp_path, status_and_errors):
    (tmp_path / "out").mkdir()
    command = flags_of(teachers["bert"], tmp_path / "out", token_counts=data["bert"][1], keep=150)
    status, errors = status_and_errors(trim_vocabulary.main, command)
    assert status == 2 and "exists already" in errors[0] and not list((tmp_path / "out").iterdir())


def in_python(folder: Path) -> None:
    """Put a tokenizer in Python in place of the teacher's."""
    (folder / "tokenizer.json").unlink()
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    text = "".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.get))
    (folder / "vocab.txt").write_text(text, encoding="utf-8")
    content = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def with_model(**changes) -> object:
    """Return a function that changes the model of the teacher's tokenizer.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"] |= changes
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    return change


UNKNOWN_KINDS = {
    "in Python": ("bert", in_python, "BertJapaneseTokenizer runs in Python only"),
    "of a later library": (
        "bert",
        with_model(type="Syllables"),
        "tokenizer.json could not be read",
    ),
    "at random": ("gpt2", with_model(dropout=0.1), "dropout 0.1, which draws ids at random"),
}


@pytest.mark.parametrize("name", UNKNOWN_KINDS)
def test_a_tokenizer_without_a_known_kind_is_refused(
    name, teachers, data, tmp_path, status_and_errors
):
    kind, change, message = UNKNOWN_KINDS[name]
    teacher = shutil.copytree(teachers[kind], tmp_path / "teacher")
    change(teacher)
    command = flags_of(teacher, tmp_path / "out", token_counts=data[kind][1], keep=300)
    status, errors = status_and_errors(trim_vocabulary.main, command)
    assert status == 2 and len(errors) == 1 and message in errors[0], errors
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_files_that_cannot_be_converted_are_refused_before_anything_is_written(
    teachers, data, tmp_path, status_and_errors
):
    tokens, counts = data["bert"]
    copy = write_pickle(tmp_path / "c.counts", pickle.loads(Path(counts).read_bytes()))
    (tmp_path / "c.counts.out.pickle").write_bytes(b"another's")
    for file, message in ((data["gpt2"][0], "another than that of"), (copy, "exists, and no mark")):
        more = {"token_counts": counts, "keep": 150, "remap": [tokens, file]}
        command = flags_of(teachers["bert"], tmp_path / "out", **more)
        status, errors = status_and_errors(trim_vocabulary.main, command)
        assert status == 2 and len(errors) == 1 and message in errors[0], errors
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "c.counts.out.pickle").read_bytes() == b"another's"
    assert not list(Path(tokens).parent.glob("*.out.*"))
