"""SQuAD: files, windows, decoding, metric, and the program that fine-tunes and scores."""

import argparse
import dataclasses
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import run_process
from stand_ins import (
    LAYERS,
    POSITIONS,
    ROOT,
    STUDENT_LAYERS,
    WIDTH,
    student_config_of,
    vocab_size_of,
)

import run_squad_w_distillation as program
from distil.tasks import squad_spans, squad_training
from distil.tasks.squad import Question, read_questions, score_answer, score_predictions
from distil.tasks.squad_spans import (
    Limits,
    Rules,
    Window,
    decode,
    is_max_context,
    make_windows,
    window_spans,
    window_starts,
)
from utils import InputError

LIMITS = Limits(max_seq_length=48, doc_stride=10, max_query_length=8)
SIZES = ["--max_seq_length", "48", "--doc_stride", "10", "--max_query_length", "8"]
PROGRAM = ROOT / "scripts" / "run_squad_w_distillation.py"

# --------------------------------------------------------------------------------------------------
# Files and models made on the spot
# --------------------------------------------------------------------------------------------------


def made_file(lines: list[str], num: int, seed: int, impossible_every: int = 0) -> dict:
    """Make SQuAD's JSON, two questions per context of the words before the answer; some without."""
    rng, paragraphs = random.Random(seed), []
    for line in lines[:num]:
        words, qas = line.split(), []
        for _ in range(2):
            at, length = rng.randrange(2, len(words) - 1), rng.randint(1, 2)
            answer, start = " ".join(words[at : at + length]), len(" ".join(words[:at])) + 1
            qas.append(
                {
                    "id": f"q{len(paragraphs)}-{len(qas)}",
                    "question": f"{words[at - 2]} {words[at - 1]}?",
                    "answers": [{"text": answer, "answer_start": start}],
                    "is_impossible": False,
                }
            )
        if impossible_every and len(paragraphs) % impossible_every == 0:
            qas[0] |= {"answers": [], "is_impossible": True, "plausible_answers": qas[0]["answers"]}
        paragraphs.append({"context": line, "qas": qas})
    return {"version": "made", "data": [{"title": "made", "paragraphs": paragraphs}]}


def write(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory, lines) -> dict[str, str]:
    """Paths of SQuAD files: v1, v2, and few, a part of v1."""
    folder = tmp_path_factory.mktemp("squad")
    made = {
        "v1": made_file(lines, 12, 1),
        "v2": made_file(lines, 12, 2, impossible_every=2),
        "few": made_file(lines, 4, 1),
    }
    return {name: write(folder / f"{name}.json", content) for name, content in made.items()}


@pytest.fixture(scope="session")
def models(tmp_path_factory, teachers) -> dict[str, Path]:
    """Make folders of models with a random head: bert, roberta, distilbert, small-roberta."""
    folder = tmp_path_factory.mktemp("answering")
    return {
        name: make_answering(name, folder / name, teachers)
        for name in ("bert", "roberta", "distilbert", "small-roberta")
    }


