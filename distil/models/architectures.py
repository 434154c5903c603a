"""Tables of the differences between architectures: classes, token roles, heads, layers, pairs.

ARCHITECTURES has one row for each model type that 2019 knew, PAIRS one for each (teacher, student).
`language_model.resolve_architecture` makes a row for any other model. This module does not import
torch, so that programs that only tokenize start without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _distilbert_transform(model, hidden_ND):
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_ND)))


def _roberta_transform(model, hidden_ND):
    from transformers.activations import gelu

    head = model.lm_head
    return head.layer_norm(gelu(head.dense(hidden_ND)))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model type: a row of ARCHITECTURES, or one made by `resolve_architecture`.

    name: model type of a row, else the model's class; for messages and cards.
    model_class, config_class, tokenizer_class: names in transformers.
    vocab_files: files that a tokenizer folder without tokenizer.json must hold.
    transform: (model, hidden_ND) -> (N, D), the prediction head's layers before its last linear
        map; None: known only as a part of the model's forward.
    projection: module path of that linear map, from (N, D) to logits (N, V).
    layers: prefix of the layer's number in parameter names.
    position_embeddings, token_type_embeddings: module paths; None if the model has no such table.
    head_transform: prefixes of the head's dense layer and norm, copied with --vocab_transform.
    aliases: second names of tied parameters.
    obsolete: pattern of parameter names found in old checkpoints only.
    reserved_positions: unused first rows of the position table (RoBERTa's positions begin at 2).
    start_token, end_token, pad_token: the tokenizer's attributes for these roles.
    pads_by_mask: whether padded batches of a causal model have an attention mask. GPT-2's have
        none, as in 2019: causal attention does not reach the padding behind.
    masked: whether it is a masked-language model; None: as the class's name says.
    runs_remote_code: whether Python files that come with the model may run.
    """

    name: str
    model_class: str
    config_class: str
    tokenizer_class: str
    vocab_files: tuple[str, ...]
    transform: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] | None
    projection: str
    layers: str
    position_embeddings: str | None
    token_type_embeddings: str | None = None
    head_transform: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    obsolete: str = r"\.position_ids$"
    reserved_positions: int = 0
    start_token: str = "cls_token"
    end_token: str = "sep_token"
    pad_token: str = "pad_token"
    pads_by_mask: bool = True
    masked: bool | None = None
    runs_remote_code: bool = False

    @property
    def is_named(self) -> bool:
        """True for a row of ARCHITECTURES, False for an architecture resolved by conventions."""
        return ARCHITECTURES.get(self.name) is self

    @property
    def is_masked(self) -> bool:
        """True for masked-language models, False for causal ones."""
        return self.model_class.endswith("MaskedLM") if self.masked is None else self.masked


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        "bert",
        "BertForMaskedLM",
        "BertConfig",
        "BertTokenizer",
        ("vocab.txt",),
        transform=lambda model, hidden_ND: model.cls.predictions.transform(hidden_ND),
        projection="cls.predictions.decoder",
        layers="bert.encoder.layer.",
        position_embeddings="bert.embeddings.position_embeddings",
        token_type_embeddings="bert.embeddings.token_type_embeddings",
        head_transform=("cls.predictions.transform.",),
        aliases=("cls.predictions.decoder.bias",),
    ),
    "distilbert": Architecture(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        "BertTokenizer",
        ("vocab.txt",),
        transform=_distilbert_transform,
        projection="vocab_projector",
        layers="distilbert.transformer.layer.",
        position_embeddings="distilbert.embeddings.position_embeddings",
        head_transform=("vocab_transform.", "vocab_layer_norm."),
    ),
    "roberta": Architecture(
        "roberta",
        "RobertaForMaskedLM",
        "RobertaConfig",
        "RobertaTokenizer",
        ("vocab.json", "merges.txt"),
        transform=_roberta_transform,
        projection="lm_head.decoder",
        layers="roberta.encoder.layer.",
        position_embeddings="roberta.embeddings.position_embeddings",
        token_type_embeddings="roberta.embeddings.token_type_embeddings",
        head_transform=("lm_head.dense.", "lm_head.layer_norm."),
        aliases=("lm_head.decoder.bias",),
        reserved_positions=2,
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        "GPT2Tokenizer",
        ("vocab.json", "merges.txt"),
        transform=lambda model, hidden_ND: hidden_ND,
        projection="lm_head",
        layers="transformer.h.",
        position_embeddings="transformer.wpe",
        obsolete=r"\.attn\.(masked_)?bias$",
        start_token="bos_token",
        end_token="eos_token",
        pad_token="unk_token",
        pads_by_mask=False,
    ),
}

