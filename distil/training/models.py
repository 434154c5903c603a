"""The models of a run: the teacher; the student's configuration, first weights and frozen parts."""

import os
from typing import Any

import torch

from distil.data import cards
from distil.data.token_files import files_of
from distil.models import compared_layers
from distil.models.architectures import ARCHITECTURES, AUTO, Architecture
from distil.models.checks import (
    ids_problem,
    size_mismatches,
    vocabulary_problem,
)
from distil.models.compared_layers import extracted_layers, parse_layer_map
from distil.models.first_weights import evenly_spaced_layers, load_student_weights
from distil.models.forward import recompute_activations, set_dropout
from distil.models.heads import FirstEntries, Head
from distil.models.hub import load_config
from distil.models.language_model import (
    LanguageModel,
    build_network,
    freeze_embeddings,
    load_network,
    read_student_config,
    resolve_architecture,
    resolve_by_name,
    save_used_bias_twice,
)
from distil.models.tokenizer_rules import difference, tokenizer_facts
from distil.models.tokenizers import load_tokenizer
from distil.objectives import LOSSES
from distil.training.config import TrainConfig
from utils import InputError, keyed_seed, logger, raise_problems

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")


def student_source(config: TrainConfig) -> str:
    """Name the student in a message: its flag and path."""
    if config.student is None:
        return f"--student_config {config.student_config}"
    return f"--student {config.student}"


def find_student_config(config: TrainConfig):
    """Load the student's configuration: the folder's, or the JSON. Raises InputError."""
    if config.student is None:
        given = config.student_type, config.student_config, config.initializer_range
        return read_student_config(*given)
    named = None if config.student_type == AUTO else config.student_type
    return load_config(named, config.student, "--student", config.trust_remote_code)


def load_teacher(config: TrainConfig) -> LanguageModel:
    """Load the teacher with its tokenizer; compare the files' cards before its weights are read.

    Raises InputError.
    """
    kind = config.teacher_type, config.mlm, config.trust_remote_code
    name, flag = config.teacher_name, "--teacher_name"
    architecture = resolve_by_name(name, flag, *kind)
    named = architecture.name if architecture.is_named else None
    num_rows = load_config(named, name, flag, config.trust_remote_code).vocab_size
    tokenizer = load_tokenizer(architecture, name, flag)
    facts = tokenizer_facts(tokenizer)
    problems = [ids_problem(facts["vocab_size"], num_rows, f"{flag} {name}")]
    for option in ("data_file", "eval_data_file", "token_counts"):
        path = getattr(config, option)
        if path is None:
            continue
        card_file = f"{path}.json" if option == "token_counts" else files_of(path)[-1]
        card = cards.read_card(card_file, f"--{option}")
        source = f"--{option} {path}", f"{flag} {name}"
        problems.append(cards.tokenizer_problem(card, facts, *source))
    raise_problems(problems)
    network = load_network(architecture, name, flag).eval().requires_grad_(False)
    return LanguageModel(architecture, network, tokenizer, f"{flag} {name}")


def resolve_student(config: TrainConfig, student_config) -> Architecture:
    """Resolve the student's architecture. Raises InputError."""
    if config.student_type != AUTO:
        return ARCHITECTURES[config.student_type]
    source, trust = student_source(config), config.trust_remote_code
    return resolve_architecture(student_config, config.mlm, source, trust)


def check_models(
    config: TrainConfig, architecture: Architecture, student_config, teacher: LanguageModel
) -> None:
    """Raise InputError, a line each, where a student does not fit its teacher and tokenizer."""
    check_student_vocabulary(config, architecture, teacher.tokenizer)
    needs_width = any(LOSSES[name].reads == "hidden" for name in config.active)
    configs = student_config, teacher.network.config
    is_fixed = config.student is not None  # its weights have sizes
    sizes = size_mismatches(*configs, student_source(config), architecture, needs_width, is_fixed)
    is_proven = config.student is None or has_tokenizer(config.student)
    rows = vocabulary_problem(student_config, teacher, student_source(config), is_fixed, is_proven)
    raise_problems([rows, *sizes, *layer_problems(config, *configs)])
    if student_config.vocab_size != teacher.vocab_size:
        logger.warning(
            "%s: has %d rows of the vocabulary, the teacher %d, their tokenizer %d entries: the"
            " teacher is compared over these; further rows are never asked for.",
            student_source(config),
            student_config.vocab_size,
            teacher.vocab_size,
            teacher.num_entries,
        )


