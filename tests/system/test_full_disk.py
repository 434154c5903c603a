"""A write that fails: one error with the path, nothing partial under a final name.

The limit of a file's size stands in for a full disk; scripts/fault_injection.py (T38) fills disks.
"""

import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from distil.models.export import save_folder, tokenizer_for
from distil.system.files import (
    atomic_folder,
    naming_library_errors,
    replacing_files,
    save_weights,
)
from distil.tasks.fine_tuning import Trainer, training_arguments


@contextlib.contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Let writes beyond a file's size fail in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def model(teachers):
    """Load the tiny BERT: (network, its tokenizer)."""
    network = transformers.AutoModelForMaskedLM.from_pretrained(teachers["bert"])
    return network, tokenizer_for(
        network, transformers.AutoTokenizer.from_pretrained(teachers["bert"])
    )


# Below the tokenizer's 10 kB, and between it and the weights' 200 kB.
@pytest.mark.parametrize("num_bytes", [500, 5_000, 50_000])
def test_a_model_that_does_not_fit_leaves_the_folder_as_it_was(num_bytes, model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "log.json").write_text("{}")
    with pytest.raises(OSError) as failed, no_file_above(num_bytes):
        save_folder(*model, tmp_path / "model")
    assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(tmp_path / "model"))
    assert names(tmp_path) == ["model/log.json"]
    save_folder(*model, tmp_path / "model")
    assert {"config.json", "log.json", "model.safetensors"} <= {*names(tmp_path / "model")}
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(OSError), no_file_above(num_bytes):
        save_folder(*model, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_a_smaller_model_leaves_no_shards_of_the_larger_one(model, tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("old")
    save_folder(*model, tmp_path)
    assert [name for name in names(tmp_path) if name.startswith("model")] == ["model.safetensors"]


@pytest.mark.parametrize("num_bytes", [500, 5_000, 50_000])
def test_a_new_folder_that_does_not_fit_is_not_made(num_bytes, model, tmp_path):
    with (
        pytest.raises(OSError) as failed,
        no_file_above(num_bytes),
        atomic_folder(tmp_path / "new") as folder,
    ):
        save_folder(*model, folder)
    assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


WRITERS = {
    "torch.save to a path": lambda tensors, path: torch.save(tensors, path),
    "safetensors": lambda tensors, path: safetensors.torch.save_file(tensors, path),
    "save_weights": lambda tensors, path: save_weights(path, tensors),
}


@pytest.mark.parametrize("name", WRITERS)
def test_errors_that_libraries_wrap_name_the_path(name, tmp_path):
    tensors = {"weight": torch.zeros(100_000)}
    with pytest.raises(OSError) as failed, no_file_above(10_000), naming_library_errors(tmp_path):
        WRITERS[name](tensors, str(tmp_path / "file"))
    assert failed.value.errno in (errno.EFBIG, errno.EIO)
    assert str(tmp_path) in str(failed.value.filename)


def test_other_errors_of_libraries_stay(tmp_path):
    for error in (RuntimeError("index out of range"), ValueError("no"), KeyError("os error")):
        with pytest.raises(type(error)), naming_library_errors(tmp_path):
            raise error


def test_a_temporary_folder_is_removed_where_its_filling_fails(tmp_path):
    with pytest.raises(ValueError), replacing_files(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        raise ValueError("no")
    assert names(tmp_path) == []


@pytest.mark.parametrize("num_bytes", [5_000, 50_000, 400_000])
def test_a_checkpoint_of_fine_tuning_that_does_not_fit_is_removed(num_bytes, model, tmp_path):
    """At 400 kB the weights fit, the optimizer's moments do not."""
    network, tokenizer = model
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "use_cpu": True}
    trainer = Trainer(
        distance="tokens",
        model=network,
        processing_class=tokenizer,
        args=training_arguments(tmp_path, seed=1, batch_size=2, eval_batch_size=2, **changes),
        train_dataset=[{"input_ids": [2, 5, 3], "labels": [2, 5, 3]}] * 2,
    )
    with pytest.raises(OSError) as failed, no_file_above(num_bytes):
        trainer.train()
    assert str(tmp_path / "checkpoint-1") in str(failed.value.filename)
    assert names(tmp_path) == []
    trainer.train()
    found = {Path(name).name for name in names(tmp_path)}
    assert {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= found
