"""train.py with planted faults, for faults/ranks.py: faulty_train.py FOLDER FAULT SECONDS flags..

Every update takes SECONDS longer, and each process writes a file `FOLDER/training.ATTEMPT.RANK`
with its id once it trains. FAULT: "none", or "exit0:RANK:UPDATE": this rank calls os._exit(0) in
that update of the first attempt.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
import utils

RANK, ATTEMPT = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def main() -> None:
    folder, fault, seconds, flags = (
        Path(sys.argv[1]),
        sys.argv[2].split(":"),
        float(sys.argv[3]),
        sys.argv[4:],
    )
    kept, updates = train.Distiller.launch, []

    def step(distiller, *arguments, **options):
        updates.append(1)
        if len(updates) == 2:
            (folder / f"training.{ATTEMPT}.{RANK}").write_text(str(os.getpid()))
        if fault[0] == "exit0" and ATTEMPT == "0" and [RANK, str(len(updates))] == fault[1:]:
            os._exit(0)
        time.sleep(seconds)
        return kept(distiller, *arguments, **options)

    train.Distiller.launch = step
    train.main(flags)


if __name__ == "__main__":
    utils.run_program(main)
