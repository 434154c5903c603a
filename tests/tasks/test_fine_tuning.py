"""The second step's loss, the inputs of student and teacher, and the models that it admits."""

import copy
import itertools
import json
import math
import types

import pytest
import torch
import transformers
from families import tiny_config

from distil.tasks import fine_tuning, loading, options, scores
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
    found = fine_tuning.DISTANCES["classes"](
        outputs(logits=s), outputs(logits=t), None, TEMPERATURE
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_values_are_compared_by_the_mean_square():
    s, t = logits(5, 1, seed=1), logits(5, 1, seed=2)
    found = fine_tuning.DISTANCES["values"](outputs(logits=s), outputs(logits=t), None, TEMPERATURE)
    assert found.item() == pytest.approx(
        mean((a - b) ** 2 for a, b in zip(s[:, 0].tolist(), t[:, 0].tolist(), strict=True))
    )


def test_spans_are_compared_over_every_position_padding_included():
    tensors = [logits(4, 7, seed=seed) for seed in range(4)]
    student, teacher = (
        outputs(start_logits=start, end_logits=end) for start, end in (tensors[:2], tensors[2:])
    )
    terms = [
        mean(kl_by_hand(a, b) for a, b in zip(s.tolist(), t.tolist(), strict=True))
        for s, t in (
            (student.start_logits, teacher.start_logits),
            (student.end_logits, teacher.end_logits),
        )
    ]
    found = fine_tuning.DISTANCES["spans"](student, teacher, None, TEMPERATURE)
    assert found.item() == pytest.approx(mean(terms), rel=1e-12)


@pytest.mark.parametrize(("distance", "shift"), [("tokens", 0), ("next tokens", 1)])
def test_tokens_are_compared_where_there_is_a_label(distance, shift):
    s, t = logits(3, 6, 4, seed=1), logits(3, 6, 4, seed=2)
    labels = torch.full((3, 6), -100)
    labels[0, 2], labels[1, 0], labels[2, 5] = 3, 1, 0
    places = [
        (b, i - shift)
        for b, i in itertools.product(range(3), range(6))
        if labels[b, i] != -100 and i >= shift
    ]
    expected = mean(kl_by_hand(s[place].tolist(), t[place].tolist()) for place in places)
    found = fine_tuning.DISTANCES[distance](
        outputs(logits=s), outputs(logits=t), labels, TEMPERATURE
    )
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
    "bert": transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **SIZES
    ),
    "distilbert": transformers.DistilBertConfig(
        dim=8, n_layers=1, n_heads=2, hidden_dim=8, **SIZES
    ),
    "roberta": transformers.RobertaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        type_vocab_size=1,
        **SIZES,
    ),
}


@pytest.mark.parametrize(
    ("kind", "sees_types"), [("bert", True), ("distilbert", False), ("roberta", False)]
)
def test_token_types_reach_those_that_have_them(kind, sees_types):
    model = transformers.AutoModelForQuestionAnswering.from_config(CONFIGS[kind])
    batch = {
        name: torch.zeros(1, 4).long()
        for name in ("input_ids", "attention_mask", "token_type_ids", "example")
    }
    expected = {"input_ids", "attention_mask"} | ({"token_type_ids"} if sees_types else set())
    assert set(fine_tuning.inputs_of(model, batch)) == expected


