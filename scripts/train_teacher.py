"""Train a teacher on a token file: a small BERT from scratch, or any model from given weights.

It is train.py's loop without a teacher: the language-modelling loss alone, one process.
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
import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

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
from distil.objectives import LOSSES
from distil.system.files import output_problem, write_json
from distil.system.launch import start_runtime
from distil.system.signals import StopSignals
from distil.training import devices, resume
from distil.training.checkpointing import Checkpoint
from distil.training.claim import checkpoints_of
from distil.training.config import TrainConfig
from distil.training.endings import ending_early
from distil.training.layout import checkpoints_in
from distil.training.teacher_options import parse
from lm_seqs_dataset import LmSeqsDataset, make_preparation, read_held_out
from train import Trainer
from utils import InputError, keyed_seed, logger, raise_problems, run_program, setup_logging

RUN = "training"  # in the output folder: the run folder, as of train.py
SAME_FLAGS = (
    *("batch_size", "bf16", "checkpoint_interval", "data_file", "eval_data_file", "eval_interval"),
    *("force", "learning_rate", "max_length", "mlm_mask_prop", "resume", "seed", "token_counts"),
    "warmup_prop",
)
# What no flag of this program changes.
FIXED = {
    **{"adam_epsilon": 1e-8, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0},
    **{"mlm_smoothing": 0.0, "weight_decay": 0.01},
    **{"keep_checkpoints": 2, "log_interval": 100, "report_to": ()},
}


def check_output(args: argparse.Namespace) -> None:
    """Raise InputError for an output folder that holds a model which this run did not make."""
    problems = [output_problem(args.output_dir, "--output_dir", is_folder=True)]
    names = ["model.safetensors", "config.json", "curve.json"]
    there = [name for name in names if os.path.lexists(os.path.join(args.output_dir, name))]
    resumes = args.resume and checkpoints_in(checkpoints_of(os.path.join(args.output_dir, RUN)))
    if there and not (args.force or resumes):
        problems.append(
            f"--output_dir {args.output_dir}: holds a {there[0]} already; choose another, or"
            " replace it with --force"
        )
    if not args.mlm_mask_prop > 0:
        problems.append(f"--mlm_mask_prop {args.mlm_mask_prop}: expected above 0")
    raise_problems(problems)


def as_config(args: argparse.Namespace, is_masked: bool) -> TrainConfig:
    """Return the flags as train.py's, with the language-modelling loss alone. Raises InputError."""
    start = {"student_config": args.config} if args.weights is None else {"student": args.weights}
    return TrainConfig(
        **start,
        teacher_name=args.weights or args.config,  # its weights are those that training begins with
        dump_path=os.path.join(args.output_dir, RUN),
        max_steps=args.num_steps,
        mlm=is_masked,
        n_gpu=min(torch.cuda.device_count(), 1),
        alphas=dict.fromkeys(LOSSES, 0.0) | {"mlm" if is_masked else "clm": 1.0},
        **{name: getattr(args, name) for name in SAME_FLAGS},
        **FIXED,
    )


@contextlib.contextmanager
def naming_own_flags(args: argparse.Namespace) -> Iterator[None]:
    """Raise InputError with the flags of train.py in it named as this program's."""
    start = "--config" if args.weights is None else "--weights"
    names = {"--dump_path": "--output_dir", "--max_steps": "--num_steps"}
    names |= dict.fromkeys(("--teacher_name", "--student", "--student_config"), start)
    try:
        yield
    except InputError as error:
        text = re.sub(r"--\w+", lambda found: names.get(found[0], found[0]), str(error))
        raise InputError(text) from error


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


def find_resume_point(args: argparse.Namespace, config: TrainConfig) -> Checkpoint | None:
    """Find the checkpoint to resume from: see `resume.find_resume_point`."""
    point = resume.find_resume_point(config, 1)
    own = head_only(args)
    if point is not None and (was := point.state["identity"].get("head_only")) != own:
        raise InputError(
            f"--train_head_only: {own}, {point.path} was made with {was}; name the same,"
            f" {resume.START_ANEW}"
        )
    return point


def head_only(args: argparse.Namespace) -> str:
    """Say what a run trains, for its checkpoints."""
    return "yes" if args.train_head_only else "no"


def make_trainer(args: argparse.Namespace, config: TrainConfig) -> Trainer:
    """Load and check model and data, for train.py's loop. Raises InputError."""
    runtime = start_runtime(config.n_gpu, config.local_rank, {})
    devices.check_device(config, runtime.device)
    files = resume.watch_data(config)
    model = build_model(args) if args.weights is None else load_model(args)
    save_used_bias_twice(model.network)
    dataset = LmSeqsDataset.from_file(config.data_file, model, config.max_length)
    # Smoothing 0: a teacher learns every token's prediction, frequent ones too, as BERT did.
    drawn = config.mlm_smoothing, config.seed, config.mlm_mask_prop
    prepare = make_preparation(model, config.token_counts, *drawn)
    held_out = read_held_out(config.eval_data_file, model, config.max_length)
    files.require_unchanged(one.tokens for one in (dataset, held_out and held_out.dataset) if one)
    # The model is its own teacher, which no objective reads: a resumed training compares the
    # weights that it begins with, as train.py compares a teacher's.
    models = model, model
    trainer = Trainer(config, runtime, *models, dataset, prepare, held_out, None, files)
    trainer.identity["head_only"] = head_only(args)
    trainer.progress.curve = []
    return trainer


def main(argv: list[str] | None = None) -> None:
    """Run the program: load, train, save the model's folder."""
    args = parse(argv)
    setup_logging(logging.INFO)
    check_output(args)
    with naming_own_flags(args):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Resume if asked to, train, and save the model's folder. Raises InputError."""
    named = None if args.weights is None else resolve_by_name(args.weights, "--weights")
    config = as_config(args, (named or ARCHITECTURES["bert"]).is_masked)
    point = find_resume_point(args, config)
    trainer = make_trainer(args, config)
    if point is not None:
        trainer.restore(point)
    try:
        trainer.open_folder(point)
        folder, progress, stop = trainer.folder, trainer.progress, StopSignals()
        with ending_early(folder.describe_saved, lambda: progress.step), stop:
            trainer.fit(stop)
        folder.log.close()
    finally:
        if trainer.folder is not None:
            trainer.folder.close()
    network, tokenizer = trainer.student.network, trainer.student.tokenizer
    save_folder(network, tokenizer_for(network, tokenizer), args.output_dir)
    write_json(Path(args.output_dir) / "curve.json", progress.curve)
    progress.log_gain()
    logger.info("Wrote %s: %s parameters.", args.output_dir, f"{network.num_parameters():,}")


if __name__ == "__main__":
    run_program(main)
