"""Digest all that a checkout computes: `python tests/fingerprint.py CHECKOUT OUT`.

Run it on a checkout from before and on one from after a change that must alter nothing, and compare
the two outputs with diff: weights, moments, states, logs, token files, cards, scores, tables,
messages, exit statuses, helps. A line is a readable key with a digest or a value, so that the first
one that differs says where to look.

Every program is run as users run it, by its path and its flags, but in a process forked from this
one, which has imported the libraries: a second where a new interpreter takes five. Of the checkout
only its programs' paths and flags are taken for granted, and that tests/stand_ins.py has
make_lines, make_teachers and World.

All work is done in `fingerprint.work` beside OUT, which is emptied first and stays, to be looked
into. Paths stand in cards and states: give the two outputs the same folder, and copy the first one
away. Make them on the same machine, with the same libraries. What differs between two runs of the
same code is left out, or replaced by a word: times, speeds, memory, temporary names, hosts, the
commit.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

LIMIT_S = 240  # a program that takes longer has hung
GRACE_S = 30  # in which a launcher ends its processes
KINDS = ("bert", "roberta", "gpt2")
# What programs import, imported before they are forked.
LIBRARIES = """
torch torch._dynamo torch.utils.tensorboard torch.utils.flop_counter transformers accelerate
transformers.integrations.sdpa_attention transformers.trainer datasets pyarrow.parquet scipy.stats
matplotlib.pyplot sklearn.metrics seqeval.metrics psutil tqdm.contrib.logging git hypothesis
torchmetrics.functional.text.squad tensorboard.backend.event_processing.event_accumulator
"""
LAUNCHER_VARIABLES = """
RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT N_NODES N_GPU_NODE
NODE_RANK TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
"""


def main() -> None:
    """Run everything, write the lines; end with status 1 where a program ended as it should not."""
    if len(sys.argv) != 3:
        sys.exit("usage: python tests/fingerprint.py CHECKOUT OUT")
    root, out = (Path(path).resolve() for path in sys.argv[1:])
    started, work = time.monotonic(), out.parent / "fingerprint.work"
    shutil.rmtree(work, ignore_errors=True)
    for name in ("home", "printed", "tmp"):
        (work / name).mkdir(parents=True)
    os.chdir(work)
    set_environment(work)
    for name in LIBRARIES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    bench = Bench(root, work)
    for section in (make_inputs, *SECTIONS):
        begun = time.monotonic()
        section(bench)
        print(f"{section.__name__}: {time.monotonic() - begun:.0f} s", flush=True)
    out.write_text("\n".join(bench.lines) + "\n", encoding="utf-8")
    used_s = sum(os.times()[:4])
    print(f"{len(bench.lines)} lines, {time.monotonic() - started:.0f} s, {used_s:.0f} s of a core")
    if bench.unexpected:
        sys.exit("\n".join(["ended as they should not (see printed/):", *bench.unexpected]))


def set_environment(work: Path) -> None:
    """Give programs the same surroundings each time."""
    for name in LAUNCHER_VARIABLES.split():
        os.environ.pop(name, None)
    os.environ |= {
        "COLUMNS": "100",
        "HF_HOME": str(work / "home" / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(work / "home"),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        "TMPDIR": str(work / "tmp"),
        "TOKENIZERS_PARALLELISM": "false",
    }


# --------------------------------------------------------------------------------------------------
# Programs
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """A checkout, where its programs run, the flags that train each pair, and what was found."""

    root: Path
    work: Path
    flags: dict[str, dict[str, str | bool]] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    num_run: int = 0

    def add(self, key: str, value: object) -> None:
        """Record a line."""
        self.lines.append(f"{key} {value}")

    def run(
        self,
        program: str,
        words: str | Sequence[str],
        *,
        status: int = 0,
        key: str = "",
        terse: bool = False,
        prepare: Callable[[], None] = lambda: None,
        **environment: str,
    ) -> None:
        """Run a program; record its end and what it prints, with `terse` only problems it names."""
        argv = shlex.split(words) if isinstance(words, str) else list(words)
        key = key or f"{program} {' '.join(argv)}".rstrip()
        printed = [self.work / "printed" / f"{self.num_run:03d}.{name}" for name in ("out", "err")]
        self.num_run += 1
        path = self.root / program

        def act() -> None:
            for descriptor, place in enumerate(printed, start=1):
                direct(descriptor, place)
            os.environ.update(environment)
            prepare()
            sys.argv, sys.path[0] = [str(path), *argv], str(path.parent)
            runpy.run_path(str(path), run_name="__main__")

        ended = in_fork(act)
        texts = [place.read_text(encoding="utf-8", errors="replace") for place in printed]
        self.record(key, ended, *texts, terse=terse, expected=status)

    def record(
        self, key: str, ended: int | None, out: str, err: str, *, terse: bool, expected: int
    ) -> None:
        """Record a program's exit status (None: hung) and what it printed."""
        self.add(f"ended | {key} |", ended)
        if ended != expected:
            self.unexpected.append(key)
        if not terse:
            for line in self.plain(out).splitlines():
                self.add(f"out | {key} |", shortened(line))
        for line in messages(self.plain(err)):
            if not terse or ": error: " in line:
                self.add(f"err | {key} |", shortened(line))

    def plain(self, text: str) -> str:
        """Replace what differs from checkout to checkout, or from run to run."""
        for path, word in ((self.work, "WORK"), (self.root, "CHECKOUT")):
            text = re.sub(rf"{re.escape(str(path))}(?![\w-])", word, text)
        for pattern, word in VOLATILE:
            text = pattern.sub(word, text)
        return text

    def train(self, kind: str, run: str, changes: str, key: str = "", **options) -> None:
        """Run train.py with a pair's flags, changed as `changed` says."""
        argv = changed(self.flags[kind] | {"dump_path": run}, changes)
        self.run("train.py", argv, key=key or f"train {kind} {run} {changes}", **options)

    def files(self, *folders: str) -> None:
        """Record every file below folders, and the logs of runs."""
        for folder in folders:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() or path.is_symlink():
                    self.lines += map(self.plain, file_lines(path, self.plain))
            for log in sorted(Path(folder).rglob("log/*")):
                self.lines += map(self.plain, log_lines(log))


