"""Files of data that change while they are read: named, or warned of, and never trained on."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.test_token_files import of_100, random_sequences, write_tokens

from distil.data import disk, safe_pickle
from distil.data.disk import DiskArray, DiskFile
from distil.data.token_files import open_token_file
from distil.data.watched import WatchedFiles
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError, RankError

SEQUENCES = random_sequences(3000)  # 3 blocks


@pytest.fixture
def store(tmp_path) -> Path:
    return Path(write_tokens(tmp_path / "data", "store", SEQUENCES)).with_suffix(".bin")


@pytest.fixture
def pickled(tmp_path) -> Path:
    return Path(write_tokens(tmp_path / "data", "pickle", SEQUENCES[:50]))


def watch(path: Path) -> tuple[WatchedFiles, LmSeqsDataset]:
    """Open a token file as a run does, and read all of it."""
    name = str(path).removesuffix(".bin")
    files = WatchedFiles({"--data_file": name, "--eval_data_file": None}, {})
    dataset = LmSeqsDataset.from_file(name, of_100("X"))
    files.require_unchanged([dataset.tokens])
    files.enter(0)
    dataset.collate(range(len(dataset)))
    return files, dataset


def flip(path: Path, place: int = 70_000, keeps_time: bool = False) -> None:
    """Change a byte in place."""
    facts = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    if keeps_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_an_array_in_a_file_is_indexed_as_numpy_does(tmp_path):
    values = np.random.default_rng(0).integers(0, 60_000, 100_000).astype(np.uint16)
    (tmp_path / "file").write_bytes(b"head" + values.tobytes())
    found = DiskArray(DiskFile(str(tmp_path / "file"), "--x"), np.uint16, 4, len(values))
    assert len(found) == len(values) and np.array_equal(found, values)
    keys = slice(None), slice(5, 70_000), slice(-3, None), slice(9, 3), slice(99_990, 200_000)
    for key in (*keys, np.array([99_999, 0, 7, 40_000, 7]), np.array([], np.int64)):
        assert np.array_equal(found[key], values[key]), key
    assert (found[-1], found[7]) == (values[-1], values[7])
    with pytest.raises(IndexError):
        found[len(values)]
    starts, lengths = np.array([50_000, 3, 3]), np.array([2, 0, 40_000])
    runs = [values[start : start + size] for start, size in zip(starts, lengths, strict=True)]
    assert np.array_equal(found.runs(starts, lengths), np.concatenate(runs))


def in_child(action: Callable[[], str]) -> str:
    """Return the InputError of an action in a forked process, which a signal may end."""
    read_end, write_end = os.pipe()
    if not (pid := os.fork()):
        signal.alarm(20)
        try:
            action()
        except InputError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"ended by signal {-status}" if status else said


def test_a_store_that_is_cut_while_it_is_read_ends_in_a_line(store):
    """A mapped file would end the process by SIGBUS."""
    tokens = open_token_file(store)
    dataset = LmSeqsDataset.from_file(store, of_100("X"))
    os.truncate(store, 1000)
    size = sum(map(len, SEQUENCES)) * 2
    expected = f"--data_file {store}: has 1000 bytes, it had {size} when it was opened: cut off"
    for read in (lambda: dataset.collate([len(dataset) - 1]), lambda: tokens.ids_M[:]):
        assert in_child(read).startswith(expected)


def test_a_pickle_that_is_cut_while_it_is_read_ends_in_a_line(pickled, monkeypatch):
    """Its opcodes are checked first, in bytes that can't vanish."""
    kept = safe_pickle._opcodes

    def cut(size: int):
        os.truncate(pickled, 0)
        return kept(size)

    monkeypatch.setattr(safe_pickle, "_opcodes", cut)
    assert in_child(lambda: open_token_file(pickled)).startswith(f"--data_file {pickled}: ")


