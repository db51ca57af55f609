"""What a source names, from the outside: a Hub id, a folder, a file or an installed package."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.validation import shown
from whisper_flash_attention.weights.checkpoint import Checkpoint, shorten
from whisper_flash_attention.weights.ctranslate2_reader import read_ctranslate2
from whisper_flash_attention.weights.openai_reader import read_openai
from whisper_flash_attention.weights.packaged import PREFIX, packaged_names, packaged_source
from whisper_flash_attention.weights.tokens import SpecialTokens

Source = str | os.PathLike[str]

_EXPECTED = (
    "expected a Transformers folder (config.json with *.safetensors or *.bin), a CTranslate2 "
    "folder (model.bin), an OpenAI checkpoint (*.pt), a Hub id, or package:NAME"
)
TOKENIZER_FILES = frozenset(("tokenizer.json", "tokenizer_config.json"))
_LONGEST_NAME = 4096  # bytes of a path
_OPENAI_SUFFIXES = (".pt", ".pth")

# Names of checkpoints, as openai-whisper and faster-whisper have them -> repositories on the Hub.
_HUB_IDS = {
    name: f"openai/whisper-{name}"
    for name in (
        *("tiny.en", "tiny", "base.en", "base", "small.en", "small", "medium.en", "medium"),
        *("large-v2", "large-v3", "large-v3-turbo"),
    )
} | {
    "large-v1": "openai/whisper-large",
    "large": "openai/whisper-large-v3",
    "turbo": "openai/whisper-large-v3-turbo",
    **{
        f"distil-{name}": f"distil-whisper/distil-{name}"
        for name in ("small.en", "medium.en", "large-v2", "large-v3", "large-v3.5")
    },
}
SHORT_NAMES = tuple(_HUB_IDS)


# Number of languages -> a repository with the tokenizer of all of OpenAI's checkpoints with as
# many, for checkpoints that come without one; 0 is English-only.
_TOKENIZERS = {
    0: "openai/whisper-tiny.en",
    99: "openai/whisper-tiny",
    100: "openai/whisper-large-v3",
}


@dataclass(frozen=True, slots=True)
class Located:
    """What a source turned out to be.

    Attributes:
        kind: who reads it.
        folder: the local folder, None for a Hub id or an OpenAI checkpoint.
        model: the file or files with the weights, where this package reads them.
    """

    kind: Literal["transformers", "openai", "ctranslate2"]
    folder: Path | None = None
    model: tuple[Path, ...] = ()


def hub_id(name: Source) -> str:
    """The Hub id for a short name ("tiny.en", "turbo"); others stay as they are.

    Raises:
        WeightsError: it is neither text nor a path; or it is a misspelt short name.
    """
    name = source_name(name)
    if name in _HUB_IDS:
        return _HUB_IDS[name]
    if re.fullmatch(r"[\w.-]+", name) and not os.path.exists(name) and not _is_local(name):
        _refuse_short_name(name)
    return name


def _refuse_short_name(name: str) -> None:
    """Raise `WeightsError`: every repository of the Hub that has a Whisper has an owner, too."""
    near = difflib.get_close_matches(name.lower(), SHORT_NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "there is no such model or folder."
    raise WeightsError(
        f"{name}: {hint} Short names are {', '.join(SHORT_NAMES)}; others are a Hub id "
        f"(owner/name), a folder, an OpenAI .pt file, or {' or '.join(packaged_names())}"
    )


def _is_local(name: str) -> bool:
    """Whether a name can only be that of a file or folder."""
    return name.startswith((".", os.sep, "~")) or Path(name).suffix in _OPENAI_SUFFIXES


def source_name(source: object) -> str:
    """Return a source as text. Raises `WeightsError` if it is neither text nor a path."""
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(name, str):
        raise WeightsError(f"{shown(source)}: neither text nor a path; {_EXPECTED}")
    return name


def read_checkpoint(source: Source) -> Checkpoint | None:
    """Read a checkpoint that Transformers cannot read; None for what it should load itself.

    Args:
        source: an OpenAI `.pt` file, a CTranslate2 folder, or `package:tiny.en` or `package:base`
            for what an installed package carries. A Hub id or a Transformers folder gives None.

    Raises:
        WeightsError: the path is missing or of no known layout, or the checkpoint is truncated,
            wrong or hostile. The message names the file and what is wrong with it.
        MissingPackage: the package is not installed.
    """
    located = locate(source)
    name = source_name(source)
    if located.kind == "openai":
        return read_openai(located.model[0], name)
    if located.kind == "ctranslate2" and located.folder is not None:
        return read_ctranslate2(located.folder, located.model, name)
    return None


def locate(source: Source, *, weights: bool = True) -> Located:
    """Find out what a source is, by looking at names of files only.

    Args:
        source: as `read_checkpoint` takes it.
        weights: whether a folder must hold weights; a tokenizer can come without.

    Raises:
        WeightsError, MissingPackage: as `read_checkpoint`.
    """
    name = source_name(source)
    if name.startswith(PREFIX):
        package = packaged_source(name)
        return Located("ctranslate2", package.folder, package.model)
    _check_name(name)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return _locate_folder(path, weights)
        is_file, exists = path.is_file(), path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        raise WeightsError(f"{shorten(name)}: cannot be looked at ({shorten(error)})") from error
    if is_file and path.suffix in _OPENAI_SUFFIXES:
        return Located("openai", None, (path,))
    if is_file:
        raise WeightsError(f"{path}: a file of unknown kind; {_EXPECTED}")
    if exists:
        raise WeightsError(f"{path}: neither a file nor a folder; {_EXPECTED}")
    if _is_local(name) or not isinstance(source, str) or not name.isprintable():
        raise WeightsError(f"{shorten(path, 200)}: does not exist; {_EXPECTED}")
    return Located("transformers")


def tokenizer_source(tokens: SpecialTokens) -> str:
    """A repository on the Hub with the tokenizer of these special tokens."""
    return _TOKENIZERS[len(tokens.languages) if tokens.multilingual else 0]


def is_bare(folder: Path) -> bool:
    """Whether a tokenizer lies there without the configuration that Transformers needs."""
    found = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return found == {"tokenizer.json"}


def _check_name(name: str) -> None:
    """Refuse what can be neither a path nor a Hub id, whatever lies on the disk."""
    try:
        is_possible = "\0" not in name and len(os.fsencode(name)) <= _LONGEST_NAME
    except UnicodeEncodeError:  # lone surrogates
        is_possible = False
    if not is_possible or not name.strip():
        raise WeightsError(f"{shorten(name)!r}: neither a path nor a Hub id; {_EXPECTED}")


def _locate_folder(folder: Path, weights: bool) -> Located:
    names = sorted(os.listdir(folder))
    if "model.bin" in names:
        return Located("ctranslate2", folder, (folder / "model.bin",))
    has_weights = "config.json" in names and any(
        name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"))
        for name in names
    )
    if has_weights or (not weights and TOKENIZER_FILES.intersection(names)):
        return Located("transformers", folder)
    found = (
        ", ".join(map(shorten, names[:5])) + (", ..." if len(names) > 5 else "")
        if names
        else "nothing"
    )
    raise WeightsError(f"{folder}: a folder with {found}; {_EXPECTED}")
