"""The machine that figures were measured on."""

import os
import platform
from pathlib import Path

import torch
import transformers


def describe_machine(device: str, threads: int | None) -> dict:
    """Describe device, CPU, cores, load and versions.

    load: processes that want a core, mean of the last minute. threads: None for torch's choice.
    """
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    models = [
        line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")
    ]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads or torch.get_num_threads(),
        "load": os.getloadavg()[0],
        **{
            flag: flag in cpu.split()
            for flag in ("avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
