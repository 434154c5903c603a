"""The variants of a study: which flags of train.py and which first weights each one takes.

The triple loss is the reference, with the weights of the 2019 README. The ablations are those of
the paper (Sanh et al., 2019, Table 4); every other row of LOSSES is tried alone and with the KL
divergence. Imports no torch.
"""

import dataclasses
from collections.abc import Mapping

from distil.objectives import LOSSES

REFERENCE, NO_TEACHER = "triple", "no_teacher"
TRIPLES: dict[bool, dict[str, object]] = {  # by "is masked"
    True: {"ce": 5.0, "mlm": 2.0, "cos": 1.0},
    False: {"ce": 5.0, "clm": 0.5, "cos": 1.0},
}
KL_WEIGHT = 5.0  # beside another objective of weight 1, as in the triple


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a study.

    title: for people. alphas: objective -> weight; the others are off. flags: further ones of
    train.py. student: a row of STUDENTS.
    """

    title: str
    alphas: Mapping[str, float]
    flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    student: str = "half"


# First students: (number of the teacher's layers, data file) -> flags of extract.py.
STUDENTS = {
    "half": lambda num, data: {"--num_layers": max(num // 2, 1)},
    "third": lambda num, data: {"--num_layers": max(num // 3, 1)},
    "first_layers": lambda num, data: {"--layers": range(max(num // 2, 1))},
    "last_layers": lambda num, data: {"--layers": range(num - max(num // 2, 1), num)},
    "measured_layers": lambda num, data: {
        "--num_layers": max(num // 2, 1),
        "--choose_layers": data,
    },
}
RANDOM = "random"  # half's configuration


def variants(is_masked: bool) -> dict[str, Variant]:
    """List the variants for masked or causal models, the reference first."""
    triple = TRIPLES[is_masked]
    lm = "mlm" if is_masked else "clm"
    found = {
        REFERENCE: Variant("triple loss", triple),
        NO_TEACHER: Variant("without teacher", {lm: 1.0}),
    }
    for name in triple:
        left = {other: weight for other, weight in triple.items() if other != name}
        found[f"without_{name}"] = Variant(f"triple without L_{name}", left)
    found["random_start"] = Variant("triple, random first weights", triple, student=RANDOM)
    for name in STUDENTS:
        if name != "half":
            title = f"triple, student of the teacher's {name.replace('_', ' ')}"
            found[name] = Variant(title, triple, student=name)
    for temperature in (1, 4):
        flags = {"--temperature": temperature}
        found[f"temperature_{temperature}"] = Variant(f"triple, T = {temperature}", triple, flags)
    if is_masked:
        for smoothing in (0, 0.7):
            title = f"triple, masks smoothed by {smoothing}"
            found[f"smoothing_{smoothing}"] = Variant(title, triple, {"--mlm_smoothing": smoothing})
    for name, loss in LOSSES.items():
        if loss.needs_teacher:
            found[f"{name}_alone"] = Variant(f"{loss.title} alone", {name: 1.0})
        if loss.needs_teacher and name not in triple:
            title = f"KL divergence and {loss.title}"
            found[f"ce_{name}"] = Variant(title, {"ce": KL_WEIGHT, name: 1.0})
    return found


def train_flags(variant: Variant, is_masked: bool) -> dict[str, object]:
    """Return a variant's flags of train.py; None for a flag without a value."""
    alphas = {f"--alpha_{name}": variant.alphas.get(name, 0.0) for name in LOSSES}
    return {**alphas, **({"--mlm": None} if is_masked else {}), **variant.flags}
