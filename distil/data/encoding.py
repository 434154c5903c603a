"""Blocks of text to token ids, in worker processes.

WordPiece and byte-level BPE encode the text between two spaces independently of its neighbours, so
the ids of such a chunk are cached: most chunks of a text were seen before, and a dictionary is
several times faster than the tokenizers library. `chunk_rule` says for which tokenizers this holds.
"""

import array
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from distil.data.decoding import texts_of
from distil.data.text_sources import BLOCK_BYTES, Block
from distil.system.signals import holding_signals
from utils import InputError, naming_panics

NEW_PER_TEXT, NEW_PER_BATCH = 50, 5000  # chunks encoded in one text, and in one call
MAX_CHUNK_CHARS = 32  # longer chunks rarely occur again: they are not cached
MAX_CACHED = 2**17  # chunks of a generation; there are two, about 25 MB each
AHEAD = 2  # blocks queued per worker
WORKER_CHECK_S = 5
MIN_BYTES_PER_WORKER, MIN_BLOCK_BYTES = 2**17, 2**16


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How lines become ids: tokenizer (of the tokenizers library), its special and largest ids."""

    tokenizer: Tokenizer
    start_id: int | None
    end_id: int
    largest_id: int
    unknown_id: int | None
    text_field: str = "text"
    errors: str = "strict"
    flag: str = "--file_path"  # that names the text, for messages

    @property
    def dtype(self) -> np.dtype:
        """Return uint16 for a vocabulary of fewer than 65536 entries, else int32."""
        # Differs from the original: added tokens count, and ids are checked. 2019 silently wrapped
        # at 16 bits.
        return np.dtype(np.uint16 if self.largest_id + 1 < 2**16 else np.int32)


@dataclasses.dataclass(frozen=True)
class EncodedBlock:
    """A block's sequences: ids end to end, their lengths, and counts; num_bytes as in Block."""

    ids_M: np.ndarray
    lengths_N: np.ndarray
    num_words: int
    num_blank: int
    num_bad: int
    num_bytes: int


# --------------------------------------------------------------------------------------------------
# Chunks whose ids do not depend on their neighbours
# --------------------------------------------------------------------------------------------------


def chunk_rule(tokenizer: Tokenizer, end_id: int) -> str | None:
    """Return how to cut a line at its spaces without changing the ids; None if that is impossible.

    "bert": BertNormalizer works per character (NFD reorders marks only after a letter, and a space
    is not one), BertPreTokenizer cuts at all white space: any cut at U+0020 is exact, and the space
    itself is dropped.
    "byte_level": GPT-2's pattern never joins a character with a space after it, and looks ahead
    only inside a run of white space: a cut before a space is exact in lines whose only white space
    is single spaces.
    Added tokens are matched first: none of this holds if one contains a space or swallows the next
    one. The end token must be one of them, because it separates chunks.
    """
    added = tokenizer.get_added_tokens_decoder()
    if any(token.rstrip or any(map(str.isspace, token.content)) for token in added.values()):
        return None
    if end_id not in added or added[end_id].normalized or added[end_id].single_word:
        return None
    parts = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model
    kinds = tuple(None if part is None else type(part).__name__ for part in parts)
    if kinds == ("BertNormalizer", "BertPreTokenizer", "WordPiece"):
        return "bert"
    if (
        kinds == (None, "ByteLevel", "BPE")
        and tokenizer.pre_tokenizer.use_regex
        and not tokenizer.model.dropout
    ):
        return "byte_level"
    return None


# Prefix of the key of a line's first chunk, which has no space before it; no line contains it.
FIRST = "\n"


def _byte_level_keys(line: str) -> list[str] | None:
    chunks = line.split()
    if " ".join(chunks) != line:
        return None
    chunks[0] = FIRST + chunks[0]
    return chunks


# Line -> keys of its chunks; None if the rule does not hold for the line.
KEYS: dict[str, Callable[[str], list[str] | None]] = {
    "bert": lambda line: line.split(" "),
    "byte_level": _byte_level_keys,
}


def choose_separator(tokenizer: Tokenizer, rule: str, end_id: int) -> tuple[str, int]:
    """Choose the separator of chunks that are encoded in one text: (its text, its single id).

    The end token always works because added tokens are matched first, but plain characters are
    faster: for BERT ";", always a word of one character; for byte-level BPE the line end, a single
    token before a letter or a space.
    """
    end_token = tokenizer.id_to_token(end_id)
    if rule == "byte_level":
        candidates = [] if tokenizer.pre_tokenizer.add_prefix_space else [("\n", "\n")]
        candidates.append((end_token, end_token))
    else:
        candidates = [(";", " ; "), (end_token, f" {end_token} ")]
    in_added = "".join(token.content for token in tokenizer.get_added_tokens_decoder().values())
    for token, text in candidates:
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
        if len(ids) == 1 and ids[0] != unknown and (token == end_token or token not in in_added):
            return text, ids[0]
    raise AssertionError("chunk_rule ensures that the end token works")


