"""The recipes run from documents to report at tiny size and refuse bad settings."""

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
import transformers
from conftest import run_process
from readme import readme_commands
from stand_ins import ROOT, STUDENT_LAYERS, make_lines, student_config_of, vocab_size_of

RECIPES = ROOT / "scripts" / "recipes"
PROGRAMS = sorted(path.name for path in RECIPES.glob("*.sh") if path.name != "common.sh")
TINY = {
    "STEPS": "3",
    "MAX_TOKENS": "512",
    "MICRO_BATCHES": "2",
    "HELD_OUT": "4",
    "EVAL_INTERVAL": "2",
    "PRECISION": "fp32",
    "SEEDS": "42",
    "TASKS": "",
    "PSEUDO": "2",
    "TASK_FLAGS": "--max_steps 2",
    "PYTHON": sys.executable,
    "REPORT_FLAGS": "--no_speed",
}
MASKED, CAUSAL = transformers.AutoModelForMaskedLM, transformers.AutoModelForCausalLM


@pytest.fixture(scope="module")
def site(tmp_path_factory, teachers) -> Path:
    """Make a folder with documents, teachers named as the real ones, and data of tasks."""
    site = tmp_path_factory.mktemp("site")
    (site / "my documents").mkdir()
    for name, seed, num in (("en.txt", 0, 180), ("de.txt", 7, 60)):
        text = "\n\n".join(make_lines(num, seed))
        (site / "my documents" / name).write_text(text, encoding="utf-8")
    for kind, name in (("bert", "bert-base"), ("roberta", "roberta-base"), ("gpt2", "gpt2")):
        os.symlink(teachers[kind], site / name)
    families.make_teacher(site / "ModernBERT-base", "modernbert", True, teachers)
    families.make_teacher(site / "Qwen3-0.6B-Base", "qwen3", False, teachers)
    (site / "chains.txt").write_text("\n".join(make_lines(180)), encoding="utf-8")
    (site / "held out.txt").write_text("\n".join(make_lines(220)[180:]), encoding="utf-8")
    write_wheel(site / "antiberty.whl", teachers["bert"])
    for kind in teachers:
        content = json.dumps(student_config_of(kind, vocab_size_of(teachers[kind])))
        (site / f"{kind}.json").write_text(content)
    sizes = student_config_of("bert", vocab_size_of(site / "bert-base"))
    student = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))
    tokenizer = transformers.AutoTokenizer.from_pretrained(site / "bert-base")
    for part in (student, tokenizer):
        part.save_pretrained(site / "tiny-distilbert")
    write_tasks(site / "tasks")
    return site


def write_wheel(path: Path, teacher: Path) -> None:
    """Write a wheel laid out as AntiBERTy's: its vocabulary a folder above the weights."""
    models = "antiberty/trained_models"
    vocabulary = transformers.AutoTokenizer.from_pretrained(teacher).get_vocab()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{models}/vocab.txt", "\n".join(sorted(vocabulary, key=vocabulary.get)))
        wheel.write(teacher / "config.json", f"{models}/AntiBERTy_md_smooth/config.json")
        with wheel.open(f"{models}/AntiBERTy_md_smooth/pytorch_model.bin", "w") as file:
            torch.save(safetensors.torch.load_file(teacher / "model.safetensors"), file)
        wheel.writestr("antiberty/__init__.py", "raise ImportError('never imported')")


def write_tasks(folder: Path) -> None:
    """Write tiny data in the formats of MRPC, NER, WikiText and SQuAD."""
    sentences = make_lines(16, seed=5)
    pairs = [
        f"{k % 2}\t{k}\t{k}\t{a}\t{a if k % 2 else b}"
        for k, (a, b) in enumerate(zip(sentences, sentences[1:], strict=False))
    ]
    tags = [
        [(word, "B-PER" if word[0].isupper() else "O") for word in s.split()] for s in sentences
    ]
    tagged = "\n\n".join("\n".join(f"{word} {tag}" for word, tag in s) for s in tags)
    paragraph = {"context": "ba ke li mo nu", "qas": [question(k) for k in range(4)]}
    squad = json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]})
    mrpc = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *pairs])
    content = {
        "mrpc": {"train.tsv": mrpc, "dev.tsv": mrpc},
        "ner": {"train.txt": tagged, "dev.txt": tagged, "test.txt": tagged},
        "wikitext": {
            f"wiki.{part}.raw": "\n".join(make_lines(40, seed=6)) for part in ("train", "test")
        },
        "squad": {"train-v1.1.json": squad, "dev-v1.1.json": squad},
    }
    for task, files in content.items():
        (folder / task).mkdir(parents=True)
        for name, text in files.items():
            (folder / task / name).write_text(text + "\n", encoding="utf-8")


