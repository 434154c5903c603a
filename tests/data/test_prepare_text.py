"""Documents to lines of whole sentences: nothing lost, languages sampled in proportion to n^s."""

import collections
import gzip
import itertools
import json
import math
import random
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import run_process
from stand_ins import ROOT

import prepare_text
from distil.data import documents, languages
from distil.data.decoding import texts_of
from distil.data.documents import Corpus, document_lines, document_parts
from distil.data.languages import shares, targets
from distil.data.sentences import pack, sentence_ends, weighted_length
from distil.data.text_sources import find_sources, read_blocks


def prepare(tmp_path: Path, *paths: object, **flags) -> list[str]:
    """Run the program; return the lines of its output."""
    output = tmp_path / "out" / "dump.txt"
    arguments = ["--file_path", *map(str, paths), "--output", str(output), "--force"]
    for name, value in flags.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    prepare_text.main(arguments)
    text = output.read_bytes().decode()
    assert text.endswith("\n") and text.splitlines() == text.split("\n")[:-1], (
        "a line end for some is one for all"
    )
    return text.split("\n")[:-1]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def without_space(text: str) -> str:
    return "".join(text.split())


def numbered(num: int, name: str = "Sentence") -> list[str]:
    return [f"{name} {number:06d} says something." for number in range(num)]


# --------------------------------------------------------------------------------------------------
# Sentences
# --------------------------------------------------------------------------------------------------

# A bar marks the end of a sentence and the beginning of the next.
SENTENCES = [
    "The cat sat. |Then it left! |Did it? |Yes … |No.",
    "He came in 1990. |She left at 3.14 p.m. on a day. |All 24 were won.",
    (
        'Dr. Smith of the U.S. Army met J. R. R. Tolkien, e.g. at No. 500. |"Why?" he asked.'
        ' |"Because." |(Yes, so.) |It ended.'
    ),
    (
        "He said no. |Then see Fig. 3 and Smith Jr. (b. Jan. 5). |It rained.[1][23] |Wait... what?"
        " |Oh?! |What..."
    ),
    (
        "Er wurde am 3. Oktober 1990 geboren, z. B. in Köln bzw. Bonn. |„Ludwig XIV. Friedrich?“"
        " |Das war's."
    ),
    "В 1990 г. А. С. Пушкин жил на ул. Мира. |Он писал стихи! |Где?",
    "黑豹队的防守只丢了 308分，排名第六。|职业碗防守截锋以 3.5 分领先。|“是吗？”|好！！|完。",
    "पैंथर्स छठे स्थान पर रहे। |शॉर्ट ने नेतृत्व किया।|क्या?",
    "لم يتخلى فريق بانثرز. |هل كان ذلك؟ |نعم كان.",
    "یہ ایک جملہ ہے۔ |یہ دوسرا ہے۔",
    "ในปี พ.ศ. 2550 ทีมรับ กทม. ของ น.ส. แพนเธอร์ส ได้อันดับที่หก",
    "그는 비잔티움과 싸웠다. |그것은 이 때. |끝났다.",
    "¿Vive en EE. UU. la Sra. López? |¡Sí! |Claro.",
    "a.b. c, i.e. lower. case goes on . and on",
    "Film and theatre actor . |He had a role ( in 2000 ) . |This was it .",
    "...",
    "x",
]


@pytest.mark.parametrize("marked", SENTENCES)
def test_sentences_end_where_readers_end_them(marked):
    text = marked.replace("|", "")
    starts = [0, *sentence_ends(text)]
    assert [text[a:b] for a, b in itertools.pairwise(starts)] == marked.split("|")


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def test_a_line_takes_as_many_whole_sentences_as_fit(tmp_path):
    rng = random.Random(1)
    sentences = [
        " ".join(rng.choices(["word", "it", "seldom"], k=rng.randint(3, 12))).capitalize() + "."
        for _ in range(300)
    ]
    lines = prepare(tmp_path, write(tmp_path / "text", " ".join(sentences)), max_chars=150)
    expected = [sentences[0]]
    for sentence in sentences[1:]:
        if len(expected[-1]) + 1 + len(sentence) <= 150:
            expected[-1] += " " + sentence
        else:
            expected.append(sentence)
    assert lines == expected


