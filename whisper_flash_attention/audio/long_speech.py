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
from whisper_flash_attention.audio.silence import is_silence
from whisper_flash_attention.audio.sound import Sound
from whisper_flash_attention.audio.vad import CHUNK_SECONDS, WINDOW_SECONDS, Chunk
from whisper_flash_attention.audio.voice import FRAME, Heard, Voice
from whisper_flash_attention.audio.waveforms import check_finite
from whisper_flash_attention.errors import AudioError

# Of the detector, in a block.
FRAMES = 1024


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
    voice, probabilities, size = Voice(vad.detector()), array("f"), 0
    for block in sound.blocks(FRAME * FRAMES / SAMPLING_RATE):
        size += block.size
        probabilities.extend(voice.hear(block).tolist())
    # In place of the samples, whose number alone matters now.
    stand_in = torch.zeros(1).expand(size)
    spans = vad.spans_of_speech(stand_in, Heard(probabilities), max_seconds)
    return size / SAMPLING_RATE, cut(sound, spans)


def cut_all(sound: Sound, max_seconds: float = WINDOW_SECONDS) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and all of it in chunks, as `all_chunks`.

    Raises:
        AudioError: as `Sound.blocks`.
    """
    if sound.samples is not None:
        seconds = sound.samples.size / SAMPLING_RATE
        return seconds, vad.all_chunks(sound.samples, max_seconds)
    size, step = sum(block.size for block in sound.blocks()), round(max_seconds * SAMPLING_RATE)
    spans = ((begin, min(begin + step, size)) for begin in range(0, size, step))
    chunks = (chunk for chunk in cut(sound, spans) if not is_silence(chunk.samples))
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
