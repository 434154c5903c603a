"""Prediction heads: from hidden states to logits."""

import copy
import dataclasses
import functools
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from distil.models.architectures import ARCHITECTURES
from distil.models.checks import evaluating, is_close, some_ids, without_cache
from distil.system.failures import naming_failures
from utils import InputError

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class PredictionHead:
    """Map last hidden states to logits: the head's own layers, then a linear map."""

    transform: Callable[[torch.Tensor], torch.Tensor]
    projection: torch.nn.Linear

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NV."""
        return self.projection(self.transform(hidden_ND))


@dataclasses.dataclass(frozen=True)
class FirstEntries:
    """A head's logits for the first num_entries of its vocabulary; the rows beyond pad its table.

    Transform and projection exist if the head has them. The projection is cut when it is read: the
    head's parameters may move to another device or precision.
    """

    head: Head
    num_entries: int

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NE."""
        return self.head(hidden_ND)[:, : self.num_entries]

    def __getattr__(self, name: str):
        if name == "transform":
            return self.head.transform
        if name == "projection":
            return _first_rows(self.head.projection, self.num_entries)
        raise AttributeError(name)


def _first_rows(projection: nn.Linear, num_entries: int) -> types.SimpleNamespace:
    """Cut a linear map's weight and bias, without a copy."""
    bias = None if projection.bias is None else projection.bias[:num_entries]
    return types.SimpleNamespace(weight=projection.weight[:num_entries], bias=bias)


def prediction_head(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a model's prediction head: hidden_ND -> logits_NV.

    Raises InputError if it cannot be separated from the layers.
    """
    row = ARCHITECTURES.get(model.config.model_type)
    if row is None or type(model).__name__ != row.model_class:
        return head_by_convention(model, f"{type(model).__name__}")
    transform = functools.partial(row.transform, model)
    return PredictionHead(transform, model.get_submodule(row.projection))


def head_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """List the parameters that the prediction head reads, including a shared embedding table."""
    of_base = {id(parameter) for parameter in model.base_model.parameters()}
    own = [parameter for parameter in model.parameters() if id(parameter) not in of_base]
    output = model.get_output_embeddings().parameters()
    return own + [parameter for parameter in output if id(parameter) in of_base]


def own_head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters outside the base model, by each of their names; no shared table."""
    of_base = {id(parameter) for parameter in model.base_model.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) not in of_base}


def train_head_alone(model: nn.Module, source: str) -> None:
    """Freeze all but the prediction head's own parameters; tied embeddings are frozen, too.

    Raises InputError naming `source` where the head has none.
    """
    own = own_head_parameters(model).values()
    if not own:
        raise InputError(
            f"{source}: the head of a {type(model).__name__} is its table of embeddings, with no"
            " parameters beside it to train alone; leave out --train_head_only"
        )
    model.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)


def replaced(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Copy a model with another part at `path`; all other parameters are shared."""
    name, _, rest = path.partition(".")
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    copied._modules[name] = replaced(model._modules[name], rest, part) if rest else part
    return copied


class _Hidden(BaseModelOutput):
    """A base model's output with only the last hidden state; other fields are None."""

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def _returning_inputs(base: nn.Module) -> nn.Module:
    """Copy a base model so that it returns its input embeddings as last hidden state."""

    def forward(*unused, inputs_embeds=None, **others) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)

    stub = copy.copy(base)
    stub._compiled_call_impl = None  # a compiled base model would ignore the new forward
    stub.forward = forward
    return stub


@dataclasses.dataclass(frozen=True)
class AnyHead:
    """Map last hidden states to logits by a model's own forward, with its scales, caps and biases.

    base: path of the part that computes the hidden states. output: path of the last linear map if
    nothing follows it; then transform and projection exist, which the memory-efficient head needs.
    None: the map is known only as a whole.
    """

    model: nn.Module
    base: str
    output: str | None = None

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return logits_NV."""
        return self._logits(self.model, hidden_ND)

    def _logits(self, model: nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
        stub = _returning_inputs(model.get_submodule(self.base))
        alone = replaced(model, self.base, stub)
        options = without_cache(model)
        return alone(inputs_embeds=hidden_ND[None], return_dict=True, **options).logits[0]

    def __getattr__(self, name: str):
        if name in ("transform", "projection") and self.output is not None:
            return self._transform if name == "transform" else self.model.get_submodule(self.output)
        raise AttributeError(name)

    def _transform(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self._logits(replaced(self.model, self.output, nn.Identity()), hidden_ND)


@torch.no_grad()
def head_by_convention(model: nn.Module, source: str) -> AnyHead:
    """Find a head that reproduces a model's logits; with transform and projection if possible.

    Raises InputError if the logits depend on more than the last hidden state.
    """
    with evaluating(model):
        ids_BT = some_ids(model, 1)
        what = f"{source}: cannot be called as a language model"
        with naming_failures(what, "; take another"):
            base, options = model.base_model, without_cache(model.base_model)
            hidden_ND = base(ids_BT, **options).last_hidden_state[0]
            logits_NV = model(ids_BT, **without_cache(model)).logits[0]
        output = path_of(model, model.get_output_embeddings())
        paths = model.base_model_prefix, path_of(model, _decoder_of(model))
        for path in filter(None, dict.fromkeys(paths)):
            for candidate in (AnyHead(model, path, output), AnyHead(model, path)):
                if _reproduces(candidate, hidden_ND, logits_NV):
                    return candidate
    raise InputError(
        f"{source}: its logits depend on more than the last hidden state; take another model"
    )


def _decoder_of(model: nn.Module) -> nn.Module | None:
    """Return a model's decoder, which some models call directly (OPT), or None."""
    try:
        return model.get_decoder()
    except Exception:  # models without a decoder raise various errors
        return None


def _reproduces(head: AnyHead, hidden_ND: torch.Tensor, logits_NV: torch.Tensor) -> bool:
    """Test whether a head, and its two parts if it has them, give the model's logits."""
    try:
        if not is_close(head(hidden_ND), logits_NV):
            return False
        # A cap changes only large logits.
        scaled = [hidden_ND * factor for factor in (1, 100, 10000) if head.output is not None]
        return all(
            is_close(head.projection(head.transform(one_ND)), head(one_ND)) for one_ND in scaled
        )
    except Exception:  # the head reads the projection's weight, or does not call this base
        return False


def path_of(model: nn.Module, part: nn.Module | None) -> str | None:
    """Return the path of a part in a model, or None."""
    return next((path for path, module in model.named_modules() if path and module is part), None)
