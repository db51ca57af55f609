"""What a run does with every recording, as engines receive it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.decoder_pool import DECODE_TIMEOUT, STREAM_AUDIO
from whisper_flash_attention.audio.vad import WINDOW_SECONDS
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.model import Opener, RunOptions

ENGINES = ("local", "ray")
# Of a small archive, too, every model gets a share, and none waits long for the last one.
GROUPS_EACH = 4


@dataclass(frozen=True, slots=True)
class Work:
    """The model, the options, and how many recordings it gets at a time.

    Args:
        opener: of the model.
        run_options: for every recording without options of its own.
        group_hours: hours of audio that are transcribed side by side, and held in memory; 1 hour of
            samples is 0.23 GB. A recording that is longer is transcribed alone.
        group_files: the most recordings side by side; None is some times more than are decoded at a
            time.
        workers: engine "local": processes that decode; engine "ray": models. None chooses.
        decode_timeout: seconds without progress after which decoding a recording is given up.
        decode: name of the function that decodes, as for `DecoderPool`.

    Raises:
        OptionError: a number makes no sense.
    """

    opener: Opener
    run_options: RunOptions = field(default_factory=RunOptions)
    group_hours: float = 4.0
    group_files: int | None = None
    workers: int | None = None
    decode_timeout: float = DECODE_TIMEOUT
    decode: str = STREAM_AUDIO

    def __post_init__(self) -> None:
        for name, unit in (("group_hours", "hours"), ("decode_timeout", "seconds")):
            number = check.number(name, getattr(self, name), f"{unit}, more than 0", above=0)
            object.__setattr__(self, name, number)
        for name in ("group_files", "workers"):
            count = check.optional(check.whole_number, name, getattr(self, name), least=1)
            object.__setattr__(self, name, count)

    @property
    def most_files(self) -> int:
        """The most recordings of a group."""
        return self.group_files or 4 * self.run_options.batch_size

    @property
    def most_seconds(self) -> float:
        """Seconds of audio with which a group is complete."""
        return 3_600 * self.group_hours

    def has_room(self, seconds: float, beside: Sequence[float]) -> bool:
        """Whether a recording of this length may be transcribed beside others of these lengths.

        A batch that is prepared, one in work, and one whose text is late have room in any case.
        """
        if self.group_files is not None and len(beside) >= self.group_files:
            return False
        least = 4 * WINDOW_SECONDS * self.run_options.batch_size
        return seconds + sum(beside) <= max(self.most_seconds, least)

    def alone(self) -> Work:
        """The same with each recording as a group of its own."""
        return replace(self, group_files=1)

    def shared(self, items: Sequence[Item], workers: int) -> Work:
        """The same with groups so small that there are `GROUPS_EACH` for each of several models."""
        groups = GROUPS_EACH * workers
        hours = sum(item.expected_seconds or 0.0 for item in items) / 3_600 / groups
        return replace(
            self,
            group_hours=min(self.group_hours, hours) if hours else self.group_hours,
            group_files=min(self.most_files, math.ceil(len(items) / groups)),
        )
