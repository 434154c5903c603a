"""Statistics of masking, scaling of an update, frozen parameters, and evaluation."""

import dataclasses
import json
import math

import pytest
import torch
from stand_ins import make_model

from distil.data.batches import MlmPreparation, masking_weights, prepare_clm
from distil.evaluation import figures_of, measure, reader_of
from distil.models.architectures import architecture_named
from distil.models.forward import last_hidden_state, recompute_activations
from distil.models.heads import prediction_head
from distil.models.language_model import build_network, freeze_embeddings, read_student_config
from distil.objectives import NORMALIZATIONS
from distil.training.optimizer import split_for_weight_decay
from distil.training.post_mortem import NonFiniteError
from distiller import DistillationModel, Distiller

VOCAB, MASK_ID, SPECIAL_IDS = 60, 4, [0, 1, 2, 3, 4]


def make_preparation(
    counts_V=None, smoothing=0.7, mask_prop=0.15, fates=(0.8, 0.1, 0.1), restrict=False, seed=7
):
    counts_V = torch.arange(VOCAB) * 10 if counts_V is None else counts_V
    weights_V = masking_weights(counts_V, smoothing, SPECIAL_IDS)
    return MlmPreparation(weights_V, MASK_ID, mask_prop, *fates, restrict, seed)


def make_batch(lengths, seed=0, vocab=VOCAB):
    """Make token ids: 1, random ordinary ids, 2, then padding 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.tensor(lengths)
    token_ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(token_ids_BT, lengths, strict=True):
        row[:length] = torch.randint(len(SPECIAL_IDS), vocab, (length,), generator=generator)
        row[0], row[length - 1] = 1, 2
    return token_ids_BT, lengths_B


# --------------------------------------------------------------------------------------------------
# Masked-LM batches
# --------------------------------------------------------------------------------------------------


def test_weights_are_smoothed_counts_and_zero_for_special_tokens():
    weights_V = masking_weights(torch.tensor([5, 0, 1, 100, 2]), 0.7, [0])
    assert weights_V.dtype == torch.float64
    assert weights_V.tolist() == pytest.approx([0, 1, 1, 100**-0.7, 2**-0.7])


def test_frequent_tokens_keep_their_weight_in_float64():
    weights_V = masking_weights(torch.tensor([10**9, 10]), 0.7, [])
    assert weights_V[0] / weights_V[1] == pytest.approx((10**8) ** -0.7)


@pytest.mark.parametrize("lengths", [[20, 13], [12], [30] * 7])
@pytest.mark.parametrize("mask_prop", [0.0, 0.01, 0.15, 0.5])
def test_the_given_share_of_real_tokens_is_drawn(lengths, mask_prop):
    batch = make_preparation(mask_prop=mask_prop)(0, *make_batch(lengths))
    num = math.ceil(mask_prop * sum(lengths))
    assert (batch.labels_BT != -100).sum() == len(batch.rows["masked"]) == num
    assert batch.num_tokens == sum(lengths) == batch.attention_mask_BT.sum()


def test_at_most_the_positions_of_positive_weight_are_drawn():
    token_ids_BT = torch.tensor([[1, 9, 3, 3, 3, 3, 8, 2]])
    batch = make_preparation(mask_prop=1.0)(0, token_ids_BT, torch.tensor([8]))
    assert batch.rows["masked"].tolist() == [1, 6]
    special_BT = torch.tensor([[1, 3, 3, 2]])
    nothing = make_preparation(mask_prop=0.5)(0, special_BT, torch.tensor([4]))
    assert len(nothing.rows["masked"]) == 0
    assert torch.equal(nothing.input_ids_BT, special_BT)


def test_labels_are_the_original_ids_and_other_tokens_are_unchanged():
    token_ids_BT, lengths_B = make_batch([25, 18, 31])
    batch = make_preparation()(0, token_ids_BT, lengths_B)
    drawn_BT = batch.labels_BT != -100
    assert torch.equal(batch.labels_BT[drawn_BT], token_ids_BT[drawn_BT])
    assert torch.equal(batch.input_ids_BT[~drawn_BT], token_ids_BT[~drawn_BT])


def test_masks_depend_on_seed_and_number_alone():
    batch = make_batch([30, 25])
    drawn = {(seed, g): make_preparation(seed=seed)(g, *batch) for seed in (7, 8) for g in (0, 1)}
    torch.manual_seed(999)
    again = make_preparation(seed=7)(1, *batch)
    assert torch.equal(again.input_ids_BT, drawn[7, 1].input_ids_BT)
    assert len({tuple(b.labels_BT.flatten().tolist()) for b in drawn.values()}) == 4


def six_sigma(probability: float, n: int) -> float:
    """Bound a share's error over n draws by 6 standard deviations: exceeded once in 5 x 10^8."""
    return 6 * math.sqrt(probability * (1 - probability) / n)