def make_answering(name: str, folder: Path, teachers: dict[str, Path]) -> Path:
    vocabulary = teachers["roberta" if "roberta" in name else "bert"]
    shutil.copytree(vocabulary, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    size, layers = vocab_size_of(vocabulary), STUDENT_LAYERS if "small" in name else LAYERS
    sizes = {
        "vocab_size": size,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            **student_config_of("bert", size), initializer_range=0.2
        )
    elif name == "bert":
        config = transformers.BertConfig(**sizes, max_position_embeddings=POSITIONS)
    else:
        config = transformers.RobertaConfig(
            **sizes, max_position_embeddings=POSITIONS + 2, type_vocab_size=1
        )
    transformers.AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
    return folder


def tokenizer_of(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


def flags(kind: str, models: dict[str, Path], output: Path, **changes) -> list[str]:
    """List the program's flags; True is a bare flag, None none."""
    values = {
        "model_type": kind.removeprefix("small-"),
        "model_name_or_path": models[kind],
        "output_dir": output,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "logging_steps": 1000,
        "no_cuda": True,
        **changes,
    }
    listed = list(SIZES)
    for name, value in values.items():
        if value is not None:
            listed += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return listed


def read(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_v1(path: str, for_training: bool = True) -> list[Question]:
    return read_questions(path, "--train_file", with_impossible=False, for_training=for_training)


# --------------------------------------------------------------------------------------------------
# Windows
# --------------------------------------------------------------------------------------------------


def test_windows_begin_each_stride_further_on_until_the_end_is_seen():
    def slowly(num_tokens, room, doc_stride):
        starts, start = [], 0
        while True:
            length = min(num_tokens - start, room)
            starts.append(start)
            if start + length >= num_tokens:
                return starts
            start += min(length, doc_stride)

    for num_tokens in range(0, 40):
        for room in range(1, 14):
            for doc_stride in range(1, 16):
                assert list(window_starts(num_tokens, room, doc_stride)) == slowly(
                    num_tokens, room, doc_stride
                )


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_windows_are_those_of_the_tokenizers_own_overflow(kind, teachers, files):
    tokenizer = tokenizer_of(teachers[kind])
    questions = read_v1(files["v1"])
    windows = make_windows(questions, tokenizer, LIMITS)
    theirs = tokenizer_of(teachers[kind])
    space = " " if kind == "roberta" else ""
    expected = []
    for question in questions:
        query = theirs(space + question.text, add_special_tokens=False)["input_ids"]
        assert len(query) <= LIMITS.max_query_length
        room = LIMITS.max_seq_length - len(query) - theirs.num_special_tokens_to_add(pair=True)
        expected += theirs(
            space + question.text,
            space + question.context,
            truncation="only_second",
            max_length=LIMITS.max_seq_length,
            stride=room - LIMITS.doc_stride,
            return_overflowing_tokens=True,
        )["input_ids"]
    assert [window.ids.tolist() for window in windows] == expected
    assert (
        len(windows) > len(questions)
        and max(len(window.ids) for window in windows) == LIMITS.max_seq_length
    )


def test_a_question_is_cut_before_the_context_is(teachers, files):
    tokenizer = tokenizer_of(teachers["bert"])
    question = dataclasses.replace(
        read_v1(files["v1"])[0], text="ba ke li mo nu ra so ti vu ze " * 3
    )
    whole = tokenizer(question.text, add_special_tokens=False)["input_ids"]
    for window in make_windows([question], tokenizer, LIMITS):
        assert (
            window.ids[1:9].tolist() == whole[:8]
            and window.ids[9] == tokenizer.sep_token_id
            and window.context_at == 10
        )


def test_a_training_window_points_at_the_answer_or_at_cls(teachers, files):
    tokenizer = tokenizer_of(teachers["bert"])
    questions = read_v1(files["v1"])
    windows = make_windows(questions, tokenizer, LIMITS)
    found = [window.span != (0, 0) for window in windows]
    assert any(found) and not all(found)
    for window in windows:
        question, (start, end) = questions[window.question], window.span
        answer_end = question.answer_start + len(question.answers[0])
        if window.span == (0, 0):
            assert (
                window.offsets[0, 0] > question.answer_start or window.offsets[-1, 1] < answer_end
            )
        else:
            a, b = (
                window.offsets[start - window.context_at, 0],
                window.offsets[end - window.context_at, 1],
            )
            assert (a, b) == (question.answer_start, answer_end)
    assert {window.question for window in windows if window.span != (0, 0)} == set(
        range(len(questions))
    )


def test_questions_without_an_answer_train_on_cls(teachers, files):
    questions = read_questions(files["v2"], "--train_file", with_impossible=True, for_training=True)
    windows = make_windows(questions, tokenizer_of(teachers["bert"]), LIMITS)
    spans = {window.span for window in windows if questions[window.question].is_impossible}
    assert sum(question.is_impossible for question in questions) == 6 and spans == {(0, 0)}


def test_items_are_padded_and_typed_as_the_tokenizer_does(teachers, files):
    tokenizer = tokenizer_of(teachers["bert"])
    question = dataclasses.replace(
        read_v1(files["v1"])[0], context="ba ke li mo", answers=("ke",), answer_start=3
    )
    dataset = squad_spans.WindowDataset(
        make_windows([question], tokenizer, LIMITS), 48, tokenizer.pad_token_id, with_spans=True
    )
    item = dataset[0]
    theirs = tokenizer(question.text, question.context, padding="max_length", max_length=48)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert item[name].tolist() == theirs[name]
    assert (
        tokenizer.decode(item["input_ids"][item["start_positions"] : item["end_positions"] + 1])
        == "ke"
    )


@pytest.mark.parametrize(
    ("num_tokens", "room", "doc_stride"),
    [(40, 11, 4), (41, 12, 4), (30, 9, 9), (25, 10, 3), (5, 9, 2)],
)
def test_max_context_is_that_of_the_slow_definition(num_tokens, room, doc_stride):
    starts = window_starts(num_tokens, room, doc_stride)
    spans = [(first, min(first + room, num_tokens)) for first in starts]
    windows = [Window(0, np.zeros(0), 0, a, np.zeros((b - a, 2))) for a, b in spans]
    found, num_ties = is_max_context(windows), 0
    for token in range(num_tokens):
        scores = [
            min(token - a, b - 1 - token) + 0.01 * (b - a) if a <= token < b else -math.inf
            for a, b in spans
        ]
        num_ties += scores.count(max(scores)) > 1
        here = [row for row, (a, b) in enumerate(spans) if a <= token < b and found[row][token - a]]
        assert here == [scores.index(max(scores))]
    assert num_ties or (room - doc_stride) % 2 == 0 or len(spans) == 1


# --------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------


def oracle_logits(windows: list[Window], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Make logits from the gold answers: 9 at the answer's start and end, 0 elsewhere."""
    start, end = np.zeros((2, len(windows), length), dtype=np.float32)
    for row, window in enumerate(windows):
        if window.span != (0, 0):
            start[row, window.span[0]] = end[row, window.span[1]] = 9
    return start, end


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_gold_oracle_scores_100(kind, teachers, files):
    questions = read_v1(files["v1"])
    windows = make_windows(questions, tokenizer_of(teachers[kind]), LIMITS)
    answers = decode(questions, windows, *oracle_logits(windows, 48), Rules())
    assert answers.predictions == {question.id: question.answers[0] for question in questions}
    assert score_predictions(questions, answers.predictions) == {
        "exact": 100,
        "f1": 100,
        "total": 24,
    }


def test_a_gold_oracle_misses_only_answers_that_are_too_long(teachers, files):
    questions = read_v1(files["v1"])
    tokenizer = tokenizer_of(teachers["bert"])
    windows = make_windows(questions, tokenizer, LIMITS)
    predictions = decode(
        questions, windows, *oracle_logits(windows, 48), Rules(max_answer_length=3)
    ).predictions
    too_long = {
        q.id
        for q in questions
        if len(tokenizer(q.answers[0], add_special_tokens=False)["input_ids"]) > 3
    }
    assert too_long and {q.id for q in questions if predictions[q.id] != q.answers[0]} == too_long


ODDITIES = (
    "ba  ke\tli\u00a0mo\u202fnu\n\nra e\u0301te\u0301 É🙂👩\u200d👩\u200d👧 so\u200bti 北京市 vu"
    " [SEP] ze </s> [CLS] ba\r\nke \u3000li \ufeffmo ﬁ ½ ß İ\x00nu (ra), 'so'…ti."
)
ODD_ANSWERS = [
    "ba  ke\tli",
    "mo\u202fnu\n\nra",
    "e\u0301te\u0301",
    "É🙂👩\u200d👩\u200d👧 so",
    "北京市",
    "京",
    "[SEP]",
    "ze </s>",
    "ba\r\nke \u3000li",
    "ﬁ",
    "½",
    "ß",
    "(ra), 'so'",
    "ti.",
    ODDITIES[: ODDITIES.index(" vu")],
]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("answer", ODD_ANSWERS)
def test_answers_come_out_of_the_context_as_they_stand_there(kind, answer, teachers):
    question = Question("1", "ba\tke?\n", ODDITIES, (answer,), ODDITIES.index(answer))
    windows = make_windows([question], tokenizer_of(teachers[kind]), Limits(512, 64, 16))
    answers = decode(
        [question], windows, *oracle_logits(windows, 512), Rules(max_answer_length=200)
    )
    assert answers.predictions["1"] == answer


def test_special_tokens_in_a_text_are_text(teachers):
    question = Question("1", "[SEP] ba?", "ke [SEP] li </s> <s> [MASK] <mask>", ("li",), 9)
    for kind in ("bert", "roberta"):
        tokenizer = tokenizer_of(teachers[kind])
        (window,) = make_windows([question], tokenizer, Limits(512, 64, 64))
        special = [
            int(i)
            for i in window.ids
            if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id
        ]
        assert len(special) == tokenizer.num_special_tokens_to_add(pair=True)


def test_a_context_without_tokens_is_answered_with_nothing(teachers):
    questions = [Question("1", "ba?", "\x00\x01", ("x",)), Question("2", "ba?", "ke", ("ke",))]
    windows = make_windows(questions, tokenizer_of(teachers["bert"]), LIMITS)
    logits = np.zeros((2, len(windows), 48))
    assert decode(questions, windows, *logits, Rules()).predictions == {"1": "empty", "2": "ke"}
    assert decode(questions, windows, *logits, Rules(with_null=True)).predictions["1"] == ""


def slow_answer(question, windows, start_WT, end_WT, rules):
    """Decode by the rule: (prediction, n best texts, null's score minus the best span's)."""
    found, null = [], math.inf
    for window, is_max_C, start_T, end_T in zip(
        windows, is_max_context(windows), start_WT, end_WT, strict=True
    ):
        null = min(null, float(start_T[0] + end_T[0]))
        tops = [
            sorted(range(len(t)), key=lambda i, t=t: -t[i])[: rules.n_best_size]
            for t in (start_T, end_T)
        ]
        for s in tops[0]:
            for e in tops[1]:
                a, b = s - window.context_at, e - window.context_at
                inside = 0 <= a < len(window.offsets) and 0 <= b < len(window.offsets)
                if inside and is_max_C[a] and s <= e < s + rules.max_answer_length:
                    text = question.context[window.offsets[a][0] : window.offsets[b][1]]
                    found.append((float(start_T[s]) + float(end_T[e]), text))
    found += [(null, "")] if rules.with_null else []
    texts = []
    for _, text in sorted(found, key=lambda pair: -pair[0]):
        if text not in texts and len(texts) < rules.n_best_size:
            texts.append(text)
    texts += [""] if rules.with_null and "" not in texts else []
    spans = {text: max(score for score, other in found if other == text) for text in texts}
    best = next((text for text in texts if text), None)
    odds = null - spans[best] if best else null
    if not rules.with_null:
        return best or "empty", texts or ["empty"], odds
    return best if best and odds <= rules.null_score_diff_threshold else "", texts, odds


@pytest.mark.parametrize(
    "rules",
    [Rules(), Rules(5, 4), Rules(20, 30, True), Rules(8, 3, True, -4.0), Rules(3, 2, True, 6.0)],
)
def test_decoding_is_that_of_the_slow_definition(rules, teachers, files):
    questions = read_v1(files["v1"])
    windows = make_windows(questions, tokenizer_of(teachers["bert"]), LIMITS)
    start_WT, end_WT = (
        np.random.default_rng(5).normal(size=(2, len(windows), 48)).astype(np.float32) * 2
    )
    answers = decode(questions, windows, start_WT, end_WT, rules)
    for number, question in enumerate(questions):
        rows = [row for row, window in enumerate(windows) if window.question == number]
        prediction, texts, odds = slow_answer(
            question, [windows[r] for r in rows], start_WT[rows], end_WT[rows], rules
        )
        assert [entry["text"] for entry in answers.nbest[question.id]] == texts
        assert answers.predictions[question.id] == prediction
        if rules.with_null:
            assert answers.null_odds[question.id] == pytest.approx(odds, abs=1e-6)
        assert sum(entry["probability"] for entry in answers.nbest[question.id]) == pytest.approx(1)
    assert bool(answers.null_odds) == rules.with_null


def test_a_span_stays_within_its_limits(teachers, files):
    windows = make_windows(read_v1(files["v1"]), tokenizer_of(teachers["bert"]), LIMITS)
    window, logits = windows[0], np.random.default_rng(1).normal(size=(2, 48))
    spans = list(window_spans(window, np.ones(len(window.offsets), bool), *logits, Rules(48, 3)))
    number = len(window.offsets)
    assert len(spans) == number + number - 1 + number - 2


def test_logits_that_are_not_finite_are_refused(teachers, files):
    questions = read_v1(files["few"])
    windows = make_windows(questions, tokenizer_of(teachers["bert"]), LIMITS)
    logits = np.zeros((2, len(windows), 48))
    logits[1, 3, 7] = np.nan
    with pytest.raises(InputError, match="not finite.*--learning_rate"):
        decode(questions, windows, *logits, Rules())


# --------------------------------------------------------------------------------------------------
# Metric
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        (("the Cat!",), "cat", 100, 100),
        (("a cat sat", "dog"), "cat", 0, 200 / 3),  # precision 1, recall 1/2
        (("one two", "two three four"), "two three", 0, 80),
        (("cat cat",), "cat", 0, 200 / 3),
        (("cat",), "", 0, 0),
        (("cat",), "dog", 0, 0),
    ],
)
def test_answers_are_scored_by_the_best_gold_answer(gold, prediction, exact, f1):
    for with_impossible in (False, True):
        assert score_answer(
            Question("1", "q", "c", gold), prediction, with_impossible
        ) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        ((), "", 100),
        ((), "the", 100),
        ((), "cat", 0),
        (("the",), "", 100),
        (("the", "cat"), "", 0),
        (("the", "cat"), "cat", 100),
    ],
)
def test_v2_counts_the_empty_answer_where_there_is_none(gold, prediction, expected):
    assert score_answer(Question("1", "q", "c", gold), prediction, True) == (expected, expected)


