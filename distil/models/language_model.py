"""Language models: architecture, network and tokenizer, resolved once at the start of a program.

A program resolves each model from its flags and passes a LanguageModel to everything else. Teachers
are loaded in evaluation mode without gradients; students are built from a JSON configuration or
loaded from a folder.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from distil.data.token_files import SpecialIds
from distil.models import conventions
from distil.models.architectures import ARCHITECTURES, AUTO, Architecture
from distil.models.bounds import ENTRIES, check_counts, check_memory
from distil.models.checks import check_finite, is_finite, some_of
from distil.models.heads import Head, own_head_parameters, path_of, prediction_head
from distil.models.hub import check_weight_files, load_config, quiet_transformers
from distil.models.names import model_folder
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizer_rules import tokenizer_facts
from distil.models.tokenizers import load_tokenizer
from distil.system.failures import naming_failures
from distil.system.files import require_file
from distil.system.json_files import read_json
from utils import InputError, logger, one_line

MAX_LENGTH = 2**20  # if neither tokenizer nor model sets a limit


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A network with its architecture and tokenizer; source: its flag and name, for messages."""

    architecture: Architecture
    network: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    source: str

    @property
    def is_masked(self) -> bool:
        """True for masked-language models, False for causal ones."""
        return self.architecture.is_masked

    @property
    def vocab_size(self) -> int:
        """Number of logits, V; the tokenizer may have fewer entries."""
        return self.network.config.vocab_size

    @functools.cached_property
    def num_entries(self) -> int:
        """The tokenizer's largest id + 1. The model's rows beyond are padding, never asked for."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def max_length(self) -> int:
        """Length in ids of the longest sequence that tokenizer and position table admit."""
        return max_input_length(self.architecture, self.tokenizer, self.network.config)

    @functools.cached_property
    def special_ids(self) -> SpecialIds:
        """Ids of start, end, padding and the unknown token."""
        return special_ids(self.architecture, self.tokenizer)

    @functools.cached_property
    def tokenizer_facts(self) -> dict[str, Any]:
        """What decides the tokenizer's ids: see `tokenizer_facts` of tokenizer_rules.py."""
        return tokenizer_facts(self.tokenizer)

    @functools.cached_property
    def head(self) -> Head:
        """The projection from last hidden states to logits."""
        return prediction_head(self.network)


def resolve_architecture(
    config, is_masked: bool, source: str, trust_remote_code: bool = False
) -> Architecture:
    """Return the row of a model's configuration, or a new one by conventions.

    trust_remote_code: see load_config. Raises InputError naming `source` if transformers has no
    such language model, or if it lacks a part that distillation needs.
    """
    named = ARCHITECTURES.get(config.model_type)
    if named is not None and named.is_masked == is_masked:
        return named
    skeleton = conventions.skeleton(config, is_masked, source, trust_remote_code)
    parts = conventions.anatomy(skeleton, source)
    return Architecture(
        type(skeleton).__name__,
        type(skeleton).__name__,
        type(config).__name__,
        "AutoTokenizer",
        (),
        transform=None,
        projection=parts.output,
        layers=f"{parts.layer_lists[0]}." if parts.layer_lists else "",
        position_embeddings=parts.positions,
        token_type_embeddings=parts.token_types,
        reserved_positions=parts.reserved_positions,
        masked=is_masked,
        runs_remote_code=trust_remote_code,
    )


def resolve_by_name(
    name: str,
    flag: str,
    model_type: str = AUTO,
    is_masked: bool | None = None,
    trust_remote_code: bool = False,
) -> Architecture:
    """Resolve the architecture of a hub name or folder.

    is_masked: None means as the saved class. Raises InputError naming `flag`.
    """
    if model_type != AUTO:
        return ARCHITECTURES[model_type]
    source = f"{flag} {name}"
    config = load_config(None, name, flag, trust_remote_code)
    is_masked = is_masked_config(config, source) if is_masked is None else is_masked
    return resolve_architecture(config, is_masked, source, trust_remote_code)


