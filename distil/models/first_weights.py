"""A student's first weights: layers of its teacher, or a state dict from the disk.

Source: Sanh et al., 2019, section 3: the student is initialized by taking one layer out of two.
"""

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn

from distil.models.architectures import ARCHITECTURES, PAIRS, Architecture
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
from distil.models.language_model import build_network
from distil.system.files import require_file
from utils import InputError, logger, one_line

StateDict = Mapping[str, torch.Tensor]


def evenly_spaced_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Choose layers, first and last kept: round(linspace(0, L - 1, l)), which gives 0 2 4 7 9 11
    for 12 -> 6.
    """
    return np.rint(np.linspace(0, num_teacher_layers - 1, num_student_layers)).astype(int).tolist()


def extract_student(
    teacher: torch.nn.Module,
    student_type: str,
    layers: Sequence[int],
    *,
    vocab_transform: bool = False,
    fold_token_types: bool = False,
) -> dict[str, torch.Tensor]:
    """Make a student's first state dict out of a teacher's layers `layers` -> 0, 1, ..

    vocab_transform: take the dense layer and norm of the prediction head too. fold_token_types: add
    token type 0 to every position row where the student has no token types, which makes the copy
    exact (never to the word embeddings, which the output projection shares). Raises InputError
    naming a parameter that the teacher lacks.
    """
    teacher_type = teacher.config.model_type
    pair, student_row = PAIRS[teacher_type, student_type], ARCHITECTURES[student_type]
    teacher_state = teacher.state_dict()
    names = pair.parameter_names or _names_of_one_architecture(
        teacher_state, ARCHITECTURES[teacher_type]
    )
    if not vocab_transform:
        names = {
            s: t
            for s, t in names.items()
            if not s.startswith(student_row.head_transform or ("\0",))
        }
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
            state[student_name.format(layer=student_layer)] = (
                teacher_state[source].detach().clone().contiguous()
            )
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
    """Make a whole student of another architecture than its teacher's, out of the teacher's layers
    `layers`.

    Raises InputError where PAIRS has no such pair.
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
    student = build_network(
        ARCHITECTURES[student_type], config, f"{student_type} of {len(layers)} layers"
    )
    state = extract_student(
        teacher, student_type, layers, vocab_transform=True, fold_token_types=fold_token_types
    )
    student.load_state_dict(state, strict=False)
    return student


def _names_of_one_architecture(teacher_state: StateDict, row: Architecture) -> dict[str, str]:
    """Map a model's own names to themselves, layer numbers replaced by {layer}; aliases and old
    buffers left out.
    """
    pattern = re.compile(re.escape(row.layers) + r"\d+\.")
    names = [n for n in teacher_state if n not in row.aliases and not re.search(row.obsolete, n)]
    templates = [pattern.sub(f"{row.layers}{{layer}}.", name) for name in names]
    return {template: template for template in templates}


def load_student_weights(student: torch.nn.Module, row: Architecture, path: str) -> None:
    """Load first weights (a plain state dict) into a student, checked name by name.

    Raises InputError naming every tensor that is missing, unexpected, of another shape or not
    finite. Absent tensors of the head's transform are named in a warning only: they are absent
    without --vocab_transform.
    """
    source = f"--student_pretrained_weights {path}"
    own = student.state_dict()
    given = _read_state_dict(path, "--student_pretrained_weights")
    given = {n: t for n, t in given.items() if n in own or not re.search(row.obsolete, n)}
    storages = {own[n].data_ptr() for n in given if n in own}
    missing = [n for n in own if n not in given and own[n].data_ptr() not in storages]
    optional = [n for n in missing if n.startswith(row.head_transform or ("\0",))]
    # Differs from the original: 2019 loaded whatever fitted, in silence.
    kinds = {"lacks": [n for n in missing if n not in optional], **_misfits(given, own)}
    remedy = "extract them anew for this student's configuration"
    problems = [
        f"{source}: {kind} {some_of(names)}; {remedy}" for kind, names in kinds.items() if names
    ]
    if problems:
        raise InputError("\n".join(problems))
    check_finite(given, source)
    student.load_state_dict(given, strict=False)
    if optional:
        remedy = "they start at random (extract with --vocab_transform to take them)"
        logger.warning("%s has no %s: %s.", path, some_of(optional), remedy)
    logger.info("Loaded %d tensors from %s.", len(given), path)


