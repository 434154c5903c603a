"""Micro-batches: padding, masks and labels, made on the host, keyed by seed and number.

Flow: LmSeqsDataset.collate -> prepare_mlm / prepare_clm -> MicroBatch -> join (or
distil/data/packing.py) -> the models.

Source: Sanh et al., 2019, section 3; masking by smoothed counts: Conneau and Lample, 2019 (XLM),
section 3.2.

Shape suffixes: B sequences, T padded length, N selected positions, V vocabulary, L positions of
micro-batches laid end to end.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F

from distil.losses import IGNORED_LABEL
from utils import keyed_seed


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Input of one forward and backward pass, made on the host: a micro-batch, or several joined.

    number: of the micro-batch; of a pass, its first one's. joined: the micro-batches of a pass, in
    the order of their sequences and rows; none: it is one itself.
    attention_mask_BT: 1 on real tokens; None: none is made. It is passed only if a batch is padded.
    labels_BT: ids to predict, IGNORED_LABEL elsewhere; of causal models not shifted yet.
    rows: kind of rows (see losses.Loss) -> ascending positions in the flattened (B, T).
    num_tokens: real tokens. selection: rows for the head, added by Distiller.ready.
    packing: where a packed pass has its sequences; it has no attention_mask_BT, and its rows of
    each kind are ordered as in its micro-batches.
    """

    number: int
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor | None
    labels_BT: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    num_tokens: int
    selection: "Selection | None" = None
    joined: tuple["MicroBatch", ...] = ()
    packing: "Packing | None" = None

    @property
    def parts(self) -> tuple["MicroBatch", ...]:
        """The micro-batches in it."""
        return self.joined or (self,)

    def num_rows(self, kind: str) -> list[int]:
        """Count the rows of a kind in each of its micro-batches."""
        return [len(part.rows[kind]) for part in self.parts]

    @property
    def is_causal(self) -> bool:
        """True for causal language modeling, False for masked."""
        return "next" in self.rows

    @property
    def is_padded(self) -> bool:
        """True where some position is padding."""
        return self.num_tokens < self.input_ids_BT.numel()

    def pinned(self) -> "MicroBatch":
        """Copy to page-locked memory, so that a GPU can fetch it without blocking the host."""
        memo: dict[int, torch.Tensor] = {}
        return _pinned(self, memo)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed pass are.

    sequences_BT: number of each token's sequence in the pass, -1 on padding. columns_BT: each
    token's place in its sequence, 0 on padding. places_L: for each position of the pass's
    micro-batches, laid end to end with their padding, its place in the flattened (B, T).
    """

    sequences_BT: torch.Tensor
    columns_BT: torch.Tensor
    places_L: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of a micro-batch that the head projects, selected on the host.

    rows_N: positions in the flattened (B, T), ascending within the pass's micro-batches.
    offsets: objective -> indices into rows_N of the objective's rows.
    labels: objective -> the ids to predict at these rows, or None.
    """

    rows_N: torch.Tensor
    offsets: Mapping[str, torch.Tensor]
    labels: Mapping[str, torch.Tensor | None]


def _pinned(value, memo: dict[int, torch.Tensor]):
    """Copy a dataclass's or mapping's tensors to page-locked memory, shared tensors only once."""
    if isinstance(value, torch.Tensor):
        return memo.setdefault(id(value), value.pin_memory())
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        contents = {name: _pinned(getattr(value, name), memo) for name in names}
        return dataclasses.replace(value, **contents)
    if isinstance(value, Mapping):
        return {key: _pinned(content, memo) for key, content in value.items()}
    return value


def masking_weights(
    counts_V: torch.Tensor, smoothing: float, special_ids: Iterable[int]
) -> torch.Tensor:
    """Weigh token ids for masking: max(count, 1) ^ -smoothing, 0 for special tokens; float64."""
    # Differs from the original: always float64. Half precision rounded frequent tokens' weights to
    # 0, so that they were never masked.
    weights_V = counts_V.clamp(min=1).double() ** -smoothing
    weights_V[list(special_ids)] = 0.0
    return weights_V


def real_positions(lengths_B: torch.Tensor, padded_length: int) -> torch.Tensor:
    """Mark the real tokens of a padded batch: bool (B, T)."""
    return torch.arange(padded_length) < lengths_B[:, None]


