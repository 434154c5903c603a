"""Documents of a corpus, in parts of bounded size, to lines of whole sentences.

A document never shares a line with another one. Counts are added to the Corpus on the way.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator

from distil.data.sentences import pack, weighted_length
from distil.data.text_sources import Source

DOCUMENTS = ("auto", "line", "blank_lines", "file")
PART_CHARS = 2**16  # of a long document, held at a time
# " = Title = ", " = = Section = = " (WikiText), "== Section ==" (MediaWiki).
HEADING = re.compile(r"^[^\S\n]*=[= ]{0,20}[^=\s][^\n]{0,200}=[= ]{0,20}[^\S\n]*$", re.MULTILINE)


@dataclasses.dataclass
class Corpus:
    """The files of a language, or all files, and the counts of what they hold.

    characters: of the lines. dropped: remainders shorter than --min_chars. bad: lines skipped or
    repaired. forms: text files by the form of their documents.
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


def document_parts(texts: Iterable[str], form: str, corpus: Corpus) -> Iterator[tuple[str, bool]]:
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


def document_lines(
    parts: Iterable[tuple[str, bool]], max_chars: int, min_chars: int, corpus: Corpus
) -> Iterator[str]:
    """Yield each document's lines; all white space, U+2028 and form feeds too, becomes a space."""
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
            if weighted_length(rest) >= min_chars:
                yield rest
            else:
                corpus.dropped += 1
                corpus.dropped_characters += len(rest)
        if is_end:
            rest = ""


def guess_form(first_lines: list[str]) -> str:
    """Return "blank_lines" if a blank line is between a text file's first lines, else "line"."""
    is_text = [bool(line.strip()) for line in first_lines]
    if True not in is_text:
        return "line"
    between = is_text[is_text.index(True) : len(is_text) - is_text[::-1].index(True)]
    return "line" if all(between) else "blank_lines"
