"""The versions of libraries that the program was tested with: requirements.txt pins them."""

import contextlib
import importlib.metadata
import re
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
DECISIVE = ("torch", "transformers")  # whose versions change results


def versions() -> dict[str, str]:
    """Return the installed versions of the decisive libraries: {"torch_version": "2.13.0", ..}."""
    found = {}
    for name in DECISIVE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"{name}_version"] = importlib.metadata.version(name)
    return found


def version_notice(requirements: Path = REQUIREMENTS) -> str | None:
    """Say in one line which decisive libraries are not of the tested version, or None."""
    try:
        text = requirements.read_text(encoding="utf-8")
    except OSError:
        return None
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", text, flags=re.M))
    others = []
    for key, version in versions().items():
        name = key.removesuffix("_version")
        if name in tested and version.partition("+")[0] != tested[name]:  # 2.13.0+cpu is 2.13.0
            others.append(f"{name} {version} (tested: {tested[name]})")
    return f"{', '.join(others)}: results may differ, or fail." if others else None
