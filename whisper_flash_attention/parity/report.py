"""The report of a comparison: table, differences, word error rates, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.parity.cases import Clips
from whisper_flash_attention.parity.compare import (
    EXPLAINED,
    FAILED,
    IDENTICAL,
    LANGUAGE,
    UNEXPLAINED,
    Outcome,
    Row,
)
from whisper_flash_attention.terminal import print_line, printable


@dataclass(slots=True)
class WordErrors:
    """Word errors over several texts: substitutions, insertions and deletions, and words in all."""

    errors: int = 0
    words: int = 0

    def add(self, reference: str, found: str) -> None:
        """Count one pair of normalised texts."""
        wanted = reference.split()
        self.errors += edit_distance(wanted, found.split())
        self.words += len(wanted)

    @property
    def rate(self) -> float | None:
        """Errors per word of the references; None where those have no words."""
        return self.errors / self.words if self.words else None


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """Fewest substitutions, insertions and deletions from `first` to `second` (Levenshtein)."""
    row = list(range(len(second) + 1))
    for index, item in enumerate(first, start=1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(second, start=1):
            best = min(diagonal + (item != other), row[column] + 1, row[column - 1] + 1)
            diagonal, row[column] = row[column], best
    return row[-1]


MOST_LISTED = 40


@dataclass
class Summary:
    """One mode's line of the table.

    Attributes:
        counts: recordings by status.
        smallest_gap: smallest distance between the two best scores over all recordings.
        text: our words against stock's.
        spoken: stock's and our words against the transcripts.
        like_float32: number of recordings equal to stock's in float32, of stock and of ours; None
            if that is the dtype.
    """

    mode: str
    counts: dict[str, int]
    smallest_gap: float | None
    text: WordErrors = field(default_factory=WordErrors)
    spoken: tuple[WordErrors, WordErrors] = field(
        default_factory=lambda: (WordErrors(), WordErrors())
    )
    like_float32: tuple[int, int] | None = None


@dataclass
class Report:
    """An outcome, with what is needed to present it.

    Attributes:
        facts: options and environment, for the JSON.
        bound: gap in logits that explains a difference in this dtype.
        clips: what was compared, and what was skipped.
        tokenizer: of the checkpoint; None if it has none.
    """

    outcome: Outcome
    clips: Clips
    facts: Mapping[str, Any]
    bound: float
    tokenizer: Any | None

    def summaries(self) -> list[Summary]:
        """A summary per mode that was run, the language's first."""
        modes = dict.fromkeys(row.mode for row in self.outcome.rows)
        return [self._summarise(mode) for mode in modes]

    def _summarise(self, mode: str) -> Summary:
        rows = [row for row in self.outcome.rows if row.mode == mode]
        statuses = [row.status for row in rows]
        gaps = [row.smallest_gap for row in rows if row.smallest_gap is not None]
        counts = {
            name: statuses.count(name) for name in (IDENTICAL, EXPLAINED, UNEXPLAINED, FAILED)
        }
        summary = Summary(mode, counts, min(gaps, default=None))
        if any(row.float32 is not None for row in rows):
            pairs = [(row.reference == row.float32, row.ours == row.float32) for row in rows]
            summary.like_float32 = (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs))
        if self.tokenizer is not None and mode != LANGUAGE:
            self._count_words(summary, rows)
        return summary

    def _count_words(self, summary: Summary, rows: Sequence[Row]) -> None:
        transcripts = {clip.name: clip.transcript for clip in self.clips.clips}
        for row in rows:
            texts = self._words(row.reference), self._words(row.ours)
            summary.text.add(*texts)
            spoken = transcripts[row.recording]
            if spoken is not None:
                for errors, text in zip(summary.spoken, texts, strict=True):
                    errors.add(self._normalised(spoken), text)

    def _words(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return self._normalised(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _normalised(self, text: str) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.basic_normalize(text))

    def token(self, number: int) -> str:
        """A token as its id and, where there is a tokenizer, its text."""
        if self.tokenizer is None:
            return str(number)
        return f"{number} {self.tokenizer.decode([number], decode_with_timestamps=True)!r}"

    def show(self, out: Console) -> None:
        """Print the table and the differences."""
        out.print(self._table())
        for mode, reason in self.outcome.not_comparable.items():
            print_line(out, f"{mode}: not comparable here: {reason}")
        if self.clips.skipped:
            print_line(out, f"skipped: {len(self.clips.skipped)} that could not be read")
        errors = self.outcome.logit_errors
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            print_line(
                out,
                f"largest difference of a log-probability, given stock's text: {errors[worst]:.2g} "
                f"({worst})",
            )
        differing = [row for row in self.outcome.rows if row.status != IDENTICAL]
        differing.sort(key=lambda row: row.status == EXPLAINED)
        for row in differing[:MOST_LISTED]:
            print_line(out, self._line(row))
        if len(differing) > MOST_LISTED:
            print_line(out, f"and {len(differing) - MOST_LISTED} more; --output lists all")
        print_line(out, self._verdict())

    def _table(self) -> Table:
        columns: dict[str, Callable[[Summary], str]] = {
            "Mode": lambda s: s.mode,
            "Recordings": lambda s: str(sum(s.counts.values())),
            "Identical": lambda s: str(s.counts[IDENTICAL]),
            "Explained": lambda s: str(s.counts[EXPLAINED]),
            "Unexplained": lambda s: str(s.counts[UNEXPLAINED]),
            "Failed": lambda s: str(s.counts[FAILED]),
            "Smallest gap": lambda s: "" if s.smallest_gap is None else f"{s.smallest_gap:.2g}",
            "As float32: stock, ours": lambda s: _pair(s.like_float32),
            "WER ours to stock": lambda s: _percent(s.text.rate),
            "WER stock": lambda s: _percent(s.spoken[0].rate),
            "WER ours": lambda s: _percent(s.spoken[1].rate),
        }
        facts = self.facts
        title = f"{facts['model']}, {facts['dtype']} on {facts['device']}, ours against stock"
        rows = self.summaries()
        cells = {name: [show(row) for row in rows] for name, show in columns.items()}
        table = Table(title=Text(printable(title)), title_justify="left")
        kept = [name for name, column in cells.items() if any(column)]
        for name in kept:
            table.add_column(name, justify="left" if name == "Mode" else "right")
        for index in range(len(rows)):
            table.add_row(*(cells[name][index] for name in kept))
        return table

    def _line(self, row: Row) -> str:
        start = f"{row.status}: {row.mode}, {row.recording}"
        if row.failure is not None:
            return f"{start}: {row.failure}"
        assert row.tokens is not None and row.tie is not None
        reference, ours = (self.token(token) for token in row.tokens)
        return (
            f"{start}, position {row.position}: stock {reference}, ours {ours}; "
            f"gap {row.tie.gap:.3g} ({row.tie.what}), explained up to {row.tie.bound:.3g}"
        )

    def _verdict(self) -> str:
        rows = self.outcome.rows
        bad = sum(row.status in (UNEXPLAINED, FAILED) for row in rows)
        if bad:
            return f"NOT the same: {bad} of {len(rows)} results are unexplained or failed"
        ties = sum(row.status == EXPLAINED for row in rows)
        near = f", {ties} differ at near-ties" if ties else ""
        return f"the same: {len(rows) - ties} of {len(rows)} results identical{near}"

    def write(self, path: Path) -> None:
        """Write everything as JSON; numbers that are not finite become null.

        Raises:
            OptionError: the file cannot be written.
        """
        content = {
            **self.facts,
            "bound": self.bound,
            "same": self.outcome.is_good,
            "summary": [
                {
                    "mode": summary.mode,
                    **summary.counts,
                    "smallest_gap": summary.smallest_gap,
                    "wer_ours_to_stock": summary.text.rate,
                    "wer_stock": summary.spoken[0].rate,
                    "wer_ours": summary.spoken[1].rate,
                    "like_float32": summary.like_float32,
                }
                for summary in self.summaries()
            ],
            "not_comparable": self.outcome.not_comparable,
            "skipped": self.clips.skipped,
            "languages": self.outcome.languages,
            "logit_errors": self.outcome.logit_errors,
            "results": [
                {**asdict(row), "tie": row.tie and asdict(row.tie)} for row in self.outcome.rows
            ],
        }
        text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
        try:
            # Bytes of a name that are not UTF-8 become escapes, as JSON has them.
            path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise OptionError(f"{path}: cannot be written ({error.strerror})") from error


def _pair(numbers: tuple[int, int] | None) -> str:
    return "" if numbers is None else f"{numbers[0]}, {numbers[1]}"


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2f} %"


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
