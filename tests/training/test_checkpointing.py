"""Checkpoint files: written whole or not at all, verified byte by byte, the newest intact found."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distil.system.files import json_digest
from distil.training import checkpointing
from distil.training.checkpointing import DamagedError
from utils import InputError

TENSORS = {
    "student": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])},
    "optimizer": {"exp_avg/a": torch.ones(2, 3), "step/a": torch.tensor(3.0)},
}


def write(folder, step, keep=3, tensors=TENSORS) -> Path:
    state = {"micro_batches": 2 * step, "rate": 0.1}
    return checkpointing.write(folder, step, tensors, state, keep)


def test_a_checkpoint_is_read_as_written(tmp_path):
    found = checkpointing.read(write(tmp_path / "new" / "folder", 7))
    assert found.step == 7 and found.state == {"micro_batches": 14, "rate": 0.1}
    for name, content in TENSORS.items():
        read = found.tensors(name)
        assert set(read) == set(content)
        assert all(torch.equal(read[key], tensor) for key, tensor in content.items())


def test_an_empty_file_of_tensors_is_read(tmp_path):
    path = write(tmp_path, 1, tensors={"optimizer": {}})
    assert checkpointing.read(path).tensors("optimizer") == {}


def test_files_of_tensors_are_the_library_s_bytes():
    """Written one tensor at a time, which the library can't: it returns all of them at once."""
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (), (0, 4), (2, 1, 3)]
    tensors = {
        f'{name}/{kind} "quoted" ü': torch.randn(shape).mul(9).to(kind)
        for kind in checkpointing.DTYPES
        for name, shape in zip("bxca0", shapes, strict=True)
    }
    tensors["turned"] = torch.randn(4, 6).T
    for content in ({}, tensors, {"one": torch.ones(1)}):
        plain = {name: tensor.contiguous() for name, tensor in content.items()}
        written = b"".join(checkpointing.as_safetensors(content))
        assert written == safetensors.torch.save(plain)


