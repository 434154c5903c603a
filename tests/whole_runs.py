"""Shared by tests of whole runs: compare two runs, interrupt one."""

import json
import os
import signal
import time
from pathlib import Path

from stand_ins import is_text, logged

from distil.training import checkpointing


def assert_same_run(one: Path, two: Path) -> None:
    """Check that two runs have bit-equal weights, moments, counters and logs."""
    names = [path.name for path in checkpointing.checkpoints_in(one / "checkpoints")]
    assert names and names == [
        path.name for path in checkpointing.checkpoints_in(two / "checkpoints")
    ]
    for name in names:
        first, second = (run / "checkpoints" / name for run in (one, two))
        files = ["student.safetensors", *["optimizer.safetensors"] * (name != "step-00000000")]
        for file in files:
            assert (first / file).read_bytes() == (second / file).read_bytes()
        states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
        for state in states:
            del state["log_bytes"], state["flags"]
        assert states[0] == states[1]
    final = [one / "pytorch_model.bin", one / "model" / "model.safetensors"]
    for path in sorted(one.glob("*.pth")) + final:
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path.name
    logs = [[point for point in logged(run) if not is_text(point)] for run in (one, two)]
    assert logs[0] == logs[1] and len(logs[0]) > 100
    metrics = [read_metrics(run) for run in (one, two)]
    for line in metrics[0] + metrics[1]:
        line.pop("tokens_per_s", None)
    assert metrics[0] == metrics[1] and metrics[0]


def read_metrics(run: Path) -> list[dict]:
    """Read the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def dying_at(function, call: int):
    """Wrap a function to raise KeyboardInterrupt in its call number `call`, counted from 1."""
    calls = []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return dying


def stop_after(monkeypatch, num_updates: int, number: int = signal.SIGTERM):
    """Make the process send itself a signal during update `num_updates`."""
    import train

    kept, calls = train.Distiller.launch, []

    def step(self, *arguments, **options):
        calls.append(1)
        if len(calls) == num_updates:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # a thread receives it
        return kept(self, *arguments, **options)

    monkeypatch.setattr(train.Distiller, "launch", step)


def masked_flags(folder: Path, teacher: Path, text_file: Path, **changes: object) -> list[str]:
    """Write a teacher's data; list the flags that train a student of all its layers from it."""
    import binarized_data

    flags = {"file_path": text_file, "tokenizer_type": "auto", "tokenizer_name": teacher}
    flags |= {"dump_file": folder / "ids", "token_counts_dump": folder / "counts"}
    binarized_data.main(as_words(flags | {"num_workers": 1}))
    flags = {"student": teacher, "teacher_name": teacher, "n_gpu": 0, "n_epoch": 1}
    flags |= {"data_file": folder / f"ids.{teacher.name}.pickle", "alpha_cos": 1.0}
    flags |= {"token_counts": folder / "counts", "alpha_mlm": 1.0, "alpha_clm": 0.0}
    return as_words(flags | {"gradient_accumulation_steps": 2} | changes) + ["--mlm"]


def as_words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
