"""The objectives of distillation: tensors in, scalars out.

One row of LOSSES is one objective; its `--alpha_x` flag, log tag, rows and inputs follow from the
row. Objectives that read logits are computed through `head_losses`, which projects the selected
hidden states to the vocabulary chunk by chunk and takes each chunk's gradient at once, so that no
(N, V) tensor larger than a chunk exists.

Source: Sanh et al., 2019, "DistilBERT, a distilled version of BERT", section 3 (training loss);
Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", section 2 (temperature and its
square).

Shape suffixes: B sequences, T padded length, N selected positions, C positions of a chunk, V
vocabulary, D width, K active losses.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORED_LABEL = -100
NORMALIZATIONS = ("micro_batches", "tokens")  # what an update's means are taken over


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Widen half precision to float32, which sums and logarithms need; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --------------------------------------------------------------------------------------------------
# Formulas. Each returns a sum over its rows; the mean is taken by whoever knows the count.
# --------------------------------------------------------------------------------------------------


def kl_divergence(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    """Sum T^2 KL(softmax(t / T) || softmax(s / T)) over N rows; natural log. T^2 keeps gradients'
    size (Hinton, 2).
    """
    student_log_probs_NV = F.log_softmax(student_NV / temperature, dim=-1)
    teacher_log_probs_NV = F.log_softmax(teacher_NV / temperature, dim=-1)
    return (
        F.kl_div(student_log_probs_NV, teacher_log_probs_NV, reduction="sum", log_target=True)
        * temperature**2
    )


def cross_entropy(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    """Sum -log softmax(s)[label] over N rows; neither the teacher nor the temperature enters."""
    return F.cross_entropy(student_NV, labels_N, reduction="sum")


def squared_error(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    """Sum (s - t)^2 over N rows and the vocabulary."""
    return (student_NV - teacher_NV).square().sum()


def cosine_distance(student_ND, teacher_ND, labels_N, temperature: float) -> torch.Tensor:
    """Sum 1 - cos(h_s, h_t) over N rows of last hidden states; 1e-12 is added to each squared
    norm.
    """
    ones_N = student_ND.new_ones(len(student_ND))
    return F.cosine_embedding_loss(student_ND, teacher_ND, ones_N, reduction="sum")


# --------------------------------------------------------------------------------------------------
# The same with their gradients by hand: (sum, gradient with respect to the student's logits), from
# logits of any precision in float32 or wider. They may overwrite nothing.
# --------------------------------------------------------------------------------------------------


def kl_divergence_gradient(
    student_NV, teacher_NV, labels_N, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of kl_divergence: T (softmax(s / T) - softmax(t / T)) (Hinton et al., 2015, section
    2.1).
    """
    student_log_probs_NV = F.log_softmax(at_least_float32(student_NV) / temperature, dim=-1)
    teacher_log_probs_NV = F.log_softmax(at_least_float32(teacher_NV) / temperature, dim=-1)
    teacher_NV = teacher_log_probs_NV.exp()
    total = (
        torch.dot(teacher_NV.flatten(), teacher_log_probs_NV.sub_(student_log_probs_NV).flatten())
        * temperature**2
    )
    return total, student_log_probs_NV.exp_().sub_(teacher_NV).mul_(temperature)