def test_masking_statistics_over_100_000_predicted_tokens():
    prepare = make_preparation(mask_prop=0.5, fates=(0.8, 0.1, 0.1))
    drawn = kept = masked = random = 0
    random_ids = torch.zeros(VOCAB)
    for number in range(60):
        token_ids_BT, lengths_B = make_batch([128] * 32, seed=number)
        batch = prepare(number, token_ids_BT, lengths_B)
        chosen = batch.labels_BT != -100
        new, old = batch.input_ids_BT[chosen], token_ids_BT[chosen]
        drawn += len(new)
        masked += (new == MASK_ID).sum().item()
        kept += (new == old).sum().item()
        other = new[(new != MASK_ID) & (new != old)]
        random += len(other)
        random_ids += torch.bincount(other, minlength=VOCAB)
    assert drawn >= 10**5
    # Random ids are uniform over V: [MASK] and the token itself have probability 1 / V each.
    for found, probability in (
        (masked, 0.8 + 0.1 / VOCAB),
        (kept, 0.1 + 0.1 / VOCAB),
        (random, 0.1 - 0.2 / VOCAB),
    ):
        assert abs(found / drawn - probability) < six_sigma(probability, drawn)
    # Special tokens are as likely replacements as any other id.
    special, probability = random_ids[[0, 1, 2, 3]].sum().item(), 4 / (VOCAB - 2)
    assert abs(special / random - probability) < six_sigma(probability, random) + 1 / VOCAB**2


def test_rare_tokens_are_drawn_by_smoothed_counts():
    counts_V = torch.ones(VOCAB, dtype=torch.long)
    counts_V[10], counts_V[11] = 1000, 10
    prepare = make_preparation(counts_V, mask_prop=1 / 200)
    token_ids_BT = torch.tensor([[1, *[10] * 99, *[11] * 99, 2]])
    hits = {10: 0, 11: 0}
    for number in range(4000):  # one position a batch: drawing without replacement has no effect
        batch = prepare(number, token_ids_BT, torch.tensor([200]))
        for label in batch.labels_BT[batch.labels_BT != -100].tolist():
            hits[label] += 1
    expected = 1 / (1 + (1000 / 10) ** -0.7)
    share = hits[11] / sum(hits.values())
    assert sum(hits.values()) == 4000
    assert abs(share - expected) < six_sigma(expected, 4000)


def test_positions_are_drawn_over_the_whole_batch_and_never_from_special_tokens_or_padding():
    seen = torch.zeros(2, 20, dtype=torch.bool)
    token_ids_BT, lengths_B = make_batch([20, 12])
    for number in range(300):
        seen |= make_preparation()(number, token_ids_BT, lengths_B).labels_BT != -100
    expected = torch.ones(2, 20, dtype=torch.bool)
    expected[:, 0] = expected[0, 19] = False
    expected[1, 11:] = False
    assert torch.equal(seen, expected)


# --------------------------------------------------------------------------------------------------
# Updates
# --------------------------------------------------------------------------------------------------

MLM_ALPHAS = {"ce": 5.0, "mlm": 2.0, "mse": 0.1, "cos": 1.0}
CLM_ALPHAS = {"ce": 0.5, "clm": 0.5, "mse": 0.1, "cos": 0.7}


