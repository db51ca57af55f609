"""Where sound belongs in a recording's time: presentation time stamps, and the gaps they show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Frame = TypeVar("Frame")

# Seconds by which time stamps may run ahead of the samples before silence is put in: containers
# round them, network recorders stamp packets as they arrive, and some decoders give nothing for the
# first packet (128 ms, at 8 kHz).
TOLERANCE = 0.15
# Seconds that time stamps may lie back (overlapping packets) before a new clock is assumed.
BACKWARD = 1.0
# Seconds of frames without a time stamp to wait for one that confirms a jump.
_LOOK_AHEAD = 10.0
# Limits of silence, in seconds: one gap, all gaps, and all gaps beyond the announced length.
LONGEST_GAP = 3600.0
MOST_SILENCE = 3 * 3600.0
MOST_UNANNOUNCED_SILENCE = 600.0


@dataclass(slots=True)
class Timeline(Generic[Frame]):
    """Place frames by their time stamps.

    A jump of time stamps counts once the next one confirms it: a single wrong one moves nothing.
    Forward it is a gap, if it is not too long to be true; backward it is another clock, as where
    recordings were joined, and what follows is placed right after what came before.

    Args:
        origin: time stamp, in seconds, at which the whole container begins; None for the first
            frame's.
        announced: length of the whole container in seconds, if it is known.

    Attributes:
        position: seconds of sound and silence placed so far.
        lead: seconds of silence before the first frame.
        silence: seconds of silence in all gaps.
        wrong: number of time stamps that make no sense.
    """

    origin: float | None = None
    announced: float | None = None
    position: float = 0.0
    lead: float = 0.0
    silence: float = 0.0
    wrong: int = 0
    _pending: list[tuple[Frame, float]] = field(default_factory=list)
    _pending_time: float = 0.0

    def place(
        self, frames: Iterable[tuple[Frame, float | None, float]]
    ) -> Iterator[tuple[Frame, float]]:
        """Yield every frame with the seconds of silence that belong before it.

        Args:
            frames: frames in order, each with its time stamp in seconds, if it has one, and its
                length in seconds.
        """
        for frame, time, length in frames:
            if self.origin is None and time is not None:
                self.origin = time - self.position
            if self._pending:
                waited = sum(length for _, length in self._pending)
                if time is None and waited < _LOOK_AHEAD:
                    self._pending.append((frame, length))
                    continue
                confirmed = (
                    time is not None and abs(time - self._pending_time - waited) <= TOLERANCE
                )
                yield from self._settle(confirmed)
            late = 0.0 if time is None else self._lateness(time)
            if -BACKWARD <= late <= TOLERANCE:
                self.position += length
                yield frame, 0.0
            else:
                assert time is not None
                self._pending, self._pending_time = [(frame, length)], time
        if self._pending:
            yield from self._settle(confirmed=True)

    def _lateness(self, time: float) -> float:
        assert self.origin is not None
        return time - self.origin - self.position

    def _settle(self, confirmed: bool) -> Iterator[tuple[Frame, float]]:
        assert self.origin is not None
        late, gap = self._lateness(self._pending_time), 0.0
        if not confirmed:
            self.wrong += abs(late) > BACKWARD  # less than that is jitter
        elif late < 0:
            self.origin += late
        elif self._is_plausible(late):
            gap = late
            self.lead = gap if self.position == 0 else self.lead
            self.silence += gap
        else:
            self.wrong += 1
            self.origin += late
        pending, self._pending = self._pending, []
        for frame, length in pending:
            self.position += gap + length
            yield frame, gap
            gap = 0.0

    def _is_plausible(self, gap: float) -> bool:
        if gap > LONGEST_GAP or self.silence + gap > MOST_SILENCE:
            return False
        end = self.position + gap
        is_announced = self.announced is not None and end <= self.announced + BACKWARD
        return is_announced or self.silence + gap <= MOST_UNANNOUNCED_SILENCE
