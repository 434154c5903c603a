"""The teacher's answers to held-out text are kept to the bit, and a disk's failure ends nothing."""

import dataclasses
import os

import numpy as np
import pytest
import torch

import train
from distil import evaluation, kept_rows
from distil.evaluation import HeldOut, Reader, figures_of, first_largest
from distil.kept_rows import KeptRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows_of(dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 5, generator=generator).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("memory_bytes", [2**20, 200, 0])
def test_rows_come_back_to_the_bit_from_memory_and_from_the_file(memory_bytes, tmp_path):
    kept = KeptRows(tmp_path, memory_bytes)
    given = {dtype: rows_of(dtype, seed) for seed, dtype in enumerate(DTYPES)}
    given["strided"] = rows_of(torch.float32, 9).t()[1:]
    given["none"] = torch.zeros(0, 5)
    for key, rows in given.items():
        kept.keep(key, rows)
        rows_before = bits(rows)
        if rows.numel():
            rows.zero_()  # what is kept is a copy
        given[key] = rows_before, rows.shape, rows.dtype
    for _ in range(2):
        for key, (content, shape, dtype) in given.items():
            found = kept.recall(key)
            if found is None:
                assert not content and memory_bytes == 0
                continue
            assert (bits(found), found.shape, found.dtype) == (content, shape, dtype)
    assert kept.recall("other") is None
    assert bool(kept.in_file) == (memory_bytes < 1000) and not os.listdir(tmp_path)


def test_a_folder_that_is_not_there_is_replaced_by_the_systems(tmp_path):
    kept = KeptRows(tmp_path / "missing", 0)
    kept.keep(1, rows_of(torch.float32, 1))
    assert torch.equal(kept.recall(1), rows_of(torch.float32, 1))