def test_dense_scripts_fill_a_line_with_fewer_characters():
    assert [
        weighted_length("abc."),
        weighted_length("äя."),
        weighted_length("汉字。"),
        weighted_length("ไทย"),
        weighted_length("한국 x"),
        weighted_length("हिन्दी"),
    ] == [
        4,
        3,
        9,
        9,
        8,
        6,
    ]
    lines, rest, _ = pack("汉字汉字汉字汉字。" * 20, 100, 0)
    assert {len(line) for line in lines} == {27} and all(
        weighted_length(line) <= 100 for line in [*lines, rest]
    )


ALPHABETS = [
    "abcdeXYZ",
    "äößÉñ",
    "абвГД",
    "汉字日本カタ",
    "हिंदीक्षत्रिय",
    "العربية",
    "ไทยกำ่น้ำ",
    "한국어가",
    "e\u0301a\u0308\u200d",
    "😀👍🏽👩\u200d🚀",
]
MARKS = [
    ".",
    "!",
    "?",
    "。",
    "।",
    "؟",
    "…",
    '"',
    "(",
    ")",
    "”",
    "1",
    "23",
    "\u200b",
    ",",
    "，",
    "=",
]
SPACES = [
    " ",
    "  ",
    "\t",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1e",
]


def random_line(rng: random.Random) -> str:
    """Make text without \\n and \\r in one or several scripts, sometimes with very long words."""
    pieces = []
    alphabets = rng.sample(ALPHABETS, rng.randint(1, 3))
    for _ in range(rng.randint(1, 60)):
        pieces.append(
            "".join(
                rng.choices(
                    rng.choice(alphabets),
                    k=rng.choice([1, 2, 5, 8, 200 if rng.random() < 0.05 else 3]),
                )
            )
        )
        pieces.append(rng.choice(MARKS) if rng.random() < 0.3 else "")
        pieces.append(rng.choice(SPACES) if rng.random() < 0.2 else rng.choice([" ", " ", ""]))
    return "".join(pieces)


@pytest.mark.parametrize("form", ["line", "blank_lines", "file", "jsonl"])
def test_nothing_is_lost_and_no_line_is_too_long(form, tmp_path):
    rng = random.Random(form)
    for trial in range(25):
        documents = [
            [random_line(rng) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 8))
        ]
        end = rng.choice(["\n", "\r\n", "\r"])
        if form == "jsonl":
            text = "\n".join(
                json.dumps({"text": end.join(document)}, ensure_ascii=trial % 2 == 0)
                for document in documents
            )
        else:
            text = ((end if form == "line" else end * 2).join(map(end.join, documents))) + end
        path = write(tmp_path / f"in.{'jsonl' if form == 'jsonl' else 'txt'}", text)
        flags = {} if form == "jsonl" else {"documents": form}
        max_chars = rng.choice([20, 47, 200, 1000])
        lines = prepare(tmp_path, path, max_chars=max_chars, min_chars=0, **flags)
        assert without_space("".join(lines)) == without_space("".join(map("".join, documents)))
        assert all(
            line and line == " ".join(line.split()) and weighted_length(line) <= max_chars
            for line in lines
        )


