"""The CPU kernels against torch: values, gradients, statistics of the draws, tied weights.

A dropout of 10^-7 is rounded to 0 but still handled by the kernels: comparisons use it to draw
nothing.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable

import families
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import run_process
from faults.forked import end_of, fork_program
from stand_ins import ROOT, make_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import distiller
from distil.data.batches import MlmPreparation, masking_weights, prepare_clm
from distil.kernels import cpu
from distil.kernels.cpu import LANES, TiedGradient, draw_kept, faster
from distil.models.architectures import ARCHITECTURES
from distil.models.forward import recompute_activations
from distil.models.language_model import freeze_embeddings
from distiller import DistillationModel, Distiller

NOTHING_DROPPED = 1e-7
# Half precision has 8 bits, and the kernels round in other places than torch: a few last units.
TOLERANCES = {torch.float64: {}, torch.float32: {}, torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5}}
DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def _all_kernels(monkeypatch):
    """Test all kernels, whichever are the faster ones on this machine."""
    monkeypatch.setattr(cpu, "MKL_IS_FASTER", False)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None, seed: int = 0
) -> list[torch.Tensor]:
    """Call `function` under a seed; return its value and the gradients of a weighted sum of it."""
    leaves = [
        tensor if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs
    ]
    torch.manual_seed(seed)
    value = function(*leaves)
    value.backward(random(*value.shape, seed=99, dtype=value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Assert equality to the bit: torch's function must have run."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def assert_close(
    found: list[torch.Tensor], expected: list[torch.Tensor], precision: torch.dtype
) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), **TOLERANCES[precision])


def six_sigma(probability: float, n: int) -> float:
    """Bound a share's deviation over n draws: six sigma, exceeded by chance once in 5 x 10^8."""
    return 6 * math.sqrt(probability * (1 - probability) / n)


def in_half() -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# Draws
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_each_lane_of_a_word_keeps_its_share(probability):
    kept, factor = draw_kept(torch.Size([2**18, 4]), probability)
    for share in kept.double().mean(0).tolist():
        assert abs(share - (1 - probability)) < six_sigma(probability, 2**18) + 1 / LANES
    assert factor == pytest.approx(1 / (1 - probability), rel=1 / LANES / (1 - probability))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_elements_are_dropped_independently_of_their_neighbours(probability):
    """Pairs are kept as often as independent ones: within a word, and in adjacent words."""
    kept = draw_kept(torch.Size([2**20]), probability)[0]
    for distance in range(1, 9):
        n = len(kept) - distance
        share, expected = (
            (kept[distance:] & kept[:-distance]).double().mean().item(),
            (1 - probability) ** 2,
        )
        # Pairs overlap: two pairs of a common element vary together, which at most doubles the
        # deviation.
        assert abs(share - expected) < 2 * six_sigma(expected, n) + 2 / LANES


@pytest.mark.parametrize("num_rare", [4, 16])
@pytest.mark.parametrize("are_dropped", [True, False])
def test_the_ends_of_the_scale_are_exact(num_rare, are_dropped):
    """4 or 16 in 2^16, dropped or kept: 64 or 256 of a million elements, in each lane of a word."""
    rare, n = num_rare / LANES, 2**20
    kept, factor = draw_kept(torch.Size([n, 4]), rare if are_dropped else 1 - rare)
    for count in (kept != are_dropped).sum(0).tolist():
        assert abs(count / n - rare) < six_sigma(rare, n)
    assert factor == LANES / (LANES - num_rare if are_dropped else num_rare)


def test_what_rounds_to_nothing_drops_nothing_and_what_rounds_to_all_does_not_drop_all():
    kept, factor = draw_kept(torch.Size([2**20]), NOTHING_DROPPED)
    assert kept.all() and factor == 1
    kept, factor = draw_kept(torch.Size([2**22]), 1 - NOTHING_DROPPED)
    assert factor == LANES and abs(kept.double().mean() - 1 / LANES) < six_sigma(1 / LANES, 2**22)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5, 1), (2, 0, 4)])
def test_any_shape_can_be_drawn(shape):
    kept, _ = draw_kept(torch.Size(shape), 0.4)
    assert kept.shape == shape and kept.dtype == torch.bool


def test_draws_differ_and_are_repeated_under_the_same_seed():
    def draws(seed):
        torch.manual_seed(seed)
        return [draw_kept(torch.Size([100, 3]), 0.5)[0] for _ in range(2)]

    one, two = draws(1), draws(2)
    assert all(torch.equal(a, b) for a, b in zip(one, draws(1), strict=True))
    assert not torch.equal(*one) and not torch.equal(one[0], two[0])


