"""Operations that run faster on a CPU than torch's, or sum more precisely.

Within the context `faster()` a model's calls of torch.nn.functional are redirected to this module;
no model code is changed, so it serves every architecture. Outside it, on other devices and for
cases that are not handled, torch's functions run.

- Dropout: torch draws a float32 per element from a serial generator (6 ms a million); here 16 bits.
- Attention with dropout: torch's fused CPU kernel supports no dropout, and its fallback keeps three
  matrices of B x H x T x T; here one, and one byte an element.
- The gradient of an embedding that is tied to the head: only the rows that occurred, where torch
  makes a second V x D matrix.
- float32 linear maps: torch calls MKL, which is slow on AMD; there oneDNN, from the same package.
- Layer norms in half precision: torch adds the gradients of weight and bias over rows in half
  precision (5,000 ones give 256); here in float32.

Shape suffixes: B sequences, H heads, T query positions, S key positions, N rows, I and O width of
input and output.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

LANES = 2**16  # the share of dropped elements is rounded to a multiple of 1 / LANES
NORM_ELEMENTS = 2**18  # of a layer norm's rows that a CPU's cache holds in float32

# --------------------------------------------------------------------------------------------------
# Dropout
# --------------------------------------------------------------------------------------------------


def draw_kept(shape: torch.Size, probability: float) -> tuple[torch.Tensor, float]:
    """Draw kept elements from torch's default generator: (bool, factor that preserves the mean).

    probability: of dropping an element, rounded to a multiple of 2^-16 below 1 (0.1 becomes
    0.100006); the factor fits the rounded probability.
    """
    # Differs from the original: the probability is rounded. torch draws one number an element,
    # which takes longer.
    num_dropped = min(round(probability * LANES), LANES - 1)
    num_words = -(-shape.numel() // 4)
    words = torch.empty(num_words, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    lanes = words.view(torch.int16)[: shape.numel()].view(shape)
    return lanes >= num_dropped - LANES // 2, LANES / (LANES - num_dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, probability: float):
        kept, ctx.factor = draw_kept(inputs.shape, probability)
        ctx.save_for_backward(kept)
        return torch.mul(inputs, kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return torch.mul(grad, kept).mul_(ctx.factor), None


def dropout(input, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Compute torch.nn.functional.dropout."""
    if not training or inplace or not 0 < p < 1 or not _is_float_on_cpu(input):
        return F.dropout(input, p, training, inplace)
    return _Dropout.apply(input, p)


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------