def question(k: int) -> dict:
    return {"id": f"q{k}", "question": "ke ba?", "answers": [{"text": "li", "answer_start": 6}]}


# Recipe -> (its settings in addition to TINY, class that loads its student). `my documents` serves
# as a text and as a folder with one file per language; with exponent 0 German is repeated.
SETTINGS = {
    "antiberty-4-layers.sh": (
        {"TEXT": "chains.txt", "PACKAGE": "antiberty.whl", "NUM_LAYERS": "2"},
        MASKED,
    ),
    "distilbert-base-uncased.sh": (
        {"TEACHER": "bert-base", "STUDENT_CONFIG": "bert.json", "PRECISION": "bf16"},
        MASKED,
    ),
    "distilbert-base-german-cased.sh": (
        {"TEACHER": "bert-base", "STUDENT_CONFIG": "bert.json", "TASKS": "ner"},
        MASKED,
    ),
    "distilbert-base-german-from-mbert.sh": (
        {"TEACHER": "bert-base", "KEEP": "150", "NUM_LAYERS": "2", "TASKS": "ner"},
        MASKED,
    ),
    "distilbert-base-multilingual-cased.sh": (
        {"TEACHER": "bert-base", "STUDENT_CONFIG": "bert.json", "EXPONENT": "0"},
        MASKED,
    ),
    "distilroberta-base.sh": (
        {"TEACHER": "roberta-base", "STUDENT_CONFIG": "roberta.json", "GPUS": "2"},
        MASKED,
    ),
    "distilgpt2.sh": (
        {"TEACHER": "gpt2", "STUDENT_CONFIG": "gpt2.json", "TASKS": "wikitext", "MAX_CHARS": "300"},
        CAUSAL,
    ),
    "modernbert-base-11-layers.sh": ({"TEACHER": "ModernBERT-base", "NUM_LAYERS": "2"}, MASKED),
    "qwen3-0.6b-14-layers.sh": (
        {"TEACHER": "Qwen3-0.6B-Base", "NUM_LAYERS": "2", "MAX_CHARS": "300"},
        CAUSAL,
    ),
}
SECOND_STEP = {
    "TEACHER": "bert-base",
    "STUDENT_FOLDER": "tiny-distilbert",
    "SQUAD": "tasks/squad",
    "OUT": "out of squad-second-step.sh",
    "SQUAD_FLAGS": "--max_steps 2 --max_seq_length 48 --doc_stride 16 --max_query_length 10",
}


def run_recipe(name: str, site: Path, *stages: str, **settings: str) -> subprocess.CompletedProcess:
    given = SECOND_STEP if name == "squad-second-step.sh" else SETTINGS[name][0]
    folders = {"TEXT": "my documents", "TASK_DATA": "tasks", "OUT": f"out of {name}"}
    environment = {"CUDA_VISIBLE_DEVICES": "", **TINY, **folders, **given, **settings}
    return run_process("bash", RECIPES / name, *stages, cwd=site, timeout_s=900, **environment)


@pytest.fixture(scope="module")
def run_of(request, site):
    """Run the selected recipes once, two at a time; return a function that waits for one."""
    chosen = [item for item in request.session.items if item.path == request.path]
    names = [
        item.callspec.params["name"]
        for item in chosen
        if item.originalname.startswith("test_a_recipe_runs")
    ]
    names += [
        "squad-second-step.sh"
        for item in chosen
        if item.originalname.startswith("test_the_second_step_runs")
    ]
    pool = concurrent.futures.ThreadPoolExecutor(2)
    running = {name: pool.submit(run_recipe, name, site) for name in names}

    def wait(name: str) -> Path:
        done = running[name].result()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return site / f"out of {name}"

    yield wait
    pool.shutdown(cancel_futures=True)


