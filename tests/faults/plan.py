"""The kinds of faults that scripts/fault_injection.py injects, one a row."""

import dataclasses

from faults import plan_of_folders
from faults.plan_of_data import ROWS_OF_DATA
from faults.plan_of_streams import STREAMS


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of fault: the injection, the figure to reach, and the best known elsewhere.

    trial: "module:function" under tests/, called with a Bench. smoke, full: numbers of calls. jobs:
    calls at one time. limit_s: time after which a call has hung. is_sampled: the trials are drawn
    at random, so that their number bounds a rate; otherwise they are cases chosen by hand.
    """

    id: str
    injected: str
    figure: str
    elsewhere: str
    trial: str
    smoke: int
    full: int
    jobs: int = 2
    limit_s: float = 120
    is_sampled: bool = True


PLAN = [
    Row(
        "T1",
        "SIGKILL at random moments, 3 and more a run, started again; 1 to 3 ranks, masked and"
        " causal, accumulation 1 and 4, over an epoch's end",
        "200 of 200 digests and logs equal the undisturbed run's",
        "Composer: 12 planned stops",
        "faults.runs:killed_at_random",
        2,
        200,
        limit_s=300,
    ),
    Row(
        "T2",
        "SIGKILL inside a save",
        "1000 of 1000 loadable, never more than one interval lost",
        "the 2019 program: 59 of 100 unreadable",
        "faults.runs:killed_in_a_save",
        8,
        1000,
    ),
    Row(
        "T3",
        "every system call of a save: killed, EIO, ENOSPC",
        "all points safe, their number printed",
        "none in the field (RocksDB, SQLite do it)",
        "faults.saves:system_call_fails",
        1,
        1,
        jobs=1,
        limit_s=900,
        is_sampled=False,
    ),
    Row(
        "T4",
        "order of write, fsync, rename in one save",
        "0 violations",
        "torch's distributed checkpoint: 2",
        "faults.saves:order_of_calls",
        1,
        3,
        jobs=1,
        is_sampled=False,
    ),
    Row(
        "T5",
        "bit flips, truncation, zeroed and swapped blocks, a file of another run: token file,"
        " counts, checkpoint files",
        "0 silent of 6000 and more; the message names the file",
        "850-999 of 1000 silent",
        "faults.files:damaged",
        8,
        240,
    ),
    Row(
        "T6",
        "newest of 3 checkpoints damaged; all damaged",
        "100 of 100 resume from the one before; all damaged: exit 2",
        "open request in transformers",
        "faults.saves:newest_is_damaged",
        6,
        100,
    ),
    Row(
        "T7",
        "disk full (6 MB tmpfs), read-only folder",
        "old checkpoint intact, error with path, no .tmp left over",
        '"unexpected pos 704 vs 598"',
        "faults.saves:disk_full",
        2,
        20,
    ),
    Row(
        "T8",
        "SIGTERM to launcher, one rank, all; during a save; twice",
        "100 of 100: agreed step saved, exit 143, resume bit-identical",
        "OLMo: agreed every 25 steps",
        "faults.runs:terminated",
        4,
        100,
        limit_s=300,
    ),
    Row(
        "T9",
        "kill -9 of a random rank, up to 3 times, --max-restarts 3; a rank calling os._exit(0)",
        "50 of 50 recovered, 0 hangs, same digest",
        "torchrun's default 9 of 17",
        "faults.ranks:killed_rank",
        1,
        50,
        jobs=1,
        limit_s=400,
    ),
    Row(
        "T10",
        "T9 with --force among the arguments",
        "0 checkpoints lost",
        "the 2019 program loses all",
        "faults.ranks:killed_rank_with_force",
        0,
        10,
        jobs=1,
        limit_s=400,
    ),
    Row(
        "T11",
        "one rank stopped (SIGSTOP)",
        "ends non-zero within timeout + 40 s, rank named",
        "30 min",
        "faults.ranks:stopped_rank",
        0,
        6,
        jobs=3,
        limit_s=300,
    ),
    Row(
        "T12",
        "NaN and Inf in teacher logits, one loss term, one rank's gradient, initial weights",
        "100 of 100 stop before the update, exit != 0, weights unchanged, nothing non-finite saved",
        "exit 0",
        "faults.runs:not_finite",
        6,
        100,
        limit_s=200,
    ),
    Row(
        "T14",
        "hypothesis over n, world, batch size, grouping, seed, epoch, position",
        "2000 examples: each sequence once an epoch, no rank waits, other order each epoch, rest"
        " after resume in order",
        "others sort before comparing",
        "faults.inputs:plans",
        1,
        20,
    ),
    Row(
        "T15",
        "world size changed on resume (2 -> 1, 1 -> 2) at equal A x W",
        "same micro-batches, masks and dropout; loss within 1e-5; else a one-line refusal",
        "torchtitan refuses",
        "faults.runs:other_world_size",
        1,
        12,
        limit_s=300,
    ),
    Row(
        "T16",
        "2 nodes x 2 ranks on loopback; one agent killed",
        "digest = 1 node x 4; survivor ends within the timeout",
        "real clusters only",
        "faults.ranks:two_nodes",
        0,
        4,
        jobs=1,
        limit_s=600,
    ),
    Row(
        "T18",
        "20 planted mistakes against the tests that guard them",
        "20 of 20 caught",
        "TrainCheck 18 of 20",
        "faults.mutants:planted_mistake",
        0,
        20,
        limit_s=900,
        is_sampled=False,
    ),
    Row(
        "T19",
        "60 malicious files x each entry point",
        "0 executed",
        "4-5 payloads tested",
        "faults.malicious:malicious",
        3,
        60,
        limit_s=300,
        is_sampled=False,
    ),
    Row(
        "T20",
        "mutated pickles, stores, checkpoints",
        "100,000: 0 crashes or hangs",
        "safetensors 38.4 M",
        "faults.files:mutated",
        2,
        200,
        limit_s=600,
    ),
    Row(
        "T39",
        "small files that hold what they should not (scores, flags, logs, cards, counts,"
        " configurations, tokenizers, states of checkpoints, ..) x each program that reads them",
        "500: no traceback, no hang, nothing executed; a line names the file, or it is left out",
        "none",
        "faults.small_files:hostile",
        3,
        112,
        limit_s=600,
    ),
    Row(
        "T21",
        "--force on 30 targets (/, ~, ., link/, a folder holding the data, a foreign folder, ..)",
        "0 foreign files lost",
        "a guard in one project",
        "faults.inputs:forced",
        6,
        30,
        is_sampled=False,
    ),
    Row(
        "T22",
        "corpora by hypothesis: empty, BOM, CRLF, NUL, invalid UTF-8, 10 MB line, only unknown, all"
        " too short",
        "5000: fine, or exit 2 with file:line; no traceback",
        "traceback",
        "faults.inputs:corpora",
        1,
        100,
        limit_s=600,
    ),
    Row(
        "T23",
        "40 mismatches: vocabulary, width, positions, missing special token, counts of another"
        " tokenizer, missing, extra, NaN student weights",
        "40 of 40 refused before the first step, both values named",
        "bare asserts",
        "faults.programs:mismatched",
        6,
        40,
        is_sampled=False,
    ),
    Row(
        "T24",
        "arguments and environment by hypothesis",
        "2000: no traceback, no hang > 10 s",
        "none",
        "faults.inputs:arguments",
        1,
        40,
        limit_s=600,
    ),
    Row(
        "T26",
        "preprocessing killed and rerun",
        "nothing partial under a final name; rerun byte-identical",
        "none",
        "faults.programs:preprocessing_killed",
        2,
        100,
        limit_s=300,
    ),
]
PLAN += [Row(**row) for row in ROWS_OF_DATA]
PLAN += [Row(**fields) for fields in STREAMS]
PLAN += [Row(**row) for row in plan_of_folders.ROWS]
