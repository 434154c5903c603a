"""What the progress bar and TensorBoard say of speed is what tokens, seconds and model FLOPs imply;
no speed is asserted.
"""

import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from distil.flops import size_of, update_flops
from distiller import StepReport

PEAK = 1e9


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Have train.py read its seconds from here, and take every device for one of PEAK."""
    now = [0.0]
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: PEAK)
    return now


def parts_of(world, tmp_path, kind: str = "bert", **changes) -> train.Parts:
    return train.set_up(
        train.parse_config(world.flags(kind, tmp_path / "run", **changes)), train.Runtime()
    )


def updates_of(parts: train.Parts, accumulation: int, num: int) -> list:
    updates = parts.sampler.updates(parts.num_micro_batches, accumulation, 0, 1, 0)
    return [next(updates) for _ in range(num)]


def record(progress: train.Progress, update) -> None:
    """Take in an update whose losses are all 1.5."""
    progress.record(update, report_of(progress, update))


def report_of(progress: train.Progress, update) -> StepReport:
    return StepReport(
        torch.full((len(update.planned), len(progress.names)), 1.5, dtype=torch.float64), 1.0, {}
    )


def lengths_of(parts: train.Parts, update) -> list[np.ndarray]:
    return [parts.dataset.lengths[batch.sequences].astype(np.int64) for batch in update.planned]


def test_the_bar_shows_tokens_a_second_and_mfu(clock, world, tmp_path):
    parts = parts_of(world, tmp_path)
    progress = train.Progress(parts, train.Runtime())
    teacher, student = size_of(parts.distiller.teacher), size_of(parts.student)
    tokens = flops = 0
    for seconds, update in zip((2.0, 6.0), updates_of(parts, 3, 2), strict=True):
        clock[0] = seconds
        record(progress, update)
        tokens += sum(int(lengths_B.sum()) for lengths_B in lengths_of(parts, update))
        flops += sum(
            update_flops(teacher, student, lengths_B) for lengths_B in lengths_of(parts, update)
        )
        expected = (
            f"loss 1.5000, {tokens / seconds:,.0f} tokens/s, {flops / seconds / PEAK:.1%} MFU"
        )
        assert progress.training_text == expected and expected in str(progress.bar.postfix)
    assert flops / 6.0 / PEAK > 0.01, "the figure is not lost in rounding"


class Points:
    """Keeps what is logged: tag -> value."""

    def add_scalars(self, scalars: dict[str, float], x: int) -> None:
        self.last = scalars


def test_logged_rates_are_of_the_time_since_the_last_log_without_evaluations(
    clock, world, tmp_path
):
    parts = parts_of(world, tmp_path)
    progress, points = train.Progress(parts, train.Runtime()), Points()
    first, second = updates_of(parts, 2, 2)
    for seconds, evaluation_s, update in ((4.0, 0.0, first), (9.0, 3.0, second)):
        clock[0] = seconds
        record(progress, update)
        if evaluation_s:
            clock[0] += evaluation_s
            progress.take_figures({"loss": 1.0, "accuracy": 0.5}, evaluation_s)
        progress.log_to(points, 0, report_of(progress, update))
        tokens = sum(int(lengths_B.sum()) for lengths_B in lengths_of(parts, update))
        flops = sum(parts.work.flops(lengths_B) for lengths_B in lengths_of(parts, update))
        elapsed_s = 4.0 if update is first else 9.0 - 4.0
        assert points.last["global/speed"] == elapsed_s
        assert points.last["global/tokens_per_s"] == pytest.approx(tokens / elapsed_s)
        assert points.last["global/mfu"] == pytest.approx(flops / elapsed_s / PEAK)


def scalars(folder) -> dict[str, list[float]]:
    log = EventAccumulator(str(folder / "log" / "train"), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_a_runs_log_holds_tokens_and_seconds_that_agree(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: PEAK)
    flags = {"max_steps": 4, "log_interval": 4, "gradient_accumulation_steps": 2}
    train.main(world.flags("gpt2", tmp_path / "run", **flags))
    found, parts = scalars(tmp_path / "run"), parts_of(world, tmp_path / "other", "gpt2", **flags)
    updates = updates_of(parts, 2, 4)
    for k, pair in enumerate((updates[:2], updates[2:])):
        lengths = [lengths_B for update in pair for lengths_B in lengths_of(parts, update)]
        seconds = found["global/speed"][k]  # the files hold float32
        tokens, flops = (
            sum(int(lengths_B.sum()) for lengths_B in lengths),
            sum(map(parts.work.flops, lengths)),
        )
        assert found["global/tokens_per_s"][k] * seconds == pytest.approx(tokens, rel=1e-5)
        assert found["global/mfu"][k] * seconds * PEAK == pytest.approx(flops, rel=1e-5)


def test_models_whose_work_is_not_known_have_a_speed_alone(world, tmp_path, monkeypatch, clock):
    monkeypatch.setattr(train, "shown_size", lambda model, token_ids_BT: None)
    parts, points = parts_of(world, tmp_path), Points()
    progress = train.Progress(parts, train.Runtime())
    clock[0] = 1.0
    (update,) = updates_of(parts, 2, 1)
    record(progress, update)
    progress.log_to(points, 0, report_of(progress, update))
    assert (
        parts.work is None
        and "MFU" not in progress.training_text
        and "tokens/s" in progress.training_text
    )
    assert "global/tokens_per_s" in points.last and "global/mfu" not in points.last


def test_the_peak_of_several_processes_is_that_of_one_times_their_number(world, tmp_path, clock):
    parts = parts_of(world, tmp_path)
    peaks = [train.Progress(parts, train.Runtime(rank, 3)).peak_flops for rank in (0, 1)]
    assert peaks == [3 * PEAK, None]


def test_the_peak_is_measured_in_the_runs_precision(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        train, "peak_flops", lambda device, dtype: asked.append((device.type, dtype)) or PEAK
    )
    for changes in ({}, {"bf16": True}, {"fp16": True}):
        train.Progress(parts_of(world, tmp_path, **changes), train.Runtime())
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16)]


# Flags -> whether a teacher runs, and whether it is projected.
WORK = {
    "all": ("bert", {}, True, True),
    "restricted": ("bert", {"restrict_ce_to_mask": True}, True, True),
    "restricted, without KL": (
        "bert",
        {"restrict_ce_to_mask": True, "alpha_ce": 0.0, "alpha_mse": 0.1},
        True,
        True,
    ),
    "masks alone": ("bert", {"alpha_ce": 0.0, "alpha_cos": 0.0}, False, False),
    "masks and cosine": ("bert", {"alpha_ce": 0.0}, True, False),
    "causal": ("gpt2", {}, True, True),
    "next tokens alone": ("gpt2", {"alpha_ce": 0.0, "alpha_cos": 0.0}, False, False),
}


@pytest.mark.parametrize("name", WORK)
def test_what_is_counted_is_what_is_projected(name, world, tmp_path):
    """Against the rows of real micro-batches, whichever objectives read them."""
    kind, changes, has_teacher, is_projected = WORK[name]
    parts = parts_of(world, tmp_path, kind, **changes)
    work, model = parts.work, parts.distiller.model
    assert (work.teacher is not None) == has_teacher == model.needs_teacher
    assert bool(has_teacher and work.teacher.in_head) == is_projected
    for update in updates_of(parts, 2, 3):
        for planned, lengths_B in zip(update.planned, lengths_of(parts, update), strict=True):
            batch = parts.prepare(planned.number, *parts.dataset.collate(planned.sequences))
            read = [batch.rows[train.LOSSES[loss].rows] for loss in model._active("logits")]
            assert work.head_rows(lengths_B) == len(torch.cat(read).unique())
            student = work.student.forward_flops(lengths_B, len(torch.cat(read).unique()))
            teacher = (
                work.teacher.forward_flops(lengths_B, work.head_rows(lengths_B))
                if has_teacher
                else 0
            )
            assert work.flops(lengths_B) == teacher + 3 * student


def test_without_objectives_on_logits_nothing_is_projected(world, tmp_path):
    config = train.parse_config(world.flags("bert", tmp_path / "run"))
    config.alphas.update(dict.fromkeys(config.alphas, 0.0), cos=1.0)
    assert train.head_rows(config, np.array([20, 30])) == 0