# --------------------------------------------------------------------------------------------------
# Dropout
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6, 5), (7,), ()])
def test_dropout_is_the_plain_formula(shape, dtype, is_cast):
    inputs = random(*shape, dtype=dtype)
    with in_half() if is_cast else contextlib.nullcontext():
        found = results(lambda x: cpu.dropout(x, 0.3), inputs)
    torch.manual_seed(0)
    kept, factor = draw_kept(inputs.shape, 0.3)
    expected = [
        inputs.double() * kept * factor,
        random(*shape, seed=99, dtype=dtype).double() * kept * factor,
    ]
    assert found[0].dtype == dtype
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_nothing_is_torchs(dtype):
    inputs = random(4, 6, dtype=dtype)
    found = results(lambda x: cpu.dropout(x, NOTHING_DROPPED), inputs)
    assert_same(found, results(lambda x: F.dropout(x, 0.0), inputs))


@pytest.mark.parametrize("probability", [0.1, 0.75])
def test_dropout_keeps_the_mean(probability):
    torch.manual_seed(3)
    inputs = 2 + random(2**20)
    deviation = math.sqrt(
        probability / (1 - probability) * inputs.square().mean().item() / len(inputs)
    )
    assert abs(cpu.dropout(inputs, probability).mean() - inputs.mean()) < 6 * deviation


def test_dropouts_gradient_is_that_of_its_value():
    def seeded(x):
        torch.manual_seed(0)
        return cpu.dropout(x, 0.4)

    inputs = random(3, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(seeded, inputs) and torch.autograd.gradgradcheck(seeded, inputs)


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 1.0}, {"p": 0.3, "training": False}])
def test_dropout_leaves_the_rest_to_torch(options):
    inputs = random(4, 5)
    assert_same(
        *(results(lambda x, f=f: f(x, **options), inputs) for f in (cpu.dropout, F.dropout))
    )


def test_dropout_in_place_is_torchs():
    found, expected = random(4, 5), random(4, 5)
    torch.manual_seed(0)
    assert cpu.dropout(found, 0.3, inplace=True) is found
    torch.manual_seed(0)
    F.dropout(expected, 0.3, inplace=True)
    assert torch.equal(found, expected) and not torch.equal(found, random(4, 5))


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_probability_that_is_none_is_refused(probability):
    with pytest.raises(ValueError, match="probability"):
        cpu.dropout(random(3), probability)


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------

B, H, T, S, D = 2, 3, 5, 7, 4


def qkv(dtype: torch.dtype = torch.float32, num_keys: int = S) -> list[torch.Tensor]:
    shapes = ((B, H, T, D), (B, H, num_keys, D), (B, H, num_keys, 6))  # values and keys differ
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def shown(*shape: int) -> torch.Tensor:
    """Make a mask that shows each query some keys, and always the first."""
    mask = random(*shape, seed=5) > 0
    mask[..., 0] = True
    return mask


def partly_blind() -> torch.Tensor:
    mask = shown(B, 1, T, S)
    mask[0, :, 2] = False
    return mask