def load_language_model(architecture: Architecture, name: str, flag: str) -> LanguageModel:
    """Load tokenizer and network, in evaluation mode without gradients. Raises InputError."""
    tokenizer = load_tokenizer(architecture, name, flag)
    network = load_network(architecture, name, flag).eval().requires_grad_(False)
    return LanguageModel(architecture, network, tokenizer, f"{flag} {name}")


def max_input_length(architecture: Architecture, tokenizer, config) -> int:
    """Return the length in ids of the longest sequence that tokenizer and positions admit."""
    # Differs from the original: from tokenizer and configuration. 2019 had a table of model names,
    # which fails for any other name.
    positions = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
    reserved = architecture.reserved_positions
    if reserved and isinstance(getattr(config, "pad_token_id", None), int):
        reserved = max(reserved, config.pad_token_id + 1)  # they are numbered from the padding id
    return int(min(tokenizer.model_max_length, positions - reserved))


def load_network(
    architecture: Architecture, name: str, flag: str, *, may_lack_head: bool = False
) -> torch.nn.Module:
    """Load a complete language model in float32. Raises InputError if weights do not fit it.

    may_lack_head: parameters of the prediction head that the folder lacks begin at random, and are
    logged. Checks the conventions by which an architecture without a row was resolved.
    """
    row = architecture
    config = load_config(
        row.name if row.is_named else None, name, flag, row.runs_remote_code, return_dict=True
    )
    check_memory(config, lambda: _build(row, config), f"{flag} {name}")
    with (
        quiet_transformers(),
        naming_failures(f"{flag} {name}: its weights could not be loaded"),
    ):
        check_weight_files(name, flag)
        model, report = _loader(row).from_pretrained(
            model_folder(name),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=row.runs_remote_code,
            weights_only=True,
        )
    misfits = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    of_a_layer = re.compile(rf"(^|\.){re.escape(row.layers.partition('.')[2] or chr(0))}\d+\.")
    extra = [name for name in report["unexpected_keys"] if of_a_layer.search(name)]
    misfits += [name for name in extra if not re.search(row.obsolete, name)]
    if misfits:
        raise InputError(
            f"{flag} {name}: {some_of(sorted(misfits))} do not fit its config.json; take a whole,"
            " unedited model"
        )
    absent = set(report["missing_keys"])
    state = model.state_dict()
    biases = linked_biases(model, state, absent)
    for name, value in biases.items():
        state[name].copy_(value)
    absent -= set(biases)
    absent -= set(row.aliases) | _tied_names(model, absent)
    _check_absent(model, row, sorted(absent), f"{flag} {name}", may_lack_head)
    check_finite(model.state_dict(), f"{flag} {name}")
    _declare_untied(model, f"{flag} {name}")
    if not row.is_named:
        conventions.check_conventions(model, row.is_masked, f"{flag} {name}")
    return model


def _check_absent(
    model: torch.nn.Module, row: Architecture, absent: list[str], source: str, may_lack_head: bool
) -> None:
    """Log the head's absent parameters where it may lack them; raise InputError for others."""
    new = set(absent) & own_head_parameters(model).keys() if may_lack_head else set()
    missing = [name for name in absent if name not in new]
    if missing:
        head = "; only those of its head may be absent" if may_lack_head else ", with its head"
        raise InputError(
            f"{source}: has no weights for {some_of(missing)}; a whole {row.model_class} is"
            f" expected{head}"
        )
    if new:
        text = "%s: lacks parameters of the prediction head, which begin at random: %s."
        logger.info(text, source, ", ".join(sorted(new)))


def _loader(row: Architecture):
    """Return the class that loads a model: its own for a row, else an auto class."""
    if row.is_named:
        return getattr(transformers, row.model_class)
    return transformers.AutoModelForMaskedLM if row.is_masked else transformers.AutoModelForCausalLM


