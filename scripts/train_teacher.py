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
import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from distil.evaluation import Reader
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
from distil.system.signals import Stopped, StopSignals, exit_status
from distil.training import devices, resume
from distil.training.checkpointing import Checkpoint
from distil.training.claim import checkpoints_of
from distil.training.config import TrainConfig, as_flags, folder_problem
from distil.training.endings import ending_early
from distil.training.layout import checkpoints_in
from distil.training.optimizer import ADAM_BETAS, make_moments, split_for_weight_decay
from distil.training.progress import Actions, Intervals, Progress
from distil.training.reports import StepReport
from distil.training.run_folder import RunFolder
from distil.training.state import check_finite_state
from distil.training.teacher_options import parse
from distiller import DistillationModel, Distiller
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset, make_preparation, read_held_out
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
    **{"keep_checkpoints": 2, "log_interval": 100, "n_gpu": 0, "report_to": ()},
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


def make_distiller(config: TrainConfig, model: LanguageModel) -> Distiller:
    """Make the distiller, with loss, optimizer and schedule, without a teacher."""
    network = model.network
    objective = DistillationModel(network, config.alphas, config.temperature)
    optimizer = torch.optim.AdamW(
        split_for_weight_decay(network, config.weight_decay),
        lr=config.learning_rate,
        betas=ADAM_BETAS,
        eps=config.adam_epsilon,
    )
    make_moments(optimizer)
    updates = int(config.warmup_prop * config.max_steps), config.max_steps
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, *updates)
    return Distiller(
        *(objective, None, optimizer, schedule),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        amp_dtype=torch.bfloat16 if config.bf16 else None,
    )


