"""The README's workflow from text to a trained student, as one function a stage.

Each stage calls one of the project's programs as a user calls it; scripts/quickstart.py calls the
stages one after another.
"""

import contextlib
import dataclasses
import hashlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import transformers

from distil.data import builtin_corpus
from distil.data.decoding import texts_of
from distil.data.hub_datasets import find_files
from distil.data.text_sources import read_blocks
from distil.models.architectures import AUTO, PAIRS, Architecture
from distil.models.names import short_name
from distil.models.tokenizers import train_word_pieces
from distil.system.children import running
from distil.system.files import atomic_paths, replacing_files, write_json
from distil.system.json_files import load_json
from utils import InputError, logger

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 8000
# No dropout and wide first weights: a teacher trained for minutes, on each sequence once, learns
# faster so.
TEACHER = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.05,
}
HELD_OUT_EVERY = 40  # one document in so many is held out
README_ALPHAS = {
    "mlm": {
        "--alpha_ce": 5.0,
        "--alpha_mlm": 2.0,
        "--alpha_cos": 1.0,
        "--alpha_clm": 0.0,
        "--mlm": None,
    },
    "clm": {"--alpha_ce": 5.0, "--alpha_clm": 0.5, "--alpha_cos": 1.0},
}
ALONE_ALPHAS = {
    "mlm": {"--alpha_ce": 0, "--alpha_mlm": 1.0, "--alpha_clm": 0, "--mlm": None},
    "clm": {"--alpha_ce": 0, "--alpha_clm": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of a run: teacher's and student's updates, sequences an update and held out."""

    teacher_steps: int = 3000
    student_steps: int = 700
    batch_size: int = 16
    num_held_out: int = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """Paths, architecture and size of a run.

    architecture: the teacher's. is_embedded: the teacher is trained by the run. resumes: an
    interrupted run is continued.
    """

    folder: Path
    teacher: str
    architecture: Architecture
    is_embedded: bool
    scale: Scale
    seed: int
    max_length: int
    resumes: bool = False

    @property
    def objective(self) -> str:
        """The language-model objective of the pair: mlm or clm."""
        return "mlm" if self.architecture.is_masked else "clm"

    @property
    def student_type(self) -> str | None:
        """The student's type, where PAIRS has one for the teacher's; else its own, None."""
        teacher = self.architecture
        found = (student for known, student in PAIRS if known == teacher.name)
        return next(found, None)

    def token_file(self, part: str) -> Path:
        """Return the path of a part's token ids, made by binarized_data.py."""
        return self.folder / f"{part}.{short_name(self.teacher)}.pickle"

    @property
    def counts(self) -> Path:
        """Return the path of the token counts."""
        return self.folder / "token_counts.pickle"

    @property
    def student_config(self) -> Path:
        """Return the path of the student's configuration, if it has a type of PAIRS."""
        return self.folder / "student.json"

    @property
    def first_student(self) -> Path:
        """Return the folder of the student before training, if it has no type of PAIRS."""
        return self.folder / "first_student"


class Stages:
    """The stages of a run, each done once: an interrupted run continues after the last finished.

    path: the marker file; identity: flags and text, which must be the interrupted run's.
    """

    def __init__(self, path: Path, identity: dict):
        self.path, self.identity = path, identity
        self.done: list[str] = []
        if path.exists():
            try:
                earlier = load_json(path, {"done": [str]})
            except ValueError:
                earlier = {}
            done = earlier.pop("done", None)
            # A finished run is made again, as every other program does.
            if earlier == identity and done and "report" not in done:
                self.done = done
                logger.info("Continuing in %s after: %s.", path.parent, ", ".join(done))

    def start(self) -> None:
        """Write the marker."""
        write_json(self.path, {**self.identity, "done": self.done})

    def run(self, name: str, work: Callable, *arguments: object) -> None:
        """Call work(*arguments) unless an earlier run finished this stage."""
        if name not in self.done:
            work(*arguments)
            self.done.append(name)
            self.start()


def call(program: str, flags: Mapping[str, object]) -> None:
    """Run one of the project's programs, printed as a user would type it. Raises InputError.

    flags: flag -> value, None for a flag without a value.
    """
    words = [str(word) for item in flags.items() for word in item if word is not None]
    print(f"\n$ python {program} {shlex.join(words)}", flush=True)
    with running(ROOT / program, words) as process:
        status = process.wait()
    if status != 0:
        raise InputError(
            f"{program} ended with status {status}; read its message above; the same command"
            " continues from here"
        )


def make_text(plan: Plan, text: str | None, text_field: str) -> None:
    """Write train.txt and held_out.txt; a document is in one of them, whole."""
    documents: Iterable[list[str]] = (
        ([line] for line in user_lines(text, text_field))
        if text
        else (list(builtin_corpus.lines(d)) for d in builtin_corpus.documents())
    )
    parts = {"train": 0, "held_out": 0}  # lines written
    with (
        atomic_paths(*(plan.folder / f"{part}.txt" for part in parts)) as paths,
        contextlib.ExitStack() as opened,
    ):
        files = {
            part: opened.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
            for part, path in zip(parts, paths, strict=True)
        }
        for number, document in enumerate(documents):
            part = "held_out" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
            files[part].writelines(line + "\n" for line in document)
            parts[part] += len(document)
        if not parts["held_out"]:
            raise InputError(
                f"--text {text}: expected at least {HELD_OUT_EVERY} lines of text, different from"
                " one another"
            )
    logger.info("Text: %s lines to train on, %s held out.", *(f"{num:,}" for num in parts.values()))


def user_lines(path: str, text_field: str = "text") -> Iterator[str]:
    """Yield each distinct line or record of what binarized_data.py reads once, on one line.

    A repeated line could be both trained on and held out. Raises InputError.
    """
    seen = set()  # digests: they take less memory than the lines
    for source in find_files(path, flag="--text"):
        for block in read_blocks(source, text_field, "--text"):
            for text in texts_of(block, text_field, flag="--text")[0]:
                line = re.sub(r"[\r\n]+", " ", text.strip())
                digest = hashlib.blake2b(line.encode(), digest_size=8).digest()
                if line and digest not in seen:
                    seen.add(digest)
                    yield line


def train_vocabulary(plan: Plan) -> None:
    """Train a WordPiece vocabulary on train.txt and save it as a BERT tokenizer."""
    vocabulary = train_word_pieces(plan.folder / "train.txt", VOCAB_SIZE)
    tokenizer = transformers.BertTokenizer(
        vocab=vocabulary, do_lower_case=True, model_max_length=512
    )
    with replacing_files(plan.teacher) as folder:
        tokenizer.save_pretrained(folder)
    logger.info("Vocabulary: %d WordPiece tokens.", len(vocabulary))


def make_tokens(plan: Plan, vocab_size: int) -> None:
    """Binarize both parts and count the tokens of the first."""
    for part in ("train", "held_out"):
        flags = {
            "--file_path": plan.folder / f"{part}.txt",
            "--tokenizer_type": "bert" if plan.is_embedded else AUTO,
            "--tokenizer_name": plan.teacher,
            "--dump_file": plan.folder / part,
        }
        call("scripts/binarized_data.py", flags)
    flags = {
        "--data_file": plan.token_file("train"),
        "--token_counts_dump": plan.counts,
        "--vocab_size": vocab_size,
    }
    call("scripts/token_counts.py", flags)


def train_teacher(plan: Plan, vocab_size: int) -> None:
    """Train the teacher that the default run distils."""
    write_json(plan.folder / "teacher.json", {**TEACHER, "vocab_size": vocab_size})
    flags = {
        "--config": plan.folder / "teacher.json",
        "--tokenizer_name": plan.teacher,
        "--data_file": plan.token_file("train"),
        "--token_counts": plan.counts,
        "--output_dir": plan.teacher,
        "--num_steps": plan.scale.teacher_steps,
        "--max_length": plan.max_length,
        "--seed": plan.seed,
        "--force": None,
    }
    call("scripts/train_teacher.py", flags)


def write_student_config(plan: Plan, teacher_config, num_layers: int) -> None:
    """Write the configuration of a student of num_layers layers, otherwise as the teacher's."""
    if plan.student_type == "distilbert":
        content = {
            "model_type": "distilbert",
            "vocab_size": teacher_config.vocab_size,
            "dim": teacher_config.hidden_size,
            "n_layers": num_layers,
            "n_heads": teacher_config.num_attention_heads,
            "hidden_dim": teacher_config.intermediate_size,
            "activation": teacher_config.hidden_act,
            "max_position_embeddings": teacher_config.max_position_embeddings,
            "sinusoidal_pos_embds": True,
        }
    else:
        content = {
            k: v
            for k, v in teacher_config.to_diff_dict().items()
            if k not in ("transformers_version", "dtype")
        }
        content["n_layer" if plan.student_type == "gpt2" else "num_hidden_layers"] = num_layers
    write_json(plan.student_config, content)


def extract_first_weights(plan: Plan, num_layers: int) -> None:
    """Copy num_layers evenly spaced layers of the teacher into the student's first weights."""
    if plan.student_type is None:
        shutil.rmtree(plan.first_student, ignore_errors=True)
        flags = {
            "--teacher": plan.teacher,
            "--num_layers": num_layers,
            "--output": plan.first_student,
        }
        call("scripts/extract.py", flags)
        return
    is_bert = plan.architecture.name == "bert"
    flags = {
        "--model_type": plan.architecture.name,
        "--model_name": plan.teacher,
        "--dump_checkpoint": plan.folder / "first_weights.pth",
        "--num_layers": num_layers,
        "--force": None,  # a stage that was interrupted is run again
    }
    flags |= {"--vocab_transform": None} if plan.objective == "mlm" else {}
    flags |= {"--fold_token_types": None} if is_bert else {}
    call("scripts/extract_distilbert.py" if is_bert else "scripts/extract.py", flags)


def train_student(plan: Plan, name: str, alphas: Mapping[str, object]) -> None:
    """Train a student from the first weights, with the teacher or without it."""
    # Smoothing 0: the table's tokens are drawn uniformly from the text. Minutes on a few MB are too
    # few for 2019's emphasis on rare tokens (0.7), which moves a small student away from its
    # teacher at the frequent ones.
    masking = {"--token_counts": plan.counts, "--mlm_smoothing": 0}
    if plan.student_type is None:
        models = {"--student": plan.first_student, "--teacher_name": plan.teacher}
    else:
        models = {
            "--student_type": plan.student_type,
            "--student_config": plan.student_config,
            "--teacher_type": plan.architecture.name,
            "--teacher_name": plan.teacher,
        }
    first = {
        "--freeze_pos_embs": None,
        "--student_pretrained_weights": plan.folder / "first_weights.pth",
    }
    flags = {
        **models,
        **alphas,
        **(first if plan.student_type is not None else {}),
        "--data_file": plan.token_file("train"),
        **(masking if plan.objective == "mlm" else {}),
        "--dump_path": plan.folder / name,
        **({"--resume": "auto"} if _is_begun(plan, name) else {"--force": None}),
        "--max_steps": plan.scale.student_steps,
        "--batch_size": plan.scale.batch_size,
        "--gradient_accumulation_steps": 1,
        "--max_length": plan.max_length,
        "--log_interval": 10,
        "--checkpoint_interval": max(plan.scale.student_steps // 5, 50),
        "--seed": plan.seed,
    }
    call("train.py", flags)


def _is_begun(plan: Plan, name: str) -> bool:
    """True if the interrupted run that is continued, not one before it, began this training."""
    checkpoints = plan.folder / name / "checkpoints"
    return (
        plan.resumes
        and checkpoints.is_dir()
        and checkpoints.stat().st_mtime_ns >= (plan.folder / "train.txt").stat().st_mtime_ns
    )
