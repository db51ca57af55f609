"""The documents of users: README.md and the pages of `docs/`, with their blocks and commands."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = (README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md")))


def page(name: str) -> str:
    """The text of `README.md`, or of a page in `docs/`."""
    path = README if name == README.name else REPOSITORY / "docs" / name
    return path.read_text("utf-8")


def python_blocks(text: str) -> list[str]:
    """Fenced blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """What follows `whisper-flash` in indented lines, and in those that continue them."""
    joined = re.sub(r"\\\n +", "", text)
    return re.findall(r"^    whisper-flash (.+)$", joined, flags=re.MULTILINE)


def label(path: Path) -> str:
    """A page's path below the repository, as the name of a test case."""
    return path.relative_to(REPOSITORY).as_posix()