SAMPLES = {
    "en": (
        "The Panthers gave up just 308 points. They ranked sixth in the league, didn't they? Yes!"
    ),
    "de": (
        "Die Abwehr ließ nur 308 Punkte zu. Damit lag sie am 3. Oktober auf Platz sechs, nicht"
        " wahr? Ja!"
    ),
    "zh": "黑豹队的防守只丢了 308分，在联赛中排名第六。职业碗防守截锋卡万·肖特以 11 分领先于全队。",
    "hi": (
        "पैंथर्स की डिफ़ेन्स ने लीग में केवल 308 अंक दिए और छठे स्थान पर रहे। कावन शॉर्ट ने सैक में टीम का नेतृत्व किया।"
    ),
    "ar": (
        "لم يتخلى فريق بانثرز سوى عن 308 نقطة، ليحتل المركز السادس. وقد تصدر المدافع كاوان شورت"
        " الفريق؟"
    ),
    "th": (
        "ทีมรับของแพนเธอร์สถอดใจที่คะแนน 308 ได้อันดับที่หกของลีก"
        " ในขณะที่เป็นผู้นำในเอ็นเอฟแอลด้วยการอินเตอร์เซป 24 ครั้ง"
    ),
    "ru": (
        "Защита пропустила всего 308 очков. В 2015 г. она заняла шестое место в лиге, не так"
        " ли? Да!"
    ),
}


@pytest.mark.parametrize("language", SAMPLES)
def test_no_text_of_any_language_is_lost(language, tmp_path):
    text = " ".join([SAMPLES[language]] * 30)
    lines = prepare(tmp_path, write(tmp_path / "in.txt", text), max_chars=300, min_chars=0)
    assert (
        without_space("".join(lines)) == without_space(text)
        and max(map(weighted_length, lines)) <= 300
    )
    assert sum(map(weighted_length, lines)) / len(lines) > 150, "lines are filled"


def test_a_sentence_too_long_is_cut_at_a_space():
    text = " ".join(["word"] * 100)
    lines, rest, _ = pack(text, 42, 20)
    assert lines == [" ".join(["word"] * 8)] * 12 and rest == " ".join(["word"] * 4)


@pytest.mark.parametrize("text", ["e\u0301\u0323", "กำ", "क्षि", "👩\u200d🚀", "👍🏽"])
def test_no_character_is_cut_from_its_marks(text):
    lines, rest, _ = pack("x" + text * 300, 50, 20)
    assert len(lines) > 3
    pattern = re.compile(f"x?({re.escape(text)})*")
    assert all(pattern.fullmatch(line) for line in [*lines, rest])


def test_endless_marks_are_cut():
    lines, rest, _ = pack("e" + "\u0301" * 1000, 50, 20)
    assert len("".join(lines) + rest) == 1001 and max(map(len, lines)) == 50


def test_a_short_sentence_before_a_long_one_is_not_dropped():
    text = "Oh. " + " ".join(["Word"] * 100)
    lines, _, _ = pack(text, 60, 20)
    assert lines[0].startswith("Oh. Word Word")


def test_short_remainders_are_dropped_and_counted(tmp_path, capsys):
    path = write(tmp_path / "in.txt", "Short.\nLong enough to be kept.\n汉字汉字汉字。\n")
    assert prepare(tmp_path, path) == ["Long enough to be kept.", "汉字汉字汉字。"]
    logged = capsys.readouterr().err
    assert (
        "Read 3 documents of 3 sentences: 2 lines of 15 characters on average (30 in all)" in logged
    )
    assert (
        "Left out 0 headings, and 1 remainders shorter than 20 (16.67% of the characters)" in logged
    )


# --------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------

BY_LINE = "One is a line.\nTwo is a line.\n"
BY_BLANK = "\n\nOne is on\ntwo lines.\n  \t\nTwo is here.\n\n\nThree.\n"


@pytest.mark.parametrize(
    "text, documents, expected",
    [
        (BY_LINE, "auto", ["One is a line.", "Two is a line."]),
        (f"\n \n{BY_LINE}\n\n", "auto", ["One is a line.", "Two is a line."]),
        (BY_LINE, "blank_lines", ["One is a line. Two is a line."]),
        (BY_BLANK, "auto", ["One is on two lines.", "Two is here.", "Three."]),
        (BY_BLANK, "blank_lines", ["One is on two lines.", "Two is here.", "Three."]),
        (BY_BLANK, "line", ["One is on", "two lines.", "Two is here.", "Three."]),
        (BY_BLANK, "file", ["One is on two lines. Two is here. Three."]),
    ],
)
def test_documents_are_kept_apart(text, documents, expected, tmp_path):
    assert (
        prepare(tmp_path, write(tmp_path / "in", text), documents=documents, min_chars=0)
        == expected
    )


