"""The objectives, compared with the 2019 code's numbers and with independent slow loops."""

import dataclasses
import math

import pytest
import torch
from conftest import load_golden

from distil import losses
from distil.kernels import logit_gradients
from distil.kernels.head import (
    EAGER_BYTES,
    Projection,
    Term,
    even_chunk_rows,
    gpu_chunk_limit,
    head_losses,
    projected_losses,
    weighted_sums,
)
from distil.objectives import LOSSES

GOLDEN = load_golden("parity.json")["losses"]
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def golden_rows(case):
    """Select the rows of each kind, and their labels, from a golden case's labels and lengths."""
    labels_BT, lengths_B = torch.tensor(case["labels"]), torch.tensor(case["lengths"])
    real_BT = torch.arange(labels_BT.shape[1]) < lengths_B[:, None]
    if case["mlm"]:
        masked_BT = labels_BT != -100
        distilled_BT = masked_BT if case["restrict_ce_to_mask"] else real_BT
        rows = {"real": real_BT, "masked": masked_BT, "distilled": distilled_BT}
        targets = {"masked": labels_BT}
    else:
        next_BT = torch.zeros_like(real_BT)
        next_BT[:, :-1] = real_BT[:, 1:]
        rows = {"real": real_BT, "distilled": real_BT, "next": next_BT}
        targets = {"next": labels_BT.roll(-1, dims=1)}
    rows = {kind: selected_BT.flatten().nonzero()[:, 0] for kind, selected_BT in rows.items()}
    return rows, {kind: labels_BT.flatten() for kind, labels_BT in targets.items()}


def make_terms(alphas, rows, targets):
    """Make the terms of the logit objectives; their sum is the weighted mean loss."""
    terms = {}
    for name, alpha in alphas.items():
        loss = LOSSES[name]
        if loss.reads == "logits":
            rows_N = rows[loss.rows]
            labels_N = targets[loss.rows][rows_N] if loss.rows in targets else None
            terms[name] = Term(loss, rows_N, rows_N, labels_N, alpha / max(len(rows_N), 1))
    return terms


def identity_projection(logits_NV: torch.Tensor) -> Projection:
    """Make a projection whose logits equal its input."""
    return Projection(logits_NV, torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype), None)


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 1000, "fast", "fast, 3"])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["seed"]))
def test_losses_and_gradients_equal_the_2019_code(case, chunk_rows):
    def tensor(key):
        return torch.tensor(case[key], dtype=torch.float64).flatten(0, 1)

    student_NV = tensor("student_logits").requires_grad_()
    student_ND = tensor("student_hidden").requires_grad_()
    teacher_NV, teacher_ND = tensor("teacher_logits"), tensor("teacher_hidden")
    rows, targets = golden_rows(case)
    terms = make_terms(case["alphas"], rows, targets)
    plain = (student_NV, teacher_NV, list(terms.values()), case["T"])
    if chunk_rows is None:
        total, sums_K = weighted_sums(*plain)
    elif isinstance(chunk_rows, str):
        projections = identity_projection(student_NV), identity_projection(teacher_NV)
        total, sums_K = projected_losses(*projections, *plain[2:], 3 if "3" in chunk_rows else None)
    else:
        total, sums_K = head_losses(lambda x: x, [], plain[0], lambda x: x, *plain[1:], chunk_rows)
    sums = zip(terms, sums_K, strict=True)
    values = {name: value.item() / len(terms[name].offsets) for name, value in sums}
    if "cos" in case["alphas"]:
        real_N = rows["real"]
        cosine = LOSSES["cos"].formula(student_ND[real_N], teacher_ND[real_N], None, case["T"])
        values["cos"] = cosine.item() / len(real_N)
        total = total + case["alphas"]["cos"] * cosine / len(real_N)
    total.backward()
    assert values == pytest.approx(case["terms"], rel=1e-12)
    assert total.item() == pytest.approx(case["loss"], rel=1e-12)
    torch.testing.assert_close(student_NV.grad, tensor("grad_student_logits"), **FLOAT64)
    if case["grad_student_hidden"] is not None:
        torch.testing.assert_close(student_ND.grad, tensor("grad_student_hidden"), **FLOAT64)


