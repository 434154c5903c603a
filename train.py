"""Distil a language model: flags, the loop, the wall clock and the run folder. See README.md.

Launch as one process (`python train.py ..`) or as several (`torchrun`, `python -m
torch.distributed.launch`).
"""

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.training.plan_process import read_flags
    from utils import read_flags_first

    read_flags_first(read_flags)

import contextlib
import functools
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from distil.data.batches import MicroBatch
from distil.data.packing import make_pass
from distil.data.watched import WatchedFiles
from distil.evaluation import HeldOut, Reader
from distil.flops import UpdateFlops, count_update, peak_flops
from distil.models.export import tokenizer_for
from distil.models.language_model import LanguageModel, check_forward
from distil.system.launch import LostRankError, Runtime, start_runtime
from distil.system.prefetch import MICRO_BATCHES_AHEAD, prefetched
from distil.system.rank_zero import log_on_rank_0
from distil.system.signals import Stopped, StopSignals, exit_status
from distil.system.watch import EXIT_LOST_RANK, report_lost_ranks
from distil.training import devices, models, post_mortem, resume, unused
from distil.training.checkpointing import Checkpoint
from distil.training.config import TrainConfig, as_flags, folder_problem, parse_config
from distil.training.endings import ending_early
from distil.training.log import parameter_statistics
from distil.training.optimizer import make_optimizer, make_schedule, run_length
from distil.training.planning import naming_limits, tell_plan
from distil.training.post_mortem import NonFiniteError
from distil.training.progress import Actions, Intervals, Progress
from distil.training.reports import PendingUpdate, StepReport, log_sizes
from distil.training.run_folder import RunFolder
from distil.training.state import check_finite_state
from distiller import DistillationModel, Distiller
from grouped_batch_sampler import GroupedBatchSampler, PlannedBatch, Update
from lm_seqs_dataset import LmSeqsDataset, make_preparation, read_held_out
from utils import logger, run_program


def set_up(config: TrainConfig, runtime: Runtime) -> "Trainer":
    """Load and check data, tokenizer, teacher and student. Raises InputError."""
    devices.check_device(config, runtime.device)
    files = resume.watch_data(config)
    student_config = models.find_student_config(config)
    architecture = models.resolve_student(config, student_config)
    teacher = models.load_teacher(config)
    models.check_models(config, architecture, student_config, teacher)
    dataset = LmSeqsDataset.from_file(config.data_file, teacher, config.max_length)
    drawn = config.mlm_smoothing, config.seed, config.mlm_mask_prop
    fates = config.word_mask, config.word_keep, config.word_rand
    counts, at_masks = config.token_counts, config.restrict_ce_to_mask
    prepare = make_preparation(teacher, counts, *drawn, fates, at_masks)
    by_rarity = prepare if config.mlm and config.mlm_smoothing * config.mlm_mask_prop else None
    kept = config.max_length, by_rarity, config.dump_path
    held_out = read_held_out(config.eval_data_file, teacher, *kept)
    student = models.make_student(config, architecture, student_config, teacher.tokenizer)
    files.require_unchanged(one.tokens for one in (dataset, held_out and held_out.dataset) if one)
    longest_BT, _ = dataset.collate_longest()
    check_forward(student, longest_BT)
    check_forward(teacher, longest_BT)
    flops = None
    if runtime.is_main:
        sizes = config.active, longest_BT, config.mlm_mask_prop, config.mlm and at_masks
        flops = count_update(student.network, teacher.network, *sizes)
    return Trainer(config, runtime, student, teacher, dataset, prepare, held_out, flops, files)


def make_distiller(
    config: TrainConfig,
    runtime: Runtime,
    student: LanguageModel,
    teacher: LanguageModel,
    num_updates: int,
    longest: MicroBatch,
) -> Distiller:
    """Put the networks on the device, and optimizer and schedule around the student.

    longest: the longest sequence, which shows what gets a gradient.
    """
    options = models.objective_options(config, student.network.config, teacher.network.config)
    given = student.network, config.alphas, config.temperature
    model = DistillationModel(*given, teacher=teacher.network, options=options)
    model.to(runtime.device)
    if not model.uses_fast_head:
        logger.info("The student's head is not layers and one linear map: the slower head is used.")
    if model.needs_teacher:
        teacher.network.to(runtime.device)
    head, ranks = models.compared_head(student, teacher), runtime.world_size
    unused.freeze_unused(model, teacher.network, longest, student.source, ranks, head)
    rates = config.learning_rate, config.weight_decay, config.adam_epsilon
    optimizer = make_optimizer(model, *rates)
    schedule = make_schedule(optimizer, num_updates, config.warmup_prop)
    return Distiller(
        *(model, teacher.network, optimizer, schedule),
        teacher_head=head,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        world_size=ranks,
        amp_dtype=torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None,
        normalization=config.loss_normalization,
        compiles=config.compile,
    )


