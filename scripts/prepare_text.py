"""Turn documents into sequences: lines of several whole sentences, for binarized_data.py.

A line holds sentences of one document only. Several languages (--by_language) can be sampled so
that the small ones come more often: with probability p_l = n_l^s / sum_k n_k^s for n_l lines of
language l (Conneau and Lample 2019, section 3.1; multilingual BERT: s = 0.7). The languages then
stand one after the other: binarized_data.py shuffles.
"""

import argparse
import bisect
import collections
import dataclasses
import itertools
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data.text_sources import ERRORS, Source, find_sources, read_blocks, texts_of
from distil.system.files import atomic_path, require_output
from distil.system.signals import exit_on_sigterm
from utils import (
    InputError,
    OneLineParser,
    bar_options,
    keyed_seed,
    logger,
    run_program,
    setup_logging,
)

DOCUMENTS = ("auto", "line", "blank_lines", "file")
PART_CHARS = 2**16  # of a long document this much is held at a time
SMALLEST_MAX_CHARS = 20
DENSE_CHARS = (
    3  # what a character of DENSE counts for: a token is 1 to 2 of them, but 3 to 5 letters
)
# Thai to Lao, Burmese, Hangul, Khmer, Chinese and Japanese.
DENSE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]+"
)

# " = Title = ", " = = Section = = " (WikiText), "== Section ==" (MediaWiki).
HEADING = re.compile(r"^[^\S\n]*=[= ]{0,20}[^=\s][^\n]{0,200}=[= ]{0,20}[^\S\n]*$", re.MULTILINE)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--file_path",
        nargs="+",
        required=True,
        metavar="PATH",
        help=(
            "files, folders or quoted patterns: text, .jsonl, .parquet, .csv ..; text also as .gz,"
            " .bz2, .xz"
        ),
    )
    add(
        "--output",
        default="data/dump.txt",
        help="one sequence a line, UTF-8 (default: %(default)s)",
    )
    add(
        "--text_field",
        default="text",
        help="where a record (.jsonl, .parquet ..) has its text (default: %(default)s)",
    )
    add(
        "--errors",
        choices=ERRORS,
        default="strict",
        help=(
            "lines that are not UTF-8: an error, left out, or mended with U+FFFD (default:"
            " %(default)s)"
        ),
    )
    add(
        "--documents",
        choices=DOCUMENTS,
        default="auto",
        help=(
            "what a document is in a text file: a line; what stands between blank lines (its line"
            " ends become spaces); the whole file; auto: blank_lines if a blank line stands between"
            " others in the first MiB, else line. A record is always one. Headings such as '=="
            " Title ==' end a document and are left out (default: %(default)s)"
        ),
    )
    add(
        "--max_chars",
        type=int,
        default=1000,
        help=(
            "longest line; a Chinese, Japanese, Korean, Thai, Lao, Khmer or Burmese character"
            f" counts as {DENSE_CHARS}. With multilingual BERT's vocabulary 1000 are 220 (English)"
            " to 430 (Bengali) tokens (default: %(default)s)"
        ),
    )
    add(
        "--min_chars",
        type=int,
        default=20,
        help="what is left at a document's end and is shorter is dropped (default: %(default)s)",
    )
    add(
        "--by_language",
        action="store_true",
        help=(
            "each PATH, or each entry of the one folder given, is a language, named up to the"
            " first dot"
        ),
    )
    add(
        "--sampling_exponent",
        type=float,
        default=1.0,
        help=(
            "s of n^s, with --by_language: 1 natural sizes, 0.7 multilingual BERT, 0 equal shares;"
            " other than 1 it needs room for the text twice beside --output (default: %(default)s)"
        ),
    )
    add(
        "--num_lines",
        type=int,
        help=(
            "lines to write, small languages repeated, large ones thinned (default: as many as"
            " there are)"
        ),
    )
    add("--seed", type=int, default=56, help="seed of the sampling (default: %(default)s)")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# Sentences
# --------------------------------------------------------------------------------------------------

