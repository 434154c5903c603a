"""The prediction head with the objectives on its logits, chunk by chunk: no (N, V) tensor exists.

`head_losses` is the plain version: autograd, any head; the reference. `projected_losses` is the
fast one: the last linear map by hand, 4 matrix products and one pass over each chunk of logits.

Shape suffixes: N selected positions, C positions of a chunk, V vocabulary, D width, K terms, L
objectives. A teacher may have logits for the first entries of the V only: see distil/losses.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from distil.kernels.cpu import wide_layer_norms
from distil.kernels.terms import Term
from distil.losses import at_least_float32
from distil.models.heads import Head
from distil.objectives import Loss

# Rows of logits in a chunk. On a CPU a chunk should be small in memory, and large beside the (V, D)
# gradient that it adds to; a GPU wants large products (4096 x 30522 in float32: 0.5 GB).
HEAD_CHUNK_ROWS = {"cpu": 320, "cuda": 4096}
CHUNK_LOGITS = 2**25  # logits in a chunk of the fast head on a GPU: a matrix of 64 or 128 MB
BLOCK_ROWS, SLICE_ENTRIES = 32, 4096  # rows and vocabulary entries that fit a CPU's cache
PADDED_VOCABULARY = 128  # GPUs' matrix units take dimensions that are multiples of it


def rows_per_chunk(device_type: str) -> int:
    """Return how many rows of logits make a chunk on a device."""
    return HEAD_CHUNK_ROWS.get(device_type, HEAD_CHUNK_ROWS["cpu"])


def apply_terms(
    student_head: Head,
    head_parameters: Sequence[torch.nn.Parameter],
    student_ND: torch.Tensor,
    teacher_head: Head | None,
    teacher_ND: torch.Tensor | None,
    terms: Sequence[Term],
    temperature: float,
    chunk_rows: int | None,
    is_fast: bool,
    compiles: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project N selected hidden states and apply the terms: (weighted total, sums_K).

    is_fast: by `projected_losses`, else by `head_losses`. chunk_rows None: by the device.
    """
    if not is_fast:
        chunk_rows = chunk_rows or rows_per_chunk(student_ND.device.type)
        given = student_head, head_parameters, student_ND, teacher_head, teacher_ND
        return head_losses(*given, terms, temperature, chunk_rows)
    with torch.no_grad():
        teacher = None if teacher_ND is None else Projection.of(teacher_head, teacher_ND)
    student = Projection.of(student_head, student_ND)
    return projected_losses(student, teacher, terms, temperature, chunk_rows, compiles)


# --------------------------------------------------------------------------------------------------
# The plain head
# --------------------------------------------------------------------------------------------------


def weighted_sums(student_CX, teacher_CX, terms: Sequence[Term], temperature: float, first=0):
    """Apply each term to rows first .. first + C of the selection: (weighted total, sums_K).

    Given every row at once it is the reference of `head_losses`. A term without a row gives 0.
    """
    total = student_CX[:0].sum()  # 0 with a zero gradient, also where no term has a row
    sums, nothing = [], total.new_zeros(())
    for term in terms:
        low, high = term.within(first, first + len(student_CX))
        value = nothing
        if high > low:
            rows = term.select(low, high, student_CX, teacher_CX, first)
            value = term.loss.formula(*rows, temperature)
            total = total + value * term.weight
        sums.append(value.detach())
    return total, torch.stack(sums)


