"""Trials of whole runs: killed, stopped by signals, poisoned with NaN, on other numbers of ranks.

Called by scripts/fault_injection.py.

A run is train.main in processes forked from one that has imported everything: one second rather
than five. Several ranks are as many forks, with a launcher's variables in their environments.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from faults.forked import ended, fork_program
from safetensors.torch import load_file
from stand_ins import is_text, logged, open_port

import train
from distil.system import files
from distil.training import checkpointing
from distil.training.endings import EXIT_NON_FINITE

LIMIT_S = 90

# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


class Ranks:
    """A forked run of one or several processes; their output goes to LOG.RANK."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        world_size: int = 1,
        before: Callable[[int], None] = lambda rank: None,
    ):
        """before: called with its rank in each process ahead of train.main, to plant a fault."""
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)]
        port = str(open_port())
        self.pids = [self._fork(argv, rank, world_size, port, before) for rank in range(world_size)]
        self.statuses: list[int | None] = [None] * world_size

    def _fork(self, argv, rank: int, world_size: int, port: str, before) -> int:
        def prepare() -> None:
            become_rank(self.logs[rank], rank, world_size, port)
            before(rank)

        return fork_program(prepare, lambda: train.main(list(argv)))

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some of the processes, or to all."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self.statuses[rank] is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def is_over(self) -> bool:
        """True where every process has ended."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                self.statuses[rank] = ended(pid)
        return None not in self.statuses

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Wait for all and return their statuses (-N: ended by signal N).

        Raises TimeoutError after ending them.
        """
        deadline = time.monotonic() + limit_s
        while not self.is_over():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"no end after {limit_s:g} s: {self.output()[-500:]}")
            time.sleep(0.002)
        return self.statuses

    def output(self) -> str:
        """Return what the processes printed."""
        return "\n".join(
            log.read_text(encoding="utf-8", errors="replace") for log in self.logs if log.exists()
        )


def become_rank(log: Path, rank: int, world_size: int, port: str) -> None:
    """Redirect this process's output to a file, and set a launcher's variables for a rank."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["train.py"]
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "PYTEST"))]:
        del os.environ[name]
    if world_size > 1:
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
        }
        os.environ |= {name: str(value) for name, value in variables.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def points(run: Path) -> list[tuple]:
    """List every point of a run's log files, except times, memory and texts."""
    return [point for point in logged(run) if not is_text(point)]


def digest(run: Path) -> str:
    """Hash a run's results: weights under all names, moments, counters, learning rate, log."""
    total = hashlib.sha256()
    newest = checkpointing.newest(run / "checkpoints")
    state = {
        name: value for name, value in newest.state.items() if name not in ("log_bytes", "flags")
    }
    total.update(json.dumps([newest.step, state, points(run)], sort_keys=True).encode())
    files = [
        newest.path / "student.safetensors",
        newest.path / "optimizer.safetensors",
        run / "pytorch_model.bin",
    ]
    for path in [*files, run / "model" / "model.safetensors", *sorted(run.glob("*.pth"))]:
        total.update(path.read_bytes())
    return total.hexdigest()


# kind, ranks, accumulation. With three ranks or more the order of summing gradients matters.
SHAPES = [("bert", 3, 1), ("gpt2", 3, 2)]
SHAPES += [
    (kind, ranks, accumulation)
    for kind in ("bert", "gpt2")
    for ranks in (1, 2)
    for accumulation in (1, 4)
]
MICRO_BATCHES = 48  # of each run, over an epoch's end, with a checkpoint every few updates


def run_flags(bench, shape: tuple, dump_path: Path, **changes) -> list[str]:
    """List the flags of a run of one of SHAPES."""
    kind, ranks, accumulation = shape
    flags = {
        "batch_size": 10,
        "n_epoch": 2,
        "gradient_accumulation_steps": accumulation,
        "log_interval": 4,
        "checkpoint_interval": 5 if ranks > 1 else 9,
        "distributed_timeout_s": 60,
    }
    return bench.world.flags(kind, dump_path, **flags, **changes)


def reference(bench, shape: tuple) -> tuple[str, float]:
    """Run a shape undisturbed, once for all calls: (its digest, its seconds)."""
    kept = bench.world.folder / f"reference-{'-'.join(map(str, shape))}.json"
    if not kept.exists():
        run, started = bench.folder / "reference", time.monotonic()
        ranks = Ranks(run_flags(bench, shape, run), bench.folder / "reference.log", shape[1])
        if any(ranks.wait()):
            raise RuntimeError(f"the undisturbed run failed: {ranks.output()[-800:]}")
        files.write_json(kept, [digest(run), time.monotonic() - started])
    return tuple(json.loads(kept.read_text()))


