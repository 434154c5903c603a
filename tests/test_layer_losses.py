"""Objectives on layers, compared with slow float64 loops written from the papers' formulas."""

import math

import families
import pytest
import torch

from distil import layer_losses
from distil.data.batches import MicroBatch, prepare_clm
from distil.layer_losses import ComparedLayers, Projected, Relations, Sequences
from distil.models.layer_readings import PARTS, Attention
from distiller import DistillationModel, Distiller

LENGTHS = [4, 2, 1, 4]
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def make_attention(seed, num_heads, num_key_heads, width, dtype=torch.float64, padded=5):
    """Make random queries, keys and values, large on padding, which nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for heads in (num_heads, num_key_heads, num_key_heads):
        part = torch.randn(len(LENGTHS), padded, heads * width, generator=generator).double()
        for row, length in enumerate(LENGTHS):
            part[row, length:] = 1e3
        parts.append(part.to(dtype).requires_grad_())
    return Attention(*parts, num_heads, num_key_heads, 0.4)


def sequences(attention, is_causal, layer=0):
    return Sequences({layer: attention}, torch.tensor(LENGTHS), is_causal)


def slow_relations(student, teacher, num_heads, is_causal):
    """Sum KL(R_t || R_s) one head, token and entry at a time (MiniLMv2, section 3)."""
    total = 0.0
    for part in PARTS:
        for row, length in enumerate(LENGTHS):
            for head in range(num_heads):
                for i in range(length):
                    seen = range(i + 1 if is_causal else length)
                    probs = []
                    for attention in (teacher, student):
                        vectors = getattr(attention, part)[row]
                        width = vectors.shape[1] // num_heads
                        own = vectors[:, head * width : (head + 1) * width]
                        scores = [sum(own[i] * own[j]) / math.sqrt(width) for j in seen]
                        exponentials = [score.exp() for score in scores]
                        probs.append([e / sum(exponentials) for e in exponentials])
                    total += sum(p * (p / q).log() for p, q in zip(*probs, strict=True)) / num_heads
    return total


def slow_scores(student, teacher, is_causal):
    """Sum (S_s - S_t)^2 one head, token and key at a time (TinyBERT, equation 7)."""
    total, num_heads = 0.0, student.num_heads
    for row, length in enumerate(LENGTHS):
        for head in range(num_heads):
            for i in range(length):
                seen = range(i + 1 if is_causal else length)
                for j in seen:
                    scores = []
                    for attention in (student, teacher):
                        width = attention.query.shape[2] // num_heads
                        of_key = head * attention.num_key_heads // num_heads
                        query = attention.query[row, i, head * width : (head + 1) * width]
                        key = attention.key[row, j, of_key * width : (of_key + 1) * width]
                        scores.append(sum(query * key) * attention.scale)
                    total += (scores[0] - scores[1]) ** 2 / len(seen) / num_heads
    return total


def gradients(total, attention, factor=1.0):
    leaves = [getattr(attention, part) for part in PARTS]
    grads = torch.autograd.grad(total * factor, leaves, allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in grads]


# (formula on Sequences, slow loop, module, student's and teacher's heads, key heads and width)
CASES = {
    "rel": (
        layer_losses.relation_divergence,
        lambda s, t, causal: slow_relations(s, t, 2, causal),
        Relations([(0, 1)], 2),
        ((2, 1, 4), (3, 2, 6)),
    ),
    "rel of more heads than attention has": (
        layer_losses.relation_divergence,
        lambda s, t, causal: slow_relations(s, t, 6, causal),
        Relations([(0, 1)], 6),
        ((2, 2, 3), (2, 1, 6)),
    ),
    "att": (
        layer_losses.score_error,
        slow_scores,
        ComparedLayers([(0, 1)]),
        ((4, 2, 3), (4, 4, 5)),
    ),
}


@pytest.mark.parametrize("entries", [1, 60, 2**18])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention_objectives_equal_a_slow_loop_in_any_chunks(
    case, is_causal, entries, monkeypatch
):
    monkeypatch.setitem(layer_losses.CHUNK_ENTRIES, "cpu", entries)
    formula, slow, module, sizes = CASES[case]
    student, teacher = (make_attention(seed, *size) for seed, size in enumerate(sizes))
    expected = slow(student, teacher, is_causal)
    given = sequences(student, is_causal), sequences(teacher, is_causal, 1)
    found = formula(*given, None, 2.0, module)
    torch.testing.assert_close(found, expected, **FLOAT64)
    found, expected = (gradients(total, student, 3.0) for total in (found, expected))
    assert all(grad.abs().sum() > 0 for grad in found[:2])
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other.expand_as(mine), **FLOAT64)
    assert any(
        grad.abs().sum() > 0 for grad in gradients(formula(*given, None, 1, module), student)
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention_objectives_are_sums_over_ranges_of_sequences(case, is_causal):
    formula, _, module, sizes = CASES[case]
    student, teacher = (make_attention(seed, *size) for seed, size in enumerate(sizes))
    given = sequences(student, is_causal), sequences(teacher, is_causal, 1)
    whole = formula(*given, None, 2.0, module)
    for sizes in ([1, 3], [2, 1, 1], [0, 4]):
        parts = zip(*(sequences.split(sizes) for sequences in given), strict=True)
        total = sum(formula(*part, None, 2.0, module) for part in parts)
        torch.testing.assert_close(total, whole, **FLOAT64)
        found, expected = (gradients(value, student) for value in (total, whole))
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, **FLOAT64)
        whole = formula(*given, None, 2.0, module)  # its graph was used


@pytest.mark.parametrize("case", CASES)
def test_more_padding_changes_neither_value_nor_gradient(case):
    formula, _, module, sizes = CASES[case]
    found = []
    for padded in (4, 9):
        both = [make_attention(seed, *size, padded=4) for seed, size in enumerate(sizes)]
        longer = [
            torch.nn.functional.pad(getattr(a, p), (0, 0, 0, padded - 4), value=1e3)
            for a in both
            for p in PARTS
        ]
        student, teacher = (
            Attention(*longer[k : k + 3], a.num_heads, a.num_key_heads, a.scale)
            for k, a in zip((0, 3), both, strict=True)
        )
        value = formula(sequences(student, False), sequences(teacher, False, 1), None, 1.0, module)
        found.append([value, *gradients(value, both[0])])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_widened_before_softmax_and_sums(case):
    formula, _, module, sizes = CASES[case]
    both = [make_attention(k, *size, torch.bfloat16) for k, size in enumerate(sizes)]
    wide = [
        Attention(
            *(getattr(a, p).detach().double().requires_grad_() for p in PARTS),
            a.num_heads,
            a.num_key_heads,
            a.scale,
        )
        for a in both
    ]
    found, exact = (
        formula(sequences(s, True), sequences(t, True, 1), None, 1.0, module)
        for s, t in (both, wide)
    )
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    for mine, other in zip(gradients(found, both[0]), gradients(exact, wide[0]), strict=True):
        # rounded to bfloat16 once: 2^-9 of each entry
        torch.testing.assert_close(mine.double(), other.double(), rtol=2**-8, atol=1e-6)


def test_equal_models_have_no_relation_divergence_and_no_gradient():
    attention = make_attention(0, 2, 1, 4)
    value = layer_losses.relation_divergence(
        *(sequences(attention, True), sequences(attention, True)), None, 1.0, Relations([(0, 0)], 2)
    )
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(grad.abs().max() < 1e-12 for grad in gradients(value, attention))


def slow_distance(student, teacher, weight, pairs, distance):
    """Sum distances one token and entry at a time; weight: of the map from narrow to wide."""
    total = 0.0
    for ours, theirs in pairs:
        for s, t in zip(student[ours], teacher[theirs], strict=True):
            s = s if weight is None else torch.stack([sum(row * s) for row in weight])
            if distance == "mse":
                total += sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / len(t)
            else:
                norms = torch.sqrt((sum(s * s) + 1e-12) * (sum(t * t) + 1e-12))
                total += 1 - sum(s * t) / norms
    return total / len(pairs)


@pytest.mark.parametrize("distance", ["mse", "cos"])
@pytest.mark.parametrize("width", [6, 4, 9])
def test_hidden_states_equal_a_slow_loop(width, distance):
    generator = torch.Generator().manual_seed(0)
    pairs = [(0, 1), (1, 3)]
    module = Projected(pairs, distance, width, 6).double()
    student = {k: torch.randn(7, width, generator=generator).double() for k in (0, 1)}
    teacher = {k: torch.randn(7, 6, generator=generator).double() for k in (1, 3)}
    leaves = [student[k].requires_grad_() for k in student] + list(module.parameters())
    weight = None if width == 6 else module.project.weight
    assert (weight is None) == (not list(module.parameters()))
    found = layer_losses.hidden_distance(student, teacher, None, 2.0, module)
    expected = slow_distance(student, teacher, weight, pairs, distance)
    torch.testing.assert_close(found, expected, **FLOAT64)
    grads = [torch.autograd.grad(value, leaves) for value in (found, expected)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)


def test_a_projection_begins_as_the_same_isometry_and_draws_nothing():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (Projected([(0, 0)], "mse", 4, 6).project.weight for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, second)
    torch.testing.assert_close(first.T @ first, torch.eye(4))


def test_no_sequence_and_no_token_give_zero():
    empty = Attention(*(torch.zeros(0, 3, 4, requires_grad=True) for _ in PARTS), 2, 2, 1.0)
    given = Sequences({0: empty}, torch.zeros(0, dtype=torch.int64), False)
    for formula, module in (
        (layer_losses.relation_divergence, Relations([(0, 0)], 2)),
        (layer_losses.score_error, ComparedLayers([(0, 0)])),
    ):
        value = formula(given, given, None, 1.0, module)
        value.backward()
        assert value.item() == 0


# --------------------------------------------------------------------------------------------------
# The step
# --------------------------------------------------------------------------------------------------

ALPHAS = {"ce": 5.0, "rel": 1.5, "hid": 0.7, "att": 0.3, "emb": 0.2}
OPTIONS = {"relation_heads": 2, "relation_layer": 2, "layer_map": [(0, 1), (3, 3)]}


def bert_by_definition(model, batch, layer: int):
    """Return a BERT's queries, keys and values of a layer from its states and weights."""
    given = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    states = model(**given, output_hidden_states=True).hidden_states
    own = model.bert.encoder.layer[layer].attention.self
    return states, [project(states[layer]) for project in (own.query, own.key, own.value)]


