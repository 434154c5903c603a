"""Train a teacher on a token file: a small BERT from scratch, or any model from given weights.

It is the distillation loop without a teacher: the language-modelling loss alone.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.training.teacher_options import parse
    from utils import read_flags_first

    read_flags_first(parse)

import argparse
import logging
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from distil.data.batches import MlmPreparation
from distil.data.token_files import MIN_LENGTH
from distil.models.architectures import ARCHITECTURES
from distil.models.checks import tokenizer_problem
from distil.models.export import save_folder, tokenizer_for
from distil.models.heads import train_head_alone
from distil.models.language_model import (
    LanguageModel,
    build_network,
    load_network,
    read_student_config,
    resolve_by_name,
    save_used_bias_twice,
)
from distil.models.tokenizers import load_tokenizer
from distil.system.files import output_problem, write_json
from distil.system.launch import check_precision
from distil.training.optimizer import ADAM_BETAS, split_for_weight_decay
from distil.training.post_mortem import NonFiniteError
from distil.training.teacher_options import parse
from distiller import DistillationModel, Distiller
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset, make_preparation
from utils import (
    InputError,
    bar_options,
    keep_freed_memory,
    keyed_seed,
    logger,
    raise_problems,
    run_program,
    setup_logging,
)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for values out of range and an output folder that holds a model."""
    ranges = {
        "num_steps": (1, 1e9),
        "batch_size": (1, 1e6),
        "max_length": (MIN_LENGTH + 1, 1e6),
        "mlm_mask_prop": (1e-6, 1),
        "learning_rate": (1e-12, 1),
        "warmup_prop": (0, 1),
    }
    problems = [
        f"--{name} {getattr(args, name)}: expected {low:g} to {high:g}"
        for name, (low, high) in ranges.items()
        if not low <= getattr(args, name) <= high
    ]
    problems.append(output_problem(args.output_dir, "--output_dir", is_folder=True))
    names = ["model.safetensors", "config.json", "curve.json"]
    there = [name for name in names if os.path.lexists(os.path.join(args.output_dir, name))]
    if there and not args.force:
        problems.append(
            f"--output_dir {args.output_dir}: holds a {there[0]} already; choose another, or"
            " replace it with --force"
        )
    raise_problems(problems)


def build_model(args: argparse.Namespace) -> LanguageModel:
    """Build a BERT of --config with random weights. Raises InputError."""
    config = read_student_config("bert", args.config, flag="--config")
    source, architecture = f"--config {args.config}", ARCHITECTURES["bert"]
    tokenizer = load_tokenizer(architecture, args.tokenizer_name, "--tokenizer_name")
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= config.vocab_size:
        raise InputError(
            f"{source}: vocab_size is {config.vocab_size}, the tokenizer has ids up to"
            f" {largest_id}; set vocab_size {largest_id + 1} or more"
        )
    torch.manual_seed(keyed_seed(args.seed, "teacher"))
    network = build_network(architecture, config, source)
    return LanguageModel(architecture, network, tokenizer, source)


def load_model(args: argparse.Namespace) -> LanguageModel:
    """Load --weights; what the folder lacks of a head is random. Raises InputError."""
    name, flag = args.weights, "--weights"
    architecture = resolve_by_name(name, flag)
    if args.tokenizer_name is None:
        tokenizer = load_tokenizer(architecture, name, flag)
    else:
        tokenizer = load_tokenizer(architecture, args.tokenizer_name, "--tokenizer_name")
    torch.manual_seed(keyed_seed(args.seed, "teacher"))
    network = load_network(architecture, name, flag, may_lack_head=True)
    model = LanguageModel(architecture, network, tokenizer, f"{flag} {name}")
    raise_problems([tokenizer_problem(model)])
    if args.train_head_only:
        train_head_alone(network, model.source)
    return model


def make_distiller(args: argparse.Namespace, model: LanguageModel) -> Distiller:
    """Make the distiller, with loss, optimizer and schedule, without a teacher."""
    network, alphas = model.network, {"mlm" if model.is_masked else "clm": 1.0}
    objective = DistillationModel(network, alphas, temperature=1.0)
    optimizer = torch.optim.AdamW(
        split_for_weight_decay(network, 0.01), lr=args.learning_rate, betas=ADAM_BETAS
    )
    num_warmup = int(args.warmup_prop * args.num_steps)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, num_warmup, args.num_steps)
    return Distiller(
        objective,
        None,
        optimizer,
        schedule,
        max_grad_norm=1.0,
        seed=args.seed,
        amp_dtype=torch.bfloat16 if args.bf16 else None,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the program: load, train, save the model's folder."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_arguments(args)
    check_precision(torch.device("cpu"), args.bf16, fp16=False)
    keep_freed_memory()  # as train.py does on a CPU
    teacher = build_model(args) if args.weights is None else load_model(args)
    model, tokenizer = teacher.network, teacher.tokenizer
    save_used_bias_twice(model)
    dataset = LmSeqsDataset.from_file(args.data_file, teacher, args.max_length)
    # Smoothing 0: a teacher learns every token's prediction, frequent ones too, as BERT did.
    prepare = make_preparation(teacher, args.token_counts, 0.0, args.seed, args.mlm_mask_prop)
    try:
        curve = train(make_distiller(args, teacher), dataset, prepare, args)
    except NonFiniteError as error:
        logger.error("Stopped: %s. Nothing was saved.", error)
        sys.exit(1)
    save_folder(model, tokenizer_for(model, tokenizer), args.output_dir)
    write_json(Path(args.output_dir) / "curve.json", curve)
    logger.info("Wrote %s: %s parameters.", args.output_dir, f"{model.num_parameters():,}")


def train(
    distiller: Distiller, dataset: LmSeqsDataset, prepare: MlmPreparation, args: argparse.Namespace
) -> list[float]:
    """Run the updates; return the loss of each."""
    sampler = GroupedBatchSampler(
        dataset.lengths, args.batch_size, dataset.max_length, group_by_size=True, seed=args.seed
    )
    curve: list[float] = []
    steps = sampler.micro_batches(args.num_steps)
    with tqdm(steps, total=args.num_steps, unit="step", desc="teacher", **bar_options()) as bar:
        for planned in bar:
            batch = prepare(planned.number, *dataset.collate(planned.sequences))
            report = distiller.step([batch], [planned.number], 1)
            curve.append(report.losses_MK[0, 0].item())
            bar.set_postfix_str(f"loss {curve[-1]:.3f}", refresh=False)
    return curve


if __name__ == "__main__":
    run_program(main)
