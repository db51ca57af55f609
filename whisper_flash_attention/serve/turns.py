"""Turns of a live conversation: sound as it arrives, where speech starts and stops, stable text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.audio.voice import FRAME, Voice, detector
from whisper_flash_attention.options import VadOptions

# Below the threshold by this much, speech ends.
HYSTERESIS = 0.15
# Text without blanks: this number of characters at the end of a pass is not final.
UNSURE_CHARACTERS = 2


def _mu_law() -> Samples:
    """Samples of the 256 codes of G.711 mu-law (ITU-T G.711, table 2)."""
    codes = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (codes >> 4) & 7, (codes & 15).astype(np.int32)
    size = (((mantissa << 3) + 132) << exponent) - 132
    return (np.where(codes & 128, -size, size) / 32768).astype(np.float32)


def _a_law() -> Samples:
    """Samples of the 256 codes of G.711 A-law (ITU-T G.711, table 1)."""
    codes = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = ((codes >> 4) & 7).astype(np.int32), (codes & 15).astype(np.int32)
    steps = (mantissa << 4) + 8
    size = np.where(exponent > 0, (steps + 256) << np.maximum(exponent - 1, 0), steps)
    return (np.where(codes & 128, size, -size) / 32768).astype(np.float32)


CODES = {"audio/pcmu": _mu_law(), "audio/pcma": _a_law()}


@dataclass(frozen=True, slots=True)
class LiveFormat:
    """How samples are sent: 16-bit PCM, little-endian, or G.711.

    Args:
        kind: audio/pcm, audio/pcmu or audio/pcma.
        rate: samples per second.
    """

    kind: str = "audio/pcm"
    rate: int = 24_000

    @property
    def sample_bytes(self) -> int:
        return 2 if self.kind == "audio/pcm" else 1

    def samples(self, data: bytes) -> Samples:
        """Mono float32 samples `[T]` of whole samples' bytes."""
        if self.kind == "audio/pcm":
            return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
        return CODES[self.kind][np.frombuffer(data, np.uint8)]


class Voices:
    """Silero's detector for sounds that arrive side by side: what comes while it runs goes next."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Voice, Samples, asyncio.Future[list[float]]]] = []
        self._work: asyncio.Task[None] | None = None

    async def probabilities(self, voice: Voice, block: Samples) -> list[float]:
        """Probabilities of speech in the next frames of a sound."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((voice, block, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            pieces = [(voice, block) for voice, block, _ in taken]
            waiting = [future for _, _, future in taken]
            try:
                found = await asyncio.to_thread(Voice.together, pieces)
            except Exception as error:  # raised by those who wait
                for future in waiting:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, each in zip(waiting, found, strict=True):
                if not future.done():  # else its session has ended
                    future.set_result(each.tolist())


@dataclass(slots=True)
class SpeechDetector:
    """Where speech starts and stops in sound that arrives piece by piece.

    Args:
        rate: samples per second.
        options: threshold and silence that ends speech.

    Attributes:
        in_speech: whether the last frame was taken for speech.
        voice: of the sound, in the detector.

    Raises:
        MissingPackage: Silero's package is not installed.
    """

    rate: int
    options: VadOptions
    in_speech: bool = False
    voice: Voice = field(init=False)
    _rest: Samples = field(default_factory=lambda: np.zeros(0, np.float32))
    _taken: int = 0
    _frames: int = 0
    _silent: int = 0

    def __post_init__(self) -> None:
        self.voice = Voice(detector())

    def take(self, samples: Samples) -> Samples:
        """Take the next samples `[T]`; return those of whole frames, at the detector's rate."""
        self._rest = np.concatenate([self._rest, self._resampled(samples)])
        whole = self._rest.size // FRAME * FRAME
        block, self._rest = self._rest[:whole], self._rest[whole:]
        return block

    def changes(self, probabilities: Sequence[float]) -> list[tuple[bool, float]]:
        """Go on with the probabilities of the next frames.

        Returns:
            Changes in order: whether speech started, and the second, counted from the first sample,
            at which it started or stopped.
        """
        found = (self._advance(probability) for probability in probabilities)
        return [change for change in found if change is not None]

    def _advance(self, probability: float) -> tuple[bool, float] | None:
        """One frame further."""
        seconds = FRAME / SAMPLING_RATE
        begin = self._frames * seconds
        self._frames += 1
        least = self.options.threshold
        if not self.in_speech:
            if probability < least:
                return None
            self.in_speech, self._silent = True, 0
            return True, begin
        below = self.options.neg_threshold or max(0.01, least - HYSTERESIS)
        self._silent = self._silent + 1 if probability < below else 0
        most = (self.options.min_silence_duration_ms or 500) / 1000
        if self._silent * seconds < most:
            return None
        self.in_speech = False
        return False, begin + seconds

    def _resampled(self, samples: Samples) -> Samples:
        """The samples at 16 kHz, linearly between those that were sent: for the detector alone."""
        if self.rate == SAMPLING_RATE:
            return samples
        step = self.rate / SAMPLING_RATE
        first = -(-self._taken // step) * step - self._taken
        places: npt.NDArray[np.float64] = np.arange(first, samples.size, step)
        self._taken += samples.size
        return np.interp(places, np.arange(samples.size), samples).astype(np.float32)


class StableText:
    """Text of an utterance of which no word is taken back: words on which two passes agree.

    Local agreement, section 3.2 of "Turning Whisper into Real-Time Transcription System"
    (Macháček et al., 2023).
    """

    def __init__(self) -> None:
        self.text = ""
        self._last = ""

    def add(self, text: str) -> str:
        """Take the text of one more pass; return what is stable now and was not before."""
        same = sum(
            1
            for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._last, text, strict=False))
        )
        agreed = text[:same]
        self._last = text
        # The last word may go on, or get another mark.
        end = agreed.rfind(" ") + 1
        agreed = agreed[:end] if " " in text else agreed[:-UNSURE_CHARACTERS]
        return self._extend(agreed)

    def finish(self, text: str) -> str:
        """Take the final text; return what follows the stable one, "" if they differ."""
        return self._extend(text)

    def _extend(self, text: str) -> str:
        if not text.startswith(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new
