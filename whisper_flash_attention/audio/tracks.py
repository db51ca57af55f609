"""The audio tracks of a recording, and which one is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from whisper_flash_attention.audio.languages import language_key
from whisper_flash_attention.audio.pyav import keep_layout
from whisper_flash_attention.errors import AudioError, OptionError

if TYPE_CHECKING:
    from av import AudioStream
    from av.container import InputContainer


@dataclass(frozen=True, slots=True)
class AudioTrack:
    """One audio track of a recording, as its container describes it.

    Args:
        number: its place among the audio tracks, from 1.
        codec: FFmpeg's name of the decoder ("aac", "opus"), or "unknown".
        language: the tag in the container ("eng", "de"), if there is one.
        title: the track's title, if there is one.
        channels: number of channels; 0 if the container does not know.
        layout: FFmpeg's name of the channel layout ("stereo", "5.1(side)").
        rate: sampling rate in Hz; 0 if the container does not know.
        seconds: length, where the container announces one for this track.
        default: whether the container marks it as the one to play.
    """

    number: int
    codec: str
    language: str | None
    title: str | None
    channels: int
    layout: str
    rate: int
    seconds: float | None
    default: bool

    def __str__(self) -> str:
        parts = [f"{self.number}: {self.codec}", self.language or "no language"]
        parts += [repr(self.title)] * (self.title is not None)
        parts += [f"{self.channels} channel{'' if self.channels == 1 else 's'} ({self.layout})"]
        parts += [f"{self.rate} Hz"]
        parts += [f"{self.seconds:.1f} s"] * (self.seconds is not None)
        parts += ["default"] * self.default
        return ", ".join(parts)


def check_track(track: int | str | None) -> None:
    """Raise `OptionError` if `track` can be neither a number nor a language tag."""
    if isinstance(track, bool) or not isinstance(track, int | str | None):
        raise OptionError(f"track must be a number or a language, got {track!r}")
    if (isinstance(track, int) and track < 1) or (isinstance(track, str) and not track.strip()):
        raise OptionError(f"track must be 1 or more, or a language such as 'en', got {track!r}")


def tracks_of(container: InputContainer) -> list[AudioTrack]:
    """List the audio tracks of an open container, in its order."""
    return [_describe(number, each) for number, each in enumerate(container.streams.audio, 1)]


def choose_track(
    container: InputContainer, track: int | str | None, name: str
) -> tuple[AudioTrack, AudioStream]:
    """Return the track to read.

    Args:
        track: its number from 1, a language tag, or None for the one that FFmpeg calls best. Of
            several tracks in one language the one marked as default, or else the first, is taken.
        name: of the recording, for messages.

    Raises:
        AudioError: there is no such track, or none that can be decoded. The message lists the
            tracks, one a line.
    """
    tracks = tracks_of(container)
    if not tracks:
        raise AudioError(f"{name}: there is no audio stream that can be decoded")
    if track is None:
        best = container.streams.best("audio")
        chosen = next(
            (each for each in tracks if container.streams.audio[each.number - 1] is best), None
        )
        if chosen is None:  # FFmpeg's best is one without a decoder only if all are
            raise AudioError(f"{name}: there is no audio stream that can be decoded")
    elif isinstance(track, int):
        if track > len(tracks):
            raise AudioError(f"{name}: there is no audio track {track}; {listing(tracks)}")
        chosen = tracks[track - 1]
    else:
        wanted = language_key(track)
        found = [each for each in tracks if each.language and language_key(each.language) == wanted]
        if not found:
            raise AudioError(f"{name}: there is no audio track in {track!r}; {listing(tracks)}")
        chosen = next((each for each in found if each.default), found[0])
    stream = container.streams.audio[chosen.number - 1]
    if stream.codec_context is None:
        raise AudioError(f"{name}: audio track {chosen.number} has a codec that cannot be decoded")
    return chosen, stream


def listing(tracks: list[AudioTrack]) -> str:
    """What messages say of the tracks that there are: one line each."""
    return "its audio tracks are\n" + "\n".join(f"  {each}" for each in tracks)


def _describe(number: int, stream: AudioStream) -> AudioTrack:
    from av.stream import Disposition

    context = stream.codec_context
    layout = None if context is None else keep_layout(context.layout)
    return AudioTrack(
        number=number,
        codec="unknown" if context is None else context.name,
        language=_tag(stream, "language"),
        title=_tag(stream, "title"),
        channels=0 if layout is None else layout.nb_channels,
        layout="unknown" if layout is None else layout.name,
        rate=0 if context is None else context.sample_rate or 0,
        seconds=_seconds(stream),
        default=bool(Disposition(stream.disposition) & Disposition.default),
    )


def _tag(stream: AudioStream, key: str) -> str | None:
    """A text from the container, in printable characters; None for one that says nothing."""
    text = stream.metadata.get(key, "")
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    text = text.strip()
    return None if not text or (key == "language" and text.lower() == "und") else text[:200]


def _seconds(stream: AudioStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Matroska has no field for it; most writers add this tag.
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
