"""The prediction head and the objectives on its logits, chunk by chunk: no (N, V) tensor exists.

`head_losses` is the plain version: autograd, any head. `projected_losses` is the fast one: the last
linear map by hand, 4 matrix products and one pass over each chunk of logits.

Shape suffixes: N selected positions, C positions of a chunk, V vocabulary, D width, K active
losses.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from distil.losses import at_least_float32

# Rows of logits made at once. On a CPU a chunk should be small in memory, and large beside the (V,
# D) gradient that each chunk adds to; a GPU wants large products (4096 x 30522 in float32: 0.5 GB).
HEAD_CHUNK_ROWS = {"cpu": 320, "cuda": 4096}


# The fast head's on a GPU: logits in a chunk (a matrix of 64 or 128 MB).
CHUNK_LOGITS = 2**25


# On a CPU: rows of a chunk, and entries of the vocabulary, that are worked through in the cache.
BLOCK_ROWS, SLICE_ENTRIES = 32, 4096


PADDED_VOCABULARY = 128  # GPUs' matrix units take dimensions that are multiples of it


@dataclasses.dataclass(frozen=True)
class Term:
    """One active objective of one micro-batch.

    rows_N: ascending positions, on the device, into the rows that are handed in; offsets: the same
        on the host, so that cutting chunks never waits for the device. labels_N: one a row, only
        where the formula reads them.
    weight: what its sum is multiplied by in the total: alpha / count x the update's scale (a
        number, or a scalar tensor on the device when a gradient scaler provides it).
    """

    formula: Callable[..., torch.Tensor]
    rows_N: torch.Tensor
    offsets: torch.Tensor
    labels_N: torch.Tensor | None
    weight: float | torch.Tensor
    gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    by_row: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Return which of its rows are rows first .. last of the selection, as a range of
        places.
        """
        low, high = torch.searchsorted(self.offsets, torch.tensor([first, last])).tolist()
        return low, high


def weighted_sums(
    student_CX, teacher_CX, terms: Sequence[Term], temperature: float, first: int = 0
):
    """Apply each term to rows first .. first + C of the selection: (weighted total, unweighted
    sums_K).

    The plain version: given every row at once it is the reference that `head_losses` is tested
    against. A term that has no row here contributes 0.
    """
    total = student_CX[:0].sum()  # 0 with a zero gradient, also where no term has a row
    sums = []
    for term in terms:
        low, high = term.within(first, first + len(student_CX))
        value = total.new_zeros(())
        if high > low:
            value = _term_sum(term, low, high, student_CX, teacher_CX, temperature, first)
            total = total + value * term.weight
        sums.append(value.detach())
    return total, torch.stack(sums)


def _term_sum(
    term: Term, low: int, high: int, student_CX, teacher_CX, temperature: float, first: int
) -> torch.Tensor:
    return term.formula(*_rows_of(term, low, high, student_CX, teacher_CX, first), temperature)


