"""A student's first weights: copied from layers of its teacher, or loaded from a file.

Source: Sanh et al., 2019, section 3: one layer out of two; 2019's code, and this one, take evenly
spaced ones, first and last included: 0 2 4 7 9 11 of 12. Every student made here is compared with
its teacher without the other layers.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn

from distil.models.architectures import ARCHITECTURES, PAIRS, Architecture
from distil.models.bounds import check_archive
from distil.models.checks import (
    check_finite,
    evaluating,
    is_close,
    some_ids,
    some_of,
    without_cache,
)
from distil.models.conventions import NUM_LAYERS, config_with_layers, layer_lists
from distil.models.heads import replaced
from distil.models.language_model import build_network, is_untied, linked_biases
from distil.system.failures import naming_failures
from distil.system.files import require_file
from utils import InputError, logger

StateDict = Mapping[str, torch.Tensor]


# Differs from the original: 2019's script took 0 2 4 7 9 11 of any teacher; the default name of its
# file for roberta-large, tf_roberta_048131723.pth, states these. No rounding of evenly spaced
# numbers gives both.
LAYERS_OF_2019 = {(24, 6): [0, 4, 8, 13, 17, 23]}


def evenly_spaced_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Select layers round(linspace(0, L - 1, l)), the first and last included.

    12 -> 6 gives 0 2 4 7 9 11. LAYERS_OF_2019 has the exceptions.
    """
    if (num_teacher_layers, num_student_layers) in LAYERS_OF_2019:
        return list(LAYERS_OF_2019[num_teacher_layers, num_student_layers])
    return np.rint(np.linspace(0, num_teacher_layers - 1, num_student_layers)).astype(int).tolist()


def extract_student(
    teacher: torch.nn.Module,
    student_type: str,
    layers: Sequence[int],
    *,
    vocab_transform: bool = False,
    fold_token_types: bool = False,
) -> dict[str, torch.Tensor]:
    """Copy a teacher's layers to the layers 0, 1, .. of a student's state dict.

    vocab_transform: copy the dense layer and norm of the prediction head, too.
    fold_token_types: add token type 0 to every position embedding of a student without token types,
        which makes the copy exact (not to word embeddings: the output projection shares them).
    Raises InputError naming a parameter that the teacher lacks.
    """
    teacher_type = teacher.config.model_type
    pair, student_row = PAIRS[teacher_type, student_type], ARCHITECTURES[student_type]
    teacher_state = teacher.state_dict()
    names = pair.parameter_names or _names_of_one_architecture(
        teacher_state, ARCHITECTURES[teacher_type]
    )
    if not vocab_transform:
        left_out = student_row.head_transform  # str.startswith(()) is False
        names = {s: t for s, t in names.items() if not s.startswith(left_out)}
    state = {}
    for student_name, teacher_name in names.items():
        targets = list(enumerate(layers)) if "{layer}" in student_name else [(0, 0)]
        for student_layer, teacher_layer in targets:
            source = teacher_name.format(layer=teacher_layer)
            if source not in teacher_state:
                raise InputError(
                    f"the teacher has no parameter {source}; a {teacher_type} language model is"
                    " expected"
                )
            copied = teacher_state[source].detach().clone().contiguous()
            state[student_name.format(layer=student_layer)] = copied
    if fold_token_types and pair.fold_token_types:
        target, source = pair.fold_token_types
        state[target] += teacher_state[source][0]
    return state


def student_of_pair(
    teacher: torch.nn.Module,
    student_type: str,
    layers: Sequence[int],
    fold_token_types: bool = False,
):
    """Build a student of another architecture from a teacher's layers.

    It is compared with the teacher without its other layers and, unless they are folded, its token
    types. Raises InputError if PAIRS has no such pair with configuration entries, or if the student
    computes something else.
    """
    pair = PAIRS.get((teacher.config.model_type, student_type))
    if pair is None or not pair.config_entries:
        known = ", ".join(f"{t} -> {s}" for (t, s), row in PAIRS.items() if row.config_entries)
        raise InputError(
            f"--student_type {student_type}: no student of a {teacher.config.model_type} teacher;"
            f" expected {known}"
        )
    config = getattr(transformers, ARCHITECTURES[student_type].config_class)(
        num_hidden_layers=len(layers),
        **{s: getattr(teacher.config, t) for s, t in pair.config_entries.items()},
    )
    config.tie_word_embeddings = not is_untied(teacher)
    lost = [
        f"{name} {found} (a {student_type}'s is {value})"
        for name, value in pair.fixed_entries.items()
        if (found := getattr(teacher.config, name, value)) != value
    ]
    student = build_network(
        ARCHITECTURES[student_type], config, f"{student_type} of {len(layers)} layers"
    )
    state = extract_student(
        teacher, student_type, layers, vocab_transform=True, fold_token_types=fold_token_types
    )
    student.load_state_dict(state, strict=False)
    types = pair.fold_token_types and not fold_token_types
    if not _equals_cut(teacher, student, layers, drops_token_types=bool(types)):
        reason = f"; its configuration cannot hold {', '.join(lost)}" if lost else ""
        raise InputError(
            f"--student_type {student_type}: a {student_type} computes something else than layers"
            f" {' '.join(map(str, layers))} of the teacher{reason}; leave --student_type out"
        )
    if lost:
        text = "--student_type %s: its configuration cannot hold %s; the logits are equal on a few"
        logger.warning(f"{text} tokens.", student_type, ", ".join(lost))
    if types:
        text = "A %s has no token types: the teacher's are dropped (--fold_token_types adds type 0"
        logger.info(f"{text} to its positions).", student_type)
    return student


