"""How a chunk of logits becomes the gradient of the weighted objectives, in the chunk's own memory.

`replace_by_gradient` applies one term after the other; `partly_fused` compiles the objectives that
have a form for it to one pass over the logits. distil/kernels/head.py makes the chunks.

Shape suffixes: N selected positions, C positions of a chunk, V vocabulary, L objectives, K terms.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from distil.data.batches import sent
from distil.kernels.terms import Term
from distil.losses import at_least_float32
from distil.objectives import Loss


def replacing(terms: Sequence[Term], temperature: float) -> Callable:
    """Return `replace_by_gradient` for these terms."""
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


# --------------------------------------------------------------------------------------------------
# Objectives fused by a compiler
# --------------------------------------------------------------------------------------------------


def partly_fused(terms: Sequence[Term], temperature: float, rows_ND: torch.Tensor) -> Callable:
    """Return `replace_by_gradient` with the terms that have a form for it in one compiled pass.

    Terms without that form cost a copy of the chunk's logits, and leave the others compiled.
    """
    has_form = [term.loss.by_row is not None for term in terms]
    plain = replacing([term for term in terms if term.loss.by_row is None], temperature)
    if not any(has_form):
        return plain
    with_form = [term for term in terms if term.loss.by_row is not None]
    compiled = fused(with_form, temperature, rows_ND)
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
    losses, weights_LN, owners_LN, labels_LN = _by_row(terms, rows_ND)
    by_row, has_one_each = tuple(loss.by_row for loss in losses), len(losses) == len(terms)

    def replace(logits_CV, teacher_CV, first: int):
        chunk = slice(first, first + len(logits_CV))
        owners_LC = owners_LN[:, chunk].contiguous()
        given = labels_LN[:, chunk].contiguous(), weights_LN[:, chunk].contiguous()
        given += (owners_LC < len(terms),)
        # One kernel serves chunks of all sizes, from the first on.
        for tensor, dim in [(logits_CV, 0), (teacher_CV, 0), *((found, 1) for found in given)]:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        found = _compiled()(logits_CV, teacher_CV, *given, by_row, temperature, has_one_each)
        if not has_one_each:  # the losses of each row
            sums_K = found.new_zeros(len(terms) + 1).index_add_(
                0, owners_LC.flatten(), found.flatten()
            )
            return (found * given[1]).sum(), sums_K[:-1]
        weighted_K = [value * term.weight for value, term in zip(found, terms, strict=True)]
        return torch.stack(weighted_K).sum(), found

    return replace


def _by_row(terms: Sequence[Term], rows_ND: torch.Tensor):
    """Lay the terms out by objective and row: (losses, weights_LN, owners_LN, labels_LN).

    An owner is a term's number, their number where the row is none's. In a few launches, however
    many the terms.
    """
    losses, places = _by_objective(terms)
    device, shape = rows_ND.device, (len(losses), len(rows_ND))
    sizes = [len(term.offsets) for term in terms]
    sizes_K, places_K = sent(torch.tensor([sizes, places]), device)
    total = sum(sizes)
    owners = torch.arange(len(terms), device=device)
    owners = owners.repeat_interleave(sizes_K, output_size=total)
    cells = places_K[owners] * len(rows_ND) + torch.cat([term.rows_N for term in terms])
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    weights = [term.weight for term in terms]
    if isinstance(weights[0], torch.Tensor):
        weights_K = torch.stack(weights).to(wide)
    else:
        weights_K = sent(torch.tensor(weights, dtype=wide), device)
    labeled = zip(cells.split(sizes), (term.labels_N for term in terms), strict=True)
    labeled = [pair for pair in labeled if pair[1] is not None]
    weights_LN = torch.zeros(shape, dtype=wide, device=device)
    owners_LN = torch.full(shape, len(terms), device=device)
    labels_LN = torch.zeros(shape, dtype=torch.int64, device=device)
    weights_LN.view(-1).index_copy_(0, cells, weights_K[owners])
    owners_LN.view(-1).index_copy_(0, cells, owners)
    if labeled:
        labels_LN.view(-1).index_copy_(0, *map(torch.cat, zip(*labeled, strict=True)))
    return losses, weights_LN, owners_LN, labels_LN


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
