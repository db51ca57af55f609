"""Modes of decoding, bounds of near-ties, and recordings as features of a window.

Nothing here imports PyTorch or Transformers, so that `--help` and refusals are quick.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import AudioError, MissingPackage, OptionError

TEMPERATURE = 0.7
BEAMS = 5

BOUNDS: Mapping[str, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.7}
"""Largest gap, in logits, that explains a difference, by dtype.

Measured on tiny.en and 524 positions of speech, with stock's eager float32 logits as the truth, as
the error in the distance between the likeliest token and the nine after it: stock float16 is off
by up to 0.045, stock bfloat16 by up to 0.36, our float32 by up to 5e-5. Where two tokens change
places both sides can be off, so that half precision gets twice its error. Float32 gets 20 times
its error, for models of more layers.
"""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of decoding: the options that both models' `generate` gets."""

    name: str
    summary: str
    options: Mapping[str, Any]

    @property
    def beams(self) -> int:
        """Beams per recording; 1 for other ways."""
        return int(self.options["num_beams"])

    @property
    def has_timestamps(self) -> bool:
        """Whether timestamp tokens may be generated."""
        return bool(self.options["return_timestamps"])


MODES: Mapping[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "greedy",
            "the likeliest token at every step",
            {"return_timestamps": False, "num_beams": 1},
        ),
        Mode(
            "timestamps",
            "greedy, with timestamps, one window",
            {"return_timestamps": True, "num_beams": 1, "force_unique_generate_call": True},
        ),
        Mode("beams", f"{BEAMS} beams", {"return_timestamps": False, "num_beams": BEAMS}),
        Mode(
            "sampled",
            f"sampled at temperature {TEMPERATURE} with a seed, one recording at a time",
            {"return_timestamps": False, "num_beams": 1, "temperature": TEMPERATURE},
        ),
    )
}


@dataclass(frozen=True, slots=True)
class ParityOptions:
    """What to compare.

    Args:
        modes: names in `MODES`, in the order in which they are run; none means all.
        batch_size: recordings per call; sampling always takes one.
        limit: most recordings to compare; None takes all.
        language: code or name of the language spoken, for multilingual models; "auto" has stock
            detect it, compares that detection, and gives the same language to both models.
        tolerance: gap in logits that explains a difference; by default that of the dtype.
        seed: of the random numbers of the sampled mode.

    Raises:
        OptionError: a value is unknown or impossible.
    """

    modes: Sequence[str] = ()
    batch_size: int = 8
    limit: int | None = None
    language: str = "auto"
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.modes:
            check.one_of("mode", name, MODES)
        check.whole_number("batch_size", self.batch_size, least=1)
        check.optional(check.whole_number, "limit", self.limit, least=1)
        gap = "a gap in logits, 0 or more"
        check.optional(check.number, "tolerance", self.tolerance, gap, least=0)
        check.whole_number("seed", self.seed, least=0)

    def chosen_modes(self) -> tuple[Mode, ...]:
        """The modes to run, each once."""
        return tuple(MODES[name] for name in dict.fromkeys(self.modes or MODES))

    def bound(self, dtype: str) -> float:
        """The gap in logits that explains a difference in this dtype ("float16")."""
        return BOUNDS[dtype] if self.tolerance is None else self.tolerance


WINDOW_SECONDS = 30


@dataclass(frozen=True)
class Clip:
    """One recording's first window.

    Attributes:
        name: of the file, or of the array in a file of features.
        features: float32 log-mel features `[mel bins, frames]`, as the extractor makes them.
        transcript: from a `.txt` file beside the recording, if there is one; None for longer
            recordings, of which only the first window is decoded.
    """

    name: str
    features: npt.NDArray[np.float32]
    transcript: str | None = None


@dataclass
class Clips:
    """The clips that could be read, and why the others could not."""

    clips: list[Clip] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def find_recordings(paths: Sequence[str | Path]) -> list[Path]:
    """Files among `paths`, and the recordings (by suffix) in the folders.

    Raises:
        OptionError: a folder holds no recordings.
    """
    from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES

    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in RECORDING_SUFFIXES)
        if not inside:
            raise OptionError(f"{path}: holds no recordings (wav, flac, mp3, m4a, ogg ...)")
        found += inside
    return list(dict.fromkeys(found))


def read_recordings(
    paths: Sequence[Path],
    extractor: Any,
    begin: Callable[[str], None],
    report: Callable[[str], None],
) -> Clips:
    """Features of the first 30 s of each recording.

    Args:
        paths: recordings of any format.
        extractor: a `WhisperFeatureExtractor`.
        begin: called with a recording's name before it is read.
        report: called with one line for each recording that cannot be read.

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
            report(f"skipped: {error}")
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


def read_features(path: Path, shape: tuple[int, int], report: Callable[[str], None]) -> Clips:
    """Features from a file of arrays, instead of recordings.

    Args:
        path: an `.npz` file with an array `[mel bins, frames]` per recording, under its name; or
            an `.npy` file with one array `[recordings, mel bins, frames]`.
        shape: (mel bins, frames) that the model takes.
        report: called with one line for each array that is not of this shape, not real numbers, or
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
                report(f"skipped: {path.name}, {name}: {wrong}")
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
