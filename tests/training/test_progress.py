"""Shown and logged speeds follow from tokens, seconds and model FLOPs; no speed is asserted."""

import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from distil import flops
from distil.flops import size_of, update_flops
from distil.losses import LOSSES
from distil.training import progress

PEAK = 1e9


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Replace the clock of the progress by this list's item, and every device's peak by PEAK."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: PEAK)
    return now


def trainer_of(world, tmp_path, kind: str = "bert", **changes) -> train.Trainer:
    config = train.parse_config(world.flags(kind, tmp_path / "run", **changes))
    return train.set_up(config, train.Runtime())


def updates_of(trainer: train.Trainer, accumulation: int, num: int) -> list:
    updates = trainer.sampler.updates(trainer.num_micro_batches, accumulation, 0, 1, 0)
    return [next(updates) for _ in range(num)]


def record(shown: train.Progress, update) -> None:
    """Record an update whose losses are all 1.5."""
    losses_MK = torch.full((len(update.planned), len(shown.names)), 1.5, dtype=torch.float64)
    shown.record(update.planned, losses_MK)


def lengths_of(trainer: train.Trainer, update) -> list[np.ndarray]:
    return [trainer.dataset.lengths[batch.sequences].astype(np.int64) for batch in update.planned]


def test_the_bar_shows_tokens_a_second_and_mfu(clock, world, tmp_path):
    trainer = trainer_of(world, tmp_path)
    shown = trainer.progress
    teacher, student = size_of(trainer.teacher.network), size_of(trainer.student.network)
    tokens = num_flops = 0
    for seconds, update in zip((2.0, 6.0), updates_of(trainer, 3, 2), strict=True):
        clock[0] = seconds
        record(shown, update)
        tokens += sum(int(lengths_B.sum()) for lengths_B in lengths_of(trainer, update))
        num_flops += sum(update_flops(teacher, student, x) for x in lengths_of(trainer, update))
        rates = f"{tokens / seconds:,.0f} tokens/s, {num_flops / seconds / PEAK:.1%} MFU"
        expected = f"loss 1.5000, {rates}"
        assert shown.training_text == expected and expected in str(shown.bar.postfix)
    assert num_flops / 6.0 / PEAK > 0.01, "the figure is not lost in rounding"


def test_logged_rates_cover_the_time_since_the_last_log_without_evaluations(clock, world, tmp_path):
    trainer = trainer_of(world, tmp_path)
    shown = trainer.progress
    first, second = updates_of(trainer, 2, 2)
    for seconds, evaluation_s, update in ((4.0, 0.0, first), (9.0, 3.0, second)):
        clock[0] = seconds
        record(shown, update)
        if evaluation_s:
            clock[0] += evaluation_s
            shown.take_figures({"loss": 1.0, "accuracy": 0.5}, evaluation_s, None)
        points = shown.take_scalars(0, 0.1)
        tokens = sum(int(lengths_B.sum()) for lengths_B in lengths_of(trainer, update))
        counted = sum(map(trainer.flops.of_batch, lengths_of(trainer, update)))
        elapsed_s = 4.0 if update is first else 9.0 - 4.0
        assert points["global/speed"] == elapsed_s
        assert points["global/tokens_per_s"] == pytest.approx(tokens / elapsed_s)
        assert points["global/mfu"] == pytest.approx(counted / elapsed_s / PEAK)


def scalars(folder) -> dict[str, list[float]]:
    log = EventAccumulator(str(folder / "log" / "train"), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_logged_rates_agree_with_logged_seconds(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: PEAK)
    flags = {"max_steps": 4, "log_interval": 4, "gradient_accumulation_steps": 2}
    train.main(world.flags("gpt2", tmp_path / "run", **flags))
    found = scalars(tmp_path / "run")
    trainer = trainer_of(world, tmp_path / "other", "gpt2", **flags)
    updates = updates_of(trainer, 2, 4)
    for k, pair in enumerate((updates[:2], updates[2:])):
        lengths = [lengths_B for update in pair for lengths_B in lengths_of(trainer, update)]
        seconds = found["global/speed"][k]  # the files hold float32
        tokens = sum(int(lengths_B.sum()) for lengths_B in lengths)
        counted = sum(map(trainer.flops.of_batch, lengths))
        assert found["global/tokens_per_s"][k] * seconds == pytest.approx(tokens, rel=1e-5)
        assert found["global/mfu"][k] * seconds * PEAK == pytest.approx(counted, rel=1e-5)


def test_models_of_unknown_flops_have_a_speed_but_no_mfu(world, tmp_path, monkeypatch, clock):
    monkeypatch.setattr(flops, "shown_size", lambda model, token_ids_BT: None)
    trainer = trainer_of(world, tmp_path)
    shown = trainer.progress
    clock[0] = 1.0
    (update,) = updates_of(trainer, 2, 1)
    record(shown, update)
    points = shown.take_scalars(0, 0.1)
    assert trainer.flops is None
    assert "MFU" not in shown.training_text and "tokens/s" in shown.training_text
    assert "global/tokens_per_s" in points and "global/mfu" not in points


def test_the_peak_of_several_processes_is_their_number_times_that_of_one(world, tmp_path, clock):
    trainer, peaks = trainer_of(world, tmp_path), []
    for rank in (0, 1):
        trainer.runtime = train.Runtime(rank, 3)
        peaks.append(trainer._make_progress().peak_flops)
    assert peaks == [3 * PEAK, None]


def test_the_peak_is_measured_in_the_runs_precision(world, tmp_path, monkeypatch):
    asked = []

    def peak_flops(device, dtype) -> float:
        asked.append((device.type, dtype))
        return PEAK

    monkeypatch.setattr(train, "peak_flops", peak_flops)
    for changes in ({}, {"bf16": True}, {"fp16": True}):
        trainer_of(world, tmp_path, **changes)
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16)]


# Name -> (kind, flags, whether the teacher runs, whether it is projected).
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
def test_counted_flops_match_the_rows_that_are_projected(name, world, tmp_path):
    """Compare with the rows of micro-batches that the active objectives read."""
    kind, changes, has_teacher, is_projected = WORK[name]
    trainer = trainer_of(world, tmp_path, kind, **changes)
    work, model = trainer.flops, trainer.distiller.model
    assert (work.teacher is not None) == has_teacher == model.needs_teacher
    assert bool(has_teacher and work.teacher.in_head) == is_projected
    for update in updates_of(trainer, 2, 3):
        for planned, lengths_B in zip(update.planned, lengths_of(trainer, update), strict=True):
            batch = trainer.prepare(planned.number, *trainer.dataset.collate(planned.sequences))
            read = [batch.rows[LOSSES[loss].rows] for loss in model._active("logits")]
            assert work.head_rows(lengths_B) == len(torch.cat(read).unique())
            num_rows = work.head_rows(lengths_B)
            expected = 3 * work.student.forward_flops(lengths_B, num_rows)
            if has_teacher:
                expected += work.teacher.forward_flops(lengths_B, num_rows)
            assert work.of_batch(lengths_B) == expected


def test_without_objectives_on_logits_nothing_is_projected(world, tmp_path):
    trainer = trainer_of(world, tmp_path)
    models = trainer.student.network, trainer.teacher.network
    ids_BT = torch.ones(1, 20, dtype=torch.int64)
    counted = flops.count_update(*models, ["cos"], ids_BT, 0.15, False)
    assert counted.head_rows(np.array([20, 30])) == 0
