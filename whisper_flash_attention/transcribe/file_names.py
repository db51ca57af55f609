"""Names of files that some file systems take for one: `A.srt` and `a.srt`, or two forms of `é`."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize


def folded(name: str) -> str:
    """Return the same text for all names that any file system takes for one."""
    return normalize("NFKC", normalize("NFKC", name).casefold())


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names that fold into an earlier one's text, each with that earlier one."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(folded(name), name), name) for name in names)
    return [(earlier, name) for earlier, name in pairs if earlier != name]


def tells_apart(folder: Path) -> bool:
    """Whether the file system of a folder distinguishes upper and lower case, and Unicode forms.

    It is tried with a temporary file. Raises `OSError` if that fails.
    """
    name = f".{uuid.uuid4().hex}-\u00e9.tmp"
    probe = folder / name
    probe.touch()
    try:
        others = (name.upper(), normalize("NFD", name))
        return not any((folder / other).exists() for other in others)
    finally:
        with suppress(FileNotFoundError):
            probe.unlink()
