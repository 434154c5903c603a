"""The documentation: its version, its links, its paths; what `pip install .` says."""

import re
import subprocess
import sys

import pytest
from readme import PAGES
from stand_ins import ROOT

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
