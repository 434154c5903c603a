"""Rows of faults.plan on output, signals and Ctrl-C: the fields of a Row."""

STREAMS = [
    {
        "id": "T30",
        "injected": "output that can't be written from a random moment on: a pipe without a reader,"
        " a full disk, a terminal that is gone, closed streams; 1 to 3 ranks",
        "figure": "100 of 100: status 0, digest equal to the undisturbed run's",
        "elsewhere": "none",
        "trial": "faults.streams:unwritable_output",
        "smoke": 4,
        "full": 100,
        "limit_s": 300,
    },
    {
        "id": "T31",
        "injected": "SIGHUP, SIGUSR2, SIGUSR1, SIGXCPU at random moments; SIGHUP under nohup",
        "figure": "50 of 50: status 143, agreed step saved, resume bit-identical; nohup: no effect",
        "elsewhere": "none",
        "trial": "faults.streams:hung_up",
        "smoke": 3,
        "full": 50,
        "limit_s": 300,
    },
    {
        "id": "T32",
        "injected": "Ctrl-C at random moments of the start-up of every program, from its first"
        " statement on",
        "figure": "20 of 20 for each of 22 programs: one line, status 130, nothing partial",
        "elsewhere": "a traceback of imports",
        "trial": "faults.streams:interrupted_start",
        "smoke": 1,
        "full": 440,
        "limit_s": 120,
    },
]
