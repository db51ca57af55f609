"""One recording of an archive, as it travels between the stages."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.languages import AUTO, language_or_auto
from whisper_flash_attention.option_kinds import checked_channel, checked_track
from whisper_flash_attention.options import TASKS

# About 30 years. Sums of lengths stay finite, and numbers of samples stay whole numbers.
MOST_SECONDS = 1e9
# A guess at a recording's length from its size, for the order of work and the time left: 128 kbit/s
# of mp3 are 16 kB/s. Nothing else rests on it.
BYTES_PER_SECOND = 16_000


@dataclass(frozen=True, slots=True)
class Item:
    """What is to be transcribed.

    Args:
        id: by which results are found, unique in the archive.
        path: a local file, or a URL that fsspec opens.
        language: name or code, kept as its code, or auto; None leaves it to the run's options.
        task: "transcribe" or "translate"; None leaves it to the run's options.
        prompt: text that stands for earlier context; None leaves it to the run's options.
        start, end: the part of the recording to transcribe, in seconds; all of it if left out.
        seconds: its length as far as it is known without opening it.
        channel, audio_track: what is read of it, as in `TranscribeOptions`; None leaves it to the
            run's options.

    Raises:
        OptionError: a value that makes no sense.
    """

    id: str
    path: str
    language: str | None = None
    task: str | None = None
    prompt: str | None = None
    start: float = 0.0
    end: float | None = None
    seconds: float | None = None
    channel: int | str | None = None
    audio_track: int | str | None = None

    def __post_init__(self) -> None:
        if not self.id:
            raise OptionError("the id is missing")
        if not self.path:
            raise OptionError("the path is missing")
        if _SURROGATE.search(self.id):
            raise OptionError(f"the id is not UTF-8: {self.id!r}")
        if "\0" in self.path:
            raise OptionError(f"the path holds a NUL, which no path may: {self.path!r}")
        if self.language is not None:
            object.__setattr__(self, "language", _code(self.language))
        check.optional(check.one_of, "task", self.task, TASKS)
        if self.channel is not None:
            object.__setattr__(self, "channel", checked_channel(self.channel))
        object.__setattr__(self, "audio_track", checked_track(self.audio_track))
        for name in ("start", "end", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST_SECONDS:  # NaN is not, either
                raise OptionError(f"{name} must be seconds, 0 to {MOST_SECONDS:g}, but is {value}")
        if self.end is not None and self.end <= self.start:
            raise OptionError(f"end must be after start, but is {self.end} s, start {self.start} s")

    @property
    def expected_seconds(self) -> float | None:
        """Seconds of audio to transcribe, as far as they are known without opening it."""
        if self.end is not None:
            return self.end - self.start
        return None if self.seconds is None else max(0.0, self.seconds - self.start)

    def to_json(self) -> str:
        """Return a line that `from_json` makes an equal item of."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Item:
        """Rebuild what `to_json` gave."""
        return cls(**json.loads(line))


def longest_first(items: list[Item]) -> list[Item]:
    """The order of work: no long recording is left for the end, when the other workers are idle.

    Those of unknown length come last, in the order in which they were given.
    """
    return sorted(items, key=lambda item: -(item.expected_seconds or 0.0))


_SURROGATE = re.compile("[\ud800-\udfff]")


# Manifests name a few languages many times.
@cache
def _code(language: str) -> str:
    return language_or_auto(language) or AUTO
