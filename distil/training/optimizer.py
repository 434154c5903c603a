"""The optimizer: which parameters are decayed, and its moments' place in memory."""

import torch
from torch import nn

ADAM_BETAS = (0.9, 0.98)


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """Make the moments now, before anything short-lived: made in the first update they would lie
    scattered among it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros(
                (), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu"
            )
            optimizer.state[parameter] = {"step": step, **moments}


def split_for_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group the trained parameters: decayed, and not decayed (biases and layer norms). Embeddings
    are decayed.

    Differs from the original: layer norms are told by their module. 2019 looked for the text
    "LayerNorm.weight", and so decayed DistilBERT's, GPT-2's and the RoBERTa head's.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__.endswith("Norm")
        for parameter in module.parameters(recurse=False)
    }
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = id(parameter) in norms or name.split(".")[-1] == "bias"
            (kept if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
