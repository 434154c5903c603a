"""Trackers of a run beside its folder: Weights & Biases and MLflow, through accelerate.

Optional packages, imported only where --report_to names one. A run must not end because a tracker
fails: the first failure is reported, and the run continues without it.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import InputError, logger, one_line

TENSORBOARD = "tensorboard"
PROJECT = "distil"  # of wandb, and MLflow's experiment; WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME win
STORE = "mlflow.db"  # MLflow's, in the run folder


class Tracker:
    """A tracker that was started. inner: accelerate's; id: of its run, kept in checkpoints."""

    def __init__(self, name: str, inner, id: str):
        self.name, self.id = name, id
        self.inner = inner

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values after update `step`."""
        self._try(lambda: self.inner.log(dict(values), step=step))

    def finish(self) -> None:
        """End the tracker's run, once."""
        self._try(lambda: self.inner.finish())
        self.inner = None

    def _try(self, act: Callable[[], None]) -> None:
        if self.inner is None:
            return
        try:
            act()
        # Trackers can raise anything; the figures are in metrics.jsonl.
        except Exception as error:
            self.inner = None
            logger.warning("%s failed, and gets no more figures: %s.", self.name, one_line(error))


def start_wandb(run_path: Path, id: str | None):
    """Start a run of wandb, or continue the one of an id: (accelerate's tracker, id)."""
    import wandb
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    options = {"name": run_path.name, "dir": str(run_path), "id": id}
    options |= {"resume": "allow", "settings": wandb.Settings(console="off")}
    tracker = WandBTracker(project, **options)
    tracker.start()
    return tracker, tracker.tracker.id


def start_mlflow(run_path: Path, id: str | None):
    """Start a run of MLflow in RUN/mlflow.db, or continue one: (accelerate's tracker, id)."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{run_path.resolve() / STORE}")
    tracker = MLflowTracker(PROJECT, run_id=id, run_name=run_path.name)
    tracker.start()
    return tracker, tracker.tracker.info.run_id


STARTS = {"wandb": start_wandb, "mlflow": start_mlflow}
NAMES = (TENSORBOARD, *STARTS)


def tracker_problems(names: Sequence[str]) -> list[str]:
    """Say which trackers can't be started, before anything is loaded."""
    problems = []
    for name in (name for name in STARTS if name in names):
        missing = [package for package in (name, "accelerate") if not _is_installed(package)]
        if missing:
            problems.append(
                f"--report_to {name}: {' and '.join(missing)} is not installed; pip install"
                f" {' '.join(missing)}, or leave {name} out"
            )
        elif name == "wandb" and (reason := _reason_not_logged_in()):
            problems.append(
                f"--report_to wandb: {reason}; run wandb login, set WANDB_API_KEY, or export"
                " WANDB_MODE=offline"
            )
    return problems


def _is_installed(package: str) -> bool:
    """True for an installed package, not for a folder of its name such as wandb's ./wandb."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _reason_not_logged_in() -> str:
    """Say why wandb could not log in; "" where it needs no login, or has one."""
    try:
        import wandb

        if wandb.setup().settings.mode != "online":
            return ""
        try:
            is_logged_in = wandb.login(prompt=False, verify=False)
        except TypeError:  # older versions lack the argument
            is_logged_in = bool(wandb.api.api_key)
        return "" if is_logged_in else "not logged in"
    except Exception as error:  # a bad WANDB_MODE, a broken installation, ..
        return one_line(error)


def _make_accelerate_log() -> None:
    """Set up the state that accelerate's trackers need to log; the process group stays as it is."""
    from accelerate import PartialState

    PartialState()


def start_trackers(
    names: Sequence[str], run_path: Path, flags: Mapping[str, Any], ids: Mapping[str, str]
) -> list[Tracker]:
    """Start the trackers, or continue their runs. ids: of a resumed run's. Raises InputError."""
    trackers = []
    for name in (name for name in STARTS if name in names):
        try:
            _make_accelerate_log()
            inner, id = STARTS[name](run_path, ids.get(name))
            if name not in ids:
                inner.store_init_configuration(dict(flags))
        except Exception as error:
            for tracker in trackers:
                tracker.finish()
            raise InputError(
                f"--report_to {name}: does not start ({one_line(error)}); see its documentation, or"
                f" leave {name} out"
            ) from error
        trackers.append(Tracker(name, inner, id))
    return trackers
