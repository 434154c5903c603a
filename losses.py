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


@dataclasses.dataclass(frozen=True)
class Loss:
    """One objective: a formula, what it reads, and where.

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


LOSSES: dict[str, Loss] = {
    "ce": Loss(kl_divergence, "logits", "distilled", True, 0.5, "KL divergence to the teacher's distribution"),
    "mlm": Loss(cross_entropy, "logits", "masked", False, 0.0, "masked-language-model loss; needs --mlm"),
    "clm": Loss(cross_entropy, "logits", "next", False, 0.5, "causal-language-model loss; not with --mlm"),
    "mse": Loss(squared_error, "logits", "distilled", True, 0.0, "squared error of the logits"),
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


def weighted_sums(student_CX, teacher_CX, terms: Sequence[Term], temperature: float, first: int = 0):
    """Apply each term to rows first .. first + C of the selection: (weighted total, unweighted sums_K).

    The plain version: given every row at once it is the reference that `head_losses` is tested against. A term that
    has no row here contributes 0.
    """
    total = student_CX[:0].sum()  # 0 with a zero gradient, also where no term has a row
    sums = []
    for term in terms:
        low, high = torch.searchsorted(term.offsets, torch.tensor([first, first + len(student_CX)])).tolist()
        value = total.new_zeros(())
        if high > low:
            value = _term_sum(term, low, high, student_CX, teacher_CX, temperature, first)
            total = total + value * term.weight
        sums.append(value.detach())
    return total, torch.stack(sums)


def _term_sum(term: Term, low: int, high: int, student_CX, teacher_CX, temperature: float, first: int) -> torch.Tensor:
    labels = None if term.labels_N is None else term.labels_N[low:high]
    if high - low < len(student_CX):  # a gather copies: only where the term leaves rows out
        rows = term.rows_N[low:high] - first
        student_CX = student_CX[rows]
        teacher_CX = None if teacher_CX is None else teacher_CX[rows]
    return term.formula(student_CX, teacher_CX, labels, temperature)


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
        grads, ctx.grads = ctx.grads, None  # scaled in place: a copy of the (V, D) gradient is saved
        assert grads is not None, "a second backward through head_losses is not supported"
        return None, None, None, *(None if grad is None else grad.mul_(grad_total) for grad in grads)
