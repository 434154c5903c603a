"""Shared by tests of whole runs: compare two runs, interrupt one."""

import json
from pathlib import Path

from stand_ins import is_text, logged

from distil.training import checkpointing


def assert_same_run(one: Path, two: Path) -> None:
    """Check that two runs have bit-equal weights, moments, counters and logs."""
    names = [path.name for path in checkpointing.exist(one / "checkpoints")]
    assert names and names == [path.name for path in checkpointing.exist(two / "checkpoints")]
    for name in names:
        first, second = (run / "checkpoints" / name for run in (one, two))
        for file in ("student.safetensors", "optimizer.safetensors"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
        states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
        for state in states:
            del state["log_bytes"], state["flags"]
        assert states[0] == states[1]
    for path in sorted(one.glob("*.pth")) + [one / "pytorch_model.bin", one / "model.safetensors"]:
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    logs = [[point for point in logged(run) if not is_text(point)] for run in (one, two)]
    assert logs[0] == logs[1] and len(logs[0]) > 100


def dying_at(function, call: int):
    """Wrap a function to raise KeyboardInterrupt in its call number `call`, counted from 1."""
    calls = []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return dying