def make_student(tmp_path, dropout=0.0, dtype=torch.float64):
    config = {
        "vocab_size": VOCAB,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "dropout": dropout,
        "max_position_embeddings": 64,
        "attention_dropout": dropout,
        "initializer_range": 0.2,
    }
    path = tmp_path / "student.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(2)
    config = read_student_config("distilbert", str(path))
    return build_network(architecture_named("distilbert"), config).to(dtype)


def make_distiller(student, teacher, alphas=MLM_ALPHAS, fast_head=True, **changes):
    teacher = teacher.to(student.dtype).eval().requires_grad_(False)
    model = DistillationModel(student, alphas, 2.0, chunk_rows=7, fast_head=fast_head)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    options = {"max_grad_norm": 1e9, "seed": 5} | changes
    return Distiller(model, teacher, optimizer, None, **options)


def gradients(distiller, batches) -> dict[str, torch.Tensor]:
    distiller.optimizer.zero_grad()
    distiller.accumulate(batches, [batch.number for batch in batches], len(batches))
    named = distiller.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def slow_loss(student, teacher, batch, alphas, temperature=2.0):
    """Compute the objectives by definition from all logits of one micro-batch."""
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    s, t = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    real, masked = batch.attention_mask_BT.bool(), batch.labels_BT != -100
    log_p, log_q = (torch.log_softmax(x.logits[real] / temperature, -1) for x in (t, s))
    log_probs = torch.log_softmax(s.logits[masked], -1)
    hidden = s.hidden_states[-1][real], t.hidden_states[-1][real]
    terms = {
        "ce": temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / real.sum(),
        "mlm": -log_probs.gather(1, batch.labels_BT[masked][:, None]).mean(),
        "mse": (s.logits[real] - t.logits[real]).square().sum() / real.sum(),
        "cos": 1 - torch.cosine_similarity(*hidden).mean(),
    }
    return sum(alpha * terms[name] for name, alpha in alphas.items()), terms


@pytest.mark.parametrize("fast_head", [True, False])
def test_the_step_computes_the_objectives_by_definition(fast_head, tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher, fast_head=fast_head)
    batches = [
        make_preparation()(g, *make_batch(lengths, seed=g))
        for g, lengths in enumerate([[20, 13], [31], [12, 14, 12]])
    ]
    found = gradients(distiller, batches)
    student.zero_grad()
    for batch in batches:
        loss, _ = slow_loss(student, distiller.teacher, batch, MLM_ALPHAS)
        (loss / len(batches)).backward()
    for name, gradient in found.items():
        expected = student.get_parameter(name.removeprefix("student.")).grad
        # Another order of sums, in float64.
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


def test_an_update_reports_the_unweighted_losses_of_each_micro_batch(tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher)
    batches = [make_preparation()(g, *make_batch([20 + g], seed=g)) for g in (4, 5)]
    expected = [slow_loss(student, distiller.teacher, batch, MLM_ALPHAS) for batch in batches]
    report = distiller.step(batches, [4, 5], 2)
    for row, (loss, terms) in zip(report.losses_MK.tolist(), expected, strict=True):
        values = [loss.item(), *(terms[name].item() for name in MLM_ALPHAS)]
        assert row == pytest.approx(values, rel=1e-9)


def test_restricted_distillation_reads_masked_positions_only(tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher, {"ce": 1.0, "mlm": 1.0})
    batch = make_preparation(restrict=True)(0, *make_batch([30]))
    masked = batch.labels_BT != -100
    logits = (model(batch.input_ids_BT).logits for model in (distiller.teacher, student))
    log_p, log_q = (torch.log_softmax(x[masked] / 2, -1) for x in logits)
    expected = 4 * (log_p.exp() * (log_p - log_q)).sum() / masked.sum()
    found = distiller.accumulate([batch], [0], 1)[0, 1]
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_batch_of_8_equals_4_and_4_at_equal_counts(tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher)
    token_ids_BT, lengths_B = make_batch([20] * 8)
    # Both use the same masks: drawn for the halves, then joined.
    halves = [make_preparation()(g, token_ids_BT[4 * g : 4 * g + 4], lengths_B[:4]) for g in (0, 1)]
    whole = join(halves)
    one, two = gradients(distiller, [whole]), gradients(distiller, halves)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-11)


