"""Our objectives equal those of other projects, where these are installed: values and gradients.

textbrewer (Yang et al., 2020), torchdistill (Matsubara, 2021) and trl are no requirements; each
test is skipped without its package. A package may lie in any folder on PYTHONPATH.
"""

import functools
import importlib
import warnings
from collections.abc import Callable

import pytest
import torch

from distil.layer_losses import ComparedLayers, Projected, Relations, Sequences
from distil.models.layer_readings import PARTS, Attention
from distil.objectives import LOSSES

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums in another order
LENGTHS, NUM_HEADS, WIDTH, SCALE = [7, 3, 1, 7], 3, 4, 0.37
TEXTBREWER, TRL = "textbrewer.losses", "trl.trainer.gkd_trainer"
TORCHDISTILL = "torchdistill.losses.mid_level"


def module_of(name: str):
    """Import a module of another project, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name}: {error}")


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Draw a float64 tensor that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).requires_grad_()


def mask_of_lengths() -> torch.Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


# --------------------------------------------------------------------------------------------------
# Ours: means over rows, as a micro-batch takes them
# --------------------------------------------------------------------------------------------------


def of_logits(name: str, temperature: float, student, teacher):
    return LOSSES[name].formula(student, teacher, None, temperature) / len(student)


def of_hidden(distance: str, student_BTD, teacher_BTD):
    """Compare one layer's hidden states at real tokens."""
    rows = [{0: states[mask_of_lengths()]} for states in (student_BTD, teacher_BTD)]
    compared = Projected([(0, 0)], distance, WIDTH, WIDTH)
    return LOSSES["hid"].formula(*rows, None, 1.0, compared) / sum(LENGTHS)


def last_hidden(student_BTD, teacher_BTD):
    rows = [states[mask_of_lengths()] for states in (student_BTD, teacher_BTD)]
    return LOSSES["cos"].formula(*rows, None, 1.0) / sum(LENGTHS)


def of_attention(name: str, student_PBTW, teacher_PBTW):
    """Compare queries, keys and values (P), a batch with padding at once."""
    lengths_B = torch.tensor(LENGTHS)
    read = (
        Sequences({0: Attention(*parts, NUM_HEADS, NUM_HEADS, SCALE)}, lengths_B, False)
        for parts in (student_PBTW, teacher_PBTW)
    )
    pair = [(0, 0)]
    compared = Relations(pair, NUM_HEADS) if name == "rel" else ComparedLayers(pair)
    return LOSSES[name].formula(*read, None, 1.0, compared) / sum(LENGTHS)


# --------------------------------------------------------------------------------------------------
# Theirs
# --------------------------------------------------------------------------------------------------


def soft_cross_entropy(temperature: float, module, student, teacher):
    """Make KL of the cross-entropy with soft targets, less the teacher's entropy, times T^2."""
    cross = module.kd_ce_loss(student, teacher, temperature)
    return (cross - module.kd_ce_loss(teacher, teacher, temperature)) * temperature**2


def kd_loss(temperature: float, module, student, teacher):
    """Scale the soft loss by T^2, which theirs does only beside a loss on labels."""
    loss = module.KDLoss("logits", "out", "logits", "out", temperature, alpha=0.0)
    logits = ({"logits": {"out": one}} for one in (student, teacher))
    return loss(*logits) * temperature**2


def divergence(beta: float, temperature: float, module, student, teacher):
    """Scale TRL's generalized Jensen-Shannon divergence by T^2: 0 forward, 1 reverse KL."""
    loss = module.GKDTrainer.generalized_jsd_loss
    return loss(student, teacher, beta=beta, temperature=temperature) * temperature**2


def mean_squared_logits(module, student, teacher):
    """Sum over the vocabulary, of which theirs takes the mean."""
    return module.kd_mse_loss(student, teacher) * student.shape[1]


def masked_states(name: str, module, student, teacher):
    return getattr(module, name)(student, teacher, mask_of_lengths().long())


