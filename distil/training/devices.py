"""Whether a device can do what a run's flags ask."""

import torch

from distil.models.forward import packing_problem
from distil.system.compiler import check_compiler
from distil.system.launch import check_precision
from distil.training.config import TrainConfig
from utils import logger


def gpu_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU; None: the device is none."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def _wants_packing(config: TrainConfig, device: torch.device) -> bool:
    is_asked = device.type == "cuda" if config.pack_sequences is None else config.pack_sequences
    return is_asked and config.tokens_per_pass != 0


def packs_sequences(
    config: TrainConfig, device: torch.device, *models: torch.nn.Module
) -> bool | None:
    """Say whether passes are packed; None: where that is cheaper, as by default on a GPU.

    Where a model or an objective can't be packed a line in the log says why.
    """
    if not _wants_packing(config, device):
        return False
    for model in models:
        if problem := packing_problem(model, config.active, not config.mlm):
            logger.info("Sequences are not packed: %s.", problem)
            return False
    return config.pack_sequences


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError where the device can't do what the flags ask; name flags without effect."""
    if not config.mlm and config.restrict_ce_to_mask:
        logger.warning("--restrict_ce_to_mask has no effect without --mlm.")
    check_precision(device, config.bf16, config.fp16)
    if config.compile:
        check_compiler(device)
        if config.tokens_per_pass and not _wants_packing(config, device):
            logger.info("--compile: passes differ in shape, and are compiled for any shape.")
    if config.fp16:
        logger.info(
            "--fp16: torch's own mixed precision; --fp16_opt_level %s has no effect.",
            config.fp16_opt_level,
        )