def _rows_of(term: Term, low: int, high: int, student_CX, teacher_CX, first: int):
    """Select what a term reads of rows first .. first + C: (student, teacher, labels)."""
    labels = None if term.labels_N is None else term.labels_N[low:high]
    if high - low < len(student_CX):  # a gather copies: only where the term leaves rows out
        rows = term.rows_N[low:high] - first
        student_CX = student_CX[rows]
        teacher_CX = None if teacher_CX is None else teacher_CX[rows]
    return student_CX, teacher_CX, labels


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
    """Project N selected hidden states and apply the terms: (weighted total, sums_K), without an
    (N, V) tensor.

    Forward goes chunk by chunk: both projections, every term, and at once the gradient with respect
    to the chunk's hidden states and to `head_parameters`, which backward only scales. Logits are
    float32 or wider inside the terms, whatever precision the projection runs in.
    """

    def chunk_loss(hidden_CD: torch.Tensor, first: int):
        student_CV = at_least_float32(student_head(hidden_CD))
        teacher_CV = None
        if teacher_head is not None:
            with torch.no_grad():
                teacher_CV = at_least_float32(
                    teacher_head(teacher_ND[first : first + len(hidden_CD)])
                )
        return weighted_sums(student_CV, teacher_CV, terms, temperature, first)

    return _ChunkedHead.apply(chunk_loss, chunk_rows, len(terms), student_ND, *head_parameters)


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear map to the vocabulary. rows_ND: what it is applied to; weight_VD, bias_V (or None):
    its parameters.
    """

    rows_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    def prepared(self, dtype: torch.dtype) -> "Projection":
        """Return it in the precision of the matrix products; for a GPU's matrix units V is filled
        up to a multiple of 128.

        Filling is exact: the rows added are zeros, and so are the logits, whose columns the
        objectives never see.
        """
        given = self.rows_ND, self.weight_VD, self.bias_V
        rows, weight, bias = (
            None if tensor is None else tensor.detach().to(dtype) for tensor in given
        )
        missing = (
            -len(weight) % PADDED_VOCABULARY
            if weight.device.type == "cuda" and dtype.itemsize == 2
            else 0
        )
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        return Projection(rows, weight, bias)

    def logits(self, first: int, last: int) -> torch.Tensor:
        """Project rows first .. last: (C, V), V filled up."""
        return F.linear(self.rows_ND[first:last], self.weight_VD, self.bias_V)


def projected_losses(
    student: Projection,
    teacher: Projection | None,
    terms: Sequence[Term],
    temperature: float,
    chunk_rows: int | None = None,
    compiles: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project N selected rows and apply the terms: (weighted total, sums_K), as `head_losses` does,
    faster.

    A chunk of logits is made, read once, and overwritten by the gradient of the total, from which
    the gradients of rows and weights follow: 8 D V operations a row, and no tensor of N x V. Matrix
    products run in autocast's precision where that is on; the objectives in float32 or wider.
    compiles: join the element-wise operations of the objectives that have a form for it by
    torch.compile.
    """
    parameters = [student.rows_ND, student.weight_VD, student.bias_V]
    return _ProjectedLosses.apply(teacher, terms, temperature, chunk_rows, compiles, *parameters)


def _products_dtype(like: torch.Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


class _ProjectedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, terms, temperature, chunk_rows, compiles, rows_ND, weight_VD, bias_V):
        student = Projection(rows_ND, weight_VD, bias_V)
        dtype = _products_dtype(rows_ND)
        with torch.autocast(rows_ND.device.type, enabled=False):
            if compiles:
                overwrite = partly_joined(terms, temperature, rows_ND)
            else:
                overwrite = functools.partial(
                    _overwrite_by_gradient, terms=terms, temperature=temperature
                )
            total, sums_K, grads = _walk_chunks(
                student,
                student.prepared(dtype),
                None if teacher is None else teacher.prepared(dtype),
                overwrite,
                len(terms),
                chunk_rows or even_chunk_rows(len(rows_ND), len(weight_VD), rows_ND.device.type),
                ctx.needs_input_grad[6:],
            )
        ctx.grads = grads
        ctx.mark_non_differentiable(sums_K)
        return total, sums_K

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        return None, None, None, None, None, *_taken_and_scaled(ctx, grad_total)


def _walk_chunks(
    original: Projection,
    student: Projection,
    teacher,
    overwrite,
    num_terms: int,
    chunk_rows: int,
    wants_grad,
):
    """Make loss and gradients chunk by chunk: (total, sums_K, [grad_rows, grad_weight or None,
    grad_bias or None]).
    """
    rows_ND, weight_VD, bias_V = original.rows_ND, original.weight_VD, original.bias_V
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    total, sums_K = rows_ND.new_zeros((), dtype=wide), rows_ND.new_zeros(num_terms, dtype=wide)
    grad_rows_ND = torch.empty_like(rows_ND)
    num_rows, vocab_size = len(rows_ND), len(weight_VD)
    # Not zeroed where the first chunk fills it: zeros are as much to write as a gradient.
    grad_weight_VD = (
        (torch.empty_like if num_rows else torch.zeros_like)(weight_VD) if wants_grad[0] else None
    )
    grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None and wants_grad[1] else None
    for first in range(0, num_rows, chunk_rows):
        last = min(first + chunk_rows, num_rows)
        logits_CV, chunk_total, chunk_sums_K = _chunk_gradient(
            student, teacher, overwrite, first, last, vocab_size
        )
        total += chunk_total
        sums_K += chunk_sums_K
        # As linear maps, which `cpu_kernels` makes faster on a CPU.
        grad_rows_ND[first:last] = F.linear(logits_CV, student.weight_VD.t())
        if grad_weight_VD is not None:
            _take_product(
                grad_weight_VD, logits_CV, student.rows_ND[first:last], is_first=first == 0
            )
        if grad_bias_V is not None:
            grad_bias_V += logits_CV[:, :vocab_size].sum(0, dtype=wide)
    return total, sums_K, [grad_rows_ND, grad_weight_VD, grad_bias_V]