# These end a sentence whatever follows: Chinese and Japanese, Arabic and Urdu, Indic, Tibetan,
# Burmese, Khmer, Armenian, Ethiopic. The others need a space, and behind it what can begin one.
STRONG_MARKS = frozenset("。！？｡؟۔।॥།။។։።")
MARKS = ".!?…‥" + "".join(sorted(STRONG_MARKS))
OPENERS = "\"'“‘«‹„‚([{「『【（《¿¡"
CLOSERS = "\"'”’»›)]}」』】）》"
OPENER, CLOSER = re.escape(OPENERS), re.escape(CLOSERS)
SENTENCE_END = re.compile(
    rf"[{MARKS}]+(?:[{CLOSER}]|[“«](?= |$)|\[\d+\])*(?: (?=[{OPENER} ]*([^{OPENER} ])))?"
)
CONTINUING = frozenset(",;:.!?-–—/&%)]}=+*")
THAI = re.compile("[\u0e00-\u0e7f]")
# Initials (J., U.S, z.B, т.е), ordinals (3. Oktober, XIV. Jahrhundert); scripts of syllables and
# ideographs have none.
LETTER = r"[^\W\d_\u1100-\u11ff\u2e80-\U0010ffff]"
INITIALS = re.compile(
    rf"(?:{LETTER}{{1,2}}\.-?)*{LETTER}|(?:{LETTER}{{1,2}}\.)+{LETTER}{{1,2}}|\d{{1,2}}|[ivx]+"
)
ABBREVIATIONS_BY_LANGUAGE = {
    "en": (
        "mr mrs ms dr prof st jr sr vs gen col capt lt sgt maj cmdr adm rev hon gov sen rep pres mt"
        " ft cf ca approx dept univ inc ltd co corp ph.d messrs viz incl esp bros"
    ),
    "de": "bzw hr str abs bspw evtl ggf inkl jh mio mrd sog vgl geb gest hrsg hl",
    "fr es it nl ro": (
        "mme mlle mgr av ee sra srta dra gral núm sig dott ing avv dhr mevr bijv dl dna"
    ),
    "ru": "гг им ул св др тыс млн млрд руб стр рис см напр проф акад обл дж род обр ум кон нач",
    "pl tr fi vi id sw": "tzn tzw św np doç bkz esim mm ks lyh tp ts ths pgs jl pdt takr tar",
    "el hi te": "βλ αριθ डॉ पं కి మీ డా",
}
ABBREVIATIONS = frozenset(" ".join(ABBREVIATIONS_BY_LANGUAGE.values()).split())
NUMBERED = (
    "no nos nr art fig figs vol pp sec ch chap op par eq ed tab bd kap jan feb mar apr jun jul aug"
    " sep sept oct nov dec"
)
BEFORE_A_NUMBER = frozenset(NUMBERED.split(" "))  # No. 5, but: He said no. Then ..


