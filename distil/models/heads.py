"""Prediction heads: from hidden states to logits."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from distil.models.architectures import ARCHITECTURES

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class PredictionHead:
    """A model's way from last hidden states to logits: its own layers, then a linear map."""

    transform: Callable[[torch.Tensor], torch.Tensor]
    projection: torch.nn.Linear

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NV."""
        return self.projection(self.transform(hidden_ND))


def prediction_head(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Find a model's prediction head: hidden_ND -> logits_NV. Raises InputError where it can't be
    told from the layers.
    """
    row = ARCHITECTURES.get(model.config.model_type)
    if row is None or type(model).__name__ != row.model_class:
        from distil.models import conventions

        return conventions.head(model, f"{type(model).__name__}")
    return PredictionHead(
        functools.partial(row.transform, model), model.get_submodule(row.projection)
    )


def head_of(model: torch.nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Project last hidden states to the vocabulary with the model's own prediction head:
    logits_NV.
    """
    return prediction_head(model)(hidden_ND)


def head_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """List the parameters that the prediction head reads, the embedding table that it shares
    included.
    """
    of_base = {id(parameter) for parameter in model.base_model.parameters()}
    own = [parameter for parameter in model.parameters() if id(parameter) not in of_base]
    output = [
        parameter
        for parameter in model.get_output_embeddings().parameters()
        if id(parameter) in of_base
    ]
    return own + output
