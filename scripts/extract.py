"""Make a student's first weights from layers of a RoBERTa or GPT-2, or a student of any teacher."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.models.extract_options import EXTRACT, parse
    from utils import read_flags_first

    read_flags_first(lambda: parse(EXTRACT))

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from distil.models import layer_choice, narrowing
from distil.models.architectures import ARCHITECTURES, PAIRS
from distil.models.checks import tokenizer_problem
from distil.models.compared_layers import EXTRACTION
from distil.models.export import save_folder, tokenizer_for
from distil.models.extract_options import EXTRACT, Defaults, parse
from distil.models.first_weights import (
    evenly_spaced_layers,
    extract_student,
    student_of_layers,
    student_of_pair,
)
from distil.models.hub import load_config
from distil.models.language_model import (
    LanguageModel,
    is_masked_config,
    is_untied,
    load_language_model,
    load_network,
    resolve_architecture,
    save_used_bias_twice,
)
from distil.models.layer_choice import LayerChoice
from distil.models.narrowing import Importance, Sizes
from distil.system.files import atomic_folder, require_output, save_weights, write_json
from distil.system.memory import reuse_memory
from lm_seqs_dataset import LmSeqsDataset
from utils import (
    InputError,
    bar_options,
    logger,
    raise_problems,
    run_program,
    setup_logging,
)

DEFAULT_NUM_LAYERS = 6


def choose_layers(
    num_teacher_layers: int, num_layers: int | None, layers: Sequence[int] | None
) -> list[int]:
    """Choose the teacher's layers by the flags.

    Raises InputError where the teacher has no such layers.
    """
    if layers is not None and num_layers is not None:
        raise InputError("--layers and --num_layers: give one of them")
    if layers is not None:
        wrong = [layer for layer in layers if not 0 <= layer < num_teacher_layers]
        if wrong:
            raise InputError(
                f"--layers {wrong[0]}: the teacher has layers 0 to {num_teacher_layers - 1}"
            )
        return list(layers)
    wanted = (
        num_layers
        if num_layers is not None
        else max(min(DEFAULT_NUM_LAYERS, num_teacher_layers // 2), 1)
    )
    if not 1 <= wanted <= num_teacher_layers:
        raise InputError(
            f"--num_layers {wanted}: expected 1 to {num_teacher_layers}, the teacher's layers"
        )
    return evenly_spaced_layers(num_teacher_layers, wanted)


def extract(defaults: Defaults, argv: list[str] | None = None) -> None:
    """Run either program: load the teacher, copy its layers, write the student."""
    args = parse(defaults, argv)
    setup_logging(logging.INFO)
    if args.choose_layers is not None and None in (args.teacher, args.output):
        raise InputError("--choose_layers: needs --teacher and --output; give both")
    if args.teacher is None and args.output is None:
        write_state_dict(args, defaults)
    elif args.teacher is None or args.output is None:
        raise InputError(
            "--teacher and --output: expected both, or neither (then --model_type, --model_name,"
            " --dump_checkpoint)"
        )
    else:
        write_student(args)


def write_state_dict(args: argparse.Namespace, defaults: Defaults) -> None:
    """Write the state dict of a student's first weights, as in 2019."""
    inputs = [args.model_name]
    require_output(args.dump_checkpoint, "--dump_checkpoint", inputs, force=args.force)
    student_type = defaults.student_types[args.model_type]
    require_folding(args, args.model_type, student_type)
    teacher = load_network(ARCHITECTURES[args.model_type], args.model_name, "--model_name")
    layers = choose_layers(teacher.config.num_hidden_layers, args.num_layers, args.layers)
    options = {"vocab_transform": args.vocab_transform, "fold_token_types": args.fold_token_types}
    state = extract_student(teacher, student_type, layers, **options)
    save_weights(args.dump_checkpoint, state)
    print(
        f"Took {len(layers)} layers ({' '.join(map(str, layers))}) and {len(state)} tensors.",
        flush=True,
    )
    logger.info("Wrote %s.", args.dump_checkpoint)
    numbers = "".join(map(str, layers))
    is_default = args.dump_checkpoint == defaults.dump_checkpoint
    if is_default and not Path(args.dump_checkpoint).stem.endswith(f"_{numbers}"):
        text = "%s: the default name is of other layers than it holds (%s); rename it."
        logger.warning(text, args.dump_checkpoint, " ".join(map(str, layers)))
    if is_untied(teacher):
        text = '%s: the teacher\'s input and output embeddings differ: set "tie_word_embeddings":'
        logger.warning(f"{text} false in the student's JSON.", args.dump_checkpoint)


def require_folding(args: argparse.Namespace, teacher_type: str, student_type: str | None) -> None:
    """Raise InputError for --fold_token_types where the student keeps its token types."""
    pair = PAIRS.get((teacher_type, student_type or teacher_type))
    if args.fold_token_types and not (pair and pair.fold_token_types):
        raise InputError(
            "--fold_token_types: is for a DistilBERT made of a BERT (extract_distilbert.py, or"
            " --student_type distilbert); leave it out"
        )