def _misfits(given: StateDict, own: StateDict) -> dict[str, list[str]]:
    """Describe the given tensors that a model with the state `own` cannot take, by kind of
    misfit.
    """
    shared = [n for n in given if n in own and _is_plain(given[n])]
    first_name: dict[int, str] = {}
    for name in shared:
        first_name.setdefault(own[name].data_ptr(), name)
    twins = [(n, first_name[own[n].data_ptr()]) for n in shared]
    return {
        "has unexpected": [n for n in given if n not in own],
        "has odd": [f"{n} ({t.dtype}, {t.layout})" for n, t in given.items() if not _is_plain(t)],
        "has misshapen": [
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
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{flag} {path}: not a state dict that can be loaded safely ({one_line(error)})"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state.items()
    ):
        raise InputError(
            f"{flag} {path}: expected a plain state dict (name -> tensor); make it with extract.py"
        )
    return dict(state)


def _is_safetensors(path: str) -> bool:
    """Tell by the content: the size of a JSON object comes first. Torch's own files begin
    otherwise.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path)


def _is_plain(tensor: object) -> bool:

    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in kinds
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )


def student_of_layers(teacher: nn.Module, layers: Sequence[int], source: str) -> nn.Module:
    """Make a student out of a teacher's layers `layers` -> 0, 1, .., with all that stands outside
    the layers.

    Compared with the teacher without its other layers. Raises InputError where layers can't be
    taken so.
    """
    lists, num_layers = layer_lists(teacher, source), getattr(teacher.config, NUM_LAYERS, None)
    if not lists:
        raise InputError(
            f"{source}: a {type(teacher).__name__} has no list of layers to choose from (shared or"
            " nested ones can't be taken apart); write the student's configuration yourself, for"
            " --student_config"
        )
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise InputError(
            f"--layers: {wrong[0] if wrong else 'none'}, but {source} has layers 0 to"
            f" {num_layers - 1}"
        )
    config = config_with_layers(teacher.config, layers, source)
    config._attn_implementation = teacher.config._attn_implementation
    try:
        student = type(teacher)(config)
    except Exception as error:
        raise InputError(
            f"{source}: no model of {len(layers)} layers can be made ({one_line(error)})"
        ) from error
    student.to(next(teacher.parameters()).dtype)
    _copy_layers(teacher, student, lists, layers, source)
    _check_layers(teacher, student, lists, layers, source)
    return student


def _copy_layers(
    teacher, student, lists: Sequence[str], layers: Sequence[int], source: str
) -> None:
    """Load the teacher's state, layer numbers changed."""
    own, state = student.state_dict(), {}
    for name, tensor in teacher.state_dict().items():
        path = next((path for path in lists if name.startswith(f"{path}.")), None)
        if path is None:
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        state |= {
            f"{path}.{new}.{rest}": tensor for new, old in enumerate(layers) if int(number) == old
        }
    outside = [name for name in own if not name.startswith(tuple(f"{path}." for path in lists))]
    resized = [name for name in outside if name in state and own[name].shape != state[name].shape]
    state = {name: tensor for name, tensor in state.items() if name not in resized}
    wrong = sorted(set(own) - set(resized) ^ set(state)) or [
        n for n in state if own[n].shape != state[n].shape
    ]
    if wrong:
        raise InputError(
            f"{source}: layers {' '.join(map(str, layers))} can't stand in other places: {wrong[0]}"
            " differs there; choose layers of one kind, in the teacher's own order of kinds"
        )
    # ESM's contact head, which reads the attention of every layer and is no part of the language
    # model
    if resized:
        logger.warning(
            "%s: %s depends on the number of layers, and starts at random.",
            source,
            ", ".join(resized),
        )
    student.load_state_dict(state, strict=False)


@torch.no_grad()
def _check_layers(
    teacher, student, lists: Sequence[str], layers: Sequence[int], source: str
) -> None:
    """Raise InputError where the student computes other logits than the teacher without its other
    layers.
    """
    cut = teacher
    for path in lists:
        kept = nn.ModuleList(teacher.get_submodule(path)[layer] for layer in layers)
        cut = replaced(cut, path, kept)
    _give_config(cut, lists, student.config)
    ids_BT, options = some_ids(teacher, 1), without_cache(teacher)
    try:
        with evaluating(teacher, student, cut):
            same = is_close(student(ids_BT, **options).logits, cut(ids_BT, **options).logits)
    except Exception as error:
        raise InputError(
            f"{source}: can't be called with fewer layers ({one_line(error)}); take another model"
        ) from error
    if not same:
        raise InputError(
            f"{source}: layers {' '.join(map(str, layers))} compute something else in the student,"
            " where they have other numbers; choose layers whose kinds follow each other as in a"
            " model of that depth"
        )


def _give_config(model: nn.Module, lists: Sequence[str], config) -> None:
    """Have the copied modules around the layers read the student's configuration."""
    model.config = config
    for path in lists:
        part = model
        for name in path.split(".")[:-1]:
            part = part._modules[name]
            if hasattr(part, "config"):
                part.config = config
