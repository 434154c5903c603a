"""Rank 0 logs and reports input errors for all processes of a run."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator

from distil.system.copies import refuse_srun
from distil.system.versions import version_notice
from utils import InputError, logger, setup_logging

# All processes find the same error, and the launcher ends the rest when the first one exits: the
# others wait, so that rank 0 reports.
RANK_0_FIRST_S = 3


@contextlib.contextmanager
def reporting_on_rank_0() -> Iterator[None]:
    """Log on rank 0 only within the block, and let rank 0 raise input errors first.

    Raises InputError in tasks of srun, which have no ranks.
    """
    is_another_rank = os.environ.get("RANK", "0") != "0"
    setup_logging(logging.ERROR if is_another_rank else logging.INFO)
    if not os.environ.get("RANK"):
        refuse_srun(os.environ)
    notice = version_notice()
    if notice:
        logger.warning(notice)
    try:
        yield
    except InputError:
        if is_another_rank:
            time.sleep(RANK_0_FIRST_S)
        raise