def test_files_are_kept_apart(tmp_path):
    write(tmp_path / "in" / "a.txt", "The end of one\nis here")
    write(tmp_path / "in" / "b.txt", "and another begins.")
    assert prepare(tmp_path, tmp_path / "in", documents="file", min_chars=0) == [
        "The end of one is here",
        "and another begins.",
    ]


@pytest.mark.parametrize("documents", ["line", "blank_lines", "file"])
def test_headings_separate_documents_and_are_left_out(documents, tmp_path):
    text = " = Title = \n \n First text = here .\n = = Section = = \n==Other==\n Second text ==\n"
    lines = prepare(tmp_path, write(tmp_path / "in", text), documents=documents, min_chars=0)
    assert lines == ["First text = here .", "Second text =="]


def test_a_record_is_a_document(tmp_path):
    records = [
        {"body": "One.\n\nStill one.\r\n== Heading ==\nA section."},
        {"body": ""},
        {"body": None},
        {"body": "Two."},
    ]
    path = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, records)))
    assert prepare(tmp_path, path, text_field="body", min_chars=0) == [
        "One. Still one.",
        "A section.",
        "Two.",
    ]


def test_compressed_files_and_patterns_are_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt.gz").write_bytes(
            gzip.compress(f"This is the text of {name}.\n".encode())
        )
    assert prepare(tmp_path, tmp_path / "*.txt.gz") == [
        "This is the text of a.",
        "This is the text of b.",
    ]


def test_unicode_line_ends_become_spaces(tmp_path):
    path = write(
        tmp_path / "in.jsonl", json.dumps({"text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\u00a0i"})
    )
    assert prepare(tmp_path, path, min_chars=0) == ["a b c d e f g h i"]


