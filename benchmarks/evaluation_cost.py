"""What an evaluation on held-out text costs, beside training: CPU seconds a token of each.

    python -m benchmarks.evaluation_cost --pair bert --precision bf16

Teacher and student of base size, random weights and ids; in one process, taking turns, an update
and an evaluation. "first": the teacher answers; "later": its answers are kept.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.workload import (
    PAIR_ROWS,
    Job,
    make_distiller,
    make_models,
    make_tokenizer,
    make_workload,
    write_synthetic,
)
from distil.evaluation import HeldOut, Reader
from distil.models.architectures import ARCHITECTURES
from distil.system.launch import Runtime


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pair", default="bert", choices=PAIR_ROWS)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--length", type=int, default=128, help="of all sequences, in ids")
    parser.add_argument("--micro_batches", type=int, default=4, help="of 5 sequences, an update")
    parser.add_argument("--batches", type=int, default=1, help="of 4,096 held-out ids")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="base", choices=["base", "tiny"])
    return parser.parse_args()


def main() -> None:
    """Run the program: make the parts, take turns, print CPU seconds a token and their ratios."""
    args = parse()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        sizes = args.length, 5, args.micro_batches, args.precision, args.rounds + 1, 0, 1, 56
        path = str(Path(folder, "ids"))
        job = Job("distiller", args.pair, args.size, "cpu", path, *sizes)
        write_synthetic([job])
        print(json.dumps(measure(job, args), indent=1))


def measure(job: Job, args: argparse.Namespace) -> dict[str, float]:
    """Take turns: CPU seconds a real token of training and of each kind of evaluation."""
    workload, (teacher, student) = make_workload(job), make_models(job)
    step = make_distiller(job, teacher, student)
    dataset = workload.dataset
    is_masked = ARCHITECTURES[PAIR_ROWS[job.pair].teacher_type].is_masked
    tokenizer = make_tokenizer(job.pair, teacher.config.vocab_size, job.length)
    ways = {"fixed masks": (None,), "both kinds of masks": (workload.prepare,)}
    held_out = {
        name: HeldOut.of(dataset, tokenizer, is_masked, *way)
        for name, way in (ways if is_masked else {"next tokens": ()}).items()
    }
    for one in held_out.values():
        del one.batches[args.batches :]
    num_evaluated = sum(int(dataset.lengths[batch].sum()) for batch in one.batches)
    readers = (
        Reader(student, step.model.head, step.amp_dtype),
        Reader(step.teacher, step.teacher_head),
    )
    spent: dict[str, list[float]] = {}

    def time_it(name: str, num_tokens: int, work) -> None:
        started = time.process_time()
        work()
        spent.setdefault(name, []).append((time.process_time() - started) / num_tokens)

    for number, update in enumerate(workload.planned(job, args.rounds + 1)):
        batches = workload.batches([update], step.ready)
        numbers = [planned.number for planned in update]
        num_trained = int(workload.lengths(update).sum())
        train = functools.partial(step.step, batches, numbers, len(numbers))
        time_it("training" if number else "warm-up", num_trained, train)
        for way, one in held_out.items():
            evaluate = functools.partial(one.figures, *readers, Runtime())
            time_it(f"{way}, {'later' if number else 'first'}", num_evaluated, evaluate)
    best = {name: min(values) for name, values in spent.items() if name != "warm-up"}
    return {name: {"ms": 1000 * s, "x training": s / best["training"]} for name, s in best.items()}


if __name__ == "__main__":
    main()
