"""Which layers of student and teacher the objectives on layers compare: the flags, checked.

Imports no torch, so that train.py checks its flags at once.
"""

import os
from collections.abc import Sequence

from distil.system.json_files import read_json

EXTRACTION = "extraction.json"  # written by scripts/extract.py into the student's folder
Pairs = list[tuple[int, int]]  # (student's layer, teacher's layer), from 0


def parse_layer_map(text: str) -> Pairs:
    """Read STUDENT:TEACHER,.. Raises ValueError that says what is wrong with it."""
    pairs = []
    for entry in text.split(","):
        numbers = entry.strip().split(":")
        if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers):
            raise ValueError(f"{entry.strip()!r} is not two layers; write STUDENT:TEACHER,..")
        pairs.append((int(numbers[0]), int(numbers[1])))
    for owner, layers in zip(("student", "teacher"), zip(*pairs, strict=True), strict=True):
        twice = [layer for layer in layers if layers.count(layer) > 1]
        if twice:
            raise ValueError(f"names layer {twice[0]} of the {owner} twice; leave one entry out")
    return pairs


def layer_problems(
    pairs: Sequence[tuple[int, int]], num_student: int, num_teacher: int
) -> list[str]:
    """Describe each layer that does not exist, with what there is."""
    owners = ("student", num_student), ("teacher", num_teacher)
    return [
        f"the {owner} has no layer {layer}, only 0 to {num_layers - 1}"
        for pair in pairs
        for layer, (owner, num_layers) in zip(pair, owners, strict=True)
        if layer >= num_layers
    ]


def extracted_layers(folder: str, num_student: int, num_teacher: int) -> list[int] | None:
    """Return the teacher's layers that a student was made of, by the file of scripts/extract.py.

    None where there is no such file, or it is of other models. Raises InputError where it cannot be
    read.
    """
    path = os.path.join(folder, EXTRACTION)
    if not os.path.isfile(path):
        return None
    remedy = "remove it, or name the layers with --layer_map"
    content = read_json(path, f"--layer_map: {path}", remedy, {"layers": [int], ...: ...})
    layers, total = content.get("layers", []), content.get("of")
    is_of_these = total == num_teacher and len(layers) == num_student
    return layers if is_of_these and set(layers) <= set(range(num_teacher)) else None