MASKS = {
    "none": {},
    "padding": {"attn_mask": shown(B, 1, 1, S).expand(-1, 1, T, -1)},
    "bool": {"attn_mask": shown(B, 1, T, S)},
    "partly blind": {"attn_mask": partly_blind()},
    "additive": {"attn_mask": random(T, S, seed=6)},
    "additive, infinite": {
        "attn_mask": torch.zeros(B, 1, T, S).masked_fill(~shown(B, 1, T, S), -torch.inf)
    },
    "additive, partly blind": {
        "attn_mask": torch.zeros(B, 1, T, S).masked_fill(~partly_blind(), -torch.inf)
    },
    "additive, lowest": {"attn_mask": torch.zeros(T, S).masked_fill(~shown(T, S), -1e30)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "scale 0": {"scale": 0.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
def test_attention_that_drops_nothing_is_torchs(name, dtype):
    inputs, options = qkv(dtype), MASKS[name]
    found = results(functools.partial(cpu.attention, dropout_p=NOTHING_DROPPED, **options), *inputs)
    expected = results(functools.partial(F.scaled_dot_product_attention, **options), *inputs)
    assert found[0].dtype == dtype and found[0].isfinite().all()
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("name", MASKS)
def test_attention_under_autocast_is_torchs(name):
    inputs, options = qkv(), MASKS[name]
    with in_half():
        found = results(
            functools.partial(cpu.attention, dropout_p=NOTHING_DROPPED, **options), *inputs
        )
        expected = results(functools.partial(F.scaled_dot_product_attention, **options), *inputs)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert_close(found, expected, torch.bfloat16)


@pytest.mark.parametrize("num_keys", [3, T, S])
def test_keys_may_be_fewer_or_more_than_queries(num_keys):
    inputs = qkv(num_keys=num_keys)
    for options in ({}, {"is_causal": True}):
        found = results(
            functools.partial(cpu.attention, dropout_p=NOTHING_DROPPED, **options), *inputs
        )
        assert_close(
            found,
            results(functools.partial(F.scaled_dot_product_attention, **options), *inputs),
            torch.float32,
        )


def slow_attention(query, key, value, kept, factor, attn_mask=None, is_causal=False, scale=None):
    """Compute softmax, dropout and sum by loops in float64."""
    value_of = torch.zeros(B, H, T, value.shape[-1], dtype=torch.float64)
    mask = None if attn_mask is None else attn_mask.expand(B, H, T, S)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        exponents = {}
        for s in range(S):
            bias = 0.0
            if mask is not None:
                bias = (
                    (0.0 if mask[b, h, t, s] else -math.inf)
                    if mask.dtype == torch.bool
                    else mask[b, h, t, s].item()
                )
            if (s <= t or not is_causal) and bias > -math.inf:
                exponents[s] = (
                    query[b, h, t] @ key[b, h, s] * (D**-0.5 if scale is None else scale) + bias
                ).exp()
        for s, exponent in exponents.items():
            if kept[b, h, t, s]:
                value_of[b, h, t] = (
                    value_of[b, h, t] + exponent / sum(exponents.values()) * factor * value[b, h, s]
                )
    return value_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "partly blind", "additive", "causal", "scale"])
def test_attention_with_dropout_is_the_slow_formula(name, dtype):
    inputs, options = qkv(dtype), MASKS[name]
    found = results(functools.partial(cpu.attention, dropout_p=0.4, **options), *inputs)
    torch.manual_seed(0)
    kept, factor = draw_kept(torch.Size([B, H, T, S]), 0.4)
    slow = functools.partial(slow_attention, kept=kept, factor=factor, **options)
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    value = slow(*leaves)
    value.backward(random(*value.shape, seed=99, dtype=dtype).double())
    assert_close(found, [value.detach(), *(leaf.grad for leaf in leaves)], dtype)


@pytest.mark.parametrize("name", ["partly blind", "causal"])
def test_attentions_gradient_is_that_of_its_value(name):
    def seeded(*inputs):
        torch.manual_seed(0)
        return cpu.attention(*inputs, dropout_p=0.4, **MASKS[name])

    assert torch.autograd.gradcheck(
        seeded, [tensor.requires_grad_() for tensor in qkv(torch.float64)]
    )


def test_attention_keeps_the_mean():
    """With values of 1 each query gets its sum of kept probabilities, whose mean is 1."""
    torch.manual_seed(3)
    query, key = random(8, 8, 128, 8), random(8, 8, 128, 8, seed=1)
    found = cpu.attention(query, key, torch.ones_like(key), dropout_p=0.1)
    probs = (query @ key.transpose(-2, -1) * 8**-0.5).softmax(-1)
    deviation = math.sqrt(0.1 / 0.9 * probs.square().sum(-1).mean().item() / found[..., 0].numel())
    assert abs(found[..., 0].mean().item() - 1) < 6 * deviation


def test_a_second_derivative_is_refused_not_wrong():
    for function, inputs in (
        (lambda x: cpu.attention(x, x, x, dropout_p=0.4), random(1, 1, 3, 4)),
        (lambda x: cpu.linear(x, random(5, 4)), random(3, 4)),
    ):
        (grad,) = torch.autograd.grad(
            function(inputs.requires_grad_()).square().sum(), inputs, create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


LEFT_TO_TORCH = {
    "grouped queries": (
        [(B, 4, T, D), (B, 2, S, D), (B, 2, S, D)],
        {"dropout_p": 0.4, "enable_gqa": True},
    ),
    "three dimensions": ([(B, T, D), (B, S, D), (B, S, D)], {"dropout_p": 0.4}),
    "no dropout": ([(B, H, T, D), (B, H, S, D), (B, H, S, D)], {}),
    "all dropped": ([(B, H, T, D), (B, H, S, D), (B, H, S, D)], {"dropout_p": 1.0}),
    "a mask that learns": ([(B, H, T, D), (B, H, S, D), (B, H, S, D), (T, S)], {"dropout_p": 0.4}),
    "keys of all sequences": ([(B, H, T, D), (1, H, S, D), (1, H, S, D)], {"dropout_p": 0.4}),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_attention_leaves_the_rest_to_torch(name):
    shapes, options = LEFT_TO_TORCH[name]
    inputs = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    found, expected = (
        results(functools.partial(function, **options), *inputs)
        for function in (cpu.attention, F.scaled_dot_product_attention)
    )
    assert_same(found, expected)


def test_float64_under_autocast_stays_float64():
    with in_half():
        found, expected = (
            results(functools.partial(function, dropout_p=0.4), *qkv(torch.float64))
            for function in (cpu.attention, F.scaled_dot_product_attention)
        )
    assert found[0].dtype == torch.float64
    assert_same(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": shown(T, S), "is_causal": True},
        {"attn_mask": torch.zeros(T, S, dtype=torch.int64)},
        {"attn_mask": torch.zeros(T, S, dtype=torch.float64)},
    ],
)
def test_what_torch_refuses_is_refused(options):
    with pytest.raises(RuntimeError, match="attn_mask"):
        cpu.attention(*qkv(), dropout_p=0.4, **options)
    with pytest.raises(RuntimeError, match="same dtype"):
        cpu.attention(qkv(torch.float64)[0], *qkv()[1:], dropout_p=0.4)


# --------------------------------------------------------------------------------------------------
# Linear maps
# --------------------------------------------------------------------------------------------------


def is_own(value: torch.Tensor) -> bool:
    return value.grad_fn is not None and value.grad_fn.name() == "_LinearBackward"


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (9, 6), (2, 5, 6), (2, 3, 1, 6)])
def test_a_linear_map_is_torchs(shape, has_bias):
    inputs = random(*shape), random(8, 6, seed=1), random(8, seed=2) if has_bias else None
    assert is_own(cpu.linear(inputs[0], inputs[1].clone().requires_grad_(), inputs[2]))
    assert_close(results(cpu.linear, *inputs), results(F.linear, *inputs), torch.float32)