@torch.no_grad()
def _equals_cut(
    teacher: nn.Module, student: nn.Module, layers: Sequence[int], drops_token_types: bool
) -> bool:
    """Compare a student with the teacher of a row, without other layers and token types."""
    row = ARCHITECTURES[teacher.config.model_type]
    path = row.layers.removesuffix(".")
    kept = nn.ModuleList(teacher.get_submodule(path)[layer] for layer in layers)
    cut = replaced(teacher, path, kept)
    if drops_token_types:
        table = teacher.get_submodule(row.token_type_embeddings)
        zeros = nn.Embedding(*table.weight.shape, _weight=torch.zeros_like(table.weight))
        cut = replaced(cut, row.token_type_embeddings, zeros)
    ids_BT, options = some_ids(teacher, 1), without_cache(teacher)
    with evaluating(teacher, student, cut):
        return is_close(student(ids_BT).logits, cut(ids_BT, **options).logits)


def _names_of_one_architecture(teacher_state: StateDict, row: Architecture) -> dict[str, str]:
    """Map names to themselves, with {layer} for numbers; skip tied aliases and old buffers."""
    pattern = re.compile(re.escape(row.layers) + r"\d+\.")
    others = {t.data_ptr() for n, t in teacher_state.items() if n not in row.aliases}
    tied = {n for n in row.aliases if n in teacher_state and teacher_state[n].data_ptr() in others}
    names = [n for n in teacher_state if n not in tied and not re.search(row.obsolete, n)]
    templates = [pattern.sub(f"{row.layers}{{layer}}.", name) for name in names]
    return {template: template for template in templates}


def load_student_weights(
    student: torch.nn.Module,
    row: Architecture,
    path: str,
    build: Callable[[], nn.Module] | None = None,
) -> None:
    """Load first weights (a plain state dict) into a student after checking every tensor.

    Raises InputError naming each tensor that is missing, unexpected, of another shape or not
    finite. Missing tensors of the head's transform, which extraction without --vocab_transform
    omits, are a warning. build: makes a student at random, which gives these; without it they
    stay.
    """
    source = f"--student_pretrained_weights {path}"
    own = student.state_dict()
    given = _read_state_dict(path, "--student_pretrained_weights")
    given = {n: t for n, t in given.items() if n in own or not re.search(row.obsolete, n)}
    storages = {own[n].data_ptr() for n in given if n in own}
    absent = [n for n in own if n not in given and own[n].data_ptr() not in storages]
    given |= linked_biases(student, given, absent)
    missing = [n for n in absent if n not in given]
    optional = [n for n in missing if n.startswith(row.head_transform)]
    # Differs from the original: 2019 silently loaded the tensors that fitted.
    kinds = {"lacks": [n for n in missing if n not in optional], **_misfits(given, own)}
    problems = [
        f"{source}: {kind} {some_of(names)}; {REMEDIES.get(kind, REMEDY)}"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise InputError("\n".join(problems))
    check_finite(given, source)
    if optional and build is not None:
        drawn = build().state_dict()
        given |= {name: drawn[name] for name in optional}
    student.load_state_dict(given, strict=False)
    if optional:
        remedy = "initialized at random (extract with --vocab_transform to copy them)"
        logger.warning("%s has no %s: %s.", path, some_of(optional), remedy)
    logger.info("Loaded %d tensors from %s.", len(given), path)


REMEDY = "extract them anew for this student's configuration"
REMEDIES = {
    "has another shape for": "set the sizes of these weights in the student's JSON",
    "has another value for": (
        'the weights of an untied teacher need "tie_word_embeddings": false in the student\'s JSON'
    ),
}


def _misfits(given: StateDict, own: StateDict) -> dict[str, list[str]]:
    """List the given tensors that do not fit a model with the state `own`, by kind of problem."""
    shared = [n for n in given if n in own and _is_plain(given[n])]
    first_name: dict[int, str] = {}
    for name in shared:
        first_name.setdefault(own[name].data_ptr(), name)
    twins = [(n, first_name[own[n].data_ptr()]) for n in shared]
    return {
        "has unexpected": [n for n in given if n not in own],
        "has an unsupported type of": [
            f"{n} ({t.dtype}, {t.layout})" for n, t in given.items() if not _is_plain(t)
        ],
        "has another shape for": [
            f"{n} {list(given[n].shape)} (the student's is {list(own[n].shape)})"
            for n in shared
            if own[n].shape != given[n].shape
        ],
        "has another value for": [
            f"{n} (tied to {m})" for n, m in twins if n != m and not given[n].equal(given[m])
        ],
    }


def _read_state_dict(path: str, flag: str) -> dict[str, torch.Tensor]:
    require_file(path, flag)
    check_archive(path, f"{flag} {path}")
    what = f"{flag} {path}: not a state dict that can be loaded safely"
    with naming_failures(what, passing=(OSError,)):
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state.items()
    ):
        raise InputError(
            f"{flag} {path}: expected a plain state dict (name -> tensor); make it with extract.py"
        )
    return dict(state)


