"""Which process this is, where it computes, how it meets the others, and how it learns that it is
to stop.

`start_runtime` reads what a launcher left in the environment (torchrun, torch.distributed.launch,
or nothing), chooses the device and joins the process group. From then on a thread of each process
sends heartbeats (`Watch`), so that one that hangs or is gone is named: the collectives' own errors
name none. `StopSignals` notes what asks the run to end.
"""

import contextlib
import dataclasses
import datetime
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import distributed

from distil.system.watch import Watch
from utils import InputError, RankError, logger, one_line

TIMEOUT_S = 600  # that processes wait for each other


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What is found out when a process starts: its place among the others, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    watch: "Watch | None" = None

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks to the user."""
        return self.rank == 0

    @contextlib.contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Raise an input or system error of any rank on every rank: none is left waiting, and rank
        0 can say it.
        """
        problem = None
        try:
            yield
        except InputError as error:
            problem = str(error)
        except OSError as error:
            problem = one_line(error, limit=None)
        if self.world_size == 1:
            if problem:
                raise InputError(problem)
            return
        problems: list[str | None] = [None] * self.world_size
        distributed.all_gather_object(problems, problem)
        lines = {line: None for text in problems if text for line in text.splitlines()}
        if lines:
            raise InputError("\n".join(lines))

    def from_main(self, value):
        """Give every rank the object of rank 0 (one that pickle knows)."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def tensors_from_main(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give every rank the tensors of rank 0, on the CPU; on other ranks the argument is not
        looked at.
        """
        shapes = self.from_main(
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        )
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = (tensors[name] if self.is_main else torch.empty(shape, dtype=dtype)).to(
                self.device
            )
            if self.world_size > 1:
                distributed.broadcast(tensor, src=0)
            received[name] = tensor.cpu()
        return received

    @contextlib.contextmanager
    def watching(self, on_orphaned: Callable[[], None]) -> Iterator[None]:
        """Turn a collective's failure into LostRankError, which says who is missing.

        on_orphaned: called, from another thread, where the launcher that started this process is
        gone.
        """
        if self.watch is not None:
            self.watch.on_orphaned = on_orphaned
        try:
            yield
        except RuntimeError as error:
            if self.watch is None or not _is_of_collective(error):
                raise
            raise LostRankError(f"{self.watch.describe()} ({one_line(error)})") from error
        finally:
            if self.watch is not None:
                self.watch.close()


class LostRankError(RuntimeError):
    """Another process of the run is gone, or hangs."""


def _is_of_collective(error: RuntimeError) -> bool:
    signs = (
        "gloo",
        "NCCL",
        "Connection closed",
        "Connection reset",
        "Broken pipe",
        "Timed out waiting",
        "Socket",
        "recvValue",
    )
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)


LAUNCHER_REMEDY = (
    "start with torchrun or python -m torch.distributed.launch, or unset it for a single process"
)


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """True in a process that a launcher started: one for which RANK and LOCAL_RANK are set."""
    return bool(environment.get("RANK") and environment.get("LOCAL_RANK"))


def is_another_rank(environment: Mapping[str, str]) -> bool:
    """True in a process that is one of several and not rank 0."""
    return is_one_of_several(environment) and environment["RANK"] != "0"


def read_launcher(
    environment: Mapping[str, str], local_rank_flag: int
) -> tuple[int, int, int, int] | None:
    """Read (rank, world size, local rank, processes on this machine) from a launcher's variables.

    Returns None for a process that no launcher started: it is one of several if and only if RANK
    and LOCAL_RANK are set. Raises InputError that names every variable missing, malformed or
    contradicting another.
    """
    if not is_one_of_several(environment):
        if local_rank_flag >= 0:
            missing = " and ".join(
                name for name in ("RANK", "LOCAL_RANK") if not environment.get(name)
            )
            raise RankError(
                f"--local_rank {local_rank_flag}: {missing} not set in the environment;"
                f" {LAUNCHER_REMEDY}"
            )
        return None
    problems = [
        f"{name} is not set though RANK and LOCAL_RANK are; {LAUNCHER_REMEDY}"
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not environment.get(name)
    ]
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "N_GPU_NODE",
        "N_NODES",
        "NODE_RANK",
        "MASTER_PORT",
    )
    value: dict[str, int] = {}
    for name in names:
        if environment.get(name):
            try:
                value[name] = int(environment[name])
            except ValueError:
                problems.append(
                    f"{name}={environment[name]}: not a whole number; {LAUNCHER_REMEDY}"
                )
    if not 1 <= value.get("MASTER_PORT", 1) <= 65535:
        problems.append(
            f"MASTER_PORT={value['MASTER_PORT']}: expected 1 to 65535; {LAUNCHER_REMEDY}"
        )
    if problems:
        raise RankError("\n".join(problems))
    _check_launcher(value, local_rank_flag)
    return value["RANK"], value["WORLD_SIZE"], value["LOCAL_RANK"], _processes_on_machine(value)


