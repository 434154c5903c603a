"""Held-out figures: against slow loops, by the program, and in a run, which stays unchanged."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import as_uint16, run_process, write_pickle
from families import make_teacher
from stand_ins import ROOT, is_text, logged, make_lines, model_facts, vocab_size_of
from whole_runs import dying_at

import binarized_data
import evaluate_lm
import train
from distil import evaluation
from distil.evaluation import (
    FixedMasks,
    Reader,
    figures_of,
    measure,
    next_tokens,
    passes_over,
    plan_batches,
    reader_of,
)
from distil.kernels.head import rows_per_chunk
from distil.models.architectures import ARCHITECTURES, architecture_named
from distil.models.export import save_folder
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizers import load_tokenizer
from distil.reporting import model_card
from distil.training import checkpointing
from distil.training.progress import Intervals, Progress, describe_gain
from lm_seqs_dataset import LmSeqsDataset

KINDS = ("bert", "roberta", "gpt2")


@pytest.fixture(scope="module")
def held_out(teachers, tmp_path_factory) -> dict[str, str]:
    """Text that is not trained on, and its token files: "text", or a model type."""
    folder = tmp_path_factory.mktemp("held_out")
    text = folder / "held_out.txt"
    text.write_text("\n".join(make_lines(14, seed=9)) + "\n", encoding="utf-8")
    files = {"text": str(text)}
    for kind, teacher in teachers.items():
        binarized_data.main(
            [
                "--file_path",
                str(text),
                "--tokenizer_type",
                kind,
                "--tokenizer_name",
                str(teacher),
                "--dump_file",
                str(folder / "held_out"),
            ]
        )
        files[kind] = str(folder / f"held_out.tiny-{kind}.pickle")
    return files


def disturbed(model):
    """Copy a model and change its weights a little: it partly agrees with the original."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return copied


class Setting:
    """A model, its teacher, tokenizer and sequences, loaded without the program under test."""

    def __init__(self, kind: str, teachers, held_out):
        self.tokenizer = load_tokenizer(architecture_named(kind), str(teachers[kind]), "")
        auto = (
            transformers.AutoModelForMaskedLM
            if ARCHITECTURES[kind].is_masked
            else transformers.AutoModelForCausalLM
        )
        self.teacher = auto.from_pretrained(teachers[kind]).eval()
        self.student = disturbed(self.teacher)
        special = special_ids(architecture_named(kind), self.tokenizer)
        self.dataset = LmSeqsDataset.from_file(
            held_out[kind], model_facts(vocab_size_of(teachers[kind]), kind, special)
        )
        masked = ARCHITECTURES[kind].is_masked
        self.passes = (
            FixedMasks(self.tokenizer.mask_token_id, self.tokenizer.all_special_ids)
            if masked
            else next_tokens
        )

    def batches(self, **options):
        return passes_over(
            self.dataset.collate, plan_batches(self.dataset.lengths, **options), self.passes
        )

    def figures(self, **options) -> dict[str, float]:
        return figures_of(
            measure(reader_of(self.student), reader_of(self.teacher), self.batches(**options)), True
        )


@pytest.fixture
def setting(request, teachers, held_out) -> Setting:
    return Setting(request.param, teachers, held_out)


def questions_one_by_one(setting: Setting, kind: str):
    """Yield (input ids, read positions, expected ids), one unpadded sequence and pass at a time."""
    special = set(setting.tokenizer.all_special_ids)
    for number in range(len(setting.dataset)):
        ids = setting.dataset[number].tolist()
        if kind == "gpt2":
            yield ids, list(range(len(ids) - 1)), ids[1:]
            continue
        for turn in range(7):
            places = [place for place in range(turn, len(ids), 7) if ids[place] not in special]
            masked = [
                setting.tokenizer.mask_token_id if place in places else id
                for place, id in enumerate(ids)
            ]
            yield masked, places, [ids[place] for place in places]


def slow_figures(setting: Setting, kind: str) -> dict[str, float]:
    """Compute the figures by definition: float64, one position at a time."""
    sums, num = (
        dict.fromkeys(
            ("loss", "accuracy", "kl", "agreement", "cosine", "teacher_loss", "teacher_accuracy"),
            0.0,
        ),
        0,
    )
    with torch.no_grad():
        for ids, places, labels in questions_one_by_one(setting, kind):
            both = [
                model(torch.tensor([ids]), output_hidden_states=True)
                for model in (setting.student, setting.teacher)
            ]
            for place, label in zip(places, labels, strict=True):
                s, t = (found.logits[0, place].log_softmax(-1) for found in both)
                h, g = (found.hidden_states[-1][0, place] for found in both)
                sums["loss"] -= s[label].item()
                sums["teacher_loss"] -= t[label].item()
                sums["accuracy"] += int(s.argmax() == label)
                sums["teacher_accuracy"] += int(t.argmax() == label)
                sums["kl"] += (t.exp() * (t - s)).sum().item()
                sums["agreement"] += int(s.argmax() == t.argmax())
                sums["cosine"] += (h @ g / (h.norm() * g.norm())).item()
                num += 1
    means = {name: value / num for name, value in sums.items()}
    return means | {
        "perplexity": math.exp(means["loss"]),
        "teacher_perplexity": math.exp(means["teacher_loss"]),
    }


