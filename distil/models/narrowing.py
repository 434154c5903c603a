"""Narrower students: a model with some of its width, neurons and heads, chosen by importance.

Importance is that of activations on a text: the mean over positions of their L2 norm over the
sequences (Muralidharan et al., 2024, "Minitron", section 2.2), of the feed-forward layer's neurons
and attention's heads where they enter the layer's last map, of the width where it enters attention
and feed-forward layer. Without a text it is the L2 norm of the weights.

A width that is kept is the same one in every layer, for the layers add to it; neurons and heads are
chosen for each layer. What is kept stays in its order, so that all kept is the same model.

Shape suffixes: B sequences, T padded length, D width, F neurons, H heads.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distil.data.batches import MicroBatch, to_device
from distil.models.checks import evaluating, is_close, some_ids, without_cache
from distil.models.conventions import key_of, layer_lists
from distil.models.forward import last_hidden_state
from distil.models.layer_readings import blocks_of
from distil.system.failures import naming_failures
from utils import InputError


@dataclasses.dataclass(frozen=True)
class Parts:
    """Names, within a layer, of the linear maps around attention heads and neurons.

    qkv, up: maps to the queries, keys and values, and to the neurons. out, down: maps from both
    back to the width. fused_qkv, fused_up: parts that one map concatenates, each as wide.
    """

    qkv: Sequence[str]
    out: str
    up: Sequence[str]
    down: str
    fused_qkv: int = 1
    fused_up: int = 1


BERT = Parts(
    qkv=["attention.self.query", "attention.self.key", "attention.self.value"],
    out="attention.output.dense",
    up=["intermediate.dense"],
    down="output.dense",
)
LLAMA = Parts(
    qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    out="self_attn.o_proj",
    up=["mlp.gate_proj", "mlp.up_proj"],
    down="mlp.down_proj",
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "modernbert": Parts(*(["attn.Wqkv"], "attn.Wo", ["mlp.Wi"], "mlp.Wo"), fused_qkv=3, fused_up=2),
    "gpt2": Parts(*(["attn.c_attn"], "attn.c_proj", ["mlp.c_fc"], "mlp.c_proj"), fused_qkv=3),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Width, neurons, heads, heads of keys and values, and the width of a head."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_width: int

    @classmethod
    def of(cls, config) -> "Sizes":
        """Read a configuration."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        intermediate = getattr(config, "intermediate_size", None)
        if config.model_type == "gpt2":
            intermediate = config.n_inner or 4 * hidden
        return cls(
            hidden,
            intermediate,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or hidden // heads,
        )


def wanted_sizes(
    config, hidden: int | None, intermediate: int | None, heads: int | None, source: str
) -> Sizes:
    """Return a student's sizes; None: the teacher's, or for heads what the width admits.

    Heads are cut whole and keep their width: where a family's configuration derives it from the
    model's width, the number of heads follows. Raises InputError.
    """
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{source}: cannot make a {config.model_type} narrower; expected one of"
            f" {', '.join(FAMILIES)}: leave --hidden_size, --intermediate_size, --num_heads out"
        )
    own = Sizes.of(config)
    if heads is None:
        follows = hidden is not None and not _has_head_width(config)
        heads = hidden // own.head_width if follows else own.heads
    hidden = own.hidden if hidden is None else hidden
    intermediate = own.intermediate if intermediate is None else intermediate
    key_heads = own.key_heads * heads // own.heads
    found = Sizes(hidden, intermediate, heads, key_heads, own.head_width)
    for flag, value, most in (
        ("hidden_size", found.hidden, own.hidden),
        ("intermediate_size", found.intermediate, own.intermediate),
        ("num_heads", found.heads, own.heads),
    ):
        if not 1 <= value <= most:
            raise InputError(f"--{flag} {value}: expected 1 to {most}, as {source} has")
    group = own.heads // own.key_heads
    if found.heads % group:
        raise InputError(
            f"--num_heads {found.heads}: {source} has {group} heads for each of keys and values;"
            f" expected a multiple of {group}"
        )
    if not _has_head_width(config) and found.heads * own.head_width != found.hidden:
        raise InputError(
            f"--num_heads {found.heads}, --hidden_size {found.hidden}: heads keep their width"
            f" {own.head_width}, and a {config.model_type}'s configuration holds no other than"
            f" hidden_size / heads; give --hidden_size {found.heads * own.head_width}"
        )
    return found


def _has_head_width(config) -> bool:
    return config.model_type in FAMILIES and FAMILIES[config.model_type] is LLAMA


# --------------------------------------------------------------------------------------------------
# Importance
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Importance:
    """A score of each entry of the width, and of each layer's neurons and heads."""

    hidden_D: torch.Tensor
    neurons: Sequence[torch.Tensor]
    heads: Sequence[torch.Tensor]


