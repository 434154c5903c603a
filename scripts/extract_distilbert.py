"""Make a DistilBERT student's first weights from layers of a BERT teacher."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.models.extract_options import EXTRACT_DISTILBERT, parse
    from utils import read_flags_first

    read_flags_first(lambda: parse(EXTRACT_DISTILBERT))


from distil.models.extract_options import EXTRACT_DISTILBERT
from extract import extract
from utils import run_program


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    extract(EXTRACT_DISTILBERT, argv)


if __name__ == "__main__":
    run_program(main)