@pytest.mark.parametrize("setting, kind", [(kind, kind) for kind in KINDS], indirect=["setting"])
def test_every_figure_equals_a_slow_loop(setting, kind):
    setting.student.double()
    setting.teacher.double()
    found, expected = setting.figures(), slow_figures(setting, kind)
    assert found == pytest.approx(expected, rel=1e-9) and set(found) == set(expected)
    assert 0.05 < found["agreement"] < 0.95 and found["kl"] > 0.01, (
        "the two models differ, and not wholly"
    )


def test_every_token_is_asked_for_once_and_no_special_one():
    token_ids_BT = torch.tensor([[1, 9, 8, 7, 9, 9, 3, 8, 7, 2], [1, 5, 6, 2, 0, 0, 0, 0, 0, 0]])
    passes = list(FixedMasks(4, [0, 1, 2, 3, 4], every=3)(0, token_ids_BT, torch.tensor([10, 4])))
    asked = [batch.labels_BT[batch.labels_BT != -100].tolist() for batch in passes]
    assert asked == [[7], [9, 9, 8, 5], [8, 9, 7, 6]] and [
        len(batch.labels_BT) for batch in passes
    ] == [1, 2, 2]
    for batch in passes:
        masked_BT = batch.labels_BT != -100
        assert (batch.input_ids_BT[masked_BT] == 4).all() and (batch.input_ids_BT != 4)[
            ~masked_BT
        ].all()
        assert batch.rows["masked"].tolist() == masked_BT.flatten().nonzero()[:, 0].tolist()
        assert (
            batch.num_tokens == batch.attention_mask_BT.sum()
            and not masked_BT[batch.attention_mask_BT == 0].any()
        )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sequence_is_in_one_batch_of_one_rank(world_size):
    lengths = (
        torch.randint(12, 60, (101,), generator=torch.Generator().manual_seed(3))
        .numpy()
        .astype("int32")
    )
    batches = plan_batches(lengths, max_tokens=200)
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 200 for batch in batches)

    def collate(numbers):
        seen.extend(numbers.tolist())
        return torch.full((len(numbers), 12), 9), torch.full((len(numbers),), 12)

    seen: list[int] = []
    for rank in range(world_size):
        list(passes_over(collate, batches, next_tokens, rank, world_size))
    assert sorted(seen) == list(range(101))


@pytest.mark.parametrize("setting", KINDS, indirect=True)
def test_figures_do_not_depend_on_how_the_text_is_cut_into_batches(setting):
    assert setting.figures(max_tokens=64) == pytest.approx(setting.figures(), rel=1e-5)


def test_sums_of_ranks_add_up(teachers, held_out):
    setting = Setting("bert", teachers, held_out)
    batches = plan_batches(setting.dataset.lengths, max_tokens=300)
    readers = reader_of(setting.student), reader_of(setting.teacher)
    shares = [
        measure(*readers, passes_over(setting.dataset.collate, batches, setting.passes, rank, 2))
        for rank in (0, 1)
    ]
    assert all(share[0] > 0 for share in shares)
    assert figures_of(sum(shares), True) == pytest.approx(
        setting.figures(max_tokens=300), rel=1e-12
    )


def test_logits_are_made_a_chunk_at_a_time(teachers, held_out):
    setting, sizes = Setting("gpt2", teachers, held_out), []
    plain = reader_of(setting.student)

    def head(hidden_ND):
        sizes.append(len(hidden_ND))
        return plain.head(hidden_ND)

    measure(Reader(setting.student, head), None, setting.batches())
    assert max(sizes) == rows_per_chunk("cpu") and sum(sizes) == int(
        (setting.dataset.lengths - 1).sum()
    )


def test_measuring_leaves_mode_randomness_and_gradients_alone(teachers, held_out):
    setting = Setting("bert", teachers, held_out)
    setting.student.train()
    before = torch.get_rng_state()
    sums = [measure(reader_of(setting.student), None, setting.batches()) for _ in range(2)]
    assert setting.student.training and all(module.training for module in setting.student.modules())
    assert torch.equal(sums[0], sums[1]), "no dropout"
    assert torch.equal(torch.get_rng_state(), before) and all(
        p.grad is None for p in setting.student.parameters()
    )


def test_models_of_another_width_have_no_cosine(teachers, held_out):
    setting = Setting("gpt2", teachers, held_out)
    config = dataclasses.replace(setting.student.config, n_embd=16)
    narrow = transformers.GPT2LMHeadModel(config).eval()
    sums_S = measure(reader_of(narrow), reader_of(setting.teacher), setting.batches())
    assert "cosine" not in figures_of(sums_S, True, same_width=False) and sums_S[-1] == 0