LONG = (  # a minute each
    *("antiberty-4-layers.sh", "distilbert-base-german-cased.sh", "distilgpt2.sh"),
    *("distilbert-base-german-from-mbert.sh", "modernbert-base-11-layers.sh"),
    "qwen3-0.6b-14-layers.sh",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SETTINGS]
)
def test_a_recipe_runs_from_documents_to_report(name, run_of):
    settings, auto_class = SETTINGS[name]
    out = run_of(name)
    student = out / name.removesuffix(".sh")
    model, report = auto_class.from_pretrained(student, output_loading_info=True)
    assert model.config.num_hidden_layers == STUDENT_LAYERS
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert transformers.AutoTokenizer.from_pretrained(student).is_fast
    assert json.loads((student / "best" / "best.json").read_text())["figures"]["kl"] > 0
    found = json.loads((out / "report" / "report.json").read_text())
    assert set(found["quality"]) == {"lm", *settings.get("TASKS", "").split()}
    for entry in found["quality"].values():
        assert set(entry["models"]) == {"teacher", "student"}
    assert json.loads((out / "held_out.student.json").read_text())["score"]["kl"] > 0
    assert (student / "model" / "README.md").read_text().startswith("---\n")
    assert (out / "report" / "report.png").exists()
    texts = [(out / f"{part}.txt").read_text() for part in ("held_out", "train")]
    held_out, rest = (text.splitlines() for text in texts)
    assert len(held_out) >= 20 and len(rest) > len(held_out) and not set(held_out) & set(rest)


@pytest.mark.slow
def test_the_second_step_runs_from_a_student_to_a_report(run_of, site):
    out = run_of("squad-second-step.sh")
    for run in ("teacher", "student", "plain"):
        assert 0 <= json.loads((out / run / "scores.json").read_text())["score"]["f1"] <= 100
        transformers.AutoModelForQuestionAnswering.from_pretrained(out / run)
    assert json.loads((out / "student" / "scores.json").read_text())["teacher"].endswith("/teacher")
    for run in ("student", "plain"):
        found = json.loads((out / f"report.{run}" / "report.json").read_text())
        assert set(found["quality"]) == {"squad"}
    before = (out / "teacher" / "scores.json").stat().st_mtime_ns
    again = run_recipe("squad-second-step.sh", site, "teacher")
    assert again.returncode == 0 and "scores.json is there already" in again.stdout
    assert (out / "teacher" / "scores.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_recipe_tells_its_plan_in_place_of_training(site):
    settings = {"PLAN": "1", "PRICE": "2", "GPUS": "2", "OUT": "planned"}
    done = run_recipe("distilgpt2.sh", site, **settings)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w+) {2,}(.*)$", done.stdout, flags=re.M))
    assert rows["run"].startswith("2 processes") and rows["cost"].endswith("at 2 an hour")
    assert rows["updates"].startswith("3 of 6 micro-batches")
    names = {path.name for path in (site / "planned").iterdir()}
    assert "first_weights.pth" in names and not names & {"distilgpt2", "report"}


ANTIBERTY = "antiberty-4-layers.sh"


@pytest.mark.slow
def test_a_chain_is_a_sequence_and_given_ones_are_held_out(site):
    """The teacher is made of the package's files; residues written together are separated."""
    (site / "together.txt").write_text("EVQL\n\nE V Q L\n  Q V  Q L\r\nDIQMTQ\n", encoding="utf-8")
    (site / "apart.txt").write_text("DIQMTQ\nQ V Q L\n", encoding="utf-8")
    settings = {"TEXT": "together.txt", "HELD_OUT_TEXT": "apart.txt", "OUT": "chains"}
    out = site / settings["OUT"]
    done = run_recipe(ANTIBERTY, site, "data", **settings)
    assert done.returncode == 0, done.stderr
    assert (out / "train.txt").read_text() == "E V Q L\nE V Q L\n"
    assert (out / "held_out.txt").read_text() == "D I Q M T Q\nQ V Q L\n"
    names = {path.name for path in (out / "antiberty").iterdir()}
    assert names == {"config.json", "pytorch_model.bin", "vocab.txt"}
    assert not list(out.glob("*.part")) and not (out / "unpacked").exists()