def layer_problems(config: TrainConfig, student_config, teacher_config) -> list[str]:
    """Describe the layers named by flags that student or teacher lacks."""
    if config.relation_layer is None and config.layer_map is None:
        return []
    counts = [num_layers_of(one) for one in (student_config, teacher_config)]
    problems = []
    if config.relation_layer is not None:
        pair = [(counts[0] - 1, config.relation_layer)]
        found = compared_layers.layer_problems(pair, *counts)
        problems += [f"--relation_layer {config.relation_layer}: {text}" for text in found]
    if config.layer_map is not None:
        found = compared_layers.layer_problems(parse_layer_map(config.layer_map), *counts)
        problems += [f"--layer_map {config.layer_map}: {text}" for text in found]
    return problems


def objective_options(config: TrainConfig, student_config, teacher_config) -> dict[str, Any]:
    """Return the flags that the active objectives' modules take, the layer map resolved.

    Its default: the layers that the student was made of, else evenly spaced ones.
    """
    names = {option for name in config.active for option in LOSSES[name].options}
    options = {name: getattr(config, name) for name in names}
    if config.layer_map is not None:
        options["layer_map"] = parse_layer_map(config.layer_map)
    elif "layer_map" in names:
        counts = [num_layers_of(one) for one in (student_config, teacher_config)]
        folder = config.student or os.path.dirname(config.student_pretrained_weights or "")
        layers = extracted_layers(folder, *counts) or evenly_spaced_layers(counts[1], counts[0])
        options["layer_map"] = list(enumerate(layers))
    return options


def num_layers_of(config) -> int:
    """Return a configuration's number of layers."""
    return config.get_text_config().num_hidden_layers


def compared_head(student: LanguageModel, teacher: LanguageModel) -> Head:
    """Return the teacher's head, cut to the tokenizer's entries where the models' rows differ.

    Models of equal sizes are compared over all rows, as in 2019.
    """
    if student.vocab_size == teacher.vocab_size:
        return teacher.head
    return FirstEntries(teacher.head, teacher.num_entries)


def has_tokenizer(folder: str) -> bool:
    """Test whether a student's folder holds a tokenizer."""
    return any(os.path.exists(f"{folder}/{file}") for file in TOKENIZER_FILES)


def check_student_vocabulary(config: TrainConfig, architecture: Architecture, tokenizer) -> None:
    """Raise InputError where the student's folder holds a tokenizer of another vocabulary."""
    folder = config.student
    if folder is None or not has_tokenizer(folder):
        return
    own = load_tokenizer(architecture, folder, "--student")
    found = difference(own, tokenizer)
    if found:
        raise InputError(
            f"--student {folder}: {found}; a student has its teacher's tokenizer: remove its"
            " tokenizer files if it was trained on ids of the teacher's"
        )


def make_student(
    config: TrainConfig, architecture: Architecture, student_config, tokenizer
) -> LanguageModel:
    """Load the student's folder, or build it at random from a seed and load its first weights.

    Position embeddings and token types are frozen as the flags say.
    """

    def build(draws: bool = True) -> torch.nn.Module:
        torch.manual_seed(keyed_seed(config.seed, "student"))
        if config.student is not None:
            return load_network(architecture, config.student, "--student")
        return build_network(architecture, student_config, student_source(config), draws=draws)

    weights = config.student_pretrained_weights
    student = build(draws=weights is None)
    if weights is not None:
        load_student_weights(student, architecture, weights, build)
    save_used_bias_twice(student)
    positions, token_types = config.freeze_pos_embs, config.freeze_token_type_embds
    freeze_embeddings(student, architecture, positions=positions, token_types=token_types)
    if config.student_dropout is not None:
        set_dropout(student, config.student_dropout)
    if config.activation_checkpointing:
        recompute_activations(student, config.compile)
    return LanguageModel(architecture, student, tokenizer, student_source(config))
