"""The prediction head with the objectives on its logits, chunk by chunk: no (N, V) tensor exists.

`head_losses` is the plain version: autograd, any head; the reference. `projected_losses` is the
fast one: the last linear map by hand, 4 matrix products and one pass over each chunk of logits.

Shape suffixes: N selected positions, C positions of a chunk, V vocabulary, D width, K terms, L
objectives. A teacher may have logits for the first entries of the V only: see distil/losses.py.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from distil.kernels.cpu import wide_layer_norms
from distil.kernels.logit_gradients import partly_fused, replacing
from distil.kernels.terms import Term
from distil.losses import at_least_float32
from distil.models.heads import Head

# Rows of logits in a chunk: of the plain head, and on a CPU of the fast one. There it should be
# small in memory, and large beside the (V, D) gradient that it adds to.
HEAD_CHUNK_ROWS = {"cpu": 320, "cuda": 4096}
# On a GPU a chunk of the fast head takes what memory allows: each reads and writes the (V, D)
# gradient, and large products are faster. Eager objectives make float32 copies of the logits.
MEMORY_SHARE, ROWS_MULTIPLE = 1 / 16, 64
EAGER_BYTES = 24  # a logit, beside those of student and teacher
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
        given = num_rows, vocab_size, dtype, rows_ND.device, compiles
        chunk_rows = chunk_rows or _chunk_rows(*given)
        block_rows = BLOCK_ROWS if kind == "cpu" else chunk_rows
        teacher_size = 0 if teacher is None else len(teacher.weight_VD)
        with torch.autocast(kind, enabled=False):
            student = Projection(rows_ND, weight_VD, bias_V).prepared(dtype)
            teacher = None if teacher is None else teacher.prepared(dtype)
            of_all = terms, temperature
            replace = partly_fused(*of_all, rows_ND) if compiles else replacing(*of_all)
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


def even_chunk_rows(num_rows: int, limit: int, multiple: int = 1) -> int:
    """Return the rows of a chunk: as few chunks as the limit admits, alike, rounded up."""
    num_chunks = max(-(-num_rows // limit), 1)
    return max(-(-num_rows // (num_chunks * multiple)) * multiple, 1)


def gpu_chunk_limit(vocab_size: int, itemsize: int, compiles: bool, gpu_bytes: int) -> int:
    """Return the most rows of a chunk of the fast head on a GPU with that memory.

    itemsize: bytes of a logit of the products.
    """
    bytes_a_row = vocab_size * (2 * itemsize + (0 if compiles else EAGER_BYTES))
    rows = int(gpu_bytes * MEMORY_SHARE) // bytes_a_row
    return max(rows // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE


def _chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, device, compiles: bool) -> int:
    """Choose the rows of a chunk of the fast head."""
    if device.type != "cuda":
        return even_chunk_rows(num_rows, rows_per_chunk(device.type))
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory
    limit = gpu_chunk_limit(vocab_size, dtype.itemsize, compiles, gpu_bytes)
    return even_chunk_rows(num_rows, limit, ROWS_MULTIPLE)
