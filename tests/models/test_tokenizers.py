"""The tokenizer that lies in a folder: which file decides, what is refused, what is compared."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from stand_ins import make_model
from tokenizers import models, normalizers, pre_tokenizers

import binarized_data
import run_task
import token_counts
import train
from distil.data.cards import check_tokenizer, read_card, write_card, write_token_counts
from distil.data.token_files import open_token_file
from distil.models.architectures import ANY_TOKENIZER, ARCHITECTURES
from distil.models.casing import Casing
from distil.models.export import save_folder, tokenizer_for
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizer_rules import TEXTS, casing_of, rules_of, tokenizer_facts
from distil.models.tokenizers import load_tokenizer, load_tokenizer_of_2019
from distil.tasks.squad_spans import encode
from utils import InputError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("café", "cafe", "Café", "Cafe", "straße", "strasse", "東", "京", "東京", "1", "##s", "##2")
LINES = ["café cafe Café 東京", "Cafe straße 12 cafes", "東 京 strasse"] * 8


def word_pieces(normalizer, pre_tokenizer=None, words=WORDS) -> tokenizers.Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *words])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(list(SPECIALS))
    return backend


def save_teacher(folder: Path, backend: tokenizers.Tokenizer, kind: str = "bert", **config) -> Path:
    """Save a tiny model of a kind beside a tokenizer.json and a tokenizer_config.json."""
    folder.mkdir(parents=True)
    model = make_model(kind, backend.get_vocab_size(), **({} if kind == "gpt2" else PADDED))
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    roles = {f"{token[1:-1].lower()}_token": token for token in SPECIALS}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | config))
    return folder


PADDED = {"pad_token_id": 0}
OWN = {
    "accents kept": normalizers.BertNormalizer(strip_accents=False),
    "NFC": normalizers.NFC(),
    "no Chinese characters": normalizers.BertNormalizer(handle_chinese_chars=False),
}


def binarize(folder: Path, teacher: Path, *flags: str) -> list[str]:
    (folder / "text").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    names = ["--file_path", "text", "--tokenizer_name", teacher, "--dump_file", "ids"]
    names = [str(folder / name) if name in ("text", "ids") else str(name) for name in names]
    return [*names, "--num_workers", "1", *flags]


@pytest.mark.parametrize("normalizer", OWN.values(), ids=OWN)
def test_tokenizer_json_decides(normalizer, tmp_path):
    backend = word_pieces(normalizer)
    teacher = save_teacher(tmp_path / "teacher", backend)
    binarized_data.main(binarize(tmp_path, teacher, "--tokenizer_type", "auto"))
    tokens = open_token_file(str(tmp_path / "ids.teacher.pickle"))
    ends = np.cumsum(tokens.lengths_N)
    found = sorted(
        tokens.ids_M[a:b].tolist() for a, b in zip(ends - tokens.lengths_N, ends, strict=True)
    )
    assert found == sorted([2, *backend.encode(line).ids, 3] for line in LINES)


@pytest.mark.parametrize("normalizer", OWN.values(), ids=OWN)
def test_an_explicit_type_refuses_a_tokenizer_json_of_other_ids(
    normalizer, tmp_path, status_and_errors
):
    teacher = save_teacher(tmp_path / "teacher", word_pieces(normalizer))
    status, errors = status_and_errors(binarized_data.main, binarize(tmp_path, teacher))
    assert status == 2 and len(errors) == 1
    assert "gives other ids than its tokenizer.json" in errors[0]
    assert "--tokenizer_type auto" in errors[0] and not list(tmp_path.glob("ids*"))


def test_an_explicit_type_takes_a_tokenizer_json_of_the_ids_of_2019(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", word_pieces(normalizers.BertNormalizer()))
    explicit = load_tokenizer_of_2019(ARCHITECTURES["bert"], str(teacher), "--x", Casing())
    automatic = load_tokenizer(ANY_TOKENIZER, str(teacher), "--x")
    assert tokenizer_facts(explicit) == tokenizer_facts(automatic)


def test_limits_and_padding_of_a_published_file_are_switched_off(tmp_path):
    for normalizer in (normalizers.BertNormalizer(), normalizers.NFC()):
        backend = word_pieces(normalizer)
        backend.enable_truncation(4)
        backend.enable_padding(length=4)
        teacher = save_teacher(tmp_path / type(normalizer).__name__, backend)
        tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x")
        assert len(tokenizer.backend_tokenizer.encode(" ".join(WORDS)).ids) >= len(WORDS)
        assert len(tokenizer("cafe", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"do_lower_case": False}, "do_lower_case is False in tokenizer_config.json"),
        ({"strip_accents": False}, "strip_accents is False in tokenizer_config.json"),
    ],
)
def test_a_configuration_that_contradicts_tokenizer_json_is_refused_unless_a_flag_decides(
    declared, said, tmp_path, status_and_errors
):
    backend = word_pieces(normalizers.BertNormalizer())
    teacher = save_teacher(tmp_path / "teacher", backend, **declared)
    flags = binarize(tmp_path, teacher, "--tokenizer_type", "auto")
    status, errors = status_and_errors(binarized_data.main, flags)
    (option,) = declared
    assert status == 2 and len(errors) == 1 and said in errors[0]
    assert f"--{option} or --no-{option}" in errors[0]  # a remedy that works:
    for flag, does in ((f"--{option}", True), (f"--no-{option}", False)):
        assert status_and_errors(binarized_data.main, [*flags, flag]) == (0, [])
        card = read_card(str(tmp_path / "ids.teacher.pickle.json"), "--x")
        assert card["tokenizer"][option] is does
    with pytest.raises(InputError, match="correct one of them$"):  # no flags here
        load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--teacher_name")


def test_a_flag_against_rules_that_it_cannot_change_is_refused(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", word_pieces(normalizers.Lowercase()))
    with pytest.raises(InputError, match="--no-do_lower_case: .* leave the flag out"):
        load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x", Casing(do_lower_case=False))
    load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x", Casing(do_lower_case=True))


PAIRS = [(lower, strip) for lower in (True, False, None) for strip in (True, False, None)]


@pytest.mark.parametrize("flags", PAIRS)
@pytest.mark.parametrize("does", [(True, None), (False, None), (True, False), (False, True)])
def test_both_casing_flags_decide_together(flags, does, tmp_path):
    lower, strip = does
    backend = word_pieces(normalizers.BertNormalizer(lowercase=lower, strip_accents=strip))
    teacher = save_teacher(tmp_path / "teacher", backend)
    tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x", Casing(*flags))
    lower = lower if flags[0] is None else flags[0]
    strip = strip if flags[1] is None else flags[1]
    expected = lower, lower if strip is None else strip
    assert casing_of(tokenizer.backend_tokenizer) == expected
    save_folder(make_model("bert", len(tokenizer)), tokenizer, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert casing_of(again.backend_tokenizer) == expected


def test_a_casing_flag_that_a_vocabulary_cannot_follow_is_refused(teachers, tmp_path):
    for file in ("vocab.json", "merges.txt"):
        content = json.loads((teachers["roberta"] / "tokenizer.json").read_text())["model"]
        merges = "\n".join(" ".join(pair) for pair in content["merges"])
        text = json.dumps(content["vocab"]) if file == "vocab.json" else merges
        (tmp_path / file).write_text(text, encoding="utf-8")
    row = ARCHITECTURES["roberta"]
    for load in (load_tokenizer, load_tokenizer_of_2019):
        with pytest.raises(InputError, match="--do_lower_case: .* leave the flag out"):
            load(row, str(tmp_path), "--x", Casing(do_lower_case=True))
        load(row, str(tmp_path), "--x", Casing(do_lower_case=False))


def test_special_tokens_that_tokenizer_json_does_not_list_get_their_roles(tmp_path, caplog):
    backend = tokenizers.Tokenizer(word_pieces(None).model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    teacher = save_teacher(tmp_path / "teacher", backend)
    tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x")
    assert tokenizer(LINES, add_special_tokens=False)["input_ids"] == [
        one.ids for one in backend.encode_batch(LINES)
    ]
    assert tokenizer("[MASK]", add_special_tokens=False)["input_ids"] == [4]


def test_tokens_that_only_the_configuration_adds_are_told(tmp_path, caplog):
    teacher = save_teacher(tmp_path / "teacher", word_pieces(normalizers.NFC()))
    (teacher / "added_tokens.json").write_text(json.dumps({"covid19": 17}))
    declared = json.loads((teacher / "tokenizer_config.json").read_text())
    declared["additional_special_tokens"] = ["<ent>"]
    (teacher / "tokenizer_config.json").write_text(json.dumps(declared))
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x")
    assert "with more tokens: <ent>" in caplog.text
    assert "<ent>" not in tokenizer.get_vocab()


WRONG = {
    "tokenizer_class": (5, "tokenizer_class is 5"),
    "do_lower_case": ("true", "do_lower_case is 'true'"),
    "model_max_length": ("512", "model_max_length is 512, expected above 2"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_entry_of_the_configuration_is_named(key, tmp_path):
    value, message = WRONG[key]
    backend = word_pieces(normalizers.NFC())
    teacher = save_teacher(tmp_path / "teacher", backend, **{key: value})
    with pytest.raises(InputError, match=message):
        load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x")


def test_options_that_fast_tokenizers_drop_are_refused(tmp_path):
    folder = bare(tmp_path / "bare")
    for key, value in (("never_split", ["covid19"]), ("do_basic_tokenize", False)):
        (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(InputError, match=f"{key} is .* which no fast tokenizer applies"):
            load_tokenizer(ARCHITECTURES["bert"], folder, "--x")
    (tmp_path / "bare" / "tokenizer_config.json").write_text('{"never_split": null}')
    load_tokenizer(ARCHITECTURES["bert"], folder, "--x")


def test_random_merges_are_refused(teachers, tmp_path):
    shutil.copytree(teachers["roberta"], tmp_path / "teacher")
    content = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has dropout 0.1, which draws ids at random"):
        load_tokenizer(ARCHITECTURES["roberta"], str(tmp_path / "teacher"), "--x")


def test_white_space_around_a_special_token_is_no_other_rule_set(teachers, tmp_path):
    shutil.copytree(teachers["roberta"], tmp_path / "published")
    content = json.loads((tmp_path / "published" / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["lstrip"] = token["content"] == "<mask>"
    (tmp_path / "published" / "tokenizer.json").write_text(json.dumps(content))
    folders = teachers["roberta"], tmp_path / "published"
    facts = [
        tokenizer_facts(load_tokenizer(ARCHITECTURES["roberta"], str(folder), "--x"))
        for folder in folders
    ]
    assert facts[0] == facts[1]


def unigram() -> tokenizers.Tokenizer:
    pieces = [(token, 0.0) for token in SPECIALS] + [(f"▁{word}", -2.0) for word in WORDS]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(list(SPECIALS))
    return backend


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("make", [unigram, lambda: word_pieces(normalizers.NFC())])
def test_the_type_of_model_is_not_the_type_of_tokenizer(kind, make, tmp_path):
    backend = make()
    teacher = save_teacher(tmp_path / "teacher", backend, kind)
    tokenizer = load_tokenizer(ARCHITECTURES[kind], str(teacher), "--x")
    ids = tokenizer(LINES, add_special_tokens=False)["input_ids"]
    assert ids == [one.ids for one in backend.encode_batch(LINES)]
    special = special_ids(ARCHITECTURES[kind], tokenizer)
    assert (special.start, special.end, special.pad, special.unknown) == (
        2,
        3,
        0 + (kind == "gpt2"),
        1,
    )


def test_a_causal_models_vocabulary_may_hold_a_mask_token(teachers, tmp_path, status_and_errors):
    shutil.copytree(teachers["roberta"], tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").unlink()
    make_model("gpt2", 320).config.save_pretrained(tmp_path / "teacher")
    tokenizer = load_tokenizer(ARCHITECTURES["gpt2"], str(tmp_path / "teacher"), "--x")
    assert tokenizer.mask_token == "<mask>"
    flags = binarize(tmp_path, tmp_path / "teacher", "--tokenizer_type", "gpt2")
    status, errors = status_and_errors(binarized_data.main, flags)
    assert status == 2 and len(errors) == 1


def test_a_tokenizer_in_python_is_refused_with_what_to_convert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *WORDS]) + "\n", encoding="utf-8")
    content = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    for row in (ARCHITECTURES["bert"], ANY_TOKENIZER):
        with pytest.raises(InputError, match="runs in Python only; .* convert it"):
            load_tokenizer(row, str(tmp_path), "--x")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(content | {"word_tokenizer_type": "mecab"})
    )
    with pytest.raises(InputError, match="runs in Python only .* convert it"):
        load_tokenizer(ARCHITECTURES["bert"], str(tmp_path), "--x")
    with pytest.raises(InputError, match="holds a BertJapaneseTokenizer"):
        load_tokenizer_of_2019(ARCHITECTURES["bert"], str(tmp_path), "--x", Casing())


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    make_model("bert", 50).config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has neither tokenizer.json nor a vocabulary"):
        load_tokenizer(ARCHITECTURES["bert"], str(tmp_path), "--x")


def test_questions_and_contexts_get_the_ids_of_tokenizer_json(teachers, tmp_path):
    for kind in ("bert", "roberta"):
        backend = word_pieces(normalizers.NFC())
        teacher = save_teacher(tmp_path / kind, backend, kind)
        tokenizer = load_tokenizer(ARCHITECTURES[kind], str(teacher), "--x")
        found = [one.ids.tolist() for one in encode(LINES, tokenizer)]
        assert found == [one.ids for one in backend.encode_batch(LINES)]
    bytes_ = load_tokenizer(ARCHITECTURES["roberta"], str(teachers["roberta"]), "--x")
    (found,) = encode(["bake"], bytes_)  # RoBERTa reads a first word as one after a space
    assert found.ids.tolist() == bytes_(" bake", add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------------------------------
# A bare vocab.txt
# --------------------------------------------------------------------------------------------------


def bare(folder: Path, words=WORDS) -> str:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *words]) + "\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("strip", [True, False, None])
def test_flags_decide_the_casing_of_a_bare_vocabulary(lower, strip, tmp_path):
    casing = Casing(lower, strip)
    for name in ("a", "b"):
        folder = bare(tmp_path / name)
        load = load_tokenizer if name == "a" else load_tokenizer_of_2019
        tokenizer = load(ARCHITECTURES["bert"], folder, "--x", casing)
        assert casing_of(tokenizer.backend_tokenizer) == (lower, lower if strip is None else strip)


def test_accents_in_a_lower_case_vocabulary_are_warned_of(tmp_path, caplog):
    lower = [word for word in WORDS if word == word.lower()]
    folder = bare(tmp_path / "accents", lower)
    with caplog.at_level(logging.WARNING):
        load_tokenizer(ARCHITECTURES["bert"], folder, "--x", Casing())
    assert "1 entries of its vocabulary have some (café)" in caplog.text
    assert "--no-strip_accents" in caplog.text
    caplog.clear()
    load_tokenizer(ARCHITECTURES["bert"], folder, "--x", Casing(strip_accents=False))
    load_tokenizer(ARCHITECTURES["bert"], bare(tmp_path / "cased"), "--x", Casing())
    assert not caplog.records


# --------------------------------------------------------------------------------------------------
# Comparisons by rules
# --------------------------------------------------------------------------------------------------

CHANGES = {
    "normalizer": lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
    "pre tokenizer": lambda backend: setattr(
        backend, "pre_tokenizer", pre_tokenizers.WhitespaceSplit()
    ),
    "model": lambda backend: setattr(backend.model, "max_input_chars_per_word", 3),
    "added tokens": lambda backend: backend.add_tokens([tokenizers.AddedToken("cafe")]),
}


@pytest.mark.parametrize("part", CHANGES)
def test_rules_of_another_tokenizer_are_refused_with_both_values(part, tmp_path, status_and_errors):
    folders = {}
    for name in ("own", "other"):
        backend = word_pieces(normalizers.BertNormalizer(), words=(*WORDS, "more") * 1)
        if name == "other":
            CHANGES[part](backend)
        folders[name] = save_teacher(tmp_path / name, backend)
    facts = [
        tokenizer_facts(load_tokenizer(ARCHITECTURES["bert"], str(folder), "--x"))
        for folder in folders.values()
    ]
    assert facts[0]["vocabulary_sha256"] == facts[1]["vocabulary_sha256"]
    assert facts[0]["rules_sha256"] != facts[1]["rules_sha256"]
    binarized_data.main(binarize(tmp_path, folders["own"], "--tokenizer_type", "auto"))
    data, counts = str(tmp_path / "ids.own.pickle"), str(tmp_path / "counts")
    num = str(facts[0]["vocab_size"])
    token_counts.main(["--data_file", data, "--token_counts_dump", counts, "--vocab_size", num])
    flags = ["--student", str(folders["other"]), "--teacher_name", str(folders["other"]), "--mlm"]
    flags += ["--data_file", data, "--token_counts", counts, "--dump_path", str(tmp_path / "run")]
    weights = (folders["other"] / "model.safetensors").read_bytes()
    (folders["other"] / "model.safetensors").unlink()  # refused before anything slow
    status, errors = status_and_errors(train.main, [*flags, "--alpha_mlm", "1", "--alpha_clm", "0"])
    (folders["other"] / "model.safetensors").write_bytes(weights)
    assert status == 2 and len(errors) == 2 and f"its {part} is " in errors[0], errors
    assert f"--data_file {data}" in errors[0] and not (tmp_path / "run").exists()
    flags[3] = str(folders["own"])
    status, errors = status_and_errors(train.main, [*flags, "--alpha_mlm", "1", "--alpha_clm", "0"])
    assert status == 2 and f"--student {folders['other']}: its {part} is " in errors[0]


def test_a_tokenizer_of_more_ids_than_its_model_is_refused_first(tmp_path, status_and_errors):
    teacher = save_teacher(tmp_path / "teacher", word_pieces(normalizers.NFC()))
    binarized_data.main(binarize(tmp_path, teacher, "--tokenizer_type", "auto"))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    (teacher / "model.safetensors").unlink()
    flags = ["--student", str(teacher), "--teacher_name", str(teacher), "--mlm"]
    flags += ["--alpha_mlm", "1", "--alpha_clm", "0", "--mlm_smoothing", "0"]
    flags += ["--data_file", str(tmp_path / "ids.teacher.pickle")]
    flags += ["--dump_path", str(tmp_path / "run")]
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and "ids up to 16" in errors[0]


def test_counts_of_other_rules_are_refused(world, tmp_path, status_and_errors):
    card = read_card(f"{world.counts('bert')}.json", "--x")
    card["tokenizer"] |= {"rules_sha256": "0" * 64, "rules": {"normalizer": "another"}}
    counts = np.load(world.counts("bert"), allow_pickle=True)
    write_token_counts(tmp_path / "counts", np.array(counts), {"tokenizer": card["tokenizer"]})
    flags = world.flags("bert", tmp_path / "run", token_counts=tmp_path / "counts")
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and "its normalizer is another, that of" in errors[0]


def test_a_fine_tuned_teacher_of_other_rules_is_refused(tmp_path, status_and_errors):
    for name, normalizer in (("a", normalizers.BertNormalizer()), ("b", normalizers.NFC())):
        save_teacher(tmp_path / name, word_pieces(normalizer))
    (tmp_path / "data").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "data" / file).write_text("sentence\tlabel\ncafe\t1\nCafe\t0\n")
    names = ["--model_name_or_path", tmp_path / "a", "--teacher_name_or_path", tmp_path / "b"]
    names += ["--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    status, errors = status_and_errors(run_task.main, ["--task", "sst2", *map(str, names)])
    assert status == 2 and len(errors) == 1 and "have different tokenizers" in errors[0]


def test_cards_of_before_are_read_with_a_notice(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher", word_pieces(normalizers.BertNormalizer()))
    binarized_data.main(binarize(tmp_path, teacher, "--tokenizer_type", "auto"))
    path = str(tmp_path / "ids.teacher.pickle")
    card = read_card(f"{path}.json", "--x")
    kept = ("type", "name", "vocab_size", "vocabulary_sha256", "special_ids")
    own = {key: card["tokenizer"][key] for key in kept}
    model = load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x")
    for lower, is_refused in ((None, False), (True, False), (False, True)):
        card["tokenizer"] = own | {"do_lower_case": lower}
        write_card(f"{path}.json", {k: v for k, v in card.items() if k != "format"})
        capsys.readouterr()
        old = read_card(f"{path}.json", "--x")
        if is_refused:
            with pytest.raises(InputError, match="its do_lower_case is False, that of M True"):
                check_tokenizer(old, tokenizer_facts(model), "file", "M")
        else:
            check_tokenizer(old, tokenizer_facts(model), "file", "M")
            assert "only the vocabulary was compared" in capsys.readouterr().err


def test_equal_rules_have_one_fingerprint_however_they_are_written():
    first = word_pieces(normalizers.BertNormalizer(strip_accents=None))
    second = word_pieces(normalizers.Sequence([normalizers.BertNormalizer(strip_accents=True)]))
    second.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer()])
    second.enable_truncation(5)
    second.decoder = tokenizers.decoders.WordPiece()
    assert rules_of(first) == rules_of(second)
    assert len(TEXTS) == len(set(TEXTS))


# --------------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2"])
def test_an_exported_folder_has_the_ids_of_its_teacher_and_inputs_of_its_model(kind, tmp_path):
    backend = word_pieces(normalizers.NFC())
    teacher = save_teacher(tmp_path / "teacher", backend, "bert")
    tokenizer = load_tokenizer(ARCHITECTURES["bert"], str(teacher), "--x")
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
        config = transformers.DistilBertConfig(vocab_size=backend.get_vocab_size(), **sizes)
        network = transformers.DistilBertForMaskedLM(config)
    else:
        network = make_model(kind, backend.get_vocab_size())
    save_folder(network, tokenizer_for(network, tokenizer), tmp_path / "student")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    ids = loaded(LINES, add_special_tokens=False)["input_ids"]
    assert ids == [one.ids for one in backend.encode_batch(LINES)]
    outputs = {"input_ids", "attention_mask"} | ({"token_type_ids"} if kind == "bert" else set())
    assert set(loaded(LINES[0], LINES[1])) == outputs
    declared = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    assert declared["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(declared["model_input_names"]) == outputs


def test_a_class_that_gives_the_ids_is_kept_in_an_exported_folder(teachers, tmp_path):
    for kind, name in (("bert", "BertTokenizer"), ("roberta", "RobertaTokenizer")):
        tokenizer = load_tokenizer(ARCHITECTURES[kind], str(teachers[kind]), "--x")
        save_folder(make_model(kind, len(tokenizer)), tokenizer, tmp_path / kind)
        declared = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert declared["tokenizer_class"] == name
