"""Which process is rank 0, which logs and reports input errors for all processes of a run."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping

from distil.system.copies import refuse_srun
from distil.system.versions import version_notice
from utils import InputError, logger, setup_logging

# All processes find the same error, and the launcher ends the rest when the first one exits: the
# others wait, so that rank 0 reports.
RANK_0_FIRST_S = 3
TIMEOUT_S = 600  # for which processes wait for each other


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """True in a process that a launcher started: one for which RANK and LOCAL_RANK are set."""
    return bool(environment.get("RANK") and environment.get("LOCAL_RANK"))


def is_another_rank(environment: Mapping[str, str]) -> bool:
    """True in a process that is one of several and not rank 0."""
    return is_one_of_several(environment) and environment["RANK"] != "0"


def log_on_rank_0() -> None:
    """Set up logging: errors alone on the other ranks."""
    setup_logging(logging.ERROR if is_another_rank(os.environ) else logging.INFO)


@contextlib.contextmanager
def reporting_on_rank_0() -> Iterator[None]:
    """Log on rank 0 only within the block, and let rank 0 raise input errors first.

    Raises InputError in tasks of srun, which have no ranks.
    """
    is_other = os.environ.get("RANK", "0") != "0"
    setup_logging(logging.ERROR if is_other else logging.INFO)
    if not os.environ.get("RANK"):
        refuse_srun(os.environ)
    notice = version_notice()
    if notice:
        logger.warning(notice)
    try:
        yield
    except InputError:
        if is_other:
            time.sleep(RANK_0_FIRST_S)
        raise