@pytest.mark.slow
def test_a_recipe_studies_its_teacher_where_that_is_named_and_goes_on(site):
    flags = (
        "--own --variants no_teacher --seeds 1 --max_steps 2 --learning_rates 5e-4 --processes 1"
    )
    settings = {"STUDY_FLAGS": flags, "OUT": "studied", "HELD_OUT_TEXT": "held out.txt"}
    for _ in range(2):  # the second time everything is there
        done = run_recipe(ANTIBERTY, site, "study", **settings)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((site / "studied" / "study" / "study.json").read_text())["rows"]
    assert {row["variant"] for row in rows.values()} == {"triple", "no_teacher"}
    assert "antiberty is there already" in done.stdout and "pip download" not in done.stdout
    held_out = (site / "studied" / "held_out.txt").read_text()
    assert held_out.splitlines() == (site / "held out.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"TEXT": "."}, "TEXT=.: is a folder; expected a file"),
        ({"HELD_OUT_TEXT": "none"}, "HELD_OUT_TEXT=none: no such file, or an empty one"),
        ({"PACKAGE": "none.whl"}, "PACKAGE=none.whl: no such file"),
        ({"NUM_LAYERS": "0"}, "NUM_LAYERS=0: expected a whole number above 0"),
    ],
)
def test_bad_settings_of_chains_give_one_line_and_no_files(settings, expected, tmp_path):
    (tmp_path / "chains.txt").write_text("E V Q L\n")
    given = {"TEXT": "chains.txt", **settings}
    done = run_process("bash", RECIPES / ANTIBERTY, cwd=tmp_path, timeout_s=20, **given)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"{ANTIBERTY}: error: {expected}")
    assert os.listdir(tmp_path) == ["chains.txt"]


def test_every_recipe_is_tested():
    assert {*SETTINGS, "squad-second-step.sh"} == set(PROGRAMS)