def test_a_linear_map_of_tensors_that_lie_otherwise_is_torchs():
    """Transposed, sliced, expanded; and a gradient that is one number, expanded."""
    views = (
        random(5, 12, 6)[:, ::2].transpose(0, 1),
        random(6, 8, seed=1).t(),
        random(16, seed=2)[::2],
    )
    assert_close(results(cpu.linear, *views), results(F.linear, *views), torch.float32)
    repeated = random(1, 6).expand(5, 6)
    assert_close(
        results(cpu.linear, repeated, views[1]),
        results(F.linear, repeated, views[1]),
        torch.float32,
    )
    grads = []
    for function in (cpu.linear, F.linear):
        leaves = [view.detach().clone().requires_grad_() for view in views]
        function(*leaves).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert_close(*grads, torch.float32)


CHANGES = {
    "scaled": lambda tensor: tensor.div_(3),
    "dropped": lambda tensor: F.dropout(tensor, 0.5, True, inplace=True),
    "a part of it": lambda tensor: tensor[:1].mul_(3),
    "seen otherwise": lambda tensor: tensor.view(-1).add_(1),
}
CHANGEABLE = {
    "linear": lambda x_BNI, w_OI: F.linear(x_BNI, w_OI),
    "addmm": lambda x_BNI, w_OI: torch.addmm(x_BNI[0, 0, 0], x_BNI[0], w_OI.t()),
    "dropout": lambda x_BNI, w_OI: F.dropout(x_BNI, 0.3),
    "attention": lambda x_BNI, w_OI: F.scaled_dot_product_attention(
        *[x_BNI[None]] * 3, dropout_p=NOTHING_DROPPED
    ),
    "layer norm": lambda x_BNI, w_OI: F.layer_norm(x_BNI.bfloat16(), (6,), w_OI[0]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CHANGEABLE)
def test_results_may_be_changed_in_place_as_torchs(name, change):
    """Longformer divides its queries in place; other models drop in place."""
    grads = []
    for is_ours in (True, False):
        leaves = [random(2, 5, 6), random(8, 6, seed=1)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        torch.manual_seed(0)
        with faster() if is_ours or name == "dropout" else contextlib.nullcontext():
            value = CHANGEABLE[name](*leaves)
            if name == "dropout" and not is_ours:  # as drawn, by autograd
                value = leaves[0] * (value / leaves[0]).detach()
        torch.manual_seed(1)
        CHANGES[change](value)
        (value.float() / 10).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert_close(*grads, torch.bfloat16 if name == "layer norm" else torch.float32)


def test_a_model_that_scales_its_queries_in_place_gets_torchs_gradient():
    grads = []
    for context in (faster(), contextlib.nullcontext()):
        model = families.tiny_model("longformer", True)
        with context:
            loss = model(torch.arange(5, 21)[None]).logits.square().mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 50
    assert_close(*grads, torch.float32)


class Products(TorchDispatchMode):
    """Count oneDNN's products."""

    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += function.overloadpacket is torch.ops.mkldnn._linear_pointwise
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_only_what_is_trained_gets_a_gradient_and_costs_a_product(frozen):
    grads = []
    for function in (cpu.linear, F.linear):
        leaves = [random(2, 5, 6), random(8, 6, seed=1), random(8, seed=2)]
        for place, leaf in enumerate(leaves):
            leaf.requires_grad_(place not in frozen)
        with Products() as products:
            value = function(*leaves)
            value.backward(random(2, 5, 8, seed=99))
        num_products = 1 + sum(place not in frozen for place in (0, 1))
        assert (is_own(value), products.num) == (
            (True, num_products) if function is cpu.linear else (False, 0)
        )
        assert all((leaf.grad is None) == (place in frozen) for place, leaf in enumerate(leaves))
        grads.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert_close(*grads, torch.float32)


def test_a_float32_product_stays_in_mkl_where_that_is_faster(monkeypatch):
    monkeypatch.setattr(cpu, "MKL_IS_FASTER", True)
    with Products() as products:
        cpu.linear(random(2, 5, 6), random(8, 6, seed=1))
    assert products.num == 0


def test_a_linear_map_without_gradient_is_torchs():
    inputs = random(2, 5, 6), random(8, 6, seed=1).requires_grad_(), random(8, seed=2)
    with torch.no_grad():
        found, expected = cpu.linear(*inputs), F.linear(*inputs)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    frozen = cpu.linear(inputs[0], inputs[1].detach())
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, F.linear(inputs[0], inputs[1].detach()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_to_torch(dtype):
    inputs = (
        random(5, 6, dtype=dtype),
        random(8, 6, seed=1, dtype=dtype),
        random(8, seed=2, dtype=dtype),
    )
    assert not is_own(cpu.linear(*(tensor.clone().requires_grad_() for tensor in inputs)))
    assert_same(results(cpu.linear, *inputs), results(F.linear, *inputs))


def test_autocast_is_left_to_torch():
    inputs = random(5, 6), random(8, 6, seed=1), random(8, seed=2)
    with in_half():
        found = (
            results(cpu.linear, *inputs),
            results(lambda x, w, b: cpu.addmm(b, x, w.t()), *inputs),
        )
        expected = (
            results(F.linear, *inputs),
            results(lambda x, w, b: torch.addmm(b, x, w.t()), *inputs),
        )
    assert found[0][0].dtype == torch.bfloat16
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 6), (8, 6), (8,)),
        ((2, 0, 6), (8, 6), (8,)),
        ((3, 0), (8, 0), (8,)),
        ((3, 6), (0, 6), (0,)),  # nothing in it
        ((6,), (8, 6), (8,)),
        ((3, 6), (8, 6), (1,)),
        ((3, 6), (8, 6), (1, 8)),  # a vector; biases that are spread out
    ],
)
def test_empty_and_odd_shapes_are_left_to_torch(shapes):
    inputs = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    assert_same(results(cpu.linear, *inputs), results(F.linear, *inputs))


