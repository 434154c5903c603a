"""Objectives on what is inside the models: relations and scores of attention, hidden states.

Flow: distil/models/layer_readings.py records the layers that an objective's module names; a formula
gets them as Sequences (attention) or as rows by layer (hidden states), and returns a sum over real
tokens. The module, made by a `make_*` function, says which layers are compared, and may hold a
trained projection.

Relations and scores are made a few sequences at a time, with their gradient, which backward only
scales: no tensor of T x T entries for a whole batch is kept. Each sequence is a separate sum.

Sources: Wang et al., 2021, "MiniLMv2", section 3 (relations); Jiao et al., 2020, "TinyBERT",
section 3.1 (scores, equation 7; hidden states, 8; embeddings, 9); Sanh et al., 2019 (cosines).

Shape suffixes: B sequences, T padded length, W width of queries, keys or values, A heads, C
sequences of a chunk, L their longest length, d width of a head, N real tokens, D width of hidden
states.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from distil.losses import at_least_float32, cosine_distance
from distil.models.layer_readings import (
    EMBEDDINGS,
    PARTS,
    Attention,
    blocks_of,
    probe,
    recording_attention,
    recording_blocks,
)
from utils import InputError

# Entries of a chunk's scores: what fits a CPU's cache; a GPU wants large products.
CHUNK_ENTRIES = {"cpu": 2**18, "cuda": 2**24}
HIDDEN = -1e30  # score of a key that a token does not see: its probability is 0, no difference NaN
PLURALS = {"query": "queries", "key": "keys", "value": "values"}
Pairs = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Attention of some layers of a micro-batch. lengths_B: real tokens, on the host."""

    layers: Mapping[int, Attention]
    lengths_B: torch.Tensor
    is_causal: bool

    def split(self, sizes: Sequence[int]) -> list["Sequences"]:
        """Cut into ranges of `sizes` sequences."""
        parts = {layer: found.split(sizes) for layer, found in self.layers.items()}
        return [
            Sequences({layer: own[k] for layer, own in parts.items()}, lengths, self.is_causal)
            for k, lengths in enumerate(self.lengths_B.split(list(sizes)))
        ]


# --------------------------------------------------------------------------------------------------
# What is compared: an objective's module
# --------------------------------------------------------------------------------------------------


class ComparedLayers(nn.Module):
    """Pairs (student's layer, teacher's layer) that an objective compares."""

    def __init__(self, pairs: Pairs):
        super().__init__()
        self.pairs = tuple(pairs)

    @property
    def layers(self) -> tuple[list[int], list[int]]:
        """The layers read of the student, and of the teacher."""
        student, teacher = zip(*self.pairs, strict=True)
        return list(student), list(teacher)


class Relations(ComparedLayers):
    """One pair of layers whose queries, keys and values are cut into num_heads heads."""

    def __init__(self, pairs: Pairs, num_heads: int):
        super().__init__(pairs)
        self.num_heads = num_heads


class Projected(ComparedLayers):
    """Pairs of hidden states; where widths differ, the student's go through a trained map first.

    It is shared by all pairs, as in TinyBERT, and begins as an isometry: no random number is drawn.
    """

    def __init__(self, pairs: Pairs, distance: str, student_width: int, teacher_width: int):
        super().__init__(pairs)
        self.distance = DISTANCES[distance]
        self.project: nn.Module = nn.Identity()
        if student_width != teacher_width:
            widths = student_width, teacher_width
            self.project = nn.utils.skip_init(nn.Linear, *widths, bias=False)
            drawn = torch.Generator().manual_seed(0)
            nn.init.orthogonal_(self.project.weight, generator=drawn)


def make_relations(
    student, teacher, *, relation_heads: int = 12, relation_layer: int | None = None
):
    """Make the module of `relation_divergence`: the student's last layer, the teacher's by flag.

    Raises InputError where attention cannot be read, or its widths be cut into relation_heads.
    """
    source = "--alpha_rel"
    last = [len(blocks_of(model) or [None]) - 1 for model in (student, teacher)]
    pair = last[0], last[1] if relation_layer is None else relation_layer
    for model, layer, owner in zip((student, teacher), pair, ("student", "teacher"), strict=True):
        found = probe(model, recording_attention, [layer], source)[layer]
        for part in PARTS:
            width = getattr(found, part).shape[-1]
            if width % relation_heads:
                raise InputError(
                    f"--relation_heads {relation_heads}: does not divide the width {width} of the"
                    f" {owner}'s {PLURALS[part]}; name a divisor of all widths of both models"
                )
    return Relations([pair], relation_heads)


