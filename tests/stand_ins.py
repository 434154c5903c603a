"""Stand-ins for real data and models: a text, tokenizers trained on it, tiny random teachers.

For the tests and for scripts/fault_injection.py.
"""

import json
import random
import socket
import sys
import types
from pathlib import Path

import torch
import transformers
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from distil.models.tokenizers import train_word_pieces  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WIDTH, LAYERS, POSITIONS = 32, 4, 64
STUDENT_LAYERS = 2


def make_lines(num: int, seed: int = 0) -> list[str]:
    """Make sentences of unequal lengths over 300 invented words with Zipf's frequencies."""
    rng = random.Random(seed)
    syllables = ["ba", "ke", "li", "mo", "nu", "ra", "so", "ti", "vu", "ze", "Da", "Fi", "Go"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=rng.randint(8, 40))) + "." for _ in range(num)]


def save_tokenizer(kind: str, folder: Path, text_file: Path, lowercase: bool = True) -> None:
    """Train a tokenizer of a model type and save it as transformers does."""
    if kind == "bert":
        vocabulary = train_word_pieces(text_file, 200, lowercase)
        tokenizer = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=lowercase)
    else:
        trainer = ByteLevelBPETokenizer()
        tokenizer_class, special = transformers.GPT2Tokenizer, ["<|endoftext|>"]
        if kind == "roberta":
            special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
            tokenizer_class = transformers.RobertaTokenizer
        trainer.train([str(text_file)], vocab_size=320, show_progress=False, special_tokens=special)
        trainer.save_model(str(folder))
        files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
        tokenizer = tokenizer_class(**files)
    tokenizer.save_pretrained(folder)


def make_model(kind: str, vocab_size: int, layers: int = LAYERS, **options):
    """Make a random language model with weights large enough for predictions to differ."""
    torch.manual_seed(1)
    sizes = {"vocab_size": vocab_size, "initializer_range": 0.2, **options}
    if kind == "gpt2":
        sizes |= {"n_embd": WIDTH, "n_layer": layers, "n_head": 4, "n_positions": POSITIONS}
        config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
        return transformers.GPT2LMHeadModel(config)
    sizes |= {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if kind == "roberta":
        config = transformers.RobertaConfig(
            **sizes, max_position_embeddings=POSITIONS + 2, type_vocab_size=1
        )
        return transformers.RobertaForMaskedLM(config)
    config = transformers.BertConfig(**sizes, max_position_embeddings=POSITIONS)
    return transformers.BertForMaskedLM(config)


def make_teachers(folder: Path, text_file: Path) -> dict[str, Path]:
    """Save tiny teachers with tokenizers: model type -> folder."""
    folders = {}
    for kind in ("bert", "roberta", "gpt2"):
        folders[kind] = folder / f"tiny-{kind}"
        folders[kind].mkdir()
        save_tokenizer(kind, folders[kind], text_file)
        make_model(kind, vocab_size_of(folders[kind])).save_pretrained(folders[kind])
    return folders


def vocab_size_of(folder: Path) -> int:
    return len(transformers.AutoTokenizer.from_pretrained(folder))


def student_config_of(kind: str, vocab_size: int) -> dict:
    """Return a student's JSON configuration for a teacher of a model type."""
    if kind == "gpt2":
        return {
            "n_embd": WIDTH,
            "n_layer": STUDENT_LAYERS,
            "n_head": 4,
            "n_positions": POSITIONS,
            "vocab_size": vocab_size,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    if kind == "roberta":
        return {
            "hidden_size": WIDTH,
            "num_hidden_layers": STUDENT_LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": vocab_size,
            "max_position_embeddings": POSITIONS + 2,
            "type_vocab_size": 1,
        }
    return {
        "dim": WIDTH,
        "n_layers": STUDENT_LAYERS,
        "n_heads": 4,
        "hidden_dim": 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": POSITIONS,
        "sinusoidal_pos_embds": True,
    }


def model_facts(
    vocab_size: int, source: str, special_ids=None, max_length: int = 64, facts=None
) -> types.SimpleNamespace:
    """Make the part of a LanguageModel that LmSeqsDataset needs."""
    return types.SimpleNamespace(
        special_ids=special_ids,
        max_length=max_length,
        vocab_size=vocab_size,
        num_entries=vocab_size,
        tokenizer_facts=facts,
        source=source,
    )


class World:
    """Data, counts, first weights and configuration for each pair, and the flags to train it."""

    STUDENTS = {"bert": "distilbert", "roberta": "roberta", "gpt2": "gpt2"}

    def __init__(self, folder: Path, teachers: dict[str, Path], text_file: Path):
        import binarized_data
        import extract
        import extract_distilbert
        import token_counts

        self.folder, self.teachers, self.text = folder, teachers, text_file
        for kind, teacher in teachers.items():
            vocab_size = vocab_size_of(teacher)
            flags = ["--file_path", str(text_file), "--dump_file", str(folder / "data")]
            flags += ["--tokenizer_type", kind, "--tokenizer_name", str(teacher)]
            binarized_data.main(flags)
            flags = ["--data_file", self.data(kind), "--token_counts_dump", self.counts(kind)]
            token_counts.main([*flags, "--vocab_size", str(vocab_size)])
            content = json.dumps(student_config_of(kind, vocab_size))
            Path(self.config(kind)).write_text(content)
            program = extract_distilbert if kind == "bert" else extract
            flags = ["--model_type", kind, "--model_name", str(teacher)]
            program.main([*flags, "--dump_checkpoint", self.first_weights(kind)])

    def data(self, kind: str) -> str:
        return str(self.folder / f"data.tiny-{kind}.pickle")

    def counts(self, kind: str) -> str:
        return str(self.folder / f"counts.{kind}.pickle")

    def config(self, kind: str) -> str:
        return str(self.folder / f"student.{kind}.json")

    def first_weights(self, kind: str) -> str:
        return str(self.folder / f"first.{kind}.pth")

    def flags(self, kind: str, dump_path: Path, **changes) -> list[str]:
        """List the flags of train.py for a pair.

        changes: flags to replace or add; None removes a flag, True passes it without a value.
        """
        values = {
            "student_type": self.STUDENTS[kind],
            "student_config": self.config(kind),
            "teacher_type": kind,
            "teacher_name": str(self.teachers[kind]),
            "data_file": self.data(kind),
            "dump_path": str(dump_path),
            "alpha_ce": 5.0,
            "alpha_cos": 1.0,
            "gradient_accumulation_steps": 2,
            "n_epoch": 1,
        }
        if kind == "gpt2":
            values |= {"alpha_clm": 0.5}
        else:
            values |= {"mlm": True, "alpha_mlm": 2.0, "alpha_clm": 0.0}
            values |= {"token_counts": self.counts(kind)}
        flags: list[str] = []
        for name, value in (values | changes).items():
            if value is not None:
                flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return flags


MEASURED = ("global/speed", "global/tokens_per_s", "global/mfu", "global/memory_usage")


def logged(run: Path) -> list[tuple]:
    """List the points of a run's event files: (tag, x, value), without times and memory."""
    points = []
    for file in sorted((run / "log").glob("*/*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                content = value.tensor.float_val or value.tensor.string_val
                points.append((value.tag, event.step, str(content)))
    return sorted(point for point in points if point[0] not in MEASURED)


def is_text(point: tuple) -> bool:
    """True if a point of a run's log is a text, not a number."""
    return point[0].startswith("config/")


def open_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
