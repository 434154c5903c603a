"""Model FLOPs of an update and a device's peak FLOP/s; their ratio over time is the MFU.

Model FLOPs are those that the mathematics needs for the real tokens, without an implementation's
extra work (padding, recomputation, logits of padding). Source: Chowdhery et al., 2022, "PaLM",
appendix B.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from distil.kernels import cpu
from distil.objectives import LOSSES
from utils import logger

# --------------------------------------------------------------------------------------------------
# Model FLOPs
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """The sizes that determine a forward pass's products.

    in_layers, in_head: entries of the layers' and the prediction head's matrices. attention_width:
    heads x head width, which in some families differs from the width of the hidden states.
    """

    in_layers: int
    in_head: int
    num_layers: int
    attention_width: int

    def forward_flops(self, lengths_B: np.ndarray, num_head_rows: int | None = None) -> int:
        """Count a forward pass, with num_head_rows tokens (None: all) projected to the vocabulary.

        2 per matrix entry and token; for the attention 4 T d per token, layer and sequence of T
        tokens. Causal and windowed attention are counted as full attention, as is customary.
        """
        lengths_B = lengths_B.astype(np.int64)
        num_tokens, num_pairs = int(lengths_B.sum()), int((lengths_B**2).sum())
        num_head_rows = num_tokens if num_head_rows is None else num_head_rows
        in_products = 2 * (self.in_layers * num_tokens + self.in_head * num_head_rows)
        return in_products + 4 * self.attention_width * self.num_layers * num_pairs


def size_of(model: torch.nn.Module) -> ModelSize:
    """Count the entries of a model's matrices, without embeddings and poolers.

    Raises AttributeError or TypeError where the configuration names no layers, heads or width.
    """

    def entries(module: torch.nn.Module) -> int:
        return sum(
            m.weight.numel()
            for name, m in module.named_modules()
            if _is_matrix(m) and "pooler" not in name
        )

    config = model.config.get_text_config()
    head_width = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    in_layers = entries(model.base_model)
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    return ModelSize(in_layers, entries(model) - in_layers, num_layers, num_heads * head_width)


def _is_matrix(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and not isinstance(module, torch.nn.Embedding)
    )


TOLERANCE = 0.01
COUNTED_TOKENS = 16  # of the forward pass that shows what a model computes


def shown_size(model: torch.nn.Module, token_ids_BT: torch.Tensor) -> ModelSize | None:
    """Count a model's matrices and check by a forward pass on the CPU; None where these differ.

    A family's conventions don't tell everything: it may reuse layers (ALBERT) or pad (Longformer).
    Experts, which see some of the tokens, and convolutions have weights of more than two
    dimensions.
    """
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        return None
    was_training = model.training
    try:
        size = size_of(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(token_ids_BT)
        whole = size.forward_flops(np.full(*token_ids_BT.shape))
    # Configurations and classes can raise anything: then there is no figure.
    except Exception:
        return None
    finally:
        model.train(was_training)
    attention = (
        4 * size.attention_width * size.num_layers * token_ids_BT.numel() * token_ids_BT.shape[1]
    )
    found = counter.get_total_flops()  # without those of a fused attention, on a CPU
    return (
        size
        if any(abs(found - wanted) <= TOLERANCE * wanted for wanted in (whole, whole - attention))
        else None
    )


@dataclasses.dataclass(frozen=True)
class UpdateFlops:
    """Model FLOPs of an update.

    teacher: None where no objective reads it. head_rows: lengths_B -> rows that are projected.
    """

    teacher: ModelSize | None
    student: ModelSize
    head_rows: Callable[[np.ndarray], int]

    def of_batch(self, lengths_B: np.ndarray) -> int:
        """Count a micro-batch's model FLOPs."""
        return update_flops(self.teacher, self.student, lengths_B, self.head_rows(lengths_B))