def make_scores(student, teacher, *, layer_map: Pairs):
    """Make the module of `score_error`. Raises InputError where attention has other head counts."""
    source = "--alpha_att"
    compared = ComparedLayers(layer_map)
    models = zip((student, teacher), compared.layers, strict=True)
    found = [probe(model, recording_attention, layers, source) for model, layers in models]
    for ours, theirs in layer_map:
        counts = found[0][ours].num_heads, found[1][theirs].num_heads
        if counts[0] != counts[1]:
            raise InputError(
                f"{source}: the student's layer {ours} has {counts[0]} heads, the teacher's"
                f" {theirs} {counts[1]}; they must be equal: leave it out, or take --alpha_rel"
            )
    return compared


def make_hidden_states(student, teacher, *, layer_map: Pairs, hid_loss: str = "mse"):
    """Make the module of `hidden_distance`. Raises InputError where blocks cannot be read."""
    return _projected(student, teacher, layer_map, hid_loss, "--alpha_hid")


def make_embeddings(student, teacher, *, hid_loss: str = "mse"):
    """Make the module of `hidden_distance` for the embeddings, the first block's input."""
    return _projected(student, teacher, [(EMBEDDINGS, EMBEDDINGS)], hid_loss, "--alpha_emb")


def _projected(student, teacher, pairs: Pairs, distance: str, source: str) -> Projected:
    models = zip((student, teacher), ComparedLayers(pairs).layers, strict=True)
    found = [probe(model, recording_blocks, layers, source) for model, layers in models]
    return Projected(pairs, distance, *(next(iter(f.values())).shape[-1] for f in found))


# --------------------------------------------------------------------------------------------------
# Formulas
# --------------------------------------------------------------------------------------------------


def relation_divergence(
    student: Sequences, teacher: Sequences, labels_N, temperature: float, compared: Relations
) -> torch.Tensor:
    """Sum over real tokens, queries, keys and values: the mean over heads of KL(R_t || R_s).

    R = softmax(X X' / sqrt(d)), X a head of width d of the concatenated queries, keys or values.
    """
    ((ours, theirs),) = compared.pairs
    return sum(
        _RelationDivergence.apply(
            getattr(student.layers[ours], part),
            getattr(teacher.layers[theirs], part),
            student.lengths_B,
            student.is_causal,
            compared.num_heads,
        )
        for part in PARTS
    )


def score_error(
    student: Sequences, teacher: Sequences, labels_N, temperature: float, compared: ComparedLayers
) -> torch.Tensor:
    """Sum over real tokens (S_s - S_t)^2, the mean over the keys they see, over heads and pairs.

    S = Q K' times the attention's scale, before masks, caps and softmax.
    """
    errors = [
        _ScoreError.apply(
            student.layers[ours].query,
            student.layers[ours].key,
            student.layers[ours],
            teacher.layers[theirs],
            student.lengths_B,
            student.is_causal,
        )
        for ours, theirs in compared.pairs
    ]
    return sum(errors) / len(errors)


def hidden_distance(
    student: Mapping[int, torch.Tensor],
    teacher: Mapping[int, torch.Tensor],
    labels_N,
    temperature: float,
    compared: Projected,
) -> torch.Tensor:
    """Sum over real tokens the distance of hidden states (N, D), the mean over pairs."""
    distances = [
        compared.distance(at_least_float32(compared.project(student[ours])), teacher[theirs])
        for ours, theirs in compared.pairs
    ]
    return sum(distances) / len(distances)


# (student_ND, teacher_ND) -> sum over N rows.
DISTANCES = {
    "mse": lambda student_ND, teacher_ND: (student_ND - teacher_ND).square().mean(-1).sum(),
    "cos": lambda student_ND, teacher_ND: cosine_distance(student_ND, teacher_ND, None, 1.0),
}