class _DroppedAttention(torch.autograd.Function):
    """dropout(softmax(q k' scale + mask)) v. Saves the probabilities and the kept elements."""

    @staticmethod
    def forward(ctx, query_BHTD, key_BHSD, value_BHSD, mask, probability: float, scale: float):
        scores_BHTS = (query_BHTD * scale) @ key_BHSD.transpose(-2, -1)
        if mask is not None:
            scores_BHTS = (
                scores_BHTS.masked_fill_(~mask, -torch.inf)
                if mask.dtype == torch.bool
                else scores_BHTS.add_(mask)
            )
        probs_BHTS = scores_BHTS.softmax(-1)
        if mask is not None and (is_blind := _sees_nothing(mask)).any():
            probs_BHTS.masked_fill_(is_blind, 0.0)
        kept_BHTS, ctx.factor = draw_kept(probs_BHTS.shape, probability)
        ctx.scale = scale
        ctx.save_for_backward(query_BHTD, key_BHSD, value_BHSD, probs_BHTS, kept_BHTS)
        return (torch.mul(probs_BHTS, kept_BHTS) @ value_BHSD).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BHTD):
        query_BHTD, key_BHSD, value_BHSD, probs_BHTS, kept_BHTS = ctx.saved_tensors
        grad_BHTD = grad_BHTD * ctx.factor
        grad_value_BHSD = torch.mul(probs_BHTS, kept_BHTS).transpose(-2, -1) @ grad_BHTD
        grad_probs_BHTS = (grad_BHTD @ value_BHSD.transpose(-2, -1)).mul_(kept_BHTS)
        grad_scores_BHTS = torch._softmax_backward_data(
            grad_probs_BHTS, probs_BHTS, -1, probs_BHTS.dtype
        ).mul_(ctx.scale)
        grad_query_BHTD = grad_scores_BHTS @ key_BHSD
        return (
            grad_query_BHTD,
            grad_scores_BHTS.transpose(-2, -1) @ query_BHTD,
            grad_value_BHSD,
            None,
            None,
            None,
        )


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute torch.nn.functional.scaled_dot_product_attention."""
    tensors, is_cast = (query, key, value), torch.is_autocast_enabled("cpu")
    is_handled = (
        0 < dropout_p < 1
        and all(
            _is_float_on_cpu(t) and t.dim() == 4 and t.shape[:2] == query.shape[:2] for t in tensors
        )
        and all(t.dtype != torch.float64 if is_cast else t.dtype == query.dtype for t in tensors)
        and (attn_mask is None or not (is_causal or attn_mask.requires_grad))
        and (attn_mask is None or attn_mask.dtype in (torch.bool, torch.float32, query.dtype))
    )
    if not is_handled:
        return F.scaled_dot_product_attention(
            *tensors,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    dtype = torch.get_autocast_dtype("cpu") if is_cast else query.dtype
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    with torch.autocast("cpu", enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _DroppedAttention.apply(query, key, value, attn_mask, dropout_p, scale)


def _sees_nothing(mask: torch.Tensor) -> torch.Tensor:
    """Mark queries that see no key: torch's attention returns zeros for them, a softmax NaN."""
    return (~mask if mask.dtype == torch.bool else mask == -torch.inf).all(-1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# Linear maps
# --------------------------------------------------------------------------------------------------


def _is_intel() -> bool:
    with contextlib.suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


# On Intel's CPUs MKL is 5 to 20 % faster than oneDNN in float32, on AMD's up to a third slower.
MKL_IS_FASTER = _is_intel()


def _product(
    left_NI: torch.Tensor, right_OI: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute left right' + bias in oneDNN.

    Its result for more than two dimensions is a view, which autograd lets nobody change in place
    when a custom function returns it; models do change what torch's linear map returns.
    """
    result = torch.ops.mkldnn._linear_pointwise(
        left_NI.flatten(0, -2), right_OI, bias_O, "none", [], ""
    )
    return torch.ops.aten._unsafe_view(result, [*left_NI.shape[:-1], len(right_OI)])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight_OI, bias_O):
        ctx.save_for_backward(inputs, weight_OI)
        return _product(inputs, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, weight_OI = ctx.saved_tensors
        grad_inputs = _product(grad, weight_OI.t()) if ctx.needs_input_grad[0] else None
        grad_NO, inputs_NI = grad.flatten(0, -2), inputs.flatten(0, -2)
        grad_weight_OI = _product(grad_NO.t(), inputs_NI.t()) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight_OI, grad_NO.sum(0) if ctx.needs_input_grad[2] else None


def linear(input, weight, bias=None) -> torch.Tensor:
    """Compute torch.nn.functional.linear; in half precision torch already calls oneDNN."""
    return (
        _linear(input, weight, bias)
        if _is_for_onednn(input, weight, bias)
        else F.linear(input, weight, bias)
    )


def addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None) -> torch.Tensor:
    """Compute torch.addmm, which GPT-2 uses for its linear maps."""
    is_linear = (beta, alpha, out) == (1, 1, None) and mat1.dim() == mat2.dim() == 2
    if is_linear and _is_for_onednn(mat1, mat2.t(), input):
        return _linear(mat1, mat2.t(), input)
    return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha, out=out)


def _is_for_onednn(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = [tensor for tensor in (input, weight, bias) if tensor is not None]
    return (
        not MKL_IS_FASTER
        and all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0
            for tensor in tensors
        )
        and input.dim() > 1
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _linear(input, weight, bias) -> torch.Tensor:
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, weight, bias)
    ):
        return _Linear.apply(input, weight, bias)
    return _product(input, weight, bias)


# --------------------------------------------------------------------------------------------------
# Layer norms
# --------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    """torch's layer norm; its gradients are computed in float32, a few rows at a time."""

    @staticmethod
    def forward(ctx, inputs, shape: list[int], weight, bias, eps: float):
        result, mean, rstd = torch.native_layer_norm(inputs, shape, weight, bias, eps)
        ctx.save_for_backward(inputs, mean, rstd, weight, bias)
        ctx.shape = shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, mean, rstd, *affine = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
        widened = [None if tensor is None else tensor.float() for tensor in affine]
        step = max(NORM_ELEMENTS // max(math.prod(ctx.shape), 1), 1)
        rows = [tensor.reshape(-1, *ctx.shape).split(step) for tensor in (grad, inputs)]
        statistics = [tensor.reshape(-1, 1).split(step) for tensor in (mean, rstd)]
        grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        targets = grad_inputs.view(-1, *ctx.shape).split(step)
        sums = [0.0, 0.0]
        for target, *parts in zip(targets, *rows, *statistics, strict=True):
            part_grad, part, part_mean, part_rstd = (tensor.float() for tensor in parts)
            of_part = part_grad, part, ctx.shape, part_mean, part_rstd, *widened, wanted
            found, *added = torch.ops.aten.native_layer_norm_backward(*of_part)
            if wanted[0]:
                target.copy_(found)
            for k, is_wanted in enumerate(wanted[1:]):
                sums[k] = sums[k] + added[k] if is_wanted else None
        narrowed = (
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, affine, strict=True)
        )
        return grad_inputs if wanted[0] else None, None, *narrowed, None


def layer_norm(input, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> torch.Tensor:
    """Compute torch.nn.functional.layer_norm; float32 and wider are torch's."""
    trained = [x for x in (weight, bias) if x is not None and x.requires_grad]
    is_half = input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16)
    is_half = is_half and input.numel() > 0
    if not (is_half and trained and torch.is_grad_enabled()):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps)


def _is_float_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_floating_point()


# --------------------------------------------------------------------------------------------------
# Embeddings that are tied to the head
# --------------------------------------------------------------------------------------------------


class _TiedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight_VD, padding_id, found: list):
        ctx.save_for_backward(ids)
        ctx.padding_id, ctx.found = -1 if padding_id is None else padding_id % len(weight_VD), found
        return F.embedding(ids, weight_VD, padding_id)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        is_padding = ids == ctx.padding_id
        ctx.found.append(
            (
                ids.flatten(),
                grad.masked_fill(is_padding[..., None], 0.0).reshape(-1, grad.shape[-1]),
            )
        )
        return None, None, None, None