class LineEncoder:
    """Encode lines: start id, the line's ids without the tokenizer's special tokens, end id."""

    def __init__(self, encoding: Encoding, *, is_cached: bool = True):
        """is_cached: False encodes every line by the library, for comparison."""
        self.tokenizer = encoding.tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.typecode = {2: "H", 4: "i"}[encoding.dtype.itemsize]
        self.dtype = encoding.dtype
        self.largest_id = encoding.largest_id
        self.start = b"" if encoding.start_id is None else self._bytes_of([encoding.start_id])
        self.end = self._bytes_of([encoding.end_id])
        self.rule = chunk_rule(self.tokenizer, encoding.end_id) if is_cached else None
        if self.rule:
            self.separator, self.separator_id = choose_separator(
                self.tokenizer, self.rule, encoding.end_id
            )
            self.mark = self.separator.strip(" ")
        # Precedes every chunk but a line's first.
        self.joint = " " if self.rule == "byte_level" else ""
        # A cache of two generations: a full young one replaces the old one, from which chunks
        # still in use are copied back.
        self.young: dict[str, bytes] = {}
        self.old: dict[str, bytes] = {}
        self.passing: list[str] = []  # chunks in the young generation that are too long to keep

    def encode(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids_M of all lines end to end, lengths_N as int32); check the largest id."""
        ids_of_line = (
            self._encode_whole(lines) if self.rule is None else self._encode_by_chunks(lines)
        )
        sequences = [self.start + ids + self.end for ids in ids_of_line]
        lengths_N = (
            np.fromiter(map(len, sequences), np.int32, len(sequences)) // self.dtype.itemsize
        )
        ids_M = np.frombuffer(b"".join(sequences), self.dtype)
        if len(ids_M) and int(ids_M.max()) > self.largest_id:
            raise InputError(
                f"--tokenizer_name: the tokenizer returned id {int(ids_M.max())}, but its"
                f" vocabulary ends at {self.largest_id}"
            )
        return ids_M, lengths_N

    def _encode_whole(self, lines: list[str]) -> list[bytes]:
        encoded = self.tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        return [self._bytes_of(one.ids) for one in encoded]

    def _encode_by_chunks(self, lines: list[str]) -> list[bytes]:
        chunks_of_line = list(map(KEYS[self.rule], lines))
        self._cache(self._new_chunks([chunks for chunks in chunks_of_line if chunks is not None]))
        whole = iter(
            self._encode_whole(
                [line for line, chunks in zip(lines, chunks_of_line, strict=True) if chunks is None]
            )
        )
        ids_of = self.young.__getitem__
        return [
            next(whole) if chunks is None else b"".join(map(ids_of, chunks))
            for chunks in chunks_of_line
        ]

    def _new_chunks(self, chunks_of_line: list[list[str]]) -> list[str]:
        """List the chunks that are not cached, each once; copy back those of the old generation."""
        for chunk in self.passing:
            del self.young[chunk]
        self.passing = []
        if len(self.young) > MAX_CACHED:
            self.young, self.old = {}, self.young
        young, old = self.young, self.old
        missing = [
            chunk
            for chunk in set(itertools.chain.from_iterable(chunks_of_line))
            if chunk not in young
        ]
        young.update((chunk, old[chunk]) for chunk in missing if chunk in old)
        return [chunk for chunk in missing if chunk not in young]

    def _cache(self, new: list[str]) -> None:
        for k in range(0, len(new), NEW_PER_BATCH):
            batch = new[k : k + NEW_PER_BATCH]
            texts = [chunk[1:] if chunk[:1] == FIRST else self.joint + chunk for chunk in batch]
            self.young.update(zip(batch, self._encode_new(texts), strict=True))
        self.passing = [chunk for chunk in new if len(chunk) > MAX_CHUNK_CHARS]

    def _encode_new(self, chunks: list[str]) -> list[bytes]:
        """Encode chunks, several in one text: one by one they take twice as long."""
        apart = self._encode_whole([chunk for chunk in chunks if self.mark in chunk])
        joined = self._encode_joined([chunk for chunk in chunks if self.mark not in chunk])
        given = {True: iter(apart), False: iter(joined)}
        return [next(given[self.mark in chunk]) for chunk in chunks]

    def _encode_joined(self, chunks: list[str]) -> list[bytes]:
        texts = [
            self.separator.join(chunks[k : k + NEW_PER_TEXT])
            for k in range(0, len(chunks), NEW_PER_TEXT)
        ]
        found: list[bytes] = []
        for one in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = np.array(one.ids, self.dtype)
            data, size = ids.tobytes(), self.dtype.itemsize
            ends = (np.flatnonzero(ids == self.separator_id) * size).tolist()
            starts = [0, *(end + size for end in ends)]
            found += [
                data[start:end] for start, end in zip(starts, [*ends, len(data)], strict=True)
            ]
        # Another way to write the separator, if one is in a chunk, shows in their number.
        return found if len(found) == len(chunks) else self._encode_whole(chunks)

    def _bytes_of(self, ids: Iterable[int]) -> bytes:
        return array.array(self.typecode, ids).tobytes()


def count_words(line: str) -> int:
    """Count the words of a stripped line, separated by white space."""
    if line.isascii() and line.isprintable() and "  " not in line:  # single spaces count faster
        return line.count(" ") + 1
    return len(line.split())


# --------------------------------------------------------------------------------------------------
# Workers
# --------------------------------------------------------------------------------------------------


class BlockEncoder:
    """Encode a block of text; raise InputError naming file and line for invalid text."""

    def __init__(self, encoding: Encoding):
        self.encoding = encoding
        self.encoder = LineEncoder(encoding)

    def __call__(self, block: Block) -> EncodedBlock:
        """Decode and strip the lines, skip blank ones, encode the others."""
        how = self.encoding
        texts, num_bad = texts_of(block, how.text_field, how.errors, how.flag)
        lines = [stripped for text in texts if (stripped := text.strip())]
        with naming_panics(f"{how.flag} {block.path}: from line {block.first} on"):
            ids_M, lengths_N = self.encoder.encode(lines)
        # Differs from the original: blank lines are skipped. 2019 made sequences of two boundary
        # tokens of them.
        return EncodedBlock(
            ids_M,
            lengths_N,
            sum(map(count_words, lines)),
            len(texts) - len(lines),
            num_bad,
            block.num_bytes,
        )


def divide_work(num_bytes: int, num_cores: int) -> tuple[int, int]:
    """Return (worker processes, bytes per block) for a text: a small one needs few processes."""
    num_workers = max(min(num_cores, num_bytes // MIN_BYTES_PER_WORKER), 1)
    return num_workers, min(max(num_bytes // (8 * num_workers), MIN_BLOCK_BYTES), BLOCK_BYTES)


class WorkerPool:
    """Encode blocks on several processes, in order; a context manager. The processes start at once.

    Create it before this process has threads: the workers are forked if the system can, and share
    its memory.
    """

    def __init__(self, encoding: Encoding, num_workers: int, *, is_forked: bool = True):
        """num_workers: processes; 1 = this one. is_forked: False where this process has threads."""
        self.num_workers = num_workers
        if num_workers == 1:
            self.encode = BlockEncoder(encoding)
            return
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        method = "fork" if can_fork and is_forked else "spawn"
        self.executor = concurrent.futures.ProcessPoolExecutor(
            num_workers, multiprocessing.get_context(method), _start_worker, (encoding, os.getpid())
        )
        # Signals wait, because an exception that a handler raises during a fork is lost.
        with holding_signals(), self._reporting_dead_workers():
            self.executor.submit(os.getpid).result()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        if self.num_workers == 1:
            return
        if kind is not None:
            self._kill()
        self.executor.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def _reporting_dead_workers(self) -> Iterator[None]:
        try:
            yield
        except concurrent.futures.process.BrokenProcessPool as error:
            # The executor sends the others SIGTERM, which a starting worker misses.
            self._kill()
            raise InputError(
                "a worker process was killed (is the memory full?); run again with a smaller"
                " --num_workers"
            ) from error

    def _kill(self) -> None:
        """Kill the workers, and close this process's end of their result pipe.

        The executor's thread may be reading a result that a killed worker wrote half of; it would
        wait forever, because this process holds the pipe open. Neither has a public name.
        """
        for process in list((self.executor._processes or {}).values()):
            process.kill()
        self.executor._result_queue._writer.close()

    def _result(self, future: concurrent.futures.Future) -> EncodedBlock:
        """Wait for a result, and check from time to time that all workers are alive."""
        while True:
            try:
                return future.result(timeout=WORKER_CHECK_S)
            except concurrent.futures.TimeoutError:
                processes = list((self.executor._processes or {}).values())
                if any(process.exitcode is not None for process in processes):
                    self._kill()

    def map(self, blocks: Iterator[Block]) -> Iterator[EncodedBlock]:
        """Yield the encoded blocks in order, with a few in flight; raise the first InputError."""
        if self.num_workers == 1:
            yield from map(self.encode, blocks)
            return
        in_flight: collections.deque[concurrent.futures.Future] = collections.deque()
        with self._reporting_dead_workers():
            for block in blocks:
                in_flight.append(self.executor.submit(_encode_block, block))
                if len(in_flight) >= self.num_workers * AHEAD:
                    yield self._result(in_flight.popleft())
            while in_flight:
                yield self._result(in_flight.popleft())


_encode_in_worker: BlockEncoder


def _start_worker(encoding: Encoding, parent: int) -> None:
    global _encode_in_worker
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent receives it, too, and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encode_in_worker = BlockEncoder(encoding)


def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed; it would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode_block(block: Block) -> EncodedBlock:
    return _encode_in_worker(block)