def test_figures_of_nothing_are_not_a_number_and_perplexity_is_bounded():
    nothing = torch.zeros(len(evaluation.SUMS), dtype=torch.float64)
    assert all(math.isnan(value) for value in figures_of(nothing, True).values())
    assert evaluation.perplexity(1e6) == math.exp(100) and math.isnan(
        evaluation.perplexity(math.nan)
    )


def test_on_sequences_of_one_length_gpt2s_perplexity_is_that_of_its_own_loss(teachers):
    model = transformers.GPT2LMHeadModel.from_pretrained(teachers["gpt2"]).eval()
    ids_BT = torch.randint(1, 300, (9, 30), generator=torch.Generator().manual_seed(1))
    sums_S = measure(reader_of(model), None, next_tokens(0, ids_BT, torch.full((9,), 30)))
    with torch.no_grad():
        loss = model(ids_BT, labels=ids_BT).loss.item()
    assert figures_of(sums_S, False)["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def scores_of(output: Path, *flags: object) -> dict:
    evaluate_lm.main([*map(str, flags), "--device", "cpu", "--output", str(output)])
    return json.loads(output.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_its_own_perfect_student(kind, teachers, held_out, tmp_path, capsys):
    found = scores_of(
        tmp_path / "s.json",
        "--model",
        teachers[kind],
        "--teacher",
        teachers[kind],
        "--data_file",
        held_out[kind],
    )
    score = found["score"]
    assert (
        found["task"] == ("causal lm" if kind == "gpt2" else "masked lm")
        and found["model_name"] == f"tiny-{kind}"
    )
    for prefix in [""] if kind == "gpt2" else ["", "drawn_"]:
        assert score[f"{prefix}kl"] == 0 and score[f"{prefix}agreement"] == 100
        assert score[f"{prefix}cosine"] == pytest.approx(1)
        assert score[f"{prefix}loss"] == score[f"{prefix}teacher_loss"] > 0
        assert score[f"{prefix}perplexity"] == pytest.approx(math.exp(score[f"{prefix}loss"]))
    assert re.search(r"^\| agreement +\| 100\.00% +\| +\|$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("setting, kind", [(kind, kind) for kind in KINDS], indirect=["setting"])
def test_text_and_its_token_file_give_the_same_figures(setting, kind, teachers, held_out, tmp_path):
    flags = "--model", teachers[kind], "--teacher", setting_folder(setting, tmp_path)
    by_ids = scores_of(tmp_path / "ids.json", *flags, "--data_file", held_out[kind])
    by_text = scores_of(tmp_path / "text.json", *flags, "--text_file", held_out["text"])
    # Another order has other drawn masks.
    names = [name for name in by_ids["score"] if not name.startswith("drawn_")]
    assert {n: by_ids["score"][n] for n in names} == pytest.approx(
        {n: by_text["score"][n] for n in names}, rel=1e-5
    )
    assert by_ids["runs"][0]["num_examples"] == by_text["runs"][0]["num_examples"]
    swapped = {name: setting.figures()[name] for name in ("loss", "teacher_loss")}
    assert by_ids["score"]["teacher_loss"] == pytest.approx(swapped["loss"], rel=1e-5)
    assert by_ids["score"]["loss"] == pytest.approx(swapped["teacher_loss"], rel=1e-5)


def setting_folder(setting: Setting, tmp_path: Path) -> Path:
    """Save a setting's student with its tokenizer."""
    setting.student.save_pretrained(tmp_path / "student")
    setting.tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


# Models of families without a row: the vocabulary is one of the stand-ins'.
OTHERS = {
    "llama": "gpt2",
    "gpt_neox": "gpt2",
    "opt": "gpt2",
    "modernbert": "bert",
    "camembert": "roberta",
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_of_any_family_is_measured_as_a_slow_loop_does(
    family, teachers, held_out, tmp_path
):
    is_masked = OTHERS[family] != "gpt2"
    folder = make_teacher(tmp_path / family, family, is_masked, teachers)
    auto_class = (
        transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    )
    model, tokenizer = (
        auto_class.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    disturbed(model).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    lines = [
        " ".join(line.split()[: 5 + number]) for number, line in enumerate(make_lines(9, seed=9))
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    files = (
        "--model",
        tmp_path / "student",
        "--teacher",
        folder,
        "--text_file",
        tmp_path / "text.txt",
    )
    found = scores_of(tmp_path / "s.json", *files)
    assert found["task"] == ("masked lm" if is_masked else "causal lm")
    setting = SimpleNamespace(
        tokenizer=tokenizer,
        student=auto_class.from_pretrained(tmp_path / "student").double(),
        teacher=model.double(),
        dataset=sequences_by_hand(tokenizer, lines),
    )
    assert len({len(sequence) for sequence in setting.dataset}) > 3, "some are padded"
    expected = slow_figures(setting, "masked" if is_masked else "gpt2")
    expected |= {
        name: 100 * value for name, value in expected.items() if name in ("accuracy", "agreement")
    }
    expected["teacher_accuracy"] *= 100
    figures = {name: found["score"][name] for name in expected}
    assert figures == pytest.approx(expected, rel=1e-4)  # float32 against float64


def sequences_by_hand(tokenizer, lines: list[str]) -> list[torch.Tensor]:
    """Add a tokenizer's boundary tokens to lines; skip those of 11 ids or fewer."""
    start = [
        token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token is not None
    ][:1]
    end = [
        token for token in (tokenizer.sep_token_id, tokenizer.eos_token_id) if token is not None
    ][:1]
    found = [
        [*start, *tokenizer(line, add_special_tokens=False)["input_ids"], *end] for line in lines
    ]
    return [torch.tensor(ids) for ids in found if 11 < len(ids) <= 64]


@pytest.mark.parametrize("setting", ["bert"], indirect=True)
def test_pseudo_perplexity_equals_a_loop_that_masks_one_token_at_a_time(
    setting, teachers, held_out, tmp_path
):
    found = scores_of(
        tmp_path / "s.json",
        "--model",
        teachers["bert"],
        "--data_file",
        held_out["bert"],
        "--pseudo_perplexity",
        3,
    )["score"]
    total, num, last = 0.0, 0, len(setting.dataset) - 1
    model = setting.teacher.double()
    for number in (0, round(last / 2), last):
        ids = setting.dataset[number]
        for place in [
            p for p in range(len(ids)) if ids[p] not in setting.tokenizer.all_special_ids
        ]:
            masked = ids.clone() if torch.is_tensor(ids) else torch.from_numpy(ids.copy())
            masked[place] = setting.tokenizer.mask_token_id
            with torch.no_grad():
                total += model(masked[None]).logits[0, place].log_softmax(-1)[ids[place]].item()
            num += 1
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(-total / num), rel=1e-5)


def test_masks_are_drawn_by_seed_and_by_rarity_with_counts(world, teachers, held_out, tmp_path):
    def drawn(*more):
        flags = "--model", teachers["bert"], "--data_file", held_out["bert"], *more
        score = scores_of(tmp_path / "s.json", *flags)["score"]
        return score["loss"], score["drawn_loss"]

    one, again, other = drawn(), drawn("--seed", 56), drawn("--seed", 57)
    rare = drawn("--token_counts", world.counts("bert"))
    assert one == again and one[0] == other[0] == rare[0], "fixed masks know no seed"
    assert len({one[1], other[1], rare[1]}) == 3


BAD = {
    "no text": (
        ["--model", "{bert}"],
        ["--data_file, --text_file: neither is given, expected one of them"],
    ),
    "two texts": (
        ["--model", "{bert}", "--data_file", "{ids}", "--text_file", "{text}"],
        ["expected one of them"],
    ),
    "numbers": (
        [
            "--model",
            "{bert}",
            "--data_file",
            "{ids}",
            "--mask_every",
            "1",
            "--pseudo_perplexity",
            "0",
            "--max_length",
            "11",
            "--mlm_mask_prop",
            "nan",
        ],
        [
            "--max_length 11: expected 12",
            "--mask_every 1: expected 2",
            "--mlm_mask_prop nan: expected",
            "--pseudo_perplexity 0: expected 1",
        ],
    ),
    "no file": (
        ["--model", "{bert}", "--data_file", "nowhere", "--token_counts", "nowhere"],
        ["--data_file nowhere: no such file", "--token_counts nowhere: no such file"],
    ),
    "another vocabulary": (
        ["--model", "{bert}", "--data_file", "{other}"],
        ["--data_file {other}: "],
    ),
    "empty after cleaning": (
        ["--model", "{bert}", "--data_file", "{short}"],
        ["none of its 2 sequences is left"],
    ),
    "short lines": (
        ["--model", "{bert}", "--text_file", "{lines}"],
        ["--text_file {lines}: none of its lines is left"],
    ),
    "blank lines": (["--model", "{bert}", "--text_file", "{blank}"], ["has blank lines only"]),
    "no UTF-8": (
        ["--model", "{bert}", "--text_file", "{latin}"],
        ["{latin}:2: byte 3 of the line is not UTF-8"],
    ),
    "teacher's vocabulary": (
        ["--model", "{bert}", "--teacher", "{cased}", "--data_file", "{ids}"],
        ["different tokenizers"],
    ),
    "mixed kinds": (
        ["--model", "{bert}", "--teacher", "{gpt2}", "--data_file", "{ids}"],
        [
            "--teacher {gpt2}: is a causal model, --model {bert} a masked one; compare with a"
            " masked model"
        ],
    ),
    "no masks": (
        [
            "--model",
            "{gpt2}",
            "--data_file",
            "{ids}",
            "--pseudo_perplexity",
            "2",
            "--token_counts",
            "{ids}",
        ],
        ["--pseudo_perplexity: is for masked models", "--token_counts: is for masked models"],
    ),
    "no language model": (
        ["--model", "{t5}", "--data_file", "{ids}", "--teacher", "{bart}"],
        [
            "--model {t5}: is a t5 model; expected a masked or causal language model",
            "--teacher {bart}: bart is an encoder-decoder",
        ],
    ),
    "no mask token": (
        ["--model", "{maskless}", "--data_file", "{ids}"],
        ["its tokenizer has no mask_token"],
    ),
    "sees what comes": (
        ["--model", "{seeing}", "--data_file", "{ids}"],
        ["it attends to later tokens, so it is not a causal model"],
    ),
    "remote code": (
        ["--model", "{remote}", "--data_file", "{ids}"],
        ["pass --trust_remote_code if you trust"],
    ),
    "no model": (
        ["--model", "{empty}", "--data_file", "{ids}"],
        ["--model {empty}: holds no readable config.json"],
    ),
    "over the text": (
        ["--model", "{bert}", "--text_file", "{text}", "--output", "{text}"],
        ["would overwrite the input {text}"],
    ),
    "over the model": (
        ["--model", "{bert}", "--text_file", "{text}", "--output", "{bert}/config.json"],
        ["would overwrite"],
    ),
    "unknown flag": (["--model", "{bert}", "--date_file", "x"], ["did you mean --data_file?"]),
}


@pytest.fixture(scope="module")
def bad_inputs(teachers, held_out, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(teachers["bert"], folder / "cased")
    tokenizer = json.loads((folder / "cased" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (folder / "cased" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("empty", "t5", "bart", "remote"):
        (folder / name).mkdir()
    for name in ("t5", "bart"):
        (folder / name / "config.json").write_text(json.dumps({"model_type": name}))
    (folder / "remote" / "config.json").write_text(
        '{"model_type": "x", "auto_map": {"AutoConfig": "x.XConfig"}}'
    )
    make_teacher(folder / "maskless", "modernbert", True, teachers)
    declared = json.loads((folder / "maskless" / "tokenizer_config.json").read_text())
    del declared["mask_token"]
    (folder / "maskless" / "tokenizer_config.json").write_text(
        json.dumps({**declared, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    rules = (folder / "maskless" / "tokenizer.json").read_text().replace("[MASK]", "[OTHER]")
    (folder / "maskless" / "tokenizer.json").write_text(rules)
    shutil.copytree(teachers["bert"], folder / "seeing")
    config = json.loads((folder / "seeing" / "config.json").read_text())
    (folder / "seeing" / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertLMHeadModel"]})
    )
    (folder / "lines").write_text("bake limo\n")
    (folder / "blank").write_text(" \n\n")
    (folder / "latin").write_bytes(b"gut\nab\xfc\n")
    write_pickle(folder / "short", as_uint16([[2, 9, 3], [2, 9, 9, 3]]))
    names = {path.name: str(path) for path in folder.iterdir()}
    return names | {
        "ids": held_out["bert"],
        "other": held_out["roberta"],
        "text": held_out["text"],
        **teachers,
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_line_a_problem_and_nothing_is_overwritten(
    name, bad_inputs, tmp_path, status_and_errors
):
    words, expected = BAD[name]
    (tmp_path / "old").write_text("old")
    words = [
        "--output",
        str(tmp_path / "old"),
        "--force",
        *(word.format(**bad_inputs) for word in words),
    ]
    read = [Path(bad_inputs["text"]), Path(bad_inputs["bert"]) / "config.json"]
    before = [path.read_bytes() for path in read]
    status, errors = status_and_errors(evaluate_lm.main, words)
    assert status == 2 and len(errors) == len(expected), errors
    for line, text in zip(errors, expected, strict=True):
        assert text.format(**bad_inputs) in line
    assert (tmp_path / "old").read_text() == "old" and [
        path.read_bytes() for path in read
    ] == before


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_bf16_scores_are_close_to_those_of_float32(kind, teachers, held_out, tmp_path):
    flags = "--model", teachers[kind], "--teacher", teachers[kind], "--data_file", held_out[kind]
    wide = scores_of(tmp_path / "wide.json", *flags)
    half = scores_of(tmp_path / "half.json", *flags, "--bf16")
    assert half["flags"]["bf16"] and not wide["flags"]["bf16"]
    assert half["score"]["loss"] != wide["score"]["loss"]
    # 8 bits in each product, over a mean of many.
    assert half["score"]["loss"] == pytest.approx(wide["score"]["loss"], rel=0.01)
    assert half["score"]["kl"] == 0


# --------------------------------------------------------------------------------------------------
# On the way of a run
# --------------------------------------------------------------------------------------------------

# 10 updates.
RUN = {
    "batch_size": 24,
    "n_epoch": 2,
    "log_interval": 5,
    "checkpoint_interval": 4,
    "learning_rate": 0.2,
}


def held_out_points(run: Path) -> list[tuple]:
    return [point for point in logged(run) if point[0].startswith("eval/")]


def assert_same_weights(one: Path, two: Path) -> None:
    for name in ("pytorch_model.bin", "model_epoch_0.pth"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    newest = checkpointing.checkpoints_in(one / "checkpoints")[0].name
    for name in ("student.safetensors", "optimizer.safetensors"):
        assert (one / "checkpoints" / newest / name).read_bytes() == (
            two / "checkpoints" / newest / name
        ).read_bytes()


@pytest.fixture(scope="module")
def evaluated(world, held_out, tmp_path_factory) -> Path:
    """Make a whole run with an evaluation every 3 updates and at the end, the 10th."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train.main(world.flags("bert", folder, **RUN, eval_data_file=held_out["bert"], eval_interval=3))
    return folder


def test_evaluation_does_not_change_training(evaluated, world, tmp_path):
    train.main(world.flags("bert", tmp_path / "plain", **RUN))
    assert_same_weights(evaluated, tmp_path / "plain")
    runs = evaluated, tmp_path / "plain"
    numbers = [
        [point for point in logged(run) if not is_text(point) and point[0][:5] != "eval/"]
        for run in runs
    ]
    assert numbers[0] == numbers[1] and not held_out_points(tmp_path / "plain")
    assert not (tmp_path / "plain" / "best").exists()


def test_the_first_weights_every_interval_and_the_end_are_evaluated_on_both_kinds_of_masks(
    evaluated,
):
    points, steps = held_out_points(evaluated), (0, 3, 6, 9, 10)
    names = [f"{masks}{name}" for masks in ("", "drawn_") for name in evaluation.LOGGED_FIGURES]
    assert {tag for tag, _, _ in points} == {f"eval/{name}" for name in names}
    for name in names:
        assert [x for tag, x, _ in points if tag == f"eval/{name}"] == [2 * step for step in steps]
    lines = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "eval/kl" in line] == list(steps)


def test_the_first_weights_score_what_update_0_says(evaluated, world, teachers, held_out, tmp_path):
    """On fixed masks and on those of the run's own weights, which no seed of a run changes."""
    flags = world.flags("bert", tmp_path / "run", **RUN, seed=56)
    trainer = train.set_up(train.parse_config(flags), train.Runtime())
    save_folder(trainer.student.network, trainer.student.tokenizer, tmp_path / "first")
    score = scores_of(
        *(tmp_path / "s.json", "--model", tmp_path / "first", "--teacher", teachers["bert"]),
        *("--data_file", held_out["bert"], "--token_counts", world.counts("bert")),
    )["score"]
    line = (evaluated / "metrics.jsonl").read_text().splitlines()[0]
    for name, value in json.loads(line).items():
        if name.startswith("eval/"):
            share = 100 if name.endswith(("accuracy", "agreement")) else 1
            assert score[name[5:]] == pytest.approx(share * value, rel=1e-5), name


def test_uniform_masks_and_causal_models_are_evaluated_in_one_way(world, held_out, tmp_path):
    for kind, changes in (("bert", {"mlm_smoothing": 0}), ("gpt2", {})):
        data = {"eval_data_file": held_out[kind], "max_steps": 1}
        train.main(world.flags(kind, tmp_path / kind, **data, **changes))
        tags = {tag for tag, _, _ in held_out_points(tmp_path / kind)}
        assert tags == {f"eval/{name}" for name in evaluation.LOGGED_FIGURES}


# What a run says last: name -> (learning rate, first weights from the teacher, level, words).
ENDS = {
    "better": (1e-3, False, "INFO", "%)."),
    "worse": (5.0, True, "WARNING", "training made this student no better; best/ holds update 0."),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_run_says_by_how_much_it_beats_its_first_weights(
    name, world, held_out, tmp_path, capsys
):
    rate, from_teacher, level, words = ENDS[name]
    changes = {"learning_rate": rate, "max_steps": 20, "warmup_prop": 0.0}
    if from_teacher:
        changes["student_pretrained_weights"] = world.first_weights("bert")
    flags = world.flags("bert", tmp_path / "run", eval_data_file=held_out["bert"], **changes)
    train.main(flags)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "first weights ->" in line]
    first, last = (
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "eval/kl" in line
    )
    assert level in said.split() and words in said, said
    for masks in ("", "drawn_"):
        figures = [line[f"eval/{masks}kl"] for line in (first, last)]
        assert "{:.4f} -> {:.4f}".format(*figures) in said
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best["step"] == (20 if name == "better" else 0)


def test_the_card_has_the_held_out_figures_of_the_run(evaluated):
    """Named by the run folder or by the model/ in it; a run without any has no table."""
    lines = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    first, last = ([line["eval/kl"] for line in lines if "eval/kl" in line][k] for k in (0, -1))
    for folder in (evaluated, evaluated / "model"):
        text = "\n".join(model_card.held_out_text(str(folder)))
        (row,) = [line for line in text.splitlines() if "held out: KL to the teacher" in line]
        assert [float(cell) for cell in row.split("|")[2:4]] == pytest.approx(
            [first, last], rel=1e-4
        )
        assert "held out (drawn): KL" in text
        assert text in model_card.training_text(str(folder), None)
    assert model_card.held_out_text(str(evaluated / "best")) == []


def test_figures_that_cannot_be_compared_are_no_gain():
    figures = {"loss": 2.0, "kl": 0.5, "accuracy": 0.1}
    assert describe_gain(figures, {**figures, "kl": 0.4}, None) == (
        True,
        "Held out, first weights -> last: KL 0.5000 -> 0.4000 (-20.0%).",
    )
    assert describe_gain({"loss": 2.0}, {"loss": 1.0}, None)[0], "without a teacher the loss"
    assert not describe_gain(figures, figures, None)[0]
    assert not describe_gain({**figures, "kl": 0.0}, figures, None)[0]
    assert not describe_gain(figures, {"loss": 1.0}, None)[0]
    assert not describe_gain({}, figures, None)[0]


def test_the_best_student_is_the_one_of_the_lowest_kl_and_scores_what_best_json_says(
    evaluated, teachers, held_out, tmp_path
):
    best = json.loads((evaluated / "best" / "best.json").read_text())
    kl = {
        x // 2: float(value[1:-1])
        for tag, x, value in held_out_points(evaluated)
        if tag == "eval/kl"
    }
    assert best["step"] == min(kl, key=kl.get) != 10 and best["lowest"] == "kl", (
        "a run whose last student is not its best"
    )
    assert best["figures"]["kl"] == pytest.approx(min(kl.values()), rel=1e-6)
    flags = "--teacher", teachers["bert"], "--data_file", held_out["bert"]
    score = scores_of(tmp_path / "best.json", "--model", evaluated / "best", *flags)["score"]
    assert score["kl"] == pytest.approx(best["figures"]["kl"], rel=1e-5)
    assert score["accuracy"] == pytest.approx(100 * best["figures"]["accuracy"])
    last = scores_of(tmp_path / "last.json", "--model", evaluated, *flags)["score"]
    assert last["kl"] == pytest.approx(kl[10], rel=1e-5)
    assert sorted(os.listdir(evaluated / "best")) == sorted(
        ["best.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )


def stop_during(monkeypatch, owner, name: str, call: int) -> None:
    """Let the process signal itself in the call-th call of its function."""
    kept, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the system gives it to a thread
        return kept(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)


STOPS = {
    "before an evaluation": (train.Distiller, "launch", 5, 5),
    "at an update to be evaluated": (train.Distiller, "launch", 6, 6),
    "during the evaluation of the first weights": (evaluation, "measure", 1, 1),
    "during an evaluation": (evaluation, "measure", 5, 7),  # two kinds of masks each
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_neither_misses_nor_doubles_an_evaluation(
    name, evaluated, world, held_out, tmp_path, monkeypatch
):
    owner, function, call, step = STOPS[name]
    flags = world.flags(
        "bert", tmp_path / "run", **RUN, eval_data_file=held_out["bert"], eval_interval=3
    )
    with monkeypatch.context() as patch:
        stop_during(patch, owner, function, call)
        with pytest.raises(SystemExit) as end:
            train.main(flags)
    assert (
        end.value.code == 143
        and checkpointing.newest(tmp_path / "run" / "checkpoints").step == step
    )
    train.main([*flags, "--resume"])
    assert_went_on(tmp_path / "run", evaluated)


def assert_went_on(run: Path, whole: Path) -> None:
    assert_same_weights(run, whole)
    numbers = [[point for point in logged(folder) if not is_text(point)] for folder in (run, whole)]
    assert numbers[0] == numbers[1]
    for name in ("best.json", "model.safetensors"):
        assert (run / "best" / name).read_bytes() == (whole / "best" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, name, call",
    [
        (train.RunFolder, "save_checkpoint", 2),
        (train.RunFolder, "save_checkpoint", 4),
        (train.RunFolder, "save_best", 1),
        (train.RunFolder, "save_best", 2),
    ],
)
def test_a_run_that_died_around_an_evaluation_does_it_again(
    owner, name, call, evaluated, world, held_out, tmp_path, monkeypatch
):
    flags = world.flags(
        "bert", tmp_path / "run", **RUN, eval_data_file=held_out["bert"], eval_interval=3
    )
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying_at(getattr(owner, name), call))
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    train.main([*flags, "--resume", "auto"])
    assert_went_on(tmp_path / "run", evaluated)


def test_the_best_is_remembered_and_only_compared_on_the_same_text(
    evaluated, world, held_out, tmp_path, status_and_errors
):
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    best = json.loads((run / "best" / "best.json").read_text())
    assert checkpointing.newest(run / "checkpoints").state["best"] == best
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = [*world.flags("bert", run, **RUN), "--resume"]
    status, errors = status_and_errors(train.main, [*flags, "--eval_data_file", world.data("bert")])
    assert status == 2 and len(errors) == 1, errors
    assert re.search(
        r"--eval_data_file .*: its digest is \w{12}, the best student so far was found on \w{12};"
        r" name",
        errors[0],
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train.main(flags)
    assert held_out_points(run) == held_out_points(evaluated)


OTHER_RUNS = [
    ("gpt2", {"bf16": True}),
    ("roberta", {"fp16": True}),
    ("gpt2", {"alpha_ce": 0.0, "alpha_cos": 0.0}),
]


@pytest.mark.parametrize("kind, changes", OTHER_RUNS)
def test_causal_half_precision_and_teacherless_runs_are_evaluated_at_the_end(
    kind, changes, world, held_out, tmp_path
):
    flags = {"batch_size": 60, "eval_data_file": held_out[kind], **changes}
    train.main(world.flags(kind, tmp_path / "run", **flags))
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    measure = "loss" if changes.get("alpha_ce") == 0.0 else "kl"
    assert best["lowest"] == measure and ("kl" in best["figures"]) == (measure == "kl")
    score = scores_of(
        tmp_path / "s.json",
        "--model",
        tmp_path / "run" / "best",
        "--teacher",
        world.teachers[kind],
        "--data_file",
        held_out[kind],
    )["score"]
    # Half precision: 8 bits (bf16) in each product, over a sum of many.
    assert score[measure] == pytest.approx(
        best["figures"][measure], rel=0.05 if len(changes) == 1 else 1e-5
    )


def test_a_student_that_is_not_a_number_is_never_the_best():
    progress = Progress(["loss"], 10, 5, 2, 1, np.array([12]), Intervals(5, 5), shows_bar=False)
    figures = {"loss": math.nan, "accuracy": 0.0, "kl": math.nan}

    def is_best(**changes: float) -> bool:
        return progress.take_figures({**figures, **changes}, 0.0, "digest")

    assert not is_best() and progress.best is None
    assert is_best(kl=0.5) and progress.best["figures"]["kl"] == 0.5
    assert not is_best() and not is_best(kl=0.5)


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(world, held_out, tmp_path):
    """After one update, at learning rate 0: the student is equal on both, to the bit."""
    flags = {
        "max_steps": 1,
        "batch_size": 12,
        "eval_data_file": held_out["bert"],
        "eval_interval": 1,
    }
    train.main(world.flags("bert", tmp_path / "one", gradient_accumulation_steps=2, **flags))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / "train.py",
    ]
    done = run_process(
        *command,
        *world.flags("bert", tmp_path / "two", gradient_accumulation_steps=1, **flags),
        timeout_s=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        json.loads((tmp_path / name / "best" / "best.json").read_text()) for name in ("one", "two")
    )
    assert one.pop("figures") == pytest.approx(two.pop("figures"), rel=1e-9) and one == two


BAD_RUNS = {
    "interval": (
        {"eval_interval": 0, "eval_data_file": "{bert}"},
        ["--eval_interval 0: expected at least 1"],
    ),
    "no file named": (
        {"eval_interval": 3},
        ["--eval_interval 3 without --eval_data_file: name held-out text to evaluate"],
    ),
    "no such file": ({"eval_data_file": "nowhere"}, ["--eval_data_file nowhere: no such file"]),
    "another vocabulary": ({"eval_data_file": "{roberta}"}, ["--eval_data_file {roberta}: "]),
    "empty after cleaning": (
        {"eval_data_file": "{short}"},
        ["--eval_data_file {short}: none of its 1 sequences is left"],
    ),
    "both": (
        {"eval_data_file": "nowhere", "eval_interval": -1},
        ["--eval_interval -1", "--eval_data_file nowhere"],
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_flags_of_evaluation_are_named_a_line_each(
    name, world, held_out, tmp_path, status_and_errors
):
    changes, expected = BAD_RUNS[name]
    files = held_out | {"short": write_pickle(tmp_path / "short", as_uint16([[2, 9, 3]]))}
    changes = {
        flag: value.format(**files) if isinstance(value, str) else value
        for flag, value in changes.items()
    }
    status, errors = status_and_errors(train.main, world.flags("bert", tmp_path / "run", **changes))
    assert status == 2 and len(errors) == len(expected) and not (tmp_path / "run").exists(), errors
    for line, text in zip(errors, expected, strict=True):
        assert text.format(**files) in line
