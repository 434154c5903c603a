"""The figures of the data benchmark: tokenizing, binarizing, counting, opening, collating."""

import argparse
import os
import time
from pathlib import Path

import numpy as np

from benchmarks.data_stages import MB, ROOT, program_memory, run_stage
from distil.data.decoding import texts_of
from distil.data.encoding import Encoding, LineEncoder, WorkerPool, divide_work
from distil.data.text_sources import find_sources, read_blocks
from distil.data.token_files import writing_tokens
from distil.models.architectures import architecture_named
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizers import load_tokenizer
from utils import InputError

LINES_PER_BATCH = 2000


SAMPLE_BYTES = 2_000_000  # of text, for what is slow


class Table:
    """Rows (what, figure, unit, remark), printed as they come and kept for the JSON."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, what: str, figure: float, unit: str, remark: str = "") -> None:
        """Print a row and keep it."""
        self.rows.append({"what": what, "figure": round(figure, 4), "unit": unit, "remark": remark})
        shown = f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:,.2f}"
        print(f"{what:<66} {shown:>10} {unit:<10} {remark}", flush=True)


def make_encoding(args: argparse.Namespace, name: str) -> tuple[Encoding, object]:
    """Load the tokenizer: (how lines become ids, the tokenizer of transformers)."""
    architecture = architecture_named(args.tokenizer_type)
    tokenizer = load_tokenizer(architecture, name, "--tokenizer_name")
    special = special_ids(architecture, tokenizer)
    largest_id = max(tokenizer.get_vocab().values())
    ids = special.start, special.end, largest_id, special.unknown
    return Encoding(tokenizer.backend_tokenizer, *ids), tokenizer


def measure_rates(
    args: argparse.Namespace, table: Table, text: Path, repeated: Path, name: str
) -> None:
    """Measure tokenizing: a line at a time, by the library, and by our workers."""
    encoding, tokenizer = make_encoding(args, name)
    num_workers = len(os.sched_getaffinity(0))
    # Ours first: its processes are forked before the library has threads.
    ours = {}
    for label, path in (
        ("every text once", text),
        (f"{args.small_mb} MB, the text repeated", repeated),
    ):
        (source,) = find_sources(str(path))
        processes, block_bytes = divide_work(source.num_bytes, num_workers)
        started = time.perf_counter()
        with WorkerPool(encoding, processes) as pool:
            for _ in pool.map(read_blocks(source, "text", block_bytes=block_bytes)):
                pass
            ours[label] = os.path.getsize(path) / MB / (time.perf_counter() - started)
    lines = text.read_text(encoding="utf-8").splitlines()
    size = os.path.getsize(text) / MB
    started, done = time.perf_counter(), 0
    for line in lines:
        tokenizer.encode(line, add_special_tokens=False, verbose=False)
        done += len(line.encode()) + 1
        if done > SAMPLE_BYTES:
            break
    loop = done / MB / (time.perf_counter() - started)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    rates = {}
    for method in ("encode_batch", "encode_batch_fast"):
        encode = getattr(encoding.tokenizer, method)
        started = time.perf_counter()
        for k in range(0, len(lines), LINES_PER_BATCH):
            encode(lines[k : k + LINES_PER_BATCH], add_special_tokens=False)
        rates[method] = size / (time.perf_counter() - started)
    library = max(rates.values())
    table.add("tokenizing: a line at a time, as 2019", loop, "MB/s", "one core")
    for method, rate in rates.items():
        table.add(
            f"tokenizing: the library's {method}, ids thrown away",
            rate,
            "MB/s",
            f"{num_workers} cores",
        )
    for label, rate in ours.items():
        remark = (
            f"{rate / library:.2f} x library, {rate / loop:.1f} x loop, {num_workers} processes"
        )
        table.add(f"tokenizing: binarized_data's workers, {label}", rate, "MB/s", remark)


def measure_exactness(args: argparse.Namespace, table: Table, name: str) -> None:
    """Check that cached chunks give the library's ids on the texts of --languages."""
    encoding, _ = make_encoding(args, name)
    cached, plain = LineEncoder(encoding), LineEncoder(encoding, is_cached=False)
    num_ids = num_files = 0
    for source in find_sources(args.languages, "--languages"):
        for block in read_blocks(source, "text", "--languages"):
            lines = [
                line.strip()
                for line in texts_of(block, "text", flag="--languages")[0]
                if line.strip()
            ]
            (found, _), (expected, _) = cached.encode(lines), plain.encode(lines)
            if not np.array_equal(found, expected):
                raise InputError(
                    f"--languages {source.path}: cached chunks gave other ids than the library;"
                    " report it"
                )
            num_ids += len(expected)
        num_files += 1
    table.add(
        f"exactness: ids equal to the library's, {num_files} texts", num_ids, "ids", "all equal"
    )


