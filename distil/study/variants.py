"""The variants of a study: which flags of train.py and which first weights each one takes.

The triple loss is the reference, with the weights of the 2019 README. The ablations are those of
the paper (Sanh et al., 2019, Table 4); every other row of LOSSES is tried alone and with the KL
divergence. Imports no torch.
"""

import dataclasses
import shlex
from collections.abc import Mapping

from distil.objectives import LOSSES
from distil.study.runs import words_of
from utils import InputError

REFERENCE, NO_TEACHER = "triple", "no_teacher"
HALF = "half"  # the reference's first student
TRIPLES: dict[bool, dict[str, object]] = {  # by "is masked"
    True: {"ce": 5.0, "mlm": 2.0, "cos": 1.0},
    False: {"ce": 5.0, "clm": 0.5, "cos": 1.0},
}
KL_WEIGHT = 5.0  # beside another objective of weight 1, as in the triple


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a study.

    title: for people. alphas: objective -> weight; the others are off. flags: further ones of
    train.py. student: a row of STUDENTS, or the name of one that first_flags, of extract.py, make.
    """

    title: str
    alphas: Mapping[str, float]
    flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    student: str = HALF
    first_flags: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def extract_flags(self, num_layers: int, data_file: str) -> Mapping[str, object]:
        """Return the flags of extract.py that make the first student of this teacher."""
        return self.first_flags or STUDENTS[self.student](num_layers, data_file)


# First students: (number of the teacher's layers, data file) -> flags of extract.py.
STUDENTS = {
    HALF: lambda num, data: {"--num_layers": max(num // 2, 1)},
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
        if name != HALF:
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


# ---- rows of one's own ---------------------------------------------------------------------------

FIRST_FLAGS = {  # those of extract.py
    *("--num_layers", "--layers", "--choose_layers"),
    *("--hidden_size", "--intermediate_size", "--num_heads", "--importance_file"),
}
OF_STUDY = {  # what a study gives each training
    *("--student", "--student_config", "--teacher_name", "--data_file", "--token_counts"),
    *("--max_length", "--learning_rate", "--max_steps", "--seed", "--dump_path", "--resume"),
}


def read_own(text: str) -> tuple[str, dict[str, list[str]]]:
    """Read NAME=FLAGS: the name, and flag -> values. Raises InputError."""
    name, _, words = text.partition("=")
    taken = {**variants(True), **variants(False), **STUDENTS, RANDOM: None}
    if not name.isidentifier() or name in taken:
        raise InputError(
            f"--own {text}: expected NAME=FLAGS, a name of letters, digits and _ that no variant"
            " and no first student has"
        )
    try:
        words = shlex.split(words)
    except ValueError as error:
        raise InputError(f"--own {text}: {error}; close the quotation mark") from error
    flags: dict[str, list[str]] = {}
    for word in words:
        flag, is_joined, value = word.partition("=")
        if word.startswith("--"):
            values = flags[flag] = [value] if is_joined else []
        elif flags:
            values.append(word)
        else:
            raise InputError(f"--own {text}: {word} is no flag; expected NAME=FLAGS")
    if not flags or OF_STUDY & flags.keys():
        found = ", ".join(sorted(OF_STUDY & flags.keys())) or "no flag"
        raise InputError(
            f"--own {text}: {found}; expected flags of train.py that are not the study's own, or of"
            f" extract.py: {', '.join(sorted(FIRST_FLAGS))}"
        )
    return name, flags


def own_variant(name: str, flags: Mapping[str, list[str]], is_masked: bool) -> Variant:
    """Make a row of one's own: the triple loss, but for its flags."""
    title = f"triple with {shlex.join(words_of(flags))}"
    first = {flag: values for flag, values in flags.items() if flag in FIRST_FLAGS}
    of_training = {flag: values for flag, values in flags.items() if flag not in FIRST_FLAGS}
    student = name if first else HALF
    return Variant(title, TRIPLES[is_masked], of_training, student, first)


# ---- command lines -------------------------------------------------------------------------------


def train_flags(variant: Variant, is_masked: bool) -> dict[str, object]:
    """Return a variant's flags of train.py, as words_of writes them."""
    alphas = {f"--alpha_{name}": variant.alphas.get(name, 0.0) for name in LOSSES}
    return {**alphas, **({"--mlm": None} if is_masked else {}), **variant.flags}
