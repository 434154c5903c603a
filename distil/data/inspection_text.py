"""The report on a token file as text: rows of figures, a histogram, tables of ids, sequences."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distil.data.inspection import PERCENTILES, section
from distil.data.token_files import MIN_LENGTH

BAR_WIDTH = 40


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    yield from _file_lines(report)
    yield from _card_lines(report["card"])
    yield from _length_lines(report)
    yield from _id_lines(report)
    yield from _frequent_lines(report)
    yield from _shown_lines(report)
    if report["problems"]:
        yield from ["", "PROBLEMS: the file is not what its card, or its tokenizer, says"]
        yield from (f"  {problem}" for problem in report["problems"])
    if "verified" in report:
        num_blocks, num_bytes = report["verified"]["blocks"], report["verified"]["bytes"]
        yield from [
            "",
            f"verified: {num_blocks:,} block{'s' if num_blocks > 1 else ''}, {num_bytes:,} bytes",
        ]


def _row(name: str, value: object) -> str:
    return f"{name:<20} {value}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)"


def _size(num_bytes: int) -> str:
    power = next((power for power in (9, 6, 3) if num_bytes >= 10**power), 0)
    unit = {9: "GB", 6: "MB", 3: "kB", 0: "bytes"}[power]
    return f"{num_bytes / 10**power:,.1f} {unit}" if power else f"{num_bytes} bytes"


def _file_lines(report: Mapping[str, Any]) -> Iterator[str]:
    files = ", ".join(
        f"{os.path.basename(file['path'])} {_size(file['bytes'])}" for file in report["files"]
    )
    yield _row("path", report["path"])
    yield _row("format", f"{report['format']} of {report['dtype']}")
    yield _row("on disk", f"{_size(report['bytes'])} ({files})")
    yield _row("tokenizer", report["tokenizer"])


def _card_lines(card: Mapping[str, Any]) -> Iterator[str]:
    if not card:
        yield _row("card", "none")
        return
    tokenizer, counts = section(card, "tokenizer"), section(card, "counts")
    if tokenizer:
        lower_case = {True: ", lower-cased", False: ", not lower-cased"}.get(
            tokenizer.get("do_lower_case"), ""
        )
        size, fingerprint = (
            tokenizer.get("vocab_size"),
            str(tokenizer.get("vocabulary_sha256"))[:12],
        )
        yield _row(
            "made with",
            f"{tokenizer.get('name')} ({tokenizer.get('type')}{lower_case}), {size} entries, "
            f"fingerprint {fingerprint}",
        )
    made = {"seed": "seed of the shuffle", "errors": "text not UTF-8"}
    yield from (
        _row(label, card[name]) for name, label in made.items() if card.get(name) is not None
    )
    for label, source in _first_sources(card.get("sources")):
        yield _row(label, source)
    skipped = [
        f"{counts[name]:,} {name.replace('_', ' ')}"
        for name in ("blank_lines", "bad_lines")
        if name in counts
    ]
    if skipped:
        yield _row("left out of them", ", ".join(skipped))
    if counts.get("words"):
        in_text = counts.get("ids", 0) - 2 * counts.get("sequences", 0)
        yield _row("words", f"{counts['words']:,}, {in_text / counts['words']:.2f} ids a word")


def _first_sources(sources: object, limit: int = 5) -> Iterator[tuple[str, str]]:
    sources = (
        [source for source in sources if isinstance(source, Mapping)]
        if isinstance(sources, list)
        else []
    )
    for k, source in enumerate(sources[:limit]):
        size = f" {_size(source['bytes'])}" if isinstance(source.get("bytes"), int) else ""
        yield ("made from" if k == 0 else ""), f"{source.get('path')}{size}"
    if len(sources) > limit:
        yield "", f"and {len(sources) - limit} more files"


def _length_lines(report: Mapping[str, Any]) -> Iterator[str]:
    lengths, num_sequences = report["lengths"], report["sequences"]
    percentiles = ", ".join(f"{name} {lengths[name]:,}" for name in PERCENTILES)
    yield ""
    yield _row("sequences", f"{num_sequences:,}")
    yield _row("ids", f"{report['ids']:,}")
    yield _row(
        "ids a sequence",
        f"mean {lengths['mean']:.1f}, {percentiles}, shortest {lengths['shortest']:,}, "
        f"longest {lengths['longest']:,}",
    )
    yield _row(
        "too short to train",
        f"{_share(lengths['short'], num_sequences)}: {MIN_LENGTH} ids or fewer",
    )
    yield ""
    yield f"{'ids a sequence':>14} {'sequences':>13} {'':>7} {'their ids':>15}"
    most = max(row["sequences"] for row in lengths["histogram"])
    for row in lengths["histogram"]:
        if row["from"] <= lengths["longest"]:
            share, bar = (
                row["sequences"] / num_sequences,
                "#" * -(-BAR_WIDTH * row["sequences"] // most),
            )
            line = (
                f"{_range(row):>14} {row['sequences']:>13,} {share:>7.1%} {row['ids']:>15,}  {bar}"
            )
            yield line.rstrip()


def _range(row: Mapping[str, Any]) -> str:
    if row["to"] is None:
        return f"{row['from']} and more"
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']} to {row['to']}"


def _id_lines(report: Mapping[str, Any]) -> Iterator[str]:
    vocabulary, unknown, boundaries = report["vocabulary"], report["unknown"], report["boundaries"]
    yield ""
    yield _row("smallest, largest id", f"{vocabulary['smallest']}, {vocabulary['largest']}")
    if vocabulary["size"] is None:
        yield _row("ids that occur", f"{vocabulary['occur']:,}")
    else:
        yield _row(
            "vocabulary",
            f"{vocabulary['size']:,} entries: {vocabulary['occur']:,} occur,"
            f" {vocabulary['never']:,} never; ids outside it: {vocabulary['outside']:,}",
        )
    if unknown is not None:
        yield _row("unknown ids", f"{_share(unknown['count'], report['ids'])}: id {unknown['id']}")
        yield _row(
            "mostly unknown",
            f"{_share(unknown['half_unknown_sequences'], report['sequences'])} of the sequences:"
            " half or more",
        )
    if boundaries is not None:
        first = boundaries["first_wrong"]
        where = "" if first is None else f", sequence {first:,} the first"
        yield _row(
            "without boundaries",
            f"{_share(boundaries['wrong_sequences'], report['sequences'])} of the sequences do "
            f"not begin with id {boundaries['start']} and end with id {boundaries['end']}"
            f"{where}",
        )
    if report["special"]:
        yield ""
        yield from _special_lines(report["special"])


def _special_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    roles = [", ".join(row["roles"]) or "-" for row in rows]
    width = max(map(len, ["role", *roles]))
    yield (
        f"{'special id':>10}  {'token':<14} {'role':<{width}} {'first':>13} {'last':>13}"
        f" {'inside':>13}  of a sequence"
    )
    for row, role in zip(rows, roles, strict=True):
        counts = " ".join(f"{row[place]:>13,}" for place in ("first", "last", "inside"))
        yield f"{row['id']:>10}  {row['token'] or '-':<14} {role:<{width}} {counts}"


def _frequent_lines(report: Mapping[str, Any]) -> Iterator[str]:
    if report["most_frequent"]:
        yield ""
        yield f"{'frequent id':>11} {'occurrences':>15} {'share':>7}  token"
        for row in report["most_frequent"]:
            figures = f"{row['id']:>11} {row['count']:>15,} {row['share']:>7.2%}"
            yield f"{figures}  {row['token'] or ''}".rstrip()


def _shown_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["shown"]:
        why = f" ({row['why']})" if row["why"] else ""
        unknown = f", {row['unknown']:,} unknown" if row["unknown"] else ""
        yield ""
        yield f"sequence {row['number']:,}{why}: {row['length']:,} ids{unknown}"
        rest = " ..." if row["length"] > len(row["ids"]) else ""
        yield f"  {' '.join(map(str, row['ids'])) + rest if row['text'] is None else row['text']}"