class _Norms:
    """Sums of squares of what enters some maps, by position: (T, width) each."""

    def __init__(self):
        self.squares: dict[tuple[str, int], torch.Tensor] = {}
        self.real_BT = torch.zeros(0, dtype=torch.bool)

    def hook(self, kind: str, layer: int):
        """Make a hook that adds a map's input."""

        def add(module, inputs) -> None:
            values = inputs[0].detach().float()
            if values.dim() == 2:  # without padding
                return self._add((kind, layer), values[None], self.real_BT[:1])
            return self._add((kind, layer), values, self.real_BT)

        return add

    def _add(self, key, values_BTX: torch.Tensor, real_BT: torch.Tensor) -> None:
        sums_TX = (values_BTX.square() * real_BT[..., None]).sum(0).double()
        before = self.squares.get(key)
        if before is not None:
            longest = max(len(before), len(sums_TX))
            pad = [nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x in (before, sums_TX)]
            sums_TX = pad[0] + pad[1]
        self.squares[key] = sums_TX

    def scores(self, kind: str, layer: int) -> torch.Tensor:
        """Return the mean over positions of the L2 norm over sequences."""
        return self.squares[kind, layer].sqrt().mean(0)


@torch.no_grad()
def importance_by_activations(model: nn.Module, batches: Iterable[MicroBatch]) -> Importance:
    """Score by what the parts of a model put out on a text: see the module's docstring."""
    sizes, parts, norms, handles = Sizes.of(model.config), parts_of(model), _Norms(), []
    layers = blocks_of(model)
    for number, layer in enumerate(layers):
        places = {"neurons": parts.down, "heads": parts.out}
        places |= {"attention": parts.qkv[0], "feed-forward": parts.up[0]}
        for kind, name in places.items():
            hook = norms.hook(kind, number)
            handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    try:
        with evaluating(model):
            for batch in batches:
                real_BT = torch.zeros(batch.input_ids_BT.shape, dtype=torch.bool)
                real_BT.view(-1)[batch.rows["real"]] = True
                norms.real_BT = to_device(real_BT, next(model.parameters()).device)
                last_hidden_state(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    numbers = range(len(layers))
    kinds = ("attention", "feed-forward")
    hidden_D = sum(norms.scores(kind, number) for kind in kinds for number in numbers)
    heads = [norms.scores("heads", n).unflatten(0, (sizes.heads, -1)).norm(dim=1) for n in numbers]
    return Importance(hidden_D, [norms.scores("neurons", n) for n in numbers], heads)


@torch.no_grad()
def importance_by_weights(model: nn.Module) -> Importance:
    """Score by the L2 norm of the weights that an entry is multiplied with."""
    sizes, parts = Sizes.of(model.config), parts_of(model)
    neurons, heads, squares_D = [], [], torch.zeros(sizes.hidden, dtype=torch.float64)
    for layer in blocks_of(model):
        neurons.append(_norm_of_inputs(layer.get_submodule(parts.down)))
        of_out = _norm_of_inputs(layer.get_submodule(parts.out))
        heads.append(of_out.unflatten(0, (sizes.heads, -1)).norm(dim=1))
        for name in (*parts.qkv, *parts.up):
            squares_D += _norm_of_inputs(layer.get_submodule(name)).square()
    return Importance(squares_D.sqrt(), neurons, heads)


def _norm_of_inputs(linear: nn.Module) -> torch.Tensor:
    """Return the norm of the weights of each input, float64."""
    is_transposed = isinstance(linear, Conv1D)
    return linear.weight.double().norm(dim=1 if is_transposed else 0).cpu()


def parts_of(model: nn.Module) -> Parts:
    """Return the names of a family's parts."""
    return FAMILIES[model.config.model_type]


# --------------------------------------------------------------------------------------------------
# The cut
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kept:
    """Indices that are kept, ascending: of the width, and of each layer's neurons and heads."""

    hidden_D: torch.Tensor
    neurons: Sequence[torch.Tensor]
    heads: Sequence[torch.Tensor]


def choose(importance: Importance, own: Sizes, wanted: Sizes) -> Kept:
    """Keep the most important; heads that share keys and values stay together."""
    group = own.heads // own.key_heads
    heads = []
    for scores_H in importance.heads:
        groups = _largest(scores_H.unflatten(0, (-1, group)).norm(dim=1), wanted.key_heads)
        heads.append((groups[:, None] * group + torch.arange(group)).flatten())
    neurons = [_largest(scores_F, wanted.intermediate) for scores_F in importance.neurons]
    return Kept(_largest(importance.hidden_D, wanted.hidden), neurons, heads)


def _largest(scores_N: torch.Tensor, num: int) -> torch.Tensor:
    order = scores_N.cpu().sort(descending=True, stable=True).indices
    return order[:num].sort().values


def narrowed(model: nn.Module, wanted: Sizes, importance: Importance, source: str) -> nn.Module:
    """Build a model of the same class with the most important width, neurons and heads.

    Where the whole width is kept, it is compared with the model whose other neurons and heads are
    silent. Raises InputError where it cannot be built or computes something else.
    """
    own, parts = Sizes.of(model.config), parts_of(model)
    kept = choose(importance, own, wanted)
    with naming_failures(f"{source}: cannot build a model of these sizes"):
        student = type(model)(_config_of(model.config, wanted))
    student.to(next(model.parameters()).dtype)
    (path,) = layer_lists(model, source)
    state, target = model.state_dict(), student.state_dict()
    cut = {}
    for name, tensor in state.items():
        found = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.*)\.(weight|bias)", name)
        layer, inner, kind = found.groups() if found else (None, "", "")
        module = model.get_submodule(name.rpartition(".")[0])
        axes = {}
        if layer is not None and inner:
            axes = _axes(inner, kind, int(layer), kept, own, parts, isinstance(module, Conv1D))
        for axis, size in enumerate(tensor.shape):
            index = axes.get(axis)
            if index is None and target[name].shape[axis] != size:
                index = kept.hidden_D
            tensor = tensor if index is None else tensor.index_select(axis, index)
        cut[name] = tensor
    wrong = [name for name in cut if cut[name].shape != target[name].shape]
    if wrong or set(cut) != set(target):
        name = wrong[0] if wrong else min(set(cut) ^ set(target))
        raise InputError(f"{source}: {name} does not fit a narrower model; leave the sizes out")
    student.load_state_dict(cut)
    if wanted.hidden == own.hidden and not _equals_silenced(model, student, kept, own):
        raise InputError(
            f"{source}: computes something else without the other neurons and heads; leave"
            " --intermediate_size and --num_heads out"
        )
    return student


