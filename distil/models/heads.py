"""Prediction heads: from hidden states to logits."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from distil.models.architectures import ARCHITECTURES
from distil.models.checks import evaluating, is_close, some_ids, without_cache
from utils import InputError, one_line

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
        return head_by_convention(model, f"{type(model).__name__}")
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


def replaced(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Copy a model so that it shares every parameter with the original, but has another part at
    `path`.
    """
    name, _, rest = path.partition(".")
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    copied._modules[name] = replaced(model._modules[name], rest, part) if rest else part
    return copied


class _Hidden(BaseModelOutput):
    """A base model's output of which only the last hidden state is there."""

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def _passing_on(base: nn.Module) -> nn.Module:
    """Copy a base model so that it returns the embeddings that it is given as its last hidden
    state.
    """
    stub = copy.copy(base)
    stub._compiled_call_impl = None  # else a compiled base model goes its own way
    stub.forward = lambda *unused, inputs_embeds=None, **others: _Hidden(
        last_hidden_state=inputs_embeds
    )
    return stub


@dataclasses.dataclass(frozen=True)
class AnyHead:
    """A model's way from last hidden states to logits, by the model's own forward: whatever it
    scales, caps or adds.

    base: path of the part that makes the hidden states. output: path of the linear map at the end,
    where all else stands before it; then transform and projection exist, which the memory-efficient
    head needs. None: the way is known as a whole only.
    """

    model: nn.Module
    base: str
    output: str | None = None

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NV."""
        return self._logits(self.model, hidden_ND)

    def _logits(self, model: nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
        alone = replaced(model, self.base, _passing_on(model.get_submodule(self.base)))
        return alone(
            inputs_embeds=hidden_ND[None], return_dict=True, **without_cache(model)
        ).logits[0]

    def __getattr__(self, name: str):
        if name in ("transform", "projection") and self.output is not None:
            return self._transform if name == "transform" else self.model.get_submodule(self.output)
        raise AttributeError(name)

    def _transform(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self._logits(replaced(self.model, self.output, nn.Identity()), hidden_ND)


@torch.no_grad()
def head_by_convention(model: nn.Module, source: str) -> AnyHead:
    """Find a model's head, by comparing with its logits; with transform and projection where the
    last map comes last.

    Raises InputError where logits are more than a function of the last hidden state.
    """
    with evaluating(model):
        ids_BT = some_ids(model, 1)
        try:
            hidden_ND = model.base_model(
                ids_BT, **without_cache(model.base_model)
            ).last_hidden_state[0]
            logits_NV = model(ids_BT, **without_cache(model)).logits[0]
        except Exception as error:
            raise InputError(
                f"{source}: can't be called as a language model ({one_line(error)}); take another"
            ) from error
        output = path_of(model, model.get_output_embeddings())
        for base in dict.fromkeys((model.base_model_prefix, path_of(model, _decoder_of(model)))):
            for candidate in (AnyHead(model, base, output), AnyHead(model, base)) if base else ():
                if _gives(candidate, hidden_ND, logits_NV):
                    return candidate
    raise InputError(
        f"{source}: its logits are more than a prediction head on the last hidden state; take"
        " another model"
    )


def _decoder_of(model: nn.Module) -> nn.Module | None:
    """Return what a model calls its decoder; some heads go round the base model to it (OPT's)."""
    try:
        return model.get_decoder()
    except Exception:  # not every model has one
        return None


def _gives(head: AnyHead, hidden_ND: torch.Tensor, logits_NV: torch.Tensor) -> bool:
    try:
        if not is_close(head(hidden_ND), logits_NV):
            return False
        # A cap on logits shows only where they are large.
        scaled = [hidden_ND * factor for factor in (1, 100, 10000) if head.output is not None]
        return all(
            is_close(head.projection(head.transform(one_ND)), head(one_ND)) for one_ND in scaled
        )
    except Exception:  # a head that reads the map's weight itself, or does not call this base
        return False


def path_of(model: nn.Module, part: nn.Module | None) -> str | None:
    """Return the path of a part of a model; None where it is none."""
    return next((path for path, module in model.named_modules() if path and module is part), None)