def by_sequence(loss: Callable, student_PBTW, teacher_PBTW):
    """Weigh each sequence by its rows: theirs weighs a batch's by pairs of tokens."""
    total = 0.0
    for number, length in enumerate(LENGTHS):
        parts = (
            x[:, number, None, :length].unflatten(-1, (NUM_HEADS, -1)).transpose(2, 3)
            for x in (student_PBTW, teacher_PBTW)
        )
        total = total + loss(*parts, torch.ones(1, length)) * length
    return total / sum(LENGTHS)


def attention_error(module, student, teacher):
    """Compare scores before the softmax, (P, 1, A, T, d) by sequence."""

    def loss(*parts_and_mask):
        *models, mask = parts_and_mask
        scores = [query @ key.transpose(-1, -2) * SCALE for query, key, _ in models]
        return module.att_mse_loss(*scores, mask)

    return by_sequence(loss, student, teacher)


def relations(module, student, teacher):
    """Sum over queries, keys and values the cross-entropy of X X' / sqrt(d), less the entropy."""

    def loss(*parts_and_mask):
        *models, mask = parts_and_mask
        total = 0.0
        for part in range(len(PARTS)):
            ours, theirs = (
                x[part] @ x[part].transpose(-1, -2) / x.shape[-1] ** 0.5 for x in models
            )
            cross = module.att_ce_loss(ours, theirs, mask)
            total = total + cross - module.att_ce_loss(theirs, theirs, mask)
        return total

    return by_sequence(loss, student, teacher)


LOGITS, STATES = (11, 17), (len(LENGTHS), max(LENGTHS), WIDTH)
ATTENTION = (len(PARTS), len(LENGTHS), max(LENGTHS), NUM_HEADS * WIDTH)
part = functools.partial
# What -> (their module, shape of student and teacher, ours, theirs).
CASES = {
    "ce, T 1": (TEXTBREWER, LOGITS, part(of_logits, "ce", 1.0), part(soft_cross_entropy, 1.0)),
    "ce, T 2": (TEXTBREWER, LOGITS, part(of_logits, "ce", 2.0), part(soft_cross_entropy, 2.0)),
    "ce, KDLoss": (TORCHDISTILL, LOGITS, part(of_logits, "ce", 3.0), part(kd_loss, 3.0)),
    "ce, TRL": (TRL, LOGITS, part(of_logits, "ce", 2.0), part(divergence, 0, 2.0)),
    "rkl": (TRL, LOGITS, part(of_logits, "rkl", 2.0), part(divergence, 1, 2.0)),
    "jsd": (TRL, LOGITS, part(of_logits, "jsd", 2.0), part(divergence, 0.5, 2.0)),
    "mse": (TEXTBREWER, LOGITS, part(of_logits, "mse", 1.0), mean_squared_logits),
    "cos": (TEXTBREWER, STATES, last_hidden, part(masked_states, "cos_loss")),
    "hid, mse": (TEXTBREWER, STATES, part(of_hidden, "mse"), part(masked_states, "hid_mse_loss")),
    "hid, cos": (TEXTBREWER, STATES, part(of_hidden, "cos"), part(masked_states, "cos_loss")),
    "att": (TEXTBREWER, ATTENTION, part(of_attention, "att"), attention_error),
    "rel": (TEXTBREWER, ATTENTION, part(of_attention, "rel"), relations),
}


def both(name: str, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compute an objective by both programs: [value, gradient by the student] of each."""
    module_name, shape, ours, theirs = CASES[name]
    student, teacher = draw(seed, *shape), draw(seed + 1, *shape).detach()
    values = ours(student, teacher), theirs(module_of(module_name), student, teacher)
    return tuple([value.detach(), *torch.autograd.grad(value, student)] for value in values)


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("name", CASES)
def test_an_objective_equals_an_independent_implementation(name, seed):
    ours, theirs = both(name, seed)
    assert ours[0] > 0.1 and ours[1].abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, **EXACT)