@pytest.mark.parametrize("name", [*PROGRAMS, "common.sh"])
def test_recipes_are_valid_shell(name):
    done = subprocess.run(["bash", "-n", str(RECIPES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert name == "common.sh" or os.access(RECIPES / name, os.X_OK)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_missing_text_gives_one_line_and_no_files(name, tmp_path):
    done = run_process("bash", RECIPES / name, cwd=tmp_path, TEXT="nowhere", TASKS="", timeout_s=20)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        f"{name}: error: TEXT=nowhere: no such file or folder; expected documents (text, .jsonl,"
        " .parquet ..) to distil on"
    ]


BAD = {
    "a stage": (
        ["trian"],
        {},
        ["trian: no such stage; expected some of student data train evaluate, or none for all"],
    ),
    "tasks' data": ([], {"TASKS": "mrpc", "TASK_DATA": "none"}, ["TASK_DATA=none: no such folder"]),
    "numbers": (
        [],
        {"EPOCHS": "0", "STEPS": "x", "GPUS": "-1"},
        ["EPOCHS=0: expected a whole", "STEPS=x:", "GPUS=-1:"],
    ),
    "a large number": ([], {"STEPS": "9" * 30}, ["STEPS=9999"]),
    "held out": ([], {"HELD_OUT": "1"}, ["HELD_OUT=1: would hold out everything"]),
    "an interpreter": ([], {"PYTHON": "pythn"}, ["PYTHON=pythn: no such program"]),
    "precision": ([], {"PRECISION": "fp8"}, ["PRECISION=fp8: expected bf16, fp16 or fp32"]),
    "processes": (
        [],
        {"GPUS": "5"},
        ["MICRO_BATCHES=48: can't be dealt evenly to 5 x 1 processes"],
    ),
    "a host": (["train"], {"NODES": "2"}, ["MASTER: needed for NODES=2"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_give_one_line_each_and_no_files(name, tmp_path):
    stages, settings, expected = BAD[name]
    (tmp_path / "text").write_text("bake limo\n")
    settings = {"TEXT": "text", "TASKS": "", **settings}
    command = ["bash", RECIPES / "distilgpt2.sh", *stages]
    done = run_process(*command, cwd=tmp_path, timeout_s=20, **settings)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == len(expected)
    assert os.listdir(tmp_path) == ["text"]
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"distilgpt2.sh: error: {start}")


def test_the_second_step_names_all_missing_inputs(tmp_path):
    settings = {"GPUS": "5", "SQUAD": "none", "STUDENT_FOLDER": "none", "PRECISION": "bf16"}
    command = ["bash", RECIPES / "squad-second-step.sh"]
    done = run_process(*command, cwd=tmp_path, timeout_s=20, **settings)
    starts = [
        "GPUS=5: 12 and",
        "PRECISION=bf16",
        "SQUAD=none: has no train",
        "SQUAD=none: has no dev",
        "STUDENT_FOLDER=none",
    ]
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == len(starts) and not list(tmp_path.iterdir())
    for line, start in zip(lines, starts, strict=True):
        assert line.removeprefix("squad-second-step.sh: error: ").startswith(start)


@pytest.mark.slow
def test_a_text_too_short_to_hold_out_a_part_is_refused(site, tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(make_lines(5)), encoding="utf-8")
    paths = {"OUT": str(tmp_path / "out"), "TEXT": str(tmp_path / "short.txt")}
    done = run_recipe("distilgpt2.sh", site, "data", **paths)
    assert done.returncode == 2
    assert "nothing is left beside the 20 sequences" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "train.txt").exists()


@pytest.mark.slow
def test_the_commands_for_any_teacher_run_as_printed(site, tmp_path):
    for name in ("scripts", "train.py"):
        os.symlink(ROOT / name, tmp_path / name)
    for folder in ("answerdotai", "data"):
        (tmp_path / folder).mkdir()
    os.symlink(site / "ModernBERT-base", tmp_path / "answerdotai" / "ModernBERT-base")
    (tmp_path / "data" / "dump.txt").write_text("\n".join(make_lines(120)), encoding="utf-8")
    block = readme_commands()["anyteacher"].replace("--num_layers 11", "--num_layers 2")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    done = run_process("bash", "-euc", block, cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    student = MASKED.from_pretrained(tmp_path / "serialization_dir" / "student_of_modernbert")
    assert student.config.num_hidden_layers == 2


# --------------------------------------------------------------------------------------------------
# Jobs of SLURM; read-only code
# --------------------------------------------------------------------------------------------------

# A stand-in of srun notes its line and runs the command once; of Python, notes its line only.
STAND_INS = {
    "srun": 'echo "srun $* NODES=$NODES GPUS=$GPUS MASTER=${MASTER:-}" >> "$NOTED"\n'
    'while [[ "$1" = --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '[ "$1 $2 $3" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n',
    "python-of-job": '[ "$1" = -c ] || echo "python $*" >> "$NOTED"\n',
}
JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "4"}
TWO = JOB | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}


@pytest.fixture
def send(tmp_path):
    """Run the job's script as SLURM does, a copy elsewhere; return (what was run, the process)."""

    def run(*words: str, **settings: str) -> tuple[list[str], subprocess.CompletedProcess]:
        for folder in ("bin", "spool", "my text"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name, script in STAND_INS.items():
            (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}")
            (tmp_path / "bin" / name).chmod(0o755)
        copy = shutil.copy(RECIPES / "slurm.sbatch", tmp_path / "spool" / "slurm_script")
        environment = {"NOTED": str(tmp_path / "noted"), "TEXT": "my text", "TASKS": ""}
        environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": "my out"}
        environment |= {"PYTHON": "python-of-job", "SLURM_SUBMIT_DIR": str(ROOT), **settings}
        done = run_process("bash", copy, *words, cwd=tmp_path, timeout_s=60, **environment)
        noted = tmp_path / "noted"
        return noted.read_text().splitlines() if noted.exists() else [], done

    return run


def test_the_job_file_is_valid_shell_with_flags_of_sbatch():
    path = RECIPES / "slurm.sbatch"
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = path.read_text().splitlines()
    flags = [line for line in lines if line.startswith("#SBATCH ")]
    assert len(flags) >= 5 and all(re.fullmatch(r"#SBATCH --[a-z-]+=\S+", flag) for flag in flags)
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert lines.index(flags[-1]) < commands[0], "sbatch reads them before the first command only"


def test_a_job_of_one_machine_runs_the_recipe_in_one_task(send):
    noted, done = send("distilgpt2.sh", "train", **JOB, SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0, done.stderr
    srun, torchrun = noted
    assert srun == (
        "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=8 bash"
        f" {RECIPES / 'distilgpt2.sh'} train NODES=1 GPUS=4 MASTER="
    )
    start = f"python -m torch.distributed.run --nproc_per_node 4 --standalone {ROOT / 'train.py'} "
    assert torchrun.startswith(start) and " --gradient_accumulation_steps 12 " in torchrun


def test_a_job_of_two_machines_trains_on_both_and_does_the_rest_on_one(send):
    noted, done = send("distilgpt2.sh", "student", "train", "evaluate", **TWO)
    assert done.returncode == 0, done.stderr
    tasks = [line.split(" bash ")[0] for line in noted if line.startswith("srun")]
    assert tasks == [f"srun --nodes={n} --ntasks={n} --ntasks-per-node=1" for n in (1, 2, 1)]
    (torchrun,) = (line for line in noted if "torch.distributed.run" in line)
    assert torchrun.startswith(
        "python -m torch.distributed.run --nproc_per_node 4 --nnodes 2 --rdzv_backend c10d"
        f" --rdzv_endpoint gpu07:20123 {ROOT / 'train.py'} "
    )
    assert " --gradient_accumulation_steps 6 " in torchrun
    programs = [line.split()[1] for line in noted if line.startswith("python /")]
    names = [Path(program).name for program in programs]
    assert names == ["extract.py", "evaluate_lm.py", "evaluate_lm.py", "report.py"]


BAD_JOBS = {
    "outside a job": (["distilgpt2.sh"], {}, "SLURM_JOB_ID is not set; send this file with sbatch"),
    "no recipe": ([], JOB, "no recipe; expected the name of one"),
    "another recipe": (["gpt3.sh"], JOB, f"{RECIPES / 'gpt3.sh'}: no such recipe"),
    "another folder": (
        ["distilgpt2.sh"],
        JOB | {"DISTIL": "/no"},
        "/no/scripts/recipes/distilgpt2",
    ),
    "the second step": (["squad-second-step.sh"], TWO, "squad-second-step.sh runs on one machine"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_bad_jobs_are_refused_in_one_line(name, send, tmp_path):
    words, settings, expected = BAD_JOBS[name]
    noted, done = send(*words, **settings)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and noted == [] and not (tmp_path / "my out").exists()
    assert line.startswith(f"slurm.sbatch: error: {expected}")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Copy the program, but for its tests, as a read-only installation has it."""
    code = tmp_path / "code"
    for name in ("distil", "scripts", "training_configs"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, code / path.name)
    return code


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def make_stub(path: Path) -> Path:
    """Write a program that passes its arguments on to this interpreter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("given", ["PYTHON", "VENV"])
def test_a_checkout_stays_as_it_is_where_the_interpreter_is_elsewhere(given, checkout, tmp_path):
    before, venv = files_in(checkout), tmp_path / "my environment"
    python = make_stub(venv / "bin" / "python")
    (venv / "bin" / "pip.py").write_text("")  # `import pip` shows that an environment is whole
    (venv / "pyvenv.cfg").write_text("")
    for name in ("requirements.txt", "requirements-eval.txt"):
        sums = subprocess.check_output(["cksum"], input=(ROOT / name).read_bytes()).decode()
        (venv / f"installed-{sums.strip().replace(' ', '-')}").touch()
    settings = {"PYTHONPATH": str(venv / "bin")}
    settings[given] = str({"PYTHON": python, "VENV": venv}[given].relative_to(tmp_path))
    command = ["bash", checkout / "scripts" / "quickstart.sh", "--help"]
    done = run_process(*command, cwd=tmp_path, timeout_s=60, **settings)
    assert done.returncode == 0 and "--output" in done.stdout, done.stderr
    settings |= {"TEACHER": "none", "TEXT": ".", "TASKS": "", "HF_HUB_OFFLINE": "1"}
    recipe = checkout / "scripts" / "recipes" / "distilgpt2.sh"
    done = run_process("bash", recipe, "student", cwd=tmp_path, timeout_s=60, **settings)
    assert "+ " in done.stdout and str(python) in done.stdout.replace("\\ ", " ")
    assert "--model_name none" in done.stderr and files_in(checkout) == before


def test_an_interpreter_or_environment_that_cannot_serve_is_refused_in_one_line(tmp_path):
    bare, home = tmp_path / "bare", tmp_path / "home"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    cases = {
        "PYTHON": [("pythn", "no such program"), (str(bare), "has no torch transformers; install")],
        "VENV": [
            (str(home), "holds files and is no virtual environment"),
            ("/dev/null/venv", "no folder with write permission; name another, or an interpreter"),
        ],
    }
    cases["PYTHON"].append(("/bin/false", "does not run Python"))
    for name, values in cases.items():
        for value, expected in values:
            command = ["bash", ROOT / "scripts" / "quickstart.sh"]
            done = run_process(*command, cwd=tmp_path, timeout_s=60, **{name: value})
            (line,) = done.stderr.splitlines()
            assert done.returncode == 2 and done.stdout == "" and (home / "thesis.txt").exists()
            assert line.startswith(f"quickstart.sh: error: {name}={value}: {expected}"), line