def changed(flags: dict[str, str | bool], changes: str) -> list[str]:
    """List flags as words, changed: `name=value` and the bare `name` set one, `-name` drops it."""
    flags = dict(flags)
    for word in shlex.split(changes):
        name, is_set, value = word.partition("=")
        if name.startswith("-"):
            flags.pop(name[1:])
        else:
            flags[name] = value if is_set else True
    words: list[str] = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def direct(descriptor: int, path: Path) -> None:
    """Have standard output (1) or error (2) go to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    stream = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    setattr(sys, ("stdout", "stderr")[descriptor - 1], stream)


def in_fork(act: Callable[[], None]) -> int | None:
    """Call a function in a forked process; return its exit status, None where it hung."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return end_of(pid)
    status = 1
    try:
        os.setsid()
        act()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # a panic of the tokenizers library is no Exception
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def end_of(pid: int) -> int | None:
    """Wait for a child: its status, negative for a signal; None where it had to be killed."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def stopped_at(place: str) -> Callable[[], None]:
    """Prepare a process that asks itself to stop when it gives a file or folder this name."""

    def look(event: str, arguments: tuple) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(place):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # the system gives the signal to a thread

    return lambda: sys.addaudithook(look)


# --------------------------------------------------------------------------------------------------
# What is recorded of texts and files
# --------------------------------------------------------------------------------------------------

VOLATILE = [
    (re.compile(pattern), word)
    for pattern, word in (
        (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", "TIME"),
        (r"\d{4}-\d\d-\d\d", "DATE"),
        (r"\.old-\d{8}-\d{6}", ".old-TIME"),
        (r"\d[\d.,]* (?:s|ms|min|minutes)\b *", "SECONDS"),
        (r"\d[\d.,]*[kM]? [a-zA-Z]+/s\b", "SPEED"),
        (r"\b(?:\d+[dhms])+ left\b", "TIME left"),
        (r'(?<="tokens_per_s": )[\d.]+', "SPEED"),
        (r"'train_(runtime|samples_per_second|steps_per_second)': '[^']*'", r"'train_\1': SPEED"),
        (r"[\w.-]*tfevents[\w.-]*", "EVENTS"),
        (r"(?<=/benchmark-)\w{8}", "TEMPORARY"),
        (r"\b[0-9a-f]{40}\b", "COMMIT"),
        (r"(?<=SHA-256 of the rest: )\w+", "VARYING"),
        (r"(?<=\.py:)\d+", "N"),
        (r"[^\n]*The git head is unborn or detached[^\n]*", ""),
    )
]
BAR = re.compile(r"^[^\[]*\d+%\|[^\[]*\[[^\]]*\]|^[^\[]*\d+\w* \[\d\d:\d\d, [^\]]*\]|\x1b\[[A-Z]")
LEFT_OUT = ("run.lock", ".lock")
# Entries of any JSON: times, speeds, machines; the bytes of logs by their names, and what hangs on
# them; the commit. The rest of a file that has one is compared by its values, not its bytes.
VARYING_NAMES = """
date seconds latency_ms sentences_s speed_up load step_s tokens_s flops_s round_tokens_s stages_s
memory ceilings mfu_measured train_runtime train_samples_per_second train_steps_per_second
log_bytes state.json manifest_sha256 commit git_sha repo_id repo_sha repo_branch
"""
VARYING = frozenset(VARYING_NAMES.split())


def digest(content: bytes | str) -> str:
    """Return the beginning of a SHA-256."""
    whole = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(whole).hexdigest()[:16]


def shortened(line: str, limit: int = 300) -> str:
    """Show a long line's beginning and digest."""
    return line if len(line) <= limit else f"{line[:limit]} .. {digest(line)}"


def messages(text: str) -> Iterator[str]:
    """Yield the lines of a standard error without progress bars; of a traceback only the last."""
    in_traceback = False
    for line in re.split(r"[\r\n]+", text):
        line = BAR.sub("", line).rstrip()
        if line.startswith("Traceback "):
            in_traceback = True
        elif line and not (in_traceback and line.startswith(" ")):
            yield f"raised {line}" if in_traceback else line.lstrip()
            in_traceback = False


