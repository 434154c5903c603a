"""What transformers' conventions tell about any masked or causal language model, without a row for
its family.

Where architectures.py has a row a model type, this module finds out: which class the model has,
which lists hold its layers, what its configuration lists by layer, where the output projection and
the position table are. Then a student is made of some of a teacher's layers, as in Sanh et al.,
2019, section 3, within one architecture.

Nothing is believed that a model doesn't show: heads, padding and extracted layers are compared on a
few tokens, and what differs is refused with a line that says so.

Shape suffixes: B sequences, T padded length, N positions, V vocabulary, D width.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from utils import InputError, logger, one_line

NUM_LAYERS = "num_hidden_layers"
CHECK_TOKENS = 12
TOLERANCE = 1e-4  # relative to the largest logit, float32: other kernels may sum in another order

# --------------------------------------------------------------------------------------------------
# Configurations with fewer layers
# --------------------------------------------------------------------------------------------------


def _gpt_neo_entries(config, layers: Sequence[int]) -> dict[str, Any]:
    """GPT-Neo writes its attention by layer as [[kinds in turn], how often]."""
    return {"attention_types": [[[config.attention_layers[layer]], 1] for layer in layers]}


# What no convention tells: model type -> entries of the configuration with some of its layers.
ENTRIES: dict[str, Callable[[Any, Sequence[int]], dict[str, Any]]] = {"gpt_neo": _gpt_neo_entries}


def key_of(config, name: str) -> str:
    """Return how this type of configuration calls a common entry: num_hidden_layers -> n_layer
    (GPT-2).
    """
    return config.attribute_map.get(name, name)


def listed_by_layer(config) -> list[str]:
    """List the entries of a configuration that hold one value a layer (layer_types, windows,
    ..).
    """
    num_layers, content = getattr(config, NUM_LAYERS), config.to_dict()
    return [
        key
        for key, value in content.items()
        if isinstance(value, (list, tuple))
        and len(value) == num_layers
        and ("layer" in key or _follows(config, key))
    ]


def _follows(config, key: str) -> bool:
    """Tell whether a default configuration lists `key` by layer: its length follows the number of
    layers.
    """
    lengths = []
    for num_layers in (5, 7):
        try:
            value = getattr(type(config)(**{key_of(config, NUM_LAYERS): num_layers}), key, None)
        except Exception:  # a configuration that can't be made so
            return False
        lengths.append(len(value) if isinstance(value, (list, tuple)) else 0)
    return lengths == [5, 7]


def config_with_layers(config, layers: Sequence[int], source: str):
    """Copy a configuration, with the entries of `layers` only. Raises InputError naming `source`
    where that can't be.
    """
    content = config.to_dict()
    content |= {key: [content[key][layer] for layer in layers] for key in listed_by_layer(config)}
    content |= ENTRIES.get(config.model_type, lambda config, layers: {})(config, layers)
    content[key_of(config, NUM_LAYERS)] = len(layers)
    try:
        return type(config).from_dict(content)
    except Exception as error:
        raise InputError(
            f"{source}: no configuration of {len(layers)} layers can be made of it"
            f" ({one_line(error)})"
        ) from error


# --------------------------------------------------------------------------------------------------
# Anatomy
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Where things are in a model.

    layer_lists: module paths of the lists that hold one module a layer (XLM has four). output: path
    of the linear map from (N, D) to logits (N, V). positions, token_types: paths of these tables,
    None where there is none. reserved_positions: rows of the position table that no token uses.
    """

    layer_lists: tuple[str, ...]
    output: str
    positions: str | None
    token_types: str | None
    reserved_positions: int


def skeleton(config, is_masked: bool, source: str, trust_remote_code: bool = False) -> nn.Module:
    """Make a language model without memory for its weights.

    Raises InputError where transformers has none of the kind asked for.
    """
    auto_class = (
        transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    )
    if not (trust_remote_code and auto_class.__name__ in (getattr(config, "auto_map", None) or {})):
        _require_class(config, is_masked, source)
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"{source}: no {config.model_type} model can be made of it ({one_line(error)})"
        ) from error


def _require_class(config, is_masked: bool, source: str) -> None:
    kinds = {
        True: transformers.MODEL_FOR_MASKED_LM_MAPPING,
        False: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{source}: {config.model_type} is an encoder-decoder; expected an encoder or a decoder"
            " alone"
        )
    if type(config) in kinds[is_masked]:
        return
    names = {True: "masked", False: "causal"}
    remedy = (
        f"it has a {names[not is_masked]} one, {'leave --mlm out' if is_masked else 'add --mlm'}"
    )
    remedy = (
        remedy if type(config) in kinds[not is_masked] else "take a masked or causal language model"
    )
    raise InputError(
        f"{source}: transformers has no {names[is_masked]} language model of type"
        f" {config.model_type}; {remedy}"
    )