def test_v2_scores_are_also_given_apart():
    questions = [
        Question("1", "q", "c", ("a cat",)),
        Question("2", "q", "c", ("big dog",)),
        Question("3", "q", "c", ()),
    ]
    scores = score_predictions(questions, {"1": "cat", "2": "dog", "3": "x"}, with_impossible=True)
    third = 100 / 3
    expected = {
        "exact": third,
        "f1": third + 2 * third / 3,
        "total": 3,
        "HasAns_exact": 50,
        "HasAns_f1": 50 + third,
        "HasAns_total": 2,
        "NoAns_exact": 0,
        "NoAns_f1": 0,
        "NoAns_total": 1,
    }
    assert scores == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# Loss, inputs, updates
# --------------------------------------------------------------------------------------------------


def make_trainer(
    student, teacher, models, files, tmp_path, **changes
) -> squad_training.SpanTrainer:
    """Make the program's Trainer for two kinds of models, without running it."""
    teacher_flags = (
        {"teacher_type": teacher, "teacher_name_or_path": models[teacher]} if teacher else {}
    )
    args = program.parse(
        flags(
            student,
            models,
            tmp_path / "run",
            do_train=True,
            train_file=files["v1"],
            **teacher_flags,
            **changes,
        )
    )
    tokenizer = squad_training.load_tokenizers(args)
    student_model = squad_training.load_student(args, args.model_name_or_path, is_fine_tuned=False)
    windows = squad_training.read_train_windows(args, tokenizer)
    arguments = squad_training.trainer_arguments(args)
    return squad_training.make_trainer(
        args, arguments, tokenizer, student_model, squad_training.load_teacher(args), windows
    )


