"""Log-mel features of real speech, computed before the measurement and shared by all systems.

Clips are 30 s each; clips and batches differ from one another.
"""

from __future__ import annotations

import io
import tempfile
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.benchmark.settings import Setting
from whisper_flash_attention.errors import BenchmarkError, MissingPackage, OptionError

if TYPE_CHECKING:
    import torch

Samples = npt.NDArray[np.float32]

SOURCES = ("bundled", "librispeech")
SAMPLING_RATE = 16000
SECONDS_PER_CLIP = 30
CLIP_SAMPLES = SECONDS_PER_CLIP * SAMPLING_RATE
BUNDLED_STEP = 27_011  # samples between the starts of two clips, 1.7 s
MOST_CLIPS = 67  # a prime, so that batches of any size start at different clips


@dataclass(frozen=True)
class FeatureFile:
    """Features [clips, mel bins, 3000], float32, as an `.npy` file, and what is in it."""

    path: Path
    description: str


def clips_needed(settings: list[Setting]) -> int:
    """The number of different clips that these settings use, at most `MOST_CLIPS`."""
    return min(MOST_CLIPS, max(s.batch_size * s.batches for s in settings))


def prepare_features(source: str, mel_bins: int, clips: int, path: Path) -> FeatureFile:
    """Write the features of `clips` clips from `source` to `path`.

    Raises:
        OptionError: the source is not one of `SOURCES`.
        BenchmarkError: the source has too few clips.
        MissingPackage: the source needs a package that is not installed.
    """
    from transformers import WhisperFeatureExtractor

    if source not in SOURCES:
        raise OptionError(f"features {source!r} are unknown; sources: {', '.join(SOURCES)}")
    if source == "bundled":
        speech, origin = bundled_clips(clips)
    else:
        speech, origin = librispeech_clips(clips)
    extractor: Any = WhisperFeatureExtractor.from_dict({"feature_size": mel_bins})
    features = [
        extractor(clip, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features[0]
        for clip in speech
    ]
    np.save(path, np.stack(features).astype(np.float32))
    return FeatureFile(path, f"{source}: {origin}")


def bundled_clips(count: int) -> tuple[list[Samples], str]:
    """Clips cut from the package's recordings, joined to a loop, each from another start."""
    from whisper_flash_attention.audio.bundled_clips import bundled_recordings

    recordings = [read_wave(recording.path) for recording in bundled_recordings()]
    loop = np.concatenate(recordings)
    clips = [
        np.take(loop, np.arange(CLIP_SAMPLES) + index * BUNDLED_STEP, mode="wrap")
        for index in range(count)
    ]
    seconds = loop.size / SAMPLING_RATE
    origin = f"clips of 30 s from {len(recordings)} recordings ({seconds:.1f} s, repeated)"
    return clips, origin


def read_wave(path: Path) -> Samples:
    """Samples in [-1, 1) of a 16 kHz mono 16-bit PCM WAV file.

    Raises:
        BenchmarkError: the file is another kind of WAV.
    """
    with wave.open(str(path), "rb") as file:
        kind = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if kind != (SAMPLING_RATE, 1, 2):
            raise BenchmarkError(f"{path.name}: want 16 kHz mono 16-bit PCM, found {kind}")
        pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    return pcm.astype(np.float32) / 32768.0


def librispeech_clips(count: int) -> tuple[list[Samples], str]:
    """The first utterances of LibriSpeech test-clean from the Hub; the extractor pads them."""
    try:
        from datasets import Audio, load_dataset
    except ImportError as error:
        raise MissingPackage(
            "features 'librispeech' need the package datasets: "
            "pip install 'whisper-flash-attention[bench]', or use --features bundled"
        ) from error
    name = "openslr/librispeech_asr"
    corpus = load_dataset(name, "clean", split="test", streaming=True)
    undecoded = corpus.cast_column("audio", Audio(decode=False)).take(count)
    clips = [decode(row["audio"]["bytes"]) for row in undecoded]
    if len(clips) < count:
        raise BenchmarkError(f"{name} has {len(clips)} clips, {count} are needed")
    return clips, f"{count} utterances of test-clean"


def decode(encoded: bytes) -> Samples:
    """Samples of an audio file that is held in memory."""
    from whisper_flash_attention.audio.audio_source import load_audio

    with tempfile.NamedTemporaryFile(suffix=".flac") as file:
        file.write(io.BytesIO(encoded).getbuffer())
        file.flush()
        return load_audio(Path(file.name), sampling_rate=SAMPLING_RATE)


def batch_of(features: torch.Tensor, index: int, batch_size: int) -> torch.Tensor:
    """Batch number `index` [batch_size, mel bins, 3000] from features [clips, mel bins, 3000]."""
    import torch

    chosen = (torch.arange(batch_size) + index * batch_size) % features.shape[0]
    return features[chosen]
