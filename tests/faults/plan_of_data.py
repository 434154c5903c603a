"""Rows of the plan about data that changes and disks that are full."""

ROWS_OF_DATA = [
    {
        "id": "T37",
        "injected": "data changed in a run: a bit flipped in place (also with the time kept), cut"
        " off, overwritten, replaced, touched, removed, grown; store, pickle, held-out, counts",
        "figure": "all: one line that names the file and no checkpoint trained on other bytes,"
        " or a warning and the undisturbed result; no SIGBUS",
        "elsewhere": "SIGBUS, or trained on in silence",
        "trial": "faults.changed_data:data_changed",
        "smoke": 1,
        "full": 16,
        "limit_s": 600,
    },
    {
        "id": "T38",
        "injected": "a disk (tmpfs) that gets full at 8 sizes, for half of them with the temporary"
        " files on it: every program that writes, anew and over old files",
        "figure": "all: status 2, one line with a path, nothing partial under a final name, no"
        " temporary file, old files intact",
        "elsewhere": "tracebacks, and files of 0 bytes under final names",
        "trial": "faults.full_disks:disk_full",
        "smoke": 2,
        "full": 38,
        "limit_s": 900,
        "is_sampled": False,
    },
]
