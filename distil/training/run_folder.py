"""The run folder: everything that a run writes, each file complete under its name or absent.

Names are 2019's (parameters.json, checkpoint.pth, model_epoch_E.pth, pytorch_model.bin), with
checkpoints/, best/ and the files that from_pretrained loads.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distil.models.export import save_config, save_folder, save_tokenizer
from distil.models.hub import quiet_transformers
from distil.system.files import (
    atomic_folder,
    atomic_path,
    atomic_paths,
    flush_to_disk,
    link,
    make_folder,
    naming,
    naming_library_errors,
    output_problem,
    save_weights,
    write_json,
)
from distil.system.locks import LOCK, is_restarted, require_unlocked, take_lock
from distil.system.versions import versions
from distil.training import checkpointing
from distil.training.log import Log, Place, cut_log
from distil.training.trackers import TENSORBOARD, start_trackers
from utils import VERSION, InputError, git_facts, logger

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS, BEST, MODEL = "checkpoints", "best", "model"
# What a run writes: a folder with none of it is not taken for a run's.
RUN_FILES = ("parameters.json", "checkpoint.pth", "model_epoch_*.pth", "checkpoints/step-*")


def facts_of_start() -> dict[str, Any]:
    """Return what parameters.json holds beside the flags: versions, and how many processes."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"version": VERSION, "num_processes": processes, **versions()}


def resume_mode(resume: str | None, dump_path: str) -> str | None:
    """Say whether the run resumes: "required", "auto" (where there is a checkpoint), or None.

    A launcher that restarts its processes passes the flags of the first time, --force among them:
    such a run resumes as with auto.
    """
    return resume or ("auto" if is_restarted(os.environ, Path(dump_path) / LOCK) else None)


def checkpoints_of(dump_path: str) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(dump_path) / CHECKPOINTS


def dump_path_problem(
    dump_path: str, force: bool, mode: str | None, inputs: Iterable[str | None]
) -> str | None:
    """Say why the run folder can't be made, or moved aside, without harm.

    mode: see `resume_mode`; inputs: paths and names that the run reads.
    """
    path = Path(dump_path)
    problem = output_problem(dump_path, "--dump_path", is_folder=True)
    resumes = mode == "required" or (mode and checkpointing.exist(path / CHECKPOINTS))
    if problem or not os.path.lexists(path) or resumes:
        return problem
    where = f"--dump_path {path}"
    if not force and not mode:
        return (
            f"{where}: exists already; choose another, resume it with --resume, or move it aside"
            " with --force"
        )
    read = [name for given in inputs if given for name in (given, f"{given}.bin")]
    inside = [name for name in read if os.path.exists(name) and _is_within(name, path)]
    if inside:
        return f"{where}: holds {inside[0]}, which this run reads; choose another folder"
    places = os.getcwd(), ROOT, os.path.expanduser("~")
    if any(_is_within(place, path) for place in places):
        return f"{where}: is no run's folder; choose another, --force does not apply to it"
    if any(path.iterdir()) and not any(any(path.glob(name)) for name in RUN_FILES):
        return (
            f"{where}: holds other files than a run's; choose another, --force does not apply to it"
        )
    if not os.access(entry(dump_path).parent, os.W_OK):
        return f"{where}: can't be moved aside, for {entry(dump_path).parent} may not be written to"
    return None