def make_trainer(tmp_path, student, teacher, **options):
    arguments = fine_tuning.training_arguments(
        tmp_path, seed=1, batch_size=2, eval_batch_size=2, use_cpu=True
    )
    return fine_tuning.Trainer(
        model=student, teacher=teacher, args=arguments, distance="classes", **options
    )


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
    trainer = make_trainer(
        tmp_path, student, teacher, alpha_task=0.3, alpha_ce=0.7, temperature=TEMPERATURE
    )
    s = student(input_ids=batch["input_ids"], labels=batch["labels"])
    t = teacher(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
    distance = kl_by_hand(s.logits[0].tolist(), t.logits[0].tolist())
    expected = {True: 0.3 * s.loss.item() + 0.7 * distance, False: s.loss.item()}
    for is_training, value in expected.items():
        assert trainer.compute_loss(student.train(is_training), batch).item() == pytest.approx(
            value, rel=1e-5
        )
    assert not teacher.training and not any(
        parameter.requires_grad for parameter in teacher.parameters()
    )


def set_dropout_to_0(*models) -> None:
    for module in itertools.chain(*(model.modules() for model in models)):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def made_models(distance: str) -> list[torch.nn.Module]:
    """Make a student and a teacher with a head, float64, weights large enough for a distance."""
    gpt2 = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    auto_class, configs, options = {
        "classes": (
            transformers.AutoModelForSequenceClassification,
            ("distilbert", "bert"),
            {"num_labels": 3},
        ),
        "values": (
            transformers.AutoModelForSequenceClassification,
            ("distilbert", "bert"),
            {"num_labels": 1},
        ),
        "tokens": (
            transformers.AutoModelForTokenClassification,
            ("distilbert", "bert"),
            {"num_labels": 4},
        ),
        "next tokens": (transformers.AutoModelForCausalLM, (gpt2, gpt2), {}),
        "spans": (transformers.AutoModelForQuestionAnswering, ("distilbert", "bert"), {}),
    }[distance]
    models = []
    for config in configs:
        config = copy.deepcopy(CONFIGS.get(config, config) if isinstance(config, str) else config)
        for name, value in options.items():
            setattr(config, name, value)
        config.problem_type = {
            "classes": "single_label_classification",
            "values": "regression",
        }.get(distance)
        models.append(auto_class.from_config(config, attn_implementation="eager").double())
    for number, parameter in enumerate(itertools.chain(*(model.parameters() for model in models))):
        torch.nn.init.normal_(parameter, 0, 0.5, generator=torch.Generator().manual_seed(number))
    set_dropout_to_0(*models)
    return models


def made_examples(distance: str) -> list[dict[str, torch.Tensor]]:
    """Make four examples of six positions, some padded, with unequal numbers of labels."""
    examples, generator = [], torch.Generator().manual_seed(4)
    for number, length in enumerate((6, 3, 5, 4)):
        is_real_T = torch.arange(6) < length
        ids_T = torch.randint(1, 30, (6,), generator=generator) * is_real_T
        labels = {
            "classes": {"labels": torch.tensor(number % 3)},
            "values": {"labels": torch.tensor(0.7 * number, dtype=torch.float64)},
            "tokens": {"labels": torch.where(is_real_T & (torch.arange(6) > 1), ids_T % 4, -100)},
            "next tokens": {"labels": torch.where(is_real_T, ids_T, -100)},
            "spans": {
                "start_positions": torch.tensor(1),
                "end_positions": torch.tensor(length - 1),
            },
        }[distance]
        types_T = (torch.arange(6) > 2).long()
        examples.append(
            {
                "input_ids": ids_T,
                "attention_mask": is_real_T.long(),
                "token_type_ids": types_T,
                **labels,
            }
        )
    return examples


def probabilities(row, temperature: float = 1.0) -> list:
    """Write out a softmax of a row, its elements differentiable."""
    powers = [(value / temperature).exp() for value in row]
    return [power / sum(powers) for power in powers]


def pairs_by_hand(distance: str, student, teacher, batch) -> list[tuple]:
    """List what is compared in a batch: (student's logits, teacher's, the label)."""
    num, labels = len(batch["input_ids"]), batch.get("labels")
    if distance in ("classes", "values"):
        return [(student.logits[b], teacher.logits[b], labels[b]) for b in range(num)]
    shift = 1 if distance == "next tokens" else 0
    places = [(b, i) for b in range(num) for i in range(shift, 6) if labels[b, i] != -100]
    return [
        (student.logits[b, i - shift], teacher.logits[b, i - shift], labels[b, i])
        for b, i in places
    ]


def loss_by_hand(
    distance: str, student, teacher, batch, alpha_task: float, alpha_ce: float
) -> torch.Tensor:
    """Compute alpha_task x labels' loss + alpha_ce x distance from the teacher by elements."""
    if distance == "spans":
        sides = [
            [(s[b], t[b], label[b]) for b in range(len(label))]
            for s, t, label in (
                (student.start_logits, teacher.start_logits, batch["start_positions"]),
                (student.end_logits, teacher.end_logits, batch["end_positions"]),
            )
        ]
    else:
        sides = [pairs_by_hand(distance, student, teacher, batch)]
    terms = []
    for s, t, label in itertools.chain(*sides):
        if distance == "values":
            terms.append(alpha_task * (s[0] - label) ** 2 + alpha_ce * (s[0] - t[0]) ** 2)
            continue
        both = zip(probabilities(t, TEMPERATURE), probabilities(s, TEMPERATURE), strict=True)
        kl = TEMPERATURE**2 * sum(p * (p.log() - q.log()) for p, q in both)
        terms.append(alpha_ce * kl - alpha_task * probabilities(s)[int(label)].log())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("distance", fine_tuning.DISTANCES)
def test_an_update_of_the_trainer_follows_the_gradient_of_the_formula(distance, tmp_path):
    """With two micro-batches and SGD, the weights move by the mean of the two gradients."""
    student, teacher = made_models(distance)
    arguments = fine_tuning.training_arguments(
        tmp_path,
        seed=1,
        batch_size=2,
        eval_batch_size=2,
        use_cpu=True,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
    )
    descent = torch.optim.SGD(student.parameters(), lr=0.1)
    seen: list[dict] = []

    def collate(examples):
        seen.append(
            {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        )
        return dict(seen[-1])

    trainer = fine_tuning.Trainer(
        model=student,
        teacher=teacher,
        args=arguments,
        distance=distance,
        train_dataset=made_examples(distance),
        data_collator=collate,
        alpha_task=0.3,
        alpha_ce=0.7,
        temperature=TEMPERATURE,
        optimizers=(descent, torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 1.0)),
    )
    before = copy.deepcopy(student)
    loss = trainer.train().training_loss
    losses = []
    for batch in seen:
        known = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        types = {} if distance == "next tokens" else {"token_type_ids": batch["token_type_ids"]}
        with torch.no_grad():
            wanted = teacher(**known, **types)
        losses.append(loss_by_hand(distance, before(**known), wanted, batch, 0.3, 0.7))
    assert len(losses) == 2
    (sum(losses) / 2).backward()
    assert loss == pytest.approx(mean(x.item() for x in losses), rel=1e-6)
    moved = torch.cat(
        [(b - a).flatten() for a, b in zip(student.parameters(), before.parameters(), strict=True)]
    )
    expected = 0.1 * torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in before.parameters()]
    )
    # The library takes the logarithm of a causal model's probabilities in float32.
    tolerance = 1e-5 if distance == "next tokens" else 1e-9
    assert expected.norm() > 0.001 and (moved - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("num", "batch_size", "accumulation", "epochs"), [(14, 7, 3, 2), (16, 3, 4, 2), (10, 5, 2, 1)]
)
def test_updates_are_whole_accumulations_times_epochs(
    num, batch_size, accumulation, epochs, tmp_path
):
    examples = (made_examples("classes") * num)[:num]
    arguments = fine_tuning.training_arguments(
        tmp_path,
        seed=1,
        batch_size=batch_size,
        eval_batch_size=2,
        use_cpu=True,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
    )
    student, _ = made_models("classes")
    sizes: list[int] = []

    def collate(chosen):
        sizes.append(len(chosen))
        return transformers.default_data_collator(chosen)

    trainer = fine_tuning.Trainer(
        model=student,
        args=arguments,
        distance="classes",
        train_dataset=examples,
        data_collator=collate,
    )
    num_batches = math.ceil(num / batch_size)
    updates = num_batches // accumulation
    if not updates:
        with pytest.raises(
            InputError,
            match=f"--gradient_accumulation_steps {accumulation}: an epoch has {num_batches} micro",
        ):
            fine_tuning.require_an_update(num, arguments)
        return
    fine_tuning.require_an_update(num, arguments)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == updates * epochs
    assert (
        len(sizes) == updates * accumulation * epochs
        and sum(sizes) == min(num, updates * accumulation * batch_size) * epochs
    )