def linked_biases(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], absent: Collection[str]
) -> dict[str, torch.Tensor]:
    """Find the values of a model's absent output biases under their second names: name -> value.

    transformers 4 had one bias under two names (lm_head.bias, lm_head.decoder.bias) and saved it
    once; in transformers 5 an untied model has two, and one that is absent would be zero.
    """
    links = getattr(model, "_tied_weights_keys", None)
    links, own = links if isinstance(links, dict) else {}, model.state_dict()
    return {
        name: state[other]
        for name, other in [*links.items(), *((b, a) for a, b in links.items())]
        if name in absent and other in state and other not in absent and own[name].dim() == 1
    }


def save_used_bias_twice(model: torch.nn.Module) -> None:
    """Give an unused second output bias the value of the used one whenever the model is saved.

    Of an untied model transformers 5 uses decoder.bias alone, transformers 4 reads either name.
    """
    projection = model.get_output_embeddings()
    used, own = getattr(projection, "bias", None), dict(model.named_parameters())
    if used is None or not is_untied(model):
        return
    name = next(name for name, parameter in own.items() if parameter is used)
    links = getattr(model, "_tied_weights_keys", None)
    other = own.get(links.get(name)) if isinstance(links, dict) else None
    if other is None or other is used:
        return

    @torch.no_grad()
    def copy(*unused) -> None:
        other.copy_(used)

    model.register_state_dict_pre_hook(copy)