def sentence_ends(text: str) -> list[int]:
    """List where the sentences of a text with single spaces end, the space behind each included;
    the last is len(text).
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text) if _ends_sentence(match)]
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    return ends


def _ends_sentence(match: re.Match) -> bool:
    marks, follows = match[0], match[1]
    if not STRONG_MARKS.isdisjoint(marks):
        return True
    if follows is None or follows.islower() or follows in CONTINUING:
        return False
    if marks[0] != "." or marks[1] in ".…!?":
        return True
    start = match.start()
    return not _is_abbreviation(
        match.string[max(0, start - 20) : start].rpartition(" ")[2], follows
    )


def _is_abbreviation(word: str, follows: str) -> bool:
    # A sentence end that is missed leaves a longer sentence, which does no harm; so what is
    # doubtful is no end.
    if word.startswith(("(", "[")):  # (born. 1950)
        return True
    word = word.lstrip(OPENERS).lower()
    if word in ABBREVIATIONS or (follows.isdigit() and word in BEFORE_A_NUMBER):
        return True
    return bool(
        INITIALS.fullmatch(word) or THAI.match(word[-1:])
    )  # Thai sets no full stop but in abbreviations


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def length(text: str) -> int:
    """Measure a text in characters, those of DENSE as DENSE_CHARS."""
    if text.isascii():
        return len(text)
    return len(text) + (DENSE_CHARS - 1) * sum(map(len, DENSE.findall(text)))


def pack(text: str, max_chars: int, min_chars: int) -> tuple[list[str], str, list[int]]:
    """Join sentences to lines up to `max_chars`: (lines, the last one, which more text may
    lengthen, sentences in both).

    A longer sentence is cut. The text has single spaces. No line but the last is shorter than
    `min_chars`.
    """
    lines: list[str] = []
    start = fits = 0
    ends = sentence_ends(text)
    for end in ends:
        # The first comparison spares most sentences the exact one.
        while (
            end - start > max_chars // DENSE_CHARS and length(text[start:end].rstrip()) > max_chars
        ):
            if fits <= start or length(text[start:fits].rstrip()) < min_chars:
                fits = _place_to_cut(text, start, max_chars, min_chars)
            lines.append(text[start:fits].rstrip())
            start = fits + text.startswith(" ", fits)
        fits = end
    num_before = bisect.bisect_right(ends, start)
    return lines, text[start:], [num_before, len(ends) - num_before]


def _place_to_cut(text: str, start: int, max_chars: int, min_chars: int) -> int:
    """Find where a line that begins at `start` is to end: at its last space or clause, or else
    between two characters.
    """
    window = text[start : start + max_chars + 1]
    limit = bisect.bisect_right(
        range(1, len(window)), max_chars, key=lambda size: length(window[:size])
    )
    if window[limit] == " ":
        return start + limit
    place = max(window.rfind(mark, 0, limit) + 1 for mark in " ，、；")
    if length(window[:place].rstrip()) >= max(min_chars, 1):
        return start + place
    for size in range(limit, max(limit // 2, 1), -1):
        if not _belong_together(window[size - 1], window[size]):
            return start + size
    return start + limit


def _belong_together(left: str, right: str) -> bool:
    # Marks and vowel signs, U+200D, Thai and Lao AM, skin tones; what follows a virama (combining
    # class 9).
    return (
        unicodedata.category(right)[0] == "M"
        or right in "\u200d\u0e33\u0eb3"
        or "\U0001f3fb" <= right <= "\U0001f3ff"
        or left == "\u200d"
        or unicodedata.combining(left) == 9
    )


# --------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Corpus:
    """The files of a language, or all of them, and what was found in them; characters: those of the
    lines.

    forms: how many text files had each form of documents; bad: lines left out or mended; dropped:
    short remainders.
    """

    name: str
    sources: list[Source]
    documents: int = 0
    sentences: int = 0
    lines: int = 0
    characters: int = 0
    dropped: int = 0
    dropped_characters: int = 0
    headings: int = 0
    bad: int = 0
    forms: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def parts_of(texts: Iterable[str], form: str, corpus: Corpus) -> Iterator[tuple[str, bool]]:
    """Yield documents in parts of bounded size: (text, whether its document ends here).

    form: "line" (each text is a document), "blank_lines" or "file" (texts are lines of documents).
    """
    if form == "line":
        for text in texts:
            sections = HEADING.split(text) if "=" in text else [text]
            corpus.headings += len(sections) - 1
            for section in sections:
                yield from _bounded(section, True)
        return
    held: list[str] = []
    size = 0
    for text in texts:
        is_heading = "=" in text and HEADING.fullmatch(text) is not None
        corpus.headings += is_heading
        is_end = is_heading or (form == "blank_lines" and not text.strip())
        if not is_end:
            held.append(text)
            size += len(text) + 1
        if is_end or size > PART_CHARS:
            yield from _bounded("\n".join(held) + "\n", is_end)
            held, size = [], 0
    yield from _bounded("\n".join(held) + "\n", True)


def _bounded(text: str, is_end: bool) -> Iterator[tuple[str, bool]]:
    for place in range(0, len(text), PART_CHARS):
        yield text[place : place + PART_CHARS], is_end and place + PART_CHARS >= len(text)


def lines_of(
    parts: Iterable[tuple[str, bool]], max_chars: int, min_chars: int, corpus: Corpus
) -> Iterator[str]:
    """Yield each document's lines; what is no line end for everyone (U+2028, form feed ..) is a
    space, too.
    """
    rest = ""
    for part, is_end in parts:
        text = " ".join((rest + part).split())
        if part[-1:].isspace() and text and not is_end:
            text += " "
        lines, rest, num_sentences = pack(text, max_chars, min_chars)
        corpus.sentences += num_sentences[0]
        yield from lines
        if is_end and rest:
            corpus.documents += 1
            corpus.sentences += num_sentences[1]
            if length(rest) >= min_chars:
                yield rest
            else:
                corpus.dropped += 1
                corpus.dropped_characters += len(rest)
        if is_end:
            rest = ""


def form_of(first_lines: list[str]) -> str:
    """Tell from a text file's first lines what its documents are: "blank_lines" if one is between
    others, else "line".
    """
    is_text = [bool(line.strip()) for line in first_lines]
    if True not in is_text:
        return "line"
    return (
        "line"
        if all(is_text[is_text.index(True) : len(is_text) - is_text[::-1].index(True)])
        else "blank_lines"
    )


def prepare(corpus: Corpus, args: argparse.Namespace, file: TextIO, bar: tqdm) -> None:
    """Write a corpus's lines; count them."""
    for source in corpus.sources:
        blocks = _texts(source, args, corpus, bar)
        first = next(blocks, [])
        form = args.documents if source.kind == "lines" else "line"
        if form == "auto":
            form = form_of(first)
            corpus.forms[form] += 1
        texts = itertools.chain(first, itertools.chain.from_iterable(blocks))
        for line in lines_of(parts_of(texts, form, corpus), args.max_chars, args.min_chars, corpus):
            file.write(line + "\n")
            corpus.lines += 1
            corpus.characters += len(line)


