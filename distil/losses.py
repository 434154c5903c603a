"""The objectives of distillation: tensors in, scalars out.

Reading order: the formula of each objective; its gradient derived by hand; both row by row. LOSSES
in distil/objectives.py is the table from which the program takes the rest.

The formulas define the objectives and are the reference of the tests. Of an objective on logits,
training runs the `gradient` (where it is compiled, `by_row`) in distil/kernels/logit_gradients.py,
on a chunk of positions at a time: no (N, V) tensor larger than a chunk exists. A formula itself
runs where neither form exists, and on hidden states.

Sources: Sanh et al., 2019, "DistilBERT, a distilled version of BERT", section 2 (training loss);
Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", section 2 (temperature); Gu et
al., 2024, "MiniLLM", section 2 (reverse KL); Lin, 1991, "Divergence measures based on the Shannon
entropy", section IV (Jensen-Shannon).

Symbols: s and t are the student's and the teacher's logits, T the temperature.
Shape suffixes: N selected positions, V vocabulary, E the entries that the teacher has logits for
(the first of the V; the student's further rows pad its table, and are predicted with probability 0
by the teacher), D width, 1 a kept dimension.
"""

import math

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100
WithGradient = tuple[torch.Tensor, torch.Tensor]  # loss, gradient by the student's logits (N, V)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Widen half precision to float32, which sums and logarithms need; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --------------------------------------------------------------------------------------------------
# Formulas: (student, teacher, labels, temperature) -> sum over N rows. The caller divides by its
# count of rows, which may extend over several chunks, micro-batches or ranks.
# --------------------------------------------------------------------------------------------------


def kl_divergence(student_NV, teacher_NE, labels_N, temperature: float) -> torch.Tensor:
    """Sum T^2 KL(softmax(t / T) || softmax(s / T)) over rows, in nats.

    Gradients shrink as 1 / T^2; the factor T^2 keeps their size (Hinton et al., 2015, section 2).
    """
    student_log_probs_NV = F.log_softmax(student_NV / temperature, dim=-1)
    teacher_log_probs_NE = F.log_softmax(teacher_NE / temperature, dim=-1)
    student_log_probs_NE = student_log_probs_NV[:, : teacher_NE.shape[1]]
    divergence = F.kl_div(
        student_log_probs_NE, teacher_log_probs_NE, reduction="sum", log_target=True
    )
    return divergence * temperature**2


def reverse_kl(student_NV, teacher_NE, labels_N, temperature: float) -> torch.Tensor:
    """Sum T^2 KL(softmax(s / T) || softmax(t / T)) over rows, in nats.

    Over the entries that the teacher has logits for: the others would make it infinite.
    """
    student_log_probs_NE = F.log_softmax(student_NV[:, : teacher_NE.shape[1]] / temperature, dim=-1)
    teacher_log_probs_NE = F.log_softmax(teacher_NE / temperature, dim=-1)
    divergence = F.kl_div(
        teacher_log_probs_NE, student_log_probs_NE, reduction="sum", log_target=True
    )
    return divergence * temperature**2


def jensen_shannon(student_NV, teacher_NE, labels_N, temperature: float) -> torch.Tensor:
    """Sum T^2 / 2 [KL(t || m) + KL(s || m)] over rows, in nats: s and t softmaxes, m their mean."""
    student_log_probs_NV = F.log_softmax(student_NV / temperature, dim=-1)
    teacher_log_probs_NE = F.log_softmax(teacher_NE / temperature, dim=-1)
    mean_log_probs_NV = _log_mean(student_log_probs_NV, teacher_log_probs_NE)
    mean_log_probs_NE = mean_log_probs_NV[:, : teacher_NE.shape[1]]
    divergences = (
        F.kl_div(mean, log_probs, reduction="sum", log_target=True)
        for mean, log_probs in (
            (mean_log_probs_NE, teacher_log_probs_NE),
            (mean_log_probs_NV, student_log_probs_NV),
        )
    )
    return sum(divergences) * (temperature**2 / 2)


def _log_mean(student_log_probs_NV, teacher_log_probs_NE) -> torch.Tensor:
    """Return log((s + t) / 2), where t is 0 behind its E entries."""
    num_entries = teacher_log_probs_NE.shape[1]
    both_NE = torch.logaddexp(student_log_probs_NV[:, :num_entries], teacher_log_probs_NE)
    log_sums_NV = torch.cat([both_NE, student_log_probs_NV[:, num_entries:]], dim=-1)
    return log_sums_NV - math.log(2)


def cross_entropy(student_NV, teacher_NE, labels_N, temperature: float) -> torch.Tensor:
    """Sum -log softmax(s)[label] over rows; teacher and temperature are not used."""
    return F.cross_entropy(student_NV, labels_N, reduction="sum")