def is_untied(model: torch.nn.Module) -> bool:
    """Test whether a model's input and output embeddings are two tables."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is not model.get_input_embeddings().weight


def _declare_untied(model: torch.nn.Module, source: str) -> None:
    """Correct a configuration that ties embeddings which the loaded checkpoint has two of.

    transformers 5 leaves such a model untied, but a copy of its configuration would tie them.
    """
    links = getattr(model, "_tied_weights_keys", None) or {}
    output = path_of(model, model.get_output_embeddings())
    is_tied = getattr(model.config, "tie_word_embeddings", False) and f"{output}.weight" in links
    if is_tied and is_untied(model):
        text = "%s: its configuration ties input and output embeddings, its weights do not: it is"
        logger.warning(f"{text} taken as untied.", source)
        model.config.tie_word_embeddings = False


def _tied_names(model: torch.nn.Module, names: set[str]) -> set[str]:
    """Select the names whose tensors also have a name outside `names`."""
    state = model.state_dict()
    others = {tensor.data_ptr() for name, tensor in state.items() if name not in names}
    return {name for name in names & set(state) if state[name].data_ptr() in others}


# Entries of a saved configuration that are ignored: set by each run, or naming code or files.
RUN_ENTRIES = (
    *("auto_map", "attn_implementation", "_attn_implementation", "transformers_weights"),
    *("experts_implementation", "_experts_implementation"),
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "quantization_config",
)


def read_student_config(
    model_type: str,
    path: str,
    initializer_range: float | None = None,
    flag: str = "--student_config",
):
    """Read a model's JSON configuration, of the type that it states if model_type is AUTO.

    Raises InputError if the file is not a configuration of `model_type`.
    """
    require_file(path, flag)
    remedy = "take another copy, or write it as those in training_configs/"
    content = read_json(path, f"{flag} {path}", remedy, ENTRIES, strict=False)
    check_counts(content, f"{flag} {path}")
    try:
        if model_type == AUTO:
            model_type = content.get("model_type", "none")
        declared = content.pop("model_type", model_type)
        config_class = type(transformers.AutoConfig.for_model(model_type))
        unknown = [key for key in content if not hasattr(config_class(), key)]
        entries = {key: value for key, value in content.items() if key not in RUN_ENTRIES}
        config = config_class(**entries)
    except Exception as error:
        raise InputError(
            f"{flag} {path}: not a {model_type} configuration ({one_line(error)}); correct it"
        ) from error
    if declared != model_type:
        raise InputError(
            f"{flag} {path}: is for a {declared} model, expected {model_type}; name another file"
        )
    if config.num_hidden_layers < 1:
        raise InputError(
            f"{flag} {path}: has {config.num_hidden_layers} layers, expected at least 1; correct it"
        )
    if unknown and model_type in ARCHITECTURES:
        text = "%s %s: a %s model has no use for %s; check the spelling."
        logger.warning(text, flag, path, model_type, some_of(unknown))
    # Differs from the original: 2019 parsed the flag and ignored it.
    if initializer_range is not None:
        config.initializer_range = initializer_range
    if model_type in ARCHITECTURES:
        config.architectures = [ARCHITECTURES[model_type].model_class]
    return config


def _build(architecture: Architecture, config) -> torch.nn.Module:
    if architecture.is_named:
        return getattr(transformers, architecture.model_class)(config)
    trust = architecture.runs_remote_code
    return _loader(architecture).from_config(config, trust_remote_code=trust)


def build_network(
    architecture: Architecture, config, source: str = "--student_config", *, draws: bool = True
) -> torch.nn.Module:
    """Build a network with random weights. Raises InputError naming `source`.

    draws: False where all weights are loaded next: they are left undefined, which saves the time
    of drawing them. Code from a model hub draws in any case.
    """
    what = f"{source}: cannot build a model from it"
    with quiet_transformers(), naming_failures(what, "; correct the JSON"):
        check_memory(config, lambda: _build(architecture, config), source)
        if draws or not architecture.is_named:
            return _build(architecture, config)
        with no_init_weights():
            network = _build(architecture, config)
        network.tie_weights()
        return network


def freeze_embeddings(
    student: torch.nn.Module, architecture: Architecture, *, positions: bool, token_types: bool
) -> None:
    """Freeze position embeddings (always if sinusoidal) and token type embeddings."""
    # Differs from the original: --freeze_pos_embs freezes DistilBERT's positions. 2019 ignored it,
    # though its README passes it.
    if positions and architecture.position_embeddings is None:
        text = "--freeze_pos_embs: a %s has no table of positions; nothing to freeze."
        logger.warning(text, type(student).__name__)
    elif positions or getattr(student.config, "sinusoidal_pos_embds", False):
        student.get_submodule(architecture.position_embeddings).requires_grad_(False)
    if token_types and architecture.token_type_embeddings:
        student.get_submodule(architecture.token_type_embeddings).requires_grad_(False)


def is_masked_config(config, source: str) -> bool:
    """Test whether a configuration is for a masked-language model (True) or a causal one (False).

    Decides by the class that was saved, else for masked if transformers has both. Raises InputError
    naming `source` if it has neither.
    """
    kinds = {
        True: transformers.MODEL_FOR_MASKED_LM_MAPPING,
        False: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    found = [kind for kind, mapping in kinds.items() if type(config) in mapping]
    classes = config.architectures or []
    saved = [kind for kind in found if kinds[kind][type(config)].__name__ in classes]
    if not found and not getattr(config, "auto_map", None):
        raise InputError(
            f"{source}: is a {config.model_type} model; expected a masked or causal language model"
        )
    return (saved or found or ["AutoModelForMaskedLM" in config.auto_map])[0]


@torch.no_grad()
def check_forward(model: LanguageModel, token_ids_BT: torch.Tensor) -> None:
    """Raise InputError if a model fails, or computes NaN or infinite values, on a sequence."""
    what = f"{model.source}: the model fails on {token_ids_BT.shape[1]} tokens"
    with naming_failures(what, "; correct its JSON"):
        hidden_BTD = model.network.base_model(token_ids_BT).last_hidden_state
        logits_NV = model.head(hidden_BTD[0, :1])
    if not (is_finite(hidden_BTD) and is_finite(logits_NV)):
        raise InputError(
            f"{model.source}: the model gives NaN or infinite values before any training; correct"
            " its JSON or weights"
        )