AUTO = "auto"  # read the model type from the model's configuration

# A tokenizer of any class, for which no model is known.
ANY_TOKENIZER = Architecture(
    AUTO,
    "",
    "",
    "AutoTokenizer",
    (),
    transform=None,
    projection="",
    layers="",
    position_embeddings=None,
)


def architecture_named(model_type: str) -> Architecture:
    """Return the row of a model type; ANY_TOKENIZER for AUTO and types without a row."""
    return ARCHITECTURES.get(model_type, ANY_TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pair of model types (teacher, student) that can be distilled.

    parameter_names: student's name -> teacher's name, with {layer} for the number of a layer; None:
        both have the same architecture and names.
    fold_token_types: name of the student's table whose rows --fold_token_types adds the teacher's
        token type 0 to, and name of the teacher's table; None if the student has token types.
    config_entries: student's configuration entry -> teacher's, to build a student from some of the
        teacher's layers.
    fixed_entries: entries of the teacher that the student's configuration cannot hold, with the
        values that a student computes with.
    """

    parameter_names: Mapping[str, str] | None = None
    fold_token_types: tuple[str, str] | None = None
    config_entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed_entries: Mapping[str, object] = dataclasses.field(default_factory=dict)


def _with_weight_and_bias(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{s}.{kind}": f"{t}.{kind}" for s, t in modules.items() for kind in ("weight", "bias")}


BERT_TO_DISTILBERT = {
    "distilbert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "distilbert.embeddings.position_embeddings.weight": (
        "bert.embeddings.position_embeddings.weight"
    ),
    "vocab_projector.weight": "cls.predictions.decoder.weight",
    "vocab_projector.bias": "cls.predictions.decoder.bias",  # cls.predictions.bias where tied
    **_with_weight_and_bias(
        {
            "distilbert.embeddings.LayerNorm": "bert.embeddings.LayerNorm",
            "vocab_transform": "cls.predictions.transform.dense",
            "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
            **{
                f"distilbert.transformer.layer.{{layer}}.{student}": (
                    f"bert.encoder.layer.{{layer}}.{teacher}"
                )
                for student, teacher in {
                    "attention.q_lin": "attention.self.query",
                    "attention.k_lin": "attention.self.key",
                    "attention.v_lin": "attention.self.value",
                    "attention.out_lin": "attention.output.dense",
                    "sa_layer_norm": "attention.output.LayerNorm",
                    "ffn.lin1": "intermediate.dense",
                    "ffn.lin2": "output.dense",
                    "output_layer_norm": "output.LayerNorm",
                }.items()
            },
        }
    ),
}

PAIRS: dict[tuple[str, str], Pair] = {
    ("bert", "distilbert"): Pair(
        BERT_TO_DISTILBERT,
        fold_token_types=(
            "distilbert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
        ),
        config_entries={
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_position_embeddings",
            "dim": "hidden_size",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "initializer_range": "initializer_range",
            "pad_token_id": "pad_token_id",
            "bos_token_id": "bos_token_id",
            "eos_token_id": "eos_token_id",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        fixed_entries={
            "layer_norm_eps": 1e-12,
            "is_decoder": False,
            "add_cross_attention": False,
            "position_embedding_type": "absolute",
            "classifier_dropout": None,
        },
    ),
    ("roberta", "roberta"): Pair(),
    ("gpt2", "gpt2"): Pair(),
}
