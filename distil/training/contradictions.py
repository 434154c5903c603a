"""What contradicts what among the flags of train.py, a line each, with flag, value and remedy."""

import itertools
import math

from distil.models.architectures import ARCHITECTURES, AUTO, PAIRS
from distil.models.compared_layers import parse_layer_map


def contradictions(config) -> list[str]:
    """List what contradicts what in a TrainConfig."""
    kinds = masking_problems, objective_problems, layer_flag_problems, type_problems
    kinds += pass_problems, plan_problems
    return [*itertools.chain(*(problems(config) for problems in kinds))]


def pass_problems(config) -> list[str]:
    """Say that passes of one micro-batch are not packed."""
    if not (config.pack_sequences and config.tokens_per_pass == 0):
        return []
    return [
        "--pack_sequences with --tokens_per_pass 0: a pass each micro-batch leaves nothing to pack;"
        " raise it, or leave one of them out"
    ]


def plan_problems(config) -> list[str]:
    """Name the flags of a plan where none is asked for."""
    return [
        f"--{name} {getattr(config, name):g} without --plan: add it, or leave this out"
        for name in ("tokens_per_second", "price_per_hour")
        if config.plan is None and getattr(config, name) is not None
    ]


def masking_problems(config) -> list[str]:
    """Check that the shares of what becomes of a predicted token add up to 1."""
    total = config.word_mask + config.word_keep + config.word_rand
    if abs(total - 1) <= 1e-6:
        return []
    return [f"--word_mask + --word_keep + --word_rand: their sum is {total:g}, expected 1"]


def objective_problems(config) -> list[str]:
    """Say which objectives contradict each other or --mlm."""
    alphas = config.alphas
    problems = [
        f"--alpha_{name} {alpha}: expected a finite number, 0 or more"
        for name, alpha in alphas.items()
        if not (math.isfinite(alpha) and alpha >= 0)
    ]
    mlm, clm = alphas["mlm"], alphas["clm"]
    # Both may be 0: the paper's ablation without the language-modelling loss (its table 4).
    if mlm > 0 and clm > 0:
        problems.append(
            f"--alpha_mlm {mlm} and --alpha_clm {clm}: expected one of them above 0; set the other"
            " to 0"
        )
    elif config.mlm and clm > 0:
        problems.append(f"--alpha_clm {clm} with --mlm: set --alpha_clm 0, or leave --mlm out")
    if not config.mlm and mlm > 0:
        problems.append(f"--alpha_mlm {mlm} without --mlm: add --mlm, or set --alpha_mlm 0")
    if not sum(alphas.values()) > 0:
        problems.append(
            f"{' '.join(f'--alpha_{name}' for name in alphas)}: their sum is not above 0; weigh an"
            " objective"
        )
    if config.mlm and config.mlm_smoothing > 0 and config.token_counts is None:
        problems.append(
            f"--mlm with --mlm_smoothing {config.mlm_smoothing}, without --token_counts: expected"
            " the file that scripts/token_counts.py makes; name it, or set --mlm_smoothing 0"
        )
    if config.eval_interval is not None and config.eval_data_file is None:
        problems.append(
            f"--eval_interval {config.eval_interval} without --eval_data_file: name held-out text"
            " to evaluate"
        )
    return problems


# Flag -> the objectives that read it.
READ_BY = {"relation_layer": ("rel",), "layer_map": ("hid", "att")}


def layer_flag_problems(config) -> list[str]:
    """Say which layers are named in a wrong way, or for no objective."""
    problems = []
    for flag, names in READ_BY.items():
        value = getattr(config, flag)
        if value is not None and not any(config.alphas[name] > 0 for name in names):
            flags = " or ".join(f"--alpha_{name}" for name in names)
            problems.append(f"--{flag} {value} without {flags}: weigh one, or leave it out")
    if config.layer_map is not None:
        try:
            parse_layer_map(config.layer_map)
        except ValueError as error:
            problems.append(f"--layer_map {config.layer_map}: {error}")
    return problems


def type_problems(config) -> list[str]:
    """Say why teacher, student and objective don't go together."""
    student, teacher = config.student_type, config.teacher_type
    problems = student_problems(config)
    if AUTO not in (teacher, student) and (teacher, student) not in PAIRS:
        known = ", ".join(f"{t} -> {s}" for t, s in PAIRS)
        problems.append(
            f"--teacher_type {teacher} with --student_type {student}: no such pair; expected one of"
            f" {known}"
        )
    named = {
        flag: kind
        for flag, kind in (("--student_type", student), ("--teacher_type", teacher))
        if kind != AUTO
    }
    for flag, model_type in named.items():
        is_masked = ARCHITECTURES[model_type].is_masked
        if config.mlm != is_masked:
            kind = "masked" if is_masked else "causal"
            remedy = "add --mlm, and set --alpha_clm 0" if is_masked else "leave --mlm out"
            problems.append(
                f"{flag} {model_type} {'with' if config.mlm else 'without'} --mlm: it is a {kind}"
                f" model; {remedy}"
            )
    if config.bf16 and config.fp16:
        problems.append("--bf16 and --fp16: two precisions; leave one of them out")
    if config.max_tokens is not None and not config.group_by_size:
        problems.append(
            "--max_tokens with --no-group_by_size: the budget is planned by length; leave one of"
            " them out"
        )
    if (
        config.freeze_token_type_embds
        and student != AUTO
        and ARCHITECTURES[student].token_type_embeddings is None
    ):
        problems.append(
            f"--freeze_token_type_embds with --student_type {student}: it has no token types; leave"
            " it out"
        )
    return problems


def student_problems(config) -> list[str]:
    """Say where the student is given twice, or not at all."""
    if config.student is None:
        missing = (
            "--student, --student_config: neither is given; name a folder made by"
            " scripts/extract.py --output, or a JSON"
        )
        return [missing] if config.student_config is None else []
    others = ("student_config", "student_pretrained_weights", "initializer_range")
    return [
        f"--{name} {getattr(config, name)} with --student {config.student}: the folder holds"
        " configuration and weights; leave one of them out"
        for name in others
        if getattr(config, name) is not None
    ]
