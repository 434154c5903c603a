"""Make a DistilBERT student's first weights from layers of a BERT teacher."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()


from extract import Defaults, extract
from utils import run_program

DEFAULTS = Defaults(
    description=__doc__,
    student_types={"bert": "distilbert"},
    model_type="bert",
    model_name="bert-base-uncased",
    dump_checkpoint="serialization_dir/tf_bert-base-uncased_0247911.pth",
)


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    extract(DEFAULTS, argv)


if __name__ == "__main__":
    run_program(main)
