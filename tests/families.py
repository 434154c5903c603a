"""Tiny models of families that architectures.py has no row for: random weights, real classes, a
tokenizer of the stand-ins'.
"""

import json
from pathlib import Path

import torch
import transformers

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "embedding_size": 32,
    "max_position_embeddings": 80,
    "head_dim": 8,
    "rotary_dim": 4,
    "word_embed_proj_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "sliding_window": 4,
    "local_attention": 8,
}
NUM_LAYERS = 4
# What a family's configuration wants besides.
MORE = {
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]], "window_size": 4},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "llama": {"tie_word_embeddings": False},
}
SCALES = {
    "modernbert": 16
}  # whose layers add little to their input else: half of them compute the same
MASKED = (
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "deberta-v2",
    "modernbert",
)
CAUSAL = ("gpt2", "gpt_neox", "gpt_neo", "opt", "llama", "qwen2", "qwen3", "gemma", "gemma2")


def tiny_config(model_type: str, vocab_size: int, **special_ids: int | None):
    """Make a small configuration of any family; an entry is set where the family has it."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    known, names = config_class().to_dict(), config_class.attribute_map
    wanted = SIZES | MORE.get(model_type, {}) | {"vocab_size": vocab_size} | special_ids
    entries = {
        names.get(name, name): value
        for name, value in wanted.items()
        if names.get(name, name) in known
    }
    return config_class(
        **entries, **{names.get("num_hidden_layers", "num_hidden_layers"): NUM_LAYERS}
    )


def tiny_model(
    model_type: str, is_masked: bool, vocab_size: int = 99, seed: int = 0, **special_ids: int | None
):
    """Make a model with random weights, larger than those it would begin with: caps and scales are
    to show.
    """
    special_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | special_ids
    auto_class = (
        transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(seed)
    model = auto_class.from_config(tiny_config(model_type, vocab_size, **special_ids)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALES.get(model_type, 4))
            elif "bias" in name:
                parameter.normal_(0, 0.1)
        spread = model(torch.arange(5, 25)[None]).logits.std()
        if spread < 1:  # nearly uniform distributions have nothing to teach
            model.get_output_embeddings().weight.mul_(1 / spread)
    return model


def causal_tokenizer(gpt2_folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Make a tokenizer without bos, unknown and padding tokens, as Qwen's: the stand-in's, with an
    end token alone.
    """
    content = json.loads((gpt2_folder / "tokenizer.json").read_text(encoding="utf-8"))
    backend = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_backend(content), eos_token="<|endoftext|>"
    )
    backend.model_max_length = 64
    return backend


def _backend(content: dict):
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(content))


def make_teacher(
    folder: Path, model_type: str, is_masked: bool, stand_ins: dict[str, Path]
) -> Path:
    """Save a tiny teacher of a family with a tokenizer that it may have; return its folder."""
    if is_masked:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            stand_ins["roberta" if model_type in OF_ROBERTA else "bert"]
        )
    else:
        tokenizer = causal_tokenizer(stand_ins["gpt2"])
    roles = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    ids = {name: number for name in roles if (number := getattr(tokenizer, name)) is not None}
    model = tiny_model(model_type, is_masked, len(tokenizer), **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


OF_ROBERTA = ("roberta", "xlm-roberta", "camembert")
