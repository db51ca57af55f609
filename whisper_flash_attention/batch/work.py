"""What a run does with every recording, as an engine is told it."""

from __future__ import annotations

from dataclasses import dataclass, field

from whisper_flash_attention.batch.model import Asked, Opener
from whisper_flash_attention.errors import OptionError

ENGINES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Work:
    """The model, what is asked of it, and how many recordings it sees at a time.

    Args:
        opener: of the model.
        asked: of every recording that asks for nothing else.
        group_hours: hours of audio that are transcribed side by side, and held in memory; 1 hour of
            samples is 0.23 GB. A recording that is longer is a group of its own.
        workers: engine "local": threads that decode ahead; engine "ray": models. None chooses.
        alone: whether each recording is a group of its own.

    Raises:
        OptionError: a number makes no sense.
    """

    opener: Opener
    asked: Asked = field(default_factory=Asked)
    group_hours: float = 4.0
    workers: int | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.group_hours > 0:
            raise OptionError(f"group_hours must be more than 0, got {self.group_hours}")
        for name, number in (("workers", self.workers), ("batch_size", self.asked.batch_size)):
            if number is not None and number < 1:
                raise OptionError(f"{name} must be at least 1, got {number}")

    @property
    def group_files(self) -> int:
        """The most recordings of a group: some times more than are decoded at a time."""
        return 1 if self.alone else 4 * self.asked.batch_size

    @property
    def group_seconds(self) -> float:
        """Seconds of audio of a group."""
        return 3_600 * self.group_hours
