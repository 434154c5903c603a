"""Tiny models of families with and without a row in ARCHITECTURES: real classes, random weights."""

from pathlib import Path

import tokenizers
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
# Further entries of a family's configuration.
MORE = {
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]], "window_size": 4},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "llama": {"tie_word_embeddings": False},
    "longformer": {"attention_window": [8] * NUM_LAYERS},  # sequences are padded to multiples of it
}
# Factors of the initial weights, 4 by default. ModernBERT's layers add little to their input: with
# 4, half of the layers would give the same logits.
SCALES = {"modernbert": 16}
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
ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert")  # by tokenizer
CAUSAL = ("gpt2", "gpt_neox", "gpt_neo", "opt", "llama", "qwen2", "qwen3", "gemma", "gemma2")


def auto_class(is_masked: bool):
    return transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM


def tiny_config(model_type: str, vocab_size: int, **special_ids: int | None):
    """Make a small configuration of any family from the entries that the family has."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    known, names = config_class().to_dict(), config_class.attribute_map
    wanted = SIZES | MORE.get(model_type, {}) | {"vocab_size": vocab_size} | special_ids
    entries = {names.get(name, name): value for name, value in wanted.items()}
    entries = {key: value for key, value in entries.items() if key in known}
    depth = names.get("num_hidden_layers", "num_hidden_layers")
    return config_class(**entries, **{depth: NUM_LAYERS})


def tiny_model(
    model_type: str, is_masked: bool, vocab_size: int = 99, seed: int = 0, **special_ids: int | None
):
    """Make a model with random weights, large enough for caps and scales to change its logits."""
    special_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | special_ids
    config = tiny_config(model_type, vocab_size, **special_ids)
    torch.manual_seed(seed)
    model = auto_class(is_masked).from_config(config).eval()
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
    """Make a tokenizer with an end token but no bos, unknown or padding token, as Qwen's."""
    backend = tokenizers.Tokenizer.from_file(str(gpt2_folder / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>"
    )
    tokenizer.model_max_length = 64
    return tokenizer


def make_teacher(
    folder: Path, model_type: str, is_masked: bool, stand_ins: dict[str, Path], padding: int = 0
) -> Path:
    """Save a tiny teacher of a family with a suitable tokenizer; return its folder.

    padding: rows of its vocabulary beyond the tokenizer's.
    """
    if is_masked:
        kind = "roberta" if model_type in ROBERTA_LIKE else "bert"
        tokenizer = transformers.AutoTokenizer.from_pretrained(stand_ins[kind])
    else:
        tokenizer = causal_tokenizer(stand_ins["gpt2"])
    roles = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    ids = {name: number for name in roles if (number := getattr(tokenizer, name)) is not None}
    model = tiny_model(model_type, is_masked, len(tokenizer) + padding, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
