"""Measure the way from text to batches: rates, memory, times; prints a table and writes it as JSON.

Beside our programs stand, in the same run: tokenizing one line at a time, the tokenizers library
alone on the same batches, and the pickled list of 2019. Memory is looked at from outside, in
processes of their own. Linux only (/proc). By default the text is the prose that the installed
packages carry, and the vocabulary is trained on it.
"""

import argparse
import contextlib
import json
import logging
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distil.data import builtin_corpus
from distil.data.decoding import texts_of
from distil.data.encoding import Encoding, LineEncoder, WorkerPool, divide_work
from distil.data.text_sources import find_sources, read_blocks
from distil.data.token_files import open_token_file, writing_tokens
from distil.models.hub import short_name
from distil.models.tokenizers import load_tokenizer, special_ids, train_word_pieces
from distil.system.files import require_output, write_json
from utils import InputError, OneLineParser, logger, run_program, setup_logging

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 30_000
LINES_PER_BATCH = 2000
SAMPLE_BYTES = 2_000_000  # of text, for what is slow
MB = 1e6


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--text", help="text to tokenize, a file or folder (default: the installed packages' prose)"
    )
    add(
        "--tokenizer_type",
        default="bert",
        choices=["bert", "roberta", "gpt2"],
        help="(default: %(default)s)",
    )
    add(
        "--tokenizer_name",
        help="hub name or folder (default: a WordPiece vocabulary is trained on the text)",
    )
    add(
        "--languages",
        help=(
            "folder of texts on each of which remembered chunks are compared with the library's ids"
        ),
    )
    add(
        "--small_mb",
        type=int,
        default=60,
        help="text for rates and for the smaller memory figure, MB (default: %(default)s)",
    )
    add(
        "--large_mb",
        type=int,
        default=1000,
        help="text for the larger memory figure, MB (default: %(default)s)",
    )
    add(
        "--num_sequences",
        type=int,
        default=10**7,
        help="of the synthetic store (default: %(default)s)",
    )
    add("--folder", help="where the working files go, several GB (default: a temporary folder)")
    add("--json", default="benchmark_data.json", help="output (default: %(default)s)")
    add("--stage", help=argparse.SUPPRESS)
    add("--arguments", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("small_mb", "large_mb", "num_sequences"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


class Table:
    """Rows (what, figure, unit, beside what), printed as they come and kept for the JSON."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, what: str, figure: float, unit: str, remark: str = "") -> None:
        """Print a row and keep it."""
        self.rows.append({"what": what, "figure": round(figure, 4), "unit": unit, "remark": remark})
        shown = f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:,.2f}"
        print(f"{what:<66} {shown:>10} {unit:<10} {remark}", flush=True)


# --------------------------------------------------------------------------------------------------
# Text and tokenizer
# --------------------------------------------------------------------------------------------------


def make_text(args: argparse.Namespace, folder: Path) -> Path:
    """Write the text once, a sequence a line."""
    path = folder / "text.txt"
    if args.text:
        blocks = (
            block
            for source in find_sources(args.text, "--text")
            for block in read_blocks(source, "text", "--text")
        )
        lines: Iterable[str] = (
            line.strip() for block in blocks for line in texts_of(block, "text", flag="--text")[0]
        )
    else:
        lines = (
            line
            for document in builtin_corpus.documents()
            for line in builtin_corpus.lines(document)
        )
    path.write_text("".join(line + "\n" for line in lines if line), encoding="utf-8")
    return path


def repeat(path: Path, size_mb: int) -> Path:
    """Write a text again and again until there are size_mb MB."""
    content, size = path.read_bytes(), int(size_mb * MB)
    target = path.with_name(f"text-{size_mb}.txt")
    with open(target, "wb") as file:
        while file.tell() < size:
            file.write(content)
    return target


def make_tokenizer(args: argparse.Namespace, text: Path, folder: Path) -> str:
    """Return the tokenizer's name; without one, train a WordPiece vocabulary."""
    if args.tokenizer_name:
        return args.tokenizer_name
    import transformers

    target = folder / "trained-bert"
    vocabulary = train_word_pieces(text, VOCAB_SIZE)
    transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(target)
    return str(target)


def make_encoding(args: argparse.Namespace, name: str) -> tuple[Encoding, object]:
    """Load the tokenizer: (how lines become ids, the tokenizer of transformers)."""
    tokenizer = load_tokenizer(args.tokenizer_type, name, "--tokenizer_name")
    special = special_ids(args.tokenizer_type, tokenizer)
    largest_id = max(tokenizer.get_vocab().values())
    ids = special["start"], special["end"], largest_id, special["unknown"]
    return Encoding(tokenizer.backend_tokenizer, *ids), tokenizer


# --------------------------------------------------------------------------------------------------
# Processes looked at from outside
# --------------------------------------------------------------------------------------------------


def anonymous_bytes(pid: int) -> int:
    """Return a process's anonymous memory: what is its own, pages of mapped files apart."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def watched(sample: Callable[[], int], process: subprocess.Popen, every_s: float = 0.01) -> int:
    """Return the largest sample until a process ends. Raises InputError where it fails."""
    largest = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):  # it, or a child, has just ended
            largest = max(largest, sample())
        time.sleep(every_s)
    if process.returncode != 0:
        said = " ".join(process.stderr.read().splitlines()[-1:])
        raise InputError(
            f"{' '.join(map(str, process.args))}: ended with status {process.returncode}: {said}"
        )
    return largest


def program_memory(*command: object) -> tuple[float, dict[str, int]]:
    """Run a program: (seconds, largest sums over its processes of rss and pss, in bytes)."""
    started = time.perf_counter()
    largest = {"rss": 0, "pss": 0}
    words = [sys.executable, *map(str, command)]
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        root = psutil.Process(process.pid)

        def sample() -> int:
            infos = [one.memory_full_info() for one in (root, *root.children(recursive=True))]
            for kind in largest:
                largest[kind] = max(largest[kind], sum(getattr(info, kind) for info in infos))
            return 0

        watched(sample, process, 0.05)
    return time.perf_counter() - started, largest


def run_stage(name: str, *arguments: object) -> tuple[dict, int]:
    """Run a stage in a process of its own: (what it found, its peak of anonymous memory above that
    after its imports).
    """
    command = [sys.executable, __file__, "--stage", name, "--arguments", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        if process.stdout.readline() != "ready\n":
            raise InputError(f"stage {name}: did not start: {process.communicate()[1].strip()}")
        before = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        peak = watched(lambda: anonymous_bytes(process.pid), process, 0.002)
        return json.loads(process.stdout.read()), peak - before


def in_stage(stage: Callable[[], dict]) -> None:
    """In the process of a stage: say that the imports are done, wait for a look, work, print what
    was found.
    """
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(stage()), flush=True)


def stage_open(path: str, max_length: str) -> None:
    """Open a token file, filter, plan an epoch, make the first batch."""
    from grouped_batch_sampler import GroupedBatchSampler
    from lm_seqs_dataset import LmSeqsDataset, SpecialIds

    def work() -> dict:
        started = time.perf_counter()
        dataset = LmSeqsDataset.from_file(
            path, SpecialIds(101, 102, 0, 100), int(max_length), 2**31 - 1, "the benchmark"
        )
        opened = time.perf_counter()
        sampler = GroupedBatchSampler(
            dataset.lengths, 5, dataset.max_length, group_by_size=True, seed=56
        )
        batches = sampler.epoch_batches(0)
        planned = time.perf_counter()
        dataset.collate(batches[0])
        return {
            "open_s": opened - started,
            "plan_s": planned - opened,
            "first_batch_s": time.perf_counter() - started,
            "sequences": len(dataset),
            "batches": len(batches),
        }

    in_stage(work)


def stage_just_open(path: str) -> None:
    """Open a token file, no more."""
    in_stage(lambda: {"sequences": len(open_token_file(path).lengths_N)})


def stage_count(path: str, vocab_size: str) -> None:
    """Count the ids of a token file."""
    import token_counts

    def work() -> dict:
        started = time.perf_counter()
        counts_V = token_counts.count_ids(
            open_token_file(path), int(vocab_size), path, "the benchmark"
        )
        return {"seconds": time.perf_counter() - started, "ids": int(counts_V.sum())}

    in_stage(work)


def stage_pickle(path: str) -> None:
    """Read a pickled list as the 2019 program did: unpickle, and an array of lengths."""

    def work() -> dict:
        started = time.perf_counter()
        with open(path, "rb") as file:
            data = pickle.load(file)  # a file that this run has made
        lengths = np.array([len(sequence) for sequence in data])
        return {"seconds": time.perf_counter() - started, "sequences": len(lengths)}

    in_stage(work)


def stage_collate(path: str) -> None:
    """Make batches of neighbouring lengths: one gather each, and a sequence at a time."""
    import torch

    from grouped_batch_sampler import GroupedBatchSampler
    from lm_seqs_dataset import LmSeqsDataset, SpecialIds

    def one_by_one(dataset: LmSeqsDataset, indices: np.ndarray) -> torch.Tensor:
        ends = dataset.starts[indices] + dataset.lengths[indices]
        parts = [
            dataset.tokens.ids_M[a:b].astype(np.int64)
            for a, b in zip(dataset.starts[indices], ends, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, parts)), batch_first=True)

    def work() -> dict:
        dataset = LmSeqsDataset.from_file(
            path, SpecialIds(101, 102, 0, 100), 512, 2**31 - 1, "the benchmark"
        )
        found = {}
        for size in (5, 256):
            sampler = GroupedBatchSampler(dataset.lengths, size, 512, group_by_size=True, seed=56)
            batches = [sampler.epoch_batches(0)[k] for k in range(min(300, len(sampler)))]
            for name, make in (
                ("gather", dataset.collate),
                ("one by one", lambda b: one_by_one(dataset, b)),
            ):
                for batch in batches:  # touch every page once
                    make(batch)
                started = time.perf_counter()
                for batch in batches:
                    make(batch)
                found[f"{name}, {size}"] = (time.perf_counter() - started) / len(batches) * 1e6
        return found

    in_stage(work)


STAGES = {
    "open": stage_open,
    "just_open": stage_just_open,
    "count": stage_count,
    "pickle": stage_pickle,
    "collate": stage_collate,
}


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def measure_rates(
    args: argparse.Namespace, table: Table, text: Path, repeated: Path, name: str
) -> None:
    """Tokenize: a line at a time, by the library, and by our workers."""
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
    """Compare remembered chunks with the library's ids on every text of --languages. Raises
    InputError at a difference.
    """
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
                    f"--languages {source.path}: remembered chunks gave other ids than the library;"
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
    """Run binarized_data.py at two sizes of text, into both formats."""
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
                "sum over its processes (sum of RSS, shared pages counted anew:"
                f" {memory['rss'] / MB:.0f} MB)"
            )
            table.add(f"{what}: peak memory", memory["pss"] / MB, "MB", remark)


def measure_counting(table: Table, label: str, path: Path, vocab_size: int) -> None:
    """Count and open a store."""
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
    """Write a token file of random ids, lengths spread as Wikipedia's paragraphs' are; return its
    bytes of ids.
    """
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
    os.sync()  # what is measured next should not wait for this to reach the disk
    if not has_card:
        Path(f"{path}.json").unlink()
    return 2 * num_ids


def measure_opening(args: argparse.Namespace, table: Table, folder: Path) -> None:
    """Open, filter and plan a large synthetic store, with its card and without."""
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
    """Read the same sequences from a pickled list as 2019, and as we do, and from a store."""
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
        way, size = name.split(", ")
        table.add(f"collating {size} sequences: {way}", microseconds, "us", "warm")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Measure everything."""
    table = Table()
    text = make_text(args, folder)
    name = make_tokenizer(args, text, folder)
    texts = {str(size): repeat(text, size) for size in (args.small_mb, args.large_mb)}
    table.add(
        "text, once",
        os.path.getsize(text) / MB,
        "MB",
        f"{args.text or 'prose of the installed packages'}; {short_name(name)}",
    )
    measure_rates(args, table, text, texts[str(args.small_mb)], name)
    if args.languages:
        measure_exactness(args, table, name)
    measure_binarizing(args, table, texts, name, folder)
    vocab_size = make_encoding(args, name)[0].largest_id + 1
    for label in texts:
        measure_counting(table, label, folder / f"out-{label}.{short_name(name)}", vocab_size)
    measure_opening(args, table, folder)
    measure_pickle(args, table, folder)
    versions = {
        module: sys.modules[module].__version__
        for module in ("numpy", "tokenizers", "transformers")
    }
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores,"
        f" {psutil.virtual_memory().total / 1e9:.0f} GB"
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "python": platform.python_version(),
        **versions,
        "flags": {k: v for k, v in vars(args).items() if k not in ("stage", "arguments")},
        "rows": table.rows,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, or one stage of it in a process of its own."""
    args = parse(argv)
    if args.stage:
        STAGES[args.stage](*args.arguments)
        return
    setup_logging(logging.WARNING)
    require_output(args.json, "--json")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        found = measure(args, Path(folder))
    write_json(args.json, found)
    logger.setLevel(logging.INFO)
    logger.info("Wrote %s.", args.json)


if __name__ == "__main__":
    run_program(main)
