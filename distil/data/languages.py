"""Languages of a multilingual corpus: which files belong to each, and how many of their lines.

A language with n lines is sampled with probability p_l = n_l^s / sum_k n_k^s (Conneau and Lample
2019, section 3.1; multilingual BERT: s = 0.7), so that small languages come more often.
"""

import os
import random
import shutil
from pathlib import Path
from typing import TextIO

from distil.data.documents import Corpus
from distil.data.hub_datasets import find_files
from utils import InputError


def find_languages(paths: list[str], split: str | None) -> list[Corpus]:
    """List the languages of paths; raise InputError for ambiguous names."""
    sources = [(path, source) for path in paths for source in find_files(path, split)]
    if len(paths) == 1 and os.path.isdir(paths[0]):
        folder = Path(paths[0])
        sources = [
            (str(folder / Path(source.path).relative_to(folder).parts[0]), source)
            for _, source in sources
        ]
    corpora: dict[str, Corpus] = {}
    path_of: dict[str, str] = {}
    for path, source in sources:
        name = Path(path).absolute().name.split(".")[0]
        if path_of.setdefault(name, path) != path:
            found = f"{path_of[name]} and {path} are both language {name!r}"
            raise InputError(f"--file_path: {found}; put its files in one folder, and give that")
        corpora.setdefault(name, Corpus(name, [])).sources.append(source)
    return list(corpora.values())


def shares(num_lines: list[int], exponent: float) -> list[float]:
    """Return each language's probability n^s / sum of n^s."""
    weights = [(n / max(num_lines)) ** exponent for n in num_lines]
    return [weight / sum(weights) for weight in weights]


def targets(num_lines: list[int], exponent: float, total: int) -> list[int]:
    """Return each language's lines, probability x total, rounded so that they sum to `total`."""
    exact = [share * total for share in shares(num_lines, exponent)]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def sample(path: Path, num_lines: int, target: int, rng: random.Random, output: TextIO) -> None:
    """Copy `target` of a file's lines in order: whole passes, then draws without replacement."""
    passes, needed = divmod(target, num_lines)
    with open(path, "rb") as file:
        output.flush()
        for _ in range(passes):
            file.seek(0)
            shutil.copyfileobj(file, output.buffer, 2**20)
        file.seek(0)
        # Selection sampling: each line with probability needed / remaining (Knuth, volume 2, 3.4.2,
        # algorithm S).
        for remaining in range(num_lines, 0, -1):
            if not needed:
                break
            line = file.readline()
            if rng.random() * remaining < needed:
                output.buffer.write(line)
                needed -= 1
