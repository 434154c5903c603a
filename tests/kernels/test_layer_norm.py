"""Layer norms in half precision on a CPU: gradients of weights and biases against float64."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import transformers

from distil.data.batches import MicroBatch
from distil.kernels import cpu
from distil.kernels.head import Projection, Term, head_losses
from distil.models import heads
from distil.models.forward import read_outputs
from distil.objectives import LOSSES
from distiller import DistillationModel

HALF = [torch.bfloat16, torch.float16]
# Weight and bias are rounded to 8 bits at most; the sums over rows must not add to that.
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def draw(rows: int, width: int, dtype: torch.dtype, affine: torch.dtype):
    """Draw (inputs, weight, bias, gradient); the gradient's mean is not 0, as in training."""
    generator = torch.Generator().manual_seed(rows)
    inputs, grad = torch.randn(2, rows, width, generator=generator).to(dtype)
    weight, bias = torch.rand(2, width, generator=generator).to(affine)
    return inputs, weight, bias, (grad * 0.1 + 0.05).to(dtype)


def norm_gradients(rows, width, dtype, affine, shape=None, wide=False):
    """Return value and gradients of a layer norm inside the context, or of float64's."""
    *leaves, grad = draw(rows, width, dtype, affine)
    if wide:
        *leaves, grad = (tensor.double() for tensor in (*leaves, grad))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    inputs = leaves[0] if shape is None else leaves[0].view(shape)
    with contextlib.nullcontext() if wide else cpu.faster():
        value = F.layer_norm(inputs, (width,), *leaves[1:])
    value.backward(grad.view(value.shape))
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("affine", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 320, 5000, 16000])
def test_gradients_over_many_rows_are_summed_in_float32(rows, affine):
    value, found = norm_gradients(rows, 32, torch.bfloat16, affine)
    _, expected = norm_gradients(rows, 32, torch.bfloat16, affine, wide=True)
    inputs, weight, bias, _ = draw(rows, 32, torch.bfloat16, affine)
    assert torch.equal(value, F.layer_norm(inputs, (32,), weight, bias))  # torch's own
    assert [grad.dtype for grad in found] == [torch.bfloat16, affine, affine]
    assert relative_error(found[0], expected[0]) < 2**-8
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert relative_error(one, other) < ROUNDED[affine]


@pytest.mark.parametrize("dtype", HALF)
def test_any_shape_and_order_of_a_layer_norms_input_has_one_gradient(dtype):
    flat = norm_gradients(600, 24, dtype, torch.float32)
    shaped = norm_gradients(600, 24, dtype, torch.float32, shape=(20, 5, 6, 24))
    assert torch.equal(flat[0].view(-1), shaped[0].view(-1))
    assert all(torch.equal(a, b) for a, b in zip(flat[1], shaped[1], strict=True))
    inputs, weight, bias, grad = draw(600, 24, dtype, torch.float32)
    found = []
    for given in (inputs.view(20, 30, 24), inputs.view(20, 30, 24).mT.contiguous().mT):
        leaves = [t.detach().requires_grad_() for t in (given, weight.clone(), bias.clone())]
        with cpu.faster():
            F.layer_norm(leaves[0], (24,), *leaves[1:]).backward(grad.view(20, 30, 24))
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", ["inputs", "weight", "bias", "no bias", "two dimensions"])
def test_only_what_is_trained_gets_a_gradient_of_a_layer_norm(frozen):
    inputs, weight, bias, grad = draw(60, 24, torch.bfloat16, torch.float32)
    if frozen == "two dimensions":
        inputs, grad = inputs.view(20, 3, 24), grad.view(20, 3, 24)
        weight, bias = weight.expand(3, 24).clone(), bias.expand(3, 24).clone()
    leaves = {"inputs": inputs, "weight": weight, "bias": None if frozen == "no bias" else bias}
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name != frozen)
    with cpu.faster():
        value = F.layer_norm(leaves["inputs"], weight.shape, weight, leaves["bias"])
    value.backward(grad)
    wide = {k: None if v is None else v.detach().double() for k, v in leaves.items()}
    for name, leaf in wide.items():
        if leaf is not None:
            leaf.requires_grad_(leaves[name].requires_grad)
    expected = F.layer_norm(wide["inputs"], weight.shape, wide["weight"], wide["bias"])
    expected.backward(grad.double())
    for name, leaf in leaves.items():
        if leaf is not None and leaf.requires_grad:
            assert relative_error(leaf.grad, wide[name].grad) < ROUNDED[torch.bfloat16]
        else:
            assert leaf is None or leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_layer_norms_are_left_to_torch(dtype):
    inputs, weight, bias, _ = draw(30, 24, dtype, dtype)
    with cpu.faster():
        value = F.layer_norm(inputs, (24,), weight.requires_grad_(), bias.requires_grad_())
    assert type(value.grad_fn).__name__ == "NativeLayerNormBackward0"


