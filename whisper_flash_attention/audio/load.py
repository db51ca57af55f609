"""Read a recording of any format as mono float32 samples at one rate, through PyAV (FFmpeg).

Whole (`load_audio`) or block by block (`stream_audio`), which is the same work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from whisper_flash_attention.audio.channels import ChannelMixer
from whisper_flash_attention.audio.container import Source, name_of, open_container
from whisper_flash_attention.audio.decode import (
    HIGHEST_RATE,
    LOWEST_RATE,
    MOST_SECONDS,
    Decoding,
    Samples,
)
from whisper_flash_attention.audio.tracks import AudioTrack, check_track, choose_track, tracks_of
from whisper_flash_attention.errors import AudioError, OptionError

__all__ = [
    "MOST_SECONDS_HELD",
    "SAMPLING_RATE",
    "Samples",
    "Source",
    "audio_tracks",
    "chosen_track",
    "join_blocks",
    "load_audio",
    "name_of",
    "stream_audio",
]

SAMPLING_RATE = 16_000  # Hz; what every Whisper checkpoint was trained on
# The longest recording that is held in memory as a whole: 5.5 GB at 16 kHz.
MOST_SECONDS_HELD = 24 * 3600


def load_audio(
    source: Source,
    sampling_rate: int = SAMPLING_RATE,
    *,
    channel: int | None = None,
    track: int | str | None = None,
) -> Samples:
    """Decode `source` into mono float32 samples `[T]` within [-1, 1] at `sampling_rate` Hz.

    Every format of PyAV's FFmpeg is read (wav, flac, mp3, ogg, opus, m4a, mp4, ...). Decoding goes
    frame by frame; the peak of memory is twice the result, of which 24 hours are the most.

    Time counts as for a player, from where the whole container begins: where its time stamps say
    that a track begins late or has a gap, silence is put in. A gap of more than an hour, or of more
    than the container's length, is a damaged time stamp.

    Channels are mixed with the standard weights of their places (ITU-R BS.775, low-frequency
    effects left out), those without a place equally. Where they cancel each other, the loudest is
    used instead, and a warning says so.

    An open file is read from its beginning and left open. One that cannot seek, or a named pipe, is
    copied to its end first, from where it is, into a temporary file if it is long.

    A damaged recording gives what could be decoded, and one warning in the log that says how much
    was damaged or is missing, so that a part is never passed off as the whole. A plain PCM file has
    nothing by which damage inside it could be noticed; an Ogg file that was cut off between two
    pages looks like a shorter one.

    Args:
        source: name of a file, bytes, or a file that was opened for reading bytes.
        sampling_rate: of the result, 2,000 to 3,072,000 Hz.
        channel: the only channel to read, from 1; all of them are mixed if left out.
        track: the audio track to read, by its number from 1 or its language ("en", "eng"); if left
            out the one that FFmpeg calls best, which heeds the container's default mark.

    Raises:
        AudioError: it is missing, a folder, not readable, not audio, has no samples, nothing of it
            can be decoded, its sampling rate is below 2,000 or above 3,072,000 Hz, it is too long,
            or has no such channel or track. The message names the file.
        OptionError: the rate, channel or track makes no sense for any recording.
    """
    return join_blocks(
        stream_audio(
            source,
            sampling_rate=sampling_rate,
            channel=channel,
            track=track,
            most_seconds=MOST_SECONDS_HELD,
        )
    )


def stream_audio(
    source: Source,
    *,
    sampling_rate: int = SAMPLING_RATE,
    block_seconds: float = 30.0,
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    track: int | str | None = None,
    most_seconds: float = MOST_SECONDS,
) -> Iterator[Samples]:
    """Decode `source` block by block, in memory that does not grow with its length.

    Joined, the blocks are what `load_audio` gives, from `start` to `end`. What is before `start` is
    decoded and dropped, since a codec's samples depend on what came before; what is behind `end` is
    not read.

    Args:
        source: as for `load_audio`.
        sampling_rate: of the result, 2,000 to 3,072,000 Hz.
        block_seconds: length of a block; only the last may be shorter.
        start, end: seconds of the recording to give, all of it if left out.
        channel, track: as for `load_audio`.
        most_seconds: refuse a recording that goes on for longer; a week if left out. Whoever keeps
            the blocks passes `MOST_SECONDS_HELD`, since hours of silence fit into a small file.

    Returns:
        Blocks of mono float32 samples `[T]` within [-1, 1], of which the caller owns the memory.

    Raises:
        OptionError: at once, if the rate or a length is out of range, `end` is not after `start`,
            or `channel` or `track` makes no sense.
        AudioError: with the first block, as `load_audio`, or where nothing is left from `start` on.
            That a recording is too long or not finite shows only when it was read so far, after
            blocks that were given already. Warnings come last, too.
    """
    if not LOWEST_RATE <= sampling_rate <= HIGHEST_RATE:
        raise OptionError(
            f"sampling_rate must be {LOWEST_RATE} to {HIGHEST_RATE} Hz, got {sampling_rate}"
        )
    size = _samples_of("block_seconds", block_seconds, sampling_rate)
    first = _samples_of("start", start, sampling_rate)
    last = None if end is None else _samples_of("end", end, sampling_rate)
    if size == 0:
        raise OptionError(f"block_seconds is {block_seconds}, less than one sample")
    if last is not None and last <= first:
        raise OptionError(f"end must be after start, but is {end} s, and start {start} s")
    if channel is not None and (type(channel) is not int or channel < 1):
        raise OptionError(f"channel must be 1 or more, got {channel!r}")
    check_track(track)
    decoding = Decoding(sampling_rate, first, last, ChannelMixer(channel), most_seconds)
    return _blocks(source, size, track, decoding)


def audio_tracks(source: Source) -> list[AudioTrack]:
    """List the audio tracks of a recording, in the order in which `track` counts them.

    Raises:
        AudioError: as `load_audio`, if it is not a recording.
    """
    with open_container(source) as recording:
        return tracks_of(recording.container)


def chosen_track(source: Source, track: int | str | None = None) -> AudioTrack:
    """Return the audio track that `load_audio` reads.

    Raises:
        AudioError: as `load_audio`, if it is not a recording or has no such track.
    """
    check_track(track)
    with open_container(source) as recording:
        return choose_track(recording.container, track, recording.name)[0]


def join_blocks(blocks: Iterable[Samples]) -> Samples:
    """Join blocks `[T]` of `stream_audio`, at least one, into one array."""
    found = list(blocks)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _samples_of(name: str, seconds: float, sampling_rate: int) -> int:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise OptionError(f"{name} must be seconds, not negative, got {seconds}")
    return round(seconds * sampling_rate)


def _blocks(
    source: Source, size: int, track: int | str | None, decoding: Decoding
) -> Iterator[Samples]:
    with open_container(source) as recording:
        chosen, stream = choose_track(recording.container, track, recording.name)
        for block in _regrouped(decoding.run(recording, stream), size):
            if not np.isfinite(block).all():
                raise AudioError(f"{recording.name}: holds samples that are not finite numbers")
            yield np.clip(block, -1.0, 1.0, out=block)
        decoding.report(recording, chosen)


def _regrouped(pieces: Iterable[Samples], size: int) -> Iterator[Samples]:
    """New arrays of `size` samples each, the last with what is left."""
    kept: list[Samples] = []
    missing = size
    for piece in pieces:
        while len(piece) >= missing:
            yield np.concatenate([*kept, piece[:missing]])
            kept, piece, missing = [], piece[missing:], size
        kept.append(piece)
        missing -= len(piece)
    if missing < size:
        yield np.concatenate(kept)