def _is_within(path: str | os.PathLike, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


def entry(path: str) -> Path:
    """Name a folder by its entry in the folder above: links before it are followed, itself not.

    A rename then moves what was looked at: os.path.abspath takes "link/../run" for "run", and
    rename a slash behind a link for the folder behind it.
    """
    if Path(path).name in ("", ".."):
        return Path(path).resolve()
    return Path(path).parent.resolve() / Path(path).name


def _free_name(name: str) -> str:
    candidates = [name, *(f"{name}-{k}" for k in range(1, 1000))]
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


class RunFolder:
    """The files of a run, written by the main process only."""

    def __init__(
        self,
        flags: Mapping[str, Any],
        student,
        tokenizer,
        state: Mapping[str, Any] | None,
        problem: str | None,
    ):
        """Claim and begin the folder of a run.

        flags: every flag, for parameters.json. student, tokenizer: what is saved. state: of the
        checkpoint that the run resumes from, for its log; None: the folder is made, an old one
        moved aside. problem: see dump_path_problem, asked again: loading took a while.
        """
        self.path = entry(flags["dump_path"])
        self.student, self.tokenizer = student, tokenizer
        self.lock = self.log = None
        self.keep_epochs = flags.get("keep_epochs")
        self.loader_files: list[Path] = []  # what from_pretrained reads beside the weights
        self.plain: tuple[int, Path] | None = None  # the newest plain state dict, and its step
        if problem:
            raise InputError(problem)
        self._claim(resumes=state is not None)
        try:
            self._begin(flags, state)
        except BaseException:
            self.close()
            raise

    def _claim(self, resumes: bool) -> None:
        if not resumes and os.path.lexists(self.path):
            # Differs from the original: moved aside, where 2019 deleted.
            require_unlocked(self.path / LOCK)
            aside = _free_name(f"{self.path}.old-{time.strftime('%Y%m%d-%H%M%S')}")
            os.rename(self.path, aside)
            logger.info("Moved the existing %s aside to %s.", self.path, aside)
        make_folder(self.path.parent)
        self.path.mkdir(exist_ok=resumes)
        flush_to_disk(self.path.parent)
        with naming(self.path / LOCK):
            self.lock = take_lock(self.path / LOCK)
        if resumes:
            self._remove_leftovers()

    def _begin(self, flags: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        write_json(self.path / "parameters.json", {**flags, **facts_of_start()})
        # Differs from the original: outside a checkout, or with a detached head, the run continues.
        write_json(self.path / "git_log.json", git_facts(ROOT))
        self._write_loader_files()
        ids = {} if state is None else state.get("trackers", {})
        trackers = start_trackers(flags["report_to"], self.path, flags, ids)
        self.tracker_ids = {**ids, **{tracker.name: tracker.id for tracker in trackers}}
        if state is not None:
            cut_log(self.path, state["log_bytes"])
            # The process may have been killed between the two.
            save_weights(self.path / "checkpoint.pth", self.student.state_dict())
        self.log = Log(self.path, TENSORBOARD in flags["report_to"], trackers)
        if state is None:
            student_config = self.student.config.to_json_string(use_diff=False)
            texts = {"config/training": json.dumps(flags), "config/student": student_config}
            self.log.add_texts(texts)

    def _remove_leftovers(self) -> None:
        """Remove files that this run was writing when it was killed."""
        checkpointing.clean(self.path / CHECKPOINTS)
        for path in [*self.path.glob(".*.tmp"), *self.path.glob(f"{BEST}/.*.tmp")]:
            path.unlink(missing_ok=True)
        for path in self.path.glob(".export-*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Unlock the folder for other processes."""
        if self.lock is not None:
            self.lock.close()
        if self.log is not None:
            self.log.release()

    def save_checkpoint(
        self, tensors: checkpointing.Tensors, state: Mapping[str, Any], step: int, keep: int
    ) -> None:
        """Write a whole checkpoint, then checkpoint.pth: the student's plain state dict."""
        of_log = {"log_bytes": self.log.flushed_sizes(), "trackers": self.tracker_ids}
        folder, files = self.path / CHECKPOINTS, self.loader_files
        checkpointing.write(folder, step, tensors, {**state, **of_log}, keep, files)
        self._save_plain("checkpoint.pth", step)

    def _save_plain(self, name: str, step: int) -> None:
        """Write the student's plain state dict; link it where it was written after this update."""
        target = self.path / name
        if self.plain is not None and self.plain[0] == step:
            link(self.plain[1], target)
        else:
            save_weights(target, self.student.state_dict())
        self.plain = step, target

    def save_epoch(self, epoch: int, mean_loss: float, step: int) -> None:
        """Write model_epoch_{epoch}.pth and log the epoch's mean loss."""
        self._save_plain(f"model_epoch_{epoch}.pth", step)
        for old in range(epoch + 1 - self.keep_epochs if self.keep_epochs else 0):
            (self.path / f"model_epoch_{old}.pth").unlink(missing_ok=True)
        self.log.add_scalars({"epoch/loss": mean_loss}, epoch)
        logger.info("Epoch %d: mean loss %.4f.", epoch, mean_loss)

    def log_training(
        self, scalars: Mapping[str, float], statistics: Mapping[str, float], place: Place
    ) -> None:
        """Log scalars of training by tag, and apart statistics of parameters and gradients."""
        self.log.add_figures(scalars, place)
        self.log.add_scalars(statistics, place.x, "parameters")

    def log_figures(self, figures: Mapping[str, float], place: Place, is_best: bool) -> None:
        """Log held-out figures, and show them."""
        self.log.add_figures({f"eval/{name}": value for name, value in figures.items()}, place)
        listed = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        best = "; the best so far" if is_best else ""
        logger.info("Update %d, held out: %s%s.", place.update, listed, best)

    def describe_saved(self) -> str:
        """Name the newest checkpoint on the disk."""
        saved = checkpointing.exist(self.path / CHECKPOINTS)
        if saved:
            return f"The newest checkpoint is {saved[0]}."
        return f"No checkpoint was saved yet in {self.path}."

    def save_best(self, record: Mapping[str, Any]) -> None:
        """Write the student as the best so far to best/, then best.json, which describes it."""
        target = self.path / BEST
        with self._exported() as files:
            names = [*(target / file.name for file in files), target / "best.json"]
            with atomic_paths(*names, stale=[target / "best.json"]) as temporaries:
                for file, temporary in zip(files, temporaries, strict=False):
                    os.replace(file, temporary)
                temporaries[-1].write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _exported(self) -> Iterator[list[Path]]:
        """Yield the files of student and tokenizer that from_pretrained loads, to be moved."""
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.path) as folder:
            with naming_library_errors(self.path):
                save_folder(self.student, self.tokenizer, folder)
            yield sorted(Path(folder).iterdir())

    def _write_loader_files(self) -> None:
        """Write configuration and tokenizer, with which the weights beside them load."""
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.path) as folder:
            with quiet_transformers(), naming_library_errors(self.path):
                save_config(self.student, folder)
                save_tokenizer(self.tokenizer, folder)
            for file in sorted(Path(folder).iterdir()):
                with atomic_path(self.path / file.name) as temporary:
                    os.replace(file, temporary)
                self.loader_files.append(self.path / file.name)

    def finish(self, step: int) -> None:
        """Write model/, what is published, then pytorch_model.bin: its presence means that the run
        is done.

        The files of model/ but its weights have a second name in the run folder, as in 2019.
        """
        self._write_model()
        for file in (self.path / MODEL).iterdir():
            if file.name != "model.safetensors":
                link(file, self.path / file.name)
        self._save_plain("pytorch_model.bin", step)
        self.log.close()

    def _write_model(self) -> None:
        """Write model/ whole; one of an earlier end of this run is replaced."""
        target, old = self.path / MODEL, self.path / ".export-old"
        if target.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        with atomic_folder(target) as folder:
            save_folder(self.student, self.tokenizer, folder)
        shutil.rmtree(old, ignore_errors=True)
