"""Stages of the data benchmark, each in a separate process whose memory is measured from outside.

scripts/benchmark_data.py starts itself anew with --stage for each; a stage answers with one line of
JSON.
"""

import contextlib
import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from distil.data.token_files import SpecialIds, open_token_file
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "scripts" / "benchmark_data.py"
MB = 1e6


def anonymous_bytes(pid: int) -> int:
    """Return a process's anonymous memory in bytes, without pages of mapped files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def watched(sample: Callable[[], int], process: subprocess.Popen, every_s: float = 0.01) -> int:
    """Return the largest sample until a process ends; raise InputError if it fails."""
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
    """Run a stage in a separate process: (its figures, bytes of peak memory above its imports)."""
    words = ["--stage", name, "--arguments", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, PROGRAM, *words], text=True, **pipes) as process:
        if process.stdout.readline() != "ready\n":
            raise InputError(f"stage {name}: did not start: {process.communicate()[1].strip()}")
        before = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        peak = watched(lambda: anonymous_bytes(process.pid), process, 0.002)
        return json.loads(process.stdout.read()), peak - before


def in_stage(stage: Callable[[], dict]) -> None:
    """In a stage's process: report the end of the imports, wait, work, print the figures."""
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(stage()), flush=True)


def of_bert(max_length: int) -> types.SimpleNamespace:
    """Stand in for the LanguageModel that reads the data: BERT's ids, any vocabulary."""
    return types.SimpleNamespace(
        special_ids=SpecialIds(101, 102, 0, 100),
        max_length=max_length,
        num_entries=2**31 - 1,
        tokenizer_facts=None,
        source="the benchmark",
    )


def stage_open(path: str, max_length: str) -> None:
    """Open a token file, filter, plan an epoch, make the first batch."""
    from grouped_batch_sampler import GroupedBatchSampler
    from lm_seqs_dataset import LmSeqsDataset

    def work() -> dict:
        started = time.perf_counter()
        dataset = LmSeqsDataset.from_file(path, of_bert(int(max_length)))
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
    """Open a token file only."""
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
    """Read a pickled list as the 2019 program did: unpickle it, and make an array of lengths."""

    def work() -> dict:
        started = time.perf_counter()
        with open(path, "rb") as file:
            data = pickle.load(file)  # a file that this run has made
        lengths = np.array([len(sequence) for sequence in data])
        return {"seconds": time.perf_counter() - started, "sequences": len(lengths)}

    in_stage(work)


def stage_collate(path: str) -> None:
    """Make batches of neighbouring lengths: read by pread, from a mapped file, one by one."""
    import torch

    from grouped_batch_sampler import GroupedBatchSampler
    from lm_seqs_dataset import LmSeqsDataset

    def one_by_one(dataset: LmSeqsDataset, indices: np.ndarray) -> torch.Tensor:
        ends = dataset.starts[indices] + dataset.lengths[indices]
        parts = [
            dataset.tokens.ids_M[a:b].astype(np.int64)
            for a, b in zip(dataset.starts[indices], ends, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, parts)), batch_first=True)

    def work() -> dict:
        dataset = LmSeqsDataset.from_file(path, of_bert(512))
        of_mapped = copy.copy(dataset)
        ids_M = dataset.tokens.ids_M
        mapped_M = np.memmap(ids_M.file.path, ids_M.dtype, "r", ids_M.start, ids_M.shape)
        of_mapped.tokens = dataclasses.replace(dataset.tokens, ids_M=mapped_M)

        def anew(indices: np.ndarray) -> torch.Tensor:
            dataset.tokens.forget()
            return dataset.collate(indices)

        found = {}
        for size in (5, 256):
            sampler = GroupedBatchSampler(dataset.lengths, size, 512, group_by_size=True, seed=56)
            batches = [sampler.epoch_batches(0)[k] for k in range(min(300, len(sampler)))]
            for name, make in (
                ("pread", dataset.collate),
                ("from a mapped file", of_mapped.collate),
                ("pread, every block verified anew", anew),
                ("one by one", lambda b: one_by_one(dataset, b)),
            ):
                seconds = []
                for batch in batches * 6:  # the first round touches every page
                    started = time.perf_counter()
                    make(batch)
                    seconds.append(time.perf_counter() - started)
                found[f"{name}, {size}"] = float(np.median(seconds[len(batches) :])) * 1e6
        return found

    in_stage(work)


STAGES = {
    "open": stage_open,
    "just_open": stage_just_open,
    "count": stage_count,
    "pickle": stage_pickle,
    "collate": stage_collate,
}