def _texts(
    source: Source, args: argparse.Namespace, corpus: Corpus, bar: tqdm
) -> Iterator[list[str]]:
    for block in read_blocks(source, args.text_field):
        texts, num_bad = texts_of(block, args.text_field, args.errors)
        corpus.bad += num_bad
        yield texts
        bar.update(block.num_bytes)


# --------------------------------------------------------------------------------------------------
# Languages
# --------------------------------------------------------------------------------------------------


def find_corpora(paths: list[str], by_language: bool) -> list[Corpus]:
    """List the languages, or the one corpus there is, with their files. Raises InputError."""
    if not by_language:
        return [Corpus("all", [source for path in paths for source in find_sources(path)])]
    sources = [(path, source) for path in paths for source in find_sources(path)]
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
    """Compute each language's probability n^s / sum of n^s."""
    weights = [(n / max(num_lines)) ** exponent for n in num_lines]
    return [weight / sum(weights) for weight in weights]


def targets(num_lines: list[int], exponent: float, total: int) -> list[int]:
    """Share `total` lines out among languages: probability x total, rounded so that the sum is
    `total`.
    """
    exact = [share * total for share in shares(num_lines, exponent)]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def sample(path: Path, num_lines: int, target: int, rng: random.Random, output: TextIO) -> None:
    """Copy `target` of a file's lines: whole passes, then the rest drawn without replacement, in
    the file's order.
    """
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