class Trainer:
    """A run: its configuration, models and data, and the loop over updates.

    folder: None on other processes than the main one.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        student: LanguageModel,
        teacher: LanguageModel,
        dataset: LmSeqsDataset,
        prepare: Callable,
        held_out: HeldOut | None,
        flops: UpdateFlops | None,
        files: WatchedFiles,
    ):
        self.config, self.runtime, self.student, self.teacher = config, runtime, student, teacher
        self.dataset, self.prepare, self.held_out = dataset, prepare, held_out
        self.files, self.flops = files, flops
        self.folder: RunFolder | None = None
        sizes = dataset.lengths, config.batch_size, dataset.max_length
        options = {"seed": config.seed, "max_tokens": config.max_tokens}
        self.sampler = GroupedBatchSampler(*sizes, group_by_size=config.group_by_size, **options)
        room, accumulation = devices.gpu_bytes(runtime.device), config.gradient_accumulation_steps
        packs = devices.packs_sequences(config, runtime.device, student.network, teacher.network)
        self.num_ranks = config.num_processes(runtime.world_size)
        self.sampler.join(config.tokens_per_pass, accumulation, room, packs, self.num_ranks)
        self.per_update = accumulation * self.num_ranks
        length = len(self.sampler), self.per_update, config.n_epoch, config.max_steps
        self.num_micro_batches, num_updates = run_length(*length)
        self.identity = {}
        if runtime.is_main:
            digests = dataset.tokens.digest(), held_out and held_out.dataset.tokens.digest()
            self.identity = resume.identify(config, student.network.config, teacher, *digests)
        longest = prepare(0, *dataset.collate_longest())
        self.distiller = make_distiller(config, runtime, student, teacher, num_updates, longest)
        self.progress = self._make_progress()

    def _make_progress(self) -> Progress:
        config, runtime, flops = self.config, self.runtime, self.flops
        peak = flops and peak_flops(runtime.device, self.distiller.amp_dtype or torch.float32)
        every = config.log_interval, config.checkpoint_interval, config.eval_interval
        names = ["loss", *(f"loss_{name}" for name in self.distiller.model.alphas)]
        sizes = self.num_micro_batches, len(self.sampler), self.per_update, self.num_ranks
        return Progress(
            names,
            *(*sizes, self.dataset.lengths, Intervals(*every, self.held_out is not None)),
            shows_bar=runtime.is_main,
            batch_flops=None if flops is None else flops.of_batch,
            peak_flops=None if peak is None else peak * runtime.world_size,
        )

    def open_folder(self, point: Checkpoint | None) -> None:
        """Claim the run folder; a new run saves at once, which shows that the disk has room."""
        state = None if point is None else point.state
        problem = folder_problem(self.config)  # asked again: loading took a while
        network = self.student.network
        saved = network, tokenizer_for(network, self.student.tokenizer)
        self.folder = RunFolder(as_flags(self.config), *saved, state, problem)
        if point is None:
            self.save()

    def fit(self, stop: StopSignals) -> None:
        """Train: an update, then whatever falls due after it. Raises Stopped.

        Where the distiller does not wait, an update is read when the next one has been launched, so
        that the device is never idle; before anything that falls due all updates are read.
        """
        config, runtime, progress = self.config, self.runtime, self.progress
        plan = self.num_micro_batches, config.gradient_accumulation_steps
        ranks = runtime.rank, runtime.world_size
        updates = self.sampler.updates(*plan, *ranks, progress.micro_batches)
        stream = contextlib.closing(prefetched(self._ready(updates), MICRO_BATCHES_AHEAD))
        progress.start_clock()
        unread: list[tuple[Update, PendingUpdate, int]] = []
        with progress.showing(logger), self.files.explaining(), stream as items:
            self.evaluate_if_due()  # the first weights, or the run was stopped before it could
            for update in items:
                actions = progress.actions(update.planned)
                batches = itertools.islice(items, len(update.passes))
                with self._explaining(update, progress.step):
                    pending = self.distiller.launch(
                        progress.moving_bar(batches, len(update.planned)),
                        [batch.number for batch in update.planned],
                        len(update.passes),
                        wants_statistics=actions.is_logged and runtime.is_main,
                        asks_to_stop=lambda: stop.requested is not None,
                    )
                unread.append((update, pending, progress.step))
                progress.advance(update.planned)
                reports = self._read(unread, len(unread) - 1)
                is_asked = any(report.num_asking for report in reports)
                if self.distiller.waits or actions.any or is_asked:
                    reports += self._read(unread, len(unread))
                is_stopped = any(report.num_asking for report in reports)
                if actions.is_last or not is_stopped:  # else a resumed run evaluates
                    self.evaluate_if_due()
                if actions.any or is_stopped:
                    self._act(update, reports[-1], actions, is_stopped)
                if is_stopped and not actions.is_last:
                    raise Stopped(exit_status(stop.requested or signal.SIGTERM))

    def _read(self, unread: list[tuple], num: int) -> list[StepReport]:
        """Read the oldest `num` updates that were not read yet, and record their losses."""
        reports = []
        for update, pending, number in unread[:num]:
            with self._explaining(update, number):
                reports.append(pending.read())
            self.progress.record(update.planned, reports[-1].losses_MK)
        del unread[:num]
        return reports

    def _act(self, update: Update, report: StepReport, actions: Actions, is_stopped: bool) -> None:
        """Log and save what is due. Raises NonFiniteError, on every rank, before a bad save."""
        # Differs from the original: logs and checkpoints follow the update that they fall in.
        is_saved = actions.is_saved or is_stopped
        if is_saved or actions.epochs:
            check_finite_state(self.distiller.tensors())
            with self.runtime.raise_on_all_ranks():
                self.files.check(rereads=actions.is_last)
        if self.folder is None:
            return
        if actions.is_logged:
            rate = self.distiller.schedule.get_last_lr()[0]
            scalars = self.progress.take_scalars(rate, report.grad_norm)
            statistics = parameter_statistics(self.student.network) | report.statistics
            self.folder.log_training(scalars, statistics, self.progress.place)
            logger.info("%s", self.progress.describe_log(scalars))
        for epoch in actions.epochs:
            self.folder.save_epoch(epoch, self.progress.epoch_mean(epoch), self.progress.step)
        if is_saved:
            self.save()

    def evaluate_if_due(self) -> None:
        """Evaluate held-out data where that falls due: show it, log it, keep the best student.

        The checkpoint that follows holds all three; a run that dies before it repeats them.
        Training is not touched. Raises NonFiniteError, on every rank, before a bad save.
        """
        if not self.progress.evaluation_is_due():
            return
        check_finite_state(self.distiller.tensors())
        with self.runtime.raise_on_all_ranks():
            self.files.check()
        started, progress = time.perf_counter(), self.progress
        figures = self.evaluate(self.held_out)
        elapsed_s = time.perf_counter() - started
        is_best = progress.take_figures(figures, elapsed_s, self.identity.get("eval_data_file"))
        if self.folder is not None:
            self.folder.keep_figures(figures, progress.place, progress.best if is_best else None)

    def evaluate(self, held_out: HeldOut) -> dict[str, float]:
        """Measure the student, and its distance from the teacher, on held-out data."""
        distiller = self.distiller
        student = Reader(self.student.network, distiller.model.head, distiller.amp_dtype)
        teacher = distiller.teacher and Reader(distiller.teacher, distiller.teacher_head)
        return held_out.figures(student, teacher, self.runtime)

    # ---- saving and resuming ---------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the run as it is."""
        sampler, keep = self.sampler, self.config.keep_checkpoints
        state = {
            **self.progress.state(),
            **self.distiller.values(),
            "identity": self.identity,
            "flags": as_flags(self.config),
            "per_update": self.per_update,
            **{"tokens_per_pass": sampler.tokens_per_pass, "pack_sequences": sampler.packs},
            "torch": torch.__version__,
        }
        self.folder.save_checkpoint(self.distiller.tensors(), state, self.progress.step, keep)

    def restore(self, point: Checkpoint | None) -> None:
        """Load on every rank the checkpoint that rank 0 found. Raises InputError on a misfit."""
        identity = self.identity, self.student.source, point
        check = functools.partial(resume.check_identity, self.config, *identity)
        files = list(self.distiller.tensors())
        tensors, step, state = resume.share_checkpoint(self.runtime, point, files, check)
        with self.runtime.raise_on_all_ranks(), resume.naming_misfit(point):
            self.distiller.load(tensors, state)
            self.progress.load(step, state)
        self.sampler.tokens_per_pass, self.sampler.packs = resume.passes(self.config, state)

    # ---- batches, and what failed in them --------------------------------------------------------

    def _ready(self, updates: Iterable[Update]) -> Iterator[Update | MicroBatch]:
        """Yield each update, then this rank's passes of it, ready for the device."""
        way = self.dataset.special.pad, self.sampler.shape
        for update in updates:
            yield update
            for one in update.passes:
                yield self.distiller.ready(make_pass(self._prepared(one), *way))

    def _prepared(self, batches: Iterable[PlannedBatch]) -> Iterator[MicroBatch]:
        """Collate and prepare micro-batches, one at a time."""
        for planned in batches:
            self.files.enter(planned.epoch)
            yield self.prepare(planned.number, *self.dataset.collate(planned.sequences))

    @contextlib.contextmanager
    def _explaining(self, update: Update, number: int) -> Iterator[None]:
        """Raise failures of an update with its number, rank and sequences, its batches saved."""
        shape = self.sampler.shape
        with post_mortem.naming_out_of_memory(update.passes, self.dataset.lengths, shape):
            try:
                yield
            except NonFiniteError as error:
                found = error.culprits(shape) or self._located(update) or error.culprits(None)
                if self.folder is None:
                    raise
                shares = self.sampler.shares(update.planned, self.runtime.world_size)
                told = number, update.planned, shares, found, self.folder.path, self._prepared
                raise post_mortem.explain(error, *told) from error

    def _located(self, update: Update) -> dict[int, str]:
        """Find on all ranks the micro-batches whose gradient is not finite."""
        mine = self.distiller.non_finite_gradients(self._prepared(update.mine))
        return post_mortem.merged(mine, self.runtime.world_size)