def test_widths_that_do_not_match_are_told_by_torch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.linear(random(2, 3), random(4, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.addmm(random(4), random(2, 3), random(5, 4))


def test_gpt2s_linear_maps_are_torchs():
    module = transformers.pytorch_utils.Conv1D(8, 6)
    nn.init.normal_(module.bias)
    found = []
    for context in (faster, contextlib.nullcontext):
        module.zero_grad()
        inputs = random(2, 5, 6).requires_grad_()
        with context():
            value = module(inputs)
        assert is_own(value._base) == (context is faster)  # the module reshapes the result
        value.backward(random(2, 5, 8, seed=99))
        found.append(
            [value.detach(), inputs.grad, module.weight.grad.clone(), module.bias.grad.clone()]
        )
    assert_close(*found, torch.float32)
    assert module.weight.grad.is_contiguous()


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"alpha": 2}, {}])
@pytest.mark.parametrize("shape", [(8,), (1,), (5, 8)])
def test_other_sums_of_products_are_left_to_torch(shape, options):
    inputs = random(*shape), random(5, 6, seed=1), random(6, 8, seed=2)
    found, expected = (
        results(functools.partial(function, **options), *inputs)
        for function in (cpu.addmm, torch.addmm)
    )
    if shape == (8,) and not options:
        assert_close(found, expected, torch.float32)
    else:
        assert_same(found, expected)


def test_a_sum_of_products_can_have_its_place():
    out, inputs = torch.empty(5, 8), (random(8), random(5, 6, seed=1), random(6, 8, seed=2))
    assert cpu.addmm(*inputs, out=out) is out
    assert torch.equal(out, torch.addmm(*inputs))


# --------------------------------------------------------------------------------------------------
# The context
# --------------------------------------------------------------------------------------------------


def test_only_calls_inside_the_context_come_here():
    linear, dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def names():
        heads = random(1, 1, 3, 4).requires_grad_()
        values = (
            linear(heads),
            dropout(heads),
            F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5),
        )
        sums = torch.addmm(linear.bias, heads[0, 0], linear.weight)
        return [value.grad_fn.name() for value in (*values, sums)]

    outside = names()
    with faster():
        inside = names()
    assert (
        inside[:3] == ["_LinearBackward", "_DropoutBackward", "_DroppedAttentionBackward"]
        and inside[3] == inside[0]
    )
    assert names() == outside and not set(outside) & set(inside)


