"""The objectives of distillation: tensors in, scalars out.

One row of LOSSES is one objective; its `--alpha_x` flag, log tag, rows and inputs follow from the row. Objectives that
read logits are computed through `head_losses`, which projects the selected hidden states to the vocabulary chunk by
chunk and takes each chunk's gradient at once, so that no (N, V) tensor larger than a chunk exists.

Source: Sanh et al., 2019, "DistilBERT, a distilled version of BERT", section 3 (training loss); Hinton et al., 2015,
"Distilling the Knowledge in a Neural Network", section 2 (temperature and its square).

Shape suffixes: B sequences, T padded length, N selected positions, C positions of a chunk, V vocabulary, D width,
K active losses.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

# Rows of logits made at once. On a CPU a chunk should stay near the cache, and be large beside the (V, D) gradient
# that each chunk adds to; a GPU wants large products (4096 x 30522 in float32: 0.5 GB).
HEAD_CHUNK_ROWS = {"cpu": 320, "cuda": 4096}
# The fast head's: logits in a chunk (a matrix of 64 or 128 MB), and rows of it that a CPU works through in its cache.
CHUNK_LOGITS, BLOCK_ROWS = 2**25, 32
PADDED_VOCABULARY = 128  # GPUs' matrix units take dimensions that are multiples of it
IGNORED_LABEL = -100


# --------------------------------------------------------------------------------------------------------------------
# Formulas. Each returns a sum over its rows; the mean is taken by whoever knows the count.
# --------------------------------------------------------------------------------------------------------------------


def kl_divergence(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    """Sum T^2 KL(softmax(t / T) || softmax(s / T)) over N rows; natural log. T^2 keeps gradients' size (Hinton, 2)."""
    student_log_probs_NV = F.log_softmax(student_NV / temperature, dim=-1)
    teacher_log_probs_NV = F.log_softmax(teacher_NV / temperature, dim=-1)
    return F.kl_div(student_log_probs_NV, teacher_log_probs_NV, reduction="sum", log_target=True) * temperature**2


