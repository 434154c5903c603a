"""The pages of the documentation and the commands that they print."""

import re

from stand_ins import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def readme_commands() -> dict[str, str]:
    """Find the workflow blocks of README and docs: the first line is a comment, `# name: ..`."""
    commands: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, block in re.findall(r"```bash\n# (\w+): [^\n]*\n(.*?)```", text, flags=re.S):
            assert name not in commands, f"{page}: {name} is printed twice"
            commands[name] = block
    return commands
