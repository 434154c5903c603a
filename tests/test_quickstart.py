"""The quickstart with one's own text and teacher, and its refusals; CI runs its default."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_process
from families import make_teacher
from stand_ins import ROOT, make_lines

import quickstart
from distil import workflow


def arguments_for(text: Path, teacher: Path, output: Path) -> list[str]:
    flags = {"--text": text, "--teacher": f"{teacher}/", "--output": output, "--student_steps": 40}
    return [*(str(word) for item in flags.items() for word in item), "--short"]


@pytest.fixture(scope="module")
def own_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "my text.txt"
    path.write_text("\n".join(make_lines(700, seed=3)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own_records(own_text):
    path = own_text.with_name("records.jsonl")
    records = [json.dumps({"n": 1, "body": line}) for line in own_text.read_text().splitlines()]
    path.write_text("\n".join(records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(own_records, teachers, tmp_path_factory) -> tuple[Path, str]:
    """Run it on records with a BERT teacher: the folder, and what it prints."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = [*arguments_for(own_records, teachers["bert"], out), "--text_field", "body"]
    done = run_process(sys.executable, ROOT / "scripts" / "quickstart.py", *flags, timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.fixture
def run_of(own_text, teachers, tmp_path, capfd, monkeypatch, request):
    """Return a function: kind of teacher -> the folder, and what is printed."""

    def run(kind: str) -> tuple[Path, str]:
        if kind == "bert":
            return request.getfixturevalue("whole")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        teacher = teachers.get(kind) or make_teacher(tmp_path / "teacher", kind, False, teachers)
        quickstart.main(arguments_for(own_text, teacher, tmp_path / "out"))
        return tmp_path / "out", capfd.readouterr().out

    return run


@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt2", marks=pytest.mark.long), "qwen3"])
def test_own_text_and_teacher_give_the_table(kind, run_of):
    out, printed = run_of(kind)
    study = out / "study"
    state = json.loads((study / "study.json").read_text())
    first = state["first"]["half"]["reported"]
    distilled, alone = (
        state["rows"][f"{variant}/56/0.0005"]["reported"] for variant in ("triple", "no_teacher")
    )
    assert distilled["kl"] < first["kl"] and "kl" not in state["teacher"]["reported"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (study / "DISTILLATION.md").read_text()
    for row in (first, distilled, alone):
        assert f" {row['kl']:.4f} " in table and f" {row['kl']:.4f} " in printed
        assert f" {row['agreement']:.2%} " in table
    assert "A sentence at a time through the teacher's " in printed
    assert f"against {alone['loss']:.4f}" in printed and "student without teacher: " in printed
    config = json.loads((study / "runs/triple-56-0.0005/model/config.json").read_text())
    assert config["model_type"] == ("distilbert" if kind == "bert" else kind)
    held_out = set((out / "held_out.txt").read_text().splitlines())
    assert held_out and not held_out & set((out / "train.txt").read_text().splitlines())


def test_a_repeated_line_is_taken_once(tmp_path):
    text = "bake\n limo \nbake \n\nlimo\nbake"  # the last line without an end
    (tmp_path / "text").write_text(text)
    assert list(workflow.user_lines(str(tmp_path / "text"))) == ["bake", "limo"]


def test_a_text_is_read_as_binarized_data_reads_it(tmp_path):
    records = [{"n": k, "body": text} for k, text in enumerate(["bake", "limo\r\nso", "bake"])]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = list(workflow.user_lines(str(tmp_path / "text.jsonl"), "body"))
    assert found == ["bake", "limo so"]


def test_only_an_interrupted_run_of_the_same_flags_is_continued(tmp_path):
    called = []
    for flags, names in (
        ({"seed": 1}, ["text", "tokens"]),  # interrupted
        ({"seed": 1}, ["text", "tokens", "report"]),
        ({"seed": 1}, ["text"]),  # the one before is finished
        ({"seed": 2}, ["text"]),
    ):
        stages = workflow.Stages(tmp_path / "marker.json", flags)
        stages.start()
        for name in names:
            stages.run(name, called.append, (flags["seed"], name))
    assert called == [(1, "text"), (1, "tokens"), (1, "report"), (1, "text"), (2, "text")]


@pytest.mark.long
def test_an_interrupted_run_continues_to_the_same_student(
    whole, own_records, teachers, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cut = [*arguments_for(own_records, teachers["bert"], tmp_path / "cut"), "--text_field", "body"]
    program = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), *cut]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("study/runs/triple-*/checkpoints/step-*")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    capfd.readouterr()
    quickstart.main(cut)
    printed = capfd.readouterr()
    assert "after: text, tokens" in printed.err and "--resume auto" in printed.err
    assert "binarized_data.py" not in printed.out and "extract.py" not in printed.err
    for name in ("triple", "no_teacher"):
        place = Path("study", "runs", f"{name}-56-0.0005", "model", "model.safetensors")
        assert (whole[0] / place).read_bytes() == (tmp_path / "cut" / place).read_bytes()


BAD = {
    "no text": (["--text", "{tmp}/nowhere"], "nowhere: no such file"),
    "short text": (["--text", "{tmp}/short", "--teacher", "{bert}"], "expected at least 40 lines"),
    "not utf-8": (
        ["--text", "{tmp}/latin", "--teacher", "{bert}"],
        "latin:2: byte 3 of the line is not UTF-8",
    ),
    "no teacher": (
        ["--text", "{tmp}/short", "--teacher", "{tmp}"],
        "holds no readable config.json",
    ),
    "foreign folder": (
        ["--text", "{tmp}/short", "--output", "{tmp}"],
        "holds files that no quickstart made",
    ),
    "length": (["--text", "{tmp}/short", "--max_length", "11"], "--max_length 11"),
    "steps": (["--text", "{tmp}/short", "--student_steps", "0"], "--student_steps 0"),
    "short held-out lines": (
        ["--text", "{tmp}/tail", "--teacher", "{bert}"],
        "held_out.tiny-bert.pickle: none of its",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, teachers, tmp_path, status_and_errors):
    (tmp_path / "short").write_text("bake limo\nnura\n")
    (tmp_path / "latin").write_bytes(b"gut\nab\xfc\n" * 60)
    (tmp_path / "tail").write_text("\n".join([*make_lines(39), "bake"]))
    arguments, expected = BAD[name]
    arguments = [word.format(tmp=tmp_path, **teachers) for word in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, errors = status_and_errors(quickstart.main, arguments)
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert all((tmp_path / file).read_bytes() == content for file, content in before.items())


def test_a_text_in_the_output_folder_is_left_alone(teachers, tmp_path, status_and_errors):
    (tmp_path / "quickstart.json").write_text("{}")
    (tmp_path / "train.txt").write_text("years of work")
    arguments = [
        "--text",
        str(tmp_path / "train.txt"),
        "--teacher",
        str(teachers["bert"]),
        "--output",
        str(tmp_path),
    ]
    status, errors = status_and_errors(quickstart.main, arguments)
    assert status == 2 and "lies in --output" in errors[0]
    assert (tmp_path / "train.txt").read_text() == "years of work"