def table(corpora: list[Corpus], counts: list[int]) -> str:
    """Lay out what was found and written, a language a row; times: lines written by lines found."""
    head = f"{'language':12} {'documents':>10} {'lines':>10} {'characters':>12} {'share':>7}"
    head += f" {'written':>10} {'share':>7} {'times':>7}"
    found, written = sum(corpus.lines for corpus in corpora), sum(counts)
    rows = [
        f"{corpus.name:12} {corpus.documents:10} {corpus.lines:10} {corpus.characters:12}"
        f" {corpus.lines / found:7.2%} {count:10} {count / written:7.2%}"
        f" {count / corpus.lines:7.2f}"
        for corpus, count in zip(corpora, counts, strict=True)
    ]
    return "\n".join([head, *rows])


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Raise InputError for numbers that make no sense."""
    problems = []
    if args.max_chars < SMALLEST_MAX_CHARS:
        problems.append(
            f"--max_chars {args.max_chars}: expected at least {SMALLEST_MAX_CHARS}, such as 1000"
        )
    elif not 0 <= args.min_chars <= args.max_chars:
        problems.append(
            f"--min_chars {args.min_chars}: expected 0 to --max_chars, which is {args.max_chars}"
        )
    if not 0 <= args.sampling_exponent <= 1:
        problems.append(
            f"--sampling_exponent {args.sampling_exponent}: expected 0 (equal shares) to 1 (natural"
            " sizes)"
        )
    elif args.sampling_exponent != 1 and not args.by_language:
        problems.append(
            f"--sampling_exponent {args.sampling_exponent}: is among languages; add --by_language"
        )
    if args.num_lines is not None and args.num_lines < 1:
        problems.append(f"--num_lines {args.num_lines}: expected at least 1")
    if problems:
        raise InputError("\n".join(problems))


def write_all(
    corpora: list[Corpus], args: argparse.Namespace, output: TextIO, bar: tqdm
) -> list[int]:
    """Write every line once; list how many each language has."""
    for corpus in corpora:
        prepare(corpus, args, output, bar)
        _require_lines(corpus, args)
    return [corpus.lines for corpus in corpora]


def write_sample(
    corpora: list[Corpus], args: argparse.Namespace, output: TextIO, bar: tqdm
) -> list[int]:
    """Write each language's lines beside the output, then its share of them to the output; list the
    shares in lines.
    """
    with tempfile.TemporaryDirectory(
        prefix=".", suffix=".tmp", dir=Path(args.output).parent
    ) as folder:
        files = [Path(folder) / str(number) for number in range(len(corpora))]
        for corpus, path in zip(corpora, files, strict=True):
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                prepare(corpus, args, file, bar)
            _require_lines(corpus, args)
        num_lines = [corpus.lines for corpus in corpora]
        counts = targets(num_lines, args.sampling_exponent, args.num_lines or sum(num_lines))
        logger.info("Sampling %d of %d lines.", sum(counts), sum(num_lines))
        for corpus, path, count in zip(corpora, files, counts, strict=True):
            sample(
                path, corpus.lines, count, random.Random(keyed_seed(args.seed, corpus.name)), output
            )
            path.unlink()
    return counts


def _require_lines(corpus: Corpus, args: argparse.Namespace) -> None:
    if not corpus.lines:
        where = (
            f"--file_path: language {corpus.name!r}"
            if args.by_language
            else f"--file_path {' '.join(args.file_path)}"
        )
        short = (
            f"{corpus.dropped} shorter than --min_chars {args.min_chars}"
            if corpus.dropped
            else "the text is blank"
        )
        raise InputError(
            f"{where}: no line is left of {corpus.documents} documents ({short}); expected text"
        )


def report(
    corpora: list[Corpus], counts: list[int], args: argparse.Namespace, elapsed_s: float
) -> None:
    """Say what was read, dropped and written."""
    total = Corpus("total", [])
    for corpus in corpora:
        for name in [field.name for field in dataclasses.fields(Corpus)][2:]:
            setattr(total, name, getattr(total, name) + getattr(corpus, name))
    if args.by_language:
        print(table(corpora, counts))
    if total.forms:
        forms = ", ".join(
            f"{form} for {count} files" for form, count in sorted(total.forms.items())
        )
        logger.info("--documents auto: took %s.", forms)
    logger.info(
        "Read %d documents of %d sentences: %d lines of %.0f characters in the mean (%d in all).",
        total.documents,
        total.sentences,
        total.lines,
        total.characters / total.lines,
        total.characters,
    )
    percent = 100 * total.dropped_characters / (total.characters + total.dropped_characters)
    logger.info(
        "Left out %d headings, and %d remainders shorter than %d (%.2f%% of the characters).",
        total.headings,
        total.dropped,
        args.min_chars,
        percent,
    )
    if total.bad:
        logger.warning(
            "%d lines were no valid text: %s.",
            total.bad,
            {"skip": "left out"}.get(args.errors, "mended"),
        )
    logger.info("Wrote %s: %d lines in %.1f s.", args.output, sum(counts), elapsed_s)


def main(argv: list[str] | None = None) -> None:
    """Run the program: read, split, join, sample, write."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check(args)
    corpora = find_corpora(args.file_path, args.by_language)
    sources = [source for corpus in corpora for source in corpus.sources]
    require_output(args.output, "--output", [*args.file_path, *(source.path for source in sources)])
    started = time.perf_counter()
    write = write_all if args.sampling_exponent == 1 and args.num_lines is None else write_sample
    bar = tqdm(
        total=sum(source.num_bytes for source in sources),
        unit="B",
        unit_scale=True,
        desc="prepare",
        **bar_options(),
    )
    with (
        atomic_path(args.output) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as output,
        bar,
    ):
        counts = write(corpora, args, output, bar)
    report(corpora, counts, args, time.perf_counter() - started)


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