def finish(bench, shape: tuple, run: Path, expected: str, what: str) -> None:
    """Resume to the end, and compare with the undisturbed run."""
    ranks = Ranks(
        [*run_flags(bench, shape, run), "--resume", "auto"], bench.folder / "finish.log", shape[1]
    )
    statuses = ranks.wait()
    if any(statuses):
        bench.fail(f"{shape} {what}: resuming ended with {statuses}: {ranks.output()[-800:]}")
    elif digest(run) != expected:
        bench.fail(f"{shape} {what}: another digest than the undisturbed run's")


# --------------------------------------------------------------------------------------------------
# T1, T2: killed
# --------------------------------------------------------------------------------------------------


def killed_at_random(bench) -> None:
    """T1: SIGKILL every process of a run at random moments, restart each time, compare the end."""
    shape, run = SHAPES[bench.number % len(SHAPES)], bench.folder / "run"
    expected, _ = reference(bench, shape)
    num_kills = 0
    for attempt in range(bench.rng.randint(3, 5)):
        counted = Counted()
        argv = [*run_flags(bench, shape, run), "--resume", "auto"]
        ranks = Ranks(argv, bench.folder / f"{attempt}.log", shape[1], counted.plant)
        wait_at_random(bench, shape, counted, ranks)
        ranks.send(signal.SIGKILL)
        statuses = ranks.wait()
        num_kills += -signal.SIGKILL in statuses
        if not set(statuses) <= {0, -signal.SIGKILL}:
            bench.fail(f"{shape}, attempt {attempt}: status {statuses}: {ranks.output()[-500:]}")
    bench.note(f"{num_kills} kills in a run")
    finish(bench, shape, run, expected, f"killed {num_kills} times")


