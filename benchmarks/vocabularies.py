"""How many entries of a vocabulary a text needs: by language, by share of the ids.

    python benchmarks/vocabularies.py --teacher FOLDER --texts FOLDER --json FILE

TEXTS holds LANGUAGE.txt files, a text a line. Of each, every tenth run of 5 lines is held out; the
others are counted. Prints a table in Markdown.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.models.architectures import ANY_TOKENIZER
from distil.models.tokenizers import load_tokenizer
from distil.reporting.tables import markdown
from distil.system.files import write_json
from distil.vocabulary.choice import choose, pieces_of, special_numbers, trimmed_tokenizer
from distil.vocabulary.report import compare_on_text

COVERAGES = (0.99, 0.999, 0.9999)
RUN, ONE_OF = 5, 10  # lines held out together; one run of so many


def split(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split lines into counted and held-out ones."""
    parts: tuple[list[str], list[str]] = [], []
    for number, line in enumerate(lines):
        parts[number // RUN % ONE_OF == ONE_OF - 1].append(line)
    return parts


def measure(backend, lines: list[str], unknown: str | None) -> list[dict]:
    """Trim a tokenizer to counted lines at each coverage, and compare on the held-out ones."""
    counted, held_out = split(lines)
    counts_V = np.zeros(max(backend.get_vocab().values()) + 1, np.int64)
    for encoding in backend.encode_batch(counted, add_special_tokens=False):
        np.add.at(counts_V, encoding.ids, 1)
    pieces, special = pieces_of(backend, "--teacher"), special_numbers(backend)
    rows = []
    for coverage in COVERAGES:
        choice = choose(pieces, special, counts_V, None, coverage)
        trimmed = trimmed_tokenizer(backend, pieces, choice.new_of)
        found = compare_on_text(held_out, backend, trimmed, choice, unknown)
        entries = {"coverage": coverage, "entries": len(choice.kept_K)}
        rows.append({**entries, "held_out_ids": found.ids, **found.shares()})
    return rows


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True, help="folder with a tokenizer")
    parser.add_argument("--texts", required=True, help="folder of LANGUAGE.txt")
    parser.add_argument("--json", required=True, help="output")
    args = parser.parse_args()
    tokenizer = load_tokenizer(ANY_TOKENIZER, args.teacher, "--teacher", needs_roles=False)
    backend, everything, found = tokenizer.backend_tokenizer, [], {}
    for path in sorted(Path(args.texts).glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        everything += lines
        found[path.stem] = measure(backend, lines, tokenizer.unk_token)
    found["all"] = measure(backend, everything, tokenizer.unk_token)
    write_json(args.json, {"vocabulary": len(tokenizer), "languages": found})
    head = ["language"] + [f"{c:.2%}: entries, held-out ids, words changed" for c in COVERAGES]
    rows = [
        [name, *(f"{r['entries']:,}, {r['ids_kept']:.2%}, {r['words_changed']:.2%}" for r in rows)]
        for name, rows in found.items()
    ]
    print(markdown([head, *rows]))


if __name__ == "__main__":
    main()
