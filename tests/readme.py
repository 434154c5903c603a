"""The commands that the README prints."""

import re

from stand_ins import ROOT


def readme_commands() -> dict[str, str]:
    """Find the README's workflow blocks: those that begin with a comment line `# README: name`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n# (\w+): [^\n]*\n(.*?)```", text, flags=re.S)
    return dict(blocks)
