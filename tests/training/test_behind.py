"""Checkpoints written by a thread while a GPU trains on; here from the memory of a CPU."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

import train
from distil.training import checkpointing, run_folder
from distil.training.behind import Behind, copied_to_host
from utils import InputError


@pytest.fixture
def behind(monkeypatch):
    """Let a CPU's tensors count as those of a GPU."""
    monkeypatch.setattr(run_folder, "is_on_gpu", lambda tensors: True)


def train_saving(world, run: Path) -> Path:
    """Train four updates; save after each."""
    train.main(world.flags("bert", run, max_steps=4, batch_size=40, checkpoint_interval=1))
    return run


def content_of(run: Path) -> list[tuple[str, object]]:
    """List every tensor of every checkpoint and of the files of weights."""
    found = []
    for path in checkpointing.checkpoints_in(run / "checkpoints"):
        point = checkpointing.read(path)
        for file in ("student", "optimizer"):
            found += [(f"{path.name}/{file}/{k}", v) for k, v in point.tensors(file).items()]
    for name in ("checkpoint.pth", "pytorch_model.bin", "model_epoch_0.pth"):
        weights = torch.load(run / name, weights_only=True)
        found += [(f"{name}/{k}", v) for k, v in weights.items()]
    return found


def test_a_run_that_writes_behind_leaves_the_same_files(world, tmp_path, monkeypatch):
    plain = train_saving(world, tmp_path / "plain")
    monkeypatch.setattr(run_folder, "is_on_gpu", lambda tensors: True)
    other = train_saving(world, tmp_path / "behind")
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (plain, other)]
    assert {n for n in names[0] if "tfevents" not in n} == {
        n for n in names[1] if "tfevents" not in n
    }
    for (name, expected), (own, found) in zip(*map(content_of, (plain, other)), strict=True):
        assert name == own and torch.equal(expected, found), name


class Opened:
    """A run folder in which the first checkpoint lies, and what is saved into it."""

    def __init__(self, world, run: Path, monkeypatch):
        kept = []
        monkeypatch.setattr(train, "fit_and_export", lambda trainer, stop: kept.append(trainer))
        monkeypatch.setattr(train.RunFolder, "close", lambda folder: None)
        train.main(world.flags("bert", run, max_steps=4))
        (self.trainer,) = kept
        monkeypatch.undo()
        monkeypatch.setattr(run_folder, "is_on_gpu", lambda tensors: True)
        self.folder = self.trainer.folder

    def save(self, step: int) -> None:
        """Save the run as it is, as after so many updates."""
        self.folder.save_checkpoint(self.trainer.distiller.tensors(), {"a": 1}, step, 2)


@pytest.fixture
def opened(world, tmp_path, monkeypatch):
    """Begin a run that trains nothing."""
    found = Opened(world, tmp_path / "run", monkeypatch)
    yield found
    found.folder.close()


def test_a_checkpoint_holds_the_state_of_its_update(opened):
    weight = next(opened.trainer.distiller.model.student.parameters())
    begun = opened.folder.behind.start
    release = []
    opened.folder.behind.start = release.append  # begins only when training went on
    opened.save(1)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    begun(release[0])
    opened.folder.behind.wait()
    point = checkpointing.newest(opened.folder.path / "checkpoints")
    assert point.step == 1
    assert any(
        torch.equal(t, before) for t in point.tensors("student").values() if t.shape == before.shape
    )
    plain = torch.load(opened.folder.path / "checkpoint.pth", weights_only=True)
    assert any(torch.equal(t, before) for t in plain.values() if t.shape == before.shape)


def test_what_fails_behind_is_raised_at_the_next_write(opened):
    checkpoints = opened.folder.path / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text("in the way")
    opened.save(1)
    with pytest.raises(InputError, match="checkpoints"):
        opened.folder.save_epoch(0, 1.0, 1)


def test_what_fails_behind_at_the_end_is_said(opened, caplog):
    checkpoints = opened.folder.path / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text("in the way")
    opened.save(1)
    with caplog.at_level(logging.ERROR):
        opened.folder.close()
    assert "was not written" in caplog.text and "checkpoints" in caplog.text


def test_an_error_is_raised_once_and_tasks_follow_each_other():
    behind, done = Behind(), []
    behind.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        behind.start(lambda: done.append(1))
    for k in range(20):
        behind.start(lambda k=k: done.append(k))
    assert behind.close() is None and done == list(range(20))


def test_tensors_that_share_memory_are_copied_once():
    table = torch.ones(3, 2)
    copied = copied_to_host({"a": {"x": table}, "b": {"x": table, "y": table.t(), "z": table + 1}})
    table.zero_()
    assert copied["a"]["x"] is copied["b"]["x"] and copied["a"]["x"].sum() == 6
    assert copied["b"]["y"].shape == (2, 3) and copied["b"]["z"].sum() == 12
