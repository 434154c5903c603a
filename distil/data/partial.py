"""Runs that can be continued: their scratch folder stays where they are interrupted.

The folder, .NAME.partial beside the output, holds what was made so far and state.json, how much of
it counts. A run of the same identity (flags, tokenizer, content) goes on from there; another one
begins anew.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distil.data.text_sources import Block
from distil.system.files import json_digest, write_json
from distil.system.json_files import load_json
from distil.system.locks import lock_file
from utils import logger

SAVE_S = 30  # between two states
STATE, LOCK = "state.json", "lock"


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a text was read: number of the source, and its rows done (of a data set's shard)."""

    source: int = 0
    rows: int = 0


def place_behind(number: int, block: Block, *, is_record: bool) -> Place:
    """Return the place behind a block of source `number`. Only records are numbered."""
    if not is_record:
        return Place(number)
    # The block behind a source's last is empty.
    return (
        Place(number, block.first - 1 + len(block.content)) if block.content else Place(number + 1)
    )


class Partial:
    """A folder for the files of a run; state: of the interrupted run of the same identity, or {}.

    identity: None for a run that can't be continued.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None):
        self.folder = folder
        self.digest = None if identity is None else json_digest(identity)
        self.state = self._read() if identity is not None else {}
        self._saved_at = time.monotonic()

    @property
    def can_continue(self) -> bool:
        """False for a run whose files are deleted where it is interrupted."""
        return self.digest is not None

    def _read(self) -> dict[str, Any]:
        try:
            state = load_json(self.folder / STATE, {"identity": str, "sha256": str})
            digest = state.pop("sha256")
            is_same = digest == json_digest(state) and state.pop("identity") == self.digest
        except FileNotFoundError:
            return {}
        except ValueError:
            is_same = False
        if is_same:
            return state
        logger.warning("%s: of a run with other flags or other text; starting anew.", self.folder)
        (self.folder / STATE).unlink()
        return {}

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state. Everything that it counts must be on the disk."""
        state = {"identity": self.digest, **state}
        write_json(self.folder / STATE, {**state, "sha256": json_digest(state)})
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """True if a state should be saved."""
        return self.can_continue and time.monotonic() - self._saved_at >= SAVE_S


@contextlib.contextmanager
def partial_folder(output: Path, identity: Mapping[str, Any] | None) -> Iterator[Partial]:
    """Yield the scratch folder of a run; delete it on success, or if no state was saved.

    Raises InputError where another run works in it.
    """
    if identity is None:
        with tempfile.TemporaryDirectory(
            prefix=f".{output.name}.", suffix=".tmp", dir=output.parent
        ) as scratch:
            yield Partial(Path(scratch), None)
        return
    folder = output.parent / f".{output.name}.partial"
    folder.mkdir(exist_ok=True)
    with lock_file(folder / LOCK, f"{folder}: another run writes it"):
        try:
            yield Partial(folder, identity)
        except BaseException:
            if os.path.exists(folder / STATE):
                logger.info("Kept %s: the same command continues from there.", folder)
            else:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
