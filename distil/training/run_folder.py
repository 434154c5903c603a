"""The run folder: everything that a run writes, each file complete under its name or absent.

Names are 2019's (parameters.json, checkpoint.pth, model_epoch_E.pth, pytorch_model.bin), with
checkpoints/, best/ and the files that from_pretrained loads.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distil.models.export import save_config, save_folder, save_tokenizer
from distil.models.hub import quiet_transformers
from distil.system.files import (
    atomic_folder,
    atomic_path,
    atomic_paths,
    is_regular,
    link,
    naming_library_errors,
    save_weights,
    write_json,
)
from distil.system.locks import LOCK, read_lock, sign_lock, take_lock
from distil.system.versions import versions
from distil.training import checkpointing
from distil.training.behind import Behind, copied_to_host, is_on_gpu
from distil.training.claim import ROOT, claim, entry, resume_mode
from distil.training.layout import BEST, CHECKPOINTS, MODEL
from distil.training.log import Log, Place, cut_log, own_files, run_id_of
from distil.training.trackers import TENSORBOARD, start_trackers
from utils import VERSION, InputError, git_facts, logger, one_line

# Files and folders that this module and atomic_path make, and remove unless they are killed.
TEMPORARY_FILE = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
TEMPORARY_FOLDER = re.compile(rf"\.export-([a-z0-9_]{{8}}|old)|\.{MODEL}\.\d+\.tmp")
PLAIN = "plain"  # names the student's state dict beside the files of a checkpoint


def facts_of_start() -> dict[str, Any]:
    """Return what parameters.json holds beside the flags: versions, and how many processes."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"version": VERSION, "num_processes": processes, **versions()}


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
        moved aside where the flags allow it. problem: see dump_path_problem, asked again:
        loading took a while.
        """
        self.path = entry(flags["dump_path"])
        self.student, self.tokenizer = student, tokenizer
        self.lock = self.log = None
        self.keep_epochs = flags.get("keep_epochs")
        self.loader_files: list[Path] = []  # what from_pretrained reads beside the weights
        self.plain: tuple[int, Path] | None = None  # the newest plain state dict, and its step
        self.behind = Behind()
        if problem:
            raise InputError(problem)
        resumes = state is not None
        mode = resume_mode(flags["resume"], flags["dump_path"])
        may_move = flags["force"] or mode is not None
        self.lock = take_lock(self.path / LOCK) if resumes else claim(self.path, may_move=may_move)
        try:
            self._remove_leftovers(of_a_start=not resumes)
            # In the names of event files: other programs' may lie beside them.
            self.id = run_id_of(state["log_bytes"] if resumes else ()) or secrets.token_hex(4)
            self.lock = sign_lock(self.lock, self.path / LOCK, {"run": self.id})
            self._begin(flags, state)
        except BaseException:
            self.close()
            raise

    def _begin(self, flags: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        write_json(self.path / "parameters.json", {**flags, **facts_of_start()})
        # Differs from the original: outside a checkout, or with a detached head, the run continues.
        write_json(self.path / "git_log.json", git_facts(ROOT))
        self._write_loader_files()
        ids = {} if state is None else state.get("trackers", {})
        trackers = start_trackers(flags["report_to"], self.path, flags, ids)
        self.tracker_ids = {**ids, **{tracker.name: tracker.id for tracker in trackers}}
        if state is not None:
            cut_log(self.path, state["log_bytes"], self.id)
            # The process may have been killed between the two.
            save_weights(self.path / "checkpoint.pth", self.student.state_dict())
        earlier = () if state is None else state["log_bytes"]
        self.log = Log(self.path, self.id, TENSORBOARD in flags["report_to"], trackers, earlier)
        if state is None:
            student_config = self.student.config.to_json_string(use_diff=False)
            texts = {"config/training": json.dumps(flags), "config/student": student_config}
            self.log.add_texts(texts)

    def _remove_leftovers(self, *, of_a_start: bool) -> None:
        """Remove what this run was writing when it was killed.

        of_a_start: the log of a start that failed, too.
        """
        checkpointing.clean(self.path / CHECKPOINTS)
        for path in [*self.path.glob(".*"), *self.path.glob(f"{BEST}/.*.tmp")]:
            if TEMPORARY_FILE.fullmatch(path.name) and is_regular(path):
                path.unlink()
            elif TEMPORARY_FOLDER.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        run_id = read_lock(self.path / LOCK).get("run")
        for path in own_files(self.path, run_id, ()) if of_a_start and run_id else ():
            path.unlink()

    def close(self) -> None:
        """Unlock the folder for other processes."""
        if error := self.behind.close():
            logger.error("The last checkpoint was not written: %s", one_line(error, limit=None))
        if self.lock is not None:
            self.lock.close()
        if self.log is not None:
            self.log.release()

    def save_checkpoint(
        self, tensors: checkpointing.Tensors, state: Mapping[str, Any], step: int, keep: int
    ) -> None:
        """Write a whole checkpoint, then checkpoint.pth: the student's plain state dict.

        Of a student on a GPU a thread writes a copy, while training goes on; what fails then is
        raised at the next write. The first one tells at once whether the disk has room.
        """
        of_log = {"log_bytes": self.log.flushed_sizes(), "trackers": self.tracker_ids}
        given, weights = {**state, **of_log}, self.student.state_dict()
        self.behind.wait()
        if step == 0 or not is_on_gpu(weights.values()):
            self._write_checkpoint(tensors, given, step, keep, weights)
            return
        copied = copied_to_host({**tensors, PLAIN: weights})
        plain = copied.pop(PLAIN)
        self.behind.start(lambda: self._write_checkpoint(copied, given, step, keep, plain))

    def _write_checkpoint(self, tensors, state, step: int, keep: int, weights) -> None:
        folder, files = self.path / CHECKPOINTS, self.loader_files
        checkpointing.write(folder, step, tensors, state, keep, files)
        self._save_plain("checkpoint.pth", step, weights)

    def _save_plain(self, name: str, step: int, weights=None) -> None:
        """Write the student's plain state dict; link it where it was written after this update.

        weights: the state dict, where it is a copy.
        """
        target = self.path / name
        if self.plain is not None and self.plain[0] == step and is_regular(self.plain[1]):
            link(self.plain[1], target)
        else:
            save_weights(target, self.student.state_dict() if weights is None else weights)
        self.plain = step, target

    def save_epoch(self, epoch: int, mean_loss: float, step: int) -> None:
        """Write model_epoch_{epoch}.pth and log the epoch's mean loss."""
        self.behind.wait()
        self._save_plain(f"model_epoch_{epoch}.pth", step)
        for old in range(epoch + 1 - self.keep_epochs if self.keep_epochs else 0):
            if is_regular(path := self.path / f"model_epoch_{old}.pth"):
                path.unlink()
        self.log.add_scalars({"epoch/loss": mean_loss}, epoch)
        logger.info("Epoch %d: mean loss %.4f.", epoch, mean_loss)

    def log_training(
        self, scalars: Mapping[str, float], statistics: Mapping[str, float], place: Place
    ) -> None:
        """Log scalars of training by tag, and apart statistics of parameters and gradients."""
        self.log.add_figures(scalars, place)
        self.log.add_scalars(statistics, place.x, "parameters")

    def keep_figures(
        self, figures: Mapping[str, float], place: Place, best: Mapping[str, Any] | None
    ) -> None:
        """Log held-out figures, show them, and save the student where it is the best so far.

        best: what best.json holds then, else None.
        """
        self.log.add_figures({f"eval/{name}": value for name, value in figures.items()}, place)
        listed = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        end = "" if best is None else "; the best so far"
        logger.info("Update %d, held out: %s%s.", place.update, listed, end)
        if best is not None:
            self.save_best(best)

    def describe_saved(self) -> str:
        """Name the newest checkpoint on the disk."""
        self.behind.wait()
        saved = checkpointing.checkpoints_in(self.path / CHECKPOINTS)
        if saved:
            return f"The newest checkpoint is {saved[0]}."
        return f"No checkpoint was saved yet in {self.path}."

    def save_best(self, record: Mapping[str, Any]) -> None:
        """Write the student as the best so far to best/, then best.json, which describes it."""
        self.behind.wait()
        target = self.path / BEST
        with (
            self._exported() as files,
            self._replacing(target, files, target / "best.json") as (temporary,),
        ):
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _replacing(self, target: Path, files: Sequence[Path], *more: Path) -> Iterator[list[Path]]:
        """Move files into a folder, all at once, with further ones to be written in the block.

        Other files in the folder stay as they are. The further files are deleted first.
        """
        self._require_own(target)
        names = [*(target / file.name for file in files), *more]
        with atomic_paths(*names, stale=more) as temporaries:
            for file, temporary in zip(files, temporaries, strict=False):
                os.replace(file, temporary)
            yield temporaries[len(files) :]

    def _require_own(self, folder: Path) -> None:
        if folder.is_symlink():
            raise InputError(
                f"{folder}: is a link, expected a folder of the run; take it away, then continue"
                " with --resume"
            )

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
        self.behind.wait()
        for name in self._write_model():
            if name != "model.safetensors":
                link(self.path / MODEL / name, self.path / name)
        self._save_plain("pytorch_model.bin", step)
        self.log.close()
        logger.info("Done: %s holds the student, for from_pretrained.", self.path / MODEL)

    def _write_model(self) -> list[str]:
        """Write model/; replace the files of an earlier end of this run. Return their names."""
        target = self.path / MODEL
        if os.path.lexists(target):
            with self._exported() as files, self._replacing(target, files):
                return [file.name for file in files]
        with naming_library_errors(self.path), atomic_folder(target) as folder:
            save_folder(self.student, self.tokenizer, folder)
            return sorted(file.name for file in folder.iterdir())
