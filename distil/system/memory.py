"""Memory of a process, and what limits it.

Imports no torch: a program that only watches another one starts in no time and takes little.
Sources: proc(5), getrlimit(2); Linux's documentation of control groups, versions 1 and 2.
"""

import contextlib
import ctypes
import dataclasses
import os
import resource
from pathlib import Path

# How many compiled kernels oneDNN and torch's layer above it keep, 1,024 each by default: those of
# all shapes that a run met, up to 700 MB. A step's layers use the same few dozen.
KERNELS_KEPT = 64
KERNEL_CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
NO_LIMIT = 2**60  # control groups of version 1 write a huge number
GROUP_FILES = {  # version: file of the limit, of the use, of details; entry of what can be freed
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
    2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
}


# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of malloc.h. A heap for each thread reserves
# 64 MB of addresses, and whether a thread gets one is chance: under a limit (ulimit -v) it decides.
MALLOC = (-1, 2**31 - 1), (-3, 2**31 - 1), (-8, 1)


def reuse_memory() -> None:
    """Reuse freed memory, and keep few compiled kernels: for a process that computes on a CPU.

    By default glibc returns large freed blocks to the system at once, and each large operation
    faults its pages in again: a log-softmax of 512 x 30522 takes 20 ms rather than 4 ms. Other C
    libraries go on as they do. oneDNN heeds its number if nothing was computed yet.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        for setting in MALLOC:
            library.mallopt(*setting)


def process_memory(field: str, process: int | str = "self") -> int:
    """Read a process's memory in bytes from Linux: VmRSS, at present; VmHWM, the peak; and so on.

    0 where the process has ended, or on other systems.
    """
    with contextlib.suppress(OSError):
        return _sizes(Path(f"/proc/{process}/status")).get(field, 0)
    return 0


def _sizes(path: Path) -> dict[str, int]:
    """Read lines of the form "VmRSS:  12 kB"."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[2:] == ["kB"]}


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit of this process's memory.

    name: as in messages. num_bytes: what the process may have in all. field: of /proc/self/status,
    what is limited.
    """

    name: str
    num_bytes: int
    field: str


RESIDENT, ADDRESSES, DATA = "VmHWM", "VmPeak", "VmData"  # of the last Linux keeps no peak


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """List what limits this process: resource limits, control groups, the machine's free memory.

    root: where /proc and /sys lie.
    """
    limits = []
    for kind, name, field in (
        (resource.RLIMIT_AS, "the limit of addresses (ulimit -v)", ADDRESSES),
        (resource.RLIMIT_DATA, "the limit of data (ulimit -d)", DATA),
    ):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            limits.append(Limit(name, soft, field))
    own = process_memory("VmRSS")
    group = _group_bytes(root)
    if group is not None:
        limits.append(Limit("the control group", group + own, RESIDENT))
    with contextlib.suppress(OSError, KeyError):
        free = _sizes(root / "proc/meminfo")["MemAvailable"]
        limits.append(Limit("main memory (free now)", free + own, RESIDENT))
    return limits


def _group_bytes(root: Path) -> int | None:
    """Return what the control groups of this process leave; None where they set no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if version == 1 else "")
        inner = top / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top):
                left += _left_in(folder, version)
    return min(left, default=None)


def _left_in(folder: Path, version: int) -> list[int]:
    """Return what one control group leaves, in a list; nothing where it sets no limit."""
    limit_file, usage_file, details_file, freeable = GROUP_FILES[version]
    try:
        limit = int((folder / limit_file).read_text())
        usage = int((folder / usage_file).read_text())
        rows = (line.split() for line in (folder / details_file).read_text().splitlines())
        free = next((int(row[1]) for row in rows if row[0] == freeable), 0)
    except (OSError, ValueError):  # no such group here; "max"
        return []
    return [] if limit >= NO_LIMIT else [max(limit - max(usage - free, 0), 0)]
