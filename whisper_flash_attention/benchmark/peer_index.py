"""What a folder has of a checkpoint, so that a later run need not write its files again.

An index beside the files says what they were made from, and their sizes. Files are taken only if
all of that is as wanted; a torn index counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from whisper_flash_attention._version import __version__
from whisper_flash_attention.benchmark.peer_systems import PeerCheckpoint
from whisper_flash_attention.benchmark.results import write_whole

INDEX = "checkpoint.json"
LONGEST_NAME = 80  # characters of a source in the name of its folder


@dataclass(frozen=True)
class Origin:
    """What the files of a checkpoint are made from.

    Attributes:
        source: as users name it, a path whole; a size where weights are random.
        random_weights: whether they are drawn.
        modified: time in nanoseconds of the newest file of a source that is a path; otherwise 0.
        version: of this package, which writes them.
    """

    source: str
    random_weights: bool = False
    modified: int = 0
    version: str = __version__

    @classmethod
    def of(cls, source: str, *, random_weights: bool) -> Origin:
        """The origin of a source as users name it."""
        if random_weights or not os.path.exists(source):
            return cls(source, random_weights)
        path = Path(os.path.realpath(source))
        times = [0]
        with suppress(OSError):  # reading it will report what is wrong
            files = list(path.iterdir()) if path.is_dir() else [path]
            times += [each.stat().st_mtime_ns for each in files]
        return cls(str(path), modified=max(times))

    @property
    def folder_name(self) -> str:
        """The name of a folder for the files, different for every source."""
        readable = re.sub(r"[^\w.-]+", "-", self.source, flags=re.ASCII)[-LONGEST_NAME:]
        digest = hashlib.sha256(os.fsencode(self.source)).hexdigest()[:8]
        name = f"{readable.strip('-.')}-{digest}"
        return f"random-{name}" if self.random_weights else name


def read_index(folder: Path, origin: Origin, formats: Sequence[str]) -> PeerCheckpoint | None:
    """Return the files in a folder if they have this origin, all formats and their sizes."""
    try:
        found = json.loads((folder / INDEX).read_text("utf-8"))
        files = {name: folder / found["files"][name] for name in formats}
        sizes = {str(folder / name): size for name, size in found["sizes"].items()}
        if found["origin"] != asdict(origin) or sizes != _sizes(map(Path, sizes)):
            return None
        heads = found["alignment_heads"]
        if not _sizes(files.values()).keys() <= sizes.keys():
            return None
        return PeerCheckpoint(
            {name: str(path) for name, path in files.items()},
            int(found["end_of_text"]),
            bool(found["is_multilingual"]),
            None if heads is None else tuple((int(layer), int(head)) for layer, head in heads),
        )
    # Not there, torn, or of another version of this package.
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def write_index(folder: Path, origin: Origin, checkpoint: PeerCheckpoint) -> None:
    """Write the index of files that are there.

    Raises:
        BenchmarkError: it cannot be written.
    """
    files = {name: Path(path) for name, path in checkpoint.files.items()}
    document = {
        "origin": asdict(origin),
        "files": {name: str(path.relative_to(folder)) for name, path in files.items()},
        "sizes": {
            str(Path(path).relative_to(folder)): size
            for path, size in _sizes(files.values()).items()
        },
        "end_of_text": checkpoint.end_of_text,
        "is_multilingual": checkpoint.is_multilingual,
        "alignment_heads": checkpoint.alignment_heads,
    }
    write_whole(folder / INDEX, json.dumps(document, indent=1) + "\n")


def _sizes(paths: Iterable[Path]) -> dict[str, int]:
    """Bytes of files, and of those in folders; raises `OSError` if one is not there."""
    return {str(file): file.stat().st_size for path in paths for file in _all_below(path)}


def _all_below(path: Path) -> list[Path]:
    """The files in a folder, or the path itself if it is none."""
    found = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return found or [path]
