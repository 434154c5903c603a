"""Whether torch.compile works on this machine."""

import functools

import torch

from utils import InputError, logger, one_line


@functools.cache
def _problem(device: torch.device) -> str | None:
    try:
        torch.compile(lambda x: (x * 2).sin())(torch.ones(8, device=device))
    except Exception as error:
        return (
            f"torch.compile fails on this machine ({one_line(error)}); install a C++ compiler (for"
            " a GPU Triton, too)"
        )
    return None


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile fails on this machine, before folders are moved."""
    if problem := _problem(device):
        raise InputError(f"--compile: {problem}, or leave it out")


@functools.cache  # one warning
def compiles_on_gpu(device: torch.device) -> bool:
    """True for a GPU where torch.compile works; a warning for one where it does not."""
    if device.type != "cuda":
        return False
    if problem := _problem(device):
        logger.warning("Objectives on logits run uncompiled, which is slower: %s.", problem)
    return problem is None