def notices(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(kept_rows.logger, "info", lambda text, *more: found.append(text % more))
    return found


def test_a_full_disk_is_said_once_and_rows_in_memory_stay(tmp_path, monkeypatch):
    """/dev/full is a file on a disk that is always full."""
    said = notices(monkeypatch)
    kept = KeptRows(tmp_path, memory_bytes=150)
    kept.keep("in memory", rows_of(torch.float32, 1))
    kept.keep("in the file", rows_of(torch.float32, 2))
    assert kept.recall("in the file") is not None
    with open("/dev/full", "r+b", buffering=0) as full:
        os.dup2(full.fileno(), kept.file.fileno())
    for number in range(3):
        kept.keep(number, rows_of(torch.float32, 3))
    assert len(said) == 1 and "computed anew" in said[0], said
    assert torch.equal(kept.recall("in memory"), rows_of(torch.float32, 1))
    assert kept.recall("in the file") is None and kept.file is None


def test_half_of_the_disks_free_room_is_left(tmp_path, monkeypatch):
    said, num_bytes = notices(monkeypatch), rows_of(torch.float32, 1).nbytes
    kept, taken = KeptRows(tmp_path, memory_bytes=0), 0

    def disk(_) -> os.statvfs_result:
        return os.statvfs_result((1, 1, 0, 0, 4 * num_bytes - taken, 0, 0, 0, 0, 255))

    monkeypatch.setattr(kept_rows.os, "fstatvfs", disk)
    for number in range(3):
        kept.keep(number, rows_of(torch.float32, number))
        taken += num_bytes
        assert len(said) == (number == 2), "two of four fit"


def test_a_file_that_cannot_be_read_is_computed_anew(tmp_path, monkeypatch):
    said = notices(monkeypatch)
    kept = KeptRows(tmp_path, memory_bytes=0)
    kept.keep(1, rows_of(torch.float32, 1))
    os.ftruncate(kept.file.fileno(), 10)
    assert kept.recall(1) is None and len(said) == 1


# --------------------------------------------------------------------------------------------------
# In a run's evaluation
# --------------------------------------------------------------------------------------------------


def parts(world, kind: str, tmp_path, **changes) -> tuple[HeldOut, Reader, Reader]:
    data = {"eval_data_file": world.data(kind), **changes}
    config = train.parse_config(world.flags(kind, tmp_path / "run", **data))
    trainer = train.set_up(config, train.Runtime())
    step = trainer.distiller
    student = Reader(trainer.student.network, step.model.head, step.amp_dtype)
    return trainer.held_out, student, Reader(step.teacher, step.teacher_head)


@pytest.mark.parametrize("memory_bytes", [2**28, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind, precision", [("bert", {}), ("bert", {"bf16": True}), ("gpt2", {})])
def test_later_evaluations_run_no_teacher_and_are_bit_equal(
    kind, precision, memory_bytes, world, tmp_path, monkeypatch
):
    held_out, student, teacher = parts(world, kind, tmp_path, **precision)
    held_out = dataclasses.replace(held_out, kept=KeptRows(None, memory_bytes))
    runtime, calls = train.Runtime(), []
    kept_forward = teacher.model.base_model.forward

    def forward(*arguments, **options):
        calls.append(1)
        return kept_forward(*arguments, **options)

    monkeypatch.setattr(teacher.model.base_model, "forward", forward)
    first = held_out.figures(student, teacher, runtime)
    num_calls = len(calls)
    assert num_calls > 0 and held_out.figures(student, teacher, runtime) == first
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.1)
    later = held_out.figures(student, teacher, runtime)
    assert len(calls) == num_calls, "the teacher is asked in the first evaluation alone"
    anew = dataclasses.replace(held_out, kept=KeptRows(None))
    assert later == anew.figures(student, teacher, runtime) != first
    assert bool(held_out.kept.in_file) == (memory_bytes == 0)


def test_a_run_without_room_for_the_answers_ends_as_with_it(world, tmp_path, monkeypatch):
    full = os.statvfs_result((1, 1, 0, 0, 0, 0, 0, 0, 0, 255))
    for name in ("kept", "anew"):
        if name == "anew":
            monkeypatch.setattr(kept_rows.os, "fstatvfs", lambda _: full)
            monkeypatch.setattr(kept_rows, "MEMORY_BYTES", 0)
        data = {"eval_data_file": world.data("bert"), "eval_interval": 1, "max_steps": 2}
        train.main(world.flags("bert", tmp_path / name, **data))
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("kept", "anew")]
    lines = [[line for line in text.splitlines() if "eval/" in line] for text in texts]
    assert lines[0] == lines[1] and len(lines[0]) == 3


# --------------------------------------------------------------------------------------------------
# One pass less over the logits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 255, 511, 512, 513, 700, 1024, 3001])
def test_the_first_of_the_largest_logits_is_found(num):
    """Among many equal ones, as logits in bfloat16 are; NaN is the largest, as torch has it."""
    generator = torch.Generator().manual_seed(num)
    values_NV = torch.randint(0, 4, (40, num), generator=generator).float()
    for row, place in enumerate(torch.randint(num, (10,), generator=generator).tolist()):
        values_NV[row, place] = (5.0, torch.inf, torch.nan)[row % 3]
    assert torch.equal(first_largest(values_NV), values_NV.argmax(-1))
    cut_NV = values_NV[:, : max(num - 3, 1)]  # not contiguous
    assert torch.equal(first_largest(cut_NV), cut_NV.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_large_vocabulary_equal_a_slow_loop(dtype):
    """Two heads over 5,003 entries; the loop is in float64, from the same rounded logits."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(5003, 16, generator=generator).to(dtype) for _ in range(2)]
    rows_ND = torch.randn(50, 16, generator=generator).to(dtype)
    labels_N = torch.randint(5003, (50,), generator=generator)
    model = torch.nn.Linear(1, 1)
    readers = [Reader(model, lambda rows_CD, w=weight: rows_CD @ w.t()) for weight in weights]
    sums_S = evaluation._sums_of_rows(*readers, labels_N, rows_ND, rows_ND)
    found = figures_of(sums_S, True)
    s_NV, t_NV = ((rows_ND @ weight.t()).double().log_softmax(-1) for weight in weights)
    pairs = list(zip(s_NV, t_NV, strict=True))
    expected = {
        "loss": -np.mean([s_NV[n, labels_N[n]].item() for n in range(50)]),
        "teacher_loss": -np.mean([t_NV[n, labels_N[n]].item() for n in range(50)]),
        "kl": np.mean([(t.exp() * (t - s)).sum().item() for s, t in pairs]),
        "agreement": np.mean([int(s.argmax() == t.argmax()) for s, t in pairs]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6), name
    twice = readers[0], readers[0], labels_N, rows_ND, rows_ND
    same = figures_of(evaluation._sums_of_rows(*twice), True)
    assert same["kl"] == 0 and same["agreement"] == 1