def wait_at_random(bench, shape: tuple, counted: "Counted", ranks: Ranks) -> None:
    """Wait for a moment in one of the next updates, or, one time in four, in the start."""
    if bench.rng.random() < 0.25:
        time.sleep(bench.rng.uniform(0, 0.5))
        return
    updates = MICRO_BATCHES // (shape[1] * shape[2])
    counted.wait_for(b".", bench.rng.randint(1, max(updates // 5, 1)), ranks)
    time.sleep(bench.rng.uniform(0, 0.03))


class Pipe:
    """Marks that a run's processes leave, read by this process."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)

    def leave(self, mark: bytes) -> None:
        """Leave a mark of one byte."""
        os.write(self.write_end, mark)

    def wait_for(self, mark: bytes, num: int, ranks: Ranks) -> bool:
        """Wait for so many marks of a kind; return False where the run ended before."""
        while num > 0:
            with contextlib.suppress(BlockingIOError):
                num -= os.read(self.read_end, 1) == mark
                continue
            if ranks.is_over():
                return False
            time.sleep(0.0002)
        return True


class Announced(Pipe):
    """Processes of a run that announce when a save begins and ends; the save is not delayed."""

    def plant(self, rank: int) -> None:
        """Wrap RunFolder.save_checkpoint in this process."""
        kept = train.RunFolder.save_checkpoint

        def save_checkpoint(*arguments):
            self.leave(b"(")
            kept(*arguments)
            self.leave(b")")

        train.RunFolder.save_checkpoint = save_checkpoint

    def is_inside(self) -> bool:
        """True where the awaited save has not ended."""
        with contextlib.suppress(BlockingIOError):
            return b")" not in os.read(self.read_end, 100)
        return True


def killed_in_a_save(bench) -> None:
    """T2: SIGKILL within a save; every earlier checkpoint must exist and load."""
    run, announced = bench.folder / "run", Announced()
    flags = bench.world.flags(
        "bert",
        run,
        batch_size=12,
        max_steps=8,
        checkpoint_interval=2,
        gradient_accumulation_steps=2,
    )
    ranks = Ranks(flags, bench.folder / "log", before=announced.plant)
    save = bench.rng.randint(2, 8)  # the first is of update 0
    if not announced.wait_for(b"(", save, ranks):
        bench.fail(f"the run ended before save {save}: {ranks.output()[-300:]}")
        return
    time.sleep(bench.rng.uniform(0, 0.03))
    is_inside = announced.is_inside()
    ranks.send(signal.SIGKILL)
    ranks.wait()
    bench.note("inside the save" if is_inside else "just after the save")
    found = checkpointing.newest(run / "checkpoints")
    if found is None or found.step < save - 2 or (not is_inside and found.step < save - 1):
        bench.fail(
            f"killed in save {save} (inside: {is_inside}): the newest is {found and found.step}"
        )
    if (run / "checkpoint.pth").exists():
        torch.load(run / "checkpoint.pth", weights_only=True)


# --------------------------------------------------------------------------------------------------
# T8: signals to stop
# --------------------------------------------------------------------------------------------------


class Counted(Pipe):
    """Ranks whose rank 0 announces every update and takes a little longer for it."""

    def __init__(self, slow_s: float = 0.0) -> None:
        super().__init__()
        self.slow_s = slow_s

    def plant(self, rank: int) -> None:
        """Wrap Distiller.launch in this process."""
        kept = train.Distiller.launch

        def step(distiller, *arguments, **options):
            if rank == 0:
                self.leave(b".")
            time.sleep(self.slow_s)
            return kept(distiller, *arguments, **options)

        train.Distiller.launch = step


def terminated(bench) -> None:
    """T8: send a signal to one rank or all, in a save, or twice; every tenth call to torchrun."""
    if bench.number % 10 == 9:
        from faults import ranks

        ranks.terminated_launcher(bench)
        return
    shape, run = SHAPES[bench.number % len(SHAPES)], bench.folder / "run"
    expected, _ = reference(bench, shape)
    how = ("one rank", "all ranks", "in a save", "twice")[bench.number // len(SHAPES) % 4]
    number = bench.rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    {"in a save": stopped_in_a_save, "twice": stopped_twice}.get(how, stopped_in_an_update)(
        bench, shape, run, how, number
    )
    finish(bench, shape, run, expected, f"stopped ({how}, {signal.Signals(number).name})")


def wanted_statuses(number: int, shape: tuple, how: str) -> set[int]:
    """List the allowed statuses; of several ranks, those without a Ctrl-C end as by SIGTERM."""
    status = 130 if number == signal.SIGINT else 143
    return {status, 143} if how == "one rank" and shape[1] > 1 else {status}


def check_stop(bench, shape: tuple, run: Path, how: str, number: int, ranks: Ranks) -> None:
    """Check the statuses, and that the checkpoint's update is the one that the run reports."""
    statuses = ranks.wait()
    if not set(statuses) <= wanted_statuses(number, shape, how):
        bench.fail(f"{shape} {how}: statuses {statuses}: {ranks.output()[-600:]}")
    said = re.search(r"Stopped after update (\d+)", ranks.output())
    newest = checkpointing.newest(run / "checkpoints")
    if not said or newest is None or newest.step != int(said[1]):
        bench.fail(
            f"{shape} {how}: said {said and said[0]}, the newest checkpoint is"
            f" {newest and newest.step}"
        )


def stopped_in_an_update(bench, shape: tuple, run: Path, how: str, number: int) -> None:
    """Send the signal at a random moment in a random update."""
    updates = MICRO_BATCHES // (shape[1] * shape[2])
    counted = Counted(0.01)
    ranks = Ranks(run_flags(bench, shape, run), bench.folder / "stop.log", shape[1], counted.plant)
    counted.wait_for(b".", bench.rng.randint(1, max(updates - 3, 1)), ranks)
    time.sleep(bench.rng.uniform(0, 0.02))
    ranks.send(number, [bench.rng.randrange(shape[1])] if how == "one rank" else None)
    check_stop(bench, shape, run, how, number, ranks)


def stopped_in_a_save(bench, shape: tuple, run: Path, how: str, number: int) -> None:
    """Send the signal while rank 0 saves."""
    announced = Announced()
    ranks = Ranks(
        run_flags(bench, shape, run), bench.folder / "stop.log", shape[1], announced.plant
    )
    announced.wait_for(b"(", 2, ranks)
    time.sleep(bench.rng.uniform(0, 0.01))
    ranks.send(number)
    check_stop(bench, shape, run, how, number, ranks)


def stopped_twice(bench, shape: tuple, run: Path, how: str, number: int) -> None:
    """Send a second signal after more than a second within a long update: must end at once."""
    counted = Counted(3.0)
    ranks = Ranks(run_flags(bench, shape, run), bench.folder / "stop.log", shape[1], counted.plant)
    counted.wait_for(b".", 1, ranks)
    time.sleep(0.05)
    ranks.send(number)
    time.sleep(1.2)
    if ranks.is_over():
        bench.fail(f"{shape} {how}: ended by the first signal, in an update")
    sent_at = time.monotonic()
    ranks.send(number)
    statuses = ranks.wait()
    if set(statuses) != wanted_statuses(number, shape, how) or time.monotonic() - sent_at > 1:
        bench.fail(
            f"{shape} {how}: statuses {statuses} {time.monotonic() - sent_at:.1f} s after the"
            " second signal"
        )


# --------------------------------------------------------------------------------------------------
# T12: not finite
# --------------------------------------------------------------------------------------------------


def not_finite(bench) -> None:
    """T12: NaN or Inf at some place, update and rank: must be neither applied nor saved."""
    where = ("teacher", "loss", "gradient", "initial weights")[bench.number % 4]
    value = (float("nan"), float("inf"))[bench.number // 4 % 2]
    world_size = 1 + bench.number // 8 % 2
    run, update, rank = (
        bench.folder / "run",
        bench.rng.randint(0, 4),
        bench.rng.randrange(world_size),
    )
    flags = {"batch_size": 6, "max_steps": 8, "checkpoint_interval": 2, "distributed_timeout_s": 60}
    if where == "initial weights":
        refused_weights(bench, run, value, flags, world_size)
        return
    before = POISONS[where](bench, update, rank, value)
    ranks = Ranks(bench.world.flags("bert", run, **flags), bench.folder / "log", world_size, before)
    statuses, output = ranks.wait(), ranks.output()
    culprit = "on rank " if where == "teacher" else f"on rank {rank}, "
    expected = (
        f"update {update}: ",
        "the update was not applied",
        culprit,
        "sequences ",
        "unchanged",
    )
    missing = [text for text in expected if text not in output]
    if set(statuses) != {EXIT_NON_FINITE} or missing:
        bench.fail(
            f"{where} {value}, update {update}, rank {rank} of {world_size}: {statuses}, lacks"
            f" {missing}: {output[-900:]}"
        )
    require_finite_files(bench, run)


def require_finite_files(bench, run: Path) -> None:
    """Check that all weights in files are finite and that the batch was kept."""
    states = {path: torch.load(path, weights_only=True) for path in run.glob("*.pth")}
    states |= {path: load_file(path) for path in run.glob("checkpoints/step-*/*.safetensors")}
    for path, state in states.items():
        if not all(torch.isfinite(tensor).all() for tensor in state.values()):
            bench.fail(f"{path} holds values that are not finite")
    if not states or not list(run.glob("nonfinite-step-*.safetensors")):
        bench.fail(f"{run}: no checkpoint, or no batch for the post-mortem")


def poison_step(poison: Callable, update: int) -> None:
    """Wrap Distiller.launch to call `poison` at one update; report weights changed by then."""
    kept, calls = train.Distiller.launch, []

    def step(distiller, *arguments, **options):
        calls.append(1)
        if len(calls) == update + 1:
            poison(distiller)
        before = [parameter.detach().clone() for parameter in distiller.model.parameters()]
        try:
            return kept(distiller, *arguments, **options)
        except train.NonFiniteError:
            same = all(
                torch.equal(a, b) for a, b in zip(before, distiller.model.parameters(), strict=True)
            )
            print("unchanged" if same else "CHANGED", file=sys.stderr, flush=True)
            raise

    train.Distiller.launch = step


def poison_teacher(bench, update: int, rank: int, value: float) -> Callable[[int], None]:
    """Make a logit of the teacher NaN or infinite, on every rank."""

    def poison(distiller) -> None:
        distiller.teacher.cls.predictions.bias.data[7] = value

    return lambda own: poison_step(poison, update)


def poison_loss(bench, update: int, rank: int, value: float) -> Callable[[int], None]:
    """Make one term of the loss NaN or infinite, on one rank."""

    def poison(distiller) -> None:
        kept = distiller.model.forward

        def forward(*arguments, **options):
            total, means_K = kept(*arguments, **options)
            return total * value, torch.cat([means_K[:1] * value, means_K[1:]])

        distiller.model.forward = forward

    return lambda own: poison_step(poison if own == rank else lambda distiller: None, update)


def poison_gradient(bench, update: int, rank: int, value: float) -> Callable[[int], None]:
    """Make a gradient NaN or infinite, on one rank; the losses stay finite."""

    def poison(distiller) -> None:
        distiller.model.student.vocab_projector.bias.register_hook(
            lambda gradient: gradient * 0 + value
        )

    return lambda own: poison_step(poison if own == rank else lambda distiller: None, update)


POISONS = {"teacher": poison_teacher, "loss": poison_loss, "gradient": poison_gradient}


def refused_weights(bench, run: Path, value: float, flags: dict, world_size: int) -> None:
    """Pass first weights that are not finite: must be refused before anything is made."""
    state = torch.load(bench.world.first_weights("bert"), weights_only=True)
    state[bench.rng.choice(sorted(state))].view(-1)[0] = value
    torch.save(state, bench.folder / "first.pth")
    argv = bench.world.flags(
        "bert", run, **flags, student_pretrained_weights=bench.folder / "first.pth"
    )
    ranks = Ranks(argv, bench.folder / "log", world_size)
    statuses, output = ranks.wait(), ranks.output()
    if set(statuses) != {2} or run.exists() or "first.pth" not in output or "Traceback" in output:
        bench.fail(f"first weights with {value}: {statuses}: {output[-500:]}")


# --------------------------------------------------------------------------------------------------
# T15: another number of processes
# --------------------------------------------------------------------------------------------------


def other_world_size(bench) -> None:
    """T15: stop, then resume with another number of ranks; other updates must be refused.

    The number of micro-batches an update stays equal, or the resumption must be refused.
    """
    before, after = ((2, 2), (1, 4)) if bench.number % 2 == 0 else ((1, 4), (2, 2))
    kind = ("bert", "gpt2")[bench.number // 2 % 2]
    for name in ("run", "whole"):
        counted = Counted(0.01)

        def plant(rank: int, name=name, counted=counted) -> None:
            counted.plant(rank)
            record_micro_batches(bench.folder / f"{name}.seen")

        argv = run_flags(bench, (kind, *before), bench.folder / name)
        ranks = Ranks(argv, bench.folder / f"{name}.log", before[0], plant)
        if name == "run":
            counted.wait_for(b".", bench.rng.randint(3, 9), ranks)
            ranks.send(signal.SIGTERM)
        ranks.wait()
    refuse_other_product(bench, kind, after)
    argv = [*run_flags(bench, (kind, *after), bench.folder / "run"), "--resume"]
    ranks = Ranks(
        argv,
        bench.folder / "after.log",
        after[0],
        lambda rank: record_micro_batches(bench.folder / "run.seen"),
    )
    statuses = ranks.wait()
    if any(statuses):
        bench.fail(f"{kind} {before} -> {after}: {statuses}: {ranks.output()[-500:]}")
        return
    compare_worlds(bench, f"{kind} {before} -> {after}")


def record_micro_batches(path: Path) -> None:
    """Write each micro-batch's number, input, labels and dropout to a file as it is computed."""
    kept = train.Distiller._backward

    def backward(distiller, batch, *arguments):
        (means_K,) = losses_MK = kept(distiller, batch, *arguments)
        tensors = {"input": batch.input_ids_BT, "labels": batch.labels_BT}
        line = [
            batch.number,
            checkpointing.content_digest(tensors),
            torch.rand(1).item(),  # drawn after dropout: identifies the state of its stream
            means_K.tolist(),
        ]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return losses_MK

    train.Distiller._backward = backward


def refuse_other_product(bench, kind: str, shape: tuple) -> None:
    """Check that another number of micro-batches an update is refused in a line with both."""
    argv = [*run_flags(bench, (kind, shape[0], shape[1] + 1), bench.folder / "run"), "--resume"]
    ranks = Ranks(argv, bench.folder / "refused.log", shape[0])
    statuses = ranks.wait()
    lines = [line for line in ranks.output().splitlines() if ": error: " in line]
    expected = rf"{(shape[1] + 1) * shape[0]} micro-batches an update, .* was made with 4"
    if set(statuses) != {2} or not lines or not re.search(expected, lines[0]):
        bench.fail(f"another product was not refused: {statuses} {lines}")


def compare_worlds(bench, what: str) -> None:
    """Compare both runs' computations, micro-batch by micro-batch, and their logged losses."""
    runs = []
    for name in ("run", "whole"):
        lines = map(json.loads, (bench.folder / f"{name}.seen").read_text().splitlines())
        runs.append({number: rest for number, *rest in lines})
    if {n: rest[:2] for n, rest in runs[0].items()} != {n: rest[:2] for n, rest in runs[1].items()}:
        bench.fail(f"{what}: other micro-batches, masks or dropout")
    pairs = [zip(runs[0][n][2], runs[1][n][2], strict=True) for n in sorted(runs[1])]
    largest = max(abs(a - b) / max(abs(b), 1e-3) for pair in pairs for a, b in pair)
    bench.note(
        "largest relative difference of a loss: "
        + (f"below 1e{math.ceil(math.log10(largest))}" if largest else "0")
    )
    if largest > 1e-5:
        bench.fail(f"{what}: a loss differs by {largest:.1e}")
