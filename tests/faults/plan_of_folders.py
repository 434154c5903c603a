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
        "full": 37,
        "limit_s": 900,
        "is_sampled": False,
    },
    {
        "id": "T34",
        "injected": "volumes: empty, with lost+found, with a run, read-only, part of another,"
        " behind a link, in a folder of others; --force, --resume auto; extract.py into one",
        "figure": "used, or refused in one line; what --force moves aside stays in the volume",
        "elsewhere": "none",
        "trial": "faults.starts:volumes_as_folders",
        "smoke": 2,
        "full": 10,
        "is_sampled": False,
    },
    {
        "id": "T35",
        "injected": "a checkout of another user: 10 starts of train.py for one call of evaluate_lm,"
        " run_task, run_squad_w_distillation, report",
        "figure": "all end with their results and say whose the checkout is",
        "elsewhere": "GitPython: BrokenPipeError in 66 of 120 calls",
        "trial": "faults.neighbours:foreign_owner",
        "smoke": 2,
        "full": 140,
    },
    {
        "id": "T36",
        "injected": "links, hard links, copies that share files (cp -al) and files of others in"
        " every folder that train.py, run_task.py and the SQuAD program write to, and at the names"
        " of outputs",
        "figure": "0 of others' files changed or deleted",
        "elsewhere": "none",
        "trial": "faults.neighbours:among_neighbours",
        "smoke": 2,
        "full": 60,
    },
]