class Training:
    """A training: its configuration, model and data, and train.py's loop for one process."""

    def __init__(self, args: argparse.Namespace, config: TrainConfig):
        """Load and check model and data. Raises InputError."""
        self.config, self.runtime = config, start_runtime(config.n_gpu, config.local_rank, {})
        devices.check_device(config, self.runtime.device)
        self.files = resume.watch_data(config)
        self.model = build_model(args) if args.weights is None else load_model(args)
        save_used_bias_twice(self.model.network)
        self.dataset = LmSeqsDataset.from_file(config.data_file, self.model, config.max_length)
        # Smoothing 0: a teacher learns every token's prediction, frequent ones too, as BERT did.
        drawn = config.mlm_smoothing, config.seed, config.mlm_mask_prop
        self.prepare = make_preparation(self.model, config.token_counts, *drawn)
        self.held_out = read_held_out(config.eval_data_file, self.model, config.max_length)
        opened = self.dataset, self.held_out and self.held_out.dataset
        self.files.require_unchanged(one.tokens for one in opened if one)
        sizes = self.dataset.lengths, config.batch_size, self.dataset.max_length
        self.sampler = GroupedBatchSampler(*sizes, group_by_size=True, seed=config.seed)
        digests = [one and one.tokens.digest() for one in opened]
        # The weights that training begins with are compared as train.py compares a teacher's.
        given = self.model.network.config, self.model, *digests
        self.identity = resume.identify(config, *given) | {"head_only": head_only(args)}
        self.distiller = make_distiller(config, self.model)
        every = config.log_interval, config.checkpoint_interval, config.eval_interval
        self.progress = Progress(
            ["loss", *(f"loss_{name}" for name in self.distiller.model.alphas)],
            *(config.max_steps, len(self.sampler), 1, 1, self.dataset.lengths),
            Intervals(*every, self.held_out is not None),
            shows_bar=True,
        )
        self.progress.curve = []
        self.folder: RunFolder | None = None

    def open_folder(self, point: Checkpoint | None) -> None:
        """Claim the run folder; a new training saves at once, which shows that there is room."""
        network, tokenizer = self.model.network, self.model.tokenizer
        saved = network, tokenizer_for(network, tokenizer)
        state = None if point is None else point.state
        self.folder = RunFolder(as_flags(self.config), *saved, state, folder_problem(self.config))
        if point is None:
            self.save()

    def fit(self, stop: StopSignals) -> None:
        """Train: an update, then whatever falls due after it. Raises Stopped."""
        progress = self.progress
        steps = self.sampler.micro_batches(self.config.max_steps, progress.micro_batches)
        progress.start_clock()
        with progress.showing(logger), self.files.explaining():
            self.evaluate_if_due()  # the first weights, or it was stopped before it could
            for planned in steps:
                actions = progress.actions([planned])
                self.files.enter(planned.epoch)
                batch = self.prepare(planned.number, *self.dataset.collate(planned.sequences))
                report = self.distiller.step([batch], [planned.number], 1)
                progress.advance([planned])
                progress.record([planned], report.losses_MK)
                number = stop.requested
                if actions.is_last or number is None:  # else a resumed training evaluates
                    self.evaluate_if_due()
                if actions.is_logged or actions.is_saved or number is not None:
                    self.act(report, actions, number is not None)
                if number is not None and not actions.is_last:
                    raise Stopped(exit_status(number))

    def act(self, report: StepReport, actions: Actions, is_stopped: bool) -> None:
        """Log and save what is due. Raises NonFiniteError before a bad save."""
        if actions.is_logged:
            rate = self.distiller.schedule.get_last_lr()[0]
            scalars = self.progress.take_scalars(rate, report.grad_norm)
            self.folder.log_training(scalars, {}, self.progress.place)
            logger.info("%s", self.progress.describe_log(scalars))
        if actions.is_saved or is_stopped:
            check_finite_state(self.distiller.tensors())
            self.files.check(rereads=actions.is_last)
            self.save()

    def evaluate_if_due(self) -> None:
        """Evaluate held-out data where that falls due: show it, log it, keep the best weights."""
        progress = self.progress
        if not progress.evaluation_is_due():
            return
        check_finite_state(self.distiller.tensors())
        self.files.check()
        started, distiller = time.perf_counter(), self.distiller
        reader = Reader(self.model.network, distiller.model.head, distiller.amp_dtype)
        figures = self.held_out.figures(reader, None, self.runtime)
        elapsed_s = time.perf_counter() - started
        is_best = progress.take_figures(figures, elapsed_s, self.identity["eval_data_file"])
        self.folder.keep_figures(figures, progress.place, progress.best if is_best else None)

    def save(self) -> None:
        """Write a checkpoint of the training as it is."""
        state = {
            **self.progress.state(),
            **self.distiller.values(),
            "identity": self.identity,
            "flags": as_flags(self.config),
            "per_update": 1,
            "torch": torch.__version__,
        }
        keep = self.config.keep_checkpoints
        self.folder.save_checkpoint(self.distiller.tensors(), state, self.progress.step, keep)

    def restore(self, point: Checkpoint) -> None:
        """Load a checkpoint. Raises InputError on a misfit."""
        identity = self.identity, self.model.source, point
        check = functools.partial(resume.check_identity, self.config, *identity)
        given = point, list(self.distiller.tensors()), check
        tensors, step, state = resume.share_checkpoint(self.runtime, *given)
        with resume.naming_misfit(point):
            self.distiller.load(tensors, state)
            self.progress.load(step, state)


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
    training = Training(args, config)
    if point is not None:
        training.restore(point)
    try:
        training.open_folder(point)
        folder, progress, stop = training.folder, training.progress, StopSignals()
        with ending_early(folder.describe_saved, lambda: progress.step), stop:
            training.fit(stop)
        folder.log.close()
    finally:
        if training.folder is not None:
            training.folder.close()
    network, tokenizer = training.model.network, training.model.tokenizer
    save_folder(network, tokenizer_for(network, tokenizer), args.output_dir)
    write_json(Path(args.output_dir) / "curve.json", progress.curve)
    progress.log_gain()
    logger.info("Wrote %s: %s parameters.", args.output_dir, f"{network.num_parameters():,}")


if __name__ == "__main__":
    run_program(main)