def first_batch(trainer, num: int = 5) -> dict[str, torch.Tensor]:
    return transformers.default_data_collator([trainer.train_dataset[i] for i in range(num)])


def logits_of(model, batch, with_types: bool):
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = model(**inputs, **({"token_type_ids": batch["token_type_ids"]} if with_types else {}))
    return output.start_logits, output.end_logits


def cross_entropy_by_hand(logits_BT, positions_B) -> float:
    rows = [
        -math.log(math.exp(row[p]) / sum(math.exp(x) for x in row))
        for row, p in zip(logits_BT, positions_B, strict=True)
    ]
    return sum(rows) / len(rows)


def kl_by_hand(student_BT, teacher_BT, temperature) -> float:
    total = 0.0
    for student_T, teacher_T in zip(student_BT, teacher_BT, strict=True):
        p = [math.exp(x / temperature) for x in teacher_T]
        q = [math.exp(x / temperature) for x in student_T]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student_BT) * temperature**2


@pytest.mark.parametrize(
    ("alpha_ce", "alpha_squad", "temperature"), [(0.5, 0.5, 2.0), (0.9, 0.25, 3.0)]
)
def test_the_loss_is_the_formula_written_out(
    alpha_ce, alpha_squad, temperature, models, files, tmp_path
):
    weights = {"alpha_ce": alpha_ce, "alpha_squad": alpha_squad, "temperature": temperature}
    trainer = make_trainer("distilbert", "bert", models, files, tmp_path, **weights)
    student, teacher, batch = trainer.model.double(), trainer.teacher.double(), first_batch(trainer)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert batch["input_ids"].shape == (5, 48) and (batch["attention_mask"] == 0).any()
    loss = trainer.compute_loss(student.train(), batch).item()
    with torch.no_grad():
        ours = [t.tolist() for t in logits_of(student.eval(), batch, with_types=False)]
        theirs = [t.tolist() for t in logits_of(teacher, batch, with_types=True)]
    positions = [batch["start_positions"].tolist(), batch["end_positions"].tolist()]
    of_labels = sum(cross_entropy_by_hand(o, p) for o, p in zip(ours, positions, strict=True)) / 2
    of_teacher = sum(kl_by_hand(o, t, temperature) for o, t in zip(ours, theirs, strict=True)) / 2
    assert of_teacher > 0.05  # else a wrong weight of it would not show
    assert loss == pytest.approx(alpha_ce * of_teacher + alpha_squad * of_labels, rel=1e-10)
    student.eval()
    assert trainer.compute_loss(student, batch).item() == pytest.approx(of_labels, rel=1e-10)


def test_without_a_teacher_the_loss_is_that_of_the_labels(models, files, tmp_path):
    trainer = make_trainer("distilbert", None, models, files, tmp_path)
    batch = first_batch(trainer)
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours = [t.tolist() for t in logits_of(trainer.model, batch, with_types=False)]
    positions = [batch["start_positions"].tolist(), batch["end_positions"].tolist()]
    expected = sum(cross_entropy_by_hand(o, p) for o, p in zip(ours, positions, strict=True)) / 2
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher"), [("distilbert", "bert"), ("bert", "bert"), ("small-roberta", "roberta")]
)
def test_token_types_reach_bert_only(student, teacher, models, files, tmp_path):
    trainer = make_trainer(student, teacher, models, files, tmp_path)
    seen: dict[str, set] = {}
    for role, model in {"student": trainer.model, "teacher": trainer.teacher}.items():
        model.register_forward_pre_hook(
            lambda m, a, given, role=role: seen.update({role: set(given)}), with_kwargs=True
        )
    trainer.compute_loss(trainer.model.train(), first_batch(trainer))
    common, labels = {"input_ids", "attention_mask"}, {"start_positions", "end_positions"}
    types_of = {
        kind: {"token_type_ids"} if kind == "bert" else set() for kind in (student, teacher)
    }
    assert seen["student"] == common | labels | types_of[student]
    assert seen["teacher"] == common | types_of[teacher]
    assert not trainer.teacher.training and not any(
        p.requires_grad for p in trainer.teacher.parameters()
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "epochs"), [(8, 1, 2), (7, 3, 2), (5, 4, 3)]
)
def test_updates_are_whole_accumulations_times_epochs(
    batch_size, accumulation, epochs, models, files, tmp_path
):
    sizes = {"per_gpu_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(
        "distilbert", None, models, files, tmp_path, num_train_epochs=epochs, max_steps=-1, **sizes
    )
    num = len(trainer.train_dataset)
    read: list[int] = []
    whole = type(trainer.train_dataset).__getitem__
    trainer.train_dataset.__class__ = type(
        "Watched",
        (type(trainer.train_dataset),),
        {"__getitem__": lambda self, i: read.append(i) or whole(self, i)},
    )
    trainer.train()
    updates = math.ceil(num / batch_size) // accumulation
    an_epoch = min(num, updates * accumulation * batch_size)
    assert accumulation == 1 or math.ceil(num / batch_size) % accumulation  # some are left over
    assert trainer.state.global_step == trainer.state.max_steps == updates * epochs
    assert len(read) == an_epoch * epochs
    assert all(len(set(read[i * an_epoch : (i + 1) * an_epoch])) == an_epoch for i in range(epochs))
    assert read[:an_epoch] != read[an_epoch : 2 * an_epoch]


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def learnt(tmp_path_factory, models, files) -> Path:
    """A BERT that has learnt the answers of a few questions by heart, scored on them."""
    output = tmp_path_factory.mktemp("learnt") / "run"
    changes = {
        "max_steps": 120,
        "save_steps": 60,
        "per_gpu_train_batch_size": 16,
        "train_file": files["few"],
    }
    program.main(
        flags(
            "bert",
            models,
            output,
            do_train=True,
            do_eval=True,
            predict_file=files["few"],
            **changes,
        )
    )
    return output