def slow_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        sum_s, sum_t = (sum(math.exp(x / temperature) for x in row) for row in (s, t))
        for x, y in zip(s, t, strict=True):
            q, p = math.exp(x / temperature) / sum_s, math.exp(y / temperature) / sum_t
            total += p * (math.log(p) - math.log(q))
    return total * temperature**2


def slow_softmaxes(student, teacher, temperature):
    """Yield each row's two distributions; the teacher's is 0 where it has no logits."""
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        sum_s, sum_t = (sum(math.exp(x / temperature) for x in row) for row in (s, t))
        missing = [0.0] * (len(s) - len(t))
        yield (
            [math.exp(x / temperature) / sum_s for x in s],
            [math.exp(x / temperature) / sum_t for x in t] + missing,
        )


def slow_divergence(left, right):
    return sum(p * math.log(p / q) for p, q in zip(left, right, strict=True) if p > 0)


def slow_reverse_kl(student, teacher, temperature):
    pairs = slow_softmaxes(student[:, : teacher.shape[1]], teacher, temperature)
    return sum(slow_divergence(s, t) for s, t in pairs) * temperature**2


def slow_jensen_shannon(student, teacher, temperature):
    total = 0.0
    for s, t in slow_softmaxes(student, teacher, temperature):
        mean = [(x + y) / 2 for x, y in zip(s, t, strict=True)]
        total += (slow_divergence(t, mean) + slow_divergence(s, mean)) / 2
    return total * temperature**2


def slow_cosine(student, teacher):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        norms = math.sqrt((sum(x * x for x in s) + 1e-12) * (sum(x * x for x in t) + 1e-12))
        total += 1 - sum(x * y for x, y in zip(s, t, strict=True)) / norms
    return total


SLOW = {
    "ce": lambda s, t, labels, temperature: slow_kl(s, t, temperature),
    "mlm": lambda s, t, labels, _: sum(
        math.log(sum(map(math.exp, row))) - row[k]
        for row, k in zip(s.tolist(), labels, strict=True)
    ),
    "mse": lambda s, t, labels, _: sum(
        (x - y) ** 2
        for a, b in zip(s.tolist(), t.tolist(), strict=True)
        for x, y in zip(a, b, strict=True)
    ),
    "cos": lambda s, t, labels, _: slow_cosine(s, t),
    "rkl": lambda s, t, labels, temperature: slow_reverse_kl(s, t, temperature),
    "jsd": lambda s, t, labels, temperature: slow_jensen_shannon(s, t, temperature),
}
SLOW["clm"] = SLOW["mlm"]


@pytest.mark.parametrize("name", [k for k, loss in LOSSES.items() if not loss.make_module])
def test_each_objective_equals_a_slow_loop(name):
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(9, (6,), generator=generator)
    fast = LOSSES[name].formula(student, teacher, labels, 3.0).item()
    assert fast == pytest.approx(SLOW[name](student, teacher, labels.tolist(), 3.0), rel=1e-10)


