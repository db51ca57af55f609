"""The recordings to compare on, as features of one 30 s window each; bad ones are left out."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.errors import AudioError, MissingPackage, OptionError
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES

WINDOW_SECONDS = 30


@dataclass(frozen=True)
class Clip:
    """One recording's first window.

    Attributes:
        name: of the file, or of the array in a file of features.
        features: float32 log-mel features `[mel bins, frames]`, as the extractor makes them.
        transcript: what is said, where a `.txt` file beside the recording tells; None for longer
            recordings, of which only the first window is decoded.
    """

    name: str
    features: npt.NDArray[np.float32]
    transcript: str | None = None


@dataclass
class Clips:
    """What could be read, and why the others could not."""

    clips: list[Clip] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def find_recordings(places: Sequence[str | Path]) -> list[Path]:
    """Files among `places`, and the recordings (by the ends of their names) in the folders.

    Raises:
        OptionError: a folder holds no recordings.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            found.append(place)
            continue
        inside = sorted(p for p in place.iterdir() if p.suffix.lower() in RECORDING_SUFFIXES)
        if not inside:
            raise OptionError(f"{place}: holds no recordings (wav, flac, mp3, m4a, ogg ...)")
        found += inside
    return list(dict.fromkeys(found))


def read_recordings(
    paths: Sequence[Path], extractor: Any, begin: Callable[[str], None], tell: Callable[[str], None]
) -> Clips:
    """Features of the first 30 s of each recording.

    Args:
        paths: recordings of any format.
        extractor: a `WhisperFeatureExtractor`.
        begin: called with a recording's name before it is read.
        tell: called with one line for each recording that cannot be read.

    Raises:
        MissingPackage: PyAV, which decodes recordings, is not installed.
    """
    result = Clips()
    for path, name in zip(paths, _short_names(paths), strict=True):
        begin(name)
        try:
            result.clips.append(_read_recording(path, name, extractor))
        except AudioError as error:
            result.skipped[name] = str(error)
            tell(f"skipped: {error}")
    return result


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Names of files; whole paths for those of the same name."""
    times = Counter(path.name for path in paths)
    return [path.name if times[path.name] == 1 else str(path) for path in paths]


def _read_recording(path: Path, name: str, extractor: Any) -> Clip:
    from whisper_flash_attention.audio import SAMPLING_RATE, load_audio

    try:
        samples = load_audio(path)
    except ImportError as error:
        raise MissingPackage(
            "recordings are decoded by PyAV, which is not installed: pip install av, or give "
            "--features instead of --audio"
        ) from error
    features = extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="np")
    is_whole = samples.size <= WINDOW_SECONDS * SAMPLING_RATE
    beside = path.with_suffix(".txt")
    transcript = None
    if is_whole and beside != path and beside.is_file():
        transcript = beside.read_text(encoding="utf-8", errors="replace").strip() or None
    return Clip(name, features["input_features"][0].astype(np.float32), transcript)


def read_features(path: Path, shape: tuple[int, int], tell: Callable[[str], None]) -> Clips:
    """Features from a file of arrays, instead of recordings.

    Args:
        path: an `.npz` file with an array `[mel bins, frames]` per recording, under its name; or
            an `.npy` file with one array `[recordings, mel bins, frames]`.
        shape: (mel bins, frames) that the model takes.
        tell: called with one line for each array that is not of this shape, not real numbers, or
            not finite.

    Raises:
        OptionError: the file is missing or no such file.
    """
    result = Clips()
    try:
        for name, array in _arrays(path):
            wrong = _what_is_wrong(array, shape)
            if wrong:
                result.skipped[name] = wrong
                tell(f"skipped: {path.name}, {name}: {wrong}")
            else:
                result.clips.append(Clip(name, array.astype(np.float32)))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"{path}: not an .npz or .npy file of features ({reason})") from error
    return result


def _arrays(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        yield from ((str(index), row) for index, row in enumerate(np.atleast_1d(loaded)))
        return
    with loaded:
        for name in loaded.files:
            yield name, loaded[name]


def _what_is_wrong(array: npt.NDArray[Any], shape: tuple[int, int]) -> str | None:
    if array.shape != shape:
        return f"its shape is {list(array.shape)}, this model takes {list(shape)}"
    if not np.issubdtype(array.dtype, np.floating):
        return f"its dtype is {array.dtype}, not floating point"
    if not np.isfinite(array).all():
        return "it holds numbers that are not finite"
    return None