def test_normalization_by_tokens_gives_any_split_the_same_gradient(tmp_path):
    """Even if lengths and numbers of masked tokens differ; by micro-batches it does not."""
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    token_ids_BT, lengths_B = make_batch([30, 12, 25, 13])
    parts = zip(token_ids_BT.split(2), lengths_B.split(2), strict=True)
    halves = [make_preparation()(g, *part) for g, part in enumerate(parts)]
    rows = {**halves[1].rows, "masked": halves[1].rows["masked"][:2]}
    halves[1] = dataclasses.replace(halves[1], rows=rows)
    found = {}
    for normalization in NORMALIZATIONS:
        distiller = make_distiller(student, teacher, normalization=normalization)
        losses = [
            distiller.accumulate(split, list(range(len(split))), len(split)).mean(0)
            for split in ([join(halves)], halves)
        ]
        one, two = gradients(distiller, [join(halves)]), gradients(distiller, halves)
        found[normalization] = max((one[name] - two[name]).abs().max().item() for name in one)
        assert torch.allclose(*losses, rtol=1e-9) == (normalization == "tokens"), (
            "the logged losses are the same mean"
        )
    assert found["tokens"] < 1e-11 < 1e-4 < found["micro_batches"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by torch's compiler
def test_compiled_models_give_the_same_update(tmp_path):
    teacher, batches = make_model("bert", VOCAB), [make_preparation()(0, *make_batch([20, 17]))]
    reports = []
    for compiles in (False, True):
        student = make_student(tmp_path, dtype=torch.float32)
        distiller = make_distiller(student, teacher, compiles=compiles)
        reports.append(distiller.step(batches, [0], 1))
    torch.testing.assert_close(reports[0].losses_MK, reports[1].losses_MK, rtol=1e-5, atol=1e-6)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-4)


def test_recomputed_activations_give_the_same_gradient(tmp_path):
    teacher, batches = make_model("bert", VOCAB), [make_preparation()(0, *make_batch([20, 17]))]
    found = []
    for is_recomputed in (False, True):
        student = make_student(tmp_path, dropout=0.2)
        if is_recomputed:
            recompute_activations(student)
        found.append(gradients(make_distiller(student, teacher), batches))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def join(halves):
    first, second = halves
    size = first.input_ids_BT.numel()
    return dataclasses.replace(
        first,
        input_ids_BT=torch.cat([first.input_ids_BT, second.input_ids_BT]),
        attention_mask_BT=torch.cat([first.attention_mask_BT, second.attention_mask_BT]),
        labels_BT=torch.cat([first.labels_BT, second.labels_BT]),
        rows={kind: torch.cat([first.rows[kind], second.rows[kind] + size]) for kind in first.rows},
        num_tokens=first.num_tokens + second.num_tokens,
    )


def test_padding_changes_nothing(tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher)
    token_ids_BT, lengths_B = make_batch([17])
    plain = make_preparation()(0, token_ids_BT, lengths_B)
    padding = {"input_ids_BT": 0, "attention_mask_BT": 0, "labels_BT": -100}
    wider = {
        name: torch.nn.functional.pad(getattr(plain, name), (0, 9), value=value)
        for name, value in padding.items()
    }
    padded = dataclasses.replace(plain, **wider)
    one, two = gradients(distiller, [plain]), gradients(distiller, [padded])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-8, atol=1e-10)


def gpt2_student():
    """Make a student in float64 without dropout."""
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return make_model("gpt2", VOCAB, layers=2, **options).double()