def test_invalid_bytes_are_skipped_or_replaced(tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_bytes(
        b"\xef\xbb\xbfThe first good line.\nA bad \xfc in this line.\nThe other good line.\n"
    )
    assert prepare(tmp_path, path, errors="skip") == [
        "The first good line.",
        "The other good line.",
    ]
    assert "1 lines were not valid text: skipped." in capsys.readouterr().err
    assert prepare(tmp_path, path, errors="replace")[1] == "A bad \ufffd in this line."


def test_a_document_may_cross_blocks(tmp_path):
    sentences = numbered(60000)  # 2 MB
    text = "\n".join(sentences[:50000]) + "\n\n" + "\n".join(sentences[50000:])
    lines = prepare(tmp_path, write(tmp_path / "in.txt", text), documents="blank_lines")
    assert " ".join(lines) == " ".join(sentences)
    assert [len(line) for line in lines].count(len(lines[0])) == len(lines) - 2, (
        "only the ends of the two documents are shorter"
    )
    assert any(line.startswith(sentences[50000]) for line in lines)


def test_lines_do_not_depend_on_the_parts_of_a_document():
    rng = random.Random(3)
    for _ in range(60):
        text = " ".join(" ".join(random_line(rng).split()) for _ in range(5))
        # If a sentence is cut inside a word, only one of the two sees the text before the cut.
        text = re.sub(r"[^\W\d]{15,}", "", text)
        whole, parted = Corpus("whole", []), Corpus("parted", [])
        expected = list(document_lines([(text, True)], 200, 20, whole))
        places = [0, *sorted(rng.sample(range(1, len(text)), 4)), len(text)]
        parts = [(text[a:b], b == len(text)) for a, b in itertools.pairwise(places)]
        assert list(document_lines(parts, 200, 20, parted)) == expected
        assert (whole.sentences, whole.documents, whole.dropped) == (
            parted.sentences,
            parted.documents,
            parted.dropped,
        )


@pytest.mark.parametrize("form", ["line", "blank_lines", "file"])
def test_parts_are_bounded(form):
    texts = ["汉字" * 10**6, "word " * 10**6, *["a line"] * 10**5]
    parts = list(document_parts(texts, form, Corpus("all", [])))
    assert max(len(text) for text, _ in parts) <= documents.PART_CHARS and parts[-1][1]
    assert sum(is_end for _, is_end in parts) == {"line": len(texts)}.get(form, 1)
    assert without_space("".join(text for text, _ in parts)) == without_space("".join(texts))


def test_the_output_is_read_back_line_by_line(tmp_path):
    lines = prepare(
        tmp_path,
        write(tmp_path / "in.jsonl", json.dumps({"text": " ".join(numbered(500))})),
        max_chars=100,
    )
    (source,) = find_sources(str(tmp_path / "out" / "dump.txt"))
    found = [text for block in read_blocks(source, "text") for text in texts_of(block, "text")[0]]
    assert found == lines and len(lines) > 100


# --------------------------------------------------------------------------------------------------
# Languages
# --------------------------------------------------------------------------------------------------


def test_shares_follow_the_exponent():
    sizes = [9, 1, 4]
    assert shares(sizes, 1) == pytest.approx([9 / 14, 1 / 14, 4 / 14])
    assert shares(sizes, 0.5) == pytest.approx([3 / 6, 1 / 6, 2 / 6])
    assert shares(sizes, 0) == pytest.approx([1 / 3] * 3)
    assert sum(shares([10**12, 3], 0.7)) == pytest.approx(1)


def test_targets_are_the_rounded_shares_and_sum_to_the_total():
    assert targets([900, 100, 400], 0.5, 1200) == [600, 200, 400]
    assert targets([5, 5, 5], 0.7, 10) == [4, 3, 3]
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randint(1, 10 ** rng.randint(1, 9)) for _ in range(rng.randint(1, 104))]
        exponent, total = rng.choice([0, 0.3, 0.7, 1]), rng.randint(1, 10**9)
        found = targets(sizes, exponent, total)
        assert sum(found) == total
        assert all(
            abs(n - total * share) <= 1
            for n, share in zip(found, shares(sizes, exponent), strict=True)
        )
        assert targets(sizes, 1, sum(sizes)) == sizes


@pytest.fixture
def wiki(tmp_path) -> Path:
    """A folder of three languages: 400 lines, 100 in two files, 25 compressed."""
    folder = tmp_path / "wiki"
    write(folder / "en.txt", "\n".join(numbered(400, "English")))
    write(folder / "sw" / "1.txt", "\n".join(numbered(60, "Swahili")))
    write(folder / "sw" / "2.txt", "\n".join(numbered(40, "Kiswahili")))
    (folder / "is.txt.gz").write_bytes(gzip.compress("\n".join(numbered(25, "Icelandic")).encode()))
    return folder


def by_language(lines: list[str]) -> dict[str, list[int]]:
    """List how often each line occurs, by the lines' first two letters."""
    counts: dict[str, list[int]] = collections.defaultdict(list)
    for line, count in collections.Counter(lines).items():
        counts["Sw" if line.startswith("Kis") else line[:2]].append(count)
    return counts


def test_languages_are_sampled_to_exact_counts(wiki, tmp_path, capsys):
    lines = prepare(tmp_path, wiki, by_language=True, sampling_exponent=0.5)
    counts = by_language(lines)
    # 525 lines in the ratio 20 : 10 : 5.
    assert {name: sum(each) for name, each in counts.items()} == {"En": 300, "Sw": 150, "Ic": 75}
    assert (
        set(counts["En"]) == {1}
        and set(counts["Ic"]) == {3}
        and collections.Counter(counts["Sw"]) == {1: 50, 2: 50}
    )
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows[0] == [
        "language",
        "documents",
        "lines",
        "characters",
        "share",
        "written",
        "share",
        "times",
    ]
    assert ["en", "400", "400", f"{400 * len(lines[0])}", "76.19%", "300", "57.14%", "0.75"] in rows
    assert [row[0] for row in rows[1:]] == ["en", "is", "sw"]


