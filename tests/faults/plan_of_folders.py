"""Rows of the plan: folders of runs and outputs (faults/starts.py, faults/neighbours.py)."""

ROWS = [
    {
        "id": "T33",
        "injected": "starts that fail: killed, EIO, ENOSPC at every system call that touches the"
        " run folder before the first save is done",
        "figure": "the next start works: with the same flags, with --force, with --resume auto",
        "elsewhere": "none",
        "trial": "faults.starts:start_fails",
        "smoke": 1,
        "full": 12,
        "limit_s": 900,
        "is_sampled": False,
    },
]
