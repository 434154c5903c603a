"""Trials under the real launcher: killed, stopped, missing ranks; killed launchers; two nodes.

Called by scripts/fault_injection.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from faults.runs import Ranks, digest, finish, reference, run_flags
from stand_ins import open_port

from distil.training import checkpointing

FAULTY = Path(__file__).resolve().parent / "faulty_train.py"
TIMEOUT_S = 10
LAUNCHER_WAITS_S = 30  # from SIGTERM to SIGKILL


class Launcher:
    """torchrun on this machine with faulty_train.py, and bounded waits."""

    def __init__(
        self,
        bench,
        flags: list[str],
        options: list[str],
        fault: str = "none",
        slow_s: float = 0.05,
        name: str = "launcher",
    ):
        self.folder, self.log = bench.folder, bench.folder / f"{name}.log"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            FAULTY,
            bench.folder,
            fault,
            slow_s,
            *flags,
        ]
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TORCH", "PYTEST"))
        }
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], env=clean, stdout=log, stderr=log
            )

    def rank(self, attempt: int, rank: int, limit_s: float = 90) -> int | None:
        """Wait until a rank trains; return its process id, None where the launcher ended before."""
        file, deadline = self.folder / f"training.{attempt}.{rank}", time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if file.exists() and file.read_text():
                return int(file.read_text())
            if self.process.poll() is not None:
                return None
            time.sleep(0.01)
        raise TimeoutError(
            f"rank {rank} does not train in attempt {attempt}: {self.output()[-800:]}"
        )

    def wait(self, limit_s: float) -> tuple[int, float]:
        """Wait for the launcher: (status, seconds). End it where it hangs, and report that."""
        started = time.monotonic()
        try:
            status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise TimeoutError(
                f"the launcher hung for {limit_s:g} s: {self.output()[-800:]}"
            ) from None
        return status, time.monotonic() - started

    def end(self) -> None:
        """Kill the launcher and all that it started."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()

    def output(self) -> str:
        """Return the output of launcher and processes."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def two_ranks(bench, dump_path: Path, **options) -> Launcher:
    """Start the run of SHAPE by torchrun on two processes, with up to three restarts."""
    force = options.pop("flags", [])
    flags = [*run_flags(bench, SHAPE, dump_path), *force]
    return Launcher(
        bench, flags, ["--standalone", "--nproc_per_node=2", "--max-restarts=3"], **options
    )


SHAPE = ("bert", 2, 1)  # 24 updates

# --------------------------------------------------------------------------------------------------
# T9, T10: a rank dies
# --------------------------------------------------------------------------------------------------


def killed_rank(bench, flags: tuple[str, ...] = ()) -> None:
    """T9: kill -9 a random rank up to three times, or let one exit with 0: the run recovers."""
    expected, _ = reference(bench, SHAPE)
    run, exits = bench.folder / "run", bench.number % 4 == 3
    fault = f"exit0:{bench.rng.randrange(2)}:{bench.rng.randint(2, 20)}" if exits else "none"
    launcher = two_ranks(bench, run, fault=fault, flags=list(flags))
    num_kills = 0 if exits else bench.rng.randint(1, 3)
    for attempt in range(num_kills):
        pid = launcher.rank(attempt, bench.rng.randrange(2))
        time.sleep(bench.rng.uniform(0, 1.5))
        if pid is not None and psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    status, _ = launcher.wait(200)
    bench.note("a rank called os._exit(0)" if exits else f"{num_kills} kills of a rank")
    if status != 0:
        bench.fail(
            f"{fault}, {num_kills} kills: the launcher ended with {status}:"
            f" {launcher.output()[-1500:]}"
        )
    elif digest(run) != expected:
        bench.fail(f"{fault}, {num_kills} kills: another digest than the undisturbed run's")
    lost = list(bench.folder.glob("run.old-*"))
    if lost:
        bench.fail(f"checkpoints were moved aside to {lost[0].name}")


def killed_rank_with_force(bench) -> None:
    """T10: as T9 with --force among the arguments: no checkpoint is lost."""
    killed_rank(bench, ("--force",))


# --------------------------------------------------------------------------------------------------
# T11: a rank hangs
# --------------------------------------------------------------------------------------------------


def stopped_rank(bench) -> None:
    """T11: SIGSTOP one rank: the run ends within both timeouts and names the rank."""
    rank = bench.number % 2
    flags = [
        *run_flags(bench, SHAPE, bench.folder / "run"),
        "--distributed_timeout_s",
        str(TIMEOUT_S),
    ]
    launcher = Launcher(bench, flags, ["--standalone", "--nproc_per_node=2"], slow_s=0.2)
    pid = launcher.rank(0, rank)
    time.sleep(bench.rng.uniform(0, 1))
    os.kill(pid, signal.SIGSTOP)
    bound = TIMEOUT_S + LAUNCHER_WAITS_S + 10
    status, seconds = launcher.wait(bound + 60)
    bench.note(f"rank {rank} stopped: ended after {seconds:.0f} s of at most {bound}")
    if status == 0 or seconds > bound or f"rank {rank} was last heard of" not in launcher.output():
        bench.fail(
            f"rank {rank}: status {status} after {seconds:.0f} s: {launcher.output()[-1500:]}"
        )
    if checkpointing.newest(bench.folder / "run" / "checkpoints") is None:
        bench.fail("no checkpoint is left")


# --------------------------------------------------------------------------------------------------
# T8: the launcher is asked to stop
# --------------------------------------------------------------------------------------------------


def terminated_launcher(bench) -> None:
    """T8 at the launcher: its processes agree on an update and save; its status is not 0."""
    expected, _ = reference(bench, SHAPE)
    launcher = two_ranks(bench, bench.folder / "run")
    launcher.rank(0, 0)
    time.sleep(bench.rng.uniform(0, 1))
    launcher.process.send_signal(bench.rng.choice([signal.SIGTERM, signal.SIGINT]))
    status, _ = launcher.wait(60)
    said = re.search(r"Stopped after update (\d+)", launcher.output())
    newest = checkpointing.newest(bench.folder / "run" / "checkpoints")
    if status == 0 or not said or newest.step != int(said[1]):
        bench.fail(
            f"the launcher ended with {status}; said {said and said[0]}, newest {newest.step}:"
            f" {launcher.output()[-800:]}"
        )
    finish(bench, SHAPE, bench.folder / "run", expected, "launcher asked to stop")


# --------------------------------------------------------------------------------------------------
# T16: two nodes
# --------------------------------------------------------------------------------------------------


def two_nodes(bench) -> None:
    """T16: two launchers of two processes on loopback equal one of four; or kill one launcher."""
    run, port = bench.folder / "run", open_port()
    flags = [*run_flags(bench, FOUR, run), "--distributed_timeout_s", "20"]
    options = [
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=trial",
    ]
    nodes = [Launcher(bench, flags, options, slow_s=0.1, name=f"node-{node}") for node in range(2)]
    {0: equal_to_one_node, 1: killed_launcher}[bench.number % 2](bench, run, nodes)


FOUR = ("bert", 4, 1)


def equal_to_one_node(bench, run: Path, nodes: list[Launcher]) -> None:
    """Compare with one node of four processes."""
    statuses = [node.wait(200)[0] for node in nodes]
    if any(statuses):
        bench.fail(f"two nodes ended with {statuses}: {nodes[0].output()[-1000:]}")
        return
    bench.note("2 nodes x 2 = 1 node x 4")
    expected, _ = reference(bench, FOUR)
    if digest(run) != expected:
        bench.fail("two nodes: another digest than one node's")


def killed_launcher(bench, run: Path, nodes: list[Launcher]) -> None:
    """Kill one launcher; the other must end, and no process may be left."""
    for rank in range(4):
        nodes[0].rank(0, rank)
    ranks = [
        psutil.Process(int((bench.folder / f"training.0.{rank}").read_text())) for rank in range(4)
    ]
    victim = bench.rng.randrange(2)
    nodes[victim].process.kill()
    nodes[victim].process.wait()
    status, seconds = nodes[1 - victim].wait(20 + LAUNCHER_WAITS_S + 60)
    bench.note(f"one launcher killed: the other ended after {seconds:.0f} s")
    left = psutil.wait_procs(ranks, timeout=40)[1]
    if status == 0 or left:
        bench.fail(
            f"the other launcher ended with {status}; {len(left)} processes are left:"
            f" {nodes[1 - victim].output()[-800:]}"
        )
    for process in left:
        process.kill()
    ranks = Ranks([*run_flags(bench, FOUR, run), "--resume"], bench.folder / "finish.log", 4)
    statuses = ranks.wait()
    expected, _ = reference(bench, FOUR)
    if any(statuses) or digest(run) != expected:
        bench.fail(
            f"going on after a launcher was killed: {statuses}, or another digest:"
            f" {ranks.output()[-500:]}"
        )