def step_by_definition(student, teacher, batch) -> torch.Tensor:
    """Compute the weighted loss of a micro-batch, a sequence at a time, from whole matrices."""
    given = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    real = batch.attention_mask_BT.bool()
    log_p, log_q = ((m(**given).logits[real] / 2).log_softmax(-1) for m in (teacher, student))
    total = ALPHAS["ce"] * 4 * (log_p.exp() * (log_p - log_q)).sum()
    states, _ = bert_by_definition(student, batch, 3)
    others, _ = bert_by_definition(teacher, batch, 2)
    pairs = [(states[1], others[2]), (states[4], others[4])]
    total = total + ALPHAS["hid"] * sum((s - t)[real].square().sum() / 32 for s, t in pairs) / 2
    total = total + ALPHAS["emb"] * (states[0] - others[0])[real].square().sum() / 32
    lengths = real.sum(1).tolist()
    parts = bert_by_definition(student, batch, 3)[1], bert_by_definition(teacher, batch, 2)[1]
    for part in zip(*parts, strict=True):
        for row, length in enumerate(lengths):
            s, t = (x[row, :length].unflatten(-1, (2, 16)).transpose(0, 1) for x in part)
            s, t = ((x @ x.transpose(1, 2) / 4).log_softmax(-1) for x in (s, t))
            total = total + ALPHAS["rel"] * (t.exp() * (t - s)).sum() / 2
    for ours, theirs in OPTIONS["layer_map"]:
        models = (student, ours), (teacher, theirs)
        both = [bert_by_definition(one, batch, layer)[1] for one, layer in models]
        for row, length in enumerate(lengths):
            scores = []
            for query, key, _ in both:
                q, k = (x[row, :length].unflatten(-1, (4, 8)).transpose(0, 1) for x in (query, key))
                scores.append(q @ k.transpose(1, 2) / math.sqrt(8))
            error = (scores[0] - scores[1]).square()
            total = total + ALPHAS["att"] * error.sum() / length / 4 / 2
    return total / sum(lengths)