# --------------------------------------------------------------------------------------------------
# Relations and scores by chunks of sequences
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Sequences first .. last of a batch, cut to their longest."""

    first: int
    last: int
    lengths: Sequence[int]
    is_causal: bool

    @property
    def place(self) -> tuple[slice, slice]:
        """Where it is in (B, T, ..)."""
        return slice(self.first, self.last), slice(max(self.lengths))

    def heads(self, tensor_BTW: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Cut its part of (B, T, W) into heads, at least float32: (C, A, L, d)."""
        tensor_CLW = at_least_float32(tensor_BTW[self.place])
        return tensor_CLW.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def padding(self, device: torch.device) -> torch.Tensor | None:
        """Mark padding (C, 1, L); None without any."""
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        lengths_C = torch.tensor(self.lengths).to(device, non_blocking=True)
        return (torch.arange(longest, device=device) >= lengths_C[:, None])[:, None]

    def unseen(self, device: torch.device) -> torch.Tensor | None:
        """Mark keys that a token does not see (C or 1, 1, L or 1, L); None where it sees all."""
        padding_C1L, longest = self.padding(device), max(self.lengths)
        unseen = None if padding_C1L is None else padding_C1L[:, :, None]
        if self.is_causal:
            later_LL = torch.ones(longest, longest, dtype=torch.bool, device=device).triu(1)
            unseen = later_LL[None, None] if unseen is None else unseen | later_LL
        return unseen


def _chunks(
    lengths_B: torch.Tensor, num_heads: int, is_causal: bool, kind: str
) -> Iterator[_Chunk]:
    """Cut a batch into chunks of sequences whose scores have CHUNK_ENTRIES, at least one each."""
    limit, lengths, first = CHUNK_ENTRIES.get(kind, CHUNK_ENTRIES["cpu"]), lengths_B.tolist(), 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and (
            num_heads * (last + 1 - first) * max(lengths[first : last + 1]) ** 2 <= limit
        ):
            last += 1
        if max(lengths[first:last]) > 0:
            yield _Chunk(first, last, lengths[first:last], is_causal)
        first = last


def _joined(heads_CALd: torch.Tensor) -> torch.Tensor:
    """Concatenate heads: (C, L, W)."""
    return heads_CALd.transpose(1, 2).flatten(2)


class _RelationDivergence(torch.autograd.Function):
    """Sum over real tokens the mean over heads of KL(R_t || R_s), for one of queries, keys, values.

    With S = X X' / sqrt(d), the gradient by S is (R_s - R_t) / A, by X (G + G') X / sqrt(d).
    """

    @staticmethod
    def forward(ctx, student_BTW, teacher_BTW, lengths_B, is_causal: bool, num_heads: int):
        kind, wide = student_BTW.device.type, torch.promote_types(student_BTW.dtype, torch.float32)
        total = student_BTW.new_zeros((), dtype=wide)
        wants_grad = ctx.needs_input_grad[0]
        grad_BTW = student_BTW.new_zeros(student_BTW.shape, dtype=wide) if wants_grad else None
        with torch.autocast(kind, enabled=False):
            for chunk in _chunks(lengths_B, num_heads, is_causal, kind):
                heads = [chunk.heads(x, num_heads) for x in (student_BTW, teacher_BTW)]
                value, grad_CALL = _divergence(*heads, chunk)
                total += value / num_heads
                if wants_grad:
                    scale = heads[0].shape[-1] ** -0.5 / num_heads
                    both_CALL = grad_CALL + grad_CALL.transpose(-1, -2)
                    grad_BTW[chunk.place] = _joined((both_CALL @ heads[0]) * scale)
        ctx.grads, ctx.dtype = [grad_BTW], student_BTW.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        return *_scaled(ctx, grad_total), None, None, None, None