def run(config: TrainConfig, runtime: Runtime, stop: StopSignals) -> None:
    """Set up, resume if asked to, train and export. Raises InputError."""
    point = None
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            point = resume.find_resume_point(config, config.num_processes(runtime.world_size))
    resumes = runtime.from_main(point is not None)
    with runtime.raise_on_all_ranks():
        trainer = set_up(config, runtime)
    if resumes:
        trainer.restore(point)
    if config.plan:
        measured = trainer.distiller, trainer.sampler, trainer._ready
        tell_plan(config, trainer.progress, *measured, trainer.held_out, trainer.evaluate)
        return
    try:
        with runtime.raise_on_all_ranks():
            if runtime.is_main:
                trainer.open_folder(point)
        sizes = trainer.dataset.lengths, trainer.num_micro_batches, runtime.world_size
        log_sizes(config, trainer.student.network, *sizes, *trainer.sampler.passes)
        fit_and_export(trainer, stop)
    finally:
        if trainer.folder is not None:
            trainer.folder.close()


def fit_and_export(trainer: Trainer, stop: StopSignals) -> None:
    """Run the loop, say what ends it early, and export the student."""
    folder, progress = trainer.folder, trainer.progress
    with ending_early(folder and folder.describe_saved, lambda: progress.step), stop:
        trainer.fit(stop)
    if folder is not None:
        folder.finish(trainer.progress.step)
        trainer.progress.log_gain()


def main(argv: list[str] | None = None) -> None:
    """Run the program: read the flags, join the other processes, run."""
    config = parse_config(argv)
    log_on_rank_0()
    runtime = start_runtime(
        config.gpus_here, config.local_rank, timeout_s=config.distributed_timeout_s
    )
    stop = StopSignals()
    try:
        with runtime.watching(lambda: stop.request(signal.SIGTERM)), naming_limits(config):
            run(config, runtime, stop)
    except LostRankError as error:
        report_lost_ranks(str(error), runtime.rank)
        sys.exit(EXIT_LOST_RANK)


if __name__ == "__main__":
    run_program(main, prints_result=False)