@pytest.mark.parametrize("num_entries", [9, 7])
@pytest.mark.parametrize("form", ["formula", "gradient", "by_row"])
@pytest.mark.parametrize("name", ["ce", "rkl", "jsd"])
def test_each_form_of_a_divergence_equals_the_slow_loop_and_its_differences(
    name, form, num_entries
):
    if name == "ce" and num_entries < 9:
        return  # its slow loop has no teacher of fewer entries; another test has
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64) * 3
    teacher, temperature = teacher[:, :num_entries], 1.7
    function = getattr(LOSSES[name], form)
    if form == "formula":
        leaf = student.clone().requires_grad_()
        value = function(leaf, teacher, None, temperature)
        (gradient,) = torch.autograd.grad(value, leaf)
    else:
        value, gradient = function(student.clone(), teacher.clone(), None, temperature)
    expected = SLOW[name](student, teacher, None, temperature)
    assert value.sum().item() == pytest.approx(expected, rel=1e-12)
    step = 1e-5
    for row in range(4):
        for entry in range(9):
            moved = [student.clone(), student.clone()]
            for one, sign in zip(moved, (1, -1), strict=True):
                one[row, entry] += sign * step
            high, low = (SLOW[name](one, teacher, None, temperature) for one in moved)
            difference = (high - low) / (2 * step)
            # central differences in float64: rounding / step + step^2
            assert gradient[row, entry].item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


def random_head_case(num_rows=11, width=6, vocab=17, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, vocab)
    )
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    head = head.to(dtype)
    student_ND, teacher_ND = torch.randn(2, num_rows, width, generator=generator, dtype=dtype)
    masked = torch.tensor([1, 4, 5, 9])
    labels = torch.randint(vocab, (len(masked),), generator=generator)
    everywhere = torch.arange(num_rows)
    terms = [
        Term(LOSSES["ce"], everywhere, everywhere, None, 5.0 / num_rows),
        Term(LOSSES["mlm"], masked, masked, labels, 2.0 / len(masked)),
        Term(LOSSES["mse"], everywhere, everywhere, None, 0.1 / num_rows),
    ]
    return head, student_ND, teacher_ND, terms


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 50])
def test_the_chunked_head_equals_the_plain_one(chunk_rows):
    head, student_ND, teacher_ND, terms = random_head_case()
    results = []
    for is_chunked in (False, True):
        hidden_ND = student_ND.clone().requires_grad_()
        head.zero_grad()
        if is_chunked:
            total, sums_K = head_losses(
                head, list(head.parameters()), hidden_ND, head, teacher_ND, terms, 2.0, chunk_rows
            )
        else:
            total, sums_K = weighted_sums(head(hidden_ND), head(teacher_ND).detach(), terms, 2.0)
        (3 * total).backward()
        grads = [parameter.grad.clone() for parameter in head.parameters()]
        results.append([total.detach(), sums_K, hidden_ND.grad, *grads])
    for chunked, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(chunked, plain, **FLOAT64)


def test_frozen_head_parameters_get_no_gradient():
    head, student_ND, teacher_ND, terms = random_head_case()
    head[2].bias.requires_grad_(False)
    hidden_ND = student_ND.clone().requires_grad_()
    parameters = list(head.parameters())
    total, _ = head_losses(head, parameters, hidden_ND, head, teacher_ND, terms, 2.0, 4)
    total.backward()
    assert head[2].bias.grad is None
    assert head[2].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_an_empty_selection_gives_zero_and_a_zero_gradient(chunk_rows):
    head, student_ND, teacher_ND, _ = random_head_case()
    student_ND, teacher_ND = student_ND[:0], teacher_ND[:0]
    nothing = torch.tensor([], dtype=torch.long)
    terms = [Term(LOSSES[name], nothing, nothing, nothing, 1.0) for name in ("ce", "mlm", "mse")]
    hidden_ND = student_ND.clone().requires_grad_()
    if chunk_rows is None:
        total, sums_K = weighted_sums(head(hidden_ND), head(teacher_ND), terms, 2.0)
    else:
        total, sums_K = head_losses(
            head, list(head.parameters()), hidden_ND, head, teacher_ND, terms, 2.0, chunk_rows
        )
    total.backward()
    assert total.item() == 0 and sums_K.tolist() == [0, 0, 0]
    assert head[0].weight.grad.abs().sum() == 0