def _chunk_gradient(
    student: Projection, teacher, overwrite, first: int, last: int, vocab_size: int
):
    """Make the gradient by the logits of rows first .. last: (gradient (C, V), V filled up,
    weighted total, sums_K).
    """
    logits_CV = student.logits(first, last)
    teacher_CV = None if teacher is None else teacher.logits(first, last)
    block_rows = BLOCK_ROWS if logits_CV.device.type == "cpu" else last - first
    found = []
    for start in range(first, last, block_rows):
        block = slice(start - first, min(start + block_rows, last) - first)
        teacher_block = None if teacher_CV is None else teacher_CV[block, :vocab_size]
        found.append(overwrite(logits_CV[block, :vocab_size], teacher_block, first=start))
    totals, sums = zip(*found, strict=True)
    return logits_CV, torch.stack(totals).sum(), torch.stack(sums).sum(0)


def _take_product(grad_weight_VD: torch.Tensor, logits_CV, rows_CD, is_first: bool) -> None:
    """Put a chunk's part of the gradient by the projection's weights in place (is_first), or add
    it.

    On a CPU some entries of the vocabulary at a time: a part in half precision is widened while it
    is in the cache, and no second (V, D) tensor exists.
    """
    vocab_size = len(grad_weight_VD)
    step = SLICE_ENTRIES if logits_CV.device.type == "cpu" else vocab_size
    for start in range(0, vocab_size, step):
        target = grad_weight_VD[start : start + step]
        part = F.linear(logits_CV[:, start : start + len(target)].t(), rows_CD.t())
        target.copy_(part) if is_first else target.add_(part)


def _overwrite_by_gradient(
    logits_CV, teacher_CV, first: int, terms: Sequence[Term], temperature: float
):
    """Apply the terms to a block of logits and put the total's gradient in their place: (weighted
    total, sums_K).
    """
    gradient_CV: torch.Tensor | None = None
    total, sums = (
        logits_CV.new_zeros((), dtype=torch.promote_types(logits_CV.dtype, torch.float32)),
        [],
    )
    for term in terms:
        low, high = term.within(first, first + len(logits_CV))
        if high == low:
            sums.append(total.new_zeros(()))
            continue
        value, part = _sum_and_gradient(term, low, high, logits_CV, teacher_CV, temperature, first)
        total = total + value * term.weight
        sums.append(value)
        if high - low == len(logits_CV) and gradient_CV is None:
            gradient_CV = part.mul_(term.weight)
            continue
        gradient_CV = (
            torch.zeros_like(logits_CV, dtype=total.dtype) if gradient_CV is None else gradient_CV
        )
        gradient_CV.index_add_(0, term.rows_N[low:high] - first, part.mul_(term.weight))
    logits_CV.zero_() if gradient_CV is None else logits_CV.copy_(gradient_CV)
    return total, torch.stack(sums)


def _sum_and_gradient(
    term: Term, low: int, high: int, student_CV, teacher_CV, temperature: float, first: int
):
    student_CV, teacher_CV, labels = _rows_of(term, low, high, student_CV, teacher_CV, first)
    if term.gradient is not None:
        return term.gradient(student_CV, teacher_CV, labels, temperature)
    teacher_CV = None if teacher_CV is None else at_least_float32(teacher_CV)
    with torch.enable_grad():
        leaf_CV = at_least_float32(student_CV.detach()).requires_grad_()
        value = term.formula(leaf_CV, teacher_CV, labels, temperature)
    return value.detach(), torch.autograd.grad(value, leaf_CV)[0]


def partly_joined(terms: Sequence[Term], temperature: float, rows_ND: torch.Tensor) -> Callable:
    """Return what `_overwrite_by_gradient` does: one compiled pass for the terms that have a form
    for it, the others after it.

    One without that form costs a copy of the chunk's logits, and leaves the rest compiled.
    """
    places = {
        has_form: [k for k, t in enumerate(terms) if (t.by_row is not None) == has_form]
        for has_form in (True, False)
    }
    with_form, without = ([terms[k] for k in places[has_form]] for has_form in (True, False))
    plain = functools.partial(_overwrite_by_gradient, terms=without, temperature=temperature)
    if not without or not with_form:
        return joined(terms, temperature, rows_ND) if with_form else plain
    compiled = joined(with_form, temperature, rows_ND)

    def overwrite(logits_CV, teacher_CV, first: int):
        gradient_CV = logits_CV.clone()
        plain_total, plain_sums_K = plain(gradient_CV, teacher_CV, first=first)
        total, sums_K = compiled(logits_CV, teacher_CV, first)
        logits_CV.add_(gradient_CV)
        order = torch.tensor([*places[True], *places[False]]).argsort().tolist()
        return total + plain_total, torch.stack([*sums_K, *plain_sums_K])[order]

    return overwrite


