"""Count the kernels that an update launches: apart, and with micro-batches joined in one pass.

Run as `python -m benchmarks.launches`. Counts operations on floating-point tensors that are no
views, in the eager code that a GPU runs (without the CPU's kernels, logits in a GPU's chunks), on
models of the base depth and a narrow width; an operation is a kernel, or nearly so. Updates are as
README's command makes them: 50 micro-batches of 5 sequences.
"""

import itertools
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workload import Job, make_distiller, make_models, make_workload, write_synthetic
from distil.kernels import head
from distil.reporting.tables import markdown

GPU_BYTES = 141 * 10**9  # of an H200, for the default size of a pass
CHUNK_ROWS = head.CHUNK_LOGITS // 30522
WITHOUT_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("detach", "alias", "_unsafe_view", "lift_fresh"),
}


class LaunchCounter(TorchDispatchMode):
    """Count operations on floating-point tensors, but those that only make a view."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        returned = [value.alias_info for value in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        is_kernel = function.__name__.split(".")[0] not in WITHOUT_KERNEL and not is_view
        self.num += is_kernel and any(tensor.is_floating_point() for tensor in tensors)
        return found


def count(job: Job, tokens_per_pass: int | None) -> dict:
    """Count an update's launches, passes and shapes. tokens_per_pass None: a GPU's default."""
    work = make_workload(job)
    work.sampler.join(tokens_per_pass, job.micro_batches, GPU_BYTES)
    (update,) = work.updates(job, 1)
    teacher, student = make_models(job)
    distiller = make_distiller(job, teacher, student)
    distiller.has_cpu_kernels, distiller.model.chunk_rows = False, CHUNK_ROWS
    passes = list(work.batches([update], distiller.ready))
    with LaunchCounter() as counter:
        distiller.step(passes, [batch.number for batch in update.planned], len(passes))
    padded = sum(one.input_ids_BT.numel() for one in passes)
    num_real = sum(one.num_tokens for one in passes)
    return {
        "N": work.sampler.tokens_per_pass,
        "passes": len(passes),
        "shapes": len({one.input_ids_BT.shape for one in passes}),
        "padded / real tokens": f"{padded / num_real:.2f}",
        "launches": counter.num,
        "launches a real token": f"{counter.num / num_real:.2f}",
    }


def main() -> None:
    """Print a table: pairs, equal and mixed lengths, passes apart and joined."""
    head.BLOCK_ROWS = CHUNK_ROWS  # as on a GPU
    sizes = {"kind": "distiller", "size": "narrow", "device": "cpu", "precision": "fp32"}
    sizes |= {"batch_size": 5, "micro_batches": 50, "updates": 1, "warmup": 0, "threads": 1}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for pair, longest in itertools.product(("bert", "gpt2"), (128, 512)):
            path = str(Path(folder) / f"{pair}-{longest}")
            job = Job(pair=pair, length=longest, data_file=path, seed=56, **sizes)
            write_synthetic([job], is_mixed=longest == 512)
            for limit in (0, 4096, 8192, None):
                found = {"pair": pair, "longest": longest, **count(job, limit)}
                lines += [[*found]] * (not lines) + [[str(value) for value in found.values()]]
    print(markdown(lines))


if __name__ == "__main__":
    main()
