"""Measure the first update's gradient and the number of reductions, for test_distributed.py.

Run under a launcher. Arguments: an output file, then train.py's flags. Everything is train.py's but
float64, in which two orders of one sum differ by rounding only.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
import utils
from distil.system.launch import start_runtime

TOKENS_PER_PASS = 900  # of the second round, in which passes join micro-batches
make_student, load_teacher = train.models.make_student, train.models.load_teacher


def doubled(make):
    """Make a language model in float64."""

    def made(*arguments):
        model = make(*arguments)
        model.network.double()
        return model

    return made


def main() -> None:
    output, flags = sys.argv[1], sys.argv[2:]
    train.models.make_student = doubled(make_student)
    train.models.load_teacher = doubled(load_teacher)
    config = train.parse_config(flags)
    runtime = start_runtime(config.n_gpu, config.local_rank)
    trainer = train.set_up(config, runtime)
    num_reductions = count_reductions(trainer.distiller)
    facts = run_updates(trainer) | {"reductions": num_reductions[0]}
    trainer.sampler.join(TOKENS_PER_PASS, config.gradient_accumulation_steps, None)
    torch.save({**facts, "joined": run_updates(trainer)}, f"{output}.{runtime.rank}")


def run_updates(trainer: train.Trainer) -> dict:
    """Compute the gradient of every update, as the run does, without a step of the optimizer."""
    runtime, grads, numbers, passes, losses = trainer.runtime, [], [], [], []
    plan = trainer.num_micro_batches, trainer.config.gradient_accumulation_steps
    items = trainer._ready(trainer.sampler.updates(*plan, runtime.rank, runtime.world_size))
    for update in items:
        trainer.distiller.optimizer.zero_grad()
        planned, num = [batch.number for batch in update.planned], len(update.passes)
        mine = itertools.islice(items, num)
        losses.append(trainer.distiller.accumulate(mine, planned, num))
        named = trainer.student.network.named_parameters()
        grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        numbers.append([batch.number for batch in update.mine])
        passes.append(num)
    counts = {"passes": passes, "updates": len(grads)}
    return {"grads": grads, "losses": torch.cat(losses), "mine": numbers, **counts}


def count_reductions(distiller) -> list[int]:
    """Count the gradient buckets that DDP reduces; a model this small has one."""
    count = [0]

    def hook(state, bucket):
        count[0] += 1
        return allreduce_hook(state, bucket)

    if distiller.world_size > 1:
        distiller.wrapped.register_comm_hook(None, hook)
    return count


if __name__ == "__main__":
    utils.run_program(main)
