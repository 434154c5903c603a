"""Memory does not grow with the number of shapes that a process has met."""

import os
import sys

import pytest
from conftest import run_process
from stand_ins import ROOT

from benchmarks.workload import Job, make_distiller, make_models
from distil.system.memory import KERNEL_CACHES, KERNELS_KEPT
from distil.tasks.fine_tuning import training_arguments

# Linear maps of 240 row counts, as the heads of 240 micro-batches: prints the growth in MB.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from distil.kernels import cpu
from distil.system.launch import start_runtime
from distil.system.memory import process_memory
start_runtime(0, -1)
weight = torch.zeros(256, 128, dtype=torch.bfloat16)  # in oneDNN on every CPU
cpu.linear(torch.zeros(1000, 128, dtype=torch.bfloat16), weight)
before = process_memory("VmRSS")
for rows in range(100, 340):
    cpu.linear(torch.zeros(rows, 128, dtype=torch.bfloat16), weight)
print((process_memory("VmRSS") - before) / 1e6)
"""


def growth_mb(**environment: str) -> float:
    done = run_process(sys.executable, "-c", PROGRAM, **environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_process_keeps_few_of_the_kernels_that_it_has_used():
    many = growth_mb(**dict.fromkeys(KERNEL_CACHES, "1024"))  # the libraries' own number
    assert growth_mb() < 0.7 * many, many


def tune(folder):
    training_arguments(folder, seed=1, batch_size=1, eval_batch_size=1, use_cpu=True)


def benchmark(folder):
    path = str(folder / "ids")
    job = Job("distiller", "bert", "tiny", "cpu", path, 16, 2, 1, "fp32", 1, 0, 1, 56)
    make_distiller(job, *make_models(job))


@pytest.mark.parametrize("start", [tune, benchmark])
def test_fine_tuning_and_benchmarks_keep_as_few_as_train_py(start, monkeypatch, tmp_path):
    """With the libraries' number a benchmark showed twice the memory that train.py takes."""
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    start(tmp_path)
    assert [os.environ[name] for name in KERNEL_CACHES] == [str(KERNELS_KEPT)] * 2


# Four threads that hold memory of their own: prints the growth of addresses in MB.
THREADS = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
from distil.system.launch import start_runtime
from distil.system.memory import process_memory
start_runtime(0, -1)
begun, over = threading.Barrier(5), threading.Event()
def hold():
    own = bytearray(2**16)
    begun.wait()
    over.wait()
before = process_memory("VmSize")
threads = [threading.Thread(target=hold) for _ in range(4)]
for thread in threads:
    thread.start()
begun.wait()
print((process_memory("VmSize") - before) / 1e6)
over.set()
"""


def test_threads_reserve_addresses_for_their_stacks_alone():
    """A heap each would be 64 to 128 MB more, by chance, which a limit (ulimit -v) counts."""
    done = run_process(sys.executable, "-c", THREADS)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4 * 16
