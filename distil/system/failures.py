"""Failures of libraries, as one line: what failed, why, and the remedy."""

import contextlib
from collections.abc import Iterator

from utils import InputError, is_out_of_memory, one_line


@contextlib.contextmanager
def naming_failures(
    what: str, remedy: str = "", passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Raise InputError of `what`, the reason and `remedy` for anything that the block raises.

    Loaders raise anything on damaged files, and models on sizes that do not fit. Out of memory is
    raised as it is, for no other file or model is its remedy; so are errors of the types `passing`.
    """
    try:
        yield
    except (InputError, *passing):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what} ({one_line(error)}){remedy}") from error