def test_causal_padding_changes_nothing():
    student, teacher = gpt2_student(), make_model("gpt2", VOCAB)
    distiller = make_distiller(student, teacher, CLM_ALPHAS)
    token_ids_BT, lengths_B = make_batch([15, 9])
    alone = [
        prepare_clm(0, token_ids_BT[:1], lengths_B[:1]),
        prepare_clm(1, token_ids_BT[1:, :9], lengths_B[1:]),
    ]
    losses = distiller.accumulate(alone, [0, 1], 2)
    together = distiller.accumulate([prepare_clm(0, token_ids_BT, lengths_B)], [0], 1)
    weights = {"ce": [15, 9], "clm": [14, 8], "mse": [15, 9], "cos": [15, 9]}
    for column, name in enumerate(CLM_ALPHAS, start=1):
        pairs = zip(weights[name], losses[:, column].tolist(), strict=True)
        mean = sum(weight * loss for weight, loss in pairs) / sum(weights[name])
        assert together[0, column].item() == pytest.approx(mean, rel=1e-9)


def test_the_causal_loss_predicts_the_next_token():
    student, teacher = gpt2_student(), make_model("gpt2", VOCAB)
    batch = prepare_clm(0, *make_batch([15, 9]))
    # transformers shifts the labels, and computes its loss in float32.
    expected = student(batch.input_ids_BT, labels=batch.labels_BT).loss.item()
    found = make_distiller(student, teacher, {"clm": 1.0}).accumulate([batch], [0], 1)
    assert found[0].tolist() == pytest.approx([expected, expected], rel=1e-5)


def test_causal_labels_are_the_ids_and_no_mask_is_passed():
    token_ids_BT, lengths_B = make_batch([5, 3])
    batch = prepare_clm(0, token_ids_BT, lengths_B)
    assert batch.attention_mask_BT is None
    assert batch.labels_BT[0].tolist() == token_ids_BT[0].tolist()
    assert batch.labels_BT[1].tolist() == [*token_ids_BT[1, :3].tolist(), -100, -100]
    assert batch.rows["next"].tolist() == [0, 1, 2, 3, 5, 6]


def test_dropout_depends_on_seed_and_number_alone(tmp_path):
    teacher = make_model("bert", VOCAB)
    batches = [make_preparation()(g, *make_batch([20], seed=3)) for g in (0, 1)]

    def losses(seed, numbers):
        torch.manual_seed(seed * 100 + 1)
        distiller = make_distiller(make_student(tmp_path, dropout=0.3), teacher, seed=seed)
        chosen = [batches[g] for g in numbers]
        return distiller.accumulate(chosen, sorted(numbers), len(chosen))[:, 0].tolist()

    assert losses(5, [0, 1]) == losses(5, [1, 0])
    assert losses(5, [0, 1]) != losses(6, [0, 1])


def test_the_teacher_does_not_run_if_no_active_objective_needs_it(tmp_path):
    alphas = {"ce": 0.0, "mlm": 1.0, "cos": 0.0}
    distiller = make_distiller(make_student(tmp_path), make_model("bert", VOCAB), alphas)
    assert distiller.teacher is None
    assert distiller.accumulate([make_preparation()(0, *make_batch([20]))], [0], 1).shape == (1, 2)


