"""The README's workflow from text to a trained student, as one function a stage.

Each stage calls one of the project's programs as a user calls it; scripts/quickstart.py calls the
stages one after another.
"""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import transformers

from distil.data import builtin_corpus
from distil.models.architectures import ARCHITECTURES
from distil.models.hub import short_name
from distil.models.tokenizers import train_word_pieces
from distil.system.files import atomic_path, write_json
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
    "clm": {"--alpha_ce": 5.0, "--alpha_clm": 2.0, "--alpha_cos": 1.0},
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
    """Paths, model types and size of a run."""

    folder: Path
    teacher: str
    teacher_type: str
    student_type: str
    scale: Scale
    seed: int
    max_length: int

    @property
    def objective(self) -> str:
        """The language-model objective of the pair: mlm or clm."""
        return "mlm" if ARCHITECTURES[self.teacher_type].is_masked else "clm"

    def token_file(self, part: str) -> Path:
        """Return the path of a part's token ids, made by binarized_data.py."""
        return self.folder / f"{part}.{short_name(self.teacher)}.pickle"

    @property
    def counts(self) -> Path:
        """Return the path of the token counts."""
        return self.folder / "token_counts.pickle"

    @property
    def student_config(self) -> Path:
        """Return the path of the student's configuration."""
        return self.folder / "student.json"


def call(program: str, flags: Mapping[str, object]) -> None:
    """Run one of the project's programs, printed as a user would type it. Raises InputError.

    flags: flag -> value, None for a flag without a value.
    """
    words = [str(word) for item in flags.items() for word in item if word is not None]
    print(f"\n$ python {program} {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, str(ROOT / program), *words]).returncode
    if status != 0:
        raise InputError(f"{program} ended with status {status}; read its message above")


def make_text(plan: Plan, text: str | None) -> None:
    """Write train.txt and held_out.txt; a document is in one of them, whole."""
    documents = (
        ([line] for line in user_lines(text))
        if text
        else (list(builtin_corpus.lines(d)) for d in builtin_corpus.documents())
    )
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for number, document in enumerate(documents):
        parts["held_out" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"] += document
    if not parts["held_out"]:
        raise InputError(
            f"--text {text}: expected at least {HELD_OUT_EVERY} lines of text, different from one"
            " another"
        )
    for part, lines in parts.items():
        with atomic_path(plan.folder / f"{part}.txt") as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    logger.info(
        "Text: %s lines to train on, %s held out.", *(f"{len(lines):,}" for lines in parts.values())
    )


def user_lines(path: str) -> Iterator[str]:
    """Yield each distinct line once: a repeated line could be both trained on and held out."""
    seen = set()
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                stripped = line.strip()
                if stripped and stripped not in seen:
                    seen.add(stripped)
                    yield stripped
        except UnicodeDecodeError as error:
            raise InputError(f"--text {path}: is not UTF-8 ({error}); convert it") from error


def train_vocabulary(plan: Plan) -> None:
    """Train a WordPiece vocabulary on train.txt and save it as a BERT tokenizer."""
    vocabulary = train_word_pieces(plan.folder / "train.txt", VOCAB_SIZE)
    transformers.BertTokenizer(
        vocab=vocabulary, do_lower_case=True, model_max_length=512
    ).save_pretrained(plan.teacher)
    logger.info("Vocabulary: %d WordPiece tokens.", len(vocabulary))


def make_tokens(plan: Plan, vocab_size: int) -> None:
    """Binarize both parts and count the tokens of the first."""
    for part in ("train", "held_out"):
        flags = {
            "--file_path": plan.folder / f"{part}.txt",
            "--tokenizer_type": plan.teacher_type,
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
    is_bert = plan.teacher_type == "bert"
    flags = {
        "--model_type": plan.teacher_type,
        "--model_name": plan.teacher,
        "--dump_checkpoint": plan.folder / "first_weights.pth",
        "--num_layers": num_layers,
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
    flags = {
        "--student_type": plan.student_type,
        "--student_config": plan.student_config,
        "--teacher_type": plan.teacher_type,
        "--teacher_name": plan.teacher,
        **alphas,
        "--freeze_pos_embs": None,
        "--student_pretrained_weights": plan.folder / "first_weights.pth",
        "--data_file": plan.token_file("train"),
        **(masking if plan.objective == "mlm" else {}),
        "--dump_path": plan.folder / name,
        "--force": None,
        "--max_steps": plan.scale.student_steps,
        "--batch_size": plan.scale.batch_size,
        "--gradient_accumulation_steps": 1,
        "--max_length": plan.max_length,
        "--log_interval": 10,
        "--seed": plan.seed,
    }
    call("train.py", flags)