def test_a_model_learns_by_heart_and_everything_is_written(learnt, files):
    scores, predictions = read(learnt / "scores.json"), read(learnt / "predictions_.json")
    assert (
        scores["task"] == "squad" and scores["score"]["exact"] >= 75
    )  # of 8 questions; the head alone, at random: 0
    assert scores["runs"][0]["num_examples"] == {"train": 8, "dev": 8}
    assert (
        list(predictions)
        == list(read(learnt / "nbest_predictions_.json"))
        == [q.id for q in read_v1(files["few"])]
    )
    assert not (learnt / "null_odds_.json").exists()
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(learnt)
    assert model.config.model_type == "bert" and tokenizer_of(learnt).cls_token == "[CLS]"
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    ):
        assert (learnt / "checkpoint-60" / name).is_file() and (
            learnt / "checkpoint-120" / name
        ).is_file()


def test_the_export_and_its_checkpoints_are_for_transformers_4_too(models, files, tmp_path):
    student = shutil.copytree(models["bert"], tmp_path / "student")
    tokenizer = tokenizer_of(student)
    further = tokenizer.convert_ids_to_tokens([len(tokenizer) - 1])
    tokenizer.add_special_tokens({"additional_special_tokens": further})
    tokenizer.save_pretrained(student)
    train = {"do_train": True, "train_file": files["few"], "max_steps": 1}
    program.main(flags("bert", {"bert": student}, tmp_path / "run", **train))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        declared = read(folder / "tokenizer_config.json")
        assert declared["additional_special_tokens"] == further
        assert "extra_special_tokens" not in declared and "is_local" not in declared
        assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_a_teacher_is_measured_on_training_windows(learnt, models, files, tmp_path, capsys):
    changes = {"teacher_type": "bert", "do_train": True, "train_file": files["few"], "max_steps": 1}
    for teacher, message in (
        (learnt, "INFO    The teacher finds the start in "),
        (models["bert"], "of 10 training windows: no better than guessing"),  # random weights
    ):
        changes |= {"teacher_name_or_path": teacher, "overwrite_output_dir": True}
        program.main(flags("bert", models, tmp_path / "out", **changes))
        assert message in capsys.readouterr().err


def test_a_teacher_whose_start_and_end_are_swapped_is_refused(models, files, tmp_path):
    trainer = make_trainer("bert", "bert", models, files, tmp_path)
    args, data = argparse.Namespace(teacher_name_or_path="T"), trainer.train_dataset
    found_N2, _ = squad_training.spans_of_teacher(trainer, list(data))
    for order in ([0, 1], [1, 0]):  # answers that are the teacher's own, then with ends swapped
        data.windows = [
            dataclasses.replace(window, span=tuple(span))
            for window, span in zip(data.windows, found_N2[:, order].tolist(), strict=True)
        ]
        if order == [0, 1]:
            squad_training.check_teacher(args, trainer)
            continue
        with pytest.raises(InputError, match="--teacher_name_or_path T: .* start and end swapped"):
            squad_training.check_teacher(args, trainer)


def test_a_file_of_predictions_is_scored_alone(learnt, files, capsys):
    command = [
        "--score_predictions",
        str(learnt / "predictions_.json"),
        "--predict_file",
        files["few"],
    ]
    program.main(command)
    score = read(learnt / "scores.json")["score"]
    assert (
        capsys.readouterr().out
        == f"exact match {score['exact']:.2f}, F1 {score['f1']:.2f} (8 questions)\n"
    )


