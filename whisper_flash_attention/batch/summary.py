"""What a run came to: `summary.json`, written last, and the table that is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from whisper_flash_attention.batch.manifest import Rejected
from whisper_flash_attention.batch.results import SUMMARY
from whisper_flash_attention.batch.rows import Tally
from whisper_flash_attention.batch.shards import write_whole
from whisper_flash_attention.terminal import printable

SHOWN_REJECTED = 1_000


@dataclass(frozen=True, slots=True)
class Summary:
    """The state of an archive after a run. A folder has one only after a run that came to its end.

    Args:
        items: recordings in the archive.
        done: of the shards' rows, those without an error; of all runs together.
        failed: of the shards' rows, those with an error.
        remaining: recordings of the archive without a row: those that `limit` left out.
        rejected: rows of the manifest that name no recording.
        audio_hours: of what is done.
        errors: how many there are of each kind.
        run_files: rows that this run added.
        run_audio_hours: of these.
        run_seconds: how long this run took, start and end included.
        rejected_rows: the first of the rejected rows, with their reasons.
    """

    items: int
    done: int
    failed: int
    remaining: int
    rejected: int
    audio_hours: float
    errors: Mapping[str, int]
    run_files: int
    run_audio_hours: float
    run_seconds: float
    rejected_rows: tuple[Rejected, ...] = field(default=(), repr=False)

    @property
    def times_real(self) -> float:
        """How many times faster than real time this run was, all in all."""
        return self.run_audio_hours * 3_600 / self.run_seconds if self.run_seconds else 0.0

    @property
    def all_well(self) -> bool:
        """Whether no recording failed and no row was rejected."""
        return not self.failed and not self.rejected

    def write(self, folder: Path) -> None:
        """Write `summary.json`. Raises `BatchError` if it cannot be written."""
        fields = asdict(self) | {"times_real": self.times_real}
        write_whole(folder / SUMMARY, json.dumps(fields, indent=1).encode() + b"\n")

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(show_header=False, box=None)
        table.add_row("recordings", f"{self.items}")
        table.add_row("done", f"{self.done} ({self.audio_hours:.2f} h of audio)")
        for kind, count in sorted(self.errors.items()):
            table.add_row("failed", Text(printable(f"{count} {kind}")))
        if self.rejected:
            table.add_row("rejected", f"{self.rejected} rows of the manifest")
        if self.remaining:
            table.add_row("left", f"{self.remaining}")
        ran = (
            f"{self.run_files} recordings, {self.run_audio_hours:.2f} h in {self.run_seconds:.1f} s"
        )
        table.add_row("this run", f"{ran}: {self.times_real:.1f} x real time")
        return table


def summarize(
    items: int, rejected: list[Rejected], remaining: int, whole: Tally, run: Tally, seconds: float
) -> Summary:
    """Put a summary together from what all shards (`whole`) and this run (`run`) add up to."""
    return Summary(
        items=items,
        done=whole.done,
        failed=whole.failed,
        remaining=remaining,
        rejected=len(rejected),
        audio_hours=whole.audio_seconds / 3_600,
        errors=dict(whole.kinds),
        run_files=run.done + run.failed,
        run_audio_hours=run.audio_seconds / 3_600,
        run_seconds=seconds,
        rejected_rows=tuple(rejected[:SHOWN_REJECTED]),
    )
