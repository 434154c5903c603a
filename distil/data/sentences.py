"""Sentences of any language, found by rules, and packed into lines of bounded length.

A sentence end that is missed leaves a longer sentence, which does no harm; a false one cuts a
sentence in two. So doubtful places are not ends.
"""

import bisect
import re
import unicodedata

# The weight of a character of DENSE: a token is 1 to 2 of them, but 3 to 5 letters.
DENSE_CHARS = 3
# Thai to Lao, Burmese, Hangul, Khmer, Chinese and Japanese.
DENSE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]+"
)
# Marks that always end a sentence: Chinese and Japanese, Arabic and Urdu, Indic, Tibetan, Burmese,
# Khmer, Armenian, Ethiopic. The others need a space and a possible beginning after it.
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
# ideographs do not use them.
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
    """List the sentence ends of a text with single spaces, after the space; the last is its end."""
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
    if word.startswith(("(", "[")):  # (born. 1950)
        return True
    word = word.lstrip(OPENERS).lower()
    if word in ABBREVIATIONS or (follows.isdigit() and word in BEFORE_A_NUMBER):
        return True
    # Thai uses full stops in abbreviations only.
    return bool(INITIALS.fullmatch(word) or THAI.match(word[-1:]))


def weighted_length(text: str) -> int:
    """Count the characters of a text, each of DENSE as DENSE_CHARS."""
    if text.isascii():
        return len(text)
    return len(text) + (DENSE_CHARS - 1) * sum(map(len, DENSE.findall(text)))


def pack(text: str, max_chars: int, min_chars: int) -> tuple[list[str], str, list[int]]:
    """Join the sentences of a text with single spaces to lines of at most `max_chars`.

    A longer sentence is cut, and no line but the last is shorter than `min_chars`. Returns (lines,
    the last line, which more text may extend, number of sentences in the lines and in the last).
    """
    lines: list[str] = []
    start = fits = 0
    ends = sentence_ends(text)
    for end in ends:
        # The first comparison saves most sentences the exact one.
        while (
            end - start > max_chars // DENSE_CHARS
            and weighted_length(text[start:end].rstrip()) > max_chars
        ):
            if fits <= start or weighted_length(text[start:fits].rstrip()) < min_chars:
                fits = _place_to_cut(text, start, max_chars, min_chars)
            lines.append(text[start:fits].rstrip())
            start = fits + text.startswith(" ", fits)
        fits = end
    num_before = bisect.bisect_right(ends, start)
    return lines, text[start:], [num_before, len(ends) - num_before]


def _place_to_cut(text: str, start: int, max_chars: int, min_chars: int) -> int:
    """Return where to cut a line that begins at `start`: after a space, a clause or a character."""
    window = text[start : start + max_chars + 1]
    limit = bisect.bisect_right(
        range(1, len(window)), max_chars, key=lambda size: weighted_length(window[:size])
    )
    if window[limit] == " ":
        return start + limit
    place = max(window.rfind(mark, 0, limit) + 1 for mark in " ，、；")
    if weighted_length(window[:place].rstrip()) >= max(min_chars, 1):
        return start + place
    for size in range(limit, max(limit // 2, 1), -1):
        if not _belong_together(window[size - 1], window[size]):
            return start + size
    return start + limit


def _belong_together(left: str, right: str) -> bool:
    # Marks and vowel signs, U+200D, Thai and Lao AM, skin tones; letters after a virama (combining
    # class 9).
    return (
        unicodedata.category(right)[0] == "M"
        or right in "\u200d\u0e33\u0eb3"
        or "\U0001f3fb" <= right <= "\U0001f3ff"
        or left == "\u200d"
        or unicodedata.combining(left) == 9
    )
