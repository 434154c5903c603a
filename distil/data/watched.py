"""The data files of a run, watched for changes while it trains.

Programs that write data files under their names replace them by renaming, which an open file does
not see. Others write in place, cut off, move away. Checked at the start of each epoch and at every
save: the bytes that were trained on must be those that the run began with.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping

from distil.data.disk import DiskArray
from distil.data.token_files import TokenFile, files_of
from utils import InputError, RankError, logger

Stamp = tuple[int, int, int, int] | None  # device, inode, size, time of the last change


def stamp_of(path: str) -> Stamp:
    """Return what changes with a file's content or place; None without a file."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _change(before: Stamp, now: Stamp) -> str:
    if now is None:
        return "was removed"
    return "was written to, or its time set" if before and before[:2] == now[:2] else "was replaced"


class WatchedFiles:
    """Files of data, as they were before a run opened them."""

    def __init__(self, tokens: Mapping[str, str | None], others: Mapping[str, str | None]):
        """tokens, others: flag -> path of token files, and of other files; None: not given."""
        self.flags = {
            file: flag for flag, path in tokens.items() if path for file in files_of(path)
        }
        self.flags |= {path: flag for flag, path in others.items() if path}
        self.stamps = {path: stamp_of(path) for path in self.flags}
        self.opened: list[TokenFile] = []
        self._epoch: int | None = None
        self._lock = threading.Lock()

    def require_unchanged(self, opened: Iterable[TokenFile]) -> None:
        """Watch files that were opened. Raises InputError for one that changed while it was read.

        It may be read half and half, or verified before the change and read after it.
        """
        self.opened = list(opened)
        for path, stamp in self._changed().items():
            raise InputError(
                f"{self.flags[path]} {path}: {_change(self.stamps[path], stamp)} while this program"
                " read it; start again when it is complete"
            )

    def enter(self, epoch: int) -> None:
        """Check the files, and verify what is read from now on anew, if an epoch begins."""
        if epoch != self._epoch:
            self.check()
            self._epoch = epoch
            for tokens in self.opened:
                tokens.forget()

    def check(self, rereads: bool = False) -> None:
        """Verify again what was read from the disk where a file was changed, and warn.

        rereads: verify it in any case. Raises RankError naming a file whose ids are not those that
        the run began with. A file that is in memory, and one whose name is gone, is as it was: the
        run continues, and only a resumed one can't.
        """
        with self._lock:
            changed = self._changed()
            for tokens in self.opened if changed or rereads else []:
                verify_read(tokens)
            for path, stamp in changed.items():
                logger.warning(
                    "%s %s: %s while this run reads it. What was read is in memory, or verified"
                    " again: the run continues. To resume it, the file must be as it was.",
                    *(self.flags[path], path, _change(self.stamps[path], stamp)),
                )
                self.stamps[path] = stamp

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise RankError naming a file where what failed may be the fault of its ids.

        An id outside the vocabulary is an IndexError on a CPU, a failed assertion on a GPU.
        """
        try:
            yield
        except (IndexError, RuntimeError) as error:
            if isinstance(error, IndexError) or "device-side assert" in str(error):
                self.check(rereads=True)
            raise

    def _changed(self) -> dict[str, Stamp]:
        found = {path: stamp_of(path) for path in self.flags}
        return {path: stamp for path, stamp in found.items() if stamp != self.stamps[path]}


def verify_read(tokens: TokenFile) -> None:
    """Verify what was read of a token file that is not in memory; raise RankError if changed."""
    if tokens.blocks is not None:
        tokens.blocks.check_again()
    elif isinstance(tokens.ids_M, DiskArray) and tokens.ids_M.file.is_changed():
        file = tokens.ids_M.file
        raise RankError(
            f"{file.flag} {file.path}: was written to, or its time set, while this run reads it; it"
            " has no card to verify it by; restore it from a copy, and resume"
        )