def squared_error(student_NV, teacher_NE, labels_N, temperature: float) -> torch.Tensor:
    """Sum (s - t)^2 over rows and the entries that the teacher has logits for."""
    return (student_NV[:, : teacher_NE.shape[1]] - teacher_NE).square().sum()


def cosine_distance(student_ND, teacher_ND, labels_N, temperature: float) -> torch.Tensor:
    """Sum 1 - cos(h_s, h_t) over rows of last hidden states; adds 1e-12 to each squared norm."""
    ones_N = student_ND.new_ones(len(student_ND))
    return F.cosine_embedding_loss(student_ND, teacher_ND, ones_N, reduction="sum")


# --------------------------------------------------------------------------------------------------
# Gradients by hand: the formula's sum, and its gradient by the student's logits. Logits of any
# precision are widened to at least float32; the arguments are not modified.
# --------------------------------------------------------------------------------------------------


def _padded_to(student_NV: torch.Tensor, part_NE: torch.Tensor) -> torch.Tensor:
    """Append zeros for the entries that the teacher has no logits for."""
    num_missing = student_NV.shape[1] - part_NE.shape[1]
    return F.pad(part_NE, (0, num_missing)) if num_missing else part_NE


def kl_divergence_gradient(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Differentiate kl_divergence: T (softmax(s / T) - softmax(t / T)).

    Source: Hinton et al., 2015, section 2.1, times T^2.
    """
    student_log_probs_NV = F.log_softmax(at_least_float32(student_NV) / temperature, dim=-1)
    teacher_log_probs_NE = F.log_softmax(at_least_float32(teacher_NE) / temperature, dim=-1)
    teacher_probs_NE = teacher_log_probs_NE.exp()
    num_entries = teacher_NE.shape[1]
    log_ratio_NE = teacher_log_probs_NE.sub_(student_log_probs_NV[:, :num_entries])
    total = torch.dot(teacher_probs_NE.flatten(), log_ratio_NE.flatten()) * temperature**2
    gradient_NV = student_log_probs_NV.exp_()
    gradient_NV[:, :num_entries].sub_(teacher_probs_NE)
    return total, gradient_NV.mul_(temperature)


def reverse_kl_gradient(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Differentiate reverse_kl: T s (log(s / t) - KL of the row); s and t are softmaxes."""
    num_entries = teacher_NE.shape[1]
    student_NE = at_least_float32(student_NV[:, :num_entries])
    student_log_probs_NE = F.log_softmax(student_NE / temperature, dim=-1)
    log_ratio_NE = F.log_softmax(at_least_float32(teacher_NE) / temperature, dim=-1)
    torch.sub(student_log_probs_NE, log_ratio_NE, out=log_ratio_NE)
    student_probs_NE = student_log_probs_NE.exp_()
    divergence_N1 = (student_probs_NE * log_ratio_NE).sum(-1, keepdim=True)
    gradient_NE = log_ratio_NE.sub_(divergence_N1).mul_(student_probs_NE).mul_(temperature)
    return divergence_N1.sum() * temperature**2, _padded_to(student_NV, gradient_NE)


def jensen_shannon_gradient(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Differentiate jensen_shannon: T / 2 s (log(s / m) - KL(s || m) of the row)."""
    student_log_probs_NV = F.log_softmax(at_least_float32(student_NV) / temperature, dim=-1)
    teacher_log_probs_NE = F.log_softmax(at_least_float32(teacher_NE) / temperature, dim=-1)
    mean_log_probs_NV = _log_mean(student_log_probs_NV, teacher_log_probs_NE)
    log_ratio_NE = teacher_log_probs_NE - mean_log_probs_NV[:, : teacher_NE.shape[1]]
    teacher_part = torch.dot(teacher_log_probs_NE.exp_().flatten(), log_ratio_NE.flatten())
    log_ratio_NV = torch.sub(student_log_probs_NV, mean_log_probs_NV, out=mean_log_probs_NV)
    student_probs_NV = student_log_probs_NV.exp_()
    divergence_N1 = (student_probs_NV * log_ratio_NV).sum(-1, keepdim=True)
    gradient_NV = log_ratio_NV.sub_(divergence_N1).mul_(student_probs_NV).mul_(temperature / 2)
    return (teacher_part + divergence_N1.sum()) * (temperature**2 / 2), gradient_NV


def cross_entropy_gradient(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Differentiate cross_entropy: softmax(s) - onehot(label)."""
    log_probs_NV = F.log_softmax(at_least_float32(student_NV), dim=-1)
    total = -log_probs_NV.gather(1, labels_N[:, None]).sum()
    gradient_NV = log_probs_NV.exp_()
    gradient_NV.scatter_add_(1, labels_N[:, None], gradient_NV.new_full((len(labels_N), 1), -1.0))
    return total, gradient_NV


def squared_error_gradient(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Differentiate squared_error: 2 (s - t)."""
    student_NE = at_least_float32(student_NV)[:, : teacher_NE.shape[1]]
    difference_NE = student_NE - at_least_float32(teacher_NE)
    return difference_NE.square().sum(), _padded_to(student_NV, difference_NE.mul_(2))


# --------------------------------------------------------------------------------------------------
# Row by row: (losses_N, gradient_NV) by sums along the vocabulary and element-wise operations only,
# which torch.compile fuses into one pass over a chunk of logits of at least float32.
# --------------------------------------------------------------------------------------------------


def _softmax_and_log_sum(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (softmax_NV, logsumexp_N1)."""
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    exponentials_NV = (logits_NV - largest_N1).exp()
    sum_N1 = exponentials_NV.sum(-1, keepdim=True)
    return exponentials_NV / sum_N1, largest_N1 + sum_N1.log()


def kl_divergence_rows(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Compute kl_divergence_gradient with one loss per row."""
    student_NV, teacher_NE = student_NV / temperature, teacher_NE / temperature
    student_probs_NV, student_log_sum_N1 = _softmax_and_log_sum(student_NV)
    teacher_probs_NE, teacher_log_sum_N1 = _softmax_and_log_sum(teacher_NE)
    student_NE = student_NV[:, : teacher_NE.shape[1]]
    log_ratio_NE = (teacher_NE - teacher_log_sum_N1) - (student_NE - student_log_sum_N1)
    losses_N = (teacher_probs_NE * log_ratio_NE).sum(-1) * temperature**2
    return losses_N, (student_probs_NV - _padded_to(student_NV, teacher_probs_NE)) * temperature


def reverse_kl_rows(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Compute reverse_kl_gradient with one loss per row."""
    student_NE = student_NV[:, : teacher_NE.shape[1]] / temperature
    teacher_NE = teacher_NE / temperature
    student_probs_NE, student_log_sum_N1 = _softmax_and_log_sum(student_NE)
    _, teacher_log_sum_N1 = _softmax_and_log_sum(teacher_NE)
    log_ratio_NE = (student_NE - student_log_sum_N1) - (teacher_NE - teacher_log_sum_N1)
    divergence_N1 = (student_probs_NE * log_ratio_NE).sum(-1, keepdim=True)
    gradient_NE = student_probs_NE * (log_ratio_NE - divergence_N1) * temperature
    return divergence_N1[:, 0] * temperature**2, _padded_to(student_NV, gradient_NE)


def jensen_shannon_rows(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Compute jensen_shannon_gradient with one loss per row."""
    student_NV, teacher_NE = student_NV / temperature, teacher_NE / temperature
    student_probs_NV, student_log_sum_N1 = _softmax_and_log_sum(student_NV)
    teacher_probs_NE, teacher_log_sum_N1 = _softmax_and_log_sum(teacher_NE)
    student_log_probs_NV = student_NV - student_log_sum_N1
    teacher_log_probs_NE = teacher_NE - teacher_log_sum_N1
    mean_log_probs_NV = _log_mean(student_log_probs_NV, teacher_log_probs_NE)
    log_ratio_NE = teacher_log_probs_NE - mean_log_probs_NV[:, : teacher_NE.shape[1]]
    log_ratio_NV = student_log_probs_NV - mean_log_probs_NV
    student_part_N1 = (student_probs_NV * log_ratio_NV).sum(-1, keepdim=True)
    losses_N = (teacher_probs_NE * log_ratio_NE).sum(-1) + student_part_N1[:, 0]
    gradient_NV = student_probs_NV * (log_ratio_NV - student_part_N1) * (temperature / 2)
    return losses_N * (temperature**2 / 2), gradient_NV


def cross_entropy_rows(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Compute cross_entropy_gradient with one loss per row."""
    probs_NV, log_sum_N1 = _softmax_and_log_sum(student_NV)
    is_label_NV = torch.arange(student_NV.shape[-1], device=student_NV.device) == labels_N[:, None]
    losses_N = log_sum_N1[:, 0] - torch.where(is_label_NV, student_NV, 0.0).sum(-1)
    return losses_N, torch.where(is_label_NV, probs_NV - 1.0, probs_NV)


def squared_error_rows(student_NV, teacher_NE, labels_N, temperature: float) -> WithGradient:
    """Compute squared_error_gradient with one loss per row."""
    difference_NE = student_NV[:, : teacher_NE.shape[1]] - teacher_NE
    return difference_NE.square().sum(-1), _padded_to(student_NV, 2.0 * difference_NE)