def cross_entropy(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    """Sum -log softmax(s)[label] over N rows; neither the teacher nor the temperature enters."""
    return F.cross_entropy(student_NV, labels_N, reduction="sum")


def squared_error(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    """Sum (s - t)^2 over N rows and the vocabulary."""
    return (student_NV - teacher_NV).square().sum()


def cosine_distance(student_ND, teacher_ND, labels_N, temperature: float) -> torch.Tensor:
    """Sum 1 - cos(h_s, h_t) over N rows of last hidden states; 1e-12 is added to each squared norm."""
    ones_N = student_ND.new_ones(len(student_ND))
    return F.cosine_embedding_loss(student_ND, teacher_ND, ones_N, reduction="sum")


# --------------------------------------------------------------------------------------------------------------------
# The same with their gradients by hand: (sum, gradient with respect to the student's logits). They may overwrite nothing.
# --------------------------------------------------------------------------------------------------------------------


def kl_divergence_gradient(student_NV, teacher_NV, labels_N, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of kl_divergence: T (softmax(s / T) - softmax(t / T)) (Hinton et al., 2015, section 2.1)."""
    student_log_probs_NV = F.log_softmax(student_NV / temperature, dim=-1)
    teacher_log_probs_NV = F.log_softmax(teacher_NV / temperature, dim=-1)
    teacher_NV = teacher_log_probs_NV.exp()
    total = torch.dot(teacher_NV.flatten(), teacher_log_probs_NV.sub_(student_log_probs_NV).flatten()) * temperature**2
    return total, student_log_probs_NV.exp_().sub_(teacher_NV).mul_(temperature)


def cross_entropy_gradient(student_NV, teacher_NV, labels_N, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of cross_entropy: softmax(s) - onehot(label)."""
    log_probs_NV = F.log_softmax(student_NV, dim=-1)
    total = -log_probs_NV.gather(1, labels_N[:, None]).sum()
    gradient_NV = log_probs_NV.exp_()
    gradient_NV.scatter_add_(1, labels_N[:, None], gradient_NV.new_full((len(labels_N), 1), -1.0))
    return total, gradient_NV


def squared_error_gradient(student_NV, teacher_NV, labels_N, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of squared_error: 2 (s - t)."""
    difference_NV = student_NV - teacher_NV
    return difference_NV.square().sum(), difference_NV.mul_(2)


@dataclasses.dataclass(frozen=True)
class Loss:
    """One objective: a formula, what it reads, and where.

    gradient: the formula's sum with its gradient by the student's logits; None: autograd finds it, a block at a time.
    reads: "logits" or "hidden" (last hidden states).
    rows: "distilled" (real tokens, or masked positions only with --restrict_ce_to_mask), "real" (every real token),
        "masked" (positions drawn for masked-LM) or "next" (positions whose next token is real).
    needs_teacher: False where the teacher need not run for it.
    default_alpha: the default of its flag; help: one line for the command line.
    """

    formula: Callable[..., torch.Tensor]
    reads: str
    rows: str
    needs_teacher: bool
    default_alpha: float
    help: str
    gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        kl_divergence, "logits", "distilled", True, 0.5, "KL divergence to the teacher's distribution", kl_divergence_gradient
    ),
    "mlm": Loss(
        cross_entropy, "logits", "masked", False, 0.0, "masked-language-model loss; needs --mlm", cross_entropy_gradient
    ),
    "clm": Loss(
        cross_entropy, "logits", "next", False, 0.5, "causal-language-model loss; not with --mlm", cross_entropy_gradient
    ),
    "mse": Loss(squared_error, "logits", "distilled", True, 0.0, "squared error of the logits", squared_error_gradient),
    "cos": Loss(cosine_distance, "hidden", "real", True, 0.0, "cosine distance of the last hidden states"),
}


# --------------------------------------------------------------------------------------------------------------------
# From rows to a loss
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
    """One active objective of one micro-batch.

    rows_N: ascending positions, on the device, into the rows that are handed in; offsets: the same on the host, so
        that cutting chunks never waits for the device. labels_N: one a row, only where the formula reads them.
    weight: what its sum is multiplied by in the total: alpha / count x the update's scale (a number, or a scalar
        tensor on the device when a gradient scaler provides it).
    """

    formula: Callable[..., torch.Tensor]
    rows_N: torch.Tensor
    offsets: torch.Tensor
    labels_N: torch.Tensor | None
    weight: float | torch.Tensor
    gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Return which of its rows are rows first .. last of the selection, as a range of places."""
        low, high = torch.searchsorted(self.offsets, torch.tensor([first, last])).tolist()
        return low, high


def weighted_sums(student_CX, teacher_CX, terms: Sequence[Term], temperature: float, first: int = 0):
    """Apply each term to rows first .. first + C of the selection: (weighted total, unweighted sums_K).

    The plain version: given every row at once it is the reference that `head_losses` is tested against. A term that
    has no row here contributes 0.
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


def _term_sum(term: Term, low: int, high: int, student_CX, teacher_CX, temperature: float, first: int) -> torch.Tensor:
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
    """Project N selected hidden states and apply the terms: (weighted total, sums_K), without an (N, V) tensor.

    Forward goes chunk by chunk: both projections, every term, and at once the gradient with respect to the chunk's
    hidden states and to `head_parameters`, which backward only scales. Logits are float32 or wider inside the terms,
    whatever precision the projection runs in.
    """

    def chunk_loss(hidden_CD: torch.Tensor, first: int):
        student_CV = at_least_float32(student_head(hidden_CD))
        teacher_CV = None
        if teacher_head is not None:
            with torch.no_grad():
                teacher_CV = at_least_float32(teacher_head(teacher_ND[first : first + len(hidden_CD)]))
        return weighted_sums(student_CV, teacher_CV, terms, temperature, first)

    return _ChunkedHead.apply(chunk_loss, chunk_rows, len(terms), student_ND, *head_parameters)


# --------------------------------------------------------------------------------------------------------------------
# The fast head: the last linear map by hand, 4 matrix products and one pass over each chunk of logits
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear map to the vocabulary. rows_ND: what it is applied to; weight_VD, bias_V (or None): its parameters."""

    rows_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    def prepared(self, dtype: torch.dtype) -> "Projection":
        """Return it in the precision of the matrix products; for a GPU's matrix units V is filled up to a multiple of 128.

        Filling is exact: the rows added are zeros, and so are the logits, whose columns the objectives never see.
        """
        given = self.rows_ND, self.weight_VD, self.bias_V
        rows, weight, bias = (None if tensor is None else tensor.detach().to(dtype) for tensor in given)
        missing = -len(weight) % PADDED_VOCABULARY if weight.device.type == "cuda" and dtype.itemsize == 2 else 0
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        return Projection(rows, weight, bias)

    def logits(self, first: int, last: int) -> torch.Tensor:
        """Project rows first .. last: (C, V), V filled up."""
        return F.linear(self.rows_ND[first:last], self.weight_VD, self.bias_V)


def projected_losses(
    student: Projection, teacher: Projection | None, terms: Sequence[Term], temperature: float, chunk_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project N selected rows and apply the terms: (weighted total, sums_K), as `head_losses` does, faster.

    A chunk of logits is made, read once, and overwritten by the gradient of the total, from which the gradients of rows
    and weights follow: 8 D V operations a row, and no tensor of N x V. Matrix products run in autocast's precision where
    that is on; the objectives in float32 or wider.
    """
    parameters = [student.rows_ND, student.weight_VD, student.bias_V]
    return _ProjectedLosses.apply(teacher, terms, temperature, chunk_rows, *parameters)


def _products_dtype(like: torch.Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


class _ProjectedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, terms, temperature, chunk_rows, rows_ND, weight_VD, bias_V):
        student = Projection(rows_ND, weight_VD, bias_V)
        dtype = _products_dtype(rows_ND)
        with torch.autocast(rows_ND.device.type, enabled=False):
            total, sums_K, grads = _walk_chunks(
                student, student.prepared(dtype), None if teacher is None else teacher.prepared(dtype), terms, temperature,
                chunk_rows or max(CHUNK_LOGITS // len(weight_VD), 1), ctx.needs_input_grad[5:],
            )  # fmt: skip
        ctx.grads = grads
        ctx.mark_non_differentiable(sums_K)
        return total, sums_K

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        return None, None, None, None, *_taken_and_scaled(ctx, grad_total)


def _walk_chunks(original: Projection, student: Projection, teacher, terms, temperature, chunk_rows: int, wants_grad):
    """Make loss and gradients chunk by chunk: (total, sums_K, [grad_rows, grad_weight or None, grad_bias or None])."""
    rows_ND, weight_VD, bias_V = original.rows_ND, original.weight_VD, original.bias_V
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    total, sums_K = rows_ND.new_zeros((), dtype=wide), rows_ND.new_zeros(len(terms), dtype=wide)
    grad_rows_ND = torch.empty_like(rows_ND)
    grad_weight_VD = torch.zeros_like(weight_VD) if wants_grad[0] else None
    grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None and wants_grad[1] else None
    num_rows, vocab_size = len(rows_ND), len(weight_VD)
    for first in range(0, num_rows, chunk_rows):
        last = min(first + chunk_rows, num_rows)
        logits_CV = student.logits(first, last)
        teacher_CV = None if teacher is None else teacher.logits(first, last)
        block_rows = BLOCK_ROWS if logits_CV.device.type == "cpu" else last - first
        for start in range(first, last, block_rows):
            block = slice(start - first, min(start + block_rows, last) - first)
            teacher_block = None if teacher_CV is None else at_least_float32(teacher_CV[block, :vocab_size])
            block_total, block_sums_K = _overwrite_by_gradient(
                logits_CV[block, :vocab_size], teacher_block, terms, temperature, start
            )
            total += block_total
            sums_K += block_sums_K
        grad_rows_ND[first:last] = logits_CV @ student.weight_VD
        if grad_weight_VD is not None:
            grad_weight_VD += (logits_CV.t() @ student.rows_ND[first:last])[:vocab_size]
        if grad_bias_V is not None:
            grad_bias_V += logits_CV[:, :vocab_size].sum(0, dtype=wide)
    return total, sums_K, [grad_rows_ND, grad_weight_VD, grad_bias_V]


def _overwrite_by_gradient(logits_CV, teacher_CV, terms: Sequence[Term], temperature: float, first: int):
    """Apply the terms to a block of logits and put the total's gradient in their place: (weighted total, sums_K)."""
    student_CV = at_least_float32(logits_CV)
    gradient_CV: torch.Tensor | None = None
    total, sums = student_CV.new_zeros(()), []
    for term in terms:
        low, high = term.within(first, first + len(student_CV))
        if high == low:
            sums.append(total.new_zeros(()))
            continue
        value, part = _sum_and_gradient(term, low, high, student_CV, teacher_CV, temperature, first)
        total = total + value * term.weight
        sums.append(value)
        if high - low == len(student_CV) and gradient_CV is None:
            gradient_CV = part.mul_(term.weight)
            continue
        gradient_CV = torch.zeros_like(student_CV) if gradient_CV is None else gradient_CV
        gradient_CV.index_add_(0, term.rows_N[low:high] - first, part.mul_(term.weight))
    logits_CV.zero_() if gradient_CV is None else logits_CV.copy_(gradient_CV)
    return total, torch.stack(sums)


def _sum_and_gradient(term: Term, low: int, high: int, student_CV, teacher_CV, temperature: float, first: int):
    student_CV, teacher_CV, labels = _rows_of(term, low, high, student_CV, teacher_CV, first)
    if term.gradient is not None:
        return term.gradient(student_CV, teacher_CV, labels, temperature)
    with torch.enable_grad():
        leaf_CV = student_CV.detach().requires_grad_()
        value = term.formula(leaf_CV, teacher_CV, labels, temperature)
    return value.detach(), torch.autograd.grad(value, leaf_CV)[0]


def _taken_and_scaled(ctx, grad_total: torch.Tensor) -> list[torch.Tensor | None]:
    """Scale the gradients that forward made, in place: a copy of the (V, D) gradient is saved."""
    grads, ctx.grads = ctx.grads, None
    assert grads is not None, "a second backward through a chunked head is not supported"
    return [None if grad is None else grad.mul_(grad_total) for grad in grads]


def rows_per_chunk(device_type: str) -> int:
    """Return how many rows of logits make a chunk on a device."""
    return HEAD_CHUNK_ROWS.get(device_type, HEAD_CHUNK_ROWS["cpu"])


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Widen half precision to float32, which sums and logarithms need; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _ChunkedHead(torch.autograd.Function):
    """Sum chunk_loss over chunks of rows; the gradients are made in forward, while a chunk's logits are at hand."""

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
            for target, grad in zip([grad_hidden_ND[first : first + chunk_rows], *grads], chunk_grads, strict=True):
                if grad is not None:
                    target += grad
        by_parameter = iter(grads)
        ctx.grads = [grad_hidden_ND, *(next(by_parameter) if p.requires_grad else None for p in parameters)]
        ctx.mark_non_differentiable(sums_K)
        return total, sums_K

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        return None, None, None, *_taken_and_scaled(ctx, grad_total)