@pytest.mark.parametrize("what", ["teacher", "student", "gradient"])
def test_a_non_finite_update_is_not_applied(what, tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher)
    if what == "teacher":
        distiller.teacher.cls.predictions.bias.data[3] = float("nan")
    elif what == "student":
        student.vocab_transform.bias.data[0] = float("inf")
    else:
        student.vocab_projector.bias.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    message = "gradient norm" if what == "gradient" else "loss_ce .*micro-batch 8"
    with pytest.raises(NonFiniteError, match=message):
        distiller.step([make_preparation()(8, *make_batch([20]))], [8], 1)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_gradients_are_clipped_to_the_norm(tmp_path):
    student, teacher = make_student(tmp_path), make_model("bert", VOCAB)
    distiller = make_distiller(student, teacher, max_grad_norm=0.01)
    batches = [make_preparation()(0, *make_batch([20]))]
    report = distiller.step(batches, [0], 1, wants_statistics=True)
    norms = [p.grad.norm() for p in distiller.model.parameters() if p.grad is not None]
    assert report.grad_norm > 0.1
    assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)
    tag, std = next(item for item in report.statistics.items() if item[0].startswith("grad_std/"))
    after = distiller.model.student.get_parameter(tag.removeprefix("grad_std/")).grad
    before_clipping = after.std().item() * report.grad_norm / 0.01
    assert std == pytest.approx(before_clipping, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_is_close_to_float32(dtype, tmp_path):
    teacher = make_model("bert", VOCAB)
    batches = [make_preparation()(g, *make_batch([20, 16], seed=g)) for g in (0, 1)]
    full = make_distiller(make_student(tmp_path, dtype=torch.float32), teacher)
    exact = full.step(batches, [0, 1], 2)
    mixed = make_distiller(make_student(tmp_path, dtype=torch.float32), teacher, amp_dtype=dtype)
    report = mixed.step(batches, [0, 1], 2)
    # An overflow only halves the scaler's scale.
    for _ in range(6 if dtype == torch.float16 else 0):
        report = report if math.isfinite(report.grad_norm) else mixed.step(batches, [0, 1], 2)
    # 0.03: bfloat16 has 8 bits of mantissa.
    torch.testing.assert_close(report.losses_MK, exact.losses_MK, rtol=0.03, atol=0.03)
    assert report.grad_norm == pytest.approx(exact.grad_norm, rel=0.05)


# --------------------------------------------------------------------------------------------------
# Frozen and decayed parameters, evaluation
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, name",
    [
        ("gpt2", "transformer.wpe.weight"),
        ("roberta", "roberta.embeddings.position_embeddings.weight"),
    ],
)
def test_frozen_positions_get_no_gradient(kind, name):
    student = make_model(kind, VOCAB, layers=2)
    freeze_embeddings(student, architecture_named(kind), positions=True, token_types=False)
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == [name]


def test_frozen_token_types_get_no_gradient():
    student = make_model("roberta", VOCAB, layers=2)
    freeze_embeddings(student, architecture_named("roberta"), positions=False, token_types=True)
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["roberta.embeddings.token_type_embeddings.weight"]


def test_biases_and_layer_norms_are_not_decayed(tmp_path):
    students = make_student(tmp_path), make_model("roberta", VOCAB), make_model("gpt2", VOCAB)
    for student in students:
        decayed, kept = split_for_weight_decay(student, 0.1)
        names = {id(p): name for name, p in student.named_parameters()}
        groups = [{names[id(p)] for p in group["params"]} for group in (decayed, kept)]
        decayed_names, kept_names = groups
        assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
        is_norm = ("LayerNorm", "layer_norm", "ln_")
        assert kept_names == {
            n for n in names.values() if n.endswith("bias") or any(part in n for part in is_norm)
        }
        assert any("embeddings" in n or "wte" in n for n in decayed_names)
        assert len(decayed_names) + len(kept_names) == len(names)


def test_frozen_parameters_are_in_no_group(tmp_path):
    student = make_student(tmp_path)
    student.distilbert.embeddings.position_embeddings.requires_grad_(False)
    grouped = {id(p) for group in split_for_weight_decay(student, 0.1) for p in group["params"]}
    assert id(student.distilbert.embeddings.position_embeddings.weight) not in grouped


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_the_head_on_hidden_states_gives_the_models_own_logits(kind):
    model = make_model(kind, VOCAB).eval()
    token_ids_BT, lengths_B = make_batch([12, 9])
    batch = (prepare_clm if kind == "gpt2" else make_preparation())(0, token_ids_BT, lengths_B)
    logits = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    assert torch.equal(prediction_head(model)(last_hidden_state(model, batch)), logits)


def test_a_teacher_evaluated_against_itself_has_no_divergence():
    teacher = make_model("bert", VOCAB).eval()
    batches = [make_preparation()(g, *make_batch([20, 14], seed=g)) for g in (0, 1)]
    found = figures_of(measure(reader_of(teacher), reader_of(teacher), batches), True)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["agreement"] == 1.0
    total = 0.0
    for batch in batches:
        logits = teacher(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        rows = logits.flatten(0, 1), batch.labels_BT.flatten()
        total += torch.nn.functional.cross_entropy(*rows, reduction="sum").item()
    num_masked = sum(len(batch.rows["masked"]) for batch in batches)
    assert found["loss"] == pytest.approx(total / num_masked, rel=1e-5)