def file_lines(path: Path, plain: Callable[[str], str]) -> Iterator[str]:
    """Yield a line a file; of Markdown its lines, of an object in JSON a line an entry, too."""
    key = f"file {path}"
    if path.is_symlink():
        yield f"{key} -> {os.readlink(path)}"
    elif path.name in LEFT_OUT or "tfevents" in path.name:
        yield key
    elif path.suffix == ".json":
        yield from json_lines(key, plain(path.read_text(encoding="utf-8")))
    elif path.suffix == ".md":
        lines = plain(path.read_text(encoding="utf-8")).splitlines()
        yield from (f"{key} | {shortened(line)}" for line in lines)
    elif path.suffix in (".txt", ".tsv", ".jsonl"):
        yield f"{key} {digest(plain(path.read_bytes().decode(errors='replace')))}"
    else:
        yield f"{key} {digest(path.read_bytes())}"


def json_lines(key: str, text: str) -> Iterator[str]:
    """Yield the digest of a JSON's text, where nothing in it varies, and a line an entry."""
    content = json.loads(text)
    constant = without_varying(content)
    yield f"{key} {digest(text) if constant == content else 'VARYING'}"
    if isinstance(constant, dict):
        for name, value in constant.items():
            shown = json.dumps(value, ensure_ascii=False)
            yield f"{key} {name} {shown if len(shown) <= 80 else digest(shown)}"
    elif constant != content:
        yield f"{key} [] {digest(json.dumps(constant, ensure_ascii=False))}"


def without_varying(content):
    """Replace what varies in the content of a JSON."""
    if isinstance(content, dict):
        return {
            name: "VARYING" if name in VARYING else without_varying(value)
            for name, value in content.items()
        }
    return [without_varying(value) for value in content] if isinstance(content, list) else content


MEASURED = ("global/speed", "global/tokens_per_s", "global/mfu", "global/memory_usage")