def _divergence(student_CALd, teacher_CALd, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum KL(R_t || R_s) over real tokens and heads; return it and its gradient by the scores."""
    unseen = chunk.unseen(student_CALd.device)
    logs = []
    for heads_CALd in (student_CALd, teacher_CALd):
        scores_CALL = (heads_CALd * heads_CALd.shape[-1] ** -0.5) @ heads_CALd.transpose(-1, -2)
        if unseen is not None:
            scores_CALL.masked_fill_(unseen, HIDDEN)
        logs.append(torch.log_softmax(scores_CALL, dim=-1))
    student_CALL, teacher_CALL = logs
    probs_CALL = teacher_CALL.exp()
    ratio_CALL = teacher_CALL.sub_(student_CALL)
    grad_CALL = student_CALL.exp_().sub_(probs_CALL)
    padding_C1L = chunk.padding(student_CALd.device)
    if padding_C1L is not None:
        for tensor in (ratio_CALL, grad_CALL):
            tensor.masked_fill_(padding_C1L[..., None], 0.0)
    return torch.dot(probs_CALL.flatten(), ratio_CALL.flatten()), grad_CALL


class _ScoreError(torch.autograd.Function):
    """Sum over real tokens the squared error of scores, the mean over keys seen and heads."""

    @staticmethod
    def forward(ctx, query_BTW, key_BTW, student: Attention, teacher: Attention, lengths_B, causal):
        kind, wide = query_BTW.device.type, torch.promote_types(query_BTW.dtype, torch.float32)
        total = query_BTW.new_zeros((), dtype=wide)
        grads = [x.new_zeros(x.shape, dtype=wide) for x in (query_BTW, key_BTW)]
        num_heads = student.num_heads
        with torch.autocast(kind, enabled=False):
            for chunk in _chunks(lengths_B, num_heads, causal, kind):
                query_CALd, key_CALd, scores_CALL = _scores(student, chunk)
                error_CALL = scores_CALL.sub_(_scores(teacher, chunk)[2])
                if (unseen := chunk.unseen(query_BTW.device)) is not None:
                    error_CALL.masked_fill_(unseen, 0.0)
                weighted_CALL = error_CALL * _shares(chunk, error_CALL) / num_heads
                total += torch.dot(error_CALL.flatten(), weighted_CALL.flatten())
                weighted_CALL.mul_(2 * student.scale)
                grads[0][chunk.place] = _joined(weighted_CALL @ key_CALd)
                grad_key_CALd = weighted_CALL.transpose(-1, -2) @ query_CALd
                of_key = grad_key_CALd.unflatten(1, (student.num_key_heads, -1)).sum(2)
                grads[1][chunk.place] = _joined(of_key)
        ctx.grads, ctx.dtype = grads, query_BTW.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        return *_scaled(ctx, grad_total), None, None, None, None


def _scores(attention: Attention, chunk: _Chunk) -> tuple[torch.Tensor, ...]:
    """Return queries and keys by the queries' heads, and the scores."""
    query_CALd = chunk.heads(attention.query, attention.num_heads)
    key_CALd = chunk.heads(attention.key, attention.num_key_heads)
    groups = attention.num_heads // attention.num_key_heads
    key_CALd = key_CALd.repeat_interleave(groups, dim=1)
    return query_CALd, key_CALd, (query_CALd * attention.scale) @ key_CALd.transpose(-1, -2)


def _shares(chunk: _Chunk, like: torch.Tensor) -> torch.Tensor:
    """Return 1 / the number of keys that a token sees, 0 on padding: (C or 1, 1, L, 1)."""
    longest, device = max(chunk.lengths), like.device
    if chunk.is_causal:
        seen = torch.arange(1, longest + 1, dtype=like.dtype, device=device)[None]
    else:
        seen = torch.tensor(chunk.lengths, dtype=like.dtype).to(device, non_blocking=True)[:, None]
    shares = (1 / seen)[:, None, :, None].expand(-1, -1, longest, -1)
    padding_C1L = chunk.padding(device)
    return shares if padding_C1L is None else shares.masked_fill(padding_C1L[..., None], 0.0)


def _scaled(ctx, grad_total: torch.Tensor) -> list[torch.Tensor | None]:
    """Scale the gradients that forward made, before they are narrowed to half precision."""
    grads, ctx.grads = ctx.grads, None
    assert grads is not None, "a second backward through chunked scores is not supported"
    return [None if grad is None else grad.mul_(grad_total).to(ctx.dtype) for grad in grads]
