"""The recordings that come with the package: five short clips of public-domain English speech."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BundledClip:
    """One bundled clip: 16 kHz mono 16-bit PCM WAV, readable with the standard library's `wave`."""

    path: Path
    transcript: str
    source: str
    licence: str
    seconds: float
    sha256: str


def bundled_recordings() -> tuple[BundledClip, ...]:
    """Return the clips in the order of the text they read (their origin: `NOTICE.md` beside them).

    Joined, they make 24.7 s of one voice reading *Sense and Sensibility*.
    """
    # The wheel is always unpacked on installation, so that a resource is a file with a path.
    folder = Path(str(resources.files("whisper_flash_attention"))) / "data" / "recordings"
    rows = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return tuple(
        BundledClip(
            path=folder / row["file"],
            transcript=row["transcript"],
            source=row["source"],
            licence=row["licence"],
            seconds=row["seconds"],
            sha256=row["sha256"],
        )
        for row in rows
    )
