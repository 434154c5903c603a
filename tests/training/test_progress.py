"""Shown and logged speeds follow from tokens, seconds and model FLOPs; no speed is asserted."""

import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from distil import flops
from distil.flops import size_of, update_flops
from distil.objectives import LOSSES
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
        expected = f"loss 1.500, {tokens / seconds:.0f} tok/s, {num_flops / seconds / PEAK:.1%} MFU"
        assert expected in shown.text(None)
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
        points = shown.take_scalars(0.1, 2.5)
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
    assert trainer.flops is None
    assert_no_mfu(trainer, clock)


def test_a_cpu_has_no_mfu(world, tmp_path, monkeypatch):
    """A peak measured while others use the cores gave an MFU of 101,931 %."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = trainer_of(world, tmp_path)
    assert trainer.flops is not None
    assert_no_mfu(trainer, now)


def assert_no_mfu(trainer: train.Trainer, clock: list[float]) -> None:
    shown = trainer.progress
    clock[0] += 1.0
    (update,) = updates_of(trainer, 2, 1)
    record(shown, update)
    assert "MFU" not in shown.text(None) and "tok/s" in shown.text(None)
    points = shown.take_scalars(0.1, 2.5)
    assert "global/tokens_per_s" in points and "global/mfu" not in points
    assert "MFU" not in shown.describe_log(points)


def test_the_peak_of_several_processes_is_their_number_times_that_of_one(world, tmp_path, clock):
    trainer, peaks = trainer_of(world, tmp_path), []
    for rank in (0, 1):
        trainer.runtime = train.Runtime(rank, 3)
        trainer.flops = None if rank else trainer.flops  # as set_up leaves it
        peaks.append(trainer._make_progress().peak_flops)
    assert peaks == [3 * PEAK, None]


def test_the_peak_is_that_of_the_runs_precision(world, tmp_path, monkeypatch):
    asked = []

    def peak_flops(device, dtype) -> float:
        asked.append((device.type, dtype))
        return PEAK

    monkeypatch.setattr(train, "peak_flops", peak_flops)
    for changes in ({}, {"bf16": True}, {"fp16": True}):
        trainer_of(world, tmp_path, **changes)
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16)]


# --------------------------------------------------------------------------------------------------
# The bar
# --------------------------------------------------------------------------------------------------


def progress_of(num_micro_batches: int, per_epoch: int, per_update: int = 2) -> progress.Progress:
    names, lengths = ["loss", "loss_ce"], np.full(9, 20)
    sizes = num_micro_batches, per_epoch, per_update, 1
    return progress.Progress(names, *sizes, lengths, progress.Intervals(5, 5), shows_bar=True)


def do_updates(shown: progress.Progress, num: int, per_update: int = 2, loss: float = 1.5) -> None:
    """Take updates as the loop does: advance, then record."""
    for _ in range(num):
        first, per_epoch = shown.micro_batches, shown.batches_per_epoch
        numbers = range(first, min(first + per_update, shown.num_micro_batches))
        planned = [
            types.SimpleNamespace(number=n, epoch=n // per_epoch, sequences=[0, 1]) for n in numbers
        ]
        shown.advance(planned)
        shown.record(planned, torch.full((len(planned), 2), loss, dtype=torch.float64))


def test_the_time_left_of_a_resumed_run_counts_only_what_it_did(clock):
    """The jump to the checkpoint was counted as speed: 27 s were shown for many minutes."""
    shown = progress_of(2000, 1000)
    zeros = {"log_sums": [0.0, 0.0], "log_count": 0, "epoch_sums": []}
    shown.load(900, {"micro_batches": 1800, **zeros})
    clock[0] = 50.0
    shown.start_clock()
    assert "left" not in shown.text(None), "nothing is known before the first update"
    clock[0] = 60.0
    do_updates(shown, 1)  # 2 micro-batches in 10 s; 198 are left
    assert "epoch 1, update 901/1000, 16m30s left" in shown.text(None)


def test_the_time_left_does_not_count_the_evaluation_of_the_first_weights(clock):
    shown = progress_of(2000, 1000)
    shown.start_clock()
    clock[0] = 100.0
    shown.take_figures({"loss": 1.0, "accuracy": 0.5}, 100.0, None)
    clock[0] = 110.0
    do_updates(shown, 1)  # 2 micro-batches in 10 s; 1,998 are left
    assert "2h46m left" in shown.text(None)


def test_the_bar_names_the_epoch_that_is_computed_and_counts_updates(clock):
    shown = progress_of(9, 4)
    seen = [shown.text(None)]
    for _ in range(5):
        clock[0] += 1.0
        do_updates(shown, 1)
        seen.append(shown.text(None))
    started = ("epoch 0, update 0/5", "epoch 0, update 1/5", "epoch 1, update 2/5")
    ended = ("epoch 1, update 3/5", "epoch 2, update 4/5", "epoch 2, update 5/5")
    assert [text.split(", 0")[0].split(", ")[:2] for text in seen] == [
        text.split(", ") for text in (*started, *ended)
    ]


def test_80_columns_hold_loss_speed_time_left_and_the_held_out_figure(clock):
    shown = progress_of(250_000, 90_000)
    shown.step, shown.micro_batches = 99_990, 199_980
    clock[0] = 1e-3
    do_updates(shown, 1, loss=12.3456)
    shown.peak_flops, shown.time_left = 1e15, "5h12m left"
    shown.take_figures({"kl": 0.12345, "accuracy": 0.5, "loss": 2.0}, 0.0, None)
    narrow, wide = shown.text(80), shown.text(200)
    assert len(narrow) <= 80 and wide.startswith(narrow)
    assert narrow == (
        "epoch 2, update 99991/125000, 5h12m left, loss 12.346, 80k tok/s, eval KL 0.123"
    )
    assert wide.endswith(", top-1 50.0%")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0s"), (59.6, "1m00s"), (125, "2m05s"), (3 * 3600 + 59, "3h00m"), (90_000, "1d01h")],
)
def test_durations_have_two_units(seconds, expected):
    assert progress.duration(seconds) == expected


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