def test_an_error_inside_ends_the_context():
    with pytest.raises(KeyError), faster():
        raise KeyError
    assert not is_own(nn.Linear(4, 4)(random(3, 4)))


# --------------------------------------------------------------------------------------------------
# Looking up tied weights
# --------------------------------------------------------------------------------------------------

VOCAB, WIDTH = 11, 6


class TiedModel(nn.Module):
    """Embedding, looked up once or twice, one linear map, a head with the embedding's weights."""

    def __init__(
        self, num_lookups: int = 1, padding_id: int | None = None, freezes_inner: bool = False
    ):
        super().__init__()
        self.num_lookups, self.padding_id = num_lookups, padding_id
        self.weight = nn.Parameter(random(VOCAB, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.inner.weight.copy_(random(WIDTH, WIDTH, seed=1))
            self.inner.bias.copy_(random(WIDTH, seed=2))
        self.inner.requires_grad_(not freezes_inner)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = F.embedding(ids_BT, self.weight, self.padding_id)
        if self.num_lookups == 2:
            hidden_BTD = hidden_BTD * F.embedding(ids_BT.flip(-1) + 1, self.weight, self.padding_id)
        logits_BTV = F.linear(torch.tanh(self.inner(hidden_BTD)), self.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT.flatten())


# Some ids more than once, 0 last.
IDS = [torch.tensor([[1, 3, 3, 0], [9, 1, 0, 0]]), torch.tensor([[2, 3, 9, 9]])]


def accumulated(
    model: nn.Module, batches: list[torch.Tensor], is_tied: bool, is_cast: bool = False
) -> list[torch.Tensor]:
    """Run forward and backward of each batch; return the summed gradients, the tied one first."""
    model.zero_grad()
    weight = next(model.parameters())
    for ids_BT in batches:
        with TiedGradient(weight) if is_tied else contextlib.nullcontext() as tied:
            with (
                faster(tied) if is_tied else contextlib.nullcontext(),
                in_half() if is_cast else contextlib.nullcontext(),
            ):
                loss = model(ids_BT)
            loss.backward()
        assert not weight._backward_hooks
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_lookups": 2},
        {"padding_id": 0},
        {"padding_id": -2},
        {"num_lookups": 2, "padding_id": 0},
        {"freezes_inner": True},
    ],
)
def test_tied_weights_get_autograds_gradient(options, num_batches, is_cast):
    model, batches = TiedModel(**options), IDS[:num_batches]
    found = accumulated(model, batches, is_tied=True, is_cast=is_cast)
    expected = accumulated(model, batches, is_tied=False, is_cast=is_cast)
    # Under autocast the linear maps are torch's: the same numbers in another order of sums, also
    # there in float32.
    assert_close(found, expected, torch.float32)
    assert len(found) == (1 if options.get("freezes_inner") else 3)


def test_the_rows_are_looked_up_our_way_and_padding_counts():
    """Autograd's way is not taken, and without padding_id padding has a gradient."""
    model = TiedModel()
    with TiedGradient(model.weight) as tied, faster(tied):
        assert F.embedding(IDS[0], model.weight).grad_fn.name() == "_TiedLookupBackward"
        assert (
            F.embedding(IDS[0], random(VOCAB, 2).requires_grad_()).grad_fn.name()
            == "EmbeddingBackward0"
        )
    with_it, without = (
        accumulated(TiedModel(padding_id=padding), IDS, is_tied=True)[0] for padding in (0, None)
    )
    assert not torch.allclose(with_it[0], without[0])


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_special_look_ups_are_left_to_torch(options):
    grads = []
    for is_tied in (True, False):
        weight = random(VOCAB, WIDTH).requires_grad_()
        with TiedGradient(weight) as tied:
            with faster(tied) if is_tied else contextlib.nullcontext():
                looked_up = F.embedding(IDS[0], weight, **options)
            assert looked_up.grad_fn.name() == "EmbeddingBackward0"
            (looked_up.square().sum() + weight.square().sum()).backward()
        grads.append([weight.grad, weight.detach()])
    assert_same(*grads)


@pytest.mark.parametrize(
    "ids",
    [torch.tensor(3), torch.zeros(0, dtype=torch.long), torch.tensor([[3, 4]], dtype=torch.int32)],
)
def test_where_the_heads_gradient_is_zero_the_rows_looked_up_have_one_alone(ids):
    weight = random(VOCAB, WIDTH).requires_grad_()
    with TiedGradient(weight) as tied:
        with faster(tied):
            loss = (
                F.embedding(ids, weight).square().sum()
                + 0 * F.linear(random(2, WIDTH), weight).sum()
            )
        loss.backward()
    expected = torch.zeros_like(weight)
    expected[ids.long()] = 2 * weight.detach()[ids.long()]
    torch.testing.assert_close(weight.grad, expected)


