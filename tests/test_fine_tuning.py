"""The second step's loss, what student and teacher are given, and which models and tokenizers are taken for it."""

import itertools
import json
import math
import types

import pytest
import torch
import transformers

import fine_tuning
from utils import InputError

TEMPERATURE = 2.0


def kl_by_hand(student: list[float], teacher: list[float]) -> float:
    """T^2 KL(teacher || student) of two rows of logits, a sum over classes of p (log p - log q)."""
    p, q = ([math.exp(value / TEMPERATURE) for value in row] for row in (teacher, student))
    p, q = ([value / sum(row) for value in row] for row in (p, q))
    return TEMPERATURE**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(**tensors: torch.Tensor) -> types.SimpleNamespace:
    return types.SimpleNamespace(**tensors)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_classes_are_compared_by_the_mean_over_examples():
    s, t = logits(5, 3, seed=1), logits(5, 3, seed=2)
    expected = mean(kl_by_hand(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True))
    found = fine_tuning.DISTANCES["classes"](outputs(logits=s), outputs(logits=t), None, TEMPERATURE)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_values_are_compared_by_the_mean_square():
    s, t = logits(5, 1, seed=1), logits(5, 1, seed=2)
    found = fine_tuning.DISTANCES["values"](outputs(logits=s), outputs(logits=t), None, TEMPERATURE)
    assert found.item() == pytest.approx(mean((a - b) ** 2 for a, b in zip(s[:, 0].tolist(), t[:, 0].tolist(), strict=True)))


def test_spans_are_compared_over_every_position_padding_included():
    tensors = [logits(4, 7, seed=seed) for seed in range(4)]
    student, teacher = (outputs(start_logits=start, end_logits=end) for start, end in (tensors[:2], tensors[2:]))
    terms = [
        mean(kl_by_hand(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True))
        for s, t in ((student.start_logits, teacher.start_logits), (student.end_logits, teacher.end_logits))
    ]
    found = fine_tuning.DISTANCES["spans"](student, teacher, None, TEMPERATURE)
    assert found.item() == pytest.approx(mean(terms), rel=1e-12)


@pytest.mark.parametrize(("distance", "shift"), [("tokens", 0), ("next tokens", 1)])
def test_tokens_are_compared_where_there_is_a_label(distance, shift):
    s, t = logits(3, 6, 4, seed=1), logits(3, 6, 4, seed=2)
    labels = torch.full((3, 6), -100)
    labels[0, 2], labels[1, 0], labels[2, 5] = 3, 1, 0
    places = [(b, i - shift) for b, i in itertools.product(range(3), range(6)) if labels[b, i] != -100 and i >= shift]
    expected = mean(kl_by_hand(s[place].tolist(), t[place].tolist()) for place in places)
    found = fine_tuning.DISTANCES[distance](outputs(logits=s), outputs(logits=t), labels, TEMPERATURE)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distance", ["tokens", "next tokens"])
def test_a_batch_without_labels_is_at_distance_0(distance):
    s = logits(2, 3, 4, seed=1).requires_grad_()
    found = fine_tuning.DISTANCES[distance](
        outputs(logits=s), outputs(logits=logits(2, 3, 4, seed=2)), torch.full((2, 3), -100), 1.0
    )
    found.backward()
    assert found.item() == 0 and not s.grad.any()


SIZES = {"vocab_size": 30, "max_position_embeddings": 16}
CONFIGS = {
    "bert": transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **SIZES),
    "distilbert": transformers.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, **SIZES),
    "roberta": transformers.RobertaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, type_vocab_size=1, **SIZES
    ),
}


@pytest.mark.parametrize(("kind", "sees_types"), [("bert", True), ("distilbert", False), ("roberta", False)])
def test_token_types_reach_those_that_have_them(kind, sees_types):
    model = transformers.AutoModelForQuestionAnswering.from_config(CONFIGS[kind])
    batch = {name: torch.zeros(1, 4).long() for name in ("input_ids", "attention_mask", "token_type_ids", "example")}
    expected = {"input_ids", "attention_mask"} | ({"token_type_ids"} if sees_types else set())
    assert set(fine_tuning.inputs_of(model, batch)) == expected