def saved(folder, kind: str, auto_class) -> str:
    auto_class.from_config(CONFIGS[kind]).save_pretrained(folder)
    return str(folder)


def test_a_language_model_gets_a_new_head_but_is_no_teacher(tmp_path):
    name = saved(tmp_path / "lm", "bert", transformers.AutoModelForMaskedLM)
    loaded = loading.load_for_task(
        transformers.AutoModelForSequenceClassification,
        name,
        "--model_name_or_path",
        is_fine_tuned=False,
        num_labels=3,
    )
    assert loaded.config.num_labels == 3
    with pytest.raises(
        InputError,
        match=r"--teacher .*lm: has no fitting weights for .*expected a model fine-tuned",
    ):
        loading.load_for_task(
            transformers.AutoModelForSequenceClassification, name, "--teacher", is_fine_tuned=True
        )


def test_an_encoder_that_lacks_a_part_is_refused(tmp_path):
    name = saved(tmp_path / "lm", "distilbert", transformers.AutoModelForMaskedLM)
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**config, "n_layers": 2}))
    with pytest.raises(
        InputError,
        match=r"distilbert\.transformer\.layer\.1\..* and 15 others; expected a whole encoder",
    ):
        loading.load_for_task(
            transformers.AutoModelForQuestionAnswering, name, "--model", is_fine_tuned=False
        )