def joined(terms: Sequence[Term], temperature: float, rows_ND: torch.Tensor) -> Callable:
    """Return what `_overwrite_by_gradient` does, as one compiled pass over the logits of any of N
    selected rows.

    Every term is applied to every row, with weight 0 where the row is not its own: reading the
    logits costs more.
    """
    num_rows, device = len(rows_ND), rows_ND.device
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    weights_KN = torch.zeros(len(terms), num_rows, dtype=wide, device=device)
    is_own_KN = torch.zeros(len(terms), num_rows, dtype=torch.bool, device=device)
    labels_KN = torch.zeros(len(terms), num_rows, dtype=torch.int64, device=device)
    for k, term in enumerate(terms):
        weights_KN[k, term.rows_N] = (
            term.weight.to(wide) if isinstance(term.weight, torch.Tensor) else float(term.weight)
        )
        is_own_KN[k, term.rows_N] = True
        if term.labels_N is not None:
            labels_KN[k, term.rows_N] = term.labels_N
    by_row = tuple(term.by_row for term in terms)

    def overwrite(logits_CV, teacher_CV, first: int):
        chunk = slice(first, first + len(logits_CV))
        sums_K = _compiled()(
            logits_CV,
            teacher_CV,
            labels_KN[:, chunk],
            weights_KN[:, chunk],
            is_own_KN[:, chunk],
            by_row,
            temperature,
        )
        weighted_K = [value * term.weight for value, term in zip(sums_K, terms, strict=True)]
        return torch.stack(weighted_K).sum(), sums_K

    return overwrite


def _joined_terms(
    logits_CV, teacher_CV, labels_KC, weights_KC, is_own_KC, by_row: tuple, temperature: float
) -> torch.Tensor:
    """Apply each term to each row; put the total's gradient in the logits' place: sums_K."""
    student_CV = at_least_float32(logits_CV)
    teacher_CV = None if teacher_CV is None else at_least_float32(teacher_CV)
    gradient_CV, sums = torch.zeros_like(student_CV), []
    for k, function in enumerate(by_row):
        losses_C, part_CV = function(student_CV, teacher_CV, labels_KC[k], temperature)
        sums.append(torch.where(is_own_KC[k], losses_C, 0.0).sum())
        gradient_CV = gradient_CV + torch.where(
            is_own_KC[k][:, None], part_CV * weights_KC[k][:, None], 0.0
        )
    logits_CV.copy_(gradient_CV)
    return torch.stack(sums)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_joined_terms)


def _taken_and_scaled(ctx, grad_total: torch.Tensor) -> list[torch.Tensor | None]:
    """Scale the gradients that forward made, in place: a copy of the (V, D) gradient is saved."""
    grads, ctx.grads = ctx.grads, None
    assert grads is not None, "a second backward through a chunked head is not supported"
    return [None if grad is None else grad.mul_(grad_total) for grad in grads]


def rows_per_chunk(device_type: str) -> int:
    """Return how many rows of logits make a chunk on a device."""
    return HEAD_CHUNK_ROWS.get(device_type, HEAD_CHUNK_ROWS["cpu"])


def even_chunk_rows(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Return how many rows make a chunk of the fast head: as few chunks as the limit admits, of
    like size.
    """
    limit = (
        max(CHUNK_LOGITS // vocab_size, 1) if device_type == "cuda" else rows_per_chunk(device_type)
    )
    num_chunks = max(-(-num_rows // limit), 1)
    return max(-(-num_rows // num_chunks), 1)


class _ChunkedHead(torch.autograd.Function):
    """Sum chunk_loss over chunks of rows; the gradients are made in forward, while a chunk's logits
    are at hand.
    """

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
            for target, grad in zip(
                [grad_hidden_ND[first : first + chunk_rows], *grads], chunk_grads, strict=True
            ):
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
        return None, None, None, *_taken_and_scaled(ctx, grad_total)
