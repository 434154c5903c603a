"""English prose found on every machine: docstrings and help topics of the installed packages.

The quickstart's default corpus. Source files are parsed, never imported.
"""

import ast
import concurrent.futures
import hashlib
import importlib.util
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy")
MAX_LINE = 260  # characters; about 55 tokens
MIN_LETTERS = 0.7  # share of letters and spaces in a sentence of prose
MIN_WORDS = 5


def source_files() -> list[Path]:
    """List the Python files of the standard library and of PACKAGES, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in PACKAGES]
    files = [
        path
        for path in library.rglob("*.py")
        if "site-packages" not in path.parts and "test" not in path.parts
    ]
    return sorted(files) + [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def docstrings(path: Path) -> list[str]:
    """List a file's docstrings, and the strings of pydoc's help topics."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    found = []
    is_topics = path.parent.name == "pydoc_data"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.append(text)
        elif is_topics and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a docstring that are prose, without markup, signatures and code."""
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", joined):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if (
                len(sentence.split()) >= MIN_WORDS
                and letters >= MIN_LETTERS * len(sentence)
                and ">>>" not in sentence
            ):
                yield sentence


def documents() -> Iterator[list[str]]:
    """Yield each file's sentences, without those seen before in any file."""
    seen: set[bytes] = set()
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for texts in pool.map(docstrings, source_files(), chunksize=64):
            fresh = []
            for sentence in itertools.chain.from_iterable(map(sentences, texts)):
                key = hashlib.blake2b(sentence.lower().encode(), digest_size=8).digest()
                if key not in seen:
                    seen.add(key)
                    fresh.append(sentence)
            if fresh:
                yield fresh


def lines(document: list[str]) -> Iterator[str]:
    """Join a document's sentences to lines of at most MAX_LINE characters."""
    line = ""
    for sentence in document:
        if line and len(line) + 1 + len(sentence) > MAX_LINE:
            yield line
            line = ""
        line = f"{line} {sentence}" if line else sentence[: 4 * MAX_LINE]
    yield line