def log_lines(folder: Path) -> Iterator[str]:
    """Yield a line a tag of a run's log: its points, by number and digest, and the last value."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points: dict[str, list[tuple[int, str]]] = {}
    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                content = value.tensor.float_val or value.tensor.string_val
                points.setdefault(value.tag, []).append((event.step, str(list(content))))
    for tag, found in sorted(points.items()):
        places = f"{len(found)} at {digest(str([step for step, _ in found]))}"
        values = f"{digest(str(found))} .. {shortened(found[-1][1], 40)}"
        yield f"log {folder} {tag} {places} {'MEASURED' if tag in MEASURED else values}"


# --------------------------------------------------------------------------------------------------
# Inputs
# --------------------------------------------------------------------------------------------------


def make_inputs(bench: Bench) -> None:
    """Make texts, teachers and data with tests/stand_ins.py, in a process of their own."""

    def act() -> None:
        for descriptor, name in enumerate(("out", "err"), start=1):
            direct(descriptor, bench.work / "printed" / f"inputs.{name}")
        sys.path[:1] = [str(bench.root / name) for name in ("tests", "scripts", "")]
        make_stand_ins()

    if status := in_fork(act):
        sys.exit(f"no stand-ins were made: status {status}; see {bench.work}/printed/inputs.err")
    bench.flags = json.loads(Path("flags.json").read_text())
    bench.files("t", "w", "a")


def make_stand_ins() -> None:
    """Make t/ (teachers), w/ (data of each pair), a/ (a model that answers), texts, flags.json."""
    stand_ins = importlib.import_module("stand_ins")
    text = Path("dump.txt")
    text.write_text("\n".join(stand_ins.make_lines(240)) + "\n")
    Path("held_out.txt").write_text("\n".join(stand_ins.make_lines(14, seed=9)) + "\n")
    for name in ("t", "w"):
        Path(name).mkdir()
    world = stand_ins.World(Path("w"), stand_ins.make_teachers(Path("t"), text), text)
    flags = {kind: as_dict(world.flags(kind, Path("unused"))) for kind in KINDS}
    Path("flags.json").write_text(json.dumps(flags))
    make_more_models()
    write_documents(stand_ins.make_lines(60, seed=4))
    write_tasks(stand_ins.make_lines(80, seed=5))
    write_squad(stand_ins.make_lines(12, seed=6))


def as_dict(words: Sequence[str]) -> dict[str, str | bool]:
    """Return flags by name, a bare one as True."""
    flags: dict[str, str | bool] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            flags[word[2:]] = True if following.startswith("--") else following
    return flags


def make_more_models() -> None:
    """Make teachers of families without a row of their own, and a BERT that answers questions."""
    import torch
    import transformers

    torch.manual_seed(5)
    gpt2, bert = (
        transformers.AutoTokenizer.from_pretrained(f"t/tiny-{kind}") for kind in ("gpt2", "bert")
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "initializer_range": 0.2, "max_position_embeddings": 64}
    roles = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    qwen = transformers.Qwen3Config(
        **sizes, **roles, vocab_size=len(gpt2), num_key_value_heads=2, head_dim=8
    )
    roles = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    modern = transformers.ModernBertConfig(
        **sizes, **roles, vocab_size=len(bert), pad_token_id=0, local_attention=8
    )
    answering = transformers.BertConfig(**sizes, vocab_size=len(bert))
    made = {
        "t/tiny-qwen": (transformers.Qwen3ForCausalLM(qwen), gpt2),
        "t/tiny-modernbert": (transformers.ModernBertForMaskedLM(modern), bert),
        "a/answering": (transformers.BertForQuestionAnswering(answering), bert),
    }
    for folder, (model, tokenizer) in made.items():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


ODD = (
    "Dr. Smith met J. R. R. Tolkien in 1990. She left at 3.14 p.m. He said no. Then see Fig. 3. "
    "黑豹队的防守。好！"
)


def write_documents(lines: Sequence[str]) -> None:
    """Write documents in two languages, several kinds of file, and a line that is not UTF-8."""
    import pyarrow.parquet

    for folder in ("d/languages/de", "d/bad", "d/foreign", "d/tables"):
        Path(folder).mkdir(parents=True)
    sentences = [line.capitalize() for line in lines]
    paragraphs = [" ".join(sentences[k : k + 4]) for k in range(0, 40, 4)]
    german = [*sentences[40:50], "Er kam am 3. Oktober. „Nein!“ Gut."]
    records = [json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(lines[50:])]
    bad = b"\xef\xbb\xbf" + "\n\n".join(lines[:20]).encode() + b"\nba \xff ke\r\nba ke\n"
    packed = gzip.compress("".join(records).encode(), mtime=0)
    contents = {
        "languages/en.txt": "\n\n".join(["== Heading ==", ODD, *paragraphs]).encode(),
        "languages/de/a.txt": "\n".join(german).encode(),
        "languages/de/b.jsonl.gz": packed,
        "tables/a.csv": "\n".join(["id,body", *(f'{k},"{lines[k]}"' for k in range(9))]).encode(),
        "bad/text.txt": bad,
        "bad/broken.json": b"{",
        "foreign/thesis.txt": b"mine",
        "short.txt": b"ba ke\n",
    }
    for name, content in contents.items():
        Path("d", name).write_bytes(content)
    rows = pyarrow.table({"body": list(lines[9:20])})
    pyarrow.parquet.write_table(rows, "d/tables/b.parquet")


STSB = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
GERMEVAL = "1\tFiba\tB-PER\tB-LOC\n2\tke\tI-PER\tO\n3\tGo\tB-LOCderiv\tO\n4\tli\tO\tO\n\n"
CONLL = "Fiba fiba NN I-NC I-PER\nke ke NN I-NC O\nGomü gomü NN I-NC I-LOC\nGo go NN I-NC B-LOC\n\n"


def write_tasks(lines: Sequence[str]) -> None:
    """Write the files of some tasks, a few examples each, in their published formats."""
    texts = [" ".join(line.split()[:6]) for line in lines]
    for folder in ("sst2", "cola", "mrpc", "stsb", "ner", "conll", "wikitext"):
        Path("k", folder).mkdir(parents=True)
    for name, size in {"train": 24, "dev": 9}.items():
        tables = {
            "sst2": [["sentence", "label"]],
            "cola": [],
            "mrpc": [MRPC],
            "stsb": [STSB.split()],
        }
        for k, text in enumerate(texts[:size]):
            other, label, score = texts[-k], str(k % 2), f"{k % 6 * 0.9:.3f}"
            tables["sst2"].append([f'he said "{text}"', label])
            tables["cola"].append(["gj04", label, "*", text])
            tables["mrpc"].append([label, "1", "2", text, other])
            tables["stsb"].append([str(k), "news", "-", "2015", "1", "-", "-", text, other, score])
        for task, rows in tables.items():
            content = "".join("\t".join(row) + "\n" for row in rows)
            Path(f"k/{task}/{name}.tsv").write_text(content)
    for name, size in {"train": 8, "dev": 3, "test": 6}.items():
        blocks = [f"#\thttp://example.org\t[2010-07-04]\n{GERMEVAL}"] * size
        Path(f"k/ner/NER-de-{name}.tsv").write_text("".join(blocks))
    for name, size in {"train": 8, "testa": 3, "testb": 6}.items():
        text = "-DOCSTART- -X- -X- -X- O\n\n" + CONLL * size
        Path(f"k/conll/deu.{name}").write_text(text, encoding="latin-1")
    for name, size in {"train": 30, "valid": 6, "test": 12}.items():
        text = " \n = Title = \n \n" + "".join(f" {line} \n" for line in lines[-size:])
        Path(f"k/wikitext/wiki.{name}.raw").write_text(text)
    for number, text in enumerate(texts[:20]):
        folder = Path("k/imdb", "train" if number < 12 else "test", ("neg", "pos")[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, f"{number}_7.txt").write_text(f"{text}<br /><br />{text}")


def write_squad(lines: Sequence[str]) -> None:
    """Write SQuAD's JSON: a question about each context, every third without an answer."""
    paragraphs = []
    for number, line in enumerate(lines):
        words, place = line.split(), 2 + number % 4
        answer, start = " ".join(words[place : place + 2]), len(" ".join(words[:place])) + 1
        answers = [] if number % 3 == 0 else [{"text": answer, "answer_start": start}]
        question = {"id": f"q{number}", "question": f"{words[place - 1]} {words[0]}?"}
        question |= {"answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": line, "qas": [question]})
    content = {"version": "v2.0", "data": [{"title": "made", "paragraphs": paragraphs}]}
    Path("k/squad").mkdir(parents=True)
    Path("k/squad/made.json").write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------


def table(text: str) -> list[list[str]]:
    """Read a table: a line a case, `name: words`."""
    return [line.strip().split(": ", 1) for line in text.strip().splitlines()]