@dataclasses.dataclass(frozen=True)
class MlmPreparation:
    """Make masked-LM batches.

    weights_V: see masking_weights. mask_prop: share of real tokens to predict.
    word_mask, word_keep, word_rand: probabilities that a drawn token becomes [MASK], stays, or
    becomes an id uniform over the V entries of weights_V, the tokenizer's.
    """

    weights_V: torch.Tensor
    mask_id: int
    mask_prop: float
    word_mask: float
    word_keep: float
    word_rand: float
    restrict_ce_to_mask: bool
    seed: int

    def __call__(
        self, number: int, token_ids_BT: torch.Tensor, lengths_B: torch.Tensor
    ) -> MicroBatch:
        """Make micro-batch `number`; its random numbers are keyed by (seed, number).

        Draws ceil(mask_prop x real tokens) positions over the whole batch, without replacement, by
        weight; at most as many as have a positive weight.
        """
        real_BT = real_positions(lengths_B, token_ids_BT.shape[1])
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, number, "mask"))
        drawn_BT = self._draw(token_ids_BT, real_BT, generator)
        labels_BT = torch.where(drawn_BT, token_ids_BT, IGNORED_LABEL)
        input_ids_BT = token_ids_BT.clone()
        input_ids_BT[drawn_BT] = self._replacements(token_ids_BT[drawn_BT], generator)
        real, masked = _positions(real_BT), _positions(drawn_BT)
        distilled = masked if self.restrict_ce_to_mask else real
        rows = {"real": real, "masked": masked, "distilled": distilled}
        return MicroBatch(number, input_ids_BT, real_BT.long(), labels_BT, rows, len(real))

    def _draw(self, token_ids_BT, real_BT, generator) -> torch.Tensor:
        weights_BT = self.weights_V[token_ids_BT] * real_BT
        num_real = int(real_BT.sum())
        # Differs from the original: capped. 2019 masked [CLS] once no position of positive weight
        # was left.
        num_drawn = min(math.ceil(self.mask_prop * num_real), int((weights_BT > 0).sum()))
        drawn_BT = torch.zeros_like(real_BT)
        if num_drawn:
            places = torch.multinomial(
                weights_BT.flatten(), num_drawn, replacement=False, generator=generator
            )
            drawn_BT.view(-1)[places] = True
        return drawn_BT

    def _replacements(self, original_N: torch.Tensor, generator) -> torch.Tensor:
        if not len(original_N):
            return original_N
        fates = [self.word_mask, self.word_keep, self.word_rand]
        probabilities = torch.tensor(fates, dtype=torch.float64)
        random_N = torch.randint(len(self.weights_V), original_N.shape, generator=generator)
        fate_N = torch.multinomial(
            probabilities, len(original_N), replacement=True, generator=generator
        )
        choices_3N = torch.stack([torch.full_like(original_N, self.mask_id), original_N, random_N])
        return choices_3N.gather(0, fate_N[None])[0]


def mlm_preparation(
    tokenizer,
    counts_V: torch.Tensor,
    smoothing: float,
    seed: int,
    mask_prop: float = 0.15,
    fates: tuple[float, float, float] = (0.8, 0.1, 0.1),
    restrict_ce_to_mask: bool = False,
) -> MlmPreparation:
    """Build an MlmPreparation for a tokenizer's mask and special tokens.

    counts_V, smoothing: see masking_weights. fates: word_mask, word_keep and word_rand.
    """
    weights_V = masking_weights(counts_V, smoothing, tokenizer.all_special_ids)
    mask_id = tokenizer.mask_token_id
    return MlmPreparation(weights_V, mask_id, mask_prop, *fates, restrict_ce_to_mask, seed)


def prepare_clm(
    number: int, token_ids_BT: torch.Tensor, lengths_B: torch.Tensor, with_mask: bool = False
) -> MicroBatch:
    """Make a causal-LM batch: labels are the ids, IGNORED_LABEL on padding.

    with_mask: add an attention mask. GPT-2 needs none: padding comes after the real tokens, and
    causal attention does not look ahead.
    """
    real_BT = real_positions(lengths_B, token_ids_BT.shape[1])
    labels_BT = torch.where(real_BT, token_ids_BT, IGNORED_LABEL)
    next_is_real_BT = torch.zeros_like(real_BT)
    next_is_real_BT[:, :-1] = real_BT[:, 1:]
    real = _positions(real_BT)
    rows = {"real": real, "distilled": real, "next": _positions(next_is_real_BT)}
    mask_BT = real_BT.long() if with_mask else None
    return MicroBatch(number, token_ids_BT, mask_BT, labels_BT, rows, len(real))


