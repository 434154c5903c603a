"""Compare objectives, first weights and flags at equal cost, with seeds, against the triple loss.

Makes the first students, trains every variant with every seed by train.py, measures all students
on the same masks, and writes a table, its JSON and a picture. The same command continues an
interrupted study, and adds variants and seeds to a finished one.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

    from distil.study.options import parse
    from utils import read_flags_first

    read_flags_first(parse)

import argparse
import logging
import shlex
import shutil
from pathlib import Path

from tqdm import tqdm

from distil.models.language_model import load_language_model, resolve_by_name
from distil.models.names import short_name
from distil.reporting.scores import read_all_scores
from distil.reporting.task_runs import RunSettings, run_missing, run_problems
from distil.study.measures import HeldOutText, costs, load_student, read_trainable
from distil.study.options import chosen, parse
from distil.study.runs import Job, run_folder, run_jobs, run_to_end, words_of
from distil.study.summary import Row, conclusion, draw, table
from distil.study.variants import HALF, RANDOM, train_flags
from distil.system.files import atomic_path, require_output, write_json
from distil.system.json_files import load_json
from distil.system.locks import lock_file
from distil.system.memory import reuse_memory
from distil.system.signals import exit_on_sigterm
from distil.tasks.tasks import TASKS
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError, bar_options, logger, raise_problems, run_program, setup_logging

MARKER, LOCK = "study.json", "study.lock"
PARTS = ("first", "teacher", "rows", "tasks")  # of study.json
# Flags that make figures incomparable: a study continues only with the same.
IDENTITY = (
    *("teacher", "data_file", "held_out", "num_held_out", "max_steps", "equal", "max_length"),
    *("train_flags", "extract_flags"),
)
OF_TRAININGS = ("max_steps", "equal", "train_flags")  # may change until the first one


class Study:
    """A study's folder, models and finished rows."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.output)
        require_output(args.output, "--output", is_folder=True)
        self.state = self._claim()
        architecture = resolve_by_name(args.teacher, "--teacher")
        self.teacher = load_language_model(architecture, args.teacher, "--teacher")
        self.is_masked = self.teacher.is_masked
        self.variants = chosen(args, self.is_masked)
        given = self.teacher, args.max_length
        held_out = LmSeqsDataset.from_file(args.held_out, *given, "--held_out")
        self.held_out = HeldOutText(held_out, self.teacher, args.num_held_out)
        self.dataset = LmSeqsDataset.from_file(args.data_file, *given)
        self.costs: dict[str, float] | None = None

    def _claim(self) -> dict:
        """Read an earlier study's state, or begin one. Raises InputError for another's folder."""
        identity = {name: getattr(self.args, name) for name in IDENTITY}
        path = self.folder / MARKER
        if not path.exists():
            there = self.folder.iterdir() if self.folder.exists() else ()
            if any(one.name != LOCK for one in there):
                raise InputError(
                    f"--output {self.folder}: holds files that no study made; choose another folder"
                )
            return {"identity": identity, "own": self.args.own, **{name: {} for name in PARTS}}
        shape = {"identity": dict, **dict.fromkeys(PARTS, dict)}
        try:
            state = load_json(path, shape)
        except ValueError as error:
            raise InputError(f"{path}: {error}; remove the folder to begin anew") from error
        is_begun = state["rows"] or (self.folder / "runs").exists()
        fixed = [name for name in IDENTITY if is_begun or name not in OF_TRAININGS]
        changed = [name for name in fixed if state["identity"].get(name) != identity[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"--{name} {identity[name]}: the study in {self.folder} has"
                f" {state['identity'].get(name)}; give that, or another --output"
            )
        own = state.get("own", {})
        for name, flags in self.args.own.items():
            if own.get(name, flags) != flags and self._has_begun(name, state["rows"]):
                raise InputError(
                    f"--own {name}: the study in {self.folder} has it with"
                    f" {shlex.join(words_of(own[name]))}; give that, or another name"
                )
        return state | {"identity": identity, "own": own | self.args.own}

    def _has_begun(self, name: str, rows: dict) -> bool:
        runs = self.folder.glob(f"runs/{name}-*")
        finished = (row["variant"] == name for row in rows.values())
        return self.first(name).exists() or any(runs) or any(finished)

    def save(self) -> None:
        """Write the finished rows."""
        write_json(self.folder / MARKER, self.state)

    # ---- what is made once -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Make first students and token counts, and measure the first weights and the teacher."""
        self.state = self._claim()  # locked now: another study may have ended since
        self.save()
        loaded = {}  # of this call's variants: the folder may hold more
        of_teacher = self.teacher.network.config.num_hidden_layers, self.args.data_file
        for kind, variant in {v.student: v for v in self.variants.values()}.items():
            if kind == RANDOM:
                continue
            folder = self.first(kind)
            if not folder.exists():
                flags = {"--teacher": self.args.teacher, **variant.extract_flags(*of_teacher)}
                words = shlex.split(self.args.extract_flags or "")
                words += words_of({**flags, "--output": folder})
                run_to_end("scripts/extract.py", words, self.log("first"))
            loaded[kind] = load_student(folder)
            if kind not in self.state["first"]:
                self.state["first"][kind] = self.held_out.figures(loaded[kind])
                self.save()
        if not self.state["teacher"]:
            network = self.teacher.network
            self.state["teacher"] = self.held_out.figures(network, against_teacher=False)
            self.save()
        if self.is_masked and self.args.token_counts is None and not self.counts.exists():
            flags = {"--data_file": self.args.data_file, "--token_counts_dump": self.counts}
            flags["--vocab_size"] = self.teacher.vocab_size
            run_to_end("scripts/token_counts.py", words_of(flags), self.log("counts"))
        networks = {k: loaded.get(v.student, loaded[HALF]) for k, v in self.variants.items()}
        first = self.args.seeds[0], self.args.learning_rates[0]
        words = {name: self.job(name, *first).words for name in self.variants}
        configs = read_trainable(words, networks, self.teacher)
        self.costs = costs(configs, networks, self.teacher, self.dataset)
        if self.costs is None and self.args.equal == "flops":
            raise InputError("--equal flops: not known for these models; compare equal updates")

    def first(self, kind: str) -> Path:
        """Name the folder of a kind of first student."""
        return self.folder / "first" / kind

    def log(self, name: str) -> Path:
        """Name the file of what a program prints."""
        return self.folder / f"{name}.log"

    @property
    def counts(self) -> Path:
        """The token counts' path."""
        return Path(self.args.token_counts or self.folder / "token_counts.pickle")

    # ---- trainings -------------------------------------------------------------------------------

    def job(self, name: str, seed: int, rate: float) -> Job:
        """Plan one training."""
        args, variant = self.args, self.variants[name]
        cost = self.costs[name] if args.equal == "flops" and self.costs else 1.0
        updates = max(round(args.max_steps / cost), 1)
        folder = run_folder(self.folder, name, seed, rate)
        if variant.student == RANDOM:
            student = {"--student_config": self.first(HALF) / "config.json"}
        else:
            student = {"--student": self.first(variant.student)}
        flags = {
            **student,
            "--teacher_name": args.teacher,
            "--data_file": args.data_file,
            **({"--token_counts": self.counts} if self.is_masked else {}),
            **({"--max_length": args.max_length} if args.max_length else {}),
            **train_flags(variant, self.is_masked),
            "--learning_rate": rate,
            "--max_steps": updates,
            "--seed": seed,
            "--dump_path": folder,
            "--keep_checkpoints": 2,
            "--resume": "auto",
        }
        words = [*shlex.split(args.train_flags), *words_of(flags)]  # the last of twins counts
        return Job(name, seed, rate, updates, words, folder)

    def train(self, jobs: list[Job]) -> None:
        """Train and measure what is not finished yet."""
        jobs = [job for job in jobs if job.name not in self.state["rows"]]
        with tqdm(total=len(jobs), unit="run", **bar_options()) as bar:

            def finish(job: Job, elapsed_s: float) -> None:
                self.state["rows"][job.name] = {
                    "variant": job.variant,
                    "seed": job.seed,
                    "rate": job.rate,
                    "updates": job.updates,
                    "elapsed_s": elapsed_s,
                    **self.held_out.figures(load_student(job.folder / "model")),
                }
                self.save()
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
                bar.update()
                bar.set_postfix_str(job.name)

            run_jobs(jobs, self.args.processes, finish)

    def rate_of(self, name: str) -> float:
        """Choose a variant's rate: the lowest KL on the sequences for tuning, with the first seed.

        Of the rates without a finished training none is chosen.
        """
        rows = self.state["rows"]
        jobs = [self.job(name, self.args.seeds[0], rate) for rate in self.args.learning_rates]
        finished = [job for job in jobs if job.name in rows]
        return min(finished, key=lambda job: rows[job.name]["tuning"]["kl"]).rate

    def run(self) -> None:
        """Train every variant: all rates with the first seed, then the best with the others."""
        first, *others = self.args.seeds
        rates = self.args.learning_rates
        self.train([self.job(name, first, rate) for rate in rates for name in self.variants])
        chosen_rates = {name: self.rate_of(name) for name in self.variants}
        self.train(
            [self.job(name, seed, rate) for seed in others for name, rate in chosen_rates.items()]
        )

    # ---- results ---------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Return the finished rows at the variants' rates."""
        found = []
        for name, variant in self.variants.items():
            rate = self.rate_of(name)
            jobs = [self.job(name, seed, rate) for seed in self.args.seeds]
            by_seed = {
                job.seed: self.state["rows"][job.name]["reported"]
                | self.state["tasks"].get(job.name, {})
                for job in jobs
            }
            cost = None if self.costs is None else self.costs[name]
            found.append(Row(name, variant, rate, by_seed, cost))
        return found

    def report(self) -> None:
        """Write and print the table; draw the picture."""
        rows, args = self.rows(), self.args
        first = {kind: found["reported"] for kind, found in self.state["first"].items()}
        teacher = self.state["teacher"]["reported"] | self.state["tasks"].get("teacher", {})
        title = args.title or short_name(args.teacher)
        lines = [
            f"# Distillation of {title} at equal {args.equal}",
            f"{args.max_steps} updates of the triple, seeds {', '.join(map(str, args.seeds))},"
            f" `{args.train_flags}`; held-out figures on fixed masks of the sequences that no rate"
            " was tuned on. Intervals: 95 %, over seeds; differences seed by seed. Cost: model"
            " FLOPs of an update against the triple's.",
            table(rows, first, teacher, args.tasks),
            conclusion(rows, teacher),
            f"![KL by variant]({self.folder.name}.png)",
        ]
        with atomic_path(self.folder / "DISTILLATION.md") as temporary:
            temporary.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        facts = {"teacher": title, "updates": args.max_steps, "seeds": args.seeds}
        draw(rows, self.folder / f"{self.folder.name}.png", facts, first[HALF]["kl"])
        print(f"\n{lines[2]}\n\n{lines[3]}")

    def run_tasks(self) -> None:
        """Fine-tune teacher and students on the tasks; keep the scores."""
        models = {"teacher": self.args.teacher}
        for name in self.variants:
            jobs = [self.job(name, seed, self.rate_of(name)) for seed in self.args.seeds]
            models |= {job.name: str(job.folder / "model") for job in jobs}
        flags = self.args.data_dir, None, None, None, self.args.task_flags
        tasks, folder, problems = self.args.tasks, str(self.folder / "tasks"), []
        found = read_all_scores([], folder, models, tasks, problems)
        settings = RunSettings(models, *flags)
        raise_problems([*problems, *run_problems(settings, tasks, found)])
        run_missing(settings, tasks, folder, found)
        for (role, task), content in found.items():
            self.state["tasks"].setdefault(role, {})[task] = content["score"][TASKS[task].score_key]
        self.save()


def main(argv: list[str] | None = None) -> None:
    """Run the program."""
    args = parse(argv)
    setup_logging(logging.INFO)
    reuse_memory()  # students are measured on the CPU
    study = Study(args)
    study.folder.mkdir(parents=True, exist_ok=True)
    with lock_file(study.folder / LOCK, f"--output {study.folder}: another study works in it"):
        study.prepare()
        study.run()
        if args.tasks:
            study.run_tasks()
        study.report()
    logger.info("Wrote %s.", study.folder / "DISTILLATION.md")


if __name__ == "__main__":
    exit_on_sigterm()
    run_program(main)