def helps(bench: Bench) -> None:
    """Record what every program says of itself."""
    for path in [bench.root / "train.py", *sorted((bench.root / "scripts").glob("*.py"))]:
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            bench.run(str(path.relative_to(bench.root)), "--help")


def text_to_ids(bench: Bench) -> None:
    """Prepare text, binarize, count, inspect."""
    for name, flags in table(PREPARED):
        bench.run("scripts/prepare_text.py", f"{flags} --output p/{name}.txt")
    for name, flags in table(BINARIZED):
        bench.run("scripts/binarized_data.py", f"--num_workers 1 --dump_file b/{name} {flags}")
    counts = "--data_file b/store.tiny-bert w/data.tiny-bert.pickle --token_counts_dump b/both"
    bench.run("scripts/token_counts.py", f"{counts} --vocab_size 200")
    for name in ("w/data.tiny-roberta.pickle", "b/store.tiny-bert", "b/qwen.tiny-qwen.pickle"):
        found = f"b/{Path(name).name}.inspected.json"
        bench.run("scripts/inspect_data.py", f"{name} --top 5 --num_sequences 2 --json {found}")
        bench.run("scripts/inspect_data.py", f"{name} --verify --num_sequences 0 --top 0")
    shutil.copy("b/store.tiny-bert.bin", "b/damaged.bin")
    bench.files("p", "b")


PREPARED = """
plain: --file_path d/languages/en.txt --max_chars 200
languages: --file_path d/languages --by_language --sampling_exponent 0.5 --num_lines 40
lines: --file_path d/bad/text.txt --errors replace --documents line --min_chars 5
"""
BERT = "--tokenizer_name t/tiny-bert"
GPT2 = "--tokenizer_type gpt2 --tokenizer_name t/tiny-gpt2"
BINARIZED = f"""
store: --file_path dump.txt {BERT} --format store --token_counts_dump b/counts --report
skip: --file_path d/bad/text.txt {BERT} --errors skip --seed 7 --no-do_lower_case
replace: --file_path d/bad/text.txt {GPT2} --errors replace --format store
records: --file_path d/languages/de/b.jsonl.gz {GPT2} --vocab_size 400 --token_counts_dump b/more
qwen: --file_path dump.txt --tokenizer_type auto --tokenizer_name t/tiny-qwen
modern: --file_path dump.txt --tokenizer_type auto --tokenizer_name t/tiny-modernbert
held_out: --file_path held_out.txt {BERT}
tables: --file_path d/tables {BERT} --text_field body
workers: --file_path dump.txt {GPT2} --num_workers 2
"""


def first_weights(bench: Bench) -> None:
    """Extract first weights and whole students."""
    for program, flags in table(EXTRACTED):
        bench.run(f"scripts/{program}.py", flags)
    bench.files("x")


EXTRACTED = """
extract_distilbert: --model_name t/tiny-bert --vocab_transform --dump_checkpoint x/bert.pth
extract_distilbert: --model_name t/tiny-bert --layers 1 2 3 --dump_checkpoint x/bert3.pth
extract: --model_name t/tiny-roberta --vocab_transform --dump_checkpoint x/roberta.pth
extract: --model_type gpt2 --model_name t/tiny-gpt2 --layers 3 1 --dump_checkpoint x/gpt2.pth
extract: --teacher t/tiny-qwen --num_layers 2 --output x/qwen
extract: --teacher t/tiny-modernbert --num_layers 2 --output x/modern
extract: --teacher t/tiny-roberta --layers 0 3 --output x/roberta
extract: --teacher t/tiny-bert --student_type distilbert --num_layers 4 --output x/distilbert
"""


def training(bench: Bench) -> None:
    """Train: each pair, each objective, precision, plan and freezing once."""
    for name, changes in table(RUNS):
        kind, run = name.split()
        bench.train(kind, f"r/{run}", changes)
    bench.train("bert", "r/bert", f"{SHORT} force", key="train bert once more, by force")
    bench.train("bert", "r/compiled", f"{SHORT} compile", prepare=without_compiler)
    nan = "learning_rate=1e3 warmup_prop=0 max_grad_norm=1e30 fp16"
    bench.train("bert", "r/nan", nan, status=1)
    bench.files("r")


def without_compiler() -> None:
    """Have torch.compile return what it is given: compiling takes a minute."""
    import torch._dynamo

    torch._dynamo.config.disable = True


SHORT = "max_steps=6 batch_size=4 log_interval=2 n_gpu=0 checkpoint_interval=4"
ANY = "-student_config student_type=auto teacher_type=auto"
RUNS = f"""
bert bert: {SHORT}
gpt2 gpt2: {SHORT}
roberta roberta: {SHORT} bf16
bert tokens: {SHORT} loss_normalization=tokens student_pretrained_weights=x/bert.pth freeze_pos_embs
gpt2 budget: max_tokens=400 alpha_mse=0.5 max_steps=8 log_interval=3 seed=7 temperature=1.5
roberta recomputed: {SHORT} activation_checkpointing restrict_ce_to_mask freeze_token_type_embds
bert scaled: {SHORT} fp16 mlm_mask_prop=0.3 mlm_smoothing=0 word_mask=0.6 word_keep=0.3
bert held_out: batch_size=24 n_epoch=2 eval_data_file=b/held_out.tiny-bert.pickle eval_interval=2
gpt2 alone: {SHORT} no-group_by_size alpha_ce=0 alpha_cos=0 initializer_range=0.1 max_length=32
bert store: {SHORT} data_file=b/store.tiny-bert weight_decay=0.1 learning_rate=1e-3 warmup_prop=0.5
gpt2 qwen: {SHORT} {ANY} student=x/qwen teacher_name=t/tiny-qwen data_file=b/qwen.tiny-qwen.pickle
bert modern: {SHORT} {ANY} student=x/modern teacher_name=t/tiny-modernbert \
data_file=b/modern.tiny-modernbert.pickle
"""


