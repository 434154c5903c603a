"""Names of what lies in a run folder."""

import os
import re
from pathlib import Path

CHECKPOINTS, BEST, MODEL = "checkpoints", "best", "model"
METRICS = "metrics.jsonl"
EVENTS = {"train": "log/train", "parameters": "log/parameters"}  # TensorBoard's
STEP = re.compile(r"step-(\d{8,})")  # a checkpoint


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """List a folder's checkpoints, whole or damaged, newest first."""
    try:
        found = [
            path for path in Path(folder).iterdir() if STEP.fullmatch(path.name) and path.is_dir()
        ]
    except (FileNotFoundError, NotADirectoryError):  # other errors may hide checkpoints: raise them
        return []
    return sorted(found, key=lambda path: int(STEP.fullmatch(path.name)[1]), reverse=True)