def test_a_trained_model_is_scored_without_training(learnt, models, files, tmp_path):
    model = {"bert": learnt}
    program.main(
        flags(
            "bert",
            model,
            tmp_path / "run",
            do_eval=True,
            eval_all_checkpoints=True,
            predict_file=files["few"],
        )
    )
    for name in ("predictions_.json", "nbest_predictions_.json"):
        assert read(tmp_path / "run" / name) == read(learnt / name)
    assert read(tmp_path / "run" / "predictions_120.json") == read(learnt / "predictions_.json")
    assert read(tmp_path / "run" / "scores_60.json")["runs"][0]["metrics"].keys() == {"exact", "f1"}
    assert (tmp_path / "run" / "nbest_predictions_60.json").is_file()


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(models, files, tmp_path):
    changes = {
        "do_train": True,
        "train_file": files["v1"],
        "max_steps": 8,
        "save_steps": 3,
        "teacher_type": "bert",
        "teacher_name_or_path": models["bert"],
        "per_gpu_train_batch_size": 16,
    }
    program.main(flags("distilbert", models, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    there = {"distilbert": tmp_path / "again" / "checkpoint-3"}
    program.main(flags("distilbert", there, tmp_path / "again", **changes))
    whole, again = (
        transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / run).state_dict()
        for run in ("whole", "again")
    )
    assert whole.keys() == again.keys() and all(
        torch.equal(whole[name], again[name]) for name in whole
    )
    assert read(tmp_path / "again" / "checkpoint-8" / "trainer_state.json")["global_step"] == 8


def test_a_damaged_checkpoint_is_named(models, files, tmp_path, status_and_errors):
    train = {"do_train": True, "train_file": files["few"]}
    program.main(flags("distilbert", models, tmp_path / "run", **train))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    for name in ("optimizer.pt", "trainer_state.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        command = flags(
            "distilbert", {"distilbert": checkpoint}, tmp_path / "run", **train | {"max_steps": 4}
        )
        status, errors = status_and_errors(program.main, command)
        assert (
            status == 2
            and len(errors) == 1
            and f"{checkpoint}: its {name} can't be read" in errors[0]
        )
        (checkpoint / name).write_bytes(content)


def test_a_distant_student_follows_the_teacher(learnt, models, files, tmp_path):
    changes = {
        "teacher_type": "bert",
        "teacher_name_or_path": learnt,
        "train_file": files["few"],
        "max_steps": 60,
        "per_gpu_train_batch_size": 16,
        "do_train": True,
        "alpha_squad": 0.0,
    }
    program.main(
        flags(
            "distilbert",
            models,
            tmp_path / "run",
            do_eval=True,
            predict_file=files["few"],
            **changes,
        )
    )
    scores = read(tmp_path / "run" / "scores.json")
    assert (
        scores["teacher"] == str(learnt) and scores["score"]["exact"] >= 50
    )  # of 8, from the teacher's logits alone


def test_roberta_learns_from_roberta(models, files, tmp_path):
    changes = {
        "teacher_type": "roberta",
        "teacher_name_or_path": models["roberta"],
        "train_file": files["v1"],
        "save_steps": 1,
    }
    changes |= {
        "do_train": True,
        "do_eval": True,
        "predict_file": files["v1"],
        "eval_all_checkpoints": True,
    }
    program.main(flags("small-roberta", models, tmp_path / "run", **changes))
    by_step = {step: read(tmp_path / "run" / f"predictions_{step}.json") for step in ("1", "2", "")}
    assert by_step["2"] == by_step[""] != by_step["1"]
    contexts = {q.id: q.context for q in read_v1(files["v1"])}
    assert all(text in contexts[name] for name, text in by_step[""].items())


def test_v2_writes_null_odds_and_obeys_the_threshold(models, files, tmp_path, capsys):
    changes = {
        "version_2_with_negative": True,
        "train_file": files["v2"],
        "predict_file": files["v2"],
    }
    program.main(
        flags(
            "bert", models, tmp_path / "run", do_train=True, do_eval=True, max_steps=30, **changes
        )
    )
    odds, scores = (
        read(tmp_path / "run" / "null_odds_.json"),
        read(tmp_path / "run" / "scores.json"),
    )
    assert scores["task"] == "squad_v2" and "without: exact match" in capsys.readouterr().out
    assert {"exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"} == scores[
        "score"
    ].keys()
    threshold = sorted(odds.values())[len(odds) // 2]
    trained = {"bert": tmp_path / "run"}
    program.main(
        flags(
            "bert",
            trained,
            tmp_path / "again",
            do_eval=True,
            null_score_diff_threshold=threshold,
            **changes,
        )
    )
    predictions = read(tmp_path / "again" / "predictions_.json")
    again = read(tmp_path / "again" / "null_odds_.json")
    assert again == odds and all(
        (predictions[name] == "") == (odds[name] > threshold) for name in odds
    )
    assert 0 < sum(text == "" for text in predictions.values()) < len(odds)


def test_evaluation_during_training_scores_the_whole_set(models, files, tmp_path, capsys):
    changes = {
        "do_train": True,
        "evaluate_during_training": True,
        "logging_steps": 1,
        "train_file": files["few"],
    }
    program.main(flags("distilbert", models, tmp_path / "run", predict_file=files["v1"], **changes))
    assert capsys.readouterr().out.count("'eval_total': 24") == 2


@pytest.mark.slow
def test_two_processes_learn_and_answer_each_question_once(learnt, models, files, tmp_path):
    scored = {"do_eval": True, "predict_file": files["v1"], "per_gpu_eval_batch_size": 5}
    train = {
        "do_train": True,
        "train_file": files["v1"],
        "teacher_type": "bert",
        "teacher_name_or_path": learnt,
    }
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        PROGRAM,
    ]
    command = flags(
        "distilbert", models, tmp_path / "two", max_steps=12, no_cuda=None, **train, **scored
    )
    two = run_process(*launch, *command, CUDA_VISIBLE_DEVICES="")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("exact match") == 1 and "(24 questions)" in two.stdout
    program.main(flags("distilbert", {"distilbert": tmp_path / "two"}, tmp_path / "one", **scored))
    assert read(tmp_path / "two" / "predictions_.json") == read(
        tmp_path / "one" / "predictions_.json"
    )
    assert list(read(tmp_path / "two" / "predictions_.json")) == [
        question.id for question in read_v1(files["v1"])
    ]


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

LEAD = "ba ke li mo nu ra"


def one_question(**changes) -> dict:
    entry = {
        "id": "x1",
        "question": "ba?",
        "answers": [{"text": "li", "answer_start": 6}],
        **changes,
    }
    paragraph = {
        "context": LEAD,
        "qas": [{name: value for name, value in entry.items() if value is not None}],
    }
    return {"data": [{"paragraphs": [paragraph]}]}


def edited(**changes) -> dict:
    """Return a valid file except for the changes of its paragraph."""
    content = one_question()
    content["data"][0]["paragraphs"][0] |= changes
    return content


WRONG_FILES = {
    "misplaced": (
        one_question(answers=[{"text": "li", "answer_start": 5}]),
        r"id 'x1'.*'li' is not at character 5.*' l'.*--skip_mis",
    ),
    "negative place": (
        one_question(answers=[{"text": "li", "answer_start": -11}]),
        r"'li' is not at character -11",
    ),
    "no place": (
        one_question(answers=[{"text": "li"}]),
        r"\(id 'x1'\), answer 1: answer_start has to be a whole number, got none",
    ),
    "place of text": (
        one_question(answers=[{"text": "li", "answer_start": "6"}]),
        r"answer_start .* got a str",
    ),
    "empty question": (
        one_question(question=" "),
        r"article 1, paragraph 1, question 1 \(id 'x1'\): question is empty; fill it",
    ),
    "no question": (one_question(question=None), r"question has to be a text, got none"),
    "no id": (one_question(id=None), r"id has to be a text"),
    "number as id": (one_question(id=7), r"id has to be a text, got a int"),
    "no context": (
        edited(context=None),
        r"article 1, paragraph 1: context has to be a text, got a NoneType",
    ),
    "empty context": (edited(context=""), r"context is empty"),
    "surrogate": (edited(context="ba \ud800 li"), r"half of a surrogate pair"),
    "no answers": (one_question(answers=[]), r"\(id 'x1'\): has no answers, expected at least one"),
    "no answers at all": (one_question(answers=None), r"answers has to be a list, got none"),
    "empty answer": (
        one_question(answers=[{"text": "", "answer_start": 2}]),
        r"the answer '' is not at",
    ),
    "impossible": (
        one_question(answers=[], is_impossible=True),
        r"is_impossible is true.*add --version_2_with_negative",
    ),
    "odd impossible": (
        one_question(is_impossible="no"),
        r"is_impossible is 'no', expected true or false",
    ),
    "twice": (
        edited(qas=one_question()["data"][0]["paragraphs"][0]["qas"] * 2),
        r"id 'x1' is there twice",
    ),
    "no questions": (edited(qas=[]), r"holds no questions"),
    "flat": ([{"id": "x1"}], r"data has to be a list, got none; expected SQuAD's own JSON"),
    "flat data": ({"data": [LEAD]}, r"article 1: paragraphs has to be a list, got none"),
    "no json": ('{"data": [', r"no readable JSON"),
    "deep": ("[" * 200_000, r"no readable JSON"),
    "latin": (b'{"data": "\xe9"}', r"no readable JSON"),
    "empty": ("", r"the file is empty"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_training_file_is_named(name, models, tmp_path, status_and_errors):
    content, message = WRONG_FILES[name]
    path = tmp_path / "train.json"
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    status, errors = status_and_errors(
        program.main, flags("bert", models, tmp_path / "run", do_train=True, train_file=path)
    )
    assert status == 2 and len(errors) == 1 and not (tmp_path / "run").exists()
    assert errors[0].startswith(f"--train_file {path}")
    assert re.search(message, errors[0])


def test_misplaced_answers_can_be_left_out(tmp_path):
    misplaced = {"id": "x2", "question": "?", "answers": [{"text": "zz", "answer_start": 1}]}
    path = write(
        tmp_path / "train.json",
        edited(qas=[*one_question()["data"][0]["paragraphs"][0]["qas"], misplaced]),
    )
    kept = read_questions(
        path, "--train_file", with_impossible=False, for_training=True, skip_misplaced=True
    )
    assert [question.id for question in kept] == ["x1"]
    assert len(read_v1(path, for_training=False)) == 2


def test_v2_contradictions_are_named(tmp_path):
    path = write(tmp_path / "dev.json", one_question(is_impossible=True))
    with pytest.raises(InputError, match="is_impossible is true, but it has answers"):
        read_questions(path, "--predict_file", with_impossible=True, for_training=False)


WRONG_FLAGS = {
    "nothing to do": ({"do_train": None}, "nothing to do: give --do_train, --do_eval"),
    "no room": (
        {"max_seq_length": 11},
        "--max_seq_length 11: a question of --max_query_length 8 and 3 .* leave no room",
    ),
    "stride": ({"doc_stride": 38}, "--doc_stride 38: .* holds 37 tokens"),
    "too long": (
        {"max_seq_length": 65},
        "--max_seq_length 65: the student reads 64 tokens at most; lower it",
    ),
    "teacher without type": (
        {"teacher_name_or_path": "x"},
        "--teacher_name_or_path: needs --teacher_type",
    ),
    "type without teacher": (
        {"teacher_type": "bert"},
        "--teacher_type: needs --teacher_name_or_path",
    ),
    "distilbert teacher": ({"teacher_type": "distilbert"}, "invalid choice: 'distilbert'"),
    "no file": ({"train_file": "nowhere.json"}, "--train_file nowhere.json: no such file"),
    "no named file": (
        {"train_file": None, "data_dir": "nowhere"},
        "--train_file nowhere/train-v1.1.json: no such file",
    ),
    "no named v2": (
        {"train_file": None, "data_dir": "no", "version_2_with_negative": True},
        "no/train-v2.0.json: no such",
    ),
    "no model": (
        {"model_name_or_path": "/nowhere/at/all"},
        "--model_name_or_path /nowhere/at/all: neither a local folder",
    ),
    "batch": ({"per_gpu_train_batch_size": 0}, "--per_gpu_train_batch_size 0: expected 1"),
    "rate": ({"learning_rate": "nan"}, "--learning_rate nan: expected"),
    "steps": ({"max_steps": 0}, "--max_steps 0: expected at least 1"),
    "fp16": ({"fp16": True}, "--fp16: needs a GPU"),
    "accumulation": (
        {"gradient_accumulation_steps": 999},
        "--gradient_accumulation_steps 999: an epoch has .* lower it",
    ),
    "all checkpoints": (
        {"eval_all_checkpoints": True},
        "--eval_all_checkpoints: has no effect without --do_eval",
    ),
    "unknown": ({"per_gpu_batch_size": 3}, "unknown argument --per_gpu_batch_size; did you mean"),
    "type": (
        {"model_type": "roberta"},
        "holds a .*, which is no roberta tokenizer|expected roberta",
    ),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_a_wrong_flag_is_named(name, models, files, tmp_path, status_and_errors):
    changes, message = WRONG_FLAGS[name]
    good = {"do_train": True, "train_file": files["v1"]}
    status, errors = status_and_errors(
        program.main, flags("bert", models, tmp_path / "run", **(good | changes))
    )
    assert status == 2 and len(errors) == 1 and not (tmp_path / "run").exists()
    assert re.search(message, errors[0])


def test_all_problems_of_arguments_are_said_at_once(models, tmp_path, status_and_errors):
    changes = {
        "max_steps": 0,
        "save_steps": 0,
        "temperature": 0,
        "model_type": None,
        "teacher_type": "bert",
    }
    status, errors = status_and_errors(
        program.main, flags("bert", models, tmp_path / "run", **changes, seed=-1)
    )
    assert status == 2 and len(errors) == 7
    assert any("--model_type: is required" in line for line in errors)


def test_a_teacher_has_to_fit(models, teachers, files, tmp_path, status_and_errors):
    wrong = {
        ("roberta", models["roberta"]): "have different tokenizers",
        (
            "bert",
            teachers["bert"],
        ): "has no fitting weights for qa_outputs.bias and 1 other; expected a model fine-tuned",
        ("bert", models["distilbert"]): "is a distilbert model, expected bert",
    }
    for (kind, folder), message in wrong.items():
        changes = {
            "teacher_type": kind,
            "teacher_name_or_path": folder,
            "do_train": True,
            "train_file": files["few"],
        }
        status, errors = status_and_errors(
            program.main, flags("bert", models, tmp_path / "run", **changes)
        )
        assert status == 2 and len(errors) == 1 and message in errors[0]
    changes |= {"alpha_ce": 0.0}
    status, errors = status_and_errors(
        program.main, flags("bert", models, tmp_path / "run", **changes)
    )
    assert status == 2 and "--alpha_ce 0: expected above 0 with a teacher" in errors[0]


def test_a_model_without_a_head_is_not_scored(teachers, files, tmp_path, status_and_errors):
    command = flags("bert", teachers, tmp_path / "run", do_eval=True, predict_file=files["few"])
    status, errors = status_and_errors(program.main, command)
    assert (
        status == 2 and "qa_outputs" in errors[0] and "fine-tuned for this very task" in errors[0]
    )


def test_results_are_not_overwritten_unasked(learnt, models, files, tmp_path, status_and_errors):
    train = {"do_train": True, "train_file": files["few"], "save_steps": 1}
    program.main(flags("distilbert", models, tmp_path / "run", **train))
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    status, errors = status_and_errors(
        program.main, flags("distilbert", models, tmp_path / "run", **train, seed=3)
    )
    assert (
        status == 2
        and "is not empty; resume with --model_name_or_path" in errors[0]
        and "checkpoint-2" in errors[0]
    )
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    os.link(tmp_path / "run" / "model.safetensors", tmp_path / "backup")
    foreign = [tmp_path / "run" / name for name in ("checkpoint-3/notes.txt", "checkpoint-2/n.txt")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    again = train | {"overwrite_output_dir": True, "seed": 3, "max_steps": 1}
    inside = shutil.copy(files["few"], tmp_path / "run" / "checkpoint-1" / "few.json")
    command = flags("distilbert", models, tmp_path / "run", **{**again, "train_file": inside})
    status, errors = status_and_errors(program.main, command)
    assert status == 2 and "--train_file" in errors[0] and "is read, and would be" in errors[0]
    os.unlink(inside)
    program.main(flags("distilbert", models, tmp_path / "run", **again))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    assert os.listdir(tmp_path / "run" / "checkpoint-2") == ["n.txt"]
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").exists()
    assert all(path.read_text() == "mine" for path in foreign)
    assert (tmp_path / "backup").read_bytes() == before, "written in place"
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    teacher = {"teacher_type": "bert", "teacher_name_or_path": models["bert"]}
    for kind, output, more, flag in (
        ("distilbert", tmp_path / "run", {}, "--model_name_or_path"),
        (
            "bert",
            models["bert"],
            teacher | {"model_name_or_path": learnt},
            "--teacher_name_or_path",
        ),
    ):
        places = {"distilbert": tmp_path / "run", "bert": models["bert"]}
        status, errors = status_and_errors(
            program.main, flags(kind, places, output, **again | more)
        )
        assert (
            status == 2
            and len(errors) == 1
            and f"{flag} {output} is read, and would be replaced" in errors[0]
        )
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept
    test = {"do_eval": True, "predict_file": files["few"]}
    trained = {"distilbert": tmp_path / "run"}
    program.main(flags("distilbert", trained, tmp_path / "run", **test))
    status, errors = status_and_errors(
        program.main, flags("distilbert", trained, tmp_path / "run", **test)
    )
    assert status == 2 and "holds predictions_.json already" in errors[0]


def test_predictions_for_other_questions_are_refused(files, tmp_path, status_and_errors):
    ids = [question.id for question in read_v1(files["few"])]
    wrong = {
        "unknown": ({"y9": "x"}, f"none of its 1 ids is a question's, such as {ids[0]!r}"),
        "empty": ({}, "none of its 0 ids is a question's"),
        "list": (["x"], "holds a list, expected an object"),
        "number": ({name: 1 for name in ids}, f"id {ids[0]!r} has a int, expected the answer"),
        "no json": ("{", "no readable JSON"),
    }
    for content, message in wrong.values():
        path = write(tmp_path / "predictions.json", content)
        command = ["--score_predictions", path, "--predict_file", files["few"]]
        status, errors = status_and_errors(program.main, command)
        assert status == 2 and len(errors) == 1 and message in errors[0] and path in errors[0]
    status, errors = status_and_errors(program.main, ["--score_predictions", "nowhere"])
    assert status == 2 and len(errors) == 2


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_missing_predictions_count_0_and_unknown_ones_are_ignored(version, files, tmp_path, capsys):
    questions = read_questions(
        files[version], "", with_impossible=version == "v2", for_training=False
    )
    right = {q.id: q.answers[0] if q.answers else "" for q in questions[:20]}
    path = write(tmp_path / "p.json", {**right, "y8": "x", "y9": "x"})
    v2 = ["--version_2_with_negative"] if version == "v2" else []
    program.main(["--score_predictions", path, "--predict_file", files[version], *v2])
    printed = capsys.readouterr()
    assert printed.out.startswith("exact match 83.33, F1 83.33 (24 questions)")  # 20 of 24
    assert (
        f"without a prediction, counted as 0: 4, such as {questions[20].id!r}" in printed.err
        and "for unknown ids, ignored: 2, such as 'y8'" in printed.err
    )
    write(tmp_path / "p.json", {q.id: right.get(q.id, "x y z") for q in questions})
    program.main(["--score_predictions", path, "--predict_file", files[version], *v2])
    printed = capsys.readouterr()
    assert "83.33" in printed.out and "prediction" not in printed.err  # nothing to warn of


def test_flags_without_a_meaning_are_accepted_with_a_notice(files, tmp_path, capsys):
    predictions = write(tmp_path / "p.json", {q.id: q.answers[0] for q in read_v1(files["few"])})
    old = [
        "--overwrite_cache",
        "--threads=4",
        "--cache_dir=x",
        "--verbose_logging",
        "--local-rank=0",
        "--fp16_opt_level=O2",
    ]
    program.main(["--score_predictions", predictions, "--predict_file", files["few"], *old])
    assert capsys.readouterr().err.count("has no effect any more") == 6


def test_defaults_are_those_of_2019():
    args = program.parse([])
    expected = {
        "alpha_ce": 0.5,
        "alpha_squad": 0.5,
        "temperature": 2.0,
        "max_seq_length": 384,
        "doc_stride": 128,
        "max_query_length": 64,
        "per_gpu_train_batch_size": 8,
        "per_gpu_eval_batch_size": 8,
        "learning_rate": 5e-5,
        "gradient_accumulation_steps": 1,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "warmup_steps": 0,
        "n_best_size": 20,
        "max_answer_length": 30,
        "null_score_diff_threshold": 0.0,
        "logging_steps": 50,
        "save_steps": 50,
        "seed": 42,
    }
    assert {name: getattr(args, name) for name in expected} == expected