HEADERS = {
    "a list": [],
    "of another kind": {"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}},
    "of 10^12 numbers": {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}},
    "of less than nothing": {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
    "of no shape": {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
    "without a place": {"a": {"dtype": "F32", "shape": [1]}},
}


@pytest.mark.parametrize("header", [*HEADERS.values(), b"{", b""], ids=[*HEADERS, "cut", "none"])
def test_a_file_of_tensors_with_a_false_header_is_damaged(header, tmp_path):
    """Though its checksum is right: somebody made it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    if header == b"":
        content = b"\xff" * 8
    (tmp_path / "student.safetensors").write_bytes(content)
    row = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    checkpoint = checkpointing.Checkpoint(tmp_path, 3, {}, {"student.safetensors": row})
    with pytest.raises(DamagedError, match="student.safetensors"):
        checkpoint.tensors("student")


def test_before_the_first_update_the_moments_are_not_written(tmp_path, monkeypatch):
    path = write(tmp_path, 0)
    assert not (path / "optimizer.safetensors").exists()
    found = checkpointing.read(path)
    assert found.tensors("optimizer") == {} and set(found.tensors("student")) == {"a", "b"}
    # Their room is looked for: the next checkpoint has them.
    sizes = [sum(tensor.nbytes for tensor in content.values()) for content in TENSORS.values()]
    room = checkpointing.ROOM_BYTES + sum(sizes)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room - 1))
    with pytest.raises(InputError, match="the disk is full"):
        write(tmp_path / "new", 0)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (0, 9, 10, 100_000_000, 11):
        write(tmp_path, step, keep=2)
    names = [path.name for path in checkpointing.checkpoints_in(tmp_path)]
    assert names == ["step-100000000", "step-00000011"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_repeated_step_replaces_its_checkpoint(tmp_path):
    write(tmp_path, 5)
    other = {**TENSORS, "student": {"a": torch.zeros(1)}}
    write(tmp_path, 5, tensors=other)
    assert torch.equal(checkpointing.newest(tmp_path).tensors("student")["a"], torch.zeros(1))


FILES = ["student.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "longer"])
def test_a_damaged_file_is_named(name, damage, tmp_path):
    path = write(tmp_path, 5)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= damage == "flip"
        damaged = {"cut": content[:-1], "empty": b"", "longer": content + b" x"}
        file.write_bytes(damaged.get(damage, content))
    with pytest.raises(DamagedError, match=name):
        checkpointing.read(path)


def test_a_flipped_bit_in_any_byte_is_detected(tmp_path):
    path = write(tmp_path, 5)
    for name in FILES:
        file = path / name
        content = file.read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=name):
                checkpointing.read(path)
        file.write_bytes(content)
    checkpointing.read(path)


def test_renamed_and_mixed_folders_are_refused(tmp_path):
    first, second = write(tmp_path, 5), write(tmp_path, 6)
    shutil.copytree(first, tmp_path / "step-00000009")
    with pytest.raises(DamagedError, match="renamed"):
        checkpointing.read(tmp_path / "step-00000009")
    shutil.copy(first / "state.json", second)
    with pytest.raises(DamagedError, match=r"state\.json"):
        checkpointing.read(second)


def test_the_newest_intact_checkpoint_is_found_and_skipped_ones_are_logged(tmp_path, caplog):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    (tmp_path / "step-00000004.tmp").mkdir()  # left by a killed save
    checkpointing.logger.propagate = True
    assert checkpointing.newest(tmp_path).step == 2
    assert "skipped the checkpoint step-00000003" in caplog.text


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / "MANIFEST.json").unlink()
    with pytest.raises(InputError, match=r"all 2 checkpoint\(s\) are damaged"):
        checkpointing.newest(tmp_path)
    assert checkpointing.newest(tmp_path / "none") is None


def test_a_newer_version_is_refused_instead_of_skipped(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    manifest["version"] = 2
    path.write_text(json.dumps({**manifest, "manifest_sha256": json_digest(manifest)}))
    with pytest.raises(InputError, match="is of version 2, this program reads version 1") as caught:
        checkpointing.newest(tmp_path)
    assert not isinstance(caught.value, DamagedError)


def test_a_failed_write_keeps_earlier_checkpoints(tmp_path, monkeypatch):
    write(tmp_path, 1)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    message = r"No space left on device: .*step-00000002.* \(a checkpoint takes [\d,]+ bytes\)"
    with pytest.raises(InputError, match=f"{message}.*--resume"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_file_that_differs_from_what_was_written_is_no_checkpoint(
    name, damage, tmp_path, monkeypatch
):
    write(tmp_path, 1)
    fsync = os.fsync

    def damaging(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= damage == "flip"
            damaged = {"cut": content[:-1], "longer": content + b" "}
            path.write_bytes(damaged.get(damage, content))

    monkeypatch.setattr(os, "fsync", damaging)
    monkeypatch.setattr(checkpointing, "WRITE_BYTES", 13)  # several pieces a tensor
    with pytest.raises(DamagedError, match=f"{name}: (differs from|is longer than) what was"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_free_space_is_checked_before_writing(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = "the disk is full: a checkpoint takes [0-9,]+ bytes, 5,000 are free"
    with pytest.raises(InputError, match=message):
        write(tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".trash-step-00000000")
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_digest_depends_on_names_types_shapes_and_bytes_but_not_on_order():
    base = {"a": torch.arange(4.0), "b": torch.zeros(0)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {**base, "a": base["a"].reshape(2, 2)},
        {**base, "a": base["a"].int()},
        {**base, "a": base["a"] + 1},
        {"a": base["a"]},
    ]
    digests = {checkpointing.content_digest(tensors) for tensors in (base, *others)}
    assert len(digests) == 1 + len(others)
    reordered = checkpointing.content_digest(dict(reversed(base.items())))
    assert reordered == checkpointing.content_digest(base)


@pytest.mark.parametrize("name", ["../step-00000001/state.json", "/dev/zero", "folder"])
def test_a_manifest_may_only_name_files_of_its_folder(name, tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    (path / "folder").mkdir()
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["manifest_sha256"]
    manifest["files"][name] = {"bytes": 0, "sha256": "0"}
    manifest["manifest_sha256"] = json_digest(manifest)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="not one of its files|no such file"):
        checkpointing.read(path)
