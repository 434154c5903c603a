"""Make a student's first weights from layers of a teacher of the same architecture (RoBERTa or
GPT-2).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extraction import Defaults, extract
from utils import run_program

DEFAULTS = Defaults(
    description=__doc__,
    student_types={"roberta": "roberta", "gpt2": "gpt2"},
    model_type="roberta",
    model_name="roberta-large",
    dump_checkpoint="serialization_dir/tf_roberta_048131723.pth",
)


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    extract(DEFAULTS, argv)


if __name__ == "__main__":
    run_program(main)
