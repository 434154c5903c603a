"""Names and folders of models, without loading anything."""

import os
from pathlib import Path


def short_name(name_or_folder: str) -> str:
    """Return the last component of a hub name or folder: 'dbmdz/bert-base/' -> 'bert-base'.

    Of a run's model/ the run's: every run has one.
    """
    path = Path(os.path.abspath(name_or_folder))
    if path.name == "model" and (path.parent / "parameters.json").is_file():
        path = path.parent
    return path.name if name_or_folder else ""


def model_folder(name: str) -> str:
    """Return the folder with a model: of a run folder of train.py its model/, else `name`."""
    inner = os.path.join(name, "model")
    return inner if os.path.isfile(os.path.join(inner, "config.json")) else name
