"""Resumed runs equal uninterrupted ones bit for bit; signals; refused resumes."""

import functools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faults.files import settle_manifest
from stand_ins import ROOT, logged, make_model
from whole_runs import assert_same_run, dying_at, stop_after

import train
from distil.system import locks, signals
from distil.system.signals import holding_signals
from distil.system.start import AS_SIGTERM
from distil.training import checkpointing
from distil.training.endings import EXIT_NON_FINITE

RUNS = {
    "bert": {"batch_size": 12, "n_epoch": 2},
    "gpt2": {"batch_size": 12, "n_epoch": 2, "gradient_accumulation_steps": 3, "max_tokens": 400},
    "roberta": {"batch_size": 24, "n_epoch": 3, "gradient_accumulation_steps": 4, "bf16": True},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_resumes_bit_for_bit(kind, world, tmp_path, monkeypatch):
    flags = {**RUNS[kind], "log_interval": 5, "checkpoint_interval": 6}
    train.main(world.flags(kind, tmp_path / "whole", **flags))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(SystemExit) as end:
            train.main(world.flags(kind, tmp_path / "stopped", **flags))
    assert end.value.code == 143
    assert checkpointing.newest(tmp_path / "stopped" / "checkpoints").step == 4
    assert not (tmp_path / "stopped" / "pytorch_model.bin").exists()
    train.main([*world.flags(kind, tmp_path / "stopped", **flags), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_killed_run_resumes_from_its_last_checkpoint(world, tmp_path, monkeypatch):
    """After the last checkpoint, log points and an epoch's weights are written twice."""
    flags = {"batch_size": 24, "n_epoch": 3, "fp16": True}
    flags |= {"log_interval": 3, "checkpoint_interval": 8}
    train.main(world.flags("bert", tmp_path / "whole", **flags))
    with monkeypatch.context() as patch:
        dying = dying_at(train.RunFolder.save_checkpoint, 3)
        patch.setattr(train.RunFolder, "save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            train.main(world.flags("bert", tmp_path / "died", **flags))
    assert (tmp_path / "died" / "model_epoch_0.pth").exists()
    train.main([*world.flags("bert", tmp_path / "died", **flags), "--resume", "auto"])
    assert_same_run(tmp_path / "whole", tmp_path / "died")


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> Path:
    """A run stopped after two updates of four; each test that resumes it makes a copy."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            train.main(world.flags("bert", folder, **SHORT))
    return folder


SHORT = {"batch_size": 30, "log_interval": 2}


def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGTERM, 143), *((number, 143) for number in AS_SIGTERM), (signal.SIGINT, 130)],
)
def test_signals_stop_a_run_with_their_status(number, status, world, tmp_path, monkeypatch, capfd):
    stop_after(monkeypatch, 2, number)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
    before = {n: signal.getsignal(n) for n in signals.ENDING_SIGNALS}
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", tmp_path / "run", **SHORT))
    assert end.value.code == status
    assert "Stopped after update 2; resume with --resume." in capfd.readouterr().err
    assert {n: signal.getsignal(n) for n in signals.ENDING_SIGNALS} == before
    assert not [thread for thread in threading.enumerate() if thread.name in ("signals", "watch")]


def test_under_nohup_a_closed_terminal_stops_nothing():
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signals.exit_on_sigterm()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, kept)
        for number in (signal.SIGTERM, *AS_SIGTERM[:-1]):
            signal.signal(number, signal.SIG_DFL)


def test_a_signal_is_counted_once_within_a_second_and_a_later_one_exits_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    stop = signals.StopSignals()
    stop.request(signal.SIGINT)
    stop.request(signal.SIGINT)
    assert stop.requested == signal.SIGINT and not ended
    monkeypatch.setattr(signals, "SAME_EVENT_S", 0.0)
    stop.request(signal.SIGXCPU)  # the system repeats it
    assert not ended
    stop.request(signal.SIGTERM)
    assert ended == [143]


def test_a_signal_during_an_atomic_write_is_noted():
    with signals.StopSignals() as stop, holding_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 10
        while stop.requested is None and time.monotonic() < end:
            time.sleep(0.01)
    assert stop.requested == signal.SIGTERM


def test_resuming_a_finished_run_only_exports_it_again(world, stopped, tmp_path):
    run = copied(stopped, tmp_path)
    flags = [*world.flags("bert", run, **SHORT), "--resume"]
    train.main(flags)
    weights, log = (run / "pytorch_model.bin").read_bytes(), logged(run)
    (run / "pytorch_model.bin").unlink()
    train.main(flags)
    assert (run / "pytorch_model.bin").read_bytes() == weights and logged(run) == log


def test_leftovers_of_a_killed_process_are_removed(world, stopped, tmp_path):
    run = copied(stopped, tmp_path)
    (run / ".export-abcd1234").mkdir()
    (run / ".checkpoint.pth.abcd1234.tmp").write_text("half")
    (run / "checkpoints" / "step-00000003.tmp").mkdir()
    (run / "notes.txt").write_text("mine")
    train.main([*world.flags("bert", run, **SHORT), "--resume"])
    left = {path.name for path in run.rglob("*")}
    assert not [name for name in left if name.endswith(".tmp") or name.startswith(".export")]
    assert "notes.txt" in left


def test_resuming_rewrites_the_plain_checkpoint(world, stopped, tmp_path):
    """The process may have been killed between writing the two checkpoints."""
    run = copied(stopped, tmp_path)
    weights = (run / "checkpoint.pth").read_bytes()
    (run / "checkpoint.pth").write_bytes(b"of an earlier update")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "fit", lambda *arguments: sys.exit(9))
        with pytest.raises(SystemExit):
            train.main([*world.flags("bert", run, **SHORT), "--resume"])
    assert (run / "checkpoint.pth").read_bytes() == weights


def test_paths_and_intervals_may_change_on_resuming(world, stopped, tmp_path):
    run = copied(stopped, tmp_path)
    data = shutil.copy(world.data("bert"), tmp_path / "moved.pickle")
    changes = {"data_file": data, "log_interval": 1}
    changes |= {"checkpoint_interval": 1, "keep_checkpoints": 2}
    train.main([*world.flags("bert", run, **{**SHORT, **changes}), "--resume", "--force"])
    assert (run / "pytorch_model.bin").exists()
    assert len(checkpointing.checkpoints_in(run / "checkpoints")) == 2
    assert not list(tmp_path.glob("run.old-*")), "--force only applies to new runs"


REFUSED = {
    "another rate": (
        {"learning_rate": 1e-3},
        r"--learning_rate 0\.001: .*step-00000002 was made with 0\.0005; pass that",
    ),
    "another seed": ({"seed": 57}, "--seed 57: .* was made with 56"),
    "other passes": (
        {"tokens_per_pass": 700},
        "--tokens_per_pass 700: .* was made with None; pass that",
    ),
    "packed sequences": (
        {"tokens_per_pass": None, "pack_sequences": True},
        "--pack_sequences True: .* was made with None; pass that",
    ),
    "other epochs": ({"n_epoch": 2}, "--n_epoch 2: .* was made with 1"),
    "another loss": ({"alpha_ce": 1.0}, r"--alpha_ce 1\.0: .* was made with 5\.0"),
    "another update": (
        {"gradient_accumulation_steps": 3},
        r"3 on 1 process\(es\): 3 micro-batches an update, .* with 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_flags_are_refused_with_both_values(
    name, world, stopped, tmp_path, status_and_errors
):
    run = copied(stopped, tmp_path)
    changes, expected = REFUSED[name]
    before = contents(run)
    flags = [*world.flags("bert", run, **SHORT, **changes), "--resume"]
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and re.search(expected, errors[0]), errors
    assert contents(run) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_keeps_its_passes_bit_for_bit(world, tmp_path, monkeypatch):
    """Dropout depends on them."""
    flags = {"batch_size": 12, "gradient_accumulation_steps": 5, "n_epoch": 2, "log_interval": 5}
    flags |= {"tokens_per_pass": 900, "checkpoint_interval": 10}
    train.main(world.flags("bert", tmp_path / "whole", **flags))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            train.main(world.flags("bert", tmp_path / "stopped", **flags))
    train.main([*world.flags("bert", tmp_path / "stopped", **flags), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_resumed_run_keeps_packed_passes_bit_for_bit(world, tmp_path, monkeypatch):
    """Their size is a default, kept; dropout depends on it."""
    flags = {"batch_size": 12, "gradient_accumulation_steps": 5, "n_epoch": 2, "log_interval": 5}
    flags |= {"pack_sequences": True, "checkpoint_interval": 10}
    train.main(world.flags("bert", tmp_path / "whole", **flags))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            train.main(world.flags("bert", tmp_path / "stopped", **flags))
    newest, *_ = checkpointing.checkpoints_in(tmp_path / "stopped" / "checkpoints")
    state = json.loads((newest / "state.json").read_text())
    assert state["pack_sequences"] is True and state["tokens_per_pass"] > 0
    train.main([*world.flags("bert", tmp_path / "stopped", **flags), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_that_was_packed_on_a_gpu_by_default_stays_so(world, stopped, tmp_path, capfd):
    """As if it had begun on a GPU: the flags were not given, and the state names both."""
    run = copied(stopped, tmp_path)
    newest, *_ = checkpointing.checkpoints_in(run / "checkpoints")
    assert json.loads((newest / "state.json").read_text())["pack_sequences"] is False, "of a CPU"
    with_state(newest, tokens_per_pass=700, pack_sequences=True)
    settle_manifest(newest)
    train.main([*world.flags("bert", run, **SHORT), "--resume"])
    assert "A pass packs their sequences into up to 10 rows of 64 tokens." in capfd.readouterr().err
    newest, *_ = checkpointing.checkpoints_in(run / "checkpoints")
    state = json.loads((newest / "state.json").read_text())
    assert (state["pack_sequences"], state["tokens_per_pass"]) == (True, 700)


def test_a_run_keeps_the_passes_of_the_device_it_began_on(world, stopped, tmp_path, capfd):
    """As if it had begun on a GPU: the flag was not given, and the state names the size."""
    run = copied(stopped, tmp_path)
    newest, *_ = checkpointing.checkpoints_in(run / "checkpoints")
    assert json.loads((newest / "state.json").read_text())["tokens_per_pass"] == 0, "of a CPU"
    with_state(newest, tokens_per_pass=700)
    settle_manifest(newest)
    train.main([*world.flags("bert", run, **SHORT), "--resume"])
    assert "A pass joins micro-batches up to 700 padded tokens." in capfd.readouterr().err
    newest, *_ = checkpointing.checkpoints_in(run / "checkpoints")
    assert json.loads((newest / "state.json").read_text())["tokens_per_pass"] == 700


def other_student(world, tmp_path) -> dict:
    config = json.loads(Path(world.config("bert")).read_text()) | {"n_layers": 3}
    (tmp_path / "deeper.json").write_text(json.dumps(config))
    return {"student_config": tmp_path / "deeper.json"}


def other_teacher(world, tmp_path) -> dict:
    shutil.copytree(world.teachers["bert"], tmp_path / "teacher")
    make_model("bert", 200, initializer_range=0.1).save_pretrained(tmp_path / "teacher")
    return {"teacher_name": tmp_path / "teacher"}


def other_data(world, tmp_path) -> dict:
    from distil.data import token_files

    path = str(tmp_path / "other.pickle")
    tokens = token_files.open_token_file(world.data("bert"))
    with token_files.writing_tokens(path, "pickle", tokens.ids_M.dtype) as (writer, card):
        card.update(counts={}, tokenizer=tokens.card["tokenizer"])
        writer.append(tokens.ids_M[: int(tokens.lengths_N[:-1].sum())], tokens.lengths_N[:-1])
    return {"data_file": path}


OTHER = {
    "student": (other_student, r"--student_config .*: n_layers is 3, .* was made with 2"),
    "teacher": (other_teacher, r"--teacher_name .*: its digest is \w+, .* was made with \w+"),
    "data": (other_data, r"--data_file .*: its digest is \w+, .* was made with \w+"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_inputs_are_refused_with_both_values(
    name, world, stopped, tmp_path, status_and_errors
):
    run = copied(stopped, tmp_path)
    change, expected = OTHER[name]
    before = contents(run)
    flags = world.flags("bert", run, **SHORT, **change(world, tmp_path))
    status, errors = status_and_errors(train.main, [*flags, "--resume"])
    assert status == 2 and len(errors) == 1 and re.search(expected, errors[0]), errors
    assert contents(run) == before


def test_counts_that_change_nothing_may_be_left_out_of_a_resumed_run(world, tmp_path):
    flags = world.flags("bert", tmp_path / "run", **SHORT, mlm_smoothing=0, max_steps=2)
    train.main(flags)
    plain = world.flags(
        "bert", tmp_path / "run", **SHORT, mlm_smoothing=0, max_steps=2, token_counts=None
    )
    train.main([*plain, "--resume"])
    train.main([*flags, "--resume"])


def test_without_a_checkpoint_only_resume_auto_starts(world, tmp_path, status_and_errors):
    flags = world.flags("bert", tmp_path / "run", **SHORT)
    status, errors = status_and_errors(train.main, [*flags, "--resume"])
    assert status == 2 and len(errors) == 1 and "there is no checkpoint in" in errors[0]
    assert not (tmp_path / "run").exists()
    train.main([*flags, "--resume", "auto"])
    assert (tmp_path / "run" / "pytorch_model.bin").exists()


def test_with_auto_a_folder_without_checkpoints_is_moved_aside(world, tmp_path):
    flags = world.flags("bert", tmp_path / "run", **SHORT)
    train.main(flags)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train.main([*flags, "--resume", "auto"])
    assert len(list(tmp_path.glob("run.old-*"))) == 1


def test_damaged_checkpoints_are_skipped_and_a_run_never_starts_over(
    world, stopped, tmp_path, status_and_errors, caplog
):
    run = copied(stopped, tmp_path)
    newest, oldest = checkpointing.checkpoints_in(run / "checkpoints")
    (newest / "student.safetensors").write_bytes(b"x" * 300)
    flags = [*world.flags("bert", run, **SHORT), "--resume", "auto"]
    caplog.set_level("INFO", logger="distil")
    with pytest.MonkeyPatch.context() as patch:
        propagate = functools.partial(setattr, train.logger, "propagate", True)
        patch.setattr(train, "log_on_rank_0", propagate)
        patch.setattr(train.logger, "handlers", [])
        train.main(flags)
    assert re.search("skipped the checkpoint step-00000002: .*student.safetensors", caplog.text)
    assert "Resuming from" in caplog.text and "step-00000000: 0 updates" in caplog.text
    for path in checkpointing.checkpoints_in(run / "checkpoints"):
        (path / "state.json").unlink()
    before = contents(run)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and "are damaged" in errors[-1] and contents(run) == before


def test_two_runs_do_not_share_a_folder(world, stopped, tmp_path, status_and_errors):
    run = copied(stopped, tmp_path)
    lock = run / locks.LOCK
    with locks.sign_lock(locks.take_lock(lock), lock, {}):
        for more in (["--resume"], ["--force"]):
            flags = [*world.flags("bert", run, **SHORT), *more]
            status, errors = status_and_errors(train.main, flags)
            assert status == 2 and "another run trains in it" in errors[0]
            assert str(os.getpid()) in errors[0]


def test_non_finite_weights_are_not_saved(world, tmp_path, monkeypatch, capfd):
    kept = train.Distiller.launch

    def step(self, *arguments, **options):
        report = kept(self, *arguments, **options)
        next(self.model.student.parameters()).data[0, 0] = float("inf")
        return report

    monkeypatch.setattr(train.Distiller, "launch", step)
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", tmp_path / "run", **SHORT, checkpoint_interval=1))
    assert end.value.code == EXIT_NON_FINITE
    message = "of the student became NaN or infinite; nothing of it was saved"
    assert message in capfd.readouterr().err
    saved = checkpointing.checkpoints_in(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000000"]
    plain = tmp_path / "run" / "checkpoint.pth"
    assert not plain.exists() or torch.load(plain)


def with_state(step: Path, **changes) -> None:
    path = step / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_tensor(step: Path, file: str, change) -> None:
    """Change the first tensor of a kind in a checkpoint's file."""
    tensors = safetensors.torch.load_file(step / file)
    name = next(name for name in tensors if not name.startswith("step/"))
    safetensors.torch.save_file(tensors | {name: change(tensors[name])}, step / file)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.flatten()[0] = float("nan")
    return tensor


EDITED = {
    "a negative size": (
        lambda step: with_state(step, tokens_per_pass=-1),
        "tokens_per_pass is -1, expected 0 to",
    ),
    "a text": (lambda step: with_state(step, micro_batches="2"), "micro_batches is '2', expected"),
    "too many": (lambda step: with_state(step, micro_batches=10**9), "micro_batches is 1000000000"),
    "sums": (lambda step: with_state(step, log_sums=[1.0]), "1 log_sums of"),
    "held-out figures": (
        lambda step: with_state(step, held_out={"first": {"kl": "x"}}),
        "held_out.first.kl is 'x', expected",
    ),
    "a method": (
        lambda step: with_state(step, schedule={"get_lr": "x"}),
        "schedule.get_lr is 'x', expected",
    ),
    "NaN weights": (
        lambda step: with_tensor(step, "student.safetensors", with_nan),
        "the checkpoint has NaN or infinite values",
    ),
    "weights of ints": (
        lambda step: with_tensor(step, "student.safetensors", torch.Tensor.int),
        "int32 in the checkpoint, ",
    ),
    "NaN moments": (
        lambda step: with_tensor(step, "optimizer.safetensors", with_nan),
        "expected finite numbers of",
    ),
    "moments of another shape": (
        lambda step: with_tensor(step, "optimizer.safetensors", lambda tensor: tensor[:1].clone()),
        "expected finite numbers of",
    ),
}


@pytest.mark.parametrize("name", EDITED)
def test_a_checkpoint_of_other_numbers_is_refused_though_its_checksums_fit(
    name, world, stopped, tmp_path, status_and_errors
):
    run = copied(stopped, tmp_path)
    change, expected = EDITED[name]
    newest, *others = checkpointing.checkpoints_in(run / "checkpoints")
    change(newest)
    settle_manifest(newest)
    flags = [*world.flags("bert", run, **SHORT), "--resume"]
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert str(newest) in errors[0]


def test_a_restart_is_recognized_by_the_launcher_or_by_job_and_count(tmp_path, monkeypatch):
    lock, again = tmp_path / locks.LOCK, {"TORCHELASTIC_RESTART_COUNT": "1"}
    locks.sign_lock(locks.take_lock(lock), lock, {}).close()
    assert not locks.is_restarted(again, lock), "no launcher has used this folder"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert not locks.is_restarted(again, lock), "nor this job"
    locks.sign_lock(locks.take_lock(lock), lock, {}).close()
    assert locks.is_restarted({}, lock)
    lock.write_text(lock.read_text().replace('"launcher": "', '"launcher": "elsewhere/'))
    assert locks.is_restarted(again, lock) and not locks.is_restarted({}, lock)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not locks.is_restarted(again, lock)
    assert not locks.is_restarted(again, tmp_path / "none")


def test_the_documentation_names_the_flags_of_resuming():
    text = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    for flag in ("--resume", "--keep_checkpoints", "--distributed_timeout_s"):
        assert flag in text