def test_rows_that_were_looked_up_may_be_changed_in_place():
    grads = []
    for is_ours in (True, False):
        weight_VD = random(9, 4).requires_grad_()
        tied = TiedGradient(weight_VD) if is_ours else None
        with tied or contextlib.nullcontext():
            with faster(tied):
                rows = F.embedding(torch.tensor([[1, 2, 1], [4, 8, 0]]), weight_VD)
            rows.mul_(2)
            (rows.square().sum() + weight_VD.square().sum()).backward()
        grads.append([weight_VD.grad])
    assert_close(*grads, torch.float32)


def test_without_gradient_a_look_up_is_torchs():
    weight = random(VOCAB, WIDTH).requires_grad_()
    with TiedGradient(weight) as tied, faster(tied), torch.no_grad():
        assert torch.equal(F.embedding(IDS[0], weight), weight[IDS[0]])


def test_a_gradient_of_look_ups_alone_is_not_lost_in_silence():
    weight = random(VOCAB, WIDTH).requires_grad_()
    with pytest.raises(AssertionError, match="look-ups"), TiedGradient(weight) as tied:
        with faster(tied):
            loss = F.embedding(IDS[0], weight).sum()
        loss.backward()
    assert not weight._backward_hooks


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyError


@pytest.mark.parametrize("fails_in_forward", [True, False])
def test_nothing_stays_behind_an_error(fails_in_forward):
    """Backward fails between two look-ups; the next gradient is unaffected."""
    model, num_found = TiedModel(), 0
    tied = TiedGradient(model.weight)
    with pytest.raises(KeyError), tied:
        with faster(tied):
            late = Failing.apply(F.embedding(IDS[0], model.weight))  # last in backward
            early = F.embedding(IDS[0], model.weight)
            if fails_in_forward:
                raise KeyError
            loss = late.sum() + early.sum() + F.linear(random(2, WIDTH), model.weight).sum()
        try:
            loss.backward()
        finally:
            num_found = len(tied._found)
    assert num_found == (0 if fails_in_forward else 1)
    assert not model.weight._backward_hooks and not tied._found and model.weight.grad is None
    expected = accumulated(model, IDS, is_tied=False)
    with tied:
        with faster(tied):
            total = sum(model(ids_BT) for ids_BT in IDS)
        model.zero_grad()
        total.backward()
    assert_close([parameter.grad for parameter in model.parameters()], expected, torch.float32)


RANK_BATCHES = [[IDS[0], IDS[1]], [IDS[1] - 1, IDS[0].flip(-1)]]


def gradients_of_rank(rank: int) -> list[torch.Tensor]:
    """Run two micro-batches, the first without a gradient exchange."""
    model = TiedModel(num_lookups=2, padding_id=0)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for number, ids_BT in enumerate(RANK_BATCHES[rank]):
        with (
            wrapped.no_sync() if number == 0 else contextlib.nullcontext(),
            TiedGradient(model.weight) as tied,
        ):
            with faster(tied):
                loss = wrapped(ids_BT)
            loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.save(gradients_of_rank(rank), f"{folder}/{rank}.pt")
    # After the model is deleted: in the other order it hangs now and then.
    torch.distributed.destroy_process_group()


def run_ranks(folder: str) -> None:
    ranks = [
        fork_program(lambda: None, functools.partial(run_rank, rank, folder)) for rank in range(2)
    ]
    assert [end_of(pid, 60) for pid in ranks] == [0, 0]


def test_two_ranks_exchange_the_rows_too(tmp_path):
    """Both ranks get the mean of both sums.

    In a separate program: after torch has started threads, a fork can hang.
    """
    done = run_process(sys.executable, __file__, tmp_path, PYTHONPATH=f"{ROOT}:{ROOT}/tests")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    summed = accumulated(
        TiedModel(num_lookups=2, padding_id=0), RANK_BATCHES[0] + RANK_BATCHES[1], is_tied=False
    )
    for rank in range(2):
        assert_close(
            torch.load(tmp_path / f"{rank}.pt"), [grad / 2 for grad in summed], torch.float32
        )


# --------------------------------------------------------------------------------------------------
# Whole models, in the step
# --------------------------------------------------------------------------------------------------

