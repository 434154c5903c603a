"""--do_lower_case and --strip_accents, the flags of WordPiece tokenizers.

Imports neither torch nor transformers: programs parse their flags first.
"""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Casing:
    """What the flags say; None: as the tokenizer's folder says."""

    do_lower_case: bool | None = None
    strip_accents: bool | None = None

    def options(self) -> dict[str, bool]:
        """Return what is given, as options of a tokenizer's class."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


HELP = {
    "do_lower_case": (
        "WordPiece: lower-case the text (default: as the tokenizer's folder says; a bare vocab.txt:"
        " whether it has no capitals)"
    ),
    "strip_accents": (
        "WordPiece: strip accents (default: as the tokenizer's folder says, else whether it"
        " lower-cases)"
    ),
}


def add_casing_flags(parser: argparse.ArgumentParser) -> None:
    """Add both flags, each also as --no-..."""
    for name, text in HELP.items():
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )


def casing_of_flags(args: argparse.Namespace) -> Casing:
    """Return what a program's flags say."""
    return Casing(args.do_lower_case, args.strip_accents)