@pytest.mark.parametrize(
    ("family", "longest"),
    [
        ("bert", 80),
        ("roberta", 78),
        ("camembert", 78),
        ("llama", 80),
        ("modernbert", 80),
        ("bloom", None),
        ("xlnet", None),
    ],
)
def test_positions_that_no_token_uses_do_not_count(family, longest):
    assert loading.longest_input(tiny_config(family, 99, pad_token_id=1)) == longest


def test_other_token_ids_are_refused(teachers):
    bert, gpt2 = (
        loading.load_any_tokenizer(str(teachers[kind]), "--x") for kind in ("bert", "gpt2")
    )
    loading.require_same_vocabulary(bert, bert, "a", "b")
    with pytest.raises(InputError, match="different tokenizers"):
        loading.require_same_vocabulary(bert, gpt2, "a", "b")


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ((0.0, 0.5, 2.0), "--alpha_ce"),
        ((0.5, -1.0, 2.0), "--alpha_task"),
        ((0.5, 0.5, 0.0), "--temperature"),
    ],
)
def test_weights_out_of_range_are_named(values, flag):
    problems = options.second_step_problems(True, *values, "alpha_task")
    assert len(problems) == 1 and problems[0].startswith(flag)
    assert not options.second_step_problems(True, 0.5, 0.5, 2.0, "alpha_task")
    assert not options.second_step_problems(False, 0.0, -1.0, 2.0, "alpha_task")


def test_scores_are_medians_over_the_seeds(tmp_path):
    runs = [
        {"seed": seed, "metrics": {"accuracy": value}, "num_examples": {"dev": 9}}
        for seed, value in enumerate((70.0, 90.0, 80.0))
    ]
    scores.write_scores(
        tmp_path / "scores.json", task="sst2", model="a/b/", runs=runs, flags={"seeds": [0, 1, 2]}
    )
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["score"] == {"accuracy": 80.0} and content["spread"] == {
        "accuracy": [70.0, 90.0]
    }
    assert content["model_name"] == "b" and content["runs"] == runs
