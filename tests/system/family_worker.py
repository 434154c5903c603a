"""Train a tiny model of each family on one rank and on two, for test_unused_parameters.py.

Run under a launcher with two processes. Arguments: an output file, then NAME:masked or NAME:causal,
with +layerdrop where layers are left out at random. Writes JSON: family -> outcome, detail.
"""

import datetime
import json
import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import families

from distil.data.batches import MicroBatch
from distil.models import conventions, language_model
from distil.training.optimizer import make_optimizer
from distil.training.unused import freeze_unused
from distiller import DistillationModel, Distiller
from utils import InputError

NUM_BATCHES, NUM_UPDATES, LENGTH = 4, 3, 20
# Sums in another order, relative to the largest gradient; some models amplify it.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def make_batch(number: int, is_masked: bool, length: int) -> MicroBatch:
    """Make a micro-batch of three sequences without padding."""
    generator = torch.Generator().manual_seed(number)
    ids_BT = torch.randint(5, 99, (3, length), generator=generator)
    places = torch.arange(ids_BT.numel())
    kept = places if is_masked else places[places % length != length - 1]
    kinds = {"real": places, "masked" if is_masked else "next": kept, "distilled": kept}
    labels_BT = ids_BT.clone() if is_masked else ids_BT
    batch = MicroBatch(number, ids_BT, None, labels_BT, kinds, ids_BT.numel())
    return batch


def precision_of(name: str, is_masked: bool) -> torch.dtype:
    """Return float64 where a model trains in it, else float32.

    Grouped products have no float64; Longformer's gradients in it are NaN, as torch computes them.
    """
    model = families.tiny_model(name, is_masked).double().train()
    batch = make_batch(0, is_masked, LENGTH - 1)
    try:
        model.base_model(batch.input_ids_BT).last_hidden_state.square().sum().backward()
    except RuntimeError:
        return torch.float32
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.float64 if all(grad.isfinite().all() for grad in grads) else torch.float32


def gradients(name: str, is_masked: bool, drops: bool, alphas: dict, world_size: int, rank: int):
    """Train; return each update's gradient by parameter, the final weights, and what is frozen."""
    student, teacher = (families.tiny_model(name, is_masked, seed=seed) for seed in (1, 0))
    precision = precision_of(name, is_masked)
    student, teacher = student.to(precision), teacher.to(precision)
    if drops:
        student.base_model.layerdrop = student.get_decoder().layerdrop = 0.5
    teacher.requires_grad_(False)
    model = DistillationModel(student, alphas, 2.0)
    before = torch.get_rng_state()
    freeze_unused(model, teacher, make_batch(99, is_masked, LENGTH), name, world_size)
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn"
    assert all(p.grad is None for p in model.parameters()), "a gradient was left"
    optimizer = make_optimizer(model, 1e-4, 0.01, 1e-6)
    options = {"max_grad_norm": 1e9, "seed": 0, "world_size": world_size}
    step = Distiller(model, teacher, optimizer, None, **options)
    found = []
    for update in range(NUM_UPDATES):
        # The last update has one micro-batch: the second rank takes part with nothing.
        num = 1 if update == NUM_UPDATES - 1 else NUM_BATCHES
        numbers = [update * NUM_BATCHES + k for k in range(num)]
        mine = numbers[rank::world_size]
        step.step([make_batch(k, is_masked, LENGTH - k % 3) for k in mine], numbers, len(mine))
        named = student.named_parameters()
        found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad]
    return found, dict(student.state_dict()), frozen, precision


def difference(one: tuple, two: tuple) -> str | None:
    """Describe how the run of two ranks differs from that of one; None: it does not."""
    if one[2] != two[2]:
        return f"frozen: {one[2]}, {two[2]}"
    tolerance = TOLERANCES[one[3]]
    for update, (expected, found) in enumerate(zip(one[0], two[0], strict=True)):
        if expected.keys() != found.keys():
            return f"update {update}: gradients of {sorted(expected.keys() ^ found.keys())}"
        largest = max(grad.abs().max() for grad in expected.values())
        for name, grad in expected.items():
            if (found[name] - grad).abs().max() > tolerance * largest:
                return f"update {update}: {name}"
    for name, tensor in one[1].items():
        if not torch.allclose(tensor.float(), two[1][name].float(), rtol=0, atol=1e-5):
            return f"final {name}"
    return None


def outcome_of(family: str, alphas: dict, rank: int) -> tuple[str, str]:
    """Return ("works", what is frozen), ("refused", why) or ("wrong", what differs)."""
    name, _, kind = family.partition(":")
    is_masked, drops = kind.startswith("masked"), kind.endswith("+layerdrop")
    try:
        model = families.tiny_model(name, is_masked)
        language_model.resolve_architecture(model.config, is_masked, name)
        conventions.check_conventions(model, is_masked, name)
        two = gradients(name, is_masked, drops, alphas, 2, rank)
        one = gradients(name, is_masked, drops, alphas, 1, 0)
    except InputError as error:
        return "refused", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    differs = difference(one, two)
    return ("wrong", differs) if differs else ("works", ", ".join(two[2]))


def main() -> None:
    output, alphas, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, found = int(os.environ["RANK"]), {}
    for name in names:
        found[name] = outcome_of(name, json.loads(alphas), rank)
        Path(f"{output}.{rank}").write_text(json.dumps(found))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
