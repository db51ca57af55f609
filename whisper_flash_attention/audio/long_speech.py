"""Speech in recordings of any length, in bounded memory.

A recording that is not held is read twice: for the probabilities of speech, of which there is one
per 512 samples, and for the chunks. The chunks are those of `speech_chunks` on all of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from whisper_flash_attention.audio import vad
from whisper_flash_attention.audio.load import SAMPLING_RATE
from whisper_flash_attention.audio.sound import Sound
from whisper_flash_attention.audio.vad import CHUNK_SECONDS, Chunk
from whisper_flash_attention.audio.waveforms import check_finite
from whisper_flash_attention.errors import AudioError

# Silero's model looks at so many samples at a time.
LOOK = 512
# So many looks are taken from one block.
LOOKS = 1000


def find_speech(sound: Sound, max_seconds: float = CHUNK_SECONDS) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and chunks that hold all its speech, as `speech_chunks`.

    Raises:
        AudioError: as `Sound.blocks`.
        MissingPackage: Silero's package is not installed.
    """
    if sound.samples is not None:
        check_finite(sound.samples)
        seconds = sound.samples.size / SAMPLING_RATE
        return seconds, vad.speech_chunks(sound.samples, max_seconds)
    heard = _Heard(sound)
    spans = vad.spans_of_speech(heard.samples, heard, max_seconds)
    return len(heard.samples) / SAMPLING_RATE, cut(sound, spans)


def cut_all(sound: Sound, max_seconds: float = CHUNK_SECONDS) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and all of it in chunks, as `all_chunks`.

    Raises:
        AudioError: as `Sound.blocks`.
    """
    if sound.samples is not None:
        seconds = sound.samples.size / SAMPLING_RATE
        return seconds, vad.all_chunks(sound.samples, max_seconds)
    size, step = sum(block.size for block in sound.blocks()), round(max_seconds * SAMPLING_RATE)
    spans = ((begin, min(begin + step, size)) for begin in range(0, size, step))
    chunks = (chunk for chunk in cut(sound, spans) if not vad.is_flat(chunk.samples))
    return size / SAMPLING_RATE, chunks


def cut(sound: Sound, spans: Iterable[tuple[int, int]]) -> Iterator[Chunk]:
    """Chunks of a recording, given first samples and ends in order."""
    blocks = sound.blocks()
    room, first = np.zeros(0, np.float32), 0
    for begin, end in spans:
        while first + room.size < end:
            kept = room[max(0, begin - first) :]
            first += room.size - kept.size
            block = next(blocks, None)
            if block is None:
                raise AudioError(f"{sound.name}: became shorter while it was read")
            room = np.concatenate([kept, block])
        yield Chunk(begin / SAMPLING_RATE, room[begin - first : end - first].copy())


class _Heard:
    """A detector that was asked before: its answers on a recording, one after the other.

    Attributes:
        samples: a stand-in `[T]` for the recording's samples, which takes no memory.
    """

    def __init__(self, sound: Sound) -> None:
        self._probabilities = array("f")
        detector, size = vad.detector(), 0
        detector.reset_states()
        with torch.no_grad():
            for block in sound.blocks(LOOK * LOOKS / SAMPLING_RATE):
                size += block.size
                looks = torch.from_numpy(np.pad(block, (0, -block.size % LOOK))).view(-1, LOOK)
                self._probabilities.extend(detector(each, SAMPLING_RATE).item() for each in looks)
        self.samples = torch.zeros(1).expand(size)
        self._next = 0

    def reset_states(self) -> None:
        self._next = 0

    def __call__(self, look: torch.Tensor, sampling_rate: int) -> torch.Tensor:
        self._next += 1
        return torch.tensor(self._probabilities[self._next - 1])