def count_update(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    objectives: Sequence[str],
    token_ids_BT: torch.Tensor,
    mask_prop: float,
    ce_at_masks: bool,
) -> UpdateFlops | None:
    """Count what an update computes, from a sequence; None where a family does not show it.

    objectives: rows of LOSSES in use. mask_prop: share of tokens that masked-LM predicts.
    ce_at_masks: distillation reads masked positions only. Both models are on the CPU.
    """
    student_size = shown_size(student, token_ids_BT[:, :COUNTED_TOKENS])
    teacher_size = shown_size(teacher, token_ids_BT[:, :COUNTED_TOKENS])
    read_of_teacher = {LOSSES[name].reads for name in objectives if LOSSES[name].needs_teacher}
    if student_size is None or (teacher_size is None and read_of_teacher):
        logger.info(
            "How much these models compute is not known for their families: no MFU is shown."
        )
        return None
    if "logits" not in read_of_teacher:
        teacher_size = dataclasses.replace(teacher_size, in_head=0) if read_of_teacher else None
    kinds = [LOSSES[name].rows for name in objectives if LOSSES[name].reads == "logits"]
    rows = functools.partial(_head_rows, kinds, mask_prop, ce_at_masks)
    return UpdateFlops(teacher_size, student_size, rows)


def _head_rows(
    kinds: Sequence[str], mask_prop: float, ce_at_masks: bool, lengths_B: np.ndarray
) -> int:
    """Count the rows of a micro-batch that any objective on logits reads."""
    num_real = int(lengths_B.sum())
    num_masked = math.ceil(mask_prop * num_real)
    num_rows = {
        "real": num_real,
        "masked": num_masked,
        "next": num_real - len(lengths_B),
        "distilled": num_masked if ce_at_masks else num_real,
    }
    return max((num_rows[kind] for kind in kinds), default=0)


def update_flops(
    teacher: ModelSize | None,
    student: ModelSize,
    lengths_B: np.ndarray,
    num_head_rows: int | None = None,
) -> int:
    """Count an update: teacher's forward pass, student's forward and twice that for backward."""
    of_teacher = 0 if teacher is None else teacher.forward_flops(lengths_B, num_head_rows)
    return of_teacher + 3 * student.forward_flops(lengths_B, num_head_rows)


# --------------------------------------------------------------------------------------------------
# Peaks of devices
# --------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense peaks by data sheet, TFLOP/s: (tensor cores in half precision, float32 without tensor
# cores). The first name that is part of the device's name applies.
NOMINAL_PEAKS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
}


def nominal_peak(device_name: str, precision: str) -> float | None:
    """Return a GPU's peak by its data sheet, FLOP/s; None where the table lacks it."""
    for name, (half, single) in NOMINAL_PEAKS.items():
        if name in device_name:
            return 1e12 * (single if precision == "fp32" else half)
    return None


def clock_s(device: str) -> float:
    """Read the host's clock after the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(device: str, work: Callable[[], object], limit_s: float = 1.0) -> float:
    """Return the shortest of 3 to 30 runs after a warm-up: a ceiling needs the best run."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < limit_s and len(times) < 30):
        started = clock_s(device)
        work()
        times.append(clock_s(device) - started)
    return min(times)


def product_rate(left: torch.Tensor, right: torch.Tensor, limit_s: float = 1.0) -> float:
    """Measure the product of two square matrices, FLOP/s, in the fastest way that the step uses."""
    ways = [functools.partial(torch.matmul, left, right, out=torch.empty_like(left))]
    if left.device.type == "cpu" and left.dtype == torch.float32:
        ways.append(functools.partial(cpu.linear, left, right))
    return 2 * len(left) ** 3 / min(best_seconds(left.device.type, way, limit_s) for way in ways)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a device's peak, FLOP/s, by its data sheet; None where none is listed, as on a CPU.

    A peak measured at a run's start depends on what else ran just then.
    """
    if device.type != "cuda":
        return None
    precision = next(key for key, value in DTYPES.items() if value == dtype)
    return nominal_peak(torch.cuda.get_device_name(device), precision)