def test_a_heads_own_layer_norm_is_precise_outside_the_context_too():
    """With --compile the base model is compiled and the head runs as it is."""
    rows, width, vocab_size = 5000, 16, 20
    torch.manual_seed(0)
    layer, projection = torch.nn.LayerNorm(width), torch.nn.Linear(width, vocab_size)
    head = heads.PredictionHead(layer, projection)
    hidden_ND = torch.randn(rows, width).bfloat16()
    found = [
        torch.autograd.grad(Projection.of(head, hidden_ND).rows_ND.float().sum(), layer.bias)[0]
    ]
    labels_N = torch.zeros(rows, dtype=torch.int64)
    term = Term(LOSSES["mlm"], torch.arange(rows), torch.arange(rows), labels_N, 1.0)
    plain = head, list(layer.parameters()), hidden_ND, None, None, [term], 1.0, rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = head_losses(*plain)
    found += torch.autograd.grad(total, layer.bias)
    layer.double(), projection.double()
    value = head_losses(head, list(layer.parameters()), hidden_ND.double(), *plain[3:])[0]
    expected = torch.autograd.grad(value, layer.bias)[0]
    assert torch.equal(found[0], torch.full((width,), float(rows)))
    assert relative_error(found[1], expected) < 2**-6  # the head's products are rounded too


# --------------------------------------------------------------------------------------------------
# Whole models
# --------------------------------------------------------------------------------------------------

VOCAB_SIZE, LENGTH = 120, 160


def make_network(kind: str, seed: int):
    """Make a BERT, or an ELECTRA whose embeddings are projected, which makes all of it bfloat16."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.1}
    if kind == "electra":
        config = transformers.ElectraConfig(**sizes, embedding_size=16)
        return transformers.ElectraForMaskedLM(config).eval()
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()


def model_gradients(kind: str, rows: int, dtype: torch.dtype, fast_head: bool):
    """Return the gradient of each parameter, from `rows` rows, all of which enter the losses."""
    student, teacher = (make_network(kind, seed).to(torch.float64) for seed in (0, 1))
    if dtype != torch.float64:
        student, teacher = student.float(), teacher.to(dtype)
    shape = rows // LENGTH, LENGTH
    ids_BT = torch.randint(5, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(2))
    places = torch.arange(ids_BT.numel())
    kinds = dict.fromkeys(("real", "masked", "distilled"), places)
    batch = MicroBatch(0, ids_BT, None, ids_BT.clone(), kinds, len(places))
    model = DistillationModel(student, {"ce": 1.0, "mlm": 1.0}, 2.0, fast_head=fast_head)
    with cpu.faster():
        with torch.no_grad():
            read = read_outputs(teacher, batch, model.readings)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, _ = model(batch, read, heads.prediction_head(teacher), 1.0)
    total.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def check_model(kind: str, rows: int) -> None:
    exact = model_gradients(kind, rows, torch.float64, fast_head=False)
    fast, plain = (model_gradients(kind, rows, torch.bfloat16, fast) for fast in (True, False))
    largest = max(grad.norm() for grad in exact.values())
    assert set(fast) == set(plain) == set(exact)
    for name, grad in exact.items():
        if grad.norm() > 1e-6 * largest:  # a key's bias has no gradient but rounding
            error, bound = relative_error(fast[name], grad), relative_error(plain[name], grad)
            # The two heads round at other places: neither error is always the smaller.
            assert error < 1.25 * bound + 2**-10 and error < 2**-5, (name, error, bound)


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_a_model_in_bfloat16_has_every_parameters_gradient(kind):
    check_model(kind, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rows", [320, 5000, 16000])
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_a_model_in_bfloat16_has_every_parameters_gradient_by_any_threads(kind, rows, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        check_model(kind, rows)
    finally:
        torch.set_num_threads(before)