def measure_binarizing(
    args: argparse.Namespace, table: Table, texts: dict[str, Path], name: str, folder: Path
) -> None:
    """Measure binarized_data.py on two sizes of text, into both formats."""
    for label, path in texts.items():
        for file_format in ("store", "pickle"):
            seconds, memory = program_memory(
                ROOT / "scripts" / "binarized_data.py",
                "--file_path",
                path,
                "--tokenizer_type",
                args.tokenizer_type,
                "--tokenizer_name",
                name,
                "--dump_file",
                folder / f"out-{label}",
                "--format",
                file_format,
            )
            what = f"binarizing {label} MB into a {file_format}"
            rate = os.path.getsize(path) / MB / seconds
            table.add(
                f"{what}: whole program",
                seconds,
                "s",
                f"{rate:.1f} MB/s of text, start and shuffle included",
            )
            remark = (
                "sum over its processes (sum of RSS, shared pages counted in each:"
                f" {memory['rss'] / MB:.0f} MB)"
            )
            table.add(f"{what}: peak memory", memory["pss"] / MB, "MB", remark)


def measure_counting(table: Table, label: str, path: Path, vocab_size: int) -> None:
    """Measure counting and opening a store."""
    found, peak = run_stage("count", path, vocab_size)
    rate = found["ids"] / found["seconds"] / 1e6
    table.add(
        f"counting the store of {label} MB: peak above the interpreter",
        peak / MB,
        "MB",
        f"{rate:.0f} M ids/s",
    )
    found, peak = run_stage("just_open", path)
    table.add(
        f"opening the store of {label} MB: peak above the interpreter",
        peak / MB,
        "MB",
        f"{found['sequences']:,} sequences",
    )


def write_synthetic(path: Path, num_sequences: int, file_format: str, has_card: bool = True) -> int:
    """Write random ids with lengths spread as in Wikipedia's paragraphs; return the ids' bytes."""
    generator, num_ids = np.random.default_rng(0), 0
    card = {
        "tokenizer": {"special_ids": {"start": 101, "end": 102, "pad": 0, "unknown": 100}},
        "counts": {"largest_id": 30521, "boundary_ids_inside": 0},
        "many_unknown": [],
    }
    with writing_tokens(str(path), file_format, np.dtype(np.uint16)) as (writer, written_card):
        for first in range(0, num_sequences, 10**5):
            lengths = np.clip(
                generator.gamma(2.0, 26.0, min(10**5, num_sequences - first)), 6, 600
            ).astype(np.int64)
            ids = generator.integers(1000, 30522, int(lengths.sum()), dtype=np.uint16)
            ends = np.cumsum(lengths)
            ids[ends - lengths], ids[ends - 1] = 101, 102
            writer.append(ids, lengths)
            num_ids += len(ids)
        written_card |= card
    os.sync()  # the next measurement must not wait for the disk
    if not has_card:
        Path(f"{path}.json").unlink()
    return 2 * num_ids


def measure_opening(args: argparse.Namespace, table: Table, folder: Path) -> None:
    """Measure opening, filtering and planning a large synthetic store, with and without a card."""
    path = folder / "synthetic"
    for has_card in (True, False):
        num_bytes = write_synthetic(path, args.num_sequences, "store", has_card)
        found, peak = run_stage("open", path, 512)
        what = (
            f"{args.num_sequences:,} sequences, {num_bytes / 1e9:.2f}"
            f" GB{'' if has_card else ', no card: every id looked at'}"
        )
        seconds = found["open_s"] + found["plan_s"]
        remark = (
            f"open and filter {found['open_s']:.2f} s, plan {found['plan_s']:.2f} s;"
            f" {found['batches']:,} batches"
        )
        table.add(f"store of {what}: ready", seconds, "s", remark)
        table.add(f"store of {what}: first batch", found["first_batch_s"], "s", "after the imports")
        table.add(
            "  its peak of anonymous memory a sequence",
            peak / args.num_sequences,
            "bytes",
            f"{peak / MB:.0f} MB",
        )


def measure_pickle(args: argparse.Namespace, table: Table, folder: Path) -> None:
    """Measure reading the same sequences: a pickle as in 2019, a pickle as here, a store."""
    num = max(args.num_sequences // 10, 1)
    for file_format in ("pickle", "store"):
        write_synthetic(folder / f"same-{file_format}", num, file_format)
    found, peak = run_stage("pickle", folder / "same-pickle")
    table.add(
        f"pickle of {num:,} sequences: pickle.load, as 2019",
        found["seconds"],
        "s",
        f"{peak / MB:.0f} MB, in each process",
    )
    for file_format in ("pickle", "store"):
        found, peak = run_stage("open", folder / f"same-{file_format}", 512)
        what = f"{file_format} of {num:,} sequences: opened, filtered, planned"
        table.add(
            what, found["open_s"] + found["plan_s"], "s", f"{peak / MB:.0f} MB, in each process"
        )
    found, _ = run_stage("collate", folder / "same-store")
    for name, microseconds in found.items():
        way, size = name.rsplit(", ", 1)
        table.add(f"collating {size} sequences: {way}", microseconds, "us", "warm, median")