def _positions(selected_BT: torch.Tensor) -> torch.Tensor:
    return selected_BT.flatten().nonzero()[:, 0]


def join(batches: Iterable[MicroBatch], pad_id: int) -> MicroBatch:
    """Join micro-batches to one pass, padded to its longest: their sequences, then their rows.

    Nothing is drawn anew: masks and labels are those of each micro-batch.
    """
    batches = list(batches)
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.input_ids_BT.shape[1] for batch in batches)

    def stacked(name: str, padding: int) -> torch.Tensor:
        tensors = [getattr(batch, name) for batch in batches]
        wide = [F.pad(x_BT, (0, longest - x_BT.shape[1]), value=padding) for x_BT in tensors]
        return torch.cat(wide)

    has_masks = batches[0].attention_mask_BT is not None
    return MicroBatch(
        number=batches[0].number,
        input_ids_BT=stacked("input_ids_BT", pad_id),
        attention_mask_BT=stacked("attention_mask_BT", 0) if has_masks else None,
        labels_BT=stacked("labels_BT", IGNORED_LABEL),
        rows={kind: _joined_rows(batches, kind, longest) for kind in batches[0].rows},
        num_tokens=sum(batch.num_tokens for batch in batches),
        joined=tuple(batches),
    )


def _joined_rows(batches: Sequence[MicroBatch], kind: str, longest: int) -> torch.Tensor:
    """Find rows of micro-batches in their pass, padded to `longest`: ascending, as they were."""
    rows, first = [], 0  # sequence of the pass
    for batch in batches:
        num, length = batch.input_ids_BT.shape
        own_N = batch.rows[kind]
        rows.append((own_N // length + first) * longest + own_N % length)
        first += num
    return torch.cat(rows)


def end_to_end(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Lay flattened micro-batches end to end, with their padding: one sequence of L positions."""
    sizes = [batch.input_ids_BT.numel() for batch in batches]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    shifted = list(zip(batches, starts, strict=True))
    return MicroBatch(
        number=batches[0].number,
        input_ids_BT=torch.cat([batch.input_ids_BT.flatten() for batch in batches])[None],
        attention_mask_BT=None,
        labels_BT=torch.cat([batch.labels_BT.flatten() for batch in batches])[None],
        rows={
            kind: torch.cat([batch.rows[kind] + start for batch, start in shifted])
            for kind in batches[0].rows
        },
        num_tokens=sum(batch.num_tokens for batch in batches),
    )


def label_of_row(kind: str, labels_BT: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor | None:
    """Return the id to predict at each row ("next": the following position's); None without one."""
    if kind == "masked":
        return labels_BT.flatten()[rows_N]
    if kind == "next":
        return labels_BT.flatten()[rows_N + 1]
    return None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device; asynchronously if the tensor is page-locked (see MicroBatch.pinned)."""
    return tensor.to(device, non_blocking=True)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device, by way of page-locked memory where that keeps the host from waiting."""
    return to_device(tensor.pin_memory() if device.type == "cuda" else tensor, device)


def select_rows(batch: MicroBatch, kinds: Mapping[str, str]) -> Selection:
    """Find the rows of a pass that any objective reads. kinds: objective -> kind of rows."""
    packing = batch.packing
    if packing is not None:  # an objective's rows are ascending there, micro-batch by micro-batch
        batch = end_to_end(batch.parts)
    rows = {name: batch.rows[kind] for name, kind in kinds.items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    rows_N = torch.cat(list(rows.values())).unique() if rows else nothing  # ascending
    offsets = {name: torch.searchsorted(rows_N, own_N) for name, own_N in rows.items()}
    labels = {
        name: label_of_row(kinds[name], batch.labels_BT, own_N) for name, own_N in rows.items()
    }
    return Selection(rows_N if packing is None else packing.places_L[rows_N], offsets, labels)
