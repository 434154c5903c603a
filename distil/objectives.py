"""The table of objectives: all that the program knows about one beside its mathematics.

Its `--alpha_x` flag, log tag, input and rows follow from its row. The functions are those of
distil/losses.py, by name: KL divergence's are `kl_divergence`, `kl_divergence_gradient` and
`kl_divergence_rows`. Imports no torch, so that train.py reads its flags at once.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from distil.losses import WithGradient

NORMALIZATIONS = ("micro_batches", "tokens")  # over which an update's means are taken
HIDDEN_DISTANCES = ("mse", "cos")  # of hidden states and embeddings


@dataclasses.dataclass(frozen=True)
class Loss:
    """One objective: its formula, and the input and rows that the formula is applied to.

    function: the formula, or its name in distil/losses.py ("module.name": in another of distil/):
        (student, teacher, labels_N, temperature) -> sum over rows; the first two are logits (N, V)
        and (N, E), or other outputs (N, ..), as their reading selects them; labels_N are the ids to
        predict, given for logits at "masked" and "next" rows, else None.
    reads: "logits", or a row of READINGS in distil/models/forward.py ("hidden": last hidden
        states; "blocks": hidden states by layer; "attention": queries, keys and values by layer).
    rows: "real" (every real token), "masked" (positions drawn for masked-LM), "next" (positions
        whose next token is real), or "distilled" (as "real"; as "masked" with
        --restrict_ce_to_mask).
    needs_teacher: False where the objective can be computed without running the teacher.
    default_alpha: default of its --alpha flag. title: its name for people. condition: when the flag
        may be given.
    make_module: (student, teacher) -> a module that the formula gets as its last argument; its
        parameters are trained, saved and restored with the student's, but not exported. Its
        `layers`, if it has any, are those to be read of student and teacher. Not for objectives
        that read logits.
    options: flags of train.py that make_module gets as keywords.
    """

    function: str | Callable[..., torch.Tensor]
    reads: str
    rows: str
    needs_teacher: bool
    default_alpha: float
    title: str
    condition: str = ""
    make_module: str | Callable[..., torch.nn.Module] | None = None
    options: tuple[str, ...] = ()

    @property
    def formula(self) -> Callable[..., torch.Tensor]:
        """The formula's function."""
        return self._function("") if isinstance(self.function, str) else self.function

    def module(self, student, teacher, options: Mapping[str, Any]) -> torch.nn.Module:
        """Make the objective's module from student, teacher and the flags that it takes."""
        make = self.make_module
        make = _named(make) if isinstance(make, str) else make
        return make(student, teacher, **{k: options[k] for k in self.options if k in options})

    @property
    def gradient(self) -> Callable[..., WithGradient] | None:
        """The formula's sum and its gradient by the student's logits; None: by autograd."""
        return self._function("_gradient")

    @property
    def by_row(self) -> Callable[..., WithGradient] | None:
        """The same per row, for torch.compile; None: this objective is not compiled."""
        return self._function("_rows")

    def _function(self, suffix: str) -> Callable[..., Any] | None:
        if not isinstance(self.function, str):
            return None
        return _named(self.function + suffix)

    @property
    def help(self) -> str:
        """Describe the objective in one line for the command line."""
        return f"{self.title}; {self.condition}" if self.condition else self.title


def _named(name: str) -> Callable[..., Any] | None:
    """Find a function of distil/losses.py, or "module.name"; None where there is none."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(f"distil.{module or 'losses'}"), name, None)


# "ce" is 2019's name: the paper's L_ce, the cross-entropy with soft targets, is this KL divergence
# plus the teacher's entropy, a constant.
LOSSES: dict[str, Loss] = {
    "ce": Loss(
        "kl_divergence",
        reads="logits",
        rows="distilled",
        needs_teacher=True,
        default_alpha=0.5,
        title="KL divergence to the teacher's distribution",
    ),
    "mlm": Loss(
        "cross_entropy",
        reads="logits",
        rows="masked",
        needs_teacher=False,
        default_alpha=0.0,
        title="masked-language-model loss",
        condition="needs --mlm",
    ),
    "clm": Loss(
        "cross_entropy",
        reads="logits",
        rows="next",
        needs_teacher=False,
        default_alpha=0.5,
        title="causal-language-model loss",
        condition="not with --mlm",
    ),
    "mse": Loss(
        "squared_error",
        reads="logits",
        rows="distilled",
        needs_teacher=True,
        default_alpha=0.0,
        title="squared error of the logits",
    ),
    "cos": Loss(
        "cosine_distance",
        reads="hidden",
        rows="real",
        needs_teacher=True,
        default_alpha=0.0,
        title="cosine distance of the last hidden states",
    ),
    "rkl": Loss(
        "reverse_kl",
        reads="logits",
        rows="distilled",
        needs_teacher=True,
        default_alpha=0.0,
        title="reverse KL divergence, from the teacher's distribution to the student's",
    ),
    "jsd": Loss(
        "jensen_shannon",
        reads="logits",
        rows="distilled",
        needs_teacher=True,
        default_alpha=0.0,
        title="Jensen-Shannon divergence to the teacher's distribution",
    ),
    "rel": Loss(
        "layer_losses.relation_divergence",
        reads="attention",
        rows="real",
        needs_teacher=True,
        default_alpha=0.0,
        title="KL divergence to the teacher's self-attention relations",
        make_module="layer_losses.make_relations",
        options=("relation_heads", "relation_layer"),
    ),
    "hid": Loss(
        "layer_losses.hidden_distance",
        reads="blocks",
        rows="real",
        needs_teacher=True,
        default_alpha=0.0,
        title="distance of the layers' hidden states",
        make_module="layer_losses.make_hidden_states",
        options=("layer_map", "hid_loss"),
    ),
    "att": Loss(
        "layer_losses.score_error",
        reads="attention",
        rows="real",
        needs_teacher=True,
        default_alpha=0.0,
        title="squared error of the layers' attention scores",
        make_module="layer_losses.make_scores",
        options=("layer_map",),
    ),
    "emb": Loss(
        "layer_losses.hidden_distance",
        reads="blocks",
        rows="real",
        needs_teacher=True,
        default_alpha=0.0,
        title="distance of the embeddings",
        make_module="layer_losses.make_embeddings",
        options=("hid_loss",),
    ),
}