def test_each_path_is_a_language(wiki, tmp_path):
    paths = [wiki / "sw", wiki / "en.txt", wiki / "is.txt.gz"]
    lines = prepare(tmp_path, *paths, by_language=True, sampling_exponent=0, num_lines=30)
    counts = by_language(lines)
    assert list(counts) == ["Sw", "En", "Ic"] and all(each == [1] * 10 for each in counts.values())


@pytest.mark.parametrize("flags", [{}, {"num_lines": 525}])
def test_an_exponent_of_one_keeps_every_line_once(flags, wiki, tmp_path):
    plain = prepare(tmp_path, wiki)
    assert (
        sorted(prepare(tmp_path, wiki, by_language=True, **flags)) == sorted(plain)
        and len(set(plain)) == 525
    )


def test_the_sample_is_reproduced_from_the_seed(wiki, tmp_path):
    first, again, other = (
        prepare(tmp_path, wiki, by_language=True, sampling_exponent=0.7, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other and len(first) == len(other)


def test_a_languages_sample_does_not_depend_on_other_names(wiki, tmp_path):
    flags = {"by_language": True, "sampling_exponent": 0, "num_lines": 60}
    before = prepare(tmp_path, wiki, **flags)
    (wiki / "sw").rename(wiki / "ax")
    after = prepare(tmp_path, wiki, **flags)
    assert [line for line in before if line[:2] in ("En", "Ic")] == [
        line for line in after if line[:2] in ("En", "Ic")
    ]
    assert sorted(before) != sorted(after)


def test_every_line_has_the_same_chance(tmp_path):
    path = write(tmp_path / "lines", "".join(f"{i}\n" for i in range(10)))
    trials, counts = 2000, collections.Counter()
    for seed in range(trials):
        with open(tmp_path / "drawn", "w", encoding="utf-8") as output:
            languages.sample(path, 10, 13, random.Random(seed), output)
        drawn = (tmp_path / "drawn").read_text().split()
        assert (
            drawn[:10] == [str(i) for i in range(10)]
            and drawn[10:] == sorted(set(drawn[10:]))
            and len(drawn) == 13
        )
        counts.update(drawn[10:])
    bound = 5 * math.sqrt(trials * 0.3 * 0.7)
    assert all(abs(counts[str(i)] - 0.3 * trials) < bound for i in range(10))


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

BAD = {
    "no path": ([], "--file_path"),
    "no file": (["{tmp}/nowhere"], "nowhere: no such file"),
    "no match": (["{tmp}/*.nothing"], "no file matches"),
    "empty folder": (["{tmp}/void"], "void: the folder holds no text"),
    "empty file": (["{tmp}/empty"], "empty: the file is empty"),
    "blank": (["{tmp}/blank"], "no line is left of 0 documents (the text is blank)"),
    "short": (["{tmp}/short"], "no line is left of 2 documents (2 shorter than --min_chars 20)"),
    "not utf-8": (["{tmp}/good.txt", "{tmp}/latin"], "latin:2: byte 3 of the line is not UTF-8"),
    "no field": (
        ["{tmp}/in.jsonl", "--text_field", "body"],
        "in.jsonl:1: has no field 'body', only text",
    ),
    "no json": (["{tmp}/bad.jsonl"], "bad.jsonl:2: is not a JSON object"),
    "output is input": (["{tmp}/good.txt", "--output", "{tmp}/good.txt"], "would overwrite"),
    "output among inputs": (["{tmp}/lang", "--output", "{tmp}/lang/new.txt"], "would overwrite"),
    "output is matched": (["{tmp}/*.txt", "--output", "{tmp}/good.txt"], "would overwrite"),
    "output is a folder": (["{tmp}/good.txt", "--output", "{tmp}/void"], "is a folder"),
    "tiny lines": (["{tmp}/good.txt", "--max_chars", "19"], "--max_chars 19: expected at least 20"),
    "no room": (
        ["{tmp}/good.txt", "--max_chars", "30", "--min_chars", "31"],
        "--min_chars 31: expected 0 to --max_chars",
    ),
    "negative": (["{tmp}/good.txt", "--min_chars", "-1"], "--min_chars -1"),
    "exponent": (
        ["{tmp}/lang", "--by_language", "--sampling_exponent", "1.5"],
        "expected 0 (equal shares) to 1",
    ),
    "no number": (
        ["{tmp}/lang", "--by_language", "--sampling_exponent", "nan"],
        "expected 0 (equal shares) to 1",
    ),
    "one language": (["{tmp}/lang", "--sampling_exponent", "0.7"], "add --by_language"),
    "no lines": (["{tmp}/good.txt", "--num_lines", "0"], "--num_lines 0: expected at least 1"),
    "same name": (
        ["{tmp}/lang/en.txt", "{tmp}/en.jsonl", "--by_language"],
        "both language 'en'; put its files in one folder",
    ),
    "same entry": (["{tmp}/twice", "--by_language"], "are both language 'en'"),
    "language without text": (
        ["{tmp}/lang", "{tmp}/blank", "--by_language", "--sampling_exponent", "0"],
        "language 'blank'",
    ),
    "language not utf-8": (
        ["{tmp}/lang", "{tmp}/latin", "--by_language", "--sampling_exponent", "0"],
        "latin:2: byte 3",
    ),
    "unknown flag": (["{tmp}/good.txt", "--by-language"], "did you mean --by_language?"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_the_output_alone(name, tmp_path, status_and_errors):
    arguments, expected = BAD[name]
    good = "This is a good line.\nThis is another one.\n"
    for path in (
        "good.txt",
        "lang/en.txt",
        "lang/sw.txt",
        "twice/en.1.txt",
        "twice/en.2.txt",
        "en.jsonl",
    ):
        write(tmp_path / path, good)
    write(tmp_path / "empty", "")
    write(tmp_path / "blank", " \n\n \n")
    write(tmp_path / "short", "Oh.\nAh.\n")
    (tmp_path / "latin").write_bytes(b"gut\nab\xfc\n")
    write(tmp_path / "in.jsonl", json.dumps({"text": good}))
    write(tmp_path / "bad.jsonl", json.dumps({"text": good}) + "\n{\n")
    (tmp_path / "void").mkdir()
    old = write(tmp_path / "old", "old")
    arguments = ["--file_path", *(word.format(tmp=tmp_path) for word in arguments)]
    if "--output" not in arguments:
        arguments += ["--output", str(old)]
    arguments.append("--force")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    status, errors = status_and_errors(prepare_text.main, arguments)
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_interrupted_run_leaves_nothing(wiki, tmp_path, status_and_errors):
    write(wiki / "en.txt", "\n".join(numbered(300000)))  # 10 MB: more than half a second
    arguments = [
        "--file_path",
        str(wiki),
        "--by_language",
        "--num_lines",
        "5",
        "--output",
        str(tmp_path / "dump.txt"),
    ]
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        status, errors = status_and_errors(prepare_text.main, arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert (status, errors) == (130, ["interrupted"]) and [
        path.name for path in tmp_path.iterdir()
    ] == ["wiki"]


def test_the_program_starts_without_the_large_libraries(tmp_path):
    write(tmp_path / "in.txt", "\n".join(numbered(3)))
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import prepare_text
prepare_text.main(["--file_path", "in.txt", "--output", "out.txt"])
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    done = run_process(sys.executable, "-c", code, cwd=tmp_path, timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text().split("\n") == [*numbered(3), ""]
