"""This process's rank, device and process group, read from a launcher's environment variables.

`start_runtime` reads the variables that a launcher has set (torchrun, torch.distributed.launch, or
none), chooses the device and joins the process group. From then on a thread of each process sends
heartbeats (`Watch`), so that a hung or lost rank is named: the errors of collectives name none.
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

from distil.system.copies import refuse_copies
from distil.system.memory import reuse_memory
from distil.system.rank_zero import TIMEOUT_S, is_one_of_several
from distil.system.versions import version_notice
from distil.system.watch import Watch
from utils import InputError, RankError, logger, one_line


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Facts of a process's start: its rank among the others, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    watch: "Watch | None" = None

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise any rank's input or system error on all ranks: none waits, and rank 0 reports."""
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
        """Return rank 0's object, which pickle must support, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def tensors_from_main(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return rank 0's tensors, on the CPU, on every rank; others' arguments are ignored."""
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
        """Convert a collective's failure to LostRankError, which names the missing ranks.

        on_orphaned: called from another thread when the launcher of this process has ended.
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
    """Another process of the run has ended or hangs."""


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


def read_launcher(
    environment: Mapping[str, str], local_rank_flag: int
) -> tuple[int, int, int, int] | None:
    """Read (rank, world size, local rank, processes a machine) from a launcher's variables.

    Returns None for a process that no launcher started: RANK and LOCAL_RANK are set if and only if
    one did. Raises InputError that names every missing, malformed or contradictory variable.
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
        refuse_copies(environment)
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


Check = tuple[bool, str]  # (is it wrong, the message)