KINDS = ("distilbert", "roberta", "gpt2")
WORDS, MASK_ID = 60, 4
DROPOUTS = {
    "distilbert": ("dropout", "attention_dropout"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}


def make_student(kind: str, dropout: float) -> nn.Module:
    options = dict.fromkeys(DROPOUTS[kind], dropout)
    if kind != "distilbert":
        return make_model(kind, WORDS, layers=2, **options).train()
    torch.manual_seed(1)
    sizes = {
        "vocab_size": WORDS,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 64,
    }
    return transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(**sizes, initializer_range=0.2, **options)
    ).train()


def make_batches(kind: str) -> list:
    """Make two micro-batches with padding, of masked or of next tokens."""
    prepare = prepare_clm
    if kind != "gpt2":
        weights_V = masking_weights(torch.ones(WORDS), 0.7, range(5))
        prepare = MlmPreparation(weights_V, MASK_ID, 0.3, 0.8, 0.1, 0.1, False, 7)
    batches = []
    for number, lengths in enumerate([[20, 13], [17, 9, 12]]):
        lengths_B = torch.tensor(lengths)
        token_ids_BT = torch.randint(
            5, WORDS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(number)
        )
        padding_BT = torch.arange(max(lengths)) >= lengths_B[:, None]
        batches.append(
            prepare(
                number,
                token_ids_BT.masked_fill(padding_BT, 1 if kind == "roberta" else 0),
                lengths_B,
            )
        )
    return batches


def gradients(kind: str, student: nn.Module, **options) -> dict[str, torch.Tensor]:
    """Return each parameter's gradient in an update of two micro-batches."""
    own, dtype = "clm" if kind == "gpt2" else "mlm", next(student.parameters()).dtype
    teacher = (
        make_model("bert" if kind == "distilbert" else kind, WORDS)
        .to(dtype)
        .eval()
        .requires_grad_(False)
    )
    alphas = {"ce": 5.0, own: 2.0, "cos": 1.0}
    model = DistillationModel(student, alphas, 2.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    step = Distiller(
        model,
        teacher,
        optimizer,
        None,
        max_grad_norm=1e9,
        seed=5,
        **options,
    )
    batches = make_batches(kind)
    step.accumulate(batches, [batch.number for batch in batches], len(batches))
    assert not model.student.get_output_embeddings().weight._backward_hooks
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.fixture
def plainly(monkeypatch):
    """Compute gradients by torch's functions."""

    def compute(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(distiller, "faster", lambda tied: contextlib.nullcontext())
            return gradients(*arguments, **options)

    return compute


def assert_relative(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float
) -> None:
    """Compare each gradient by its norm, or by the norm of all if it is mere rounding."""
    assert set(found) == set(expected)
    of_all = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= bound * max(grad.norm(), 0.01 * of_all), name


@pytest.mark.parametrize(
    ("dtype", "dropout", "bound"),
    [
        (torch.float32, 0.0, 1e-6),
        (torch.float64, 0.0, 1e-13),
        (torch.float64, NOTHING_DROPPED, 1e-13),
        # Attention sums in another order: both are 10^-6 away from float64's.
        (torch.float32, NOTHING_DROPPED, 5e-6),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gets_torchs_gradient(kind, dtype, dropout, bound, plainly):
    found = gradients(kind, make_student(kind, dropout).to(dtype))
    expected = plainly(kind, make_student(kind, 0.0).to(dtype))
    assert_relative(found, expected, bound)
    assert all(grad.any() for grad in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_frozen_embeddings_gets_torchs_gradient(kind, plainly):
    def frozen():
        student = make_student(kind, 0.0)
        freeze_embeddings(student, ARCHITECTURES[kind], positions=True, token_types=False)
        student.get_input_embeddings().weight.requires_grad_(False)
        return student

    found, expected = gradients(kind, frozen()), plainly(kind, frozen())
    assert_relative(found, expected, 1e-6)
    assert len(found) < len(gradients(kind, make_student(kind, 0.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_under_autocast_gets_torchs_gradient(kind, plainly):
    found = gradients(kind, make_student(kind, NOTHING_DROPPED), amp_dtype=torch.bfloat16)
    expected = plainly(kind, make_student(kind, 0.0), amp_dtype=torch.bfloat16)
    assert_relative(found, expected, 0.05)  # 8 bits: scores are rounded before the softmax


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_have_the_same_dropout(kind, amp_dtype):
    """To the bit: the same functions, on the same numbers, after the same seed."""
    found = []
    for is_recomputed in (False, True):
        student = make_student(kind, 0.2)
        if is_recomputed:
            recompute_activations(student)
        found.append(gradients(kind, student, amp_dtype=amp_dtype))
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    without = gradients(kind, make_student(kind, 0.0), amp_dtype=amp_dtype)
    assert not any(torch.equal(found[0][name], without[name]) for name in without)


if __name__ == "__main__":
    run_ranks(sys.argv[1])
