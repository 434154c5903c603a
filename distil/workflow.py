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
from distil.models.architectures import AUTO, Architecture
from distil.models.names import short_name
from distil.models.tokenizers import train_word_pieces
from distil.study.runs import run_folder, words_of
from distil.study.variants import REFERENCE
from distil.system.children import running
from distil.system.files import atomic_paths, replacing_files, write_json
from distil.system.json_files import load_json
from utils import InputError, logger

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 4000
# No dropout and wide first weights: a teacher trained for minutes, on each sequence once, learns
# faster so.
TEACHER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.05,
}
SHORT_RATE = 1.5e-3
# Most of the teacher's updates see short sequences, as BERT's did (Devlin et al., 2018, appendix
# A.2): attention to neighbours is learned in fewer updates where there are fewer positions.
SHORT_LENGTH, SHORT_BATCH = 16, 24
HELD_OUT_EVERY = 40  # one document in so many is held out
STUDENT_RATE = 5e-4


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of a run.

    short_steps, teacher_steps: the teacher's updates on short and on whole sequences.
    student_steps, batch_size: a student's updates, and its sequences an update. num_held_out:
    sequences measured.
    """

    short_steps: int = 7000
    teacher_steps: int = 2000
    student_steps: int = 300
    batch_size: int = 16
    num_held_out: int = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """Paths, architecture and size of a run.

    architecture: the teacher's. is_embedded: the teacher is trained by the run.
    """

    folder: Path
    teacher: str
    architecture: Architecture
    is_embedded: bool
    scale: Scale
    seed: int
    max_length: int

    def token_file(self, part: str) -> Path:
        """Return the path of a part's token ids, made by binarized_data.py."""
        return self.folder / f"{part}.{short_name(self.teacher)}.pickle"

    @property
    def counts(self) -> Path:
        """Return the path of the token counts."""
        return self.folder / "token_counts.pickle"

    @property
    def short_teacher(self) -> Path:
        """Return the folder of the teacher that has seen short sequences only."""
        return self.folder / "short_teacher"

    @property
    def study(self) -> Path:
        """Return the folder of students, runs and figures, made by study.py."""
        return self.folder / "study"

    def run(self, variant: str) -> Path:
        """Return the run folder of the student of a variant of the study."""
        return run_folder(self.study, variant, self.seed, STUDENT_RATE)


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
    words = words_of(flags)
    print(f"\n$ python {program} {shlex.join(words)}", flush=True)
    with running(ROOT / program, words) as process:
        status = process.wait()
    if status != 0:
        raise InputError(
            f"{program} ended with status {status}; read its message above; the same command"
            " continues from here"
        )


def make_text(plan: Plan, text: str | None, text_field: str) -> None:
    """Write train.txt and held_out.txt; a document is in one of them, whole.

    Removes an earlier run's study, whose rows are of other text or another teacher.
    """
    shutil.rmtree(plan.study, ignore_errors=True)
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
    """Train the teacher that the default run distils: its first updates, on short sequences."""
    write_json(plan.folder / "teacher.json", {**TEACHER, "vocab_size": vocab_size})
    start = {"--config": plan.folder / "teacher.json"}
    length = min(SHORT_LENGTH, plan.max_length)
    size = {"--num_steps": plan.scale.short_steps, "--batch_size": SHORT_BATCH}
    more = {"--max_length": length, "--learning_rate": SHORT_RATE}
    _train_teacher(plan, {**start, **size, **more}, plan.short_teacher)


def lengthen_teacher(plan: Plan) -> None:
    """Train the teacher's last updates, on whole sequences."""
    size = {"--num_steps": plan.scale.teacher_steps, "--max_length": plan.max_length}
    start = {"--weights": plan.short_teacher}
    _train_teacher(plan, {**start, **size}, Path(plan.teacher))


def _train_teacher(plan: Plan, more: Mapping[str, object], output: Path) -> None:
    # Begun after the text was made: by the interrupted run that is continued, not by one before it.
    begun, text = output / "training" / "checkpoints", plan.folder / "train.txt"
    resumes = begun.is_dir() and begun.stat().st_mtime_ns >= text.stat().st_mtime_ns
    flags = {
        **more,
        "--tokenizer_name": plan.teacher,
        "--data_file": plan.token_file("train"),
        "--output_dir": output,
        "--seed": plan.seed,
        "--force": None,
        **({"--resume": "auto"} if resumes else {}),
    }
    call("scripts/train_teacher.py", flags)


def compare(plan: Plan) -> None:
    """Distil a student, train its twin without the teacher, and measure all on held-out text."""
    is_bert = plan.architecture.name == "bert"
    # Smoothing 0: the figures' tokens are those of the text. Minutes on a few MB are too few for
    # 2019's emphasis on rare tokens (0.7), which moves a small student away from its teacher at the
    # frequent ones.
    of_training = {
        "--batch_size": plan.scale.batch_size,
        "--gradient_accumulation_steps": 1,
        "--log_interval": 10,
        "--checkpoint_interval": max(plan.scale.student_steps // 5, 50),
        **({"--mlm_smoothing": 0} if plan.architecture.is_masked else {}),
        **({"--freeze_pos_embs": None} if is_bert else {}),
    }
    flags = {
        "--teacher": plan.teacher,
        **({"--extract_flags": "--student_type distilbert --fold_token_types"} if is_bert else {}),
        "--data_file": plan.token_file("train"),
        "--held_out": plan.token_file("held_out"),
        "--num_held_out": plan.scale.num_held_out,
        **({"--token_counts": plan.counts} if plan.architecture.is_masked else {}),
        "--max_length": plan.max_length,
        "--variants": REFERENCE,
        "--seeds": plan.seed,
        "--max_steps": plan.scale.student_steps,
        "--learning_rates": STUDENT_RATE,
        "--train_flags": shlex.join(words_of(of_training)),
        "--processes": 2 if plan.is_embedded else 1,
        "--output": plan.study,
    }
    call("scripts/study.py", flags)
