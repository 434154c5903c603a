"""The documentation: its version, its links, its paths; what `pip install .` says."""

import re
import subprocess
import sys

from stand_ins import ROOT

import utils


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