class TiedGradient:
    """Context of forward and backward that adds an embedding's gradient to the head's, in place.

    weight_VD: the tied weights, which get a dense gradient from the head in every backward.
    Autograd alone would make a second V x D matrix for the embedding, mostly zeros, and add both.
    """

    def __init__(self, weight_VD: torch.Tensor):
        self.weight_VD = weight_VD
        self._found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look_up(
        self,
        input,
        weight,
        padding_idx=None,
        max_norm=None,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
    ):
        """Compute torch.nn.functional.embedding."""
        if (
            max_norm is not None
            or scale_grad_by_freq
            or sparse
            or not torch.is_grad_enabled()
            or not weight.requires_grad
        ):
            return F.embedding(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )
        return _TiedLookup.apply(input, weight, padding_idx, self._found)

    def __enter__(self) -> "TiedGradient":
        # The hook gets the sum of all dense gradients, before accumulation and the all-reduce.
        self._hook = self.weight_VD.register_hook(self._add_rows)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._found.clear()

    def _add_rows(self, grad_VD: torch.Tensor | None) -> None:
        assert grad_VD is not None, "the weights got a gradient from look-ups only"
        while self._found:
            ids, rows = self._found.pop()
            grad_VD.index_add_(0, ids, rows.to(grad_VD.dtype))


# --------------------------------------------------------------------------------------------------
# The context
# --------------------------------------------------------------------------------------------------

WIDENED = {F.layer_norm: layer_norm}
HANDLED = WIDENED | {
    F.dropout: dropout,
    F.scaled_dot_product_attention: attention,
    F.linear: linear,
    torch.addmm: addmm,
}


class _Faster(TorchFunctionMode):
    """Redirect calls of a table's keys to its values, and look-ups of tied weights to `look_up`.

    The redirected functions run outside this mode.
    """

    def __init__(self, tied: TiedGradient | None = None, handled: Mapping | None = None):
        super().__init__()
        self.tied, self.handled = tied, HANDLED if handled is None else handled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            function is F.embedding
            and self.tied is not None
            and len(args) > 1
            and args[1] is self.tied.weight_VD
        ):
            return self.tied.look_up(*args, **kwargs)
        return self.handled.get(function, function)(*args, **kwargs)


def faster(tied: TiedGradient | None = None) -> contextlib.AbstractContextManager:
    """Return the context for a forward pass."""
    return _Faster(tied)


def faster_for(*models: torch.nn.Module | None) -> contextlib.AbstractContextManager:
    """Return `faster` where all models compute on a CPU, not compiled; else an empty context."""
    found = [model for model in models if model is not None]
    on_cpu = all(next(model.parameters()).device.type == "cpu" for model in found)
    is_compiled = any(module._compiled_call_impl for model in found for module in model.modules())
    return _Faster() if on_cpu and not is_compiled else contextlib.nullcontext()


def wide_layer_norms() -> contextlib.AbstractContextManager:
    """Return the context of a prediction head, which may run outside `faster`: when compiled."""
    return _Faster(handled=WIDENED)


def checkpointing_contexts() -> tuple[
    contextlib.AbstractContextManager, contextlib.AbstractContextManager
]:
    """Return torch.utils.checkpoint's contexts for a forward inside `faster`.

    The first forward needs no further context, the recomputation needs `faster` again.
    """
    return contextlib.nullcontext(), _Faster()
