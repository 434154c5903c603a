"""Compare students of a trimmed teacher with students of the whole one, on a teacher trained here.

    python benchmarks/vocabularies_trained.py --texts FOLDER --folder WORK --json FILE

TEXTS holds LANGUAGE.txt files, a text a line. A small multilingual teacher of each kind, masked and
causal, is trained on all of them; its vocabulary is trimmed to one language, and students are
trained on that language alone: of the whole teacher, of the trimmed one for as many updates, and of
the trimmed one for as many CPU seconds. The same command continues an interrupted run.
"""

import argparse
import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tokenizers
import torch
import transformers

from benchmarks.vocabularies import split
from benchmarks.vocabulary_losses import (
    Example,
    causal_example,
    chunks_of,
    is_kept,
    kl_over_kept,
    loss_a_character,
    masked_example,
    masked_words,
)
from distil.models.hub import quiet_transformers
from distil.models.tokenizers import train_word_pieces
from distil.reporting.tables import markdown
from distil.study.variants import NO_TEACHER, REFERENCE, train_flags, variants
from distil.system.files import write_json
from distil.vocabulary.choice import Choice
from distil.workflow import Stages, call
from utils import InputError, run_program, setup_logging

KINDS = {"masked": "mlm", "causal": "clm"}
WIDTH, LAYERS, HEADS, LENGTH = 192, 4, 4, 128
TEXT_WORDS, KEPT_WORDS = 40, 12  # words of a held-out text; of one whose ids are all kept
ONE_WORD_OF, NUM_MASKINGS = 7, 2  # one word of so many is masked; maskings of a text
COST_UPDATES = 5, 35  # two runs whose difference is the cost of updates without start and end
STUDENTS = {  # row -> (teacher's vocabulary, updates for an equal number or equal time)
    "whole": ("whole", "updates"),
    "trimmed, equal updates": ("trimmed", "updates"),
    "trimmed, equal time": ("trimmed", "time"),
}
REFERENCES = {
    "teacher": ("whole", "teacher"),
    "trimmed teacher": ("trimmed", "teacher"),
    "first student": ("whole", "first"),
    "trimmed first student": ("trimmed", "first"),
}
PLACES = "texts", "folder", "json"  # flags that don't change what is computed
MEASURES = ("loss", "loss_on_kept", "kl")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--texts", required=True, help="folder of LANGUAGE.txt")
    add("--folder", required=True, help="folder for everything that is made, and to continue from")
    add("--json", required=True, help="output")
    add("--language", default="de", help="the students' language (default: %(default)s)")
    add("--vocab_size", type=int, default=12_000, help="of the teachers (default: %(default)s)")
    add("--coverage", type=float, default=0.99, help="of trimming (default: %(default)s)")
    add("--other_kb", type=int, default=100, help="text of each other language (default: 100)")
    add(
        "--teacher_updates",
        type=int,
        nargs=2,
        default=(1800, 600),
        metavar=("MASKED", "CAUSAL"),
        help="(default: 1800 600)",
    )
    add("--student_updates", type=int, default=120, help="(default: %(default)s)")
    add("--batch_size", type=int, default=8, help="sequences an update (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    args = parser.parse_args(argv)
    if not Path(args.texts, f"{args.language}.txt").is_file():
        raise InputError(
            f"--texts {args.texts}: holds no {args.language}.txt; expected a text a language, that"
            " of --language among them"
        )
    return args


# --------------------------------------------------------------------------------------------------
# Text, tokenizers, teachers
# --------------------------------------------------------------------------------------------------


def make_texts(args: argparse.Namespace, folder: Path) -> None:
    """Write the teacher's text, and the language's to train on and held out, disjoint."""
    everything: list[str] = []
    for path in sorted(Path(args.texts).glob("*.txt")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        counted, held_out = split([line for line in dict.fromkeys(lines) if line])
        if path.stem == args.language:
            write_lines(folder / "language.txt", counted)
            write_lines(folder / "held_out.txt", held_out)
        else:
            sizes = np.cumsum([len(line.encode()) for line in counted])
            counted = counted[: int(np.searchsorted(sizes, 1000 * args.other_kb))]
        everything += counted
    write_lines(folder / "all.txt", everything)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def make_random_teacher(args: argparse.Namespace, folder: Path, kind: str) -> None:
    """Train a vocabulary on all texts; save a teacher of random weights with it."""
    target = folder / kind / "random"
    target.mkdir(parents=True, exist_ok=True)
    text, sizes = str(folder / "all.txt"), {"initializer_range": 0.05}
    torch.manual_seed(0)
    if kind == "masked":
        vocabulary = train_word_pieces(text, args.vocab_size, lowercase=False)
        tokenizer = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False)
        config = transformers.BertConfig(
            **sizes,
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        network = transformers.BertForMaskedLM(config)
    else:
        trainer, end = tokenizers.ByteLevelBPETokenizer(), "<|endoftext|>"
        options = {"show_progress": False, "special_tokens": [end]}
        trainer.train([text], vocab_size=args.vocab_size, **options)
        trainer.save_model(str(target))
        files = {"vocab": str(target / "vocab.json"), "merges": str(target / "merges.txt")}
        tokenizer = transformers.GPT2Tokenizer(**files)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        sizes |= {"vocab_size": len(tokenizer), "n_embd": WIDTH, "n_layer": LAYERS}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_head=HEADS, n_positions=LENGTH, **sizes, **ends, **drops)
        network = transformers.GPT2LMHeadModel(config)
    with quiet_transformers():
        tokenizer.save_pretrained(target)
        network.save_pretrained(target)


def binarize(folder: Path, text: str, tokenizer: Path, dump: Path) -> None:
    """Make a token file and counts: DUMP.NAME.pickle, DUMP.counts."""
    flags = {"--file_path": folder / text, "--tokenizer_type": "auto", "--force": None}
    flags |= {"--tokenizer_name": tokenizer, "--dump_file": dump, "--num_workers": 1}
    call("scripts/binarized_data.py", flags | {"--token_counts_dump": f"{dump}.counts"})


def train(
    args: argparse.Namespace, models: Mapping[str, object], data: Path, output: Path, **more
) -> float:
    """Run train.py; return its CPU seconds, start and end included. more: flags."""
    flags = {**models, "--data_file": data, "--dump_path": output, "--n_gpu": 0, "--force": None}
    flags |= {"--gradient_accumulation_steps": 1, "--batch_size": args.batch_size}
    flags |= {"--max_length": LENGTH, "--log_interval": 50, "--checkpoint_interval": 10**9}
    before = cpu_seconds()
    call("train.py", flags | {f"--{name}": value for name, value in more.items()})
    return cpu_seconds() - before


def cpu_seconds() -> float:
    """Return the CPU seconds of the programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def flags_of(variant: str, kind: str) -> dict[str, object]:
    """Return the flags of train.py of a study's variant."""
    is_masked = kind == "masked"
    return train_flags(variants(is_masked)[variant], is_masked)


def train_teacher(args: argparse.Namespace, folder: Path, kind: str) -> None:
    """Train the teacher on all languages."""
    place = folder / kind
    binarize(folder, "all.txt", place / "random", place / "all")
    models = {"--student": place / "random", "--teacher_name": place / "random"}
    models |= flags_of(NO_TEACHER, kind)
    if kind == "masked":
        models |= {"--mlm_smoothing": 0, "--mlm_mask_prop": 0.3}
    updates = args.teacher_updates[list(KINDS).index(kind)]
    data, more = place / "all.random.pickle", {"learning_rate": 1e-3, "max_steps": updates}
    used = train(args, models, data, place / "teacher_run", warmup_prop=0.1, **more)
    (place / "teacher_run" / "model").rename(place / "whole")
    write_json(place / "teacher.json", {"updates": updates, "cpu_s": used})


def make_students(args: argparse.Namespace, folder: Path, kind: str) -> None:
    """Trim the teacher; make both teachers' data of the language and first students."""
    place = folder / kind
    binarize(folder, "language.txt", place / "whole", place / "language")
    flags = {"--teacher": place / "whole", "--token_counts": place / "language.counts"}
    flags |= {"--coverage": args.coverage, "--held_out": folder / "held_out.txt"}
    call("scripts/trim_vocabulary.py", flags | {"--output": place / "trimmed"})
    binarize(folder, "language.txt", place / "trimmed", place / "language")
    for name in ("whole", "trimmed"):
        flags = {"--teacher": place / name, "--num_layers": LAYERS // 2}
        call("scripts/extract.py", flags | {"--output": place / f"{name}_first"})


# --------------------------------------------------------------------------------------------------
# Students
# --------------------------------------------------------------------------------------------------


def train_student(
    args: argparse.Namespace, place: Path, vocabulary: str, output: str, updates: int, seed: int
) -> float:
    """Train a student of one of the teachers; return its CPU seconds."""
    alphas = flags_of(REFERENCE, place.name)
    if "--mlm" in alphas:
        alphas = {**alphas, "--mlm_smoothing": 0}
    models = {"--student": place / f"{vocabulary}_first", "--teacher_name": place / vocabulary}
    data = place / f"language.{vocabulary}.pickle"
    more = {"max_steps": updates, "seed": seed}
    return train(args, models | alphas, data, place / output, **more)


def measure_cost(args: argparse.Namespace, folder: Path, kind: str) -> None:
    """Find the CPU seconds of an update, from two runs each; how many fit into the whole's time."""
    place, cost = folder / kind, {}
    few, many = COST_UPDATES
    for name in ("whole", "trimmed"):
        used = [train_student(args, place, name, "cost_run", n, seed=0) for n in (few, many)]
        cost[name] = (used[1] - used[0]) / (many - few)
    ratio = cost["whole"] / cost["trimmed"]
    updates = {"updates": args.student_updates, "time": round(args.student_updates * ratio)}
    write_json(place / "cost.json", {"cpu_s_an_update": cost, "updates": updates})


def run_student(args: argparse.Namespace, folder: Path, kind: str, row: str, seed: int) -> None:
    """Train a student and measure it."""
    place, (vocabulary, equal) = folder / kind, STUDENTS[row]
    updates = read(place / "cost.json")["updates"][equal]
    name = f"{vocabulary}_{equal}_{seed}"
    used = train_student(args, place, vocabulary, name, updates, seed)
    found = measure(folder, kind, place / name / "model", vocabulary)
    write_json(place / f"{name}.json", {"updates": updates, "cpu_s": used, **found})


def measure_reference(folder: Path, kind: str, row: str) -> None:
    """Measure a teacher or a student before training."""
    vocabulary, stage = REFERENCES[row]
    name = vocabulary if stage == "teacher" else f"{vocabulary}_first"
    found = measure(folder, kind, folder / kind / name, vocabulary)
    write_json(folder / kind / f"{name}.json", found)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------


def held_out_examples(
    lines: list[str],
    pair: Mapping[str, object],
    choice: Choice,
    is_masked: bool,
    num_words: tuple[int, int] = (TEXT_WORDS, KEPT_WORDS),
) -> tuple[dict[str, list[Example]], list[Example]]:
    """Make {vocabulary: examples} of the same texts, and those of the whole whose ids are kept.

    pair: {whole, trimmed: tokenizer}. num_words: of a text, of one whose ids are kept.
    """
    texts = chunks_of(lines, num_words[0])
    lengths = [
        max(len(one.backend_tokenizer.encode(text).ids) for one in pair.values()) for text in texts
    ]
    texts = [text for text, length in zip(texts, lengths, strict=True) if length < LENGTH]
    whole, kept = pair["whole"], set(map(int, choice.kept_K))
    short = [text for text in chunks_of(lines, num_words[1]) if is_kept(whole, text, kept)]
    if not is_masked:
        found = {name: [causal_example(one, text) for text in texts] for name, one in pair.items()}
        return found, [causal_example(whole, text) for text in short]
    texts = [text for text in texts for _ in range(NUM_MASKINGS)]
    words = masked_words(list(pair.values()), texts, ONE_WORD_OF)
    found = {
        name: [masked_example(one, *each) for each in zip(texts, words, strict=True)]
        for name, one in pair.items()
    }
    some = masked_words([whole], short, ONE_WORD_OF)
    return found, [masked_example(whole, *each) for each in zip(short, some, strict=True)]


def measure(folder: Path, kind: str, model: Path, vocabulary: str) -> dict[str, float]:
    """Measure a model on the held-out text."""
    place, is_masked = folder / kind, kind == "masked"
    lines = (folder / "held_out.txt").read_text(encoding="utf-8").splitlines()
    choice = Choice(np.array(read(place / "trimmed" / "trimming.json")["kept"]), [])
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    with quiet_transformers():
        pair = {
            name: transformers.AutoTokenizer.from_pretrained(place / name)
            for name in ("whole", "trimmed")
        }
        teacher, network = (auto.from_pretrained(one) for one in (place / "whole", model))
    examples, kept = held_out_examples(lines, pair, choice, is_masked)
    is_trimmed, own = vocabulary == "trimmed", examples[vocabulary]
    on_kept = [one.renumbered(choice.new_of) for one in kept] if is_trimmed else kept
    return {
        "parameters": network.num_parameters(),
        "loss": loss_a_character(network, own),
        "loss_on_kept": loss_a_character(network, on_kept),
        "kl": kl_over_kept(teacher, network, kept, choice, is_trimmed=is_trimmed),
        "texts": len(own),
        "characters": sum(one.characters for one in own),
        "pieces": sum(len(one.targets) for one in own),
        "kept_texts": len(kept),
        "kept_pieces": sum(len(one.targets) for one in kept),
    }


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def collect(folder: Path, kind: str, seeds: list[int]) -> dict[str, list[dict]]:
    """Read what was measured: row -> one entry a seed."""
    place, found = folder / kind, {}
    for row, (vocabulary, stage) in REFERENCES.items():
        name = vocabulary if stage == "teacher" else f"{vocabulary}_first"
        found[row] = [read(place / f"{name}.json")]
    for row, (vocabulary, equal) in STUDENTS.items():
        found[row] = [read(place / f"{vocabulary}_{equal}_{seed}.json") for seed in seeds]
    return found


def table(rows: Mapping[str, list[dict]], cost: Mapping[str, float]) -> str:
    """Lay the rows out: means over seeds, with the distance to the farthest seed."""
    titles = ["parameters, M", "updates", "CPU s an update", "CPU s in all", "nats a character"]
    cells = [["model", *titles, "the same where all ids are kept", "KL over kept entries"]]
    for row, runs in rows.items():
        spent = ["", "", ""]
        if row in STUDENTS:
            in_all = statistics.fmean(run["cpu_s"] for run in runs)
            updates = f"{runs[0]['updates']:,}"
            spent = [updates, f"{cost[STUDENTS[row][0]]:.2f}", f"{in_all:.0f}"]
        cells.append([row, f"{runs[0]['parameters'] / 1e6:.1f}", *spent])
        for name in MEASURES:
            values = [run[name] for run in runs]
            mean = statistics.fmean(values)
            spread = max(abs(value - mean) for value in values)
            cells[-1].append(f"{mean:.4f}" + (f" ± {spread:.4f}" if len(runs) > 1 else ""))
    return markdown(cells)


def report(args: argparse.Namespace, folder: Path) -> None:
    """Print the tables; write the JSON."""
    flags = {name: value for name, value in vars(args).items() if name not in PLACES}
    content = {"date": time.strftime("%Y-%m-%d"), "flags": flags, "kinds": {}}
    for kind in KINDS:
        place = folder / kind
        trimming = read(place / "trimmed" / "trimming.json")
        trimming.pop("kept")
        cost, rows = read(place / "cost.json"), collect(folder, kind, args.seeds)
        teacher = read(place / "teacher.json")
        content["kinds"][kind] = {"teacher": teacher, "trimming": trimming, **cost, "rows": rows}
        entries = [trimming[when]["entries"] for when in ("before", "after")]
        print(f"\n{kind}: {entries[0]:,} entries, trimmed {entries[1]:,}\n")
        print(table(rows, cost["cpu_s_an_update"]), flush=True)
    write_json(args.json, content)


def main(argv: list[str] | None = None) -> None:
    """Run every stage, then print the tables."""
    args = parse(argv)
    setup_logging(logging.INFO)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    identity = {k: v for k, v in vars(args).items() if k not in (*PLACES, "seeds")}
    stages = Stages(folder / "stages.json", json.loads(json.dumps(identity)))
    stages.run("texts", make_texts, args, folder)
    for kind in KINDS:
        stages.run(f"{kind}: random teacher", make_random_teacher, args, folder, kind)
        stages.run(f"{kind}: train teacher", train_teacher, args, folder, kind)
        stages.run(f"{kind}: students", make_students, args, folder, kind)
        stages.run(f"{kind}: cost", measure_cost, args, folder, kind)
        for row in REFERENCES:
            stages.run(f"{kind}: measure {row}", measure_reference, folder, kind, row)
    for seed in args.seeds:
        for kind in KINDS:
            for row in STUDENTS:
                stages.run(f"{kind}: {row}, {seed}", run_student, args, folder, kind, row, seed)
    report(args, folder)


if __name__ == "__main__":
    run_program(main)