def _processes_on_machine(value: Mapping[str, int]) -> int:
    if "LOCAL_WORLD_SIZE" in value or "N_GPU_NODE" in value:
        return value.get("LOCAL_WORLD_SIZE", value.get("N_GPU_NODE"))
    return max(value["WORLD_SIZE"] // max(value.get("N_NODES", 1), 1), 1)


def _check_launcher(value: Mapping[str, int], local_rank_flag: int) -> None:
    """Raise RankError or InputError for variables that contradict each other, on this rank or on
    all.
    """
    rank, world_size, local_rank = value["RANK"], value["WORLD_SIZE"], value["LOCAL_RANK"]
    per_machine = value.get("N_GPU_NODE", _processes_on_machine(value))
    source = "N_GPU_NODE" if "N_GPU_NODE" in value else "LOCAL_WORLD_SIZE"
    machines = value.get("N_NODES", max(world_size // max(per_machine, 1), 1))
    machine = value.get("NODE_RANK", 0)
    expected_machine = value.get("GROUP_RANK", rank // max(per_machine, 1))
    of_all = [
        (world_size < 1, f"WORLD_SIZE={world_size}: at least 1 is expected"),
        (per_machine < 1, f"{source}={per_machine}: at least 1 is expected"),
        (
            per_machine > max(world_size, 1),
            f"{source}={per_machine} contradicts WORLD_SIZE={world_size}",
        ),
        (
            "N_GPU_NODE" in value and value.get("LOCAL_WORLD_SIZE", per_machine) != per_machine,
            (
                f"N_GPU_NODE={per_machine} contradicts"
                f" LOCAL_WORLD_SIZE={value.get('LOCAL_WORLD_SIZE')}"
            ),
        ),
        (
            "N_NODES" in value and machines * per_machine != world_size,
            (
                f"N_NODES={machines} x {per_machine} processes a machine contradicts"
                f" WORLD_SIZE={world_size}"
            ),
        ),
        (
            "N_GPU_NODE" in value and world_size % max(per_machine, 1) != 0,
            f"N_GPU_NODE={per_machine} does not divide WORLD_SIZE={world_size}",
        ),
    ]
    of_this_rank = [
        (
            not 0 <= rank < max(world_size, 1),
            f"RANK={rank}: expected 0 to WORLD_SIZE - 1 = {world_size - 1}",
        ),
        (
            not 0 <= local_rank < max(per_machine, 1),
            (
                f"LOCAL_RANK={local_rank}: expected 0 to {per_machine - 1}, for {per_machine}"
                " processes run on a machine"
            ),
        ),
        (
            local_rank_flag >= 0 and local_rank_flag != local_rank,
            (
                f"--local_rank {local_rank_flag} contradicts LOCAL_RANK={local_rank}; leave the"
                " flag out"
            ),
        ),
        (
            "NODE_RANK" in value and machine != expected_machine,
            (
                f"NODE_RANK={machine} contradicts RANK={rank}, which runs on machine"
                f" {expected_machine}"
            ),
        ),
        (
            "NODE_RANK" in value and not 0 <= machine < max(machines, 1),
            f"NODE_RANK={machine}: expected 0 to N_NODES - 1 = {machines - 1}",
        ),
    ]
    remedy = "; export what the launcher is told, or unset it"
    for kind, checks in ((RankError, of_this_rank), (InputError, of_all)):
        if any(is_wrong for is_wrong, _ in checks):
            raise kind(
                "\n".join(
                    message + remedy for is_wrong, message in of_all + of_this_rank if is_wrong
                )
            )


def start_runtime(
    n_gpu: int,
    local_rank_flag: int,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Runtime:
    """Find out which process this is, choose its device, and join the others where there are any.

    n_gpu: GPUs over all processes; 0 = the CPU. timeout_s: how long processes wait for each other.
    Raises InputError where the launcher's variables are missing or contradict each other, or where
    there are GPUs but too few.
    """
    launched = read_launcher(os.environ if environment is None else environment, local_rank_flag)
    rank, world_size, local_rank, per_machine = launched or (0, 1, 0, 1)
    gpus_here = torch.cuda.device_count()
    device = choose_device(
        n_gpu, world_size, local_rank, per_machine, gpus_here, launched is not None
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, watch = "nccl" if device.type == "cuda" else "gloo", None
    if launched is not None:
        store = _join_the_others(backend, rank, world_size, timeout_s)
        watch = Watch(store, rank, world_size, timeout_s) if world_size > 1 else None
    runtime = Runtime(rank, world_size, local_rank, device, watch)
    if runtime.is_main:
        wanted_gpu = n_gpu > 0 and device.type == "cpu"
        where = "the GPU" if device.type == "cuda" else "the CPU"
        how = f"{world_size} processes, {backend}" if launched is not None else "one process"
        logger.info(
            "%s on %s%s.",
            how,
            where,
            f" (--n_gpu {n_gpu}, but this machine has no GPU)" if wanted_gpu else "",
        )
    return runtime


def _join_the_others(
    backend: str, rank: int, world_size: int, timeout_s: float
) -> distributed.Store:
    """Join the process group; return a store that this attempt has for itself."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        socket.getaddrinfo(
            os.environ["MASTER_ADDR"], None
        )  # torch would look for the name until the timeout
        store, rank, world_size = next(distributed.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = distributed.PrefixStore(
            _agree_on_attempt(store, rank, world_size, timeout_s), store
        )
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no such host, port in use, a rank that never came
        where = (
            f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}"
            f" MASTER_PORT={os.environ.get('MASTER_PORT')}"
        )
        raise RankError(
            f"{where}: the processes could not meet ({one_line(error)}); check address, port and"
            " every rank"
        ) from error
    return store


def _agree_on_attempt(
    store: distributed.Store, rank: int, world_size: int, timeout_s: float
) -> str:
    """Agree with the others of this attempt on a name that no earlier attempt had.

    A launcher that starts the processes again keeps its store, with all that the dead ones left in
    it: of 17 restarted runs of two ranks 6 hung. Nor do several machines count attempts alike. So
    rank 0 invents a name, and tells it to those who greet with a word of their own, which no dead
    process can have said.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        _welcome(store, word, set(range(1, world_size)), deadline)
        return word
    store.set(f"hello/{rank}", word)
    while time.monotonic() < deadline:
        if store.check([f"welcome/{rank}"]):
            greeted, attempt = store.get(f"welcome/{rank}").decode().split(":")
            if greeted == word:
                store.set(f"joined/{attempt}/{rank}", "")
                return attempt
        time.sleep(0.02)
    raise RuntimeError(f"rank 0 did not answer within {timeout_s:g} s")


def _welcome(store: distributed.Store, attempt: str, waiting: set[int], deadline: float) -> None:
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"joined/{attempt}/{rank}"]):
                waiting.discard(rank)
            elif store.check([f"hello/{rank}"]):
                store.set(f"welcome/{rank}", f"{store.get(f'hello/{rank}').decode()}:{attempt}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(waiting)))} did not come")
        time.sleep(0.02 if waiting else 0)


def choose_device(
    n_gpu: int,
    world_size: int,
    local_rank: int,
    per_machine: int,
    gpus_here: int,
    is_launched: bool,
) -> torch.device:
    """Choose a process's device. No GPU, or n_gpu 0: the CPU. GPUs, but fewer than asked for:
    InputError.
    """
    if n_gpu == 0 or gpus_here == 0:
        return torch.device("cpu")
    if n_gpu > 1 and not is_launched:
        raise InputError(
            f"--n_gpu {n_gpu}: this is a single process; start {n_gpu} with torchrun"
            f" --nproc_per_node={n_gpu}"
        )
    if n_gpu > 1 and n_gpu != world_size:
        raise InputError(
            f"--n_gpu {n_gpu} contradicts WORLD_SIZE={world_size}; pass --n_gpu {world_size}"
        )
    if per_machine > gpus_here:
        raise InputError(
            f"{per_machine} processes on this machine, which has {gpus_here} GPU(s): one GPU a"
            f" process is expected; start {gpus_here} process(es), or pass --n_gpu 0 for the CPU"
        )
    return torch.device("cuda", local_rank)


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile does not work on this machine: better now than after
    moving folders.
    """
    try:
        torch.compile(lambda x: (x * 2).sin())(torch.ones(8, device=device))
    except Exception as error:
        raise InputError(
            f"--compile: torch.compile fails on this machine ({one_line(error)}); install a C++"
            " compiler (for a GPU Triton, too), or leave it out"
        ) from error
