"""What ends a run before its last update, and the exit status."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from distil.system.signals import Stopped
from distil.training.post_mortem import NonFiniteError
from utils import logger

EXIT_NON_FINITE = 1


@contextlib.contextmanager
def ending_early(
    describe_saved: Callable[[], str] | None, step: Callable[[], int]
) -> Iterator[None]:
    """Exit with one line where a value is not finite or a signal stops the run.

    describe_saved: names the newest checkpoint; None on other processes than the main one, which
    say nothing. step: updates done.
    """
    try:
        yield
    except NonFiniteError as error:
        if describe_saved is not None:
            logger.error("Stopped: %s. %s", error, describe_saved())
        sys.exit(EXIT_NON_FINITE)
    except Stopped as end:
        if describe_saved is not None:
            text = "Stopped after update %d; resume with --resume. %s"
            logger.info(text, step(), describe_saved())
        sys.exit(end.status)