def resuming(bench: Bench) -> None:
    """Go on with a run that died, one that was asked to stop, and one that had ended."""
    Path("s").mkdir()
    shutil.copytree("r/bert", "s/died")
    forget_after("s/died", 2)
    bench.train("bert", "s/died", f"{SHORT} resume")
    bench.train("bert", "s/died", f"{SHORT} resume", key="train bert s/died, which had ended")
    stop = stopped_at("checkpoints/step-00000004")
    bench.train("gpt2", "s/stopped", f"{SHORT} resume=auto", prepare=stop, status=143)
    kept = sorted(path.name for path in Path("s/stopped/checkpoints").iterdir())
    bench.add("checkpoints of s/stopped:", kept)
    bench.train("gpt2", "s/stopped", f"{SHORT} resume=auto", key="train gpt2 s/stopped, on")
    for whole, resumed in (("r/bert", "s/died"), ("r/gpt2", "s/stopped")):
        one, two = (Path(run, "pytorch_model.bin").read_bytes() for run in (whole, resumed))
        bench.add(f"{resumed} went on as {whole} did:", one == two)
    bench.files("s")


def forget_after(run: str, step: int) -> None:
    """Make a run's folder what it was when its process died some updates after a checkpoint."""
    for path in Path(run, "checkpoints").iterdir():
        if int(path.name.split("-")[-1]) > step:
            shutil.rmtree(path)
    for pattern in ("pytorch_model.bin", "model/*", "config.json", "tokenizer*"):
        for path in Path(run).glob(pattern):
            path.unlink()


def several_ranks(bench: Bench) -> None:
    """Train on two processes of torchrun's; go on with one."""
    flags = bench.flags["bert"] | {"dump_path": "m/two"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(bench.root / "train.py"), *changed(flags, TWO_RANKS)]
    status, *printed = launched(command, bench.work / "printed")
    bench.record("torchrun, 2 ranks", status, *printed, terse=False, expected=0)
    shutil.copytree("m/two", "m/one")
    forget_after("m/one", 4)
    bench.train("bert", "m/one", f"{SHORT} resume")
    bench.files("m")


TWO_RANKS = f"{SHORT} gradient_accumulation_steps=1"