def make_trainer(tmp_path, student, teacher, **options):
    arguments = fine_tuning.training_arguments(tmp_path, seed=1, batch_size=2, eval_batch_size=2, use_cpu=True)
    return fine_tuning.Trainer(model=student, teacher=teacher, args=arguments, distance="classes", **options)


def test_the_loss_is_the_weighted_sum_and_evaluation_the_tasks_own(tmp_path):
    torch.manual_seed(0)
    student = transformers.AutoModelForSequenceClassification.from_config(CONFIGS["distilbert"])
    teacher = transformers.AutoModelForSequenceClassification.from_config(CONFIGS["bert"])
    for module in (*student.modules(), *teacher.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = {
        "input_ids": torch.tensor([[2, 5, 6, 3]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1]]),
        "labels": torch.tensor([1]),
    }
    trainer = make_trainer(tmp_path, student, teacher, alpha_task=0.3, alpha_ce=0.7, temperature=TEMPERATURE)
    s = student(input_ids=batch["input_ids"], labels=batch["labels"])
    t = teacher(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
    distance = kl_by_hand(s.logits[0].tolist(), t.logits[0].tolist())
    expected = {True: 0.3 * s.loss.item() + 0.7 * distance, False: s.loss.item()}
    for is_training, value in expected.items():
        assert trainer.compute_loss(student.train(is_training), batch).item() == pytest.approx(value, rel=1e-5)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def saved(folder, kind: str, auto_class) -> str:
    auto_class.from_config(CONFIGS[kind]).save_pretrained(folder)
    return str(folder)


def test_a_language_model_gets_a_new_head_but_is_no_teacher(tmp_path):
    name = saved(tmp_path / "lm", "bert", transformers.AutoModelForMaskedLM)
    loaded = fine_tuning.load_for_task(
        transformers.AutoModelForSequenceClassification, name, "--model_name_or_path", is_fine_tuned=False, num_labels=3
    )
    assert loaded.config.num_labels == 3
    with pytest.raises(InputError, match=r"--teacher .*lm: has no fitting weights for .*expected a model fine-tuned"):
        fine_tuning.load_for_task(transformers.AutoModelForSequenceClassification, name, "--teacher", is_fine_tuned=True)


def test_an_encoder_that_lacks_a_part_is_refused(tmp_path):
    name = saved(tmp_path / "lm", "distilbert", transformers.AutoModelForMaskedLM)
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**config, "n_layers": 2}))
    with pytest.raises(InputError, match=r"distilbert\.transformer\.layer\.1\..* and 15 others; expected a whole encoder"):
        fine_tuning.load_for_task(transformers.AutoModelForQuestionAnswering, name, "--model", is_fine_tuned=False)


def test_other_token_ids_are_refused(teachers):
    bert, gpt2 = (fine_tuning.load_any_tokenizer(str(teachers[kind]), "--x") for kind in ("bert", "gpt2"))
    fine_tuning.require_same_vocabulary(bert, bert, "a", "b")
    with pytest.raises(InputError, match="different tokenizers"):
        fine_tuning.require_same_vocabulary(bert, gpt2, "a", "b")


@pytest.mark.parametrize(
    ("values", "flag"),
    [((0.0, 0.5, 2.0), "--alpha_ce"), ((0.5, -1.0, 2.0), "--alpha_task"), ((0.5, 0.5, 0.0), "--temperature")],
)
def test_weights_out_of_range_are_named(values, flag):
    problems = fine_tuning.second_step_problems(True, *values, "alpha_task")
    assert len(problems) == 1 and problems[0].startswith(flag)
    assert not fine_tuning.second_step_problems(True, 0.5, 0.5, 2.0, "alpha_task")
    assert not fine_tuning.second_step_problems(False, 0.0, -1.0, 2.0, "alpha_task")


def test_scores_are_medians_over_the_seeds(tmp_path):
    runs = [
        {"seed": seed, "metrics": {"accuracy": value}, "num_examples": {"dev": 9}}
        for seed, value in enumerate((70.0, 90.0, 80.0))
    ]
    fine_tuning.write_scores(tmp_path / "scores.json", task="sst2", model="a/b/", runs=runs, flags={"seeds": [0, 1, 2]})
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["score"] == {"accuracy": 80.0} and content["spread"] == {"accuracy": [70.0, 90.0]}
    assert content["model_name"] == "b" and content["runs"] == runs