def test_the_step_computes_objectives_on_layers_by_definition():
    """A step with the CPU's kernels, whose embedding is tied to the head, in float64."""
    teacher, student = (families.tiny_model("bert", True, seed=k).double() for k in (0, 1))
    teacher.requires_grad_(False)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = DistillationModel(student, ALPHAS, 2.0, teacher=teacher, options=OPTIONS)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(model, teacher, optimizer, None, max_grad_norm=1e9, seed=0)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number, lengths in enumerate(([9, 12], [7], [11, 5, 8])):
        ids_BT = torch.randint(5, 99, (len(lengths), max(lengths)), generator=generator)
        causal = prepare_clm(number, ids_BT, torch.tensor(lengths), with_mask=True)
        mask_BT = causal.attention_mask_BT
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        rows = {kind: causal.rows["real"] for kind in ("real", "distilled", "masked")}
        batches.append(MicroBatch(number, ids_BT, mask_BT, ids_BT, rows, sum(lengths)))
    losses_MK = distiller.accumulate(batches, [0, 1, 2], 3)
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    for number, batch in enumerate(batches):
        total = step_by_definition(student, teacher, batch)
        (total / 3).backward()
        assert losses_MK[number, 0].item() == pytest.approx(total.item(), rel=1e-9)
    for name, gradient in found.items():
        expected = student.get_parameter(name).grad
        # another order of sums, in float64
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)
