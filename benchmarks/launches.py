"""Count the kernels that an update launches: apart, with micro-batches joined in passes, packed.

Run as `python -m benchmarks.launches`. Counts operations on floating-point tensors that are no
views, in the code that a GPU runs (without the CPU's kernels, logits in a GPU's chunks), on models
of the base depth and a narrow width; an operation is a kernel, or nearly so. Objectives that are
compiled count as the kernels that torch's compiler makes of them here, for a CPU. Updates are as
README's command makes them: 50 micro-batches of 5 sequences.

Then the bytes that the objectives move for a logit: eager, each operation's inputs and outputs;
compiled, each kernel's, by the compiler's own count.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workload import Job, make_distiller, make_models, make_workload, write_synthetic
from distil.kernels import head, logit_gradients
from distil.kernels.terms import Term
from distil.objectives import LOSSES
from distil.reporting.tables import markdown

GPU_BYTES = 141 * 10**9  # of an H200, for the default size of a pass
CHUNK_ROWS = 8192  # an H200 takes more, which the memory of this machine may not hold
ROWS, VOCAB_SIZE = 64, 30522  # of the chunk whose traffic is counted
WITHOUT_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("detach", "alias", "_unsafe_view", "lift_fresh"),
}


class LaunchCounter(TorchDispatchMode):
    """Count operations on floating-point tensors, but those that only make a view; and their bytes.

    num_bytes: of what operations read and write.
    """

    def __init__(self):
        super().__init__()
        self.num = self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        returned = [value.alias_info for value in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        is_kernel = function.__name__.split(".")[0] not in WITHOUT_KERNEL and not is_view
        if is_kernel and any(tensor.is_floating_point() for tensor in tensors):
            self.num += 1
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return found


@contextlib.contextmanager
def compiling(counter: LaunchCounter) -> Iterator[None]:
    """Let the objectives count as one compiled pass a chunk; what it computes is the same."""
    kernels: dict[tuple, int] = {}

    def run(*arguments):
        with torch.utils._python_dispatch._disable_current_modes():
            found = logit_gradients._fused_terms(*arguments)
            by_row, *_, has_one_each = arguments[-3:]
            if (by_row, has_one_each) not in kernels:
                kernels[by_row, has_one_each] = compiled_traffic(by_row, has_one_each)[0]
        counter.num += kernels[by_row, has_one_each]
        return found

    with mock.patch.object(logit_gradients, "_compiled", lambda: run):
        yield


def compiled_traffic(by_row: tuple, has_one_each: bool) -> tuple[int, float]:
    """Compile objectives for a chunk in bfloat16: (kernels, bytes a logit)."""
    torch._dynamo.reset()
    metrics.reset()
    torch._logging.set_logs(inductor_metrics=True)
    arguments = _chunk(len(by_row))
    torch.compile(logit_gradients._fused_terms)(*arguments, by_row, 2.0, has_one_each)
    return metrics.generated_kernel_count, metrics.num_bytes_accessed / arguments[0].numel()


def _chunk(num_objectives: int) -> list[torch.Tensor]:
    """Draw logits of student and teacher, then labels, weights and owned rows of objectives."""
    logits = [torch.randn(ROWS, VOCAB_SIZE).bfloat16() for _ in range(2)]
    labels = torch.randint(VOCAB_SIZE, (num_objectives, ROWS))
    return [*logits, labels, torch.rand(labels.shape), torch.ones(labels.shape, dtype=torch.bool)]


def eager_traffic(names: Sequence[str]) -> tuple[int, float]:
    """Run objectives on a chunk in bfloat16: (operations, bytes a logit)."""
    logits_CV, teacher_CV, labels_LC, *_ = _chunk(len(names))
    rows = torch.arange(ROWS)
    terms = [
        Term(LOSSES[name], rows, rows, labels, 1.0)
        for name, labels in zip(names, labels_LC, strict=True)
    ]
    with LaunchCounter() as counter:
        logit_gradients.replace_by_gradient(logits_CV, teacher_CV, 0, terms, 2.0)
    return counter.num, counter.num_bytes / logits_CV.numel()


def count(job: Job, tokens_per_pass: int | None, packs: bool = False) -> dict:
    """Count an update's passes and launches, with the objectives eager and compiled.

    Mean passes, shapes and padding are those of all the job's updates. tokens_per_pass None: a
    GPU's default. packs: lay sequences into rows.
    """
    work = make_workload(job)
    work.sampler.join(tokens_per_pass, job.micro_batches, GPU_BYTES, packs)
    first, *others = work.updates(job, job.updates)
    teacher, student = make_models(job)
    distiller = make_distiller(job, teacher, student)
    distiller.has_cpu_kernels, distiller.model.chunk_rows = False, CHUNK_ROWS
    passes = list(work.batches([first], distiller.ready))
    launched = []
    for distiller.model.compiles_head in (False, True):
        with LaunchCounter() as counter, compiling(counter):
            distiller.step(passes, [batch.number for batch in first.planned], len(passes))
        launched.append(counter.num)
    num_passes = len(passes)
    num_real = sum(one.num_tokens for one in passes)
    passes += work.batches(others, lambda one: one)
    padded = sum(one.input_ids_BT.numel() for one in passes)
    return {
        "N": f"{work.sampler.tokens_per_pass}{', packed' * packs}",
        "passes": num_passes,
        "mean": f"{len(passes) / job.updates:.2f}",
        "shapes": len({one.input_ids_BT.shape for one in passes}),
        "padded / real tokens": f"{padded / sum(one.num_tokens for one in passes):.2f}",
        "launches": launched[0],
        "objectives compiled": launched[1],
        "then a real token": f"{launched[1] / num_real:.2f}",
    }


def main() -> None:
    """Print a table: pairs, equal and mixed lengths, passes apart, joined and packed."""
    head.BLOCK_ROWS = CHUNK_ROWS  # as on a GPU
    sizes = {"kind": "distiller", "size": "narrow", "device": "cpu", "precision": "fp32"}
    sizes |= {"batch_size": 5, "micro_batches": 50, "updates": 20, "warmup": 0, "threads": 1}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for pair, longest in itertools.product(("bert", "gpt2"), (128, 512)):
            path = str(Path(folder) / f"{pair}-{longest}")
            job = Job(pair=pair, length=longest, data_file=path, seed=56, **sizes)
            write_synthetic([job], is_mixed=longest == 512)
            for limit, packs in ((0, False), (None, False), (None, True)):
                found = {"pair": pair, "longest": longest, **count(job, limit, packs)}
                lines += [[*found]] * (not lines) + [[str(value) for value in found.values()]]
    print(markdown(lines))
    lines = [["objectives", "eager: operations", "bytes a logit", "compiled: kernels", "bytes"]]
    for names in (("ce",), ("ce", "mlm"), ("ce", "clm")):
        by_row = tuple(LOSSES[name].by_row for name in names)
        found = *eager_traffic(names), *compiled_traffic(by_row, True)
        lines.append([" + ".join(names), *(f"{value:.0f}" for value in found)])
    print(markdown(lines))


if __name__ == "__main__":
    main()
