"""Outputs replace files of other programs only with --force, and what is no file never."""

import json
import os
import shutil
from pathlib import Path

import pytest

import binarized_data
import compare_runs
import evaluate_lm
import extract
import inspect_data
import join_tokens
import prepare_text
import token_counts
import train_teacher
from distil.reporting.plots import picture
from distil.system.files import atomic_folder, output_problem
from distil.system.outputs import is_picture


def words(*values: object) -> list[str]:
    return [str(value) for value in values]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two folders that compare_runs.py reads."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    row = {"update": 1, "micro_batches": 1, "epoch": 0, "loss": 1.0}
    for seed, folder in enumerate(folders):
        (folder / "parameters.json").write_text(json.dumps({"seed": seed}))
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folders


def commands(world, teachers, runs, folder: Path) -> dict[str, tuple]:
    """List each program by the file it writes: {file: (main, its flags)}."""
    bert, data = teachers["bert"], world.data("bert")
    binarize = ["--file_path", world.text, "--tokenizer_name", bert, "--num_workers", 1]
    return {
        "scores.json": (evaluate_lm.main, ["--model", bert, "--data_file", data, "--output"]),
        "first.pth": (
            extract.main,
            ["--model_type", "gpt2", "--model_name", teachers["gpt2"], "--dump_checkpoint"],
        ),
        "counts.pickle": (
            token_counts.main,
            ["--data_file", data, "--vocab_size", 300, "--token_counts_dump"],
        ),
        "dump.txt": (prepare_text.main, ["--file_path", world.text, "--output"]),
        "report.json": (inspect_data.main, [data, "--json"]),
        "curves.png": (compare_runs.main, [*runs, "--output"]),
        "more.pickle": (
            binarized_data.main,
            [*binarize, "--dump_file", folder / "d", "--token_counts_dump"],
        ),
        "picture.png": (binarized_data.main, [*binarize, "--dump_file", folder / "e", "--report"]),
    }


UNMARKED = ("first.pth", "dump.txt")  # any program's could look like it
NAMES = (
    *("scores.json", "first.pth", "counts.pickle", "dump.txt", "report.json", "curves.png"),
    *("more.pickle", "picture.png"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_replaces_its_own_output_and_others_only_with_force(
    name, world, teachers, runs, tmp_path, status_and_errors
):
    main, flags = commands(world, teachers, runs, tmp_path)[name]
    path, flags = tmp_path / name, words(*flags, tmp_path / name)
    path.write_text("years of work")
    status, errors = status_and_errors(main, flags)
    assert (status, len(errors)) == (2, 1) and "replace it with --force" in errors[0], errors
    assert path.read_text() == "years of work" and os.listdir(tmp_path) == [name]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    status, errors = status_and_errors(main, flags)
    assert status == 2 and "exists, and is a link" in errors[0]
    main([*flags, "--force"])
    assert path.is_file() and not path.is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "years of work"
    status, errors = status_and_errors(main, flags)
    assert status == (2 if name in UNMARKED else 0), errors
    path.write_bytes(b"")  # as mktemp makes one
    main(flags)


@pytest.mark.parametrize("kind", ["pickle", "store"])
def test_a_token_file_replaces_its_own_kind(kind, world, teachers, tmp_path, status_and_errors):
    flags = words("--file_path", world.text, "--tokenizer_name", teachers["bert"])
    flags += words("--num_workers", 1, "--dump_file", tmp_path / "d", "--format", kind)
    endings = {"pickle": [".pickle", ".pickle.json"], "store": [".bin", ".idx", ".json"]}[kind]
    for ending in endings:
        path = tmp_path / f"d.tiny-bert{ending}"
        path.write_text("years of work")
        status, errors = status_and_errors(binarized_data.main, flags)
        assert status == 2 and "replace it with --force" in errors[0], errors
        assert path.read_text() == "years of work"
        path.unlink()
    for more in ([], [], ["--force"]):
        binarized_data.main([*flags, *more])


def test_joined_shards_replace_no_other_file(world, teachers, tmp_path, status_and_errors):
    flags = words("--file_path", world.text, "--tokenizer_name", teachers["bert"])
    for number in (1, 2):
        shard = words("--num_workers", 1, "--dump_file", tmp_path / "d", "--shard", f"{number}/2")
        binarized_data.main([*flags, *shard])
    path = tmp_path / "d.tiny-bert.pickle"
    path.write_text("years of work")
    join = ["--shards", str(tmp_path / "d.tiny-bert")]
    status, errors = status_and_errors(join_tokens.main, join)
    assert status == 2 and "replace it with --force" in errors[0]
    join_tokens.main([*join, "--force"])


def test_a_teacher_replaces_no_model_unasked(world, teachers, tmp_path, status_and_errors):
    (tmp_path / "config.json").write_text("{}")
    flags = words("--config", tmp_path / "config.json", "--tokenizer_name", teachers["bert"])
    flags += words("--data_file", world.data("bert"), "--output_dir", tmp_path)
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and "holds a config.json already" in errors[0]


def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", str(tmp_path / "pipe"), str(tmp_path / "link")):
        assert "is a device or a pipe" in output_problem(path, "--output", force=True)


def test_a_picture_of_the_user_is_not_taken_for_ours(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.figure(figsize=(1, 1)).savefig(tmp_path / "thesis.png")
    plt.close("all")
    with picture(tmp_path / "ours.png", 1, (1, 1)):
        pass
    assert is_picture(tmp_path / "ours.png") and not is_picture(tmp_path / "thesis.png")


def test_an_empty_folder_behind_a_link_or_of_a_volume_receives_a_student(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to("volume")
    for is_mount in (False, True):
        monkeypatch.setattr(os.path, "ismount", lambda path, found=is_mount: found)
        with atomic_folder(tmp_path / "link") as folder:
            (folder / "config.json").write_text("{}")
        assert os.listdir(tmp_path / "volume") == ["config.json"]
        assert sorted(os.listdir(tmp_path)) == ["link", "volume"]
        shutil.rmtree(tmp_path / "volume")
        (tmp_path / "volume").mkdir()