def write_student(args: argparse.Namespace) -> None:
    """Write a student's folder, which from_pretrained and train.py --student load.

    Raises InputError.
    """
    source = f"--teacher {args.teacher}"
    if args.choose_layers is not None and (args.num_layers is None or args.layers is not None):
        raise InputError("--choose_layers: needs --num_layers, and no --layers; give these")
    require_output(args.output, "--output", [args.teacher], is_folder=True)
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise InputError(f"--output {args.output}: holds something already; name a new folder")
    config = load_config(None, args.teacher, "--teacher", args.trust_remote_code)
    trust = args.trust_remote_code
    architecture = resolve_architecture(config, is_masked_config(config, source), source, trust)
    require_folding(args, config.model_type, args.student_type)
    num_layers = getattr(config, "num_hidden_layers", None)
    layers = (
        choose_layers(num_layers, args.num_layers, args.layers)
        if isinstance(num_layers, int)
        else []
    )
    sizes = student_sizes(args, config, source)
    model = load_language_model(architecture, args.teacher, "--teacher")
    raise_problems([tokenizer_problem(model)])
    teacher, tokenizer = model.network, model.tokenizer
    choice = None
    if args.choose_layers is not None:
        choice = measure_layers(args, model)
        layers = choice.kept
    student = make_student(teacher, args, layers, source)
    if sizes is not None:
        student = narrowing.narrowed(
            student, sizes, measure_importance(args, model, student), source
        )
    save_used_bias_twice(student)
    with atomic_folder(args.output) as folder:
        save_folder(student, tokenizer_for(student, tokenizer), folder)
        save_weights(folder / "first_weights.pth", student.state_dict())
        taken = {"teacher": args.teacher, "layers": layers, "of": num_layers}
        if sizes is not None:
            taken["sizes"] = dataclasses.asdict(sizes)
        if choice is not None:
            taken["choice"] = report_choice(choice, args, folder)
        write_json(folder / EXTRACTION, taken)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    print(
        f"Took {len(layers)} of {num_layers} layers ({' '.join(map(str, layers))}):"
        f" {parameters[0]:,} parameters of {parameters[1]:,}.",
        flush=True,
    )
    logger.info(
        "Wrote %s: distil it with train.py --student %s --teacher_name %s.",
        args.output,
        args.output,
        args.teacher,
    )


def report_choice(choice: LayerChoice, args: argparse.Namespace, folder: Path) -> dict:
    """Print and draw what each layer costs; return the choice for extraction.json."""
    text = layer_choice.as_markdown(choice)
    (folder / "layers.md").write_text(f"{text}\n", encoding="utf-8")
    facts = {"teacher": args.teacher, "held out": args.choose_layers}
    layer_choice.draw(choice, folder / "layers.png", facts)
    print(text, flush=True)
    return {"file": args.choose_layers, **layer_choice.as_json(choice)}


def student_sizes(args: argparse.Namespace, config, source: str) -> Sizes | None:
    """Return a narrower student's sizes; None where no flag asks for one. Raises InputError."""
    given = args.hidden_size, args.intermediate_size, args.num_heads
    if given == (None, None, None):
        if args.importance_file is not None:
            raise InputError(
                "--importance_file: needs --hidden_size, --intermediate_size or --num_heads"
            )
        return None
    if args.student_type is not None:
        raise InputError(
            f"--student_type {args.student_type}: has its teacher's sizes; leave it out, or"
            " --hidden_size, --intermediate_size and --num_heads"
        )
    return narrowing.wanted_sizes(config, *given, source)


def measure_importance(args: argparse.Namespace, model: LanguageModel, student) -> Importance:
    """Score what a narrower student may keep, on a text if there is one."""
    flag = "importance_file" if args.importance_file else "choose_layers"
    if getattr(args, flag) is None:
        return narrowing.importance_by_weights(student)
    dataset = LmSeqsDataset.from_file(getattr(args, flag), model, None, f"--{flag}")
    batches = layer_choice.asked_batches(dataset, model.tokenizer, model.is_masked)
    return narrowing.importance_by_activations(student, batches)


def measure_layers(args: argparse.Namespace, model: LanguageModel) -> LayerChoice:
    """Choose --num_layers of the teacher's layers on held-out text. Raises InputError."""
    dataset = LmSeqsDataset.from_file(args.choose_layers, model, None, "--choose_layers")
    batches = layer_choice.asked_batches(dataset, model.tokenizer, model.is_masked)
    sizes = model.network.config.num_hidden_layers, args.num_layers
    total, source = layer_choice.num_measurements(*sizes), f"--teacher {args.teacher}"
    with tqdm(total=total, unit="measurement", **bar_options()) as bar:
        given = model.network, args.num_layers, batches, source
        return layer_choice.choose_by_measurement(*given, bar.update)


def make_student(teacher, args: argparse.Namespace, layers: Sequence[int], source: str):
    """Make a student of the teacher's type, or of --student_type, which PAIRS lists for it."""
    if args.student_type is not None:
        return student_of_pair(teacher, args.student_type, layers, args.fold_token_types)
    return student_of_layers(teacher, layers, source)


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    reuse_memory()  # layers and importance are measured on the CPU
    extract(EXTRACT, argv)


if __name__ == "__main__":
    run_program(main)
