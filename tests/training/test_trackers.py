"""Trackers beside the run folder, each read back by its own library where it is installed."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
from whole_runs import dying_at, read_metrics

import train
from distil.training import trackers
from distil.training.trackers import Tracker, start_trackers, tracker_problems
from utils import InputError

BLOCK, HEADER = 2**15, 7  # of wandb's files, in LevelDB's log format


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(
    world, tmp_path, status_and_errors, monkeypatch
):
    known = importlib.util.find_spec
    missing = {"wandb", "mlflow"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else known(name)
    )
    monkeypatch.setattr(train, "set_up", lambda *_: pytest.fail("something was loaded"))
    flags = [*world.flags("bert", tmp_path / "run"), "--report_to", "wandb", "mlflow"]
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and errors == [
        f"--report_to {name}: {name} is not installed; pip install {name}, or leave {name} out"
        for name in ("wandb", "mlflow")
    ]
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_trackers_name_is_no_package(tmp_path, monkeypatch):
    """wandb itself makes a folder ./wandb, which Python could import as an empty package."""
    monkeypatch.setattr(trackers, "STARTS", {"tracker_of_no_package": None})
    (tmp_path / "tracker_of_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = tracker_problems(["tracker_of_no_package"])
    assert "tracker_of_no_package is not installed" in problem


def test_an_unknown_tracker_is_refused(world, tmp_path, status_and_errors):
    flags = [*world.flags("bert", tmp_path / "run"), "--report_to", "notebook"]
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and "invalid choice: 'notebook'" in errors[0]


class Failing:
    """A tracker of a package that fails at its second log."""

    def __init__(self):
        self.steps = []

    def log(self, values, step):
        self.steps.append(step)
        if len(self.steps) > 1:
            raise RuntimeError("the server is gone")

    def finish(self):
        self.steps.append("finished")


def test_a_tracker_that_fails_is_left_out_and_the_run_continues(
    world, tmp_path, monkeypatch, capfd
):
    inner = Failing()
    started = [Tracker("wandb", inner, "some-id")]
    monkeypatch.setattr("distil.training.run_folder.start_trackers", lambda *_: started)
    train.main(world.flags("gpt2", tmp_path / "run", log_interval=4, max_steps=6))
    assert inner.steps == [2, 4] and len(read_metrics(tmp_path / "run")) == 3
    assert capfd.readouterr().err.count("wandb failed, and gets no more figures: the server") == 1


def test_a_tracker_that_does_not_start_is_one_line_and_ends_the_others(tmp_path, monkeypatch):
    first = Failing()
    first.store_init_configuration = lambda flags: None

    def refuse(run_path, id):
        raise RuntimeError("no\nroute")

    starts = {"wandb": lambda run_path, id: (first, "id"), "mlflow": refuse}
    monkeypatch.setattr(trackers, "STARTS", starts)
    with pytest.raises(InputError, match=r"--report_to mlflow: does not start \(no route\)"):
        start_trackers(["wandb", "mlflow"], tmp_path, {}, {})
    assert first.steps == ["finished"]


def resumed(world, tmp_path: Path, name: str) -> tuple[Path, str]:
    """Kill a run after its second checkpoint and resume it: (run folder, the tracker's run id)."""
    folder, changes = tmp_path / "run", {"max_steps": 6, "log_interval": 2, "batch_size": 20}
    flags = world.flags("gpt2", folder, **changes, checkpoint_interval=4)
    flags += ["--report_to", "tensorboard", name]
    with pytest.MonkeyPatch.context() as patch:
        dying = dying_at(train.RunFolder.save_checkpoint, 3)
        patch.setattr(train.RunFolder, "save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/state.json")]
    (id,) = {state["trackers"][name] for state in states}
    train.main([*flags, "--resume"])
    return folder, id


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")  # of mlflow and its libraries
def test_mlflow_continues_its_run_in_the_run_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    folder, id = resumed(world, tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'distil'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == id and run.info.status == "FINISHED"
    assert run.data.params["dump_path"] == str(folder)
    points = {(point.step, point.value) for point in client.get_metric_history(id, "loss_ce")}
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert points == {(line["update"], line["loss_ce"]) for line in lines} and len(points) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing lies beside the run"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")  # of wandb and its libraries
def test_wandb_continues_under_its_id(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, id = resumed(world, tmp_path, "wandb")
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{id}.wandb" for file in files)
    points = {}
    for file in files:
        for record in wandb_records(file):
            if record.HasField("run"):
                assert record.run.run_id == id and record.run.project == "distil"
            if record.HasField("history"):
                items = record.history.item
                point = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                points[point["_step"]] = point["loss_ce"]
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert points == {line["update"]: line["loss_ce"] for line in lines} and len(points) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing lies beside the run"


def wandb_records(file: Path) -> list:
    """Read an offline run with wandb's own record type."""
    from wandb.proto import wandb_internal_pb2

    content, records, kept, at = file.read_bytes(), [], b"", 7  # behind the file's header
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        kept += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(kept))
            kept = b""
    return records


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_login_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    import wandb

    wandb.teardown()  # forget the settings of other tests
    (problem,) = tracker_problems(["tensorboard", "wandb"])
    assert problem.startswith("--report_to wandb: not logged in; run wandb login")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    (problem,) = tracker_problems(["wandb"])
    assert "\n" not in problem and "mode" in problem.lower()