def launched(command: Sequence[str], folder: Path) -> tuple[int | None, str, str]:
    """Run a launcher: its status, None where it hung; what it printed to each stream."""
    places = [folder / f"launched.{name}" for name in ("out", "err")]
    with open(places[0], "wb") as out, open(places[1], "wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    try:
        status = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        status = None
        process.terminate()  # it ends its processes, which are no longer in its session
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        process.kill()
        process.wait()
    out_text, err_text = (path.read_text(encoding="utf-8", errors="replace") for path in places)
    return status, out_text, err_text


def held_out(bench: Bench) -> None:
    """Measure models on held-out text."""
    for name, flags in table(EVALUATED):
        bench.run("scripts/evaluate_lm.py", f"{flags} --device cpu --output e/{name}.json")
    bench.files("e")


TOKENS, TEXT = "--data_file b/held_out.tiny-bert.pickle", "--text_file held_out.txt"
EVALUATED = f"""
bert: --model r/bert --teacher t/tiny-bert {TOKENS} --pseudo_perplexity 3
gpt2: --model r/gpt2 --teacher t/tiny-gpt2 {TEXT} --max_length 40
roberta: --model r/roberta {TEXT} --token_counts w/counts.roberta.pickle --mask_every 5 --seed 3
qwen: --model r/qwen --teacher t/tiny-qwen {TEXT}
best: --model r/held_out/best --teacher t/tiny-bert {TOKENS}
"""


def fine_tuning(bench: Bench) -> None:
    """Fine-tune for tasks and for SQuAD, with and without a teacher; train a teacher."""
    quick = "--no_cuda --per_gpu_train_batch_size 8 --num_train_epochs 1"
    for name, flags in table(TASKS):
        task = name.split("-")[0]
        places = f"--task {task} --data_dir k/{task} --output_dir f/{name}"
        bench.run("scripts/run_task.py", f"{places} {quick} {flags}")
    predictions = "--score_predictions f/sst2/seed-42/predictions.tsv"
    bench.run("scripts/run_task.py", f"--task sst2 --data_dir k/sst2 {predictions}")
    for name, flags in table(SQUAD):
        fixed = f"{MADE} {WINDOWS} --do_train --do_eval --output_dir f/{name}"
        bench.run("scripts/run_squad_w_distillation.py", f"{flags} {fixed}")
    scored = f"--score_predictions f/squad/predictions_.json {MADE} --version_2_with_negative"
    bench.run("scripts/run_squad_w_distillation.py", scored)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": 200, "max_position_embeddings": 64}
    Path("f/bert.json").write_text(json.dumps(sizes))
    data = "--data_file w/data.tiny-bert.pickle --token_counts w/counts.bert.pickle"
    made = f"--config f/bert.json {BERT} {data} --output_dir f/teacher --num_steps 4"
    bench.run("scripts/train_teacher.py", made)
    bench.files("f")


TASKS = """
sst2: --model_name_or_path t/tiny-bert --seeds 42 43
sst2-second: --model_name_or_path r/bert --teacher_name_or_path f/sst2/seed-42 --bf16
cola: --model_name_or_path r/gpt2 --save_models none
mrpc: --model_name_or_path r/roberta --save_models none --gradient_accumulation_steps 2
stsb: --model_name_or_path t/tiny-bert --save_models none
imdb: --model_name_or_path t/tiny-bert --save_models none --max_seq_length 16
ner: --model_name_or_path t/tiny-bert
ner-second: --model_name_or_path r/bert --teacher_name_or_path f/ner/seed-42 --save_models none
ner-conll: --model_name_or_path t/tiny-bert --data_dir k/conll --encoding latin-1 --split dev
wikitext: --model_name_or_path t/tiny-gpt2 --max_seq_length 32
wikitext-second: --model_name_or_path r/gpt2 --teacher_name_or_path f/wikitext/seed-42 \
--save_models none --max_seq_length 32
"""
MADE = "--train_file k/squad/made.json --predict_file k/squad/made.json"
WINDOWS = "--max_seq_length 48 --doc_stride 10 --max_query_length 8 --version_2_with_negative"
SQUAD = """
squad: --model_type bert --model_name_or_path a/answering --max_steps 2 --no_cuda
squad-second: --model_type distilbert --model_name_or_path r/bert --num_train_epochs 1 --no_cuda \
--teacher_type bert --teacher_name_or_path f/squad
"""


def reports(bench: Bench) -> None:
    """Make a report and a model card; measure speeds; run the quickstart."""
    models = "--teacher t/tiny-bert --student r/bert --lm_text_file held_out.txt --no_speed"
    scores = "--tasks sst2 lm --scores f/sst2/scores.json f/sst2-second/scores.json"
    card = "--write_card --license mit --language en"
    bench.run("scripts/report.py", f"{models} {scores} --output_dir o/report {card}")
    shutil.copy("r/bert/README.md", "o/card.md")
    timed = "--batch_sizes 2 --passes 3 --num_sentences 4 --devices cpu --json o/latency.json"
    bench.run("scripts/latency.py", f"--models t/tiny-bert r/bert {timed}", terse=True)
    step = "--size tiny --device cpu --updates 2 --warmup 1 --threads 1 --json o/step.json"
    bench.run("scripts/benchmark.py", step, terse=True)
    quick = "--text dump.txt --teacher t/tiny-bert --output o/quickstart --student_steps 12 --short"
    bench.run("scripts/quickstart.py", quick)
    bench.files("o")


def wrong_calls(bench: Bench) -> None:
    """Call every program wrongly; record the exit status and the problems named."""
    Path("z").mkdir()
    wide = Path("w/student.bert.json").read_text().replace('"dim": 32', '"dim": 40')
    Path("z/wide.json").write_text(wide)
    Path("z/list.json").write_text("[]")
    for case in TRAINED_WRONGLY.strip().splitlines():
        kind, _, changes = case.partition(" ")
        argv = changed(bench.flags[kind] | {"dump_path": "z/run"}, changes)
        bench.run("train.py", argv, key=f"train {case}", status=2, terse=True)
    argv = changed(bench.flags["bert"], "dump_path=z/run")
    for key, environment in LAUNCHED_WRONGLY.items():
        bench.run("train.py", argv, key=f"train, {key}", status=2, terse=True, **environment)
    for case in CALLED_WRONGLY.strip().splitlines():
        program, _, words = case.partition(" ")
        if Path(bench.root, "scripts", f"{program}.py").exists():
            bench.run(f"scripts/{program}.py", words, status=2, terse=True)
        else:
            bench.add("no such program:", program)
    bench.add("left by wrong calls:", sorted(str(path) for path in Path("z").rglob("*")))


TRAINED_WRONGLY = f"""
bert -data_file
bert data_file=none.pickle
bert data_file=dump.txt
bert data_file=w/data.tiny-gpt2.pickle
bert bathc_size=4
bert batch_size=0
bert batch_size=x
bert learning_rate=-1 n_epoch=0 warmup_prop=2
bert checkpoint_interval=0 log_interval=0 keep_checkpoints=1
bert word_mask=0.9
bert max_tokens=5
bert max_tokens=400 no-group_by_size
bert max_length=11
bert bf16 fp16
bert loss_normalization=words
bert distributed_timeout_s=0
bert local_rank=0
bert alpha_mlm=0
bert -mlm
bert alpha_clm=0.5
bert alpha_ce=nan
gpt2 mlm
gpt2 alpha_clm=0 alpha_ce=0 alpha_cos=0
bert -token_counts
bert token_counts=none
bert token_counts=w/counts.gpt2.pickle
bert eval_interval=5
bert eval_data_file=none
bert eval_data_file=w/data.tiny-gpt2.pickle
bert teacher_type=gpt2
bert teacher_type=llama
bert teacher_name=none
bert teacher_name=t/tiny-gpt2
bert student_type=roberta
bert student_config=none
bert student_config=dump.txt
bert student_config=z/list.json
bert student_config=z/wide.json
bert student_pretrained_weights=dump.txt
bert student_pretrained_weights=w/first.gpt2.pth
bert -student_config
bert student=x/distilbert
bert student=x/roberta -student_config
bert student=none -student_config
bert freeze_token_type_embds
gpt2 freeze_token_type_embds
bert dump_path=
bert dump_path=/
bert dump_path=dump.txt
bert dump_path=r/bert
bert dump_path=w force
bert dump_path=d/foreign force
bert resume
bert resume force
bert resume=maybe
bert dump_path=r/bert resume
bert dump_path=r/bert resume {SHORT} seed=57
bert dump_path=r/bert resume {SHORT} alpha_ce=1
bert dump_path=r/bert resume {SHORT} gradient_accumulation_steps=3
bert dump_path=r/bert resume {SHORT} data_file=b/skip.tiny-bert.pickle
bert dump_path=r/bert resume {SHORT} teacher_name=f/teacher
"""
LAUNCHED_WRONGLY = {
    "RANK alone": {"RANK": "0", "LOCAL_RANK": "0"},
    "RANK too large": {
        "RANK": "3",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    },
}
CALLED_WRONGLY = f"""
binarized_data --file_path none.txt
binarized_data --file_paht dump.txt
binarized_data --format tar
binarized_data --file_path dump.txt --tokenizer_name none --dump_file z/a
binarized_data --file_path dump.txt {BERT} --dump_file z/a --num_workers 0
binarized_data --file_path dump.txt {BERT} --dump_file z/a --token_counts_dump z/b --vocab_size 5
binarized_data --file_path d/bad/text.txt {BERT} --dump_file z/a
token_counts --data_file none
token_counts --data_file dump.txt --token_counts_dump z/c --vocab_size 9
token_counts --data_file w/data.tiny-bert.pickle --token_counts_dump z/c --vocab_size 9
inspect_data
inspect_data none
inspect_data dump.txt
inspect_data b/damaged.bin
inspect_data w/data.tiny-bert.pickle --top -1
inspect_data w/data.tiny-bert.pickle --json w/data.tiny-bert.pickle
prepare_text
prepare_text --file_path none
prepare_text --file_path dump.txt --output dump.txt
prepare_text --file_path dump.txt --max_chars 0 --output z/d
prepare_text --file_path d/short.txt --output z/d
prepare_text --file_path d/bad/text.txt --output z/d
prepare_text --file_path d/bad/broken.json --output z/d
extract --model_type bert
extract --model_type gpt2 --model_name none --dump_checkpoint z/e
extract --model_type gpt2 --model_name t/tiny-bert --dump_checkpoint z/e
extract --teacher t/tiny-bert --layers 0 4 --output z/f
extract --teacher t/tiny-bert --num_layers 2 --output x
extract --teacher t/tiny-gpt2 --num_layers 2 --student_type distilbert --output z/f
extract_distilbert --model_name t/tiny-bert --num_layers 9 --dump_checkpoint z/e
evaluate_lm --model r/bert --output z/g
evaluate_lm --model none {TEXT} --output z/g
evaluate_lm --model r/bert {TEXT} --mask_every 0 --output z/g
evaluate_lm --model r/bert {TEXT} --teacher t/tiny-gpt2 --output z/g
evaluate_lm --model r/bert --data_file w/data.tiny-gpt2.pickle --output z/g
run_task --task sst3
run_task --task sst2 --model_name_or_path none --data_dir k/sst2 --output_dir z/h
run_task --task sst2 --model_name_or_path t/tiny-bert --data_dir none --output_dir z/h
run_task --task sst2 --model_name_or_path t/tiny-bert --data_dir k/ner --output_dir z/h
run_task --task sst2 --model_name_or_path t/tiny-bert --data_dir k/sst2 --output_dir f/sst2
run_task --task sst2 --data_dir k/sst2 --output_dir z/h --learning_rate -1 --seeds -1
run_squad_w_distillation
run_squad_w_distillation --model_type gpt2
run_squad_w_distillation --model_type bert --model_name_or_path none {MADE} --do_eval \
--output_dir z/i
report --teacher t/tiny-bert --student none --output_dir z/j --tasks mprc --passes 1
report --teacher t/tiny-bert --student r/bert --output_dir d/foreign
train_teacher --config none {BERT} --data_file none --token_counts none --output_dir z/k
train_teacher --config f/bert.json {BERT} --data_file none --token_counts none \
--output_dir f/teacher --num_steps 0
latency --models none
benchmark --pair t5
benchmark --device cpu --batch_size 0 --length 9999
benchmark_data --num_sequences 0
quickstart --text none --output z/l
quickstart --text d/short.txt --output d
torture --only T999
torture --trails 3
"""

SECTIONS = (
    helps,
    text_to_ids,
    first_weights,
    training,
    resuming,
    several_ranks,
    held_out,
    fine_tuning,
    reports,
    wrong_calls,
)


if __name__ == "__main__":
    main()
