"""The documentation: its version, its links, its paths; what `pip install .` says."""

import ast
import re
import subprocess
import sys

import pytest
import transformers
from conftest import run_process
from readme import PAGES
from stand_ins import LAYERS, ROOT

import utils

ROOMS = "benchmarks|distil|docs|scripts|tests|training_configs"


def anchors(page) -> set[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(rf"(?<![\w./-])(?:{ROOMS})/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"(?<![\w./-])\w+\.py\b", text):
        assert any(ROOT.glob(name)) or any((ROOT / "scripts").glob(name)), name


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text


def test_the_version_is_that_of_the_changelog_and_the_citation():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, flags=re.M)[1]
    cited = re.search(r"^version: (\S+)$", citation, flags=re.M)[1]
    assert newest == cited == utils.VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+", utils.VERSION)


def test_the_training_program_prints_its_version():
    done = run_process(sys.executable, ROOT / "train.py", "--version")
    assert (done.returncode, done.stdout.split()) == (0, ["distil", utils.VERSION])


def test_pip_install_stops_and_says_how_to_install(tmp_path):
    sources = tmp_path / "checkout"  # what pip reads; it may write there
    (sources / ".ci").mkdir(parents=True)
    for name in ("pyproject.toml", ".ci/not_a_package.py"):
        (sources / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(tmp_path / "installed"), str(sources)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "install its dependencies with `pip install -r requirements.txt`" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "installed").exists()


def python_blocks(page: str) -> list[str]:
    """List the Python programs that a page of docs/ prints."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def run_script(script: str, folder, teachers) -> list[dict[str, float]]:
    """Run the printed script on a small teacher; return the losses that it prints."""
    (folder / "bert-base-uncased").symlink_to(teachers["bert"])
    assert "evenly_spaced_layers(12, 6)" in script
    script = script.replace("evenly_spaced_layers(12, 6)", f"evenly_spaced_layers({LAYERS}, 2)")
    (folder / "script.py").write_text(script, encoding="utf-8")
    done = run_process(sys.executable, "script.py", cwd=folder, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [line.partition(" ") for line in done.stdout.splitlines()]
    assert [step for step, _, _ in printed] == ["0", "1", "2"]
    return [ast.literal_eval(losses) for _, _, losses in printed]


def test_the_python_script_takes_three_updates_as_printed(tmp_path, teachers):
    (script,) = python_blocks("python.md")
    assert len(script.splitlines()) <= 30
    losses = run_script(script, tmp_path, teachers)
    for update in losses:
        weighted = 5 * update["ce"] + 2 * update["mlm"] + update["cos"]
        assert update["loss"] == pytest.approx(weighted)
    assert losses[2]["cos"] < losses[0]["cos"], "it learns"
    student = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "my_student")
    assert student.config.num_hidden_layers == 2


def test_losses_are_added_as_printed(tmp_path, teachers):
    (script,) = python_blocks("python.md")
    printed = 'alphas = {"ce": 5.0, "mlm": 2.0, "cos": 1.0}'
    assert printed in script
    script = script.replace(printed, 'alphas = {"variation": 1.0, "projected": 1.0}')
    blocks = [*python_blocks("extending.md"), script]
    losses = run_script("\n".join(blocks), tmp_path, teachers)
    assert losses[2]["projected"] < losses[0]["projected"], "it learns"
    assert all(update["variation"] > 0 for update in losses)