def anatomy(model: nn.Module, source: str) -> Anatomy:
    """Find out where things are in a model. Raises InputError naming what it lacks."""
    projection = model.get_output_embeddings()
    output = next(
        (
            path
            for path, module in model.named_modules()
            if module is projection and module is not None
        ),
        None,
    )
    if model.base_model is model or output is None or not isinstance(projection, nn.Linear):
        raise InputError(
            f"{source}: a {type(model).__name__} has no prediction head apart from its layers; take"
            " another model"
        )
    tables = [
        path
        for path, module in model.base_model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    positions = next(
        (f"{model.base_model_prefix}.{path}" for path in tables if _is_of_positions(path)), None
    )
    return Anatomy(
        layer_lists(model, source),
        output,
        positions,
        next(
            (
                f"{model.base_model_prefix}.{path}"
                for path in tables
                if "token_type" in path.lower()
            ),
            None,
        ),
        _reserved(model, positions),
    )


def _reserved(model: nn.Module, positions: str | None) -> int:
    """Count the rows of the position table up to that of padding, which it counts from (RoBERTa's
    begin at 2).
    """
    table = None if positions is None else model.get_submodule(positions)
    limit = getattr(model.config, "max_position_embeddings", None)
    return (
        0
        if table is None or table.padding_idx is None or table.num_embeddings != limit
        else table.padding_idx + 1
    )


def _is_of_positions(path: str) -> bool:
    name = path.rsplit(".", 1)[-1].lower()
    return ("pos" in name and "rel" not in name) or name == "wpe"


def layer_lists(model: nn.Module, source: str) -> tuple[str, ...]:
    """Find the lists that hold one module a layer: those that are of another length in a model of
    other depth.

    None where layers are shared or nested, or their number can't be changed.
    """
    num_layers = getattr(model.config, NUM_LAYERS, None)
    if not isinstance(num_layers, int) or num_layers < 1:
        return ()
    others = list(range(num_layers - 1)) or [0, 0]
    try:
        with torch.device("meta"):
            smaller = type(model)(config_with_layers(model.config, others, source))
    except Exception:  # what a class refuses has no end
        return ()
    lengths = {path: len(module) for path, module in _outermost_lists(smaller)}
    return tuple(
        path
        for path, module in _outermost_lists(model)
        if len(module) == num_layers and lengths.get(path) == len(others)
    )


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules that are in no other list, with their paths."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(inside)):
            inside.append(f"{path}.")
            yield path, module


# --------------------------------------------------------------------------------------------------
# Models with a part replaced
# --------------------------------------------------------------------------------------------------


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
def head(model: nn.Module, source: str) -> AnyHead:
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


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two tensors agree but for rounding."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-3))


# --------------------------------------------------------------------------------------------------
# What a model has to show
# --------------------------------------------------------------------------------------------------


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return what a model is called with besides ids and mask: no cache of keys and values, where
    it knows one.
    """
    parameters = inspect.signature(model.forward).parameters
    return (
        {"use_cache": False}
        if "use_cache" in parameters or hasattr(model.config, "use_cache")
        else {}
    )


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode for a while."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@torch.no_grad()
def check_conventions(model: nn.Module, is_masked: bool, source: str) -> None:
    """Raise InputError where a model is not what distillation takes it for.

    What is padded must not change the rest, and a causal model must not see what comes.
    """
    head(model, source)
    ids_BT = some_ids(model, 2)
    half = ids_BT.shape[1] // 2
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, half:] = 0
    try:
        with evaluating(model):
            options = without_cache(model)
            batch_BTV = model(ids_BT, attention_mask=mask_BT, **options).logits
            alone_BTV = model(ids_BT[1:, :half], **options).logits
            unmasked_BTV = model(ids_BT[1:], **options).logits
    except Exception as error:
        raise InputError(
            f"{source}: can't be called with a mask ({one_line(error)}); take another model"
        ) from error
    if not is_close(batch_BTV[1:, :half], alone_BTV):
        raise InputError(
            f"{source}: padding changes what it computes for the real tokens; take another model"
        )
    if not is_masked and not is_close(unmasked_BTV[:, :half], alone_BTV):
        raise InputError(
            f"{source}: it sees the tokens that come, so it is no causal model; add --mlm, or take"
            " another"
        )


def some_ids(model: nn.Module, num_sequences: int) -> torch.Tensor:
    """Draw token ids, (num_sequences, CHECK_TOKENS at most), none of them the padding id, from
    which some count positions.
    """
    config = model.config.get_text_config()
    length = min(
        CHECK_TOKENS, (getattr(config, "max_position_embeddings", None) or CHECK_TOKENS) - 2
    )
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(config.vocab_size, (num_sequences, max(length, 2)), generator=generator)
    ids_BT[ids_BT == pad] = (pad + 1) % config.vocab_size
    return ids_BT.to(next(model.parameters()).device)


# --------------------------------------------------------------------------------------------------
# Students of some of the teacher's layers
# --------------------------------------------------------------------------------------------------


def student_of_layers(teacher: nn.Module, layers: Sequence[int], source: str) -> nn.Module:
    """Make a student out of a teacher's layers `layers` -> 0, 1, .., with all that stands outside
    the layers.

    Compared with the teacher without its other layers. Raises InputError where layers can't be
    taken so.
    """
    lists, num_layers = layer_lists(teacher, source), getattr(teacher.config, NUM_LAYERS, None)
    if not lists:
        raise InputError(
            f"{source}: a {type(teacher).__name__} has no list of layers to choose from (shared or"
            " nested ones can't be taken apart); write the student's configuration yourself, for"
            " --student_config"
        )
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise InputError(
            f"--layers: {wrong[0] if wrong else 'none'}, but {source} has layers 0 to"
            f" {num_layers - 1}"
        )
    config = config_with_layers(teacher.config, layers, source)
    config._attn_implementation = teacher.config._attn_implementation
    try:
        student = type(teacher)(config)
    except Exception as error:
        raise InputError(
            f"{source}: no model of {len(layers)} layers can be made ({one_line(error)})"
        ) from error
    student.to(next(teacher.parameters()).dtype)
    _copy_layers(teacher, student, lists, layers, source)
    _check_layers(teacher, student, lists, layers, source)
    return student


def _copy_layers(
    teacher, student, lists: Sequence[str], layers: Sequence[int], source: str
) -> None:
    """Load the teacher's state, layer numbers changed."""
    own, state = student.state_dict(), {}
    for name, tensor in teacher.state_dict().items():
        path = next((path for path in lists if name.startswith(f"{path}.")), None)
        if path is None:
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        state |= {
            f"{path}.{new}.{rest}": tensor for new, old in enumerate(layers) if int(number) == old
        }
    outside = [name for name in own if not name.startswith(tuple(f"{path}." for path in lists))]
    resized = [name for name in outside if name in state and own[name].shape != state[name].shape]
    state = {name: tensor for name, tensor in state.items() if name not in resized}
    wrong = sorted(set(own) - set(resized) ^ set(state)) or [
        n for n in state if own[n].shape != state[n].shape
    ]
    if wrong:
        raise InputError(
            f"{source}: layers {' '.join(map(str, layers))} can't stand in other places: {wrong[0]}"
            " differs there; choose layers of one kind, in the teacher's own order of kinds"
        )
    # ESM's contact head, which reads the attention of every layer and is no part of the language
    # model
    if resized:
        logger.warning(
            "%s: %s depends on the number of layers, and starts at random.",
            source,
            ", ".join(resized),
        )
    student.load_state_dict(state, strict=False)


@torch.no_grad()
def _check_layers(
    teacher, student, lists: Sequence[str], layers: Sequence[int], source: str
) -> None:
    """Raise InputError where the student computes other logits than the teacher without its other
    layers.
    """
    cut = teacher
    for path in lists:
        kept = nn.ModuleList(teacher.get_submodule(path)[layer] for layer in layers)
        cut = replaced(cut, path, kept)
    _give_config(cut, lists, student.config)
    ids_BT, options = some_ids(teacher, 1), without_cache(teacher)
    try:
        with evaluating(teacher, student, cut):
            same = is_close(student(ids_BT, **options).logits, cut(ids_BT, **options).logits)
    except Exception as error:
        raise InputError(
            f"{source}: can't be called with fewer layers ({one_line(error)}); take another model"
        ) from error
    if not same:
        raise InputError(
            f"{source}: layers {' '.join(map(str, layers))} compute something else in the student,"
            " where they have other numbers; choose layers whose kinds follow each other as in a"
            " model of that depth"
        )


def _give_config(model: nn.Module, lists: Sequence[str], config) -> None:
    """Have the copied modules around the layers read the student's configuration."""
    model.config = config
    for path in lists:
        part = model
        for name in path.split(".")[:-1]:
            part = part._modules[name]
            if hasattr(part, "config"):
                part.config = config