def _is_safetensors(path: str) -> bool:
    """Recognize safetensors by the content: the length of a JSON object, then the object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path)


def _is_plain(tensor: object) -> bool:
    """Test for a dense floating-point tensor with values."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in kinds
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )


def student_of_layers(teacher: nn.Module, layers: Sequence[int], source: str) -> nn.Module:
    """Build a student of the teacher's class from some layers and everything outside the layers.

    The student is compared with the teacher without its other layers. Raises InputError if the
    layers cannot be copied or compute something else in the student.
    """
    lists, num_layers = layer_lists(teacher, source), getattr(teacher.config, NUM_LAYERS, None)
    if not lists:
        raise InputError(
            f"{source}: a {type(teacher).__name__} has no list of layers to choose from (shared or"
            " nested ones cannot be separated); write the student's configuration for"
            " --student_config yourself"
        )
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise InputError(
            f"--layers: {wrong[0] if wrong else 'none'}, but {source} has layers 0 to"
            f" {num_layers - 1}"
        )
    config = config_with_layers(teacher.config, layers, source)
    with naming_failures(f"{source}: cannot build a model of {len(layers)} layers"):
        student = type(teacher)(config)
    student.to(next(teacher.parameters()).dtype)
    _copy_layers(teacher, student, lists, layers, source)
    _check_layers(teacher, student, lists, layers, source)
    return student


def _copy_layers(
    teacher, student, lists: Sequence[str], layers: Sequence[int], source: str
) -> None:
    """Load the teacher's state into the student, with changed layer numbers."""
    own, state = student.state_dict(), {}
    for name, tensor in teacher.state_dict().items():
        path = next((path for path in lists if name.startswith(f"{path}.")), None)
        if path is None:
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        copies = [new for new, old in enumerate(layers) if int(number) == old]
        state |= {f"{path}.{new}.{rest}": tensor for new in copies}
    outside = [name for name in own if not name.startswith(tuple(f"{path}." for path in lists))]
    resized = [name for name in outside if name in state and own[name].shape != state[name].shape]
    state = {name: tensor for name, tensor in state.items() if name not in resized}
    wrong = sorted((set(own) - set(resized)) ^ set(state))
    wrong = wrong or [name for name in state if own[name].shape != state[name].shape]
    if wrong:
        raise InputError(
            f"{source}: layers {' '.join(map(str, layers))} do not fit their places in the student:"
            f" {wrong[0]} differs; choose layers of one kind, or in the teacher's order of kinds"
        )
    if resized:  # ESM's contact head, which reads every layer's attention, not used by the LM
        text = "%s: %s depends on the number of layers: initialized at random."
        logger.warning(text, source, ", ".join(resized))
    student.load_state_dict(state, strict=False)


@torch.no_grad()
def _check_layers(
    teacher, student, lists: Sequence[str], layers: Sequence[int], source: str
) -> None:
    """Raise InputError unless the student's logits equal the teacher's without its other layers."""
    cut = with_layers(teacher, lists, layers, student.config)
    ids_BT, options = some_ids(teacher, 1), without_cache(teacher)
    what = f"{source}: cannot be called with fewer layers"
    with naming_failures(what, "; take another model"), evaluating(teacher, student, cut):
        same = is_close(student(ids_BT, **options).logits, cut(ids_BT, **options).logits)
    if not same:
        raise InputError(
            f"{source}: layers {' '.join(map(str, layers))} compute something else in the student,"
            " where they have other numbers; choose layers whose kinds are in the order of a model"
            " of that depth"
        )


def with_layers(teacher: nn.Module, lists: Sequence[str], layers: Sequence[int], config):
    """Copy a model with some of its layers; their weights are shared.

    lists: see layer_lists. config: see config_with_layers.
    """
    cut = teacher
    for path in lists:
        kept = nn.ModuleList(teacher.get_submodule(path)[layer] for layer in layers)
        cut = replaced(cut, path, kept)
    _set_config(cut, lists, config)
    return cut


def _set_config(model: nn.Module, lists: Sequence[str], config) -> None:
    """Set the configuration of a copied model and of its modules around the layers."""
    model.config = config
    for path in lists:
        part = model
        for name in path.split(".")[:-1]:
            part = part._modules[name]
            if hasattr(part, "config"):
                part.config = config