def head_losses(
    student_head: Callable[[torch.Tensor], torch.Tensor],
    head_parameters: Sequence[torch.nn.Parameter],
    student_ND: torch.Tensor,
    teacher_head: Callable[[torch.Tensor], torch.Tensor] | None,
    teacher_ND: torch.Tensor | None,
    terms: Sequence[Term],
    temperature: float,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project N selected hidden states and apply the terms: (weighted total, sums_K).

    For each chunk, forward makes both projections, every term, and the gradient with respect to the
    chunk's hidden states and `head_parameters`, which backward only scales. Logits are float32 or
    wider inside the terms, in any precision of the projection.
    """

    def chunk_loss(hidden_CD: torch.Tensor, first: int):
        with wide_layer_norms():
            student_CV = at_least_float32(student_head(hidden_CD))
        teacher_CV = None
        if teacher_head is not None:
            with torch.no_grad():
                rows_CD = teacher_ND[first : first + len(hidden_CD)]
                teacher_CV = at_least_float32(teacher_head(rows_CD))
        return weighted_sums(student_CV, teacher_CV, terms, temperature, first)

    return _PlainHead.apply(chunk_loss, chunk_rows, len(terms), student_ND, *head_parameters)


class _PlainHead(torch.autograd.Function):
    """Sum chunk_loss over chunks of rows; forward makes gradients from each chunk's logits."""

    @staticmethod
    def forward(ctx, chunk_loss, chunk_rows: int, num_terms: int, hidden_ND, *parameters):
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = hidden_ND.new_zeros((), dtype=dtype)
        sums_K = hidden_ND.new_zeros(num_terms, dtype=dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grads = [torch.zeros_like(parameter) for parameter in trained]
        for first in range(0, len(hidden_ND), chunk_rows):
            with torch.enable_grad():
                hidden_CD = hidden_ND[first : first + chunk_rows].detach().requires_grad_()
                chunk_total, chunk_sums_K = chunk_loss(hidden_CD, first)
            chunk_grads = torch.autograd.grad(chunk_total, [hidden_CD, *trained], allow_unused=True)
            total += chunk_total.detach()
            sums_K += chunk_sums_K
            targets = [grad_hidden_ND[first : first + chunk_rows], *grads]
            for target, grad in zip(targets, chunk_grads, strict=True):
                if grad is not None:
                    target += grad
        by_parameter = iter(grads)
        ctx.grads = [
            grad_hidden_ND,
            *(next(by_parameter) if p.requires_grad else None for p in parameters),
        ]
        ctx.mark_non_differentiable(sums_K)
        return total, sums_K

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        return None, None, None, *_scaled_grads(ctx, grad_total)


def _scaled_grads(ctx, grad_total: torch.Tensor) -> list[torch.Tensor | None]:
    """Scale the gradients that forward made, in place: no second (V, D) tensor is needed."""
    grads, ctx.grads = ctx.grads, None
    assert grads is not None, "a second backward through a chunked head is not supported"
    return [None if grad is None else grad.mul_(grad_total) for grad in grads]


# --------------------------------------------------------------------------------------------------
# The fast head
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear map to the vocabulary: the rows it is applied to, and its weight and bias."""

    rows_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    @classmethod
    def of(cls, head, hidden_ND: torch.Tensor) -> "Projection":
        """Apply a head's own layers to hidden states, up to its last linear map."""
        with wide_layer_norms():
            rows_ND = head.transform(hidden_ND)
        return cls(rows_ND, head.projection.weight, head.projection.bias)

    def prepared(self, dtype: torch.dtype) -> "Projection":
        """Return it in the precision of the products, V padded for a GPU's matrix units.

        Padding is exact: the rows added are zeros, and the objectives never see their logits.
        """
        given = self.rows_ND, self.weight_VD, self.bias_V
        rows, weight, bias = (
            None if tensor is None else tensor.detach().to(dtype) for tensor in given
        )
        is_padded = weight.device.type == "cuda" and dtype.itemsize == 2
        missing = -len(weight) % PADDED_VOCABULARY if is_padded else 0
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        return Projection(rows, weight, bias)

    def logits(self, first: int, last: int) -> torch.Tensor:
        """Project rows first .. last: (C, V), V padded."""
        return F.linear(self.rows_ND[first:last], self.weight_VD, self.bias_V)


def projected_losses(
    student: Projection,
    teacher: Projection | None,
    terms: Sequence[Term],
    temperature: float,
    chunk_rows: int | None = None,
    compiles: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project N selected rows and apply the terms as `head_losses` does: (weighted total, sums_K).

    A chunk of logits is made, read once, and replaced by the gradient of the total, from which the
    gradients of rows and weights follow: 8 D V operations a row. Matrix products run in autocast's
    precision where that is on, the objectives in float32 or wider. compiles: fuse the element-wise
    operations of the objectives that have a form for it by torch.compile.
    """
    parameters = [student.rows_ND, student.weight_VD, student.bias_V]
    return _FastHead.apply(teacher, terms, temperature, chunk_rows, compiles, *parameters)


class _FastHead(torch.autograd.Function):
    """Sum the terms over chunks of rows; forward makes gradients from each chunk's logits."""

    @staticmethod
    def forward(ctx, teacher, terms, temperature, chunk_rows, compiles, rows_ND, weight_VD, bias_V):
        kind, num_rows, vocab_size = rows_ND.device.type, len(rows_ND), len(weight_VD)
        is_mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_mixed else rows_ND.dtype
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        total, sums_K = rows_ND.new_zeros((), dtype=wide), rows_ND.new_zeros(len(terms), dtype=wide)
        grad_rows_ND = torch.empty_like(rows_ND)
        # Not zeroed where the first chunk fills it: zeros are as much to write as a gradient.
        empty = torch.empty_like if num_rows else torch.zeros_like
        grad_weight_VD = empty(weight_VD) if ctx.needs_input_grad[6] else None
        wants_bias = bias_V is not None and ctx.needs_input_grad[7]
        grad_bias_V = torch.zeros_like(bias_V) if wants_bias else None
        chunk_rows = chunk_rows or even_chunk_rows(num_rows, vocab_size, kind)
        block_rows = BLOCK_ROWS if kind == "cpu" else chunk_rows
        teacher_size = 0 if teacher is None else len(teacher.weight_VD)
        with torch.autocast(kind, enabled=False):
            student = Projection(rows_ND, weight_VD, bias_V).prepared(dtype)
            teacher = None if teacher is None else teacher.prepared(dtype)
            replace = (partly_fused if compiles else _replacing)(terms, temperature, rows_ND)
            for first in range(0, num_rows, chunk_rows):
                last = min(first + chunk_rows, num_rows)
                logits_CV = student.logits(first, last)
                teacher_CV = None if teacher is None else teacher.logits(first, last)
                found = []
                for start in range(first, last, block_rows):
                    block = slice(start - first, min(start + block_rows, last) - first)
                    block_CV = None if teacher_CV is None else teacher_CV[block, :teacher_size]
                    found.append(replace(logits_CV[block, :vocab_size], block_CV, first=start))
                totals, sums = zip(*found, strict=True)
                total += torch.stack(totals).sum()
                sums_K += torch.stack(sums).sum(0)
                # As linear maps, which distil/kernels/cpu.py makes faster on a CPU.
                grad_rows_ND[first:last] = F.linear(logits_CV, student.weight_VD.t())
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, logits_CV, student.rows_ND[first:last], first == 0)
                if grad_bias_V is not None:
                    grad_bias_V += logits_CV[:, :vocab_size].sum(0, dtype=wide)
        ctx.grads = [grad_rows_ND, grad_weight_VD, grad_bias_V]
        ctx.mark_non_differentiable(sums_K)
        return total, sums_K

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        return None, None, None, None, None, *_scaled_grads(ctx, grad_total)


def _add_product(grad_weight_VD: torch.Tensor, logits_CV, rows_CD, is_first: bool) -> None:
    """Add a chunk's part to the gradient of the projection's weight (is_first: write it).

    On a CPU a slice of the vocabulary at a time: a part in half precision is widened while it is in
    the cache, and no second (V, D) tensor exists.
    """
    vocab_size = len(grad_weight_VD)
    step = SLICE_ENTRIES if logits_CV.device.type == "cpu" else vocab_size
    for start in range(0, vocab_size, step):
        target = grad_weight_VD[start : start + step]
        part = F.linear(logits_CV[:, start : start + len(target)].t(), rows_CD.t())
        target.copy_(part) if is_first else target.add_(part)


def _replacing(terms: Sequence[Term], temperature: float, rows_ND: torch.Tensor) -> Callable:
    return functools.partial(replace_by_gradient, terms=terms, temperature=temperature)


def replace_by_gradient(
    logits_CV, teacher_CV, first: int, terms: Sequence[Term], temperature: float
):
    """Apply the terms to a block of logits and write the total's gradient over them.

    Returns (weighted total, sums_K).
    """
    gradient_CV: torch.Tensor | None = None
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    total, sums = logits_CV.new_zeros((), dtype=wide), []
    nothing = total.clone()
    for term in terms:
        low, high = term.within(first, first + len(logits_CV))
        if high == low:
            sums.append(nothing)
            continue
        rows = term.select(low, high, logits_CV, teacher_CV, first)
        gradient = term.loss.gradient or functools.partial(gradient_by_autograd, term.loss.formula)
        value, part = gradient(*rows, temperature)
        total = total + value * term.weight
        sums.append(value)
        if high - low == len(logits_CV) and gradient_CV is None:
            gradient_CV = part.mul_(term.weight)
            continue
        gradient_CV = (
            torch.zeros_like(logits_CV, dtype=wide) if gradient_CV is None else gradient_CV
        )
        places = term.places(low, high, first)
        if isinstance(places, slice):
            gradient_CV[places] += part.mul_(term.weight)
        else:
            gradient_CV.index_add_(0, places, part.mul_(term.weight))
    logits_CV.zero_() if gradient_CV is None else logits_CV.copy_(gradient_CV)
    return total, torch.stack(sums)


def gradient_by_autograd(formula: Callable, student_CV, teacher_CV, labels_C, temperature: float):
    """Return (sum, gradient by the student's logits) of an objective that has no form for it."""
    teacher_CV = None if teacher_CV is None else at_least_float32(teacher_CV)
    with torch.enable_grad():
        leaf_CV = at_least_float32(student_CV.detach()).requires_grad_()
        value = formula(leaf_CV, teacher_CV, labels_C, temperature)
    return value.detach(), torch.autograd.grad(value, leaf_CV)[0]


def even_chunk_rows(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Return the rows of a chunk of the fast head: as few chunks as the limit admits, alike."""
    limit = rows_per_chunk(device_type)
    if device_type == "cuda":
        limit = max(CHUNK_LOGITS // vocab_size, 1)
    num_chunks = max(-(-num_rows // limit), 1)
    return max(-(-num_rows // num_chunks), 1)


# --------------------------------------------------------------------------------------------------
# Objectives fused by a compiler
# --------------------------------------------------------------------------------------------------


def partly_fused(terms: Sequence[Term], temperature: float, rows_ND: torch.Tensor) -> Callable:
    """Return `replace_by_gradient` with the terms that have a form for it in one compiled pass.

    Terms without that form cost a copy of the chunk's logits, and leave the others compiled.
    """
    has_form = [term.loss.by_row is not None for term in terms]
    plain = _replacing(
        [t for t, has in zip(terms, has_form, strict=True) if not has], temperature, rows_ND
    )
    if not any(has_form):
        return plain
    compiled = fused(
        [t for t, has in zip(terms, has_form, strict=True) if has], temperature, rows_ND
    )
    if all(has_form):
        return compiled
    order = torch.tensor(has_form).logical_not().sort(stable=True).indices.argsort().tolist()

    def replace(logits_CV, teacher_CV, first: int):
        gradient_CV = logits_CV.clone()
        plain_total, plain_sums_K = plain(gradient_CV, teacher_CV, first=first)
        total, sums_K = compiled(logits_CV, teacher_CV, first)
        logits_CV.add_(gradient_CV)
        return total + plain_total, torch.stack([*sums_K, *plain_sums_K])[order]

    return replace


def fused(terms: Sequence[Term], temperature: float, rows_ND: torch.Tensor) -> Callable:
    """Return `replace_by_gradient` as one compiled pass over the logits of any selected rows.

    Every objective is applied to every row, with weight 0 where the row is not its own: reading the
    logits costs more. Terms of one objective, of several micro-batches, share no row.
    """
    losses, rows = _by_objective(terms)
    shape, device = (len(losses), len(rows_ND)), rows_ND.device
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    weights_LN = torch.zeros(shape, dtype=wide, device=device)
    owners_LN = torch.full(shape, len(terms), device=device)  # of a row: a term, or none
    labels_LN = torch.zeros(shape, dtype=torch.int64, device=device)
    for k, (row, term) in enumerate(zip(rows, terms, strict=True)):
        is_tensor = isinstance(term.weight, torch.Tensor)
        weights_LN[row, term.rows_N] = term.weight.to(wide) if is_tensor else float(term.weight)
        owners_LN[row, term.rows_N] = k
        if term.labels_N is not None:
            labels_LN[row, term.rows_N] = term.labels_N
    by_row, has_one_each = tuple(loss.by_row for loss in losses), len(losses) == len(terms)

    def replace(logits_CV, teacher_CV, first: int):
        chunk = slice(first, first + len(logits_CV))
        owners_LC = owners_LN[:, chunk]
        of_chunk = labels_LN[:, chunk], weights_LN[:, chunk], owners_LC < len(terms)
        found = _compiled()(logits_CV, teacher_CV, *of_chunk, by_row, temperature, has_one_each)
        if not has_one_each:  # the losses of each row
            sums_K = found.new_zeros(len(terms) + 1).index_add_(
                0, owners_LC.flatten(), found.flatten()
            )
            return (found * weights_LN[:, chunk]).sum(), sums_K[:-1]
        weighted_K = [value * term.weight for value, term in zip(found, terms, strict=True)]
        return torch.stack(weighted_K).sum(), found

    return replace


def _by_objective(terms: Sequence[Term]) -> tuple[list[Loss], list[int]]:
    """Put consecutive terms of one objective that share no row together: (objectives, places)."""
    losses, places, end = [], [], 0
    for term in terms:
        start, own_end = term.bounds
        if not losses or term.loss != losses[-1] or start < min(end, own_end):
            losses.append(term.loss)
            end = 0
        end = max(end, own_end)
        places.append(len(losses) - 1)
    return losses, places


def _fused_terms(
    logits_CV, teacher_CV, labels_LC, weights_LC, is_own_LC, by_row: tuple, temperature: float, sums
) -> torch.Tensor:
    """Apply each objective to each row; write the total's gradient over the logits.

    Returns sums_L, or the losses of each row, (L, C), where sums is False.
    """
    student_CV = at_least_float32(logits_CV)
    teacher_CV = None if teacher_CV is None else at_least_float32(teacher_CV)
    gradient_CV, found = torch.zeros_like(student_CV), []
    for k, function in enumerate(by_row):
        losses_C, part_CV = function(student_CV, teacher_CV, labels_LC[k], temperature)
        losses_C = torch.where(is_own_LC[k], losses_C, 0.0)
        found.append(losses_C.sum() if sums else losses_C)
        weighted_CV = part_CV * weights_LC[k][:, None]
        gradient_CV = gradient_CV + torch.where(is_own_LC[k][:, None], weighted_CV, 0.0)
    logits_CV.copy_(gradient_CV)
    return torch.stack(found)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_fused_terms)
