"""Problems of flags, gathered so that a program names all of them at once."""

import contextlib
from collections.abc import Iterator

from utils import InputError


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Append the lines of an InputError in the block to `problems` instead of raising it."""
    try:
        yield
    except InputError as error:
        problems += str(error).splitlines()