def _config_of(config, wanted: Sizes):
    """Copy a configuration with other sizes."""
    content = config.to_dict()
    content[key_of(config, "hidden_size")] = wanted.hidden
    inner = "n_inner" if config.model_type == "gpt2" else key_of(config, "intermediate_size")
    content[inner] = wanted.intermediate
    content[key_of(config, "num_attention_heads")] = wanted.heads
    if _has_head_width(config):
        content |= {"num_key_value_heads": wanted.key_heads, "head_dim": wanted.head_width}
    copied = type(config).from_dict(content)
    copied._attn_implementation = config._attn_implementation
    return copied


def _axes(
    inner: str, kind: str, layer: int, kept: Kept, own: Sizes, parts: Parts, is_transposed: bool
) -> Mapping[int, torch.Tensor]:
    """Return the indices kept of a parameter's axes that run over heads or neurons.

    is_transposed: the map is a Conv1D, whose weight is (in, out).
    """
    first, second = (1, 0) if is_transposed and kind == "weight" else (0, 1)  # out, in
    heads_H, neurons_F = kept.heads[layer], kept.neurons[layer]
    if inner in parts.qkv:
        is_query = parts.fused_qkv > 1 or inner == parts.qkv[0]
        group = own.heads // own.key_heads
        chosen = heads_H if is_query else heads_H[::group] // group
        total = own.heads if is_query else own.key_heads
        rows = _blocks(_of_heads(chosen, own.head_width), total * own.head_width, parts.fused_qkv)
        return {first: rows}
    if inner in parts.up:
        return {first: _blocks(neurons_F, own.intermediate, parts.fused_up)}
    if inner == parts.out and kind == "weight":
        return {second: _of_heads(heads_H, own.head_width)}
    if inner == parts.down and kind == "weight":
        return {second: neurons_F}
    return {}


def _of_heads(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Return the indices of heads' entries."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _blocks(index: torch.Tensor, size: int, num: int) -> torch.Tensor:
    """Repeat indices for `num` concatenated parts of `size`."""
    return torch.cat([index + k * size for k in range(num)])


@torch.no_grad()
def _equals_silenced(model: nn.Module, student: nn.Module, kept: Kept, own: Sizes) -> bool:
    """Compare a student with the model whose neurons and heads that were left out put out 0."""
    parts, handles = parts_of(model), []

    def silencing(index: torch.Tensor, size: int):
        mask = torch.zeros(size, dtype=next(model.parameters()).dtype)
        mask[index] = 1
        return lambda module, inputs: (inputs[0] * mask.to(inputs[0].device), *inputs[1:])

    for number, layer in enumerate(blocks_of(model)):
        rows = _of_heads(kept.heads[number], own.head_width)
        places = {
            parts.down: silencing(kept.neurons[number], own.intermediate),
            parts.out: silencing(rows, own.heads * own.head_width),
        }
        for name, hook in places.items():
            handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
    ids_BT, options = some_ids(model, 2), without_cache(model)
    try:
        with evaluating(model, student):
            return is_close(student(ids_BT, **options).logits, model(ids_BT, **options).logits)
    finally:
        for handle in handles:
            handle.remove()