def _check_launcher(value: Mapping[str, int], local_rank_flag: int) -> None:
    """Raise RankError or InputError for contradictory variables, on this rank or on all."""
    per_machine = value.get("N_GPU_NODE", _processes_on_machine(value))
    machines = value.get("N_NODES", max(value["WORLD_SIZE"] // max(per_machine, 1), 1))
    of_all = _checks_of_sizes(value, per_machine, machines)
    of_this_rank = _checks_of_rank(value, per_machine, machines, local_rank_flag)
    remedy = "; export the launcher's value, or unset it"
    for kind, checks in ((RankError, of_this_rank), (InputError, of_all)):
        if any(is_wrong for is_wrong, _ in checks):
            problems = [message for is_wrong, message in of_all + of_this_rank if is_wrong]
            raise kind("\n".join(message + remedy for message in problems))


def _checks_of_sizes(value: Mapping[str, int], per_machine: int, machines: int) -> list[Check]:
    world_size, has_n_gpu_node = value["WORLD_SIZE"], "N_GPU_NODE" in value
    source = "N_GPU_NODE" if has_n_gpu_node else "LOCAL_WORLD_SIZE"
    local_world_size = value.get("LOCAL_WORLD_SIZE", per_machine)
    return [
        (world_size < 1, f"WORLD_SIZE={world_size}: expected at least 1"),
        (per_machine < 1, f"{source}={per_machine}: expected at least 1"),
        (
            per_machine > max(world_size, 1),
            f"{source}={per_machine} contradicts WORLD_SIZE={world_size}",
        ),
        (
            has_n_gpu_node and local_world_size != per_machine,
            f"N_GPU_NODE={per_machine} contradicts LOCAL_WORLD_SIZE={local_world_size}",
        ),
        (
            "N_NODES" in value and machines * per_machine != world_size,
            f"N_NODES={machines} x {per_machine} processes a machine contradicts"
            f" WORLD_SIZE={world_size}",
        ),
        (
            has_n_gpu_node and world_size % max(per_machine, 1) != 0,
            f"N_GPU_NODE={per_machine} does not divide WORLD_SIZE={world_size}",
        ),
    ]


def _checks_of_rank(
    value: Mapping[str, int], per_machine: int, machines: int, local_rank_flag: int
) -> list[Check]:
    rank, world_size, local_rank = value["RANK"], value["WORLD_SIZE"], value["LOCAL_RANK"]
    machine = value.get("NODE_RANK", 0)
    expected_machine = value.get("GROUP_RANK", rank // max(per_machine, 1))
    return [
        (
            not 0 <= rank < max(world_size, 1),
            f"RANK={rank}: expected 0 to WORLD_SIZE - 1 = {world_size - 1}",
        ),
        (
            not 0 <= local_rank < max(per_machine, 1),
            f"LOCAL_RANK={local_rank}: expected 0 to {per_machine - 1}, as {per_machine} processes"
            " run on a machine",
        ),
        (
            local_rank_flag >= 0 and local_rank_flag != local_rank,
            f"--local_rank {local_rank_flag} contradicts LOCAL_RANK={local_rank}; leave the flag"
            " out",
        ),
        (
            "NODE_RANK" in value and machine != expected_machine,
            f"NODE_RANK={machine} contradicts RANK={rank}, which runs on machine"
            f" {expected_machine}",
        ),
        (
            "NODE_RANK" in value and not 0 <= machine < max(machines, 1),
            f"NODE_RANK={machine}: expected 0 to N_NODES - 1 = {machines - 1}",
        ),
    ]


def start_runtime(
    n_gpu: int,
    local_rank_flag: int,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Runtime:
    """Read the launcher's variables, choose the device, and join the process group, if any.

    n_gpu: GPUs over all processes; 0 = the CPU. timeout_s: how long processes wait for each other.
    Raises InputError where the launcher's variables are missing or contradictory, or where there
    are GPUs but too few.
    """
    launched = read_launcher(os.environ if environment is None else environment, local_rank_flag)
    rank, world_size, local_rank, per_machine = launched or (0, 1, 0, 1)
    gpus_here = torch.cuda.device_count()
    device = choose_device(
        n_gpu, world_size, local_rank, per_machine, gpus_here, launched is not None
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        reuse_memory()
    backend, watch = "nccl" if device.type == "cuda" else "gloo", None
    if launched is not None:
        store = _join_the_others(backend, rank, world_size, timeout_s)
        watch = Watch(store, rank, world_size, timeout_s) if world_size > 1 else None
    runtime = Runtime(rank, world_size, local_rank, device, watch)
    if runtime.is_main:
        notice = version_notice()
        if notice:
            logger.warning(notice)
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
    """Join the process group; return a store for this attempt alone."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        # torch would retry a wrong name until the timeout.
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        store, rank, world_size = next(distributed.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = distributed.PrefixStore(
            _agree_on_attempt(store, rank, world_size, timeout_s), store
        )
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (OSError, RuntimeError, ValueError) as error:  # wrong host, port in use, missing rank
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
    """Agree with the other ranks on a name for this attempt that no earlier attempt had.

    A launcher that restarts the processes keeps its store, with the entries of the dead ones: of 17
    restarted runs of two ranks 6 hung. Several machines' restart counts can differ. So rank 0 makes
    up a name and gives it to each rank that sends a random word, which no dead process can have
    sent.
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
    """Choose a process's device: the CPU without a GPU or with n_gpu 0.

    Raises InputError for fewer GPUs than requested.
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


def check_precision(device: torch.device, bf16: bool, fp16: bool) -> None:
    """Raise InputError where a device lacks the precision asked for; warn where it is slow."""
    can_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if bf16 and not can_bf16:
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"--bf16: {name} does not compute in bfloat16; use --fp16, or neither for float32"
        )
    # avx512_bf16, amx_bf16, or the names that other processors give them.
    capabilities = torch.cpu.get_capabilities().items()
    has_bf16 = any(value is True for name, value in capabilities if "bf16" in name)
    if bf16 and device.type == "cpu" and not has_bf16:
        logger.warning(
            "--bf16: this CPU has no instructions for bfloat16, which makes it slower than float32."
        )
    if fp16 and device.type == "cpu":
        logger.warning(
            "--fp16: on a CPU float16 is slow; --bf16 has the same size and needs no scaling."
        )