def test_ids_changed_after_they_were_read_are_named_at_the_next_check(store):
    files, _ = watch(store)
    files.check()
    flip(store)
    for _ in range(2):  # each thread is told
        with pytest.raises(RankError, match=r"--data_file .*data\.bin: bytes 65536 to 131071 diff"):
            files.check()
    flip(store)  # mended
    files.check()


def test_a_bit_that_rots_is_named_in_the_next_epoch_or_at_the_end(store):
    files, dataset = watch(store)
    flip(store, keeps_time=True)
    files.check()  # size and time are as they were
    with pytest.raises(RankError, match=r"data\.bin: bytes 65536 to 131071 differ"):
        files.check(rereads=True)
    files.enter(0)
    dataset.collate(range(len(dataset)))
    files.enter(1)
    with pytest.raises(RankError, match=r"data\.bin: bytes 65536 to 131071 differ"):
        dataset.collate(range(len(dataset)))


def test_an_id_that_no_vocabulary_has_is_the_files_fault(store):
    files, _ = watch(store)
    with pytest.raises(IndexError), files.explaining():  # the file is as it was
        raise IndexError("index out of range in self")
    flip(store, keeps_time=True)
    with pytest.raises(RankError, match=r"data\.bin: bytes .* differ"), files.explaining():
        raise IndexError("index out of range in self")


def test_held_out_ids_are_verified_in_each_evaluation(store):
    _, dataset = watch(store)
    flip(store, keeps_time=True)
    dataset.collate(range(len(dataset)))
    dataset.tokens.forget()
    with pytest.raises(RankError, match=r"data\.bin: bytes 65536 to 131071 differ"):
        dataset.collate(range(len(dataset)))


def test_a_store_that_was_cut_is_named_at_the_next_check(store):
    files, _ = watch(store)
    os.truncate(store, 150_000)
    with pytest.raises(RankError, match=r"data\.bin: has 150000 bytes, it had \d+ .*: cut off"):
        files.check()


def replaced(path: Path) -> None:
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


HARMLESS = {
    "was written to, or its time set": lambda path: os.utime(path, ns=(1, 1)),
    "was replaced": replaced,
    "was removed": os.unlink,
}


@pytest.mark.parametrize("kind", ["store", "pickled"])
@pytest.mark.parametrize("what", HARMLESS)
def test_a_change_that_is_not_read_is_warned_of_once(what, kind, request, caplog):
    path = request.getfixturevalue(kind)
    files, dataset = watch(path)
    before = dataset.collate(range(40))[0]
    HARMLESS[what](path)
    files.check()
    files.check(rereads=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and f"--data_file {path}: {what} while this run reads" in warnings[0]
    assert (dataset.collate(range(40))[0] == before).all()


def test_a_pickle_in_memory_is_not_harmed_by_a_change(pickled, caplog):
    files, dataset = watch(pickled)
    before = dataset.collate(range(40))[0]
    pickled.write_bytes(b"other")
    files.check(rereads=True)
    assert f"{pickled}: was written to" in caplog.text
    assert (dataset.collate(range(40))[0] == before).all()


def test_a_changed_store_without_a_card_is_refused(store):
    store.with_suffix(".json").unlink()
    files, _ = watch(store)
    files.check(rereads=True)
    flip(store)
    with pytest.raises(RankError, match=r"data\.bin: was written to.*has no card to verify it by"):
        files.check()


@pytest.mark.parametrize("kind", ["store", "pickled"])
def test_a_file_that_changes_while_it_is_opened_is_refused(kind, request):
    path = request.getfixturevalue(kind)
    files = WatchedFiles({"--data_file": str(path).removesuffix(".bin")}, {"--token_counts": None})
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=rf"--data_file {path}: was written to.* while this prog"):
        files.require_unchanged([])


def test_descriptors_of_files_are_closed(store):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        open_token_file(store)
    assert len(os.listdir("/proc/self/fd")) == before
    assert disk.BLOCK_BYTES == 65536  # the numbers above
