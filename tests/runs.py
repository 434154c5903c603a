"""What the tests of whole runs share."""

import json
from pathlib import Path

from stand_ins import is_text, logged

from distil.training import checkpointing


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, moments, counters and log are equal, byte by byte."""
    names = [path.name for path in checkpointing.exist(one / "checkpoints")]
    assert names and names == [path.name for path in checkpointing.exist(two / "checkpoints")]
    for name in names:
        for file in ("student.safetensors", "optimizer.safetensors"):
            assert (one / "checkpoints" / name / file).read_bytes() == (
                two / "checkpoints" / name / file
            ).read_bytes()
        states = [
            json.loads((run / "checkpoints" / name / "state.json").read_text())
            for run in (one, two)
        ]
        for state in states:
            del state["log_bytes"], state["flags"]
        assert states[0] == states[1]
    for path in sorted(one.glob("*.pth")) + [one / "pytorch_model.bin", one / "model.safetensors"]:
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    logs = [[point for point in logged(run) if not is_text(point)] for run in (one, two)]
    assert logs[0] == logs[1] and len(logs[0]) > 100


def dying_at(function, call: int):
    calls = []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return dying