def test_rows_outside_a_selection_change_neither_loss_nor_gradient():
    head, student_ND, teacher_ND, terms = random_head_case()
    masked_only = [terms[1]]
    outside = torch.tensor([0, 2, 3, 6, 7, 8, 10])
    found = []
    for value in (0.0, 1e6):
        logits_NV = head(student_ND).detach()
        logits_NV[outside] = value
        logits_NV.requires_grad_()
        total, _ = weighted_sums(logits_NV, None, masked_only, 2.0)
        total.backward()
        assert logits_NV.grad[outside].abs().sum() == 0
        found.append((total.item(), logits_NV.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_half_precision_logits_are_widened_before_the_losses():
    head, student_ND, teacher_ND, terms = random_head_case(dtype=torch.bfloat16)
    total, sums_K = head_losses(
        head, list(head.parameters()), student_ND.requires_grad_(), head, teacher_ND, terms, 2.0, 4
    )
    assert total.dtype == sums_K.dtype == torch.float32
    exact, _ = weighted_sums(head(student_ND).double(), head(teacher_ND).double(), terms, 2.0)
    assert total.item() == pytest.approx(exact.item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# The fast head
# --------------------------------------------------------------------------------------------------


def projection_case(num_rows, vocab, width=32, seed=0, spread=1.0, names=("ce", "mlm", "mse")):
    """Make float64 rows, weights and terms: ce and mse on all rows, mlm on every third."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = (
        [random(num_rows, width), random(vocab, width) * spread / width**0.5, random(vocab)]
        for _ in range(2)
    )
    everywhere, some = torch.arange(num_rows), torch.arange(0, num_rows, 3)
    terms = []
    for name in names:
        rows = some if LOSSES[name].rows == "masked" else everywhere
        labels = None
        if LOSSES[name].rows == "masked":
            labels = torch.randint(vocab, (len(rows),), generator=generator)
        weights = {"ce": 5.0, "mlm": 2.0, "mse": 0.01, "rkl": 3.0, "jsd": 4.0}
        weight = weights[name] / max(len(rows), 1)
        terms.append(Term(LOSSES[name], rows, rows, labels, weight))
    return student, teacher, terms


def run_head(student, teacher, terms, dtype, way, chunk_rows=None):
    """Return (total, sums_K, gradients by rows, weight, bias), from values rounded to dtype."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in student]
    fixed = [tensor.to(dtype) for tensor in teacher]
    if way == "plain":
        logits = [torch.nn.functional.linear(*tensors) for tensors in (leaves, fixed)]
        total, sums_K = weighted_sums(*map(losses.at_least_float32, logits), terms, 2.0)
    else:
        total, sums_K = projected_losses(
            Projection(*leaves), Projection(*fixed), terms, 2.0, chunk_rows, way == "joined"
        )
    total.backward()
    return [total.detach(), sums_K, *(leaf.grad for leaf in leaves)]


def without_forms(term: Term) -> Term:
    """Remove a term's gradient by hand and its form for a compiler."""
    plain = dataclasses.replace(term.loss, function=term.loss.formula)
    return dataclasses.replace(term, loss=plain)


@pytest.fixture
def uncompiled(monkeypatch):
    """Run the fused terms uncompiled (compiling takes 30 s a shape); return a list of the calls."""
    calls = []

    def run(*arguments):
        calls.append(1)
        return logit_gradients._fused_terms(*arguments)

    monkeypatch.setattr(logit_gradients, "_compiled", lambda: run)
    return calls


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("vocab_size", [30522, 119547])
def test_a_chunk_on_a_gpu_takes_what_memory_allows(vocab_size, compiles):
    """In bfloat16, of a GPU with 80 GB: 1/16 of it, more than 8,192 rows where compiled."""
    limit = gpu_chunk_limit(vocab_size, 2, compiles, 80 * 10**9)
    logit_bytes = 4 if compiles else 4 + EAGER_BYTES
    assert limit % 64 == 0 and limit * vocab_size * logit_bytes <= 5 * 10**9
    assert (limit >= 8192) == compiles
    rows = even_chunk_rows(3 * limit + 1, limit, 64)
    assert rows % 64 == 0 and 3 * rows < 3 * limit + 1 <= 4 * rows
    assert gpu_chunk_limit(vocab_size, 2, compiles, 10**6) == 64


FAST_WAYS = pytest.mark.parametrize("way", ["fast", "joined"])


@FAST_WAYS
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 40])
@pytest.mark.parametrize("num_rows", [0, 1, 33, 70])
@pytest.mark.parametrize(
    "names", [("ce", "mlm", "mse"), ("mlm",), ("ce",), ("mlm", "ce"), ("rkl", "mlm", "jsd")]
)
def test_the_fast_head_equals_the_plain_one(num_rows, names, chunk_rows, way, uncompiled):
    case = projection_case(num_rows, 57, names=names)
    fast_results = run_head(*case, torch.float64, way, chunk_rows)
    plain_results = run_head(*case, torch.float64, "plain")
    for fast, plain in zip(fast_results, plain_results, strict=True):
        torch.testing.assert_close(fast, plain, **FLOAT64)
    assert bool(uncompiled) == (way == "joined" and num_rows > 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by torch's compiler
@pytest.mark.parametrize("names", [("ce", "mlm", "mse"), ("rkl", "jsd")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_compiled_head_equals_the_uncompiled_one(dtype, names):
    case = projection_case(33, 57, names=names)
    # bfloat16: a logit's gradient may be rounded the other way, by 1 in 2^8, and 57 are summed.
    bounds = FLOAT64 if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    results = run_head(*case, dtype, "joined", 20), run_head(*case, dtype, "fast", 20)
    for compiled, expected in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected, **bounds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by torch's compiler
def test_chunks_of_all_sizes_share_a_compiled_kernel():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for num_rows, chunk_rows in ((40, 20), (33, 13), (7, 7)):
        run_head(*projection_case(num_rows, 57), torch.float32, "joined", chunk_rows)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled == 1


@pytest.mark.parametrize("plain", [0, 1, 2])
def test_an_objective_without_a_form_for_a_compiler_leaves_the_others_compiled(plain, uncompiled):
    student, teacher, terms = projection_case(20, 57)
    terms[plain] = without_forms(terms[plain])
    mixed = run_head(student, teacher, terms, torch.float64, "joined", 7)
    assert len(uncompiled) == 3  # chunks
    reference = run_head(student, teacher, terms, torch.float64, "plain")
    for found, expected in zip(mixed, reference, strict=True):
        torch.testing.assert_close(found, expected, **FLOAT64)


def test_objectives_without_a_form_for_a_compiler_are_not_compiled(uncompiled):
    student, teacher, terms = projection_case(20, 57)
    plain = [without_forms(term) for term in terms]
    run_head(student, teacher, plain, torch.float64, "joined")
    assert not uncompiled


def test_a_weight_may_be_a_tensor_on_the_device(uncompiled):
    student, teacher, terms = projection_case(20, 57)
    weights = [torch.tensor(term.weight, dtype=torch.float64) for term in terms]
    with_tensors = [
        dataclasses.replace(term, weight=weight)
        for term, weight in zip(terms, weights, strict=True)
    ]
    for way in ("fast", "joined"):
        results = run_head(student, teacher, with_tensors, torch.float64, way)
        reference = run_head(student, teacher, terms, torch.float64, way)
        for found, expected in zip(results, reference, strict=True):
            torch.testing.assert_close(found, expected, **FLOAT64)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@FAST_WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab, num_rows", [(30522, 40), (119547, 12), (30522, 1)])
def test_the_fast_heads_gradient_is_as_close_to_float64_as_the_plain_heads(
    vocab, num_rows, dtype, way, uncompiled
):
    student, teacher, terms = projection_case(num_rows, vocab, width=64)
    rounded = [[tensor.to(dtype).double() for tensor in tensors] for tensors in (student, teacher)]
    exact = run_head(*rounded, terms, torch.float64, "plain")
    fast, plain = (run_head(student, teacher, terms, dtype, kind) for kind in (way, "plain"))
    for k, name in ((0, "total"), (2, "rows"), (3, "weight"), (4, "bias")):
        mine, others = relative_error(fast[k], exact[k]), relative_error(plain[k], exact[k])
        # 1.1 and 1e-7: roundings of the same size, in another order
        assert mine <= 1.1 * others + 1e-7, (name, mine, others)


@FAST_WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("ce", "mlm", "mse"), ("rkl", "jsd")])
def test_extreme_logits_give_no_nan(names, dtype, way, uncompiled):
    student, teacher, terms = projection_case(20, 301, spread=3e3, names=names)
    found = run_head(student, teacher, terms, dtype, way)
    assert max(abs((student[0] @ student[1].T).max().item()), 0) > 1e4
    assert all(torch.isfinite(tensor).all() for tensor in found)


def test_autograd_differentiates_an_objective_without_a_gradient_by_hand():
    student, teacher, terms = projection_case(20, 57)
    by_autograd = [without_forms(term) for term in terms]
    results = run_head(student, teacher, by_autograd, torch.float64, "fast", 7)
    reference = run_head(student, teacher, terms, torch.float64, "fast")
    for found, expected in zip(results, reference, strict=True):
        torch.testing.assert_close(found, expected, **FLOAT64)


def test_a_frozen_projection_gets_no_gradient():
    student, teacher, terms = projection_case(20, 57)
    student[0].requires_grad_()
    total, _ = projected_losses(Projection(*student), Projection(*teacher), terms, 2.0)
    total.backward()
    assert student[0].grad.abs().sum() > 0 and student[1].grad is student[2].grad is None


def test_padding_the_vocabulary_changes_nothing(monkeypatch):
    """Pad by hand as a GPU does in half precision, since a CPU does not."""
    student, teacher, terms = projection_case(20, 57)
    padded = [
        [rows, torch.nn.functional.pad(w, (0, 0, 0, 71)), torch.nn.functional.pad(b, (0, 71))]
        for rows, w, b in (student, teacher)
    ]
    prepared = iter([Projection(*padded[0]), Projection(*padded[1])])
    monkeypatch.setattr(Projection, "prepared", lambda self, dtype: next(prepared))
    found = run_head(student, teacher, terms, torch.float64, "fast", 6)
    expected = run_head(student, teacher, terms, torch.float64, "plain")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)


@pytest.mark.parametrize("way", ["plain", "fast", "joined"])
@pytest.mark.parametrize("names", [("ce", "mlm"), ("jsd",)])
def test_a_teacher_of_fewer_entries_gives_the_others_probability_0(names, way, uncompiled):
    """Compare with a teacher that has their logits, too small for a probability."""
    student, teacher, terms = projection_case(20, 57, names=names)
    fewer = [teacher[0], *(tensor[:50] for tensor in teacher[1:])]
    found = run_head(student, fewer, terms, torch.float64, way, 6)
    teacher[2][50:] = -1e9
    expected = run_head(student, teacher, terms, torch.float64, "plain")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)


@pytest.mark.parametrize("way", ["plain", "fast", "joined"])
@pytest.mark.parametrize("name", ["mse", "rkl"])
def test_some_objectives_are_over_the_entries_that_the_teacher_has(name, way, uncompiled):
    student, teacher, terms = projection_case(20, 57, names=(name,))
    fewer = [[rows, weight[:50], bias[:50]] for rows, weight, bias in (student, teacher)]
    total, sums_K, *gradients = run_head(student, fewer[1], terms, torch.float64, way, 6)
    expected = run_head(*fewer, terms, torch.float64, "plain")
    gradients = [gradients[0], *(gradient[:50] for gradient in gradients[1:])]
    for mine, other in zip([total, sums_K, *gradients], expected, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)