def cross_entropy_gradient(
    student_NV, teacher_NV, labels_N, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of cross_entropy: softmax(s) - onehot(label)."""
    log_probs_NV = F.log_softmax(at_least_float32(student_NV), dim=-1)
    total = -log_probs_NV.gather(1, labels_N[:, None]).sum()
    gradient_NV = log_probs_NV.exp_()
    gradient_NV.scatter_add_(1, labels_N[:, None], gradient_NV.new_full((len(labels_N), 1), -1.0))
    return total, gradient_NV


def squared_error_gradient(
    student_NV, teacher_NV, labels_N, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of squared_error: 2 (s - t)."""
    difference_NV = at_least_float32(student_NV) - at_least_float32(teacher_NV)
    return difference_NV.square().sum(), difference_NV.mul_(2)


# --------------------------------------------------------------------------------------------------
# The same once more, row by row, for a compiler to join: (losses_N, gradient). Sums and
# element-wise operations only.
# --------------------------------------------------------------------------------------------------


def _softmax_and_log_sum(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    exponentials_NV = (logits_NV - largest_N1).exp()
    sum_N1 = exponentials_NV.sum(-1, keepdim=True)
    return exponentials_NV / sum_N1, largest_N1 + sum_N1.log()


def kl_divergence_rows(
    student_NV, teacher_NV, labels_N, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row what `kl_divergence_gradient` does."""
    student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
    student_probs_NV, student_log_sum_N1 = _softmax_and_log_sum(student_NV)
    teacher_probs_NV, teacher_log_sum_N1 = _softmax_and_log_sum(teacher_NV)
    log_ratio_NV = (teacher_NV - teacher_log_sum_N1) - (student_NV - student_log_sum_N1)
    losses_N = (teacher_probs_NV * log_ratio_NV).sum(-1) * temperature**2
    return losses_N, (student_probs_NV - teacher_probs_NV) * temperature


def cross_entropy_rows(
    student_NV, teacher_NV, labels_N, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row what `cross_entropy_gradient` does."""
    probs_NV, log_sum_N1 = _softmax_and_log_sum(student_NV)
    is_label_NV = torch.arange(student_NV.shape[-1], device=student_NV.device) == labels_N[:, None]
    losses_N = log_sum_N1[:, 0] - torch.where(is_label_NV, student_NV, 0.0).sum(-1)
    return losses_N, torch.where(is_label_NV, probs_NV - 1.0, probs_NV)


def squared_error_rows(
    student_NV, teacher_NV, labels_N, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row what `squared_error_gradient` does."""
    difference_NV = student_NV - teacher_NV
    return difference_NV.square().sum(-1), 2.0 * difference_NV


@dataclasses.dataclass(frozen=True)
class Loss:
    """One objective: a formula, what it reads, and where.

    gradient: the formula's sum with its gradient by the student's logits; None: autograd finds it,
    a block at a time.
    by_row: the same for a compiler; None: the objective is not compiled, the others are.
    reads: "logits", or "hidden" (last hidden states).
    rows: "distilled" (real tokens, or masked positions only with --restrict_ce_to_mask), "real"
        (every real token), "masked" (positions drawn for masked-LM) or "next" (positions whose next
        token is real).
    needs_teacher: False where the teacher need not run for it.
    default_alpha: the default of its flag. title: its name for people. condition: when its flag may
        be given.
    make_module: (student, teacher) -> a module that the formula gets as its last argument; its
        parameters are trained, saved and restored with the student's, not exported (hidden only).
    """

    formula: Callable[..., torch.Tensor]
    reads: str
    rows: str
    needs_teacher: bool
    default_alpha: float
    title: str
    gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    by_row: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    condition: str = ""
    make_module: Callable[[torch.nn.Module, torch.nn.Module], torch.nn.Module] | None = None

    @property
    def help(self) -> str:
        """Return one line for the command line."""
        return f"{self.title}; {self.condition}" if self.condition else self.title


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        kl_divergence,
        "logits",
        "distilled",
        True,
        0.5,
        "KL divergence to the teacher's distribution",
        kl_divergence_gradient,
        kl_divergence_rows,
    ),
    "mlm": Loss(
        cross_entropy,
        "logits",
        "masked",
        False,
        0.0,
        "masked-language-model loss",
        cross_entropy_gradient,
        cross_entropy_rows,
        "needs --mlm",
    ),
    "clm": Loss(
        cross_entropy,
        "logits",
        "next",
        False,
        0.5,
        "causal-language-model loss",
        cross_entropy_gradient,
        cross_entropy_rows,
        "not with --mlm",
    ),
    "mse": Loss(
        squared_error,
        "logits",
        "distilled",
        True,
        0.0,
        "squared error of the logits",
        squared_error_gradient,
        squared_error_rows,
    ),
    "cos": Loss(
        cosine_distance, "hidden", "real", True, 0.0, "cosine distance of the last hidden states"
    ),
}
